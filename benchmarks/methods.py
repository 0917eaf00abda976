"""DINO, MoBY, MoCo v3, SelfPatch and SERE beside the same by hand, and beside what the released codes do.

    python benchmarks/methods.py [--parts engine,matching,relations] [--quick] [--device cpu|cuda] [--threads 2]
                                 [--rounds 7] [--out results/benchmark_methods.json]

engine     a training step on crops that are there, without optimiser: relvit's engine over the passes of both networks,
           the same heads and losses, backward and the teacher's move, one after the other on timm's ViT; also over a
           supervised step of that ViT on one crop an image, and the GB that a step keeps for its backward pass. Both
           sides work on the same weights, and must come to the same losses, gradients, teachers, centres and queues
matching   SelfPatch's positives and their tokens, over the released way: all neighbours side by side, twice
relations  SERE's pixel relation, features sampled first, over the released way: related first, then all relations
           sampled twice; and its sampling grids over a loop of images and points

Written from descriptions of the released codes. Sides take turns. `engine` tells the wall's time with `--threads`, and
that of all threads as CPU; the others one thread's own time (on a GPU the wall's). Figures are medians over rounds,
ratios medians of each round's ratio; a ratio above 1 is in relvit's favour. Half an hour on 2 cores, which should have
nothing else to do; `--sizes 'ViT 192/6, 32 px, p 4'` takes a fifth of that.
"""
import os
os.environ.setdefault('OMP_WAIT_POLICY', 'PASSIVE') # as benchmarks/train.py
import argparse, copy, json, statistics, time
from collections import namedtuple
from functools import partial
from itertools import product

import torch, torch.nn.functional as F

import relvit.moco # noqa: F401 (MoBY and MoCo v3 come into TASKS)
from relvit.checkpoint import write_whole
from relvit.dino import cross_views
from relvit.losses import info_nce, soft_cross_entropy
from relvit.patches import positions
from relvit.relations import spatial_relations
from relvit.runs import provenance
from relvit.selfpatch import neighbours, positives
from relvit.sere import pixel_relation, sample_views, view_pairs
from relvit.tasks import TASKS, RelViT
from relvit.tokens import TokenEncoder
from relvit.views import MultiCrop, draw_boxes, sample_map, sampling_grids

HALF = dict(relations=dict(weight=.5))
SIZES = {'ViT 192/6, 32 px, p 4': dict(img=32, local=12, p=4, bs=16, embed_dim=192, depth=6, num_heads=3,
                                       heads=HALF | dict(dino=dict(out=4096))), # more classes would hide the engine
         'ViT-S/16, 224 px': dict(img=224, local=96, p=16, bs=4, embed_dim=384, depth=12, num_heads=6, heads=HALF),
         'a tiny ViT': dict(img=16, local=12, p=4, bs=4, embed_dim=48, depth=2, num_heads=3, heads=HALF | dict(
             dino=dict(out=64, hidden=64), selfpatch=dict(out=64, hidden=64), moby=dict(hidden=64), moco3=dict(hidden=64)))}
METHODS = ('dino', 'moby', 'moco3', 'dino + selfpatch', 'moby + selfpatch', 'moco3 + selfpatch', 'dino + pixel + channel',
           'moco3 + pixel + channel', 'dino + selfpatch + relations')
Side = namedtuple('Side', 'looks heads pool') # of student or teacher: a `look` a resolution


# ---- a step by hand

def look(encoder, x, places=True):
    "timm's ViT, part by part: its class token, its other tokens before the last norm, their grid"
    vit, x = encoder.model, encoder.model.patch_embed((x - encoder.mean)/encoder.std)
    grid, first = tuple(x.shape[1:3]), vit.num_prefix_tokens
    if places: x = vit._pos_embed(x)
    else: x = torch.cat([vit.cls_token.expand(len(x), -1, -1), x.flatten(1, 2)] if first else [x.flatten(1, 2)], 1)
    x = vit.blocks(x)
    return vit.norm(x)[:, 0] if first else None, x[:, first:], grid


def image(side, i): return side.pool(side.looks[i][1]) if side.pool else side.looks[i][0]
def as_map(look): return look[1].mT.unflatten(2, look[2])


def dino(task, s, t, views):
    pred = [task.head(image(s, i)).unflatten(0, (v, -1)) for i, v in enumerate(views.counts)]
    with torch.no_grad(): taught = t.heads['dino'](image(t, 0)).unflatten(0, (views.counts[0], -1))
    loss = cross_views(pred, taught, .1, .04, task.center.value)
    task.center.value.lerp_(taught.mean((0, 1)), .1)
    return loss


def contrast(task, s, t):
    q = [task.head['predictor'](task.head['projector'](x)) for x in image(s, 0).chunk(2)]
    with torch.no_grad(): return q, [t.heads[task.name](x) for x in image(t, 0).chunk(2)]


def moco3(task, s, t, views):
    q, k = contrast(task, s, t)
    return .4*(info_nce(q[0], k[1], .2) + info_nce(q[1], k[0], .2))


def moby(task, s, t, views):
    (q, k), (a, b) = contrast(task, s, t), task.queues
    loss = info_nce(q[0], k[1], .2, b.keys.clone()) + info_nce(q[1], k[0], .2, a.keys.clone()) # pushing writes into them
    for queue, keys in zip((a, b), k): queue.push(keys)
    return loss


def selfpatch(task, s, t, views):
    pred, head = [task.head(x) for _, x, _ in s.looks], t.heads['selfpatch']
    with torch.no_grad(): taught = [head.project(head.aggregate(x, positives(x, grid))) for _, x, grid in t.looks]
    each = [soft_cross_entropy(a, b, .1, .04, task.center.value).mean() for a, b in zip(pred, taught)]
    rows = [b.flatten(0, 1) for b in taught]
    task.center.value.lerp_(sum(r.sum(0) for r in rows)/sum(map(len, rows)), .1)
    return sum(v*e for v, e in zip(views.counts, each))/sum(views.counts)


def pixel(task, s, t, views):
    with torch.no_grad(): z, each, met = t.heads['pixel'](as_map(t.looks[0])).unflatten(0, (views.counts[0], -1)), [], []
    for r, v in enumerate(views.counts):
        f, (q, k), (h, w) = task.head[0](as_map(s.looks[r])).unflatten(0, (v, -1)), view_pairs(views.counts, r), s.looks[r][2]
        mine, theirs = views.boxes[q], views.boxes[r*views.counts[0] + k]
        at_q, at_k, meets = sampling_grids(mine, theirs, (h - (r == 0), w - (r == 0)))
        student = pixel_relation(sample_views(f, k, at_k).flatten(0, 1), task.heads)
        with torch.no_grad(): taught = pixel_relation(sample_views(z, q, at_q).flatten(0, 1), task.heads)
        each.append(soft_cross_entropy(student, taught, 1., .5).mean((1, 2))), met.append(meets.flatten())
    each, met = torch.cat(each), torch.cat(met)
    return (each*met).sum()/met.sum().clamp(min=1)


def channel(task, s, t, views):
    def relation(x, v): return (x.flatten(2) @ x.flatten(2).mT/x[0, 0].numel()).unflatten(0, (v, -1))
    with torch.no_grad(): a, b = relation(t.heads['channel'](as_map(t.looks[0])), 2)
    mine = [relation(task.head[0](as_map(x)), v) for x, v in zip(s.looks, views.counts)]
    pairs = [(mine[0][1:], a), (mine[0][:1], b), *[(m, taught) for m in mine[1:] for taught in (a, b)]]
    return torch.cat([soft_cross_entropy(f, taught, 1., .1) for f, taught in pairs]).mean()


BY_HAND = {f.__name__: f for f in (dino, moby, moco3, selfpatch, pixel, channel)}


class Plain:
    "One training step, its passes, heads and losses one after the other, on the weights of a `RelViT`"
    def __init__(self, model):
        self.model, self.first, self.both = model, model.host.moves == 'before', 'selfpatch' in model.tasks
        teacher = model.teacher
        parts = [(teacher.encoder, model.encoder), *((h, model.tasks[n].taught_part()) for n, h in teacher.heads.items())]
        self.weights = [[w for pair in parts for w in pair[i].parameters()] for i in (0, 1)]

    @torch.no_grad()
    def move(self): torch._foreach_lerp_(*self.weights, 1 - self.model.host.momentum[0])

    def sides(self, views):
        "What both networks see; SelfPatch's aggregator stands in for a class token"
        heads, taught = {n: t.head for n, t in self.model.tasks.items()}, self.model.teacher.heads
        pools = [h['selfpatch'].aggregate if self.both else None for h in (heads, taught)]
        s = Side([look(self.model.encoder, c) for c in views.crops], heads, pools[0])
        with torch.no_grad(): looks = [look(self.model.teacher.encoder, c) for c in views.crops[:1 + self.both]]
        return s, Side(looks, taught, pools[1])

    def relations(self, task, views):
        _, x, grid = look(self.model.encoder, views.crops[0][:views.b], places=False)
        target = spatial_relations(positions(grid, device=x.device)).expand(views.b, -1, -1)
        return F.cross_entropy(task.head(self.model.encoder.model.norm(x)), target)

    def __call__(self, views):
        self.model.zero_grad()
        if self.first: self.move()
        s, t = self.sides(views)
        loss = sum(task.weight*(self.relations(task, views) if n == 'relations' else BY_HAND[n](task, s, t, views))
                   for n, task in self.model.tasks.items())
        loss.backward()
        if not self.first: self.move()
        return loss.detach()


def engine_step(model, views):
    "The same by relvit's engine, as a Learner calls it"
    model.zero_grad()
    if model.host.moves == 'before': model.move_teacher(0.)
    loss = model.loss(model(views.view(0), views=views))
    loss.backward()
    if model.host.moves == 'after': model.move_teacher(0.)
    return loss.detach()


def supervised(encoder, views):
    "A step on labels of one crop an image, with the same encoder"
    head, y = torch.nn.Linear(encoder.dim, 10, device=views.boxes.device), torch.arange(views.b, device=views.boxes.device) % 10
    def step():
        encoder.zero_grad(), head.zero_grad()
        cls, x, _ = look(encoder, views.view(0))
        F.cross_entropy(head(x.mean(1) if cls is None else cls), y).backward()
    return step


# ---- measuring

def times(sides, rounds, device, alone=False):
    "(wall, CPU) seconds of each side in each round, taking turns, after a warm-up; `alone`: of this thread, as both"
    def clock():
        if device == 'cuda': torch.cuda.synchronize()
        here = time.thread_time() if alone and device == 'cpu' else time.perf_counter()
        return here, here if alone else time.process_time()
    found = []
    for f in sides: f()
    for i in range(rounds):
        row = {}
        for j in range(len(sides))[::-1 if i % 2 else 1]:
            before = clock()
            sides[j]()
            row[j] = [b - a for a, b in zip(before, clock())]
        found.append([row[j] for j in range(len(sides))])
    return torch.tensor(found, dtype=torch.double) # (rounds,sides,2)


def middle(x): return statistics.median(x.tolist())


def kept(step):
    "GB that a step keeps for its backward pass, its weights among them"
    found = {}
    def note(t):
        found[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t
    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t): step()
    return sum(found.values())/1e9


def equal(a, b, tolerance, what):
    worst = max(((x - y).abs().max()/y.abs().max().clamp(min=1e-12)).item() for x, y in zip(a, b, strict=True))
    assert worst < tolerance, f'{what}: the two sides differ by {worst:.1e}'
    return worst


def same(model, views):
    "Losses of two steps, the last gradients and the states by hand and by the engine are the same; says how far they differ"
    a, b = copy.deepcopy(model), copy.deepcopy(model)
    plain, losses = Plain(a), ([], [])
    for _ in range(2): losses[0].append(plain(views)), losses[1].append(engine_step(b, views))
    grads = [[w.grad for w in m.parameters() if w.grad is not None] for m in (a, b)]
    norms = [torch.stack(torch._foreach_norm(g)) for g in grads]
    state = [[x.float() for n, x in m.state_dict().items() if not n.endswith('num_batches_tracked')] for m in (a, b)]
    return equal(*losses, 1e-5, 'loss'), equal(*([n] for n in norms), 1e-4, 'gradient'), equal(*state, 1e-4, 'state')


def build(method, img, local, p, bs, heads, device, **shape):
    "A model whose teacher is not its student, and crops"
    names = method.split(' + ')
    encoder = TokenEncoder('vit_small_patch16_224', img_size=img, p=p, cls='selfpatch' not in names, **shape)
    model = RelViT(encoder, [TASKS[n](**heads.get(n, {})) for n in names]).to(device).train()
    with torch.no_grad():
        for w in model.teacher.parameters(): w.mul_(1 + .1*torch.randn_like(w))
    few = not any(t.local_crops for t in model.view_tasks.values())
    crops = MultiCrop(img, None if few else local)
    return model, crops(torch.rand(bs, 3, img + img//4, img + img//2, device=device))


def engine(args, say):
    "The engine over its passes by hand"
    torch.set_num_threads(args.threads)
    for size, method in product(args.sizes, METHODS):
        torch.manual_seed(0)
        model, views = build(method, device=args.device, **SIZES[size])
        differ = same(model, views)
        sides = partial(Plain(model), views), partial(engine_step, model, views), supervised(model.encoder, views)
        slow, fast, one = 1e3*times(sides, args.rounds, args.device).permute(1, 2, 0) # each wall and CPU, (2,rounds)
        more, over, memory = 100*(fast/slow - 1), middle(fast[0]/one[0]), [kept(f) for f in sides[:2]]
        percent, cpu = map(middle, more)
        say(f'{size}, {method}', middle(slow[0]), middle(fast[0]), 'ms', middle(slow[0]/fast[0]), 'at most 5 % more',
            note=f'{percent:+.1f} % (CPU {cpu:+.1f} %), {over:.1f} supervised steps, {memory[1]:.2f} GB', size=size,
            method=method, percent=percent, cpu=cpu, each=more.tolist(), supervised=middle(one[0]), over=over,
            kept=memory, differ=differ)


def released_positives(x, near, k=4):
    "All neighbours of all patches side by side, twice"
    z = F.normalize(x, dim=-1)
    likeness = (z[:, :, None] @ z[:, near].mT)[:, :, 0]
    best = likeness.topk(k).indices
    return near.expand(len(x), -1, -1).gather(2, best), x[:, near].gather(2, best[..., None].expand(-1, -1, -1, x.shape[-1]))


def our_positives(x, grid):
    ids = positives(x, grid)
    return ids, x[torch.arange(len(x), device=x.device)[:, None, None], ids]


@torch.no_grad()
def matching(args, say):
    "SelfPatch's choice of positives"
    torch.set_num_threads(1)
    torch.manual_seed(0)
    b, grid, d = (2, (6, 6), 48) if args.quick else (16, (14, 14), 384)
    x = torch.randn(b, grid[0]*grid[1], d, device=args.device)
    near = neighbours(grid, device=args.device)
    sides = lambda: released_positives(x, near), lambda: our_positives(x, grid)
    (ids, tokens), (ours, chosen) = (f() for f in sides)
    assert torch.equal(ids, ours) and torch.equal(tokens, chosen), 'the two sides choose other positives'
    t = times(sides, 2*args.rounds, args.device, alone=True)[..., 0]
    say(f'positives and their tokens, B {b}, {grid[0]} x {grid[1]}, d {d}', *(1e3*middle(c) for c in t.T), 'ms',
        middle(t[:, 0]/t[:, 1]), '2.5', 'released')


def released_relation(f, heads, points):
    "(b,heads,s*t,s*t): every place to every place, then the columns and the rows of that are sampled"
    (b, d, h, w), n = f.shape, points[0, ..., 0].numel()
    z = f.reshape(b, heads, d//heads, h*w)
    a = sample_map((z.mT @ z*(d//heads)**-.5).reshape(b, heads*h*w, h, w), points) # each row is a map
    return sample_map(a.reshape(b, heads, h*w, n).mT.reshape(b, heads*n, h, w), points).reshape(b, heads, n, n).mT


def plain_grids(q, k, n):
    "The points of an overlap in the frames of both boxes, one number after the other, each a tensor"
    low, high = [max(q[i], k[i]) for i in (0, 1)], [min(q[i] + q[2 + i], k[i] + k[2 + i]) for i in (0, 1)]
    if high[0] <= low[0] or high[1] <= low[1]: return (torch.full((n, n, 2), -2.),)*2
    grids = []
    for box in (q, k):
        x, y = ([(low[i] + (high[i] - low[i])*j/(n - 1) - box[i])/box[2 + i] for j in range(n)] for i in (0, 1))
        if box[4]: x = [1 - u for u in x]
        grids.append(2*torch.stack(torch.meshgrid(torch.stack(x), torch.stack(y), indexing='xy'), -1) - 1)
    return grids


def relations(args, say):
    "SERE's pixel relation and its grids"
    torch.set_num_threads(1)
    torch.manual_seed(0)
    b, d, heads = (2, 48, 3) if args.quick else (16, 384, 6)
    sizes = torch.tensor([[375, 500]]).expand(b, 2)
    large, small = draw_boxes(2, sizes, (.4, 1.)), draw_boxes(10, sizes, (.05, .4))
    f = torch.rand(b, d, 14, 14, device=args.device) # behind a ReLU nothing is below 0
    for what, other, n in ('of two global views', large[1], 13), ('of a global view for a local one', small[0], 6):
        points = sampling_grids(large[0], other, n)[0].to(args.device)
        sides = lambda: released_relation(f, heads, points), lambda: pixel_relation(f, heads, points)
        equal(*[[s()] for s in sides], 1e-4, 'relations')
        t = times(sides, 2*args.rounds, args.device, alone=True)[..., 0]
        say(f'pixel relation {what}, {n} x {n}, M {heads}, B {b}, d {d}', *(1e3*middle(c) for c in t.T), 'ms',
            middle(t[:, 0]/t[:, 1]), '3', 'released')

    boxes = torch.cat([large, small])
    pairs = [(n, boxes[q], boxes[2*r + k]) for r, n in enumerate((13, 6)) for q, k in [view_pairs([2, 10], r)]]
    def loop(): return [torch.stack([torch.stack(plain_grids(*both, n)) for both in zip(q.flatten(0, 1), k.flatten(0, 1))])
                        for n, q, k in pairs]
    def ours(): return [torch.stack(sampling_grids(q, k, n)[:2], 2).flatten(0, 1) for n, q, k in pairs]
    equal(loop(), ours(), 1e-4, 'grids')
    t = times((loop, ours), args.rounds, 'cpu', alone=True)[..., 0]
    say(f'sampling grids of 22 pairs of views, {b} images', *(1e3*middle(c) for c in t.T), 'ms', middle(t[:, 0]/t[:, 1]),
        beside='released')


def main():
    parts = dict(engine=engine, matching=matching, relations=relations)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--parts', default=','.join(parts), help='any of them: %(default)s')
    parser.add_argument('--quick', action='store_true', help='a tiny network, small batches, one round: does it run?')
    parser.add_argument('--device', choices=('cpu', 'cuda'), default='cuda' if torch.cuda.is_available() else 'cpu')
    parser.add_argument('--threads', type=int, default=2, help='of torch, for the part `engine`')
    parser.add_argument('--rounds', type=int, default=7)
    parser.add_argument('--sizes', default=';'.join(list(SIZES)[:2]), help='of networks: %(default)s')
    parser.add_argument('--out', help='write the figures as JSON')
    args = parser.parse_args()
    if wrong := set(args.parts.split(',')) - set(parts): parser.error(f'no part is called {", ".join(wrong)}')
    args.sizes = list(SIZES)[2:] if args.quick else args.sizes.split(';')
    if args.quick: args.rounds = 1
    lines = []

    def say(what, plain, ours, unit, ratio, aim='', beside='by hand', note='', **more):
        if args.quick: aim = '' # which is not for a tiny network
        lines.append(dict(part=part, what=what, beside=beside, plain=plain, ours=ours, unit=unit, ratio=ratio, aim=aim, **more))
        said = f'{what:<70s} {beside:<8s} {plain:9.3f}  ours {ours:9.3f} {unit} x {ratio:6.2f}'
        print(f'{said}  {note}{f" (aim {aim})" if aim else ""}', flush=True)

    for part in args.parts.split(','): parts[part](args, say)
    if args.out:
        text = json.dumps(dict(lines=lines, threads=args.threads, rounds=args.rounds, kind=args.device, quick=args.quick,
                               **provenance()), indent=1)
        write_whole(args.out, lambda f: open(f, 'w').write(text))


if __name__ == '__main__': main()
