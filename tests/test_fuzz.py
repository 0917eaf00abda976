"What chance makes of good files: they are read, or refused by an error of ours that names them; nothing else, and nothing hangs."
import io, json

import numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st
from PIL import Image

from relvit.boxes import read_coco, read_voc
from relvit.checkpoint import load_encoder, save
from relvit.images import Unreadable, read_image, stored_image, table_files
from relvit.label_maps import plain_numbers, voc_numbers, wide_numbers
from relvit.patches import from_patches, grid_of, to_patches
from relvit.recipes import RECIPES, Recipe
from relvit.tokens import TokenEncoder
from relvit.training import Finetune, Joint, Pretrain, parse_args
from relvit.video import read_mask

KINDS = dict(png='RGB', jpeg='RGB', gif='P', bmp='RGB', tiff='RGBA', webp='RGB', ppm='RGB', ico='RGBA', tga='RGB', pcx='L')


def picture(kind):
    y, x = np.mgrid[:24, :24]
    im = Image.fromarray(np.stack([x*10, y*10, x + y], -1).astype(np.uint8)).convert(KINDS[kind])
    f = io.BytesIO()
    im.save(f, kind, **(dict(exif=b'Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0') if kind in ('jpeg', 'webp') else {}))
    return f.getvalue()

WHOLE = {kind: picture(kind) for kind in KINDS}


@st.composite
def harmed(draw, data):
    "Bytes with some changed, and perhaps cut, or with something put in"
    new = bytearray(data)
    for _ in range(draw(st.integers(0, 6))): new[draw(st.integers(0, len(new) - 1))] = draw(st.integers(0, 255))
    if draw(st.booleans()): del new[draw(st.integers(0, len(new))):]
    if draw(st.booleans()):
        at = draw(st.integers(0, len(new)))
        new[at:at] = draw(st.binary(max_size=12))
    return bytes(new)


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('kind', KINDS)
@settings(max_examples=60)
@given(data=st.data())
def test_images(kind, data, tmp_path_factory):
    f = tmp_path_factory.getbasetemp()/f'x.{kind}'
    f.write_bytes(data.draw(harmed(WHOLE[kind])))
    most, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, 10**6 # or a harmed header may cost a second of zeros
    try:
        for read, shape in ((lambda: read_image(f, 16), (3, 16, 16)), (lambda: stored_image(f)[0], None)):
            try: x = read()
            except Unreadable as e: assert str(f) in str(e)
            else: assert x.dtype == torch.uint8 and x.shape[0] == 3 and shape in (None, tuple(x.shape))
        if kind == 'png':
            for read in (lambda f: plain_numbers(f)[0], lambda f: wide_numbers(f)[0], lambda f: voc_numbers(f)[0], read_mask):
                try: m = read(f)
                except ValueError as e: assert str(f) in str(e)
                else: assert m.ndim == 2
    finally: Image.MAX_IMAGE_PIXELS = most


@pytest.fixture(scope='module')
def weights(tmp_path_factory):
    f = tmp_path_factory.mktemp('weights')/'w.safetensors'
    save(TokenEncoder('vit_tiny_patch16_224', img_size=8, p=4, depth=1, embed_dim=8, num_heads=1), f)
    return f, f.read_bytes()


@settings(max_examples=120)
@given(data=st.data())
def test_weights(data, weights):
    f, whole = weights
    f = f.with_name('x.safetensors')
    head = 8 + int.from_bytes(whole[:8], 'little') # most of what is there to break
    f.write_bytes(data.draw(harmed(whole[:head])) + whole[head:] if data.draw(st.booleans()) else data.draw(harmed(whole)))
    try: load_encoder(f)
    except ValueError as e: assert str(f) in str(e)


VALUES = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(['1e-3', 'nan', 'relations', 'a=b', '[', '-1']),
                      lambda s: st.lists(s, max_size=3) | st.dictionaries(st.text(max_size=4), s, max_size=2), max_leaves=4)


@pytest.mark.parametrize('kind', [Pretrain, Finetune, Joint])
@settings(max_examples=150)
@given(data=st.data())
def test_configurations(kind, data):
    keys = st.sampled_from(sorted(kind.__dataclass_fields__))
    said = data.draw(st.dictionaries(keys, VALUES, min_size=1, max_size=3))
    try: assert kind.from_dict(kind.from_dict(said).asdict()) == kind.from_dict(said)
    except ValueError as e: assert str(e)


@settings(max_examples=150)
@given(st.text(max_size=60) | st.lists(st.sampled_from(['data: x', 'epochs: 3', 'p: [', '- 1', '&a [*a]', '!!python/name:os', 'lr: 1e-3', 'tasks: {relations: 1}',
                                                         '2020-99-99', ': ', '\t', '? a', '<<: 3']), max_size=4).map('\n'.join))
def test_yaml(text):
    import tempfile
    with tempfile.NamedTemporaryFile('w', suffix='.yaml', encoding='utf-8', errors='replace') as f:
        f.write(text), f.flush()
        try: Pretrain.read(f.name)
        except ValueError as e: assert f.name in str(e)


@given(st.lists(st.text(max_size=12), max_size=3))
def test_arguments(pairs):
    try: assert isinstance(parse_args(pairs), dict)
    except ValueError as e: assert 'written like name=value' in str(e)


@given(st.dictionaries(st.sampled_from(sorted(Recipe.__dataclass_fields__)), VALUES, min_size=1, max_size=3))
def test_recipes(values):
    try: Recipe.of(RECIPES['default'].asdict() | values)
    except (ValueError, TypeError) as e: assert str(e)


@pytest.fixture(scope='module')
def table(tmp_path_factory):
    at = tmp_path_factory.mktemp('table')
    for i in range(3): Image.new('RGB', (4, 4)).save(at/f'{i}.png')
    return at


@settings(max_examples=150)
@given(data=st.data())
def test_tables(data, table):
    good = b'file,label\n0.png,a\n"1.png",b\n2.png,\n'
    (table/'t.csv').write_bytes(data.draw(harmed(good) | st.text('file,label01.png"\n;\0', max_size=60).map(str.encode)))
    try: ds = table_files(table/'t.csv', 8)
    except ValueError as e: assert 't.csv' in str(e)
    else: assert all(f.is_file() for f in ds.files)


@pytest.fixture(scope='module')
def coco(tmp_path_factory):
    at = tmp_path_factory.mktemp('coco')
    for d in ('train2017', 'annotations'): (at/d).mkdir()
    for i in range(2): Image.new('RGB', (12, 10)).save(at/f'train2017/{i}.png')
    notes = [dict(id=i, image_id=i % 2, category_id=1, iscrowd=0, bbox=[1, 1, 5, 5], segmentation=s) for i, s in enumerate(
        ([[1, 1, 6, 1, 6, 6]], dict(size=[10, 12], counts=[20, 30, 70]), dict(size=[10, 12], counts='d0f0Y1')))]
    return at, dict(images=[dict(id=i, file_name=f'{i}.png', height=10, width=12) for i in range(2)], categories=[dict(id=1, name='a')], annotations=notes)


@pytest.mark.filterwarnings('ignore:.*have no mask')
@settings(max_examples=200)
@given(data=st.data())
def test_instances(data, coco):
    at, good = coco
    d = json.loads(json.dumps(good))
    for _ in range(data.draw(st.integers(1, 2))): # something, at any depth, becomes something else
        here, key = dict(d=d), 'd'
        while isinstance(here[key], (dict, list)) and here[key] and data.draw(st.integers(0, 5)):
            here = here[key]
            key = data.draw(st.sampled_from(sorted(here))) if isinstance(here, dict) else data.draw(st.integers(0, len(here) - 1))
        if data.draw(st.booleans()) and not (isinstance(here, dict) and here.get('d') is d): del here[key]
        else: here[key] = data.draw(VALUES)
    file = at/'annotations/instances_train2017.json'
    file.write_text(json.dumps(d))
    try: ds = read_coco(at)
    except (ValueError, FileNotFoundError) as e: assert 'train2017' in str(e)
    else:
        for i in range(len(ds)):
            x, t = ds[i]
            assert (t['boxes'][:, 2:] > t['boxes'][:, :2]).all() and ('masks' not in t or t['masks'].shape == (len(t['boxes']), *x.shape[1:]))
            assert 'masks' not in t or set(t['masks'].byte().unique().tolist()) <= {0, 1}


@settings(max_examples=80)
@given(data=st.data())
def test_voc(data, tmp_path_factory):
    at = tmp_path_factory.getbasetemp()/'voc'
    for d in ('JPEGImages', 'Annotations', 'ImageSets/Main'): (at/d).mkdir(parents=True, exist_ok=True)
    if not (at/'JPEGImages/0.jpg').exists(): Image.new('RGB', (12, 10)).save(at/'JPEGImages/0.jpg')
    (at/'ImageSets/Main/train.txt').write_text('0\n')
    good = (b'<annotation><size><width>12</width><height>10</height></size><object><name>cat</name><difficult>0</difficult>'
            b'<bndbox><xmin>1</xmin><ymin>1</ymin><xmax>5</xmax><ymax>6</ymax></bndbox></object></annotation>')
    (at/'Annotations/0.xml').write_bytes(data.draw(harmed(good)))
    try: read_voc(at)
    except ValueError as e: assert '0.xml' in str(e) or '0.jpg' in str(e)


@given(st.integers(1, 12), st.integers(1, 12), st.one_of(st.integers(-3, 13), st.tuples(st.integers(-1, 13), st.integers(-1, 13)), st.floats(), st.none(), st.text(max_size=2)))
def test_grids(h, w, p):
    x = torch.arange(2*3*h*w).view(2, 3, h, w)
    try: grid = grid_of(x, p)
    except ValueError: return
    assert from_patches(to_patches(x, p), grid).equal(x)


@given(st.tuples(st.integers(-4, 8), st.integers(-4, 8)))
def test_grids_of_patches(grid):
    try: x = from_patches(torch.zeros(1, 12, 3, 2, 2), grid)
    except ValueError: assert grid[0] < 1 or grid[0]*grid[1] != 12
    else: assert tuple(x.shape) == (1, 3, 2*grid[0], 2*grid[1])
