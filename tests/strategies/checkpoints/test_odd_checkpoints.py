"""Checkpoints in mid-round of modules with odd state dicts and hooks: made of the average, and a resume is exact."""

from pathlib import Path

import pytest
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EMAWeightAveraging
from support.processes import launch, outcomes
from support.training import FEATURES, Regression, Samples, local_update, network, trainer
from torch import nn
from torch.utils.data import DataLoader

from lightning_comm import Averaging, CompressedDDPStrategy, CyclicStrategy, FixedPeriod
from lightning_comm.data.resumable import ResumableLoader
from lightning_comm.strategies.local_update.strategy import LocalUpdateStrategy

STEPS, SAVED = 8, (5, 7)
COUNTS = {0: 6, 1: 2}  # samples of a batch, where averages are weighted by them


class Layers(nn.Module):
    """Tied weights, a parameter that is a transposed view of another, buffers of all kinds, and an extra state."""

    def __init__(self, views: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm, self.second = nn.Linear(FEATURES, 7), nn.BatchNorm1d(7), nn.Linear(7, 7)
        self.again, self.last = nn.Linear(7, 7), nn.Linear(7, 1)
        self.again.weight = self.second.weight
        self.register_buffer("mask", torch.full((7,), torch.finfo(torch.float64).min, dtype=torch.float64))
        self.register_buffer("seen", torch.zeros(7), persistent=False)  # changes nothing, and DDP sends it at each step
        self.double()
        self.view = nn.Parameter(self.first.weight.detach().t()) if views else None

    def forward(self, x):
        hidden = self.norm(self.first(x) + (0 if self.view is None else x @ self.view))
        self.seen += hidden.detach().mean(0)
        hidden = self.second(hidden.tanh()) + self.again(hidden)
        return self.last(hidden.masked_fill(hidden > 1e6, 0.0) + 0 * self.mask.clamp(-1, 1))

    def get_extra_state(self):
        return {"norm": self.first.weight.detach().norm(), "twice": 2 * self.last.weight.detach()}

    def set_extra_state(self, state):
        self.loaded = state


class Odd(Regression):
    """Saves weights under other names, in other places and halved, some of them twice; and copies them in a hook."""

    def __init__(self, views=True):
        super().__init__(Layers(views), lambda p: torch.optim.AdamW(p, lr=0.02))

    def state_dict(self, *args, **kwargs):
        state = super().state_dict(*args, **kwargs)
        renamed = {f"renamed/{name}": value for name, value in state.items() if "first" not in name}
        halved = {name: value / 2 for name, value in state.items() if "first" in name}
        return {**renamed, "halved": halved, "nested": {"inner": [state["net.last.weight"]]}}

    def load_state_dict(self, state, strict=True, **kwargs):
        plain = {name.removeprefix("renamed/"): value for name, value in state.items() if name.startswith("renamed/")}
        plain |= {name: 2 * value for name, value in state["halved"].items()}
        return super().load_state_dict(plain, strict)

    def on_save_checkpoint(self, checkpoint):
        checkpoint["copied"] = {name: parameter.detach().clone() for name, parameter in self.named_parameters()}

    def training_step(self, batch, batch_idx):
        if self.trainer.strategy.__class__ is LocalUpdateStrategy and self.weighed:
            self.trainer.strategy.count_samples(COUNTS[self.trainer.global_rank])
        return super().training_step(batch, batch_idx)

    weighed = False


class Save(Callback):
    """Notes what all ranks hold, saves in three ways, and sees that each rank still holds what it held."""

    def __init__(self, folder, weighed):
        self.folder, self.weighed, self.held, self.states = folder, weighed, {}, {}

    def setup(self, trainer, pl_module, stage):
        if self.weighed:
            trainer.strategy.weigh_by_samples()

    def on_save_checkpoint(self, trainer, pl_module, checkpoint):
        checkpoint["by_callback"] = pl_module.net.last.weight  # the parameter itself

    def on_train_batch_end(self, trainer, pl_module, *args):
        step = trainer.global_step
        own = held_by(pl_module)
        momenta = [value.clone() for state in trainer.optimizers[0].state.values() for value in state.values()]
        if not isinstance(trainer.strategy, LocalUpdateStrategy):
            del own["net.seen"]  # not in the state dict, and others keep nothing beside it
        self.states[step] = [*own.values(), *momenta]
        if self.folder is None or step not in SAVED:
            return
        ranks = [None] * trainer.world_size
        if isinstance(trainer.strategy, CyclicStrategy):  # a flush brings ranks together before a save
            trainer.save_checkpoint(f"{self.folder}/{step}.ckpt")
            own = held_by(pl_module)
        torch.distributed.all_gather_object(ranks, (own, trainer.optimizers[0].state_dict()))
        self.held[step] = ranks
        trainer.save_checkpoint(f"{self.folder}/{step}.ckpt")
        trainer.save_checkpoint(f"{self.folder}/{step}-only.ckpt", weights_only=True)
        trainer._checkpoint_connector.dump_checkpoint(weights_only=False)  # saved nowhere


def held_by(module):
    return {name: t.detach().clone() for name, t in [*module.named_parameters(), *module.named_buffers()]}


class Late(TorchCheckpointIO):
    """Writes files only when asked, as one that works in the background may."""

    def __init__(self):
        self.waiting = []

    def save_checkpoint(self, checkpoint, path, storage_options=None):
        if str(path).endswith("rank0.pt") or str(path).endswith("rank1.pt"):
            super().save_checkpoint(checkpoint, path, storage_options)
        else:
            self.waiting.append((checkpoint, path))

    def write(self):
        for checkpoint, path in self.waiting:
            super().save_checkpoint(checkpoint, path)


CASES = {
    "late-file": {"checkpoint_io": Late},
    "in-flight": {"averaging": Averaging(1e-4, overlap_steps=2)},
    "int8-in-flight": {"averaging": Averaging(1e-4, "int8", overlap_steps=3)},
    "post-local": {"gradient_steps": 3},
    "weighed": {"weighed": True},
    "averaged-optimizer": {"optimizer_state": "average"},
    "late-file-weighed": {"checkpoint_io": Late, "weighed": True},
    "post-local-averaged-optimizer": {"gradient_steps": 3, "optimizer_state": "average"},
    "cyclic": {"strategy": CyclicStrategy},
    "compressed-ddp": {"strategy": lambda: CompressedDDPStrategy("bf16")},
}


def fit(rank, case, folder, ckpt_path=None):
    settings = {**CASES[case]}
    make, weighed = settings.pop("strategy", None), settings.pop("weighed", False)
    io = settings.pop("checkpoint_io", TorchCheckpointIO)()
    torch.manual_seed(rank)
    module, save = Odd(views=make is None), Save(folder, weighed)
    module.weighed = weighed
    strategy = make() if make else local_update(FixedPeriod(4), checkpoint_io=io, **settings)
    data = ResumableLoader(Samples(STEPS * 4, rank), 4, seed=3, num_replicas=1, rank=0)
    trainer(strategy, 2, callbacks=[save]).fit(module, data, ckpt_path=ckpt_path)
    save.states[STEPS + 1] = list(module.parameters())
    if isinstance(io, Late):
        io.write()
        torch.distributed.barrier()
    return save


def mean_of(ranks, case):
    """The average of what ranks held, by hand; rank 0's own where there is none."""
    counts = [1, 0] if case == "compressed-ddp" else [1, 1]  # DDP: rank 0's buffers
    if "weighed" in case:
        counts = [COUNTS[0], COUNTS[1]]
    mean = {}
    for name, value in ranks[0].items():
        rows = [held[name] for held in ranks]
        averaged = value.is_floating_point() and not torch.equal(*rows)
        mean[name] = sum(c * row for c, row in zip(counts, rows, strict=True)) / sum(counts) if averaged else value
    return mean


def check_file(path, ranks, case):
    mean = mean_of([held for held, _ in ranks], case)
    saved = torch.load(path, weights_only=True)
    state = saved["state_dict"]
    extra = state["renamed/net._extra_state"]
    pairs = {
        "nested": (state["nested"]["inner"][0], mean["net.last.weight"]),
        "extra state": (extra["norm"], mean["net.first.weight"].norm()),
        "extra state, scaled": (extra["twice"], 2 * mean["net.last.weight"]),
        "tied": (state["renamed/net.again.weight"], mean["net.second.weight"]),
        "by a callback": (saved.get("by_callback", mean["net.last.weight"]), mean["net.last.weight"]),
    }
    pairs |= {f"copy of {name}": (copy, mean[name]) for name, copy in saved["copied"].items()}
    for name, value in mean.items():
        if "first" in name:
            pairs[name] = state["halved"][name], value / 2
        elif name != "net.seen":  # in no state dict
            pairs[name] = state[f"renamed/{name}"], value
    if "averaged-optimizer" in case and "optimizer_states" in saved:
        for k, moments in saved["optimizer_states"][0]["state"].items():
            pairs[f"momentum {k}"] = moments["exp_avg"], sum(own["state"][k]["exp_avg"] for _, own in ranks) / 2
    for what, (got, wanted) in pairs.items():
        assert torch.allclose(got, wanted, rtol=1e-12, atol=1e-14), f"{what} in {path}"
    one, two = (held for held, _ in ranks)
    return not torch.equal(one["net.last.weight"], two["net.last.weight"])


# each setting of the other cases is in one of these as well
MOST = ("late-file-weighed", "int8-in-flight", "post-local-averaged-optimizer", "cyclic", "compressed-ddp")
ALONE = tuple(case for case in CASES if case not in MOST)


def _every_case(rank, folder, cases):
    apart = {}
    for case in cases:
        place = Path(folder) / case
        whole, apart[case] = fit(rank, case, place), False
        for step in SAVED:
            kind = ("", "-only")[rank]  # each rank looks at half of the files
            apart[case] |= check_file(place / f"{step}{kind}.ckpt", whole.held[step], case)
        # a save changes nothing, but for a flush of the cyclic schedule
        again = Path(folder) / f"{case}-again" if case == "cyclic" else None
        resumed = fit(rank, case, again, place / f"{SAVED[0]}.ckpt")
        assert min(resumed.states) == SAVED[0] + 1
        assert_same(resumed.states, whole.states, f"{case}, resumed")
    return apart


def assert_same(states, expected, what):
    assert max(states) == max(expected) == STEPS + 1
    for step, state in states.items():
        differ = [k for k, (a, b) in enumerate(zip(state, expected[step], strict=True)) if not torch.equal(a, b)]
        assert not differ, f"{what}: tensors {differ} at step {step}"


@pytest.mark.parametrize(
    "cases", [pytest.param(MOST, id="most"), pytest.param(ALONE, id="alone", marks=pytest.mark.exhaustive)]
)
def test_files_in_mid_round_hold_averages_whatever_a_module_makes_of_its_weights_and_a_resume_is_exact(tmp_path, cases):
    for apart in launch(_every_case, str(tmp_path), cases, world_size=2, timeout_s=120):
        assert all(apart[case] for case in cases if case not in ("cyclic", "compressed-ddp")), "ranks were not apart"


class Held(Callback):
    """Notes what all ranks hold of the model and of its moving average, then saves."""

    def __init__(self, ema, path):
        self.ema, self.path, self.ranks, self.states = ema, path, None, {}

    def on_train_batch_end(self, trainer, pl_module, *args):
        own, shadow = held_by(pl_module), held_by(self.ema._average_model.module)
        self.states[trainer.global_step] = [*own.values(), *shadow.values()]
        if self.path is not None and trainer.global_step == SAVED[0]:
            self.ranks = [None] * trainer.world_size
            torch.distributed.all_gather_object(self.ranks, (own, shadow))
            trainer.save_checkpoint(self.path)


def _moving_average(rank, path, kw):
    def run(save_to, ckpt_path=None):
        ema = EMAWeightAveraging(decay=0.8)
        held = Held(ema, save_to)
        torch.manual_seed(rank)
        data = ResumableLoader(Samples(STEPS * 4, rank), 4, seed=3, num_replicas=1, rank=0)
        module = Regression(network(norm=True), lambda p: torch.optim.AdamW(p, lr=0.02))
        trainer(local_update(FixedPeriod(4), **kw), 2, callbacks=[ema, held]).fit(module, data, ckpt_path=ckpt_path)
        held.states[STEPS + 1] = [p.detach() for p in module.parameters()]
        return held

    whole = run(path)
    assert_same(run(None, path).states, whole.states, "resumed with a moving average")
    saved = torch.load(path, weights_only=True)
    for which, key in enumerate(("current_model_state", "state_dict")):
        one, two = (ranks[which] for ranks in whole.ranks)
        for name, mine in one.items():
            wanted = (mine + two[name]) / 2 if mine.is_floating_point() else mine
            assert torch.allclose(saved[key][name], wanted, rtol=1e-12, atol=1e-14), f"{name} in {key}"
        assert not torch.equal(one["net.0.weight"], two["net.0.weight"]), "ranks were not apart"


class Fails(Regression):
    """Its hook fails on one rank, where an average is in place."""

    def on_save_checkpoint(self, checkpoint):
        self.seen = self.net[0].weight.detach().clone()
        if self.trainer.global_rank == 1:
            raise RuntimeError("the hook of rank 1 fails")


class OnException(Callback):
    """What this rank holds when callbacks learn of a failure."""

    def on_exception(self, trainer, pl_module, exception):
        self.held = pl_module.net[0].weight.detach().clone()


def _failing_hook(rank, path):
    class Saves(Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            if trainer.global_step == 2:
                self.held = pl_module.net[0].weight.detach().clone()
                trainer.save_checkpoint(path)

    module, saves, heard = Fails(), Saves(), OnException()
    data = DataLoader(Samples(16, rank), 4)
    with pytest.raises(RuntimeError, match="the hook of rank 1 fails"):
        trainer(local_update(FixedPeriod(4)), 2, callbacks=[saves, heard]).fit(module, data)
    assert not torch.equal(module.seen, saves.held), "no average was in place"
    assert torch.equal(heard.held, saves.held)
    assert torch.equal(module.net[0].weight, saves.held)
    if rank == 1:
        raise RuntimeError("all was as it should be")  # and the process ends, as it does after a failure


def test_moving_averages_of_weights_are_saved_averaged_and_resumed_exactly(tmp_path):
    in_flight = Averaging(1e-4, overlap_steps=2)
    launch(_moving_average, str(tmp_path / "a.ckpt"), {"averaging": in_flight}, world_size=2)


def test_a_failing_hook_leaves_each_rank_its_own_weights(tmp_path):
    (_, zero), (_, one) = outcomes(_failing_hook, str(tmp_path / "never.ckpt"), world_size=2, ends_within_s=0.2)
    assert zero is None, zero
    assert one is not None
    assert "all was as it should be" in one, one
    assert not (tmp_path / "never.ckpt").exists()
