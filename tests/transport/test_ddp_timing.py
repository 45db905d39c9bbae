"""What DDP says of itself: every name is still there, and its bytes are those of torch's flight recorder."""

import time

import pytest
import torch
import torch.distributed as dist
from support.flight_recorder import flight_recorder, recording_flights
from support.processes import start_ranks
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.nn.parallel import DistributedDataParallel

from lightning_comm.transport.ddp_timing import FIELDS, INTERNALS, DdpTiming
from lightning_comm.transport.watching import Watcher


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


def _backwards(rank):
    answers = {}
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
