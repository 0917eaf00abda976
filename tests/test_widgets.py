"Every widget: each control changes the picture, the picture is a function of the state, clicks land where they point."
import io

import numpy as np, pytest, torch
from PIL import Image

from relvit.plots import cells, plt, rendered
from relvit.predictions import read
from relvit.tasks import RelViT
from relvit.tokens import TokenEncoder
from relvit.training import Pretrain, train
from relvit.widgets import (AttentionExplorer, JigsawExplorer, MethodComparison, PatchPlayground, Picture, RelationExplorer, RunExplorer,
                            as_images, as_model)


def encoder(p=8, **kwargs):
    torch.manual_seed(0)
    return TokenEncoder('vit_tiny_patch16_224', img_size=32, p=p, embed_dim=24, depth=2, num_heads=2, **kwargs)


def model(*tasks): return RelViT(encoder(), tasks or ('relations', 'positions', 'distances', 'directions'))
def images(n=3): return torch.rand(n, 3, 32, 32, generator=torch.Generator().manual_seed(1))


MAKE = {
    RelationExplorer: lambda: RelationExplorer(model(), images()),
    PatchPlayground: lambda: PatchPlayground(images(), 8),
    AttentionExplorer: lambda: AttentionExplorer(encoder(), images()),
    JigsawExplorer: lambda: JigsawExplorer(model(), images()),
    MethodComparison: lambda: MethodComparison(dict(ours=model(), other=encoder(4, cls=False)), images())}
OTHER = { # another value of each control, after those before it
    RelationExplorer: dict(image=1, task='positions', patch=3),
    PatchPlayground: dict(image=1, order=2, colours=.8, noise=.5, draws=4, patch=5, mega=3),
    AttentionExplorer: dict(image=1, layer=0, head=1, cls=False, patch=3, rollout=True, share=.3),
    JigsawExplorer: dict(image=1, seed=3, use=('relations',), steps=9, patch=7),
    MethodComparison: dict(image=1, patch=0)}


@pytest.mark.parametrize('kind', MAKE, ids=lambda k: k.__name__)
def test_every_control_changes_the_picture(kind):
    "And what is seen depends on the values alone, not on how they were reached"
    widget = MAKE[kind]()
    assert set(OTHER[kind]) == set(widget.controls)
    for name, value in OTHER[kind].items():
        before = widget.picture.png
        assert widget.state[name] != value
        widget.controls[name].value = value
        assert widget.picture.png != before, name
    fresh = MAKE[kind]()
    for name, value in reversed(OTHER[kind].items()): fresh.controls[name].value = value
    assert fresh.state == widget.state and fresh.picture.png == widget.picture.png
    assert rendered(widget.draw(**widget.state))[0] == widget.picture.png


@pytest.mark.parametrize('kind', MAKE, ids=lambda k: k.__name__)
def test_a_click_frames_the_patch_under_it(kind):
    "Something orange appears around the place that was clicked"
    widget = MAKE[kind]()
    widget.controls['patch'].value = 0
    name, left, top, w, h, rows, cols = next(c for c in widget.picture.cells if c[0] == 'patch')
    row, col = rows - 1, cols - 2
    widget.picture.chosen = ['patch', row, col]
    assert widget.state['patch'] == row*widget.grid()[1] + col and widget.picture.at == [row, col, *widget.grid()]
    img = np.asarray(Image.open(io.BytesIO(widget.picture.png)).convert('RGB')).astype(int)
    H, W = img.shape[:2]
    patch = img[round((top + h*row/rows)*H) - 2:round((top + h*(row + 1)/rows)*H) + 2,
                round((left + w*col/cols)*W) - 2:round((left + w*(col + 1)/cols)*W) + 2]
    orange = np.abs(patch - [245, 133, 24]).sum(-1) < 60
    assert orange.mean() > .02 and not orange[len(orange)//3:-len(orange)//3, len(orange[0])//3:-len(orange[0])//3].any()


def test_the_same_cell_can_be_clicked_again():
    widget = RelationExplorer(model('relations'), images())
    widget.picture.chosen = ['patch', 0, 1, 1]
    widget.controls['patch'].value = 7
    widget.picture.chosen = ['patch', 0, 1, 2]
    assert widget.state['patch'] == 1


@pytest.mark.parametrize('size, p', [((32, 48), 8), ((32, 32), (8, 4)), ((24, 32), (8, 4))])
def test_grids_that_are_not_square(size, p):
    torch.manual_seed(0)
    e = TokenEncoder('vit_tiny_patch16_224', img_size=size, p=p, embed_dim=24, depth=2, num_heads=2, in_chans=1)
    m, x = RelViT(e, ('relations', 'positions')), torch.rand(2, 1, *size)
    for widget in (RelationExplorer(m, x), AttentionExplorer(m, x), JigsawExplorer(m, x), MethodComparison(dict(a=m, b=e), x), PatchPlayground(x, p)):
        h, w = widget.grid()
        widget.picture.chosen = ['patch', h - 1, w - 2]
        assert widget.state['patch'] == h*w - 2 and not widget.picture.stale, (widget, widget.note.value)
    picture = Image.fromarray(np.zeros((50, 70), np.uint8))
    assert as_images(picture, size, 1).shape == (1, 1, *size)


def test_a_model_of_mega_patches_is_compared_like_any_other():
    mega = RelViT(encoder(), ['relations'], grid=(3, 3))
    widget = MethodComparison(dict(mega=mega, other=encoder()), images())
    widget.picture.chosen = ['3x3', 2, 2]
    assert widget.state['patch'] == 15 and not widget.picture.stale, widget.note.value


def test_cells_lie_where_the_picture_shows_them():
    fig, ax = plt.subplots(figsize=(3, 2))
    ax.imshow(np.eye(4), cmap='gray')
    png, [(name, left, top, w, h, rows, cols)] = rendered(cells(ax, 'row', 4, 4).figure)
    img = np.asarray(Image.open(io.BytesIO(png)).convert('L'))
    at = lambda r, c: img[int((top + h*(r + .5)/rows)*img.shape[0]), int((left + w*(c + .5)/cols)*img.shape[1])]
    assert [[at(r, c) for c in range(4)] for r in range(4)] == (255*np.eye(4)).astype(int).tolist()


def test_a_network_is_asked_once_an_image(monkeypatch):
    widget, asked = RelationExplorer(model('relations'), images()), []
    monkeypatch.setattr(TokenEncoder, 'forward', lambda *a, **k: asked.append(1))
    for k in range(5): widget.controls['patch'].value = k
    assert not asked


def test_what_it_can_be_given(tmp_path):
    run = train(Pretrain(encoder='vit_tiny_patch16_224', encoder_args=('embed_dim=24', 'depth=1', 'num_heads=2'), epochs=1, steps=2, device='cpu',
                         out=str(tmp_path), name='run'), tell='nothing')
    assert isinstance(as_model(run), RelViT) and isinstance(as_model(str(run.path)), RelViT) and isinstance(as_model(encoder()), TokenEncoder)
    with pytest.raises(TypeError, match='a Learner or a run folder, not int'): as_model(3)
    with pytest.raises(FileNotFoundError, match='is no run folder'): as_model('nowhere')
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (50, 70, 3), dtype=np.uint8))
    for i in range(2): picture.save(tmp_path/f'{i}.png')
    for source, n in ((picture, 1), (tmp_path/'0.png', 1), ([str(tmp_path/'0.png'), picture], 2), (images(), 3), (images()[0].numpy(), 1),
                      (np.zeros((32, 32, 3), np.uint8), 1)):
        assert as_images(source, (32, 32)).shape == (n, 3, 32, 32)
    with pytest.raises(ValueError, match='this model wants images of 3 channels and 32 x 32 pixels, not'): as_images(torch.rand(3, 16, 16), (32, 32))
    runs = RunExplorer(tmp_path)
    assert runs.state['runs'] == ('run',) and len(runs.figures.children) == 1 and 'finished' in runs.table.value
    runs.controls['runs'].value = ()
    assert 'choose a run' in runs.note.value
    with pytest.raises(FileNotFoundError, match='train one first'): RunExplorer(tmp_path/'run'/'figures')


def test_what_is_wrong_is_said_where_the_picture_is():
    with pytest.raises(TypeError, match='a bare encoder has attention and features'): RelationExplorer(encoder(), images())
    with pytest.raises(ValueError, match='a puzzle needs a model that predicts'): JigsawExplorer(RelViT(encoder(), ['distances']), images())
    with pytest.raises(ValueError, match='two models or more'): MethodComparison(dict(one=model()), images())
    with pytest.raises(ValueError, match='has no task about patches, only labels'): RelationExplorer(RelViT(encoder(), ['labels'], classes=3), images())
    guessing = model('positions')
    for w in guessing.tasks.parameters(): torch.nn.init.zeros_(w) # it finds every patch in the first place, as untrained ones nearly do
    assert 'no better than guessing' in RelationExplorer(guessing, images()).note.value
    widget = RelationExplorer(model('relations'), images())
    before, widget.draw = widget.picture.png, lambda **state: read(widget.model, torch.rand(3, 8, 8))
    widget.controls['patch'].value = 1
    assert 'this model wants (32, 32)' in widget.note.value
    assert widget.picture.png == before and widget.picture.stale and not widget.picture.cells # an old picture hears nothing


def test_a_coarser_grid_has_fewer_patches():
    widget = PatchPlayground(images(), 8)
    widget.controls['patch'].value = 15
    widget.controls['mega'].value = 3
    assert widget.state['patch'] == 8 and widget.picture.at == [2, 2, 3, 3] and not widget.picture.stale


def test_a_page_without_a_kernel_has_the_figure():
    bundle = RelationExplorer(model('relations'), images())._repr_mimebundle_()
    assert {'image/png', 'text/plain', 'application/vnd.jupyter.widget-view+json'} <= set(bundle)
    assert 'http' not in Picture._esm and 'import ' not in Picture._esm # nothing is fetched
