"""A training step of relvit's detectors beside a step of torchvision's own: seconds, memory, parameters.

    python benchmarks/detect.py [--quick] [--device cpu|cuda] [--threads 2] [--rounds 3] [--steps 3] [--size 512]
                                [--batches 1,2] [--only ViT-S/16,mask] [--out results/benchmark_detect.json]

One step is a pass in training, the sum of the losses, the backward pass and one step of AdamW, all weights trained, on
generated scenes of `--size` pixels that are there, with boxes and masks, and heads for 80 classes. Mask R-CNN and its
cascade stand beside torchvision's `maskrcnn_resnet50_fpn`, Faster R-CNN beside `fasterrcnn_resnet50_fpn`, all from
random weights and with torchvision's numbers of proposals and samples.

Every side trains in a process of its own, whose largest size is its memory (on a GPU what torch allocated at most).
Sides take turns; figures are medians over rounds of the median step after a first one, ratios medians of each round's
ratio, and a ratio above 1 is in relvit's favour. An hour on 2 cores, which should have nothing else to do.
"""
import os
os.environ.setdefault('OMP_WAIT_POLICY', 'PASSIVE') # as benchmarks/train.py
import argparse, json, resource, statistics, subprocess, sys, time
from itertools import product

import torch
from torchvision.models.detection import fasterrcnn_resnet50_fpn, maskrcnn_resnet50_fpn

import relvit.t2t # noqa: F401 (its models come into timm)
from relvit.checkpoint import write_whole
from relvit.detect import Detector
from relvit.runs import provenance
from relvit.shapes import make_shapes
from relvit.tokens import TokenEncoder

CLASSES = 80
ENCODERS = {'ViT-S/16': dict(name_or_model='vit_small_patch16_224'), 'Swin-T': dict(name_or_model='swin_tiny_patch4_window7_224'),
            'T2T-14': dict(name_or_model='t2t_vit_14'),
            'a tiny ViT': dict(name_or_model='vit_small_patch16_224', embed_dim=48, depth=2, num_heads=3)}
SIDES = [('ViT-S/16', 'faster'), ('ViT-S/16', 'mask'), ('ViT-S/16', 'cascade'), ('Swin-T', 'mask'), ('T2T-14', 'mask')]
THEIRS = dict(faster=fasterrcnn_resnet50_fpn, mask=maskrcnn_resnet50_fpn)


def build(encoder, kind, size):
    "A detector of ours, or torchvision's where no encoder is named; and a function of its output that gives its loss"
    torch.manual_seed(0)
    if encoder:
        model = Detector(TokenEncoder(**ENCODERS[encoder]), CLASSES, kind, min_size=None)
        return model, model.loss
    model = THEIRS[kind](weights=None, weights_backbone=None, num_classes=CLASSES + 1, min_size=size, max_size=size)
    return model, lambda out: sum(out.values())


def child(encoder, kind, size, batch, steps, device, threads):
    "What `alone` asks for"
    torch.set_num_threads(threads)
    model, loss = build(encoder, kind, size)
    model.to(device).train()
    opt, times = torch.optim.AdamW(model.parameters(), 1e-4), []
    images, targets = make_shapes(batch, size=size, seed=0)
    images = [*(images/255).to(device)]
    targets = [{k: v.to(device) for k, v in t.items()} for t in targets]
    def clock():
        if device == 'cuda': torch.cuda.synchronize()
        return time.perf_counter()
    for _ in range(steps + 1):
        before = clock()
        opt.zero_grad()
        loss(model(images, targets)).backward()
        opt.step()
        times.append(clock() - before)
    peak = torch.cuda.max_memory_allocated()/1e9 if device == 'cuda' else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss*1024/1e9
    print(json.dumps(dict(seconds=statistics.median(times[1:]), memory=peak, parameters=sum(w.numel() for w in model.parameters())/1e6)))


def alone(args, **spec):
    "Train in a process of its own: median seconds of a step, GB at the peak, millions of parameters"
    spec |= dict(size=args.size, steps=args.steps, device=args.device, threads=args.threads)
    command = [sys.executable, '-W', 'ignore', __file__, '--child', json.dumps(spec)]
    env = os.environ | dict(OMP_NUM_THREADS=str(args.threads))
    return json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=env).stdout.splitlines()[-1])


def middle(runs, k): return statistics.median(r[k] for r in runs)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--quick', action='store_true', help='a tiny network, small scenes, one step: does it run?')
    parser.add_argument('--device', choices=('cpu', 'cuda'), default='cuda' if torch.cuda.is_available() else 'cpu')
    parser.add_argument('--threads', type=int, default=2, help='of torch')
    parser.add_argument('--rounds', type=int, default=3)
    parser.add_argument('--steps', type=int, default=3, help='of a round, after a first one')
    parser.add_argument('--size', type=int, default=512, help='sides of the scenes in pixels')
    parser.add_argument('--batches', type=lambda s: [*map(int, s.split(','))], default=[1, 2])
    parser.add_argument('--only', help='encoders and kinds, the others are left out: ViT-S/16,mask')
    parser.add_argument('--out', help='write the figures as JSON')
    parser.add_argument('--child', type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child: return child(**args.child)
    sides = [('a tiny ViT', kind) for kind in ('faster', 'mask', 'cascade')] if args.quick else SIDES
    if args.only: sides = [s for s in sides if set(s) & set(args.only.split(','))]
    if not sides: parser.error(f'nothing is called {args.only}')
    if args.quick: args.rounds, args.steps, args.size, args.batches = 1, 1, 128, [1]
    lines = []
    for batch in args.batches:
        rounds, other = [], lambda kind: (None, 'faster' if kind == 'faster' else 'mask')
        jobs = [*sides, *dict.fromkeys(other(kind) for _, kind in sides)]
        for i in range(args.rounds):
            rounds.append({job: alone(args, encoder=job[0], kind=job[1], batch=batch) for job in jobs[::-1 if i % 2 else 1]})
        for side, (what, unit) in product(sides, dict(seconds='s', memory='GB', parameters='M').items()):
            plain, ours = [r[other(side[1])] for r in rounds], [r[side] for r in rounds]
            ratio = statistics.median(a[what]/b[what] for a, b in zip(plain, ours))
            said = f'{side[0]}, {side[1]}, {args.size} px, batch {batch}, {what}'
            lines.append(dict(part='step', what=said, beside=f'torchvision {THEIRS[other(side[1])[1]].__name__}', plain=middle(plain, what),
                              ours=middle(ours, what), unit=unit, ratio=ratio, aim='', encoder=side[0], kind=side[1], batch=batch,
                              measure=what, each=[[r[what] for r in rs] for rs in (plain, ours)]))
            print(f'{said:<55s} torchvision {lines[-1]["plain"]:8.3f}  ours {lines[-1]["ours"]:8.3f} {unit:<2s} x {ratio:5.2f}', flush=True)
    if args.out:
        text = json.dumps(dict(lines=lines, threads=args.threads, rounds=args.rounds, steps=args.steps, size=args.size, kind=args.device,
                               quick=args.quick, **provenance()), indent=1)
        write_whole(args.out, lambda f: open(f, 'w').write(text))


if __name__ == '__main__': main()
