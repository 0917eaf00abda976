"What an import does, which is little, and what is imported, which is declared."
import ast, importlib, json, os, re, subprocess, sys
from configparser import ConfigParser
from pathlib import Path

import pytest

root = Path(__file__).resolve().parents[1]
modules = sorted(p for p in (root/'relvit').glob('*.py'))
config = ConfigParser(delimiters=['='])
config.read(root/'settings.ini', encoding='utf-8')
settings = config['DEFAULT']
names = {'scikit-learn': 'sklearn', 'pyyaml': 'yaml', 'pillow': 'PIL', 'webdataset': 'webdataset'} # where a package's name is not its module's


def declared(*kinds):
    "Modules of packages in lists of requirements"
    found = (re.match(r'[\w-]+', r)[0] for kind in kinds for r in settings[kind].split())
    return {names.get(n, n.replace('-', '_')) for n in found}


needed = declared('requirements')
extras = declared(*(k for k in settings if k.endswith('_requirements') and not re.match('dev|mutants', k))) - needed

WATCHED = r'''
import importlib, json, os, sys, threading
listened = 'socket.connect', 'socket.getaddrinfo', 'socket.bind', 'urllib.Request', 'subprocess.Popen', 'os.system', 'os.exec', 'os.fork', 'os.posix_spawn', \
    'os.mkdir', 'os.remove', 'os.rename', 'os.rmdir', 'os.symlink', 'os.link', 'os.chmod', 'os.truncate', 'tempfile.mkstemp', 'tempfile.mkdtemp', 'signal.signal', '_thread.start_new_thread'
told = []
def hear(event, args):
    if event == 'open': # to write: by its mode, or by its flags
        writes = set(str(args[1] or '')) & set('wax+') or args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if writes: told.append(['open', str(args[0])])
    elif event in listened: told.append([event, repr(args)[:200]])
sys.addaudithook(hear)
import torch, timm, fastai.vision.all # what they do at their own import is theirs
theirs, before = told[:], set(sys.modules)
del told[:]
mine, widgets = json.loads(sys.argv[1])
for name in mine: importlib.import_module(name)
without = sorted(set(sys.modules) - before)
for name in widgets: importlib.import_module(name)
print(json.dumps(dict(theirs=theirs, ours=told, new=without, threads=threading.active_count())))
'''


@pytest.fixture(scope='module')
def watched(tmp_path_factory):
    "What is heard while everything is imported, without writing bytecode, in an empty folder"
    there = tmp_path_factory.mktemp('here')
    every = [f'relvit.{p.stem}' for p in modules if p.stem != '__init__']
    widgets = [m for m in every if 'widgets' in m]
    if os.environ.get('RELVIT_PARTIAL') and subprocess.run([sys.executable, '-c', 'import anywidget'], capture_output=True).returncode: widgets, every = [], sorted(set(every) - set(widgets))
    asked = json.dumps([[m for m in every if m not in widgets], widgets])
    out = subprocess.run([sys.executable, '-B', '-W', 'ignore', '-c', WATCHED, asked], cwd=there, env=os.environ | dict(PYTHONPATH=str(root)),
                         capture_output=True, text=True, timeout=300)
    assert out.returncode == 0, out.stderr
    return json.loads(out.stdout) | dict(left=[p.name for p in there.iterdir()])


def test_nothing_is_written_started_or_asked_for(watched):
    assert not watched['ours'] and not watched['left'] and watched['threads'] == 1


def test_nothing_is_downloaded_not_even_by_the_libraries(watched):
    assert not [e for e, _ in watched['theirs'] if e in ('socket.connect', 'socket.getaddrinfo', 'urllib.Request')]


def test_no_extra_is_imported_before_it_is_wanted(watched):
    assert not {m.split('.')[0] for m in watched['new']} & extras
    assert {m.split('.')[0] for m in watched['new']} >= {'relvit', 'tyro'} # it was looked


def test_the_package_alone_imports_nothing():
    code = 'import sys; old = set(sys.modules); import relvit; print(*{m.split(".")[0] for m in set(sys.modules) - old})'
    found = subprocess.run([sys.executable, '-c', code], cwd=root, capture_output=True, text=True, check=True).stdout.split()
    assert set(found) - set(sys.stdlib_module_names) == {'relvit'}


def imported(tree, everywhere):
    "Top names of what is imported at once, or anywhere; from other packages"
    for node in ast.walk(tree) if everywhere else tree.body:
        if isinstance(node, ast.Import): yield from (a.name.split('.')[0] for a in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level: yield node.module.split('.')[0]


@pytest.mark.parametrize('path', modules, ids=lambda p: p.stem)
def test_what_is_imported_is_declared(path):
    "At once: what everyone has. Later: extras, too, and IPython where a notebook is"
    tree = ast.parse(path.read_text(encoding='utf-8'), feature_version=(3, 10))
    foreign = lambda everywhere: set(imported(tree, everywhere)) - set(sys.stdlib_module_names) - {'relvit'}
    assert foreign(False) <= needed
    assert foreign(True) <= needed | extras | {'IPython', 'traitlets'} # traitlets come with ipywidgets


# what there is since 3.11 only, as far as it can be seen by its name
NEWER = (r'\bimport tomllib|contextlib import .*\bchdir|\bcontextlib\.chdir|ExceptionGroup|\bTaskGroup|\bStrEnum|datetime import .*\bUTC|datetime\.UTC|file_digest'
         r'|typing import .*\b(Self|Never|LiteralString|assert_never|Unpack|Required|override)\b|itertools import .*\bbatched|\bmath\.(cbrt|exp2|sumprod)\b|add_note\('
         r'|\bexcept\*|^type \w+ =|operator import .*\bcall\b|\bos\.process_cpu_count|copy\.replace')


@pytest.mark.parametrize('path', modules, ids=lambda p: p.stem)
def test_the_oldest_python_knows_it_all(path):
    source = path.read_text(encoding='utf-8')
    compile(source, path.name, 'exec', dont_inherit=True)
    assert not re.search(NEWER, source, re.M)


def test_newer_things_are_found():
    for source in 'from typing import Any, Self', 'import tomllib', 'datetime.UTC', 'from contextlib import closing, chdir': assert re.search(NEWER, source, re.M)
    with pytest.raises(SyntaxError): ast.parse('try: pass\nexcept* ValueError: pass', feature_version=(3, 10))


@pytest.mark.parametrize('kind', [k for k in settings if k.endswith('_requirements') and k not in ('dev_requirements', 'mutants_requirements')])
def test_an_extra_is_developed_with(kind):
    "What a user may add is in the environment that is tested, with the same bound"
    assert set(settings[kind].split()) <= set(settings['dev_requirements'].split())


# an extra that is missing says its name

def _widgets():
    for name in ('widgets', 'method_widgets', 'detection_widgets'): sys.modules.pop(f'relvit.{name}', None)
    importlib.import_module('relvit.method_widgets')


WANTS = dict( # module that is missing: the extra, what asks for it
    datasets=('hub', lambda: importlib.import_module('relvit.datasets')._of_hub('x', None, 8, .1, 0, 3)),
    webdataset=('shards', lambda: importlib.import_module('relvit.shards').Shards('x.tar', 8)),
    ipywidgets=('widgets', _widgets), anywidget=('widgets', _widgets),
    pycocotools=('detect', lambda: importlib.import_module('relvit.precision')._coco()), h5py=('detect', lambda: list(importlib.import_module('relvit.boxes')._digits('x'))),
    accelerate=('distributed', lambda: importlib.import_module('relvit.distributed').Distributed()),
    tensorboard=('track', lambda: importlib.import_module('relvit.runs').tracker('tensorboard', None)), wandb=('track', lambda: importlib.import_module('relvit.runs').tracker('wandb', None)))


def test_every_extra_is_asked_for(): assert {e for e, _ in WANTS.values()} == {k.removesuffix('_requirements') for k in settings if k.endswith('_requirements')} - {'dev', 'mutants'}


@pytest.mark.parametrize('name', WANTS)
def test_what_is_missing_is_said_with_its_cure(name, monkeypatch):
    kept = {m: sys.modules[m] for m in list(sys.modules) if m.startswith('relvit.') and 'widgets' in m}
    for m in [m for m in sys.modules if m.split('.')[0] == name]: monkeypatch.delitem(sys.modules, m)
    monkeypatch.setitem(sys.modules, name, None)
    extra, ask = WANTS[name]
    with pytest.raises(ImportError, match=rf'pip install [\'"]relvit\[{extra}\]'): ask()
    sys.modules.update(kept) # the very classes that others have seen
