"""What DDP says of itself: every name is still there, and its bytes are those of torch's flight recorder."""

import time

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.overrides.distributed import prepare_for_backward
from support.flight_recorder import flight_recorder, recording_flights
from support.processes import start_ranks
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.nn.parallel import DistributedDataParallel

from lightning_comm.instruments.collectives import Watcher
from lightning_comm.instruments.ddp_timing import FIELDS, INTERNALS, DdpTiming


class Net(torch.nn.Module):
    """Three layers, of which one is not used."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.unused, self.last = (torch.nn.Linear(400, 400) for _ in range(3))
        self.norm = torch.nn.BatchNorm1d(400)

    def forward(self, x):
        return self.last(self.norm(self.first(x)))


VARIANTS = {
    "plain": {},
    "unused": {"find_unused_parameters": True},
    "static": {"static_graph": True},
    "fp16 of torch": {"builtin": dist.BuiltinCommHookType.FP16_COMPRESS},
    "bf16 hook": {"hook": default_hooks.bf16_compress_hook},
}


def _wrapped(kind, builtin=None, hook=None, **kwargs):
    net = Net()
    net.unused.requires_grad_(kind == "unused")
    ddp = DistributedDataParallel(net, bucket_cap_mb=0.5, **kwargs)
    if builtin is not None:
        ddp._register_builtin_comm_hook(builtin)
    if hook is not None:
        ddp.register_comm_hook(None, hook)
    return ddp


def _several_backwards(rank):
    """Forwards through the wrapper with three, one, and one backward in them, as Lightning optimizes manually."""
    ddp = _wrapped("plain")
    timing, lazy = DdpTiming(ddp), DdpTiming(ddp)
    lazy._on_cuda = True  # there the numbers are left as they are until the next forward
    rows, lazily = [], []

    def training_step(x, lateness, timed):
        for late_s in lateness:
            earlier = len(flight_recorder())
            loss = forward(x).sum()
            prepare_for_backward(ddp, loss)
            if rank == 1:
                time.sleep(late_s)
            loss.backward()
            lazily.append(lazy.after_backward())
            if timed:
                rows.append((timing.after_backward(), flight_recorder()[earlier:]))
        ddp.require_backward_grad_sync = False  # so that the wrapper does not prepare for yet another backward
        return torch.zeros(1)

    forward, ddp.module.forward = ddp.module.forward, training_step
    for timed in (True, False):
        for lateness in ([0.0, 0.15, 0.0], [0.0], [0.0]):
            ddp(torch.randn(8, 400), lateness, timed)
            ddp.require_backward_grad_sync = True
    lazy._set_rate(10)
    for _ in range(16):
        ddp(torch.randn(8, 400), [0.0], False)
        ddp.require_backward_grad_sync = True
    timing.after_backward()
    torch.ones(1, requires_grad=True).sum().backward()
    return rows, lazily[5:], timing.after_backward()


def _backwards(rank):
    answers = {"several": _several_backwards(rank)}
    for kind, options in VARIANTS.items():
        ddp = _wrapped(kind, **options)
        seen = []
        watcher = Watcher(seen.append, int, lambda body: body())
        watcher.install()
        timing = DdpTiming(ddp)
        rows = []
        for batch in range(6):
            earlier = len(flight_recorder())
            began = time.monotonic()
            with ddp.no_sync() if batch == 2 else torch.enable_grad():
                loss = ddp(torch.randn(8, 400)).sum()
                watcher.in_backward = True
                if rank == 1 and batch == 4:
                    time.sleep(0.2)
                loss.backward()
                watcher.in_backward = False
                time_of = timing.after_backward()
            rows.append((time_of, list(seen), flight_recorder()[earlier:], (began, time.monotonic())))
            seen.clear()
        watcher.remove()
        timing.end()
        answers[kind] = rows, ddp._get_ddp_logging_data()
    return answers


@pytest.fixture(scope="module")
def answers():
    with recording_flights():
        return start_ranks(_backwards, world_size=2)


def test_each_of_several_backwards_in_one_forward_has_its_bytes_and_its_time(answers):
    for rank in answers:
        rows, _, unrelated = rank["several"]
        for time_of, oracle in rows:
            reduced = sum(entry["bytes"] for entry in oracle if entry["kind"] == "all_reduce")
            assert time_of.payload_bytes == reduced == 4 * (2 * (400 * 400 + 400) + 800)
        starts = [time_of.start_s for time_of, _ in rows]
        assert starts == sorted(set(starts))
        assert all(time_of.duration_s > 0 for time_of, _ in rows)
        assert unrelated is None, "a backward that reaches no parameter sends nothing"
    early, late = (rank["several"][0][1][0] for rank in answers)
    assert (early.duration_s - early.hidden_s) - (late.duration_s - late.hidden_s) > 0.07


def test_read_one_forward_late_only_a_backward_that_was_alone_has_a_time(answers):
    for rank in answers:
        lazily = rank["several"][1]
        assert {time_of.payload_bytes for time_of in lazily} == {4 * (2 * (400 * 400 + 400) + 800)}
        # the times of: a single one before, two of the same iteration, three together, a single one
        known = [time_of.duration_s > 0 for time_of in lazily]
        assert known[:5] == [True, False, False, False, True]
        # iterations 7 to 22: the first ten are all measured, then every tenth, and read in the one that follows
        assert [k for k, is_known in enumerate(known[5:], start=7) if is_known] == [7, 8, 9, 10, 11, 21]


@pytest.mark.parametrize("name", INTERNALS)
def test_torchs_ddp_still_has(answers, name):
    if name.startswith("logger."):
        assert hasattr(dist.Logger, name.removeprefix("logger."))
    elif name == "logger":
        assert "self.logger = dist.Logger(" in _source()
    else:
        assert hasattr(DistributedDataParallel, name)


def _source() -> str:
    import inspect

    return inspect.getsource(DistributedDataParallel)


@pytest.mark.parametrize("name", FIELDS)
def test_what_ddp_measures_still_has(answers, name):
    for rank in answers:
        assert isinstance(rank["plain"][1][name], int)


@pytest.mark.parametrize("kind", VARIANTS)
def test_the_bytes_of_a_backward_are_those_that_torch_wrote_down(answers, kind):
    for rank in answers:
        rows, _ = rank[kind]
        for batch, (time_of, seen, oracle, _) in enumerate(rows):
            reduced = sum(entry["bytes"] for entry in oracle if entry["kind"] == "all_reduce")
            if kind == "static" and batch == 0:
                reduced -= 4 * 6  # a flag a parameter, once in the run
            by_hook = sum(record.payload_bytes for record in seen if record.purpose == "gradients")
            assert (time_of is None) == (batch == 2), "a backward without synchronisation is no iteration"
            assert (time_of.payload_bytes if time_of else 0) + by_hook == reduced, f"{kind}, batch {batch}"
    parameters = 4 * (2 * (400 * 400 + 400) + 800 + (400 * 400 + 400) * (kind == "unused"))
    share = 0.5 if "16" in kind else 1
    flags = 4 * 8 if kind == "unused" else 0
    assert reduced == share * parameters + flags


def test_buffers_that_ddp_broadcasts_before_a_forward_are_seen(answers):
    for rank in answers:
        rows, _ = rank["plain"]
        _, seen, _, _ = rows[1]
        assert [(r.kind, r.purpose, r.payload_bytes) for r in seen] == [("broadcast", "buffers", 2 * 4 * 400 + 8)]
        assert seen[0].duration_s > 0


def test_times_lie_within_the_backward_and_the_early_rank_waits_for_the_late_one(answers):
    exposed = []
    for rank in answers:
        for time_of, _, _, (began, ended) in rank["plain"][0]:
            if time_of is not None:
                assert began < time_of.start_s < time_of.start_s + time_of.duration_s < ended + 0.001
                assert 0 <= time_of.hidden_s <= time_of.duration_s
        late = rank["plain"][0][4][0]
        exposed.append(late.duration_s - late.hidden_s)
    assert exposed[0] - exposed[1] > 0.1
