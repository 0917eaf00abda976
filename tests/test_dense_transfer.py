"SERE's and SelfPatch's tables as commands: every row has its configurations, and whole rows run on generated scenes."
import json, subprocess, sys
from dataclasses import replace

import numpy as np, pytest, tyro
from PIL import Image

from relvit.datasets import DATASETS
from relvit.dense_transfer import (JUDGES, SETTINGS, TABLES, DenseTransfer, configs, dense_transfer, dense_transfer_table, file_name,
                                   printed_dense, printed_for, top5)
from relvit.detection import Detect
from relvit.runs import Run
from relvit.segmentation import Segment
from relvit.shapes import SEEDS, make_video, shape_images
from relvit.training import Finetune, config_recipe, config_tasks

rows = [(table, row) for table, t in TABLES.items() for row in t.rows]


@pytest.fixture(autouse=True)
def few_scenes(monkeypatch):
    few = lambda root, side, download: {k: shape_images(n, side, SEEDS[k]) for k, n in dict(train=200, test=12).items()}
    monkeypatch.setattr('relvit.dense_transfer.make_video', lambda frames, seed: make_video(4, 32, seed))
    monkeypatch.setitem(DATASETS, 'shapes', replace(DATASETS['shapes'], read=few))


def tiny(tmp, **more):
    "A row in a few steps"
    return dict(data='shapes', encoder_args=('embed_dim=48', 'depth=1', 'num_heads=3'), img_size=32, p=8, pretrain_epochs=1, pretrain_steps=2, pretrain_bs=8,
                epochs=1, steps=2, bs=4, judge_args=('data_args={n: [8,4,4], size: 32}',), device='cpu', runs=tmp/'runs', results=tmp/'results') | more


@pytest.mark.parametrize('table, row', rows)
def test_every_row_has_its_configurations(table, row):
    "at the paper's size and on scenes, by each judge of its table; its tasks can be built"
    t = TABLES[table]
    setting = SETTINGS[t.rows[row].setting]
    assert t.judges[0] == DenseTransfer('images', row, table, judge_data='there').judge
    for judge in (*t.judges, 'shapes'):
        big = DenseTransfer('images', row, table, judge, None if judge == 'shapes' else 'there')
        cs, of = configs(big), JUDGES[judge].of
        assert len(cs) == bool(t.rows[row].tasks) + bool(of)
        if of: assert isinstance(cs[-1], of) and cs[-1].init == (f'runs/{cs[0].name}/last.safetensors' if len(cs) == 2 else None)
        if t.rows[row].tasks:
            assert cs[0].encoder == setting.encoder and (cs[0].img_size, cs[0].p) == (224, 16 if 'vit' in setting.encoder else None)
            assert set(config_tasks(cs[0])) == set(t.rows[row].tasks)
            small = configs(DenseTransfer('shapes', row, table, judge))
            assert config_recipe(small[0]).bs == 32 and small[0].name != cs[0].name and set(config_tasks(small[0])) == set(t.rows[row].tasks)
        printed = printed_for(big)
        assert (printed is not None) == (judge in t.rows[row].printed and t.rows[row].own and JUDGES[judge].comparable)
    for judge, numbers in t.rows[row].printed.items(): assert judge in t.judges and len(numbers) <= len(JUDGES[judge].measures)
    for judge in t.rows[row].gain: assert judge in t.judges


def test_the_settings_are_the_papers():
    def recipe(table, row, **more): return config_recipe(configs(DenseTransfer('images', row, table, judge_data='there', **more))[0])
    for table in ('sere-table1', 'sere-table2'):
        r = recipe(table, 'sere')
        assert (r.bs, r.epochs, r.locals, r.global_scale, r.local_scale, r.lr) == (512, 100, 4, (.35, 1), (.05, .35), 1e-3)
    for n in (4, 5, 6, 7, 8):
        for row in TABLES[f'sere-table{n}'].rows:
            if row == 'random': continue
            r = recipe(f'sere-table{n}', row)
            assert (r.bs, r.epochs, r.locals, r.global_scale, r.lr, r.final_lr, r.wd, r.final_wd) == (256, 100, 0, (.14, 1), 5e-4, 1e-6, .04, .4)
    r = recipe('sere-table3', 'sere')
    assert (r.bs, r.epochs, r.locals, r.lr, r.final_lr, r.wd) == (256, 100, 0, 1.5e-4, 0, .1)
    r = recipe('selfpatch-k', '8')
    assert (r.bs, r.epochs, r.locals, r.global_scale) == (1024, 200, 8, (.25, 1))
    judges = {j: configs(DenseTransfer('images', table=t, judge=j, judge_data='there'))[-1] for t, j in (
        ('sere-table1', 'voc'), ('sere-table1', 'ade20k'), ('sere-table1', 'coco'), ('sere-table2', 'labels'), ('sere-table2', 'imagenets'),
        ('selfpatch-table', 'coco-mask'), ('selfpatch-table', 'ade20k-fpn'))}
    assert [judges[j].epochs*judges[j].steps for j in ('voc', 'ade20k', 'ade20k-fpn')] == [20_000, 160_000, 40_000]
    by = {j: config_recipe(c) for j, c in judges.items()}
    assert round(by['voc'].warmup*20_000) == round(by['ade20k'].warmup*160_000) == round(by['ade20k-fpn'].warmup*40_000) == 1500
    assert [by[j].bs for j in judges] == [16, 16, 16, 512, 256, 8, 16] and [by[j].layer_decay for j in judges] == [.9, .9, .8, .65, .5, 1, 1]
    assert (by['coco'].lr, by['coco-mask'].lr, by['labels'].lr) == (1e-4, 5e-5, 1e-3) and (judges['coco'].kind, judges['coco-mask'].kind) == ('cascade', 'mask')


def test_steps_are_those_of_the_optimiser():
    "an accumulated batch makes as many steps as a whole one, unless the user counts them; the warm-up has 1,500 whatever is held out"
    for table, judge, n in (('sere-table1', 'voc', 20_000), ('sere-table1', 'ade20k', 160_000), ('selfpatch-table', 'ade20k-fpn', 40_000)):
        for more in (dict(), dict(bs=4, accumulate=4), dict(judge_args=('valid=.2',)), dict(accumulate=4, judge_args=('data_args={augmented: true}',))):
            c = configs(DenseTransfer('images', table=table, judge=judge, judge_data='there', **more))[-1]
            assert c.epochs*c.steps == n*c.accumulate and c.accumulate == more.get('accumulate', 1) and round(config_recipe(c).warmup*n) == 1500
        assert configs(DenseTransfer('images', table=table, judge=judge, judge_data='there', steps=7, accumulate=4))[-1].steps == 7


def test_semantic_fpn_reads_what_selfpatch_read():
    def read(row, **more):
        c = configs(DenseTransfer('images', row, 'selfpatch-table', 'ade20k-fpn', 'there', **more))[-1]
        return c.strides, c.layers
    blocks, chosen = ((16,)*4, (2, 5, 8, 11)), ((), ())
    assert [read(r) for r in ('dino', 'dino+selfpatch', 'moby', 'moby-swin')] == [blocks, blocks, blocks, chosen]
    for more in (dict(p=8), dict(encoder_args=('depth=6',)), dict(encoder='vit_large_patch16_224'), dict(encoder='vit_small_patch16_18x2_224')): assert read('dino', **more) == chosen
    assert read('dino', encoder='deit_tiny_patch16_224') == blocks
    c = configs(DenseTransfer('shapes', 'dino', 'selfpatch-table', 'ade20k-fpn'))[-1]
    assert (c.strides, c.layers) == chosen


def test_printed_only_for_the_papers_data():
    def printed(classes=None, row='p', table='sere-table6', judge='imagenets', **more): return printed_for(DenseTransfer('images', row, table, judge, 'there', **more), classes)
    assert printed(301) == printed() == [23.7, 69.1] and printed(51) is printed(920) is printed(301, valid=.2) is None
    assert printed(920, 'dino', 'sere-table2') == [35.1, 70.7] and printed(301, 'dino', 'sere-table2') is None
    assert printed(301, 'sere', 'sere-table3') and printed(301, 'sere', 'sere-table3', accumulate=4, bs=64, pretrain_bs=64) is None # a batch holds its negatives
    assert printed(21, judge='voc', judge_args=('data_args={augmented: true}',)) == printed(21, judge='voc') == [71.5, 83.0]
    assert printed(21, judge='voc', bs=4, pretrain_bs=64, accumulate=4) == [71.5, 83.0] and printed(21, judge='voc', bs=4, accumulate=4) is None
    for other in ('valid=.2', 'accumulate=2', 'data_args={augmented: true, train: trainval}'): assert printed(21, judge='voc', judge_args=(other,)) is None
    assert printed(judge='imagenets', judge_args=('data_args={augmented: true}',)) is None
    for row, judge, n in (('dino', 'ade20k', 150), ('dino', 'coco', 80)):
        assert printed(n, row, 'sere-table1', judge) and printed(n + 1, row, 'sere-table1', judge) is None


def test_what_was_printed():
    table = printed_dense()
    assert len(table) == len(rows)
    one = lambda t, r, j: table[(table.table == t) & (table.row == r)][j].item()
    assert one('sere-table6', 'p', 'voc') == '71.5 / 83.0' and one('sere-table4', 'sere', 'difference') == '0.154 / 0.82'
    assert one('sere-table1', 'dino', 'coco') == '46.0 / 64.9 / 49.7 / 40.0 / 62.0 / 42.8' and one('selfpatch-table', 'dino', 'coco-mask') == '40.8 / – / – / 37.3'
    assert one('selfpatch-table', 'moby+selfpatch', 'davis') == '+4.8' and one('selfpatch-table', 'moby', 'davis') == ''
    unknown = [t for t in TABLES if t.startswith('selfpatch-') and t != 'selfpatch-table']
    assert len(unknown) == 3 and not any(r.printed or r.gain for t in unknown for r in TABLES[t].rows.values())


def test_the_same_pretraining_is_one_run():
    name = lambda *a, **k: DenseTransfer('images', *a, judge_data='there', **k).pretrained
    whole = {name(r, f'sere-table{n}') for n, r in ((4, 'sere'), (5, 'asymmetric'), (6, 'Ipc'), (7, '6'), (8, '.5,.1'))}
    assert len(whole) == 1 and len({name(r, f'selfpatch-{t}') for t, r in (('table', 'dino+selfpatch'), ('neighbours', '3'), ('k', '4'), ('aggregation', 'attention'))}) == 1
    assert len({name('p', judge=j) for j in ('imagenets', 'voc')} | {name('p', epochs=3, recipe_args=('lr=.1',))}) == 1 # nothing of who judges
    others = [name('p'), name('p', seed=1), name('p', pretrain_epochs=3), name('p', task_args=('pixel.heads=3',)), name('c'), name('I', 'sere-table6'),
              name('dino', 'sere-table1'), name('dino', 'selfpatch-table')]
    assert len(set(others)) == len(others)
    judged = [DenseTransfer('images', 'p', judge_data='there', **k).judged for k in (dict(), dict(judge='voc'), dict(bs=3), dict(freeze=True), dict(judge='shapes') | dict(judge_data=None))
              if k.pop('judge_data', 0) is not None]
    assert len(set(judged)) == len(judged)
    assert len(file_name('x'*400)) <= 160 and file_name('x'*400) != file_name('x'*401) and '/' not in file_name('a/b{c: 1}')


def test_rows_on_scenes(tmp_path):
    "random, a relation alone, MoCo v3 with both; another judge of the same encoder; seeds are one line"
    made = {r: dense_transfer(DenseTransfer(row=r, **tiny(tmp_path)), tell='nothing') for r in ('random', 'p')}
    for r in made.values(): assert r['printed'] is None and 0 <= r['scores']['miou'] <= 1 and r['images'] == 4 and r['part'] == 'test'
    assert [len(r['steps']) for r in made.values()] == [1, 2] and made['p']['task_args'] == ('pixel.heads=6',)
    again = dense_transfer(DenseTransfer(row='p', **tiny(tmp_path)), tell='nothing')
    assert again['scores'] == made['p']['scores'] # nothing is trained twice
    other = json.dumps(made['p'] | dict(seed=1, scores={k: v/2 for k, v in made['p']['scores'].items()}, beside={k: 0. for k in made['p']['beside']}))
    (tmp_path/'results'/f"{DenseTransfer(row='p', seed=1, **tiny(tmp_path)).name}.json").write_text(other) # as another seed would leave it
    frozen = DenseTransfer(row='p', freeze=True, **tiny(tmp_path))
    dense_transfer(frozen, tell='nothing')
    modes = [Run(p).config['mode'] for p in (tmp_path/'runs').iterdir()]
    assert (modes.count('pretrain'), modes.count('segment')) == (1, 3) and Run(tmp_path/'runs'/frozen.judged).config['freeze']
    three = dense_transfer(DenseTransfer(row='sere', table='sere-table3', **tiny(tmp_path, encoder_args=('embed_dim=48', 'depth=1'))), tell='nothing')
    assert three['tasks'] == ('moco3', 'pixel', 'channel') and 'num_heads=12' in three['encoder']
    lines = dense_transfer_table(tmp_path/'results')
    assert len(lines) == 4 and sorted(lines.seeds) == [1, 1, 1, 2] and set(lines.printed) == {''} and '±' in lines.ours[lines.seeds == 2].item()
    k, v = next(iter(made['p']['beside'].items())) # beside is averaged as well
    assert f'{k} {50*v:.2f} ± ' in lines.beside[lines.seeds == 2].item()
    assert list(lines.row)[0].startswith('sere-table3') and list(lines.row)[1] == 'sere-table6 random on shapes'
    with pytest.raises(FileNotFoundError, match='relvit reproduce sere-table6'): dense_transfer_table(tmp_path/'none')
    assert all(json.loads(f.read_text())['table'].startswith('sere') for f in (tmp_path/'results').iterdir())


@pytest.mark.parametrize('table, row, judge, more', [
    ('sere-table4', 'dino', 'difference', {}), ('selfpatch-table', 'dino+selfpatch', 'davis', {}), ('sere-table2', 'dino', 'labels', dict(judge_args=())),
    ('sere-table1', 'dino', 'coco', dict(judge_args=('data_args={n: [4,2,2], size: 32}', 'width=16'), bs=2)),
    ('selfpatch-neighbours', 'all', 'ade20k-fpn', dict(judge_args=('data_args={n: [8,4,4], size: 32}', 'width=16')))])
def test_every_kind_of_judge(table, row, judge, more, tmp_path):
    "nothing trained, labels, boxes, a pyramid: on scenes"
    own = tiny(tmp_path, table=table, row=row, judge=judge, task_args=tuple(f'{t}.{a}' for t in TABLES[table].rows[row].tasks if t in ('dino', 'selfpatch')
                                                                            for a in ('out=32', 'hidden=16', 'bottleneck=8')), **more)
    t = DenseTransfer(**own)
    r = dense_transfer(t, tell='nothing')
    assert len(r['steps']) == 1 + bool(JUDGES[judge].of) and all(k in r['scores'] for k in list(JUDGES[judge].measures.values())[:2]) and r['beside']
    line, = dense_transfer_table(tmp_path/'results').to_dict('records')
    assert all(f'{k} {v*JUDGES[judge].scale:.2f}' in line['beside'] for k, v in r['beside'].items())
    assert line['measures'].startswith(next(iter(JUDGES[judge].measures))) and line['printed'] == ''
    assert r['scores'] == dense_transfer(t, tell='nothing')['scores']


def test_photos_in_folders(tmp_path):
    "ImageNet-S in its folders: pretrained on, judged by, and asked for its views; a judge's data is looked at before anything is trained"
    rng, home = np.random.default_rng(0), tmp_path/'ImageNetS2'
    for part, n in dict(train=6, **{'train-semi': 4}, validation=2).items():
        for k, wnid in enumerate(('n01443537', 'n01484850')):
            for i in range(n):
                f = home/part/wnid/f'{wnid}_{i}.JPEG'
                f.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(rng.integers(0, 256, (40, 48, 3), dtype=np.uint8)).save(f, 'JPEG')
                if part == 'train': continue
                mask = np.zeros((40, 48, 3), np.uint8)
                mask[8:20, 8:30, 0] = k + 1
                at = home/f'{part}-segmentation'/wnid/f'{wnid}_{i}.png'
                at.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(mask).save(at)
    own = tiny(tmp_path, data=str(home), valid=.2, judge_args=('crop=32', 'short=32', 'valid=.3'), encoder='vit_tiny_patch16_224')
    r = dense_transfer(DenseTransfer(row='p', **own), tell='nothing')
    assert r['data'] == ['ImageNetS2', 'ImageNetS2'] and r['images'] == 4 and r['printed'] is None and 'fmeasure' in r['scores']
    r = dense_transfer(DenseTransfer(table='sere-table4', row='dino', **own | dict(task_args=('dino.out=32', 'dino.hidden=16', 'dino.bottleneck=8'), judge_args=())), tell='nothing')
    assert r['images'] == 4 and all(0 < v < 2 for v in r['scores'].values())
    for judge, of in (('voc', 'voc'), ('imagenets', 'imagenets')):
        with pytest.raises((ValueError, FileNotFoundError), match='empty|holds none of'):
            (tmp_path/'empty').mkdir(exist_ok=True)
            dense_transfer(DenseTransfer(row='c', **own | dict(judge=judge, judge_data=str(tmp_path/'empty'))), tell='nothing')
    assert not any('channel' in p.name for p in (tmp_path/'runs').iterdir()) # not even begun
    (home/'train').rename(tmp_path/'photos')
    for data in (home, tmp_path): # the folder itself, and the one that holds it
        with pytest.raises(ValueError, match='masks but no folder train'): DenseTransfer(row='c', **own | dict(data=str(data)))
    DenseTransfer(row='random', **own)
    DenseTransfer(row='c', **own | dict(data=str(tmp_path/'photos'), judge_data=str(home)))


def test_two_processes_judge_once(tmp_path):
    "both train, the first one judges and writes, both hear of it; and again when nothing is left to train"
    script = tmp_path/'both.py'
    script.write_text('''
import json, os, sys
import relvit.dense_transfer as d
from pathlib import Path
here, judge, rank = Path(sys.argv[1]), d._trained, os.environ['RANK']
def judged(*args):
    with open(here/'judged.txt', 'a') as f: f.write(rank)
    return judge(*args)
d._trained = judged
t = d.DenseTransfer('shapes', 'random', encoder_args=('embed_dim=48', 'depth=1', 'num_heads=3'), img_size=32, p=8, epochs=1, steps=2, bs=4,
                    judge_args=('data_args={n: [8,4,4], size: 32}',), device='cpu', runs=here/'runs', results=here/'results')
for i in range(2): (here/f'{rank}{i}.json').write_text(json.dumps(d.dense_transfer(t, tell='nothing')['scores']))
''')
    two = [sys.executable, '-W', 'ignore', '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2', str(script), str(tmp_path)]
    done = subprocess.run(two, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    heard = [json.loads((tmp_path/f'{rank}{i}.json').read_text()) for rank in '01' for i in range(2)]
    assert heard[0] and all(h == heard[0] for h in heard) and (tmp_path/'judged.txt').read_text() == '00'
    assert len(list((tmp_path/'results').iterdir())) == 1


def test_a_judge_of_another_device(tmp_path):
    "top-5 of a run whose device is not here"
    own = tiny(tmp_path, table='sere-table2', row='dino', judge='labels', judge_args=(), task_args=('dino.out=32', 'dino.hidden=16', 'dino.bottleneck=8'))
    r = dense_transfer(DenseTransfer(**own), tell='nothing')
    path = tmp_path/'runs'/DenseTransfer(**own).judged
    c = json.loads((path/'config.json').read_text())
    (path/'config.json').write_text(json.dumps(c | dict(device='cuda:7')))
    assert top5(Run(path)) == r['scores']['top5']


def test_what_cannot_be():
    for t, said in ((dict(judge='davis'), 'no judge of sere-table6'), (dict(row='random', judge='imagenets', judge_data='x', freeze=True), None),
                    (dict(table='sere-table1', judge='coco', judge_data='x', freeze=True), 'always trains its encoder along'),
                    (dict(table='sere-table4', freeze=True), 'trains no head'), (dict(pretrain_recipe_args=('locls=2',)), "did you mean 'locals'"),
                    (dict(judge='shapes', judge_data='x'), 'judge_data cannot be x'), (dict(encoder_args=('depth',)), 'encoder_args are written like'),
                    (dict(row='p', task_args=('pixel.haeds=3',)), "did you mean 'heads'"), (dict(epochs=0), 'epochs must be above 0')):
        if said is None: DenseTransfer('images', **t)
        else:
            with pytest.raises(ValueError, match=said): DenseTransfer('images', **t)


def test_as_flags():
    t = tyro.cli(DenseTransfer, args='--table sere-table8 --data shapes --row .5,.01 --seed 2 --pretrain-epochs 3 --task-args dino.out=64'.split())
    assert (t.row, t.judge, t.seed) == ('.5,.01', 'shapes', 2) and 'channel.teacher_temp=.01' in configs(t)[0].task_args and 'dino.out=64' in configs(t)[0].task_args
    assert {j.of for j in JUDGES.values()} == {None, Segment, Detect, Finetune}
