"""Averages where the host must not look: the same numbers, few kernels, no wait."""

import itertools

import pytest
import torch
import torch.distributed as dist
from support.differences import named
from support.mock_cuda import mock_cuda
from support.model_averages import Background
from support.processes import launch
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_comm.core.ledger import CommLedger
from lightning_comm.ondevice.buckets import pack, write_means
from lightning_comm.ondevice.limits import MODERATE, are_moderate
from lightning_comm.ondevice.share import Share
from lightning_comm.ondevice.uploads import uploaded
from lightning_comm.transport.averaging import FullAverage
from lightning_comm.transport.compression.cast import Cast
from lightning_comm.transport.compression.full import Full
from lightning_comm.transport.compression.int8 import Int8
from lightning_comm.transport.compression.top_k import TopK
from lightning_comm.transport.recording import Recorder

TYPES = (torch.float32, torch.bfloat16, torch.float64, torch.float16)
COUNTS = {2: [7, 3], 3: [5, 0, 11]}
BUCKET_BYTES = 200  # fewer than the 50 entries of a tensor in float64, and as many as in float32


def tensors(rank):
    generator = torch.Generator().manual_seed(rank)
    shapes = [(3, 4), (), (50,), (2, 3, 2)]
    return [torch.randn(shape, generator=generator).to(dtype) for dtype in TYPES for shape in shapes]


# ---- the same numbers ---------------------------------------------------------------------------------------------


def averages(rank, world_size, *, moderate):
    """Yield all that is averaged, in full and as differences, blocking and in the background."""
    plain = COUNTS[world_size][rank] / sum(COUNTS[world_size])
    for weight in (None, Share.of(COUNTS[world_size], rank), plain):
        ledger, full = CommLedger(), tensors(rank)
        drift = FullAverage(Recorder(ledger), BUCKET_BYTES).average_(named(full), weight, moderate=moderate).read()
        yield [*full, torch.tensor(drift), torch.tensor([record.payload_bytes for record in ledger.records])]
        for compression, background in itertools.product((Full(), Cast("fp16"), Int8(), TopK(0.5)), (False, True)):
            averager = Background(Recorder(CommLedger()), compression, BUCKET_BYTES)
            weights = named(tensors(7))
            averager.references.restart(weights)
            for own, moved in zip(weights.values(), tensors(rank), strict=True):
                own.add_(moved)
            if background:
                averager.depart(weights, weight, moderate=moderate)
                drift = averager.land_(weights)
            else:
                drift = averager.average_(weights, weight, moderate=moderate).read()
            yield [*weights.values(), *averager.references.rows, torch.tensor(drift)]


def _same(rank, world_size):
    looking, trusting = (list(averages(rank, world_size, moderate=moderate)) for moderate in (False, True))
    return [
        all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
        for one, other in zip(looking, trusting, strict=True)
    ]


@pytest.mark.parametrize("world_size", [2, pytest.param(3, marks=pytest.mark.exhaustive)])
def test_averages_of_moderate_numbers_are_the_same_whether_the_host_looks_or_not(run_ranks, world_size):
    for same in run_ranks(_same, world_size, world_size=world_size):
        assert len(same) == 3 * 9
        assert all(same), same


def test_moderate_is_what_is_finite_and_below_the_limit_in_every_type():
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        rows = [torch.zeros(0, dtype=dtype), torch.tensor([1.0, -MODERATE / 2], dtype=dtype)]
        assert are_moderate([*rows, torch.ones(3)])
        for large in (MODERATE, -2 * MODERATE, float("inf"), float("-inf"), float("nan")):
            assert not are_moderate([*rows, torch.tensor([0.0, large], dtype=dtype)])
    assert are_moderate([])
    assert not are_moderate([torch.tensor([5.0])], 5.0)


# ---- waits and kernels --------------------------------------------------------------------------------------------


class Kernels(TorchDispatchMode):
    """Counts operations that are kernels on a device: not views, and none for lists of nothing."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not func.is_view:
            self.names.append(func._schema.name.split("::")[1])
        return func(*args, **(kwargs or {}))


def _weighted_on_a_device(rank):
    answers = []
    for weight in (None, Share.of(COUNTS[3], rank)):
        here, averager = tensors(rank), FullAverage(Recorder(CommLedger()), BUCKET_BYTES)
        drift = averager.average_(named(here), weight).read()
        with mock_cuda() as device:
            there = [each.to("cuda") for each in tensors(rank)]
            with device.counting() as waits:
                found = FullAverage(Recorder(CommLedger()), BUCKET_BYTES).average_(named(there), weight, moderate=True)
            same = all(torch.equal(one.cpu(), other) for one, other in zip(there, here, strict=True))
            answers.append((same, found.read() == drift, len(waits), device.hazards))
    return answers


def test_three_ranks_average_on_a_device_as_on_the_processor_and_the_host_does_not_wait(run_ranks):
    assert run_ranks(_weighted_on_a_device, world_size=3) == [[(True, True, 0, [])] * 2] * 3


def test_a_bucket_is_packed_and_unpacked_in_one_kernel_for_each_type_however_many_pieces_it_has():
    for count in (4, 40):
        with mock_cuda() as device:
            pieces = [torch.full((5,), float(k), device="cuda").to(TYPES[k % 2]) for k in range(count)]
            bucket = torch.empty(5 * count, device="cuda")
            divisor = torch.full((), 3.0, device="cuda")
            with Kernels() as kernels, device.counting() as waits:
                used = pack(pieces, bucket)
                packed = list(kernels.names)
                write_means(pieces, used, divisor)
                unpacked = kernels.names[len(packed) :]
                write_means(pieces, used, None)
            assert packed == ["_foreach_copy_"] * 2
            assert unpacked == ["div_", *packed]
            assert kernels.names[-2:] == packed
            assert not waits
            expected = [torch.full((5,), float(k)).div(torch.tensor(3.0)).to(TYPES[k % 2]) for k in range(count)]
            assert all(torch.equal(piece.cpu(), wanted) for piece, wanted in zip(pieces, expected, strict=True))


def test_only_two_ranks_divide_their_bucket_on_a_device():
    """One need not, and the parts of more are weighed before; so a bucket is passed over once each way."""
    (found,) = launch(_passes, world_size=1)
    for world_size, (names, means) in found.items():
        # the sample of a bucket is divided whatever happens
        assert names.count("div_") == 1 + (world_size == 2), world_size
        assert names.count("_foreach_copy_") == 2, world_size
        assert world_size > 1 or means == [1.0, 2.0, 3.0, 4.0, 5.0]


def _passes(rank):
    """Average as one of several ranks that are not there; return the kernels and the means by their number."""
    found = {}
    for world_size in (1, 2, 4):
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
        with mock_cuda():
            tensor = torch.arange(1.0, 6.0, device="cuda")
            with Kernels() as kernels:
                FullAverage(Recorder(CommLedger()), 64).average_(named([tensor]), moderate=True)
            found[world_size] = kernels.names, tensor.tolist()
        dist.destroy_process_group()
    return found


def test_the_mean_of_one_rank_is_each_number_bit_for_bit(run_ranks):
    assert run_ranks(_unchanged, world_size=1) == [True]


def _unchanged(rank):
    numbers = torch.tensor([0.0, -0.0, 1e-45, -3e-39, 1.0, 3.4e38, float("inf"), float("-inf")])
    rows = [numbers.to(dtype) for dtype in TYPES]
    before = [row.clone() for row in rows]
    FullAverage(Recorder(CommLedger()), 16).average_(named(rows))
    return all(torch.equal(row.view(torch.uint8), old.view(torch.uint8)) for row, old in zip(rows, before, strict=True))


def test_halves_that_are_summed_are_not_half_of_the_sum_so_ranks_divide_at_the_end():
    smallest = torch.tensor([1e-45])
    assert float(smallest / 2 + smallest / 2) == 0.0
    assert torch.equal((smallest + smallest) / 2, smallest)


def test_a_share_of_moderate_numbers_and_a_look_at_them_wait_for_nothing():
    row = torch.randn(100, generator=torch.Generator().manual_seed(0))
    wanted, share = row.clone(), Share.of([3, 4, 5], 1)
    share.part_(wanted)
    with mock_cuda() as device:
        there = row.to("cuda")
        with device.counting() as waits:
            share.part_(there, moderate=True)
            found = are_moderate([there])
            numbers = uploaded(torch.tensor([1.0, 2.0]), there.device)
        assert not waits
        assert found.is_cuda
        assert numbers.is_cuda
        assert numbers.tolist() == [1.0, 2.0]
        assert torch.equal(there.cpu(), wanted)
