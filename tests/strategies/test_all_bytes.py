"""Every message of a run beside what torch's flight recorder and torch.distributed itself saw of it.

What the ledgers do not have is Lightning's, DDP's or the user's own, and stands in the lists below.
"""

import logging
import pickle
import re
import warnings
from collections import Counter
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import StrategyRegistry
from support.flight_recorder import flight_recorder, recording_flights
from support.processes import launch
from support.training import FEATURES, Regression, Samples, Stop, loader, network, sums_of, trainer

import lightning_comm
from lightning_comm import (
    AdaptivePartition,
    Averaging,
    BatchNormReestimation,
    CommProfiler,
    CyclicStrategy,
    FixedPeriod,
    LocalUpdateStrategy,
    PartitionedLoader,
)
from lightning_comm.callbacks.adaptive_partition import files
from lightning_comm.core.ledger import PURPOSES
from lightning_comm.instruments import collectives as watching
from lightning_comm.transport import recording

STEPS, OWN_BYTES = 6, 400
PARAMETERS, FLOAT_BUFFERS = FEATURES * 7 + 7 + 7 + 7 + 7 + 1, 14  # of `network(norm=True)`, in entries of 4 bytes

# What is not ours, as (kind, bytes): how many. The Trainer's: a value that is logged in validation, and of how many it
# is the mean; whether to stop, three times, and whether to go on to the next epoch; each of these reductions meets in a
# barrier first. The size of the name of the run's folder, which is broadcast then.
TRAINERS = Counter({("all_reduce", 4): 1, ("all_reduce", 8): 4, ("barrier", 0): 11, ("broadcast", 8): 1})
A_SAVE = Counter({("barrier", 0): 1})
SIGTERM = Counter({("broadcast", 8): 1})  # whether rank 0 was told to end, before each batch
USERS = Counter({("all_reduce", OWN_BYTES): 1})
DDP_AT_START = Counter(
    {
        ("all_gather", 8): 1,  # how many parameters there are
        ("broadcast", 8 * 16): 1,  # their shapes and strides
        ("broadcast", 4 * (PARAMETERS + FLOAT_BUFFERS)): 1,
        ("broadcast", 8): 1,  # a buffer of whole numbers
        ("broadcast", 4): 1,  # once the first gradients are there: how many buckets, and what is in them
        ("broadcast", 4 * 7): 1,
    }
)
DDP_GRADIENTS = Counter({("all_reduce", 4 * PARAMETERS): 1})
DDP_BUFFERS = Counter({("broadcast", 4 * FLOAT_BUFFERS): 1, ("broadcast", 8): 1})  # before each forward, by type
BUFFERS_AS_NOTED = Counter({("broadcast", 4 * FLOAT_BUFFERS + 8): STEPS // 2})  # a strategy writes down DDP's in one


EXACT = ("local_sgd", "ddp_topk", "pactrain", "ddp_bf16")
RESUMED = (*EXACT, "cyclic")


def times(count, messages):
    return Counter({message: count * number for message, number in messages.items()})


def registered():
    """The names of our strategies, each once, and not for each way of starting processes."""
    suffixes = ("_spawn", "_fork", "_notebook")
    ours = [
        name
        for name in StrategyRegistry.available_strategies()
        if StrategyRegistry[name]["strategy"].__module__.startswith("lightning_comm.")
    ]
    return [name for name in ours if not name.endswith(suffixes)]


class Chatty(Regression):
    """Sends something of its own in each step, and logs over the ranks in validation."""

    def __init__(self):
        super().__init__(network(torch.float32, norm=True), schedule=lambda step: 1 / (1 + step))

    def training_step(self, batch, batch_idx):
        dist.all_reduce(torch.ones(OWN_BYTES // 4))
        return super().training_step(batch[:2], batch_idx)


class Quiet(Chatty):
    """Sends nothing in a step, in which ranks that take turns could not meet."""

    def training_step(self, batch, batch_idx):
        return Regression.training_step(self, batch, batch_idx)


class ChattyWithData(Chatty):
    """The same with a loader that can be made anew."""

    def forward(self, x):
        return self.net(x)

    def train_dataloader(self):
        return loader(STEPS, self.global_rank, dtype=torch.float32)


class Saves(Stop):
    """Saves, goes on, and counts what the strategy has sent under each purpose meanwhile."""

    def __init__(self, path):
        super().__init__(3, path, goes_on=True)
        self.sent = Counter()

    def on_train_batch_end(self, runner, *args):
        ledger = getattr(runner.strategy, "ledger", None)
        before = Counter() if ledger is None else Counter(sums_by_purpose(ledger))
        super().on_train_batch_end(runner, *args)
        if ledger is not None:
            self.sent += Counter(sums_by_purpose(ledger)) - before


def sums_by_purpose(ledger):
    return {each: ledger.messages(each) for each in ledger.purposes}


@contextmanager
def counting_sends():
    """Count the bytes of messages from rank to rank where torch is asked to: it writes down none of these."""
    counted, real = [0], dist.isend

    def isend(tensor, *args, **kwargs):
        counted[0] += tensor.nbytes
        return real(tensor, *args, **kwargs)

    dist.isend = isend
    try:
        yield counted
    finally:
        dist.isend = real


def _observed(run):
    """Run something; return what it has sent by our records, by torch's, and by the bytes between single ranks."""
    seen, before = [], max([entry["number"] for entry in flight_recorder()], default=-1)
    end = recording.observe(seen.append)
    with counting_sends() as sent:
        run()
    end()
    ours = Counter((each.kind, each.payload_bytes) for each in seen if each.kind not in ("send", "receive"))
    by_torch = Counter((each["kind"], each["bytes"]) for each in flight_recorder() if each["number"] > before)
    sent_here = sum(each.payload_bytes for each in seen if each.kind == "send")
    return {
        "ours": ours,
        "by torch": by_torch,
        "sends": (sent[0], sent_here),
        "purposes": {each.purpose for each in seen},
        "tokens": sum(each.payload_bytes for each in seen if each.purpose == "stagger"),
    }


def _fit(strategy, rank, folder, *, module=Chatty, data=None, callbacks=(), resume=None, **settings):
    """Train with a validation, a checkpoint in the middle and the profiler; return what was sent, and by whom."""
    profiler = CommProfiler(f"{folder}/profile", page=False)
    save = Saves(f"{folder}/saved.ckpt")
    runner = trainer(
        strategy,
        2,
        callbacks=[profiler, *callbacks, *([] if resume else [save])],
        default_root_dir=folder,
        limit_val_batches=1,
        val_check_interval=4,
        num_sanity_val_steps=0,
        **settings,
    )
    model = module()
    to_train = data if data is not None else loader(STEPS, rank, dtype=torch.float32)
    to_validate = loader(1, rank, dtype=torch.float32)
    given = () if module is ChattyWithData else (to_train,)

    def run():
        runner.fit(model, *given, val_dataloaders=to_validate, ckpt_path=resume)

    sent = _observed(run)
    figures = profiler.figures
    ledgers = [each.ledger for each in (runner.strategy, *callbacks, profiler) if hasattr(each, "ledger")]
    return sent | {
        "folder": folder,
        "by the save": save.sent,
        "sums": [sums_of(each.ledger) for each in (runner.strategy, *callbacks) if hasattr(each, "ledger")],
        "by the profiler": figures.total_payload_bytes,
        "beside steps": set(figures.beside_wire_bytes),
        "in ledgers": {each for ledger in ledgers for each in ledger.purposes},
        "kept": sum(sum(each.kind not in ("send", "receive") for each in ledger.records) for ledger in ledgers),
    }


@patch.object(files, "partition_page", lambda journal: "not looked at")
def _all(rank, folder):
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    answers = {}
    for name in ["ddp", *registered()]:
        answers[name] = _fit(name, rank, f"{folder}/{name}")
    for name in RESUMED:
        answers[f"{name}, resumed"] = _fit(name, rank, f"{folder}/{name}", resume=f"{folder}/{name}/saved.ckpt")
    answers["stagger"] = _fit(CyclicStrategy(stagger="step"), rank, f"{folder}/stagger", module=Quiet)
    overlap = LocalUpdateStrategy(FixedPeriod(2), averaging=Averaging(overlap_steps=1))
    answers["overlap"] = _fit(overlap, rank, f"{folder}/overlap")
    for end, resume in (("", False), (", resumed", True)):
        partition = AdaptivePartition(window_steps=3, warmup_steps=0, folder=f"{folder}/shares")
        data = PartitionedLoader(Samples(8 * STEPS, 0, torch.float32), global_batch_size=8)
        saved = f"{folder}/partition/saved.ckpt" if resume else None
        kw = {"data": data, "callbacks": [partition], "resume": saved}
        answers["partition" + end] = _fit("ddp", rank, f"{folder}/partition", **kw)
        saved = f"{folder}/again/saved.ckpt" if resume else None
        kw = {"module": ChattyWithData, "callbacks": [BatchNormReestimation(num_batches=4)], "resume": saved}
        answers["again" + end] = _fit("local_sgd", rank, f"{folder}/again", **kw)
    return answers


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    with recording_flights(400):  # more than a run sends
        return launch(_all, str(tmp_path_factory.mktemp("all")), world_size=2)


def of_others(name, folder):
    """What DDP, the Trainer and the user's module send in one of the runs."""
    resumed, name = name.endswith("resumed"), name.partition(",")[0]
    steps = STEPS // 2 if resumed else STEPS
    by_ddp, sends_all = name in ("ddp", "partition") or name.startswith("ddp_") or name == "pactrain", name != "stagger"
    found = TRAINERS + Counter({("broadcast", len(pickle.dumps(folder))): 1}) + times(steps * sends_all, USERS)
    if not resumed:
        found += A_SAVE
    if by_ddp:
        found += DDP_AT_START + times(steps, DDP_BUFFERS)
    if name in ("ddp", "partition"):
        found += times(steps, DDP_GRADIENTS) + times(steps, SIGTERM)
    if name == "post_local_sgd":  # half of whose steps are DDP's
        found += DDP_AT_START + times(STEPS // 2, DDP_BUFFERS)
    return found


def test_all_our_strategies_are_there(answers):
    assert set(registered()) <= set(answers[0])
    assert len(registered()) == 12


def test_what_torch_has_sent_beside_our_records_is_of_others_and_known(answers):
    for rank in answers:
        for name, sent in rank.items():
            expected = sent["ours"] + of_others(name, sent["folder"])
            if name == "post_local_sgd":
                expected -= BUFFERS_AS_NOTED
            assert sent["by torch"] == expected, name


def test_messages_between_two_ranks_are_written_down_with_the_bytes_that_torch_was_given(answers):
    for rank in answers:
        for name, sent in rank.items():
            asked, written = sent["sends"]
            assert asked == written >= 2 * 16 * 8, name  # the clocks are compared at both ends of a run
    assert [rank["stagger"]["tokens"] for rank in answers] == [8 * (STEPS - 1)] * 2  # the first batch is cut


def test_every_record_stands_in_a_ledger_of_the_strategy_or_of_a_callback_under_a_known_purpose(answers):
    for rank in answers:
        for name, sent in rank.items():
            assert sent["kept"] == sent["ours"].total(), name
            assert sent["purposes"] <= sent["in ledgers"] <= set(PURPOSES), name
    seen = set().union(*(sent["purposes"] for sent in answers[0].values()))
    new = {"stops", "stagger", "set_up", "checkpoint_files", "batch_norm_statistics", "instruments", "partition"}
    assert new <= seen


@pytest.mark.parametrize("name", [*EXACT, "partition", "again"])
def test_the_sums_of_a_resumed_run_are_those_of_the_run_that_was_never_stopped(answers, name):
    for rank in answers:
        assert rank[f"{name}, resumed"]["sums"] == rank[name]["sums"]
        assert all(rank[name]["sums"])


def test_a_save_adds_nothing_to_what_steps_send_to_meet(answers):
    for name, sent in answers[0].items():
        assert "control" not in sent["by the save"], name
        saves = name not in ("ddp", "partition") and not name.endswith("resumed")
        assert (sent["by the save"]["checkpoint_files"] > 0) == saves, name


def test_the_profiler_books_nothing_of_ours_as_the_users(answers):
    for rank in answers:
        for name, sent in rank.items():
            steps = 0 if name == "stagger" else STEPS // 2 if name.endswith("resumed") else STEPS
            assert sent["by the profiler"].get("user", 0) == OWN_BYTES * steps, name
            assert "user" not in sent["beside steps"], name
            assert sent["beside steps"] | set(sent["by the profiler"]) <= set(PURPOSES), name
            in_no_step = {"set_up", "start", "evaluation", "checkpoint", "checkpoint_files", "instruments"}
            assert not in_no_step & set(sent["by the profiler"]), name


# ---- the source ------------------------------------------------------------------------------------------------------

PACKAGE = Path(lightning_comm.__file__).parent
SENDING = set(watching.FUNCTIONS) | {"isend", "irecv", "broadcast_object_list", "all_gather_object", "gather_object"}
DIRECT = {
    "transport/recording.py": set(watching.FUNCTIONS) | {"isend", "irecv"},  # from where everything leaves
    "transport/group_ends.py": {"irecv"},  # that nobody answers, so that it times out
    "instruments/probe.py": {
        "all_reduce",
        "all_gather_into_tensor",
        "send",
        "recv",
    },  # timed, and written down behind it
}


def sent_directly(source):
    """The functions of torch.distributed that a file calls to send, or imports by name."""
    called = re.findall(r"\b(?:dist|torch\.distributed|distributed_c10d)\.(\w+)\(", source)
    imported = re.findall(r"\w+", " ".join(re.findall(r"^from torch\.distributed import (.*)$", source, re.MULTILINE)))
    return SENDING & {*called, *imported}


def test_nothing_else_in_the_package_asks_torch_to_send():
    found = {path.relative_to(PACKAGE).as_posix(): sent_directly(path.read_text()) for path in PACKAGE.rglob("*.py")}
    direct = {name: calls for name, calls in found.items() if calls}
    assert direct.keys() == DIRECT.keys()
    assert all(calls <= DIRECT[name] for name, calls in direct.items())
