"""Tracking the objects of real videos with frozen features: seconds a frame, memory, and what the answers are worth.

    python benchmarks/video.py ../shared/data/davis [--quick] [--device cpu|cuda] [--threads 1] [--short 480]
                                                    [--out results/benchmark_video.json]

The argument is a folder of DAVIS; without one, scenes of moving shapes take its place. Four parts:

propagate  labels of one frame from the first and seven more, at 480 x 832 pixels and patches of 16: at once, beside a loop
           over patches, frames and the neighbourhood, written as the protocol is told; it does some patches, and its time
           is that of all neighbours. Both give the same. CPU seconds, one thread, the median of rounds.
track      CPU seconds a frame of a ViT-S/16, reading and enlarging included, judging not (on a GPU seconds).
memory     GB at the peak of a process when the first video was played once, and when it was played twice.
worth      J&F of all videos: the first mask, not moved; pixels of patches; the ViT-S/16, whose weights are random.

Some minutes on one core, which should have nothing else to do.
"""
import os
os.environ.setdefault('OMP_NUM_THREADS', '1')
import argparse, json, statistics, time
from itertools import product

import torch
import torch.nn.functional as F

from relvit.checkpoint import write_whole
from relvit.runs import provenance
from relvit.shapes import make_video
from relvit.tokens import TokenEncoder
from relvit.video import Pixels, TrackingScores, Video, judge, propagate, read_davis, track, track_objects, within


def slowly(targets, features, context, segs, grid, radius, topk=5, temperature=.1):
    "Labels of some patches, each neighbour of each frame by itself"
    (h, w), out = grid, []
    features, context = F.normalize(features, dim=-1), F.normalize(context, dim=-1)
    for i in targets:
        (y, x), like, labels = divmod(i, w), [], []
        for c, v, u in product(range(len(context)), range(y - radius, y + radius + 1), range(x - radius, x + radius + 1)):
            if not (0 <= v < h and 0 <= u < w): continue
            like.append(features[i] @ context[c, v*w + u])
            labels.append(segs[c, v*w + u])
        best = torch.stack(like).topk(topk)
        out.append((best.values/temperature).softmax(0) @ torch.stack(labels)[best.indices])
    return torch.stack(out)


def cpu_seconds(f):
    before = time.thread_time()
    f()
    return time.thread_time() - before


def propagation(rounds, some):
    "CPU seconds of a frame's labels, by the loop and at once"
    grid, g = (30, 52), torch.Generator().manual_seed(0)
    n, near = 30*52, within((30, 52), 12)
    features, context = torch.randn(n, 384, generator=g), torch.randn(8, n, 384, generator=g)
    segs = torch.rand(8, n, 3, generator=g).softmax(-1)
    targets = torch.linspace(0, n - 1, some).long()
    share = (near[targets].sum()/near.sum()).item() # of the neighbours
    gap = (slowly(targets.tolist(), features, context, segs, grid, 12) - propagate(features, context, segs, near)[targets]).abs().max()
    assert gap < 1e-5, gap
    times = [(cpu_seconds(lambda: slowly(targets.tolist(), features, context, segs, grid, 12))/share,
              cpu_seconds(lambda: propagate(features, context, segs, near))) for _ in range(rounds)]
    return [statistics.median(t) for t in zip(*times)]


def twice(video):
    "A video played, and played again"
    return Video(f'{video.name}, twice', [*video.frames, *video.frames], video.masks)


def peak(device, anew=False):
    "GB at the peak so far; `anew`: it counts from here"
    if device == 'cuda':
        if anew: torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated()/1e9
    if anew: open('/proc/self/clear_refs', 'w').write('5')
    return int(open('/proc/self/status').read().split('VmHWM:')[1].split()[0])*1024/1e9


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('root', nargs='?', help='folder of DAVIS; generated videos if left out')
    parser.add_argument('--quick', action='store_true', help='a tiny network, small frames, one round: does it run?')
    parser.add_argument('--device', choices=('cpu', 'cuda'), default='cpu')
    parser.add_argument('--threads', type=int, default=1, help='of torch')
    parser.add_argument('--rounds', type=int, default=3)
    parser.add_argument('--short', type=int, default=480, help='pixels of the short side')
    parser.add_argument('--out', help='write the figures as JSON')
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.quick: args.rounds, args.short = 1, 96
    videos = read_davis(args.root) if args.root else [Video(f'film {i}', *make_video(12, 256, seed=i)) for i in range(3)]
    torch.manual_seed(0)
    encoder = TokenEncoder('vit_small_patch16_224', **(dict(embed_dim=48, depth=2, num_heads=3) if args.quick else {})).to(args.device).eval()
    lines, first, frames = [], videos[0], sum(map(len, videos))

    def say(part, what, unit, ours, plain=None, beside=''):
        ratio = None if plain is None else plain/ours
        lines.append(dict(part=part, what=what, unit=unit, ours=ours, plain=plain, beside=beside, ratio=ratio))
        print(f'{part:<10s} {what:<44s} {ours:8.3f} {unit}' + ('' if plain is None else f'  {beside} {plain:8.3f}  x {ratio:.1f}'), flush=True)

    slow, fast = propagation(args.rounds, 4 if args.quick else 40)
    say('propagate', 'labels of one frame', 's', fast, slow, 'a loop')

    clock = time.process_time if args.device == 'cpu' else time.perf_counter # a busy machine disturbs the first little
    before, start, masks, peaks = peak(args.device, anew=True), clock(), [], []
    for i, m in enumerate(track(encoder, twice(first), short=args.short), 1):
        if i <= len(first): masks.append(m)
        if i in (len(first), 2*len(first)): peaks.append(peak(args.device))
    say('track', f'a frame, short side {args.short}', 's', (clock() - start)/i)
    say('memory', 'before the first frame', 'GB', before)
    say('memory', f'at the peak of {2*len(first)} frames', 'GB', peaks[1], peaks[0], f'{len(first)} frames')

    rest = track_objects(encoder, videos[1:], short=args.short)
    scores = {'the first mask': track_objects('still', videos), 'pixels of patches of 16': track_objects(Pixels(16).to(args.device), videos, short=args.short),
              'ViT-S/16, random': TrackingScores({first.name: judge(first, masks)[0]} | rest.videos)}
    for name, s in scores.items(): say('worth', f'{name}, {frames} frames', '% J&F', 100*s.jf)
    if args.out:
        text = json.dumps(dict(lines=lines, scores={k: s.asdict() for k, s in scores.items()}, videos=[repr(v) for v in videos], threads=args.threads,
                               rounds=args.rounds, short=args.short, kind=args.device, quick=args.quick, **provenance()), indent=1)
        write_whole(args.out, lambda f: open(f, 'w').write(text))


if __name__ == '__main__': main()
