"""Compressed DDP: what one rank asks for all do at the same batch; epochs that differ are refused, not waited for."""

import functools
import json
import os
import signal
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.connectors.signal_connector import _SignalConnector
from support.processes import launch
from support.training import FEATURES, Regression, loader, sample, trainer, weights
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from lightning_comm import Cast, CompressedDDPStrategy, Int8

EPOCHS = 2
STEPS = 7  # of an epoch: validated and saved in it, and neither at its end


class Model(Regression):
    """Trains on data given by the step, since Lightning begins a loader again after a resume."""

    def __init__(self):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(FEATURES, 7), nn.Tanh(), nn.Linear(7, 1))
        super().__init__(net, lambda parameters: torch.optim.AdamW(parameters, 0.01))

    def loss(self, batch):
        x, y = sample(self.global_rank, self.global_step, torch.float32)
        return nn.functional.mse_loss(self.net(x), y)


class Once(Callback):
    """Does something in one hook, at or after one step, on one rank or all."""

    def __init__(self, hook, step, action, who, rank):
        self.step, self.action, self.left = step, action, int(who in ("all", rank))
        setattr(self, hook, self._act)

    def _act(self, runner, *args):
        if self.left and runner.global_step >= self.step and not runner.sanity_checking:
            self.left = 0
            self.action(runner)


def stop(runner):
    runner.should_stop = True


def send(signum, times=1):
    return lambda runner: [os.kill(os.getpid(), signum) for _ in range(times)]


terminate = send(signal.SIGTERM)


def fit(rank, world_size, callbacks=(), *, model=None, data=None, compression=None, path=None, **kwargs):
    strategy = CompressedDDPStrategy(compression or Int8(), timeout=timedelta(seconds=60))
    settings = {"limit_val_batches": 2, "max_epochs": EPOCHS, "num_sanity_val_steps": 0, **kwargs}
    runner = trainer(strategy, world_size, callbacks=list(callbacks), **settings)
    model = model or Model()
    try:
        data = loader(STEPS, rank, dtype=torch.float32) if data is None else data
        runner.fit(model, data, loader(2, rank), ckpt_path=path)
        outcome = "ended"
    except BaseException as error:  # that of a signal too
        outcome = f"{type(error).__name__}: {error}"
    return runner, strategy, weights(model), outcome


# hook, first step, action, rank, step at which all ranks end, whether that is by SIGTERM
ENDS = {
    "SIGTERM to rank 0": ("on_train_batch_end", 5, terminate, 0, 5, True),
    "SIGTERM to rank 1, twice": ("on_train_batch_end", 5, send(signal.SIGTERM, 2), 1, 5, True),
    "SIGTERM to all": ("on_train_batch_end", 5, terminate, "all", 5, True),
    "SIGTERM before the first batch": ("on_train_start", 0, terminate, 1, 0, True),
    "SIGTERM within a forward": ("on_before_backward", 5, terminate, 1, 6, True),
    "SIGTERM in a validation": ("on_validation_batch_start", 1, terminate, 0, 4, True),
    "SIGTERM while a checkpoint is written": ("on_save_checkpoint", 1, terminate, 1, 5, True),
    "SIGTERM in the last batch of an epoch": ("on_train_batch_end", STEPS, terminate, 1, STEPS, True),
    "SIGTERM at the end of an epoch": ("on_train_epoch_end", 1, terminate, 0, STEPS, True),
    "SIGTERM after the last batch": ("on_train_end", 1, terminate, 1, EPOCHS * STEPS, False),
    "should_stop on one rank": ("on_train_batch_end", 5, stop, 1, 5, False),
    "should_stop after a validation": ("on_validation_end", 1, stop, 0, 4, False),
    "should_stop at the end of an epoch": ("on_train_epoch_end", 1, stop, 1, STEPS, False),
    "should_stop at the start of an epoch": ("on_train_epoch_start", STEPS, stop, 0, STEPS, False),
}


# one rank, and these hooks, are in other cases
ENDS_ALSO = {"SIGTERM to rank 0", "should_stop after a validation", "should_stop at the end of an epoch"}


def asked_for(request, names, also):
    return [name for name in names if name not in also or request.config.getoption("exhaustive")]


def each(names, also):
    return [pytest.param(name, marks=[pytest.mark.exhaustive] if name in also else []) for name in names]


def _ends(rank, folder, names):
    answers = {}
    for name in names:
        hook, step, action, who, _, _ = ENDS[name]
        within = f"{folder}/{name}"
        saves = ModelCheckpoint(within, filename="{step}", every_n_train_steps=5)
        runner, _, _, outcome = fit(
            rank, 2, [Once(hook, step, action, who, rank), saves], enable_checkpointing=True, val_check_interval=4
        )
        dist.barrier()  # the process group is of use after every one of these ends
        answers[name] = runner.global_step, outcome, sorted(os.listdir(within)) if os.path.isdir(within) else []
    return answers


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(tmp_path_factory.mktemp("ends"))


@pytest.fixture(scope="module")
def ends(request, folder):
    return launch(_ends, folder, asked_for(request, ENDS, ENDS_ALSO), world_size=2)


@pytest.mark.parametrize("name", each(ENDS, ENDS_ALSO))
def test_what_one_rank_is_asked_for_ends_all_ranks_at_one_step_and_sigterm_saves(ends, name):
    *_, step, terminated = ENDS[name]
    for answers in ends:
        steps, outcome, files = answers[name]
        assert steps == step
        assert outcome.startswith("SIGTERMException" if terminated else "ended")
        saved = [f"last-terminated-step={step}.ckpt", f"last-terminated-step={step}.ckpt.ranks"]
        assert [file for file in files if "terminated" in file] == (saved if terminated else [])


RESUMED = [name for name in ENDS if "before" in name or "forward" in name or "validation" in name or "epoch" in name]
RESUMED = [name for name in RESUMED if ENDS[name][-1]]
CHOSEN = ["SIGTERM within a forward", "SIGTERM in a validation", "SIGTERM at the end of an epoch"]


def _resumed(rank, folder, names):
    _, _, whole, _ = fit(rank, 2)
    ends = {}
    for name in names:
        path = f"{folder}/{name}/last-terminated-step={ENDS[name][-2]}.ckpt"
        runner, _, final, outcome = fit(rank, 2, path=path, val_check_interval=4)
        same = all((a == b).all() for a, b in zip(final, whole, strict=True))
        ends[name] = outcome, runner.global_step, runner.current_epoch, same
    return ends


@pytest.mark.parametrize(
    "names", [pytest.param(CHOSEN, id="chosen"), pytest.param(RESUMED, id="all", marks=pytest.mark.exhaustive)]
)
def test_a_run_that_sigterm_ended_goes_on_as_if_it_had_not(ends, folder, names):
    for went_on in launch(_resumed, folder, names, world_size=2):
        assert list(went_on) == names
        assert {name: end for name, end in went_on.items() if end != ("ended", EPOCHS * STEPS, EPOCHS, True)} == {}


def _by_the_clock(rank, folder):
    runner, *_ = fit(rank, 2, max_time=timedelta(seconds=0.1 if rank else 3600), max_epochs=-1, limit_val_batches=0)
    saves = ModelCheckpoint(folder, filename="{step}", train_time_interval=timedelta(seconds=0), save_top_k=-1)
    saves.on_train_batch_end = saves.on_train_batch_end if rank else lambda *args, **kwargs: None
    if not rank:  # its clock never says that it is time
        del saves.on_train_batch_end
        saves._train_time_interval = timedelta(seconds=3600)
    fit(rank, 2, [saves], enable_checkpointing=True, max_epochs=1, limit_val_batches=0)
    calls = []
    original = _SignalConnector._slurm_sigusr_handler_fn
    _SignalConnector._slurm_sigusr_handler_fn = lambda self, signum, frame: calls.append(self.trainer.global_step)
    try:

        def announce(runner):
            runner._signal_connector._slurm_sigusr_handler_fn(signal.SIGUSR1, None)

        fit(rank, 2, [Once("on_before_backward", 3, announce, 1, rank)], max_epochs=1)
    finally:
        _SignalConnector._slurm_sigusr_handler_fn = original
    return runner.global_step, sorted(os.listdir(folder)), calls


def test_time_limits_saves_by_the_clock_and_slurms_signal_are_those_of_all_ranks(tmp_path):
    one, other = launch(_by_the_clock, str(tmp_path), world_size=2)
    assert one[0] == other[0] > 0
    saved = [name for name in one[1] if name.endswith(".ckpt")]
    assert len(saved) == STEPS // 2  # asked for at the end of one batch, done at the end of the next
    assert one[2] == other[2] == [4]


class Stream(IterableDataset):
    """Samples without an end that could be known before."""

    def __init__(self, batches):
        self.batches = batches

    def __iter__(self):
        return (sample(0, index, torch.float32) for index in range(4 * self.batches))


class Claiming(Stream):
    """Says that it is longer than it is."""

    def __len__(self):
        return 4 * 20


class Sampler(torch.utils.data.Sampler):
    def __init__(self, batches):
        self.batches = batches

    def __iter__(self):
        return iter(range(4 * self.batches))

    def __len__(self):
        return 4 * 20


class Skipping(Model):
    def __init__(self, at):
        super().__init__()
        self.at = at

    def on_train_batch_start(self, batch, batch_idx):
        return -1 if batch_idx == self.at else None


def _stream(batches, kind=Stream):
    return {"data": DataLoader(kind(batches), batch_size=4)}


def _sampled(batches):
    return {"data": DataLoader(loader(20, 0, dtype=torch.float32).dataset, batch_size=4, sampler=Sampler(batches))}


# what each rank trains on, given a number of batches; how the Trainer is set
LENGTHS = {
    "a stream": (_stream, {}),
    "a stream, validated within": (_stream, {"val_check_interval": 5}),
    "a stream, accumulated": (_stream, {"accumulate_grad_batches": 4}),
    "a stream, limited": (_stream, {"limit_train_batches": 9}),
    "a stream that is shorter than it says": (functools.partial(_stream, kind=Claiming), {}),
    "a sampler that is shorter than it says": (_sampled, {}),
    "batches that a hook skips": (lambda at: {"model": Skipping(at)}, {}),
    "known lengths": (lambda batches: {"data": loader(batches, 0, dtype=torch.float32)}, {}),
}


LENGTHS_ALSO = {"a stream", "a stream, limited", "a sampler that is shorter than it says"}  # whose parts others have


def _unequal(rank, names):
    answers = {}
    for name in names:
        make, kwargs = LENGTHS[name]
        _, _, _, unequal = fit(rank, 3, **make((8, 5, 8)[rank]), **kwargs)
        runner, strategy, _, equal = fit(rank, 3, **make(5), **kwargs)
        dist.barrier()
        answers[name] = unequal, equal, runner.global_step, strategy.ledger.messages("control")
    stopped = fit(rank, 3, [Once("on_train_batch_end", 7, stop, 2, rank)], **_stream(5))[0]
    limited = fit(rank, 3, max_steps=7, **_stream(5))[0]
    return answers, stopped.global_step, limited.global_step


@pytest.fixture(scope="module")
def unequal(request):
    return launch(_unequal, asked_for(request, LENGTHS, LENGTHS_ALSO), world_size=3)


@pytest.mark.parametrize("name", each(LENGTHS, LENGTHS_ALSO))
def test_an_epoch_that_is_shorter_on_one_of_three_ranks_is_refused_by_all_alike(unequal, name):
    for answers, _, _ in unequal:
        said = answers[name][0]
        if name == "known lengths":
            parts = ("ValueError", "CompressedDDPStrategy", "[8, 5, 8] by rank", "limit_train_batches=5")
        else:
            parts = ("RuntimeError", "CompressedDDPStrategy", "epoch 0 is over on ranks [1]", "limit_train_batches=")
        assert [part for part in parts if part not in said] == []


@pytest.mark.parametrize("name", each(LENGTHS, LENGTHS_ALSO))
def test_epochs_of_equal_length_are_trained_to_their_end_with_one_message_a_batch(unequal, name):
    confirmed = name in (
        "a stream, limited",
        "a stream that is shorter than it says",
        "a sampler that is shorter than it says",
        "batches that a hook skips",
    )
    accumulated = name == "a stream, accumulated"
    within = name == "a stream, validated within"
    for answers, _, _ in unequal:
        _, equal, steps, messages = answers[name]
        assert equal == "ended"
        assert steps == EPOCHS * (2 if accumulated else 5)
        epoch = 1 + 5 + 1  # its start, its batches, its end
        epoch += (5 + 1) * confirmed + 5 * accumulated  # each before its forward; that the rank has left unseen
        epoch += 1 * (not confirmed or within)  # after its validation, where it has one
        assert messages == 2 + 1 + EPOCHS * epoch, name


def test_stops_and_limits_end_streams_at_one_step(unequal):
    assert [(stopped, limited) for _, stopped, limited in unequal] == [(7, 7)] * 3


def _counted(rank):
    _, strategy, _, _ = fit(rank, 2, max_epochs=1, limit_val_batches=0, compression=Cast("bf16"))
    ledger = strategy.ledger
    return ledger.payload_bytes("control"), ledger.messages("control"), ledger.purposes


def test_a_batch_costs_five_bytes_beside_its_gradients():
    text = len(json.dumps({"batches": STEPS, "confirms": False}))
    for payload_bytes, messages, purposes in launch(_counted, world_size=2):
        assert payload_bytes == 8 + text + 5 * (2 + STEPS + 1)
        assert messages == 2 + 2 + STEPS + 1
        assert sorted(purposes) == ["control", "gradients"]


def _alone(rank):
    ends = [fit(rank, 1, [Once("on_train_batch_end", 5, stop, 0, rank)])[0].global_step]
    runner = Trainer(strategy=CompressedDDPStrategy("bf16"), devices=1, accelerator="cpu", barebones=True, max_epochs=2)
    runner.fit(Model(), loader(STEPS, rank, dtype=torch.float32))
    return [*ends, runner.global_step], fit(rank, 1)[1].ledger.messages("control")


def test_a_single_process_stops_as_well_and_sends_nothing():
    assert launch(_alone, world_size=1)[0] == ([5, 2 * STEPS], 2)  # what it gathers from itself as training starts
