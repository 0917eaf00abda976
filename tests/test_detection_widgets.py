"The widget of detection: every control counts, a network is asked once, words and picture say the same, any image and any list will do."
import io, time

import numpy as np, pytest, torch
from PIL import Image
from torch import nn

from relvit.boxes import shapes_set
from relvit.detection_widgets import DetectionExplorer, as_detector, as_pairs, counts, draw_detections, words
from relvit.plots import plt, rendered
from relvit.precision import Precision, match, pr_curve
from relvit.tasks import RelViT
from relvit.tokens import TokenEncoder

VOCAB = ['cup', 'plate', 'fork']


def scene(seed, n=4, size=(48, 64), **more):
    g = torch.Generator().manual_seed(seed)
    corner = torch.rand(n, 2, generator=g)*torch.tensor([size[1] - 20., size[0] - 20.])
    boxes = torch.cat([corner, corner + 8 + 12*torch.rand(n, 2, generator=g)], 1)
    masks = torch.zeros(n, *size, dtype=torch.bool)
    for m, (l, t, r, b) in zip(masks, boxes.int().tolist()): m[t:b, l:r] = True
    return (torch.randint(256, (3, *size), dtype=torch.uint8, generator=g),
            dict(boxes=boxes, labels=torch.randint(1, 4, (n,), generator=g), masks=masks, **more))


def answer(target, seed=0):
    "Some of it moved, one twice, one of another class; scores rise from .2 to .95"
    n, g = len(target['labels']), torch.Generator().manual_seed(seed)
    rows = torch.tensor([*range(n), 0])
    labels = target['labels'][rows].clone()
    labels[1:2] = labels[1:2] % 3 + 1
    scores, order = torch.linspace(.2, .95, n + 1), torch.randperm(n + 1, generator=g)
    return dict(boxes=(target['boxes'][rows] + torch.randn(n + 1, 4, generator=g)*.4)[order], labels=labels[order], scores=scores,
                masks=target['masks'][rows][order][:, None].float()*.9)


PAIRS = [scene(i) for i in range(4)]
ANSWERS = [answer(t, i) for i, (_, t) in enumerate(PAIRS)]


class Asked(nn.Module):
    "A network that answers with what it was given, and counts"
    def __init__(self, answers=ANSWERS, pairs=PAIRS):
        super().__init__()
        self.answers, self.images, self.times, self.part = answers, [x for x, _ in pairs], [], nn.Sequential(nn.Linear(1, 1), nn.Dropout())
    def forward(self, images):
        assert not self.training and not torch.is_grad_enabled() and images[0].dtype == torch.float32
        i = next(i for i, x in enumerate(self.images) if torch.equal((images[0]*255).round().byte(), x))
        self.times.append(i)
        return [self.answers[i]]


OTHER = dict(image=2, threshold=.35, iou=.95, show='laid over', masks=False, curve=False, classes=('cup', 'fork'))


def test_every_control_changes_the_picture():
    "And what is seen and said depends on the values alone, not on how they were reached, nor on whether a network was asked"
    make = lambda detector=ANSWERS: DetectionExplorer(detector, PAIRS, VOCAB, curve=True)
    widget = make()
    assert set(OTHER) == set(widget.controls)
    for name, value in OTHER.items():
        before = widget.picture.png
        assert widget.state[name] != value
        widget.controls[name].value = value
        assert widget.picture.png != before and not widget.picture.stale, (name, widget.note.value)
    for fresh in make(), make(Asked()):
        for name, value in reversed(OTHER.items()): fresh.controls[name].value = value
        assert fresh.state == widget.state and fresh.picture.png == widget.picture.png and fresh.note.value == widget.note.value
    assert rendered(widget.draw(**widget.state))[0] == widget.picture.png and not plt.get_fignums()


def test_a_network_is_asked_once_an_image_and_left_as_it_was():
    network = Asked().train()
    network.part[0].eval() # frozen
    widget = DetectionExplorer(network, PAIRS, VOCAB)
    for t in .1, .2, .9: widget.controls['threshold'].value = t
    for i in 1, 0, 1: widget.controls['image'].value = i
    assert network.times == [0, 1] and not widget.state['curve']
    assert network.training and not network.part[0].training and network.part[1].training
    widget.controls['curve'].value = True # now about all of them
    for iou in .6, .7: widget.controls['iou'].value = iou
    assert network.times == [0, 1, 2, 3]


@pytest.mark.parametrize('iou', [.5, .75])
@pytest.mark.parametrize('threshold', [0., .4, .8, 1.])
def test_words_and_legend_count_alike(iou, threshold):
    "And both as the picture's boxes: a line of the colour for each"
    for (x, t), d in zip(PAIRS, ANSWERS):
        m = match(d, t, iou)
        c = counts([m], threshold)
        assert c['objects'] == 4 and c['right'] == m.found(threshold).sum() and sum(c.values()) - 4 == (d['scores'] >= threshold).sum()
        fig = draw_detections(x, t, d, VOCAB, threshold, iou)
        truth, answers = ([s.get_text() for s in ax.get_legend().get_texts()] for ax in fig.axes)
        assert truth == [f"{c['right']} found", f"{4 - c['right']} missed"]
        assert answers[:2] == [f"{c['right']} right", f"{c['wrong']} wrong"] and (f"{c['double']} double" in answers) == (c['double'] > 0)
        assert len(fig.axes[0].patches) == 4 and len(fig.axes[1].patches) == sum(c.values()) - 4
        assert f"{c['right']} of 4 objects found, {4 - c['right']} missed; {c['wrong'] + c['double']} false" in words(c)
        plt.close(fig)


def test_all_images_have_the_precision_of_the_whole_set():
    widget, p = DetectionExplorer(ANSWERS, PAIRS, VOCAB), Precision(VOCAB)
    p.add([{k: v for k, v in d.items() if k != 'masks'} for d in ANSWERS], [t for _, t in PAIRS])
    assert abs(widget.set_curve(.5, [1, 2, 3])[1] - p.result().map50) < 1e-9
    recall, precision, scores = pr_curve(widget.matched(range(4), .5))
    c = counts(widget.matched(range(4), .5), float(scores[7]))
    assert (c['right']/c['objects'], c['right']/(c['right'] + c['wrong'] + c['double'])) == (recall[7], precision[7])


def test_what_is_ignored_is_grey_and_counts_nowhere():
    x, t = scene(9, crowd=torch.tensor([True, False, False, False]), difficult=torch.tensor([False, True, False, False]))
    t['labels'] = torch.tensor([0, 1, 2, 3])
    d = dict(boxes=t['boxes'][:2], labels=torch.tensor([2, 1]), scores=torch.tensor([.9, .8]))
    assert words(counts([match(d, t)])) == '0 of 2 objects found, 2 missed; 0 false detections: recall 0%'
    fig = draw_detections(x, t, d, VOCAB, labels=[1])
    assert [s.get_text() for s in fig.axes[0].get_legend().get_texts()] == ['0 found', '0 missed', '2 ignored']
    assert {s.get_text() for s in fig.axes[0].texts} == {'no class ...', 'cup'}
    plt.close(fig)


@pytest.mark.parametrize('size', [(48, 64), (700, 1000), (1201, 333)])
def test_boxes_and_masks_lie_on_their_objects_in_any_image(size):
    "A white square on black, in a large photo that is shown smaller: mask and box stay on it"
    image, H, W = torch.zeros(3, *size, dtype=torch.uint8), *size
    l, t, r, b = box = [W//4, H//4, W//2, H//2]
    image[:, t:b, l:r] = 255
    mask = (image[:1] > 0)
    target = dict(boxes=torch.tensor([box]).float(), labels=torch.tensor([1]), masks=mask)
    widget = DetectionExplorer([dict(target, scores=torch.tensor([.9]))], [(image, target)], VOCAB, curve=False)
    x, extent, bits, _ = widget.looks[0]
    assert max(x.shape[:2]) <= 480 and extent == size and x.dtype == np.uint8
    seen = np.unpackbits(bits, -1, x.shape[1])[0].astype(bool)
    assert ((x[..., 0] > 127) == seen).mean() > .995
    fig = widget.draw(**widget.state)
    for ax in fig.axes:
        assert ax.get_xlim() == (0, W) and ax.get_ylim() == (H, 0)
        assert ax.images[0].get_extent() == [0, W, H, 0] and [ax.patches[0].get_x(), ax.patches[0].get_y()] == box[:2]
    plt.close(fig)


def test_forms_of_what_it_takes():
    x, t = PAIRS[0]
    grey, no_masks = x[:1], {k: v for k, v in ANSWERS[0].items() if k != 'masks'}
    arrays = x.permute(1, 2, 0).numpy(), Image.fromarray(x.permute(1, 2, 0).numpy())
    plain = {k: t[k] for k in ('boxes', 'labels')}
    for image, d, target in ([(i, ANSWERS[0], t) for i in (x.float()/255, grey, *arrays)] +
                             [(x, d, t) for d in (no_masks, dict(ANSWERS[0], masks=ANSWERS[0]['masks'][:, 0] > .5))] +
                             [(x, ANSWERS[0], y) for y in (plain, None)]):
        widget = DetectionExplorer([d], [(image, target)], VOCAB, curve=False)
        assert not widget.picture.stale, widget.note.value
    batch = DetectionExplorer(ANSWERS[:2], torch.stack([PAIRS[0][0], PAIRS[1][0]]), VOCAB)
    assert batch.controls['show'].options == ('detections',) and 'detections are shown' in batch.note.value and not batch.state['curve']
    empty = {k: v[:0] for k, v in ANSWERS[0].items()}
    for d, target in (empty, t), (ANSWERS[0], {k: v[:0] for k, v in t.items()}), (empty, {k: v[:0] for k, v in t.items()}), (empty, None):
        widget = DetectionExplorer([d], [(x, target)], VOCAB)
        for show in widget.controls['show'].options:
            widget.controls['show'].value = show
            assert not widget.picture.stale, widget.note.value
    scenes = shapes_set(3, 32)
    assert as_pairs(scenes) is scenes and DetectionExplorer([empty]*3, scenes).vocab == list(scenes.vocab)
    learner = type('Learner', (), dict(model=Asked()))()
    assert as_detector(learner) is learner.model


def test_what_cannot_be_meant_is_said():
    with pytest.raises(ValueError, match='2 detections for 4 images'): DetectionExplorer(ANSWERS[:2], PAIRS, VOCAB)
    with pytest.raises(ValueError, match='Say vocab'): DetectionExplorer(ANSWERS, PAIRS)
    with pytest.raises(ValueError, match='no image to show'): DetectionExplorer(Asked(), [], VOCAB)
    with pytest.raises(ValueError, match='labels would mean two things: a, b, and disc'): DetectionExplorer(Asked(), shapes_set(2, 32), ['a', 'b'])
    with pytest.raises(ValueError, match='entry 1 is neither'): as_pairs([PAIRS[0], (PAIRS[1][0], dict(boxes=torch.zeros(0, 4)))])
    with pytest.raises(FileNotFoundError, match='no run folder|nowhere'): as_detector('nowhere')
    encoder = TokenEncoder('vit_tiny_patch16_224', img_size=32, p=16, embed_dim=24, depth=1, num_heads=2)
    for wrong in encoder, RelViT(encoder, ['relations']), 3:
        with pytest.raises(TypeError, match='a detector, a Learner or a run folder of one'): as_detector(wrong)
    for wrong, why in (dict(scores=torch.full((5,), float('nan'))), 'nan or infinite'), (dict(labels=torch.full((5,), 4)), 'classes are 1 to 3'), \
                      (dict(masks=torch.zeros(5, 1, 9, 9)), 'its masks'):
        widget = DetectionExplorer([dict(ANSWERS[0], **wrong)], PAIRS[:1], VOCAB)
        assert why in widget.note.value and widget.picture.stale
    widget = DetectionExplorer(ANSWERS, PAIRS, VOCAB)
    widget.controls['classes'].value = ()
    assert 'choose a class' in widget.note.value and widget.picture.stale
    widget.controls['classes'].value = ('plate',)
    assert not widget.picture.stale


def test_a_page_without_a_kernel_has_the_figure():
    widget = DetectionExplorer(ANSWERS, PAIRS, VOCAB)
    bundle = widget._repr_mimebundle_()
    assert {'image/png', 'text/plain', 'application/vnd.jupyter.widget-view+json'} <= set(bundle)
    assert Image.open(io.BytesIO(widget.picture.png)).size[0] > 300


def test_a_move_of_the_threshold_is_quick():
    "A photo of 480 x 640 with a hundred masks, beside the curve of a set"
    image, target = scene(0, 20, (480, 640))
    many = torch.arange(100) % 20
    d = dict(boxes=target['boxes'][many], labels=target['labels'][many], masks=target['masks'][many, None].float(), scores=torch.linspace(.99, .01, 100))
    widget = DetectionExplorer([d, *ANSWERS], [(image, target), *PAIRS], VOCAB)
    start = time.process_time()
    for t in (.4, .3, .2): widget.controls['threshold'].value = t
    assert (time.process_time() - start)/3 < 1.5 # .2 s on an idle core
