"""What error feedback remembers of before a mean was thrown away, and the numbers near the limits of a type."""

import pytest
import torch
from support.mock_cuda import mock_cuda
from transport.compression.test_compressions import LAYOUT, SHAPES, codec_of, cut, entries

from lightning_comm.transport.compression.base import Codec, Context, Layout, Slot, StartedMessage, run_alone
from lightning_comm.transport.compression.cast import Cast
from lightning_comm.transport.compression.feedback import Feedback
from lightning_comm.transport.compression.int8 import Int8
from lightning_comm.transport.compression.power_sgd import PowerSGD
from lightning_comm.transport.compression.rounding import round_stochastically
from lightning_comm.transport.compression.sparse_mask import SparseMask
from lightning_comm.transport.compression.ternary import Ternary
from lightning_comm.transport.compression.top_k import TopK
from lightning_comm.transport.recording import Recorder

ONE, OTHER = "a.weight", "c.weight"
THEN = [Int8(), TopK(0.1)]


def revocable(compression):
    codec, ledger = codec_of(compression)
    context = Context(Recorder(ledger), "gradients", revocable=True)
    codec = compression.codec(context)
    if isinstance(compression, SparseMask):
        torch.manual_seed(0)
        parameters = {name: torch.nn.Parameter(torch.randn(shape)) for name, shape in SHAPES.items()}
        masks = {name: torch.rand(shape) < 0.5 for name, shape in SHAPES.items() if len(shape) > 1}
        codec.install(masks, parameters.items())
    return codec


def step(codec, number, rank, layouts=(LAYOUT,)):
    codec.begin_step()
    for layout in layouts:
        run_alone(codec.mean(entries(rank, number, layout), layout))
    codec.end_step()


def kept(codec, *, live=True):
    """The residuals, not as a checkpoint would have them, or as it would."""
    inner = getattr(codec, "_inner", codec)
    rows = inner._residuals if live else inner.state_dict()["residuals"]
    return {name: row.clone() for name, row in rows.items()}


def _taken_back(rank, compression):
    codec = revocable(compression)
    step(codec, 0, rank)
    codec.applied(SHAPES)
    first = kept(codec)
    step(codec, 1, rank)
    second = kept(codec)
    step(codec, 2, rank, cut(2))  # DDP has cut its buckets anew
    third = kept(codec)
    said = [
        all(not torch.equal(a[name], b[name]) for name in (ONE, OTHER)) for a, b in ((first, second), (second, third))
    ]
    said.append(codec.unapplied == set(SHAPES))
    saved = kept(codec, live=False)
    said.append(all(torch.equal(saved[name], first[name]) for name in SHAPES))
    codec.take_back([ONE], last_only=True)
    said.append(torch.equal(kept(codec)[ONE], second[ONE]) and torch.equal(kept(codec)[OTHER], third[OTHER]))
    codec.rescale(2.0)
    codec.take_back([ONE, "no such parameter"])
    now = kept(codec)
    said.append(torch.equal(now[ONE], 2 * first[ONE]) and torch.equal(now[OTHER], 2 * third[OTHER]))
    codec.applied([OTHER])
    codec.take_back([OTHER])
    said.append(torch.equal(kept(codec)[OTHER], 2 * third[OTHER]))
    said.append(codec.unapplied == set(SHAPES) - {ONE, OTHER})
    return said


def _each(rank, fn, compressions):
    return [fn(rank, compression) for compression in compressions]


def test_what_was_kept_before_the_last_mean_or_before_all_since_a_step_comes_back(run_ranks):
    compressions = [*THEN, PowerSGD(2), *(SparseMask(then=then) for then in THEN)]
    for answers in run_ranks(_each, _taken_back, compressions, world_size=2):
        assert dict(zip(map(repr, compressions), answers, strict=True)) == {repr(c): [True] * 8 for c in compressions}


def _not_finite_elsewhere(rank, compression):
    codec = revocable(compression)
    step(codec, 0, rank)
    before = kept(codec)
    spoilt = entries(rank, 1)
    if rank == 1:
        spoilt[40] = torch.nan  # in a.bias
    run_alone(codec.mean(spoilt, LAYOUT))
    after = kept(codec)
    return torch.equal(before["a.bias"], after["a.bias"]), torch.equal(before[OTHER], after[OTHER])


def test_a_mean_that_is_not_finite_leaves_the_residual_also_on_ranks_that_sent_finite_numbers(run_ranks):
    answers = run_ranks(_each, _not_finite_elsewhere, [*THEN, PowerSGD(2)], world_size=2)
    assert answers == [[(True, False)] * 3] * 2


EXACTNESS = {"Int8": 2.5 / 127, "Ternary": 1.0, "TopK": 0.0, "PowerSGD": 1e-5, "Cast": 2**-7}
LIMITS = {
    torch.float32: [1e-36, 3e37],  # a largest entry of 3.6e-36 is 127 scales whose inverse has no room
    torch.float64: [1e-60, 1e60],  # beyond what float32 can hold
    torch.float16: [1e-4, 1e4],
    torch.bfloat16: [1e-36, 1e37],
}


def _at_the_limits(rank, compression):
    layout = Layout((Slot("w", 48, (8, 6)), Slot("v", 7, (7,))))
    # the same on all ranks, of rank 1 where it is a matrix
    matrix = torch.outer(torch.linspace(-1, 1, 8), torch.linspace(0.5, 2, 6)).reshape(-1)
    entries = torch.cat([matrix, torch.linspace(-2, 3, 7)]).double()
    worst = {}
    for dtype, scales in LIMITS.items():
        for scale in scales:
            codec, _ = codec_of(compression, feedback=False)
            given = (scale * entries).to(dtype)
            values = given.clone()
            run_alone(codec.mean(values, layout))
            worst[str(dtype), scale] = float((values.double() - given.double()).abs().max() / (3 * scale))
    return worst


def test_equal_gradients_near_the_limits_of_their_type_have_themselves_as_the_mean(run_ranks):
    compressions = [Int8(), Ternary(), TopK(1.0), PowerSGD(1), Cast("bf16")]
    for answers in run_ranks(_each, _at_the_limits, compressions, world_size=3):
        found = [
            (c, *case, error) for c, worst in zip(compressions, answers, strict=True) for case, error in worst.items()
        ]
        for compression, dtype, scale, error in found:
            if isinstance(compression, Cast) and (dtype, scale) in (("torch.float64", 1e-60), ("torch.float64", 1e60)):
                continue  # 16 bits have no room for these
            rounding = {"torch.float16": 2**-9, "torch.bfloat16": 2**-6}.get(dtype, 1e-6)
            assert error <= EXACTNESS[type(compression).__name__] + rounding, (compression, dtype, scale)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_rounding_is_unbiased_in_narrow_types_and_for_the_smallest_scales(dtype):
    draw = torch.Generator().manual_seed(1)
    for scale in (1.0, 3e-5 if dtype == torch.float16 else 1e-38):
        for share in (100.25, -63.5, 0.25):
            given = torch.full((2**16,), share * scale).to(dtype)
            exact = float(given[0].double()) / scale
            rounded = round_stochastically(given, torch.tensor(scale), 127, draw)
            assert abs(float(rounded.double().mean()) - exact) < 0.02, (scale, share)


def _spoilt_on(rank, device):
    """Residuals after a step in which one parameter of rank 1 is NaN, and another one's mean too large."""
    codec, _ = codec_of(TopK(0.1))
    for number in range(2):
        values = entries(rank, number)
        if number == 1:
            rows = dict(zip(SHAPES, LAYOUT.split(values), strict=True))
            rows["b.weight"][5] = torch.nan if rank == 1 else 1.0
            rows["a.bias"][0] = torch.inf
        values = values.to(device)
        codec.begin_step()
        run_alone(codec.mean(values, LAYOUT))
        codec.end_step()
    return {name: row.cpu().numpy() for name, row in codec.state_dict()["residuals"].items()}


class Leaves(Codec):
    """Sends halves, and leaves halves; of one parameter, on one rank, what is left is infinite."""

    def mean(self, values, layout, sent=None):
        sent.copy_(values.mul_(0.5))
        if self.context.recorder.rank == 1:
            layout.split(sent)[1][0] = -torch.inf
        yield StartedMessage(self.context.recorder.all_reduce(values.mul_(0.5), "gradients"))


def _left_on(rank, device):
    _, ledger = codec_of(TopK(0.1))
    codec = Feedback(Leaves(Context(Recorder(ledger), "gradients")))
    rows = []
    for number in range(2):
        run_alone(codec.mean(entries(rank, number).to(device), LAYOUT))
        rows.append({name: row.cpu().numpy() for name, row in codec.state_dict()["residuals"].items()})
    return rows


def _left(rank):
    here = _left_on(rank, "cpu")
    with mock_cuda():
        return here, _left_on(rank, "cuda")


def test_what_is_left_is_restored_by_the_same_rule_on_every_device_and_by_the_rank_alone(run_ranks):
    spoilt = list(SHAPES)[1]
    for rank, (here, there) in enumerate(run_ranks(_left, world_size=2)):
        for one, other in zip(here, there, strict=True):
            assert all((one[name] == other[name]).all() for name in SHAPES)
        for row in here:
            assert {name for name in SHAPES if not row[name].any()} == ({spoilt} if rank == 1 else set())


def _spoilt(rank):
    here = _spoilt_on(rank, "cpu")
    with mock_cuda() as device:
        there = _spoilt_on(rank, "cuda")
        return here, there, [wait.where for wait in device.waits if wait.own]


def test_a_device_restores_the_residuals_that_the_processor_does_and_the_host_does_not_wait(run_ranks):
    for here, there, waits in run_ranks(_spoilt, world_size=2):
        assert all((here[name] == there[name]).all() for name in SHAPES)
        assert all(torch.from_numpy(row).isfinite().all() for row in there.values())
        assert waits == []
