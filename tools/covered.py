"""Which lines of the package run: in tests/, and in the notebooks when they import the package (as they stand they never touch it).

    python tools/covered.py run tests|notebooks [pytest's arguments, or pages]   measure; about 20 and 15 minutes of one core
    python tools/covered.py report results/coverage.json    the table, and exit code 1 where both together are under 95 %

Processes that either starts are counted too, forked or not. Data lie in runs/coverage; with the tests', which test ran which line.
"""
import json, os, subprocess, sys, time
from pathlib import Path

from coverage import Coverage

root = Path(__file__).resolve().parents[1]
folder, enough = root/'runs/coverage', 95
asked = dict(
    tests=[sys.executable, 'tools/covered.py', 'pytest', '-q', *(f'--ignore=tests/test_{t}.py' for t in ('notebooks', 'site', 'lab'))],
    notebooks=[sys.executable, 'tools/notebooks.py', 'imported'])


def settings(kind):
    "Coverage's settings as a file: processes find it by the environment, at their start"
    folder.mkdir(parents=True, exist_ok=True)
    rc = folder/f'{kind}.rc'
    rc.write_text(f'[run]\ndata_file = {folder}/{kind}.data\nparallel = true\nconcurrency = thread, multiprocessing\n'
                  f'source = {root}/relvit\nomit = */_modidx.py\ndisable_warnings = no-data-collected, module-not-measured\n'
                  '[report]\nexclude_also =\n    if __name__ == .__main__.\n')
    return rc


def run(kind, *args):
    for old in folder.glob(f'{kind}.data*'): old.unlink()
    rc = settings(kind)
    told = [f'--junitxml={folder}/tests.xml']*(kind == 'tests') # how long each took
    done = subprocess.run([*asked[kind], *told, *args], cwd=root, env=dict(os.environ, COVERAGE_PROCESS_START=str(rc), PYTHONPATH=str(root)))
    time.sleep(5) # servers of processes end, and save, after their parents
    cov = Coverage(data_file=folder/f'{kind}.data', config_file=rc)
    cov.combine([str(folder)], strict=True)
    cov.save()
    return done.returncode


def ranges(lines):
    "'3-5, 9' for 3, 4, 5, 9"
    out = []
    for i in sorted(lines):
        if out and out[-1][1] == i - 1: out[-1][1] = i
        else: out.append([i, i])
    return ', '.join(str(a) if a == b else f'{a}-{b}' for a, b in out)


def count():
    "Of each module: its statements, and those that ran in either way"
    covs = {kind: Coverage(data_file=folder/f'{kind}.data', config_file=settings(kind)) for kind in asked}
    for c in covs.values(): c.load()
    for path in sorted((root/'relvit').glob('[!_]*.py')):
        lines, ran = None, {}
        for kind, c in covs.items():
            _, statements, _, missing, _ = c.analysis2(str(path))
            lines, ran[kind] = set(statements), set(statements) - set(missing)
        yield path.stem, lines, dict(ran, together=set.union(*ran.values()))


def report(out):
    modules, total = {}, {}
    for name, lines, ran in count():
        modules[name] = dict(lines=len(lines), **{k: round(100*len(v)/len(lines), 1) for k, v in ran.items()},
                             never=ranges(lines - ran['together']))
        for k, v in dict(ran, lines=lines).items(): total[k] = total.get(k, 0) + len(v)
    percent = {k: round(100*total[k]/total['lines'], 2) for k in (*asked, 'together')}
    print(f'{"":20}{"lines":>6}' + ''.join(f'{k:>11}' for k in percent) + '   never run')
    for name, m in modules.items(): print(f'{name:20}{m["lines"]:6}' + ''.join(f'{m[k]:11.1f}' for k in percent) + f'   {m["never"]}')
    print(f'{"all":20}{total["lines"]:6}' + ''.join(f'{v:11.2f}' for v in percent.values()))
    from relvit.runs import provenance
    Path(out).write_text(json.dumps(dict(provenance=provenance(), lines=total['lines'], percent=percent, modules=modules), indent=1) + '\n')
    return percent['together'] < enough


def pytest_runtest_protocol(item):
    "Which test runs which line; coverage's own way takes all that hypothesis runs for one test"
    if now := Coverage.current(): now.switch_context(item.nodeid)


if __name__ == '__main__':
    what, *args = sys.argv[1:] or ['']
    if what == 'pytest':
        import pytest
        sys.exit(pytest.main(args, [sys.modules['__main__']]))
    if what not in ('run', 'report') or not args: sys.exit(__doc__)
    sys.exit(run(*args) if what == 'run' else report(*args))
