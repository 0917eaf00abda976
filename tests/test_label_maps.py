"Maps of classes: generated scenes, three formats written and read again, what is refused, parts that do not meet."
import math, pickle

import numpy as np, pytest, torch
from hypothesis import given, strategies as st
from PIL import Image

from relvit.boxes import open_boxes
from relvit.images import Unreadable, hold_out, pixel_statistics
from relvit.label_maps import (IGNORE, MapSet, id_table, open_maps, plain_numbers, read_ade20k, read_imagenets, read_voc_maps, shapes_maps,
                               show_map, voc_colours, voc_numbers, wide_numbers)
from relvit.plots import plt
from relvit.shapes import inside, make_shapes

pytestmark = pytest.mark.filterwarnings('ignore::UserWarning')


@pytest.fixture(autouse=True)
def no_figures():
    yield
    plt.close('all')


some = shapes_maps(6, 48, 3)


def save(x, at, **kwargs):
    at.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(x.permute(1, 2, 0) if x.ndim == 3 else x)).save(at, **kwargs)


def write_voc(home, part='train', ids=range(6), masks='SegmentationClass', lists='Segmentation', mode=None):
    (home/f'ImageSets/{lists}').mkdir(parents=True, exist_ok=True)
    (home/f'ImageSets/{lists}/{part}.txt').write_text(''.join(f'{part}_{i}\n' for i in ids))
    for i in ids:
        x, m = some[i]
        save(x, home/f'JPEGImages/{part}_{i}.png')
        im = Image.fromarray(m.byte().numpy())
        im.putpalette(voc_colours().flatten().tolist())
        (home/masks).mkdir(exist_ok=True)
        (im.convert(mode) if mode else im).save(home/f'{masks}/{part}_{i}.png')
    return home


def write_ade(home, part='training', ids=range(6)):
    home.mkdir(parents=True, exist_ok=True)
    rows = [f'{k + 1}\t0\t0\t0\t{v}, or so' for k, v in enumerate(some.vocab)]
    (home/'objectInfo150.txt').write_text('\n'.join(['Idx\tRatio\tTrain\tVal\tName', *rows]))
    for i in ids: save(some[i][0], home/f'images/{part}/{i}.png'), save((some[i][1] + 1).byte(), home/f'annotations/{part}/{i}.png')
    return home


def write_s(home, part='train-semi', ids=range(6)):
    for i in ids:
        x, m = some[i]
        k = int(m[m > 0].mode()[0])
        m = m.where(m != 5, 1000)
        save(x, home/f'{part}/n{k}/{i}.JPEG', format='PNG')
        save(torch.stack([m & 255, m >> 8, 0*m]).byte(), home/f'{part}-segmentation/n{k}/{i}.png')
    for k in range(1, 6): (home/f'{part}-segmentation/n{k}').mkdir(exist_ok=True)
    return home


# colours and codes

def test_colours_are_those_of_the_devkit():
    "The loop over bits that VOC's own kit documents"
    for k, colour in enumerate(voc_colours(3000).tolist()):
        rgb, rest = [0, 0, 0], k
        for j in range(8):
            for c in range(3): rgb[c] |= (rest >> c & 1) << 7 - j
            rest >>= 3
        assert rgb == colour, k


@given(st.lists(st.integers(0, 255), min_size=1, max_size=30), st.sampled_from(['P', 'L', 'RGB', 'RGBA', 'sorted', 'I;16', 'LA']))
def test_a_voc_mask_in_any_mode(tmp_path_factory, numbers, mode):
    f, a = tmp_path_factory.mktemp('voc')/'m.png', torch.tensor(numbers)[None]
    im = Image.fromarray(a.byte().numpy())
    if mode not in ('L', 'LA', 'I;16'): im.putpalette(voc_colours().flatten().tolist())
    if mode in ('RGB', 'RGBA', 'LA'): im = im.convert(mode)
    if mode == 'I;16': im = Image.fromarray(a.numpy().astype('uint16'))
    if mode == 'sorted': im = im.remap_palette(sorted(set(numbers), reverse=True))
    im.save(f)
    found, said = voc_numbers(f)
    assert found.equal(a) and (said == 'colours' or mode not in ('RGB', 'RGBA')) and (mode != 'L' or not said)


@given(st.lists(st.integers(0, 65535), min_size=1, max_size=30))
def test_wide_numbers(tmp_path_factory, numbers):
    at, a = tmp_path_factory.mktemp('s'), torch.tensor(numbers)[None]
    save(torch.stack([a & 255, a >> 8, 0*a]).byte(), at/'rgb.png')
    Image.fromarray(a.numpy().astype('uint16')).save(at/'16.png')
    for f in 'rgb.png', '16.png': assert wide_numbers(at/f)[0].equal(a)
    assert plain_numbers(at/'16.png')[0].equal(a)


def test_modes_that_are_no_maps(tmp_path):
    f = tmp_path/'m.tif'
    Image.fromarray(np.float32([[.5]])).save(f)
    for read in plain_numbers, wide_numbers, voc_numbers:
        with pytest.raises(Unreadable, match='fractions'): read(f)
        with pytest.raises(FileNotFoundError): read(tmp_path/'gone.png')
    Image.fromarray(np.uint8([[1]])).save(tmp_path/'l.png')
    with pytest.raises(ValueError, match='of mode L, not RGB'): wide_numbers(tmp_path/'l.png')
    Image.fromarray(np.array([[True, False]])).save(tmp_path/'1.png')
    assert plain_numbers(tmp_path/'1.png')[0].tolist() == [[1, 0]]


@given(st.integers(1, 300), st.integers(0, 3), st.integers(-3, 70000))
def test_a_table_says_what_a_number_means(k, first, number):
    ignored = first + k + 5
    found = int(id_table(k, first, [ignored])[min(max(number, -2), 65535)])
    assert found == (number - first if first <= number < first + k else IGNORE if number in (ignored, -1) else -2)


# sets

def test_scenes_are_those_of_the_boxes():
    s, b = open_maps('shapes', n=(8, 4, 4), size=48), open_boxes('shapes', n=(8, 4, 4), size=48)
    for part in 'train', 'valid', 'test':
        maps, boxes = getattr(s, part), getattr(b, part)
        for (x, m), (y, t) in zip(maps, boxes):
            assert x.equal(y)
            for mask, k in zip(t['masks'], t['labels']): assert (m[mask] == k).all()
            assert (m == 0).equal(~t['masks'].any(0))
    assert s.pretraining(48, 8).train.x.equal(b.pretraining(48, 8).train.x) and s.report()['parts'].keys() == b.report()['parts'].keys()
    two = shapes_maps(3, 32, classes=('star', 'disc'))
    assert two.vocab == ['ground', 'star', 'disc'] and two.palette.shape == (3, 3)


@given(st.lists(st.integers(0, 5), min_size=1, max_size=8))
def test_subsets(idxs):
    part = some.subset(idxs)
    xs, maps = part.batch(range(len(idxs)))
    for i, x, m in zip(idxs, xs, maps): assert x.equal(some[i][0]) and m.equal(some[i][1]) and m.dtype == torch.int64
    assert part.pixels.equal(some.pixels[idxs]) and part.pixels.sum(1).eq(48*48).all()
    assert sum(part.report()['classes'].values()) == pytest.approx(1, abs=1e-5)


def test_sizes_may_differ_and_ids_are_checked():
    x = torch.zeros(3, 4, 6, dtype=torch.uint8)
    m = torch.tensor([[0, 1, IGNORE]]).expand(4, 3).repeat(1, 2)
    ds = MapSet('own', 'ab', [x, x[:, :2, :3]], [m, m[:2, :3].where(m[:2, :3] >= 0, 255).byte()])
    assert [tuple(y.shape) for _, y in ds] == [(4, 6), (2, 3)] and ds.pixels.tolist() == [[8, 8, 8], [2, 2, 2]]
    assert ds.report()['unlabelled'] == pytest.approx(1/3, abs=1e-6) and ds.background is None
    assert ds.palette.tolist() == [[128, 0, 0], [0, 128, 0]]
    for wrong in -2, 2, 70000:
        odd = torch.full((4, 6), wrong)
        with pytest.raises(ValueError, match=f'the map of own 0 holds {wrong}; the 2 classes'): MapSet('own', 'ab', [x], [odd])
    with pytest.raises(ValueError, match='was one of them turned'): MapSet('own', 'ab', [x], [m.T])
    with pytest.raises(ValueError, match=r'uint8 \(2,3\), not torch.uint8 \(3, 3\)'): MapSet('own', 'ab', [x], [m], palette=voc_colours(3))
    assert pickle.loads(pickle.dumps(ds))[1][1].equal(ds[1][1])
    many = MapSet('many', range(300), [x], [torch.full((4, 6), 255)]) # 255 is one of the ids
    assert many[0][1].unique().tolist() == [255]


def test_a_map_is_read_when_it_is_asked_for(tmp_path):
    ds = read_voc_maps(write_voc(tmp_path), check=False)
    save(some[4][1].byte(), tmp_path/'SegmentationClass/train_0.png')
    assert ds[0][1].equal(some[4][1]) and ds.pixels is None and ds.report()['classes']['person'] is None
    save(some[4][1][:, 4:].byte(), tmp_path/'SegmentationClass/train_0.png')
    with pytest.raises(ValueError, match='train_0.png has 44 x 48 pixels, its image 48 x 48'): ds[0]
    with pytest.raises(ValueError, match='44 x 48'): read_voc_maps(tmp_path, check=False) # the head says it
    mean, std = pixel_statistics(ds)
    assert mean == pytest.approx(torch.stack(some.files).float().div(255).mean((0, 2, 3)).tolist(), abs=1e-3)


# formats

@pytest.mark.parametrize('mode', [None, 'L', 'RGB', 'RGBA'])
def test_voc(tmp_path, mode):
    ds = read_voc_maps(write_voc(tmp_path/'VOCdevkit/VOC2012', mode=mode and mode.replace('L', 'P')).parent)
    assert len(ds.vocab) == 21 and ds.background == 0 and ds.name == 'VOC2012 train'
    assert all(x.equal(y) and m.equal(n) for (x, m), (y, n) in zip(ds, some))
    assert ds.mended == ({'maps read by their colours': 6} if mode and 'RGB' in mode else {})


def test_voc_lists(tmp_path):
    home = write_voc(write_voc(tmp_path, lists='Main'), 'val', [0, 1], lists='Main')
    (home/'SegmentationClass/train_3.png').unlink() # of the images of Main, those with a mask
    (home/'ImageSets/Main/dog_train.txt').write_text('train_0 1\n')
    assert [f.stem for f in read_voc_maps(home, 'train+val').files] == [f'train_{i}' for i in (0, 1, 2, 4, 5)] + ['val_0', 'val_1']
    with pytest.raises(ValueError, match="no part 'dog_train'; there are train, val$"): read_voc_maps(home, 'dog_train')
    write_voc(home)
    line = '/JPEGImages/train_2.png /SegmentationClassAug/train_2.png\n\n'
    (home/'ImageSets/Segmentation/train_aug.txt').write_text(line*2)
    assert [f.stem for f in read_voc_maps(home, 'train_aug').files] == ['train_2']
    write_voc(tmp_path/'VOC2007'), write_voc(tmp_path/'VOC2012')
    (home/'ImageSets').rename(home/'gone')
    with pytest.raises(ValueError, match='VOC2007, VOC2012; say which'): open_maps(tmp_path)
    assert open_maps(tmp_path, year=2007).name == 'VOC2007 train'


def test_voc_of_ones_own(tmp_path):
    home = write_voc(tmp_path)
    ds = read_voc_maps(home, vocab=some.vocab)
    assert ds.vocab == some.vocab and ds[2][1].equal(some[2][1])
    with pytest.raises(ValueError, match='the 2 classes of .* are 0 to 1, no class is 255'): read_voc_maps(home, vocab='ab')


def test_images_that_are_turned_or_grey(tmp_path):
    home, exif = write_voc(tmp_path), Image.Exif()
    exif[274] = 6
    x = some[0][0][:, :40]
    Image.fromarray(x.permute(1, 2, 0).numpy()).save(home/'JPEGImages/train_0.png', exif=exif)
    save(some[0][1][:40].byte(), home/'SegmentationClass/train_0.png')
    save(some[1][0][0], home/'JPEGImages/train_1.png')
    ds = read_voc_maps(home)
    assert ds[0][0].equal(x) and ds.mended == {'images that were grey': 1, 'images that EXIF turns, left as stored': 1}
    assert ds.subset([2, 3]).mended == {}
    save(some[0][1][:40].T.byte(), home/'SegmentationClass/train_0.png')
    with pytest.raises(ValueError, match='turned'): read_voc_maps(home)


def test_unreadable_files(tmp_path):
    home = write_voc(tmp_path)
    (home/'JPEGImages/train_1.png').write_bytes(b'no image')
    cut = home/'SegmentationClass/train_4.png'
    cut.write_bytes(cut.read_bytes()[:60])
    with pytest.raises(Unreadable, match='2 of 6 files') as e: read_voc_maps(home)
    assert 'its map' in str(e.value) and 'train_4.png' in str(e.value)
    ds = read_voc_maps(home, most_unreadable=2)
    assert len(ds) == 4 and len(ds.skipped) == 2 and ds[3][1].equal(some[5][1]) and ds.pixels.equal(
        torch.cat([some.pixels, torch.zeros(6, 15).int()], 1)[[0, 2, 3, 5]])
    assert 'files left out: 2' in repr(ds)
    for f in (home/'JPEGImages').iterdir(): f.write_bytes(b'no image')
    with pytest.raises(ValueError, match='none of the 6 files of .* train can be read'): read_voc_maps(home, most_unreadable=6)


def test_ade20k(tmp_path):
    ds = read_ade20k(write_ade(tmp_path/'ADEChallengeData2016').parent)
    assert ds.vocab == some.vocab and ds.background is None and ds.palette.tolist() == voc_colours(7)[1:].tolist()
    assert all(x.equal(y) and m.equal(n) for (x, m), (y, n) in zip(ds, some))
    f = tmp_path/'ADEChallengeData2016/annotations/training/2.png'
    save(torch.zeros(48, 48).byte(), f)
    assert (read_ade20k(tmp_path)[2][1] == IGNORE).all()
    save(torch.full((48, 48), 7).byte(), f)
    with pytest.raises(ValueError, match='2.png holds 7; the 6 classes of ADE20K training are 1 to 6, no class is 0'): read_ade20k(tmp_path)
    save(some[0][0], f)
    with pytest.raises(ValueError, match=r'colours \(RGB\)'): read_ade20k(tmp_path)
    (tmp_path/'ADEChallengeData2016/objectInfo150.txt').unlink()
    with pytest.raises(FileNotFoundError, match='give them as vocab'): read_ade20k(tmp_path)
    assert read_ade20k(tmp_path, vocab=some.vocab, check=False).vocab == some.vocab
    f.unlink()
    with pytest.raises(FileNotFoundError, match='1 of 6 maps'): read_ade20k(tmp_path, vocab=some.vocab)


def test_imagenets(tmp_path):
    home = write_s(tmp_path/'ImageNetS5')
    ds = read_imagenets(tmp_path)
    assert ds.vocab == ['other', 'n1', 'n2', 'n3', 'n4', 'n5'] and ds.background == 0
    for (x, m), f in zip(ds, ds.files):
        y, n = some[int(f.stem)]
        assert x.equal(y) and m.equal(n.where(n != 5, IGNORE))
    (tmp_path/'classes.txt').write_text('n1\nn2\nn3\nn4\nn5\n')
    assert read_imagenets(home, classes=tmp_path/'classes.txt').vocab == ds.vocab
    with pytest.raises(ValueError, match='hold the class of their folder'): read_imagenets(home, classes='n5 n4 n0 n2 n1 n3'.split())
    with pytest.raises(ValueError, match='not among its 1 classes, such as'): read_imagenets(home, classes=['n9'])
    with pytest.raises(ValueError, match="no masks of a part 'train'; there are those of train-semi"): read_imagenets(home, 'train')
    with pytest.raises(FileNotFoundError, match='holds no folder such as'): read_imagenets(home/'train-semi')
    write_s(tmp_path/'ImageNetS50')
    for read in read_imagenets, open_maps:
        with pytest.raises(ValueError, match='holds ImageNetS5, ImageNetS50; give one of these folders'): read(tmp_path)
    assert len(read_imagenets(home)) == len(read_imagenets(tmp_path/'ImageNetS50')) == 6


# parts

def test_parts_do_not_meet(tmp_path):
    home = write_voc(write_voc(tmp_path/'VOC2012'), 'val', [0, 1])
    s, again = open_maps(tmp_path, valid=.4, seed=3), open_maps(home, valid=.4, seed=3)
    files = [{str(f) for f in ds.files} for ds in s.parts.values()]
    assert list(map(len, files)) == [4, 2, 2] and len(set.union(*files)) == 8 and s.valid.files == again.valid.files
    assert s.background == 0 and s.palette.equal(voc_colours(21)) and s.fit is None
    assert s.report()['opened']['valid'] == .4 and s.report()['parts']['reported on']['images'] == 2
    (home/'ImageSets/Segmentation/trainval.txt').write_text('train_0\nval_1\n')
    with pytest.raises(ValueError, match='1 images of .* in trainval .* and in val to report on'): open_maps(home, train='trainval')
    assert open_maps(home, train='trainval', test='none').test is None


def test_what_is_missing_is_said(tmp_path):
    write_ade(tmp_path/'ade', 'validation'), write_s(tmp_path/'s', 'validation')
    with pytest.raises(ValueError, match="no part 'training' to train on; there are validation; train="): open_maps(tmp_path/'ade')
    with pytest.raises(ValueError, match="no part 'train-semi' to train on"): open_maps(tmp_path/'s')
    s = open_maps(tmp_path/'ade', train='validation', valid=.3)
    assert {k: p['said'] for k, p in s.report()['parts'].items()} == {
        'trained on': 'its validation images without the held-out ones', 'chosen on': '30% of the rest, seed 0', 'reported on': '30% of validation, seed 0'}
    assert [len(ds) for ds in s.parts.values()] == [3, 1, 2] and len({f for ds in s.parts.values() for f in ds.files}) == 6
    write_ade(tmp_path/'ade', 'training'), (tmp_path/'ade/annotations/validation').rename(tmp_path/'elsewhere')
    s = open_maps(tmp_path/'ade')
    assert s.test is None and 'nothing: it has no part validation' in repr(s)
    with pytest.raises(ValueError, match='there is no folder'): open_maps(tmp_path/'gone')
    with pytest.raises(ValueError, match='is a file; unpack it'): open_maps(tmp_path/'ade/objectInfo150.txt')
    with pytest.raises(ValueError, match='holds none of'): open_maps(tmp_path/'ade/images')
    with pytest.raises(ValueError, match='holds none of annotations/training'): open_maps(tmp_path/'s', 'ade20k')
    with pytest.raises(ValueError, match='a share between 0 and 1'): open_maps('shapes', valid=2)
    with pytest.raises(ValueError, match='name parts of a folder'): open_maps('shapes', train='train')
    with pytest.raises(ValueError, match="is for data = 'shapes'"): open_maps(tmp_path, 'shapes')
    write_voc(tmp_path/'ade')
    with pytest.raises(ValueError, match='holds voc and ade20k; say which'): open_maps(tmp_path/'ade')
    assert open_maps(tmp_path/'ade', 'ade20k').format == 'ade20k'


def test_augmented_masks(tmp_path):
    home = write_voc(write_voc(tmp_path, ids=[0, 1]), 'val', [2])
    for part, ids in dict(trainaug=[0, 1, 3, 4], val=[2]).items(): write_voc(home, part, ids, 'SegmentationClassAug')
    with pytest.raises(FileNotFoundError, match='SegmentationClass/trainaug_0'): read_voc_maps(home, 'trainaug')
    s = open_maps(home, augmented=True)
    assert len(s.train) + len(s.valid) == 4
    assert [ds.maps[0].parent.name for ds in (s.train, s.test)] == ['SegmentationClassAug', 'SegmentationClass']
    (home/'SegmentationClass').rename(home/'gone')
    assert open_maps(home, augmented=True).test.maps[0].parent.name == 'SegmentationClassAug'
    with pytest.raises(FileNotFoundError, match='is read with augmented=True'): open_maps(home)


def test_held_out():
    rest, held = hold_out(some, 2, 4)
    assert len(rest) == 4 and {x.numpy().tobytes() for x in rest.files + held.files} == {x.numpy().tobytes() for x in some.files}
    assert held.pixels.sum() == 2*48*48


# figures

def test_what_is_drawn():
    x, m = some[0]
    ax = show_map(x, m, some.vocab, some.palette, 0, title='a', legend=True)
    drawn = ax.images[1].get_array()
    assert (drawn[..., 3][(m == 0).numpy()] == 0).all() and (drawn[..., 3][(m > 0).numpy()] >= .6).all()
    k = int(m.max())
    assert np.allclose(drawn[(m == k).numpy()][:, :3], some.palette[k]/255)
    texts = [t.get_text() for t in ax.get_legend().get_texts()]
    assert texts == [some.vocab[k] for k in m[m > 0].bincount().argsort(descending=True).tolist() if k and (m == k).any()]
    ax = show_map(None, m.masked_fill(m == 0, IGNORE), some.vocab, ax=plt.subplots()[1], legend=True, most=1)
    assert [t.get_text() for t in ax.get_legend().get_texts()][1:] == ['unlabelled']
    assert some.show(1, size=2).axes and show_map(x.float()/255, torch.full_like(m, IGNORE), some.vocab)
    for wrong, said in ((m[1:], 'a map of'), (m + 6, 'the map holds id')):
        with pytest.raises(ValueError, match=said): show_map(x, wrong, some.vocab)


def test_a_set_in_words():
    assert repr(some).startswith('shapes: 6 classes, 6 images, every pixel labelled\n  ground ')
    assert 'unlabelled' in repr(MapSet('one', 'ab', [some[0][0]], [torch.full((48, 48), 255)]))
    assert make_shapes(1, 48, 3)[0][0].equal(some.files[0])


@pytest.mark.parametrize('form,area', [('disc', math.pi), ('square', 4), ('triangle', 2), ('ring', .7*math.pi), ('star', 1.305)])
def test_a_form_fills_its_square_and_no_more(form, area):
    at = (torch.arange(1600) + .5)/400 - 2
    u, v = at.expand(1600, -1), at[:, None].expand(-1, 1600)
    m = inside(form, u, v)
    assert abs(m.float().mean().item()*16 - area) < .02
    assert all(abs(abs(edge) - 1) < .01 for x in (u[m], v[m]) for edge in (x.min().item(), x.max().item()))
