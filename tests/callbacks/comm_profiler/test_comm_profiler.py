"""The profiler in real runs: bytes against formulas and torch's flight recorder, faults, and what it leaves behind."""

import functools
import json
import logging
import os
import pickle
import resource
import signal
import sys
import time
import warnings
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import Callback
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import DDPStrategy
from support.flight_recorder import flight_recorder, recording_flights
from support.processes import launch
from support.training import Regression, collectives_so_far, loader, local_update, network, trainer
from torch.distributed import distributed_c10d
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torchmetrics import MeanMetric

from lightning_comm import CommProfiler, FixedPeriod, load_profile
from lightning_comm.core.costs import Curve, LinkProfile, Timing
from lightning_comm.reports import svg as svg_figures
from lightning_comm.reports.profile.page import profile_page
from lightning_comm.transport import recording

PARAMETERS = 5 * 7 + 7 + 7 + 7 + 7 + 1  # of `network(norm=True)`, in entries of 8 bytes
BUFFERS = 2 * 7 * 8 + 8
CONTROL = 64
PROBE = LinkProfile(2, "gloo", (Curve("all_reduce", 2, (Timing(2**20, 3, 0.1, 0.09, 0.11),)),))


class Bf16DDP(DDPStrategy):
    """Registers the hook on CPU as well, where Lightning leaves it out."""

    def configure_ddp(self):
        super().configure_ddp()
        self.model.register_comm_hook(None, default_hooks.bf16_compress_hook)


class Chatty(Regression):
    """Logs over the ranks on every step, keeps a metric, and sends something of its own."""

    def __init__(self):
        super().__init__()
        self.metric = MeanMetric().double()

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.log("loss", loss, sync_dist=True)
        self.metric(loss)
        self.metric.compute()
        self.metric.reset()
        dist.all_reduce(torch.ones(100))
        return loss


class Alternating(Regression):
    """Optimizes manually, as in adversarial training: two backwards a batch, for one optimizer or for two in turn."""

    def __init__(self, optimizers):
        super().__init__(network(norm=True))
        self.automatic_optimization = False
        self.optimizers_made = optimizers

    def training_step(self, batch, batch_idx):
        made = self.optimizers()
        for optimizer in made if isinstance(made, list) else [None, made]:
            self.manual_backward(self.loss(batch))
            if optimizer is not None:
                optimizer.step()
                optimizer.zero_grad()

    def configure_optimizers(self):
        layers = (self.net[0], self.net[3]) if self.optimizers_made == 2 else (self.net,)
        return [torch.optim.SGD(layer.parameters(), 0.05) for layer in layers]


class Slow(Regression):
    """Computes longer on rank 1."""

    def training_step(self, batch, batch_idx):
        time.sleep(0.03 if self.global_rank == 1 else 0.01)
        return super().training_step(batch, batch_idx)


class Fails(Regression):
    """Raises in the middle, on all ranks."""

    def training_step(self, batch, batch_idx):
        if batch_idx == 5:
            raise KeyError("training's own")
        return super().training_step(batch, batch_idx)


class Sequence(Callback):
    """Notes how many collectives this rank has issued at the end of each batch, and what the flight recorder held."""

    def __init__(self):
        self.counts = []

    def on_train_batch_end(self, *args):
        self.counts.append(collectives_so_far())


class Recorded(Callback):
    """What torch's flight recorder writes down while batches are trained on."""

    def on_train_start(self, *args):
        self.before = len(flight_recorder())

    def on_train_epoch_end(self, *args):
        self.entries = flight_recorder()[self.before :]


def fit(strategy, rank, folder, module=None, steps=12, profiler=None, callbacks=(), **kwargs):
    profiler = profiler or CommProfiler(str(folder), page=False)
    runner = trainer(strategy, 2, callbacks=[profiler, *callbacks], **kwargs)
    module = module or Regression(network(norm=True))
    runner.fit(module, loader(steps, rank), loader(2, rank))
    return profiler


def outcome(profiler):
    return {
        "figures": profiler.figures,
        "steps": profiler.steps,
        "folder": str(profiler.run_folder),
        "untouched": untouched(),
    }


def untouched() -> bool:
    """Whether the functions of torch.distributed are its own, and nobody observes our messages."""
    return dist.all_reduce.__code__.co_filename.startswith(torch.__path__[0]) and (
        distributed_c10d.all_reduce is dist.all_reduce and not recording._observers
    )


def _scenarios(rank, root):
    root = Path(root)
    found = {}
    recorded = Recorded()
    found["ddp"] = outcome(fit(DDPStrategy(), rank, root / "ddp", callbacks=[recorded]))
    found["ddp"]["oracle"] = recorded.entries
    logger = CSVLogger(root / "logs")
    found["accumulated"] = outcome(
        fit(
            DDPStrategy(),
            rank,
            root / "accumulated",
            accumulate_grad_batches=3,
            logger=logger,
            log_every_n_steps=2,
            limit_val_batches=2,
            val_check_interval=6,
        )
    )
    found["bf16"] = outcome(fit(Bf16DDP(), rank, root / "bf16"))
    for optimizers in (1, 2):
        recorded, name = Recorded(), f"alternating {optimizers}"
        options = {"logger": CSVLogger(root / name), "log_every_n_steps": 4}
        module = Alternating(optimizers)
        found[name] = outcome(
            fit(DDPStrategy(), rank, root / name, module=module, steps=6, callbacks=[recorded], **options)
        )
        found[name]["oracle"] = recorded.entries
    local = local_update(FixedPeriod(4))
    found["alternating local"] = outcome(fit(local, rank, root / "alternating local", module=Alternating(2), steps=8))
    sequence = Sequence()
    found["local"] = outcome(fit(local_update(FixedPeriod(4)), rank, root / "local", callbacks=[sequence]))
    found["local"]["counts"] = sequence.counts
    plain = Sequence()
    trainer(local_update(FixedPeriod(4)), 2, callbacks=[plain]).fit(Regression(network(norm=True)), loader(12, rank))
    found["local"]["plain"] = plain.counts
    found["post_local"] = outcome(fit(local_update(FixedPeriod(4), gradient_steps=4), rank, root / "post"))
    found["chatty"] = outcome(fit(DDPStrategy(), rank, root / "chatty", module=Chatty()))
    found["slow_ddp"] = outcome(fit(DDPStrategy(), rank, root / "slow", module=Slow()))
    found["slow_local"] = outcome(fit(local_update(FixedPeriod(4)), rank, root / "slow", module=Slow()))
    found |= _faults(rank, root)
    return found


def _faults(rank, root):
    found = {}
    profiler = CommProfiler(str(root / "exception"), page=False)
    try:
        fit(DDPStrategy(), rank, None, profiler=profiler, module=Fails())
    except KeyError as error:
        found["exception"] = {**outcome(profiler), "error": str(error)}
    # the same callback again: a run of its own
    fit(DDPStrategy(), rank, None, profiler=profiler)
    found["again"] = outcome(profiler)

    profiler = CommProfiler(str(root / "broken"), page=False)
    if rank == 1:
        profiler.on_after_backward = functools.partial(_break, profiler, profiler.on_after_backward)
    found["broken"] = outcome(fit(DDPStrategy(), rank, None, profiler=profiler))

    folder = root / "unwritable"
    if rank == 1:
        (root / "file").write_text("in the way")
        folder = root / "file"
    found["unwritable"] = outcome(fit(local_update(FixedPeriod(4)), rank, folder))
    second, said = CommProfiler(str(root / "second"), page=False), Ear()
    with said:
        first = fit(DDPStrategy(), rank, root / "first", callbacks=[second], module=Chatty())
    found["twice"] = outcome(first)
    found["twice"] |= {"second": (second.figures, second.steps, (root / "second").exists()), "said": said.heard}
    found["probes"] = [
        _with_probe(rank, root / "probed", [str(root / "probe.json"), str(root / "missing.json")][::order])
        for order in (1, -1)
    ]
    return found


def _with_probe(rank, folder, paths):
    """Measure with the path that is this rank's; the first one is a probe's file."""
    if rank == 0:
        PROBE.save(folder.with_name("probe.json"))
    profiler = CommProfiler(str(folder), probe=paths[rank], page=False)
    try:
        fit(DDPStrategy(), rank, None, profiler=profiler, steps=2)
    except Exception as error:
        return type(error).__name__, str(error)
    return None, profiler.figures.link_bytes_per_s


class Ear:
    """Hears what is said to the user: warnings, and what the package logs."""

    def __enter__(self):
        self.logged = []
        self.handler = logging.Handler()
        self.handler.emit = lambda record: self.logged.append(record.getMessage())
        logging.getLogger("lightning_comm").addHandler(self.handler)
        self.warnings = warnings.catch_warnings(record=True)
        self.caught = self.warnings.__enter__()
        warnings.simplefilter("always")
        return self

    def __exit__(self, *error):
        self.warnings.__exit__(*error)
        logging.getLogger("lightning_comm").removeHandler(self.handler)
        self.heard = self.logged + [str(each.message) for each in self.caught]


def _break(profiler, hook, runner, module):
    if profiler._session is not None and runner.global_step == 5:
        profiler._session._timing = None
        profiler._session.end_backward = lambda: 1 / 0
    hook(runner, module)


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    with recording_flights():
        return launch(_scenarios, str(tmp_path_factory.mktemp("profiles")), world_size=2)


def of(answers, name):
    return [rank[name] for rank in answers]


def sum_of(steps, purpose):
    return sum(step.payload_bytes.get(purpose, 0) for step in steps)


# ---- bytes -----------------------------------------------------------------------------------------------------------


def test_ddp_hands_over_gradients_and_buffers_at_every_step(answers):
    for rank in of(answers, "ddp"):
        assert [step.payload_bytes["gradients"] for step in rank["steps"]] == [8 * PARAMETERS] * 12
        assert [step.payload_bytes["buffers"] for step in rank["steps"]] == [BUFFERS] * 12
        run = rank["figures"]
        assert run.total_payload_bytes["gradients"] == 12 * 8 * PARAMETERS
        assert {step.dense_bytes for step in rank["steps"]} == {4 * PARAMETERS}
        assert run.dense_bytes == 4 * PARAMETERS
        assert (run.total_steps, run.steps, run.warmup_steps, run.world_size) == (12, 9, 3, 2)


def test_all_bytes_of_a_ddp_run_are_those_that_torch_wrote_down(answers):
    for rank in of(answers, "ddp"):
        oracle = sum(entry["bytes"] for entry in rank["oracle"] if entry["kind"] != "barrier")
        seen = sum(sum(step.payload_bytes.values()) for step in rank["steps"])
        indices = 4 * (6 + 1 + 1)  # of rebuilt buckets, once: the six parameters, their number, the sizes
        assert seen == oracle - indices - 8  # Lightning's flag in front of the first batch is in no step
        assert seen == 12 * (8 * PARAMETERS + BUFFERS) + 11 * 8  # and Lightning's flag between batches


def test_batches_that_accumulate_send_no_gradients_and_owe_none(answers):
    for rank in of(answers, "accumulated"):
        steps = rank["steps"]
        assert [step.optimizer_steps for step in steps] == [0, 0, 1] * 4
        assert [step.payload_bytes.get("gradients", 0) // 8 for step in steps] == [0, 0, PARAMETERS] * 4
        assert [step.dense_bytes // 4 for step in steps] == [0, 0, PARAMETERS] * 4
        assert [step.step for step in steps] == [k // 3 for k in range(12)]
        assert rank["figures"].total_optimizer_steps == 4


@pytest.mark.parametrize("optimizers", [1, 2])
def test_each_of_several_backwards_in_a_batch_sends_all_gradients(answers, optimizers):
    for rank in of(answers, f"alternating {optimizers}"):
        reduced = sum(entry["bytes"] for entry in rank["oracle"] if entry["kind"] == "all_reduce")
        assert [step.payload_bytes["gradients"] for step in rank["steps"]] == [2 * 8 * PARAMETERS] * 6
        assert sum_of(rank["steps"], "gradients") == reduced
        assert [step.dense_bytes for step in rank["steps"]] == [2 * 4 * PARAMETERS] * 6
        assert [step.optimizer_steps for step in rank["steps"]] == [optimizers] * 6
        assert rank["figures"].total_optimizer_steps == optimizers * 6
        assert rank["figures"].untimed_steps == 0


def test_local_updates_of_two_optimizers_are_compared_with_two_all_reduces(answers):
    for rank in of(answers, "alternating local"):
        assert [step.dense_bytes for step in rank["steps"]] == [2 * 4 * PARAMETERS] * 8
        assert rank["figures"].total_optimizer_steps == 16


def test_torchs_bf16_hook_halves_the_bytes_and_its_time_is_known(answers):
    for rank in of(answers, "bf16"):
        # float64 parameters, so two bytes in place of eight
        assert [step.payload_bytes["gradients"] for step in rank["steps"]] == [2 * PARAMETERS] * 12
        assert all(step.timed and step.comm_s > 0 for step in rank["steps"])


def test_local_updates_hand_over_the_parameters_once_a_round(answers):
    for rank in of(answers, "local"):
        averaged = [step.payload_bytes.get("parameters", 0) for step in rank["steps"]]
        assert averaged == [0, 0, 0, 8 * PARAMETERS] * 3
        assert sum_of(rank["steps"], "gradients") == 0
        assert sum_of(rank["steps"], "control") == CONTROL * 4  # the first round is opened, three are closed
        assert rank["figures"].total_wire_bytes["parameters"] == 3 * 8 * PARAMETERS
        share = rank["figures"].sent_bytes / rank["figures"].dense_bytes
        assert 0.25 < share < 2


def test_a_gradient_phase_counts_gradients_once(answers):
    for rank in of(answers, "post_local"):
        steps = rank["steps"]
        assert [step.payload_bytes.get("gradients", 0) for step in steps] == [8 * PARAMETERS] * 4 + [0] * 8
        assert [step.payload_bytes["buffers"] for step in steps[:4]] == [BUFFERS] * 4
        assert sum_of(steps, "parameters") == 2 * 8 * PARAMETERS
        assert all(step.comm_s > 0 for step in steps[:4])


def test_what_lightning_metrics_and_the_user_send_is_kept_apart(answers):
    for rank in of(answers, "chatty"):
        for step in rank["steps"]:
            assert step.payload_bytes["user"] == 400
            assert step.payload_bytes["metrics"] > 0
            assert step.payload_bytes["lightning"] == 8 + 8 * (step.batch < 11)  # the loss; a flag before a batch
            assert step.lightning_s > 0
            assert step.other_s > 0
            assert step.comm_s < step.duration_s - step.lightning_s - step.other_s
        lightning = rank["figures"].total_wire_bytes["lightning"]
        assert rank["figures"].sent_bytes * 12 < 12 * 8 * PARAMETERS + lightning + 1


# ---- times -----------------------------------------------------------------------------------------------------------


def test_the_profiler_adds_no_collective_within_training(answers):
    for rank in of(answers, "local"):
        steps_apart = [b - a for a, b in zip(rank["counts"], rank["counts"][1:], strict=False)]
        assert steps_apart == [b - a for a, b in zip(rank["plain"], rank["plain"][1:], strict=False)]
        assert [k for k, more in enumerate(steps_apart, start=1) if more] == [3, 7, 11]


@pytest.mark.parametrize("name", ["ddp", "accumulated", "local", "chatty", "slow_ddp", "slow_local"])
def test_figures_are_the_same_on_all_ranks_and_their_parts_fit_into_a_step(answers, name):
    first, second = of(answers, name)
    assert first["figures"] == second["figures"]
    assert first["untouched"]
    assert second["untouched"]
    for rank in (first, second):
        for step in rank["steps"]:
            assert 0 <= step.wait_s <= step.exposed_s <= step.comm_s + 1e-9
            assert step.exposed_s + step.lightning_s + step.other_s <= step.duration_s + 1e-9
    run = first["figures"]
    assert 0 < run.share_exposed <= run.share_busy < 1
    assert abs(run.ranks[1].clock_offset_s) <= run.ranks[1].clock_error_s
    assert run.clock_error_s < 0.5


def test_steps_follow_each_other_without_a_gap_but_for_validation(answers):
    for rank in of(answers, "accumulated"):
        gaps = [
            after.start_s - (before.start_s + before.duration_s)
            for before, after in zip(rank["steps"], rank["steps"][1:], strict=False)
        ]
        assert [k for k, gap in enumerate(gaps, start=1) if gap > 1e-6] == [6]


# ---- what it writes --------------------------------------------------------------------------------------------------


def test_loggers_get_the_means_of_the_steps_since_the_last_time(answers):
    logged = logged_rows(Path(of(answers, "accumulated")[0]["folder"]).parents[1] / "logs")
    assert [float(row["step"]) for row in logged] == [1, 3]  # with every second of four steps: five batches, then six
    assert [float(row["comm/bytes_dense"]) for row in logged] == pytest.approx(
        [1 / 5 * 4 * PARAMETERS, 2 / 6 * 4 * PARAMETERS]
    )
    assert 0 < float(logged[0]["comm/share_exposed"]) <= float(logged[0]["comm/share_busy"]) < 1
    assert float(logged[0]["comm/time_s"]) > 0
    assert float(logged[0]["comm/bandwidth"]) > 0


def test_loggers_are_told_on_their_own_axis_where_a_batch_has_two_optimizer_steps(answers):
    logged = logged_rows(Path(of(answers, "alternating 2")[0]["folder"]).parent)
    assert [float(row["step"]) for row in logged] == [3]  # with the fourth of six batches


def logged_rows(folder):
    [logs] = folder.glob("**/metrics.csv")
    rows = [line.split(",") for line in logs.read_text().splitlines()]
    logged = [dict(zip(rows[0], row, strict=True)) for row in rows[1:]]
    return [row for row in logged if row.get("comm/bytes_sent")]


@pytest.mark.parametrize("name", ["ddp", "local", "slow_ddp"])
def test_the_files_say_what_the_profiler_said(answers, name):
    told, folder = of(answers, name)[0]["figures"], of(answers, name)[0]["folder"]
    read = load_profile(folder).figures
    for field in ("steps", "total_payload_bytes", "total_wire_bytes", "beside_wire_bytes", "slow_rank"):
        assert getattr(read, field) == getattr(told, field), field
    for field in ("step_s", "comm_s", "exposed_s", "wait_s", "lightning_s", "sent_bytes", "bandwidth_bytes_per_s"):
        assert getattr(read, field) == pytest.approx(getattr(told, field), rel=1e-3, abs=1e-6), field


def test_without_matplotlib_the_page_has_tables_and_says_how_to_get_figures(answers, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # as if it were not installed
    text = profile_page(load_profile(of(answers, "ddp")[0]["folder"]))
    assert "<img" not in text
    assert "pip install matplotlib" in text
    assert "exposed communication" in text


def test_a_broken_matplotlib_costs_the_figures_alone_and_is_named(answers, monkeypatch):
    class Broken:
        def find_spec(self, name, *_):
            if name == "matplotlib":
                raise RuntimeError("broken install")

    monkeypatch.delitem(sys.modules, "matplotlib", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    assert svg_figures.cannot_draw() == "matplotlib cannot be imported (RuntimeError: broken install)"
    text = profile_page(load_profile(of(answers, "ddp")[0]["folder"]))
    assert "<img" not in text
    assert "RuntimeError: broken install" in text


# ---- faults ----------------------------------------------------------------------------------------------------------


def test_an_exception_of_the_training_passes_and_leaves_a_readable_file(answers):
    for rank, found in enumerate(of(answers, "exception")):
        assert "training's own" in found["error"]
        assert found["untouched"]
        assert found["figures"] is None
        lines = (Path(found["folder"]) / f"rank_{rank}.jsonl").read_text().splitlines()
        assert sum("step" in json.loads(line) for line in lines) == 5
    assert load_profile(of(answers, "exception")[0]["folder"]).figures.total_steps == 5


def test_the_same_callback_profiles_a_second_fit_into_a_folder_of_its_own(answers):
    first, second = of(answers, "exception")[0], of(answers, "again")[0]
    assert second["figures"].total_steps == 12
    assert [Path(found["folder"]).name for found in (first, second)] == ["run_0", "run_1"]


@pytest.mark.parametrize(
    ("name", "cause"), [("broken", "ZeroDivisionError: division by zero"), ("unwritable", "NotADirectoryError: ")]
)
def test_a_profiler_that_fails_on_one_rank_says_so_and_all_go_on_together(answers, name, cause):
    for found in of(answers, name):
        assert found["untouched"]
        assert list(found["figures"].stopped) == [1]
        assert cause in found["figures"].stopped[1]
        assert found["figures"].total_steps == 12  # training went on, and rank 0 measured all of it
        assert found["figures"].total_ranks == 1
        whole = "ddp" if name == "broken" else "local"  # the same run, measured on both ranks
        assert found["figures"].total_payload_bytes == of(answers, whole)[0]["figures"].total_payload_bytes
        assert found["figures"].total_wire_bytes == of(answers, whole)[0]["figures"].total_wire_bytes
    assert len(of(answers, name)[0]["steps"]) == 12
    assert of(answers, name)[1]["steps"] == []


def test_of_two_profilers_the_first_measures_and_the_second_says_that_it_does_not(answers):
    for found, alone in zip(of(answers, "twice"), of(answers, "chatty"), strict=True):
        assert found["untouched"]
        assert found["figures"].total_payload_bytes == alone["figures"].total_payload_bytes
        assert found["second"] == (None, [], False)
    said = [[text for text in found["said"] if "CommProfiler" in text] for found in of(answers, "twice")]
    assert [len(texts) for texts in said] == [1, 0]
    assert "only one can measure" in said[0][0]
    assert "Remove one of the two" in said[0][0]


@contextmanager
def files_no_larger_than(size_bytes):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes or before[0], before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def _alone(rank, folder, steps, sizes):

    class Ends(Callback):
        def on_train_batch_end(self, runner, *args):
            if steps and runner.global_step == steps:
                os.kill(os.getpid(), signal.SIGKILL)

    profiler = CommProfiler(folder, warmup_steps=0)
    runner = trainer("auto", 1, callbacks=[profiler, Ends()])
    with files_no_larger_than(sizes), Ear() as ear:
        runner.fit(Regression(), loader(60, rank))
    return profiler.figures, runner.global_step, ear.logged


def test_a_full_disk_ends_the_profile_and_not_the_training(tmp_path):
    [(figures, steps, said)] = launch(_alone, str(tmp_path), 0, 4096, world_size=1)
    assert steps == 60
    assert figures.stopped[0].startswith("OSError: [Errno 27]")
    assert len(said) == 1
    assert "rank 0 stops measuring, and training goes on. The cause: OSError" in said[0]
    assert load_profile(tmp_path / "run_0").figures.total_steps >= 5


def test_where_only_the_page_finds_no_room_it_is_named_and_nothing_else_is_lost(tmp_path):
    [(figures, _, said)] = launch(_alone, str(tmp_path), 0, 40_000, world_size=1)
    assert (figures.steps, figures.stopped) == (60, {})
    (missing,) = [text for text in said if "cannot be written" in text]
    assert str(tmp_path / "run_0" / "profile.html") in missing
    assert "File too large" in missing
    assert "load_profile(" in missing
    assert [path.name for path in (tmp_path / "run_0").iterdir()] == ["rank_0.jsonl"]
    assert load_profile(tmp_path / "run_0").figures.total_steps == 60


def test_what_a_killed_run_had_measured_can_be_read(tmp_path):
    import multiprocessing

    process = multiprocessing.get_context("fork").Process(target=_alone, args=(0, str(tmp_path), 50, 0))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    profile = load_profile(tmp_path / "run_0")
    assert 20 <= profile.figures.total_steps < 50
    assert "<h1>" in profile_page(profile)


def test_one_process_sends_nothing_and_its_steps_are_measured(tmp_path):
    [(figures, _, _)] = launch(_alone, str(tmp_path), 0, 0, world_size=1)
    assert (figures.steps, figures.share_exposed, figures.sent_bytes, figures.slow_rank) == (60, 0.0, 0.0, None)
    assert figures.step_s > 0
    assert "One process" in (tmp_path / "run_0" / "profile.html").read_text()


@pytest.mark.parametrize(
    ("kwargs", "must_say"),
    [
        ({"timeline_steps": -1}, ["timeline_steps", "got -1", "whole number >= 0"]),
        ({"warmup_steps": 2.5}, ["warmup_steps", "got 2.5", "training batches"]),
    ],
)
def test_a_bad_argument_is_named_with_its_value_and_a_way_out(kwargs, must_say):
    with pytest.raises(ValueError, match="Leave it out") as caught:
        CommProfiler(**kwargs)
    assert [word for word in must_say if word not in str(caught.value)] == []


def test_a_probe_is_read_on_rank_0_only_and_refused_on_all_ranks_alike(answers):
    for read, refused in of(answers, "probes"):
        assert read == (None, PROBE.bytes_per_s)
        assert refused[0] == "RefusedSetUp"
        assert "missing.json" in refused[1]
        assert "Leave it out" in refused[1]


def test_a_probe_that_is_none_is_refused_before_training(tmp_path):
    profiler = CommProfiler(str(tmp_path), probe=str(tmp_path / "missing.json"))
    with pytest.raises(ValueError, match=r"`probe` must be a file that .*missing.json.*Leave it out"):
        trainer("auto", 1, callbacks=[profiler]).fit(Regression(), loader(2, 0))


def test_a_folder_without_a_profile_or_with_another_version_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"`folder` must hold rank_\*.jsonl.*run_0"):
        load_profile(tmp_path)
    (tmp_path / "rank_0.jsonl").write_text('{"schema": "other/9"}\n')
    with pytest.raises(ValueError, match=r"must begin with .*profile/1.*got 'other/9'.*version"):
        load_profile(tmp_path)


def test_the_command_line_builds_it_from_yaml(tmp_path):
    from lightning.pytorch.cli import LightningCLI
    from lightning.pytorch.demos.boring_classes import BoringModel

    config = tmp_path / "config.yaml"
    config.write_text(
        "trainer:\n  accelerator: cpu\n  logger: false\n  enable_checkpointing: false\n  callbacks:\n"
        "    - class_path: lightning_comm.CommProfiler\n      init_args: {folder: here, warmup_steps: 7, page: false}\n"
    )
    cli = LightningCLI(BoringModel, run=False, args=["--config", str(config)], save_config_callback=None)
    [profiler] = [each for each in cli.trainer.callbacks if isinstance(each, CommProfiler)]
    assert (profiler.folder, profiler.warmup_steps, profiler.page) == ("here", 7, False)


def test_it_can_be_sent_to_processes_that_are_spawned():
    assert pickle.loads(pickle.dumps(CommProfiler("somewhere", timeline_steps=2))).timeline_steps == 2
