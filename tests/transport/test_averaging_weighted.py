"""Weighted averages on the wire: against exact arithmetic, and what stays when ranks count for different shares."""

import math
from datetime import timedelta
from fractions import Fraction
from functools import cache

import pytest
import torch
from support.differences import BY_HAND, SHAPES, in_memory_order, moved, named, start
from support.model_averages import Background, Model
from support.processes import one_launch, start_ranks
from torch import nn

from lightning_comm.core.ledger import CommLedger
from lightning_comm.transport.averaging import Averaging, FullAverage
from lightning_comm.transport.compression.cast import Cast
from lightning_comm.transport.compression.full import Full
from lightning_comm.transport.compression.int8 import Int8
from lightning_comm.transport.compression.power_sgd import PowerSGD
from lightning_comm.transport.compression.top_k import TopK
from lightning_comm.transport.recording import Recorder, another_group

ROUNDS = 3
SHARES = {2: (0.75, 0.25), 3: (0.5, 0.375, 0.125)}
NOBODYS = {2: (1.0, 0.0), 3: (0.625, 0.0, 0.375)}  # a rank without samples
UNEVEN = {2: (5 / 7, 2 / 7), 3: (0.7, 0.1, 0.2)}
EQUAL = {n: (1 / n,) * n for n in (2, 3)}
UNWEIGHTED = {n: (None,) * n for n in (2, 3)}
SIZES = (3, 2, 7, 1, 0, 40)


# ---- in full ---------------------------------------------------------------------------------------------------------


def inputs(rank: int, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    gen = torch.Generator().manual_seed(rank)
    return [torch.randn(n, generator=gen, dtype=torch.float64).to(dtype) for n in SIZES]


def exact_mean(weights: list[float], entries: list[float]) -> float:
    """In rational numbers, which round nothing."""
    return float(
        sum(Fraction(w) * Fraction(x) for w, x in zip(weights, entries, strict=True)) / sum(map(Fraction, weights))
    )


def _average(rank, weights, bucket_bytes, dtype):
    tensors, ledger = inputs(rank, dtype), CommLedger()
    pointers = [tensor.data_ptr() for tensor in tensors]
    drift = FullAverage(Recorder(ledger), bucket_bytes).average_(named(tensors), weights[rank] if weights else None)
    assert [tensor.data_ptr() for tensor in tensors] == pointers, "averaging moved a tensor"
    return (
        [tensor.double().numpy() for tensor in tensors],
        tuple(drift.read()),
        [r.payload_bytes for r in ledger.records],
    )


BUCKETS = {"one-entry": 8, "splits": 40, "all": 10_000}


@cache
def averages(world_size):
    shares = (None, SHARES[world_size], NOBODYS[world_size], UNEVEN[world_size])
    cases = [(weights, bucket_bytes, torch.float64) for weights in shares for bucket_bytes in BUCKETS.values()]
    return one_launch(_average, cases, world_size=world_size)


@pytest.mark.parametrize("world_size", [pytest.param(2, marks=pytest.mark.exhaustive), 3])
@pytest.mark.parametrize("shares", [SHARES, NOBODYS, UNEVEN], ids=["powers-of-two", "a-rank-without", "uneven"])
@pytest.mark.parametrize("bucket_bytes", BUCKETS.values(), ids=BUCKETS)
def test_every_tensor_becomes_the_weighted_mean_whatever_the_bucket(bucket_bytes, shares, world_size):
    weights = shares[world_size]
    own = [torch.cat(inputs(rank)) for rank in range(world_size)]
    means = [exact_mean(weights, entries) for entries in zip(*(row.tolist() for row in own), strict=True)]
    expected = torch.tensor(means, dtype=torch.float64)
    answers = averages(world_size)[weights, bucket_bytes, torch.float64]
    plain = averages(world_size)[None, bucket_bytes, torch.float64]
    for rank, (got, drift, messages) in enumerate(answers):
        for mine, theirs in zip(got, answers[0][0], strict=True):
            assert (mine == theirs).all(), "ranks differ"
        torch.testing.assert_close(torch.cat([torch.from_numpy(row) for row in got]), expected, rtol=0, atol=1e-12)
        assert drift[0] == pytest.approx(float((own[rank] - expected).square().sum()))
        assert drift[1] == pytest.approx(float(expected.square().sum()))
        assert messages == plain[rank][2]
        assert any((mine != theirs).any() for mine, theirs in zip(got, plain[rank][0], strict=True))


def _narrow(rank, weights):
    # 256 + 1 has no bf16, so scaling or summing in bf16 would round it away
    tensor = torch.tensor([256.0 if rank == 0 else 2.0] * 30, dtype=torch.bfloat16)
    FullAverage(Recorder(CommLedger()), 24).average_(named([tensor]), weights[rank])
    return tensor.double().tolist()


def test_narrow_types_are_scaled_and_summed_in_float32(run_ranks):
    weights = [1 - 2**-7, 2**-7]
    expected = float(torch.tensor(256 * weights[0] + 2 * weights[1], dtype=torch.bfloat16))
    for got in run_ranks(_narrow, weights, world_size=2):
        assert got == [expected] * 30


# ---- by differences --------------------------------------------------------------------------------------------------


COMPRESSIONS = [Full(), TopK(0.1), PowerSGD(1), Cast("bf16"), Int8()]
COMPRESSED_OR_NOT = [Full(), TopK(0.1), Int8()]


def doubles(tensors):
    """Entries in the order of memory, as numpy arrays, which queues can carry."""
    return {name: in_memory_order(name, tensor).double().numpy() for name, tensor in tensors.items()}


def references(averager):
    return {name: row.double().numpy() for name, row in averager.state_dict()["reference"].items()}


def _rounds(rank, group, compression, weights, bucket_bytes):
    """Rounds in which ranks count for other shares than in the one before: what was there before, after, and known."""
    ledger, background = CommLedger(), group is not None
    recorder = Recorder(ledger, group, beside_compute=background, hold=background)
    averager = Background(recorder, compression, bucket_bytes)
    own = start()
    own["b.weight"] = own["b.weight"].contiguous(memory_format=torch.channels_last)
    averager.references.restart(own)
    history = []
    for step in range(ROUNDS):
        moved(own, rank, step)
        before = doubles(own)
        weight = weights[(rank + step) % len(weights)]
        if background:
            averager.depart(own, weight)
            if step == 1:  # saved and restored in flight
                state, averager = averager.state_dict(), Background(recorder, compression, bucket_bytes)
                averager.load_state_dict(state, own)
            copies = {name: tensor.clone() for name, tensor in own.items() if name != "a.bias"}
            averager.correct_(copies)
            averager.land_(own)
            assert all(torch.equal(copies[name], own[name]) for name in copies), "landing is not what was foreseen"
        else:
            averager.average_(own, weight)
        history.append((before, doubles(own), references(averager)))
    return history, [record.payload_bytes for record in ledger.records]


def _all_rounds(rank, background, cases):
    group = another_group(timedelta(seconds=30)) if background else None
    return [_rounds(rank, group, *case) for case in cases]


@cache
def rounds(world_size, background):
    """What the tests ask for of one way, in one launch: by compression, weights and bytes of a bucket."""
    powers_of_two, a_rank_without, uneven, equal, unweighted = (
        shares[world_size] for shares in (SHARES, NOBODYS, UNEVEN, EQUAL, UNWEIGHTED)
    )
    cases = [(each, weights, 300) for each in COMPRESSIONS for weights in (a_rank_without, uneven)]
    cases += [(each, weights, 300) for each in COMPRESSED_OR_NOT for weights in (powers_of_two, equal, unweighted)]
    cases += [(Full(), weights, size) for weights in (powers_of_two, a_rank_without, uneven) for size in (8, 10**6)]
    answers = start_ranks(_all_rounds, background, cases, world_size=world_size, timeout_s=150)
    return {case: [of_rank[number] for of_rank in answers] for number, case in enumerate(cases)}


# `make test` has three ranks with a blocking average and two with one in the background
WITH_TWO_OR_THREE = [
    (2, True),
    (3, False),
    pytest.param(2, False, marks=pytest.mark.exhaustive),
    pytest.param(3, True, marks=pytest.mark.exhaustive),
]
WAYS = pytest.mark.parametrize(("world_size", "background"), WITH_TWO_OR_THREE)
IN_THE_OPEN = pytest.mark.parametrize("world_size", [pytest.param(2, marks=pytest.mark.exhaustive), 3])


def weighted(answers, weights, step, which, name):
    shift = [weights[(rank + step) % len(weights)] for rank in range(len(answers))]
    return sum(w * history[step][which][name] for w, (history, _) in zip(shift, answers, strict=True))


@WAYS
@pytest.mark.parametrize("shares", [SHARES, NOBODYS, UNEVEN], ids=["powers-of-two", "a-rank-without", "uneven"])
@pytest.mark.parametrize("bucket_bytes", [8, 10**6], ids=["one-parameter", "all"])
def test_nothing_dropped_leaves_every_rank_at_the_weighted_mean(bucket_bytes, shares, world_size, background):
    weights = shares[world_size]
    answers = rounds(world_size, background)[Full(), weights, bucket_bytes]
    for step in range(ROUNDS):
        for name in SHAPES:
            mean = weighted(answers, weights, step, 0, name)
            for history, _ in answers:
                assert abs(history[step][1][name] - mean).max(initial=0) < 2e-6, f"{name} in round {step}"
                assert (history[step][2][name] == answers[0][0][step][2][name]).all(), "references differ"


@IN_THE_OPEN
def test_in_the_open_nothing_dropped_leaves_ranks_equal_to_the_bit(world_size):
    answers = rounds(world_size, False)[Full(), UNEVEN[world_size], 300]
    for step in range(ROUNDS):
        for name in SHAPES:
            assert all((history[step][1][name] == answers[0][0][step][1][name]).all() for history, _ in answers)


@WAYS
@pytest.mark.parametrize("shares", [NOBODYS, UNEVEN], ids=["a-rank-without", "uneven"])
@pytest.mark.parametrize(
    ("compression", "bound"),
    [
        (Full(), 2e-6),
        (TopK(0.1), 2e-6),
        (PowerSGD(1), 2e-6),
        (Cast("bf16"), 2**-7),  # sums are rounded to 8 bits, and they are below 2
        (Int8(), 3 / 127),  # by less than one step of the second rounding, for scaled differences below 3
    ],
    ids=repr,
)
def test_the_weighted_mean_of_the_weights_stays_but_for_the_rounding_of_sums(
    compression, bound, shares, world_size, background
):
    weights = shares[world_size]
    answers = rounds(world_size, background)[compression, weights, 300]
    for step in range(ROUNDS):
        for name in SHAPES:
            before, after = (weighted(answers, weights, step, which, name) for which in (0, 1))
            assert abs(after - before).max(initial=0) < bound, f"{name} in round {step}"
    apart = [(a[1]["c.weight"] != b[1]["c.weight"]).any() for a, b in zip(answers[0][0], answers[1][0], strict=True)]
    assert any(apart) or isinstance(compression, Full), "nothing was dropped"


@WAYS
@pytest.mark.parametrize("compression", [TopK(0.1), Int8(), Cast("bf16"), PowerSGD(1)], ids=repr)
def test_a_rank_without_samples_takes_up_the_reference(compression, world_size, background):
    weights = NOBODYS[world_size]
    answers = rounds(world_size, background)[compression, weights, 300]
    for step in range(ROUNDS):
        idle = next(rank for rank in range(world_size) if weights[(rank + step) % world_size] == 0)
        _, after, reference = answers[idle][0][step]
        for name in SHAPES:
            assert abs(after[name] - reference[name]).max(initial=0) < 1e-6, f"{name} in round {step}"


@IN_THE_OPEN
@pytest.mark.parametrize("compression", COMPRESSED_OR_NOT, ids=repr)
def test_ranks_do_what_one_process_does_for_all(compression, world_size):
    weights = SHARES[world_size]
    answers = rounds(world_size, False)[compression, weights, 300]
    for step in range(ROUNDS):
        scales = [world_size * weights[(rank + step) % world_size] for rank in range(world_size)]
        for name in (name for name in SHAPES if math.prod(SHAPES[name])):
            known = in_memory_order(name, start()[name])
            if step:
                known = torch.from_numpy(answers[0][0][step - 1][2][name]).float()
            rows = [torch.from_numpy(history[step][0][name]).float() - known for history, _ in answers]
            sent, mean = BY_HAND[type(compression)]([a * row for a, row in zip(scales, rows, strict=True)], name, step)
            for (history, _), a, row, s in zip(answers, scales, rows, sent, strict=True):
                wanted = known + mean + (row - s / a)
                got = torch.from_numpy(history[step][1][name]).float()
                torch.testing.assert_close(got, wanted, rtol=0, atol=2e-6, msg=f"{name} in round {step}")


@WAYS
@pytest.mark.parametrize("compression", COMPRESSED_OR_NOT, ids=repr)
def test_equal_weights_are_what_no_weights_are_to_the_bit(compression, world_size, background):
    runs = rounds(world_size, background)
    plain, equal, uneven = (runs[compression, shares[world_size], 300] for shares in (UNWEIGHTED, EQUAL, UNEVEN))
    for (one, bytes_one), (two, bytes_two), (_, bytes_three) in zip(plain, equal, uneven, strict=True):
        assert bytes_one == bytes_two == bytes_three
        for a, b in zip(one, two, strict=True):
            assert all((a[1][name] == b[1][name]).all() and (a[2][name] == b[2][name]).all() for name in SHAPES)


# ---- a model --------------------------------------------------------------------------------------------------------


def _model(rank, weights, overlap):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)).double()
    background = another_group(timedelta(seconds=30))
    averaging = Averaging(bucket_mib=40 / 2**20, overlap_steps=int(overlap))
    shadow = nn.Linear(2, 2).double()
    averages = Model(
        model, averaging, weight_averages=lambda: {"0": shadow}, background=background if overlap else None
    )
    averages.average.begin_round(equal=True)
    momentum = torch.full((5,), float(rank), dtype=torch.float64)

    def train(step):
        generator = torch.Generator().manual_seed(10 * rank + step)
        with torch.no_grad():
            for tensor in [*model.parameters(), model[1].running_mean, *shadow.parameters()]:
                tensor += torch.randn(tensor.shape, generator=generator, dtype=torch.float64)

    def state():
        return {name: t.detach().clone().numpy() for name, t in [*model.state_dict().items(), *shadows()]}

    def shadows():
        return [(f"shadow.{name}", tensor) for name, tensor in shadow.named_parameters()]

    train(0)
    first = state()
    if overlap:
        averages.depart(weights[rank])
    else:
        averages.average.average(weights[rank])
    averages.average.average_optimizer_state([momentum], weights[rank])
    train(1)
    second = state()
    averages.temporary.enter("checkpoint", weights[1 - rank], broadcast=False)
    saved = state()
    averages.temporary.leave()
    averages.temporary.enter("evaluation", weights[1 - rank])
    inside = state()
    averages.temporary.leave()
    assert all((row == second[name]).all() for name, row in state().items()), "an evaluation left a trace"
    if overlap:
        averages.overlapped.land()
    return first, second, saved, inside, state(), momentum.tolist()


@pytest.mark.parametrize("overlap", [False, True], ids=["blocking", "in-flight"])
def test_evaluations_and_checkpoints_weigh_each_round_by_its_own_shares(run_ranks, overlap):
    weights = [0.7, 0.3]
    one, two = run_ranks(_model, weights, overlap, world_size=2)
    for name in one[0]:
        if "tracked" in name:
            continue
        mean = 0.7 * one[0][name] + 0.3 * two[0][name]
        # a second round of other shares, from the mean of the first, whether that has landed or not
        moves = [(each[4][name] if overlap else each[1][name]) - mean for each in (one, two)]
        own = [each[1][name] for each in (one, two)]
        in_open = "running" in name or "shadow" in name
        average = 0.3 * own[0] + 0.7 * own[1] if in_open else mean + 0.3 * moves[0] + 0.7 * moves[1]
        for each in (one, two):
            assert abs(each[3][name] - average).max() < 1e-12, name
            assert abs(each[2][name] - average).max() < 1e-12, name
    assert one[5] == two[5] == pytest.approx([0.3] * 5)
