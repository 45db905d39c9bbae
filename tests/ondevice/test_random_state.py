"""Random states: of CUDA where a process uses it, and not where it is merely at hand."""

import pytest
import torch
from lightning.pytorch import seed_everything
from support.processes import launch
from support.training import Regression, Stop, loader, trainer
from torch import nn

from lightning_comm import LocalUpdateStrategy
from lightning_comm.ondevice.optimizer.trial import why_not_by_parameter
from lightning_comm.ondevice.pruning.second_derivatives import kernels_with_second_derivatives
from lightning_comm.ondevice.random_state import random_state, seed_torch, set_random_state

STATE = torch.arange(16, dtype=torch.uint8)


class Gpu:
    """A GPU at hand, of which this process may or may not make use; asking it for anything but that is an error."""

    def __init__(self, monkeypatch, *, used):
        self.set_to, self.seeds = [], []
        for name, stub in {
            "is_available": lambda: True,
            "device_count": lambda: 1,
            "is_initialized": lambda: used,
            "_lazy_init": self._refuse,
            "get_rng_state": lambda device="cuda": STATE if used else self._refuse(),
            "set_rng_state": lambda state, device="cuda": self.set_to.append(state) if used else self._refuse(),
            "manual_seed": self.seeds.append,
            "manual_seed_all": lambda seed: self._refuse(),
        }.items():
            monkeypatch.setattr(torch.cuda, name, stub)

    @staticmethod
    def _refuse():
        raise RuntimeError("Cannot re-initialize CUDA in forked subprocess")


def test_a_run_on_the_processor_leaves_a_gpu_alone_and_a_state_of_one_out(monkeypatch):
    gpu = Gpu(monkeypatch, used=False)
    state = random_state()
    assert "cuda" not in state
    drawn = torch.rand(3)
    set_random_state({**state, "cuda": STATE})
    assert torch.equal(drawn, torch.rand(3))
    seed_torch(7)
    assert torch.equal(torch.rand(3), torch.rand(3, generator=torch.Generator().manual_seed(7)))
    assert (gpu.set_to, gpu.seeds) == ([], [])


def test_a_run_on_a_gpu_keeps_its_state_and_goes_on_from_a_file_of_the_processors(monkeypatch):
    gpu = Gpu(monkeypatch, used=True)
    state = random_state()
    assert torch.equal(state["cuda"], STATE)
    set_random_state({name: value for name, value in state.items() if name != "cuda"})
    assert gpu.set_to == []
    set_random_state(state)
    assert len(gpu.set_to) == 1
    seed_torch(7)
    assert gpu.seeds == [7]


@pytest.mark.parametrize("used", [False, True])
def test_a_trial_of_an_optimizer_seeds_no_device_that_its_parameters_are_not_on(monkeypatch, used):
    gpu = Gpu(monkeypatch, used=used)
    parameter = nn.Parameter(torch.ones(3))
    before = torch.get_rng_state()
    assert why_not_by_parameter("here", torch.optim.AdamW([parameter])) is None
    assert (gpu.seeds, gpu.set_to) == ([], [])
    assert torch.equal(torch.get_rng_state(), before)


def test_second_derivatives_on_the_processor_leave_the_settings_of_cuda_alone(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "flags", Gpu._refuse)
    with kernels_with_second_derivatives(nn.LSTM(2, 2)):
        pass


def _fits(rank, folder, strategy):
    patch = pytest.MonkeyPatch()
    Gpu(patch, used=False)
    patch.setattr(torch.cuda, "manual_seed_all", lambda seed: None)  # torch.manual_seed, which Lightning calls
    seed_everything(0, verbose=False)
    path = f"{folder}/saved.ckpt"
    for kwargs in ({"callbacks": [Stop(2, path)]}, {"callbacks": [], "ckpt_path": path}):
        resumed = {"ckpt_path": kwargs.pop("ckpt_path", None), "weights_only": False}
        runner = trainer(strategy(), 2, **kwargs)
        runner.fit(Regression(), loader(4, rank), **resumed)
    patch.undo()
    return runner.global_step


def _strategy(word):
    from lightning_comm import CompressedDDPStrategy, CyclicStrategy, FixedPeriod

    return {
        "local": lambda: LocalUpdateStrategy(FixedPeriod(3)),
        "compressed": lambda: CompressedDDPStrategy("powersgd"),
        "cyclic": CyclicStrategy,
    }[word]


@pytest.mark.parametrize("word", ["local", "compressed", "cyclic"])
def test_fits_on_the_processor_of_a_machine_with_a_gpu_save_and_resume_without_it(tmp_path, word):
    assert launch(_fits, tmp_path, _strategy(word), world_size=2) == [4, 4]
