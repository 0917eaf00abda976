"The README's promises about learners, held in small."

import pytest, timm, torch
from fastai.learner import Learner
from relvit.checkpoint import export_timm, load, load_encoder, save
from relvit.data import digits_dls
from relvit.heads import PairHead
from relvit.learner import finetune_learner, joint_learner, pretrain_learner
from relvit.tasks import Task

small = dict(img_size=16, p=4, embed_dim=24, depth=1, num_heads=3)
name = 'vit_tiny_patch16_224'


def dls(**kwargs): return digits_dls(bs=32, device='cpu', **{'steps': 3, **kwargs})


def fitted(learn, epochs=1, **kwargs):
    with learn.no_bar(), learn.no_logging(): learn.fit_recipe(epochs, **kwargs)
    return learn


def test_the_issue_s_own_lines(tmp_path):
    "pretrain_learner by name and sizes, export, strict load by timm"
    data = dls(size=32)
    learn = pretrain_learner(data, 'vit_small_patch16_224', img_size=32, p=4, tasks=('relations', 'positions'), in_chans=1)
    assert isinstance(learn, Learner) and learn.model.encoder.grid == (8, 8)
    with learn.no_bar(): learn.fit_one_cycle(1)
    tuned = finetune_learner(dls(size=32, labels=5), learn.model.encoder)
    export = export_timm(tuned, tmp_path/'w.safetensors')
    plain = timm.create_model('vit_small_patch16_224', img_size=32, patch_size=4, num_classes=10, in_chans=1, checkpoint_path=str(tmp_path/'w.safetensors')).eval()
    x = data.one_batch()[0]
    with torch.no_grad(): torch.testing.assert_close(plain(tuned.model.encoder.prepare(x)), tuned.model.eval()(x)['labels'], atol=1e-4, rtol=1e-4)
    assert export.args['img_size'] == [32, 32]


@pytest.mark.parametrize('recipe', ['default', 'reference'])
def test_all_tasks_train_by_each_recipe(recipe):
    learn = pretrain_learner(dls(steps=30), name, ('relations', 'distances', 'angles', 'positions', 'directions'), recipe=recipe, seed=0, permute=True, **small)
    first, last = (fitted(learn, e).recorder.values[-1][1] for e in (1, 3))
    assert last < first
    assert {'relations_acc', 'distances_r2', 'angles_mae', 'directions_degrees'} <= set(learn.recorder.metric_names)


@pytest.mark.parametrize('make', [pretrain_learner, finetune_learner, joint_learner])
def test_a_seed_repeats_the_initial_weights(make):
    a, b, c = (make(dls(), name, seed=s, **small).model.state_dict() for s in (3, 3, 4))
    assert all(torch.equal(a[k], b[k]) for k in a) and not all(torch.equal(a[k], c[k]) for k in a)


@pytest.mark.parametrize('make', [pretrain_learner, finetune_learner, joint_learner])
def test_bfloat16_on_a_cpu(make):
    "computes in bfloat16, close to float32"
    values = {}
    for amp in (False, True):
        learn = make(dls(), name, seed=0, amp=amp, **small, **(dict(zero=False) if make is finetune_learner else {}))
        with learn.no_bar(), learn.no_logging(): values[amp] = learn.validate()
    assert values[True][0] == pytest.approx(values[False][0], rel=.02) and values[True][0] != values[False][0]


def test_fastai_s_mixed_precision_casts_the_predictions():
    "what MixedPrecision does to them on a GPU: the loss still knows the positions"
    from fastai.callback.core import Callback
    from fastai.torch_core import to_float
    class Cast(Callback):
        def after_pred(self): self.learn.pred = to_float(self.learn.pred)
    losses = []
    for cbs in ([], [Cast()]):
        learn = pretrain_learner(dls(), name, permute=True, seed=0, cbs=cbs, **small)
        with learn.no_bar(), learn.no_logging(): losses.append(learn.validate()[0])
    assert losses[0] == losses[1]


def test_mixed_precision_leaves_images_alone():
    "patches are enlarged, augmented and shuffled in float32, whatever the network runs in"
    made = {}
    for amp in (False, True):
        learn = pretrain_learner(dls(), name, mega=3, permute=True, seed=0, amp=amp, **small)
        with learn.no_bar(), learn.no_logging(): learn.validate()
        made[amp] = learn.permute_patches.last[1]
    assert torch.equal(made[False].float()/255, made[True].float()/255)
    learn.augment_patches.run_valid = True
    with learn.no_bar(), learn.no_logging(): learn.validate()
    x = learn.augment_patches.last[1]
    assert x.dtype == torch.float32 and not torch.equal(x, x.bfloat16().float())


def test_mega_patches_reach_tasks_and_heads():
    learn = fitted(pretrain_learner(dls(), name, ('relations', 'positions', 'distances'), mega=3, **small))
    assert learn.model.grid == (3, 3) and learn.model.tasks['positions'].head.out_features == 9
    again = [fitted(learn).validate()[0] for _ in range(1)] + [learn.validate()[0]]
    assert again[0] == again[1] # the cuts of validation repeat


def test_frozen_means_frozen():
    learn = finetune_learner(dls(labels=5), name, freeze=True, drop_path_rate=.5, **small)
    before = {k: v.clone() for k, v in learn.model.encoder.state_dict().items()}
    fitted(learn)
    assert all(torch.equal(v, before[k]) for k, v in learn.model.encoder.state_dict().items())
    assert not learn.model.encoder.training and learn.model.tasks['labels'].head.fc.weight.abs().sum() > 0


def test_fastai_s_own_tools_work():
    learn = joint_learner(dls(), name, pool='mean', augment=False, **small)
    with learn.no_bar(), learn.no_logging():
        learn.fit_one_cycle(1)
        assert learn.lr_find(num_it=5, show_plot=False).valley > 0
        (relations, _, labels), y = learn.get_preds()
        acc = learn.validate()[learn.recorder.metric_names.index('labels_acc') - 2]
    assert relations.shape == (239, 9, 16, 16)
    assert (labels.argmax(1) == y).float().mean() == pytest.approx(float(acc))


def test_fastai_s_own_dataloaders_work(tmp_path):
    "its image and category types too; statistics are the backbone's, labels come from the data"
    from fastai.vision.data import ImageDataLoaders
    from fastai.vision.augment import Resize
    from PIL import Image
    for i in range(24):
        (tmp_path/'ab'[i % 2]).mkdir(exist_ok=True)
        Image.new('RGB', (40, 36), (10*i, 90, 50)).save(tmp_path/'ab'[i % 2]/f'{i}.png')
    data = ImageDataLoaders.from_folder(tmp_path, valid_pct=.3, seed=0, item_tfms=Resize(32), bs=8, num_workers=0, device='cpu')
    for make in pretrain_learner, joint_learner, finetune_learner:
        learn = fitted(make(data, name, **{**small, 'img_size': 32}))
        assert all(torch.isfinite(torch.as_tensor(v)) for v in learn.recorder.values[-1])
    assert learn.model.tasks['labels'].classes == 2 and learn.get_preds()[0].shape[1] == 2


def test_a_relation_of_one_s_own_trains():
    class SameColumn(Task):
        name = 'same_column'
        def make_head(self, encoder, grid): return PairHead(encoder.dim, 2)
        def target(self, pos, grid): return (pos[..., :, None, 0] == pos[..., None, :, 0]).long()
    learn = fitted(pretrain_learner(dls(steps=60), name, ('same_column', 'relations'), seed=0, augment=False, **{**small, 'depth': 2}), 2)
    values = dict(zip(learn.recorder.metric_names[1:-1], learn.recorder.values[-1]))
    assert learn.model.chance()['same_column_acc'] == .75 and values['same_column_acc'] > .8


def test_pretrained_weights_travel(tmp_path):
    learn = fitted(pretrain_learner(dls(), name, **small))
    path = save(learn, tmp_path/'a.safetensors')
    joint = joint_learner(dls(), name, **small)
    report = load(path, joint)
    assert not report.left_out and all('labels' in n for n in report.missing)
    assert load_encoder(path).grid == (4, 4)
    assert torch.equal(joint.model.tasks['relations'].head.qk.weight, learn.model.tasks['relations'].head.qk.weight)


def test_no_pickle_is_read(tmp_path):
    "a malicious pickle under any name is refused by type, and does not run"
    import pickle
    class Evil:
        def __reduce__(self): return (open, (str(tmp_path/'pwned'), 'w'))
    for f in ('a.safetensors', 'a.pth', 'a.pkl'):
        (tmp_path/f).write_bytes(pickle.dumps(Evil()))
        with pytest.raises(ValueError, match='not a safetensors file'): load_encoder(tmp_path/f)
    assert not (tmp_path/'pwned').exists()
