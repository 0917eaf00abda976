"A loss that is NaN or infinite ends a run before its step: which task, which images, where to go on from, nothing spoilt."
import io, os, subprocess, sys, tarfile, warnings
from pathlib import Path

import numpy as np, pytest, torch
from fastai.callback.core import Callback
from PIL import Image

from relvit.boxes import box_dls, open_boxes
from relvit.callbacks import NotFinite
from relvit.checkpoint import read_meta
from relvit.cli import main
from relvit.data import digits_dls, make_dls
from relvit.datasets import digits, open_data
from relvit.detection import detect_learner
from relvit.label_maps import open_maps
from relvit.learner import finetune_learner, joint_learner, pretrain_learner
from relvit.runs import Run
from relvit.segmentation import map_dls, segment_learner
from relvit.training import Finetune, Pretrain, load_model

from stopped import quietly

inf = float('inf')
size = dict(embed_dim=24, depth=1, num_heads=2)
small = dict(encoder='vit_tiny_patch16_224', p=4, seed=0, **size)
boxes = dict(kind='mask', img_size=64, p=8, encoder_args=size, channels=16, seed=0)
tiny = dict(encoder='vit_tiny_patch16_224', encoder_args=tuple(f'{k}={v}' for k, v in size.items()), bs=32, device='cpu', every=1e9)


def digit_dls(**kwargs): return digits_dls(bs=32, steps=3, device='cpu', **kwargs)


def fitted(learn, epochs=1, **kwargs):
    "The error that a fit ends with; no weight may be other than it was before the step"
    class Keep(Callback):
        order = 119
        def after_backward(self): self.learn.before = {n: w.clone() for n, w in self.model.named_parameters()}
    with learn.no_bar(), learn.no_logging(), pytest.raises(NotFinite) as said: learn.fit(epochs, cbs=Keep(), **kwargs)
    if said.value.training:
        changed = [n for n, w in learn.model.named_parameters() if not torch.equal(w.nan_to_num(7), learn.before[n].nan_to_num(7))]
        assert not changed and all(w.grad is None or not w.grad.any() for w in learn.model.parameters())
    return said.value


def spoil(module, value=inf):
    with torch.no_grad(): next(w for w in module.parameters() if w.ndim > 1).view(-1)[0] = value


PATCHES = 'relations', 'positions', 'distances', 'angles', 'directions'
VIEWS = dict(dino=dict(hidden=16, bottleneck=8, out=16), selfpatch=dict(hidden=16, bottleneck=8, out=16), pixel={}, channel={},
             moco3=dict(hidden=16, out=8), moby=dict(hidden=16, out=8, size=48))


@pytest.mark.parametrize('name', PATCHES)
def test_the_task_whose_head_is_spoilt_is_named(name):
    "One weight of its head is infinite; the others' losses are fine"
    learn = pretrain_learner(digit_dls(), tasks=PATCHES, **small)
    spoil(learn.model.tasks[name].head)
    e = fitted(learn)
    assert e.tasks == [name] and len(e.files) == 32
    assert e.said in [f'loss of {name} is {what} at epoch 0, step 0' for what in ('NaN', 'infinite')]


def test_labels(): # a head at zero has a weight that is infinite
    learn = joint_learner(digit_dls(), **small)
    spoil(learn.model.tasks['labels'].head)
    assert fitted(learn).tasks == ['labels']


@pytest.mark.parametrize('name', VIEWS)
def test_tasks_with_a_teacher(name):
    from relvit.tasks import TASKS
    tasks = [TASKS[name](**VIEWS[name]), 'relations']
    learn = pretrain_learner(digit_dls(whole=True), tasks=tasks, recipe='dino' if name not in ('moco3', 'moby') else name, cls=name != 'selfpatch', **small)
    head = learn.model.tasks[name].head
    if head is not None and any(w.ndim > 1 for w in head.parameters()): spoil(head)
    else: # a task without weights of its own: its teacher
        with torch.no_grad(): learn.model.teacher.encoder.model.norm.weight[0] = float('nan')
    assert fitted(learn).tasks == [name]


@pytest.mark.parametrize('lr', [1e30, inf])
def test_a_learning_rate_far_too_high(lr):
    "The first step is taken and spoils the weights; the second is not"
    learn = pretrain_learner(digit_dls(), tasks=('relations', 'positions'), **small)
    e = fitted(learn, lr=lr)
    assert (e.epoch, e.step) == (0, 1) and set(e.tasks) & {'relations', 'positions'} and f'it was {lr:.3g}' in str(e)


class Poison(Callback):
    "An augmentation that divides by the spread of an image, and meets an image without any"
    order = 2
    run_valid = False
    def __init__(self, at): self.at = at
    def before_batch(self):
        if (self.learn.epoch, self.learn.iter) != self.at: return
        x = self.learn.xb[0].float()/255
        x[5] = 0.
        self.learn.xb = (torch.where(torch.arange(len(x))[:, None, None, None] == 5, x/x.std((1, 2, 3), keepdim=True), x), *self.learn.xb[1:])


def folder(there):
    "Sixty digits as files"
    train, _ = digits()
    for i, (img, label) in enumerate(zip(train.x[:60], train.y)):
        f = there/f'{label}'/f'{i}.png'
        f.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(img[0].numpy()).save(f)
    return there


own = dict(img_size=16, p=4, channels=1, flip=False, scale=.5, check=False)


@pytest.mark.parametrize('memory,workers', [(0., 0), (0., 2), (2., 0)])
def test_the_image_is_named(memory, workers, tmp_path):
    "Files decoded by workers that read ahead, and files in memory: the one whose pixels were not finite is the one that was drawn"
    c = Pretrain(data=str(folder(tmp_path/'own')), memory=memory, workers=workers, out=str(tmp_path), epochs=3, **own, **tiny | dict(bs=16))
    with pytest.raises(NotFinite) as said: quietly(c, cbs=[Poison((1, 1))])
    e = said.value
    assert (e.epoch, e.step, len(e.files), len(e.spoilt)) == (1, 1, 16, 1) and e.spoilt == [e.files[5]] and Path(e.spoilt[0]).is_file()
    assert f'not finite are the pixels of {e.spoilt[0]}' in str(e)


def test_names_are_those_of_the_pixels(tmp_path):
    "Every batch of a loader names the files that its images were decoded from"
    for memory, workers in ((0., 0), (0., 2), (2., 0)):
        s = open_data(folder(tmp_path/'own'), **{k: v for k, v in own.items() if k not in ('scale',)}, memory=memory)
        train = make_dls(s, 16, whole=True, num_workers=workers, device='cpu').train
        for _ in range(2):
            for x, _ in train:
                for img, f in zip(x, train.last_names()): assert np.abs(np.array(Image.open(f)).astype(int).mean() - img.float().mean().item()) < 3


def test_names_of_shards(tmp_path):
    train, _ = digits()
    for k in range(4):
        with tarfile.open(tmp_path/f's-{k}.tar', 'w') as tar:
            for i in range(20*k, 20*k + 20):
                png = io.BytesIO()
                Image.fromarray(train.x[i, 0].numpy()).save(png, 'png')
                info = tarfile.TarInfo(f'{i:04d}.png')
                info.size = len(png.getvalue())
                tar.addfile(info, io.BytesIO(png.getvalue()))
    for workers in (0, 2):
        c = Pretrain(data=str(tmp_path/'s-{0..3}.tar'), workers=workers, steps=3, epochs=2, out=str(tmp_path/f'{workers}'), **own, **tiny | dict(bs=8))
        with pytest.raises(NotFinite) as said: quietly(c, cbs=[Poison((1, 2))])
        assert len(said.value.files) == 8 and all(' of ' in f and f.endswith('.tar') for f in said.value.files)
        assert said.value.spoilt == [said.value.files[5]]


def test_a_run_keeps_its_last_good_state(tmp_path):
    "The state is of before, its record and status say what happened, and it can be gone on with"
    c = Pretrain(out=str(tmp_path), name='a', steps=3, epochs=3, **tiny)
    with pytest.raises(NotFinite, match='losses of relations and positions are NaN at epoch 1, step 2') as said: quietly(c, cbs=[Poison((1, 2))])
    run, e = Run(tmp_path/'a'), said.value
    assert run.status == f'stopped: {e.said}' and 'epoch 1, step 2' in (run.path/'log.txt').read_text() and not run.summary
    place = read_meta(run.last)['place']
    assert (place['epoch'], place['iter']) == (1, 0) and e.checkpoint == dict(path=str(run.last), epoch=1, step=0)
    assert str(run.last) in str(e) and run.broke['files'] == e.files and len(run.metrics) == 1
    assert all(w.isfinite().all() for path in (run.last, run.best) for w in load_model(run, path.stem).state_dict().values())
    done, whole = quietly(resume=run.path), quietly(c.but(name='b'))
    assert done.status == 'finished' and not done.broke
    for a, b in zip(*(load_model(r).state_dict().values() for r in (done, whole))): assert a.equal(b)


def test_before_the_first_state(tmp_path):
    with pytest.raises(NotFinite, match='No state was saved before it'): quietly(Pretrain(out=str(tmp_path), name='a', steps=3, epochs=2, **tiny), cbs=[Poison((0, 1))])
    assert Run(tmp_path/'a').status.startswith('stopped: ') and not Run(tmp_path/'a').last.exists()


def test_between_states(tmp_path):
    "States inside an epoch: the one before the step is kept"
    with pytest.raises(NotFinite): quietly(Finetune(out=str(tmp_path), name='a', steps=4, epochs=2, **tiny | dict(every=0.)), cbs=[Poison((0, 3))])
    place = read_meta(tmp_path/'a/last.safetensors')['place']
    assert (place['epoch'], place['iter']) == (0, 3)


def test_validation_too(tmp_path):
    class Spoil(Callback):
        order = 90
        def before_validate(self):
            if self.learn.epoch == 1: spoil(self.learn.model.tasks['positions'].head)
    with pytest.raises(NotFinite, match='loss of positions is NaN at epoch 1, step 0 of the validation') as said:
        quietly(Pretrain(out=str(tmp_path), name='a', steps=3, epochs=3, **tiny), cbs=[Spoil()])
    assert len(Run(tmp_path/'a').metrics) == 1 and said.value.checkpoint['epoch'] == 1 and not said.value.training and said.value.files


def test_gradients_accumulated():
    learn = pretrain_learner(digit_dls(), **small).faster(accumulate=3)
    learn.add_cb(Poison((0, 1)))
    assert fitted(learn).step == 1


def test_half_precision():
    learn = pretrain_learner(digit_dls(), amp=True, **small)
    spoil(learn.model.tasks['relations'].head)
    e = fitted(learn)
    assert e.tasks == ['relations'] and 'no amp' in str(e) and not torch.is_autocast_enabled('cpu')


def test_a_finite_loss_with_a_gradient_that_is_not():
    "A root at 0: its value is 0, its slope infinite, and 0 times that is NaN"
    learn = pretrain_learner(digit_dls(), **small)
    loss = learn.loss_func
    learn.loss_func = lambda preds, *y: loss(preds, *y) + (preds['relations']*0).sum().abs().sqrt()
    e = fitted(learn)
    assert not e.tasks and 'the loss is finite, and the gradient of' in e.what


def test_no_label_in_a_batch_is_no_error():
    dls = digit_dls()
    dls.train_ds.y[:], dls.valid_ds.y[:] = -1, -1
    learn = finetune_learner(dls, classes=10, **small)
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    assert learn.recorder.values[-1][0] == 0


def test_a_search_for_the_learning_rate_may_go_too_far():
    learn = pretrain_learner(digit_dls(), **small)
    with learn.no_bar(), learn.no_logging(): learn.lr_find(start_lr=1e-3, end_lr=1e35, num_it=6, show_plot=False, suggest_funcs=None)
    assert all(w.isfinite().all() for w in learn.model.parameters())


def test_detector():
    dls = box_dls(open_boxes('shapes', n=(8, 4, 4), size=64), bs=2, steps=2, device='cpu')
    learn = detect_learner(dls, 'vit_tiny_patch16_224', tasks=('relations',), **boxes)
    names = dict(learn.model.named_modules())
    for task, part in dict(relations='tasks.relations.head', classifier='cls_score', boxes='bbox_pred', masks='mask_fcn_logits').items():
        at = [n for n in names if n.endswith(part)][-1]
        was = {k: v.clone() for k, v in names[at].state_dict().items()}
        with torch.no_grad(): next(names[at].parameters()).fill_(float('nan'))
        e = fitted(learn)
        assert task in e.tasks and len(e.files) == 2 and e.files[0].startswith('shapes '), (task, e)
        names[at].load_state_dict(was)


def test_images_without_objects_are_no_error():
    s = open_boxes('shapes', n=(4, 2, 2), size=64)
    s.train._rows(s.train.of == 0) # so that one batch has nothing
    s.train.first = torch.searchsorted(s.train.of, torch.arange(len(s.train) + 1))
    learn = detect_learner(box_dls(s, bs=2, steps=2, device='cpu'), 'vit_tiny_patch16_224', **boxes | dict(kind='faster'))
    with learn.no_bar(), learn.no_logging(): learn.fit(1)


@pytest.mark.parametrize('part', ['segment', 'aux'])
def test_segmenter(part):
    dls = map_dls(open_maps('shapes', n=(8, 4, 4), size=64), bs=2, steps=2, device='cpu')
    learn = segment_learner(dls, 'vit_tiny_patch16_224', kind='uper', img_size=64, p=8, encoder_args=size, channels=16, recipe='scenes', seed=0)
    spoil(learn.model.aux if part == 'aux' else learn.model.head)
    e = fitted(learn)
    assert e.tasks == [part] and len(e.files) == 2 and e.files[0].startswith('shapes ')


def test_maps_where_nothing_counts_are_no_error():
    s = open_maps('shapes', n=(4, 2, 2), size=64)
    for m in s.train.maps: m.fill_(255)
    learn = segment_learner(map_dls(s, bs=2, steps=2, device='cpu'), 'vit_tiny_patch16_224', img_size=64, p=8, encoder_args=size, recipe='scenes', seed=0)
    with learn.no_bar(), learn.no_logging(): learn.fit(1)


line = ['--encoder', 'vit_tiny_patch16_224', '--encoder-args', *tiny['encoder_args'], '--steps', '3', '--epochs', '2', '--device', 'cpu', '--lr', '1e30', '--name', 'a']


def test_the_command_says_it(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr('warnings.showwarning', lambda *args, **kwargs: None)
    with warnings.catch_warnings(): assert main(['pretrain', *line]) == 2
    said = capsys.readouterr().err
    assert 'Traceback' not in said and 'relvit pretrain: loss' in said and 'at epoch 0, step 1' in said and 'digits ' in said and 'it was 9.87e+29' in said
    assert main(['runs']) == 0 and '"status": "stopped: loss' in capsys.readouterr().out


def test_several_processes_all_stop(tmp_path):
    "One of two processes sees the bad share of a batch; both end, and both name it"
    pytest.importorskip('accelerate')
    code = '''
import sys, torch
from relvit.training import Pretrain, train
from relvit.callbacks import NotFinite
from test_nan import Poison, tiny
class Second(Poison):
    def before_batch(self):
        if torch.distributed.get_rank() == 1: super().before_batch()
try: train(Pretrain(out=sys.argv[1], name='a', steps=3, epochs=2, **tiny), tell='nothing', cbs=[Second((1, 1))])
except NotFinite as e: print('ended', torch.distributed.get_rank(), e.epoch, e.step, len(e.files), len(e.spoilt), e.spoilt[0] == e.files[5], sep=',')
'''
    (tmp_path/'two.py').write_text(code)
    env = os.environ | dict(OMP_NUM_THREADS='1', PYTHONPATH=str(Path(__file__).parent))
    done = subprocess.run([sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2', str(tmp_path/'two.py'), str(tmp_path)],
                          capture_output=True, text=True, timeout=300, env=env)
    for rank in (0, 1): assert f'ended,{rank},1,1,16,1,True' in done.stdout, done.stdout + done.stderr
    assert Run(tmp_path/'a').status.startswith('stopped: ') and read_meta(tmp_path/'a/last.safetensors')['place']['epoch'] == 1
