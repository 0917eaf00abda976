"A clean clone installs into an empty environment, and works from anywhere: nothing of the checkout is needed, nothing but the package comes along."
import json, os, shutil, subprocess, sys, tarfile, zipfile
from pathlib import Path

import pytest

root = Path(__file__).resolve().parents[1]
uv = next((str(p) for p in (Path(sys.executable).parent/'uv', shutil.which('uv')) if p and Path(p).exists()), None)
pytestmark = pytest.mark.skipif(not uv, reason='pip install uv')


def do(*cmd, cwd, **env):
    "What it printed. Of the caller's environment no path of Python's"
    env = {k: v for k, v in os.environ.items() if k not in ('PYTHONPATH', 'PYTHONHOME', 'VIRTUAL_ENV', 'RELVIT_PARTIAL', 'PYTHONDONTWRITEBYTECODE')} | env
    done = subprocess.run([str(c) for c in cmd], cwd=cwd, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, f'{cmd}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}'
    return done.stdout


@pytest.fixture(scope='module')
def clone(tmp_path_factory):
    "What `git clone` gives, with the changes and new files of this working tree; where there is no .git, the files without what tools leave"
    there = tmp_path_factory.mktemp('clone')/'relvit'
    if not (root/'.git').exists():
        return shutil.copytree(root, there, ignore=shutil.ignore_patterns('.*', '__pycache__', '*.egg-info', '_docs', 'build', 'dist', 'runs', 'demo'))
    do('git', 'clone', '--quiet', root, there, cwd=root)
    for name in do('git', 'ls-files', '-cmo', '--exclude-standard', '-z', cwd=root).split('\0'):
        if (root/name).is_file():
            (there/name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(root/name, there/name)
        elif name: (there/name).unlink(missing_ok=True) # deleted
    return there


@pytest.fixture(scope='module')
def built(clone, tmp_path_factory):
    "The archive of sources, and the wheel that is made of it"
    out = tmp_path_factory.mktemp('dist')
    do(uv, 'build', '--quiet', '--python', sys.executable, '--out-dir', out, clone, cwd=out)
    return next(out.glob('*.tar.gz')), next(out.glob('*.whl'))


def contents(wheel, but=()):
    with zipfile.ZipFile(wheel) as z: return {n: z.read(n) for n in z.namelist() if not n.endswith(but)}


def test_the_wheel_holds_the_package_and_nothing_else(built, clone):
    names = set(contents(built[1]))
    package = {str(p.relative_to(clone)) for p in (clone/'relvit').rglob('*') if p.is_file() and '__pycache__' not in p.parts}
    assert {n for n in names if '.dist-info/' not in n} == package
    assert all(any(n.endswith(f'.dist-info/{f}') for n in names) for f in ('METADATA', 'RECORD', 'WHEEL', 'entry_points.txt', 'licenses/LICENSE'))


def test_the_wheel_of_the_sources_is_the_wheel_of_the_checkout(built, clone, tmp_path):
    do(uv, 'build', '--quiet', '--wheel', '--python', sys.executable, '--out-dir', tmp_path, clone, cwd=tmp_path)
    direct = contents(next(tmp_path.glob('*.whl')))
    assert direct == contents(built[1])
    with tarfile.open(built[0]) as t: held = {n.split('/', 1)[1] for n in t.getnames() if '/' in n}
    assert {'settings.ini', 'setup.py', 'README.md', 'LICENSE'} <= held
    assert not [n for n in held if n.startswith(('nbs/', 'runs/', 'results/', 'tests/fixtures', '.venv'))]


def test_an_empty_environment(clone, tmp_path_factory):
    "`pip install .`, then from elsewhere: import, help, the demo; the folder it is in is somebody's repository"
    there = tmp_path_factory.mktemp('empty')
    do(uv, 'venv', '--quiet', '--python', sys.executable, there/'env', cwd=there)
    bin = there/'env'/('Scripts' if os.name == 'nt' else 'bin')
    do(uv, 'pip', 'install', '--quiet', '--python', bin/'python', '-c', 'constraints.txt', '.', cwd=clone)
    shutil.rmtree(clone) # whoever needs it still fails
    do('git', 'init', '--quiet', cwd=there)
    do('git', '-c', 'user.name=x', '-c', 'user.email=x@example.org', 'commit', '--quiet', '--allow-empty', '-m', 'theirs', cwd=there)
    said = do(bin/'relvit', '--help', cwd=there)
    assert 'pretrain' in said and 'doctor' in said
    code = '''
import importlib, json, pkgutil, sys
import relvit, relvit.demo
relvit.demo.demo.__wrapped__(seeds=1, quick=True, workers=1)
extras, lost = [], {}
for m in pkgutil.iter_modules(relvit.__path__):
    try: importlib.import_module(f'relvit.{m.name}')
    except ImportError as e: lost[m.name] = str(e)
print(json.dumps(dict(file=relvit.__file__, lost=lost, paths=sorted({str(getattr(m, '__file__', None) or '') for m in list(sys.modules.values())}))))
'''
    # `demo` is what `python -m relvit.demo` calls
    found = json.loads(do(bin/'python', '-W', 'ignore', '-c', code, cwd=there, OMP_NUM_THREADS='1', MPLBACKEND='Agg').splitlines()[-1])
    assert Path(found['file']).is_relative_to(there) and not [p for p in found['paths'] if p.startswith((str(root/'relvit'), str(root/'.venv'), str(clone)))]
    assert set(found['lost']) <= {'widgets', 'method_widgets', 'detection_widgets'}
    assert all("pip install 'relvit[widgets]'" in why for why in found['lost'].values())
    told = json.loads((there/'demo/demo.json').read_text())
    assert told['versions']['relvit'] and not told['commit'] and (there/'demo/demo.png').stat().st_size # the repository around it is not relvit's
