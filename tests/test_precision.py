"""Average precision: pycocotools run directly on COCO's own files says the same, and so does a slow reading of the rule."""
import copy, io, json
from contextlib import redirect_stdout

import numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st
from matplotlib import pyplot as plt

from relvit.precision import Precision, average_precision, match, overlaps, pr_curve

coco = pytest.importorskip('pycocotools.coco')
cocoeval = pytest.importorskip('pycocotools.cocoeval')
rle = pytest.importorskip('pycocotools.mask')
pytestmark = pytest.mark.filterwarnings('ignore:__array__ implementation:DeprecationWarning') # in pycocotools

SIZE = 120, 160
NUMBERS = [3, 7, 20, 90] # COCO's classes have gaps
STATS = dict(map=0, map50=1, map75=2, small=3, medium=4, large=5, recall=8)


# a small set in COCO's own form

def polygon(l, t, w, h): return [[l, t, l + w, t, l + w, t + h*.6, l + w/2, t + h, l, t + h*.6]]


def encoded(mask):
    r = rle.encode(np.asfortranarray(mask.astype(np.uint8)))
    return dict(size=list(r['size']), counts=r['counts'].decode())


def instances(seed, n=12):
    "instances.json with polygons, crowds as uncompressed run lengths, and empty images"
    g, anns = np.random.default_rng(seed), []
    for i in range(n):
        for _ in range(0 if i in (0, 5) else g.integers(1, 7)):
            l, t = g.uniform(0, 100), g.uniform(0, 70)
            w, h = np.round(g.uniform(6, min(60, SIZE[1] - l)), 2), np.round(g.uniform(6, min(50, SIZE[0] - t)), 2)
            l, t, crowd = round(l, 2), round(t, 2), g.random() < .2
            if crowd:
                mask = np.zeros(SIZE, np.uint8)
                mask[int(t):int(t + h), int(l):int(l + w)] = 1
                flat = mask.flatten(order='F')
                runs = np.diff(np.flatnonzero(np.diff(flat, prepend=0, append=2)), prepend=0).tolist()
                seg, area = dict(size=list(SIZE), counts=runs), float(mask.sum())
            else: seg, area = polygon(l, t, w, h), float(w*h*.8)
            anns.append(dict(id=100 + len(anns), image_id=1000 + 7*i, category_id=int(g.choice(NUMBERS[:3])), bbox=[l, t, float(w), float(h)],
                             area=area, iscrowd=int(crowd), segmentation=seg))
    return dict(images=[dict(id=1000 + 7*i, height=SIZE[0], width=SIZE[1]) for i in range(n)], annotations=anns,
                categories=[dict(id=k, name=f'class {k}') for k in NUMBERS]) # nothing is of the last class


def our_form(gt):
    "Targets, as the readers of this house make them"
    for i in sorted(gt.imgs):
        anns = gt.loadAnns(gt.getAnnIds(i))
        box = torch.tensor([a['bbox'] for a in anns]).float().reshape(-1, 4)
        masks = [torch.from_numpy(gt.annToMask(a)).bool() for a in anns]
        yield dict(boxes=torch.cat([box[:, :2], box[:, :2] + box[:, 2:]], 1), crowd=torch.tensor([a['iscrowd'] for a in anns]).bool(),
                   masks=torch.stack(masks) if masks else torch.zeros(0, *SIZE, dtype=torch.bool),
                   labels=torch.tensor([NUMBERS.index(a['category_id']) + 1 for a in anns]).long(),
                   area=torch.tensor([a['area'] for a in anns], dtype=torch.float64), image_id=torch.tensor(len(gt.imgs)*3 + i))


def jittered(targets, seed):
    "Detections, some of them good: moved boxes and masks, some labels and all scores by chance, some out of nowhere"
    g = torch.Generator().manual_seed(seed)
    rand = lambda *s: torch.rand(*s, generator=g)
    for t in targets:
        twice = torch.arange(len(t['labels'])).repeat(2)
        twice = twice[rand(len(twice)) < .8]
        boxes = t['boxes'][twice] + torch.randn(len(twice), 4, generator=g)*2
        boxes[:, 2:] = boxes[:, 2:].maximum(boxes[:, :2] + 1)
        masks = torch.stack([m.roll((int(a), int(b)), (0, 1)) for m, (a, b) in zip(t['masks'][twice], (rand(len(twice), 2)*6 - 3))]) \
            if len(twice) else t['masks'][:0]
        corner, size = rand(3, 2)*80, 5 + rand(3, 2)*40
        false = torch.zeros(3, *SIZE, dtype=torch.bool)
        for m, (x, y), (w, h) in zip(false, corner.int(), size.int()): m[y:y + h, x:x + w] = True
        labels = torch.cat([t['labels'][twice], torch.randint(1, 5, (3,), generator=g)])
        labels = torch.where(rand(len(labels)) < .15, torch.randint(1, 5, labels.shape, generator=g), labels)
        scores, order = (rand(len(labels))*20).round().div(20).sort(descending=True, stable=True) # with ties
        yield dict(boxes=torch.cat([boxes, torch.cat([corner, corner + size], 1)])[order], labels=labels[order], scores=scores,
                   masks=torch.cat([masks, false])[order][:, None]*.7)


def direct(gt, results, kind):
    with redirect_stdout(io.StringIO()):
        judge = cocoeval.COCOeval(gt, gt.loadRes(copy.deepcopy(results)), kind)
        judge.evaluate()
        judge.accumulate()
        judge.summarize()
    return judge


def loaded(truth):
    with redirect_stdout(io.StringIO()):
        gt = coco.COCO()
        gt.dataset = truth
        gt.createIndex()
    return gt


def same(scores, judge):
    for name, at in STATS.items():
        want = judge.stats[at]
        assert np.isnan(getattr(scores, name)) if want == -1 else abs(getattr(scores, name) - want) < 1e-9, name
    assert np.abs(np.nan_to_num(scores.curves, nan=-1) - judge.eval['precision'][:, :, :, 0, -1]).max() < 1e-9


@pytest.fixture(scope='module', params=range(3))
def both(request):
    gt = loaded(instances(request.param))
    targets = list(our_form(gt))
    return gt, targets, list(jittered(targets, request.param))


def collected(targets, detections, step=5, **kwargs):
    p = Precision([f'class {k}' for k in NUMBERS], category_ids=NUMBERS, **kwargs)
    for i in range(0, len(targets), step): p.add(detections[i:i + step], targets[i:i + step])
    return p


def test_it_is_what_pycocotools_says_of_cocos_files(both):
    gt, targets, detections = both
    assert any(t['crowd'].any() for t in targets) and any(len(t['boxes']) == 0 for t in targets)
    scores = collected(targets, detections, masks=True).result()
    boxes, masks = [], []
    for i, d in zip(sorted(gt.imgs), detections):
        for box, label, score, mask in zip(d['boxes'].double(), d['labels'], d['scores'], d['masks'][:, 0].numpy() > .5):
            said = dict(image_id=i, category_id=NUMBERS[label - 1], score=score.item())
            boxes.append(dict(said, bbox=torch.cat([box[:2], box[2:] - box[:2]]).tolist()))
            masks.append(dict(said, segmentation=encoded(mask)))
    same(scores, direct(gt, boxes, 'bbox'))
    same(scores.masks, direct(gt, masks, 'segm'))
    assert .05 < scores.map < .6 and .05 < scores.masks.map < .8 and scores.map != scores.masks.map


def test_what_it_hands_to_other_tools_scores_the_same(both):
    _, targets, detections = both
    p = collected(targets, detections, masks=True)
    truth, results = json.loads(json.dumps(p.coco()))
    gt, scores = loaded(truth), p.result()
    for kind, mine, drop in ('bbox', scores, 'segmentation'), ('segm', scores.masks, 'bbox'):
        same(mine, direct(gt, [{k: v for k, v in r.items() if k != drop} for r in results], kind))


def test_neither_the_order_nor_the_batches_matter(both):
    _, targets, detections = both
    a, b = collected(targets, detections), collected(targets[::-1], detections[::-1], step=1)
    assert a.result().asdict() == b.result().asdict()


# a slow reading

def slow_ap(detections, targets, threshold):
    "One class, no crowds: every step in plain loops"
    def iou(a, b):
        w, h = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
        common = max(w, 0)*max(h, 0)
        return common/((a[2] - a[0])*(a[3] - a[1]) + (b[2] - b[0])*(b[3] - b[1]) - common)
    answers = sorted([(-s, i, j) for i, (_, scores) in enumerate(detections) for j, s in enumerate(scores)])
    n, taken, tp, fp, points = sum(map(len, targets)), set(), 0, 0, []
    for _, i, j in answers:
        shares = [(iou(detections[i][0][j], o), k) for k, o in enumerate(targets[i]) if (i, k) not in taken]
        best = max(shares, default=(0, -1))
        if best[0] >= threshold: taken.add((i, best[1])); tp += 1
        else: fp += 1
        points.append((tp/n, tp/(tp + fp)))
    heights = [max((p for r, p in points if r >= at), default=0) for at in np.linspace(0, 1, 101)]
    return sum(heights)/101


def scene(g, most):
    n = int(g.integers(0, most + 1))
    corner = g.integers(0, 12, (n, 2))
    return np.concatenate([corner, corner + g.integers(4, 12, (n, 2))], 1).astype(float)


def as_target(boxes, **more): return dict(boxes=torch.tensor(boxes).reshape(-1, 4), labels=torch.ones(len(boxes)).long(), **more)


@settings(max_examples=60)
@given(st.integers(0, 10**6), st.sampled_from([.5, .75]))
def test_a_slow_reading_agrees(seed, iou):
    "On crowded little scenes of whole pixels, so that overlaps of exactly one half happen; scores differ"
    g = np.random.default_rng(seed)
    targets = [scene(g, 4) for _ in range(6)]
    if not any(map(len, targets)): targets[0] = np.array([[0, 0, 4, 4.]])
    detections = []
    for t in targets:
        near = t + g.integers(-2, 3, t.shape)
        near[:, 2:] = np.maximum(near[:, 2:], near[:, :2] + 1)
        detections.append(np.concatenate([near, scene(g, 4)]))
    scores = iter(g.permutation(sum(map(len, detections)))/100)
    detections = [(d, [next(scores) for _ in d]) for d in detections]
    want = slow_ap(detections, targets, iou)
    ours = [dict(as_target(d), scores=torch.tensor(s, dtype=torch.float64)) for d, s in detections]
    truth = [as_target(t) for t in targets]
    p = Precision(['thing'])
    p.add(ours, truth)
    scores, found = p.result(), [match(d, t, iou) for d, t in zip(ours, truth)]
    assert abs((scores.map50 if iou == .5 else scores.map75) - want) < 1e-9
    assert abs(average_precision(*pr_curve(found)[:2]) - want) < 1e-9


@settings(max_examples=40)
@given(st.integers(0, 10**6))
def test_match_is_pycocotools_matching(seed):
    "With crowds, difficult objects and objects of no class, two classes; image by image, at two overlaps"
    g = np.random.default_rng(seed)
    p, pairs = Precision(['a', 'b']), []
    for i in range(4):
        boxes, n = scene(g, 6), 12
        labels, crowd = torch.tensor(g.integers(0, 3, len(boxes))), torch.tensor(g.random(len(boxes)) < .3)
        t = dict(boxes=torch.tensor(boxes), labels=labels, crowd=crowd | (labels == 0), difficult=torch.tensor(g.random(len(boxes)) < .3))
        near = boxes[g.integers(0, len(boxes), n)] + g.normal(0, 1, (n, 4)) if len(boxes) else g.random((n, 4))
        near[:, 2:] = np.maximum(near[:, 2:], near[:, :2] + 1)
        d = dict(boxes=torch.tensor(near), labels=torch.tensor(g.integers(1, 3, n)), scores=torch.tensor(g.random(n)))
        p.add([d], [t])
        pairs.append((d, t))
    judge = p.judged()
    for which, iou in (0, .5), (5, .75):
        for i, (d, t) in enumerate(pairs):
            m = match(d, t, iou)
            for label in 1, 2:
                e = next((e for e in judge.evalImgs if e and (e['image_id'], e['category_id'], e['aRng'][1]) == (i, label, 1e10)), None)
                mine = m.state[m.labels == label]
                if e is None: assert not len(mine); continue
                ignored = e['dtIgnore'][which].astype(bool)
                right = (e['dtMatches'][which] > 0) & ~ignored
                assert (right == (mine == 'right')).all() and (ignored == (mine == 'ignored')).all()
                assert (e['gtIgnore'] == 0).sum() == (m.counted & (m.classes == label)).sum()


@given(st.integers(0, 10**6))
def test_what_is_ignored_might_as_well_not_be_there(seed):
    "Without the difficult objects and the crowds, and without the detections on them, the scores are the same"
    g = np.random.default_rng(seed)
    boxes = np.array([[0, 0, 10, 10], [20, 0, 30, 10], [40, 0, 60, 30], [70, 0, 95, 30.]])
    t = dict(as_target(boxes), crowd=torch.tensor([False, False, True, True]), difficult=torch.tensor([False, True, False, False]))
    t['labels'][3] = 0
    spots = g.integers(0, 5, 12) # the last is out of all of them
    places = np.concatenate([boxes[:2], [[42, 2, 50, 12], [72, 2, 80, 12], [0, 50, 10, 60]]])[spots]
    d = dict(as_target(places + g.uniform(0, .05, places.shape)), scores=torch.tensor(g.random(12)))
    kept = torch.tensor(np.isin(spots, (0, 4)))
    scores = []
    for detection, target in (d, t), ({k: v[kept] for k, v in d.items()}, as_target(boxes[:1])):
        p = Precision(['thing'])
        p.add([detection], [target])
        scores.append(p.result())
    assert scores[0].objects == scores[1].objects == 1 and abs(scores[0].map - scores[1].map) < 1e-12


def test_overlaps():
    from torchvision.ops import box_iou
    a, b = torch.rand(5, 4).double(), torch.rand(7, 4).double()
    for x in a, b: x[:, 2:] += x[:, :2]
    assert np.abs(overlaps(a, b) - box_iou(a, b).numpy()).max() < 1e-12
    assert overlaps(np.zeros((2, 4)), np.zeros((1, 4))).tolist() == [[0], [0]] and overlaps(np.zeros((0, 4)), b).shape == (0, 7)


# what it takes

BOX = dict(boxes=torch.tensor([[2., 2, 12, 12]]), labels=torch.tensor([1]))
HIT = dict(BOX, scores=torch.tensor([.9]))
MASK = torch.zeros(1, 20, 20, dtype=torch.bool)
MASK[:, 2:12, 2:12] = True


def scored(detection, target, **kwargs):
    p = Precision(['thing'], **kwargs)
    p.add([detection], [target])
    return p.result()


@pytest.mark.parametrize('masks', [MASK, MASK[:, None], MASK*.51, MASK[:, None].half()*.8, MASK.to(torch.uint8)], ids=lambda m: str(m.dtype) + str(m.ndim))
def test_forms_of_masks(masks):
    s = scored(dict(HIT, masks=masks), dict(BOX, masks=MASK), masks=True)
    assert s.masks.map > .999 and s.asdict()['masks']['map'] == s.masks.map and s.asdict()['masks']['masks'] is None


def test_area_of_the_target_counts():
    for area, name in (32**2 - 1, 'small'), (96**2 - 1, 'medium'), (96**2 + 1, 'large'):
        s = scored(HIT, dict(BOX, area=torch.tensor([area])))
        assert {k for k in ('small', 'medium', 'large') if not np.isnan(getattr(s, k))} == {name}


def test_a_wrong_thing_is_refused():
    p = Precision(['thing'], masks=True)
    with pytest.raises(ValueError, match=r'image 0: masks of \(10, 20\) pixels detected, of \(20, 20\) in the target'):
        p.add([dict(HIT, masks=MASK[:, :10])], [dict(BOX, masks=MASK)])
    with pytest.raises(ValueError, match='target of image 0 has no masks'): p.add([dict(HIT, masks=MASK)], [BOX])
    assert not len(p)
    for wrong, why in ((dict(labels=torch.tensor([0])), 'label 0'), (dict(labels=torch.tensor([-1])), 'label -1'), (dict(labels=torch.tensor([2])), 'label 2'),
                       (dict(boxes=torch.tensor([[2., 2, 1, 12]])), 'ends before'), (dict(boxes=torch.zeros(2, 4)), '2 boxes, 1 labels, 1 scores'),
                       (dict(boxes=torch.tensor([[2., 2, float('inf'), 12]])), 'nan or infinite')):
        with pytest.raises(ValueError, match=why): scored(dict(HIT, **wrong), BOX)
    with pytest.raises(ValueError, match='2 category_ids for 1 classes'): Precision(['thing'], category_ids=[1, 2])


def test_plain_data_and_no_noise(capsys):
    s = scored(HIT, BOX)
    json.dumps(s.asdict(), allow_nan=False)
    assert s.asdict()['classes'] == {'thing': dict(objects=1, AP=s.map, AP50=s.map50, AP75=s.map75, AR100=1.)}
    assert str(s).startswith('1 image, 1 object, 1 class\n  boxes  AP 100.0 %') and list(s.table['AP']) == [100]
    assert capsys.readouterr() == ('', '')


def test_nothing_to_find():
    empty = {k: v[:0] for k, v in HIT.items()}
    s = scored(HIT, empty)
    assert np.isnan([s.map, s.map50, s.recall]).all() and s.objects == 0
    with pytest.raises(ValueError, match='no object to find'): s.show()
    assert scored(empty, BOX).map == 0 and np.isnan(scored(empty, empty).map)


@pytest.mark.parametrize('k', [1, 3, 12])
def test_figure(k):
    p = Precision([f'class {i}' for i in range(k + 1)]) # the last has no object
    for i in range(k): p.add([dict(HIT, labels=torch.tensor([i + 1]))], [dict(BOX, labels=torch.tensor([i + 1]))])
    fig = p.result().show()
    assert len(fig.axes[0].lines) == (k + 1 if k <= 8 else 1) and len(fig.axes[2].get_yticks()) == min(k, 8)
    plt.close(fig)
