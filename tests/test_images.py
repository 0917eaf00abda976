"Images as they come, and the layouts in which data sets come."
import io, itertools, os, tarfile, warnings

import numpy as np, pytest, torch
from PIL import Image, ImageOps
from scipy.io import savemat

from relvit.data import make_dls
from relvit.datasets import IMAGENET100, open_data
from relvit.images import Unreadable, below, image_files, only_readable, read_image, stored_image
from relvit.shards import Shards


def picture(w=24, h=16):
    y, x = np.mgrid[:h, :w]
    return Image.fromarray(np.stack([x*255//w, y*255//h, (x + y)*255//(w + h)], -1).astype(np.uint8))


def saved(im, kind='png', **kwargs):
    f = io.BytesIO()
    im.save(f, kind, **kwargs)
    f.seek(0)
    return f


@pytest.mark.parametrize('orientation', range(1, 9))
def test_every_exif_orientation(orientation):
    exif = Image.Exif()
    exif[274] = orientation
    f = saved(picture(), 'png', exif=exif)
    want = ImageOps.exif_transpose(Image.open(f))
    assert read_image(f, 16).equal(read_image(saved(want), 16))


@pytest.mark.parametrize('mode', ['1', 'L', 'LA', 'P', 'PA', 'RGB', 'RGBA', 'CMYK', 'YCbCr', 'HSV', 'LAB', 'I', 'F', 'I;16'])
@pytest.mark.parametrize('channels', [1, 3])
def test_every_mode(mode, channels):
    im = picture()
    if mode == 'I;16': im = Image.fromarray(np.asarray(im.convert('L'), np.uint16)*257)
    elif mode == 'I': im = Image.fromarray(np.asarray(im.convert('L'), np.int32)*257)
    elif mode == 'F': im = Image.fromarray(np.asarray(im.convert('L'), np.float32)/255)
    elif mode == 'PA': im = im.convert('P').convert('PA')
    elif mode == 'LAB': im = Image.new('LAB', (9, 9), (255, 128, 128))
    else: im = im.convert(mode)
    x = read_image(im, 16, channels)
    assert x.shape == (channels, 16, 16) and x.dtype == torch.uint8
    if mode in ('L', 'I', 'F', 'I;16'): assert x.equal(read_image(picture().convert('L'), 16, channels))


def test_transparent_is_white_paper():
    im = Image.new('RGBA', (8, 8), (0, 0, 0, 0))
    assert (read_image(saved(im), 8) == 255).all()
    p = Image.new('P', (8, 8), 0)
    p.info['transparency'] = 0
    assert (read_image(p, 8) == 255).all() and (read_image(Image.new('P', (8, 8), 0), 8) == 0).all()


@pytest.mark.parametrize('size', [(1, 1), (1, 300), (300, 1), (3000, 2000)])
def test_any_size(size): assert read_image(saved(picture(*size).convert('RGB'), 'jpeg'), 32).shape == (3, 32, 32)


def test_animation_shows_its_first_frame():
    frames = [picture().convert('L'), ImageOps.invert(picture().convert('L'))]
    f = saved(frames[0], 'gif', save_all=True, append_images=frames[1:])
    assert read_image(f, 16, 1).float().sub(read_image(frames[0], 16, 1).float()).abs().max() <= 2


def test_bad_files(tmp_path, monkeypatch):
    whole = saved(picture(200, 200), 'jpeg').getvalue()
    for name, data in {'empty': b'', 'text': b'hello', 'cut': whole[:len(whole)//2], 'head': whole[:20]}.items():
        (tmp_path/f'{name}.jpg').write_bytes(data)
        with pytest.raises(Unreadable, match=f'{name}.jpg cannot be read as an image'): read_image(tmp_path/f'{name}.jpg', 16)
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 100)
    with pytest.raises(Unreadable, match='decompression bomb'): read_image(saved(picture(200, 200)), 16)


def test_bad_files_are_left_out_up_to_a_limit(tmp_path):
    for i in range(20): picture().rotate(i).save(tmp_path/f'{i}.png')
    for i in range(2): (tmp_path/f'bad{i}.png').write_bytes(b'')
    for most in (.04, 1):
        with pytest.raises(Unreadable, match='2 of 22 files'): only_readable(image_files(tmp_path, 16), most)
    for most in (.1, 2):
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter('always')
            s = open_data(tmp_path, img_size=14, p=2, most_unreadable=most)
        assert 'unreadable and left out' in str(said[-1].message)
        assert len(s.train) + len(s.valid) == 20 and len(s.skipped) == 2 and len(s.report()['skipped']) == 2


def wnids(root, names, n=2, part='train'):
    for k in names:
        for i in range(n):
            f = root/part/k/f'{k}_{i}.JPEG'
            f.parent.mkdir(parents=True, exist_ok=True)
            picture().save(f)


def test_imagenet_and_a_list_of_its_classes(tmp_path):
    names = [*IMAGENET100[:3], 'n99999999']
    for part in ('train', 'val'): wnids(tmp_path, names, part=part)
    s = open_data('imagenet', tmp_path, valid=.5)
    assert len(s.train.vocab) == 4 and len(s.test) == 8 and (s.p, s.img_size) == (32, 224)
    assert s.mean == [.485, .456, .406]
    (tmp_path/'list.txt').write_text('\n'.join(names[:2]))
    s = open_data('imagenet100', tmp_path, valid=.5, classes=tmp_path/'list.txt')
    assert s.train.vocab == names[:2] and sorted(s.test.y.tolist()) == [0, 0, 1, 1]
    with pytest.raises(ValueError, match='97 of 100 classes are not in'): open_data('imagenet100', tmp_path)


def test_kaggles_imagenet100(tmp_path):
    for i, k in enumerate(['n01', 'n02', 'n03']): wnids(tmp_path, [k], part=f'train.X{i + 1}')
    wnids(tmp_path, ['n01', 'n03'], part='val.X')
    s = open_data('imagenet100', tmp_path, valid=.5)
    assert s.train.vocab == ['n01', 'n02', 'n03'] and s.test.y.tolist() == [0, 0, 2, 2]


def test_imagenette(tmp_path):
    for part in ('train', 'val'): wnids(tmp_path/'imagenette2-160', ['n01', 'n02'], part=part)
    assert open_data('imagenette', tmp_path, valid=.5).test.y.tolist() == [0, 0, 1, 1]


def flowers(root):
    (root/'flowers-102/jpg').mkdir(parents=True)
    for i in range(1, 13): picture().rotate(i).save(root/f'flowers-102/jpg/image_{i:05d}.jpg')
    savemat(root/'flowers-102/imagelabels.mat', dict(labels=np.arange(1, 13)[None] % 102))
    savemat(root/'flowers-102/setid.mat', dict(trnid=[[1, 2, 3]], valid=[[4, 5]], tstid=[[6, 7, 8, 9, 10, 11, 12]]))


def test_flowers_are_reported_on_their_test_set(tmp_path):
    "The reference reports on `val`; that has to be asked for"
    flowers(tmp_path)
    s = open_data('flowers102', tmp_path)
    assert (s.train.y.tolist(), s.valid.y.tolist(), len(s.test)) == ([0, 1, 2], [3, 4], 7)
    r = open_data('flowers102', tmp_path, splits='reference')
    assert r.test is r.valid and r.test.y.tolist() == [3, 4] and 'too good by the choice' in repr(r)
    assert s.mean is None and open_data('flowers102', tmp_path, img_size=56).mean == [.5136, .4163, .3426]


@pytest.mark.parametrize('name, size, p, crop', [('digits', None, 4, 'shift'), ('digits', 28, 4, 'shift')])
def test_sizes(name, size, p, crop):
    s = open_data(name, img_size=size)
    assert (s.p, s.crop, s.flip) == (p, crop, False)
    x, y = make_dls(s, 8, device='cpu').one_batch()
    assert x.shape[-1] == (size or 16)


def test_a_table_of_labels_some_of_them_missing(tmp_path):
    for i in range(12): picture().save(tmp_path/f'{i}.png')
    (tmp_path/'t.csv').write_text('name,kind\n' + '\n'.join(f'{i}.png,{"ab"[i % 2] if i < 10 else ""}' for i in range(12)))
    s = open_data(tmp_path, img_size=14, p=2, labels=tmp_path/'t.csv', valid=.25)
    assert s.train.vocab == ['a', 'b'] and s.train.labelled + s.valid.labelled == 10
    assert (make_dls(s, labelled=True, device='cpu').train_ds.y >= 0).all()
    (tmp_path/'5.png').unlink()
    with pytest.raises(ValueError, match='1 of 12 files in column .name. of .* are not there'): open_data(tmp_path, img_size=14, p=2, labels=tmp_path/'t.csv')


def test_a_folder_that_nobody_may_open(tmp_path, monkeypatch):
    "It is named and left out; the data itself may not be left out"
    for f in 'a/0.png', 'b/1.png', 'lost+found/2.png':
        (tmp_path/f).parent.mkdir()
        picture().save(tmp_path/f)
    (tmp_path/'b/link').symlink_to(tmp_path/'lost+found')
    scandir, closed = os.scandir, [tmp_path/'lost+found', tmp_path/'b/link'] # for root, who tests in containers, nothing is closed
    def guarded(at):
        if str(at) in map(str, closed): raise PermissionError(13, 'Permission denied', str(at))
        return scandir(at)
    monkeypatch.setattr(os, 'scandir', guarded)
    with pytest.warns(UserWarning, match=r'the folder .*lost\+found is left out: Permission denied'): ds = image_files(tmp_path, 8)
    assert ([f.name for f in ds.files], ds.vocab) == (['0.png', '1.png'], ['a', 'b'])
    closed.append(tmp_path)
    with pytest.raises(PermissionError): image_files(tmp_path, 8)


@pytest.mark.skipif(os.name == 'nt' or not hasattr(os, 'geteuid') or os.geteuid() == 0, reason='nothing is closed to root')
def test_a_link_into_a_closed_folder(tmp_path):
    for f in 'own/0.png', 'closed/in/1.png':
        (tmp_path/f).parent.mkdir(parents=True)
        picture().save(tmp_path/f)
    (tmp_path/'own/link').symlink_to(tmp_path/'closed/in')
    (tmp_path/'closed').chmod(0)
    try: assert len(image_files(tmp_path/'own', 8)) == 1
    finally: (tmp_path/'closed').chmod(0o700)


@pytest.mark.skipif(os.name == 'nt', reason='paths as POSIX writes them')
def test_names_below_a_folder(monkeypatch):
    for root in '/tmp/data', '//tmp/data', '/tmp/data/', '/tmp/data/../data':
        for name in 'a.png', 'a/b..c.png', 'a/../b.png', '/tmp/data/a.png', '//tmp/data/a.png':
            assert os.path.abspath(below(root, name, 'x')).lstrip('/').startswith('tmp/data/')
        for name in '../a.png', 'a/../../a.png', '/tmp/a.png', '/tmp/database/a.png', '/', '..':
            with pytest.raises(ValueError, match=f'x names {name}, which lies outside of'): below(root, name, 'x')
    assert str(below('/tmp/data', 'link/../a.png', 'x')) == '/tmp/data/a.png' # not beside what the link means
    assert str(below('/', '/etc/a.png', 'x')) == '/etc/a.png'
    monkeypatch.setattr(os.path, 'abspath', lambda path: pytest.fail('a plain name is not looked at twice'))
    assert str(below('data', 'a/b.png', 'x')) == 'data/a/b.png'


def test_want_of_memory_is_no_broken_file(tmp_path, monkeypatch):
    "Or good files would be left out of a data set in silence"
    picture().save(tmp_path/'0.png')
    def full(*args, **kwargs): raise MemoryError
    monkeypatch.setattr(Image.Image, 'convert', full)
    monkeypatch.setattr(Image.Image, 'load', full)
    for read in (lambda: read_image(tmp_path/'0.png', 8), lambda: stored_image(tmp_path/'0.png'), lambda: only_readable(image_files(tmp_path, 8), 1)):
        with pytest.raises(MemoryError): read()


def test_what_decoders_of_avif_and_blp_raise(tmp_path, monkeypatch):
    "A RuntimeError, or one of its kinds"
    picture().convert('P').save(tmp_path/'0.blp')
    harmed = bytearray((tmp_path/'0.blp').read_bytes())
    harmed[8] = 64 # its encoding
    (tmp_path/'0.png').write_bytes(harmed)
    for read in (lambda f: read_image(f, 8), stored_image):
        with pytest.raises(Unreadable, match='0.png cannot be read as an image: Unknown BLP encoding'): read(tmp_path/'0.png')


def test_few_labels_of_one_class_or_none(tmp_path):
    for i in range(10): picture().save(tmp_path/f'{i}.png')
    with pytest.raises(ValueError, match='no image of .* has a label'): make_dls(open_data(tmp_path, img_size=16), labels=2)
    for i in range(10, 20):
        (tmp_path/'cat').mkdir(exist_ok=True)
        picture().save(tmp_path/f'cat/{i}.png')
    for args in (dict(labels=2), dict(labelled=True), dict(labels=2, labelled=True)):
        with pytest.raises(ValueError, match='has only one class, cat'): make_dls(open_data(tmp_path, img_size=16), **args)


def test_unlabelled_data_trains_no_classifier(tmp_path):
    for i in range(12): picture().save(tmp_path/f'{i}.png')
    s = open_data(tmp_path, img_size=14, p=2)
    assert len(make_dls(s, 4, device='cpu').train) == 2
    with pytest.raises(ValueError, match='no image of .* has a label'): make_dls(s, labelled=True)


def test_what_is_asked_for_in_vain(tmp_path):
    with pytest.raises(ValueError, match='valid is a share'): open_data('digits', valid=1.5)
    with pytest.raises(ValueError, match='there is no image in'): open_data(tmp_path)
    with pytest.raises(FileNotFoundError, match='does not hold train_32x32.mat; root is the folder that does'): open_data('svhn', tmp_path)
    with pytest.raises(ValueError, match='no patch cuts 17 pixels'): open_data('digits', img_size=17)
    with pytest.raises(FileNotFoundError): open_data(str(tmp_path/'x-{0..2}.tar'))

def test_workers_share_a_pass_over_shards(tmp_path):
    "Every image once between them, whatever the seed; and who starts at a later batch reads on from there"
    pytest.importorskip('webdataset')
    for i in range(4):
        with tarfile.open(tmp_path/f'{i}.tar', 'w') as tar:
            for j in range(6):
                Image.new('L', (8, 8), 10*(6*i + j)).save(tmp_path/'x.png')
                tar.add(tmp_path/'x.png', f'{i}{j}.png')
    shards = Shards([str(tmp_path/f'{i}.tar') for i in range(4)], 8, channels=1)
    first = lambda n, **kw: [(x, names) for x, _, names in itertools.islice(shards.batches(3, 5, **kw), n)]
    apart = [first(4, first=role, roles=2) for role in (0, 1)]
    assert len({name for part in apart for _, names in part for name in names}) == 24
    assert sorted(v.item() for part in apart for x, _ in part for v in x[:, 0, 0, 0]) == [10*i for i in range(24)]
    assert [names for _, names in first(2, first=5, roles=2)] == [names for _, names in first(4, first=1, roles=2)][2:]
    assert repr(shards) == 'shards: 4 shards, 0 classes'


def test_a_report_says_where_each_part_comes_from():
    digits, again, other = open_data('digits'), open_data('digits', seed=0), open_data('digits', seed=1)
    parts = digits.report()['parts']
    assert list(parts) == ['trained on', 'chosen on', 'reported on'] and all(p['said'] for p in parts.values())
    assert torch.equal(digits.valid.load().x, again.valid.load().x) and not torch.equal(digits.valid.load().x, other.valid.load().x)
    assert repr(digits.train) == 'digits: 1077 images 1 x 16 x 16, 1077 labelled, 10 classes'
