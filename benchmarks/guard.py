"""What `FiniteLosses` costs: steps with and without it, in turns, and the time that it takes itself.

    python benchmarks/guard.py [--rounds 10] [--steps 12] [--record results/guard.json]

On a CPU the time is that of the thread, so that a busy machine disturbs it little; of each the fastest of all steps counts.
"""
import os
os.environ.setdefault('OMP_NUM_THREADS', '1')
import argparse, json, time
from pathlib import Path

import torch
from fastai.callback.core import Callback

from relvit.data import digits_dls
from relvit.learner import pretrain_learner
from relvit.runs import provenance

CASES = {'digits, 16 tokens, batch 64, 2 blocks of 96': dict(size=16, p=4, bs=64, embed_dim=96, depth=2, num_heads=3),
         'digits, 64 tokens, batch 16, ViT-Tiny': dict(size=32, p=4, bs=16, embed_dim=192, depth=12, num_heads=3)}


class Clock(Callback):
    "Seconds of each training step"
    order, run_valid = -100, False
    def before_fit(self): self.times = []
    def before_batch(self): self.began = self.now()
    def after_batch(self): self.times.append(self.now() - self.began)
    def now(self):
        if not torch.cuda.is_available(): return time.thread_time()
        torch.cuda.synchronize()
        return time.perf_counter()


class Last(Clock):
    "The end of a step, after all others"
    order = 300
    def before_batch(self): pass
    def after_batch(self): self.times.append(self.now() - self.learn.clock.began)


def measure(size, p, bs, rounds, steps, **encoder):
    "Fastest step in ms without and with the guard, and the fastest of its own looks"
    dls = digits_dls(size, bs=bs, steps=steps, device='cuda' if torch.cuda.is_available() else 'cpu')
    dls.loaders = dls.loaders[:1] + [dls.valid.new(dls.valid_ds.subset(torch.arange(8)))] # steps are what is measured
    learn, own = pretrain_learner(dls, 'vit_tiny_patch16_224', p=p, seed=0, cbs=[Clock(), Last()], **encoder), []
    guard, times = learn.finite_losses, {False: [], True: []}
    look = guard.after_backward
    def timed():
        began = learn.clock.now()
        look()
        own.append(learn.clock.now() - began)
    guard.after_backward = timed
    with learn.no_bar(), learn.no_logging():
        for r in range(2*rounds):
            on = r % 2 == 1
            (learn.add_cb if on else learn.remove_cb)(guard)
            learn.fit(1)
            times[on] += learn.last.times[1:]
    without, with_ = (1000*min(times[k]) for k in (False, True))
    return dict(parameters=sum(w.numel() for w in learn.model.parameters()), steps=len(times[True]), without_ms=round(without, 3), with_ms=round(with_, 3),
                ratio=round(with_/without, 4), own_ms=round(1000*min(own), 3), own_share=round(1000*min(own)/without, 5))


if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--rounds', type=int, default=10)
    p.add_argument('--steps', type=int, default=12, help='of a round')
    p.add_argument('--record', type=Path, help='JSON file for the figures')
    args = p.parse_args()
    found = dict(threads=torch.get_num_threads(), cases={})
    for name, case in CASES.items():
        found['cases'][name] = m = measure(rounds=args.rounds, steps=args.steps, **case)
        print(f"{name}: {m['without_ms']} ms without, {m['with_ms']} ms with ({m['ratio']} x); the guard itself {m['own_ms']} ms, {m['own_share']:.2%} of a step", flush=True)
    if args.record: args.record.write_text(json.dumps(dict(provenance(), **found), indent=1) + '\n')
