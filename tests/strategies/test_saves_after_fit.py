"""A checkpoint that is saved after an evaluation has all that one right behind `fit` has."""

from pathlib import Path

import pytest
import torch
from support.cyclic import cyclic, deep
from support.processes import launch
from support.training import Regression, loader, local_update, trainer, weights

from lightning_comm import Averaging, CompressedDDPStrategy, FixedPeriod, TopK

STRATEGIES = {
    "rounds": lambda: local_update(FixedPeriod(4)),
    "compressed rounds": lambda: local_update(FixedPeriod(4), averaging=Averaging(compression=TopK(0.5), overlap_steps=1)),
    "gradients": lambda: local_update(FixedPeriod(4), gradient_steps=1000),
    "top-k": lambda: CompressedDDPStrategy(TopK(0.5)),
    "cyclic": cyclic,
}


def _model():
    return Regression(deep(4), lambda parameters: torch.optim.AdamW(parameters, 0.01))


def _runner(name, rank, world_size, **options):
    return trainer(STRATEGIES[name](), world_size, **{"max_epochs": 1, "num_sanity_val_steps": 0, **options})


def _save(rank, world_size, folder):
    resumed = {}
    for name in STRATEGIES:
        runner, model = _runner(name, rank, world_size, limit_val_batches=1), _model()
        runner.fit(model, loader(6, rank), loader(1, rank))
        runner.save_checkpoint(f"{folder}/{name}/after fit.ckpt")
        runner.validate(model, loader(3, rank, shuffle=True), verbose=False)
        runner.save_checkpoint(f"{folder}/{name}/after validate.ckpt")
        runner.save_checkpoint(f"{folder}/{name}/weights.ckpt", weights_only=True)
        runner.test_loop  # noqa: B018
        for kind in ("after fit", "after validate", "weights"):
            model = _model()
            _runner(name, rank, world_size, max_epochs=2).fit(
                model, loader(6, rank, shuffle=True), ckpt_path=f"{folder}/{name}/{kind}.ckpt" 
            ) if kind != "weights" else _runner(name, rank, world_size).validate(model, loader(1, rank), f"{folder}/{name}/{kind}.ckpt", verbose=False)
            resumed[name, kind] = weights(model)
    return resumed


def _differences(one, other, path=""):
    """Where two trees of values differ."""
    if isinstance(one, dict) and isinstance(other, dict):
        return [
            found
            for key in sorted({*one, *other}, key=str)
            for found in _differences(one.get(key), other.get(key), f"{path}/{key}")
        ]
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)) and len(one) == len(other):
        return [found for k, pair in enumerate(zip(one, other, strict=True)) for found in _differences(*pair, f"{path}/{k}")]
    same = torch.equal(one, other) if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor) else one == other
    return [] if same else [f"{path}: {str(one)[:60]} and {str(other)[:60]}"]


def test_a_save_after_an_evaluation_has_what_one_after_fit_has(tmp_path):
    answers = launch(_save, 2, str(tmp_path), world_size=2)
    for name in STRATEGIES:
        one, other = ({p.relative_to(f): p for p in sorted(f.rglob("*")) if p.is_file()} for f in (tmp_path/name, tmp_path/name))
        first = torch.load(tmp_path / name / "after fit.ckpt", weights_only=True)
        second = torch.load(tmp_path / name / "after validate.ckpt", weights_only=True)
        diff = [d for d in _differences(first, second)]
        print(name, len(first["optimizer_states"][0]["state"]), diff)
        ranks = [sorted(Path(f"{tmp_path}/{name}/{kind}.ckpt.ranks").glob("*")) for kind in ("after fit", "after validate")]
        print([len(r) for r in ranks])
        for a, b in zip(*ranks):
            print("   rank file", _differences(torch.load(a, weights_only=True), torch.load(b, weights_only=True)))
        for answer in answers:
            for x, y in zip(answer[name, "after fit"], answer[name, "after validate"]): 
                assert (x == y).all(), name
