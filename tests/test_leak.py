"On pure noise there is nothing to learn about places but what leaks: positions that nobody shuffled."
import warnings

import pytest, timm, torch
from relvit.data import image_dls
from relvit.images import Images
from relvit.learner import joint_learner, pretrain_learner
from relvit.patches import permute, random_perms
from relvit.recipes import Recipe
from relvit.tokens import TokenEncoder

small = dict(img_size=16, p=4, embed_dim=48, depth=2, num_heads=3)
fast = Recipe('test', lr=4e-3, final_lr=4e-5)


def noise(steps=150):
    draw = lambda n, seed: Images(torch.randint(256, (n, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)),
                                  torch.arange(n) % 2, 'ab', 'noise')
    return image_dls(draw(2048, 0), draw(256, 1), bs=64, steps=steps, device='cpu')


def trained(learn):
    with learn.no_bar(), learn.no_logging(): learn.fit_recipe(1)
    return {k: float(v) for k, v in learn.model.scores.items()}, learn.model.chance() # validation is one batch


def test_joint_training_does_not_leak_by_default():
    with warnings.catch_warnings():
        warnings.simplefilter('error', UserWarning) # and does not warn
        values, chance = trained(joint_learner(noise(), 'vit_tiny_patch16_224', augment=False, recipe=fast, seed=0, **small))
    # a token knows itself, so the diagonal is no leak; the other pairs are
    assert abs(values['relations_acc_off'] - chance['relations_acc_off']) < .02
    assert abs(values['positions_acc'] - chance['positions_acc']) < .03


def test_the_released_codes_joint_training_leaks_and_says_so():
    with pytest.warns(UserWarning, match='relations and positions can be solved by position alone'):
        values, _ = trained(joint_learner(noise(), 'vit_tiny_patch16_224', leak='paper', recipe=fast, seed=0, **small))
    assert values['relations_acc_off'] > .97 and values['positions_acc'] > .97


@pytest.mark.parametrize('how, leaks', [({}, False), (dict(pos_embed=True), True), (dict(pos_embed=True, permute=True), False)])
def test_pretraining_warns_only_where_it_leaks(how, leaks):
    learn = pretrain_learner(noise(2), 'vit_tiny_patch16_224', recipe=fast, **how, **small)
    with warnings.catch_warnings(record=True) as said, learn.no_bar(), learn.no_logging():
        warnings.simplefilter('always')
        learn.fit_recipe(1), learn.fit_recipe(1)
    assert len([w for w in said if 'position alone' in str(w.message)]) == leaks # once a learner


def test_swin_knows_places_and_is_shuffled():
    dls = image_dls(*(Images(torch.randint(256, (4, 3, 64, 64), dtype=torch.uint8)) for _ in range(2)), bs=2, device='cpu')
    tiny = dict(embed_dim=24, depths=(1, 1), num_heads=(1, 2), window_size=4)
    learn = pretrain_learner(dls, 'swin_tiny_patch4_window7_224', mega=5, recipe=fast, **tiny)
    with warnings.catch_warnings(), learn.no_bar(), learn.no_logging():
        warnings.simplefilter('error', UserWarning)
        learn.fit_recipe(1)
    assert learn.model.encoder.p == 8 and learn.model.grid == (5, 5) and hasattr(learn, 'permute_patches')


@torch.no_grad()
def test_without_positions_a_vit_is_equivariant_and_swin_is_not():
    torch.manual_seed(0)
    vit = TokenEncoder('vit_tiny_patch16_224', **small).eval()
    swin = TokenEncoder('swin_tiny_patch4_window7_224', img_size=64, embed_dim=24, depths=(1, 1), num_heads=(1, 2), window_size=4).eval()
    gaps = {}
    for name, encoder, pos in ('vit', vit, False), ('vit with positions', vit, True), ('swin', swin, None):
        x, n = torch.rand(3, 3, *encoder.img_size), encoder.grid[0]*encoder.grid[1]
        perms = random_perms(3, n)
        a, b = (encoder(v, pos_embed=pos).patches for v in (permute(x, perms, encoder.p), x))
        gaps[name] = (a - b[torch.arange(3)[:, None], perms]).abs().max().item()
    assert gaps['vit'] < 1e-5 and gaps['vit with positions'] > 1e-2 and gaps['swin'] > 1e-2


def test_only_a_vit_with_an_embedding_starts_it_anew():
    swin = dict(name_or_model='swin_tiny_patch4_window7_224', img_size=64, embed_dim=24, depths=(1, 1), num_heads=(1, 2), window_size=4)
    bare = timm.create_model('vit_tiny_patch16_224', img_size=16, patch_size=4, embed_dim=48, depth=2, num_heads=3, num_classes=0, pos_embed='none')
    for kw in swin, dict(name_or_model=bare):
        for how in dict(pos_embed='sincos'), dict(pos_std=.1):
            with pytest.raises(ValueError, match='has no positional embedding to start anew'): TokenEncoder(**kw, **how)
