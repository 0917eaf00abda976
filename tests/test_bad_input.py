"Every bad input of the registry: what is said, the exit code, and that nothing is written, changed or lost"
import json, re
from collections import Counter
from pathlib import Path

import pytest

from bad_input import CASES, GROUPS, look, make_home

RECORD = Path(__file__).parents[1]/'results/bad_input.json'


@pytest.fixture(scope='module')
def home(tmp_path_factory): return make_home(tmp_path_factory.mktemp('home'))


@pytest.mark.parametrize('case', CASES, ids=lambda c: c.id)
def test_what_is_said(case, home):
    r = look(case, home)
    assert re.search(case.said, r['said'], re.S) and r['code'] == case.code, (r['code'], r['said'], r['crash'])
    assert 'Traceback' not in r['said']
    assert case.writes or not r['changed'], r['changed']
    if r['code'] == 2 and r['said'].startswith('relvit '): # else tyro draws a frame around what it could not parse
        first, *rest = r['said'].splitlines()
        assert first.count(': ') and all(line.startswith('  ') or line.startswith('usage') or not line for line in rest) or 'there is no command' in first, r['said']


def test_the_registry():
    "Every group of inputs, each under its own name"
    many = Counter(c.group for c in CASES)
    assert set(many) == set(GROUPS) and min(many.values()) >= 8 and len(CASES) >= 100
    assert not [n for n, k in Counter(c.id for c in CASES).items() if k > 1]


def test_the_record_is_of_this_registry():
    "`make bad_input` was run after the last case was added"
    rows = json.loads(RECORD.read_text())['cases']
    assert {(r['group'], r['input'], str(r['code'])) for r in rows} == {(c.group, c.what, str(c.code)) for c in CASES}
    assert all(re.search(c.said, r['said'], re.S) for c, r in zip(CASES, rows))
