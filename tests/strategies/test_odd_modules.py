"""Unusual modules and parameters through every strategy: right weights, right checkpoints, exact resumes."""

from datetime import timedelta

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from support.odd_modules import Odd, by_hand, mean, tensors
from support.processes import launch
from support.shared_ranks import SharedRanks
from support.training import loader, trainer

from lightning_comm import (
    Averaging,
    CompressedDDPStrategy,
    CyclicStrategy,
    FixedPeriod,
    Int8,
    LocalUpdateStrategy,
    MagnitudePruning,
    PowerSGD,
    SparseMask,
    TopK,
)

STEPS, SAVED_AT, PERIOD = 7, 5, 4  # saved in mid-round, and while an average is in flight
LIMIT = timedelta(seconds=40)


def local(period=PERIOD, **kwargs):
    return lambda: LocalUpdateStrategy(FixedPeriod(period), timeout=LIMIT, **kwargs)


def averaged(compression=None, **kwargs):
    return local(averaging=Averaging(0.0002, compression, **kwargs))


def compressed(compression):
    return lambda: CompressedDDPStrategy(compression, timeout=LIMIT, bucket_cap_mb=0.0003, find_unused_parameters=True)


def cyclic(**kwargs):
    return lambda: CyclicStrategy(timeout=LIMIT, **kwargs)


# how far weights may end from the reference; `None` where a method is another one, such as a mask or a delay
DDP = {
    "ddp": (lambda: DDPStrategy(timeout=LIMIT, find_unused_parameters=True), 1e-5),  # that the reference is right
    "bf16": (compressed("bf16"), 2e-2),
    "int8": (compressed("int8"), 5e-2),
    "powersgd": (compressed(PowerSGD(2)), None),
    "topk": (compressed(TopK(0.2)), None),
    "ternary": (compressed("ternary"), None),
    "pactrain": (compressed(["sparse_mask", "bf16"]), None),
    "mask+int8": (compressed([SparseMask(MagnitudePruning(0.5)), Int8()]), None),
    "cyclic, in step": (cyclic(warmup_sync_steps=1000), 1e-5),
    "cyclic v2": (cyclic(), None),
    "cyclic v1": (cyclic(rule="v1"), None),
}
LOCAL = {
    "local": (local(), 1e-5),
    "local, overlap": (averaged(overlap_steps=2), None),
    "local, bf16": (averaged("bf16"), 2e-2),
    "local, int8": (averaged(Int8()), 2e-2),
    "local, powersgd": (averaged(PowerSGD(2)), None),
    "local, bf16, overlap": (averaged("bf16", overlap_steps=2), None),
    "local, mask": (averaged(SparseMask(MagnitudePruning(0.5))), None),
    "local, momenta too": (local(optimizer_state="average"), None),
    "gradients for half the run": (local(gradient_steps=0.3, find_unused_parameters=True), None),
    "gradients, then momenta too": (
        local(gradient_steps=0.3, find_unused_parameters=True, optimizer_state="average"),
        None,
    ),
}
STRATEGIES = DDP | LOCAL
# whose parts others show too: the compression under the other strategy, behind a mask or an overlap, or with all the
# odd parameters of `test_odd_parameters_runs`
ALSO = {
    "topk",
    "ternary",
    "bf16",
    "int8",
    "pactrain",
    "cyclic v1",
    "local, overlap",
    "local, bf16",
    "local, int8",
    "local, powersgd",
    "local, mask",
    "local, momenta too",
    "gradients for half the run",
}
DDP_ALONE = {name for name in DDP if "cyclic" not in name}  # whose checkpoints are rank 0's


class Save(Callback):
    """Saves a checkpoint, and keeps what this rank held: what it goes on with."""

    def __init__(self, path: str, flushes: bool) -> None:
        self.path, self.flushes, self.own = path, flushes, {}

    def on_train_batch_end(self, runner, module, *args):
        if runner.global_step == SAVED_AT:
            before = tensors(module)
            runner.save_checkpoint(self.path)
            self.own = tensors(module)
            assert self.flushes or all(torch.equal(now, before[name]) for name, now in self.own.items())


def make(name: str) -> Odd:
    together = name.startswith("cyclic")  # which refuses both, since no rank could own them
    return Odd(view=not together, unused=not together)


def _fits(rank, name, path):
    strategy, _ = STRATEGIES[name]
    save = Save(path, flushes=name.startswith("cyclic"))
    whole, resumed = make(name), make(name)
    runner = trainer(strategy(), 2, callbacks=[save])
    runner.fit(whole, loader(STEPS, rank))
    trainer(strategy(), 2).fit(resumed, loader(STEPS, rank), ckpt_path=path)
    numpy = [{key: value.numpy() for key, value in each.items()} for each in (tensors(whole), tensors(resumed))]
    return *numpy, {key: value.numpy() for key, value in save.own.items()}


def as_tensors(named):
    return {name: torch.from_numpy(array) for name, array in named.items()}


@pytest.fixture(scope="module")
def fitted(request, tmp_path_factory):
    """The answers of all strategies that are asked for, and where each saved its checkpoint."""
    names = STRATEGIES if request.config.getoption("exhaustive") else [each for each in STRATEGIES if each not in ALSO]
    paths = {name: str(tmp_path_factory.mktemp("odd") / "saved.ckpt") for name in names}
    return SharedRanks({name: (_fits, name, path) for name, path in paths.items()}, world_size=2), paths


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.exhaustive] if name in ALSO else []) for name in STRATEGIES]
)
def test_ranks_end_equal_and_near_the_reference_and_a_checkpoint_holds_the_average_and_resumes_exactly(name, fitted):
    runs, paths = fitted
    path = paths[name]
    answers = [[as_tensors(each) for each in answer] for answer in runs[name]]
    (whole, resumed, own), (whole_of_1, resumed_of_1, own_of_1) = answers
    begin = tensors(make(name))

    for key, value in whole.items():
        assert value.isfinite().all() or key.endswith("never"), key
        if name not in DDP_ALONE or "norm.running" not in key:  # DDP makes them equal before a forward, not after it
            assert torch.equal(value, whole_of_1[key]), f"{key} differs between ranks"
        assert torch.equal(resumed[key], value), f"{key} differs after the resume"
        assert torch.equal(resumed_of_1[key], whole_of_1[key]), f"{key} differs after the resume, on rank 1"
    assert not any(torch.equal(whole[key], begin[key]) for key in ("net.wave", "net.scale", "net.wide.weight"))
    for key in ("net.mask", "net.never", "net.order", "net.switch"):
        assert torch.equal(whole[key], begin[key])

    saved = torch.load(path, weights_only=True)["state_dict"]
    assert saved["version"] == 3
    for key, value in own.items():
        found = saved[f"model/{key}"]
        assert found.shape == value.shape
        expected = value if name in DDP_ALONE else mean([value, own_of_1[key]])
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6, msg=lambda text, key=key: f"{key}: {text}")

    tolerance = STRATEGIES[name][1]
    if tolerance is not None:
        expected = by_hand(lambda: make(name), 2, STEPS, PERIOD if name in LOCAL else None)
        for key, value in expected.items():
            if "norm.running" not in key or name in LOCAL:  # DDP takes the statistics of rank 0
                torch.testing.assert_close(
                    whole[key], value, rtol=tolerance, atol=tolerance, msg=lambda text, key=key: f"{key}: {text}"
                )


def _refused(rank, view, unused):
    with pytest.raises((MisconfigurationException, ValueError, RuntimeError)) as caught:
        trainer(cyclic()(), 2).fit(Odd(view=view, unused=unused), loader(STEPS, rank))
    return str(caught.value)


@pytest.mark.parametrize(
    ("view", "unused", "names"), [(True, False, ["net.first.weight", "net.back"]), (False, True, ["net.nobody.weight"])]
)
def test_cyclic_names_parameters_that_share_memory_and_those_without_a_gradient(view, unused, names):
    for message in launch(_refused, view, unused, world_size=2):
        assert [name for name in names if name not in message] == []
