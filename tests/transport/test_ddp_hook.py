"""The hook under torch's DDP: sent in full it changes nothing, and no way of cutting buckets changes what is sent."""

import contextlib
import itertools
import time
from functools import cache

import pytest
import torch
from support.grids import few_of
from support.processes import one_launch, start_ranks
from torch import nn
from torch.distributed.algorithms.join import Join
from torch.nn.parallel import DistributedDataParallel

from lightning_comm.core.ledger import CommLedger
from lightning_comm.transport.compression.base import Context
from lightning_comm.transport.compression.full import Full
from lightning_comm.transport.compression.int8 import Int8
from lightning_comm.transport.compression.power_sgd import PowerSGD
from lightning_comm.transport.compression.ternary import Ternary
from lightning_comm.transport.compression.top_k import TopK
from lightning_comm.transport.ddp_hook import GradientSync
from lightning_comm.transport.recording import Recorder

SMALL, LARGE = 0.002, 25.0  # MB: several buckets, and one


class Net(nn.Module):
    """Convolutions, a tied, a frozen and two partly used layers."""

    def __init__(self, *, sparse=False):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.one = nn.Linear(8, 8)
        self.two = nn.Linear(8, 8)
        self.two.weight = self.one.weight
        self.frozen = nn.Linear(8, 8).requires_grad_(False)
        self.wide = nn.Linear(8, 300)
        self.out = nn.Linear(300, 4)
        self.branch = nn.Linear(4, 4)
        self.words = nn.Embedding(50, 4, sparse=True) if sparse else None

    def forward(self, x, *, branch=False):
        x = self.norm(self.conv(x)).relu().mean((2, 3))
        x = self.out(self.wide(self.frozen(self.two(self.one(x).tanh()))).tanh())
        if self.words is not None:
            x = x + self.words(torch.arange(x.shape[0]))
        return self.branch(x) if branch else x


def picture(rank, step):
    return torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(100 * rank + step))


def sync_of(model, compression, **kwargs):
    ledger = CommLedger()
    recorder = Recorder(ledger)
    sync = GradientSync(compression.codec(Context(recorder, "gradients")), recorder, model.named_parameters(), **kwargs)
    return sync, ledger


def _train(rank, compression, mode, cap):
    """Return the weights after six steps of AdamW, and how many messages there were."""
    torch.manual_seed(0)
    model = Net(sparse=mode == "sparse")
    if mode == "channels_last":
        model = model.to(memory_format=torch.channels_last)
    branch = mode in ("unused", "rank_unused")
    if not branch:
        model.branch.requires_grad_(False)
    flags = {
        "static_graph": {"static_graph": True},
        "views": {"gradient_as_bucket_view": True},
        "views_no_sync": {"gradient_as_bucket_view": True},
        "unused": {"find_unused_parameters": True},
        "rank_unused": {"find_unused_parameters": True},
    }.get(mode, {})
    ddp = DistributedDataParallel(model, bucket_cap_mb=cap, **flags)
    ledger = None
    if compression is not None:
        sync, ledger = sync_of(model, compression)
        ddp.register_comm_hook(None, sync.hook)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, 0.05) if mode == "sparse" else torch.optim.AdamW(trained, lr=0.01)
    for step in range(6):
        quiet = mode.endswith("no_sync") and step % 3 < 2
        with ddp.no_sync() if quiet else contextlib.nullcontext():
            used = mode == "rank_unused" and rank == 1 and step != 2
            ddp(picture(rank, step), branch=used).square().mean().backward()
        if not quiet:
            optimizer.step()
            optimizer.zero_grad()
    return [each.detach().clone().numpy() for each in model.parameters()], ledger and ledger.messages()


MODES = [
    "default",
    "channels_last",
    "static_graph",
    "rank_unused",
    "no_sync",
    "views_no_sync",
]


MORE_MODES = ["views", "unused"]  # a part of "views_no_sync" and of "rank_unused"
COMPRESSED = [Int8(), TopK(0.1), Ternary(), PowerSGD(2)]
COMPRESSED_MODES = ["default", "channels_last", "static_graph", "rank_unused", "views_no_sync"]


GRID = list(itertools.product(COMPRESSED, COMPRESSED_MODES))
# each compression and each mode; the others are exhaustive
FEW = [
    (Int8(), "default"),
    (Int8(), "rank_unused"),
    (TopK(0.1), "channels_last"),
    (Ternary(), "static_graph"),
    (PowerSGD(2), "views_no_sync"),
]


@cache
def trained(often):
    """Runs of two ranks in full and without the package, in one launch: by compression, mode and size of a bucket."""
    return one_launch(_train, itertools.product((None, Full()), MODES if often else MORE_MODES, (SMALL,)), world_size=2)


@cache
def compressed(exhaustive):
    """Those with a compression, in few buckets and in many."""
    pairs = GRID if exhaustive else FEW
    return one_launch(_train, [(*pair, cap) for pair in pairs for cap in (SMALL, LARGE)], world_size=2)


@pytest.mark.parametrize("mode", [*MODES, *(pytest.param(each, marks=pytest.mark.exhaustive) for each in MORE_MODES)])
def test_sent_in_full_training_is_that_of_plain_ddp_bit_for_bit(mode):
    plain, ours = (trained(mode in MODES)[compression, mode, SMALL] for compression in (None, Full()))
    for (expected, _), (got, messages) in zip(plain, ours, strict=True):
        assert messages > (
            2 if "no_sync" in mode else 6
        )  # several buckets, or the order of messages would not be tried
        assert all((a == b).all() for a, b in zip(expected, got, strict=True))


@pytest.mark.parametrize(("compression", "mode"), few_of(GRID, *map(GRID.index, FEW)), ids=str)
def test_many_small_buckets_train_as_one_large_bucket_does(request, compression, mode):
    runs = compressed(request.config.getoption("exhaustive"))
    small, large = (runs[compression, mode, cap] for cap in (SMALL, LARGE))
    assert small[0][1] > large[0][1]
    for (one, _), (other, _) in zip(small, large, strict=True):
        assert all((a == b).all() for a, b in zip(one, other, strict=True))
    for mine, theirs in zip(small[0][0], small[1][0], strict=True):
        assert (mine == theirs).all(), "ranks differ"


def _sparse_gradient(rank, step):
    torch.manual_seed(0)
    model = Net(sparse=True)
    model.branch.requires_grad_(False)
    return model, lambda net: net(picture(rank, step)).square().mean().backward()


def _sparse(rank):
    model, backward = _sparse_gradient(rank, 0)
    ddp = DistributedDataParallel(model, bucket_cap_mb=SMALL)
    ddp.register_comm_hook(None, sync_of(model, Full())[0].hook)
    backward(ddp)
    return {name: each.grad.to_dense().numpy() for name, each in model.named_parameters() if each.grad is not None}


def test_gradients_that_are_sparse_tensors_are_averaged_and_so_are_those_beside_them(run_ranks):
    # Not against plain DDP: in torch 2.15 that halves all dense gradients of a model which has a sparse one.
    alone = []
    for rank in range(2):
        model, backward = _sparse_gradient(rank, 0)
        backward(model)
        alone.append({name: p.grad.to_dense() for name, p in model.named_parameters() if p.grad is not None})
    for got in run_ranks(_sparse, world_size=2):
        assert set(got) == set(alone[0])
        for name, gradient in got.items():
            expected = (alone[0][name] + alone[1][name]) / 2
            torch.testing.assert_close(torch.from_numpy(gradient), expected, rtol=1e-5, atol=1e-7)


def _one_gradient(rank, compression):
    torch.manual_seed(0)
    model = Net()
    model.branch.requires_grad_(False)
    ddp = DistributedDataParallel(model, bucket_cap_mb=SMALL)
    if compression is not None:
        ddp.register_comm_hook(None, sync_of(model, compression)[0].hook)
    ddp(picture(rank, 0)).square().mean().backward()
    return [each.grad.numpy() for each in model.parameters() if each.grad is not None]


@pytest.mark.parametrize("world_size", [3, pytest.param(4, marks=pytest.mark.exhaustive)])
def test_one_steps_gradient_is_that_of_plain_ddp_on_more_ranks(run_ranks, world_size):
    plain = run_ranks(_one_gradient, None, world_size=world_size)
    ours = run_ranks(_one_gradient, Full(), world_size=world_size)
    for expected, got in zip(plain, ours, strict=True):
        for a, b in zip(expected, got, strict=True):
            torch.testing.assert_close(torch.from_numpy(b), torch.from_numpy(a), rtol=0, atol=1e-6)


def _uneven(rank, compression):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 40), nn.Tanh(), nn.Linear(40, 1))
    ddp = DistributedDataParallel(model, bucket_cap_mb=0.0002)
    if compression is not None:
        ddp.register_comm_hook(None, sync_of(model, compression)[0].hook)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with Join([ddp]):
        for step in range(3 + 2 * rank):
            x = torch.randn(4, 5, generator=torch.Generator().manual_seed(10 * rank + step))
            ddp(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    return [each.detach().numpy() for each in model.parameters()]


def test_ranks_with_fewer_batches_join_as_under_plain_ddp(run_ranks):
    plain, ours = (run_ranks(_uneven, each, world_size=2) for each in (None, Full()))
    for expected, got in zip(plain, ours, strict=True):
        assert all((a == b).all() for a, b in zip(expected, got, strict=True))


@pytest.mark.parametrize("compression", [Int8(), Ternary(), TopK(0.5)], ids=repr)
def test_ranks_with_fewer_batches_join_under_a_compression(run_ranks, compression):
    answers = run_ranks(_uneven, compression, world_size=2)
    assert all((a == b).all() for a, b in zip(*answers, strict=True))


def _scaled(rank, factor):
    """Two steps; before the second one the loss scale is changed by the factor, as a gradient scaler does."""
    torch.manual_seed(0)
    model = nn.Linear(40, 3, bias=False)
    scale = 1.0
    sync, _ = sync_of(model, TopK(0.1), loss_scale=lambda: scale)
    ddp = DistributedDataParallel(model)
    ddp.register_comm_hook(None, sync.hook)
    unscaled = []
    for step in range(3):
        scale = 1.0 if step == 0 else factor
        x = torch.randn(4, 40, generator=torch.Generator().manual_seed(10 * rank + step))
        (scale * ddp(x).square().mean()).backward()
        unscaled.append((model.weight.grad / scale).numpy().copy())
        model.weight.grad = None
    return unscaled


def test_what_is_kept_follows_the_loss_scale(run_ranks):
    for one, other in zip(run_ranks(_scaled, 1.0, world_size=2), run_ranks(_scaled, 1024.0, world_size=2), strict=True):
        assert all((a == b).all() for a, b in zip(one, other, strict=True))  # a power of two rounds nothing


def _accumulated(rank, ends):
    """A backward that sends, one that does not, a step by hand, and one that sends, whose mean is thrown away."""
    torch.manual_seed(0)
    model = nn.Linear(40, 3, bias=False)
    recorder = Recorder(CommLedger())
    codec = TopK(0.1).codec(Context(recorder, "gradients", revocable=True))
    sync = GradientSync(codec, recorder, model.named_parameters())
    ddp = DistributedDataParallel(model)
    ddp.register_comm_hook(None, sync.hook)
    x = torch.randn(4, 40, generator=torch.Generator().manual_seed(rank))
    ddp(x).square().mean().backward()
    kept = codec._residuals["weight"].clone()
    sync.take_back_cleared()
    with ddp.no_sync():
        ddp(x).square().mean().backward()
    if ends:
        sync.end_backward()
    model.weight.data.sub_(model.weight.grad)  # which torch does not count
    model.weight.grad = None
    ddp(x).square().mean().backward()
    sync.thrown_away(model.parameters())
    return torch.equal(codec._residuals["weight"], kept), bool(codec._residuals["weight"].any())


def test_a_step_by_hand_after_a_backward_that_sent_nothing_is_seen(run_ranks):
    assert run_ranks(_accumulated, True, world_size=2) == [(True, True)] * 2
    assert run_ranks(_accumulated, False, world_size=2) == [(False, False)] * 2, "what was kept would be lost"


def _counted(rank):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 40), nn.Tanh(), nn.Linear(40, 1))
    sync, _ = sync_of(model, Int8())
    ddp = DistributedDataParallel(model, bucket_cap_mb=0.0002)
    ddp.register_comm_hook(None, sync.hook)
    counts = []
    for step in range(4):
        x = torch.ones(2, 5) * (torch.nan if (rank, step) == (1, 1) else 1.0)
        ddp(x).square().mean().backward()
        counts.append(sync.non_finite_steps)
        ddp.zero_grad()
    return counts


def test_a_gradient_that_is_not_finite_on_one_rank_is_counted_on_all(run_ranks):
    assert run_ranks(_counted, world_size=2) == [[0, 1, 1, 1], [0, 1, 1, 1]]


SPOILT = [  # a type, the gradient's entries, and whether one is not finite
    (torch.float16, [3000.0] * 100, False),  # their sum is beyond the type
    (torch.float16, [-3000.0] * 100, False),
    (torch.float16, [1.0, torch.inf], True),
    (torch.bfloat16, [1e37] * 100, False),
    (torch.float32, [1e37] * 100, False),
    (torch.float32, [1e37] * 50 + [-1e37] * 50 + [torch.nan], True),
    (torch.float32, [torch.inf, -torch.inf], True),
    (torch.float32, [1.0, -torch.inf, 2.0], True),
    (torch.float64, [1e307] * 100, False),
]


def _counted_of_large(rank):
    counts = []
    for dtype, entries, _ in SPOILT:
        layer = nn.Module()
        layer.register_parameter("weight", nn.Parameter(torch.zeros(len(entries), dtype=dtype)))
        layer.forward = lambda x, layer=layer: (layer.weight * x).sum()
        sync, _ = sync_of(layer, Full())
        ddp = DistributedDataParallel(layer)
        ddp.register_comm_hook(None, sync.hook)
        ddp(torch.tensor(entries, dtype=dtype)).backward()
        counts.append(sync.non_finite_steps)
    return counts


def test_gradients_that_are_finite_are_not_counted_however_large_their_sum(run_ranks):
    assert run_ranks(_counted_of_large, world_size=2) == [[int(spoilt) for _, _, spoilt in SPOILT]] * 2


def test_the_reducer_that_hands_over_single_gradients_is_refused(run_ranks):
    (said,) = run_ranks(_python_reducer, world_size=1)
    assert "torch.compile" in said
    assert "optimize_ddp" in said


def _python_reducer(rank):
    sync, _ = sync_of(nn.Linear(2, 2), Full())
    with pytest.raises(RuntimeError) as caught:
        sync.hook(None, (torch.zeros(1), torch.zeros(1)))
    return str(caught.value)


def _waited_late(rank):
    records = []
    for beside_compute in (True, False):
        ledger = CommLedger()
        pending = Recorder(ledger, beside_compute=beside_compute).all_reduce(torch.ones(1000), "gradients")
        time.sleep(0.5)
        pending.wait()
        records += ledger.records
    return [(record.duration_s, record.hidden_s) for record in records]


def test_a_message_beside_compute_lasts_until_it_has_arrived_and_not_until_it_is_waited_for(run_ranks):
    for (duration_s, hidden_s), (blocked_s, not_hidden_s) in run_ranks(_waited_late, world_size=2):
        assert 0 < duration_s == hidden_s < 0.5
        assert blocked_s >= 0.5
        assert not_hidden_s == 0.0


def _time_of_last_bucket(rank, compression, slow):
    """Return how long after its start the last bucket of each backward came, without waits, and when it returned."""
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(40, 40) for _ in range(6)])
    if rank == slow:
        model[0].register_forward_hook(lambda layer, inputs, output: time.sleep(0.2))
    ddp = DistributedDataParallel(model, bucket_cap_mb=SMALL)
    sync, _ = sync_of(model, compression)
    ddp.register_comm_hook(None, sync.hook)
    came, returned = [], []
    for _ in range(4):
        loss = ddp(torch.ones(2, 40)).sum()
        started = time.monotonic()
        sync.on_last_bucket = lambda waited_s, started=started: came.append(time.monotonic() - started - waited_s)
        loss.backward()
        returned.append(time.monotonic() - started)
    return came, returned


@pytest.mark.parametrize("compression", [Full(), Int8(), PowerSGD(rank=1)], ids=str)
def test_the_last_bucket_is_told_of_before_slower_ranks_are_waited_for(compression):
    fast, slow = start_ranks(_time_of_last_bucket, compression, 1, world_size=2)
    assert all(returned > 0.15 for returned in fast[1])  # or there was nothing to wait for
    assert len(fast[0]) == 4
    for came in (fast[0], slow[0]):
        assert sorted(came)[1] < 0.1  # where they were waited for, all would be late; a busy machine makes one late
