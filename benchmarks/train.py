"""Training with relvit beside a plain PyTorch and timm loop and a bare timm backbone: speed, memory, what pays.

    python benchmarks/train.py [--parts steps,overhead,switches,tokens] [--quick] [--device cpu|cuda] [--threads 2]
                               [--rounds 3] [--bs 64] [--steps 16] [--out results/benchmark_train.json]

steps     images a second over a whole epoch, loading and augmentation included: (a) a plain loop, written from the
          description of RelViT's released code (each patch by itself in the workers of a DataLoader, a head a class,
          targets built for each image, fp32), with the best of a few numbers of workers and threads; (b) a bare timm
          classifier on crops and flips of whole batches; relvit in fp32 and in bf16; and the share of time that is
          spent waiting for batches
overhead  relation tasks over forward and backward of the bare backbone, for a batch that is there: on a CPU the time
          of one thread
switches  a step with each of relvit's switches on and off; memory of a batch at once and in parts
tokens    seconds and memory of a step of all four tasks against the number of tokens, each in a process of its own

Sides take turns; figures are medians over rounds, of the wall's time where nothing else is said (the workers of (a) are
processes); a ratio above 1 is in relvit's favour. Images are random bytes in memory, as many as an epoch of `--steps`
takes; nothing is validated. Three quarters of an hour on 2 cores, which should have nothing else to do.
"""
import os
os.environ.setdefault('OMP_WAIT_POLICY', 'PASSIVE') # a thread that spins while it waits slows the workers beside it
import argparse, json, statistics, subprocess, sys, time
from functools import partial
from itertools import product

import timm, torch, torch.nn.functional as F
from fastai.callback.core import Callback, CancelValidException
from fastai.data.core import DataLoaders
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset
from torchvision import transforms as T

from patches import PlainHead, PlainPatches
from relvit.augment import random_flip, random_shift
from relvit.checkpoint import write_whole
from relvit.data import image_dls
from relvit.datasets import CIFAR10
from relvit.images import Images
from relvit.learner import pretrain_learner
from relvit.runs import provenance
from relvit.tasks import RelViT
from relvit.tokens import TokenEncoder

NAME, P, FOUR = 'vit_small_patch16_224', 4, ('relations', 'distances', 'angles', 'positions')
SIZES = {'ViT 192/6, p 4': (192, 6, 3), 'ViT-S/4': (384, 12, 6), 'a tiny ViT': (48, 2, 3)} # width, depth, heads
AIMS = {'ViT 192/6, p 4': dict(cpu='1.5', cuda='5'), 'ViT-S/4': dict(cpu='1.1', cuda='5')} # over the plain loop


def shape(size): return dict(zip(('embed_dim', 'depth', 'num_heads'), SIZES[size]))


def timm_vit(size, img, **kwargs): return timm.create_model(NAME, img_size=img, patch_size=P, **shape(size), **kwargs)


def pixels(n, img=32, device='cpu'):
    "Random images and labels, in memory"
    return torch.randint(256, (n, 3, img, img), dtype=torch.uint8).to(device), torch.randint(10, (n,)).to(device)


def now(device):
    "Seconds, when everything is done that was asked of the device"
    if device == 'cuda': torch.cuda.synchronize()
    return time.perf_counter()


class Items(Dataset):
    "One image at a time, cropped and flipped; `patches` adds what the released code does to each patch"
    def __init__(self, x, y, patches=False):
        self.x, self.y, self.patches = x, y, PlainPatches(x.shape[-1], P) if patches else None
        self.change = T.Compose([T.RandomCrop(x.shape[-1], 4), T.RandomHorizontalFlip()])
        self.normalise = T.Compose([T.ConvertImageDtype(torch.float), T.Normalize(*CIFAR10)])

    def __len__(self): return len(self.x)
    def __getitem__(self, i):
        x = self.change(self.x[i])
        return self.patches.one(self.normalise(x)) if self.patches else (x, self.y[i])


class ByItems(DataLoader):
    "The usual loader; its workers stay"
    def __init__(self, items, bs, workers, device):
        super().__init__(items, bs, shuffle=True, drop_last=True, num_workers=workers,
                         persistent_workers=workers > 0, pin_memory=device == 'cuda')
    def to(self, device): pass # fastai asks for it; its Learner moves the batches


class ByBatches:
    "Whole batches, cropped and flipped at once"
    def __init__(self, x, y, bs): self.x, self.y, self.bs = x, y, bs
    def __iter__(self):
        for i in torch.randperm(len(self.x)).split(self.bs): yield random_flip(random_shift(self.x[i], 4)), self.y[i]


class Plain(nn.Module):
    "A timm ViT without positions, a head a class, a linear layer for the places"
    def __init__(self, size, img):
        super().__init__()
        self.vit = timm_vit(size, img, num_classes=0, pos_embed='none')
        self.relations, self.places = PlainHead(self.vit.embed_dim, 9), nn.Linear(self.vit.embed_dim, (img//P)**2)

    def loss(self, x, relations, places):
        z = self.vit.forward_features(x)[:, 1:]
        return F.cross_entropy(self.relations(z), relations) + F.cross_entropy(self.places(z).mT, places)


class Bare(nn.Module):
    "A timm classifier; with `tokens` the backbone alone, whose sum stands in for a loss"
    def __init__(self, size, img, tokens=False):
        super().__init__()
        self.vit, self.tokens = timm_vit(size, img, num_classes=0 if tokens else 10), tokens
        for name, v in zip(('mean', 'std'), CIFAR10): self.register_buffer(name, torch.tensor(v)[:, None, None])

    def loss(self, x, y):
        x = (x.float()/255 - self.mean)/self.std
        return self.vit.forward_features(x).sum() if self.tokens else F.cross_entropy(self.vit(x), y)


class Loop:
    "A training loop by hand"
    def __init__(self, model, loader, device, threads):
        self.model, self.loader, self.device, self.threads = model.to(device).train(), loader, device, threads
        self.opt = torch.optim.AdamW(self.model.parameters(), lr=5e-4, weight_decay=.1)

    def epoch(self, watch=False):
        "Seconds of an epoch, its steps, its waits for a batch; `watch` keeps a GPU from working ahead, for the latter"
        torch.set_num_threads(self.threads)
        clock, times, waits = partial(now, self.device if watch else 'cpu'), [], []
        began = left = now(self.device)
        for batch in self.loader:
            batch = [t.to(self.device, non_blocking=True) for t in batch]
            came = clock()
            self.model.loss(*batch).backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), 1.)
            self.opt.step(), self.opt.zero_grad()
            waits.append(came - left)
            left = clock()
            times.append(left - came)
        return dict(seconds=now(self.device) - began, steps=times, waits=waits)


class Mark(Callback):
    "Notes when batches come to it and leave it: in front of all callbacks, or behind them. Nothing is validated"
    def __init__(self, order, device): self.order, self.where, self.watch = order, device, False
    def clock(self): return now(self.where if self.watch else 'cpu')
    def before_train(self): self.began, self.came, self.left = now(self.where), [], []
    def before_batch(self): self.came.append(self.clock())
    def after_batch(self): self.left.append(self.clock())
    def after_train(self): self.ended = now(self.where)
    def before_validate(self): raise CancelValidException


class Ours:
    "relvit's Learner as it comes, but for its switches"
    def __init__(self, dls, size, device, threads, tasks=('relations', 'positions'), amp=False, channels_last=False,
                 compiled=False, fused=True, accumulate=1):
        self.threads, self.marks = threads, (Mark(-100, device), Mark(100, device))
        learn = pretrain_learner(dls, NAME, tasks, p=P, cbs=self.marks, **shape(size))
        self.learn = learn.faster(amp, compiled, channels_last, fused, accumulate)

    def epoch(self, watch=False):
        "As `Loop.epoch`: a wait ends when the batch is augmented, and `loads` when it comes from the loader"
        torch.set_num_threads(self.threads)
        first, last = self.marks
        first.watch = last.watch = watch
        with self.learn.no_bar(), self.learn.no_logging(): self.learn.fit_recipe(1)
        since = [first.began, *last.left]
        return dict(seconds=last.ended - first.began, steps=[b - a for a, b in zip(last.came, last.left)],
                    loads=[b - a for a, b in zip(since, first.came)], waits=[b - a for a, b in zip(since, last.came)])


def make_dls(x, y, bs):
    "relvit's DataLoaders with CIFAR-10's augmentation"
    images, augment = Images(x, y, list('0123456789')), [partial(random_shift, pad=4), random_flip]
    return image_dls(images, images, bs=bs, augment=augment, device=x.device, mean=CIFAR10[0], std=CIFAR10[1])


def turns(sides, rounds, watch=False):
    "What an epoch of each side says, round after round, after a warm-up"
    for s in sides.values(): s.epoch()
    runs = [{k: s.epoch(watch) for k, s in sides.items()} for _ in range(rounds)]
    return {k: [r[k] for r in runs] for k in sides}


def seconds(runs): return statistics.median(r['seconds'] for r in runs)
def step_ms(runs): return 1e3*statistics.median(t for r in runs for t in r['steps'])
def waiting(runs, what='waits'): return statistics.median(100*sum(r[what])/r['seconds'] for r in runs)


def best_use(loop, items, args):
    "Give a loop the workers and threads that make it fastest; says which, and the seconds of all that was tried"
    few, tried = Subset(items, range(args.bs*max(args.steps//2, 1))), []
    cpu_uses = (0, args.threads), *product((1, 2), sorted({1, args.threads}))
    for workers, threads in ((8, args.threads), (16, args.threads)) if args.device == 'cuda' else cpu_uses:
        loop.loader, loop.threads = ByItems(few, args.bs, workers, args.device), threads
        tried.append(dict(workers=workers, threads=threads, seconds=loop.epoch()['seconds']))
    best = min(tried, key=lambda use: use['seconds'])
    loop.loader, loop.threads = ByItems(items, args.bs, best['workers'], args.device), best['threads']
    return dict(plain_use=best, tried=tried)


def steps(args, say):
    "End to end, over whole epochs"
    cuda, where = args.device == 'cuda', (args.device, args.threads)
    for size in args.sizes:
        x, y = pixels(args.bs*args.steps)
        items, there = Items(x, y, patches=True), (x.to(args.device), y.to(args.device))
        plain = Loop(Plain(size, 32), None, *where)
        more = dict(size=size, images=len(x), batch=args.bs, **best_use(plain, items, args))
        same = [t.to(args.device) for t in next(iter(ByItems(items, args.bs, 0, 'cpu')))]
        dls = make_dls(*there, args.bs)
        sides = dict(plain=plain, still=Loop(plain.model, [same]*4, *where),
                     bare=Loop(Bare(size, 32), ByBatches(*there, args.bs), *where),
                     fp32=Ours(dls, size, *where), bf16=Ours(dls, size, *where, amp=True))
        runs = turns(sides, args.rounds, watch=not cuda) # where watching costs nothing
        speed = {k: len(x)/seconds(r) for k, r in runs.items()}
        aims = dict(fp32=AIMS.get(size, {}).get(args.device, ''), bf16='above fp32')
        for beside, k in product(('plain', 'bare'), ('fp32', 'bf16')):
            say(f'{size}, an epoch, relvit in {k}', speed[beside], speed[k], 'images/s', speed[k]/speed[beside],
                aims[k] if beside == 'plain' else '', beside, **more)
        if cuda: runs = turns(sides, args.rounds, watch=True)
        slow, fast = step_ms(runs['still']), step_ms(runs['fp32'])
        say(f'{size}, a step whose batch is there, fp32', slow, fast, 'ms', slow/fast, **more)
        for k in 'fp32', 'bf16':
            slow, fast = waiting(runs['plain']), waiting(runs[k])
            say(f'{size}, waiting for a batch, relvit in {k}', slow, fast, '% of time', slow/fast, 'below 5 %',
                loading=waiting(runs[k], 'loads'), **more)


def spent(f, device):
    "Milliseconds: the thread's own time on a CPU, the wall's on a GPU"
    clock = time.thread_time if device == 'cpu' else partial(now, device)
    before = clock()
    f()
    return 1e3*(clock() - before)


def overhead(args, say):
    "Relation tasks over the same backbone, forward and backward"
    torch.set_num_threads(1)
    for size in args.sizes:
        model = RelViT(TokenEncoder(NAME, img_size=32, p=P, **shape(size))).to(args.device).train()
        x, vit = torch.rand(args.bs, 3, 32, 32, device=args.device), model.encoder.model
        def bare(): model.zero_grad(), vit.forward_features(x).sum().backward()
        def ours(): model.zero_grad(), model.loss(model(x)).backward()
        bare(), ours()
        times = [[spent(f, args.device) for f in (bare, ours)] for _ in range(2*args.rounds + 1)]
        less, more = (statistics.median(t) for t in zip(*times))
        percent, most = 100*(more/less - 1), 5 if args.device == 'cuda' else 8
        say(f'{size}, forward and backward, batch {args.bs}: {percent:.1f} % more', less, more, 'ms', less/more,
            f'at most {most} %' if size == 'ViT-S/4' else '', 'bare', size=size, batch=args.bs, percent=percent)


def switches(args, say):
    "A step with each switch on and off"
    size, n, cuda = args.sizes[-1], max(args.steps//4, 2), args.device == 'cuda'
    x, y = pixels(args.bs*n)
    dls = make_dls(x.to(args.device), y.to(args.device), args.bs)
    one = ByItems(Items(x, y), args.bs, 8 if cuda else 0, args.device)
    by_one = DataLoaders(one, one, device=dls.device)
    by_one.img_size, by_one.mean, by_one.std = dls.img_size, dls.mean, dls.std
    for what, off, on in (('bf16', {}, dict(amp=True)), ('channels-last', {}, dict(channels_last=True)),
                          ('fused attention', dict(fused=False), {}), ('torch.compile', {}, dict(compiled=True)),
                          ('data in memory, by batches', dict(dls=by_one), {})):
        own = dict(dls=dls, size=size, device=args.device, threads=args.threads)
        sides, said = dict(off=Ours(**own | off), on=Ours(**own | on)), {}
        try: first = sides['on'].epoch()['seconds']
        except Exception as e: # torch.compile where there is no compiler
            say(f'{size}, {what}', failed=f'{type(e).__name__}: {str(e)[:200]}')
            continue
        slow, fast = (seconds(r)/n for r in turns(sides, args.rounds).values())
        if what == 'torch.compile': said = dict(compiling=first - n*fast)
        say(f'{size}, {what}, batch {args.bs}{"".join(f", {s:.0f} s to compile" for s in said.values())}',
            1e3*slow, 1e3*fast, 'ms', slow/fast, 'above 1', 'off', size=size, batch=args.bs, **said)
    whole, parts = (alone(args, kind='ours', size=size, bs=bs, full=4*args.bs, steps=2) for bs in (4*args.bs, args.bs))
    for k, unit, aim in (('memory', 'GB', 'above 1'), ('seconds', 's', '')):
        say(f'{size}, gradient of {4*args.bs} images in 4 parts, {k}', whole[k], parts[k], unit, whole[k]/parts[k], aim,
            'whole', size=size)


def tokens(args, say):
    "Time and memory against the number of tokens"
    size = args.sizes[-1]
    for side in (8, 16) if args.quick else (8, 16, 32, 64):
        spec = dict(size=size, img=side*P, bs=1, tasks=FOUR, steps=2 if args.quick or side == 64 else 8)
        runs = [[alone(args, kind=kind, **spec) for kind in ('bare', 'ours')] for _ in range(args.rounds)]
        for k, unit in (('seconds', 's'), ('memory', 'GB')):
            bare, ours = (statistics.median(r[k] for r in side_runs) for side_runs in zip(*runs))
            say(f'{size}, {side*side} tokens, batch 1, four tasks, {k}', bare, ours, unit, bare/ours, beside='bare',
                size=size, tokens=side*side)


def alone(args, **spec):
    "Train in a process of its own: median seconds of a step and GB at the peak"
    command = [sys.executable, '-W', 'ignore', __file__, '--child']
    spec = json.dumps(spec | dict(device=args.device, threads=args.threads))
    said = subprocess.run([*command, spec], stdout=subprocess.PIPE, text=True, check=True).stdout
    return json.loads(said.splitlines()[-1])


def few_steps(kind, size, bs, steps, device, threads, img=32, tasks=('relations', 'positions'), full=None):
    "Seconds of each step but the first; a step takes `full` images in parts of `bs`"
    k = (full or bs)//bs
    x, y = pixels(bs*k*(steps + 1), img, device)
    batches = list(zip(x.split(bs), y.split(bs)))
    if kind == 'bare': side = Loop(Bare(size, img, tokens=True), batches, device, threads)
    else: side = Ours(make_dls(x, y, bs), size, device, threads, tasks, accumulate=k)
    times = side.epoch(watch=True)['steps']
    return [sum(times[i:i + k]) for i in range(k, len(times), k)]


def status(key): return int(open('/proc/self/status').read().split(key)[1].split()[0])/1e6


def child(spec):
    "What `alone` asks for. A tiny network goes first: what a process loads once is not counted"
    few_steps(**spec | dict(size=list(SIZES)[-1], img=32, bs=2, steps=1, full=None))
    cuda = spec['device'] == 'cuda'
    if cuda: torch.cuda.reset_peak_memory_stats()
    else: open('/proc/self/clear_refs', 'w').write('5') # the peak counts from here
    before = 0. if cuda else status('VmRSS:')
    times = few_steps(**spec)
    peak = torch.cuda.max_memory_allocated()/1e9 if cuda else status('VmHWM:')
    print(json.dumps(dict(seconds=statistics.median(times), memory=peak - before)))


def main():
    parts = dict(steps=steps, overhead=overhead, switches=switches, tokens=tokens)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--parts', default=','.join(parts), help='any of them: %(default)s')
    parser.add_argument('--quick', action='store_true', help='a tiny network, small batches, one round: does it run?')
    parser.add_argument('--device', choices=('cpu', 'cuda'), default='cuda' if torch.cuda.is_available() else 'cpu')
    parser.add_argument('--threads', type=int, default=2, help='of torch; the plain loop may take fewer')
    parser.add_argument('--rounds', type=int, default=3)
    parser.add_argument('--bs', type=int, help='64 on a CPU, 256 on a GPU')
    parser.add_argument('--steps', type=int, help='of an epoch: 16 on a CPU, 48 on a GPU')
    parser.add_argument('--out', help='write the figures as JSON')
    parser.add_argument('--child', type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child: return child(args.child)
    if wrong := set(args.parts.split(',')) - set(parts): parser.error(f'no part is called {", ".join(wrong)}')
    cuda, args.sizes = args.device == 'cuda', list(SIZES)[2:] if args.quick else list(SIZES)[:2]
    if args.quick: args.rounds = 1
    args.bs = args.bs or (8 if args.quick else 256 if cuda else 64)
    args.steps = args.steps or (4 if args.quick else 48 if cuda else 16)
    lines = []

    def say(what, plain=None, ours=None, unit='', ratio=None, aim='', beside='plain', failed=None, **more):
        if args.quick: aim = '' # which is not for a tiny network
        lines.append(dict(part=part, what=what, beside=beside, plain=plain, ours=ours, unit=unit, ratio=ratio, aim=aim,
                          failed=failed, **more))
        said = failed or f'{beside:<5s} {plain:9.3f}  ours {ours:9.3f} {unit:<9s} x {ratio:6.2f}'
        print(f'{what:<62s} {said}{f"  (aim {aim})" if aim else ""}', flush=True)

    for part in args.parts.split(','): parts[part](args, say)
    if args.out:
        text = json.dumps(dict(lines=lines, threads=args.threads, rounds=args.rounds, kind=args.device, batch=args.bs,
                               steps=args.steps, quick=args.quick, **provenance()), indent=1)
        write_whole(args.out, lambda f: open(f, 'w').write(text))


if __name__ == '__main__': main()
