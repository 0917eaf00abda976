"Detection data: generated scenes, four formats written and read again, what is mended, batches that are the same in every run."
import contextlib, hashlib, io, json, warnings

import numpy as np, pytest, torch
from fastai.learner import Learner
from hypothesis import assume, given, strategies as st
from PIL import Image

from relvit import boxes
from relvit.boxes import (_segmentation, BoxLoader, COLOURS, KITTI, VOC, box_dls, box_set, crop_boxes, decode_masks, flip_boxes, hold_out, open_boxes, read_coco,
                          read_kitti, read_svhn, read_voc, shapes_set, show_boxes, stored_image)
from relvit.datasets import open_data
from relvit.images import Unreadable
from relvit.plots import plt
from relvit.shapes import SHAPES, make_shapes, mask_boxes


@pytest.fixture(autouse=True)
def no_figures():
    yield
    plt.close('all')


# generated scenes

def test_scenes_are_those_of_every_machine():
    "Numbers of recorded runs are about these scenes: if they must change, so must the runs"
    x, targets = make_shapes(20)
    boxes, labels = torch.cat([t['boxes'] for t in targets]), torch.cat([t['labels'] for t in targets])
    assert hashlib.sha256(boxes.int().numpy().tobytes() + labels.numpy().tobytes()).hexdigest()[:16] == '65b5e8138fe53079'
    assert abs(x.float().mean().item() - 131.823) < .01


def test_no_scene_is_in_two_parts():
    "What is chosen and reported on was never trained on, and neither is the other"
    s = open_boxes('shapes', n=[8, 8, 8], size=24)
    scenes = [x.numpy().tobytes() for ds in s.parts.values() for x in ds.files]
    assert len(scenes) == len({*scenes}) == 24 and list(s.parts) == ['trained on', 'chosen on', 'reported on']


@given(st.integers(1, 5), st.integers(0, 10**6), st.integers(1, 6))
def test_a_scene_is_what_its_target_says(n, seed, most):
    x, targets = make_shapes(n, 24, seed, most, SHAPES[1:4])
    assert x.shape == (n, 3, 24, 24) and x.dtype == torch.uint8
    for t in targets:
        assert 1 <= len(t['boxes']) <= most and t['masks'].sum(0).max() == 1 and t['masks'].any((1, 2)).all()
        assert set(t['labels'].tolist()) <= {1, 2, 3} and mask_boxes(t['masks']).equal(t['boxes'])
    again, _ = make_shapes(n + 3, 24, seed, most, SHAPES[1:4])
    assert again[:n].equal(x)


def test_what_is_pretrained_on_holds_what_is_trained_on():
    s, d = open_boxes('shapes', n=(50, 20, 20), size=32), open_data('shapes', img_size=32, p=4)
    seen = {x.numpy().tobytes() for x in torch.cat([d.train.x, d.valid.x])}
    assert len(seen) == 2000 and {x.numpy().tobytes() for x in s.train.files} <= seen
    assert {x.numpy().tobytes() for x in s.test.files} <= {x.numpy().tobytes() for x in d.test.x}
    assert not seen & {x.numpy().tobytes() for ds in (s.valid, s.test) for x in ds.files}
    bare = s.pretraining(32)
    assert bare.train.x.equal(torch.stack(s.train.files)) and bare.train.labelled == 0


# formats

some = shapes_set(6, 96, 3, most=6)


def picture(x): return Image.fromarray(x.permute(1, 2, 0).numpy())


def made(path, im, **kwargs):
    path.parent.mkdir(parents=True, exist_ok=True)
    im.save(path, **kwargs)


def told(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def voc(home, objects, part='train', suffix='.png', size=(96, 96), im=None):
    "One image with objects (name, left, top, right, bottom) as VOC counts them; more text in the name of an object is more of the XML"
    text = ''.join(f'<object><name>{n}</name><bndbox><xmin>{box[0]}</xmin><ymin>{box[1]}</ymin><xmax>{box[2]}</xmax><ymax>{box[3]}</ymax></bndbox>'
                   f'{more}</object>' for n, box, more in objects)
    told(home/'Annotations/a.xml', f'<annotation><size><width>{size[0]}</width><height>{size[1]}</height></size>{text}</annotation>')
    made(home/f'JPEGImages/a{suffix}', im or picture(some.files[0]))
    told(home/f'ImageSets/Main/{part}.txt', 'a\n')


def coco(home, images, notes, part='train2017', kinds=((3, 'b'), (1, 'a'))):
    "Images (id, height, width) and annotations"
    for i, h, w in images: made(home/part/f'{i}.png', Image.new('RGB', (w, h)))
    told(home/f'annotations/instances_{part}.json', json.dumps(dict(
        images=[dict(id=i, file_name=f'{i}.png', height=h, width=w) for i, h, w in images], annotations=notes,
        categories=[dict(id=i, name=n) for i, n in kinds])))
    return home/f'annotations/instances_{part}.json'


def kitti(home, lines, name='000000'):
    made(home/f'training/image_2/{name}.png', picture(some.files[0]))
    told(home/f'training/label_2/{name}.txt', '\n'.join(lines))


def svhn(home, images):
    "A list of (image, rows of left, top, width, height, class)"
    import h5py
    home.mkdir(parents=True, exist_ok=True)
    with h5py.File(home/'digitStruct.mat', 'w') as f:
        refs, names, groups = f.create_group('#refs#'), [], []
        def column(r): return np.array(r, dtype=h5py.ref_dtype)[:, None]
        def put(a): return refs.create_dataset(str(len(refs)), data=a).ref
        for i, (im, rows) in enumerate(images):
            im.save(home/f'{i + 1}.png')
            names.append(put(np.array([[ord(c)] for c in f'{i + 1}.png'], np.uint16)))
            g = refs.create_group(str(len(refs)))
            for key, v in zip(('left', 'top', 'width', 'height', 'label'), np.array(rows, float).T):
                g.create_dataset(key, data=v[:, None] if len(v) == 1 else column([put(k.reshape(1, 1)) for k in v]))
            groups.append(g.ref)
        f.create_dataset('digitStruct/name', data=column(names)), f.create_dataset('digitStruct/bbox', data=column(groups))


def test_voc_counts_from_one_and_holds_both_ends(tmp_path):
    hard = '<difficult>1</difficult><part><name>head</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>2</xmax><ymax>2</ymax></bndbox></part>'
    voc(tmp_path/'VOC2007', [('dog', (1, 1, 96, 96), ''), ('cat', (10.5, 20, 30, '40.25'), hard)])
    ds = read_voc(tmp_path)
    t = ds[0][1]
    assert t['boxes'].tolist() == [[0, 0, 96, 96], [9.5, 19, 30, 40.25]] and t['difficult'].tolist() == [False, True]
    assert ds.vocab == VOC and [VOC[k - 1] for k in t['labels']] == ['dog', 'cat']
    assert ds[0][0].equal(some.files[0])


def test_voc_of_ones_own(tmp_path):
    "Other names, other kinds of files, sizes that the annotation does not tell, a byte order mark"
    voc(tmp_path/'own', [('zebra', (1, 1, 9, 9), ''), ('ant', (1, 1, 9, 9), '')], suffix='.jpg', size=(0, 0))
    note = tmp_path/'own/Annotations/a.xml'
    note.write_bytes('\ufeff'.encode() + note.read_bytes())
    ds = read_voc(tmp_path/'own')
    assert (ds.vocab, ds.labels.tolist()) == (['ant', 'zebra'], [2, 1])
    s = read_voc(tmp_path/'own', vocab=['ant'])
    assert s.crowd.tolist() == [True, False] and s.labels.tolist() == [0, 1]


@pytest.mark.parametrize('text,said', [
    (b'<!DOCTYPE a [<!ENTITY b "c">]><annotation>&b;</annotation>', 'declares entities'), (b'<annotation><object></annotation>', 'no annotation of VOC'),
    ('<!DOCTYPE a [<!ENTITY b "c">]><annotation/>'.encode('utf-16'), 'no annotation of VOC'), (b'<annotation><object/></annotation>', 'no annotation'),
    (b'<?xml version="1.0" encoding="utf-16"?><annotation>\xff</annotation', 'no annotation')])
def test_annotations_that_are_none(tmp_path, text, said):
    voc(tmp_path/'VOC2007', [])
    (tmp_path/'VOC2007/Annotations/a.xml').write_bytes(text)
    with pytest.raises(ValueError, match=said): read_voc(tmp_path)


def test_voc_years_and_parts(tmp_path):
    for year in 2007, 2012: voc(tmp_path/f'VOCdevkit/VOC{year}', [('dog', (1, 1, 9, 9), '')])
    told(tmp_path/'VOCdevkit/VOC2012/ImageSets/Main/dog_train.txt', 'a 1')
    with pytest.raises(ValueError, match='VOC2007, VOC2012; say which with year='): read_voc(tmp_path)
    with pytest.raises(ValueError, match="no part 'test'; there are train$"): read_voc(tmp_path, 'test', 2012)
    assert read_voc(tmp_path, year=2012).name == 'VOC2012 train'
    (tmp_path/'VOCdevkit/VOC2007/Annotations/a.xml').unlink()
    with pytest.raises(FileNotFoundError, match=r'there is no annotation .*a\.xml'): read_voc(tmp_path, year=2007)
    with pytest.raises(FileNotFoundError, match='no folder with ImageSets/Main'): read_voc(tmp_path/'nowhere')
    with pytest.warns(UserWarning, match='no folder SegmentationObject'): assert not read_voc(tmp_path, year=2012, masks=True).has_masks


def test_masks_of_voc_are_numbered(tmp_path):
    home = tmp_path/'VOC2007'
    voc(home, [('dog', (1, 1, 9, 9), ''), ('cat', (20, 20, 40, 40), '')])
    told(home/'ImageSets/Main/train.txt', 'a\nb')
    numbered = np.zeros((96, 96), np.uint8)
    numbered[:9, :9], numbered[19:40, 19:40], numbered[50] = 1, 2, 255
    im = Image.fromarray(numbered)
    im.putpalette(list(range(256))*3)
    made(home/'SegmentationObject/a.png', im)
    ds = read_voc(tmp_path, masks=True) # b has no masks, and is not looked at
    assert len(ds) == 1 and ds[0][1]['masks'].sum((1, 2)).tolist() == [81, 441]
    made(home/'SegmentationObject/a.png', im.resize((48, 96)))
    with pytest.raises(ValueError, match=r'a\.png has 48 x 96 pixels, its image 96 x 96'): read_voc(tmp_path, masks=True)[0]


def test_coco_as_its_own_tool_reads_it(tmp_path):
    "Masks as polygons, run lengths and compressed run lengths, boxes, crowds, categories"
    from pycocotools import coco as tool, mask
    rng = np.random.default_rng(0)
    square = np.zeros((40, 60), np.uint8, order='F')
    square[5:20, 10:30] = 1
    rle = mask.encode(square)
    runs = np.flatnonzero(np.diff(np.r_[0, square.flatten('F'), 0])).tolist()
    segments = [rng.uniform(0, 40, (2, 8)).tolist(), [[1, 1, 30.5, 1, 30.5, 20.25]], dict(size=[40, 60], counts=rle['counts'].decode()),
                dict(size=[40, 60], counts=np.diff([0, *runs, 2400]).tolist())]
    notes = [dict(id=i + 1, image_id=7 - i % 2, category_id=(3, 1)[i % 2], iscrowd=int(i == 3), bbox=[i, 2, 20, 9.5], area=9, segmentation=s)
             for i, s in enumerate(segments)]
    file = coco(tmp_path, [(9, 8, 8), (7, 40, 60), (6, 40, 60)], notes)
    ds = read_coco(tmp_path)
    with contextlib.redirect_stdout(io.StringIO()): theirs = tool.COCO(str(file))
    assert (ds.vocab, ds.category_ids, len(ds), ds.has_masks) == (['a', 'b'], [1, 3], 3, True)
    for (_, t), i in zip(ds, (9, 7, 6)):
        anns = theirs.loadAnns(theirs.getAnnIds(i))
        assert [ds.category_ids[k - 1] for k in t['labels']] == [a['category_id'] for a in anns]
        assert (t['boxes'][:, 2:] - t['boxes'][:, :2]).tolist() == [[20, 9.5]]*len(anns) and t['crowd'].tolist() == [a['iscrowd'] == 1 for a in anns]
        for m, a in zip(t['masks'], anns): assert (m.numpy() == theirs.annToMask(a)).all()
    assert len(read_coco(tmp_path, drop_empty=True)) == 2 and ds.report()['empty'] == 1 and ds[0][1]['masks'].shape == (0, 8, 8)
    back = read_coco(file, images=tmp_path/'train2017', masks=False)
    assert not back.has_masks and back.boxes.equal(ds.boxes)


def lengths(text):
    "Character by character, as COCO's own tool reads them"
    out, v, shift = [], 0, 0
    for c in text:
        v, shift = v | (c - 48 & 31) << shift, shift + 5
        if c - 48 & 32: continue
        if c - 48 & 16: v -= 1 << shift
        out.append(v + (out[-2] if len(out) > 2 else 0))
        v = shift = 0
    return out


@given(st.binary(max_size=40) | st.lists(st.integers(48, 111), max_size=40).map(bytes))
def test_packed_run_lengths(text):
    try: got = boxes._lengths(text)
    except ValueError: assert any(all(c - 48 & 32 for c in text[i:i + 7]) for i in range(len(text) - 6)) # more than 35 bits
    else: assert got == lengths(text)


def test_coco_that_is_odd(tmp_path):
    a = dict(image_id=1, category_id=1, bbox=[1, 1, 5, 5])
    coco(tmp_path, [(1, 20, 20)], [a, a | dict(segmentation=[[1, 1, 5, 1, 5, 5]])])
    with pytest.warns(UserWarning, match='1 of 2 objects .* have no mask'): assert not read_coco(tmp_path).has_masks
    for wrong, said in ([a | dict(image_id=2)], 'annotation 0 .* its image 2 is not listed'), ([dict(image_id=1)], "it has no 'bbox'"), ([a | dict(bbox=[1])], 'no list of four'):
        coco(tmp_path, [(1, 20, 20)], wrong)
        with pytest.raises(ValueError, match=said): read_coco(tmp_path)
    file = coco(tmp_path, [(1, 20, 20)], [a | dict(category_id=2)])
    assert read_coco(tmp_path).labels.tolist() == [0] and read_coco(tmp_path).crowd.tolist() == [True]
    made(tmp_path/'train2017/1.png', Image.new('RGB', (20, 10)))
    with pytest.raises(ValueError, match=r'1\.png has 20 x 10 pixels, its annotation is of 20 x 20'): read_coco(tmp_path)
    file.write_text('{')
    with pytest.raises(ValueError, match='instances_train2017.json is no JSON, or was cut'): read_coco(tmp_path)
    coco(tmp_path, [], [])
    with pytest.raises(ValueError, match='train2017 has no image'): read_coco(tmp_path)


def test_kitti(tmp_path):
    kitti(tmp_path/'raw', ['Cyclist 0.00 0 -1.5 1.25 2.5 30.75 90 1 1 1 1 1 1 1', '', 'DontCare -1 -1 -10 3 4 20 9 -1 -1 -1 -1 -1 -1 -1',
                           'Bicycle 0 0 0 90.00 4 2000 9 1 1 1 1 1 1 1'])
    ds = read_kitti(tmp_path)
    t = ds[0][1]
    assert t['boxes'].tolist() == [[1.25, 2.5, 30.75, 90], [3, 4, 20, 9], [90, 4, 96, 9]] and t['crowd'].tolist() == [False, True, True]
    assert t['labels'].tolist() == [KITTI.index('Cyclist') + 1, 0, 0]
    assert ds.report()['mended'] == {'boxes clipped': 1, 'objects of a class that is not listed, ignored': 1}
    for line in 'Car 0 0', 'Car 0 0 0 a b c d':
        kitti(tmp_path/'raw', ['', line])
        with pytest.raises(ValueError, match=f'line 2 of .*000000.txt is no object of KITTI: {line}'): read_kitti(tmp_path)
    (tmp_path/'raw/training/image_2/000000.png').unlink()
    kitti(tmp_path/'raw', [], '000001')
    with pytest.raises(FileNotFoundError, match=r'1 of 2 images of KITTI .* such as .*000000\.png'):
        (tmp_path/'raw/training/label_2/000000.txt').write_text('')
        read_kitti(tmp_path)


def test_svhn(tmp_path):
    import h5py
    im = picture(some.files[0])
    svhn(tmp_path/'train', [(im, [(1, 2, 10, 20, 10)]), (im.resize((50, 40)), [(-3, 2, 10, 20, 1), (9, 2, 10, 99, 9)])])
    svhn(tmp_path/'extra', [(im, [(1, 2, 10, 20, 5)])])
    ds = read_svhn(tmp_path, 'train+extra')
    assert (ds.vocab[ds.labels[0] - 1], [ds.vocab[k - 1] for k in ds.labels], len(ds), ds.flip) == ('0', ['0', '1', '9', '5'], 3, False)
    assert ds[1][0].shape == (3, 40, 50) and ds[1][1]['boxes'].tolist() == [[0, 2, 7, 22], [9, 2, 19, 40]]
    with h5py.File(tmp_path/'train/digitStruct.mat', 'w') as f: f['other'] = 1
    with pytest.raises(ValueError, match=r'no digitStruct\.mat of the house numbers'): read_svhn(tmp_path)
    with pytest.raises(FileNotFoundError, match='no folder with a digitStruct.mat'): read_svhn(tmp_path/'train')


@pytest.mark.parametrize('size,said', [([10], '10'), ([], ''), ([1, 2, 3], '3 x 2 x 1'), ([12, 10], '10 x 12')])
def test_a_mask_of_another_size_is_refused(size, said):
    with pytest.raises(ValueError, match=f'its mask is of {said} pixels, its image of 12 x 10'): _segmentation(dict(size=size, counts=[120]), 10, 12)


def test_a_missing_library_is_named(monkeypatch):
    import sys
    for name, f in dict(h5py=lambda: list(__import__('relvit.boxes').boxes._digits('x')), pycocotools=lambda: decode_masks([[[0]*6]], 8, 8)).items():
        monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(ImportError, match=r'pip install "relvit\[detect\]"'): f()


# files as they come

@pytest.mark.parametrize('mode,said', [('L', 'grey'), ('1', 'grey'), ('LA', 'grey'), ('P', ''), ('RGBA', ''), ('CMYK', ''), ('RGB', '')])
def test_kinds_of_files(tmp_path, mode, said):
    im = picture(some.files[0]).convert(mode)
    f = tmp_path/('a.jpg' if mode == 'CMYK' else 'a.png')
    im.save(f)
    x, kind = stored_image(f)
    assert x.shape == (3, 96, 96) and x.dtype == torch.uint8 and x.is_contiguous() and kind == said
    if said: assert x[0].equal(x[1]) and x[1].equal(x[2])


@pytest.mark.parametrize('suffix', ['.jpg', '.png'])
def test_boxes_are_of_the_stored_pixels(tmp_path, suffix):
    exif = Image.Exif()
    exif[274] = 6
    picture(some.files[0][:, :60]).save(tmp_path/f'a{suffix}', exif=exif)
    x, kind = stored_image(tmp_path/f'a{suffix}')
    assert x.shape == (3, 60, 96) and kind == 'turned' and (x.float() - some.files[0][:, :60]).abs().mean() < 20


def test_unreadable_files(tmp_path):
    for i in range(3): kitti(tmp_path, [f'Car 0 0 0 {i} 2 30 40'], f'{i:06d}')
    bad = tmp_path/'training/image_2/000001.png'
    whole = bad.read_bytes()
    bad.write_bytes(whole[:-3000]) # its head is whole
    with pytest.raises(Unreadable, match=r'1 of 3 files of KITTI is unreadable[\s\S]*000001\.png'): read_kitti(tmp_path)
    with pytest.warns(UserWarning, match='left out'): ds = read_kitti(tmp_path, most_unreadable=1)
    assert len(ds) == 2 and ds.boxes[:, 0].tolist() == [0, 2] and ds.of.tolist() == [0, 1] and list(ds.report()['skipped']) == [str(bad)]
    late = read_kitti(tmp_path, check=False)
    with pytest.raises(Unreadable, match=r'000001\.png'): late.batch([0, 1])
    bad.write_bytes(b'')
    with pytest.raises(Unreadable): read_kitti(tmp_path, check=False)
    made(tmp_path/'training/image_2/000002.png', Image.new('RGB', (9, 9)))
    with pytest.raises(ValueError, match='has 9 x 9 pixels, its boxes are of 96 x 96'): late[2]


# sets

number = st.floats(-60, 160, width=32) | st.just(float('nan')) | st.just(float('inf'))


@given(st.lists(st.tuples(number, number, number, number), max_size=8), st.lists(st.integers(-1, 7), min_size=8, max_size=8))
def test_whatever_comes_a_target_keeps_its_promise(boxes, labels):
    b = torch.tensor(boxes).view(-1, 4)
    ds = box_set('odd', SHAPES, [some.files[0]], [dict(boxes=b, labels=torch.tensor(labels[:len(b)], dtype=torch.int64))])
    t, counts = ds[0][1], ds.report()['mended']
    left, top, right, bottom = t['boxes'].unbind(1)
    assert ((left >= 0) & (top >= 0) & (right <= 96) & (bottom <= 96) & (left < right) & (top < bottom)).all()
    assert ((t['labels'] >= 0) & (t['labels'] <= 5)).all() and (t['crowd'] == (t['labels'] == 0)).all()
    assert len(t['boxes']) + sum(n for k, n in counts.items() if k.endswith('dropped')) == len(b)


@given(st.lists(st.integers(0, 5), min_size=1, max_size=8), st.data())
def test_subsets(idxs, data):
    ds = box_set('some', SHAPES, some.files, [some[i][1] for i in range(4)] + [dict(boxes=torch.zeros(0, 4), labels=torch.zeros(0), masks=[])]*2)
    part = ds.subset(idxs)
    for (x, t), i in zip(part, idxs):
        want = ds[i][1]
        assert x.equal(ds.files[i]) and all(t[k].equal(want[k]) for k in ('boxes', 'labels', 'masks', 'crowd', 'difficult'))
    more = data.draw(st.lists(st.integers(0, len(idxs) - 1), min_size=1, max_size=5))
    assert part.subset(more).boxes.equal(ds.subset([idxs[i] for i in more]).boxes)
    assert part.report()['objects'] == sum(len(ds[i][1]['boxes']) for i in idxs)


def test_a_target_is_a_copy():
    some[0][1]['boxes'].zero_()
    assert some[0][1]['boxes'].any()


def test_held_out():
    rest, held = hold_out(some, .3, seed=4)
    again = hold_out(some, 2, seed=4)[1]
    assert (len(rest), len(held)) == (4, 2) and torch.stack(held.files).equal(torch.stack(again.files))
    assert len({x.numpy().tobytes() for x in rest.files + held.files}) == 6
    with pytest.raises(ValueError, match='6 images cannot be held out of the 6'): hold_out(some, 6)


def test_what_a_folder_holds(tmp_path):
    coco(tmp_path, [(i, 9, 9) for i in range(10)], [])
    coco(tmp_path, [(1, 9, 9)], [], 'val2017', [(1, 'a'), (2, 'c')])
    with pytest.raises(ValueError, match='train2017 and val2017 of .* have other categories'): open_boxes(tmp_path)
    coco(tmp_path, [(1, 9, 9)], [], 'val2017')
    s = open_boxes(tmp_path, valid=.3)
    assert (s.format, len(s.train), len(s.valid), len(s.test)) == ('coco', 7, 3, 1)
    report = s.report()
    assert json.loads(json.dumps(report)) == report and set(report['parts']) == {'trained on', 'chosen on', 'reported on'} and report['fit'] is None
    coco(tmp_path, [(1, 9, 9)], [], 'train2014')
    with pytest.raises(ValueError, match='train2014, train2017; say which with year='): open_boxes(tmp_path)
    assert len(open_boxes(tmp_path, year=2017).train) == 9
    kitti(tmp_path, ['Car 0 0 0 1 2 30 40'])
    with pytest.raises(ValueError, match='holds kitti and coco; say which with format='): open_boxes(tmp_path)
    with pytest.raises(ValueError, match='1 images cannot be held out of the 1 of KITTI'): open_boxes(tmp_path, 'kitti')
    with pytest.raises(ValueError, match='holds none of ImageSets/Main'): open_boxes(tmp_path, 'voc')
    with pytest.raises(ValueError, match='valid is a share'): open_boxes(tmp_path, valid=0)


# batches

@given(st.integers(0, 5), st.integers(-40, 60), st.integers(-40, 60), st.integers(1, 130), st.integers(1, 130))
def test_windows_hold_what_was_there(i, top, left, height, width):
    assume(top + height > 0 and left + width > 0)
    x, t = some[i]
    y, u = crop_boxes(x, t, top, left, height, width, least=.5)
    big = torch.zeros(3, 300, 300, dtype=torch.uint8)
    big[:, 60:156, 60:156] = x
    assert y.equal(big[:, 60 + top:60 + top + height, 60 + left:60 + left + width])
    b = u['boxes']
    assert ((b >= 0) & (b <= torch.tensor([width, height]*2))).all() and len(b) == len(u['labels']) == len(u['masks']) == len(u['crowd'])
    for box, m in zip(mask_boxes(u['masks']), b): # a mask lies in its box
        if box[2]: assert (box[:2] >= m[:2] - 1e-3).all() and (box[2:] <= m[2:] + 1e-3).all()


def test_flips():
    x, t = some[2]
    y, u = flip_boxes(x, t)
    assert mask_boxes(u['masks']).equal(u['boxes']) and y.flip(-1).equal(x) and u['labels'].equal(t['labels'])
    flipped = [BoxLoader(some, bs=6, flip=f, seed=1, device='cpu').one_batch()[0] for f in (0, .5, 1)]
    same = [a.equal(b) for a, b in zip(flipped[0], flipped[1])]
    assert 0 < sum(same) < 6 and not any(a.equal(b) for a, b in zip(flipped[0], flipped[2]))


def test_digits_are_not_mirrored(tmp_path):
    for part in 'train', 'test': svhn(tmp_path/part, [(picture(x), [(1, 2, 10, 20, 1)]) for x in some.files])
    assert box_dls(tmp_path, bs=2, device='cpu').train.flip == 0 and box_dls(some_splits(), bs=2, device='cpu').train.flip == .5
    with pytest.warns(UserWarning, match='mirrored'): box_dls(tmp_path, bs=2, flip=.5, device='cpu')


def some_splits(): return open_boxes('shapes', n=(12, 4, 4), size=32)


def test_epochs_repeat_and_shares_join():
    def loader(**kwargs): return box_dls(some_splits(), bs=4, jitter=(.5, 1.), device='cpu', **kwargs).train
    def bits(dl): return [[(x.numpy().tobytes(), t['boxes'].tolist(), int(t['image_id'])) for x, t in zip(*b)] for b in dl]
    a, b = loader(), loader()
    first, second = bits(a), bits(a)
    assert first == bits(b) and first != second and first != bits(loader(seed=1))
    c = loader()
    c.epoch, c.first = 1, 2
    c.one_batch()
    assert bits(c) == second[2:]
    halves = [loader() for _ in range(2)]
    for rank, dl in enumerate(halves): dl.rank, dl.world = rank, 2
    ids = [[[i for *_, i in b] for b in bits(dl)] for dl in halves]
    assert [sorted(x + y) for x, y in zip(*ids)] == [sorted(i for *_, i in b) for b in first]
    assert len(loader(steps=7)) == len(bits(loader(steps=7))) == 7


def test_a_learner_takes_them():
    class Toy(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.w = torch.nn.Parameter(torch.zeros(3))
        def forward(self, images): return torch.stack([x.float().mean((1, 2))/255 for x in images]) @ self.w
    def loss(pred, targets): return (pred - torch.stack([t['boxes'].mean() for t in targets])/32).square().mean()
    dls = box_dls(some_splits(), bs=4, device='cpu')
    learn = Learner(dls, Toy(), loss_func=loss, lr=.1)
    with learn.no_logging(): learn.fit(2)
    assert learn.model.w.all() and all(np.isfinite(v).all() for v in learn.recorder.values)
    assert len(dls.test.dataset) == 4 and dls.valid.dataset is dls.splits.valid


# figures

def test_what_is_drawn():
    x, t = max(some, key=lambda b: len(b[1]['labels']))
    n = len(t['labels'])
    ax = show_boxes(x, t, SHAPES)
    assert [s.get_text() for s in ax.texts] == [SHAPES[k - 1] for k in t['labels']] and len(ax.images) == 1 + n
    said = dict(boxes=t['boxes'].float(), labels=t['labels'], scores=torch.linspace(1, .4, n), masks=torch.rand(n, 1, 96, 96))
    ax = show_boxes(x/255, said, SHAPES, threshold=.9, title='found')
    assert [s.get_text() for s in ax.texts] == [f'{SHAPES[t["labels"][0] - 1]} 1.00'] and ax.get_title() == 'found'
    odd = dict(boxes=t['boxes'][:2], labels=torch.tensor([0, 9]), crowd=torch.tensor([True, False]))
    ax = show_boxes(x, odd, SHAPES, masks=False)
    assert [s.get_text() for s in ax.texts] == ['9'] and [p.get_hatch() for p in ax.patches] == ['///', None]
    assert len(set(COLOURS)) == 7
    show_boxes(x, dict(boxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.int64)), SHAPES)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        some.show(1), BoxLoader(some, bs=2, device='cpu').show_batch(8)
