"""Averages of numbers near the limits of their type, against rational numbers."""

import itertools
import math
from fractions import Fraction

import pytest
import torch
from support.differences import named
from support.model_averages import Background, Model
from support.processes import start_ranks
from torch import Tensor, nn

from lightning_comm.core.ledger import CommLedger
from lightning_comm.ondevice.flat import Drift, DriftSum, drift_of
from lightning_comm.ondevice.share import Share
from lightning_comm.transport.averaging import Averaging, FullAverage
from lightning_comm.transport.compression.cast import Cast
from lightning_comm.transport.compression.full import Full
from lightning_comm.transport.compression.int8 import Int8
from lightning_comm.transport.compression.power_sgd import PowerSGD
from lightning_comm.transport.compression.top_k import TopK
from lightning_comm.transport.cyclic.buffers import mean_of_rows
from lightning_comm.transport.recording import Recorder

TYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
COUNTS = {2: [7, 3], 3: [5, 1, 11], 5: [3, 17, 1, 0, 2]}
OF_CONSTANTS = [(2, True), (3, False), (3, True)]  # numbers of ranks, and whether they are weighted


def extremes(dtype: torch.dtype) -> Tensor:
    """The largest, the smallest and some in between, of both signs."""
    info = torch.finfo(dtype)
    smallest = info.smallest_normal * info.eps  # a subnormal with one digit
    some = [info.max, info.max / 2, info.smallest_normal, smallest, 3 * smallest, 0.1, 1 / 3, 0.0, math.inf]
    return torch.tensor([*some, *(-each for each in some), math.nan], dtype=torch.float64).to(dtype)


def bits(tensor: Tensor) -> list[int]:
    return tensor.view(BITS[tensor.element_size()]).tolist()


def averaged(entries: Tensor, weight: float | None, bucket_bytes: int = 72) -> tuple[Tensor, list[int]]:
    tensor, ledger = entries.clone(), CommLedger()
    FullAverage(Recorder(ledger), bucket_bytes).average_(named([tensor]), weight)
    return tensor, [record.payload_bytes for record in ledger.records]


def _everything(rank, world_size, exhaustive):
    """All that ranks do together in this module, in one start of them."""
    answers = {"finite": _finite(rank, world_size), "equal": _equal(rank, world_size)}
    answers |= {
        f"constants, weighted: {weighted}": _constants(rank, world_size, weighted)
        for weighted in (False, True)
        if exhaustive or (world_size, weighted) in OF_CONSTANTS
    }
    if world_size == 2:
        answers |= {"not finite": _not_finite(rank), "bytes": _bytes(rank)}
        answers |= {f"differences, weighted: {each}": _differences(rank, each) for each in (False, True)}
    if world_size == 3:
        answers["without weight"] = _without_weight(rank)
    return answers


@pytest.fixture(scope="module")
def answers_of(request):
    """The answers of all ranks to one question, from runs of 2, 3 or 5 of them that are made once."""
    known = {}

    def answers(question, world_size):
        if world_size not in known:
            exhaustive = request.config.getoption("exhaustive")
            known[world_size] = start_ranks(_everything, world_size, exhaustive, world_size=world_size)
        return [answers[question] for answers in known[world_size]]

    return answers


# ---- equal numbers ---------------------------------------------------------------------------------------------------


def _equal(rank, world_size):
    shares = [Share.of(COUNTS[world_size], rank), Share.of([1] * world_size, rank)]
    weights = [None, *shares]
    return [
        (str(dtype), None if weight is None else float(weight), bits(averaged(extremes(dtype), weight)[0]))
        for dtype in TYPES
        for weight in weights
    ]


@pytest.mark.parametrize("world_size", [2, 3, pytest.param(5, marks=pytest.mark.exhaustive)])
def test_the_mean_of_equal_numbers_is_that_number_to_the_bit(answers_of, world_size):
    expected = {str(dtype): extremes(dtype) for dtype in TYPES}
    for answers in answers_of("equal", world_size):
        for dtype, weight, got in answers:
            nan = expected[dtype].isnan().tolist()
            for mine, wanted, is_nan in zip(got, bits(expected[dtype]), nan, strict=True):
                assert is_nan or mine == wanted, f"{dtype}, weight {weight}"
            values = torch.tensor(got, dtype=BITS[expected[dtype].element_size()]).view(expected[dtype].dtype)
            assert values.isnan().tolist() == nan


def test_parts_of_equal_numbers_sum_to_them_in_any_order_and_are_close_to_what_the_weight_says():
    generator = torch.Generator().manual_seed(0)
    for dtype, trial in itertools.product((torch.float32, torch.float64), range(30)):
        info = torch.finfo(dtype)
        drawn = torch.randn(200, generator=generator, dtype=dtype)
        row = torch.cat([extremes(dtype), drawn, drawn * info.max / 8, drawn * info.smallest_normal])
        row = row[~row.isnan()]
        counts = torch.randint(0, 20, (2 + trial % 7,), generator=generator).tolist()
        if not sum(counts):
            continue
        parts = [row.clone() for _ in counts]
        for rank, part in enumerate(parts):
            share = Share.of(counts, rank)
            if share == 0:
                part.fill_(-0.0)
                continue
            share.part_(part)
            step = torch.nextafter(row.abs(), torch.tensor(0.0, dtype=dtype)).sub_(row.abs()).abs_()
            wrong = (part - row * float(share)).abs() > 3 * step
            assert not (wrong & row.isfinite()).any()
        order = torch.randperm(len(parts), generator=generator).tolist()
        total = parts[order[0]].clone()
        for k in order[1:]:
            total += parts[k]
        assert bits(total) == bits(row), counts


# ---- finite numbers --------------------------------------------------------------------------------------------------


def near_the_limit(rank: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(rank)
    largest = torch.finfo(dtype).max
    shares = 1 - torch.rand(23, generator=generator, dtype=torch.float64) ** 4
    signs = torch.where(torch.rand(23, generator=generator) < 0.2, -1.0, 1.0)
    top = torch.tensor([largest, largest], dtype=dtype)
    if rank:  # next to the largest, where a share may be rounded up
        top = torch.nextafter(top.float(), torch.zeros(2)).to(dtype) if dtype == torch.float32 else top
    return torch.cat([(shares * signs * largest).to(dtype), top])


def _finite(rank, world_size):
    found = []
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        for weight in (None, Share.of(COUNTS[world_size], rank), COUNTS[world_size][rank] / sum(COUNTS[world_size])):
            tensor, _ = averaged(near_the_limit(rank, dtype), weight)
            found.append((str(dtype), weight is not None, tensor.double().tolist()))
    return found


@pytest.mark.parametrize("world_size", [2, 3, pytest.param(5, marks=pytest.mark.exhaustive)])
def test_the_mean_of_finite_numbers_is_finite_and_right(answers_of, world_size):
    answers = answers_of("finite", world_size)
    for found in answers:
        for (dtype, weighted, got), (*_, first) in zip(found, answers[0], strict=True):
            assert got == first, "ranks differ"
            kind = getattr(torch, dtype.split(".")[1])
            counts = COUNTS[world_size] if weighted else [1] * world_size
            rows = [near_the_limit(rank, kind).double().tolist() for rank in range(world_size)]
            for entry, values in zip(got, zip(*rows, strict=True), strict=True):
                exact = sum(c * Fraction(v) for c, v in zip(counts, values, strict=True)) / sum(counts)
                assert math.isfinite(entry), (dtype, weighted, values)
                tolerance = Fraction(8 * world_size * torch.finfo(kind).eps) * max(abs(Fraction(v)) for v in values)
                assert abs(Fraction(entry) - exact) <= tolerance, (dtype, weighted, values)


def _without_weight(rank):
    entries = torch.tensor([1.5, -2.0, 7.0]) * (rank + 1)
    if rank == 1:
        entries = torch.tensor([math.inf, math.nan, torch.finfo(torch.float32).max])
    shares = averaged(entries, Share.of([3, 0, 1], rank))[0].tolist()
    return shares, averaged(entries, [0.75, 0.0, 0.25][rank])[0].tolist()


def test_a_rank_of_weight_0_contributes_nothing_whatever_it_holds(answers_of):
    for shares, plain in answers_of("without weight", 3):
        assert shares == pytest.approx([1.5 * 1.5, -2.0 * 1.5, 7.0 * 1.5], rel=1e-6)
        assert plain == pytest.approx(shares, rel=1e-6)


def _not_finite(rank):
    largest = torch.finfo(torch.float32).max
    rows = ([math.inf, 1.0], [math.nan, 1.0], [largest, -math.inf], [largest, largest], [math.inf, -math.inf])
    return [averaged(torch.tensor([row[rank]] * 3), None)[0].tolist() for row in rows]


def test_what_is_not_finite_on_a_rank_stays_so(answers_of):
    largest = torch.finfo(torch.float32).max
    for one, two, three, four, five in answers_of("not finite", 2):
        assert one == [math.inf] * 3
        assert all(math.isnan(entry) for entry in [*two, *five])
        assert three == [-math.inf] * 3
        assert four == [largest] * 3


def _bytes(rank):
    plain = torch.full((10,), 2.0)
    mask, large, mixed = plain.clone(), plain.clone(), plain.clone()
    mask[3:5] = -math.inf  # an attention's, on all ranks
    large[:3] = torch.finfo(torch.float32).max
    mixed[0], mixed[9] = -math.inf, torch.finfo(torch.float32).max
    return [averaged(entries, None, bucket_bytes=20)[1] for entries in (plain, mask, large, mixed)]


def test_one_number_more_for_a_bucket_with_infinite_sums_and_entries_again_where_a_sum_was_too_large(answers_of):
    for plain, mask, large, mixed in answers_of("bytes", 2):
        assert plain == [20, 20]
        assert sorted(mask) == [4, 20, 20]
        assert sorted(large) == [4, 3 * 4, 20, 20]
        assert sorted(mixed) == [4, 4, 4, 20, 20]  # a bucket of its own each: a question, and a question with an answer


# ---- buffers, moving averages, differences ---------------------------------------------------------------------------


class Masked(nn.Module):
    """Constants that models keep in buffers, and one that ranks hold apart."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))
        self.register_buffer("mask", torch.full((4, 4), torch.finfo(torch.float32).min).triu(1))
        self.register_buffer("causal", torch.full((4, 4), -math.inf).triu(1))
        self.register_buffer("frequencies", 10_000 ** -(torch.arange(9) / 9))
        self.register_buffer("scale", torch.tensor(0.7).expand(5))
        self.register_buffer("flags", torch.tensor([rank == 0, True]))
        self.register_buffer("mean", torch.full((2,), float(rank)))


def _constants(rank, world_size, weighted):
    module, shadow = Masked(rank), Masked(rank)
    before = {name: tensor.clone() for name, tensor in module.named_buffers()}
    averages = Model(module, Averaging(1e-4), weight_averages=lambda: {"0": shadow})
    averages.average.begin_round(equal=True)
    weight = Share.of(COUNTS[world_size], rank) if weighted else None
    for _ in range(3):
        averages.average.average(weight)
        averages.temporary.enter("evaluation", weight)
        averages.temporary.leave()
    same = [
        torch.equal(part.get_buffer(name), before[name])
        for part in (module, shadow)
        for name in ("mask", "causal", "frequencies", "scale")
    ]
    return same, module.flags.tolist(), module.mean.tolist(), shadow.mean.tolist()


@pytest.mark.parametrize(
    ("world_size", "weighted"),
    [
        *OF_CONSTANTS,
        *(
            pytest.param(*each, marks=pytest.mark.exhaustive)
            for each in itertools.product((2, 3, 5), (False, True))
            if each not in OF_CONSTANTS
        ),
    ],
)
def test_constants_in_buffers_stay_what_they_are_for_any_number_of_rounds(answers_of, world_size, weighted):
    counts = COUNTS[world_size] if weighted else [1] * world_size
    mean = sum(rank * count for rank, count in enumerate(counts)) / sum(counts)
    for same, flags, mine, of_shadow in answers_of(f"constants, weighted: {weighted}", world_size):
        assert all(same), same
        assert flags == [True, True], "from rank 0"
        assert mine == of_shadow == pytest.approx([mean] * 2, rel=1e-6)


def _differences(rank, weighted):
    largest, found = torch.finfo(torch.float32).max, {}
    for compression in (Full(), Cast("bf16"), Cast("fp16"), Int8(), TopK(0.5), PowerSGD(1)):
        for background in (False, True):
            averager = Background(Recorder(CommLedger()), compression, 64)
            first = torch.tensor([-largest, largest, 1.0, 0.0, -largest, 0.0]).view(2, 3)
            weights = {"a": first.clone(), "mask": torch.tensor([-math.inf, 0.0, largest])}
            averager.references.restart(weights)
            moved = torch.tensor([largest, -largest, 1.0 + rank, largest, largest * (1 - 2 * rank), 0.0]).view(2, 3)
            weights["a"].copy_(moved)
            weight = [0.75, 0.25][rank] if weighted else None
            if background:
                averager.depart(weights, weight)
                averager.land_(weights)
            else:
                averager.average_(weights, weight)
            references = {name: row.tolist() for name, row in averager.state_dict()["reference"].items()}
            found[f"{compression} {background}"] = {name: t.tolist() for name, t in weights.items()}, references
    return found


@pytest.mark.parametrize("weighted", [False, True])
def test_differences_beyond_the_limits_leave_finite_weights_and_equal_references(answers_of, weighted):
    answers = answers_of(f"differences, weighted: {weighted}", 2)
    for found in answers:
        for kind, (weights, references) in found.items():
            assert references == answers[0][kind][1], f"{kind}: references differ"
            assert all(map(math.isfinite, itertools.chain(*weights["a"]))), (kind, weights["a"])
            assert all(map(math.isfinite, references["a"])), kind
            assert weights["mask"] == references["mask"] == [-math.inf, 0.0, torch.finfo(torch.float32).max], kind


# ---- drift, rows -----------------------------------------------------------------------------------------------------


def test_a_drift_beyond_the_limits_is_infinite_and_no_error():
    far = torch.tensor([1e200, -1e200], dtype=torch.float64)
    drift = DriftSum(drift_of(2, far, -far)).read()
    assert drift.distance_sq == math.inf
    large = DriftSum(drift_of(1, torch.tensor([3e38]), torch.tensor([-3e37]))).read()
    assert large.distance_sq == pytest.approx(3.3e38**2, rel=1e-6)
    assert math.isnan(drift.plus(drift).relative)
    assert math.isnan(Drift(math.nan, math.nan).relative)
    assert Drift(1.0, 0.0).relative == 0.0


@pytest.mark.parametrize("dtype", TYPES)
def test_the_mean_of_rows_is_finite_where_they_are_and_exact_where_they_agree(dtype):
    same = extremes(dtype)
    for ranks in (2, 3, 5):
        got = mean_of_rows(torch.stack([same] * ranks))
        assert bits(got[:-1]) == bits(same[:-1])
        assert got[-1].isnan()
        rows = torch.stack([near_the_limit(rank, dtype) for rank in range(ranks)])
        means = mean_of_rows(rows).double().tolist()
        allowed = 2 * ranks * torch.finfo(dtype).eps * torch.finfo(dtype).max
        for mean, values in zip(means, zip(*rows.double().tolist(), strict=True), strict=True):
            assert math.isfinite(mean)
            assert abs(Fraction(mean) - sum(map(Fraction, values)) / ranks) <= allowed
    large = torch.complex(torch.full((2,), 3e38), torch.tensor([1.0, -3e38]))
    assert torch.equal(mean_of_rows(torch.stack([large] * 3)), large)
