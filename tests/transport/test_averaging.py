"""Averaging on the wire against hand arithmetic, whatever the buckets."""

import itertools

import pytest
import torch
import torch.distributed as dist
from support.differences import named
from support.grids import few_of

from lightning_comm.core.ledger import CommLedger
from lightning_comm.transport.averaging import Averaging, FullAverage, broadcast_
from lightning_comm.transport.recording import Recorder

SIZES = (3, 2, 7, 1, 0, 40)


def inputs(rank: int, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    gen = torch.Generator().manual_seed(rank)
    return [torch.randn(n, generator=gen, dtype=torch.float64).to(dtype) for n in SIZES]


def _average(rank, bucket_bytes, dtype):
    tensors = inputs(rank, dtype)
    pointers = [tensor.data_ptr() for tensor in tensors]
    ledger = CommLedger()
    drift = FullAverage(Recorder(ledger), bucket_bytes).average_(named(tensors)).read()
    assert [tensor.data_ptr() for tensor in tensors] == pointers, "averaging moved a tensor"
    return [tensor.clone().numpy() for tensor in tensors], ledger.payload_bytes(), ledger.messages(), tuple(drift)


@pytest.mark.parametrize(
    ("bucket_bytes", "world_size"),  # of one entry, that split a tensor, exactly at an edge, and of all
    few_of(itertools.product([8, 32, 40, 10_000], [2, 3]), 0, 3, 5, 6),
)
def test_average_reaches_every_tensor_whatever_the_bucket(run_ranks, bucket_bytes, world_size):
    expected = [torch.stack(each).mean(0) for each in zip(*(inputs(r) for r in range(world_size)), strict=True)]
    answers = run_ranks(_average, bucket_bytes, torch.float64, world_size=world_size)
    for got, payload_bytes, messages, _ in answers:
        for mine, theirs, mean in zip(got, answers[0][0], expected, strict=True):
            assert (mine == theirs).all(), "ranks differ"
            torch.testing.assert_close(torch.from_numpy(mine), mean, rtol=0, atol=1e-15)
        assert payload_bytes == 8 * sum(SIZES)
        assert messages == -(-8 * sum(SIZES) // bucket_bytes)


def test_drift_is_the_distance_from_the_mean(run_ranks):
    everything = [torch.cat(inputs(rank)) for rank in range(3)]
    mean = torch.stack(everything).mean(0)
    for rank, (*_, drift) in enumerate(run_ranks(_average, 24, torch.float64, world_size=3)):
        assert drift[0] == pytest.approx(float((everything[rank] - mean).square().sum()))
        assert drift[1] == pytest.approx(float(mean.square().sum()))


def _average_large_bf16(rank):
    # 256 + 1 has no bf16, so a sum in bf16 loses every 1 that meets the 256 before the other 1
    values = [256.0 if k % 3 == rank else 1.0 for k in range(30)]
    tensor = torch.tensor(values, dtype=torch.bfloat16)
    ledger = CommLedger()
    FullAverage(Recorder(ledger), 1000).average_(named([tensor]))
    return tensor.float().tolist(), ledger.payload_bytes()


def test_narrow_types_are_summed_in_float32(run_ranks):
    small, large = torch.tensor([1.0, 256.0], dtype=torch.bfloat16)
    assert large + small + small != large + 2 * small  # or the test would prove nothing
    for values, payload_bytes in run_ranks(_average_large_bf16, world_size=3):
        assert values == [86.0] * 30
        assert payload_bytes == 4 * 30


def _average_layouts(rank):
    base = torch.arange(2 * 3 * 4 * 5, dtype=torch.float32).view(2, 3, 4, 5) + 100 * rank
    tensors = [
        base.clone().contiguous(memory_format=torch.channels_last),
        base.clone().transpose(0, 2),
        base.clone()[:, 1:, ::2],  # with holes
        torch.complex(base.clone(), -base),
        torch.tensor(3.0 * rank),
        torch.nn.Parameter(base.clone()),
    ]
    strides = [tensor.stride() for tensor in tensors]
    FullAverage(Recorder(CommLedger()), 52).average_(named(tensors))
    assert [tensor.stride() for tensor in tensors] == strides
    return [tensor.detach().clone().numpy() for tensor in tensors]


def test_every_memory_layout_is_averaged_in_place(run_ranks):
    base = torch.arange(2 * 3 * 4 * 5, dtype=torch.float32).view(2, 3, 4, 5) + 50
    for got in run_ranks(_average_layouts, world_size=2):
        expected = [base, base.transpose(0, 2), base[:, 1:, ::2], torch.complex(base, -base), torch.tensor(1.5), base]
        for mine, mean in zip(got, expected, strict=True):
            torch.testing.assert_close(torch.from_numpy(mine), mean, rtol=0, atol=0)


def _broadcast(rank, bucket_bytes):
    tensors = [
        torch.full((3,), rank, dtype=torch.int64),
        torch.full((2, 2), rank == 0, dtype=torch.bool),
        torch.tensor(rank + 0.5, dtype=torch.float64),
        torch.full((5,), rank, dtype=torch.int8)[::2],
    ]
    ledger = CommLedger()
    broadcast_(tensors, Recorder(ledger), "buffers", bucket_bytes)
    return [tensor.tolist() for tensor in tensors], ledger.payload_bytes(), ledger.messages()


@pytest.mark.parametrize(("bucket_bytes", "expected"), [(1000, 1), (5, 8)])
def test_broadcast_carries_every_type(run_ranks, bucket_bytes, expected):
    for values, payload_bytes, messages in run_ranks(_broadcast, bucket_bytes, world_size=3):
        assert messages == expected
        assert values == [[0, 0, 0], [[True, True], [True, True]], 0.5, [0, 0, 0]]
        assert payload_bytes == 3 * 8 + 4 + 8 + 3


def _extra_memory(rank, bucket_bytes):
    # counts what averaging allocates for itself, the first and the second time
    sizes = []
    real_empty = torch.empty

    def counting_empty(*args, **kwargs):
        tensor = real_empty(*args, **kwargs)
        sizes.append(tensor.numel() * tensor.element_size())
        return tensor

    tensors = [torch.randn(5000), torch.randn(77), torch.randn(30, dtype=torch.float64)]
    averager = FullAverage(Recorder(CommLedger()), bucket_bytes)
    torch.empty = counting_empty
    try:
        for _ in range(2):
            averager.average_(named(tensors))
    finally:
        torch.empty = real_empty
    return sizes


def test_extra_memory_is_three_buckets_kept_for_the_next_time(run_ranks):
    for sizes in run_ranks(_extra_memory, 4096, world_size=2):
        assert sizes == [4096, 4096, 4096]


def _sampled(rank):
    torch.manual_seed(rank)
    tensors = [torch.randn(300, 200), torch.randn(50_000, dtype=torch.float64) * 3]
    own = [tensor.double().clone() for tensor in tensors]
    drift = FullAverage(Recorder(CommLedger()), 2**20).average_(named(tensors)).read()
    exact = sum(float((a - b.double()).square().sum()) for a, b in zip(own, tensors, strict=True))
    return drift.distance_sq, exact, drift.relative


def test_the_drift_of_large_tensors_is_estimated_from_a_sample(run_ranks):
    for estimate, exact, relative in run_ranks(_sampled, world_size=2):
        assert estimate == pytest.approx(exact, rel=0.1)
        assert relative == pytest.approx(
            1.0, rel=0.1
        )  # two independent draws are as far from their mean as it is from 0


@pytest.mark.parametrize("bad", [0, -1, float("nan"), float("inf"), "8", True, 1e-9])
def test_a_bad_bucket_size_is_named_with_its_value(bad):
    with pytest.raises(ValueError, match="`bucket_mib`") as caught:
        Averaging(bucket_mib=bad)
    assert repr(bad) in str(caught.value)
    assert "4 is a good size" in str(caught.value)


def test_the_number_of_ranks_is_what_it_seems(run_ranks):
    assert run_ranks(lambda rank: dist.get_world_size(), world_size=3) == [3, 3, 3]
