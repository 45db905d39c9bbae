"""A run stopped and resumed at any step goes on as the run that was never stopped, bit for bit."""

import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from support.processes import launch
from support.training import Regression, Samples, loader, local_update, trainer, weights
from torch import nn

from lightning_comm import Averaging, FixedPeriod, MagnitudePruning, PruningSchedule, QuadraticPeriod, SparseMask, TopK
from lightning_comm.data.resumable import ResumableLoader

STEPS_PER_EPOCH, EPOCHS = 7, 2
MASK = SparseMask(MagnitudePruning(0.5))
LATER_MASK = SparseMask(MagnitudePruning(0.5), schedule=PruningSchedule(2, 10, 4))
BUCKET_MIB = 3e-4  # two for the model, and each bucket is a message of each average
VALIDATED = {"limit_val_batches": 1, "val_check_interval": 4}  # in mid-round, and while an average is in flight


def noisy_network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Dropout(0.3), nn.Linear(7, 1)).double()


class Noisy(Regression):
    """Draws from every generator in each step, so that a random state that is not restored shows."""

    def __init__(self, schedule=lambda step: 1.0):
        super().__init__(noisy_network(), lambda p: torch.optim.AdamW(p, lr=0.02), schedule)

    def training_step(self, batch, batch_idx):
        noise = 0.01 * (random.random() + float(np.random.rand()))
        return super().training_step(batch, batch_idx) * (1 + noise)


class Trace(Callback):
    """Weights, buffers and momenta of this rank after every step."""

    def __init__(self):
        self.states = {}

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.fit_loop.epoch_loop._should_accumulate():
            return
        state = [tensor.detach().clone() for tensor in pl_module.state_dict().values()]
        for moments in trainer.optimizers[0].state.values():
            state += [value.detach().clone() for value in moments.values()]
        self.states[trainer.global_step] = state


def data(rank: int, workers: int = 0) -> ResumableLoader:
    return ResumableLoader(Samples(STEPS_PER_EPOCH * 4, rank), 4, seed=3, num_replicas=1, rank=0, num_workers=workers)


class SavesAt(ModelCheckpoint):
    """Saves at the given steps alone."""

    def __init__(self, folder, steps, name=""):
        super().__init__(folder, filename=name + "{step}", every_n_train_steps=1, save_top_k=-1)
        self.steps = steps

    def on_train_batch_end(self, trainer, *args):
        if trainer.global_step in self.steps:
            super().on_train_batch_end(trainer, *args)


def seed_everything(seed: int) -> None:
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)


def fit(rank, world_size, period, *, ckpt_path=None, seed=0, schedule=lambda step: 1.0, callbacks=(), workers=0, **kw):
    seed_everything(100 * seed + rank)
    module, trace = Noisy(schedule), Trace()
    settings = {key: kw.pop(key) for key in ("gradient_steps", "optimizer_state", "buffers", "averaging") if key in kw}
    strategy = local_update(period, **settings)
    runner = trainer(
        strategy,
        world_size,
        callbacks=[trace, *callbacks],
        enable_checkpointing=bool(callbacks),
        **{"max_epochs": EPOCHS, **kw},
    )
    seed_everything(100 * seed + rank)
    runner.fit(module, data(rank, workers), loader(2, rank), ckpt_path=ckpt_path)
    return trace.states, module, runner, strategy


def assert_equal(states, expected, after):
    assert sorted(states) == sorted(step for step in expected if step > after)
    for step, state in states.items():
        for k, (ours, theirs) in enumerate(zip(state, expected[step], strict=True)):
            assert torch.equal(ours, theirs), f"tensor {k} differs at step {step}, resumed after {after}"


def _resume_everywhere(rank, world_size, folder, period, schedule, kw, stops):
    """Resume a run at the given steps, or else at each place; return where its rounds have ended.

    The first time, nothing is validated or saved, which must not change the run.
    """
    save, validated = SavesAt(folder, stops or range(100)), {**kw, **VALIDATED}
    whole, *_, strategy = fit(rank, world_size, period, schedule=schedule, callbacks=[save], **validated)
    ends = [done.step for done in strategy.history]
    for number, step in enumerate(stops or each_place(ends, len(whole), kw.get("gradient_steps", 0))):
        path, settings = Path(folder) / f"step={step}.ckpt", validated if number else kw
        resumed, *_, again = fit(rank, world_size, period, ckpt_path=path, seed=9, schedule=schedule, **settings)
        assert_equal(resumed, whole, after=step)
        synchronised = [done.step for done in again.history]
        assert ends[len(ends) - len(synchronised) :] == synchronised
        in_flight = kw.get("averaging", Averaging()).overlap_steps > 0  # a round that had ended may land again
        assert {end for end in ends if end > step} <= set(synchronised)
        assert in_flight or all(end > step for end in synchronised)
        assert again.ledger.payload_bytes("parameters") == strategy.ledger.payload_bytes("parameters")
    return ends


def each_place(ends, steps, gradient_steps):
    """Where a run is stopped: at each place within a round, also while an average of the one before is in flight.

    And at the first step, at the end of a gradient phase, at that of the first epoch, and in front of the last step.
    """
    places = {1, gradient_steps, steps // EPOCHS, steps - 1, *range(ends[0], ends[1] + 1)}
    return sorted(places & set(range(1, steps)))


def falling(step):
    return 0.85**step


SETTINGS = {
    "fixed": (FixedPeriod(4), {}),
    "qsr": (QuadraticPeriod(h_base=2), {}),
    "optimizer-averaged": (FixedPeriod(3), {"optimizer_state": "average", "buffers": "keep"}),
    "gradient-phase": (FixedPeriod(3), {"gradient_steps": 5}),
    "accumulation": (FixedPeriod(2), {"accumulate_grad_batches": 2}),
    "int8": (FixedPeriod(4), {"averaging": Averaging(BUCKET_MIB, "int8")}),
    "topk-optimizer-averaged": (
        FixedPeriod(3),
        {"averaging": Averaging(BUCKET_MIB, TopK(0.1)), "optimizer_state": "average", "buffers": "keep"},
    ),
    "powersgd-gradient-phase": (
        FixedPeriod(3),
        {"averaging": Averaging(compression="powersgd"), "gradient_steps": 3},
    ),
    "overlap": (FixedPeriod(4), {"averaging": Averaging(BUCKET_MIB, overlap_steps=2)}),
    "int8-overlap": (FixedPeriod(5), {"averaging": Averaging(BUCKET_MIB, "int8", overlap_steps=4)}),
    "qsr-overlap": (
        QuadraticPeriod(h_base=2),
        {"averaging": Averaging(BUCKET_MIB, "bf16", overlap_steps=3), "gradient_steps": 2},
    ),
    "mask": (FixedPeriod(4), {"averaging": Averaging(BUCKET_MIB, MASK)}),
    "mask-int8-overlap": (FixedPeriod(3), {"averaging": Averaging(BUCKET_MIB, [MASK, "int8"], overlap_steps=2)}),
    "gradual-mask-overlap": (FixedPeriod(3), {"averaging": Averaging(BUCKET_MIB, LATER_MASK, overlap_steps=2)}),
    "gradual-mask-int8-overlap": (
        FixedPeriod(3),
        {"averaging": Averaging(BUCKET_MIB, [LATER_MASK, "int8"], overlap_steps=2)},
    ),
}
# Each value of each setting; what the settings left out set is set in these as well. The stops are the first step, the
# end of a gradient phase or of the first epoch, which is the seventh step, and in a round where its average departs,
# while that is in flight, and in front of the next.
CASES = [
    ("int8-overlap", 2, (5, 7, 9)),
    ("topk-optimizer-averaged", 2, (1, 7)),
    ("powersgd-gradient-phase", 2, (3, 7)),
    ("qsr-overlap", 2, (5, 7)),
    ("gradual-mask-int8-overlap", 2, (4, 7)),
    ("accumulation", 3, (3,)),
]
MORE_CASES = [*((name, 2, ()) for name in SETTINGS), ("fixed", 3, ()), ("accumulation", 3, (3, 7))]


@pytest.mark.parametrize(
    ("name", "world_size", "stops"),
    [*CASES, *(pytest.param(*case, marks=pytest.mark.exhaustive) for case in MORE_CASES)],
)
def test_a_run_resumed_at_any_step_repeats_bit_for_bit(tmp_path, name, world_size, stops):
    period, kw = SETTINGS[name]
    answers = launch(
        _resume_everywhere,
        *(world_size, str(tmp_path), period, falling, kw, stops),
        world_size=world_size,
        timeout_s=150,
    )
    for ends in answers:
        assert len(ends) >= 2


def _resume_twice(rank, world_size, folder, kw, resumes):
    def checkpoints(name, places):
        """At those of the places that are steps, and at the ends of all epochs."""
        batch = SavesAt(folder, [step_of(place) for place in places if place.startswith("step")], name + "-")
        epoch = ModelCheckpoint(folder, filename=name + "-epoch-{step}", save_top_k=-1, save_on_train_epoch_end=True)
        return [batch, epoch]

    def path_of(name, place):
        return Path(folder) / f"{name}-{place}.ckpt"

    def step_of(place):
        return int(place.split("=")[-1])

    whole, *_ = fit(rank, world_size, FixedPeriod(4), callbacks=checkpoints("first", resumes), **kw)
    for first, places in resumes.items():
        path, name = path_of("first", first), f"from-{first}"
        saves = checkpoints(name, [f"step={step_of(first)}", *places])
        once, *_ = fit(rank, world_size, FixedPeriod(4), ckpt_path=path, seed=9, callbacks=saves, **kw)
        assert_equal(once, whole, after=step_of(first))
        assert not path_of(name, f"step={step_of(first)}").exists()  # a run saves no step that it starts at
        for second in places:
            path = path_of(name, second)
            twice, *_ = fit(rank, world_size, FixedPeriod(4), ckpt_path=path, seed=8, **kw)
            assert_equal(twice, whole, after=step_of(second))
    return len(whole)


OF_EPOCHS, OF_STEPS = {"max_epochs": 3}, {"max_epochs": -1, "max_steps": 10}
EACH_RESUME = {"step=6": ["step=7"], "step=7": ["step=9"], "epoch-step=7": ["epoch-step=14", "step=12"]}


@pytest.mark.parametrize(
    ("kw", "steps", "resumes"),
    [
        pytest.param(OF_EPOCHS, 21, {"epoch-step=7": ["epoch-step=14"]}, id="epochs"),
        pytest.param(OF_STEPS, 10, {"step=6": ["step=7"]}, id="steps"),
        pytest.param(OF_EPOCHS, 21, EACH_RESUME, id="epochs-each", marks=pytest.mark.exhaustive),
        pytest.param({**OF_STEPS, "max_steps": 16}, 16, EACH_RESUME, id="steps-each", marks=pytest.mark.exhaustive),
    ],
)
def test_a_resumed_run_can_be_resumed_again_also_at_the_ends_of_epochs(tmp_path, kw, steps, resumes):
    assert launch(_resume_twice, 2, str(tmp_path), kw, resumes, world_size=2) == [steps, steps]


def _resume_with_workers(rank, world_size, folder, steps):
    whole, *_ = fit(rank, world_size, FixedPeriod(4), callbacks=[SavesAt(folder, steps)], workers=2)
    for step in steps:
        resumed, *_ = fit(
            rank, world_size, FixedPeriod(4), ckpt_path=Path(folder) / f"step={step}.ckpt", seed=9, workers=2
        )
        assert_equal(resumed, whole, after=step)


@pytest.mark.parametrize("steps", [(10,), pytest.param((5, 10), marks=pytest.mark.exhaustive)])
def test_a_run_with_loader_workers_resumes_on_the_right_sample(tmp_path, steps):
    launch(_resume_with_workers, 2, str(tmp_path), steps, world_size=2)


def _inspect_files(rank, world_size, folder):
    class Average(Callback):
        """After the hook callback and before the checkpoint: the mean over ranks, by hand."""

        def on_train_batch_end(self, runner, pl_module, outputs, batch, batch_idx):
            if runner.global_step == 6:
                gathered = [None] * world_size
                torch.distributed.all_gather_object(gathered, [p.detach().clone() for p in pl_module.parameters()])
                self.mean = [torch.stack(each).sum(0) / world_size for each in zip(*gathered, strict=True)]
                self.local = gathered[rank]

    average = Average()
    save = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=6, save_top_k=-1)
    only = ModelCheckpoint(folder, filename="only-{step}", every_n_train_steps=5, save_top_k=-1, save_weights_only=True)
    fit(rank, world_size, FixedPeriod(4), callbacks=[average, save, only])
    torch.distributed.barrier()
    return [mean.numpy() for mean in average.mean], [local.numpy() for local in average.local]


def _names(folder, step):
    """The files in a folder, with the id of the save at a step as ``ID``."""
    token = torch.load(folder / f"step={step}.ckpt", weights_only=True)["lightning_comm.save"]["id"]
    return {str(path.relative_to(folder)).replace(token, "ID") for path in folder.rglob("*") if not path.is_dir()}


def _file_of(folder, step, rank):
    (path,) = folder.glob(f"step={step}.ckpt.ranks/*/rank{rank}.pt")
    return path


@pytest.fixture(scope="module")
def inspected(tmp_path_factory):
    """A folder with the checkpoints of one run, which nobody changes, and what its ranks held at step 6."""
    folder = tmp_path_factory.mktemp("inspected")
    return folder, launch(_inspect_files, 2, str(folder), world_size=2)


@pytest.fixture
def checkpoints(inspected, tmp_path):
    """The same checkpoints in a folder of the test's own."""
    return shutil.copytree(inspected[0], tmp_path / "copied")


def test_the_file_holds_averaged_weights_and_each_rank_file_its_own(inspected):
    tmp_path, answers = inspected
    names = {name for name in _names(tmp_path, 6) if "step=12.ckpt.ranks" not in name}
    expected = {f"step={step}.ckpt" for step in (6, 12)} | {f"only-step={step}.ckpt" for step in (5, 10)}
    assert names == expected | {f"step=6.ckpt.ranks/ID/rank{rank}.pt" for rank in range(2)}
    assert {_file_of(tmp_path, 12, rank).parent.name for rank in range(2)} != {_file_of(tmp_path, 6, 0).parent.name}
    main = torch.load(tmp_path / "step=6.ckpt", weights_only=True)
    parameters = [name for name, _ in Noisy().named_parameters()]
    for rank, (mean, local) in enumerate(answers):
        own = torch.load(_file_of(tmp_path, 6, rank), weights_only=True)
        for name, averaged, mine in zip(
            parameters, map(torch.from_numpy, mean), map(torch.from_numpy, local), strict=True
        ):
            torch.testing.assert_close(main["state_dict"][name], averaged, rtol=0, atol=1e-16)
            assert torch.equal(own["weights"][f"parameters:{name}"], mine)
            assert not torch.equal(mine, averaged)
    assert (
        torch.load(tmp_path / "only-step=5.ckpt", weights_only=True)["state_dict"].keys() == main["state_dict"].keys()
    )


def _load_plainly(rank, world_size, folder):
    module = Noisy()
    runner = trainer("ddp", world_size, max_epochs=EPOCHS)
    runner.fit(module, data(rank), ckpt_path=Path(folder) / "step=6.ckpt")
    return runner.global_step


def test_plain_ddp_goes_on_from_the_file(inspected):
    assert launch(_load_plainly, 2, str(inspected[0]), world_size=2) == [14, 14]


def _resume_and_catch(rank, world_size, path):
    import warnings

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        _states, module, runner, strategy = fit(rank, world_size, FixedPeriod(4), ckpt_path=path)
    torch.load(path, weights_only=True)
    return (
        runner.global_step,
        [done.step for done in strategy.history],
        weights(module),
        [str(w.message) for w in caught],
    )


def _flipped(content, tensor):
    """A file with one bit of a tensor flipped."""
    place = content.index(tensor.numpy().tobytes())
    return content[:place] + bytes([content[place] ^ 8]) + content[place + 1 :]


@pytest.mark.parametrize(
    ("damage", "world_size", "must_say"),
    [
        ("missing", 2, ["rank1.pt is missing"]),
        ("damaged", 2, ["rank1.pt cannot be read"]),
        ("flipped", 2, ["rank1.pt cannot be read", "does not match its checksum"]),
        ("foreign", 2, ["belongs to another save"]),
        ("none", 3, ["written by 2 ranks, and there are 3 now"]),
        ("plain", 2, ["another strategy wrote it"]),
    ],
)
def test_without_the_rank_files_a_new_round_starts_from_the_averaged_weights(checkpoints, damage, world_size, must_say):
    path = checkpoints / "step=6.ckpt"
    if damage == "missing":
        _file_of(checkpoints, 6, 1).unlink()
    elif damage == "damaged":
        file = _file_of(checkpoints, 6, 1)
        file.write_bytes(file.read_bytes()[:100])
    elif damage == "flipped":
        file = _file_of(checkpoints, 6, 1)
        content, weights = file.read_bytes(), torch.load(file, weights_only=True)["weights"]
        file.write_bytes(_flipped(content, weights["parameters:net.0.weight"]))
    elif damage == "foreign":
        _file_of(checkpoints, 12, 0).replace(_file_of(checkpoints, 6, 0))
    elif damage == "plain":
        content = torch.load(path, weights_only=True)
        del content["lightning_comm.local_update"]
        torch.save(content, path)
    answers = launch(_resume_and_catch, world_size, path, world_size=world_size)
    for steps, ends, final, _ in answers:
        assert steps == 14
        assert ends == [10, 14]  # a new round at step 6, not the rest of the old one
        for mine, first in zip(final, answers[0][2], strict=True):
            np.testing.assert_array_equal(mine, first)
    said = [text for text in answers[0][3] if "cannot bring every rank back" in text]
    assert len(said) == 1
    assert [word for word in [*must_say, "new round", "ckpt_path", "ranks"] if word not in said[0]] == []


def _prune(rank, world_size, folder):
    save = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=3, save_top_k=1, save_last="link")
    _, _, _runner, _ = fit(rank, world_size, FixedPeriod(4), callbacks=[save])
    torch.distributed.barrier()
    resumed, *_ = fit(rank, world_size, FixedPeriod(4), ckpt_path=Path(folder) / "last.ckpt", seed=9)
    return sorted(resumed)


def test_rank_files_go_with_their_checkpoint_and_are_found_through_a_link(tmp_path):
    assert launch(_prune, 2, str(tmp_path), world_size=2) == [[13, 14]] * 2
    expected = {"step=12.ckpt", "last.ckpt", *(f"step=12.ckpt.ranks/ID/rank{rank}.pt" for rank in range(2))}
    assert _names(tmp_path, 12) == expected


def _plain_loader(rank, world_size, folder):
    import warnings

    save = SavesAt(folder, (7, 9))
    seed_everything(rank)
    whole = Trace()
    trainer(
        local_update(FixedPeriod(4)), world_size, max_epochs=EPOCHS, callbacks=[whole, save], enable_checkpointing=True
    ).fit(Noisy(), loader(STEPS_PER_EPOCH, rank))
    said = {}
    for step in (7, 9):
        seed_everything(50 + rank)
        resumed = Trace()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trainer(local_update(FixedPeriod(4)), world_size, max_epochs=EPOCHS, callbacks=[resumed]).fit(
                Noisy(), loader(STEPS_PER_EPOCH, rank), ckpt_path=Path(folder) / f"step={step}.ckpt"
            )
        said[step] = any("dataloader is not resumable" in str(w.message) for w in caught)
        if step == 7:
            assert_equal(resumed.states, whole.states, after=7)
    return said


def test_a_loader_that_cannot_resume_is_exact_at_epoch_ends_and_warned_about_elsewhere(tmp_path):
    assert launch(_plain_loader, 2, str(tmp_path), world_size=2)[0] == {7: False, 9: True}


def _ema(rank, world_size, folder):
    """The moving average of each rank's weights, averaged at synchronisations, is that of the averaged weights."""
    ema = EMAWeightAveraging(decay=0.8)
    save = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=6, save_top_k=-1)
    _, module, *_ = fit(rank, world_size, FixedPeriod(4), callbacks=[ema, save])
    return weights(module), [p.detach().numpy() for p in ema._average_model.module.parameters()]


def test_weight_averages_are_equal_on_all_ranks_in_memory_and_in_the_file(tmp_path):
    one, two = launch(_ema, 2, str(tmp_path), world_size=2)
    for mine, theirs, shadow in zip(one[0], two[0], one[1], strict=True):
        np.testing.assert_array_equal(mine, theirs)
        np.testing.assert_array_equal(mine, shadow)  # the callback copies its average over the weights at the end
    content = torch.load(tmp_path / "step=6.ckpt", weights_only=True)
    averaged = [content["state_dict"][name] for name, _ in Noisy().named_parameters()]
    current = [content["current_model_state"][name] for name, _ in Noisy().named_parameters()]
    assert any(not torch.equal(a, c) for a, c in zip(averaged, current, strict=True))
