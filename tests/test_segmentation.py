"A segmenter as a run: from files in VOC's format, in mixed precision, frozen, stopped and gone on with, judged, asked about new images, by the command line."
import json, os, subprocess, sys
from pathlib import Path

import numpy as np, pytest, torch
from fastai.callback.core import Callback
from PIL import Image

from relvit.checkpoint import export_timm, load_encoder
from relvit.label_maps import IGNORE, MapSplits, open_maps, shapes_maps, voc_colours
from relvit.plots import plt
from relvit.recipes import get_recipe
from relvit.segment import Overlap
from relvit.segmentation import Segment, cut_window, evaluate_segmenter, judge_usual, load_segmenter, map_dls, scale_windows, segment_files, segment_learner
from relvit.tokens import TokenEncoder
from relvit.training import Finetune, Pretrain, config_of, load_model, make_learner, plan, settle

from stopped import StopAt, quietly, told

light = dict(encoder='vit_tiny_patch16_224', encoder_args=('embed_dim=24', 'depth=2', 'num_heads=2', 'drop_path_rate=.2'), img_size=32, p=8,
             bs=4, epochs=2, device='cpu', every=1e9, recipe='scenes', crop=32, short=40)


@pytest.fixture(scope='module')
def voc(tmp_path_factory):
    "Scenes as VOC has them: palette masks, a border of no class around them"
    root = tmp_path_factory.mktemp('voc')/'VOC2012'
    for d in 'JPEGImages', 'SegmentationClass', 'ImageSets/Segmentation': (root/d).mkdir(parents=True)
    for part, n in ('train', 20), ('val', 6):
        ids, ds = [f'{part}_{i}' for i in range(n)], shapes_maps(n, 48, n)
        (root/f'ImageSets/Segmentation/{part}.txt').write_text('\n'.join(ids))
        for name, i in zip(ids, range(n)):
            x, m = ds[i]
            m[0] = 255
            Image.fromarray(x.permute(1, 2, 0).numpy()).save(root/f'JPEGImages/{name}.jpg', quality=95)
            im = Image.fromarray(m.byte().numpy())
            im.putpalette(voc_colours(256).flatten().tolist())
            im.save(root/f'SegmentationClass/{name}.png')
    return root


@pytest.mark.parametrize('kind,more', [('linear', dict(accumulate=2)), ('uper', dict(width=16, recipe_args=('layer_decay=.5', 'ema=.5')))])
def test_a_run_goes_on_as_if_nothing_had_happened(kind, more, voc, tmp_path):
    "Accumulation, layer decay and averaged weights, stopped within an epoch and at its border: equal to the bit"
    own = light | dict(data=str(voc), kind=kind, out=str(tmp_path)) | more
    whole = quietly(Segment(**own, name='whole'))
    assert whole.summary and {'miou', 'macc', 'pixel_acc', 'fmeasure'} <= set(whole.metrics[-1]['valid']) and whole.metrics[-1]['valid']['loss'] is None
    assert ('aux_loss' in whole.metrics[-1]['train']) == (kind == 'uper') and 'segment_loss' not in whole.metrics[-1]['valid']
    for name, at in dict(inside=(1, 1), border=(0, 3)).items():
        cut = quietly(Segment(**own, name=name), cbs=[StopAt(*at)])
        assert cut.stopped and not cut.summary
        done = quietly(resume=cut.path)
        assert told(done) == told(whole)
        for a, b in zip(load_model(done).state_dict().values(), load_model(whole).state_dict().values()): assert a.equal(b)


@pytest.fixture(scope='module')
def run(voc, tmp_path_factory):
    return quietly(Segment(**light, data=str(voc), kind='fpn', width=16, out=str(tmp_path_factory.mktemp('runs')), name='found'))


def test_judged_and_put_to_use(run, voc, tmp_path):
    assert 0 < run.metrics[-1]['chance']['miou'] < .4 and 'miou' in repr(run)
    e = evaluate_segmenter(run)
    assert e.images == 6 and 0 <= e.scores['miou'] <= 1 and set(e.beside) == {'most frequent class, mIoU', 'most frequent class at each place, mIoU'}
    assert json.loads((run.path/'evaluation-test-last.json').read_text())['scores'] == e.scores
    model, test = load_segmenter(run), open_maps(voc).test
    assert model.vocab[0] == 'background' and model.palette.equal(voc_colours(21)) and model.background == 0
    judge = Overlap(model.vocab, 0)
    for x, m in test: judge.add(model.segment([x], short=40, long=2048), [m])
    assert judge.result().miou == pytest.approx(e.scores['miou'], abs=1e-6)
    table = segment_files(run, [voc/'JPEGImages/val_0.jpg', voc/'JPEGImages/val_1.jpg'], tmp_path/'maps')
    assert len(table) == 2 and not table.problem.any()
    with Image.open(table['map'][0]) as im:
        assert im.mode == 'P' and im.getpalette()[:63] == voc_colours(21).flatten().tolist()
        assert np.array_equal(np.array(im), model.segment([test[0][0]], short=40, long=2048)[0].numpy())
    with pytest.raises(FileNotFoundError, match='not there'): segment_files(run, tmp_path/'no.png')
    args = export_timm(model, tmp_path/'home.safetensors').create().state_dict()
    assert all(v.equal(args[k]) for k, v in model.encoder.model.state_dict().items())


def test_a_frozen_encoder_stays(voc, tmp_path):
    "And one that was pretrained arrives; data comes with the run only where it is said"
    pre = quietly(Pretrain(data=str(voc/'JPEGImages'), **{k: light[k] for k in ('encoder', 'encoder_args', 'device', 'img_size', 'p')}, epochs=1, bs=8, out=str(tmp_path), name='pre'))
    own = {k: v for k, v in light.items() if k not in ('encoder', 'encoder_args', 'img_size', 'p')}
    run = quietly(Segment(**own, data=str(voc), init=str(pre.path), freeze=True, see_positions=False, out=str(tmp_path), name='frozen'))
    assert 'tensors taken' in (tmp_path/'frozen/log.txt').read_text() and not config_of(run).see_positions
    model = load_segmenter(run)
    for (n, a), b in zip(model.encoder.state_dict().items(), load_encoder(pre.last).state_dict().values()): assert a.equal(b), n
    assert model.pos_embed is False
    with pytest.raises(ValueError, match='data must name images with class maps'): settle(Segment(init=str(pre.path)))
    assert settle(Finetune.of(dict(init=str(run.path), data='digits'))).encoder == 'vit_tiny_patch16_224'


@pytest.mark.parametrize('bad,said', [
    (dict(kind='deeplab'), "kind must be 'linear' or 'fpn' or 'uper'"), (dict(scales=(.5,)), 'scales is two rising'), (dict(scales=(.5, 2.), window='share'), 'a share of the area'),
    (dict(width=8), 'a linear head has none'), (dict(compile=True), 'compile is for'), (dict(crop=0), 'crop must be above 0'), (dict(recipe='upper'), "did you mean 'uper'"),
    (dict(infer='windows'), "infer must be 'whole' or 'slide'"), (dict(valid=0.), 'valid must be')])
def test_what_is_wrong_is_said(bad, said):
    with pytest.raises(ValueError, match=said): Segment(**bad)


@pytest.mark.parametrize('encoder,args', [('swin_tiny_patch4_window7_224', ('embed_dim=12', 'depths=[1, 1, 1, 1]', 'num_heads=[1, 2, 3, 4]')), ('t2t_vit_7', ('depth=2',))])
@pytest.mark.parametrize('kind', ['linear', 'fpn', 'uper'])
def test_other_backbones(encoder, args, kind, voc, tmp_path):
    width = {} if kind == 'linear' else dict(width=8)
    run = quietly(Segment(data=str(voc), encoder=encoder, encoder_args=args, kind=kind, crop=64, short=48, epochs=1, steps=1, bs=2, device='cpu', out=str(tmp_path), name='other', amp=True, **width))
    assert 'miou' in run.metrics[0]['valid']


def test_layers_learn_slower_towards_the_pixels(voc):
    "Layer decay through timm: .5 a layer, the head at the full rate"
    dls = map_dls(open_maps(voc), bs=4, size=32, steps=2, device='cpu')
    learn = segment_learner(dls, TokenEncoder('vit_tiny_patch16_224', img_size=32, p=8, embed_dim=24, depth=2, num_heads=2), recipe=get_recipe('imagenets').but(warmup=0.))
    rates = []
    class See(Callback):
        def after_step(self): rates.append([h['lr'] for h in self.learn.opt.hypers])
    with learn.no_bar(), learn.no_logging(): learn.fit_recipe(1, cbs=See())
    last = rates[-1]
    assert np.allclose(np.divide(last[1:], last[:-1]), 2) and len(last) == 4 # embedding, two blocks, head


@pytest.mark.parametrize('line,recipe', [(('--kind', 'uper', '--width', 16), 'uper'), (('--kind', 'fpn', '--width', 16), 'semfpn'), ((), 'uper'), (('--format', 'shapes', '--data', 'shapes'), 'scenes')])
def test_a_recipe_is_chosen_where_the_data_is_known(line, recipe, voc, tmp_path):
    "Also by the command line, whose defaults are made before its options are read"
    small = [v for k in ('encoder', 'encoder_args', 'img_size', 'p', 'crop', 'device') for v in (f'--{k.replace("_", "-")}', *np.atleast_1d(light[k]).tolist())]
    code, out, err = relvit('segment', '--data', voc, *small, '--bs', 2, '--dry-run', *line, cwd=tmp_path)
    assert code == 0 and json.loads(out)['config']['recipe'] == recipe, err
    assert Segment(data=str(voc)).but(kind='fpn').usual == 'semfpn' and Segment(data='x', format='imagenets').usual == 'imagenets'


def test_what_cannot_go_together_is_said(voc):
    with pytest.raises(ValueError, match='a folder of that name'): make_learner(Segment(data='shapes', format='voc'))
    with pytest.raises(ValueError, match='bs must be 2 or more'): make_learner(Segment(**light | dict(bs=1), data=str(voc), kind='uper', width=8))


def test_recipes_of_labels_are_refused(voc):
    with pytest.raises(ValueError, match='mixup, cutmix, smoothing, erase, policy'): make_learner(Segment(**light | dict(recipe='modern'), data=str(voc)))


def test_what_a_window_shows():
    "Scales are of the short side; no class fills a window where there is another place; outside there is none"
    image, m = torch.zeros(3, 60, 90, dtype=torch.uint8), torch.zeros(60, 90, dtype=torch.int64)
    m[:, 45:] = 1
    s = MapSplits(ds := shapes_maps(4, 64), ds, ds)
    s.format = 'shapes'
    x, maps = map_dls(s, bs=4, window='scale', scale=(.25, .25), device='cpu').train.one_batch()
    inside = (maps != IGNORE).float().mean((1, 2))
    assert torch.allclose(inside, torch.full((4,), 1/16), atol=.01)
    for top, left, h, w in list(scale_windows([1., *[.999]*20], 60, 90, 30, 60, ratio=(1., 1.))): assert 0 <= top <= 30 and 0 <= left <= 60 and h == w == 30
    got, classes = cut_window(image, m, 0, 0, 60, 90, 30, torch.zeros(3, dtype=torch.uint8))
    assert got.shape == (3, 30, 30) and (classes[:, :15] == 0).all() and (classes[:, 15:] == 1).all()


def test_the_usual_map_is_no_worse_than_one_class():
    a, b = shapes_maps(40, 48, 0), shapes_maps(10, 48, 2)
    found = judge_usual(a, b)
    assert found['most frequent class'].miou == pytest.approx(found['most frequent class'].pixel_acc/len(a.vocab), abs=1e-6)


def test_the_learner_is_fastai_s(voc):
    learn = make_learner(Segment(**light, data=str(voc)))
    learn.show_results(max_n=2)
    learn.dls.train.show_batch(2)
    plt.close('all')
    with learn.no_bar(), learn.no_logging(): values = learn.validate()
    assert dict(zip(learn.recorder.metric_names[2:], values))['miou'] == pytest.approx(float(learn.judge_maps.judged.miou))


def test_a_plan_writes_nothing(voc, tmp_path):
    p = plan(Segment(**light, data=str(voc), out=str(tmp_path/'runs')))
    assert p.seconds > 0 and p.memory > 0 and not (tmp_path/'runs').exists()


def relvit(*line, cwd=None):
    r = subprocess.run([Path(sys.executable).parent/'relvit', *map(str, line)], capture_output=True, text=True, cwd=cwd, env=os.environ | dict(OMP_NUM_THREADS='1'))
    return r.returncode, r.stdout, r.stderr


def test_by_the_command_line(voc, tmp_path):
    "segment, evaluate, predict, track-objects"
    code, out, err = relvit('segment', '--data', voc, '--encoder', light['encoder'], '--encoder-args', *light['encoder_args'], '--img-size', 32, '--p', 8, '--crop', 32, '--short', 40,
                            '--recipe', 'scenes', '--epochs', 1, '--steps', 2, '--bs', 4, '--device', 'cpu', '--name', 'seg', cwd=tmp_path)
    assert code == 0, err
    code, out, err = relvit('evaluate', 'seg', cwd=tmp_path)
    assert code == 0 and 0 <= json.loads(out)['scores']['miou'] <= 1, err
    code, out, err = relvit('predict', 'seg', voc/'JPEGImages/val_0.jpg', '--out', tmp_path/'maps', cwd=tmp_path)
    assert code == 0 and (tmp_path/'maps/val_0.png').is_file() and (tmp_path/'maps/maps.csv').is_file(), err
    frames = tmp_path/'frames'
    frames.mkdir()
    for i in range(3): os.link(voc/'JPEGImages/val_0.jpg', frames/f'{i:05d}.jpg')
    m = np.zeros((48, 48), dtype=np.uint8)
    m[10:30, 10:30] = 1
    Image.fromarray(m).save(tmp_path/'first.png')
    code, out, err = relvit('track-objects', 'seg', frames, '--mask', tmp_path/'first.png', '--out', tmp_path/'masks', '--short', 48, cwd=tmp_path)
    assert code == 0 and len(list((tmp_path/'masks').rglob('0000*.png'))) == 3, err
    for line, said in {('segment', '--data', tmp_path/'frames'): 'holds', ('track-objects', 'nobody/there', frames): 'there is no nobody/there',
                       ('track-objects', 'still', frames, '--mask', tmp_path/'first.png'): '--out', ('reproduce', 'sere-table9'): 'sere-table'}.items():
        code, out, err = relvit(*line, cwd=tmp_path)
        assert code == 2 and said in err, (line, err)
