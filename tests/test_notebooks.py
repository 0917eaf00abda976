"""Every notebook is a test case, run by nbdev's own `test_nb`: `#| eval: false`, `tst_flags`, `skip_exec` hold.

Each runs in a process of its own, forked from a server that has imported the heavy libraries once: no notebook sees
another's modules, seeds or rcParams, and none waits seconds for torch. Two run at a time where there are two cores.
"""
import contextlib, io, os, re, sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import nbformat, pytest

root = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(root/'tools')) # the processes find it there, too
import notebooks as tools # noqa: E402

notebooks = sorted(p for p in (root/'nbs').rglob('*.ipynb') if not re.search(r'/[._]', str(p.relative_to(root))))


def as_it_stands(path, flags):
    "Whether a notebook passes, and its traceback"
    os.chdir(root)
    from nbdev.test import test_nb as nbdev_test_nb
    err = io.StringIO()
    with contextlib.redirect_stderr(err): passed, _ = nbdev_test_nb(path, skip_flags=flags, basepath=root)
    return passed, err.getvalue()


@pytest.fixture(scope='module')
def apart(): return partial(tools.run_apart, tools.server('pytest', 'nbformat', 'nbdev.test'))


@pytest.fixture(scope='module')
def outcome(request, apart):
    "Start the notebooks that were asked for; a function that waits for one"
    flags = tools.flags()
    wanted = [item.callspec.params['path'] for item in request.session.items if item.name.startswith('test_notebook[')]
    with ThreadPoolExecutor(min(2, os.cpu_count())) as pool:
        running = {p: pool.submit(apart, as_it_stands, p, flags) for p in wanted}
        yield lambda path: (running.get(path) or pool.submit(apart, as_it_stands, path, flags)).result()
        for job in running.values(): job.cancel() # after -x or an interrupt


@pytest.mark.parametrize('path', notebooks, ids=[str(p.relative_to(root/'nbs')) for p in notebooks])
def test_notebook(path, outcome):
    passed, err = outcome(path)
    assert passed, f'{path.relative_to(root)} failed:\n{err}'


def page(path, *cells):
    "Write a notebook of code cells, or of raw ones where they are front matter"
    nb = nbformat.v4.new_notebook(metadata=dict(kernelspec=dict(name='python3', language='python', display_name='x')))
    new = nbformat.v4.new_raw_cell, nbformat.v4.new_code_cell
    nb.cells = [new[not c.startswith('---')](c) for c in cells]
    nbformat.write(nb, path)
    return path


def test_a_failing_notebook_fails_and_says_where(tmp_path, outcome):
    passed, err = outcome(page(tmp_path/'bad.ipynb', 'side = 3', 'assert side == 4, "the side is not four"'))
    assert not passed and 'the side is not four' in err and 'assert side == 4' in err


def test_a_notebook_may_have_workers_and_may_crash(tmp_path, outcome):
    loader = 'next(iter(torch.utils.data.DataLoader(range(4), 4, num_workers=1)))'
    assert outcome(page(tmp_path/'loader.ipynb', f'import torch\nassert {loader}.sum() == 6'))[0]
    crash = page(tmp_path/'crash.ipynb', 'import os\nos._exit(3)')
    assert outcome(crash) == (False, 'the process died with exit code 3')


@pytest.mark.parametrize('flag', ['#| eval: false', '#| notest', '#| slow'])
def test_flags_are_heeded(flag, tmp_path, outcome): assert outcome(page(tmp_path/'flagged.ipynb', f'{flag}\n1/0'))[0]


def test_front_matter_is_heeded(tmp_path, outcome):
    assert outcome(page(tmp_path/'not_run.ipynb', '---\nskip_exec: true\n---', '1/0'))[0]


def test_notebooks_do_not_meet(tmp_path, outcome):
    "Neither modules that a notebook changed nor rcParams reach the next"
    first = 'import math, matplotlib.pyplot as plt\nmath.pi, plt.rcParams["figure.dpi"] = 3, 7'
    second = 'import math, matplotlib.pyplot as plt\nassert math.pi > 3 and plt.rcParams["figure.dpi"] != 7'
    for i, source in enumerate([first, second]*2):
        passed, err = outcome(page(tmp_path/f'{i}.ipynb', source))
        assert passed, err


# the second mode: against the package

def test_an_export_cell_imports_and_does_not_define(tmp_path, apart):
    "What it would define is the package's own, private names too; it does not run, the rest does"
    cells = ['#| default_exp relations', 'minkowski = "of the page"', '#| export\n1/0\ndef _differences(*a): pass', '#| export\nimport math as other',
             'import relvit.relations\nassert _differences is relvit.relations._differences and minkowski == "of the page"']
    assert apart(tools.imported, page(tmp_path/'relations.ipynb', *cells), []) == (True, '')
    passed, err = apart(tools.imported, page(tmp_path/'bad.ipynb', *cells, 'assert _differences is None, "it is not"'), [])
    assert not passed and 'it is not' in err and 'assert _differences' in err


def test_the_second_mode_shows_and_heeds_flags(tmp_path, apart):
    "A page of the house passes; a last expression's repr is made; flags and front matter hold"
    def outcome(*cells): return apart(tools.imported, page(tmp_path/'page.ipynb', *cells), ['notest', 'slow'])
    assert apart(tools.imported, root/'nbs/02_relations.ipynb', tools.flags()) == (True, '')
    loud = 'class Loud:\n    def __repr__(self): raise ValueError("its repr was made")'
    passed, err = outcome(loud, 'Loud()')
    assert not passed and 'its repr was made' in err and outcome(loud, 'loud = Loud()') == (True, '')
    for flag in '#| eval: false', '#|notest', '#| hide\n#| slow': assert outcome(f'{flag}\n1/0') == (True, '')
    assert not outcome('x = 3\n#| notest\n1/0')[0] # no directive: it is not at the top
    assert outcome('---\nskip_exec: true\n---', '1/0') == (True, '')
