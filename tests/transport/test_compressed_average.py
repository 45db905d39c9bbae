"""Compressed averaging on the wire, against a single process that does the arithmetic of all ranks by hand."""

import math
from functools import cache

import pytest
import torch
from support.differences import BY_HAND, SHAPES, in_memory_order, moved, start
from support.model_averages import Model
from support.processes import one_launch
from torch import nn

from lightning_comm.core.ledger import CommLedger
from lightning_comm.transport.averaging import Averaging
from lightning_comm.transport.compressed_average import CompressedAverage
from lightning_comm.transport.compression.base import Compression
from lightning_comm.transport.compression.cast import Cast
from lightning_comm.transport.compression.full import Full
from lightning_comm.transport.compression.int8 import Int8
from lightning_comm.transport.compression.no_sync import NoSync
from lightning_comm.transport.compression.power_sgd import PowerSGD
from lightning_comm.transport.compression.sparse_mask import SparseMask
from lightning_comm.transport.compression.ternary import Ternary
from lightning_comm.transport.compression.top_k import TopK
from lightning_comm.transport.recording import Recorder

NUMEL = sum(math.prod(shape) for shape in SHAPES.values())
SLOTS = sum(math.prod(shape) > 0 for shape in SHAPES.values())
ROUNDS = 4
METHODS = [Cast("bf16"), Int8(), TopK(0.1)]


def numpy(tensors):
    return {name: tensor.detach().clone().contiguous().numpy() for name, tensor in tensors.items()}


def _rounds(rank, compression, bucket_bytes):
    ledger = CommLedger()
    averager = CompressedAverage(Recorder(ledger), compression, bucket_bytes)
    weights = start()
    weights["b.weight"] = weights["b.weight"].contiguous(memory_format=torch.channels_last)
    pointers = [tensor.data_ptr() for tensor in weights.values()]
    averager.references.restart(weights)
    history = []
    for step in range(ROUNDS):
        moved(weights, rank, step)
        before = numpy(weights)
        averager.average_(weights)
        state = averager.state_dict()["reference"]
        history.append((before, numpy(weights), {name: row.clone().numpy() for name, row in state.items()}))
    assert [tensor.data_ptr() for tensor in weights.values()] == pointers, "averaging moved a tensor"
    return history, ledger.payload_bytes(), ledger.purposes


@cache
def rounds(world_size):
    """All cases of this file, in one launch: by compression and bytes of a bucket."""
    cases = [(compression, size) for compression in METHODS for size in (8, 300, 10**6)]
    if world_size == 2:
        cases += [(Full(), 300), (PowerSGD(1), 300)]
    return one_launch(_rounds, cases, world_size=world_size)


# ---- the same by hand ------------------------------------------------------------------------------------------------


@cache
def in_one_process(compression: Compression, world_size: int):
    """Weights of all ranks and the reference after each round, as rows in the order of memory."""
    rounds_of_all = _in_one_process(compression, world_size)  # which goes on with the tensors that it yields
    return [([_copy(each) for each in after], _copy(reference)) for after, reference in rounds_of_all]


def _copy(tensors):
    return {name: tensor.clone() for name, tensor in tensors.items()}


def _in_one_process(compression: Compression, world_size: int):
    weights = [start() for _ in range(world_size)]
    reference = {name: in_memory_order(name, tensor).clone() for name, tensor in weights[0].items()}
    for step in range(ROUNDS):
        for rank in range(world_size):
            moved(weights[rank], rank, step)
        after = [{} for _ in range(world_size)]
        for name in SHAPES:
            rows = [in_memory_order(name, each[name]) for each in weights]
            differences = [row - reference[name] for row in rows]
            if not len(rows[0]):
                continue
            sent, mean = BY_HAND[type(compression)](differences, name, step)
            reference[name] = reference[name] + mean
            for rank in range(world_size):
                after[rank][name] = reference[name] + (differences[rank] - sent[rank])
                view = torch.empty_like(weights[rank][name])
                if name == "b.weight":
                    view = view.permute(0, 2, 3, 1)
                    weights[rank][name] = after[rank][name].view(view.shape).permute(0, 3, 1, 2).contiguous()
                else:
                    weights[rank][name] = after[rank][name].view(view.shape)
        yield after, reference


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("bucket_bytes", [8, 300, 10**6], ids=["one-parameter", "some", "all"])
@pytest.mark.parametrize("compression", METHODS, ids=repr)
def test_ranks_do_what_one_process_does_for_all_whatever_the_bucket(compression, bucket_bytes, world_size):
    answers = rounds(world_size)[compression, bucket_bytes]
    # where three numbers are summed in 16 bits, the order of the sum is the backend's
    close = {"rtol": 0, "atol": 0.02 if isinstance(compression, Cast) and world_size > 2 else 0}
    for step, (weights, reference) in enumerate(in_one_process(compression, world_size)):
        for rank, (history, *_) in enumerate(answers):
            _, after, held = history[step]
            for name in weights[rank]:
                got = in_memory_order(name, torch.from_numpy(after[name]))
                torch.testing.assert_close(got, weights[rank][name], **close, msg=f"{name} of {rank} at {step}")
                torch.testing.assert_close(torch.from_numpy(held[name]), reference[name], **close)
                assert (held[name] == answers[0][0][step][2][name]).all(), "references differ"
        assert not (answers[0][0][step][1]["c.weight"] == answers[1][0][step][1]["c.weight"]).all(), "nothing dropped"


def largest_move_of_the_mean(answers, step):
    moves = []
    for name in SHAPES:
        before, after = (
            torch.stack([torch.from_numpy(history[step][k][name]).double() for history, *_ in answers]).mean(0)
            for k in (0, 1)
        )
        moves += (after - before).abs().flatten().tolist()
    return max(moves)


@pytest.mark.parametrize(
    ("compression", "bound"),
    [
        (Full(), 1e-6),
        (TopK(0.1), 1e-6),
        (PowerSGD(1), 1e-6),
        (Cast("bf16"), 2**-8),  # the sum is rounded to 8 bits, and it is below 1
        (Int8(), 1 / 127),  # by less than one step of the second rounding, for differences below 1
    ],
    ids=repr,
)
def test_the_mean_of_the_ranks_weights_stays_but_for_the_rounding_of_sums(compression, bound):
    answers = rounds(2)[compression, 300]
    assert max(largest_move_of_the_mean(answers, step) for step in range(ROUNDS)) < bound


def test_nothing_dropped_leaves_ranks_equal():
    for history, *_ in (answers := rounds(2)[Full(), 300]):
        for name in SHAPES:
            torch.testing.assert_close(history[-1][1][name], answers[0][0][-1][1][name], rtol=0, atol=1e-6)


@pytest.mark.parametrize("world_size", [2, 3])
def test_payload_is_what_the_formula_says(world_size):
    kept = sum(max(1, math.ceil(0.1 * math.prod(s))) for s in SHAPES.values() if math.prod(s))
    part = -(-NUMEL // world_size)
    formulas = {
        Cast("bf16"): 2 * NUMEL,
        TopK(0.1): 8 * kept,
        Int8(): world_size * (part + 4 * SLOTS) + part,
    }
    for compression, expected in formulas.items():
        for _, payload_bytes, purposes in rounds(world_size)[compression, 10**6]:
            assert payload_bytes == ROUNDS * expected, compression
            assert purposes == ["parameters"]


def _saved_and_loaded(rank, compression):
    whole, *_ = _rounds(rank, compression, 300)
    weights, first = start(), CompressedAverage(Recorder(CommLedger()), compression, 300)
    first.references.restart(weights)
    for step in range(ROUNDS):
        moved(weights, rank, step)
        first.average_(weights)
        again = CompressedAverage(Recorder(CommLedger()), compression, 300)
        again.load_state_dict(first.state_dict(), weights, same=True)
        first = again
    assert all((whole[-1][1][name] == tensor.numpy()).all() for name, tensor in weights.items() if name != "b.weight")
    return True


@pytest.mark.parametrize("compression", [*METHODS, PowerSGD(1)], ids=repr)
def test_a_saved_state_goes_on_bit_for_bit(run_ranks, compression):
    assert run_ranks(_saved_and_loaded, compression, world_size=2) == [True, True]


# ---- a model --------------------------------------------------------------------------------------------------------


def _freeze_and_unfreeze(rank):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))
    model[2].bias.requires_grad_(False)
    averages = Model(model, Averaging(bucket_mib=1e-4, compression=TopK(0.1)))
    averages.average.begin_round(equal=True)
    layouts, seen = [], []

    def train_and_average():
        with torch.no_grad():
            for k, parameter in enumerate(p for p in model.parameters() if p.requires_grad):
                parameter += torch.randn(parameter.shape, generator=torch.Generator().manual_seed(100 * rank + k))
        model[1].running_mean.fill_(rank)
        layouts.append(averages.tensors.layout())
        averages.average.average()
        seen.append(numpy(model.state_dict()))

    train_and_average()
    model[0].weight.requires_grad_(False)  # between two rounds, while ranks differ in it
    model[2].bias.requires_grad_(True)
    averages.average.begin_round()
    train_and_average()
    averages.average.begin_round()
    train_and_average()
    averages.average.average(in_full=True)
    seen.append(numpy(model.state_dict()))
    return layouts, seen


def test_a_frozen_parameter_is_averaged_in_full_once_and_an_unfrozen_one_gets_a_reference(run_ranks):
    (layouts, one), (same_layouts, two) = run_ranks(_freeze_and_unfreeze, world_size=2)
    assert layouts == same_layouts
    assert len(set(layouts)) == 3
    equal = [{name for name in one[k] if (one[k][name] == two[k][name]).all()} for k in range(4)]
    assert "0.weight" not in equal[0]
    assert "1.running_mean" in equal[0]
    assert {"0.weight", "2.bias"} <= equal[1]
    assert "0.weight" in equal[2]
    assert "2.bias" not in equal[2]
    assert equal[3] == set(one[3])


def _narrow(rank):
    tensors = {
        "half": torch.ones(40, dtype=torch.bfloat16),
        "double": torch.ones(30, dtype=torch.float64),
        "complex": torch.ones(5, dtype=torch.complex64),
        "holes": torch.ones(6, 8)[:, ::2],
    }
    averager = CompressedAverage(Recorder(CommLedger()), Cast("bf16"), 64)
    averager.references.restart(tensors)
    for tensor in tensors.values():
        tensor.add_(rank)
    averager.average_(tensors)
    return {name: tensor.to(torch.complex128).numpy() for name, tensor in tensors.items()}


def test_every_type_and_layout_is_brought_together(run_ranks):
    for got in run_ranks(_narrow, world_size=3):
        for name, values in got.items():
            assert (abs(values - 2) < 0.02).all(), name


# ---- what a user gives -----------------------------------------------------------------------------------------------


def test_a_word_is_short_for_a_compression():
    assert Averaging(compression="bf16") == Averaging(compression=Cast("bf16"))
    assert Averaging(compression="int8").method == Int8()
    assert Averaging(compression=["sparse_mask", "bf16"]).method == SparseMask(then=Cast("bf16"))
    assert Averaging().method is None


@pytest.mark.parametrize(
    ("bad", "must_say"),
    [
        (NoSync(), ["NoSync()", "never meet", "FixedPeriod"]),
        ("no_sync", ["NoSync()", "never meet", "FixedPeriod"]),
        (Ternary(), ["Ternary()", "ever further apart", "Int8()"]),
        (["sparse_mask", "ternary"], ["Ternary()", "ever further apart", "Int8()"]),
        ("bf61", ["'bf61'", "'bf16'"]),
        (8, ["got 8", "Cast('bf16')"]),
        (["bf16", "int8"], ["Int8()", "SparseMask()", "cannot follow"]),
    ],
)
def test_a_compression_that_cannot_be_used_is_named_with_a_way_out(bad, must_say):
    with pytest.raises(ValueError, match="Averaging: `compression`") as caught:
        Averaging(compression=bad)
    assert [word for word in must_say if word not in str(caught.value)] == []
