"""Every notebook is a test case, run by nbdev's own `test_nb`: `#| eval: false`, `tst_flags`, `skip_exec` hold.

Each runs in a process of its own, forked from a server that has imported the heavy libraries once: no notebook sees
another's modules, seeds or rcParams, and none waits seconds for torch. Two run at a time where there are two cores.
"""
import contextlib, io, multiprocessing, os, re
from concurrent.futures import ThreadPoolExecutor
from configparser import ConfigParser
from pathlib import Path

import nbformat, pytest

root = Path(__file__).resolve().parents[1]
notebooks = sorted(p for p in (root/'nbs').rglob('*.ipynb') if not re.search(r'/[._]', str(p.relative_to(root))))
heavy = ['pytest', 'nbformat', 'nbdev.test', 'torch', 'torchvision', 'timm', 'matplotlib.pyplot', 'sklearn.datasets']
# but not fastai, which changes torch.Tensor
minutes = 15


def run(pipe, path, flags):
    "In a process of its own: send whether a notebook passes, and its traceback"
    os.chdir(root)
    from nbdev.test import test_nb as nbdev_test_nb
    err = io.StringIO()
    with contextlib.redirect_stderr(err): passed, _ = nbdev_test_nb(path, skip_flags=flags, basepath=root)
    pipe.send((passed, err.getvalue()))


def run_apart(path, ctx, flags):
    "The same from outside. Not a pool's worker, which may have no children, as a DataLoader's are"
    here, there = ctx.Pipe(duplex=False)
    process = ctx.Process(target=run, args=(there, path, flags))
    process.start()
    there.close()
    try: return here.recv() if here.poll(60*minutes) else (False, f'still running after {minutes} minutes')
    except EOFError:
        process.join()
        return False, f'the process died with exit code {process.exitcode}'
    finally:
        if process.is_alive(): process.join(5)
        process.kill()


@pytest.fixture(scope='module')
def outcome(request):
    "Start the notebooks that were asked for; a function that waits for one"
    settings = ConfigParser()
    settings.read(root/'settings.ini')
    flags = settings['DEFAULT']['tst_flags'].split()
    ctx = multiprocessing.get_context('forkserver')
    ctx.set_forkserver_preload(heavy)
    wanted = [item.callspec.params['path'] for item in request.session.items if item.name.startswith('test_notebook[')]
    with ThreadPoolExecutor(min(2, os.cpu_count())) as pool:
        running = {p: pool.submit(run_apart, p, ctx, flags) for p in wanted}
        yield lambda path: (running.get(path) or pool.submit(run_apart, path, ctx, flags)).result()
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
