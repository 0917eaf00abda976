"""What it costs to import relvit, beside what it stands on: torch, timm and fastai.vision.

    python benchmarks/imports.py [--rounds 5] [--out results/benchmark_import.json]

First new processes, taking turns: the three libraries; relvit's package; its command line; every module of it, and so all that any of them
imports. Then what each module adds to the three, and to IPython, which every notebook's kernel has loaded: all of them in forked processes,
which shows their order, and the slowest in new processes, which is what counts. CPU seconds, with bytecode cached; the median over rounds.
Exit code 1 where every module takes more than 1.5 x the libraries, or one adds more than 0.3 s.
"""
import os
os.environ.setdefault('OMP_NUM_THREADS', '1')
os.environ.setdefault('MPLBACKEND', 'Agg')
import argparse, json, statistics, subprocess, sys
from multiprocessing import get_context
from pathlib import Path

root = Path(__file__).resolve().parents[1]
libraries = 'torch', 'timm', 'fastai.vision.all'
modules = sorted(f'relvit.{p.stem}' for p in (root/'relvit').glob('[!_]*.py'))
SIDES = {'torch, timm, fastai.vision': libraries, 'relvit': ['relvit'], 'relvit.cli': ['relvit.cli'], 'relvit.training': ['relvit.training'], 'every module of relvit': modules}
TIMES, MORE, SLOWEST = 1.5, .3, 5 # aims; how many are timed in new processes


def fresh(names, before=['sys']):
    "CPU seconds of a new interpreter that imports them, less what came before"
    code = f'import time, {", ".join(before)}\nstart = time.process_time()\nimport {", ".join(names)}\nprint(time.process_time() - start)'
    env = {k: v for k, v in os.environ.items() if k != 'PYTHONDONTWRITEBYTECODE'} # or the package would be compiled anew each time
    done = subprocess.run([sys.executable, '-W', 'ignore', '-c', code], cwd=root, env=env, check=True, stdout=subprocess.PIPE, text=True)
    return float(done.stdout.split()[-1])


def more(name):
    import importlib, time
    start = time.process_time()
    importlib.import_module(name)
    return time.process_time() - start


def send(pipe, name): pipe.send(more(name))


def forked(name, ctx):
    "CPU seconds that it adds to this process"
    here, there = ctx.Pipe(duplex=False)
    process = ctx.Process(target=send, args=(there, name))
    process.start()
    there.close()
    out = here.recv()
    process.join()
    return out


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--rounds', type=int, default=5)
    parser.add_argument('--out', help='write the figures as JSON')
    args = parser.parse_args()
    for names in (libraries, modules): fresh(names) # bytecode, matplotlib's fonts
    rounds = [{what: fresh(names) for what, names in SIDES.items()} for _ in range(args.rounds)]
    seconds = {what: statistics.median(r[what] for r in rounds) for what in SIDES}
    base, *_ = seconds.values()
    ratios = {what: statistics.median(r[what]/next(iter(r.values())) for r in rounds) for what in SIDES} # side by side: of a round
    for what, s in seconds.items(): print(f'{what:<28s} {s:6.2f} s  x {ratios[what]:5.2f}')

    import torch, timm, fastai.vision.all, IPython # noqa: F401
    ctx = get_context('fork')
    order = sorted(modules, key=lambda m: -forked(m, ctx))
    adds = {m: statistics.median(fresh([m], before=[*libraries, 'IPython']) for _ in range(args.rounds)) for m in order[:SLOWEST]}
    worst = sorted(adds, key=adds.get)[::-1]
    print(f'a module adds to them at most {adds[worst[0]]:.2f} s: ' + ', '.join(f'{m} {adds[m]:.2f}' for m in worst))
    if args.out:
        from relvit.checkpoint import write_whole
        from relvit.runs import provenance
        text = json.dumps(dict(seconds=seconds, ratios=ratios, adds={m: round(adds[m], 3) for m in worst}, aims=dict(times=TIMES, more=MORE),
                               rounds=args.rounds, **provenance()), indent=1)
        write_whole(args.out, lambda f: open(f, 'w').write(text + '\n'))
    return ratios['every module of relvit'] > TIMES or adds[worst[0]] > MORE


if __name__ == '__main__': sys.exit(main())
