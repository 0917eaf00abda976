"The studies on CIFAR-10 from end to end, on images of their shape: every arm trains, is judged and is told. The numbers mean nothing, the baselines are right."
import json

import pytest, torch

from relvit import methods, photos
from relvit.datasets import Splits
from relvit.images import Images

def stripes(n, seed):
    "Ten classes, each a frequency of stripes, under noise"
    g = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % 10
    wave = torch.sin(torch.arange(32)*(y[:, None] + 1)/5)[:, None, None]
    return Images((128 + 60*wave + 20*torch.randn(n, 3, 32, 32, generator=g)).clamp(0, 255).byte(), y, [*'abcdefghij'], 'cifar10')


def opened(name, root, p, seed):
    assert (name, root) == ('cifar10', 'there')
    return Splits(stripes(300, seed), stripes(520, 98), stripes(100, 99), img_size=32, p=p)


def here(arms, seeds, cfg, workers, keep, **_):
    "What `run_arms` does, without processes of their own, which would not have these images"
    return {k: [v] for arm in arms.values() for k, v in arm(cfg, seeds[0], lambda n=1: None, None).items()}


@pytest.fixture(autouse=True)
def beside(monkeypatch):
    for study in photos, methods:
        monkeypatch.setattr(study, 'open_data', opened)
        monkeypatch.setattr(study, 'run_arms', here)


@pytest.mark.parametrize('modern', [False, True])
def test_photos(modern, tmp_path, capsys):
    photos.study.__wrapped__('there', seeds=1, record=tmp_path/'r.json', modern=modern, quick=True)
    record, said = json.loads((tmp_path/'r.json').read_text()), capsys.readouterr().out
    results = record['results']
    wanted = {k for k in photos.ROWS if k.startswith('modern') == modern}
    assert wanted <= {*results} and all(0 <= results[k][0] <= 1 for k in wanted)
    assert all(photos.ROWS[k] in said for k in wanted) and 'equal compute' in said and 'there' not in record['config'].values()
    if not modern: assert results['majority'] == pytest.approx([.1]) and results['pixels_knn'][0] > .9 < results['pixels_logistic'][0]


def test_methods(tmp_path, capsys):
    methods.compare_methods.__wrapped__('there', seeds=1, record=tmp_path/'r.json', quick=True)
    results, said = json.loads((tmp_path/'r.json').read_text())['results'], capsys.readouterr().out
    for arm, text in methods.ARMS.items():
        assert text in said and all(0 <= results[f'{arm}_{k}'][0] <= 1 for k in ('knn', 'linear'))
        if arm not in ('pixels', 'random'): assert any(results[f'{arm}_{k}'] != results[f'random_{k}'] for k in ('pixel', 'channel'))
    assert results['pixels_knn'][0] > .9
    with pytest.raises(ValueError, match="no arm is called 'dion'"): methods.compare_methods.__wrapped__('there', arms='dion', quick=True)
