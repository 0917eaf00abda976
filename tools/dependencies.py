"""The tests at the ends of what settings.ini admits: without nbdev and JupyterLab, in an environment of their own.

    python tools/dependencies.py lowest [pytest's arguments]     the lowest versions of every direct dependency, extras included
    python tools/dependencies.py newest [...]                    the newest that there are, extras included; the notebooks, too
    python tools/dependencies.py runtime [...]                   what is needed to run, and nothing else: no extra, no notebook's tools

The environment is .venv-NAME; the Python that runs this is its Python. What was resolved and how it went is written to
results/dependencies.json, an entry for each kind and Python (not where pytest got arguments: that is a part).
"""
import json, os, platform, re, subprocess, sys, time, venv
from configparser import ConfigParser
from pathlib import Path
from xml.etree import ElementTree

root = Path(__file__).resolve().parents[1]
results = root/'results/dependencies.json'
tests = ['pytest', 'hypothesis'] # what the tests themselves need
left_out = 'notebooks', 'house', 'site', 'lab' # they are about nbdev, Quarto and JupyterLab
pages = ['ipython', 'matplotlib-inline'] # what tools/notebooks.py needs to run pages
kinds = dict(lowest=['--resolution', 'lowest-direct'], newest=[], runtime=[])


def settings():
    config = ConfigParser(delimiters=['='])
    config.read(root/'settings.ini', encoding='utf-8')
    return config['DEFAULT']


def extras():
    "Those of a user"
    return [k.removesuffix('_requirements') for k in settings() if k.endswith('_requirements') and not re.match('dev|mutants', k)]


def direct():
    "Names of the direct dependencies, extras included"
    cfg = settings()
    lines = [cfg['requirements'], *(cfg[f'{e}_requirements'] for e in extras())]
    return sorted({re.match(r'[\w-]+', r)[0] for line in lines for r in line.split()})


def environment(kind):
    "Make .venv-KIND. No pins: what is resolved is the question"
    home = root/f'.venv-{kind}'
    python = home/'bin/python'
    venv.create(home, clear=True, with_pip=True, symlinks=True)
    subprocess.run([python, '-m', 'pip', 'install', '--quiet', '--disable-pip-version-check', 'uv'], check=True)
    uv = [python, '-m', 'uv', 'pip']
    wanted = root/'setup.py', *(f'--extra={e}' for e in extras() if kind != 'runtime')
    pins = subprocess.run([*uv, 'compile', '--quiet', '--refresh-package=relvit', '--no-header', '--no-annotate', f'--python={python}', *kinds[kind], *wanted],
                          check=True, stdout=subprocess.PIPE, text=True, cwd=home).stdout
    (home/'pins.txt').write_text(pins) # the tests' own needs are met beside them, never by another version
    more = tests + pages*(kind == 'newest')
    subprocess.run([*uv, 'install', '--quiet', '--compile-bytecode', f'--python={python}', '-c', home/'pins.txt', '-r', home/'pins.txt',
                    *more, '-e', root], check=True)
    return python, sorted(line.split(' ')[0] for line in pins.splitlines() if '==' in line)


def run_tests(python, args, env):
    "Passed, failed, skipped (with reasons), seconds"
    out = python.parents[1]/'tests.xml'
    out.unlink(missing_ok=True)
    ignored = [f'--ignore=tests/test_{name}.py' for name in left_out]
    start = time.monotonic()
    subprocess.run([python, '-m', 'pytest', '-q', '-p', 'no:cacheprovider', f'--junitxml={out}', *ignored, *args], cwd=root, env=env)
    if not out.exists(): sys.exit('the tests did not run')
    cases = list(ElementTree.parse(out).iter('testcase'))
    bad = [f"{c.get('classname')}::{c.get('name')}" for c in cases if c.find('failure') is not None or c.find('error') is not None]
    skips = sorted({(c.get('classname'), re.sub(r'^.*?Skipped: ', '', c.find('skipped').get('message') or '')) for c in cases if c.find('skipped') is not None})
    skipped = sum(c.find('skipped') is not None for c in cases)
    return dict(passed=len(cases) - len(bad) - skipped, failed=len(bad), skipped=skipped, seconds=round(time.monotonic() - start),
                failures=bad, reasons=[f'{name}: {why}' for name, why in skips])


def run_pages(python, env):
    "The same of the notebooks, against the package"
    start = time.monotonic()
    done = subprocess.run([python, 'tools/notebooks.py', 'imported'], cwd=root, env=env, stdout=subprocess.PIPE, text=True)
    print(done.stdout)
    bad, good = (re.findall(rf'^(nbs/\S+) {word}\b', done.stdout, re.M) for word in ('FAILED', 'passed'))
    return dict(passed=len(good), failed=len(bad), seconds=round(time.monotonic() - start), failures=bad)


def provenance(python):
    code = 'import json; from relvit.runs import provenance; print(json.dumps(provenance()))'
    return json.loads(subprocess.run([python, '-W', 'ignore', '-c', code], check=True, stdout=subprocess.PIPE, text=True, cwd=root).stdout)


def main(kind, *args):
    python, versions = environment(kind)
    named, origin = dict(v.split('==') for v in versions), provenance(python)
    env = {k: v for k, v in os.environ.items() if k != 'PYTHONDONTWRITEBYTECODE'} | dict(OMP_NUM_THREADS='1', MPLBACKEND='Agg', RELVIT_PARTIAL='1')
    outcome = run_tests(python, args, env)
    if kind == 'newest' and not args: outcome['notebooks'] = run_pages(python, env)
    failed = outcome['failed'] + outcome.get('notebooks', {}).get('failed', 0)
    print(f"{kind}, Python {platform.python_version()}: {outcome['passed']} passed, {outcome['failed']} failed, {outcome['skipped']} skipped")
    if args: return failed
    of = {n: v for n in direct() if (v := named.get(n))}
    entry = dict(origin, platform=platform.platform(), direct=of, **outcome, resolved=versions)
    known = json.loads(results.read_text()) if results.exists() else {}
    minor = '.'.join(platform.python_version_tuple()[:2])
    results.write_text(json.dumps(dict(sorted((known | {f'{kind}, Python {minor}': entry}).items())), indent=1) + '\n')
    print(f'written to {results.relative_to(root)}')
    return failed


if __name__ == '__main__':
    if len(sys.argv) < 2 or sys.argv[1] not in kinds: sys.exit(__doc__)
    sys.exit(bool(main(*sys.argv[1:])))
