"Nothing that is read can run: pickles, archives, names, tags and run folders of a stranger are refused, and leave no trace."
import ast, gzip, http.client, io, json, os, pickle, re, shutil, tarfile, warnings, zipfile
from pathlib import Path

import h5py, numpy as np, pytest, torch, torchvision, yaml
from PIL import Image
from safetensors.torch import load_file, save_file

from relvit import shards
from relvit.boxes import open_boxes
from relvit.checkpoint import encoder_config, load_encoder, read_meta, save
from relvit.cli import main
from relvit.datasets import digits, open_data
from relvit.images import Unreadable, table_files
from relvit.label_maps import open_maps
from relvit.plots import Frames, plt
from relvit.runs import Run
from relvit.shards import Shards
from relvit.tokens import TokenEncoder
from relvit.training import Pretrain
from relvit.video import Video, read_davis, track_objects

from stopped import StopAt, quietly

root = Path(__file__).resolve().parents[1]
tiny = dict(encoder='vit_tiny_patch16_224', encoder_args=('embed_dim=24', 'depth=1', 'num_heads=2'), bs=32, epochs=2, steps=3, device='cpu', every=1e9)


# what a pickle would do

class Evil:
    "Makes a folder as soon as it is unpickled"
    def __init__(self, mark): self.mark = str(mark)
    def __reduce__(self): return os.mkdir, (self.mark,)


@pytest.fixture
def mark(tmp_path):
    "What an executed pickle would make; it must not be there in the end"
    there = tmp_path/'executed'
    yield there
    assert not there.exists()


def test_the_pickle_of_these_tests_does_run(tmp_path):
    "Else they would show nothing"
    pickle.loads(pickle.dumps(Evil(tmp_path/'a')))
    torch.save(Evil(tmp_path/'b'), tmp_path/'b.pt')
    with pytest.raises(Exception): torch.load(tmp_path/'b.pt', weights_only=True)
    assert (tmp_path/'a').is_dir() and not (tmp_path/'b').exists()
    torch.load(tmp_path/'b.pt', weights_only=False)
    assert (tmp_path/'b').is_dir()


def said(args, capsys, code=2):
    "What the command `relvit` says to these arguments, on one line"
    with warnings.catch_warnings():
        was = warnings.showwarning
        try: assert main([*map(str, args)]) == code
        finally: warnings.showwarning = was
    err = capsys.readouterr().err
    assert 'Traceback' not in err
    return err


def plain(f, evil): f.write_bytes(pickle.dumps(evil))
def zipped(f, evil): torch.save(dict(model=evil), f)
def legacy(f, evil): torch.save(dict(model=evil), f, _use_new_zipfile_serialization=False)
def objects(f, evil):
    with open(f, 'wb') as o: np.save(o, np.array([evil], dtype=object), allow_pickle=True)


WRITERS = dict(plain=plain, zipped=zipped, legacy=legacy, objects=objects)


# as a checkpoint

@pytest.mark.parametrize('how', WRITERS)
@pytest.mark.parametrize('name', ['a.pt', 'a.pth', 'a.safetensors'])
def test_as_weights_to_start_from(how, name, mark, tmp_path, capsys):
    WRITERS[how](tmp_path/name, Evil(mark))
    for command in ('pretrain', 'finetune'):
        assert 'is not a safetensors file' in said([command, '--init', tmp_path/name, '--out', tmp_path/'runs', '--device', 'cpu'], capsys)
    with pytest.raises(ValueError, match='pickled checkpoints are not read'): load_encoder(tmp_path/name)
    assert not (tmp_path/'runs').exists()


@pytest.fixture(scope='module')
def begun(tmp_path_factory):
    "A run that was stopped in its first epoch"
    return quietly(Pretrain(**tiny, out=str(tmp_path_factory.mktemp('runs')), name='run'), cbs=[StopAt(0, 1)]).path


@pytest.fixture
def run(begun, tmp_path): return shutil.copytree(begun, tmp_path/'run')


def change(run, **config):
    f = run/'config.json'
    f.write_text(json.dumps(json.loads(f.read_text()) | config))


def forge(path, **meta):
    "Other words in a file of weights"
    old, w = read_meta(path), load_file(path)
    save_file(w, path, {'format': 'pt', 'relvit': json.dumps(old | meta)})


@pytest.mark.parametrize('how', WRITERS)
def test_as_the_state_of_a_run(how, mark, run, tmp_path, capsys):
    WRITERS[how](run/'last.safetensors', Evil(mark))
    for args in (['pretrain', '--resume', run], ['evaluate', run], ['export', run, tmp_path/'w.safetensors'], ['pretrain', '--init', run, '--out', tmp_path/'runs']):
        assert 'is not a safetensors file' in said(args, capsys), args


@pytest.mark.parametrize('name', ['config.json', 'data.json', 'recipe.json'])
def test_as_the_record_of_a_run(name, mark, run, capsys):
    plain(run/name, Evil(mark))
    assert f'{name} is not JSON' in said(['pretrain', '--resume', run], capsys)


def test_as_configuration(mark, tmp_path, capsys):
    plain(tmp_path/'a.yaml', Evil(mark))
    (tmp_path/'b.yaml').write_text(f'epochs: !!python/object/apply:os.mkdir ["{mark}"]')
    (tmp_path/'c.yaml').write_text(f'!!python/object/new:os.mkdir ["{mark}"]')
    for name in 'abc': assert 'is not YAML' in said(['pretrain', '--config', tmp_path/f'{name}.yaml'], capsys)
    with pytest.raises((ValueError, yaml.YAMLError)): Pretrain(encoder_args=(f'depth=!!python/object/apply:os.mkdir ["{mark}"]',))


def test_a_configuration_does_not_unfold(tmp_path):
    "Nine lines that mean a billion words"
    bomb = 'a: &a [x,x,x,x,x,x,x,x,x]\n' + ''.join(f'{k}: &{k} [{",".join([f"*{j}"]*9)}]\n' for j, k in zip('abcdefgh', 'bcdefghi')) + 'epochs: *i\n'
    (tmp_path/'a.yaml').write_text(bomb)
    with pytest.raises(ValueError, match='is not YAML: an alias'): Pretrain.read(tmp_path/'a.yaml')
    with pytest.raises(ValueError, match='encoder_args are written like'): Pretrain(encoder_args=('depth=[&a [x,x], *a]',))


# as data

def files_of_cifar(there, kind, what):
    there = there/kind.base_folder
    there.mkdir(parents=True)
    for name in [n for n, _ in kind.train_list + kind.test_list] + [kind.meta['filename']]: (there/name).write_bytes(what)
    return there


@pytest.mark.parametrize('name,kind', [('cifar10', torchvision.datasets.CIFAR10), ('cifar100', torchvision.datasets.CIFAR100)])
def test_as_batches_of_cifar(name, kind, mark, tmp_path):
    files_of_cifar(tmp_path, kind, pickle.dumps(Evil(mark)))
    with pytest.raises(FileNotFoundError, match='its files are not the official ones'): open_data(name, tmp_path)


def test_as_one_file_of_cifar(mark, tmp_path, monkeypatch):
    "All others are what their md5 sums say: the names of the classes, then one batch"
    import hashlib
    kind, good = torchvision.datasets.CIFAR10, pickle.dumps(dict(data=np.zeros((2, 3072), np.uint8), labels=[0, 1], label_names=list('ab')))
    md5, there = hashlib.md5(good).hexdigest(), files_of_cifar(tmp_path, kind, good)
    for part in ('train_list', 'test_list'): monkeypatch.setattr(kind, part, [[n, md5] for n, _ in getattr(kind, part)])
    monkeypatch.setattr(kind, 'meta', kind.meta | dict(md5=md5))
    assert len(open_data('cifar10', tmp_path).test) == 2
    for name in ('batches.meta', 'test_batch', 'data_batch_5'):
        plain(there/name, Evil(mark))
        with pytest.raises(FileNotFoundError, match='its files are not the official ones'): open_data('cifar10', tmp_path)
        (there/name).write_bytes(good)


@pytest.mark.parametrize('how', ['plain', 'objects'])
def test_as_matlab_files(how, mark, tmp_path):
    for part in ('train', 'test'): WRITERS[how](tmp_path/f'{part}_32x32.mat', Evil(mark))
    with pytest.raises(ValueError, match='train_32x32.mat is no MATLAB file with X and y'): open_data('svhn', tmp_path)
    (tmp_path/'flowers-102').mkdir()
    for f in ('imagelabels', 'setid'): WRITERS[how](tmp_path/f'flowers-102/{f}.mat', Evil(mark))
    with pytest.raises(ValueError, match='imagelabels.mat is no MATLAB file with labels'): open_data('flowers102', tmp_path)


@pytest.mark.parametrize('name', ['a.npy', 'a.npz', 'a.pkl', 'a.tar', 'a.h5'])
def test_as_a_file_of_data(name, mark, tmp_path, capsys):
    (np.savez(tmp_path/name, a=np.array([Evil(mark)], dtype=object)) if name == 'a.npz' else objects(tmp_path/name, Evil(mark)))
    err = said(['pretrain', '--data', tmp_path/name, '--out', tmp_path/'runs', '--steps', 2], capsys)
    assert re.search('there is no folder|is a file, where a folder|is no whole tar archive|cannot be cut into one part', err), err


def test_as_images_of_a_folder(mark, tmp_path):
    for i in range(4): plain(tmp_path/f'{i}.png', Evil(mark))
    objects(tmp_path/'5.npy', Evil(mark))
    with pytest.raises(Unreadable, match='none of the 4 files'): open_data(tmp_path)


def test_as_a_data_set_of_the_hub(mark, tmp_path):
    for f in ('dataset_info.json', 'state.json', 'data.arrow', 'dataset.pkl'): plain(tmp_path/f, Evil(mark))
    with pytest.raises((ValueError, OSError)): open_data(f'hf:{tmp_path}')


def test_as_annotations(mark, tmp_path):
    (tmp_path/'coco/annotations').mkdir(parents=True)
    plain(tmp_path/'coco/annotations/instances_train.json', Evil(mark))
    with pytest.raises(ValueError, match='is no file of COCO instances|is no JSON'): open_boxes(tmp_path/'coco')
    (tmp_path/'svhn/train').mkdir(parents=True)
    plain(tmp_path/'svhn/train/digitStruct.mat', Evil(mark))
    with pytest.raises(ValueError, match='is no HDF5 file'): open_boxes(tmp_path/'svhn')
    (tmp_path/'own').mkdir()
    plain(tmp_path/'own.csv', Evil(mark))
    with pytest.raises(ValueError, match='is no CSV|is not UTF-8'): open_data(tmp_path/'own', labels=tmp_path/'own.csv')


# shards

def png(i=0):
    buffer = io.BytesIO()
    Image.fromarray(digits()[0].x[i, 0].numpy()).save(buffer, 'png')
    return buffer.getvalue()


def write_tar(path, files, mode='w'):
    "Of (name, bytes), or (name, a kind of tarfile, what it links to)"
    with tarfile.open(path, mode) as tar:
        for name, *what in files:
            info = tarfile.TarInfo(name)
            if isinstance(what[0], bytes) and len(what) == 1: info.size = len(what[0])
            else: info.type, info.linkname = what
            tar.addfile(info, io.BytesIO(what[0]) if len(what) == 1 else None)
    return path


def test_as_a_part_of_a_sample(mark, tmp_path):
    evil = pickle.dumps(Evil(mark))
    f = write_tar(tmp_path/'a.tar', [(f'{i}.{kind}', png(i) if kind == 'png' else evil) for i in range(3) for kind in ('png', 'pkl', 'pth', 'pyd', 'pickle', 'npy', 'cls')])
    with pytest.raises(UnicodeDecodeError): next(Shards([str(f)], 16, channels=1).stream(0, shuffle=False)) # a label is a text
    f = write_tar(tmp_path/'a.tar', [(f'{i}.{kind}', png(i) if kind == 'png' else evil) for i in range(3) for kind in ('png', 'pkl', 'pth', 'pyd', 'npy')])
    assert len([*Shards([str(f)], 16, channels=1).stream(0, shuffle=False)]) == 3
    f = write_tar(tmp_path/'b.tar', [(f'{i}.png', evil) for i in range(30)])
    with warnings.catch_warnings(), pytest.raises(Unreadable, match='images are unreadable'):
        warnings.simplefilter('ignore')
        [*Shards([str(f)], 16, most=1).stream(0, shuffle=False)]


def test_a_shard_is_not_unpacked(mark, tmp_path, monkeypatch):
    "Names that lead out, links and devices: images are read where they lie, the rest is passed by, nothing is written"
    (tmp_path/'in').mkdir()
    monkeypatch.chdir(tmp_path/'in')
    (tmp_path/'secret.png').write_bytes(png(5))
    hostile = [('../executed/0.png', png(0)), (f'{mark}/1.png', png(1)), ('2.png', tarfile.SYMTYPE, '../secret.png'), ('3.png', tarfile.LNKTYPE, '../secret.png'),
               ('4.png', tarfile.CHRTYPE, ''), ('5.png', tarfile.FIFOTYPE, ''), ('executed/', tarfile.DIRTYPE, ''), ('6.png', png(6))]
    write_tar('a.tar', hostile)
    x = torch.stack([x for x, _ in Shards(['a.tar'], 16, channels=1).stream(0, shuffle=False)])
    assert x.equal(digits()[0].x[[0, 1, 6]]) and [f.name for f in Path().iterdir()] == ['a.tar'] and sorted(f.name for f in tmp_path.iterdir()) == ['in', 'secret.png']


def test_only_what_is_used_of_a_shard_is_read(tmp_path, monkeypatch):
    "A film beside the images may be of any size, and what webdataset notes is no sample"
    monkeypatch.setattr(shards, 'LARGEST', 10**4)
    files = [('__info__/0.json', b'{}'), ('__index__', b'x'), ('__meta__/0.png', b'x')]
    files += [(f'{i}.{kind}', data) for i in range(3) for kind, data in (('mp4', bytes(10**5)), ('png', png(i)), ('cls', b'4'))]
    f = write_tar(tmp_path/'a.tar', [*files, ('3.json', b'{}')])
    assert all(not m['data'] for m in shards.members([str(f)]) if m and m['fname'].endswith(('mp4', 'json')))
    with pytest.warns(UserWarning, match='^3 of .*a.tar is unreadable') as told:
        got = [(x, y) for x, y in Shards([str(f)], 16, channels=1).stream(0, shuffle=False)]
    assert torch.stack([x for x, _ in got]).equal(digits()[0].x[:3]) and [y for _, y in got] == [4]*3 and len(told) == 1


class BreaksOff(io.BytesIO):
    "What comes over HTTP, and no longer comes after some of it"
    def read(self, n=-1):
        if self.tell() + n > 2048: raise http.client.IncompleteRead(b'', 100)
        return super().read(n)


def test_a_connection_that_breaks_off(tmp_path, monkeypatch):
    f = write_tar(tmp_path/'a.tar', [(f'{i}.png', png(i)) for i in range(30)])
    monkeypatch.setattr(shards, 'urlopen', lambda *args, **kwargs: BreaksOff(f.read_bytes()))
    with pytest.raises(OSError, match='http://there/a.tar cannot be fetched: IncompleteRead'): [*Shards(['http://there/a.tar'], 16, channels=1).stream(0, shuffle=False)]


def test_bombs_are_bounded(tmp_path, monkeypatch):
    "A few KB that unpack to more than a file may have; and what is no whole archive"
    monkeypatch.setattr(shards, 'LARGEST', 10**5)
    f = write_tar(tmp_path/'a.tar', [('0.png', png()), ('1.png', bytes(10**6))], 'w:gz')
    assert f.stat().st_size < 10**4
    with pytest.raises(Unreadable, match=r'1.png of .*a.tar has 1,000,000 bytes, more than 100,000'): [*Shards([str(f)], 16).stream(0, shuffle=False)]
    (tmp_path/'b.tar').write_bytes(f.read_bytes()[:120])
    (tmp_path/'c.tar').write_bytes(gzip.compress(b'none at all'*1000))
    for name in 'bc':
        with pytest.raises(Unreadable, match='is no whole tar archive'): [*Shards([str(tmp_path/f'{name}.tar')], 16).stream(0, shuffle=False)]


@pytest.mark.parametrize('name', ['pipe:mkdir {mark}; cat a.tar', "http://x.invalid/';mkdir {mark};'.tar", 'gs://a;mkdir {mark}/a.tar', 'ais://a/b.tar', '-', 'a.tar::pipe:mkdir {mark}'])
def test_no_command_is_run_for_a_shard(name, mark, tmp_path, monkeypatch):
    "webdataset would hand these to a shell"
    monkeypatch.chdir(tmp_path)
    with pytest.raises((ValueError, OSError)): next(Shards(name.format(mark=mark), 16).stream(0))


# archives that are fetched

def evil_archives(tmp_path):
    "A tar and a zip with names that lead out"
    write_tar(tmp_path/'evil.tgz', [('../executed', tarfile.DIRTYPE, ''), (str(tmp_path/'executed'), tarfile.DIRTYPE, ''), ('x', b'x')], 'w:gz')
    with zipfile.ZipFile(tmp_path/'evil.zip', 'w') as z: z.writestr('../executed/x', 'x'); z.writestr('tiny-imagenet-200/x', 'x')


@pytest.mark.parametrize('name', ['cifar10', 'cifar100', 'tiny_imagenet', 'imagenette', 'flowers102', 'svhn'])
def test_what_is_fetched_is_checked_before_it_is_unpacked(name, mark, tmp_path, monkeypatch, capsys):
    "Whoever sits between sends another archive under the name: nothing of it is unpacked"
    evil_archives(tmp_path)
    def fetch(url, filename, *args, **kwargs): shutil.copy(tmp_path/('evil.zip' if str(url).endswith('.zip') else 'evil.tgz'), filename)
    monkeypatch.setattr(torchvision.datasets.utils, '_urlretrieve', fetch)
    monkeypatch.setattr(torchvision.datasets.utils, '_get_redirect_url', lambda url, **kwargs: url)
    there = tmp_path/'data'
    there.mkdir()
    with pytest.raises(OSError): open_data(name, there, download=True)
    assert all(f.is_dir() or f.suffix in ('.gz', '.tgz', '.zip', '.mat') for f in there.rglob('*')), [*there.rglob('*')]


def test_archives_of_imagenet_that_are_not_the_official_ones(mark, tmp_path):
    evil_archives(tmp_path)
    there = tmp_path/'data'
    there.mkdir()
    for f in ('ILSVRC2012_devkit_t12.tar.gz', 'ILSVRC2012_img_train.tar', 'ILSVRC2012_img_val.tar'): shutil.copy(tmp_path/'evil.tgz', there/f)
    with pytest.raises(ValueError, match='does not hold the official archives of ImageNet'): open_data('imagenet', there)
    torch.save(Evil(mark), there/'meta.bin')
    with pytest.raises(ValueError, match='does not hold the official archives of ImageNet'): open_data('imagenet', there)
    assert not any(f.is_dir() for f in there.iterdir())


# names that lead elsewhere

@pytest.fixture
def secret(tmp_path):
    "An image that lies beside the data, not in it"
    Image.fromarray(np.zeros((40, 40, 3), np.uint8)).save(tmp_path/'secret.png')
    return tmp_path/'secret.png'


@pytest.mark.parametrize('name', ['../../secret.png', 'a/../../../secret.png', '{absolute}'])
def test_names_of_coco(name, secret, tmp_path):
    (tmp_path/'coco/annotations').mkdir(parents=True)
    name = name.format(absolute=secret)
    note = dict(images=[dict(id=1, file_name=name, width=40, height=40)], categories=[dict(id=1, name='a')], annotations=[])
    (tmp_path/'coco/annotations/instances_train.json').write_text(json.dumps(note))
    with pytest.raises(ValueError, match=rf'instances_train.json names {re.escape(name)}, which lies outside of'): open_boxes(tmp_path/'coco')


@pytest.mark.parametrize('names,folder', [('{there}/{}.png', 'pictures'), ('../pictures/{}.png', 'coco/pictures'), ('{}.png', 'pictures')])
def test_where_images_of_coco_may_lie_is_for_the_user_to_say(names, folder, tmp_path, monkeypatch, capsys):
    "A file of one's own that names images elsewhere: what is refused says how to allow it, and then it is read"
    monkeypatch.chdir(tmp_path)
    Path('coco/annotations').mkdir(parents=True)
    there = Path(folder)
    there.mkdir(parents=True)
    for i in range(4): Image.new('RGB', (32, 32)).save(there/f'{i}.png')
    note = dict(images=[dict(id=i, file_name=names.format(i, there=there.resolve()), width=32, height=32) for i in range(4)], categories=[dict(id=1, name='a')],
                annotations=[dict(id=i, image_id=i, category_id=1, bbox=[4, 4, 8, 8]) for i in range(4)])
    Path('coco/annotations/instances_train2017.json').write_text(json.dumps(note))
    line = ['detect', '--data', 'coco', '--encoder', 'vit_tiny_patch16_224', '--encoder-args', 'embed_dim=24', 'depth=1', 'num_heads=2', '--img-size', '32', '--p', '8',
            '--min-size', '32', '--device', 'cpu', '--width', '8', '--steps', '1', '--epochs', '1', '--bs', '2', '--name', 'x']
    if names != '{}.png':
        err = said(line, capsys)
        assert re.search(r'which lies outside of .*coco.train2017; say which folder holds the images: .*--data-args images=FOLDER', err), err
    s = open_boxes('coco', images=there)
    assert s.train.name == 'train2017' and len(s.train) + len(s.valid) == 4 and s.in_use['images'] == str(there)
    assert said([*line, '--data-args', f'images={there}'], capsys, 0) is not None
    with pytest.raises(ValueError, match='which lies outside of coco.annotations'):
        (tmp_path/'secret.png').write_bytes(b'x')
        note['images'][0]['file_name'] = '../../secret.png'
        Path('coco/annotations/instances_train2017.json').write_text(json.dumps(note))
        open_boxes('coco', images='coco/annotations')


def test_names_of_voc(secret, tmp_path):
    for f in ('ImageSets/Main', 'Annotations', 'JPEGImages'): (tmp_path/'VOC2007'/f).mkdir(parents=True)
    (tmp_path/'secret.xml').write_text('<annotation/>')
    for part in ('train', 'val'): (tmp_path/f'VOC2007/ImageSets/Main/{part}.txt').write_text('../../secret\n')
    with pytest.raises(ValueError, match='train.txt names Annotations/../../secret.xml, which lies outside of'): open_boxes(tmp_path/'VOC2007', format='voc')
    (tmp_path/'VOC2007/ImageSets/Segmentation').mkdir()
    (tmp_path/'VOC2007/SegmentationClass').mkdir()
    for part in ('train', 'val'): (tmp_path/f'VOC2007/ImageSets/Segmentation/{part}.txt').write_text('../../secret\n')
    with pytest.raises((ValueError, FileNotFoundError), match='VOC2007'): open_maps(tmp_path/'VOC2007', 'voc')


def test_names_of_house_numbers(secret, tmp_path):
    (tmp_path/'full/train').mkdir(parents=True)
    with h5py.File(tmp_path/'full/train/digitStruct.mat', 'w') as f:
        f['#refs#/n'] = np.array([[ord(c)] for c in '../../secret.png'], np.uint16)
        for k in ('left', 'top', 'width', 'height', 'label'): f[f'#refs#/b/{k}'] = np.array([[1.]])
        for k, at in dict(name='n', bbox='b').items(): f[f'digitStruct/{k}'] = np.array([[f[f'#refs#/{at}'].ref]], dtype=h5py.ref_dtype)
    with pytest.raises(ValueError, match='digitStruct.mat names ../../secret.png, which lies outside of'): open_boxes(tmp_path/'full', format='svhn')


def test_names_of_a_table(secret, tmp_path):
    "A name is one below the folder; an absolute path in a table of one's own means what it says"
    (tmp_path/'own').mkdir()
    (tmp_path/'a.csv').write_text('file,label\n../secret.png,a\n')
    with pytest.raises(ValueError, match=r'a.csv names ../secret.png, which lies outside of'): table_files(tmp_path/'a.csv', 8, tmp_path/'own')
    (tmp_path/'b.csv').write_text(f'file,label\n{secret},a\n')
    assert table_files(tmp_path/'b.csv', 8, tmp_path/'own').files == [secret]


def test_names_of_videos(secret, tmp_path):
    "Neither read nor written elsewhere"
    for f in ('ImageSets/2017', 'JPEGImages/480p', 'Annotations/480p'): (tmp_path/'DAVIS'/f).mkdir(parents=True)
    for line in ('..', '/480p/../x.jpg'):
        (tmp_path/'DAVIS/ImageSets/2017/val.txt').write_text(line)
        with pytest.raises(ValueError, match='which lies outside of'): read_davis(tmp_path/'DAVIS')
    mask = torch.zeros(16, 16, dtype=torch.uint8)
    mask[4:8, 4:8] = 1
    for name in ('..', '../up', '/up', 'a/b'):
        with pytest.raises(ValueError, match='is no name for a folder of masks'):
            track_objects('still', Video(name, torch.zeros(2, 3, 16, 16, dtype=torch.uint8), mask), tmp_path/'out', measure=False)
    assert not (tmp_path/'up').exists()


def test_an_annotation_brings_no_entities(tmp_path):
    for f in ('ImageSets/Main', 'Annotations', 'JPEGImages'): (tmp_path/'VOC2007'/f).mkdir(parents=True)
    for part in ('train', 'val'): (tmp_path/f'VOC2007/ImageSets/Main/{part}.txt').write_text('0\n')
    (tmp_path/'VOC2007/Annotations/0.xml').write_text('<!DOCTYPE a [<!ENTITY x SYSTEM "file:///etc/passwd">]><annotation>&x;</annotation>')
    with pytest.raises(ValueError, match='declares entities'): open_boxes(tmp_path/'VOC2007', format='voc')


# a run folder of a stranger

@pytest.mark.parametrize('data', ['pipe:mkdir {mark}; cat a.tar', 'pipe:mkdir {mark};.tar'])
def test_the_data_of_a_stranger_is_no_command(data, mark, run, capsys):
    change(run, data=data.format(mark=mark))
    for args in (['pretrain', '--resume', run], ['evaluate', run], ['finetune', '--init', run, '--out', run.parent/'runs', '--steps', 2]): assert said(args, capsys)


@pytest.mark.parametrize('name', ['../../up', '..', '/up', 'a/b'])
def test_the_name_of_a_stranger(name, run, capsys):
    change(run, name=name)
    assert 'name must be a plain name' in said(['pretrain', '--resume', run], capsys)


def test_a_run_writes_into_its_folder_alone(run, tmp_path, capsys):
    "Whatever it says of where it lay, it goes on where it lies; a data set of a stranger is not fetched"
    change(run, out=str(tmp_path/'elsewhere'))
    before = {f for f in tmp_path.rglob('*') if run not in f.parents}
    assert quietly(resume=run).status == 'finished'
    assert {f for f in tmp_path.rglob('*') if run not in f.parents} == before
    change(run, data='cifar10', root=str(tmp_path/'elsewhere'), download=True)
    (run/'summary.json').unlink()
    assert 'does not hold CIFAR10' in said(['pretrain', '--resume', run], capsys)
    assert not (tmp_path/'elsewhere').exists()


@pytest.mark.parametrize('name', ['log.txt', 'metrics.jsonl', 'figures', 'last.safetensors', 'tensorboard'])
def test_links_of_a_stranger(name, run, tmp_path, capsys):
    "A log that is a link to another file would be written to its end"
    other = tmp_path/'other'
    shutil.rmtree(run/name, ignore_errors=True)
    (run/name).unlink(missing_ok=True)
    (other.mkdir() if name in ('figures', 'tensorboard') else other.write_text('mine'))
    (run/name).symlink_to(other)
    assert f'{name} is a link to elsewhere' in said(['pretrain', '--resume', run], capsys)
    assert [*other.iterdir()] == [] if other.is_dir() else other.read_text() == 'mine'


@pytest.mark.parametrize('how', ['plain', 'zipped'])
def test_weights_that_name_other_weights(how, mark, run, tmp_path, capsys):
    "An encoder's arguments go to timm, which reads a checkpoint that they name"
    WRITERS[how](tmp_path/'evil.pth', Evil(mark))
    for key, v in dict(checkpoint_path=str(tmp_path/'evil.pth'), pretrained_cfg=dict(file=str(tmp_path/'evil.pth')), pretrained_cfg_overlay=dict(file=str(tmp_path/'evil.pth'))).items():
        save(TokenEncoder('vit_tiny_patch16_224', img_size=16, p=4, embed_dim=24, depth=1, num_heads=2), tmp_path/'a.safetensors')
        forge(tmp_path/'a.safetensors', encoder=read_meta(tmp_path/'a.safetensors')['encoder'] | {key: v, 'pretrained': True})
        with pytest.raises(ValueError, match=f'{key} would have timm read weights'): load_encoder(tmp_path/'a.safetensors')
        assert f'{key} would have timm' in said(['pretrain', '--init', tmp_path/'a.safetensors', '--out', tmp_path/'runs', '--steps', 2], capsys)
    (run/'last.safetensors').unlink()
    change(run, encoder_args=[f'checkpoint_path={tmp_path/"evil.pth"}'])
    assert 'checkpoint_path would have timm' in said(['pretrain', '--resume', run], capsys)


def test_an_encoder_that_timm_would_fetch(mark, run, tmp_path, capsys):
    "timm's `local-dir:` reads whatever lies there, pickles too in some versions; a file or a run that was handed on fetches nothing"
    (tmp_path/'evil').mkdir()
    (tmp_path/'evil/config.json').write_text(json.dumps(dict(architecture='vit_tiny_patch16_224', pretrained_cfg=dict(tag='x'))))
    WRITERS['zipped'](tmp_path/'evil/pytorch_model.bin', Evil(mark))
    name = f'local-dir:{tmp_path/"evil"}'
    assert 'timm may unpickle' in said(['pretrain', '--encoder', name, '--encoder-args', 'pretrained=true', '--out', tmp_path/'runs', '--steps', 2], capsys)
    cfg = dict(mean=[.5]*3, std=[.5]*3, input_size=[3, 16, 16])
    forged = dict(model_name=name, pretrained=True, pretrained_cfg_overlay=cfg)
    save(TokenEncoder('vit_tiny_patch16_224', img_size=16, p=4, embed_dim=24, depth=1, num_heads=2), tmp_path/'a.safetensors')
    forge(tmp_path/'a.safetensors', encoder={}, timm=forged)
    with pytest.raises(ValueError, match='timm may unpickle'): load_encoder(tmp_path/'a.safetensors')
    forge(tmp_path/'a.safetensors', encoder={}, timm=forged | dict(model_name='vit_tiny_patch16_224'))
    assert 'pretrained' not in encoder_config(tmp_path/'a.safetensors')
    (run/'last.safetensors').unlink()
    change(run, encoder='hf-hub:stranger/model', encoder_args=['pretrained=true'])
    assert 'has no state yet, and its encoder would come from hf-hub:stranger/model' in said(['pretrain', '--resume', run], capsys)


def test_a_name_of_an_encoder_is_no_path(tmp_path, capsys):
    "The folder of a run is called by mode, data and encoder: the last may come from a file"
    save(TokenEncoder('vit_tiny_patch16_224', img_size=16, p=4, embed_dim=24, depth=1, num_heads=2), tmp_path/'a.safetensors')
    forge(tmp_path/'a.safetensors', encoder=read_meta(tmp_path/'a.safetensors')['encoder'] | dict(name='../../../up'))
    assert "timm has no model '../../../up'" in said(['pretrain', '--init', tmp_path/'a.safetensors', '--out', tmp_path/'deep/runs', '--steps', 2], capsys)
    assert not (tmp_path/'deep').exists()


# what is shown

script = '<script>alert(1)</script>'


def test_labels_of_frames_are_no_html():
    figs = [plt.subplots(figsize=(1, 1))[0] for _ in range(2)]
    html = Frames(figs, [script, '"><img src=x onerror=alert(1)>'])._repr_html_()
    assert '<script' not in html and '<img src=x' not in html and '&lt;script&gt;' in html


def test_tables_of_runs_are_no_html(run):
    from relvit.runs import compare
    from relvit.widgets import RunExplorer
    (run.parent/'b').mkdir()
    shutil.copytree(run, other := run.parent/f'b/{script.replace("/", "")}')
    change(other, track=None, data=script, encoder_args=[script])
    for r in (run, other):
        (r/'metrics.jsonl').write_text(json.dumps(dict(epoch=0, train=dict(loss=1.), valid={'loss': 1., script: .5}, chance={script: .1}, seconds=1.)) + '\n')
    assert '<script' not in compare([Run(run), Run(other)])._repr_html_()
    shown = RunExplorer(run.parent)
    assert '<script' not in shown.table.value and '&lt;script' in shown.table.value
    shown.say(script)
    assert '<script' not in shown.note.value


def test_no_text_is_made_html_in_a_browser():
    "The parts that run in a browser set texts and attributes, never HTML"
    found = [p.name for p in (root/'relvit').glob('*.py') if re.search('innerHTML|outerHTML|insertAdjacentHTML|document.write|description_allow_html', p.read_text())]
    assert not found


# what no line of ours calls

FORBIDDEN = {'eval', 'exec', 'os.system', 'os.popen', 'pickle.load', 'pickle.loads', 'pickle.Unpickler', 'yaml.load', 'yaml.unsafe_load', 'yaml.full_load', 'yaml.load_all',
             'marshal.load', 'marshal.loads', 'joblib.load', 'dill.load', 'dill.loads', 'cloudpickle.load', 'cloudpickle.loads', 'shelve.open', 'pd.read_pickle', 'pandas.read_pickle',
             'load_learner', 'torch.hub.load', 'torch.jit.load', 'runpy.run_path', 'shutil.unpack_archive', 'tempfile.mktemp'}


def name_of(f): return ast.unparse(f) if isinstance(f, (ast.Name, ast.Attribute)) else ''


def forbidden(source):
    "Calls that run what they read, or that could, by name"
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call): continue
        name, last, args = name_of(node.func), getattr(node.func, 'attr', ''), {k.arg: ast.unparse(k.value) for k in node.keywords}
        if name in FORBIDDEN: yield name
        if args.get('shell', 'False') != 'False': yield 'shell=True'
        if args.get('trust_remote_code', 'False') != 'False': yield 'trust_remote_code'
        if name == 'torch.load' and args.get('weights_only') != 'True': yield 'torch.load'
        if last in ('load', 'loadtxt') and args.get('allow_pickle', 'False') != 'False': yield 'allow_pickle'
        if last in ('extractall', 'extract') and args.get('filter') != "'data'": yield last


# (file, call): why it may
ALLOWED = {('tests/test_safety.py', 'pickle.loads'): 'shows that the pickle of these tests does run',
           ('tests/test_safety.py', 'torch.load'): 'shows that the pickle of these tests does run',
           ('tests/test_label_maps.py', 'pickle.loads'): 'of what it has pickled itself: a data set must reach the workers'}


def test_nothing_that_is_read_is_run():
    sources = {str(p.relative_to(root)): p.read_text() for at in ('relvit', 'tools', 'tests', 'benchmarks') for p in (root/at).rglob('*.py')}
    sources |= {p: (root/p).read_text() for p in ('setup.py',)}
    for p in (root/'nbs').rglob('*.ipynb'):
        if '.ipynb_checkpoints' in str(p): continue
        cells = [''.join(c['source']) for c in json.loads(p.read_text())['cells'] if c['cell_type'] == 'code']
        sources[str(p.relative_to(root))] = '\n'.join(re.sub(r'^\s*[%!].*$', '', c, flags=re.M) for c in cells)
    found = {(f, call) for f, text in sources.items() for call in forbidden(text)}
    assert found == set(ALLOWED), found ^ set(ALLOWED)
    assert len(sources) > 150


def test_forbidden_calls_are_found():
    bad = ['eval("1")', 'exec(x)', 'import os\nos.system("x")', 'pickle.load(f)', 'yaml.load(f, Loader=yaml.Loader)', 'torch.load(f)', 'torch.load(f, weights_only=False)',
           'np.load(f, allow_pickle=True)', 'run("x", shell=True)', 'load_dataset("x", trust_remote_code=True)', 'tar.extractall(p)', 'load_learner(f)']
    for source in bad: assert len([*forbidden(source)]) == 1, source
    good = 'model.eval()\ntorch.load(f, weights_only=True)\nnp.load(f)\nyaml.safe_load(f)\nast.literal_eval(x)\ntar.extractall(p, filter="data")\nrun(["x"], shell=False)'
    assert not [*forbidden(good)]
