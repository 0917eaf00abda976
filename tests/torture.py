"""Kills training (SIGKILL) at random moments and inside every write, goes on, and compares with a run that nobody disturbed, to the bit.

    make torture                                   # 30 random moments of each run, every write, chains of kills; results/torture.json
    make torture ARGS='--random 5 --seed 3'

Children are forked from this process, which has imported relvit and trained nothing; a few are new interpreters (`relvit`). A child that is
to die inside a write kills itself there: `Moments` stands before os.mkdir, os.fsync and os.replace, through which every file of a run goes.
Works on Linux (fork, /proc). Exit code 1 where anything differs, with the name of the tensor."""
import argparse, json, os, random, signal, subprocess, sys, tempfile, time, traceback
from collections import Counter
from pathlib import Path

os.environ.setdefault('OMP_NUM_THREADS', '1') # a process with torch's threads cannot be forked
os.environ.setdefault('MPLBACKEND', 'Agg')

from safetensors.torch import load_file
from tqdm import tqdm

from relvit.checkpoint import read_meta, write_whole
from relvit.runs import Run, provenance
from relvit.training import Pretrain, load_model, train

tiny = dict(encoder='vit_tiny_patch16_224', bs=16, epochs=3, steps=5, device='cpu')
sizes = 'embed_dim=24', 'depth=1', 'num_heads=2'
widths = 'dino.hidden=16', 'dino.bottleneck=8', 'dino.out=16', 'selfpatch.hidden=16', 'selfpatch.bottleneck=8', 'selfpatch.out=16'
RUNS = dict(
    relvit=Pretrain(**tiny, encoder_args=(*sizes, 'drop_path_rate=.2'), permute=True, mega=3),
    hosts=Pretrain(**tiny, encoder_args=(*sizes, 'cls=false'), recipe='dino', recipe_args=('locals=2',),
                   tasks=('dino', 'selfpatch', 'pixel', 'channel'), task_args=widths))


RESUMING = 'half of metrics.jsonl', 'before moving metrics.jsonl', 'after moving metrics.jsonl' # what the state does not know is forgotten
FIRST = 'half of metrics.jsonl', 'after moving best.safetensors', 'half of last.safetensors'
GOES_ON, UNBEGUN = 'while a run goes on: ', 'before any state: '


def die(): os.kill(os.getpid(), signal.SIGKILL)


class Moments:
    "Notes every moment of a process at which a file of a run is made; kills the process at the n-th time of one"
    def __init__(self, folder, fatal=None, n=1, note=None):
        self.folder, self.fatal, self.n, self.note, self.seen = str(folder), fatal, n, note, Counter()
        fsync, replace, mkdir = os.fsync, os.replace, os.mkdir

        def sync(fd):
            path = Path(os.readlink(f'/proc/self/fd/{fd}'))
            grows = not path.parent.name.startswith('.') # line by line; other files are written in a hidden folder with their name
            if path.is_file() and self.at(path if grows else path.parent.with_name(path.parent.name[1:].rpartition('.')[0]), 'half of'):
                kept = path.read_bytes().rfind(b'\n', 0, -1) + 1 if grows else 0
                os.truncate(path, (kept + path.stat().st_size)//2)
                die()
            fsync(fd)
        def move(a, b):
            if self.at(b, 'before moving'): die()
            replace(a, b)
            if self.at(b, 'after moving'): die()
        def make(path, *args, **kwargs):
            mkdir(path, *args, **kwargs)
            if Path(path).name[:1] != '.' and self.at(path, 'made folder'): die()
        os.fsync, os.replace, os.mkdir = sync, move, make

    def at(self, path, what):
        path = str(path)
        if not path.startswith(self.folder): return False
        moment = f'{what} {Path(path).name if path != self.folder else "run"}'
        self.seen[moment] += 1
        if self.note:
            with open(self.note, 'a') as f: f.write(moment + '\n')
        return moment == self.fatal and self.seen[moment] == self.n


def fork(work, kill_after=None) -> int:
    "Do something in a process of its own; its exit code, -9 if it was killed"
    sys.stdout.flush(), sys.stderr.flush()
    if not (pid := os.fork()):
        try: work(); os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    if kill_after is not None:
        end = time.time() + kill_after
        while time.time() < end:
            if (done := os.waitpid(pid, os.WNOHANG))[0]: return os.waitstatus_to_exitcode(done[1])
            time.sleep(.002)
        os.kill(pid, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def go_on(c):
    "What a user does after a crash: resume; where there is no run yet, the same again"
    try: run = Run(folder(c))
    except FileNotFoundError: return train(c, tell='nothing')
    try: return train(resume=run.path, tell='nothing')
    except ValueError as e:
        if 'is finished' not in str(e): raise


def folder(c): return Path(c.out)/c.name


def readable(path):
    "What a killed process left can be read: every JSON file, every line of the record, every state"
    if not (path/'config.json').exists(): return
    run, epochs = Run(path), []
    assert run.config and run.environment and run.data and run.recipe and run.status
    epochs = [m['epoch'] for m in run.metrics]
    assert epochs == list(range(len(epochs))), f'epochs {epochs} in metrics.jsonl'
    for f in (run.last, run.best):
        if not f.exists(): continue
        assert load_file(f) and read_meta(f)['encoder'] and load_model(run, f.stem) is not None, f
    if run.last.exists(): assert read_meta(run.last)['place']['epoch'] <= len(epochs), 'the state knows of epochs that the record lost'


def differences(a, b) -> list[str]:
    "Where two finished runs differ: tensors, places, records, files"
    a, b, out = Run(a), Run(b), []
    told = lambda r: [{k: v for k, v in m.items() if k != 'seconds'} for m in r.metrics]
    if told(a) != told(b): out.append('metrics.jsonl: ' + next((f'epoch {i}, {k}: {x[k]} and {y[k]}' for i, (x, y) in enumerate(zip(told(a), told(b)))
                                                                for k in x if x[k] != y.get(k)), f'{len(told(a))} and {len(told(b))} epochs'))
    for f in 'last', 'best':
        x, y, p, q = *(load_file(getattr(r, f)) for r in (a, b)), *(read_meta(getattr(r, f)) for r in (a, b))
        out += [f'{f}: {n} is in one only' for n in x.keys() ^ y.keys()]
        out += [f'{f}: {n} differs by up to {(x[n].double() - y[n].double()).abs().max():.2g}' for n in x.keys() & y.keys() if not x[n].equal(y[n])]
        out += [f'{f}: {k} is {p.get(k)} and {q.get(k)}' for k in p.keys() | q.keys() if p.get(k) != q.get(k)]
    files = [{str(f.relative_to(r.path)) for f in r.path.rglob('*')} for r in (a, b)]
    return out + [f'{f} lies in one folder only' for f in sorted(files[0] ^ files[1])] + ['not finished']*(not b.summary)


class Torture:
    "One run of `RUNS` and what is done to it in `out`"
    def __init__(self, name, out, rng):
        self.c, self.rng, self.name, self.rows = RUNS[name].but(out=str(out), every=0.), rng, name, []
        whole, note = self.c.but(name=f'{name}-whole'), Path(out)/f'{name}.txt'
        def noted():
            Moments(folder(whole), note=note)
            go_on(whole)
        assert fork(noted) == 0
        self.whole, self.moments, self.n, began = folder(whole), Counter(note.read_text().splitlines()), 0, time.time()
        assert fork(lambda: go_on(self.c.but(name=f'{name}-timed', every=.1))) == 0
        self.seconds = time.time() - began

    def one(self, kind, deaths, every=0.):
        "Kill one run once for each of `deaths` (seconds, or (moment, n)), let it finish, compare"
        self.n += 1
        c, kills, bad = self.c.but(name=f'{self.name}-{self.n}', every=every), 0, []
        for death in deaths:
            if isinstance(death, tuple):
                def work():
                    Moments(folder(c), *death)
                    go_on(c)
                code = fork(work)
            else: code = fork(lambda: go_on(c), death)
            kills += code == -signal.SIGKILL
            if code not in (0, -signal.SIGKILL): bad.append(f'exit code {code}')
            if code == 0: break # it was done before its time came
            try: readable(folder(c))
            except Exception as e: bad.append(f'after a kill at {death}: {type(e).__name__}: {e}')
        if (code := fork(lambda: go_on(c))): bad.append(f'could not go on after {deaths}: exit code {code}')
        else: bad += differences(self.whole, folder(c))
        self.rows.append(dict(kind=kind, kills=kills, bad=bad))
        return kills


def interpreters(t, kills):
    "The command itself, in new interpreters, killed at random moments after its first state"
    c, relvit, sent = t.c.but(name=f'{t.name}-command', every=0.), str(Path(sys.executable).parent/'relvit'), 0
    values = [a for k, v in c.asdict().items() if k in ('encoder', 'bs', 'epochs', 'steps', 'device', 'every', 'out', 'name', 'recipe', 'mega') and v is not None
              for a in (f'--{k.replace("_", "-")}', str(v))]
    values += [a for k in ('encoder_args', 'recipe_args', 'tasks', 'task_args') if getattr(c, k) for a in (f'--{k.replace("_", "-")}', *getattr(c, k))]
    line, bad = [relvit, 'pretrain', *values, *(['--permute', 'True'] if c.permute else [])], []
    while not (folder(c)/'summary.json').exists() and not bad:
        p = subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        if sent < kills:
            state, start = folder(c)/'last.safetensors', time.time()
            old = state.stat().st_mtime_ns if state.exists() else 0
            while p.poll() is None and not (state.exists() and state.stat().st_mtime_ns > old) and time.time() < start + 120: time.sleep(.005)
            time.sleep(t.rng.uniform(0, .3))
            p.kill()
        said = p.communicate()[1]
        sent += p.returncode == -signal.SIGKILL
        if p.returncode not in (0, -signal.SIGKILL): bad.append(f'exit code {p.returncode}: {said[-500:]}')
        if not bad and (folder(c)/'config.json').exists(): line = [relvit, 'pretrain', '--resume', str(folder(c))]
    t.rows.append(dict(kind='the command, new interpreters', kills=sent, bad=bad or differences(t.whole, folder(c))))


def torture(name, out, rng, moments=30, each=1, chains=3, commands=2, only=None) -> Torture:
    "Everything that is done to one run"
    t = Torture(name, out, rng)
    inside, resuming, unbegun = ([m for m in ms if only is None or said + m in only] for said, ms in (('', t.moments), (GOES_ON, RESUMING), (UNBEGUN, FIRST)))
    bar = tqdm(desc=name, total=moments + each*len(inside) + chains + len(resuming) + len(unbegun), disable=None)
    for _ in range(moments):
        while not t.one('at random', [rng.uniform(0, t.seconds)], every=.1): t.rows.pop() # it had finished: another moment
        bar.update()
    for m in inside:
        for n in rng.sample(range(1, t.moments[m] + 1), min(each, t.moments[m])):
            t.one(m, [(m, n)])
            bar.update()
    for i in range(chains): # several in a row, of both sorts
        some = [rng.uniform(0, t.seconds*.7) if rng.random() < .5 else (m := rng.choice(list(t.moments)), rng.randint(1, t.moments[m])) for _ in range(5)]
        t.one('several in a row', some)
        bar.update()
    for m in resuming:
        t.one(GOES_ON + m, [('after moving best.safetensors', 1), (m, 1), (m, 1)])
        bar.update()
    for m in unbegun: # an epoch is told, but there is no state yet
        t.one(UNBEGUN + m, [(m, 1), (m, 1)], every=1e9)
        bar.update()
    if commands: interpreters(t, commands)
    bar.close()
    return t


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--runs', nargs='+', choices=RUNS, default=list(RUNS))
    p.add_argument('--random', type=int, default=30, help='moments by the clock, of each run')
    p.add_argument('--each', type=int, default=1, help='times that each kind of moment inside a write is tried')
    p.add_argument('--only', nargs='*', help='these kinds of moments; all')
    p.add_argument('--chains', type=int, default=3, help='runs that are killed several times in a row')
    p.add_argument('--commands', type=int, default=2, help='kills of the command itself, of each run')
    p.add_argument('--seed', type=int, default=0)
    p.add_argument('--record', help='JSON file')
    a = p.parse_args(argv)
    began, record = time.time(), {}
    print(f'seed {a.seed}', flush=True)
    for name in a.runs:
        with tempfile.TemporaryDirectory() as out:
            t = torture(name, out, random.Random(f'{a.seed} {name}'), a.random, a.each, a.chains, a.commands, a.only)
        kinds = {k: [r for r in t.rows if r['kind'] == k] for k in dict.fromkeys(r['kind'] for r in t.rows)}
        record[name] = {k: dict(runs=len(rs), kills=sum(r['kills'] for r in rs), same=sum(not r['bad'] for r in rs), bad=[b for r in rs for b in r['bad']])
                        for k, rs in kinds.items()}
        print(f'\n{name}: {t.c.epochs} epochs of {t.c.steps} steps{"":29}runs  kills  same to the bit')
        for k, v in record[name].items():
            print(f'  {k:<58}{v["runs"]:>4}{v["kills"]:>7}{v["same"]:>10}')
            for b in v['bad'][:5]: print(f'      {b}')
    total = {k: sum(v[k] for kinds in record.values() for v in kinds.values()) for k in ('runs', 'kills', 'same')}
    print(f'\n{total["kills"]} kills of {total["runs"]} runs, {total["same"]} of them the same as undisturbed; {time.time() - began:.0f} s')
    if a.record: write_whole(a.record, lambda f: Path(f).write_text(json.dumps(dict(provenance(), seed=a.seed, seconds=round(time.time() - began), **total, of=record), indent=1) + '\n'))
    return int(total['same'] < total['runs'])


if __name__ == '__main__': sys.exit(main())
