"The house keeps its order: who imports whom, package as notebooks, clean pages, everything public says what it is."
import ast, importlib.util, json, os, re, shutil, subprocess, sys
from functools import cache
from pathlib import Path

import pytest

root = Path(__file__).resolve().parents[1]
pages = sorted(p for p in (root/'nbs').rglob('*.ipynb') if not re.search(r'/[._]', str(p.relative_to(root))))
numbered = [p for p in pages if p.parent == root/'nbs' and re.match(r'\d\d_', p.name)]
modules = sorted(p for p in (root/'relvit').rglob('*.py') if not p.name.startswith('_'))


def by_name(paths): return dict(argvalues=paths, ids=[p.stem for p in paths])


@cache
def notebook(path): return json.loads(path.read_text(encoding='utf-8'))


def number(path): return int(path.name[:2])


def cells(nb, exported=False):
    "Source of the code cells, without magics"
    for cell in nb['cells']:
        source = ''.join(cell['source'])
        if cell['cell_type'] == 'code' and (not exported or re.search(r'^#\|\s*exports?i?\b', source, re.M)):
            yield re.sub(r'^\s*[%!].*$', '', source, flags=re.M)


def imports(source):
    "What is imported anywhere in it; `relvit.x` also of `from .x`, `from . import x` and `import_module('relvit.x')`"
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import): yield from (a.name for a in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = '.'.join(filter(None, ['relvit' if node.level else '', node.module]))
            yield from (f'{base}.{a.name}' for a in node.names) if base == 'relvit' else [base]
        elif isinstance(node, ast.Call) and re.search(r'\b(import_module|__import__)$', ast.unparse(node.func)):
            if node.args and isinstance(node.args[0], ast.Constant): yield re.sub(r'^\.', 'relvit.', node.args[0].value)


def room(nb):
    "The module that a notebook exports to, None if it exports none"
    found = re.search(r'^#\|\s*default_exp\s+(\S+)', '\n'.join(cells(nb)), re.M)
    return found and found[1]


def misplaced(nb, n, rooms):
    "Imports of a notebook that are not from below it; `rooms` are the numbers of the modules"
    own = {m.split('.')[1] for s in cells(nb) for m in imports(s) if m.startswith('relvit.')} - {'__version__'}
    return sorted(f'relvit.{m} ({rooms.get(m, "no such room")})' for m in own if rooms.get(m, 99) >= n)


@cache
def rooms(): return {room(notebook(p)): number(p) for p in numbered}


def test_numbers_are_names():
    "NN_name.ipynb exports name.py; no number is used twice; what lies in nbs/ itself has one, or is about all of it"
    assert {p.stem[3:]: number(p) for p in numbered} == rooms()
    assert len({number(p) for p in numbered}) == len(numbered)
    assert {p.stem for p in modules} == set(rooms())
    assert {p.stem for p in pages if p.parent == root/'nbs' and p not in numbered} == {'index', 'results'}


@pytest.mark.parametrize('path', **by_name(numbered))
def test_a_notebook_imports_from_lower_floors_only(path):
    wrong = misplaced(notebook(path), number(path), rooms())
    assert not wrong


def test_misplaced_imports_are_found():
    page = lambda *source: dict(cells=[dict(cell_type='code', source=[s]) for s in source])
    wrong = ['import relvit.b', 'import torch, relvit.b as b', 'from relvit.b import x', 'from relvit import a, b',
             'from .b import x', 'from . import b', 'from relvit.c import x',
             '%time 1\n!ls\ndef f():\n    from relvit.b import x', 'import importlib as i\ni.import_module("relvit.b")']
    right = 'from relvit.a import b', 'from .a import b', 'from relvit import __version__', 'x = "relvit.b"'
    for source in wrong: assert len(misplaced(page('import torch', source), 2, dict(a=1, b=2))) == 1, source
    assert not misplaced(page(*right), 2, dict(a=1, b=2))


# which libraries

def libraries(path): return {m.split('.')[0] for s in cells(notebook(path), exported=True) for m in imports(s)}


def page_of(name): return next(p for p in numbered if p.stem == name)


@pytest.mark.parametrize('name', ['01_patches', '02_relations', '13_losses'])
def test_geometry_and_losses_need_torch_only(name):
    assert libraries(page_of(name)) <= {'torch', 'math', '__future__', 'fastcore', 'relvit'}


def test_they_do_without_the_rest_when_imported():
    "Whatever they import on their way"
    rest = {'timm', 'torchvision', 'fastai', 'matplotlib', 'sklearn', 'pandas', 'scipy', 'IPython'}
    code = 'import sys, relvit.patches, relvit.relations, relvit.losses\nprint(*{m.split(".")[0] for m in sys.modules})'
    out = subprocess.run([sys.executable, '-c', code], cwd=root, capture_output=True, text=True, timeout=120)
    assert out.returncode == 0, out.stderr
    assert 'torch' in out.stdout.split() and not rest & set(out.stdout.split())


@pytest.mark.parametrize('path', **by_name([p for p in numbered if number(p)//10 == 2]))
def test_tasks_know_neither_timm_nor_torchvision(path): assert not libraries(path) & {'timm', 'torchvision'}


# notebooks and package

@pytest.fixture(scope='module')
def copy(tmp_path_factory):
    "A copy of the working tree that was exported anew, package and index, and cleaned"
    there = tmp_path_factory.mktemp('house')
    shutil.copy(root/'settings.ini', there)
    for p in pages:
        (there/p.relative_to(root)).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(p, there/p.relative_to(root))
    (there/'relvit').mkdir()
    shutil.copy(root/'relvit/__init__.py', there/'relvit')
    code = 'import nbdev.doclinks, nbdev.clean\nnbdev.doclinks.nbdev_export()\nnbdev.clean.nbdev_clean()'
    env = {k: v for k, v in os.environ.items() if k != 'IN_TEST'} # with it nbdev_export does nothing
    out = subprocess.run([sys.executable, '-c', code], cwd=there, env=env, capture_output=True, text=True, timeout=300)
    assert out.returncode == 0 and 'Failed to clean' not in out.stderr, out.stderr
    return there


def contents(folder): return {str(p.relative_to(folder)): p.read_text(encoding='utf-8') for p in folder.rglob('*.py')}


def test_the_package_is_what_the_notebooks_export(copy):
    "If not: nbdev_export, or make notebooks"
    ours, theirs = contents(root/'relvit'), contents(copy/'relvit')
    assert set(ours) == set(theirs)
    for name in ours: assert ours[name] == theirs[name], f'relvit/{name} differs from its notebook'


@pytest.mark.parametrize('path', **by_name(pages))
def test_notebooks_are_clean(path, copy):
    same = path.read_bytes() == (copy/path.relative_to(root)).read_bytes()
    assert same, f'nbdev_clean changes {path.name}'


@pytest.mark.parametrize('path', **by_name(pages))
def test_title_and_subtitle_have_a_cell_of_their_own(path):
    "nbdev's docs show nothing else of the first cell of text"
    first = next(''.join(c['source']) for c in notebook(path)['cells'] if c['cell_type'] == 'markdown')
    assert re.fullmatch(r'# .+\n\n> .+', first)


machine = re.compile(r'(?<![\w.:/])/(?:home|work|root|tmp|usr|opt|Users)/|site-packages/|\b[A-Z]:\\+Users')


def texts(output):
    "What of an output is text, by kind"
    for kind, v in (output.get('data', {}) | {'stream': output.get('text', '')}).items():
        if not kind.startswith('image/') and isinstance(v, (str, list)): yield kind, ''.join(v)


def dirt(nb):
    "What a page must not hold: stderr, errors, widget states, absolute paths of a machine"
    if 'widgets' in nb['metadata']: yield 'metadata.widgets'
    for i, o in [(i, o) for i, cell in enumerate(nb['cells']) for o in cell.get('outputs', [])]:
        if o.get('name') == 'stderr' or o['output_type'] == 'error': yield f"cell {i}: {o.get('name', 'error')}"
        yield from (f'cell {i}: {kind}' for kind in o.get('data', {}) if 'widget' in kind)
        for kind, text in texts(o):
            if m := machine.search(text): yield f'cell {i}, {kind}: {text[max(m.start() - 20, 0):m.end() + 40]!r}'


@pytest.mark.parametrize('path', **by_name(pages))
def test_outputs_are_light_and_of_no_machine(path):
    found = list(dirt(notebook(path)))
    assert not found
    assert path.stat().st_size < 300_000


def test_dirt_is_found():
    prose = dict(cell_type='markdown', source='/home/me/x')
    page = lambda *outputs, **metadata: dict(metadata=metadata, cells=[prose, dict(cell_type='code', outputs=outputs)])
    stream = lambda text, name='stdout': dict(output_type='stream', name=name, text=text)
    shown = lambda kind, data: dict(output_type='display_data', data={kind: data})
    dirty = [stream('x', 'stderr'), stream(['a\n', 'in /home/me/x.py']), stream("PosixPath('/work/main/nbs')"),
             stream('File ".venv/lib/python3.11/site-packages/torch/x.py"'), dict(output_type='error', ename='E'),
             shown('text/plain', '/root/x'), shown('text/html', ['<a href="/tmp/x">']), stream(repr('C:\\Users\\me')),
             shown('application/vnd.jupyter.widget-view+json', {})]
    for o in dirty: assert len(list(dirt(page(o)))) == 1, o
    assert not list(dirt(page(stream('https://example.org/home/x, a/work/b, tmp/x'), shown('image/png', '/home/x'))))
    assert list(dirt(page(stream('x'), widgets={}))) == ['metadata.widgets']


def test_readme_is_the_index():
    "If not: make readme"
    spec = importlib.util.spec_from_file_location('notebooks', root/'tools/notebooks.py')
    tools = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tools)
    readme = (root/'README.md').read_text(encoding='utf-8')
    assert readme == tools.readme() and readme.startswith('# relvit')


# what is public says what it is

def undocumented(source):
    "Names in `__all__` that are defined here without a docstring, or not defined here at all"
    body = ast.parse(source).body
    defined = {n.name: ast.get_docstring(n) for n in body if isinstance(n, (ast.FunctionDef, ast.ClassDef))}
    values = [n for n in body if isinstance(n, ast.Assign)]
    assigned = {t.id for n in values for t in ast.walk(n) if isinstance(t, ast.Name) and isinstance(t.ctx, ast.Store)}
    public = next((ast.literal_eval(n.value) for n in values if ast.unparse(n.targets[0]) == '__all__'), [])
    return [name for name in public if not defined.get(name, name in assigned)]


@pytest.mark.parametrize('path', **by_name(modules))
def test_everything_public_has_a_docstring(path):
    source = path.read_text(encoding='utf-8')
    missing = undocumented(source)
    assert not missing and ast.get_docstring(ast.parse(source)), path.name


def test_missing_docstrings_are_found():
    lines = ['__all__ = ["f", "g", "C", "x", "gone"]', 'def f(): pass', 'def g(): "Says"', 'x, y = 1, 2',
             'def _h(): pass', 'class C:', '    def g(self): "Says"']
    assert undocumented('\n'.join(lines)) == ['f', 'C', 'gone']


@pytest.mark.parametrize('path', **by_name(pages))
def test_imports_have_cells_of_their_own(path):
    "nbdev's docs run cells with imports by themselves, so other code beside them breaks the site"
    for source in cells(notebook(path)):
        kinds = {isinstance(node, (ast.Import, ast.ImportFrom)) for node in ast.parse(source).body}
        assert kinds != {True, False}, source
