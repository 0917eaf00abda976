"""What people feed in by mistake, and what they are told: one registry for tests/test_bad_input.py, which runs each case, and for the page
that shows them. `python tests/bad_input.py results/bad_input.json` records what each of them says."""
import contextlib, hashlib, io, json, os, re, shlex, shutil, signal, struct, sys, tempfile, traceback, warnings
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

os.environ.setdefault('OMP_NUM_THREADS', '1') # torch's threads spin; before torch is imported
os.environ.setdefault('MPLBACKEND', 'Agg')

import datasets, huggingface_hub, numpy as np, torch
from PIL import Image
from safetensors.torch import load_file, save_file

from relvit.boxes import open_boxes
from relvit.checkpoint import read_meta, save
from relvit.cli import main
from relvit.datasets import open_data
from relvit.images import read_image
from relvit.label_maps import voc_colours
from relvit.patches import from_patches, mega_patches, permute, to_patches
from relvit.runs import provenance
from relvit.tokens import TokenEncoder
from relvit.video import write_mask

TINY = '--encoder vit_tiny_patch16_224 --encoder-args embed_dim=24 depth=1 num_heads=2 --img-size 16 --p 4 --device cpu'
GROUPS = 'images', 'grids', 'data', 'boxes', 'label maps', 'video', 'configuration', 'checkpoints'
CASES = []


@dataclass
class Case:
    group:str
    what:str # the input, in words
    said:str # pattern of what is said
    code:int|str # exit code of the command, or the exception's name; 0: it is no error
    make:callable # makes the input in the working folder; gives a command line, or a call and its words
    writes:bool = False # an input that is accepted may write what was asked for

    @property
    def id(self): return re.sub(r'\W+', '-', f'{self.group} {self.what}').strip('-')


def bad(group, what, said, code=2, writes=False):
    def add(make):
        CASES.append(Case(group, what, said, code, make, writes))
        return make
    return add


def lines(group, table):
    "Cases that are a command line and nothing else: (what, line, said)"
    for what, line, said in table: bad(group, what, said)(lambda line=line: line)


# ------------------------------------------------------------------------------------------------------ what lies in every case's folder

def picture(path, size=(20, 20), mode='RGB', **kwargs):
    "A disc, orange on white"
    y, x = np.mgrid[:size[1], :size[0]]
    disc = (x - size[0]/2 + .5)**2 + (y - size[1]/2 + .5)**2 < min(size)**2/9
    im = Image.fromarray(np.where(disc[..., None], (255, 127, 0), 255).astype(np.uint8)).convert(mode)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    im.save(path, **kwargs)
    return im

def coco(n=4, boxes=None, **changes):
    "A folder `coco` of n images with a box each, and changes of its JSON"
    for i in range(n): picture(f'coco/train2017/{i}.png', (32, 32))
    notes = [dict(id=i, image_id=i, category_id=1, iscrowd=0, bbox=b, segmentation=[[4, 4, 12, 4, 12, 12, 4, 12]])
             for i, b in enumerate(boxes or [[4, 4, 8, 8]]*n)]
    d = dict(images=[dict(id=i, file_name=f'{i}.png', height=32, width=32) for i in range(n)], annotations=notes,
             categories=[dict(id=1, name='cat'), dict(id=2, name='dog')])
    file = Path('coco/annotations/instances_train2017.json')
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(d | changes))
    return d

def kept(d, **changes): Path('coco/annotations/instances_train2017.json').write_text(json.dumps(d | changes))

def voc_maps(n=4):
    "A folder `maps` of n images with a class for each pixel"
    for i in range(n):
        picture(f'maps/JPEGImages/{i}.jpg', (32, 32))
        voc_mask(i, np.full((32, 32), i % 3, np.uint8))
    Path('maps/ImageSets/Segmentation').mkdir(parents=True)
    Path('maps/ImageSets/Segmentation/train.txt').write_text('\n'.join(map(str, range(n))))

def voc_mask(i, a):
    im = Image.fromarray(a)
    if a.dtype == np.uint8 and a.ndim == 2: im.putpalette(voc_colours(256).flatten().tolist())
    Path('maps/SegmentationClass').mkdir(parents=True, exist_ok=True)
    im.save(f'maps/SegmentationClass/{i}.png')

def video(n=3):
    "Frames in a folder `frames`, and the mask of the first"
    for i in range(n): picture(f'frames/{i:05d}.png', (32, 32))
    m = torch.zeros(32, 32, dtype=torch.uint8)
    m[10:20, 10:20] = 1
    write_mask('mask.png', m)

def make_home(at):
    "Two classes of pictures, a pretrained and a finetuned run, the weights of an encoder"
    was = os.getcwd()
    os.chdir(at)
    try:
        for k in ('cat', 'dog'):
            for i in range(6): picture(f'pictures/{k}/{i}.png')
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            common = f'{TINY} --epochs 1 --steps 1 --bs 8'
            assert main(f'pretrain {common} --name pre'.split()) == 0
            assert main(f'finetune {common} --name fine'.split()) == 0
        shutil.rmtree('runs/fine/figures')
        shutil.rmtree('runs/pre/figures')
        save(TokenEncoder('vit_tiny_patch16_224', img_size=16, p=4, depth=1, embed_dim=24, num_heads=2), 'held.safetensors')
    finally: os.chdir(was)
    return Path(at)


# ------------------------------------------------------------------------------------------------------ looking at one case

def tree(at='.'):
    "What every file below a folder holds"
    def held(f):
        if f.is_symlink(): return os.readlink(f)
        return hashlib.sha1(f.read_bytes()).hexdigest() if f.is_file() else ''
    return {str(Path(d)/f): held(Path(d)/f) for d, folders, files in os.walk(at) for f in (*folders, *files)}

def told(text, at):
    "A message without the folder it was made in"
    for p in (os.path.realpath(at), str(at)): text = text.replace(p + '/', '').replace(p, '.')
    text = re.sub(r'\x1b\[[0-9;]*m', '', text).strip()
    if not FRAMED.match(text): return text
    return ' '.join(s for line in text.splitlines() if (s := line.strip(' │╭╮╰╯─')).strip('-'))

FRAMED = re.compile(r'\W*(Value error|Parsing error|Invalid choice|Unrecognized options?|Missing)', re.I) # by tyro, which parses options

def hangs(*_): raise TimeoutError('it hangs')

def offline():
    "Nothing is sought elsewhere, as long as a case runs; both libraries read the variable when they are imported"
    modules = patch.object(huggingface_hub.constants, 'HF_HUB_OFFLINE', True), patch.object(datasets.config, 'HF_HUB_OFFLINE', True)
    return patch.dict(os.environ, HF_HUB_OFFLINE='1'), *modules

@contextlib.contextmanager
def room(most=2**40):
    "At most so many bytes of addresses beyond those in use: a kernel that promises any memory (vm.overcommit_memory = 1) kills who takes it"
    try:
        import resource
        used = int(Path('/proc/self/statm').read_text().split()[0])*resource.getpagesize()
    except (ImportError, OSError): # not Linux
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (min(x for x in (used + most, soft, hard) if x != resource.RLIM_INFINITY), hard))
    try: yield
    finally: resource.setrlimit(resource.RLIMIT_AS, (soft, hard))

def call(f, line, at):
    "What comes of a command or a call in the working folder: answer, exit code or exception, where it crashed"
    signal.signal(signal.SIGALRM, hangs)
    signal.alarm(100)
    try:
        with room(), contextlib.ExitStack() as alone:
            for c in offline(): alone.enter_context(c)
            answer = f()
    except SystemExit as e: return '', e.code, ''
    except Exception as e: return str(e), type(e).__name__, traceback.format_exc()
    finally: signal.alarm(0)
    return ('', answer, '') if line else (answer, 0, '')

def look(case, home):
    "Run a case in a copy of `home`: what was typed, what was said, exit code or exception, files that were changed"
    was, out, err = os.getcwd(), io.StringIO(), io.StringIO()
    with tempfile.TemporaryDirectory() as at, warnings.catch_warnings():
        os.chmod(at, 0o755)
        shutil.copytree(home, at, dirs_exist_ok=True, symlinks=True)
        os.chdir(at)
        try:
            made = case.make()
            line = isinstance(made, str)
            typed, f = (f'relvit {made}', lambda: main(shlex.split(made))) if line else made
            before = tree()
            warnings.simplefilter('always') # as in a process of its own
            if not line: warnings.showwarning = lambda message, *args, **kwargs: print(f'warning: {message}', file=sys.stderr)
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err): answer, code, crash = call(f, line, at)
            changed = sorted({f for f, _ in set(before.items()) ^ set(tree().items())})
        finally: os.chdir(was)
        said = told('\n'.join(s.strip() for s in (err.getvalue(), out.getvalue(), str(answer)) if s.strip()), at)
        return dict(group=case.group, input=case.what, typed=told(typed.replace(f' {TINY}', ''), at), said=said, code=code, changed=changed, crash=crash)


# ------------------------------------------------------------------------------------------------------ images

OPENED = "open_data('pictures', img_size=16, p=4)", lambda: repr(open_data('pictures', img_size=16, p=4))
def predict(*files): return f'predict runs/fine {" ".join(files) or "new"}'

def fresh(*args, **kwargs): # a good image beside the bad one
    Path('new').mkdir(exist_ok=True)
    picture('new/good.png')
    return picture(*args, **kwargs) if args else None

def cut(f, share=.5):
    b = Path(f).read_bytes()
    Path(f).write_bytes(b[:int(len(b)*share)])

def reads(f, like='RGB', off=12):
    "`read_image`, and how far its pixels are from the picture's"
    def call():
        got, want = read_image(f, 20).float(), torch.from_numpy(np.array(picture('like.png').convert(like).convert('RGB'))).permute(2, 0, 1).float()
        Path('like.png').unlink()
        assert (got - want).abs().mean() < off, (got - want).abs().mean()
        return f'read as RGB, {tuple(got.shape)}: the disc is ' + ('grey' if like == 'L' else 'orange') + ' on white'
    return f"read_image('{f}', 20)", call

@bad('images', 'a JPEG that was cut in half', r'2 images, 1 unreadable.*new/cut\.jpg,,,image file is truncated', 0)
def _():
    fresh('new/cut.jpg', (200, 200), quality=95)
    cut('new/cut.jpg')
    return predict()

@bad('images', 'one of 12 training images is cut in half', r'1 of 12 files of pictures is unreadable and left out:.*0\.png.*left out +1 unreadable', 0)
def _():
    cut('pictures/cat/0.png')
    return OPENED

@bad('images', 'two of 12 training images are cut in half', r'2 of 12 files of pictures are unreadable, and most_unreadable = 0.01 lets 1 be left out; mend them, or raise it:.*0\.png.*1\.png')
def _():
    cut('pictures/cat/0.png'), cut('pictures/cat/1.png')
    return f'pretrain --data pictures {TINY}'

@bad('images', 'every training image has 0 bytes', r'none of the 12 files of pictures can be read')
def _():
    for f in Path('pictures').glob('*/*'): f.write_bytes(b'')
    return f'pretrain --data pictures {TINY}'

@bad('images', '0 bytes', r'new/empty\.png,,,.*this is no image', 0)
def _():
    fresh()
    Path('new/empty.png').write_bytes(b'')
    return predict()

@bad('images', 'a text that is called .jpg', r'new/text\.jpg,,,"this is no image, or of a kind that PIL does not know', 0)
def _():
    fresh()
    Path('new/text.jpg').write_text('hello')
    return predict()

@bad('images', 'one pixel', r'read as RGB, \(3, 16, 16\): one colour', 0)
def _():
    Image.new('RGB', (1, 1), (255, 127, 0)).save('one.png')
    def call():
        x = read_image('one.png', 16)
        assert x.flatten(1).unique(dim=1).tolist() == [[255], [127], [0]]
        return f'read as RGB, {tuple(x.shape)}: one colour, enlarged'
    return "read_image('one.png', 16)", call

@bad('images', 'CMYK', 'read as RGB', 0)
def _():
    picture('x.jpg', mode='CMYK')
    return reads('x.jpg')

@bad('images', 'a palette', 'read as RGB', 0)
def _():
    picture('x.png', mode='P')
    return reads('x.png')

@bad('images', 'a palette of which one colour is transparent', 'read as RGB', 0)
def _():
    im = picture('a.png').quantize(2)
    im.save('x.png', transparency=im.getpixel((0, 0)))
    return reads('x.png')

@bad('images', '16 bits a pixel', r'read as RGB.*grey on white', 0)
def _():
    Image.fromarray(np.asarray(picture('a.png').convert('L'), dtype=np.uint16)*257).save('x.png')
    return reads('x.png', 'L')

@bad('images', 'transparent around the disc', 'read as RGB', 0)
def _():
    im = picture('a.png')
    white = (np.asarray(im) == 255).all(-1)
    im.putalpha(Image.fromarray((~white*255).astype(np.uint8)))
    im.save('x.png')
    return reads('x.png')

@bad('images', 'an animation', 'read as RGB', 0)
def _():
    im = picture('a.png')
    im.save('x.gif', save_all=True, append_images=[Image.new('RGB', im.size)]*3)
    return reads('x.gif')

@bad('images', 'a PNG that is called .jpg', 'read as RGB', 0)
def _():
    picture('a.png')
    Path('a.png').rename('x.jpg')
    return reads('x.jpg')

@bad('images', 'turned by a camera, which EXIF notes', r'read as RGB.*upright', 0)
def _():
    exif = Image.Exif()
    exif[274] = 6
    a = np.zeros((20, 20, 3), np.uint8)
    a[:, :10] = 255 # white on the left, which a turn to the right brings to the top
    Image.fromarray(a).save('x.jpg', exif=exif, quality=95)
    def call():
        x = read_image('x.jpg', 20).float()
        assert x[:, :9].mean() > 240 and x[:, 11:].mean() < 15
        return f'read as RGB, {tuple(x.shape)}: upright'
    return "read_image('x.jpg', 20)", call

def png_of(w, h):
    "A PNG that claims a size and holds next to nothing"
    import zlib
    def chunk(kind, data): return struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))
    return b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', struct.pack('>IIBBBBB', w, h, 8, 2, 0, 0, 0)) + chunk(b'IDAT', zlib.compress(b'')) + chunk(b'IEND', b'')

@bad('images', 'a PNG of 67 bytes that claims 60,000 x 60,000 pixels', r'new/bomb\.png.*3,600,000,000 pixels.*has to be made smaller', 0)
def _():
    fresh()
    Path('new/bomb.png').write_bytes(png_of(60000, 60000))
    return predict()

@bad('images', 'fractions with NaN among them (a TIFF of floats)', r'x\.tif cannot be read as an image: .*not a number', 'Unreadable')
def _():
    a = np.full((8, 8), .5, np.float32)
    a[0, 0] = np.nan
    Image.fromarray(a).save('x.tif')
    return "read_image('x.tif', 8)", lambda: read_image('x.tif', 8)

@bad('images', 'a file that nobody may read', r'x\.png cannot be read as an image: .*Permission denied', 'Unreadable')
def _():
    picture('x.png')
    os.chmod('x.png', 0)
    def call():
        root = os.geteuid() == 0 # who may read everything
        if root: os.seteuid(65534)
        try: read_image('x.png', 8)
        finally: root and os.seteuid(0)
    return "read_image('x.png', 8)", call

@bad('images', 'a link to an image that is gone', r'new/gone\.png,,,.*[Nn]o such file', 0)
def _():
    fresh()
    Path('new/gone.png').symlink_to('nowhere.png')
    return predict()

@bad('images', 'a file that is not there', 'not there: missing.png')
def _(): return predict('missing.png')

# ------------------------------------------------------------------------------------------------------ grids

T = '--encoder vit_tiny_patch16_224 --encoder-args embed_dim=24 depth=1 num_heads=2 --device cpu'
lines('grids', (
    ('a patch that does not divide the image', f'pretrain {T} --img-size 16 --p 5', 'patches of 5 pixels do not cut 16 pixels without a rest'),
    ('a patch of 0 pixels', f'pretrain {T} --p 0', 'p must be above 0, not 0'),
    ('a patch of -4 pixels', f'pretrain {T} --p -4', 'p must be above 0, not -4'),
    ('a patch of 2.5 pixels', f'pretrain {T} --p 2.5', r'--p.*invalid.*2\.5'),
    ('a patch larger than the image', f'pretrain {T} --img-size 16 --p 32', 'patches of 32 pixels do not cut 16'),
    ('a grid of 1 x 1', f'pretrain {T} --img-size 16 --p 16', 'one patch has no relations: choose a smaller p'),
    ('an image of 0 pixels', f'pretrain {T} --img-size 0', 'img_size must be above 0, not 0'),
    ('an image of 17 pixels, and no patch said', f'pretrain {T} --img-size 17', 'no patch cuts 17 pixels into 6 to 14 a side; choose another img_size'),
    ('an image of 3,000,000 pixels a side', f'pretrain {T} --img-size 3000000 --p 4', 'img_size must be a million at most, not 3000000'),
    ('an image of 900,000 pixels a side', f'pretrain {T} --img-size 900000 --p 4', 'there is not enough memory for .* GB; a smaller --bs, --img-size or encoder takes less'),
    ('more mega-patches than patches', f'pretrain {TINY} --mega 9', r'a grid of \(4, 4\) patches cannot be cut into \(9, 9\) mega-patches'),
    ('one mega-patch', f'pretrain {TINY} --mega 1', 'mega must be 2 or more, not 1'),
    ('a Swin that cannot have the grid', 'pretrain --encoder swin_tiny_patch4_window7_224 --img-size 50 --p 5 --device cpu', 'swin_tiny_patch4_window7_224'),
))

x16 = torch.zeros(2, 3, 16, 16)
for what, typed, f, said in (
    ('Python: a patch that does not divide the image', 'to_patches(x, 5)', lambda: to_patches(x16, 5), 'a patch side of 5 does not divide an image side of 16'),
    ('Python: a patch of 0 pixels', 'to_patches(x, 0)', lambda: to_patches(x16, 0), 'a patch side of 0 does not divide'),
    ('Python: a patch of -4 pixels', 'to_patches(x, -4)', lambda: to_patches(x16, -4), 'a patch side of -4 does not divide'),
    ('Python: a patch of 2.5 pixels', 'to_patches(x, 2.5)', lambda: to_patches(x16, 2.5), '2.5'),
    ('Python: a patch of 2.5 x 2 pixels', 'to_patches(x, (2.5, 2))', lambda: to_patches(x16, (2.5, 2)), '2.5'),
    ('Python: a patch of three numbers', 'to_patches(x, (4, 4, 4))', lambda: to_patches(x16, (4, 4, 4)), 'or two of them'),
    ('Python: a patch larger than the image', 'to_patches(x, 32)', lambda: to_patches(x16, 32), 'a patch side of 32 does not divide an image side of 16'),
    ('Python: a grid that does not hold the patches', 'from_patches(to_patches(x, 4), (3, 4))', lambda: from_patches(to_patches(x16, 4), (3, 4)), 'a grid of 3 x 4 does not hold 16 patches'),
    ('Python: a grid of 0 x 0', 'from_patches(to_patches(x, 4), (0, 0))', lambda: from_patches(to_patches(x16, 4), (0, 0)), 'a grid of 0 x 0 does not hold 16 patches'),
    ('Python: a permutation of another grid', 'permute(x, torch.arange(9), 4)', lambda: permute(x16, torch.arange(9), 4), 'permutations of 9 patches do not fit a grid of 4 x 4'),
    ('Python: more mega-patches than patches', 'mega_patches(x, 4, 5)', lambda: mega_patches(x16, 4, 5), '4 patches in a row cannot be cut into 5 mega-patches'),
): bad('grids', what, said, 'ValueError')(lambda typed=typed, f=f: (typed, f))

# ------------------------------------------------------------------------------------------------------ data

lines('data', (
    ('a folder that is not there', f'pretrain --data no/where {TINY}', 'there is no folder no/where'),
    ('a name that is not known', f'pretrain --data cifar_10 {TINY}', "did you mean 'cifar10'"),
    ('no name', f"pretrain --data '' {TINY}", 'data must not be empty'),
    ('a known data set that is not where it is sought', f'pretrain --data cifar10 --root pictures {TINY}', 'does not hold CIFAR10'),
    ('a file where a folder is wanted', f'pretrain --data held.safetensors {TINY}', 'held.safetensors is a file'),
    ('shards that are not there', f"pretrain --data 'x-{{0..3}}.tar' {TINY}", r'x-\d\.tar'),
    ('a Hugging Face data set that is not there', f'pretrain --data hf:no/where {TINY}', 'no/where'),
    ('200 labels of each class where there are 6', f'finetune --data pictures --few 200 {TINY}', 'a class has only 5 images, 200 were asked for'),
    ('a table of labels for a data set that has its own', f'pretrain --labels some.csv {TINY}', 'labels is for folders of images; digits says it itself'),
    ('a table of labels that is not there', f'pretrain --data pictures --labels some.csv {TINY}', 'there is no table of labels some.csv'),
))

@bad('data', 'an empty folder', 'there is no image in empty')
def _():
    Path('empty').mkdir()
    return f'pretrain --data empty {TINY}'

@bad('data', 'a folder of documents', 'there is no image in papers')
def _():
    Path('papers').mkdir()
    Path('papers/a.txt').write_text('a')
    return f'pretrain --data papers {TINY}'

@bad('data', 'a class without images', 'pictures has no image in its folder bird, so no class of that name', 0)
def _():
    Path('pictures/bird').mkdir()
    return OPENED

@bad('data', 'one class', 'only one class, cat')
def _():
    shutil.rmtree('pictures/dog')
    return f'finetune --data pictures {TINY} --bs 4'

@bad('data', 'no labels, and a run that learns labels', 'no image of flat has a label')
def _():
    for i in range(6): picture(f'flat/{i}.png')
    return f'finetune --data flat {TINY}'

@bad('data', 'one image', r'20\.00% of 1 images cannot be held out')
def _():
    picture('one/a.png')
    return f'pretrain --data one {TINY}'

@bad('data', 'a class with one image', '3 classes.*trained on +10 images', 0)
def _():
    picture('pictures/bird/0.png')
    return OPENED

@bad('data', 'fewer images than a batch', 'finished', 0, writes=True)
def _(): return f'pretrain --data pictures {TINY} --bs 512 --epochs 1'

@bad('data', 'a link that leads back to its own folder', '2 classes.*trained on +10 images', 0)
def _():
    Path('pictures/again').symlink_to('.')
    return OPENED

@bad('data', 'validation folders of other classes', 'no folder of the validation images has a class of the training images', 0)
def _():
    for k in ('cat', 'dog'): picture(f'parts/train/{k}/0.png'), picture(f'parts/train/{k}/1.png'), picture(f'parts/val/{k}s/0.png')
    return "open_data('parts', img_size=16, p=4)", lambda: repr(open_data('parts', img_size=16, p=4))

def table(what, said, text, code=2, encoding='utf-8', line='', group='data'):
    def make():
        Path('t.csv').write_bytes(text if isinstance(text, bytes) else text.encode(encoding))
        if code == 0: return ("open_data('pictures', labels='t.csv', img_size=16, p=4)", lambda: repr(open_data('pictures', labels='t.csv', img_size=16, p=4)))
        return f'finetune --data pictures --labels t.csv{line} {TINY} --bs 2'
    bad(group, f'a table of labels: {what}', said, code)(make)

ROWS = ''.join(f'{k}/{i}.png,{k}\n' for k in ('cat', 'dog') for i in range(6))
table('0 bytes', r't\.csv is empty', '')
table('headings alone', r't\.csv has no line below its headings', 'file,label\n')
table('no line of headings', 'must begin with a line of headings, like file,label; it begins with cat/0.png', ROWS)
table('a file in two classes', 'cat/0.png in lines 2 and 14, as cat and as dog', 'file,label\n' + ROWS + './cat/0.png,dog\n')
table('a file that is not there', "1 of 13 files in column 'file' of t.csv are not there, such as .*cat/9.png", 'file,label\n' + ROWS + 'cat/9.png,cat\n')
table('a line without a file', r'line 3 of t\.csv has no file', 'file,label\ncat/0.png,cat\n,dog\n')
table('a line with more columns', r't\.csv is no CSV: .*line 3', 'file,label\ncat/0.png,cat\ncat/1.png,cat,4,5\n')
table('a column that is not there', "t.csv has no column 'name'; there are file, label", 'file,label\n' + ROWS, line=' --columns name label')
table('semicolons', r'commas', ('file,label\n' + ROWS).replace(',', ';'))
table('Latin 1', r't\.csv is not UTF-8', 'file,label\ncat/0.png,K\xe4tzchen\n', encoding='latin-1')
table('UTF-16, as Excel may write it', r't\.csv is not UTF-8', 'file,label\n' + ROWS, encoding='utf-16')
table('UTF-8 with a mark at its start, as Excel writes it', 'pictures|t: 2 classes', '\ufefffile,label\n' + ROWS, code=0)
table('a PNG', r't\.csv is no', b'\x89PNG\r\n\x1a\n\0\0\0\rIHDR\0\0\0')

# ------------------------------------------------------------------------------------------------------ boxes

DETECT = 'detect --data coco --encoder vit_tiny_patch16_224 --encoder-args embed_dim=24 depth=1 num_heads=2 --img-size 32 --p 8 --min-size 32 --device cpu'

def boxes(what, said, code=0, **kwargs):
    def make():
        coco(**kwargs)
        return (DETECT if code == 2 else ("open_boxes('coco')", lambda: repr(open_boxes('coco'))))
    bad('boxes', what, said, code)(make)

FINE = [[4, 4, 8, 8]]*3
boxes('outside of its image', 'boxes outside of the image, dropped: 1', boxes=[[40, 40, 8, 8]] + FINE)
boxes('over the border of its image', 'boxes clipped: 1', boxes=[[28, 28, 8, 8]] + FINE)
boxes('inverted', 'boxes without area, dropped: 1', boxes=[[12, 12, -8, -8]] + FINE)
boxes('of no area', 'boxes without area, dropped: 1', boxes=[[4, 4, 0, 8]] + FINE)
boxes('NaN', 'boxes without area, dropped: 1', boxes=[[4, 4, float('nan'), 8]] + FINE)
boxes('a text for a number', r'annotation 0 of .*instances_train2017\.json', 2, boxes=[[4, 4, 'eight', 8]] + FINE)
boxes('three numbers', r'annotation 0 of .*instances_train2017\.json', 2, boxes=[[4, 4, 8]] + FINE)
boxes('categories that are missing', "instances_train2017.json is no file of COCO instances: .*categories", 2, categories={})

def noted(what, said, change, code=2):
    def make():
        d = coco()
        change(d)
        kept(d)
        return DETECT if code == 2 else ("open_boxes('coco')", lambda: repr(open_boxes('coco')))
    bad('boxes', what, said, code)(make)

noted('a class that is not listed', 'objects of a class that is not listed, ignored: 1', lambda d: d['annotations'][0].update(category_id=9), 0)
noted('crowds alone', 'no object', lambda d: [a.update(iscrowd=1) for a in d['annotations']])
noted('no object at all', 'no object', lambda d: d['annotations'].clear())
noted('an object of an image that is not listed', r'annotation 3 .*image 99', lambda d: d['annotations'][3].update(image_id=99))
noted('two images of one id', 'two images .*id 0', lambda d: d['images'][1].update(id=0))
noted('two categories of one id', 'two categories .*id 1', lambda d: d['categories'][1].update(id=1))
noted('broken run lengths', r'annotation 0 .*run lengths of its mask are not those of 32 x 32 pixels', lambda d: d['annotations'][0].update(segmentation=dict(size=[32, 32], counts='0' * 3)))
noted('run lengths of another size', r'annotation 0.*64 x 64.*32 x 32', lambda d: d['annotations'][0].update(segmentation=dict(size=[64, 64], counts=[0, 64*64])))
noted('an image of another size than annotated', r'0\.png has 32 x 32 pixels, its annotation is of 64 x 64', lambda d: d['images'][0].update(height=64, width=64))

@bad('boxes', 'an image that is missing', r'1 of 4 images of train2017 are not there, such as .*0\.png')
def _():
    coco()
    Path('coco/train2017/0.png').unlink()
    return DETECT

@bad('boxes', 'a JSON that was cut', r'instances_train2017\.json is no JSON')
def _():
    coco()
    cut('coco/annotations/instances_train2017.json')
    return DETECT

@bad('boxes', 'a JSON of 100,000 brackets', r'instances_train2017\.json is no JSON')
def _():
    coco()
    Path('coco/annotations/instances_train2017.json').write_text('['*100000)
    return DETECT

@bad('boxes', 'a folder of another kind', r'pictures holds none of .*\(voc\).*\(coco\)')
def _(): return DETECT.replace('coco', 'pictures')

@bad('boxes', 'a VOC annotation that was cut', r'0\.xml is no annotation of VOC')
def _():
    picture('voc/JPEGImages/0.jpg', (32, 32))
    for d in ('Annotations', 'ImageSets/Main'): Path('voc', d).mkdir(parents=True)
    Path('voc/ImageSets/Main/train.txt').write_text('0\n')
    Path('voc/Annotations/0.xml').write_text('<annotation><object><name>cat</na')
    return DETECT.replace('coco', 'voc')

# ------------------------------------------------------------------------------------------------------ label maps

SEGMENT = 'segment --data maps --encoder vit_tiny_patch16_224 --encoder-args embed_dim=24 depth=1 num_heads=2 --crop 32 --p 8 --device cpu'

def maps(what, said, change):
    def make():
        voc_maps()
        change()
        return SEGMENT
    bad('label maps', what, said)(make)

def paint(colour):
    a = np.zeros((32, 32, 3), np.uint8)
    a[5:9] = colour
    voc_mask(0, a)

maps('of another size than its image', r'0\.png has 16 x 32 pixels, its image 32 x 32', lambda: voc_mask(0, np.zeros((32, 16), np.uint8)))
maps('turned', 'was one of them turned', lambda: (picture('maps/JPEGImages/0.jpg', (32, 24)), voc_mask(0, np.zeros((32, 24), np.uint8))))
maps('a class out of range', r'0\.png holds 77; the 21 classes of maps train are 0 to 20, no class is 255', lambda: voc_mask(0, np.full((32, 32), 77, np.uint8)))
maps('a colour that is not in the palette', r'0\.png stores colours \(RGB\), among them \(1, 2, 3\), which is no colour of VOC', lambda: paint((1, 2, 3)))
maps('missing', r'1 of 4 maps of maps train are not there', lambda: Path('maps/SegmentationClass/0.png').unlink())
maps('cut in half', r'0\.png', lambda: cut('maps/SegmentationClass/0.png'))
maps('no part to train on', "maps has no part 'train' to train on; there are none", lambda: Path('maps/ImageSets/Segmentation/train.txt').unlink())
maps('an empty list', 'maps train has no image', lambda: Path('maps/ImageSets/Segmentation/train.txt').write_text(''))

# ------------------------------------------------------------------------------------------------------ video

def track(what, said, change, line='track-objects pixels frames --mask mask.png --out found --short 32'):
    def make():
        video(4)
        change()
        return line
    bad('video', what, said)(make)

def ids(values, size=(32, 32), mode=np.uint8):
    Image.fromarray(np.full(size, values, mode)).save('mask.png')

track('no frames', 'frames holds no image', lambda: [f.unlink() for f in Path('frames').iterdir()])
track('a folder that is not there', 'there is no folder', lambda: shutil.rmtree('frames'))
track('a mask of another size', r'the mask of frame 00000 has 16 x 16 pixels, the first frame 32 x 32', lambda: ids(1, (16, 16)))
track('a mask without an object', 'there is no object in the mask of the first frame', lambda: ids(0))
track('a mask that is not there', 'there is no mask mask.png', lambda: Path('mask.png').unlink())
track('a mask in colour', 'is in colour; a mask has a palette or is grey', lambda: picture('mask.png', (32, 32)))
track('a mask that was cut', r'mask\.png cannot be read', lambda: cut('mask.png'))
track('a frame that is missing', r'frames are missing between 00000.png and 00002.png', lambda: Path('frames/00001.png').unlink())
track('a frame of another size', r'frame 00001 has 16 x 16 pixels, the first frame 32 x 32', lambda: picture('frames/00001.png', (16, 16)))
track('a frame that was cut', r'00001\.png cannot be read', lambda: cut('frames/00001.png'))
track('nowhere to write', 'say where the masks shall go: --out FOLDER', lambda: None, 'track-objects pixels frames --mask mask.png')
track('a folder for masks that holds another\'s', r'which was not made here; choose another folder', lambda: Path('found/frames').mkdir(parents=True))
track('a temperature of 0', 'temperature is above 0', lambda: None, 'track-objects pixels frames --mask mask.png --out found --temperature 0')

# ------------------------------------------------------------------------------------------------------ configuration

def of(text): return lambda: (Path('c.yaml').write_text(text), f'pretrain --config c.yaml {TINY}')[1]

lines('configuration', (
    ('a command that there is none of', 'pretrian', "there is no command 'pretrian'; did you mean 'pretrain'"),
    ('an option that there is none of', f'pretrain --epohs 3 {TINY}', '--epochs'),
    ('a word for a number', f'pretrain --epochs many {TINY}', 'Error parsing --epochs'),
    ('a negative number', f'pretrain --bs -4 {TINY}', 'bs must be above 0, not -4'),
    ('NaN', f'pretrain --lr nan {TINY}', 'lr must be above 0, not nan'),
    ('infinity', f'pretrain --lr inf {TINY}', 'lr must be above 0, not inf'),
    ('infinite weight decay', f'pretrain --wd inf {TINY}', 'wd must be 0 or more, not inf'),
    ('NaN for the seconds between states', f'pretrain --every nan {TINY}', 'every must be 0 or more, not nan'),
    ('a seed of 30 digits', f'pretrain --seed {"9"*30} {TINY}', 'seed must be a number of 64 bits'),
    ('a batch of 10^15 images', f'pretrain --bs {10**15} --steps 1 {TINY}', 'bs must be a million at most'),
    ('an encoder of 10^12 channels', f'pretrain {TINY.replace("=24", f"={10**12}")}', 'memory|embed_dim'),
    ('an unknown task', f'pretrain --tasks relation {TINY}', "did you mean 'relations'"),
    ('a task twice', f'pretrain --tasks relations relations=2 {TINY}', 'more than once'),
    ('a task of weight NaN', f'pretrain --tasks relations=nan {TINY}', "the weight of task 'relations' must be above 0, not nan"),
    ('an unknown recipe', f'pretrain --recipe referense {TINY}', "did you mean 'reference'"),
    ('an unknown number of a recipe', f'pretrain --recipe-args mixpu=0 {TINY}', "did you mean 'mixup'"),
    ('an unknown encoder', 'pretrain --encoder vit_smal_patch16_224', 'vit_small_patch16_224'),
    ('no encoder', "pretrain --encoder ''", 'encoder must not be empty'),
    ('an unknown argument of the encoder', 'pretrain --encoder-args dpth=1', "'dpth'"),
    ('heads that do not divide the width', 'pretrain --encoder-args embed_dim=50 num_heads=3', 'timm cannot build vit_small_patch16_224'),
    ('an unknown device', f'pretrain {TINY.replace("--device cpu", "--device tpu9")}', "there is no device 'tpu9' here"),
    ('no device', f"pretrain {TINY.replace('--device cpu', '')} --device ''", 'device must not be empty'),
    ('an unknown kind of detector', 'detect --kind yolo', 'yolo.*mask.*faster.*cascade'),
    ('an unknown argument of the data', 'detect --data shapes --data-args yaer=3', 'yaer'),
    ('a share above 1', f'pretrain --drop-path 1.5 {TINY}', 'drop_path must be a share from 0 to below 1, not 1.5'),
    ('two options that exclude each other', f'pretrain --tasks labels {TINY}', 'pretraining looks at no label; joint learns labels and relations at once'),
    ('a name that leads elsewhere', f'pretrain --name ../up {TINY}', 'name must be a plain name'),
    ('a name that a run has already', f'pretrain --name pre {TINY}', 'runs/pre holds a run already: resume it, or choose another name'),
    ('a folder for runs that is a file', f'pretrain --out held.safetensors {TINY}', 'held.safetensors'),
    ('a run to go on with, and a further option', 'finetune --resume runs/fine --epochs 5', '--resume goes on with what the run began with; it takes no --epochs'),
    ('a run to go on with that is finished', 'finetune --resume runs/fine', 'runs/fine is finished'),
    ('a run to go on with that is of another kind', 'pretrain --resume runs/fine', 'runs/fine is a finetune run: relvit finetune --resume runs/fine'),
    ('a run that is not there', 'evaluate nowhere', 'nowhere is no run folder'),
    ('labels from a run that learnt none', 'predict runs/pre pictures', 'runs/pre learnt no labels: finetune a run that starts with it first'),
    ('an export to .pt', 'export runs/fine weights.pt', 'weights.pt must end in .safetensors'),
    ('a table of results that is not there', 'table nowhere', 'there is no recorded run in nowhere; make one: relvit reproduce'),
))
for what, text, said in (
    ('a YAML file that is none', 'data: [', r'c\.yaml is not YAML: line 1: '),
    ('a YAML file of a list', '- 3', r'c\.yaml must hold lines of "key: value"'),
    ('a YAML file with an unknown key', 'epohs: 3', r"c\.yaml: Pretrain knows no 'epohs'; did you mean 'epochs'"),
    ('a YAML file with a wrong type', 'epochs: [3]', r'c\.yaml: epochs must be a whole number'),
    ('a YAML file that calls Python', 'data: !!python/object/apply:os.system [ls]', r'c\.yaml is not YAML'),
    ('a YAML file with true for a number', 'epochs: true', r'c\.yaml: epochs must be a whole number, not True'),
): bad('configuration', what, said)(of(text))

def run_file(what, said, name, text, line='predict runs/fine pictures/cat/0.png', code=2):
    def make():
        f = Path('runs/fine')/name
        f.write_text(text if isinstance(text, str) else json.dumps(text(json.loads(f.read_text()))))
        return line
    bad('configuration', what, said, code)(make)

run_file('a run whose config.json was cut', r'config\.json is not JSON', 'config.json', '{"mode": "fine')
run_file('a run whose config.json is a list', r'config\.json', 'config.json', '[]')
run_file('a run whose config.json has an unknown key', r"runs/fine/config\.json: Finetune knows no 'warp'", 'config.json', lambda c: c | dict(warp=9))
run_file('a run whose config.json has a wrong type', r'runs/fine/config\.json: epochs must be a whole number', 'config.json', lambda c: c | dict(epochs='x'))
run_file('a run of a newer relvit', r'runs/fine was written by relvit 9\.9.*this is .*upgrade', 'environment.json', lambda e: e | dict(format=99, versions=dict(e['versions'], relvit='9.9')))
run_file('a run whose recipe.json was cut', r'recipe\.json is not JSON', 'recipe.json', '{', 'evaluate runs/fine')
run_file('a run whose recipe.json has an unknown key', r"recipe\.json: .*'warp'", 'recipe.json', lambda c: c | dict(warp=9), 'evaluate runs/fine')
run_file('a run whose recipe.json has a wrong type', r'recipe\.json: .*lr', 'recipe.json', lambda c: c | dict(lr='fast'), 'evaluate runs/fine')
run_file('a run whose data.json was cut', r'data\.json is not JSON', 'data.json', '{')
run_file('a run whose data.json lacks the classes', 'its config.json and data.json do not say what they do', 'data.json', lambda d: {k: v for k, v in d.items() if k != 'classes'})

# ------------------------------------------------------------------------------------------------------ checkpoints

def weights(what, said, change, line='predict runs/fine pictures/cat/0.png', code=2, file='runs/fine/last.safetensors'):
    def make():
        change(Path(file))
        return line
    bad('checkpoints', what, said, code)(make)

INIT = 'finetune --init held.safetensors --data digits --device cpu --img-size 16 --p 4'

def rewrite(tensors=lambda t: t, meta=lambda m: m):
    def change(f):
        m = read_meta(f)
        new = tensors(load_file(f))
        m = meta(m)
        save_file(new, f, {'format': 'pt', 'relvit': m if isinstance(m, str) else json.dumps(m)})
    return change

def header(n, text=b'{}'): return lambda f: f.write_bytes(struct.pack('<Q', n) + text)
NAN = lambda t: {k: torch.full_like(v, torch.nan) if v.is_floating_point() and 'blocks.0' in k else v for k, v in t.items()}
SHAPE = lambda t: {k: v[:, :4].contiguous() if k.endswith('attn.qkv.weight') else v for k, v in t.items()}
LACK = lambda t: {k: v for k, v in t.items() if 'blocks.0.attn' not in k}

for where, line, file in (('of a run', 'predict runs/fine pictures/cat/0.png', 'runs/fine/last.safetensors'), ('to start from', INIT, 'held.safetensors')):
    name = re.escape(file)
    weights(f'{where}: cut in half', name + ' is not a safetensors file', lambda f: cut(f), line, file=file)
    weights(f'{where}: 0 bytes', name + ' is .*empty', lambda f: f.write_bytes(b''), line, file=file)
    weights(f'{where}: a text', name + ' is not a safetensors file', lambda f: f.write_text('hello, this is a text'), line, file=file)
    weights(f'{where}: a header that claims 2^60 bytes', name + ' is not a safetensors file', header(2**60), line, file=file)
    weights(f'{where}: a tensor that claims 2^50 numbers', name + ' is not a safetensors file',
            header(72, b'{"a":{"dtype":"F32","shape":[1125899906842624],"data_offsets":[0,4503599627370496]}}'[:72].ljust(72)), line, file=file)
    weights(f'{where}: of a newer relvit', name + ' was written by relvit 9.9.*this is .*upgrade', rewrite(meta=lambda m: m | dict(version='9.9', format=99)), line, file=file)
    weights(f'{where}: metadata that is no JSON', name + '.*metadata', rewrite(meta=lambda m: '{"encoder": '), line, file=file)
    weights(f'{where}: metadata that is a list', name + '.*metadata', rewrite(meta=lambda m: []), line, file=file)
    weights(f'{where}: a tensor of another shape', name + '.*blocks.0.attn.qkv.weight', rewrite(SHAPE), line, file=file)
    weights(f'{where}: tensors are missing', name + '.*blocks.0.attn', rewrite(LACK), line, file=file)
    weights(f'{where}: NaN among the weights', name + '.*NaN or infinity.*blocks.0', rewrite(NAN), line, file=file)
    weights(f'{where}: an encoder that timm does not know', name + ".*'vit_huge'", rewrite(meta=lambda m: m | dict(encoder=m['encoder'] | dict(name='vit_huge'))), line, file=file)
    weights(f'{where}: a folder of that name', name + ' is (a folder, where a safetensors file is wanted|no run folder)', lambda f: (f.unlink(), f.mkdir()), line, file=file)

weights('of a run: of another architecture', 'runs/fine/last.safetensors is not what this run trained: ', lambda f: shutil.copy('held.safetensors', f))
weights('of a run: it was never written', r'runs/fine has no last\.safetensors yet', lambda f: f.unlink())
weights('of a run: a state to go on from that was cut', r'runs/fine/last\.safetensors is not a safetensors file', lambda f: (Path('runs/fine/summary.json').unlink(), cut(f)), 'finetune --resume runs/fine')
weights('to start from: not there', 'there is no nowhere.safetensors to start from', lambda f: None, INIT.replace('held', 'nowhere'))
weights('to start from: another encoder is asked for', 'init holds a vit_tiny_patch16_224, not a vit_small_patch16_224; leave encoder out', lambda f: None, INIT + ' --encoder vit_small_patch16_224')
weights('to start from: another depth is asked for', 'init holds an encoder of depth=1, not 3; leave it out', lambda f: None, INIT + ' --encoder-args depth=3')
weights('to start from: a file of another model that says nothing', 'held.safetensors: 0 tensors taken', lambda f: save_file(dict(a=torch.zeros(3)), f), f'finetune --init held.safetensors --data pictures {TINY}', file='held.safetensors')
weights('to start from: a .pt file', r'weights\.pt', lambda f: Path('weights.pt').write_bytes(b'PK\3\4 something'), INIT.replace('held.safetensors', 'weights.pt'))
weights('to export: of a run that was cut', r'runs/fine/last\.safetensors is not a safetensors file', lambda f: cut(f), 'export runs/fine home.safetensors')
weights('for a video: not there', 'there is no nowhere.safetensors', lambda f: video(), 'track-objects nowhere.safetensors frames --mask mask.png --out found')


# ------------------------------------------------------------------------------------------------------ by itself: the record

if __name__ == '__main__':
    only, rows = sys.argv[2:], [] # patterns, to see some; all are recorded if none is given
    with tempfile.TemporaryDirectory() as d:
        home = make_home(d)
        for case in CASES:
            if only and not any(re.search(p, case.id) for p in only): continue
            rows.append(r := look(case, home))
            good = re.search(case.said, r['said'], re.S) and r['code'] == case.code and (case.writes or not r['changed'])
            print('good' if good else 'BAD ', case.id, '|', r['code'], '|', *r['changed'], f"\n{r['said'][:700]}\n{'' if good else r['crash'][-900:]}", flush=True)
    keep = 'group', 'input', 'typed', 'said', 'code'
    if not only: Path(sys.argv[1]).write_text(json.dumps(dict(provenance=provenance(), cases=[{k: r[k] for k in keep} for r in rows]), indent=1))
