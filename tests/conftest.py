"One thread, no window, and the same examples every time. `--hypothesis-profile search` looks for new ones."
import os, re, sys
os.environ.setdefault('OMP_NUM_THREADS', '1') # torch's threads spin; before torch is imported
os.environ.setdefault('MPLBACKEND', 'Agg')

from importlib.util import find_spec

import pytest
from hypothesis import HealthCheck, settings

slow = [HealthCheck.too_slow, HealthCheck.data_too_large]
settings.register_profile('house', max_examples=50, deadline=None, derandomize=True, suppress_health_check=slow)
settings.register_profile('search', max_examples=300, deadline=None, suppress_health_check=slow)
settings.load_profile('house')


@pytest.fixture(autouse=True)
def no_figures_left():
    "A test that looks for figures left open sees its own, whatever ran before it in this process"
    yield
    if plt := sys.modules.get('matplotlib.pyplot'): plt.close('all')


# tools/dependencies.py runs all this where extras are missing on purpose, and says so: there, and nowhere else, what fails for want of one is skipped

EXTRAS = 'accelerate anywidget datasets h5py IPython ipywidgets nbdev nbformat pycocotools tensorboard wandb webdataset'.split()
gone = [m for m in EXTRAS if not find_spec(m)] if os.environ.get('RELVIT_PARTIAL') else []
wants = re.compile(rf"\b({'|'.join(gone)})\b")


def lacking(e):
    "Which missing extra an error is about, if any: it, or what it came from, is an ImportError that names it, or shows what a command said of it"
    while e:
        if (isinstance(e, ImportError) or 'relvit[' in str(e)) and (m := wants.search(str(e))): return m[1]
        e = e.__cause__ or e.__context__


def _run(item):
    try: return (yield)
    except Exception as e:
        if gone and (name := lacking(e)): pytest.skip(f'{name} is not installed')
        raise

pytest_runtest_setup = pytest_runtest_call = pytest.hookimpl(wrapper=True)(_run) # fixtures, too


@pytest.hookimpl(wrapper=True)
def pytest_pycollect_makemodule(module_path, parent):
    module = yield
    if gone and module is not None:
        load = module._getobj
        def _getobj():
            try: return load()
            except parent.CollectError as e:
                if found := wants.search(str(e)): pytest.skip(f'{found[1]} is not installed', allow_module_level=True)
                raise
        module._getobj = _getobj
    return module
