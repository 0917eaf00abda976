"A detector as a run: from files in COCO's format, joint, in mixed precision, stopped and gone on with, judged, asked about new images, by the command line."
import json, subprocess, sys
from pathlib import Path

import numpy as np, pytest
from PIL import Image
from safetensors.torch import load_file

from relvit.boxes import box_dls, open_boxes, shapes_set
from relvit.checkpoint import export_timm, load_encoder
from relvit.detection import Detect, detect_files, detect_learner, evaluate_detector, load_detector, usual_boxes
from relvit.plots import plt
from relvit.runs import Run
from relvit.shapes import SHAPES, make_shapes
from relvit.tokens import TokenEncoder
from relvit.training import Finetune, Pretrain, config_of, load_model, plan, settle
from relvit.transfer import TABLES, Transfer, configs, transfer, transfer_table

from stopped import StopAt, quietly, told

light = dict(encoder='vit_tiny_patch16_224', encoder_args=('embed_dim=24', 'depth=2', 'num_heads=2', 'drop_path_rate=.2'), img_size=32, p=8, width=16, anchors=4.,
             min_size=(48,), bs=4, epochs=2, device='cpu', every=1e9, recipe='scenes')


def write_coco(root, part, n, seed):
    "Scenes as COCO has them, the masks as run lengths"
    from pycocotools import mask
    images, targets = make_shapes(n, 48, seed)
    (root/part).mkdir(parents=True), (root/'annotations').mkdir(exist_ok=True)
    notes = []
    for i, (x, t) in enumerate(zip(images, targets)):
        Image.fromarray(x.permute(1, 2, 0).numpy()).save(root/part/f'{i}.png')
        for box, label, m in zip(t['boxes'].tolist(), t['labels'].tolist(), t['masks']):
            rle = mask.encode(np.asfortranarray(m.numpy().astype(np.uint8)))
            notes.append(dict(id=len(notes) + 1, image_id=i, category_id=10*label, iscrowd=0, area=int(m.sum()), bbox=[*box[:2], box[2] - box[0], box[3] - box[1]],
                              segmentation=dict(size=rle['size'], counts=rle['counts'].decode())))
    said = dict(images=[dict(id=i, file_name=f'{i}.png', height=48, width=48) for i in range(n)], annotations=notes,
                categories=[dict(id=10*(k + 1), name=name) for k, name in enumerate(SHAPES)])
    (root/f'annotations/instances_{part}.json').write_text(json.dumps(said))


@pytest.fixture(scope='module')
def coco(tmp_path_factory):
    there = tmp_path_factory.mktemp('coco')
    for part, n in ('train2017', 20), ('val2017', 6): write_coco(there, part, n, n)
    return there


@pytest.mark.parametrize('kind', ['mask', 'cascade'])
def test_a_run_goes_on_as_if_nothing_had_happened(kind, coco, tmp_path):
    "Joint training, mega-patches, accumulation, stopped within an epoch and at its border: equal to the bit"
    own = light | dict(data=str(coco), kind=kind, tasks=('relations=.5', 'positions'), mega=3, jitter=(.7, 1.), out=str(tmp_path), accumulate=2)
    whole = quietly(Detect(**own, name='whole'))
    assert whole.summary and {'map', 'map50', 'mask_map', 'relations_acc'} <= set(whole.metrics[-1]['valid'])
    assert {'classifier_loss', 'boxes_loss', 'masks_loss', 'objectness_loss', 'proposals_loss', 'relations_loss'} <= set(whole.metrics[-1]['train'])
    for name, at in dict(inside=(1, 1), border=(0, 3)).items():
        cut = quietly(Detect(**own, name=name), cbs=[StopAt(*at)])
        assert cut.stopped and not cut.summary
        done = quietly(resume=cut.path)
        assert told(done) == told(whole)
        for a, b in zip(load_model(done).state_dict().values(), load_model(whole).state_dict().values()): assert a.equal(b)


@pytest.fixture(scope='module')
def run(coco, tmp_path_factory):
    return quietly(Detect(**light, data=str(coco), out=str(tmp_path_factory.mktemp('runs')), name='found', amp=True))


def test_judged_and_put_to_use(run, coco, tmp_path):
    e = evaluate_detector(run)
    assert e.images == 6 and 0 <= e.scores['map'] <= e.scores['map50'] <= 1 and 0 <= e.beside['usual boxes, AP'] < .2
    assert json.loads((run.path/'evaluation-test-last.json').read_text())['scores'] == e.scores
    model = load_detector(run)
    assert model.vocab == list(SHAPES) and model.masks
    image = open_boxes(coco).test[0][0]
    d = model([image])[0]
    table = detect_files(run, coco/'val2017/0.png', threshold=0.)
    assert len(table) == max(len(d['boxes']), 1) and (not len(d['boxes']) or table.label[0] == SHAPES[d['labels'][0] - 1])
    (tmp_path/'bad.png').write_bytes(b'')
    assert detect_files(run, tmp_path).problem[0] and detect_files(run, coco/'val2017/0.png', threshold=1.).label.isna().all()
    with pytest.raises(FileNotFoundError, match='not there'): detect_files(run, tmp_path/'no.png')
    with pytest.raises(ValueError, match='threshold must be a score'): detect_files(run, tmp_path, threshold=50)
    args = export_timm(model, tmp_path/'home.safetensors').create().state_dict()
    assert all(v.equal(args[k]) for k, v in model.encoder.model.state_dict().items())


def test_weights_arrive_or_it_is_said(run, coco, tmp_path):
    "An encoder from any run or file; where nothing of it fits, an error"
    pre = quietly(Pretrain(data=str(coco/'train2017'), img_size=32, p=8, **{k: light[k] for k in ('encoder', 'encoder_args', 'device')}, epochs=1, bs=8, out=str(tmp_path), name='pre'))
    own = {k: v for k, v in light.items() if k not in ('encoder', 'encoder_args', 'img_size', 'p')}
    c = Detect(**own | dict(epochs=1), data=str(coco), init=str(pre.path), out=str(tmp_path), name='from')
    assert config_of(quietly(c)).encoder == 'vit_tiny_patch16_224'
    said = (tmp_path/'from/log.txt').read_text()
    assert 'tensors taken' in said and 'last.safetensors' in said
    learn = detect_learner(box_dls(open_boxes(coco), device='cpu'), load_encoder(pre.last), channels=16)
    for (n, a), b in zip(learn.model.encoder.state_dict().items(), load_encoder(pre.last).state_dict().values()): assert a.equal(b), n
    with pytest.raises(ValueError, match='no weight of the encoder fits'):
        from safetensors.torch import save_file
        save_file({f'teacher.{k}': v for k, v in TokenEncoder('vit_tiny_patch16_224', depth=1).state_dict().items()}, tmp_path/'ssl.safetensors')
        quietly(Detect(**light, data=str(coco), init=str(tmp_path/'ssl.safetensors'), out=str(tmp_path)))
    with pytest.raises(ValueError, match='init holds a vit_tiny'):
        settle(Detect(data=str(coco), init=str(pre.path), encoder='swin_tiny_patch4_window7_224'))
    fine = settle(Finetune.of(dict(init=str(run.path), data='digits'))) # back from a detector to labels
    assert fine.encoder == 'vit_tiny_patch16_224'


@pytest.mark.parametrize('bad,said', [
    (dict(tasks=('labels',)), 'relations of patches along'), (dict(tasks=('dino',)), 'relations of patches along'), (dict(mega=3), 'tasks names none'),
    (dict(kind='retina'), "kind must be 'mask' or 'faster' or 'cascade'"), (dict(min_size=(0,)), 'min_size is pixels above 0'), (dict(valid=1.), 'valid must be'),
    (dict(task_args=('relations.kind=qk',)), 'task_args are for relation tasks'), (dict(compile=True), 'compile is for'), (dict(width=0), 'width must be above 0'),
    (dict(jitter=(2., 3.)), 'jitter is two rising shares'), (dict(recipe='detct'), "did you mean 'detect'"), (dict(min_size=('a',)), 'min_size must be a list of numbers')])
def test_what_is_wrong_is_said(bad, said):
    with pytest.raises(ValueError, match=said): Detect(**bad)


def test_a_plain_run_and_averaged_weights(coco, tmp_path):
    "No relation task: nothing is said of a loss out of training; the mean of the weights is the one that is judged"
    run = quietly(Detect(**light, recipe_args=('ema=.5',), data=str(coco), out=str(tmp_path), name='plain'))
    assert run.metrics[-1]['valid']['loss'] is None and 'map' in repr(run)
    assert load_model(run).encoder.mean is not None and any(k.startswith('ema.module.roi_heads') for k in load_file(run.last))
    e = evaluate_detector(run, 'valid')
    assert e.scores['map'] == pytest.approx(run.metrics[-1]['valid']['map'], abs=1e-6)
    with pytest.raises(ValueError, match='data must name images'): settle(Detect(init=str(run.path)))


def test_places_hold_from_any_folder(coco, monkeypatch):
    "What a run was told of folders, it finds again when it goes on elsewhere"
    monkeypatch.chdir(coco)
    c = settle(Detect(**light, data='.', data_args=('images=train2017', 'drop_empty=true', 'images=nowhere')))
    assert c.data == str(coco) and c.data_args == (f'images={coco/"train2017"}', 'drop_empty=true', 'images=nowhere')


def test_a_plan_writes_nothing(coco, tmp_path):
    p = plan(Detect(**light, data=str(coco), out=str(tmp_path/'runs')))
    assert p.seconds > 0 and p.memory > 0 and p.heads > p.params and not (tmp_path/'runs').exists()


@pytest.mark.parametrize('encoder,args', [('swin_tiny_patch4_window7_224', ('embed_dim=12', 'depths=[1, 1, 1, 1]', 'num_heads=[1, 2, 3, 4]')), ('t2t_vit_7', ('depth=2',))])
def test_other_backbones_pretrain_and_detect(encoder, args, coco, tmp_path):
    "With permutation and mega-patches, then from that encoder; and joint"
    common = dict(device='cpu', epochs=1, steps=2, bs=2, out=str(tmp_path))
    pre = quietly(Pretrain(**common, data=str(coco/'train2017'), encoder=encoder, encoder_args=args, img_size=128, p=32, mega=3, name='pre'))
    assert 'relations_acc' in pre.metrics[0]['valid']
    small = dict(data=str(coco), width=16, anchors=4., min_size=(64,))
    run = quietly(Detect(**common, **small, init=str(pre.path), name='det'))
    assert 'map' in run.metrics[0]['valid']
    run = quietly(Detect(**common, **small, encoder=encoder, encoder_args=args, img_size=128, tasks=('relations', 'positions'), mega=3, name='joint'))
    assert 'relations_acc' in run.metrics[0]['valid']


def test_usual_boxes_are_where_objects_are():
    s = shapes_set(60, 48, 0)
    usual = usual_boxes(s, 3)
    assert len(usual) == 3*len(SHAPES) and sum(score for *_, score in usual) == pytest.approx(1)
    assert all(0 <= v <= 1 for _, box, _ in usual for v in box.tolist())


def test_the_learner_is_fastai_s(coco):
    "Methods of a plain Learner, and its pictures"
    s = open_boxes(coco)
    learn = detect_learner(box_dls(s, bs=4, device='cpu'), 'vit_tiny_patch16_224', 'faster', img_size=32, p=8, encoder_args=dict(embed_dim=24, depth=1, num_heads=2),
                           recipe='scenes', channels=16, min_size=None, seed=0)
    with learn.no_bar(), learn.no_logging():
        learn.fit_recipe(1)
        values = dict(zip(learn.recorder.metric_names[2:], learn.validate()))
    assert {'map', 'map50', 'map75'} <= set(values) and all(0 <= values[k] <= 1 for k in ('map', 'map50', 'map75'))
    assert len(learn.show_results(max_n=2).axes) >= 4
    plt.close('all')
    with pytest.raises(ValueError, match='mega'): detect_learner(learn.dls, learn.model.encoder, mega=3)


def test_rows_of_the_tables(coco, tmp_path):
    "Pretrained with permutation and mega-patches, joint, supervised: a row each, and the table"
    own = dict(data=str(coco), table='table3', row='coco', img_size=64, p=8, encoder_args=('embed_dim=24', 'depth=1', 'num_heads=2'), steps=1, epochs=1, pretrain_epochs=1, bs=2,
               pretrain_bs=2, width=16, min_size=(48,), anchors=4., device='cpu', runs=tmp_path/'runs', results=tmp_path/'results')
    for more in dict(permute=True, mega=True, side=3), dict(upstream=False), dict(method='supervised'):
        r = transfer(Transfer(**own, **more), tell='nothing')
        assert 0 <= r['scores']['map'] <= 1 and r['part'] == 'test' and r['images'] == 6
    assert transfer(Transfer(**own, method='supervised'), tell='nothing')['scores'] == r['scores'] # is done already
    table = transfer_table(tmp_path/'results')
    assert len(table) == 3 and set(table['printed mAP']) == {''} # what was printed is about another encoder
    pretrained = Run(next((tmp_path/'runs').glob('*-pretrain')))
    assert pretrained.data['parts']['trained on']['images'] >= 15 and not any('val2017' in str(v) for v in pretrained.data.values())
    listed = (tmp_path/'runs').glob('*-images.csv')
    assert all('train2017' in line for f in listed for line in f.read_text().splitlines()[1:]) # never what it is reported on
    pre, det = configs(Transfer(**own))
    assert pre.tasks == ('relations', 'positions') and det.init.endswith('pretrain/last.safetensors') and not det.tasks
    for rows in TABLES.values():
        for row in rows.values(): assert all(isinstance(k, tuple) and len(v) == 3 or k == 'supervised' for k, v in row.ap.items())


def test_the_command(coco, tmp_path):
    relvit = str(Path(sys.executable).parent/'relvit')
    def call(*args): return subprocess.run([relvit, *map(str, args)], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    tiny = ['--width', 16, '--min-size', 48, '--epochs', 1, '--steps', 2, '--bs', 2, '--device', 'cpu']
    line = ['detect', '--data', coco, '--format', 'coco', '--encoder', 'vit_tiny_patch16_224', '--encoder-args', 'embed_dim=24', 'depth=1', 'num_heads=2', *tiny]
    dry = call(*line, '--dry-run')
    assert dry.returncode == 0 and json.loads(dry.stdout)['data']['format'] == 'coco', dry.stderr
    done = call(*line, '--name', 'det')
    assert done.returncode == 0 and 'relvit evaluate runs/det' in done.stderr, done.stderr
    again = call('detect', '--data', coco, '--from', 'runs/det', *tiny, '--name', 'more')
    assert again.returncode == 0 and 'tensors taken' in again.stderr, again.stderr
    e = call('evaluate', 'runs/det')
    assert e.returncode == 0 and 'map50' in json.loads(e.stdout)['scores'], e.stderr
    found = call('predict', 'runs/det', coco/'val2017/0.png', '--threshold', .9)
    assert found.stdout.startswith('file,label,score,left,top,right,bottom,problem'), found.stderr
    assert call('export', 'runs/det', 'home.safetensors').returncode == 0 and (tmp_path/'home.safetensors').is_file()
    for args, said in ((['detect', '--data', tmp_path/'no'], 'no'), (['detect', '--data', coco, '--format', 'voc'], 'ImageSets'), (['detect', '--data', coco, '--from', 'runs/none'], 'runs/none'), (['detect', '--from', 'runs/det'], 'data must name'),
                       (['reproduce', 'table2', '--data', coco, '--row', 'swim'], 'swin'), (['reproduce', 'table4'], 'table3')):
        bad = call(*args)
        assert bad.returncode == 2 and said in bad.stderr and 'Traceback' not in bad.stderr, bad.stderr
