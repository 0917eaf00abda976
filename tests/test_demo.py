"The demo from its command line, in small: every arm, the table, the figure, the weights, the numbers."
import json, re, subprocess, sys

import timm
from relvit.demo import ARMS, Demo
from relvit.experiments import gain, table


def test_demo(tmp_path):
    out = tmp_path/'demo'
    cmd = [sys.executable, '-W', 'ignore', '-m', 'relvit.demo', '--quick', '--all', '--out', str(out), '--record', str(tmp_path/'r.json')]
    run = subprocess.run(cmd, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr
    found = json.loads((tmp_path/'r.json').read_text())
    assert set(ARMS) <= set(found['results']) and all(len(v) == 6 for v in found['results'].values())
    assert {'commit', 'versions', 'device', 'seeds', 'config'} <= set(found)
    for said in (*(ARMS[a] for a in ARMS), 'above 0 for', 'demo.png', 'Next:'): assert said in run.stdout, said
    assert (out/'demo.png').read_bytes()[:4] == b'\x89PNG'
    args = json.loads((out/'relvit_digits.json').read_text())
    assert timm.create_model(**args, checkpoint_path=str(out/'relvit_digits.safetensors')) is not None
    assert re.search(r'(\d+) of \1 are done', run.stderr) # progress was told


def test_equal_compute_is_equal():
    assert Demo().all_steps == Demo().pretrain + Demo().finetune == 900


def test_numbers_of_the_table():
    r = dict(relvit=[.9, .8], supervised_all=[.85, .85])
    assert '85.0 ± 7.1' in table(r, ARMS) and gain(**{'a': r['relvit'], 'b': r['supervised_all']}).startswith('+0.0 ± 7.1, -5.0 to +5.0, above 0 for 1 of 2')
