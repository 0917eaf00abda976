"The command line as a person uses it: a folder of images to weights at home, and every way to be told what was wrong."
import json, signal, subprocess, sys
from pathlib import Path

import pytest, timm, torch, yaml
from PIL import Image

from relvit.datasets import digits
from relvit.runs import Run

relvit = str(Path(sys.executable).parent/'relvit')
tiny = ['--encoder', 'vit_tiny_patch16_224', '--encoder-args', 'embed_dim=24', 'depth=1', 'num_heads=2', '--device', 'cpu']


def call(*args, cwd, code=0, **kwargs):
    run = subprocess.run([relvit, *map(str, args)], cwd=cwd, capture_output=True, text=True, timeout=300, **kwargs)
    assert run.returncode == code, (run.returncode, run.stdout, run.stderr)
    return run


@pytest.fixture(scope='module')
def home(tmp_path_factory):
    "A folder `mine` of labelled images, one of them broken, and a YAML file"
    there = tmp_path_factory.mktemp('home')
    train, test = digits(28)
    for part, ds, n in ('train', train, 400), ('test', test, 60):
        for i, (img, label) in enumerate(zip(ds.x[:n], ds.y)):
            f = there/f'mine/{part}/digit {label}/{i}.png'
            f.parent.mkdir(exist_ok=True, parents=True)
            Image.fromarray(img[0].numpy()).save(f)
    (there/'mine/train/digit 3/broken.png').write_bytes(b'')
    (there/'mine.yaml').write_text(yaml.safe_dump(dict(data='mine', img_size=24, p=4, channels=1, flip=False, scale=.7, epochs=2, bs=50, lr='3e-3')))
    return there


def test_from_a_folder_to_predictions_and_weights(home):
    "pretrain, finetune, evaluate, predict, export: what the tutorial does"
    plan = json.loads(call('pretrain', '--config', 'mine.yaml', *tiny, '--dry-run', cwd=home).stdout)
    assert plan['grid'] == [6, 6] and plan['config']['epochs'] == 2 and plan['seconds'] >= 0 and not (home/'runs').exists()
    run = call('pretrain', '--config', 'mine.yaml', *tiny, '--name', 'pre', '--epochs', 3, cwd=home)
    rows = [json.loads(line) for line in run.stdout.splitlines()] # machine-readable where there is no terminal
    assert [r['epoch'] for r in rows] == [0, 1, 2] and {'relations_acc', 'positions_acc'} <= set(rows[0]['chance'])
    assert 'relvit finetune --init runs/pre' in run.stderr
    assert list(Run(home/'runs/pre').data['skipped']) == ['mine/train/digit 3/broken.png']
    call('finetune', '--init', 'runs/pre', '--bs', 50, '--pool', 'flat', '--epochs', 6, '--name', 'fine', cwd=home)
    c = Run(home/'runs/fine').config
    assert (c['data'], c['img_size'], c['channels'], c['encoder']) == ('mine', 24, 1, 'vit_tiny_patch16_224')
    e = json.loads(call('evaluate', 'runs/fine', cwd=home).stdout)
    assert e['images'] == 60 and e['scores']['labels_acc'] > e['beside']['majority class'] and len(e['classes']) == 10
    assert json.loads((home/'runs/fine/evaluation-test-last.json').read_text()) == e
    frozen = json.loads(call('evaluate', 'runs/pre', '--part', 'valid', cwd=home).stdout)
    assert {'frozen features, logistic regression', 'features of a random encoder, logistic regression'} <= set(frozen['beside'])
    call('predict', 'runs/fine', 'mine/test', '--out', 'said.csv', cwd=home)
    lines = (home/'said.csv').read_text().splitlines()
    assert lines[0] == 'file,label,probability,problem' and len(lines) == 61 and 'digit' in lines[1].split(',')[1]
    out = call('export', 'runs/fine', 'weights.safetensors', cwd=home).stdout
    assert out.startswith('timm.create_model(')
    args = json.loads((home/'weights.json').read_text())
    assert timm.create_model(**args, checkpoint_path=str(home/'weights.safetensors')).patch_embed.grid_size == (6, 6)
    listed = [json.loads(r) for r in call('runs', cwd=home).stdout.splitlines()]
    assert [(Path(r['path']).name, r['status']) for r in listed] == [('pre', 'finished'), ('fine', 'finished')]
    assert json.loads(call('runs', 'compare', cwd=home).stdout)['fine']['mode'] == 'finetune'


def test_a_signal_saves_and_says_how_to_go_on(home):
    p = subprocess.Popen([relvit, 'joint', *tiny, '--epochs', '500', '--name', 'cut', '--every', '1000'], cwd=home, stdout=subprocess.PIPE,
                         stderr=subprocess.PIPE, text=True)
    p.stdout.readline() # an epoch is done
    p.send_signal(signal.SIGTERM)
    _, err = p.communicate(timeout=120)
    assert p.returncode == 130 and 'Go on with: relvit joint --resume runs/cut' in err
    assert call('joint', '--resume', 'runs/cut', '--epochs', 3, cwd=home, code=2).stderr.strip().endswith('it takes no --epochs')


WRONG = { # what is typed: what is said
    'pretrian': "did you mean 'pretrain'?",
    'pretrain --epohs 3': '--epochs',
    'pretrain --epochs many': "Error parsing --epochs",
    'pretrain --data cifar_10': "did you mean 'cifar10'?",
    'pretrain --data cifar10 --root nowhere': 'does not hold CIFAR10',
    'pretrain --tasks relation': "did you mean 'relations'?",
    'pretrain --tasks relations=much': "weight of task 'relations' is a number",
    'pretrain --encoder vit_smal_patch16_224': 'vit_small_patch16_224',
    'pretrain --p 5': 'patches of 5 pixels do not cut 16',
    'pretrain --augment colourful': 'is no augmentation of patches',
    'pretrain --recipe referense': "did you mean 'reference'?",
    'pretrain --config wrong.yaml': "knows no 'epohs'; did you mean 'epochs'?",
    'pretrain --config list.yaml': 'must hold lines of "key: value"',
    'pretrain --config nowhere.yaml': 'nowhere.yaml',
    'pretrain --resume nowhere': 'is no run folder',
    'finetune --few 5000': '5000 were asked for',
    'finetune --init nowhere.safetensors': 'to start from',
    'joint --leak yes': "leak is False or 'paper'",
    'evaluate nowhere': 'is no run folder',
    'export nowhere weights.pt': 'must end in .safetensors',
    'runs --folder nowhere': 'there is no run in nowhere'}


def test_what_is_wrong_is_named(tmp_path, capfd, monkeypatch):
    "One line, exit code 2, nothing written"
    from relvit.cli import main
    (tmp_path/'wrong.yaml').write_text('epohs: 3')
    (tmp_path/'list.yaml').write_text('- 3')
    monkeypatch.chdir(tmp_path)
    for line, said in WRONG.items():
        try: code = main(line.split())
        except SystemExit as e: code = e.code
        out = capfd.readouterr()
        assert code == 2 and said in out.err + out.out, (line, out)
        assert 'Traceback' not in out.err, line
    assert not (tmp_path/'runs').exists()


@pytest.mark.parametrize('name', ['pretrain', 'finetune', 'joint', 'evaluate', 'predict', 'export', 'runs', 'doctor', 'demo'])
def test_help(name, capfd):
    from relvit.cli import main
    try: code = main([name, '--help'])
    except SystemExit as e: code = e.code
    out = capfd.readouterr().out
    assert not code and name in out and len(out) > 200


def test_doctor(capsys):
    from relvit.cli import main
    assert main(['doctor']) == 0
    out = capsys.readouterr().out
    assert f'torch {torch.__version__.split("+")[0]}' in out and 'GB free' in out and '  no   ' not in out


def test_the_overview_is_quick(tmp_path):
    "It imports no torch"
    out = subprocess.run([sys.executable, '-c', 'import sys, relvit.cli as c; c.main(["--help"]); print("torch" in sys.modules)'],
                         capture_output=True, text=True, cwd=tmp_path)
    assert out.stdout.splitlines()[-1] == 'False'
