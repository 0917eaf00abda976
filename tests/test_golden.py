"""Numbers that the papers' own code gave on seeded inputs (float32, one thread), kept in tests/fixtures.

Keys are as recorded: `s8_p1_angles`, `head_rel_dwq`, `vit_pos_16x16_zp`. Tolerances are absolute unless a test says
otherwise.
"""
from functools import cache
from pathlib import Path

import numpy as np, pytest, torch
import torch.nn.functional as F
from torch.testing import assert_close

from relvit.patches import from_patches, inverse_perms, mega_patches, permute, positions, to_patches
from relvit.relations import absolute_positions, angles, distances, spatial_relations

fixtures = Path(__file__).parent/'fixtures'


@cache
def _load(name): return {k: torch.as_tensor(v) for k, v in np.load(fixtures/f'{name}.npz').items()}


def recorded(name, prefix=''):
    "The arrays of a file whose keys start so, without that start; copies, as tests train them"
    found = {k.removeprefix(prefix): v.clone() for k, v in _load(name).items() if k.startswith(prefix)}
    assert found, f'{name} holds no {prefix}*'
    return found


def close(got, want, tol): assert_close(got, want, atol=tol, rtol=0)


# floor 0

orders = [(3, 'id'), (3, 'p1'), (8, 'id'), (8, 'p1')]


@pytest.mark.parametrize('side,order', orders)
def test_targets(side, order):
    want = recorded('targets', f's{side}_{order}_')
    assert set(want) == {'perm', 'relations', 'distances', 'angles', 'abs_positions'}
    pos = positions((side, side), want['perm'])
    assert torch.equal(spatial_relations(pos), want['relations'])
    assert torch.equal(absolute_positions((side, side), want['perm']), want['abs_positions'])
    close(distances(pos), want['distances'], 2e-7)
    close(angles(pos), want['angles'], 5e-4) # theirs is float32 acos near 1, off by up to 1.9e-4 at 8 x 8


@pytest.mark.parametrize('side', [3, 8])
def test_angles_are_nearer_the_truth_than_the_recorded_ones(side):
    p = positions((side, side)).double() + side/2
    n = p.norm(dim=-1)
    a = ((p @ p.T)/(n[:, None]*n + 1e-4)).acos().fill_diagonal_(0)
    truth = a/a.max()*2 - 1
    theirs = (recorded('targets')[f's{side}_id_angles'] - truth).abs().max()
    ours = (angles(positions((side, side))) - truth).abs().max()
    assert ours < 1e-6 and theirs > 2e-6 and theirs < 4e-4


def test_patches():
    r = recorded('ops', 'patch_sq32_')
    x, perm, p = r['image'][None], r['perm'], r['patch_size'].tolist()
    patches = r['patches'].transpose(0, 1)[None] # recorded with the channels first
    assert torch.equal(to_patches(x, p), patches)
    assert torch.equal(from_patches(patches, (8, 8)), x)
    assert torch.equal(permute(x, perm, p)[0], r['shuffled_image'])
    assert torch.equal(permute(r['shuffled_image'][None], inverse_perms(perm), p), x)


@pytest.mark.parametrize('antialias', [True, False])
def test_mega_patches(antialias):
    "The recorded cuts are the reference's for rows and for columns"
    r = recorded('ops', 'mega_m56_p8_s5_')
    size, p, side, *_ = r['meta'].tolist()
    edge = torch.tensor([[0, *r['cuts_used'], size//p]])
    want = r['out_antialias' if antialias else 'out_noantialias']
    for b in 1, 3:
        x, borders = r['image'].expand(b, -1, -1, -1), (edge.expand(b, -1),)*2
        for mega in mega_patches(x, p, side, borders=borders, antialias=antialias): close(mega, want, 1e-6)


# heads and losses

@pytest.mark.parametrize('name', ['rel', 'one'])
def test_pair_head(name):
    from relvit.heads import PairHead
    r = recorded('ops', f'head_{name}_')
    dim, k = r['z'].shape[-1], len(r['wq'])
    head, z = PairHead(dim, k), r['z'].requires_grad_()
    assert {n: w.shape for n, w in head.named_parameters()} == {'qk.weight': (2*k*(dim//k), dim)} # and nothing unused
    head.qk.weight.data = torch.cat([r['wq'].reshape(-1, dim), r['wk'].reshape(-1, dim)])
    out = head(z)
    close(out, r['out'], 1e-5)
    (out*r['gout']).sum().backward()
    close(z.grad, r['dz'], 1e-5)
    close(head.qk.weight.grad, torch.cat([r['dwq'].reshape(-1, dim), r['dwk'].reshape(-1, dim)]), 1e-5)


def loop_head(z, wq, wk):
    "The reference's head, one class, one pair after the other: (Wq z_i).(Wk z_j)/sqrt(d)"
    scores = [(q @ zi) @ (k @ zj)/len(q)**.5 for zb in z for q, k in zip(wq, wk) for zi in zb for zj in zb]
    return torch.stack(scores).reshape(len(z), len(wq), z.shape[1], z.shape[1])


def test_pair_head_where_k_does_not_divide_the_width():
    "50 // 9 = 5, the rest of the width is not used. Against a loop, which recorded numbers hold to account"
    from relvit.heads import PairHead
    r = recorded('ops', 'head_rel_')
    close(loop_head(r['z'], r['wq'], r['wk']), r['out'], 1e-5)
    g = torch.Generator().manual_seed(43)
    z, head = torch.randn(1, 9, 50, generator=g), PairHead(50, 9)
    assert head.qk.weight.shape == (90, 50)
    close(head(z), loop_head(z, *head.qk.weight.unflatten(0, (2, 9, 5))), 1e-5)


def test_bilinear_head_is_equation_8():
    "With W_k = Wq_k' Wk_k it is the factorised head, but for the scale: sqrt(48) for sqrt(5)"
    from relvit.heads import PairHead
    r, head = recorded('ops', 'head_rel_'), PairHead(48, 9, kind='bilinear')
    assert sum(w.numel() for w in head.parameters()) == 9*48*48
    W = r['wq'].mT @ r['wk'] # z_i W_k z_j
    for w in head.parameters(): w.data = W.mT.reshape(w.shape) # (W_k' z_i).z_j
    close(head(r['z'])*48**.5/5**.5, r['out'], 1e-5)


def test_a_head_of_pairs_is_of_one_kind_or_the_other():
    from relvit.heads import PairHead
    with pytest.raises(ValueError, match="kind is 'qk' or 'bilinear', not 'both'"): PairHead(48, 9, kind='both')
    with pytest.raises(ValueError, match='9 classes leave no width of 8'): PairHead(8, 9)
    assert PairHead(8, 8).width == 1 and PairHead(8, 9, kind='bilinear').width == 8


def test_losses():
    from relvit.losses import mse, pair_cross_entropy
    logits, target, want = (recorded('ops', f'loss_{k}_') for k in ('logits', 'target', 'smooth0'))
    got = dict(rel=pair_cross_entropy(logits['rel'], target['relations']),
               dist=mse(logits['dist'], target['distances']),
               angle=mse(logits['angle'], target['angles']),
               abs_pos=pair_cross_entropy(logits['abs_pos'], target['abs_positions']),
               clf=pair_cross_entropy(logits['clf'], target['labels']))
    for k, v in got.items(): close(v, want[f'loss_{k}'], 1e-5)
    close(sum(got.values()), want['total'], 1e-5)
    smooth = pair_cross_entropy(logits['rel'], target['relations'], smoothing=.1)
    close(sum(got.values()) - got['rel'] + smooth, torch.tensor(13.092918), 1e-5)


def test_targets_of_the_losses():
    "The recorded targets are those of the recorded permutations"
    r = recorded('ops')
    pos = positions((3, 3), r['loss_perms'])
    assert torch.equal(spatial_relations(pos), r['loss_target_relations'])
    assert torch.equal(absolute_positions((3, 3), r['loss_perms']), r['loss_target_abs_positions'])
    close(distances(pos), r['loss_target_distances'], 2e-7)
    close(angles(pos), r['loss_target_angles'], 5e-4)


def test_loss_with_dropped_pairs():
    "Dropout falls on the loss of each pair, drawn right after the seed"
    from relvit.losses import pair_cross_entropy
    r = recorded('ops')
    torch.manual_seed(52)
    got = pair_cross_entropy(r['loss_logits_rel'], r['loss_target_relations'], smoothing=.1, drop=.5)
    close(got, torch.tensor(3.465806), 1e-5)


def test_reference_learning_rate():
    from relvit.recipes import reference_lr
    r = recorded('ops')
    got = torch.tensor([reference_lr(step/1000) for step in r['lr_steps_of_1000'].tolist()], dtype=torch.float64)
    assert_close(got, r['lr_values'].double(), atol=1e-12, rtol=2e-6)


# a ViT

def vit():
    "The recorded ViT of 2 blocks, width 48, 3 heads, in timm's clothes"
    from timm.models.vision_transformer import VisionTransformer
    model = VisionTransformer(img_size=16, patch_size=4, embed_dim=48, depth=2, num_heads=3, num_classes=0,
                              dynamic_img_size=True)
    model.load_state_dict(recorded('vit', 'vit_w.'))
    return model.eval()


def encoder():
    from relvit.tokens import TokenEncoder
    return TokenEncoder(vit(), mean=0., std=1.).eval()


def plain_vit(x, pos=None, w=None):
    "Class token and patch tokens of that network in torch's own words, for what was not recorded"
    w = w or recorded('vit', 'vit_w.')
    norm = lambda x, name: F.layer_norm(x, (48,), w[f'{name}.weight'], w[f'{name}.bias'], 1e-6)
    linear = lambda x, name: F.linear(x, w[f'{name}.weight'], w[f'{name}.bias'])
    z = F.conv2d(x, w['patch_embed.proj.weight'], w['patch_embed.proj.bias'], stride=4).flatten(2).mT
    z = torch.cat([w['cls_token'].expand(len(x), -1, -1), z], 1)
    if pos is not None: z = z + pos
    for i in 0, 1:
        qkv = linear(norm(z, f'blocks.{i}.norm1'), f'blocks.{i}.attn.qkv')
        q, k, v = qkv.unflatten(-1, (3, 3, 16)).permute(2, 0, 3, 1, 4)
        a = (q @ k.mT/4).softmax(-1) @ v
        z = z + linear(a.transpose(1, 2).flatten(2), f'blocks.{i}.attn.proj')
        z = z + linear(F.gelu(linear(norm(z, f'blocks.{i}.norm2'), f'blocks.{i}.mlp.fc1')), f'blocks.{i}.mlp.fc2')
    z = norm(z, 'norm')
    return z[:, 0], z[:, 1:]


def resized(pos, h, w):
    "Positions on another grid as DINO did it: bicubic by a factor a little too large, without antialiasing"
    cls, grid = pos[:, :1], pos[:, 1:].mT.unflatten(-1, (4, 4))
    grid = F.interpolate(grid, scale_factor=((h + .1)/4, (w + .1)/4), mode='bicubic')
    return torch.cat([cls, grid.flatten(2).mT], 1)


@torch.no_grad()
@pytest.mark.parametrize('pos', [True, False])
def test_tokens(pos):
    r, name = recorded('vit'), 'pos' if pos else 'nopos'
    t = encoder()(r['vit_in_16x16'], pos_embed=pos)
    assert t.grid == (4, 4)
    close(t.cls, r[f'vit_{name}_16x16_z'], 1e-5)
    close(t.patches, r[f'vit_{name}_16x16_zp'], 1e-5)
    close(vit().norm(t.prenorm), t.patches, 1e-6)
    plain = plain_vit(r['vit_in_16x16'], r['vit_w.pos_embed'] if pos else None)
    for got, want in zip((t.cls, t.patches), plain): close(got, want, 1e-5)


@torch.no_grad()
@pytest.mark.parametrize('size', [(24, 24), (12, 20)])
def test_tokens_of_other_sizes(size):
    "Without positions exact. With them timm's resizing, antialiased, differs from DINO's by about .02: less than .05"
    x, grid = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0)), (size[0]//4, size[1]//4)
    enc = encoder()
    t = enc(x, pos_embed=False)
    assert t.grid == grid
    for got, want in zip((t.cls, t.patches), plain_vit(x)): close(got, want, 1e-5)
    with_pos = enc(x)
    plain = plain_vit(x, resized(enc.model.pos_embed, *grid))
    for got, want in zip((with_pos.cls, with_pos.patches), plain): close(got, want, .05)
    assert (with_pos.patches - t.patches).abs().max() > .05 # the bound can fail


@torch.no_grad()
def test_attention():
    r = recorded('vit')
    maps = encoder().attention(r['vit_in_16x16'])
    assert len(maps) == 2
    close(maps[-1], r['vit_last_attn_16x16'], 1e-5)


# a whole RelViT: its own numbers were not recorded with the rest, so it is held to parts that were

def relvit(**kwargs):
    "All five tasks over the recorded ViT"
    from relvit.tasks import RelViT
    torch.manual_seed(0)
    return RelViT(encoder(), ['relations', 'distances', 'angles', 'positions', 'labels'], classes=10, **kwargs).train()


def shuffled_batch():
    g = torch.Generator().manual_seed(1)
    x, perms = torch.randn(4, 3, 16, 16, generator=g), torch.stack([torch.randperm(16, generator=g) for _ in range(4)])
    return x, permute(x, perms, 4), perms, torch.arange(4)


@pytest.mark.parametrize('pos_embed', [True, False])
def test_relvit_is_its_parts(pos_embed):
    "Losses, their sum and the gradient of every weight, against the plain network and the definitions"
    model, (x, shuffled, perms, y) = relvit(pos_embed=pos_embed), shuffled_batch()
    pos = positions((4, 4), perms)
    model.loss(model(x, shuffled, pos), y).backward()

    w = recorded('vit', 'vit_w.') | {k: v.clone() for k, v in model.tasks.state_dict().items()}
    for v in w.values(): v.requires_grad_()
    _, z = plain_vit(shuffled, w['pos_embed'] if pos_embed else None, w)
    cls, _ = plain_vit(x, w['pos_embed'], w) # the classifier sees the image as it is, with positions
    pairs = {t: loop_head(z, *w[f'{t}.head.qk.weight'].unflatten(0, (2, k, 48//k)))
             for t, k in (('relations', 9), ('distances', 1), ('angles', 1))}
    places = F.linear(z, w['positions.head.weight'], w['positions.head.bias'])
    want = dict(relations=F.cross_entropy(pairs['relations'], spatial_relations(pos)),
                distances=F.mse_loss(pairs['distances'][:, 0], distances(pos)),
                angles=F.mse_loss(pairs['angles'][:, 0], angles(pos)),
                positions=F.cross_entropy(places.flatten(0, 1), perms.flatten()),
                labels=F.cross_entropy(F.linear(cls, w['labels.head.fc.weight'], w['labels.head.fc.bias']), y))
    for t, v in want.items(): close(model.scores[f'{t}_loss'], v.detach(), 1e-5)
    sum(want.values()).backward()

    got = {k.removeprefix('encoder.model.').removeprefix('tasks.'): v.grad for k, v in model.named_parameters()}
    assert set(got) == set(w)
    for k, v in w.items(): assert_close(got[k], v.grad, atol=1e-5, rtol=1e-4, msg=lambda m: f'{k}: {m}')


@torch.no_grad()
def test_without_positions_the_patches_may_come_in_any_order():
    "The network then permutes with them: shuffling changes neither the tokens nor any loss. With positions it does"
    x, shuffled, perms, y = shuffled_batch()
    for pos_embed in False, True:
        model = relvit(pos_embed=pos_embed)
        ordered, mixed = model(x), model(x, shuffled, positions((4, 4), perms))
        same = torch.stack([m[:, p][:, :, p] for m, p in zip(ordered['relations'], perms)])
        gap = (mixed['relations'] - same).abs().max()
        losses = [model.loss(p, y) for p in (ordered, mixed)]
        if pos_embed: assert gap > .1
        else: assert gap < 1e-5 and abs(losses[0] - losses[1]) < 1e-5


@torch.no_grad()
def test_metrics():
    "Accuracies of the recorded logits"
    r, tasks = recorded('ops', 'loss_'), relvit().tasks
    for task, kind, target in zip(('relations', 'positions', 'labels'), ('rel', 'abs_pos', 'clf'),
                                  ('relations', 'abs_positions', 'labels')):
        close(tasks[task].metrics(r[f'logits_{kind}'], r[f'target_{target}'])['acc'], r[f'smooth0_acc_{kind}'], 1e-6)
