"What GitHub runs are the targets of the Makefile, with as few rights as will do and with actions that nobody can exchange."
import re
from configparser import ConfigParser
from pathlib import Path

import pytest, yaml

root = Path(__file__).resolve().parents[1]
files = sorted((root/'.github/workflows').glob('*.yml'))
makefile = (root/'Makefile').read_text(encoding='utf-8')


def load(path):
    "YAML 1.1 reads the key `on` as True"
    d = yaml.safe_load(path.read_text(encoding='utf-8'))
    return {'on' if k is True else k: v for k, v in d.items()}


flows = {p.stem: load(p) for p in files}
each = pytest.mark.parametrize('name', flows)


def jobs(name): return flows[name]['jobs'].items()
def steps(name): return [s for _, job in jobs(name) for s in job['steps']]


def test_these_there_are(): assert set(flows) == {'tests', 'docs', 'newest', 'release'}


@each
def test_actions_are_pinned(name):
    text = (root/f'.github/workflows/{name}.yml').read_text(encoding='utf-8')
    used = re.findall(r'uses: *(.*)', text)
    assert len(used) == sum('uses' in s for s in steps(name))
    for line in used: assert re.fullmatch(r'[\w.-]+/[\w./-]+@[0-9a-f]{40} # v\d+(\.\d+)*', line), line
    assert all(not s.get('with', {}).get('persist-credentials', True) for s in steps(name) if 'actions/checkout' in s.get('uses', ''))


@each
def test_rights_are_few(name):
    "None at the top, and each job its own: to write pages, or to prove to PyPI who it is, where nothing is built or tested"
    assert flows[name]['permissions'] == {} and not {'pull_request_target', 'workflow_run'} & set(flows[name]['on'])
    for job, j in jobs(name):
        more = {k: v for k, v in j['permissions'].items() if (k, v) != ('contents', 'read')}
        assert more == {('docs', 'publish'): dict(pages='write', **{'id-token': 'write'}), ('release', 'publish'): {'id-token': 'write'}}.get((name, job), {})
        if more: assert j['environment']['name'] and not [s for s in j['steps'] if 'run' in s or 'checkout' in s['uses']]
    assert 'secrets.' not in str(flows[name])


@each
def test_nothing_runs_for_ever_or_is_pasted_into_a_shell(name):
    assert flows[name]['concurrency']['group']
    for _, job in jobs(name): assert job['timeout-minutes'] <= 180
    for s in steps(name): assert '${{' not in s.get('run', '')


@each
def test_they_call_targets_that_exist(name):
    targets = set(re.search(r'^\.PHONY:(.*)', makefile, re.M)[1].split())
    called = [t for s in steps(name) for t in re.findall(r'\bmake ([\w-]+)', s.get('run', ''))]
    assert called and set(called) <= targets and all(re.search(rf'^[\w ]*\b{t}\b[\w ]*:', makefile, re.M) for t in called)
    assert called == dict(tests=['test'], docs=['quarto'], newest=['newest'], release=['dist'])[name]


def test_every_python_that_is_promised_is_tested():
    config = ConfigParser(delimiters=['='])
    config.read(root/'settings.ini', encoding='utf-8')
    lowest = int(config['DEFAULT']['min_python'].removeprefix('3.'))
    promised = re.search(r"Programming Language :: Python :: 3\.\{v\}' for v in range\((\d+), (\d+)\)", (root/'setup.py').read_text())
    versions = [f'3.{v}' for v in range(*map(int, promised.groups()))]
    assert flows['tests']['jobs']['test']['strategy']['matrix']['python'] == versions and versions[0] == f'3.{lowest}'


def test_a_release_waits_for_its_build():
    job = flows['release']['jobs']['publish']
    assert job['needs'] == 'build' and flows['release']['on'] == {'push': {'tags': ['v*']}}
    assert job['steps'][-1]['uses'].startswith('pypa/gh-action-pypi-publish@') and not job['steps'][-1].get('with')
