"""T2T-ViT is the paper's network and a timm model like others; ViT, Swin and T2T-ViT go through all modes.

tests/fixtures/t2t.npz is what the released code (Yuan et al.) made of weights and pixels that `filled` and `pixels` give.
"""
import re, warnings
from functools import cache
from pathlib import Path

import numpy as np, pytest, relvit.t2t, timm, torch # noqa: F401 registers the models
from torch.testing import assert_close

from relvit.checkpoint import export_timm, load_encoder, save
from relvit.data import image_dls
from relvit.dino import DINO
from relvit.images import Images
from relvit.learner import finetune_learner, joint_learner, pretrain_learner
from relvit.t2t import T2TViT, TokenBlock, linear_attention
from relvit.tasks import RelViT
from relvit.tokens import TokenEncoder

narrow = dict(embed_dim=48, num_heads=2, depth=2, token_dim=16)
families = dict(vit=('vit_tiny_patch16_224', dict(embed_dim=48, num_heads=3, depth=2, p=32)),
                swin=('swin_tiny_patch4_window7_224', dict(embed_dim=16, depths=(1, 1, 1, 1), num_heads=(1, 1, 2, 2))),
                t2t=('t2t_vit_7', narrow))


# the paper's network

@cache
def recorded(): return {k: torch.from_numpy(v) for k, v in np.load(Path(__file__).parent/'fixtures/t2t.npz').items()}


def filled(k, name, shape):
    "A number for every weight, the same everywhere"
    v = torch.sin(torch.arange(shape.numel(), dtype=torch.float64)*(.37 + .011*k) + k).reshape(shape)
    return (1 + .1*v if re.search(r'norm\d?\.weight$', name) else v if name.endswith('.w') else .1*v).float()


def pixels():
    n = 3*224*224
    waves = torch.sin(torch.arange(n, dtype=torch.float64)*.0137)*torch.linspace(.2, 2, n, dtype=torch.float64)
    return waves.reshape(1, 3, 224, 224).float()


@pytest.mark.parametrize('kind', ['performer', 'transformer'])
def test_tokens_of_the_released_code(kind):
    want = {k.split('_', 1)[1]: v for k, v in recorded().items() if k.startswith(kind)}
    model = T2TViT(tokens_type=kind, embed_dim=48, depth=2, num_heads=3, mlp_ratio=2., num_classes=10).eval()
    model.load_state_dict({n: filled(k, n, t.shape) for k, (n, t) in enumerate(sorted(model.state_dict().items()))})
    x, close = pixels(), lambda a, b: assert_close(a, b, atol=5e-5, rtol=0)
    with torch.no_grad():
        tokens = model.forward_features(x)
        close(model.patch_embed(x).flatten(1, 2)[0, [0, 1, 14, 104, 181, 195]], want['embedded'])
        close(tokens[0, [0, 1, 2, 15, 105, 182, 196]], want['tokens'])
        close(model(x)[0], want['logits'])
        encoder = TokenEncoder(model, mean=0., std=1.)
        close(encoder(x).patches[0, [0, 6, 24, 48]], want['pooled'])


def test_size_of_the_released_backbone():
    "21.16 M, fixed tables included"
    model = timm.create_model('t2t_vit_14', num_classes=0, weight_init='skip')
    assert sum(t.numel() for t in (*model.parameters(), *model.buffers())) == 21_160_550


def test_attention_computes_in_float32_under_autocast():
    q, k, v = torch.randn(3, 2, 40, 16)
    w = TokenBlock(8, 16).w
    with torch.autocast('cpu', dtype=torch.bfloat16): inside = linear_attention(q, k, v, w)
    assert inside.dtype == torch.float32 and torch.equal(inside, linear_attention(q, k, v, w))
    assert linear_attention(*(t.bfloat16() for t in (q, k, v)), w).dtype == torch.float32


def test_an_image_need_not_be_square():
    m = timm.create_model('t2t_vit_7', img_size=(32, 64), num_classes=3)
    assert (m.patch_embed.grid_size, m.patch_embed.num_patches) == ((2, 4), 8) and m(torch.rand(1, 3, 32, 64)).shape == (1, 3)


# a timm model

def test_timm_knows_the_names():
    kinds = ['t2t_vit_7', 't2t_vit_10', 't2t_vit_12', 't2t_vit_14', 't2t_vit_19', 't2t_vit_24', 't2t_vit_t_14', 't2t_vit_t_19', 't2t_vit_t_24']
    assert sorted(timm.list_models('t2t*')) == sorted(kinds)
    with pytest.raises(RuntimeError, match='[Nn]o pretrained weights'): timm.create_model('t2t_vit_7', pretrained=True)


def test_what_a_timm_model_has():
    model = timm.create_model('t2t_vit_t_14', **narrow, num_classes=5, in_chans=1, img_size=64, drop_path_rate=.2, proj_drop_rate=.1,
                              attn_drop_rate=.3, drop_rate=.4)
    assert model.default_cfg['classifier'] == 'head' and model.pretrained_cfg is model.default_cfg
    assert model.no_weight_decay() >= {'cls_token'} and model.num_features == 48 and model.num_prefix_tokens == 1
    assert (model.blocks[1].drop_path1.drop_prob, model.blocks[0].attn.attn_drop.p, model.head_drop.p) == pytest.approx((.2, .3, .4))
    assert model.patch_embed.blocks[0].drop.p == model.patch_embed.blocks[1].mlp.drop1.p == model.blocks[0].mlp.drop1.p == .1
    groups = timm.models.group_parameters(model, model.group_matcher(coarse=False), reverse=True)
    assert groups['patch_embed.blocks.0.qkv.weight'] == 0 and groups['blocks.1.mlp.fc2.bias'] == groups['norm.weight'] == 2
    x = torch.randn(2, 1, 64, 96)
    model.train().set_grad_checkpointing()
    model(x).square().sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    model.eval().reset_classifier(3)
    assert model(x).shape == (2, 3) and model.get_classifier().out_features == 3
    last, maps = model.forward_intermediates(x, indices=2, norm=True)
    assert [m.shape for m in maps] == [(2, 48, 4, 6)]*2
    assert_close(maps[-1].flatten(2).mT, last[:, 1:])
    pyramid = timm.create_model('t2t_vit_7', **narrow, features_only=True, out_indices=(0, 1)).eval()
    assert pyramid.feature_info.reduction() == [16, 16] and pyramid(torch.zeros(1, 3, 32, 48))[0].shape == (1, 48, 2, 3)
    assert timm.create_model('t2t_vit_7', **narrow, class_token=False, global_pool='avg')(torch.zeros(1, 3, 32, 32)).shape == (1, 1000)
    with pytest.raises(ValueError, match='patch_size=8 is not possible'): timm.create_model('t2t_vit_7', **narrow, patch_size=8)


def test_checkpointing_changes_no_gradient():
    grads = []
    for on in (False, True):
        torch.manual_seed(0)
        model = timm.create_model('t2t_vit_7', **narrow).train()
        model.set_grad_checkpointing(on)
        model(torch.ones(1, 3, 32, 32)).square().sum().backward()
        grads.append(model.patch_embed.blocks[0].qkv.weight.grad)
    assert_close(*grads)


@pytest.mark.parametrize('pad', [False, True])
def test_a_side_that_16_does_not_divide(pad):
    model = timm.create_model('t2t_vit_7', **narrow, dynamic_img_pad=pad).eval()
    x = torch.randn(1, 3, 40, 64)
    if not pad:
        with pytest.raises(ValueError, match='16 does not divide 40 x 64'): model(x)
    else: assert_close(model(x), model(torch.nn.functional.pad(x, (0, 0, 0, 8))))


def test_places_are_those_of_the_frame_at_any_size():
    "also of a model that was built for small images, whose checkpoint then fits any other"
    built = [timm.create_model('t2t_vit_7', **narrow, img_size=s) for s in (224, 64)]
    assert torch.equal(*(m.places((4, 6)) for m in built))
    assert set(built[0].state_dict()) == set(built[1].state_dict()) and 'sinusoid' not in built[0].state_dict()
    built[1].load_state_dict(built[0].state_dict())
    x = torch.randn(1, 3, 96, 64)
    assert_close(*(m.eval()(x) for m in built))


# as encoders

@pytest.mark.parametrize('family', families)
@pytest.mark.parametrize('size', [(160, 160), (192, 256), (96, 224)])
def test_any_size(family, size):
    name, kwargs = families[family]
    encoder = TokenEncoder(name, **kwargs).eval()
    x = torch.rand(1, 3, *size)
    with torch.no_grad(): tokens, maps = encoder(x), encoder.features(x, layers=(0, -1))
    assert (encoder.grid, encoder.p, tokens.grid) == ((7, 7), 32, (size[0]//32, size[1]//32))
    assert tokens.patches.shape[1] == tokens.prenorm.shape[1] == tokens.grid[0]*tokens.grid[1]
    strides = dict(vit=(32, 32), swin=(4, 32), t2t=(16, 16))[family]
    assert [f.grid for f in maps] == [(size[0]//s, size[1]//s) for s in strides]
    built = TokenEncoder(name, **kwargs, img_size=size)
    assert built.grid == tokens.grid and encoder.resize(size).grid == tokens.grid


def test_which_backbones_are_which():
    says = {f: TokenEncoder(name, **kwargs, pos_embed=False) for f, (name, kwargs) in families.items()}
    assert [(e.is_vit, e.isotropic, e.adds_positions(), e.sees_positions()) for e in says.values()] == [
        (True, True, False, False), (False, False, True, True), (False, True, False, True)]
    assert [e.adds_positions(True) for e in says.values()] == [True]*3
    with pytest.raises(ValueError, match='no positional embedding to start anew'): TokenEncoder('t2t_vit_7', pos_std=.2, **narrow)
    with pytest.raises(ValueError, match='T2TViT takes no attention mask'): TokenEncoder('t2t_vit_7', attn_mask='diagonal', **narrow)
    with pytest.raises(ValueError, match='did you mean t2t_vit_'): TokenEncoder('t2t_vit_15')


def test_relation_passes_of_t2t_do_without_the_waves():
    model = RelViT(TokenEncoder('t2t_vit_7', img_size=64, **narrow), ['relations', 'labels'], classes=3).eval()
    x = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        with_waves = model(x)
        model.encoder.model.sinusoid.zero_()
        without = model(x)
    assert torch.equal(with_waves['relations'], without['relations']) and not torch.equal(with_waves['labels'], without['labels'])


def test_every_weight_of_t2t_learns_from_relations():
    model = RelViT(TokenEncoder('t2t_vit_7', img_size=64, **narrow), ['relations', 'positions'])
    model.loss(model(torch.rand(2, 3, 64, 64))).backward()
    assert all(p.grad is not None and p.grad.any() for p in model.encoder.parameters())


def test_no_class_token():
    encoder = TokenEncoder('t2t_vit_7', cls=False, **narrow).eval()
    tokens = encoder(torch.rand(1, 3, 64, 64))
    assert tokens.cls is None and tokens.grid == (2, 2) and encoder.attention(torch.rand(1, 3, 224, 224))[0].shape == (1, 2, 196, 196)


# all modes on all families

def images(n, size, seed):
    rng = torch.Generator().manual_seed(seed)
    return Images(torch.randint(256, (n, 3, size, size), dtype=torch.uint8, generator=rng), torch.arange(n) % 2, 'ab', 'noise')


def dls(size=64): return image_dls(images(4, size, 0), images(2, size, 1), bs=2, device='cpu')


def fitted(learn):
    with warnings.catch_warnings(), learn.no_bar(), learn.no_logging():
        warnings.simplefilter('error', UserWarning) # of a leak, too
        before = [p.clone() for p in learn.model.encoder.parameters()]
        learn.fit_recipe(1)
    assert all(torch.isfinite(v) for v in learn.model.scores.values())
    assert sum(not torch.equal(p, q) for p, q in zip(before, learn.model.encoder.parameters())) > .8*len(before)
    return learn


def names(learn): return [cb.name for cb in learn.cbs]


@pytest.mark.parametrize('family', families)
@pytest.mark.parametrize('size, mega', [(224, 5), (96, None)])
def test_modes(family, size, mega):
    "pretrain, tune what was pretrained, and both at once; patches are shuffled unless the encoder cannot know places"
    (name, kwargs), data = families[family], dls(size)
    pre = fitted(pretrain_learner(data, name, mega=mega, seed=0, **kwargs))
    assert pre.model.encoder.p == 32 and pre.model.grid == ((mega, mega) if mega else (3, 3))
    assert ('permute_patches' in names(pre)) == (family != 'vit') and ('mega_patches' in names(pre)) == bool(mega)
    tuned = fitted(finetune_learner(data, pre, seed=0))
    assert tuned.model.encoder.img_size == (size, size) and 'permute_patches' not in names(tuned)
    joint = fitted(joint_learner(data, name, mega=mega, seed=0, **kwargs))
    assert 'permute_patches' in names(joint) and set(joint.model.tasks) == {'relations', 'positions', 'labels'}
    assert joint.model.grid == pre.model.grid


def test_pretraining_at_one_size_and_finetuning_at_another():
    pre = pretrain_learner(dls(96), 't2t_vit_7', **narrow)
    tuned = fitted(finetune_learner(dls(128), pre.model.encoder))
    assert tuned.model.encoder.grid == (4, 4) and pre.model.encoder.grid == (3, 3)


def test_bfloat16():
    learn = fitted(pretrain_learner(dls(96), 't2t_vit_7', amp=True, **narrow))
    assert learn.model.encoder.model.cls_token.dtype == torch.float32


def test_a_teacher_of_t2t():
    learn = fitted(pretrain_learner(dls(96), 't2t_vit_7', tasks=DINO(out=16, hidden=32, bottleneck=8), **narrow))
    theirs, ours = (e.model.patch_embed.blocks[0] for e in (learn.model.teacher.encoder, learn.model.encoder))
    assert torch.equal(theirs.w, ours.w) and not torch.equal(theirs.qkv.weight, ours.qkv.weight)


# there and back

@pytest.mark.parametrize('kwargs', [{}, dict(p=16), dict(pos_embed=False), dict(cls=False), dict(tokens_type='transformer')])
def test_files(tmp_path, kwargs):
    "save, load_encoder, export_timm, timm.create_model, and home again"
    encoder = TokenEncoder('t2t_vit_7', img_size=96, mean=.4, std=.2, **kwargs, **narrow).eval()
    x = torch.rand(2, 3, 96, 96)
    with torch.no_grad(): want = encoder(x)
    back = load_encoder(save(encoder, tmp_path/'encoder.safetensors')).eval()
    export = export_timm(back, tmp_path/'timm.safetensors')
    plain = export.create().eval()
    home = load_encoder(tmp_path/'timm.safetensors').eval()
    with torch.no_grad():
        for e in (back, home):
            assert e.grid == want.grid
            assert_close(e(x).patches, want.patches)
        assert_close(plain.forward_features(encoder.prepare(x))[:, plain.num_prefix_tokens:], encoder.features(x)[0].patches)
    assert load_encoder(tmp_path/'encoder.safetensors', img_size=128).grid == ((8, 8) if 'p' in kwargs else (4, 4))


def test_a_classifier_goes_home_to_timm(tmp_path):
    learn = finetune_learner(dls(64), 't2t_vit_7', zero=False, **narrow)
    x, model = torch.rand(2, 3, 64, 64), learn.model.eval()
    export = export_timm(learn, tmp_path/'cls.safetensors')
    with torch.no_grad(): assert_close(export.create().eval()(model.encoder.prepare(x)), model(x)['labels'])
    assert not export.note and export.args['num_classes'] == 2
    pooled = finetune_learner(dls(64), 't2t_vit_7', pool='mean', **narrow)
    assert 'without the classifier' in export_timm(pooled, tmp_path/'mean.safetensors').note
