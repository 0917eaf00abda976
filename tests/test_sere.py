"""SERE: the released code's numbers where they were recorded, and a slow reading of the paper and that code for the rest.

Recorded are relations, heads and their statistics on seeded tokens. The recorded losses came without their tokens, so
losses and gradients are held to `slow_pixel` and `slow_channel`: one pair of views after the other, one image after the
other, all h*w x h*w relations first and these resampled twice, as the released code does.
"""
import copy, math

import pytest, torch
import torch.nn.functional as F
from test_golden import close, recorded

from relvit.losses import soft_cross_entropy
from relvit.sere import (ChannelRelation, PixelRelation, RelationHead, as_map, channel_relation,
                         pixel_relation, relation_difference, released_sere, sample_views, view_difference, view_pairs)
from relvit.tasks import RelViT, Seen, make_tasks
from relvit.tokens import TokenEncoder, Tokens
from relvit.views import MultiCrop, Views, sampling_grids


# recorded

def head(kind):
    h = RelationHead(24)
    missing = h.load_state_dict(recorded('sere', f'{kind}/w/'), strict=False)
    assert not missing.unexpected_keys and all('num_batches' in k for k in missing.missing_keys)
    return h.train()


def tokens_4x4():
    x = recorded('sere', 'pixel/')['x_4x4']
    return Tokens(None, x, x, (4, 4))


@torch.no_grad()
@pytest.mark.parametrize('kind', ['pixel', 'channel'])
def test_recorded_relations_and_losses(kind):
    r, h, f = recorded('sere', f'{kind}/'), head(kind), as_map(tokens_4x4())
    relate = (lambda z: pixel_relation(z, 6)) if kind == 'pixel' else channel_relation
    z, p = relate(h.projection(f)), relate(h(f)) # two updates of the projection's statistics, one of the predictor's
    close(z, r['rel_z_4x4'], 2e-5)
    close(p, r['rel_p_4x4'], 2e-5)
    temp = .5 if kind == 'pixel' else .1
    want = -(r['teacher_softmax_4x4']*r['student_softmax_4x4'].log()).sum(-1)
    close(soft_cross_entropy(p, z, 1., temp), want, 2e-5)
    close((z/temp).softmax(-1), r['teacher_softmax_4x4'], 1e-5)


@torch.no_grad()
def test_recorded_statistics():
    r, h, f = recorded('sere', 'pixel/'), head('pixel'), as_map(tokens_4x4())
    p = h(f)
    bn = h.projection[0]
    close(bn.running_mean, r['bn_running_mean_after'], 1e-6)
    close(bn.running_var, r['bn_running_var_after'], 1e-5)
    assert p.shape == f.shape
    h.eval()
    close(pixel_relation(h.projection(f), 6), r['rel_z_4x4_eval'], 2e-5)
    close(pixel_relation(h(f), 6), r['rel_p_4x4_eval'], 2e-5)


def test_released_border_halves_what_it_reads_there():
    whole = torch.tensor([[0., 0., 224., 224., 0.]])
    grid = sampling_grids(whole, whole, 13)[0]
    want = recorded('sere', 'grid/')['border_attenuation_full_overlap']
    close(sample_views(torch.ones(1, 1, 1, 14, 14), torch.zeros(1).long(), grid[None])[0, 0, 0], want, 1e-6)
    close(sample_views(torch.ones(1, 1, 1, 14, 14), torch.zeros(1).long(), grid[None], 'border')[0, 0, 0], torch.ones(13, 13), 1e-6)


# the losses, slowly

dim, M = 12, 6


class Encoder(torch.nn.Module):
    "Only what a task asks of an encoder"
    def __init__(self, dim=dim, heads=M):
        super().__init__()
        self.dim, self.heads = dim, heads


def boxes_of(b, globals, locals, seed=0):
    "Random boxes on 120 x 100; the last local view of image 0 meets no global view"
    g = torch.Generator().manual_seed(seed)
    size = torch.cat([torch.randint(45, 80, (globals, b, 2), generator=g), torch.randint(20, 45, (locals, b, 2), generator=g)])
    corner = (torch.rand(size.shape, generator=g)*(torch.tensor([100, 80]) - size)).round()
    flip = torch.randint(2, (*size.shape[:2], 1), generator=g)
    boxes = torch.cat([corner, size, flip], -1).float()
    if locals: boxes[-1, 0] = torch.tensor([105., 85, 15, 15, 0])
    return boxes


def seen_by_two(b=2, globals=2, locals=3, grid=7, local_grid=4, seed=0, d=dim, boxes=None):
    "What student and teacher made of views of 16 pixels a token"
    g = torch.Generator().manual_seed(seed)
    counts = [(globals, grid)] + [(locals, local_grid)]*(locals > 0)
    views = Views([torch.zeros(v*b, 3, 16*s, 16*s) for v, s in counts],
                  boxes_of(b, globals, locals, seed) if boxes is None else boxes, (100, 120))
    def tokens(only=None):
        made = [torch.randn(v*b, s*s, d, generator=g) for v, s in counts[:only]]
        return [Tokens(None, x, x.requires_grad_(), (s, s)) for x, (_, s) in zip(made, counts)]
    return Seen(tokens(), views), Seen(tokens(1), views)


def built(task, d=dim, heads=M):
    "With weights of BatchNorm that are none of its first ones"
    torch.manual_seed(1)
    task.setup(Encoder(d, heads), (7, 7))
    for w in task.parameters():
        if w.ndim == 1: w.data = 1 + .3*torch.randn_like(w)
    teacher = copy.deepcopy(task.taught_part())
    for w in teacher.parameters(): w.data += .1*torch.randn_like(w)
    return task.train(), teacher.train()


def norm_relu(bn, x): # (v*b,d,h,w)
    m, v = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), correction=0, keepdim=True)
    return F.relu((x - m)/(v + bn.eps).sqrt()*bn.weight[:, None, None] + bn.bias[:, None, None])


def slow_maps(seen, heads, predict):
    maps = []
    for r, t in enumerate(seen.tokens):
        h = heads[-1 if r else 0]
        z = norm_relu((h.projection if predict else h)[0], t.prenorm.transpose(1, 2).reshape(len(t.prenorm), -1, *t.grid))
        if predict: z = norm_relu(h.predictor[1], torch.einsum('ij,bjhw->bihw', h.predictor[0].weight[:, :, 0, 0], z))
        maps.append(z.unflatten(0, (-1, seen.views.b)))
    return maps


def points(box, other, s):
    "The overlap's points in the frame of `box`, one by one; None where there is none"
    (l, t, w, h, flip), (l2, t2, w2, h2, _) = box.tolist(), other.tolist()
    x0, y0, x1, y1 = max(l, l2), max(t, t2), min(l + w, l2 + w2), min(t + h, t2 + h2)
    if x1 <= x0 or y1 <= y0: return torch.full((s, s, 2), -2.)
    rows = []
    for i in range(s):
        for j in range(s):
            u, v = (x0 + j*(x1 - x0)/(s - 1) - l)/w, (y0 + i*(y1 - y0)/(s - 1) - t)/h
            rows.append([2*(1 - u if flip else u) - 1, 2*v - 1])
    return torch.tensor(rows).reshape(s, s, 2)


def resampled_relation(z, grid, heads):
    "(d,h,w) related first, all places with all, then columns and rows resampled: (heads,n,n)"
    d, h, w = z.shape
    parts = z.reshape(heads, d//heads, h*w)
    a = torch.einsum('mcn,mck->mnk', parts, parts)/(d/heads)**.5
    read = lambda m: F.grid_sample(m.reshape(1, -1, h, w), grid[None], align_corners=False).reshape(heads, h*w, -1)
    a = read(a) # (heads,rows,points)
    a = F.grid_sample(a.transpose(1, 2).reshape(1, -1, h, w), grid[None], align_corners=False)
    return a.reshape(heads, grid.shape[0]**2, -1).transpose(1, 2)


def crossed(student, teacher, temp): return -((teacher/temp).softmax(-1)*student.log_softmax(-1)).sum(-1).mean()


def slow_pixel(student, teacher, boxes, dilute, sizes):
    "(mean over pairs and images, terms) of L_p; maps as `slow_maps` gives them"
    terms = []
    for r, views in enumerate(student):
        first = len(student[0]) if r else 0
        for q in range(len(teacher)):
            for k in range(len(views)):
                if r == 0 and q == k: continue
                for i in range(views.shape[1]):
                    gq, gk = points(boxes[q, i], boxes[first + k, i], sizes[r]), points(boxes[first + k, i], boxes[q, i], sizes[r])
                    if (gq == -2).all() and not dilute: continue
                    terms.append(crossed(resampled_relation(views[k, i], gk, M), resampled_relation(teacher[q, i], gq, M), .5))
    return torch.stack(terms).mean(), len(terms)


def slow_channel(student, teacher):
    relate = lambda z: torch.einsum('chw,dhw->cd', z, z)/z[0].numel()
    return torch.stack([crossed(relate(views[k, i]), relate(teacher[q, i]), .1)
                        for r, views in enumerate(student) for q in range(len(teacher)) for k in range(len(views))
                        if r or q != k for i in range(views.shape[1])]).mean()


@pytest.mark.parametrize('globals,locals', [(2, 3), (2, 0), (3, 1), (1, 2)])
@pytest.mark.parametrize('dilute,local_heads', [(True, True), (False, False)])
def test_losses_and_gradients_are_the_slow_ones(globals, locals, dilute, local_heads):
    s, t = seen_by_two(globals=globals, locals=locals)
    pixel, pixel_teacher = built(PixelRelation(local_heads=local_heads, dilute=dilute))
    channel, channel_teacher = built(ChannelRelation(local_heads=local_heads))
    taught = pixel.teach(t, pixel_teacher)
    total = pixel.loss(pixel(s), taught) + channel.loss(channel(s), channel.teach(t, channel_teacher))
    leaves = [x.prenorm for x in s.tokens] + [*pixel.parameters()] + [*channel.parameters()]
    got = torch.autograd.grad(total, leaves, allow_unused=True)

    wanted, terms = slow_pixel(slow_maps(s, pixel.head, True), slow_maps(t, [pixel_teacher], False)[0], s.views.boxes, dilute, (6, 4))
    wanted = wanted + slow_channel(slow_maps(s, channel.head, True), slow_maps(t, [channel_teacher], False)[0])
    want = torch.autograd.grad(wanted, leaves, allow_unused=True)
    pairs = globals*(globals - 1) + globals*locals
    if locals: assert terms == pairs*2 - (0 if dilute else globals) # one local view of one image meets nobody
    close(total, wanted, 1e-5)
    assert sum(w is not None and bool(w.any()) for w in want) > 6
    for leaf, g, w in zip(leaves, got, want):
        g, w = (torch.zeros_like(leaf) if v is None else v for v in (g, w))
        close(g, w, 1e-5*max(w.abs().max().item(), 1))


# laws

def test_disjoint_crops_say_nothing():
    boxes = torch.tensor([[0., 0, 40, 40, 0], [50, 50, 40, 40, 1], [0, 60, 20, 20, 0], [60, 0, 20, 20, 1]])[:, None].expand(-1, 2, -1)
    for border in 'released', 'clean':
        s, t = seen_by_two(locals=2, boxes=boxes)
        for dilute in False, True:
            task, teacher = built(PixelRelation(dilute=dilute, border=border))
            loss = task.loss(task(s), task.teach(t, teacher))
            grads = torch.autograd.grad(loss, [x.prenorm for x in s.tokens] + [*task.parameters()])
            assert not any(g.any() for g in grads)
            close(loss, torch.tensor((2*math.log(36) + 4*math.log(16))/6 if dilute else 0.), 1e-5)


def test_a_view_against_itself_is_its_entropy():
    "Equal boxes, equal tokens, equal temperatures, no predictor: cross entropy is entropy, and nothing differs"
    boxes = torch.tensor([10., 5, 60, 50, 0]).expand(2, 3, 5)
    s, _ = seen_by_two(b=3, locals=0, boxes=boxes)
    x = s.tokens[0].prenorm[:3].detach().repeat(2, 1, 1)
    s = Seen([Tokens(None, x, x.requires_grad_(), (7, 7))], s.views)
    for task in PixelRelation(teacher_temp=.7, student_temp=.7, predictor=False), ChannelRelation(1., .3, .3, False):
        task.setup(Encoder(), (7, 7)).train()
        taught = task.teach(s, task.taught_part())
        loss, m = task.loss(task(s), taught), task.metrics(None, taught)
        close(loss, m['entropy'], 1e-5)
        close(m['difference'], torch.tensor(0.), 1e-6)
        close(torch.autograd.grad(loss, x)[0], torch.zeros_like(x), 1e-6) # nothing pulls either
        log_n = math.log(36 if task.name == 'pixel' else dim)
        assert .2*log_n < m['entropy'] < log_n


def test_a_mirrored_view_is_the_same_view():
    "Its boxes say so: relation and metric see through the flip"
    boxes = torch.tensor([[10., 5, 60, 50, 0], [10, 5, 60, 50, 1]])[:, None].expand(2, 3, 5)
    s, _ = seen_by_two(b=3, locals=0, boxes=boxes)
    x = s.tokens[0].prenorm[:3].detach()
    x = torch.cat([x, x.unflatten(1, (7, 7)).flip(2).flatten(1, 2)])
    for border in 'released', 'clean':
        task, teacher = built(PixelRelation(border=border))
        found = task.metrics(None, task.teach(Seen([Tokens(None, x, x, (7, 7))], s.views), teacher))
        close(found['difference'], torch.tensor(0.), 1e-5)


def test_metrics_of_three_views():
    s, t = seen_by_two(globals=3, locals=1)
    task, teacher = built(PixelRelation())
    relations, meets = task.teach(t, teacher)[:2]
    a, b, where = task.compared((relations, meets))
    assert a.shape == (3, 2, 6, 36, 36) # 0-1, 0-2, 1-2
    pairs = [tuple(p) for p in zip(*(v.tolist() for v in view_pairs([3])))]
    for i, (q, k) in enumerate([(0, 1), (0, 2), (1, 2)]):
        close(a[i], relations[pairs.index((q, k))], 0)
        close(b[i], relations[pairs.index((k, q))], 0)
    each = relation_difference(a, b, .5).mean(-1)
    close(task.metrics(None, (relations, meets))['difference'], each[where].mean(), 1e-6)
    s, t = seen_by_two(globals=1, locals=2)
    assert set(task.metrics(None, task.teach(t, teacher))) == {'entropy'} # there are no two views to compare


def test_teacher_gets_no_gradient_and_has_no_predictor():
    for task in PixelRelation(local_heads=True), ChannelRelation(local_heads=True):
        s, t = seen_by_two()
        task, teacher = built(task)
        assert sum(w.numel() for w in teacher.parameters()) == 2*dim
        task.loss(task(s), task.teach(t, teacher)).backward()
        assert all(w.grad is None for w in [*teacher.parameters(), *(x.prenorm for x in t.tokens)])
        assert all(w.grad is not None and w.grad.any() for w in [*task.parameters(), *(x.prenorm for x in s.tokens)])


@pytest.mark.parametrize('border', ['released', 'clean'])
def test_relations_are_float32_under_autocast(border):
    for task in PixelRelation(border=border), ChannelRelation():
        s, t = seen_by_two()
        task, teacher = built(task)
        exact = task.loss(task(s), task.teach(t, teacher))
        half = lambda seen: Seen([Tokens(None, x.prenorm, x.prenorm.bfloat16(), x.grid) for x in seen.tokens], seen.views)
        with torch.autocast('cpu', torch.bfloat16):
            pred, taught = task(half(s)), task.teach(half(t), teacher)
            loss = task.loss(pred, taught)
        assert {x.dtype for x in (*pred, *taught, loss)} <= {torch.float32, torch.bool} and loss.dtype == torch.float32
        close(loss, exact.detach(), .05)


def test_statistics_are_those_of_all_globals_and_of_all_locals():
    "Local views may be as strange as they like: the relations of global ones stay"
    s, t = seen_by_two()
    task, teacher = built(PixelRelation())
    want = task(s)
    x = s.tokens[1]
    strange = Seen([s.tokens[0], Tokens(None, x.patches, 7 + 100*x.prenorm, x.grid)], s.views)
    got = task(strange)
    close(got[0], want[0], 1e-6)
    close(got[1], want[1], 2e-3) # BatchNorm takes scale and shift away, but for its eps


def test_points_follow_the_grid():
    s, t = seen_by_two()
    task, teacher = built(PixelRelation())
    assert [x.shape for x in task(s)] == [(2, 2, M, 36, 36), (6, 2, M, 16, 16)]
    s, t = seen_by_two(b=1, grid=14, local_grid=6)
    assert [x.shape[-1] for x in task(s)] == [169, 36]
    task.points = 5, (3, 4)
    assert [x.shape[-1] for x in task(s)] == [25, 12]


def test_heads():
    vit = lambda **k: TokenEncoder('vit_tiny_patch16_224', img_size=32, p=16, depth=1, **k)
    assert vit().heads == 3 and vit(num_heads=6).heads == 6 == PixelRelation().setup(vit(num_heads=6), (2, 2)).heads
    assert TokenEncoder('resnet18', img_size=32).heads == 4 # which has no attention, and a width of 512
    with pytest.raises(ValueError, match='5 heads do not divide a width of 192'): PixelRelation(heads=5).setup(vit(), (2, 2))
    with pytest.raises(ValueError, match="border is 'released' or 'clean'"): PixelRelation(border='wrap')
    with pytest.raises(ValueError, match='there is one'): ChannelRelation().setup(Encoder(), (7, 7))(seen_by_two(globals=1, locals=0)[0])


# within a model

def images(b=3, side=48): return torch.rand(b, 3, side, side, generator=torch.Generator().manual_seed(0))


def test_trains_in_a_model():
    "Tasks by name, beside each other and a task of RelViT; teacher and heads follow the student"
    torch.manual_seed(0)
    encoder = TokenEncoder('vit_tiny_patch16_224', img_size=32, p=8, depth=1, embed_dim=24, num_heads=2)
    model = RelViT(encoder, {'relations': 1, 'pixel': 1, 'channel': ChannelRelation(.5)})
    assert {n: sum(w.numel() for w in h.parameters()) for n, h in model.teacher.heads.items()} == dict(pixel=48, channel=48)
    views = MultiCrop(32, 16, locals=2)(images(), torch.Generator().manual_seed(1))
    opt, costs = torch.optim.AdamW([w for w in model.parameters() if w.requires_grad], 1e-3), []
    for step in range(8):
        loss = model.train().loss(model(images(side=32), views=views))
        loss.backward(), opt.step(), opt.zero_grad(), model.move_teacher(1.)
        costs.append(model.scores['pixel_loss'] + model.scores['channel_loss'])
    assert costs[-1] < costs[0]
    with torch.no_grad(): model.eval().loss(model(images(side=32), views=views))
    assert {f'{n}_{k}' for n in ('pixel', 'channel') for k in ('loss', 'difference', 'entropy')} <= set(model.scores)


def test_released_mixture():
    made = released_sere('moby')
    assert {n: w if isinstance(w, (int, float)) else w.weight for n, w in made.items()} == dict(moby=1.65, pixel=.2, channel=.5)
    assert released_sere(pixel=1., channel=1.)['dino'] == 1 # as its defaults
    assert made['pixel'].dilute and made['pixel'].local_heads and made['channel'].local_heads
    assert {n: t.weight for n, t in make_tasks({'pixel': 1, 'channel': .5}).items()} == dict(pixel=1, channel=.5)


def test_view_difference():
    torch.manual_seed(0)
    encoder = TokenEncoder('vit_tiny_patch16_224', img_size=32, p=8, depth=1, embed_dim=24, num_heads=2)
    g = lambda: torch.Generator().manual_seed(3)
    found = view_difference(encoder, images(6), generator=g())
    assert set(found) == {'pixel', 'channel', 'pixel_others', 'channel_others'} and all(0 < v < 2 for v in found.values())
    assert found == view_difference(encoder, images(6), generator=g())
    assert encoder.training and not any(w.grad is not None for w in encoder.parameters())
    assert 'pixel' in view_difference(encoder, images(6), generator=g(), bs=4)
