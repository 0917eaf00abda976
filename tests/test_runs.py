"A run that was stopped, killed or cut inside an epoch goes on as if nothing had happened, to the bit."
import numpy as np, pytest
from PIL import Image

from relvit.data import make_dls
from relvit.datasets import digits, open_data
from relvit.runs import RecordRun, load_state
from relvit.training import Finetune, Joint, Pretrain, load_model, make_learner

from stopped import StopAt, quietly, told

tiny = dict(encoder='vit_tiny_patch16_224', encoder_args=('embed_dim=24', 'depth=2', 'num_heads=2', 'drop_path_rate=.2'), bs=32,
            epochs=3, steps=5, device='cpu', every=1e9)


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    "Digits as files in folders of classes, some without a class"
    there = tmp_path_factory.mktemp('images')
    train, _ = digits()
    for i, (img, label) in enumerate(zip(train.x[:120], train.y)):
        f = there/(f'{label}' if i < 110 else '')/f'{i}.png'
        f.parent.mkdir(exist_ok=True)
        Image.fromarray(img[0].numpy()).save(f)
    return there


def same(a, b):
    assert told(a) == told(b) and len(told(a))
    for x, y in zip(load_model(a).state_dict().values(), load_model(b).state_dict().values()): assert x.equal(y)


plain = tiny | dict(encoder_args=(*tiny['encoder_args'], 'cls=false')) # as SelfPatch wants it
def heads(task, **widths): return tuple(f'{task}.{k}={v}' for k, v in widths.items())


MODES = dict(
    pretrain=lambda **k: Pretrain(**tiny, augment='colJitter:0.5-grayScale:0.2', permute=True, mega=3, **k),
    finetune=lambda **k: Finetune(**tiny, smoothing=.1, image_augment='colJitter:0.8', **k),
    joint=lambda **k: Joint(**tiny, tasks=('labels', 'relations', 'angles=.5'), **k),
    modern=lambda **k: Joint(**tiny, recipe='modern', recipe_args=('layer_decay=.7',), accumulate=2, **k), # 5 batches: one is left over
    teacher=lambda **k: Pretrain(**plain, tasks=('dino', 'selfpatch', 'pixel', 'channel', 'relations=.5'), recipe='dino', recipe_args=('locals=2',),
                                 task_args=(*heads('dino', hidden=16, bottleneck=8, out=16), *heads('selfpatch', hidden=16, bottleneck=8, out=16)), **k),
    queues=lambda **k: Pretrain(**plain, tasks=('moby', 'selfpatch'), recipe='moby', accumulate=2,
                                task_args=(*heads('moby', hidden=16, out=8, size=48), *heads('selfpatch', hidden=16, bottleneck=8, out=16)), **k),
    contrast=lambda **k: Pretrain(**tiny, tasks=('moco3', 'channel'), task_args=heads('moco3', hidden=16, out=8), recipe='moco3', **k))


@pytest.mark.parametrize('mode,workers', [(m, w) for m in MODES for w in (0, 2) if not w or m not in ('teacher', 'queues', 'contrast')])
def test_resume_is_exact(mode, workers, folder, tmp_path):
    "Cut inside an epoch, at its border, and in validation; images decoded by workers while others train"
    own = dict(data=str(folder), img_size=16, p=4, channels=1, memory=0., check=False, flip=False, scale=.5, workers=workers, out=str(tmp_path))
    whole = quietly(MODES[mode](**own, name='whole'))
    for name, stop in dict(inside=StopAt(1, 2), border=StopAt(1, 4), judged=StopAt(0, 0, training=False)).items():
        if workers and name != 'inside': continue
        c = MODES[mode](**own, name=name)
        cut = quietly(c, cbs=[stop])
        assert cut.stopped == 'SIGINT' and not cut.summary and 'stopped after' in cut.status
        done = quietly(resume=cut.path)
        assert done.summary and done.status == 'finished'
        same(whole, done)


def test_workers_change_nothing(folder, tmp_path):
    runs = [quietly(MODES['pretrain'](data=str(folder), img_size=16, p=4, channels=1, memory=m, check=False, workers=w, out=str(tmp_path)))
            for w, m in ((0, 0.), (2, 0.), (0, 2.))]
    same(runs[0], runs[1])
    same(runs[0], runs[2])


def test_a_stream_of_shards_resumes(tmp_path):
    import io, tarfile
    train, _ = digits()
    for k in range(4):
        with tarfile.open(tmp_path/f's-{k}.tar', 'w') as tar:
            for i in range(40*k, 40*k + 40):
                png = io.BytesIO()
                Image.fromarray(train.x[i, 0].numpy()).save(png, 'png')
                for name, data in (f'{i:04d}.png', png.getvalue()), (f'{i:04d}.cls', str(train.y[i].item()).encode()):
                    info = tarfile.TarInfo(name)
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    for workers in (0, 2):
        own = dict(data=str(tmp_path/'s-{0..3}.tar'), img_size=16, p=4, channels=1, flip=False, workers=workers, out=str(tmp_path/f'{workers}'))
        whole = quietly(MODES['joint'](**own, name='whole'))
        cut = quietly(MODES['joint'](**own, name='cut'), cbs=[StopAt(1, 2)])
        same(whole, quietly(resume=cut.path))


def test_other_data_is_refused(folder, tmp_path):
    "A file that came or went would change the order of everything after it"
    import shutil
    mine = shutil.copytree(folder, tmp_path/'mine')
    run = quietly(MODES['pretrain'](data=str(mine), img_size=16, p=4, channels=1, out=str(tmp_path), name='a'), cbs=[StopAt(0, 2)])
    next(mine.glob('1/*.png')).unlink()
    with pytest.raises(ValueError, match='the data is not what .* began with: parts, trained on, images was 96, is 95'): quietly(resume=run.path)


def test_another_plan_is_refused(tmp_path):
    run = quietly(MODES['pretrain'](out=str(tmp_path), name='a'), cbs=[StopAt(0, 2)])
    c = MODES['pretrain'](out=str(tmp_path)).but(steps=6)
    with pytest.raises(ValueError, match='planned with n_iter = 5, not 6'):
        make_learner(c).fit_recipe(3, cbs=RecordRun(run.path, resume=True))
    learn = make_learner(c.but(encoder_args=('embed_dim=48',)))
    learn.create_opt()
    with pytest.raises(ValueError, match='state of another model'): load_state(learn, run.last)
    with pytest.raises(FileExistsError, match='holds a run already'): quietly(c.but(name='a'))


def test_best_is_best(tmp_path):
    run = quietly(MODES['finetune'](out=str(tmp_path), data='digits').but(epochs=6, steps=None))
    accs = [m['valid']['labels_acc'] for m in run.metrics]
    from relvit.checkpoint import read_meta
    assert accs[read_meta(run.best)['epoch']] == max(accs)


def test_a_batch_depends_on_seed_epoch_and_place():
    s = open_data('digits')
    a, b = (make_dls(s, 64, seed=seed, device='cpu').train for seed in (0, 1))
    first = [x.clone() for x, _ in a]
    assert not first[0].equal(next(iter(b))[0])
    a.epoch, a.first = 0, len(a) - 1
    assert [x for x, _ in a][0].equal(first[-1])


def test_metrics_survive_a_torn_line(tmp_path):
    run = quietly(MODES['pretrain'](out=str(tmp_path), name='a'))
    with open(run.path/'metrics.jsonl', 'a') as f: f.write('{"epoch": 3, "tr')
    assert len(run.metrics) == 3 and np.isfinite(run.metrics[-1]['valid']['loss'])
