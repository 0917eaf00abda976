"""SelfPatch against the numbers that the paper's own code gave (tests/fixtures/selfpatch.npz: width 32, 4 heads, 4
positives), and the laws of neighbours, positives and loss where no number was recorded."""
import copy, math
from functools import cache
from pathlib import Path

import numpy as np, pytest, torch
from torch.testing import assert_close

from relvit.heads import ClassAttention
from relvit.selfpatch import SelfPatch, SelfPatchHead, neighbours, positives, show_positives, similarities
from relvit.tasks import RelViT, Seen, make_tasks
from relvit.tokens import TokenEncoder, Tokens
from relvit.views import MultiCrop

pytestmark = pytest.mark.filterwarnings('ignore:this encoder has a class token') # which is a case of its own


@cache
def _load(): return {k: torch.as_tensor(v) for k, v in np.load(Path(__file__).parent/'fixtures/selfpatch.npz').items()}


def recorded(prefix):
    "The arrays whose keys start so, without that start; copies"
    found = {k.removeprefix(prefix): v.clone() for k, v in _load().items() if k.startswith(prefix)}
    assert found, f'nothing is called {prefix}*'
    return found


def close(got, want, tol=1e-5): assert_close(got, want, atol=tol, rtol=0)


@pytest.fixture
def aggregator():
    "`ClassAttention` with the recorded weights; all of them, and no other"
    r = recorded('agg/')
    h = ClassAttention(32, r['num_heads'].item())
    theirs = {k.removeprefix('w/').replace('cls_blocks', 'blocks'): v for k, v in r.items() if k.startswith('w/')}
    h.load_state_dict({'token': theirs.pop('cls_token'), **theirs})
    return h


@pytest.fixture
def head(aggregator):
    head, w = SelfPatchHead(32, 4, out=28, hidden=24, bottleneck=12), recorded('phead/w/')
    assert (w.pop('last_layer.weight_g') == 1).all()
    head.aggregate = aggregator
    head.project.load_state_dict({'last': w.pop('last_layer.weight_v'), **w})
    return head


def a_task(head, **kwargs):
    task = SelfPatch(out=28, **kwargs)
    task.head = head
    return task


# neighbours

@pytest.mark.parametrize('side', [3, 14])
def test_neighbours_as_released(side):
    assert torch.equal(neighbours((side, side)), recorded(f'nbr/{side}x{side}/')['idx'].long())


def by_hand(grid, window, border):
    "Patch by patch"
    (h, w), r = grid, range(-(window//2), window//2 + 1)
    for y, x in ((y, x) for y in range(h) for x in range(w)):
        there = [(y + dy, x + dx) for dy in r for dx in r if (dy, dx) != (0, 0)]
        if border == 'clip': there = [(v, u) for v, u in there if 0 <= v < h and 0 <= u < w]
        ids = sorted(v % h*w + u % w for v, u in there)
        yield ids + [-1]*(window**2 - 1 - len(ids))


@pytest.mark.parametrize('window', [3, 5, 7])
@pytest.mark.parametrize('grid', [(1, 1), (1, 6), (2, 2), (3, 3), (5, 4), (4, 7), (6, 6), (9, 7)])
@pytest.mark.parametrize('border', ['wrap', 'clip'])
def test_neighbours_of_any_grid(grid, window, border):
    if border == 'wrap' and min(grid) < window:
        with pytest.raises(ValueError, match=f"at least, and this one is {grid[0]} x {grid[1]}.*border='clip'"): neighbours(grid, window)
        return
    ids = neighbours(grid, window, border)
    assert ids.tolist() == list(by_hand(grid, window, border)) and ids.dtype == torch.int64
    if border == 'wrap': assert all(len(set(row) - {i}) == window**2 - 1 for i, row in enumerate(ids.tolist()))


def test_a_clipped_corner_has_3_and_an_edge_5():
    there = (neighbours((5, 7), border='clip') >= 0).sum(1).reshape(5, 7)
    want = torch.full((5, 7), 5)
    want[1:-1, 1:-1], want[::4, ::6] = 8, 3
    assert torch.equal(there, want)


def test_whole_grid(): assert neighbours((2, 3), None).tolist() == [[j for j in range(6) if j != i] for i in range(6)]


@pytest.mark.parametrize('kwargs,says', [(dict(window=2), 'odd'), (dict(window=1), 'odd'), (dict(border='mirror'), 'mirror')])
def test_wrong_neighbourhoods(kwargs, says):
    with pytest.raises(ValueError, match=says): neighbours((6, 6), **kwargs)


def test_neighbours_are_computed_once_and_serve_in_training():
    with torch.inference_mode(): first = neighbours((11, 4))
    assert neighbours((11, 4)) is first and neighbours([11, 4], device='cpu') is first
    x = torch.randn(44, 3, requires_grad=True)
    x[first].sum().backward()
    assert (x.grad == 8).all()


# positives

def test_matching_as_released():
    r = recorded('match/4x4/')
    near = neighbours((4, 4))
    close(similarities(r['x'], near), r['sim8'])
    got = positives(r['x'], (4, 4))
    assert torch.equal(got, r['topk_idx']) and torch.equal(got.sort(-1).values, r['topk_idx_sorted'])
    close(similarities(r['x'], near).gather(2, r['topk_slot']), r['topk_sim'])


@pytest.mark.parametrize('border', ['wrap', 'clip'])
@pytest.mark.parametrize('grid,window,k', [((3, 3), 3, 4), ((4, 7), 3, 8), ((6, 5), 5, 4), ((3, 4), None, 4), ((5, 5), 3, 10)])
def test_positives_against_a_loop(grid, window, k, border):
    x, n = torch.randn(2, grid[0]*grid[1], 16, dtype=torch.float64), grid[0]*grid[1]
    ids = positives(x, grid, k, border, window)
    assert ids.shape == (2, n, k)
    for b in range(2):
        for i, near in enumerate(neighbours(grid, window, border).tolist()):
            near = [j for j in near if j >= 0]
            near.sort(key=lambda j: -torch.cosine_similarity(x[b, i], x[b, j], dim=0).item())
            assert ids[b, i].tolist() == (near + [-1]*k)[:k]


def test_positives_do_not_depend_on_lengths_nor_on_autocast():
    x = torch.randn(2, 36, 24)
    want = positives(x, (6, 6))
    assert torch.equal(positives(x*torch.rand(2, 36, 1).add(.5), (6, 6)), want)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        assert torch.equal(positives(x, (6, 6)), want)
        assert similarities(x.bfloat16(), neighbours((6, 6))).dtype == torch.float32
    x.requires_grad_()
    assert not similarities(x, neighbours((6, 6))).requires_grad


def test_wrong_number_of_tokens():
    with pytest.raises(ValueError, match='a grid of 4 x 4 has 16 patches, not 17'): positives(torch.randn(1, 17, 8), (4, 4))


def test_a_picture():
    ax = show_positives(torch.rand(3, 24, 40), torch.randn(15, 8), (3, 5), 0)
    dashed = [p for p in ax.patches if p.get_linestyle() not in ('-', 'solid')]
    assert len(ax.patches) == 9 and len(dashed) == 5 and len(ax.texts) == 8
    assert len(show_positives(torch.rand(3, 24, 40), torch.randn(15, 8), (3, 5), 0, border='clip').patches) == 4
    ax = show_positives(torch.rand(3, 24, 40), torch.randn(15, 8), (3, 5), 6, border='clip')
    ax.figure.canvas.draw()
    veil = ax.images[-1].get_array()[..., 3] # over all but the patch and its neighbours
    assert_close(torch.as_tensor(veil), torch.tensor([[0, 0, 0, .45, .45]]*3, dtype=torch.float64))


# what positives say

def test_aggregation_as_released(head):
    r = recorded('match/4x4/')
    close(head.together(r['x'], positives(r['x'], (4, 4))), r['teacher_out'][:, 1:])
    close(head.aggregate(r['x']), r['teacher_out'][:, 0])
    close(head.aggregate.norm(r['x']), r['student_out'][:, 1:])
    close(head.aggregate(r['x']), r['student_out'][:, 0])


def test_from_tokens_to_the_teachers_logits_as_released(head):
    x = recorded('match/4x4/')['x']
    task, tokens = a_task(head), Tokens(None, torch.full_like(x, torch.nan), x, (4, 4)) # normed tokens are not read
    close(task.teach(Seen([tokens], None), head)[0], recorded('phead/')['out_4x4_teacher'])
    close(task.image_token(tokens, head), recorded('match/4x4/')['student_out'][:, 0])


@pytest.mark.parametrize('aggregation', ['attention', 'mean', 'none'])
@pytest.mark.parametrize('grid', [(1, 1), (1, 5), (3, 4)])
def test_a_patch_is_told_by_the_positives_that_it_has(head, grid, aggregation):
    "In any order; -1 is nobody"
    x, n, head.aggregation = torch.randn(2, grid[0]*grid[1], 32), grid[0]*grid[1], aggregation
    ids = positives(x, grid, border='clip')
    got = head.together(x, ids)
    close(head.together(x, ids[..., torch.randperm(4)]), got)
    for i in range(n):
        some = [j for j in ids[0, i].tolist() if j >= 0]
        if aggregation == 'attention': want = head.aggregate(x[:1, some])
        else: want = head.aggregate.norm((x[:1, some].mean(1) if some else torch.zeros(1, 32)) if aggregation == 'mean' else x[:1, i])
        close(got[:1, i], want)


# loss

def test_loss_as_released():
    "Two global and three local crops of two images; recorded gradients are of the loss times .1"
    r = recorded('loss/')
    temps = r['temp_schedule'].tolist()
    task = SelfPatch(out=28, first_temp=temps[0], teacher_temp=temps[-1], warm_epochs=temps.index(temps[-1]) + 1)
    for task.epoch, temp in enumerate(temps): assert abs(task.teacher_temp - temp) < 1e-7
    task.epoch = r['epoch'].item()
    task.center.value.copy_(r['patch_center_in'].flatten())
    s, t = ([r[f'{who}_loc_{what}'].requires_grad_(who == 's') for what in 'gl'] for who in 'st')
    loss = task.loss(s, t)
    close(loss, r['patch'].float(), 5e-5)
    grads = torch.autograd.grad(task.weight*loss, s)
    for got, what in zip(grads, 'gl'): close(got, r[f'grad_s_loc_{what}'])
    task.remember(t)
    close(task.center.value, r['patch_center_out'].flatten())


def test_a_student_that_agrees_pays_the_entropy():
    task = SelfPatch(out=9, student_temp=.04)
    task.center.value.zero_()
    t = torch.randn(4, 9, 9), torch.randn(2, 4, 9)
    m = task.metrics(t, t)
    close(task.loss(t, t), m['entropy'])
    assert m['agree'] == 1 and 0 < m['entropy'] < math.log(9) and 0 < m['spread'] <= 1
    assert task.metrics([torch.ones(4, 9, 9)], [torch.ones(4, 9, 9)])['spread'] < 1e-6


def test_loss_in_half_precision():
    task, s, t = SelfPatch(out=9), torch.randn(2, 4, 9).bfloat16(), torch.randn(2, 4, 9).bfloat16()
    with torch.autocast('cpu', dtype=torch.bfloat16): loss = task.loss([s], [t])
    assert loss.dtype == torch.float32
    close(loss, task.loss([s.float()], [t.float()]))


def test_the_teachers_crops_must_be_the_students():
    with pytest.raises(ValueError): SelfPatch(out=9).loss([torch.randn(2, 4, 9)]*2, [torch.randn(2, 4, 9)])


# in an engine

def test_weights():
    assert make_tasks(['selfpatch'])['selfpatch'].weight == .1
    assert make_tasks({'selfpatch': 1})['selfpatch'].weight == 1


def small(name='vit_tiny_patch16_224', **kwargs):
    kwargs = dict(img_size=32, p=8, depth=1, embed_dim=48, num_heads=4) | kwargs
    return TokenEncoder(name, **{k: v for k, v in kwargs.items() if v is not None})


swin = dict(name='swin_tiny_patch4_window7_224', img_size=64, p=None, depth=None, depths=(1, 1), embed_dim=24, num_heads=(2, 3), window_size=4)


@pytest.mark.parametrize('kwargs', [dict(), dict(cls=False), dict(img_size=(24, 40)), dict(p=4), swin],
                         ids=['class token', 'none', 'not square', 'p 4', 'swin'])
def test_any_encoder(kwargs):
    encoder = small(**kwargs)
    side = 32 if kwargs is swin else 24
    model = RelViT(encoder, SelfPatch(out=16, hidden=16, bottleneck=8)).train()
    images = torch.rand(2, 3, 64, 64)
    size = encoder.img_size
    preds = model(images, views=MultiCrop(size, side, locals=3)(images))
    loss = model.loss(preds)
    loss.backward()
    task = model.tasks['selfpatch']
    assert loss.isfinite() and task.center.value.abs().sum() > 0
    assert all(w.grad is None for w in model.teacher.parameters())
    assert all(w.grad is not None for w in task.head.project.parameters())
    assert [len(p) for p in preds['selfpatch']] == [4, 6] and preds['selfpatch'][0].shape[1] == encoder.grid[0]*encoder.grid[1]
    assert 'tasks.selfpatch.center.value' in model.state_dict()
    model.eval()
    model.loss(model(images, views=MultiCrop(size, side, locals=3)(images)))
    assert {'selfpatch_entropy', 'selfpatch_spread', 'selfpatch_agree'} <= set(model.scores)


def test_with_dino_the_aggregator_learns_in_a_trunk_without_a_class_token():
    from relvit.dino import DINO
    for cls in True, False:
        model = RelViT(small(cls=cls), [DINO(out=16, hidden=16, bottleneck=8), SelfPatch(out=16, hidden=16, bottleneck=8)]).train()
        x = torch.rand(2, 3, 32, 32)
        model.loss(model(x, views=MultiCrop(32, 24, locals=2)(x))).backward()
        aggregator = model.tasks['selfpatch'].head.aggregate
        assert aggregator.norm.weight.grad is not None and (aggregator.token.grad is None) == cls


def test_heads_of_the_aggregator():
    heads = lambda encoder, **kwargs: SelfPatch(**kwargs).setup(encoder, (4, 4)).head.aggregate.heads
    assert heads(small()) == 4 and heads(small(), heads=2) == 2
    assert heads(small(embed_dim=192, num_heads=None)) == 3 and heads(small(**swin)) == 3


def test_a_grid_too_small_is_refused_before_training():
    with pytest.raises(ValueError, match="border='clip'"): SelfPatch().setup(small(), (2, 4))
    assert SelfPatch(border='clip').setup(small(), (2, 4)).head


def test_the_teachers_head_has_no_part_in_the_gradient(head):
    task, x = a_task(head), torch.randn(2, 9, 32, requires_grad=True)
    seen, theirs = Seen([Tokens(None, x, x, (3, 3))], None), copy.deepcopy(head)
    task.loss(task(seen), task.teach(seen, theirs)).backward()
    assert all(w.grad is None for w in theirs.parameters())
    alone, = torch.autograd.grad(task.loss(task(seen), task.teach(Seen([Tokens(None, x, x.detach(), (3, 3))], None), theirs)), x)
    close(alone, x.grad)


def test_it_says_where_its_aggregator_would_learn_nothing():
    with pytest.warns(UserWarning, match='meant for cls=False'): SelfPatch().setup(small(cls=True), (4, 4))
