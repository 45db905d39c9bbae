"""A checkpoint that is saved after an evaluation has all that one right behind `fit` has, or says what is missing."""

import warnings
from pathlib import Path

import pytest
import torch
from support.cyclic import cyclic, deep
from support.processes import launch
from support.training import Regression, loader, local_update, trainer, weights

from lightning_comm import Averaging, CompressedDDPStrategy, FixedPeriod, TopK

STRATEGIES = {
    "rounds": lambda: local_update(FixedPeriod(4)),
    "overlap": lambda: local_update(FixedPeriod(4), averaging=Averaging(compression=TopK(0.5), overlap_steps=1)),
    "gradients": lambda: local_update(FixedPeriod(4), gradient_steps=1000),
    "top-k": lambda: CompressedDDPStrategy(TopK(0.5)),
    "cyclic": cyclic,
}


def _model(modules=4):
    return Regression(deep(modules), lambda parameters: torch.optim.AdamW(parameters, 0.01))


def _fitted(name, rank, epochs=1, path=None, module=None):
    module = module or _model()
    runner = trainer(STRATEGIES[name](), 2, max_epochs=epochs, limit_val_batches=1)
    runner.fit(module, loader(6, rank, shuffle=True), loader(1, rank), ckpt_path=path)
    return runner, module


MOST = ("overlap", "top-k", "cyclic")
ALSO = ("rounds", "gradients")  # of the same strategy as `overlap`


def _save(rank, folder, names):
    resumed = {}
    for name in names:
        paths = [f"{folder}/{name}/{kind}.ckpt" for kind in ("fit", "validate", "test")]
        runner, module = _fitted(name, rank)
        runner.save_checkpoint(paths[0])
        runner.validate(module, loader(3, rank, shuffle=True), verbose=False)
        runner.save_checkpoint(paths[1])
        runner.predict(module, loader(3, rank, shuffle=True))
        runner.save_checkpoint(paths[2])
        runner.save_checkpoint(f"{folder}/{name}/weights.ckpt", weights_only=True)
        resumed[name] = [weights(_fitted(name, rank, 2, path)[1]) for path in paths[::2]]
    return resumed


def _content(value):
    """The value, without what tells one save from another, what saves have sent, and what an evaluation has counted."""
    if isinstance(value, dict):
        left_out = ("token", "ledger", "lightning_comm.save", "validate_loop", "predict_loop")
        return {key: _content(each) for key, each in value.items() if key not in left_out}
    if isinstance(value, (list, tuple)):
        return [_content(each) for each in value]
    return (value.dtype, value.tolist()) if isinstance(value, torch.Tensor) else value


@pytest.mark.parametrize(
    "names", [pytest.param(MOST, id="most"), pytest.param(ALSO, id="also", marks=pytest.mark.exhaustive)]
)
def test_a_save_after_an_evaluation_has_what_one_after_fit_has_and_resumes_alike(tmp_path, names):
    Regression.predict_step = lambda self, batch, batch_idx: self.net(batch[0])
    try:
        answers = launch(_save, str(tmp_path), names, world_size=2)
    finally:
        del Regression.predict_step
    for name in names:
        sets = []
        for kind in ("fit", "validate", "test"):
            path = tmp_path / name / f"{kind}.ckpt"
            files = [path, *sorted(Path(f"{path}.ranks").glob("*/*.pt"))]
            sets.append([_content(torch.load(each, weights_only=True)) for each in files])
        assert len(sets[0]) == (1 if name == "cyclic" else 3), name
        assert len(sets[0][0]["optimizer_states"][0]["state"]) == 8, name
        assert sets[1] == sets[0], name
        assert sets[2] == sets[0], name
        assert "optimizer_states" not in torch.load(tmp_path / name / "weights.ckpt", weights_only=True)
        for answer in answers:
            for one, other in zip(*answer[name], strict=True):
                assert (one == other).all(), name


def _save_another(rank, folder):
    said = {}
    for name in ("rounds", "top-k", "cyclic"):
        runner, _ = _fitted(name, rank)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            runner.validate(_model(5), loader(1, rank), verbose=False)
            runner.save_checkpoint(f"{folder}/{name}.ckpt")
            again = _fitted(name, rank, 2, f"{folder}/{name}.ckpt", _model(5))[0]
        said[name] = " ".join(str(each.message) for each in caught), again.global_step
    return said


def test_a_save_of_another_model_is_ordinary_and_says_what_is_missing(tmp_path):
    answers = launch(_save_another, str(tmp_path), world_size=2)
    for name, (said, _) in answers[0].items():
        assert f"{name}.ckpt' has the weights of the model that was evaluated last, and neither optimizer" in said
        assert "a Trainer that had not trained this model" in said
    for answer in answers:
        assert {steps for _, steps in answer.values()} == {12}


class _Fails(Regression):
    def training_step(self, batch, batch_idx):
        if batch_idx == 3:
            raise ValueError("out of luck")
        return super().training_step(batch, batch_idx)


def _save_after_failure(rank, folder):
    said = {}
    for name in ("rounds", "cyclic"):
        runner, module = trainer(STRATEGIES[name](), 2), _Fails(deep(4))
        with pytest.raises((ValueError, RuntimeError), match="out of luck"):
            runner.fit(module, loader(6, rank))
        runner.validate(module, loader(1, rank), verbose=False)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            runner.save_checkpoint(f"{folder}/{name}.ckpt")
        said[name] = " ".join(str(each.message) for each in caught)
    return said


def test_a_save_after_a_fit_that_failed_says_that_it_is_incomplete(tmp_path):
    for name, said in launch(_save_after_failure, str(tmp_path), world_size=2)[0].items():
        assert f"{name}.ckpt' is written after an error" in said
