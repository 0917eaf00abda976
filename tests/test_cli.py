"The command line as a person uses it: a folder of images to weights at home, and every way to be told what was wrong."
import json, signal, subprocess, sys
from pathlib import Path

import pytest, timm, torch, yaml
from PIL import Image

from relvit.checkpoint import save
from relvit.datasets import digits
from relvit.runs import Run
from relvit.tokens import TokenEncoder

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
    assert list(Run(home/'runs/pre').data['skipped']) == [str(home/'mine/train/digit 3/broken.png')]
    call('finetune', '--init', 'runs/pre', '--bs', 50, '--pool', 'flat', '--epochs', 6, '--name', 'fine', cwd=home)
    c = Run(home/'runs/fine').config
    assert (c['data'], c['img_size'], c['channels'], c['encoder']) == (str(home/'mine'), 24, 1, 'vit_tiny_patch16_224')
    assert set(c['encoder_args']) >= {'embed_dim=24', 'depth=1', 'num_heads=2'}
    e = json.loads(call('evaluate', 'runs/fine', cwd=home).stdout)
    assert e['images'] == 60 and e['scores']['labels_acc'] > e['beside']['majority class'] and len(e['classes']) == 10
    assert json.loads((home/'runs/fine/evaluation-test-last.json').read_text()) == e
    assert json.loads(call('evaluate', '../runs/fine', cwd=home/'mine').stdout)['scores'] == e['scores'] # from any folder
    frozen = json.loads(call('evaluate', 'runs/pre', '--part', 'valid', cwd=home).stdout)
    assert {'frozen features, logistic regression', 'features of a random encoder, logistic regression'} <= set(frozen['beside'])
    call('predict', 'fine', 'mine/test', '--out', 'said.csv', cwd=home)
    lines = (home/'said.csv').read_text().splitlines()
    assert lines[0] == 'file,label,probability,problem' and len(lines) == 61 and 'digit' in lines[1].split(',')[1]
    out = call('export', 'runs/fine', 'weights.safetensors', cwd=home).stdout
    assert out.startswith('timm.create_model(')
    args = json.loads((home/'weights.json').read_text())
    back = timm.create_model(**args, checkpoint_path=str(home/'weights.safetensors')).eval()
    assert back.patch_embed.grid_size == (6, 6)
    call('finetune', '--init', 'weights.safetensors', '--config', 'mine.yaml', '--device', 'cpu', '--name', 'again', '--epochs', 1, cwd=home)
    assert Run(home/'runs/again').config['encoder'] == 'vit_tiny_patch16_224' # the file says which
    listed = [json.loads(r) for r in call('runs', cwd=home).stdout.splitlines()]
    assert [(Path(r['path']).name, r['status']) for r in listed] == [('pre', 'finished'), ('fine', 'finished'), ('again', 'finished')]
    assert json.loads(call('runs', 'compare', cwd=home).stdout)['fine']['mode'] == 'finetune'


def test_timm_prepares_images_as_relvit_does(home):
    "A whole export, its classifier included: timm's own transform and model say what `relvit predict` says"
    call('finetune', '--config', 'mine.yaml', *tiny, '--pool', 'cls', '--lr', 3e-3, '--epochs', 4, '--name', 'home', cwd=home)
    call('export', 'home', 'home.safetensors', cwd=home)
    args = json.loads((home/'home.json').read_text())
    model = timm.create_model(**args, checkpoint_path=str(home/'home.safetensors')).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    said = [row.split(',') for row in call('predict', 'home', 'mine/test', cwd=home).stdout.splitlines()[1:]]
    x = torch.stack([transform(Image.open(home/f).convert('L')) for f, *_ in said])
    with torch.no_grad(): probs, k = model(x).softmax(1).max(1)
    names = model.pretrained_cfg['label_names']
    assert [names[i] for i in k] == [label for _, label, *_ in said]
    assert max(abs(float(p) - float(row[2])) for p, row in zip(probs, said)) < .02


def test_a_run_that_could_not_begin_leaves_nothing(home):
    "So the same line, mended, works"
    from relvit.training import Pretrain, train
    class Stop(Exception): pass
    from fastai.callback.core import Callback
    class Fails(Callback):
        def before_batch(self): raise Stop('early')
    c = Pretrain(encoder='vit_tiny_patch16_224', encoder_args=('embed_dim=24', 'depth=1', 'num_heads=2'), device='cpu', epochs=1,
                 out=str(home/'runs'), name='early')
    with pytest.raises(Stop): train(c, tell='nothing', cbs=[Fails()])
    assert not (home/'runs/early').exists()
    assert train(c, tell='nothing').status == 'finished'


def test_a_signal_saves_and_says_how_to_go_on(home):
    p = subprocess.Popen([relvit, 'joint', *tiny, '--epochs', '500', '--name', 'cut', '--every', '1000'], cwd=home, stdout=subprocess.PIPE,
                         stderr=subprocess.PIPE, text=True)
    p.stdout.readline() # an epoch is done
    p.send_signal(signal.SIGTERM)
    _, err = p.communicate(timeout=120)
    assert p.returncode == 130 and 'Go on with: relvit joint --resume runs/cut' in err
    assert call('joint', '--resume', 'runs/cut', '--epochs', 3, cwd=home, code=2).stderr.strip().endswith('it takes no --epochs')
    assert call('joint', '--resume', 'runs/cut', '--dry-run', cwd=home, code=2).stderr.strip().endswith('it takes no --dry-run')


WRONG = { # what is typed: what is said
    'pretrian': "did you mean 'pretrain'?",
    'pretrain --epohs 3': '--epochs',
    'pretrain --epochs many': "Error parsing --epochs",
    'pretrain --epochs 0': 'epochs must be above 0, not 0',
    'pretrain --data cifar_10': "did you mean 'cifar10'?",
    'pretrain --data no/where': 'there is no folder no/where',
    'pretrain --data cifar10 --root nowhere': 'does not hold CIFAR10',
    'pretrain --data pictures': 'there is no image in',
    'pretrain --tasks relation': "did you mean 'relations'?",
    'pretrain --tasks relations=much': "weight of task 'relations' must be a number",
    'pretrain --tasks relations=-1': "weight of task 'relations' must be above 0",
    'pretrain --tasks': 'tasks must name at least one of',
    'pretrain --tasks labels': 'pretraining looks at no label; joint',
    'pretrain --encoder vit_smal_patch16_224': 'vit_small_patch16_224',
    'pretrain --encoder-args embed_dim=50 num_heads=3': 'timm cannot build vit_small_patch16_224',
    'pretrain --encoder-args dpth=1': "'dpth'",
    'pretrain --p 5': 'patches of 5 pixels do not cut 16',
    'pretrain --p 16': 'one patch has no relations',
    'pretrain --mega 1': 'mega must be 2 or more',
    'pretrain --labels some.csv': 'labels is for folders of images',
    'pretrain --data pictures --splits reference': 'the reference knows no splits',
    'finetune --init foreign': 'is not of relvit pretrain, finetune or joint',
    'pretrain --drop-path 1.5': 'drop_path must be a share',
    'pretrain --most-unreadable -1': 'most_unreadable must be 0 or more',
    'pretrain --device foo': "there is no device 'foo' here",
    'pretrain --channels 2': 'channels',
    'pretrain --name ../up': 'must be a plain name',
    'pretrain --augment colourful': 'is no augmentation of patches',
    'pretrain --recipe referense': "'reference'?",
    'pretrain --config wrong.yaml': "knows no 'epohs'; did you mean 'epochs'?",
    'pretrain --config list.yaml': 'must hold lines of "key: value"',
    'pretrain --config broken.yaml': 'broken.yaml is not YAML',
    'pretrain --config other.yaml': 'this is what a finetune run is made of, not a pretrain run',
    'finetune --config pre.yaml': "knows no 'mega'; it is of pretrain and joint",
    'pretrain --config nowhere.yaml': 'there is no file nowhere.yaml',
    'pretrain --resume nowhere': 'is no run folder',
    'finetune --few 5000': '5000 were asked for',
    'finetune --few 0': 'few must be above 0',
    'finetune --smoothing 2': 'smoothing must be a share',
    'finetune --init nowhere.safetensors': 'to start from',
    'finetune --init held.safetensors --encoder vit_small_patch16_224': 'init holds a vit_tiny_patch16_224',
    'finetune --init held.safetensors --encoder-args depth=3': 'init holds an encoder of depth=1, not 3',
    'finetune --init held.safetensors --data pictures --channels 1': 'there is no image in',
    'joint --leak yes': 'leak',
    'evaluate nowhere': 'is no run folder',
    'export nowhere weights.pt': 'must end in .safetensors',
    'runs --folder nowhere': 'there is no run in nowhere'}


def test_what_is_wrong_is_named(tmp_path, capfd, monkeypatch):
    "One line, exit code 2, nothing written"
    from relvit.cli import main
    (tmp_path/'wrong.yaml').write_text('epohs: 3')
    (tmp_path/'list.yaml').write_text('- 3')
    (tmp_path/'broken.yaml').write_text('data: [')
    (tmp_path/'other.yaml').write_text('mode: finetune')
    (tmp_path/'pre.yaml').write_text('mega: 3')
    for name in ('pictures', 'foreign'): (tmp_path/name).mkdir()
    (tmp_path/'foreign/config.json').write_text('{}')
    save(TokenEncoder('vit_tiny_patch16_224', img_size=16, p=4, depth=1, embed_dim=24, num_heads=2), tmp_path/'held.safetensors')
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
