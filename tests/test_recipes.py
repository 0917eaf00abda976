"What a recipe promises: the same numbers twice, averaged weights that count, one rate a layer, one run on two devices."
import json, os, signal, subprocess, sys, time
from dataclasses import replace
from pathlib import Path

import pytest, torch
from fastai.callback.core import Callback
from safetensors.torch import load_file
from scipy.io import savemat

from relvit import recipes
from relvit.callbacks import AugmentPatches, MegaPatches, PatchRelations
from relvit.checkpoint import export_timm, load, load_encoder, save
from relvit.cli import main
from relvit.data import digits_dls
from relvit.datasets import digits
from relvit.learner import finetune_learner, pretrain_learner
from relvit.recipes import RECIPES
from relvit.reproduce import METHODS, TABLE1, Reproduction, stage, compare_rows, reproduce
from relvit.runs import Run
from relvit.training import Finetune, Joint, Pretrain, change_recipe, load_model, make_learner, recipe_of, settle

from stopped import quietly, told

tiny = dict(encoder='vit_tiny_patch16_224', encoder_args=('embed_dim=24', 'depth=2', 'num_heads=2'), bs=32, epochs=2, steps=4, device='cpu')
vit = dict(p=4, embed_dim=24, depth=2, num_heads=2)


class Halt(Callback):
    "Presses Ctrl-C once, at the third training step"
    order = 90
    def after_batch(self): self.learn.training and self.learn.train_iter == 3 and os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize('kind, recipe', [(Pretrain, 'modern'), (Finetune, 'modern'), *((Joint, r) for r in RECIPES)])
def test_a_seed_gives_the_same_numbers_twice(kind, recipe, tmp_path):
    a, b, c = (quietly(kind(**tiny, recipe=recipe, seed=s, out=str(tmp_path), name=f'{i}')) for i, s in enumerate((1, 1, 2)))
    assert told(a) == told(b) != told(c)
    assert a.recipe['name'] == recipe and a.recipe['version'] == RECIPES[recipe].version


def test_the_averaged_weights_count(tmp_path):
    "in validation, in what is loaded, exported, and started from; the raw ones are there to go on with"
    run = quietly(Finetune(**tiny, recipe='modern', recipe_args=('ema=.5',), out=str(tmp_path), name='a'))
    held, name = load_file(run.last), 'encoder.model.blocks.0.mlp.fc1.weight'
    mean, raw = held[f'ema.module.{name}'], held[name]
    assert not mean.equal(raw)
    model = load_model(run)
    assert model.state_dict()[name].equal(mean) and model.ema is None
    assert load_encoder(run.last).state_dict()[name.removeprefix('encoder.')].equal(mean)
    export = export_timm(model, tmp_path/'w.safetensors')
    assert load_file(export.path)['blocks.0.mlp.fc1.weight'].equal(mean)
    further = make_learner(Pretrain(init=str(run.path), device='cpu', recipe='default'))
    assert further.model.state_dict()[name].equal(mean)
    learn = finetune_learner(digits_dls(bs=32, steps=3, device='cpu'), 'vit_tiny_patch16_224', recipe=RECIPES['modern'].but(ema=.5), seed=0, **vit)
    with learn.no_bar(), learn.no_logging(): learn.fit_recipe(1)
    export_timm(learn, tmp_path/'v.safetensors')
    assert load_file(tmp_path/'v.safetensors')['blocks.0.mlp.fc1.weight'].equal(learn.model.averaged.state_dict()[name])


def test_a_run_keeps_the_recipe_it_began_with(tmp_path, monkeypatch):
    c = Finetune(**tiny, recipe='modern', accumulate=2, out=str(tmp_path))
    whole, cut = quietly(c.but(name='whole')), quietly(c.but(name='cut'), cbs=[Halt()])
    monkeypatch.setitem(recipes.RECIPES, 'modern', replace(RECIPES['modern'], version=2, lr=.5, mixup=0.))
    done = quietly(resume=cut.path)
    assert done.recipe['version'] == 1 and told(whole) == told(done)


def test_each_layer_learns_at_its_rate():
    learn = finetune_learner(digits_dls(bs=32, steps=2, device='cpu'), 'vit_tiny_patch16_224', recipe=RECIPES['default'].but(layer_decay=.5), seed=0, **vit)
    seen = []
    class Note(Callback):
        def before_step(self): seen.append([h['lr'] for h in self.learn.opt.hypers])
    with learn.no_bar(), learn.no_logging(): learn.fit_recipe(1, cbs=Note())
    for rates in seen: assert rates == pytest.approx([rates[-1]*.5**d for d in (3, 2, 1, 0)])
    assert seen[1][-1] == pytest.approx(learn.recipe.lr_at(.5))


def test_reference_is_the_code_as_it_is_and_paper_is_not():
    made = {}
    for name in ('reference', 'paper'):
        c = settle(Joint(recipe=name, encoder='vit_tiny_patch16_224', encoder_args=('depth=1',), device='cpu'))
        learn = make_learner(settle(Pretrain(recipe=name, encoder='vit_tiny_patch16_224', encoder_args=('depth=1',), device='cpu', mega=3)))
        cbs = {type(cb): cb for cb in learn.cbs}
        made[name] = dict(splits=c.splits, leak=c.leak, bs=c.bs, epochs=c.epochs, cuts=cbs[MegaPatches].same_cuts,
                          stats=bool(cbs[AugmentPatches].augment.stats), decay=learn.recipe.decay_all, flip=c.flip, smooth=cbs[MegaPatches].antialias, lr=learn.recipe.lr_at(.5))
    assert made['reference'] == dict(splits='reference', leak='paper', bs=256, epochs=100, cuts=True, stats=True, decay=True, flip=True, smooth=False, lr=pytest.approx(3.5392e-4, rel=1e-3))
    assert made['paper'] == dict(splits='held-out', leak=None, bs=256, epochs=100, cuts=False, stats=False, decay=False, flip=None, smooth=True, lr=pytest.approx(2.95e-4, rel=1e-2))


def test_a_sample_of_pairs_is_a_fair_one():
    "the mean loss of many samples is the loss of all pairs, where the diagonal (a larger share of a sample) does not count"
    learn = pretrain_learner(digits_dls(size=32, bs=8, device='cpu'), 'vit_tiny_patch16_224', ('relations', 'directions'), augment=False, seed=0, **vit)
    x, cb, losses = learn.dls.valid.one_batch()[0][:8], PatchRelations(most=24), []
    model = learn.model.eval()
    with torch.no_grad():
        for _ in range(60):
            cb.learn, learn.training = learn, True
            model.loss(model(x, picked=cb.sample(64, x.device)))
            losses.append(model.scores['directions_loss'])
        model.loss(model(x))
    assert torch.stack(losses).mean() == pytest.approx(model.scores['directions_loss'].item(), rel=.01)
    learn.training = False
    assert cb.sample(64, x.device).equal(cb.sample(64, x.device)) and cb.sample(24, x.device) is None


def test_torchrun_trains_one_run_on_two_processes(tmp_path):
    "the folder and, as far as samples do, the losses of one process; stopped, both stop; one who cannot share equally is told first"
    run = [sys.executable, '-W', 'ignore', '-m']
    run_alone = [*run, 'relvit.cli']
    line = ['pretrain', '--encoder', 'vit_tiny_patch16_224', '--encoder-args', 'embed_dim=24', 'depth=2', 'num_heads=2', '--augment', 'none', '--epochs', '2',
            '--steps', '4', '--bs', '32', '--device', 'cpu', '--out', str(tmp_path)]
    flat = ['--recipe-args', 'ema=.9'] # averaged weights, too
    two = [*run, 'torch.distributed.run', '--standalone', '--nproc-per-node', '2', '-m', 'relvit.cli', *line]
    # digits are shifted at random, by other numbers in each process: losses agree as samples do, weights of all processes are the same
    for name, start in dict(one=[*run, 'relvit.cli', *line], two=two).items():
        done = subprocess.run([*start, *flat, '--name', name], capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
    one, both = (Run(tmp_path/n) for n in ('one', 'two'))
    assert both.status == 'finished' and [m['epoch'] for m in both.metrics] == [0, 1]
    for a, b in zip(one.metrics, both.metrics): assert a['train']['loss'] == pytest.approx(b['train']['loss'], rel=.02)
    refused = subprocess.run([*two, '--bs', '31', '--name', 'odd'], capture_output=True, text=True, timeout=300)
    assert refused.returncode and 'a batch of 31 images cannot be shared equally by 2 processes' in refused.stderr
    assert not (tmp_path/'odd').exists()
    long = ['--epochs', '40', '--name', 'stopped'] # a whole run, stopped from outside, and gone on with by as many processes
    p, state = subprocess.Popen([*two, *long], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL), tmp_path/'stopped/last.safetensors'
    end = time.time() + 120
    while not state.exists() and time.time() < end and p.poll() is None: time.sleep(.05)
    p.terminate()
    p.wait(60)
    run = Run(tmp_path/'stopped')
    assert run.status.startswith('stopped after') and 'SIGTERM: saved' in (run.path/'log.txt').read_text()
    alone = subprocess.run([*run_alone, 'pretrain', '--resume', str(run.path)], capture_output=True, text=True, timeout=300)
    assert alone.returncode == 2 and 'was shared by 2 processes' in alone.stderr
    done = subprocess.run([*two[:two.index('pretrain') + 1], '--resume', str(run.path)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert run.status == 'finished' and [m['epoch'] for m in run.metrics] == list(range(40))


def test_trackers_hear_of_a_run(tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    run = quietly(Joint(**tiny, out=str(tmp_path), name='board', track='tensorboard'))
    board = EventAccumulator(str(run.path/'tensorboard'))
    board.Reload()
    assert {'train_loss', 'lr', 'labels_acc', 'relations_acc'} <= set(board.Tags()['scalars'])
    assert len(board.Scalars('train_loss')) == 8
    assert board.Scalars('labels_acc')[-1].value == pytest.approx(run.metrics[-1]['valid']['labels_acc'], abs=1e-5)
    monkeypatch.setenv('WANDB_MODE', 'offline')
    monkeypatch.setenv('WANDB_SILENT', 'true')
    run = quietly(Pretrain(**tiny, out=str(tmp_path), name='wandb', track='wandb'))
    import wandb
    wandb.finish()
    assert list((run.path/'wandb').glob('offline-run-*/*.wandb'))


def test_a_compiled_encoder_computes_the_same(tmp_path):
    kwargs = dict(tiny, epochs=1, steps=2, recipe='modern', recipe_args=('drop_path=0',), out=str(tmp_path))
    plain, quick = (quietly(Finetune(**kwargs, compile=c, name=f'{c}')) for c in (False, True))
    assert plain.metrics[0]['train']['loss'] == pytest.approx(quick.metrics[0]['train']['loss'], rel=1e-4)
    assert load_file(plain.last).keys() == load_file(quick.last).keys()


@pytest.fixture(scope='module')
def svhn(tmp_path_factory):
    "Handwritten digits in SVHN's format"
    there = tmp_path_factory.mktemp('svhn')
    for part, ds in zip(('train', 'test'), digits(32)):
        ds = ds.subset(torch.arange(120))
        savemat(there/f'{part}_32x32.mat', dict(X=ds.x.expand(-1, 3, -1, -1).permute(2, 3, 1, 0).numpy(), y=ds.y.numpy()[:, None]))
    return there


@pytest.mark.parametrize('method', METHODS)
def test_every_method_of_the_table_runs(method, svhn, tmp_path):
    "two steps of each, from the data to a line beside the paper's"
    small = dict(row='svhn', root=svhn, epochs=1, steps=1, bs=24, encoder='vit_tiny_patch16_224', device='cpu', runs=tmp_path/'runs', results=tmp_path/'results',
                 encoder_args=('depth=1', 'embed_dim=24', 'num_heads=3'))
    record = reproduce(Reproduction(method=method, **small), tell='nothing')
    stages = METHODS[method].stages
    assert record['seen'] == 24*sum(times for *_, times in stages) and 0 <= record['accuracy'] <= 1
    assert record['full'] == 108*100*sum(times for *_, times in stages)
    assert record['recipe']['layer_decay'] == (.65 if method == 'layer-decay' else 1)
    args = [json.loads((tmp_path/'runs'/f'{Reproduction(method=method, **small).name}-{mode}'/'config.json').read_text())['encoder_args'] for mode, *_ in stages]
    masked = [any('attn_mask' in a for a in more) for more in args]
    assert masked == [method.startswith('diagonal')]*(len(stages) - 1) + [False] # what is finetuned may look around


@pytest.mark.parametrize('row', TABLE1)
def test_every_row_has_a_plan(row):
    "the paper's patch and grid, as many epochs"
    from relvit.datasets import DATASETS
    for m in METHODS: assert {c.data for c in Reproduction(row, m).configs()} == {row}
    size, (p, *_) = DATASETS[row].img_size, DATASETS[row].sizes[DATASETS[row].img_size]
    assert size//p in (7, 8) and f'/{p}' in TABLE1[row].says
    assert [c.epochs for c in Reproduction(row, 'supervised-long').configs()] == [200]


def test_a_stopped_row_goes_on(svhn, tmp_path):
    r = Reproduction('svhn', 'relvit', root=svhn, epochs=2, steps=2, bs=24, encoder='vit_tiny_patch16_224', encoder_args=('depth=1', 'embed_dim=24', 'num_heads=3'),
                     device='cpu', runs=tmp_path/'runs', results=tmp_path/'results')
    assert not quietly(r.configs()[0], cbs=[Halt()]).summary
    record = reproduce(r, tell='nothing')
    assert record['seen'] == 24*2*2*2 and reproduce(r, tell='nothing')['accuracy'] == record['accuracy'] # nothing is trained twice
    with pytest.raises(ValueError, match='is of another seed: 0, not 1'): stage(r.configs()[0].but(seed=1), 'nothing')


def test_the_commands(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in 'ab': quietly(Finetune(**tiny, name=name))
    assert main(['runs', 'plot', 'a', 'b', '--out', 'both.png']) == 0
    assert Path('both.png').read_bytes()[:4] == b'\x89PNG'
    assert main(['recipes']) == 0
    assert set(json.loads(capsys.readouterr().out.splitlines()[-1])) == set(RECIPES)
    assert main(['reproduce', 'table4']) == 2 and 'there are table1' in capsys.readouterr().err


def test_other_runs_are_other_lines(tmp_path):
    "a version, a size, a changed number: none is mixed with another, and the paper's number stands beside its own row alone"
    base = dict(row='cifar10', method='relvit', says='RelViT', recipe=RECIPES['paper'].asdict(), encoder=dict(name='vit_small_patch16_224', args=[]), few=None,
                img_size=None, full=100, seen=10, beside={}, part='test')
    runs = [base, base | dict(recipe=RECIPES['paper'].but(version=2).asdict()), base | dict(img_size=14), base | dict(recipe=RECIPES['paper'].but(bs=64).asdict())]
    for i, r in enumerate(runs):
        for seed in (0, 1): (tmp_path/f'{i}-{seed}.json').write_text(json.dumps(r | dict(seed=seed, accuracy=.5 + .1*i)))
    lines = compare_rows(tmp_path)
    assert list(lines.seeds) == [2, 2, 2, 2] and sorted(lines.ours) == [f'{v}.00 ± 0.00' for v in (50, 60, 70, 80)]
    assert sorted(lines.paper) == ['', '90.23 ± 0.09', '90.23 ± 0.09', '90.23 ± 0.09'] and (lines[lines.paper == ''].row == 'CIFAR-10, 14 pixels').all()
    assert 'paper v1 bs=64' in set(lines.recipe)


def test_what_would_do_nothing_is_refused(tmp_path):
    with pytest.raises(ValueError, match='an epoch has 4 batches, so no step would ever take 5'): quietly(Finetune(**tiny, accumulate=5, out=str(tmp_path)))
    learn = finetune_learner(digits_dls(bs=32, steps=3, device='cpu'), 'vit_tiny_patch16_224', **vit)
    with pytest.raises(ValueError, match='modern differs in ema, drop_path, smoothing, mixup'): learn.fit_recipe(1, recipe='modern')
    with pytest.raises(ValueError, match='no mega-patches'): Joint(leak='paper', mega=3)
    with pytest.raises(ValueError, match='betas of a recipe must be a list of numbers'): Finetune(recipe_args=('betas=.9',))
    with pytest.raises(ValueError, match='betas must be two numbers'): Finetune(recipe_args=('betas=[.9, 2.]',))
    assert change_recipe('default', ('lr=1e-7',)).final_lr == pytest.approx(1e-9)


def test_an_old_run_keeps_what_it_had(tmp_path):
    "before recipes were kept, 'reference' was an optimiser and a schedule"
    run = quietly(Pretrain(**tiny, recipe='reference', out=str(tmp_path), name='a'), cbs=[Halt()])
    (run.path/'recipe.json').unlink()
    old = recipe_of(run)
    assert (old.jitter, old.same_cuts, old.zero_head, old.schedule) == ('pixels', False, True, 'reference')


def test_averaged_weights_in_a_learner():
    "loaded, searched and started from like any others"
    dls = digits_dls(bs=32, steps=3, device='cpu')
    learn = finetune_learner(dls, 'vit_tiny_patch16_224', recipe=RECIPES['modern'].but(ema=.5), seed=0, **vit)
    with learn.no_bar(), learn.no_logging():
        learn.lr_find(num_it=5, show_plot=False)
        learn.fit_recipe(1)
    mean, raw = learn.model.averaged.encoder, learn.model.encoder
    further = finetune_learner(dls, learn, recipe='default')
    weight = lambda e: e.model.blocks[0].mlp.fc1.weight
    assert weight(further.model.encoder).equal(weight(mean)) and not weight(mean).equal(weight(raw))
    assert all(w.requires_grad for w in further.model.encoder.parameters())


def test_weights_that_are_loaded_count(tmp_path):
    dls = digits_dls(bs=32, steps=2, device='cpu')
    plain, mixed = (finetune_learner(dls, 'vit_tiny_patch16_224', recipe=r, zero=False, seed=s, **vit) for s, r in enumerate(('default', 'modern')))
    with mixed.no_bar(), mixed.no_logging():
        mixed.fit_recipe(1)
        load(save(plain, tmp_path/'w.safetensors'), mixed)
    x = dls.valid.one_batch()[0]
    with torch.no_grad(): assert torch.allclose(mixed.model.eval()(x)['labels'], plain.model.eval()(x)['labels'], atol=1e-5)
