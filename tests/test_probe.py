"Probes judge and leave no trace; a leak is found where there is one, and nowhere else."
import itertools, random, warnings

import numpy as np, pytest, torch
from fastai.callback.core import Callback
from relvit.data import digits_dls, image_dls
from relvit.images import Images
from relvit.learner import finetune_learner, joint_learner, pretrain_learner
from relvit.patches import permute, positions, to_patches
from relvit.probe import (EMPTY, Pixels, ProbeEpochs, embed, empty_images, few_labels_probe, frozen, knn, leak_check,
                          linear_probe, relation_consistency)
from relvit.recipes import Recipe
from relvit.runs import RecordRun, Run
from relvit.tasks import RelViT, SpatialRelations
from relvit.tokens import TokenEncoder

name, small = 'vit_tiny_patch16_224', dict(img_size=16, p=4, embed_dim=24, depth=2, num_heads=2)
fast = Recipe('test', lr=4e-3, final_lr=4e-5)


def encoder(seed=0, **kwargs):
    torch.manual_seed(seed)
    return TokenEncoder(name, **small, **kwargs)


def random_images(n, seed, shape=(3, 16, 16)):
    return torch.randint(256, (n, *shape), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def shades(n, seed, classes=3, unknown=0):
    "Images whose class is how bright they are"
    y = torch.arange(n) % classes
    x = (random_images(n, seed)//4 + (y*60).to(torch.uint8)[:, None, None, None])
    y[:unknown] = -1
    return Images(x, y, 'abc'[:classes], 'shades')


def fitted(learn, epochs=2, **kwargs):
    with learn.no_bar(), learn.no_logging(): learn.fit_recipe(epochs, **kwargs)
    return learn


# frozen

def test_the_encoder_is_not_touched_and_its_dropout_is_off():
    dropping = dict(drop_path_rate=.5, proj_drop_rate=.5, attn_drop_rate=.5, pos_drop_rate=.5)
    plain, e = encoder(), encoder(**dropping)
    e.load_state_dict(plain.state_dict())
    e.model.blocks[0].eval()
    e.model.norm.weight.requires_grad_(False)
    modes, flags = [m.training for m in e.modules()], [w.requires_grad for w in e.parameters()]
    dls = image_dls(shades(60, 0), shades(30, 1), shades(30, 2), bs=20, device='cpu')
    assert linear_probe(e, dls, 20) == linear_probe(plain.eval(), dls, 20)
    assert [m.training for m in e.modules()] == modes and [w.requires_grad for w in e.parameters()] == flags
    assert all(w.grad is None for w in e.parameters())
    assert all(a.equal(b) for a, b in zip(e.state_dict().values(), plain.state_dict().values()))


def test_frozen_lets_go_after_an_error():
    e = encoder()
    with pytest.raises(RuntimeError, match='on purpose'), frozen(e): raise RuntimeError('on purpose')
    assert e.training and torch.is_grad_enabled()


# linear probe

def test_linear_probe_is_repeated_by_its_seed_and_leaves_the_loaders_alone():
    jitter = lambda x, generator: x.float()/255 + .3*torch.rand(x.shape, generator=generator)
    dealt = [Images(random_images(300, i), torch.arange(300) % 3, 'abc') for i in range(2)]
    dls = image_dls(*dealt, bs=16, augment=[jitter], device='cpu')
    next(iter(dls.train))
    was, first = dls.train.epoch, dls.train.one_batch()
    probes = [linear_probe(Pixels(4), dls, 12, pool='flat', seed=s) for s in (0, 0, 1)]
    assert probes[0] == probes[1] and probes[0].tried != probes[2].tried
    assert dls.train.epoch == was and dls.train.one_batch()[0].equal(first[0])
    assert probes[0].test is None


def test_linear_probe_trains_on_fresh_augmentation_and_judges_without():
    seen = []
    def note(x):
        seen.append(x.clone())
        return x
    dls = image_dls(shades(40, 0), shades(30, 1), shades(30, 2), bs=20, augment=[note], device='cpu')
    found = linear_probe(Pixels(4), dls, 7, pool='mean')
    assert len(seen) == 7 and all(len(x) == 20 for x in seen)
    assert found.valid == max(found.tried.values()) == found.tried[found.lr]
    assert set(found.tried) == {.01, .03, .1, .3, 1., 3.}


def test_the_learning_rate_is_chosen_without_the_test_set():
    train, valid, test = shades(60, 0), shades(60, 1), shades(60, 2)
    dealt = Images(test.x, test.y[torch.randperm(60, generator=torch.Generator().manual_seed(0))], 'abc')
    a, b = (linear_probe(encoder(), image_dls(train, valid, t, bs=20, device='cpu'), 40) for t in (test, dealt))
    assert (a.lr, a.valid, a.tried) == (b.lr, b.valid, b.tried) and a.test > .9 and abs(b.test - 1/3) < .25


def test_unknown_labels_neither_teach_nor_count():
    parts = shades(60, 0, unknown=45), shades(60, 1, unknown=30), Images(random_images(9, 2))
    dls = image_dls(*parts, bs=20, device='cpu')
    found = linear_probe(Pixels(4), dls, 40, pool='mean')
    assert found.valid == 1 and found.test is None
    with pytest.raises(ValueError, match='no image of shades has a label'):
        linear_probe(Pixels(4), image_dls(shades(60, 0), shades(20, 1, unknown=20), device='cpu'))
    with pytest.raises(ValueError, match="pool='cls', but the encoder has no class token"):
        linear_probe(Pixels(4), dls, 2, pool='cls')


# few labels

def test_few_labels_embeds_each_image_once():
    train, test = shades(90, 0, unknown=10), shades(30, 1, unknown=5)
    class Counts(Pixels):
        seen = 0
        def forward(self, x, pos_embed=None):
            self.seen += len(x)
            return super().forward(x, pos_embed)
    counts = Counts(4)
    table = few_labels_probe(counts, train, test, (1, 4), seeds=3, pool='flat')
    assert counts.seen <= 3*5*3 + 30
    assert (table.loc[(1, 'features')] == table.loc[(1, 'pixels')]).all() # Pixels, side by side, are the pixels
    assert list(table.index) == [(n, of) for n in (1, 4) for of in ('features', 'pixels')]
    with pytest.raises(ValueError, match='has only 26 images'): few_labels_probe(counts, train, test, (27,))


# epochs

class Listens(Callback):
    order = 100
    def __init__(self): self.heard = []
    def after_epoch(self): self.heard.append(dict(self.learn.probes))


def digits_learner(make=pretrain_learner, cbs=None, **kwargs):
    dls, drop = digits_dls(bs=100, steps=3, device='cpu'), dict(drop_path_rate=.3, pos_drop_rate=.2)
    return make(dls, name, seed=0, recipe=fast, cbs=cbs, **small, **drop, **kwargs)


@pytest.mark.parametrize('make', [pretrain_learner, joint_learner])
def test_probing_changes_nothing(make):
    plain, probed = (fitted(digits_learner(make, cbs, permute=True)) for cbs in (None, ProbeEpochs()))
    assert plain.recorder.values[-1] == probed.recorder.values[-1][:-1] and 'knn_acc' in probed.recorder.metric_names
    assert all(a.equal(b) for a, b in zip(plain.model.state_dict().values(), probed.model.state_dict().values()))


def test_probes_of_every_other_epoch_and_the_last():
    cbs = ProbeEpochs(every=2, most=300), Listens()
    learn = fitted(digits_learner(cbs=cbs), 5)
    first, second, last = [h['knn_acc'] for h in cbs[1].heard if h]
    assert [bool(h) for h in cbs[1].heard] == [False, True, False, True, True]
    assert [v[-1] for v in learn.recorder.values] == [None, first, None, second, last] and last > .15
    assert len(cbs[0].parts[0]) == 300 and cbs[0].metric not in list(learn.metrics)


def test_a_finetuned_encoder_is_probed_with_positions():
    learn = fitted(digits_learner(finetune_learner, ProbeEpochs()), 1)
    e, (a, b) = learn.model.encoder, learn.probe_epochs.parts
    assert learn.probes['knn_acc'] == knn(*embed(e, a, pos_embed=True), *embed(e, b, pos_embed=True))


def test_only_a_fit_is_probed():
    learn = fitted(digits_learner(cbs=ProbeEpochs()), 1)
    known = dict(learn.probes)
    with learn.no_bar(), learn.no_logging():
        learn.validate()
        learn.get_preds()
        learn.lr_find(num_it=3, show_plot=False)
    assert learn.probes == known and learn.probe_epochs.metric not in list(learn.metrics)


def test_no_random_number_is_drawn():
    learn = fitted(digits_learner(cbs=ProbeEpochs()), 1)
    states = lambda: (torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist())
    was, learn.probes, learn.probe_epochs.due = states(), {}, True
    learn.probe_epochs.after_validate()
    assert learn.probes and states() == was


def test_data_without_labels_is_said_once():
    dls = image_dls(Images(random_images(40, 0)), Images(random_images(20, 1)), bs=20, device='cpu')
    learn = pretrain_learner(dls, name, cbs=ProbeEpochs(), **small)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always')
        fitted(learn, 1), fitted(learn, 1)
    assert len([w for w in said if 'ProbeEpochs does nothing' in str(w.message)]) == 1
    assert learn.probes == {} and 'knn_acc' not in learn.recorder.metric_names


def test_images_are_cut_as_validation_cuts_them():
    parts = [Images(random_images(40, i, (3, 20, 20)), torch.arange(40) % 2, 'ab') for i in range(2)]
    dls = image_dls(*parts, bs=20, size=16, augment=[lambda x: x[..., :16, :16]], device='cpu')
    learn = pretrain_learner(dls, name, cbs=ProbeEpochs(pool='flat'), **small)
    assert set(fitted(learn, 1).probes) == {'knn_acc'}


def test_a_resumed_run_probes_the_epochs_that_are_left(tmp_path):
    fitted(digits_learner(cbs=ProbeEpochs()), 3, cbs=RecordRun(tmp_path/'whole', config={}))
    class Interrupt(Callback):
        order = 90
        def after_batch(self):
            if self.learn.training and self.learn.epoch == 1: self.learn.record_run.stop = 'SIGINT'
    fitted(digits_learner(cbs=ProbeEpochs()), 3, cbs=[RecordRun(tmp_path/'part', config={}), Interrupt()])
    listens = Listens()
    fitted(digits_learner(cbs=[ProbeEpochs(), listens]), 3, cbs=RecordRun(tmp_path/'part', resume=True))
    assert [bool(h) for h in listens.heard] == [False, True, True]
    assert Run(tmp_path/'part').metrics[-1]['valid'] == Run(tmp_path/'whole').metrics[-1]['valid']


# consistency

def same(x, generator=None): return x.float()/255


def test_consistency_against_a_loop():
    model, ds = RelViT(encoder(), ['relations']), Images(random_images(6, 0))
    views = iter(random_images(12, 1).split(6))
    found = relation_consistency(model, ds, lambda x, generator: next(views))
    with torch.no_grad(): a, b = (model.eval()(x)['relations'].argmax(1) for x in random_images(12, 1).split(6))
    truth, pairs = model.tasks['relations'].target(model._placed[0], None), []
    for i, s, t in itertools.product(range(6), range(16), range(16)):
        if s != t: pairs.append((a[i, s, t].item(), b[i, s, t].item(), truth[i, s, t].item()))
    answers = torch.tensor([v for p in pairs for v in p[:2]]).bincount(minlength=9)/(2*len(pairs))
    agree, guess = sum(u == v for u, v, _ in pairs)/len(pairs), (answers**2).sum().item()
    right = sum((u == t) + (v == t) for u, v, t in pairs)/2/len(pairs)
    both = sum(u == v == t for u, v, t in pairs)/len(pairs)
    want = dict(agree=agree, guess=guess, kappa=(agree - guess)/(1 - guess), right=right, both_right=both)
    assert found == pytest.approx(want, abs=1e-6)


class Guesses(torch.nn.Module):
    def forward(self, z): return torch.randn(len(z), 9, z.shape[1], z.shape[1])


@pytest.mark.parametrize('views', [2, 3])
def test_independent_guesses_have_no_kappa(views):
    torch.manual_seed(0)
    model = RelViT(encoder(), ['relations'])
    model.tasks['relations'].head = Guesses()
    found = relation_consistency(model, Images(random_images(64, 0)), views=views)
    assert abs(found['kappa']) < .02 and abs(found['agree'] - 1/9) < .01 and abs(found['both_right'] - 1/81) < .005


def test_consistency_of_a_learner_with_mega_patches_and_labels():
    learn = joint_learner(digits_dls(device='cpu'), name, mega=2, pool='flat', **small)
    modes = [m.training for m in learn.model.modules()]
    found = relation_consistency(learn, learn.dls.valid_ds, same, most=50)
    assert [found['agree'], found['kappa'], found['right']] == pytest.approx([1, 1, found['both_right']]) # two equal views
    assert [m.training for m in learn.model.modules()] == modes and learn.model.grid == (2, 2)
    with pytest.raises(ValueError, match='images of .8, 8. patches, this model wants .4, 4.'):
        relation_consistency(RelViT(encoder(), ['relations']), Images(random_images(4, 0, (3, 32, 32))))


# leaks

@pytest.mark.parametrize('grid, p', [((2, 3), (4, 6)), ((3, 3), 5), ((1, 4), 1)])
def test_empty_images(grid, p):
    noise, constant, mirrored = (empty_images(k, 2, 3, grid, p, torch.Generator().manual_seed(0)) for k in EMPTY)
    ph, pw = (p, p) if isinstance(p, int) else p
    assert noise.shape == constant.shape == mirrored.shape == (2, 3, grid[0]*ph, grid[1]*pw)
    for x in constant, mirrored:
        patches = to_patches(x, p)
        assert patches.equal(patches[:, :1].expand_as(patches)) and not x[0].equal(x[1])
    assert mirrored.flip(-1).equal(mirrored) and mirrored.flip(-2).equal(mirrored)
    shuffled = permute(mirrored, torch.randperm(grid[0]*grid[1]), p)
    assert shuffled.equal(mirrored)
    with pytest.raises(ValueError, match="kind is 'noise', 'constant', 'mirrored', not 'grey'"):
        empty_images('grey', 1, 1, grid, p)


def noise_dls(steps):
    parts = [Images(random_images(n, i), torch.arange(n) % 2, 'ab', 'noise') for i, n in enumerate((2048, 64))]
    return image_dls(*parts, bs=64, steps=steps, device='cpu')


every = 'relations', 'positions', 'distances', 'angles', 'directions'


@pytest.mark.parametrize('make, how, leaks', [
    (pretrain_learner, dict(tasks=every), False), (pretrain_learner, dict(tasks=every, pos_embed=True), True),
    (pretrain_learner, dict(tasks=every, pos_embed=True, permute=True), False), (joint_learner, {}, False),
    (joint_learner, dict(leak='paper'), True)])
def test_what_leaks_is_called_a_leak(make, how, leaks):
    "on every kind of images and by every task, after a little training on noise"
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        wide = small | dict(embed_dim=48, num_heads=3)
        dls = noise_dls(150 if leaks else 80)
        learn = fitted(make(dls, name, augment=False, recipe=fast, seed=0, **wide, **how), 1)
    table = leak_check(learn)
    assert set(table.verdict) == {'leaks' if leaks else 'no leak'}, table
    assert len(table) == 3*len(set(table.task)) and 'labels' not in set(table.task)


def test_a_token_that_knows_itself_is_no_leak():
    "A head that finds the diagonal"
    class Self(torch.nn.Module):
        def forward(self, z):
            said = torch.nn.functional.one_hot(4*torch.eye(z.shape[1]).long(), 9).permute(2, 0, 1).float()
            return said.expand(len(z), -1, -1, -1)
    model = RelViT(encoder(), ['relations'])
    model.tasks['relations'].head = Self()
    assert (leak_check(model, images=64).verdict == 'no leak').all()


def test_one_task_that_leaks_a_little_is_found():
    "A task of its own name that knows where one patch lies, and else guesses"
    class Peeks(SpatialRelations):
        name = 'peeks'
        def forward(self, tokens):
            logits = super().forward(tokens)*0
            logits[:, 0] = 1.
            logits[:, :, 0, 1:] = 2*torch.nn.functional.one_hot(self.target(positions((4, 4)), None)[0, 1:], 9).T
            return logits
    table = leak_check(RelViT(encoder(), [Peeks(), 'relations'])).set_index(['task', 'images']).verdict
    assert set(table['peeks']) == {'leaks'} and set(table['relations']) == {'no leak'}


def test_leak_check_is_repeated_and_shuffles_where_it_must():
    sizes = dict(img_size=64, embed_dim=24, depths=(1, 1), num_heads=(1, 2), window_size=4)
    swin = TokenEncoder('swin_tiny_patch4_window7_224', **sizes)
    model = RelViT(swin, ['relations', 'angles'])
    a, b = leak_check(model, images=40), leak_check(model, permute=True, images=40)
    assert a.equals(b) and not a.equals(leak_check(model, permute=False, images=40)) and set(a.verdict) == {'no leak'}
    assert model.training


def test_leak_check_sees_the_grid_of_mega_patches_and_small_batches():
    learn = joint_learner(digits_dls(device='cpu'), name, mega=(2, 3), pool='flat', **small)
    table = leak_check(learn, images=10)
    assert table.chance[1] == pytest.approx(1/6) and learn.model.grid == (2, 3)
