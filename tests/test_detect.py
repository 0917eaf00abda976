"""Pyramids and detectors: what the notebooks do not show. Every backbone and kind through a step, torchvision's own
classes on images that need a canvas, what a cascade's losses and answers are made of, weights in and out."""
import copy, json
from functools import cache

import pytest, torch
from safetensors.torch import save_file
from timm.utils import ModelEmaV3
from torch.testing import assert_close
from torchvision.models.detection import MaskRCNN

import relvit.t2t # noqa: F401 (its models come into timm)
from relvit.checkpoint import export_timm, load, load_encoder, read_meta, save
from relvit.detect import DETR_SIZES, Detector, Looks, looks
from relvit.dino import DINO
from relvit.pyramid import Canvas, Pyramid, choose_levels, levels_of, pyramid_of
from relvit.shapes import make_shapes
from relvit.tasks import Classification, RelViT
from relvit.tokens import TokenEncoder
from relvit.views import MultiCrop

SMALL = dict(channels=16, fc=16, mask_convs=1, anchors=4, proposals=(40, 20), samples=(32, 32), min_size=None)
KINDS = 'faster', 'mask', 'cascade'
ENCODERS = dict(vit=dict(name_or_model='vit_tiny_patch16_224', img_size=64, p=8, embed_dim=24, depth=2, num_heads=2),
                vit32=dict(name_or_model='vit_tiny_patch16_224', img_size=64, p=32, embed_dim=24, depth=2, num_heads=2),
                swin=dict(name_or_model='swin_tiny_patch4_window7_224', embed_dim=12, depths=(1, 1, 1, 1), num_heads=(1, 1, 2, 2)),
                t2t=dict(name_or_model='t2t_vit_7', embed_dim=24, depth=2, num_heads=2, token_dim=8),
                resnet=dict(name_or_model='resnet10t', img_size=64))


def encoder(name='vit', **kwargs):
    torch.manual_seed(0)
    return TokenEncoder(**ENCODERS[name] | kwargs)


def detector(kind='mask', name='vit', **kwargs):
    e = encoder(name)
    return Detector(e, kwargs.pop('classes', 5), kind, **SMALL | kwargs)


@cache
def _scenes(): return make_shapes(3, size=64, seed=2)
def scenes(): return list(_scenes()[0]), [dict(t) for t in _scenes()[1]]


def losses(model, *args, seed=0, **kwargs):
    torch.manual_seed(seed)
    return model.train()(*args, **kwargs)


def close(a, b, tol=1e-5): assert_close(a, b, atol=tol, rtol=tol)


def same(a, b, tol=1e-4):
    "Detections of two models"
    assert len(a) == len(b)
    for x, y in zip(a, b):
        assert set(x) == set(y)
        for k in x: close(x[k].float(), y[k].float(), tol)


# the pyramid

@pytest.mark.parametrize('name', ENCODERS)
def test_every_backbone_comes_to_the_same_strides(name):
    p = Pyramid(encoder(name), 8).eval()
    with torch.no_grad(): maps = p(torch.rand(1, 3, 64, 128))
    assert [tuple(m.shape) for m in maps.values()] == [(1, 8, 64//s, 128//s) for s in (4, 8, 16, 32, 64)]
    assert list(maps) == ['0', '1', '2', '3', 'pool'] and p.neck.multiple == 32


@pytest.mark.parametrize('name', ENCODERS)
def test_looking_at_a_backbone_leaves_no_trace(name):
    e = encoder(name).train()
    before, mode = copy.deepcopy(e.state_dict()), [m.training for m in e.modules()]
    levels_of(e)
    assert [m.training for m in e.modules()] == mode
    for k, w in e.state_dict().items(): assert torch.equal(w, before[k]), k


def test_the_papers_blocks():
    assert [l.layer for l in choose_levels(levels_of(encoder(depth=12)))] == [3, 5, 7, 11]


def test_layer_norm_and_other_strides():
    p = Pyramid(encoder(), 8, strides=(8, 16), layers=(0, -1), norm='layer').eval()
    x = torch.rand(2, 3, 48, 80)
    with torch.no_grad(): alone, both = p(x[:1]), p.train()(x) # no statistics of a batch
    for k, m in alone.items(): close(m[0], both[k][0])
    assert p.neck.all_strides == (8, 16, 32) and p.neck.layers == [0, 1]


def test_checkpointing_changes_no_gradient():
    grads, x = [], torch.rand(1, 3, 64, 64)
    for on in (False, True):
        torch.manual_seed(1)
        p = Pyramid(encoder(), 8).train()
        p.encoder.model.set_grad_checkpointing(on)
        sum(m.square().sum() for m in p(x).values()).backward()
        grads.append(p.encoder.model.patch_embed.proj.weight.grad)
    close(*grads)


def test_a_canvas_takes_one_channel_and_keeps_what_it_is_given():
    images = [torch.randint(256, (1, 20, 30), dtype=torch.uint8), torch.rand(1, 40, 10)]
    batch, _ = Canvas(16, None)(images, colour=torch.full((1, 1, 1), .25))
    assert batch.tensors.shape == (2, 1, 48, 32) and batch.tensors[0, :, 20:].unique().item() == .25
    close(batch.tensors[0, :, :20, :30], images[0]/255)
    assert torch.equal(batch.tensors[1, :, :40, :10], images[1])


# a step

@pytest.mark.parametrize('name', ENCODERS)
@pytest.mark.parametrize('kind', KINDS)
def test_a_step_reaches_every_part(kind, name):
    model = detector(kind, name)
    said = losses(model, *scenes())
    assert set(said) == {'classifier', 'boxes', 'objectness', 'proposals', *(['masks'] if kind != 'faster' else [])}
    total = model.loss(said)
    total.backward()
    assert total.isfinite() and set(model.scores) == {f'{k}_loss' for k in said}
    dead = [n for n, w in model.named_parameters() if w.grad is None and not n.startswith('encoder.')]
    assert not dead and any(w.grad.abs().sum() > 0 for w in model.encoder.parameters() if w.grad is not None)
    with torch.no_grad(): found = model.eval()(scenes()[0])
    for d in found:
        assert set(d) == {'boxes', 'labels', 'scores', *(['masks'] if kind != 'faster' else [])}
        assert d['labels'].numel() == 0 or 1 <= d['labels'].min() <= d['labels'].max() <= 5
        assert (d['scores'].diff() <= 0).all() and (d['boxes'] >= 0).all() and (d['boxes'] <= 64).all()


def test_images_that_need_a_canvas_as_torchvision_has_them():
    "Sides of 64 times n, so that it guesses the strides right, and an encoder for which black is the mean"
    e = encoder(mean=0., std=1.)
    own = dict(proposals=(40, 20), samples=(32, 32), min_size=None, score=.01)
    ours = Detector(e, 5, **own)
    theirs = MaskRCNN(Pyramid(e), 6, image_mean=[0.]*3, image_std=[1.]*3, _skip_resize=True, rpn_pre_nms_top_n_train=40,
                      rpn_post_nms_top_n_train=40, rpn_batch_size_per_image=32, box_batch_size_per_image=32)
    for a, b in ((theirs.backbone.neck, ours.neck), (theirs.rpn, ours.rpn), (theirs.roi_heads, ours.roi_heads.stages[0])):
        a.load_state_dict(b.state_dict())
    x, y = make_shapes(2, size=128, seed=5)
    x, y = [x[0, :, :, :110], x[1, :, :100]], [dict(t) for t in y]
    for t, (h, w) in zip(y, ((128, 110), (100, 128))):
        t['boxes'], t['masks'] = torch.minimum(t['boxes'], torch.tensor([w, h]*2)), t['masks'][:, :h, :w]
    got = losses(ours, x, y)
    want = losses(theirs, [i/255 for i in x], y)
    pairs = dict(classifier='classifier', boxes='box_reg', masks='mask', objectness='objectness', proposals='rpn_box_reg')
    for k, name in pairs.items(): close(got[k], want[f'loss_{name}'])


def test_boxes_come_back_on_the_image():
    model = detector(min_size=128, score=0.).eval()
    images, _ = scenes()
    with torch.no_grad():
        found = model(images[:1]) + model([images[1][:, :40]])
        large = model([torch.nn.functional.interpolate(images[0][None]/255, scale_factor=2., mode='bilinear')[0]])
    assert found[0]['masks'].shape[1:] == (1, 64, 64) and found[1]['masks'].shape[1:] == (1, 40, 64)
    assert found[1]['boxes'][:, 3].max() <= 40 and len(found[0]['boxes']) == len(large[0]['boxes']) > 0
    close(2*found[0]['boxes'], large[0]['boxes'], 1e-3)


def test_bytes_and_shares_are_the_same_image():
    model, (images, targets) = detector(), scenes()
    a, b = losses(model, images, targets), losses(model, [i/255 for i in images], targets)
    for k in a: close(a[k], b[k])


def test_a_step_is_the_same_again_and_another_with_another_seed():
    model, (images, targets) = detector('cascade'), scenes()
    model.rpn.fg_bg_sampler.batch_size_per_image = 8
    a, b, c = (losses(model, images, targets, seed=s) for s in (0, 0, 1))
    assert all(a[k] == b[k] for k in a) and any(a[k] != c[k] for k in a)


@pytest.mark.parametrize('kind', KINDS)
def test_company_changes_no_answer(kind):
    model, (images, _) = detector(kind).eval(), scenes()
    with torch.no_grad():
        both, turned, alone = model(images), model(images[::-1]), [model([i])[0] for i in images]
    same(both, turned[::-1], 1e-3)
    same(both, alone, 1e-3)


@pytest.mark.parametrize('kind', KINDS)
def test_mixed_precision(kind):
    model, (images, targets) = detector(kind), scenes()
    exact = losses(model, images, targets)
    with torch.autocast('cpu', torch.bfloat16):
        rough = losses(model, images, targets)
        total = model.loss(rough)
        with torch.no_grad(): found = model.eval()(images)
    total.backward()
    assert total.dtype == torch.float32 and total.isfinite()
    for k in exact: assert rough[k].dtype == torch.float32 and (rough[k] - exact[k]).abs() < .15*exact[k] + .05, k
    assert all(v.dtype == torch.float32 for d in found for k, v in d.items() if k != 'labels')


# targets

@pytest.mark.parametrize('why', ['crowd', 'difficult', 'label'])
def test_what_is_not_trained_on_changes_nothing(why):
    model, (images, targets) = detector(), scenes()
    want = losses(model, images, targets)
    more = []
    for t in targets:
        n, last = len(t['labels']), t['labels'][-1:] if why != 'label' else torch.zeros(1, dtype=torch.long)
        more.append(dict(boxes=torch.cat([t['boxes'], torch.tensor([[1., 2, 60, 50]])]), labels=torch.cat([t['labels'], last]),
                         masks=torch.cat([t['masks'], torch.ones(1, 64, 64, dtype=torch.bool)])))
        if why != 'label': more[-1][why] = torch.arange(n + 1) == n
    got = losses(model, images, more)
    for k in want: assert got[k] == want[k], k


@pytest.mark.parametrize('kind', KINDS)
def test_a_batch_without_objects_is_a_lesson(kind):
    model, (images, _) = detector(kind), scenes()
    none = dict(boxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.long))
    said = losses(model, images, [none]*3)
    model.loss(said).backward()
    assert said['boxes'] == said['proposals'] == said.get('masks', 0) == 0 and said['classifier'] > 0 and said['objectness'] > 0


def test_masks_where_there_are_some():
    "Scenes without masks change nothing about the loss of masks"
    model, (images, targets) = detector(), scenes()
    model.eval(), model.rpn.train(), model.roi_heads.train(), model.canvas.train() # no statistics of a batch
    model.training = True
    bare = [{k: v for k, v in t.items() if k != 'masks'} for t in targets]
    torch.manual_seed(0)
    whole = model(images[:1], targets[:1])
    torch.manual_seed(0)
    mixed = model(images, [targets[0], *bare[1:]])
    assert whole['masks'] > 0 and model(images, bare)['masks'] == 0
    assert (mixed['masks'] - whole['masks']).abs() < .2 # other samples of the same objects


# the cascade

def test_losses_of_a_cascade_are_the_weighted_sums_of_its_stages():
    model, (images, targets) = detector('cascade'), scenes()
    heads, said = model.roi_heads, []
    for s in heads.stages:
        s.losses = lambda *args, f=s.losses, **kwargs: said.append(f(*args, **kwargs)) or said[-1]
    got = losses(model, images, targets)
    for k in said[0]: close(got[k], sum(w*d[k] for w, d in zip((1, .5, .25), said)))


def test_stages_get_the_boxes_of_the_one_before():
    "Stage 2 is told those of stage 1, moved, and the targets once"
    model, (images, targets) = detector('cascade', samples=(32, 1000)), scenes()
    seen, first = [], model.roi_heads.stages[0]
    for s in model.roi_heads.stages:
        s.look = lambda maps, boxes, sizes, f=s.look: seen.append(boxes) or f(maps, boxes, sizes)
    torch.nn.init.zeros_(first.box_predictor.bbox_pred.weight)
    first.box_predictor.bbox_pred.bias.data = torch.tensor([1., 0, 0, 0]) # a tenth of the width to the right
    losses(model, images, targets)
    for a, b, t in zip(seen[0], seen[1], targets):
        assert torch.equal(a[-len(t['boxes']):], t['boxes']) and torch.equal(b[-len(t['boxes']):], t['boxes'])
        a, b = a[:-len(t['boxes'])], b[:-len(t['boxes'])]
        step = .1*(a[:, 2] - a[:, 0])[:, None]*torch.tensor([1., 0, 1, 0])
        moved = (a + step).clamp(max=64) # nothing is drawn by lot where so many are taken
        assert all((moved - x).abs().amax(1).min() < 1e-3 for x in b)


def test_three_equal_stages_without_moves_are_one():
    "The mean of equal answers is that answer, masks too"
    torch.manual_seed(0)
    three = looks((4, 8, 16, 32), 3, 8, 16, cascade=True, mask_convs=1, score=0.).eval()
    for s in three.stages:
        s.load_state_dict(three.stages[0].state_dict())
        torch.nn.init.zeros_(s.box_predictor.bbox_pred.weight), torch.nn.init.zeros_(s.box_predictor.bbox_pred.bias)
    one = Looks(list(three.stages[:1])).eval()
    maps = {str(i): torch.rand(2, 8, 64//s, 64//s) for i, s in enumerate((4, 8, 16, 32))}
    boxes = [torch.tensor([[3., 4, 30, 40], [10, 10, 60, 50]]), torch.tensor([[1., 2, 50, 60]])]
    with torch.no_grad(): a, b = (m(maps, boxes, [(64, 64)]*2)[0] for m in (three, one))
    same(a, b)
    assert sum(len(d['boxes']) for d in a) == 9 # each as each class


def test_scores_of_a_cascade_are_means():
    three = looks((4, 8, 16, 32), 1, 8, 16, cascade=True, masks=False, score=0.).eval()
    for s, logit in zip(three.stages, (-3., 0., 3.)):
        for w in s.box_predictor.parameters(): torch.nn.init.zeros_(w)
        s.box_predictor.cls_score.bias.data[1] = logit
    maps = {str(i): torch.rand(1, 8, 64//s, 64//s) for i, s in enumerate((4, 8, 16, 32))}
    with torch.no_grad(): found = three(maps, [torch.tensor([[3., 4, 30, 40]])], [(64, 64)])[0][0]
    close(found['scores'], torch.tensor([-3., 0, 3]).sigmoid().mean()[None])


# tasks beside, averages, weights

def test_joint_training_is_the_sum_of_both():
    model, (images, targets) = detector('mask', tasks={'relations': .5, 'positions': 1.}), scenes()
    x = torch.stack(images)
    both = losses(model, images, targets, x=x)
    total, scores = model.loss(both), model.scores
    alone = losses(model, images, targets)
    want = model.loss(alone) + RelViT.loss(model, RelViT.forward(model, x))
    close(total, want, 1e-4)
    assert set(scores) == {f'{k}_loss' for k in (*alone, 'relations', 'positions')}
    total.backward()
    assert model.tasks['relations'].head.qk.weight.grad.abs().sum() > 0
    assert 'tasks' not in losses(detector(), images, targets, x=x)


def test_tasks_see_patches_where_they_are_given():
    model, (images, _) = detector(tasks=['relations']).eval(), scenes()
    with torch.no_grad(): found = model(images, x=torch.stack(images), patches=torch.rand(3, 3, 32, 32))
    assert found['tasks'].grid == (4, 4) and len(found['detections']) == 3


def test_labels_reach_the_classifier_and_targets_do_not():
    model, (images, targets) = detector(tasks=[Classification(3, zero=False)]), scenes()
    said = losses(model, images, targets, x=torch.stack(images))
    y = torch.tensor([0, 1, 2])
    assert model.loss(said, targets, y) == model.loss(said, y) != model.loss(said, y.roll(1))


def test_a_teacher_beside():
    model, (images, targets) = detector(tasks=[DINO(out=64, hidden=32)]), scenes()
    x = torch.stack(images).float()/255
    said = losses(model, images, targets, x=x, views=MultiCrop(64, 32)(x))
    model.loss(said).backward()
    assert 'dino_loss' in model.scores and model.counts == 'student' and model.learnt is model.encoder


def test_averaged_weights_answer():
    model, (images, _) = detector('cascade', tasks=['relations'], score=0.), scenes()
    model.ema = ModelEmaV3(model, decay=.5)
    with torch.no_grad():
        for w in model.roi_heads.parameters(): w.add_(1.)
        found, want = model.eval()(images, x=torch.stack(images)), model.ema.module(images)
    same(found['detections'], want)
    assert model.loss(found) > 0


def test_a_file_of_a_detector(tmp_path):
    model, (images, _) = detector('cascade', vocab=list('abcde'), tasks=['relations'], min_size=DETR_SIZES, score=0.), scenes()
    path = save(model, tmp_path/'d.safetensors', detector=model.config)
    assert {k.split('.')[0] for k in model.state_dict()} == {'encoder', 'neck', 'rpn', 'roi_heads', 'tasks'}
    meta = read_meta(path)
    again = Detector(load_encoder(path), tasks=list(meta['tasks']), **meta['detector'])
    report = load(path, again)
    assert not report.missing and not report.left_out and again.vocab == list('abcde') and json.dumps(again.config)
    model.canvas.min_size = again.canvas.min_size = []
    with torch.no_grad(): same(model.eval()(images), again.eval()(images), 0)


@pytest.mark.parametrize('name', ENCODERS)
def test_an_encoder_comes_from_pretraining_and_goes_home(name, tmp_path):
    pretrained = RelViT(encoder(name), ['relations'])
    for w in pretrained.encoder.parameters(): w.data.add_(.1)
    save(pretrained, tmp_path/'p.safetensors')
    model = detector('faster', name)
    report = load(tmp_path/'p.safetensors', model)
    assert all(k.startswith(('neck.', 'rpn.', 'roi_heads.')) for k in report.missing) and report.missing
    home = export_timm(model, tmp_path/'h.safetensors').create()
    for k, w in pretrained.encoder.model.state_dict().items(): assert torch.equal(home.state_dict()[k], w), k
    save(model, tmp_path/'d.safetensors')
    for k, w in load_encoder(tmp_path/'d.safetensors').state_dict().items(): assert torch.equal(pretrained.encoder.state_dict()[k], w), k


@pytest.mark.parametrize('prefix', ['teacher.', 'student.', 'module.backbone.', 'x.encoder.model.'])
def test_nothing_loads_silently_empty(prefix, tmp_path):
    save_file({prefix + k: w for k, w in encoder().model.state_dict().items()}, tmp_path/'ssl.safetensors')
    model = detector('faster')
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match='no weight of the encoder fits'): load(tmp_path/'ssl.safetensors', model)
    assert all(torch.equal(w, before[k]) for k, w in model.state_dict().items())


def test_an_encoder_with_another_mean_paints_another_canvas(tmp_path):
    "The mean travels with the weights, so the canvas asks for it at every pass"
    save(encoder(mean=(.1, .2, .3)), tmp_path/'e.safetensors')
    model = detector('faster').eval()
    load(tmp_path/'e.safetensors', model)
    model([scenes()[0][0][:, :40]])
    close(model.canvas.colour.flatten(), torch.tensor([.1, .2, .3]))


def test_what_a_detector_says_of_itself():
    said = repr(detector('cascade', masks=False, tasks=['relations']))
    for part in 'Cascade R-CNN, 5 classes', 'strides 4, 8, 16, 32, 64', 'anchors     16, 32, 64, 128, 256 px', 'relations':
        assert part in said
    model = detector()
    assert pyramid_of(model.encoder, model.neck, torch.rand(1, 3, 64, 64))['0'].shape == (1, 16, 16, 16)
