"""What is seen of torch.distributed, against torch's own flight recorder, in real processes."""

import types

import pytest
import torch
import torch.distributed as dist
from support.flight_recorder import flight_recorder, recording_flights
from support.processes import start_ranks
from torch.distributed import distributed_c10d

from lightning_comm.core.ledger import CommLedger
from lightning_comm.instruments import collectives as watching
from lightning_comm.instruments.collectives import FUNCTIONS, Watcher
from lightning_comm.transport.recording import Recorder, observe

CALLS = {
    "all_reduce": lambda t, n: dist.all_reduce(t),
    "broadcast": lambda t, n: dist.broadcast(t, src=1),
    "reduce": lambda t, n: dist.reduce(t, 0),
    "all_gather": lambda t, n: dist.all_gather([torch.empty_like(t) for _ in range(n)], t),
    "all_gather_into_tensor": lambda t, n: dist.all_gather_into_tensor(t.new_empty(n * t.numel()), t),
    "reduce_scatter_tensor": lambda t, n: dist.reduce_scatter_tensor(t.new_empty(t.numel() // n), t),
    "all_to_all_single": lambda t, n: dist.all_to_all_single(torch.empty_like(t), t),
    "asynchronous": lambda t, n: dist.all_reduce(t, async_op=True).wait(),
    "keywords": lambda t, n: dist.broadcast(src=0, tensor=t, group=dist.group.WORLD),
    "barrier": lambda t, n: dist.barrier(),
    "objects": lambda t, n: dist.broadcast_object_list([{"some": "thing"}], src=0),
    "gathered objects": lambda t, n: dist.all_gather_object([None] * n, "word"),
}


def _calls(rank):
    seen = {}
    got = []
    before = {name: getattr(dist, name) for name in FUNCTIONS}
    watcher = Watcher(got.append, lambda: 7, lambda body: body())
    watcher.install()
    for name, call in CALLS.items():
        sent = torch.ones(12)
        earlier = len(flight_recorder())
        call(sent, dist.get_world_size())
        seen[name] = list(got), flight_recorder()[earlier:]
        got.clear()
    peer = 1 - rank
    sends, receives = torch.ones(6), torch.empty(6)
    for work in dist.batch_isend_irecv([dist.P2POp(dist.isend, sends, peer), dist.P2POp(dist.irecv, receives, peer)]):
        work.wait()
    (dist.send if rank == 0 else dist.recv)(sends, 1 - rank)
    seen["point to point"] = list(got), []
    got.clear()
    recorder = Recorder(CommLedger())
    observed = []
    end = observe(observed.append)
    recorder.all_reduce(sends, "parameters").wait()
    end()
    recorder.all_reduce(sends, "parameters").wait()
    seen["ours"] = list(got), [record.purpose for record in observed]
    watcher.remove()
    dist.all_reduce(sends)
    seen["afterwards"] = list(got), []
    restored = all(
        getattr(owner, name) is function for owner in (dist, distributed_c10d) for name, function in before.items()
    )
    return seen, restored


@pytest.fixture(scope="module")
def answers():
    with recording_flights():
        return start_ranks(_calls, world_size=2)


@pytest.mark.parametrize("name", CALLS)
def test_each_message_is_seen_once_with_the_bytes_that_torch_wrote_down(answers, name):
    for seen, _ in answers:
        records, oracle = seen[name]
        assert [record.payload_bytes for record in records if record.kind != "barrier"] == [
            entry["bytes"] for entry in oracle if entry["kind"] != "barrier"
        ]
        assert len(records) >= 1
        assert {record.step for record in records} == {7}
        assert {record.purpose for record in records} == {"user"}
        assert all((record.duration_s > 0) == (name != "asynchronous") for record in records)


def test_of_point_to_point_messages_the_sender_counts_the_bytes(answers):
    (sender, _), (receiver, _) = answers[0][0]["point to point"], answers[1][0]["point to point"]
    assert [(record.kind, record.wire_bytes) for record in sender] == [("send", 24), ("send", 24)]
    assert [(record.kind, record.wire_bytes) for record in receiver] == [("send", 24), ("receive", 0)]
    assert receiver[1].duration_s > 0


def test_what_our_recorder_sends_is_observed_there_and_not_seen_twice(answers):
    for seen, _ in answers:
        assert seen["ours"] == ([], ["parameters"])


def test_the_functions_are_put_back(answers):
    for seen, restored in answers:
        assert seen["afterwards"] == ([], [])
        assert restored


def frame_of(*modules: str):
    """A stack of calls from modules of these names, the innermost first."""
    frame = None
    for name in reversed(modules):
        frame = types.SimpleNamespace(f_globals={"__name__": name}, f_back=frame)
    return frame


@pytest.mark.parametrize(
    ("stack", "purpose"),
    [
        (("torch.distributed.c10d_logger", "lightning.fabric.utilities.distributed", "mine"), "lightning"),
        (("pytorch_lightning.loops", "__main__"), "lightning"),
        (("torchmetrics.utilities.distributed", "torch.nn.modules.module", "lightning.pytorch"), "metrics"),
        (("torch.nn.modules.module", "mine", "lightning.pytorch"), "user"),
        (("lightning_of_somebody_else", "lightning.pytorch"), "user"),
        (("torch.distributed.algorithms.ddp_comm_hooks.default_hooks", "lightning.pytorch"), "gradients"),
        (("torch.distributed.algorithms.model_averaging.utils", "mine"), "parameters"),
        (("torch.nn.modules._functions", "torch.nn.modules.batchnorm", "mine"), "batch_norm"),
        (("torch.autograd",), "gradients"),
    ],
)
def test_a_message_belongs_to_the_first_caller_outside_of_torch(stack, purpose):
    assert Watcher(print, int, print)._purpose(frame_of(*stack)) == purpose


def test_within_a_backward_a_users_hook_sends_gradients():
    watcher = Watcher(print, int, print)
    watcher.in_backward = True
    assert watcher._purpose(frame_of("mine", "torch.autograd", "lightning.pytorch")) == "gradients"


def test_an_error_of_the_call_passes_and_one_of_the_watcher_does_not(monkeypatch):
    errors = []

    def safely(body):
        try:
            body()
        except RuntimeError as error:
            errors.append(str(error))

    def fails(record):
        raise RuntimeError("cannot report")

    original = dist.all_reduce
    monkeypatch.setattr(watching.dist, "get_world_size", lambda group=None: 2)
    monkeypatch.setattr(watching.dist, "all_reduce", lambda tensor, group=None: None)
    watcher = Watcher(fails, int, safely)
    watcher.install()
    try:
        assert dist.all_reduce(torch.ones(1)) is None
        with pytest.raises(TypeError):
            dist.all_reduce(torch.ones(1), nonsense=1)
    finally:
        watcher.remove()
    assert errors == ["cannot report"]
    monkeypatch.undo()
    assert dist.all_reduce is original


def test_a_wrapper_that_came_later_is_left_where_it_is(monkeypatch):
    monkeypatch.setattr(dist, "barrier", dist.barrier)
    monkeypatch.setattr(distributed_c10d, "barrier", distributed_c10d.barrier)
    watcher = Watcher(print, int, print)
    watcher.install()
    theirs = lambda: "theirs"  # noqa: E731
    dist.barrier = theirs
    watcher.remove()
    assert dist.barrier is theirs


def test_torch_still_has_each_function_that_is_wrapped():
    for name in (*FUNCTIONS, watching.COALESCED):
        assert callable(getattr(dist, name, None)), f"torch.distributed has lost {name}"
