"The widgets of SelfPatch and SERE: controls, clicks and words, for any network and any image."
import io

import numpy as np, pytest, torch
from PIL import Image

from relvit.method_widgets import PositivesExplorer, SelfRelationExplorer, as_photos, draw_positives, likeness, networks, ranked
from relvit.patches import to_patches
from relvit.plots import plt, rendered
from relvit.selfpatch import SelfPatch, neighbours, positives
from relvit.sere import PixelRelation
from relvit.tasks import RelViT
from relvit.tokens import TokenEncoder
from relvit.views import MultiCrop, original_points


def encoder(p=8, size=32, **kwargs):
    torch.manual_seed(0)
    return TokenEncoder('vit_tiny_patch16_224', img_size=size, p=p, embed_dim=24, depth=2, num_heads=2, **kwargs)


def selfpatch(**kwargs): return SelfPatch(out=16, hidden=16, bottleneck=8, **kwargs)
def images(n=3, size=(32, 32)): return torch.rand(n, 3, *size, generator=torch.Generator().manual_seed(1))


def model(*tasks):
    "A teacher that differs from its student"
    m = RelViT(encoder(cls=False), tasks or [selfpatch(), 'pixel', 'channel'])
    with torch.no_grad():
        for w in m.encoder.parameters(): w += .1*torch.randn_like(w)
    return m


MAKE = {
    PositivesExplorer: lambda: PositivesExplorer(model(), images()),
    SelfRelationExplorer: lambda: SelfRelationExplorer(model(), images(size=(40, 60)))}
OTHER = { # another value of each control, after those before it
    PositivesExplorer: dict(image=1, tokens=('student', 'patches'), patch=3, border='clip', k=2, window=5),
    SelfRelationExplorer: dict(image=1, crops=3, area=(50, 80), network='student', heads=4, temp=.2, point=2)}


@pytest.mark.parametrize('kind', MAKE, ids=lambda k: k.__name__)
def test_every_control_changes_the_picture(kind):
    "And what is seen and said depends on the values alone, not on how they were reached"
    widget = MAKE[kind]()
    assert set(OTHER[kind]) == set(widget.controls)
    for name, value in OTHER[kind].items():
        before = widget.picture.png
        assert widget.state[name] != value
        widget.controls[name].value = value
        assert widget.picture.png != before and not widget.picture.stale, name
    fresh = MAKE[kind]()
    for name, value in reversed(OTHER[kind].items()): fresh.controls[name].value = value
    assert fresh.state == widget.state and fresh.picture.png == widget.picture.png and fresh.note.value == widget.note.value
    assert rendered(widget.draw(**widget.state))[0] == widget.picture.png


@pytest.mark.parametrize('kind', MAKE, ids=lambda k: k.__name__)
def test_a_network_is_asked_once_and_left_as_it_was(kind, monkeypatch):
    m = model().train()
    widget = kind(m, images())
    assert all(part.training for part in m.modules() if part is not m.teacher and part not in set(m.teacher.modules()))
    before, asked, forward = {k: v.clone() for k, v in m.state_dict().items()}, [], TokenEncoder.forward
    monkeypatch.setattr(TokenEncoder, 'forward', lambda *a, **k: asked.append(1) or forward(*a, **k))
    for k in range(4): widget.controls[widget.query].value = k
    assert not asked
    widget.controls['image'].value = 1
    assert 0 < len(asked) <= 2 and all(torch.equal(v, before[k]) for k, v in m.state_dict().items())


@pytest.mark.parametrize('kind', MAKE, ids=lambda k: k.__name__)
def test_a_page_without_a_kernel_has_the_figure(kind):
    widget = MAKE[kind]()
    assert {'image/png', 'text/plain', 'application/vnd.jupyter.widget-view+json'} <= set(widget._repr_mimebundle_())
    assert f'; {widget.query} {widget.state[widget.query]}, row' in widget.picture.alt and not plt.get_fignums()


# positives

def colour(picture, cell, row, col, rgb):
    "Share of a patch in the picture, its frame included and what lies beside the panel not, that has a colour"
    name, left, top, w, h, rows, cols = cell
    img = np.asarray(Image.open(io.BytesIO(picture.png)).convert('RGB')).astype(int)
    H, W = img.shape[:2]
    (y, y1), (x, x1) = ((round(n*(low + side*i/k)) - 2, round(n*(low + side*(i + 1)/k)) + 2)
                        for n, low, side, i, k in ((H, top, h, row, rows), (W, left, w, col, cols)))
    part = img[max(y, round(top*H)):min(y1, round((top + h)*H)), max(x, round(left*W)):min(x1, round((left + w)*W))]
    return (np.abs(part - rgb).sum(-1) < 60).mean()


def test_a_click_asks_the_patch_under_it():
    "It is framed white, its positives orange; in both grids"
    widget = PositivesExplorer(model(), torch.zeros(1, 3, 32, 32))
    widget.picture.chosen = ['patch', 2, 1]
    assert widget.state['patch'] == 9 and widget.picture.at == [2, 1, 4, 4]
    for cell in [c for c in widget.picture.cells if c[0] == 'patch']:
        white = [colour(widget.picture, cell, i//4, i % 4, [255]*3) for i in range(16)]
        assert max(range(16), key=white.__getitem__) == 9 and white[9] > .05 and white[3] < .01
        taken = {r[0] for r in ranked(*widget.asked(**widget.state)) if r[2]}
        orange = [colour(widget.picture, cell, i//4, i % 4, [245, 133, 24]) for i in range(16)]
        assert len(taken) == 4 and set(sorted(range(16), key=orange.__getitem__)[-4:]) == taken, orange


def test_a_click_on_a_name_asks_that_neighbour():
    widget = PositivesExplorer(encoder(), images())
    rows = ranked(*widget.asked(**widget.state))
    cell, = [c for c in widget.picture.cells if c[0] == 'candidate']
    assert cell[5:] == [8, 1]
    widget.picture.chosen = ['candidate', 5, 0]
    assert widget.state['patch'] == rows[5][0]


@pytest.mark.parametrize('border', ['wrap', 'clip'])
@pytest.mark.parametrize('window', [3, 5, None])
def test_the_order_is_that_of_positives(window, border):
    grid, tokens = (5, 6), torch.randn(30, 8, generator=torch.Generator().manual_seed(0))
    near = neighbours(grid, window, border)
    for query in 0, 14, 29:
        rows = ranked(tokens, grid, query, 3, border, window)
        assert [r[0] for r in rows[:3]] == positives(tokens[None], grid, 3, border, window)[0, query].tolist()
        assert {r[0] for r in rows} == {i for i in near[query].tolist() if i >= 0}
        assert [r[1] for r in rows] == sorted((r[1] for r in rows), reverse=True) and sum(r[2] for r in rows) == 3
        assert {r[0] for r in rows if r[3]} == {r[0] for r in rows} - {*neighbours(grid, window, 'clip')[query].tolist()}


def test_arrows_point_round_the_border():
    tokens = torch.randn(20, 8)
    arrows = lambda query, border: {r[0]: r[4] for r in ranked(tokens, (4, 5), query, border=border)}
    assert arrows(7, 'wrap') == {1: '↖', 2: '↑', 3: '↗', 6: '←', 8: '→', 11: '↙', 12: '↓', 13: '↘'}
    assert arrows(0, 'wrap') == {19: '↖', 15: '↑', 16: '↗', 4: '←', 1: '→', 9: '↙', 5: '↓', 6: '↘'}
    assert arrows(0, 'clip') == {1: '→', 5: '↓', 6: '↘'}


def test_it_begins_as_the_task_was_trained():
    widget = PositivesExplorer(model(selfpatch(k=3, window=5, border='clip')), images())
    assert [widget.state[k] for k in ('tokens', 'k', 'window', 'border')] == [('teacher', 'prenorm'), 3, 5, 'clip']
    m = model()
    want = m.teacher.encoder.eval()(images()[:1]).prenorm[0]
    widget = PositivesExplorer(m, images())
    assert torch.equal(widget.tokens(0, ('teacher', 'prenorm')), want)
    assert not torch.equal(widget.tokens(0, ('student', 'prenorm')), want)
    assert list(networks(encoder())) == list(networks(RelViT(encoder(), ['relations']))) == ['encoder']


def test_pixels_are_tokens_too():
    x = (images()*255).byte()
    widget = PositivesExplorer(encoder(), x)
    z = to_patches(x[:1]/255, 8)[0]
    assert torch.allclose(widget.tokens(0, ('pixels', '')), (z - z.mean((0, 2, 3), keepdim=True)).flatten(1))


def test_there_are_never_more_positives_than_neighbours():
    widget = PositivesExplorer(encoder(), images())
    widget.controls['window'].value = 0
    widget.controls['k'].value = 15
    assert widget.controls['border'].disabled
    widget.controls['window'].value = 3
    assert (widget.state['k'], widget.controls['k'].max, widget.controls['border'].disabled) == (8, 8, False)


def test_what_is_said_about_a_likeness():
    "By hand: on a row, each token is like one neighbour and unlike the other; and tokens that say nothing"
    row = torch.tensor([[1., 0], [1, 0], [0, 1], [0, 1]])
    words = 'cosine of a patch to its positives 1.00, to any neighbour 0.67, to any patch 0.33'
    assert likeness(row, (1, 4), 1, 'clip') == words
    pixels = torch.tensor([[1., 0], [0, 1], [0, 1], [1, 0]])
    assert likeness(row, (1, 4), 1, 'clip', pixels=pixels) == f'{words}; 50% of all positives are those that pixels would take'
    assert 'as 18% of all neighbours do' in likeness(torch.randn(64, 8), (8, 8))
    assert likeness(torch.ones(64, 8), (8, 8)).endswith('has this network been trained?')


def test_an_error_leaves_no_figure_behind():
    with pytest.raises(ValueError, match='needs a grid of 3 x 3'): draw_positives(images()[0], torch.randn(8, 4), (2, 4), 0)
    assert not plt.get_fignums()
    wide = images(size=(40, 60))
    with pytest.raises(ValueError, match='this model wants images of 3 channels and 32 x 32 pixels'): PositivesExplorer(encoder(), wide)
    with pytest.raises(ValueError, match='a grid of 1 x 1 has no neighbours'): PositivesExplorer(encoder(32), images())


# both, for other networks

SWIN = dict(name_or_model='swin_tiny_patch4_window7_224', depths=(1, 1), embed_dim=24, num_heads=(2, 3), window_size=4)


NETWORKS = {
    'not square': (lambda: encoder(8, (32, 48)), (32, 48)), 'narrow patches': (lambda: encoder((8, 4)), (32, 32)),
    'swin': (lambda: TokenEncoder(img_size=64, **SWIN), (64, 64)),
    'swin, not square': (lambda: TokenEncoder(img_size=(32, 64), **SWIN), (32, 64)),
    'resnet': (lambda: TokenEncoder('resnet18', img_size=96), (96, 96)), 'a grid of 2 x 2': (lambda: encoder(16), (32, 32))}


@pytest.mark.parametrize('make, size', NETWORKS.values(), ids=NETWORKS)
def test_any_network(make, size):
    e = make()
    p, r = PositivesExplorer(e, images(2, size)), SelfRelationExplorer(e, images(2, (50, 70)))
    for widget in (p, r):
        h, w = widget.grid()
        widget.picture.chosen = ['patch', h - 1, 0]
        assert widget.state[widget.query] == (h - 1)*w and not widget.picture.stale, widget.note.value
        assert widget.picture.at == [h - 1, 0, h, w]
    assert p.grid() == e.grid and r.grid() == tuple(max(g - 1, 2) for g in e.grid)
    assert p.state['border'] == ('wrap' if min(e.grid) > 2 else 'clip')


# self-relations

def test_a_click_takes_the_point_next_to_it():
    "In the photo and in both views, of which one is mirrored"
    widget = SelfRelationExplorer(encoder(), images(size=(40, 60)), points=(2, 3))
    look = lambda crops: widget.look(0, crops, (40, 100), 'encoder')[0]
    widget.controls['crops'].value = seed = next(s for s in range(20) if look(s).boxes[:, 0, 4].sum() == 1)
    grids = widget.common(look(seed))
    photo = original_points(grids[0], look(seed).boxes[0, 0])/torch.tensor([60, 40])
    assert widget.grid() == (2, 3)
    for name, at in ('photo', photo), ('view0', (grids[0] + 1)/2), ('view1', (grids[1] + 1)/2):
        for k, (x, y) in enumerate(at.flatten(0, 1).tolist()):
            widget.picture.chosen = [name, int(y*48), int(x*48)]
            assert widget.state['point'] == k and widget.picture.at == [k//3, k % 3, 2, 3]


def test_the_star_is_where_the_click_was():
    widget = SelfRelationExplorer(encoder(), images())
    widget.picture.chosen = ['photo', 30, 20]
    _, left, top, w, h, rows, cols = next(c for c in widget.picture.cells if c[0] == 'photo')
    img = np.asarray(Image.open(io.BytesIO(widget.picture.png)).convert('RGB')).astype(int)
    H, W = img.shape[:2]
    part = img[round(top*H):round((top + h)*H), round(left*W):round((left + w)*W)]
    y, x = (np.abs(part - [228, 87, 86]).sum(-1) < 20).nonzero()
    views = widget.look(0, 0, (40, 100), 'encoder')[0]
    at = original_points(widget.common(views)[0], views.boxes[0, 0]).flatten(0, 1)[widget.state['point']]/32
    assert abs(x.mean()/part.shape[1] - at[0]) < .02 and abs(y.mean()/part.shape[0] - at[1]) < .02


def test_views_that_do_not_meet_are_said():
    widget = SelfRelationExplorer(encoder(), images())
    with widget.hold(): widget.controls['area'].value, widget.controls['crops'].value = (5, 10), 2
    assert 'do not meet: take other crops, or larger ones' in widget.note.value and widget.picture.stale and not plt.get_fignums()
    widget.controls['area'].value = 40, 100
    assert not widget.picture.stale and 'bright is what goes with the star' in widget.note.value


def test_it_relates_as_the_task_was_trained():
    m = model(PixelRelation(heads=3, teacher_temp=.7, global_points=5), 'channel')
    crops = MultiCrop(32)(images(8))
    m.train()
    for _ in range(3): m.loss(m(images(8), views=crops))
    widget = SelfRelationExplorer(m, images())
    assert [widget.state[k] for k in ('network', 'heads', 'temp')] == ['teacher', 3, .7] and widget.points == (5, 5) and widget.temp == .1
    views, f = widget.look(0, 0, (40, 100), 'teacher')
    want = m.teacher.heads['pixel'].eval()(m.teacher.encoder.eval()(views.crops[0]).prenorm.mT.unflatten(2, (4, 4)))
    assert torch.allclose(f, want, atol=1e-6)
    want = m.tasks['pixel'].eval().head[0](m.encoder.eval()(views.crops[0]).prenorm.mT.unflatten(2, (4, 4)))
    assert torch.allclose(widget.look(0, 0, (40, 100), 'student')[1], want, atol=1e-6)
    assert SelfRelationExplorer(model('channel'), images()).state['heads'] == 2 # of the encoder


def test_without_statistics_a_projection_takes_those_of_the_views():
    for source in (encoder(), model()):
        f = SelfRelationExplorer(source, images()).look(0, 0, (40, 100), 'encoder' if source.__class__ is TokenEncoder else 'teacher')[1]
        assert (f > 0).float().mean((0, 2, 3)).min() > .2 # half of what BatchNorm centred


def test_one_view_twice_is_not_apart():
    widget = SelfRelationExplorer(encoder(), images(1), crop=MultiCrop(32, global_scale=(1., 1.), ratio=(1., 1.), flip=0.))
    assert widget.apart(0) == (0, 0) and 'those of this image and the next' not in widget.note.value
    places, channels = SelfRelationExplorer(model(), images()).apart(1)
    assert 0 < places <= 2 and 0 < channels <= 2


def test_photos_of_any_size(tmp_path):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (50, 70, 3), dtype=np.uint8))
    picture.save(tmp_path/'0.png')
    got = as_photos([tmp_path/'0.png', picture, images(2, (20, 30)), images()[0].numpy()], 37)
    assert [tuple(x.shape) for x in got] == [(3, 37, 37)]*2 + [(3, 20, 30)]*2 + [(3, 32, 32)]
    assert len(as_photos(tmp_path, 37)) == 1 and as_photos(picture, 37, 1)[0].shape == (1, 37, 37)
    with pytest.raises(ValueError, match='this model wants images of 3 channels'): as_photos(torch.rand(1, 20, 30), 37)
    assert not SelfRelationExplorer(encoder(), [picture, images()[0]]).picture.stale
    for kind in MAKE:
        for nothing in [], images(0):
            with pytest.raises(ValueError, match='there is no image to show'): kind(encoder(), nothing)
