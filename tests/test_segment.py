"""Heads, segmenters and their measures: what the notebook does not show. Every encoder and head through a step, numbers of
ImageNet-S's own code, windows against a slow loop, the parameters that the papers' configurations imply, weights in and out."""
import copy, json, math
from pathlib import Path

import numpy as np, pytest, torch, torch.nn.functional as F
from safetensors.torch import save_file
from timm.utils import ModelEmaV3
from torch.testing import assert_close

import relvit.t2t # noqa: F401 (its models come into timm)
from relvit.checkpoint import export_timm, load, load_encoder, read_meta, save
from relvit.label_maps import IGNORE
from relvit.pyramid import Pyramid, pyramid_of
from relvit.segment import (HEADS, FPNHead, LinearHead, Overlap, Segmenter, UPerHead, canvas_of, f_measure, largest, pixel_loss, spread,
                            window_starts)
from relvit.tasks import RelViT
from relvit.tokens import TokenEncoder

KINDS = tuple(HEADS)
ENCODERS = dict(vit=dict(name_or_model='vit_tiny_patch16_224', img_size=64, p=8, embed_dim=24, depth=2, num_heads=2),
                vit32=dict(name_or_model='vit_tiny_patch16_224', img_size=64, p=32, embed_dim=24, depth=2, num_heads=2),
                swin=dict(name_or_model='swin_tiny_patch4_window7_224', embed_dim=12, depths=(1, 1, 1, 1), num_heads=(1, 1, 2, 2)),
                t2t=dict(name_or_model='t2t_vit_7', embed_dim=24, depth=2, num_heads=2, token_dim=8),
                resnet=dict(name_or_model='resnet10t', img_size=64))


def encoder(name='vit', **kwargs):
    torch.manual_seed(0)
    return TokenEncoder(**ENCODERS[name] | kwargs)


def segmenter(kind='linear', name='vit', loud=False, **kwargs):
    "A small one; a loud one answers with differences worth comparing"
    model = Segmenter(encoder(name), kwargs.pop('classes', 5), kind, **dict(channels=None if kind == 'linear' else 16) | kwargs)
    if loud: torch.nn.init.normal_(next(m for m in reversed([*model.head.modules()]) if isinstance(m, torch.nn.Conv2d)).weight)
    return model


def scenes(b=2, h=64, w=64, k=5, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randint(256, (b, 3, h, w), generator=g, dtype=torch.uint8), torch.randint(IGNORE, k, (b, h, w), generator=g)


def close(a, b, tol=1e-5): assert_close(a, b, atol=tol, rtol=tol)
def weights(m): return sum(w.numel() for w in m.parameters())


# heads

def test_parameters_of_the_papers_configurations():
    "Counted on paper: side² a b of a convolution and 2 b of its norm; a transposed one, and those of the pyramid, have a bias"
    e = TokenEncoder('vit_small_patch16_224')
    conv = lambda a, b, side: side**2*a*b + 2*b
    down = 3*(4*384*384 + 384) + 2*384 # two doublings and one; a norm between the two
    uper = Segmenter(e, 150, 'uper', channels=384) # iBOT's on ADE20K
    assert weights(uper.neck) == down == 1_771_392
    assert weights(uper.head) == (7*conv(384, 384, 1) + conv(1920, 384, 3) + 3*conv(384, 384, 3) + conv(1536, 384, 3)
                                  + 384*150 + 150) == 17_024_406
    assert weights(uper.aux) == conv(384, 256, 3) + 256*150 + 150 == 923_798
    assert weights(UPerHead([384]*4, 150)) == (7*conv(384, 512, 1) + conv(384 + 2048, 512, 3) + 3*conv(512, 512, 3)
                                               + conv(2048, 512, 3) + 512*150 + 150) == 29_187_222 # mmsegmentation's width
    fpn = Segmenter(e, 150, 'fpn') # SelfPatch's on ADE20K, on four strides
    assert weights(fpn.neck) == down + 4*(384*256 + 256) + 4*(9*256*256 + 256) == 4_525_952
    assert weights(fpn.head) == 4*conv(256, 128, 3) + 3*conv(128, 128, 3) + 128*150 + 150 == 1_643_158
    flat = Segmenter(e, 150, 'fpn', strides=(16,)*4, layers=(2, 5, 8, 11)) # and on one
    assert weights(flat.neck) == 2_754_560 and weights(flat.head) == 4*conv(256, 128, 3) + 128*150 + 150
    assert flat.neck.layers == [2, 5, 8, 11] and uper.neck.layers == fpn.neck.layers == [3, 5, 7, 11] and flat.multiple == (16, 16)
    assert weights(Segmenter(e, 51).head) == 2*384 + 384*51 + 51 # ImageNet-S50


def test_the_linear_head_starts_at_nothing():
    head = LinearHead(384, 301)
    w = head.classify.weight
    assert abs(w.std().item()/2e-5 - 1) < .02 and w.abs().max() < 2 and not head.classify.bias.any()


def test_uper_by_its_formula():
    torch.manual_seed(0)
    head = UPerHead([6, 7, 8], 5, 4, (1, 2)).eval()
    x = [torch.rand(2, d, 16//2**i, 24//2**i) for i, d in enumerate((6, 7, 8))]
    up = lambda f, like: F.interpolate(f, like.shape[2:], mode='bilinear')
    with torch.no_grad():
        top = head.context(torch.cat([x[2], up(head.pools[0](x[2].mean((2, 3), keepdim=True)), x[2]),
                                      up(head.pools[1](F.avg_pool2d(x[2], (2, 3))), x[2])], 1))
        mid = head.lateral[1](x[1]) + up(top, x[1])
        low = head.lateral[0](x[0]) + up(mid, x[0])
        want = head.classify(head.fuse(torch.cat([head.smooth[0](low), up(head.smooth[1](mid), low), up(top, low)], 1)))
        close(head(dict(enumerate(x))), want)


def test_semantic_fpn_by_its_formula():
    torch.manual_seed(0)
    head = FPNHead((4, 8, 16), 6, 5, 4).eval()
    x = {i: torch.rand(2, 6, 16//2**i, 24//2**i) for i in range(3)}
    twice = lambda f: F.interpolate(f, scale_factor=2, mode='bilinear')
    b = head.branches
    with torch.no_grad():
        want = b[0][0](x[0]) + twice(b[1][0](x[1])) + twice(b[2][2](twice(b[2][0](x[2]))))
        close(head(x), head.classify(want))


# a step

@pytest.mark.parametrize('name', ENCODERS)
@pytest.mark.parametrize('kind', KINDS)
def test_a_step_reaches_every_part(kind, name):
    model, (x, maps) = segmenter(kind, name, loud=True), scenes(h=60, w=75)
    said = model.train()(x)
    assert set(said) == ({'logits', 'aux'} if kind == 'uper' else {'logits'})
    total = model.loss(said, maps)
    total.backward()
    assert total.isfinite() and set(model.scores) == {'segment_loss'} | ({'aux_loss'} if kind == 'uper' else set())
    dead = [n for n, w in model.named_parameters() if w.grad is None and n != 'encoder.model.cls_token' and '.model.norm.' not in n]
    assert not dead and sum(w.grad.abs().sum() for w in model.encoder.parameters() if w.grad is not None) > 0
    with torch.no_grad(): found = model.eval()(x)
    assert found.shape == (2, 5, 60, 75) and found.dtype == torch.float32
    for m, f in zip(model.segment(x), found): assert torch.equal(m, f.argmax(0)) and m.dtype == torch.int64


@pytest.mark.parametrize('kind', KINDS)
def test_bytes_and_shares_are_the_same_image(kind):
    model, (x, _) = segmenter(kind, loud=True).eval(), scenes(h=60)
    close(model(x), model(x/255))


@pytest.mark.parametrize('kind', KINDS)
def test_mixed_precision(kind):
    model, (x, maps) = segmenter(kind, loud=True), scenes()
    torch.manual_seed(0)
    exact = model.loss(model(x), maps)
    with torch.autocast('cpu', torch.bfloat16):
        torch.manual_seed(0)
        said = model.train()(x)
        rough = model.loss(said, maps)
        found = model.eval()(x)
        model.segment(x, 'slide', 32, 24)
    rough.backward()
    assert {v.dtype for v in (*said.values(), found, rough)} == {torch.float32} and (rough - exact).abs() < .1*exact


@pytest.mark.parametrize('name', ['vit', 'resnet'])
@pytest.mark.parametrize('kind', KINDS)
def test_a_frozen_encoder_stays_as_it_is(kind, name):
    model, (x, maps) = segmenter(kind, name, loud=True), scenes()
    model.encoder.requires_grad_(False)
    before = copy.deepcopy(model.encoder.state_dict())
    assert 'frozen' in repr(model) and not model.train().encoder.training and model.head.training
    model.loss(model(x), maps).backward()
    assert all(w.grad is None for w in model.encoder.parameters()) and all(w.grad is not None for w in model.head.parameters())
    for k, w in model.encoder.state_dict().items(): assert torch.equal(w, before[k]), k # no statistics of a batch
    model.encoder.requires_grad_(True)
    assert model.train().encoder.training


def test_company_changes_no_answer():
    x, _ = scenes(3, 60, 75)
    for kind in KINDS:
        model = segmenter(kind, loud=True).eval()
        with torch.no_grad(): close(model(x), torch.cat([model(i[None]) for i in x]), 1e-4)


@pytest.mark.parametrize('kind', ['fpn', 'uper'])
def test_layer_norm_takes_single_images(kind):
    model, x = segmenter(kind, norm='layer', dropout=0.), scenes()[0]
    a, b = model.train()(x)['logits'], torch.cat([model(i[None])['logits'] for i in x])
    close(a, b)
    if kind == 'uper':
        with pytest.raises(ValueError, match='2 images a batch'): segmenter(kind).train()(x[:1])


def test_the_norm_of_a_vit_and_its_positions():
    x, _ = scenes()
    for kind, normed in (('fpn', False), ('uper', True)):
        model = segmenter(kind).eval()
        assert model.config['out_norm'] is normed
        before = model(x)
        with torch.no_grad(): model.encoder.model.norm.weight.mul_(2)
        assert torch.equal(model(x), before) is not normed
    blind = encoder(pos_embed=False)
    on, off = (Segmenter(blind, 5, pos_embed=p).eval() for p in (True, None))
    off.load_state_dict(on.state_dict())
    assert not torch.equal(on(x), off(x))
    with torch.no_grad(): blind.model.pos_embed.zero_()
    assert torch.equal(on(x), off(x))


def test_grey_images():
    model = Segmenter(encoder(in_chans=1), 3).eval()
    assert model(torch.rand(1, 1, 50, 64)).shape == (1, 3, 50, 64)


def test_averaged_weights_answer_out_of_training():
    model, x = segmenter('fpn', loud=True), scenes()[0]
    model.ema = ModelEmaV3(model, decay=.9).requires_grad_(False)
    with torch.no_grad():
        for w in model.head.parameters(): w.add_(1.)
    assert not torch.equal(model.eval()(x), spread(model._answer(x)['logits'], (64, 64), (64, 64)))
    assert torch.equal(model.eval()(x), model.ema.module.eval()(x)) and isinstance(model.train()(x), dict)
    assert torch.equal(model.segment(x)[0], model.ema.module.segment(x)[0])
    assert model.training and model.counts == 'student'


# losses

@pytest.mark.parametrize('kind', KINDS)
def test_pixels_that_do_not_count_change_nothing(kind):
    model, (x, maps) = segmenter(kind, loud=True, dropout=0.), scenes()
    said = model.train()(x)
    logits = said['logits'].detach()
    assert model.loss({k: torch.zeros_like(v) for k, v in said.items()}, torch.full_like(maps, IGNORE)) == 0
    half = maps.clone()
    half[:, :32] = IGNORE
    upper, lower = maps.clone(), torch.where(torch.arange(64)[:, None] < 32, IGNORE, maps)
    assert torch.equal(half, lower) and model.loss(said, half) != model.loss(said, upper)
    other = {k: v.clone() for k, v in said.items()}
    other['logits'][:, :, :len(logits[0, 0])//4] += 3. # far from what counts
    model.loss(said, half)
    want = model.scores['segment_loss']
    model.loss(other, half)
    close(model.scores['segment_loss'], want)


def test_the_loss_of_a_linear_head_is_that_of_imagenets():
    "Logits twice as large; of every fourth pixel of the map the upper left counts"
    model, (x, maps) = segmenter(loud=True), scenes()
    said = model.train()(x)
    logits = F.interpolate(said['logits'], scale_factor=2, mode='bilinear')
    close(model.loss(said, maps), F.cross_entropy(logits, maps[:, ::4, ::4], ignore_index=IGNORE))


@pytest.mark.parametrize('kind', ['fpn', 'uper'])
def test_the_loss_of_the_others_is_that_of_every_pixel(kind):
    model, (x, maps) = segmenter(kind, loud=True), scenes()
    said = model.train()(x)
    cost = lambda f: F.cross_entropy(F.interpolate(f, (64, 64), mode='bilinear'), maps, ignore_index=IGNORE)
    want = cost(said['logits']) + (.4*cost(said['aux']) if kind == 'uper' else 0)
    close(model.loss(said, maps), want)
    close(model.loss(model.eval()(x), maps), F.cross_entropy(model(x), maps, ignore_index=IGNORE))


def test_the_weight_of_the_auxiliary_head():
    x, maps = scenes()
    model = segmenter('uper', aux=2.)
    total = model.loss(model.train()(x), maps)
    close(total, model.scores['segment_loss'] + 2*model.scores['aux_loss'])
    assert model.scores['aux_loss'].requires_grad is False
    assert model.aux.classify[1].in_channels == 16 and segmenter('uper', channels=260).aux.classify[1].in_channels == 256
    without = segmenter('uper', aux=0)
    assert without.aux is None and set(without.train()(x)) == {'logits'} and not [k for k in without.state_dict() if k.startswith('aux')]


def test_maps_that_cannot_be_meant():
    model, (x, maps) = segmenter(), scenes()
    said = model.train()(x)
    for wrong in (maps + 1, maps - 1):
        with pytest.raises(ValueError, match='classes are 0 to 4, -1 where none counts; a map has (5|-2)'): model.loss(said, wrong)
    for wrong in (maps[:1], maps[..., :32], maps[0]):
        with pytest.raises(ValueError, match='do not belong to images'): model.loss(said, wrong)
    with pytest.raises(ValueError, match='do not belong to images'): model.loss(model.eval()(x), maps[..., :63])
    assert pixel_loss(torch.zeros(1, 4, 2, 2), torch.full((1, 2, 2), IGNORE)) == 0


# images of any size

def test_logits_of_a_canvas_at_any_size():
    "What rises evenly goes on to do so, wherever a place has two neighbours"
    for l, canvas, size, out in (((4, 6), (64, 96), (50, 81), (123, 77)), ((7, 3), (56, 48), (49, 48), (20, 200)), ((5, 5), (40, 40), (33, 40), (33, 40))):
        ph, pw = canvas[0]/l[0], canvas[1]/l[1]
        y, x = (torch.arange(l[0]) + .5)*ph, (torch.arange(l[1]) + .5)*pw
        found = spread((2*y[:, None] + 3*x)[None, None], canvas, size, out)
        y = ((torch.arange(out[0]) + .5)*size[0]/out[0]).clamp(ph/2, canvas[0] - ph/2)
        x = ((torch.arange(out[1]) + .5)*size[1]/out[1]).clamp(pw/2, canvas[1] - pw/2)
        close(found[0, 0], 2*y[:, None] + 3*x, 1e-4)
    assert canvas_of((1, 65), (32, 16)) == (32, 80)


def test_an_answer_has_the_size_that_is_asked_for():
    "Whatever l*(o/s*c/l) comes to in floating point; and its values are those of the formula"
    def along(l, o, s, c): # (o,l) weights of one side
        at = ((torch.arange(o, dtype=torch.float64) + .5)*s*l/(o*c) - .5).clamp(0, l - 1)
        return (1 - (at[:, None] - torch.arange(l)).abs()).clamp(min=0)
    g, rounded, equal = torch.Generator().manual_seed(0), 0, 0
    for _ in range(1500):
        p = (8, 14, 16, 32)[int(torch.randint(4, (1,), generator=g))]
        size, out = (tuple(torch.randint(1, n, (2,), generator=g).tolist()) for n in (130, 160))
        canvas = canvas_of(size, (p, p))
        x = torch.randn(1, 1, canvas[0]//p, canvas[1]//p, generator=g)
        sides = [*zip(x.shape[2:], out, size, canvas)]
        found, (a, b) = spread(x, canvas, size, out), (along(*side) for side in sides)
        assert found.shape == (1, 1, *out)
        close(found[0, 0].double(), a @ x[0, 0].double() @ b.T, 1e-4)
        rounded += any(int(l*(o/s*c/l)) < o for l, o, s, c in sides)
        equal += any(l == o and s != c for l, o, s, c in sides)
    assert rounded and equal # both happen
    for h, w, *out in (224, 243, 460, 500), (1024, 1000, 4099, 3001):
        assert spread(torch.zeros(1, 1, -(-h//16), -(-w//16)), canvas_of((h, w), (16, 16)), (h, w), out).shape[2:] == tuple(out)


@pytest.mark.parametrize('size', [(460, 500), (375, 500), (333, 500), (91, 64)])
def test_real_sizes_resized(size):
    e = TokenEncoder('vit_tiny_patch16_224', img_size=224, p=16, embed_dim=12, depth=1, num_heads=1)
    model = Segmenter(e, 3)
    assert model.segment(torch.zeros(1, 3, *size), short=224)[0].shape == size


@pytest.mark.parametrize('seed', range(3))
def test_windows_cover_every_pixel(seed):
    g = torch.Generator().manual_seed(seed)
    for _ in range(200):
        n, crop = (int(v) for v in torch.randint(1, 200, (2,), generator=g))
        stride = int(torch.randint(1, crop + 1, (1,), generator=g))
        starts, seen = window_starts(n, crop, stride), torch.zeros(max(n, crop))
        for i in starts: seen[i:i + crop] += 1
        assert starts == sorted(set(starts)) and seen[:n].min() >= 1 and (n < crop or starts[-1] == n - crop)
        assert len(starts) == max(math.ceil((n - crop)/stride), 0) + 1 and all(i == k*stride for k, i in enumerate(starts[:-1]))


def slow(model, x, crop, stride):
    "Classes by sliding windows, one after the other"
    h, w = x.shape[1:]
    total, seen = torch.zeros(model.classes, h, w), torch.zeros(h, w)
    for i in range(0, max(h - crop + stride - 1, 0)//stride + 1):
        for j in range(0, max(w - crop + stride - 1, 0)//stride + 1):
            bottom, right = min(i*stride + crop, h), min(j*stride + crop, w)
            top, left = max(bottom - crop, 0), max(right - crop, 0)
            total[:, top:bottom, left:right] += model(x[None, :, top:bottom, left:right])[0]
            seen[top:bottom, left:right] += 1
    return (total/seen).argmax(0)


@pytest.mark.parametrize('kind', KINDS)
def test_windows_are_what_a_slow_loop_finds(kind):
    model = segmenter(kind, loud=True).eval()
    with torch.no_grad():
        for h, w, crop, stride in ((64, 64, 32, 32), (70, 110, 48, 31), (30, 90, 40, 40), (100, 41, 64, 13)):
            x = scenes(1, h, w)[0]
            want = slow(model, x[0], crop, stride)
            for batch in (1, 5):
                found = model.segment(x, 'slide', crop, stride, batch=batch)[0]
                assert found.shape == (h, w) and (found != want).float().mean() < 1e-3


@pytest.mark.parametrize('kind', KINDS)
def test_one_window_is_the_whole_image(kind):
    model, (x, _) = segmenter(kind, loud=True).eval(), scenes(2, 60, 75)
    for crop in (75, 512): # a window is never larger than the image
        assert all(torch.equal(a, b) for a, b in zip(model.segment(x, 'slide', crop), model.segment(x)))


def test_the_usual_stride_is_that_of_ibot():
    model, seen = segmenter(), []
    model._slide = lambda x, crop, stride, batch: seen.append((crop, stride)) or x.new_zeros(1, 5, *x.shape[2:])
    model.segment(scenes(1)[0], 'slide')
    assert seen == [(512, 341)]
    with pytest.raises(ValueError, match="stride is 1 to crop"): model.segment(scenes(1)[0], 'slide', 512, 513)
    with pytest.raises(ValueError, match="'whole' or 'slide'"): model.segment(scenes(1)[0], 'windows')


def test_images_come_back_in_order_and_leave_no_trace():
    model = segmenter('fpn', loud=True)
    model.train().neck.eval()
    modes, state = [m.training for m in model.modules()], copy.deepcopy(model.state_dict())
    images = [scenes(1, *s, seed=i)[0][0] for i, s in enumerate(((64, 64), (50, 70), (64, 64), (70, 50), (50, 70)))]
    found = model.segment(images, batch=2)
    assert [m.shape for m in found] == [i.shape[1:] for i in images] and not any(m.requires_grad for m in found)
    for x, m in zip(images, found): assert (model.segment([x])[0] != m).float().mean() < 1e-3
    assert [m.training for m in model.modules()] == modes
    for k, w in model.state_dict().items(): assert torch.equal(w, state[k]), k
    assert model.segment([]) == []


def test_a_resized_image_is_answered_at_its_own_size():
    "And a network that sees colours only says the same of a plain image at any size"
    model = segmenter(loud=True).eval()
    seen, answer = [], model._answer
    model._answer = lambda x: seen.append(tuple(x.shape)) or answer(x)
    x = scenes(2, 50, 100)[0]
    assert [m.shape for m in model.segment(x, short=32)] == [(50, 100)]*2
    model.segment(x, short=32, long=48)
    model.segment(x, 'slide', 32, short=40)
    assert seen == [(2, 3, 32, 64), (2, 3, 24, 48), *[(8, 3, 32, 32)]*2]


def test_large_images_are_decided_on_a_smaller_map():
    model, x = segmenter(loud=True).eval(), scenes(1, 60, 120)[0]
    whole = model.segment(x)[0]
    assert torch.equal(model.segment(x, most=60*120)[0], whole)
    small = model.segment(x, most=40**2)[0] # 20 x 40
    assert torch.equal(small, small[1::3, 1::3].repeat_interleave(3, 0).repeat_interleave(3, 1))
    assert torch.equal(small[1::3, 1::3], spread(model._answer(x)['logits'], (64, 120), (60, 120), (20, 40))[0].argmax(0))
    assert model.segment(x, 'slide', 40, most=1000)[0].shape == (60, 120)


def test_the_largest_of_few_at_a_time_is_the_largest():
    x, up = torch.randint(4, (3, 11, 5, 6)).float(), lambda f: F.interpolate(f, (9, 7), mode='nearest')
    for most in (1, 400, 10**6): assert torch.equal(largest(x, up, most), up(x).argmax(1)) # ties go to the first


# measures

def imagenets(): return {k: torch.as_tensor(v) for k, v in np.load(Path(__file__).parent/'fixtures'/'imagenets.npz').items()}


def test_the_numbers_of_imagenets():
    r = imagenets()
    o = Overlap('abcdef', background=0)
    o.add(r['pred'].view(20, 20), r['target'].view(20, 20))
    s = o.result()
    close(o.pairs.diagonal().float(), r['inter'], 0)
    close(o.pairs.sum(0).float(), r['area_pred'], 0)
    close(o.pairs.sum(1).float(), r['area_target'], 0)
    close(torch.tensor([100*c['IoU'] for c in s.classes.values()]), r['IoU'], 1e-5)
    close(s.miou, r['IoU'].mean().item()/100, 1e-6)
    close(s.fmeasure, r['fmeasure'].item(), 1e-6)


def test_overlap_is_what_sets_of_pixels_give():
    found, truth = torch.randint(0, 6, (4, 9, 11)), torch.randint(IGNORE, 5, (4, 9, 11)) # class 5 is found only
    found[found == 4] = 3 # and 4 is true only
    o, whole = Overlap('abcdefg', 0), Overlap('abcdefg', 0)
    for f, t in zip(found, truth): o.add(f, t)
    whole.add(found, truth)
    assert torch.equal(o.pairs, whole.pairs) and o.result().asdict() == whole.result().asdict() and o.pairs.dtype == torch.int64
    s, known = o.result(), truth != IGNORE
    iou, acc = {}, {}
    for k in range(7):
        a, b = (found == k) & known, (truth == k) & known
        if (a | b).any(): iou[k] = ((a & b).sum()/(a | b).sum()).item()
        if b.any(): acc[k] = ((a & b).sum()/b.sum()).item()
    close(s.miou, sum(iou.values())/len(iou), 1e-6)
    close(s.macc, sum(acc.values())/len(acc), 1e-6)
    close(s.pixel_acc, (found == truth)[known].float().mean().item(), 1e-6)
    assert set(iou) == {*range(6)} and set(acc) == {*range(5)} and math.isnan(s.classes['g']['IoU']) and s.pixels == known.sum()
    fs = []
    for f, t in zip(found, truth):
        tp = ((f > 0) & (t > 0)).sum().item()
        p, r = tp/((f > 0) & (t != IGNORE)).sum().item(), tp/(t > 0).sum().item()
        fs.append(1.3*p*r/(.3*p + r))
    close(s.fmeasure, sum(fs)/4, 1e-6)
    assert json.dumps(s.asdict(), allow_nan=False) and 'mIoU' in repr(s) and len(s.table) == 7


def test_pixels_are_counted_over_the_set_and_f_over_images():
    "A large image counts for more pixels than a small one, and for as much F"
    o = Overlap('ab', 0)
    o.add([torch.ones(10, 10).long(), torch.zeros(1, 2).long()], [torch.ones(10, 10).long(), torch.ones(1, 2).long()])
    s = o.result()
    close((s.classes['b']['IoU'], s.pixel_acc, s.fmeasure), (100/102, 100/102, .5), 1e-9)
    none = Overlap('ab')
    none.add(torch.ones(2, 2).long(), torch.full((2, 2), IGNORE))
    s = none.result()
    assert s.fmeasure is None and math.isnan(s.miou) and s.asdict()['miou'] is None and 'mIoU -' in repr(s)


def test_perfect_is_one_and_nothing_is_nothing():
    m = torch.randint(0, 4, (3, 8, 8))
    o = Overlap('abcd', 0)
    o.add(m, m)
    s = o.result()
    assert s.miou == s.macc == s.pixel_acc == 1 and s.fmeasure == pytest.approx(1, abs=1e-6)
    o = Overlap('abcd', 0)
    o.add((m + 1) % 4, m)
    assert o.result().miou == o.result().macc == o.result().pixel_acc == 0
    assert f_measure(torch.tensor([[5, 0], [3, 0]]), 0) == 0 == f_measure(torch.tensor([[5, 3], [0, 0]]), 0)


# weights

@pytest.mark.parametrize('kind', KINDS)
def test_a_file_of_a_segmenter(kind, tmp_path):
    palette = torch.randint(256, (5, 3), dtype=torch.uint8)
    model, (x, _) = segmenter(kind, loud=True, vocab='abcde', palette=palette, background=0), scenes()
    path = save(model, tmp_path/'s.safetensors', segmenter=model.config)
    parts = dict(linear={'encoder', 'head'}, fpn={'encoder', 'neck', 'head'}, uper={'encoder', 'neck', 'head', 'aux'})
    assert {k.split('.')[0] for k in model.state_dict()} == parts[kind]
    again = Segmenter(load_encoder(path), **read_meta(path)['segmenter'])
    report = load(path, again)
    assert not report.missing and not report.left_out and again.config == model.config and torch.equal(again.palette, palette)
    assert again.vocab == list('abcde') and again.background == 0 and json.dumps(again.config)
    assert torch.equal(model.eval()(x), again.eval()(x))


@pytest.mark.parametrize('kind, name', [('linear', 'vit'), ('uper', 'vit32'), ('fpn', 'swin'), ('linear', 't2t'), ('uper', 'resnet')])
def test_an_encoder_comes_from_pretraining_and_goes_home(kind, name, tmp_path):
    pretrained = RelViT(encoder(name), ['relations'])
    for w in pretrained.encoder.parameters(): w.data.add_(.1)
    save(pretrained, tmp_path/'p.safetensors')
    model = segmenter(kind, name)
    report = load(tmp_path/'p.safetensors', model)
    assert report.missing and all(k.startswith(('neck.', 'head.', 'aux.')) for k in report.missing)
    home = export_timm(model, tmp_path/'h.safetensors').create()
    for k, w in pretrained.encoder.model.state_dict().items(): assert torch.equal(home.state_dict()[k], w), k
    save(model, tmp_path/'s.safetensors')
    for k, w in load_encoder(tmp_path/'s.safetensors').state_dict().items(): assert torch.equal(pretrained.encoder.state_dict()[k], w), k


@pytest.mark.parametrize('prefix', ['teacher.', 'student.', 'module.backbone.', 'x.encoder.model.'])
def test_nothing_loads_silently_empty(prefix, tmp_path):
    save_file({prefix + k: w for k, w in encoder().model.state_dict().items()}, tmp_path/'ssl.safetensors')
    model = segmenter('fpn')
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match='no weight of the encoder fits'): load(tmp_path/'ssl.safetensors', model)
    assert all(torch.equal(w, before[k]) for k, w in model.state_dict().items())


def test_a_detectors_pyramid_is_what_it_was():
    "The same weights, with and without the fifth map"
    torch.manual_seed(0)
    p, fpn = Pyramid(encoder(), 16).eval(), segmenter('fpn', channels=8).eval()
    fpn.neck.load_state_dict(p.neck.state_dict())
    x = torch.rand(1, 3, 64, 64)
    with torch.no_grad(): five, four = p(x), pyramid_of(fpn.encoder, fpn.neck, x)
    assert list(five) == ['0', '1', '2', '3', 'pool'] and list(four) == ['0', '1', '2', '3']
    for k, m in four.items(): assert torch.equal(m, five[k])


def test_what_a_segmenter_says_of_itself():
    said = repr(segmenter('uper'))
    for part in 'UperNet, 5 classes', 'strides 4, 8, 16, 32', 'auxiliary head at stride 16, weight 0.4', 'aux ': assert part in said
    assert 'the last tokens, of 8 x 8 pixels' in repr(segmenter()) and 'frozen' not in repr(segmenter())
