"""relvit's patch pipeline and heads against a plain implementation, patch by patch and class by class.

    python benchmarks/patches.py [--quick] [--rounds 5] [--out results/benchmark_patches.json]

Both sides in one process, one thread, taking turns; the figure is the median over rounds of the thread's CPU time, so
that a busy machine disturbs it little. The plain side is written from the description of RelViT's released code:
torchvision transforms on each patch of each image, targets by indexing cached matrices, a head a class.
"""
import os
os.environ.setdefault('OMP_NUM_THREADS', '1')
import argparse, json, statistics, subprocess, sys, time

import torch, torch.nn.functional as F
from torch import nn
from torchvision import transforms as T

from relvit.augment import PatchAugment
from relvit.checkpoint import write_whole
from relvit.runs import provenance
from relvit.heads import PairHead
from relvit.patches import positions, random_perms
from relvit.relations import absolute_positions, spatial_relations

torch.set_num_threads(1)


class PlainPatches:
    "One image at a time: crop, resize, jitter and grey each patch by itself, shuffle, index the targets"
    def __init__(self, img, p):
        self.p, self.n = p, (img//p)**2
        self.crop, self.resize = T.RandomCrop(round(p/1.15)), T.Resize(p, antialias=True)
        self.jitter, self.grey = T.RandomApply([T.ColorJitter(.4, .4, .4, .1)], .8), T.RandomGrayscale(.2)
        self.relations = spatial_relations(positions((img//p, img//p)))

    def __call__(self, x): # (b,c,H,W) in [0,1]
        return [torch.stack(t) for t in zip(*map(self.one, x))]

    def one(self, img):
        c, side = img.shape[0], img.shape[-1]
        perm = torch.randperm(self.n)
        patches = F.unfold(img[None], self.p, stride=self.p)[0].T.reshape(self.n, c, self.p, self.p)
        patches = self.resize(torch.stack([self.crop(q) for q in patches]))
        patches = torch.stack([self.grey(self.jitter(q)) for q in patches])[perm]
        out = F.fold(patches.flatten(1).T[None], side, self.p, stride=self.p)[0]
        return out, self.relations[perm][:, perm], perm


class OurPatches:
    "The whole batch at once"
    def __init__(self, img, p): self.grid, self.augment = (img//p, img//p), PatchAugment(p)
    def __call__(self, x):
        perms = random_perms(len(x), self.grid[0]*self.grid[1], device=x.device)
        return self.augment(x, perms), spatial_relations(positions(self.grid, perms)), absolute_positions(self.grid, perms)


class PlainHead(nn.Module):
    "For each class a query, a key and a value of width d // k, the value unused"
    def __init__(self, dim, k):
        super().__init__()
        self.q, self.k, self.v = (nn.ModuleList(nn.Linear(dim, dim//k, bias=False) for _ in range(k)) for _ in range(3))
    def forward(self, z):
        out = []
        for q, k, v in zip(self.q, self.k, self.v):
            a, b, _ = q(z), k(z), v(z)
            out.append(a @ b.transpose(1, 2)/a.shape[-1]**.5)
        return torch.stack(out, 1)


def cpu_seconds(f):
    before = time.thread_time()
    f()
    return time.thread_time() - before


def compare(plain, ours, rounds):
    "Median CPU seconds of each, taking turns after a warm-up"
    plain(), ours(), ours()
    times = [(cpu_seconds(plain), min(cpu_seconds(ours) for _ in range(3))) for _ in range(rounds)]
    return [statistics.median(t) for t in zip(*times)]


def step(head, z, target):
    loss = F.cross_entropy(head(z), target)
    torch.autograd.grad(loss, [z, *(w for n, w in head.named_parameters() if not n.startswith('v.'))])


MEMORY = '''
import torch; torch.set_num_threads(1)
from relvit.patches import positions, random_perms
from relvit.relations import *
def targets(side):
    pos = positions((side, side), random_perms(1, side*side))
    return spatial_relations(pos), distances(pos, (side, side)), angles(pos, (side, side)), flat_index(pos, (side, side))
def status(key): return int(open('/proc/self/status').read().split(key)[1].split()[0])/1e6
targets(8)
open('/proc/self/clear_refs', 'w').write('5') # the peak counts from here
before = status('VmRSS:')
kept = targets(64)
print(status('VmHWM:') - before)
'''


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--rounds', type=int, default=5)
    parser.add_argument('--quick', action='store_true', help='small batches of the plain side, two rounds')
    parser.add_argument('--out', help='write the figures as JSON')
    args = parser.parse_args()
    rounds, lines = 2 if args.quick else args.rounds, []

    def say(what, plain, ours, unit, ratio, aim):
        lines.append(dict(what=what, plain=plain, ours=ours, unit=unit, ratio=ratio, aim=aim))
        print(f'{what:<68s} plain {plain:9.1f}  ours {ours:9.1f} {unit:<9s} x {ratio:6.1f}  (aim {aim})', flush=True)

    for img, p, b, few, aim in (32, 4, 256, 8, '150, 250'), (224, 32, 32, 8, '10, 20'):
        x, few = torch.randint(256, (b, 3, img, img), dtype=torch.uint8), 2 if args.quick else few
        plain, ours = PlainPatches(img, p), OurPatches(img, p)
        small = x[:few]/255
        slow, fast = compare(lambda: plain(small), lambda: ours(x), rounds)
        say(f'augment, permute, targets, {img} px, p {p}, batch {b}', few/slow, b/fast, 'images/s', (b/fast)/(few/slow), aim)

    z, target = torch.randn(64, 64, 384, requires_grad=True), torch.randint(9, (64, 64, 64))
    plain, ours = PlainHead(384, 9), PairHead(384, 9)
    slow, fast = compare(lambda: step(plain, z, target), lambda: step(ours, z, target), 2*rounds)
    say('relation head and loss, forward and backward, B 64, N 64, D 384, K 9', 1e3*slow, 1e3*fast, 'ms', slow/fast, '1.3')

    peak = float(subprocess.run([sys.executable, '-c', MEMORY], capture_output=True, text=True, check=True).stdout)
    lines.append(dict(what='four targets, one image of 4096 tokens', ours=peak, unit='GB', aim='below 1'))
    print(f'four targets of one image of 4096 tokens: {peak:.2f} GB at the peak (aim: below 1)')
    if args.out:
        text = json.dumps(dict(lines=lines, threads=1, rounds=rounds, **provenance()), indent=1)
        write_whole(args.out, lambda f: open(f, 'w').write(text))


if __name__ == '__main__': main()
