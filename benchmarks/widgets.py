"""How long a widget takes from a click to its new picture, for a ViT-S/16 at 224 pixels: 196 patches, 38,416 pairs.

    python benchmarks/widgets.py [--rounds 5] [--out results/benchmark_widgets.json]

Two sides in one run: a click on another patch of an image that the network has seen (only drawn), and one that asks the
network again, as a widget without memory would. An update should take less than 300 ms on two cores.
"""
import argparse, json, statistics, time
from pathlib import Path

import torch

from relvit.checkpoint import write_whole
from relvit.method_widgets import PositivesExplorer, SelfRelationExplorer
from relvit.runs import provenance
from relvit.tasks import RelViT
from relvit.tokens import TokenEncoder
from relvit.widgets import AttentionExplorer, JigsawExplorer, MethodComparison, PatchPlayground, RelationExplorer

LIMIT = .3 # seconds


def explorers(size):
    "Each widget, the control that is moved, its values, and the memory that a widget without one would lack"
    torch.manual_seed(0)
    model = RelViT(TokenEncoder('vit_small_patch16_224', img_size=size), ('relations', 'positions'))
    other = TokenEncoder('vit_small_patch32_224', img_size=size)
    images, n = torch.randint(0, 256, (3, 3, size, size), dtype=torch.uint8), (size//16)**2
    patches, half = [7*k % n for k in range(1, 40)], [k % n for k in range(1, 40)]
    yield 'RelationExplorer, a patch', RelationExplorer(model, images), 'patch', patches, 'readings'
    yield 'AttentionExplorer, a patch', AttentionExplorer(model, images), 'patch', patches, 'looks'
    yield 'AttentionExplorer, rollout to a layer', rolled(AttentionExplorer(model, images)), 'layer', list(range(11))*4, 'looks'
    yield 'JigsawExplorer, steps', JigsawExplorer(model, images), 'steps', half, 'solved'
    yield 'MethodComparison, a patch', MethodComparison(dict(a=model, b=other), images), 'patch', patches, 'kept'
    yield 'PositivesExplorer, a patch', PositivesExplorer(model, images), 'patch', patches, 'kept'
    yield 'SelfRelationExplorer, a point', SelfRelationExplorer(model, images), 'point', [7*k % 169 for k in range(1, 40)], 'looks'
    yield 'PatchPlayground, another order', PatchPlayground(images, 16), 'order', list(range(1, 21))*2, None


def rolled(explorer):
    explorer.controls['rollout'].value = True
    return explorer


def measure(explorer, control, values, memory, rounds):
    "Median seconds of an update with and without what the widget remembers"
    values, drawn, asked = iter(values), [], []
    for _ in range(rounds):
        for times in (drawn, asked) if memory else (drawn,):
            if times is asked: getattr(explorer, memory).clear()
            began = time.perf_counter()
            explorer.controls[control].value = next(values)
            times.append(time.perf_counter() - began)
    return statistics.median(drawn), statistics.median(asked) if asked else None


def main():
    args = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    args.add_argument('--rounds', type=int, default=7)
    args.add_argument('--size', type=int, default=224)
    args.add_argument('--out')
    args = args.parse_args()
    lines = []
    print(f'{torch.get_num_threads()} threads; ms for an update, the limit is {1000*LIMIT:.0f}')
    for what, explorer, *how in explorers(args.size):
        drawn, asked = measure(explorer, *how, args.rounds)
        lines.append(dict(what=what, drawn=drawn, asked=asked, limit=LIMIT, ratio=LIMIT/drawn))
        again = f'{1000*asked:7.0f} where the network is asked again' if asked else ''
        print(f'{what:<40}{1000*drawn:7.0f}, {LIMIT/drawn:4.1f} times faster than the limit   {again}', flush=True)
    if args.out:
        text = json.dumps(dict(lines=lines, threads=torch.get_num_threads(), **provenance()), indent=1)
        write_whole(args.out, lambda f: Path(f).write_text(text))


if __name__ == '__main__': main()
