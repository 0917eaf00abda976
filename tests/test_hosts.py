"DINO, MoCo v3 and MoBY: numbers of the reference implementations, laws of the engine, and training that does not collapse."
import multiprocessing
from functools import cache
from pathlib import Path

import numpy as np, pytest, torch
from fastai.callback.core import Callback, CancelValidException
from torch import distributed, nn
from torch.testing import assert_close

from relvit.callbacks import ClipEach
from relvit.data import digits_dls
from relvit.dino import DINO, warmed
from relvit.heads import ProjectionHead, contrast_mlp
from relvit.learner import encoder_of, pretrain_learner
from relvit.losses import Centre, Queue, info_nce
from relvit.moco import MoBY, MoCo3
from relvit.recipes import get_recipe
from relvit.selfpatch import SelfPatch, SelfPatchHead
from relvit.sere import ChannelRelation, PixelRelation
from relvit.tasks import Classification, RelViT, make_tasks, spread
from relvit.teacher import cosine
from relvit.tokens import TokenEncoder
from relvit.training import Pretrain, config_tasks, looks_at, make_learner
from relvit.views import MultiCrop


@cache
def _load():
    f = np.load(Path(__file__).parent/'fixtures/hosts.npz')
    return {k: str(f[k]) if f[k].dtype.kind == 'U' else torch.as_tensor(f[k]) for k in f.files}


def recorded(prefix):
    found = {k.removeprefix(prefix): v.clone() if torch.is_tensor(v) else v for k, v in _load().items() if k.startswith(prefix)}
    assert found, f'hosts.npz holds no {prefix}*'
    return found


def close(got, want, tol): assert_close(torch.as_tensor(got), want.to(torch.as_tensor(got).dtype), atol=tol, rtol=0)


# the papers' code

def projection(r, prefix, hidden, out):
    "Our head with recorded weights: theirs are mlp.{0,2,4} and a weight-normed last layer"
    head = ProjectionHead(r[f'{prefix}mlp.0.weight'].shape[1], out, hidden, r[f'{prefix}mlp.4.weight'].shape[0])
    state = {k.removeprefix(prefix): v for k, v in r.items() if k.startswith(f'{prefix}mlp')}
    assert (r[f'{prefix}last_layer.weight_g'] == 1).all()
    head.load_state_dict(state | dict(last=r[f'{prefix}last_layer.weight_v']))
    return head


def test_projection_head():
    r = recorded('dinohead/')
    close(projection(r, 'w/', 20, 24)(r['x']), r['y'], 1e-6)


def test_dino_loss_gradient_and_centre():
    r = recorded('dino/')
    temps = r['temp_schedule']
    task = DINO(out=24, teacher_temp=temps[-1].item(), first_temp=temps[0].item(), warm_epochs=len(temps.unique()))
    task.epoch = r['epoch'].item()
    close([warmed(e, *task.temps) for e in range(len(temps))], temps, 1e-6)
    task.center.value.copy_(r['center_in'][0])
    s = r['student'].requires_grad_()
    views = s.unflatten(0, (r['ncrops'].item(), -1)) # 2 globals, 4 locals
    taught = (r['teacher'].unflatten(0, (2, -1)),)
    loss = task.loss((views[:2], views[2:]), taught)
    close(loss, r['loss'], 1e-4)
    close(torch.autograd.grad(loss, s)[0], r['grad_student'], 1e-5)
    task.remember(taught)
    close(task.center.value, r['center_out'][0], 1e-6)


def test_dino_as_selfpatch_runs_it():
    "A centre of all crops, local ones too"
    r = recorded('selfpatch/loss/')
    task = DINO(out=20, teacher_temp=r['temp_schedule'][r['epoch']].item(), center='all')
    task.center.value.copy_(r['center_in'].flatten())
    pred = tuple(r[f's_cls_{x}'].squeeze(1).unflatten(0, (-1, 2)).requires_grad_() for x in 'gl')
    taught = tuple(r[f't_cls_{x}'].squeeze(1).unflatten(0, (-1, 2)) for x in 'gl')
    loss = task.loss(pred, taught)
    close(loss, r['cls'], 1e-4)
    task.remember(taught)
    close(task.center.value, r['center_out'].flatten(), 1e-6)


def test_moco3_loss():
    r = recorded('mocov3/')
    q, k = (torch.stack([r[f'{x}1'], r[f'{x}2']]) for x in 'qk')
    close(MoCo3(temp=r['T'].item()).loss((q,), (k,)), r['loss'], 1e-5)


def test_moby_loss():
    r = recorded('moby/')
    task = MoBY(out=12, size=16, temp=r['T'].item())
    for queue, x in zip(task.queues, (r['queue1'], r['queue2'])): queue.keys.copy_(x.T)
    pred, keys = (torch.stack([r[f'{x}1'], r[f'{x}2']]) for x in ('pred', 'key'))
    close(task.loss((pred,), (keys,)), r['loss'], 1e-5)


@pytest.mark.parametrize('key,ours', [
    ('mocov3/projector_repr', lambda: contrast_mlp(12, 20, 20, 8)), ('mocov3/predictor_repr', lambda: contrast_mlp(8, 20, 8)),
    ('moby/mlp_repr', lambda: contrast_mlp(12, 20, 8, last_norm=False))])
def test_contrastive_heads_are_built_as_theirs(key, ours):
    theirs = [line.split(': ', 1)[1] for line in _load()[key].splitlines() if ': Linear' in line or ': BatchNorm' in line or ': ReLU' in line]
    plain = lambda text: text.replace('inplace=True', '').replace(', bias=True, track', ', track').replace(', bias=False, track', ', track')
    assert [plain(repr(m)) for m in ours()] == [plain(t) for t in theirs]


def test_a_query_of_the_first_view_looks_for_its_key_of_the_second():
    "By cosine: a long key attracts no more"
    k = torch.randn(2, 40, 6, generator=torch.Generator().manual_seed(0))*torch.linspace(.2, 5, 40)[:, None]
    q = torch.stack([k[1] + k[0]/2, k[0].roll(1, 0)])
    near = torch.cosine_similarity(q[0, :, None], k[1, None], -1).argmax(1) == torch.arange(40)
    assert .5 < near.float().mean() < .95
    for task in MoCo3(), MoBY(): assert task.metrics((q,), (k,))['acc'] == task.metrics((3*q,), (k*7,))['acc'] == near.float().mean()


def test_saying_nothing_gives_the_papers_numbers():
    dino, moco, moby, own = DINO(), MoCo3(), MoBY(), SelfPatch()
    assert dino.widths == (65536, 2048, 256) and (dino.student_temp, dino.temps[0], dino.center.momentum, dino.momentum) == (.1, .04, .9, (.996, 1.))
    for task in moco, moby: assert (task.widths, task.temp, task.momentum) == ((4096, 256), .2, (.99, 1.))
    assert [len(q.keys) for q in moby.queues] == [len(Queue(8).keys)]*2 == [4096]*2
    assert (own.weight, own.k, own.window, own.border, own.student_temp, own.temps[0], own.center.momentum) == (.1, 4, 3, 'wrap', .1, .04, .9)
    for head in own.make_head(encoder(cls=False), (4, 4)), SelfPatchHead(48, 3):
        assert [tuple(m.weight.shape) for m in head.project.mlp[::2]] == [(2048, 48), (2048, 2048), (256, 2048)]
        assert head.project.last.shape == (4096, 256) and len(head.aggregate.blocks) == 2 and head.aggregate.heads == 3
    pixel, channel = PixelRelation(), ChannelRelation()
    assert [(t.teacher_temp, t.student_temp, t.predictor, t.local_heads) for t in (pixel, channel)] == [(.5, 1., True, False), (.1, 1., True, False)]


def test_directions_of_the_classes_start_with_length_1():
    "Their length is no part of the answer, but it divides their steps"
    last = ProjectionHead(16, 200, hidden=16, bottleneck=256).last
    assert (last.norm(dim=-1) - 1).abs().max() < .25


def _seen_by(rank, path, q, k, rows):
    if rank is not None: distributed.init_process_group('gloo', init_method=f'file://{path}', rank=rank, world_size=2)
    mine = slice(None) if rank is None else slice(4*rank, 4*rank + 4)
    centre, queue = Centre(6), Queue(5, size=11)
    queue.keys.zero_()
    centre.update(rows[mine])
    for _ in range(2): queue.push(k[mine])
    losses = [info_nce(q[mine], k[mine], .2, gather=g).item() for g in (True, False)]
    return losses, centre.value.tolist(), queue.keys.tolist(), queue.next.item()


def test_two_processes_are_one_with_the_whole_batch(tmp_path):
    "Keys of all are negatives, unless not gathered; the centre is the mean of all rows; both hold the same queue"
    q, k, rows = torch.randn(8, 5), torch.randn(8, 5), torch.randn(8, 3, 6)
    with multiprocessing.get_context('fork').Pool(2) as pool:
        two = pool.starmap(_seen_by, [(rank, tmp_path/'meet', q, k, rows) for rank in (0, 1)], chunksize=1)
        pool.close(), pool.join()
    (loss, _), *whole = _seen_by(None, None, q, k, rows)
    close(sum(losses[0] for losses, *_ in two)/2, torch.tensor(loss), 1e-6)
    for (losses, *state), half in zip(two, (slice(4), slice(4, 8))):
        close(losses[1], info_nce(q[half], k[half], .2), 1e-6)
        for got, want in zip(state, whole): close(got, torch.tensor(want), 1e-6)


@pytest.mark.parametrize('key,epochs,per', [('sched/', 20, 4), ('selfpatch/sched/', 12, 5)])
def test_schedules(key, epochs, per):
    r, n = recorded(key), epochs*per
    lr, ema, wd = (next(v for k, v in r.items() if k.startswith(x)) for x in ('lr', 'ema', 'wd'))
    recipe = get_recipe('dino').but(lr=lr.max().item(), final_lr=1e-6, warmup=(5 if epochs == 20 else 3)/epochs)
    close([recipe.lr_at(i/n, steps=n) for i in range(n)], lr, 1e-12)
    close([cosine(i/n, *DINO.momentum) for i in range(n)], ema, 1e-12)
    close([recipe.wd_at(i/n) for i in range(n)], wd, 1e-12)


def test_a_warmup_of_no_whole_steps_stays_below_the_highest_rate():
    for name in ('dino', 'moco3', 'moby', 'selfpatch'):
        r = get_recipe(name)
        assert max(r.lr_at(i/n, steps=n) for n in (7, 21, 25, 47, 130, 640) for i in range(n)) <= r.lr*(1 + 1e-9)


def test_moby_momentum():
    r = recorded('moby/')['momentum_schedule_K20']
    close([cosine(i/20, *MoBY(size=8, out=4).momentum) for i in range(20)], r, 1e-12)


def test_clipping_tensor_by_tensor():
    r, w = recorded('clip/'), nn.Linear(3, 2)
    w.weight.grad, w.bias.grad = torch.full((2, 3), 5.), torch.full((2,), .1)
    clip = ClipEach(3.)
    clip.learn = type('Learn', (), dict(model=w))()
    clip.before_step()
    close(w.weight.grad, r['weight_grad_after'], 1e-5)
    close(w.bias.grad, r['bias_grad_after'], 1e-6)


# the engine

small = dict(img_size=16, p=4, depth=2, embed_dim=48, num_heads=3)
widths = dict(hidden=32, bottleneck=16, out=32)


def encoder(**kw): return TokenEncoder('vit_tiny_patch16_224', **small, **kw)


def crops(locals=2): return MultiCrop(16, local_size=12, locals=locals, flip=0)


def counted(model, f):
    "What each encoder was called with while f ran"
    calls, hooks = [], []
    for name, e in dict(student=model.encoder, teacher=model.teacher.encoder).items():
        hooks.append(e.register_forward_pre_hook(lambda m, a, k, name=name: calls.append((name, a[0].shape[0], a[0].shape[-1], k.get('pos_embed'))),
                                                 with_kwargs=True))
    out = f()
    for h in hooks: h.remove()
    return out, calls


def test_each_network_looks_once_at_each_resolution():
    model = RelViT(encoder(cls=False), dict(dino=DINO(**widths), selfpatch=SelfPatch(.1, border='clip', **widths), pixel=1, channel=1, relations=.5))
    x = torch.rand(3, 3, 16, 16)
    views = crops()(x)
    preds, calls = counted(model, lambda: model(views.view(0), views=views))
    assert sorted(calls, key=str) == sorted([('student', 6, 16, None), ('student', 6, 12, None), ('student', 3, 16, False),
                                             ('teacher', 6, 16, None), ('teacher', 6, 12, None)], key=str)
    loss = model.loss(preds)
    weights = dict(dino=1, selfpatch=.1, pixel=1, channel=1, relations=.5)
    assert_close(loss.detach(), sum(w*model.scores[f'{n}_loss'] for n, w in weights.items()))


def test_a_teacher_that_needs_no_local_crops_does_not_look_at_them():
    model = RelViT(encoder(), [DINO(**widths)])
    views = crops()(torch.rand(3, 3, 16, 16))
    _, calls = counted(model, lambda: model(views.view(0), views=views))
    assert ('teacher', 6, 12, None) not in calls and ('teacher', 6, 16, None) in calls


def test_the_teacher_gets_no_gradient():
    for tasks in ([DINO(**widths), SelfPatch(.1, **widths), 'pixel', 'channel'], [MoCo3(hidden=16, out=8), 'pixel'], [MoBY(hidden=16, out=8, size=8), SelfPatch(.1, **widths)]):
        model = RelViT(encoder(cls=False), tasks)
        views = crops()(torch.rand(4, 3, 16, 16))
        for w in model.teacher.parameters(): w.requires_grad_(True) # so that nothing but the way it is asked protects it
        model.loss(model(views.view(0), views=views)).backward()
        assert repr(model.teacher) == f"Teacher({model.teacher.encoder!r}; {', '.join(model.teacher.heads)})"
        assert all(w.grad is None for w in model.teacher.parameters())
        assert not any(x.requires_grad for answer in model._taught.values() for x in answer)
        assert all(w.grad is not None for w in model.encoder.model.blocks.parameters())
        assert not any(w.requires_grad for w in RelViT(encoder(cls=False), [DINO(**widths)]).teacher.parameters())


def test_one_host_a_recipe():
    with pytest.raises(ValueError, match='dino and moco3 each move the teacher'): RelViT(encoder(), [DINO(**widths), MoCo3(hidden=16, out=8)])
    with pytest.raises(ValueError, match='dino need crops'): RelViT(encoder(), [DINO(**widths)])(torch.rand(2, 3, 16, 16))
    with pytest.raises(ValueError, match='nothing to compare'):
        model = RelViT(encoder(), [DINO(**widths)])
        x = torch.rand(2, 3, 16, 16)
        model.loss(model(x, views=MultiCrop(16, globals=1)(x)))


def test_relations_may_be_asked_alone_out_of_training():
    model = RelViT(encoder(), [DINO(**widths), 'relations']).eval()
    preds = model(torch.rand(2, 3, 16, 16))
    assert preds.names == ['relations']
    model.loss(preds)
    assert 'relations_acc' in model.scores


def test_precision_of_losses_under_autocast():
    torch.manual_seed(0)
    model = RelViT(encoder(cls=False), [DINO(**widths), SelfPatch(.1, **widths), 'pixel', 'channel'])
    views = crops()(torch.rand(4, 3, 16, 16))
    with torch.autocast('cpu', torch.bfloat16): loss = model.loss(model(views.view(0), views=views))
    assert loss.dtype == torch.float32 and all(v.dtype == torch.float32 for v in model.scores.values())
    assert abs(loss - model.loss(model(views.view(0), views=views))) < .02*loss # bfloat16 has 8 bits


# training

METHODS = dict(
    dino=(lambda: [DINO(**widths)], {}), moco3=(lambda: [MoCo3(hidden=64, out=32)], {}), moby=(lambda: [MoBY(hidden=64, out=32, size=256)], {}),
    selfpatch=(lambda: [DINO(**widths, center='all'), SelfPatch(.1, border='clip', **widths)], dict(cls=False, final_norm=False)),
    selfpatch_moby=(lambda: [MoBY(hidden=64, out=32, size=256), SelfPatch(.1, border='clip', **widths)], dict(cls=False)),
    selfpatch_moco3=(lambda: [MoCo3(hidden=64, out=32), SelfPatch(.1, border='clip', **widths)], dict(cls=False)),
    sere=(lambda: [DINO(**widths), PixelRelation(), ChannelRelation()], {}),
    sere_moco3=(lambda: [MoCo3(hidden=64, out=32), PixelRelation(), ChannelRelation()], {}),
    relations_only=(lambda: [PixelRelation(), ChannelRelation()], {}),
    mixture=(lambda: dict(dino=DINO(**widths), selfpatch=SelfPatch(.1, border='clip', **widths), relations=.5), dict(cls=False)))


@pytest.mark.parametrize('method', METHODS)
def test_it_trains_without_collapse(method):
    "Thirty steps on digits: weights move, losses are finite, features stay apart, the teacher says something but not everything"
    tasks, kw = METHODS[method]
    dls = digits_dls(bs=32, steps=30, device='cpu', whole=True)
    host = next((n for n in ('moco3', 'moby') if n in method), 'dino')
    recipe = get_recipe(host).but(lr=1e-3, final_lr=1e-5, locals=2 if host == 'dino' else 0, freeze_last=0, warmup=.2)
    torch.manual_seed(0)
    enc = TokenEncoder('vit_tiny_patch16_224', **small, in_chans=1, mean=dls.mean, std=dls.std, **kw)
    learn = pretrain_learner(dls, enc, tasks(), recipe=recipe, seed=0)
    images = dls.valid.one_batch()[0]
    view = lambda e: (lambda t: t.patches.flatten(1))(e.eval()(images))
    with torch.no_grad(): before = view(enc)
    with learn.no_bar(), learn.no_logging(): learn.fit_recipe(1)
    scores = {k: float(v) for k, v in learn.model.scores.items()}
    with torch.no_grad(): after, counts = view(learn.model.encoder), view(encoder_of(learn))
    assert all(np.isfinite(v) for v in scores.values()), scores
    assert (after - before).abs().mean() > 1e-3 and spread(after) > .05 and spread(counts) > .05, (spread(after), spread(counts))
    entropies = {k: v for k, v in scores.items() if k.endswith('entropy')}
    assert all(v > .05 for v in entropies.values()), entropies
    most = {f'{n}_entropy': t.chance((4, 4)).get('entropy', np.inf) for n, t in learn.model.tasks.items()}
    assert all(v < most[k] - 1e-3 for k, v in entropies.items()), (entropies, most) # of one that knows nothing
    assert all(v > 1e-3 for k, v in scores.items() if k.endswith('spread')), scores


# with other things

def test_images_that_are_not_square():
    dls = digits_dls(bs=8, steps=2, device='cpu', whole=True)
    enc = TokenEncoder('vit_tiny_patch16_224', img_size=(12, 16), p=4, depth=1, embed_dim=24, num_heads=2, in_chans=1)
    learn = pretrain_learner(dls, enc, [DINO(**widths)], recipe='dino')
    with learn.no_bar(), learn.no_logging(): learn.fit_recipe(1, cbs=[NoValidation()])
    assert [tuple(c.shape[-2:]) for c in learn.make_views.last[1].crops] == [(12, 16), (12, 12)]


class NoValidation(Callback):
    def before_validate(self): raise CancelValidException


def test_labels_keep_the_encoder_that_they_were_trained_with():
    model = RelViT(encoder(), dict(labels=Classification(3), dino=DINO(**widths)))
    assert model.counts == 'student' and model.learnt is model.encoder
    assert RelViT(encoder(), [DINO(**widths)]).counts == 'teacher' and RelViT(encoder(), [MoCo3(hidden=16, out=8)]).counts == 'student'


def test_a_warmed_temperature_is_part_of_the_model():
    task = DINO(out=8, first_temp=.01, teacher_temp=.5, warm_epochs=3)
    task.epoch = 2
    again = DINO(out=8, first_temp=.01, teacher_temp=.5, warm_epochs=3)
    again.load_state_dict(task.state_dict())
    assert again.teacher_temp == .5 and DINO(out=8, first_temp=.01, teacher_temp=.5, warm_epochs=3).teacher_temp == .01


def test_encoders_come_home_whole():
    "With the drop path that a teacher has not, and with patches that MoCo v3 kept as they were"
    dls = digits_dls(bs=8, steps=1, device='cpu', whole=True)
    make = lambda: TokenEncoder('vit_tiny_patch16_224', **small, in_chans=1, drop_path_rate=.3)
    drops = lambda e: [m.drop_prob for m in e.modules() if hasattr(m, 'drop_prob')]
    learn = pretrain_learner(dls, make(), [DINO(**widths)])
    assert drops(encoder_of(learn)) == drops(learn.model.encoder) != drops(learn.model.teacher.encoder)
    moco = pretrain_learner(dls, make(), [MoCo3(hidden=16, out=8)])
    assert not moco.model.encoder.model.patch_embed.proj.weight.requires_grad
    assert pretrain_learner(dls, moco.model.encoder).model.encoder.model.patch_embed.proj.weight.requires_grad


def test_what_cannot_be():
    dls = digits_dls(bs=8, steps=1, device='cpu', whole=True)
    enc = lambda: TokenEncoder('vit_tiny_patch16_224', **small, in_chans=1)
    for bad, why in [(lambda: pretrain_learner(dls, enc(), [DINO(**widths)], mega=2), 'no task here asks'),
                     (lambda: DINO(teacher_temp=0), 'teacher_temp must be above 0'), (lambda: SelfPatch(k=0), 'k must be above 0'),
                     (lambda: MoBY(momentum=5), 'momentum must lie between 0 and 1'), (lambda: DINO(center='local'), 'center is'),
                     (lambda: get_recipe('dino').but(global_scale=(.9, .2)), 'two rising shares'),
                     (lambda: pretrain_learner(dls, enc(), [DINO(**widths), SelfPatch(window=5, border='clip', **widths), SelfPatch(window=5, **widths)]), 'wrap'),
                     (lambda: RelViT(enc(), [MoCo3(hidden=8, out=4)])(torch.rand(2, 1, 16, 16), views=MultiCrop(16, globals=1)(torch.rand(2, 1, 16, 16))), 'large crops')]:
        with pytest.raises(ValueError, match=why): bad()
    with pytest.raises(ValueError, match='mean of weights already'):
        learn = pretrain_learner(dls, enc(), [DINO(**widths)], recipe='modern')
        with learn.no_bar(), learn.no_logging(): learn.fit_recipe(1)


def test_validation_of_relations_sees_plain_images():
    dls = digits_dls(bs=8, steps=1, device='cpu', whole=True)
    learn = pretrain_learner(dls, TokenEncoder('vit_tiny_patch16_224', **small, in_chans=1), [DINO(**widths), 'relations'], augment=False)
    seen = []
    learn.model.register_forward_pre_hook(lambda _, a: seen.append((a[0], a[4])))
    with learn.no_bar(), learn.no_logging(): learn.validate()
    assert seen[0][0].equal(dls.valid.one_batch()[0]) and not seen[0][1].view(0).equal(seen[0][0])


# from a configuration

def test_arguments_of_tasks_from_text():
    c = Pretrain(tasks=('dino', 'selfpatch', 'relations=.5'), task_args=('dino.out=64', 'selfpatch.border=clip', 'selfpatch.window=5'))
    made = make_tasks(config_tasks(c))
    assert {n: t.weight for n, t in made.items()} == dict(dino=1., selfpatch=.1, relations=.5) # SelfPatch's own weight
    assert len(made['dino'].center.value) == 64 and made['selfpatch'].border == 'clip' and made['selfpatch'].window == 5
    for bad, why in {'dino.outt=3': "did you mean 'out'", 'moby.size=3': 'with a task of dino', 'dino.out': 'name=value', 'out=3': 'with a task of dino'}.items():
        with pytest.raises(ValueError, match=why): Pretrain(tasks=('dino',), task_args=(bad,))


def test_whole_images_for_crops_and_augmented_ones_for_labels():
    assert looks_at(Pretrain(tasks=('dino', 'relations')), 'views') and not looks_at(Pretrain(), 'views')
    whole, moved = (make_learner(c).dls.train for c in (Pretrain(tasks=('dino',), task_args=('dino.out=8', 'dino.hidden=8', 'dino.bottleneck=4'), **few),
                                                        Pretrain(**few)))
    assert whole.augment.fs == [] and moved.augment.fs


few = dict(encoder='vit_tiny_patch16_224', encoder_args=('embed_dim=24', 'depth=1', 'num_heads=2'), bs=8, steps=1, device='cpu')
