"""What every way to average keeps to: the same list for averages in full and for compressed ones that drop nothing."""

import pytest
import torch

from lightning_comm.core.ledger import CommLedger
from lightning_comm.ondevice.share import Share
from lightning_comm.transport.averaging import Average, FullAverage
from lightning_comm.transport.compressed_average import CompressedAverage
from lightning_comm.transport.compression.full import Full
from lightning_comm.transport.recording import Recorder

COUNTS = [3, 0, 2]
WAYS = ("in full", "differences")


def tensors(rank):
    draw = torch.Generator().manual_seed(rank)
    found = {
        "matrix": torch.randn(7, 5, generator=draw),
        "double": torch.randn(9, generator=draw, dtype=torch.float64),
        "half": torch.randn(6, generator=draw).bfloat16(),
        "image": torch.randn(2, 3, 4, 4, generator=draw).contiguous(memory_format=torch.channels_last),
        "transposed": torch.randn(4, 6, generator=draw).t(),
        "strided": torch.randn(8, 6, generator=draw)[::2, 1::2],
        "empty": torch.zeros(0, 3),
        "one": torch.randn((), generator=draw),
    }
    return found | {"expanded": torch.randn(3, 1, generator=draw).expand(3, 5)}


def average_of(way, ledger) -> Average:
    recorder = Recorder(ledger)
    if way == "in full":
        return FullAverage(recorder, 64)
    average = CompressedAverage(recorder, Full(), 64)
    average.references.restart(tensors(7))
    return average


def _average(rank, way, weights):
    """Every way is given the same tensors; what comes of them, and what was sent."""
    results = []
    for moderate in (False, True):
        ledger, own = CommLedger(), tensors(rank)
        pointers = [tensor.data_ptr() for tensor in own.values()]
        average = average_of(way, ledger)
        drift = average.average_(own, None if weights is None else weights(rank), moderate=moderate).read()
        assert [tensor.data_ptr() for tensor in own.values()] == pointers, "averaging moved a tensor"
        nothing = average.average_({}).read()
        sent = [(record.kind, record.purpose, record.payload_bytes) for record in ledger.records]
        results.append(({name: t.double().numpy() for name, t in own.items()}, drift, nothing, sent))
    return results


def share(rank):
    return Share.of(COUNTS, rank)


@pytest.mark.parametrize("weights", [None, share], ids=["equal", "weighed"])
@pytest.mark.parametrize("way", WAYS)
def test_every_way_brings_all_ranks_to_the_mean_and_keeps_storage_order_and_counts(run_ranks, way, weights):
    answers = run_ranks(_average, way, weights, world_size=3)
    counts = [1, 1, 1] if weights is None else COUNTS
    inputs = [{name: t.double() for name, t in tensors(rank).items()} for rank in range(3)]
    numel = {name: tensor.numel() for name, tensor in tensors(0).items()} | {"expanded": 3}
    for looking, trusting in answers:
        for name, got in looking[0].items():
            mean = sum(c * each[name] for c, each in zip(counts, inputs, strict=True)) / sum(counts)
            close = {"rtol": 0.02, "atol": 0.02} if name == "half" else {"rtol": 1e-5, "atol": 1e-6}
            torch.testing.assert_close(torch.from_numpy(got), mean, **close, msg=f"{name} by {way}")
            assert (got == trusting[0][name]).all(), "what ranks know of large entries changed the result"
            assert (got == answers[0][0][0][name]).all(), "ranks are not equal"
        assert looking[1].relative > 0
        assert looking[1] == pytest.approx(trusting[1])
        assert looking[2] == (0.0, 0.0), "of nothing"
        assert looking[3] == trusting[3] == answers[0][0][3], "ranks sent other messages"
        assert {kind for kind, *_ in looking[3]} == {"all_reduce"}
        assert {purpose for _, purpose, _ in looking[3]} == {"parameters"}
        assert sum(each for *_, each in looking[3]) == sum(
            n * (8 if name == "double" else 4) for name, n in numel.items()
        )


def _equal(rank, way):
    ledger, own = CommLedger(), tensors(3)
    average_of(way, ledger).average_(own, share(rank))
    return all(torch.equal(tensor, before) for tensor, before in zip(own.values(), tensors(3).values(), strict=True))


def test_in_full_equal_numbers_stay_equal_bit_for_bit(run_ranks):
    assert run_ranks(_equal, "in full", world_size=3) == [True] * 3


def _nothing_counts(rank, way):
    own = tensors(rank)
    if rank == 1:  # of weight 0
        own["matrix"].fill_(1e30)
    average_of(way, CommLedger()).average_(own, share(rank))
    return own["matrix"].tolist()


@pytest.mark.parametrize("way", WAYS)
def test_a_rank_of_weight_0_contributes_nothing_whatever_it_holds(run_ranks, way):
    answers = run_ranks(_nothing_counts, way, world_size=3)
    mean = (3 * tensors(0)["matrix"] + 2 * tensors(2)["matrix"]) / 5
    torch.testing.assert_close(torch.tensor(answers[0]), mean)
    torch.testing.assert_close(torch.tensor(answers[2]), mean)
    if way == "in full":
        assert answers[1] == answers[0]
