"""Label propagation and its measures: the reference's numbers, laws of the stream, files in and out, every bad input."""
import json, weakref
from functools import cache
from pathlib import Path

import numpy as np, pytest, torch
import torch.nn.functional as F
from PIL import Image
from torch.testing import assert_close

from relvit.label_maps import voc_colours
from relvit.shapes import make_shapes, make_video
from relvit.tokens import TokenEncoder
from relvit.video import (VOID, Pixels, TrackingScores, Video, boundary_f, frame_size, jaccard, jf_stats, judge, outline, overlay, patch_labels,
                          pixel_mask, propagate, read_davis, read_mask, read_video, show_track, still, track, track_objects, within, write_mask)

fixture = Path(__file__).parent/'fixtures'/'video.npz'
ARGS = dict(short=None, radius=3)


@cache
def _load(): return {k: torch.as_tensor(v) for k, v in np.load(fixture).items()}


def recorded(prefix): return {k.removeprefix(prefix): v.clone() for k, v in _load().items() if k.startswith(prefix)}


def close(got, want, tol): assert_close(*(torch.as_tensor(v).double() if torch.is_tensor(v) else torch.tensor(v, dtype=torch.float64) for v in (got, want)), atol=tol, rtol=0)


@cache
def film(frames=8, size=64, seed=12): return Video('film', *make_video(frames, size, seed))


# the reference's numbers

def context():
    d = recorded('davis/')
    return d, (d['feat_target'], d['feat_context'].mT, d['seg_context'].flatten(2).mT)


def test_the_neighbourhood():
    d, _ = context()
    assert torch.equal(within((5, 7), int(d['radius'])), d['mask'] > 0)
    assert within((5, 7), None) is None and within((5, 7), 0).equal(torch.eye(35).bool())


@pytest.mark.parametrize('part', [1, 300, 2**22])
@pytest.mark.parametrize('masked', [True, False])
def test_propagation(masked, part):
    d, given = context()
    near = within((5, 7), int(d['radius'])) if masked else None
    got = propagate(*given, near, int(d['topk']), float(d['temperature']), part)
    close(got.T.view(1, 3, 5, 7), d['seg_target' if masked else 'seg_target_nomask'], 1e-6)


def test_the_mask_of_a_frame():
    d, given = context()
    labels = propagate(*given, within((5, 7), 2))
    assert torch.equal(pixel_mask(labels, [1, 2], (5, 7), (80, 112), (80, 112)), d['seg_argmax'])


def test_labels_of_patches():
    d = recorded('davis/')
    mask = d['onehot_example_in'][0].byte()
    assert torch.equal(patch_labels(mask, [1, 2], (2, 2)).T.view(1, 3, 2, 2), d['onehot_example_out'])


def test_region_and_outline():
    d = recorded('jf/')
    pairs = [*zip(d['res'].numpy(), d['gt'].numpy())]
    close([jaccard(*p) for p in pairs], d['J'], 1e-12)
    close([boundary_f(*p) for p in pairs], d['F'], 1e-12)
    assert np.ceil(.008*np.hypot(*pairs[0][0].shape)) == d['bound_pix']


def test_stats():
    d = recorded('jf/')
    close(jf_stats(d['stats_in']), d['stats_mean_recall_decay'], 1e-12)


# laws

def test_as_many_votes_as_are_tied():
    features, known = torch.tensor([[1., 0, 0]]), torch.tensor([[[1., 0, 0], [3, 0, 0], [2, 0, 0], [0, 1, 0]]])
    labels = torch.eye(4)[None]
    close(propagate(features, known, labels, topk=1), [[1/3, 1/3, 1/3, 0]], 1e-6)
    close(propagate(features, known, labels, topk=9).sum(), 1, 1e-6) # more than there are
    near = torch.tensor([[False, False, False, True]])
    close(propagate(features, known, labels, near, topk=3), [[0, 0, 0, 1]], 1e-6) # fewer in reach than asked for


@pytest.mark.parametrize('seed', range(3))
def test_propagation_against_a_loop(seed):
    g = torch.Generator().manual_seed(seed)
    (h, w), c, d, radius, k = (4, 6), 3, 5, 1 + seed, 1 + 2*seed
    f, ctx = torch.randn(h*w, d, generator=g), torch.randn(c, h*w, d, generator=g)
    segs, want = torch.rand(c, h*w, 3, generator=g), []
    for i in range(h*w):
        found = [(F.cosine_similarity(f[i], ctx[a, j], 0), segs[a, j]) for a in range(c) for j in range(h*w)
                 if max(abs(i//w - j//w), abs(i % w - j % w)) <= radius]
        best = sorted(found, key=lambda v: -v[0])[:k]
        want.append(torch.stack([v for v, _ in best]).div(.2).softmax(0) @ torch.stack([s for _, s in best]))
    close(propagate(f, ctx, segs, within((h, w), radius), k, .2), torch.stack(want), 1e-5)
    close(propagate(f, ctx, segs, within((h, w), radius), k, .2, part=c*h*w*5), torch.stack(want), 1e-5)


def test_half_precision_changes_nothing():
    _, given = context()
    with torch.autocast('cpu', torch.bfloat16): got = propagate(*given)
    assert got.dtype == torch.float32 and torch.equal(got, propagate(*given))


def test_a_dilation_by_a_disc():
    "The share of an outline that is near another one, by drawing discs"
    g = np.random.default_rng(0)
    a, b = (np.kron(g.random((6, 9)) < .4, np.ones((10, 10))).astype(bool) for _ in range(2))
    b = np.roll(b | a, 3, 1)
    def near(m, r):
        out, (ys, xs) = np.zeros_like(m), np.nonzero(m)
        yy, xx = np.mgrid[:m.shape[0], :m.shape[1]]
        for y, x in zip(ys, xs): out |= (yy - y)**2 + (xx - x)**2 <= r*r
        return out
    for r in (1, 2, 5):
        p, q = (outline(x)[near(outline(y), r)].sum()/outline(x).sum() for x, y in ((a, b), (b, a)))
        close(boundary_f(a, b, r), 2*p*q/(p + q), 1e-12)


def test_a_stream_knows_no_future_and_forgets_the_past():
    v = film()
    whole = torch.stack([*track(Pixels(8), v, **ARGS)])
    cut = Video('cut', v.frames[:5], v.masks[0])
    assert torch.equal(whole[:5], torch.stack([*track(Pixels(8), cut, **ARGS)]))
    assert torch.equal(whole[0], v.mask(0)) and whole.dtype == torch.uint8
    # with one frame of context besides the first, what a frame shows is gone two frames later: only its labels live on
    short = [*track(Pixels(8), v, context=0, **ARGS)]
    alone = Video('alone', v.frames[[0, 6]], v.masks[0])
    assert torch.equal(short[6], [*track(Pixels(8), alone, context=0, **ARGS)][1])


def test_queue_is_bounded():
    "Frames that are alive while a long video is tracked"
    alive, most = weakref.WeakSet(), 0
    class Frame(torch.Tensor): pass
    class Long(Video):
        def __len__(self): return 60
        def check(self): return self
        def frame(self, i):
            x = film().frames[i % 8].clone().as_subclass(Frame)
            alive.add(x)
            return x
    for _ in track(Pixels(8), Long('long', film().frames, film().masks), context=2, **ARGS):
        most = max(most, len(alive))
    assert most <= 5 # that in work, and what the thread has read ahead


def test_an_encoder_and_its_options():
    torch.manual_seed(0)
    e = TokenEncoder('vit_small_patch16_224', img_size=64, p=8, embed_dim=48, depth=2, num_heads=3).train()
    v = film(5)
    runs = {k: torch.stack([*track(e, v, **ARGS, **o)]) for k, o in dict(raw={}, normed=dict(normed=True), first=dict(layer=0), off=dict(pos_embed=False)).items()}
    assert e.training # as it was
    assert torch.equal(runs['raw'], torch.stack([*track(e, v, **ARGS)]))
    assert all(r.shape == (5, 64, 64) and set(r.unique().tolist()) <= {0, *v.objects} for r in runs.values())
    assert len({r.numpy().tobytes() for r in runs.values()}) == 4
    moved = e.model.pos_embed.data.add_(10*torch.randn_like(e.model.pos_embed)) is not None
    assert moved and torch.equal(runs['off'], torch.stack([*track(e, v, pos_embed=False, **ARGS)]))
    swin = TokenEncoder('swin_tiny_patch4_window7_224', img_size=64, window_size=2, depths=(1, 1), embed_dim=24, num_heads=(2, 2))
    for layer, radius in (0, 6), (1, 3): assert [*track(swin, v, layer=layer, radius=radius, short=None)][-1].shape == (64, 64)
    masks = [*track(e, Video('film', F.interpolate(v.frames, (48, 80)), v.masks[0][:48].repeat(1, 2)[:, :80]), short=32, step=None)]
    assert masks[-1].shape == (48, 80)


def test_sizes():
    assert frame_size((480, 854), 16) == (480, 832) and frame_size((480, 910), 16) == (480, 896) and frame_size((1080, 1920), 8) == (480, 832)
    assert frame_size((96, 96), 8, 32, None) == (32, 32) and frame_size((50, 70), (8, 16), None) == (48, 64)


def test_a_moving_scene_is_a_scene():
    frames, ids = make_video(6, 48, seed=7, most=4)
    image, [t] = make_shapes(1, 48, 7)
    assert torch.equal(frames[0], image[0]) and ids.dtype == torch.uint8 and ids.shape == (6, 48, 48)
    assert torch.equal(ids[0], (t['masks']*torch.arange(1, len(t['labels']) + 1)[:, None, None]).sum(0).byte())
    again, more = make_video(9, 48, seed=7, most=4)
    assert torch.equal(again[:6], frames) and torch.equal(more[:6], ids)
    assert not torch.equal(ids[0], ids[5])


# scores

def test_scores():
    v = film()
    perfect, later = judge(v, v.masks.values())
    assert all((x == 1).all() and x.shape == (6, 2) for x in perfect.values()) and later == []
    worst, _ = judge(v, [m*0 for m in v.masks.values()])
    s = TrackingScores({'good': perfect, 'bad': worst}, later={'bad': [7]}, unjudged=['third'])
    visible = np.mean([np.mean([(v.mask(i) == k).any().item() for i in range(1, 7)]) for k in v.objects])
    close(s.jf, .5 + .5*(1 - visible), 1e-9) # where nothing is, nothing is right
    assert s.means['j_recall'] >= .5 and json.dumps(s.asdict()) and len(s.table) == 2*len(v.objects)
    said = repr(s)
    assert 'object 7 came later' in said and 'not judged' in said and 'third' in said and 'J&F' in said
    assert 'nan' not in json.dumps(TrackingScores({}).asdict()).lower() and '0 videos' in repr(TrackingScores({}))
    assert len(s.show().axes) == 2


def test_what_is_not_judged():
    v = film(4)
    found = [m.clone() for m in v.masks.values()]
    masks = {i: m.clone() for i, m in v.masks.items()}
    masks[1][:10], masks[2][:10] = VOID, VOID
    found[1][:10] = 1
    assert all((x == 1).all() for x in judge(Video('void', v.frames, masks), found)[0].values())
    joined = {i: m.clone() for i, m in v.masks.items()}
    joined[2][0, 0] = 9
    assert judge(Video('late', v.frames, joined), v.masks.values())[1] == [9]
    assert len(judge(Video('some', v.frames, {0: masks[0], 2: v.mask(2)}), found)[0][1]) == 1
    with pytest.raises(ValueError, match='no mask of a frame between the first and the last'): judge(Video('few', v.frames, {0: masks[0], 3: masks[3]}), found)
    with pytest.raises(ValueError, match='3 masks for 4 frames'): judge(v, found[:3])
    with pytest.raises(ValueError, match=r'a mask of \(32, 64\) was found'): judge(v, [m[:32] for m in found])


def test_small_objects_keep_a_share():
    mask = torch.zeros(32, 32, dtype=torch.uint8)
    mask[:8, :8], mask[31, 20:24], mask[31, 24:28] = 1, 2, 5
    labels = patch_labels(mask, [1, 2, 5], (4, 4))
    close(labels.sum(1), torch.ones(16), 1e-6)
    close(labels[14], [60/64, 0, 4/64, 0], 1e-6)
    close(labels[15], [60/64, 0, 0, 4/64], 1e-6)


def test_every_object_may_win():
    "An object that fills the frame, and one that fills nothing"
    mask = torch.full((32, 32), 3, dtype=torch.uint8)
    labels = patch_labels(mask, [3, 4], (4, 4))
    assert torch.equal(pixel_mask(labels, [3, 4], (4, 4), (32, 32), (20, 30)), torch.full((20, 30), 3, dtype=torch.uint8))


# files

@pytest.fixture
def davis(tmp_path):
    for name, v in dict(a=film(), b=film(5, seed=3)).items():
        for i in range(len(v)):
            f = tmp_path/'DAVIS'/'JPEGImages'/'480p'/name/f'{i:05d}.jpg'
            f.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(v.frame(i).permute(1, 2, 0).numpy()).save(f, quality=95)
            write_mask(tmp_path/'DAVIS'/'Annotations'/'480p'/name/f'{i:05d}.png', v.mask(i))
    lists = tmp_path/'DAVIS'/'ImageSets'
    for year, text in {'2017': 'b\na\n', '2016': 'a\n', '480p': '/JPEGImages/480p/b/00000.jpg /Annotations/480p/b/00000.png\n'*2}.items():
        (lists/year).mkdir(parents=True)
        (lists/year/'val.txt').write_text(text)
    return tmp_path


def test_reading_davis(davis):
    names = lambda: [v.name for v in read_davis(davis)]
    root = davis/'DAVIS'
    videos = read_davis(root)
    assert [v.name for v in videos] == ['b', 'a'] and len(videos[1].check()) == 8 and torch.equal(videos[1].mask(3), film().mask(3))
    assert (videos[1].frame(3).float() - film().frame(3)).abs().mean() < 8 and videos[1].name_of(3) == '00003' and 'masks of all' in repr(videos[1])
    (root/'ImageSets/2017/val.txt').unlink()
    assert names() == ['a']
    (root/'ImageSets/2016/val.txt').unlink()
    assert names() == ['b'] # lists of paths, as in 2016
    (root/'ImageSets/480p/val.txt').rename(root/'ImageSets/480p/train.txt')
    with pytest.raises(FileNotFoundError, match='has no list val; it has train'): names()
    (root/'ImageSets/480p/train.txt').unlink()
    assert names() == ['a', 'b'] # no list at all
    with pytest.raises(FileNotFoundError, match='is not DAVIS: it has no JPEGImages; for a folder of frames name the first mask'): read_davis(davis/'nowhere')


def test_what_is_missing(davis):
    root, jpegs, pngs = davis/'DAVIS', davis/'DAVIS/JPEGImages/480p/a', davis/'DAVIS/Annotations/480p/a'
    assert len(read_video(jpegs, pngs/'00000.png').masks) == 1 and read_video(jpegs, film().mask(0), name='mine').check().name == 'mine'
    (jpegs/'00004.jpg').rename(davis/'away.jpg')
    with pytest.raises(ValueError, match='frames are missing between 00003.jpg and 00005.jpg'): read_davis(root)
    for i in (1, 3, 5, 7): (jpegs/f'{i:05d}.jpg').unlink()
    (davis/'away.jpg').rename(jpegs/'00004.jpg')
    assert len(read_video(jpegs, pngs)) == 4 # every second one
    (pngs/'00000.png').unlink()
    with pytest.raises(ValueError, match='there is no mask of the first frame, 00000'): track_objects('still', root, tell='nothing')
    with pytest.raises(FileNotFoundError, match='there is no mask'): read_video(jpegs, pngs/'00000.png')
    (pngs/'00002.png').rename(jpegs/'00002.png')
    with pytest.raises(ValueError, match='which is the frame'): read_video(jpegs, film().mask(0))
    with pytest.raises(FileNotFoundError, match='is no folder'): read_video(jpegs/'x', pngs)
    with pytest.raises(ValueError, match='holds no image'): read_video(root/'ImageSets', film().mask(0))


def test_bad_videos(tmp_path):
    frames, ids = film(3).frames, torch.stack([*film(3).masks.values()])
    bad = {'no object in the mask of the first frame': Video('v', frames, ids[0]*0),
           'the mask of frame 00000 has 32 x 64 pixels, the first frame 64 x 64': Video('v', frames, ids[0, :32]),
           'the mask of frame 00002 has': Video('v', frames, {0: ids[0], 2: ids[2, :32]}),
           'frame 00001 has 64 x 32 pixels': Video('v', [frames[0], frames[1, :, :, :32]], ids[0]),
           'is of none of the 3 frames': Video('v', frames, {0: ids[0], 3: ids[0]}),
           'has no frame': Video('v', [], ids[0]),
           'objects are 1 to 254': Video('v', frames, ids[0].long()*300)}
    for text, video in bad.items():
        assert 'objects are 1 to 254' in text or 'Video(v: ' in repr(video)
        for use in (lambda: track(Pixels(8), video), lambda: still(video), lambda: track_objects('pixels', video)):
            with pytest.raises(ValueError, match=text): use()
    with pytest.raises(ValueError, match='3 frames but 2 masks'): Video('v', frames, ids[:2])
    with pytest.raises(ValueError, match='two videos are called film'): track_objects('still', [film(), film()])
    with pytest.raises(ValueError, match='nothing would come of it'): track_objects('still', film(), measure=False)
    for masks in ids[0], {0: ids[0], 2: ids[2]}: # the last frame is never judged
        with pytest.raises(ValueError, match='no video has true masks to judge by: say out='): track_objects('still', Video('v', frames, masks))
    assert track_objects('still', Video('v', frames, ids[0]), tmp_path/'out', tell='nothing').unjudged == ['v']
    with pytest.raises(ValueError, match='64 pixels are less than a patch of 128'): track(Pixels(128), film(), short=None)
    with pytest.raises(FileNotFoundError): track(Pixels(8), Video('v', [tmp_path/'0.jpg'], ids[0]))
    (tmp_path/'1.jpg').write_bytes(b'no image')
    with pytest.raises(ValueError, match='1.jpg cannot be read as an image'): track(Pixels(8), Video('v', [tmp_path/'1.jpg'], ids[0]))


def test_masks_as_files(tmp_path):
    mask = torch.arange(256).view(16, 16).byte()
    f = write_mask(tmp_path/'a'/'m.png', mask)
    with Image.open(f) as im: assert im.mode == 'P' and torch.equal(torch.tensor(im.getpalette()).view(-1, 3).byte(), voc_colours(256))
    assert torch.equal(read_mask(f), mask) and [p.name for p in f.parent.iterdir()] == ['m.png']
    only = (mask[:2] > 3).byte()*3
    assert torch.equal(read_mask(write_mask(f, only)), only) # and written over
    Image.fromarray((np.eye(8)*255).astype(np.uint8)).save(tmp_path/'white.png')
    Image.fromarray(np.stack([np.eye(8)*255]*3, -1).astype(np.uint8)).save(tmp_path/'rgb.png')
    for name in ('white', 'rgb'):
        v = Video('v', torch.zeros(2, 3, 8, 8).byte(), {0: tmp_path/f'{name}.png', 1: torch.zeros(8, 8).byte()}).check()
        assert v.objects == [1] and torch.equal(v.mask(0), torch.eye(8).byte()) and v.mask(1).max() == 0
    Image.fromarray(np.full((4, 4), 300, np.uint16)).save(tmp_path/'many.png')
    with pytest.raises(ValueError, match='holds numbers from 300 to 300; objects are 1 to 254'): read_mask(tmp_path/'many.png')
    Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3)).save(tmp_path/'colour.png')
    with pytest.raises(ValueError, match='is in colour'): read_mask(tmp_path/'colour.png')


def test_a_set_interrupted_and_gone_on_with(davis):
    out, told = davis/'out', []
    class Stop(Exception): pass
    class Breaks(Pixels):
        left = 7
        def features(self, *args):
            self.left -= 1
            if not self.left: raise Stop
            return super().features(*args)
    with pytest.raises(Stop): track_objects(Breaks(8), davis, out, tell=told.append, **ARGS)
    assert [t['video'] for t in told] == ['b'] and len([*out.glob('a/*.png')]) in (1, 2) # the second video broke off
    s = track_objects(Pixels(8), davis, out, tell=told.append, **ARGS)
    assert [t['done'] for t in told] == [False, True, False] and {'jf', 'j', 'f', 'seconds'} <= set(told[1])
    assert s.asdict() == track_objects(Pixels(8), davis, tell='nothing', **ARGS).asdict()
    record = json.loads((out/'tracking.json').read_text())
    assert record['scores'] == s.asdict() and record['settings']['radius'] == 3 and record['settings']['topk'] == 5
    want = [*track(Pixels(8), read_davis(davis)[1], **ARGS)]
    assert all(torch.equal(read_mask(out/'a'/f'{i:05d}.png'), m) for i, m in enumerate(want))
    with pytest.raises(ValueError, match='masks with radius = 3, not 4'): track_objects(Pixels(8), davis, out, short=None, radius=4)
    with pytest.raises(ValueError, match='masks with encoder = pixels'): track_objects('still', davis, out)
    with pytest.raises(ValueError, match='holds b, which was not made here'): track_objects('still', davis, davis/'DAVIS/Annotations/480p')
    assert track_objects('still', davis, davis/'plain', measure=False, tell='nothing').videos == {}
    assert torch.equal(read_mask(davis/'plain/a/00007.png'), film().mask(0))


def test_what_is_done_is_not_decoded_again(davis, monkeypatch):
    "And nothing is written where a file that is still needed cannot be read"
    seen, frame = [], Video.frame
    monkeypatch.setattr(Video, 'frame', lambda self, i: seen.append(self.name) or frame(self, i))
    broken = davis/'DAVIS/JPEGImages/480p/a/00004.jpg'
    whole, out = broken.read_bytes(), davis/'once'
    broken.write_bytes(whole[:len(whole)//2])
    with pytest.raises(ValueError, match='00004.jpg cannot be read'): track_objects('still', davis, out, tell='nothing')
    assert not out.exists()
    broken.write_bytes(whole)
    first = track_objects('still', davis, out, tell='nothing')
    (out/'a/00007.png').unlink()
    seen.clear()
    assert track_objects('still', davis, out, tell='nothing').asdict() == first.asdict() and set(seen) == {'a'}


def test_other_weights_are_another_encoder(tmp_path):
    make = lambda seed: torch.manual_seed(seed) and TokenEncoder('vit_tiny_patch16_224', img_size=64, p=16, embed_dim=12, depth=1, num_heads=1)
    track_objects(make(0), film(4), tmp_path, tell='nothing', short=None)
    track_objects(make(0), film(4), tmp_path, tell='nothing', short=None)
    with pytest.raises(ValueError, match='masks with encoder = vit_tiny'): track_objects(make(1), film(4), tmp_path, short=None)


def test_a_slider():
    v = film()
    shown = show_track(v, still(v), most=3)
    assert shown.labels == ['frame 0', 'frame 4', 'frame 7']
    x = overlay(v.frame(0), v.mask(0), 1)
    m = v.mask(0)
    assert torch.equal(x[:, m == 0], v.frame(0)[:, m == 0]) and (x[:, m == 1] == voc_colours(2)[1][:, None]).all()
