"""Every compression on the wire, against its formula, its theorem, and plain arithmetic in float64."""

import itertools
from functools import cache

import pytest
import torch
import torch.distributed as dist
from support.grids import few_of
from support.processes import one_launch

from lightning_comm.core.compression.payload import parts, sent_bytes
from lightning_comm.core.ledger import CommLedger
from lightning_comm.transport.compression.base import Compression, Context, Layout, Slot, run_alone
from lightning_comm.transport.compression.cast import Cast
from lightning_comm.transport.compression.full import Full
from lightning_comm.transport.compression.int8 import Int8
from lightning_comm.transport.compression.names import BY_NAME, compression_of
from lightning_comm.transport.compression.no_sync import NoSync
from lightning_comm.transport.compression.power_sgd import PowerSGD
from lightning_comm.transport.compression.rounding import round_stochastically
from lightning_comm.transport.compression.ternary import Ternary
from lightning_comm.transport.compression.top_k import TopK
from lightning_comm.transport.recording import Recorder

SHAPES = {"a.weight": (7, 5), "a.bias": (7,), "b.weight": (4, 3, 3, 3), "one": (1,), "c.weight": (13, 11)}
LAYOUT = Layout(tuple(Slot(name, torch.Size(shape).numel(), shape) for name, shape in SHAPES.items()))
WHOLE = [Full(), Cast("bf16"), Cast("fp16"), Int8(), TopK(0.1), Ternary(), PowerSGD(2), NoSync()]
WITH_FEEDBACK = [Int8(), TopK(0.1), PowerSGD(2)]
UNBIASED = [Int8(), Ternary()]


def name_of(compression):
    return repr(compression)


def entries(rank, step=0, layout=LAYOUT):
    """Each parameter's entries come from its name, so that they do not depend on the layout."""
    rows = [
        torch.randn(
            slot.numel, generator=torch.Generator().manual_seed(abs(hash((slot.numel, slot.shape, rank, step))) % 2**31)
        )
        for slot in layout.slots
    ]
    return torch.cat(rows)


def codec_of(compression, *, feedback=True, seed=0):
    ledger = CommLedger()
    return compression.codec(Context(Recorder(ledger), "gradients", seed, feedback)), ledger


def _one_step(rank, compression, feedback):
    codec, ledger = codec_of(compression, feedback=feedback)
    values = entries(rank)
    sent = torch.full_like(values, torch.nan)
    run_alone(codec.mean(values, LAYOUT, sent))
    payload = ledger.payload_bytes()
    return values.numpy(), sent.numpy(), payload, ledger.wire_bytes()


@cache
def one_step(world_size):
    """A step of every compression with feedback and without, in one launch."""
    cases = [(compression, feedback) for compression in WHOLE for feedback in (False, True)]
    return one_launch(_one_step, cases, world_size=world_size)


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("compression", WHOLE, ids=name_of)
def test_all_ranks_get_the_mean_of_what_they_sent(compression, world_size):
    answers = one_step(world_size)[compression, False]
    mean_sent = torch.stack([torch.from_numpy(sent).double() for _, sent, *_ in answers]).mean(0)
    for values, *_ in answers:
        if compression == NoSync():
            continue
        assert (values == answers[0][0]).all(), "ranks differ"
        close = {"rtol": 1e-5, "atol": 1e-6}
        if isinstance(compression, Cast):
            close = {"rtol": 0.02, "atol": 0.02}  # sums are rounded to 16 bits as well
        if isinstance(compression, Int8):
            close = {"rtol": 0, "atol": 4 / 127}  # the second rounding, by less than one step of at most 3.x / 127
        torch.testing.assert_close(torch.from_numpy(values).double(), mean_sent, **close)


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("compression", WHOLE, ids=name_of)
def test_payload_is_what_the_formula_says(compression, world_size):
    word = next((word for word, make in BY_NAME.items() if type(make()) is type(compression)), "full")
    # tests/core/compression/test_payload.py counts these by hand
    shapes, settings = list(SHAPES.values()), {"ratio": 0.1, "rank": 2}
    formula = sum(part.payload_bytes for part in parts(word, shapes, world_size, **settings))
    for *_, payload, wire in one_step(world_size)[compression, True]:
        assert payload == formula
        assert wire == sent_bytes(word, shapes, world_size, **settings)


@pytest.mark.parametrize("compression", [c for c in WHOLE if c != NoSync()], ids=name_of)
def test_a_method_is_exact_where_it_says_so_and_only_there(compression):
    exact = torch.stack([entries(rank).double() for rank in range(2)]).mean(0)
    for values, *_ in one_step(2)[compression, False]:
        error = float((torch.from_numpy(values).double() - exact).abs().max())
        assert (error < 1e-6) == compression.exact


@pytest.mark.parametrize("compression", [Full(), Cast("bf16"), Cast("fp16")], ids=name_of)
def test_what_is_sent_whole_is_the_mean_within_the_precision_of_its_type(compression):
    exact = torch.stack([entries(rank).double() for rank in range(3)]).mean(0)
    unit = {"Full()": 2**-23, "Cast(dtype='bf16')": 2**-8, "Cast(dtype='fp16')": 2**-11}[repr(compression)]
    for values, *_ in one_step(3)[compression, False]:
        torch.testing.assert_close(torch.from_numpy(values).double(), exact, rtol=0, atol=4 * 3 * unit)


def _cast_and_torch(rank):
    from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
    from torch.nn.parallel import DistributedDataParallel

    from lightning_comm.transport.ddp_hook import GradientSync

    answers = []
    for dtype, torchs in (("bf16", default_hooks.bf16_compress_hook), ("fp16", default_hooks.fp16_compress_hook)):
        for ours in (True, False):
            torch.manual_seed(0)
            model = torch.nn.Sequential(torch.nn.Linear(20, 30), torch.nn.ReLU(), torch.nn.Linear(30, 4))
            ddp = DistributedDataParallel(model, bucket_cap_mb=0.001)
            if ours:
                codec, ledger = codec_of(Cast(dtype))
                ddp.register_comm_hook(None, GradientSync(codec, Recorder(ledger), model.named_parameters()).hook)
            else:
                ddp.register_comm_hook(None, torchs)
            ddp(torch.randn(8, 20, generator=torch.Generator().manual_seed(rank))).square().sum().mul(
                50
            ).backward()  # no subnormal numbers in fp16
            answers.append([parameter.grad.numpy() for parameter in model.parameters()])
    return answers


def test_a_cast_on_two_ranks_is_torchs_own_bit_for_bit(run_ranks):
    for ours_bf16, torchs_bf16, ours_fp16, torchs_fp16 in run_ranks(_cast_and_torch, world_size=2):
        for ours, theirs in ((ours_bf16, torchs_bf16), (ours_fp16, torchs_fp16)):
            assert all((a == b).all() for a, b in zip(ours, theirs, strict=True))


def _residual(codec):
    return torch.cat([codec.state_dict()["residuals"][slot.name] for slot in LAYOUT.slots])


def _feedback(rank, compression):
    codec, _ = codec_of(compression)
    before, worst = torch.zeros(LAYOUT.numel), 0.0
    for step in range(4):
        gradient = entries(rank, step)
        values, sent = gradient.clone(), torch.empty(LAYOUT.numel)
        codec.begin_step()
        run_alone(codec.mean(values, LAYOUT, sent))
        codec.end_step()
        after = _residual(codec)
        worst = max(worst, float((gradient + before - (sent + after)).abs().max()))
        before = after
    return worst, float(before.abs().max())


@pytest.mark.parametrize("compression", WITH_FEEDBACK, ids=name_of)
def test_gradient_and_residual_are_what_is_sent_and_the_new_residual(run_ranks, compression):
    for worst, residual in run_ranks(_feedback, compression, world_size=2):
        assert residual > 0.01  # or the identity would be about nothing
        assert worst < 4e-6


def _mean_over_steps(rank, compression, steps, copies):
    """The mean over steps of parameters that are there several times in one bucket, and over those."""
    codec, _ = codec_of(compression, feedback=False)
    slots = [Slot(f"{slot.name} {copy}", slot.numel, slot.shape) for copy in range(copies) for slot in LAYOUT.slots]
    layout, own = Layout(tuple(slots)), entries(rank).repeat(copies)
    total = torch.zeros(LAYOUT.numel, dtype=torch.float64)
    for _ in range(steps):
        values = own.clone()
        codec.begin_step()
        run_alone(codec.mean(values, layout))
        codec.end_step()
        total += values.view(copies, -1).double().sum(0)
    return (total / (steps * copies)).numpy()


@pytest.mark.slow
@pytest.mark.parametrize("compression", UNBIASED, ids=name_of)
def test_the_expectation_of_an_unbiased_method_is_the_mean(run_ranks, compression):
    steps, copies, ranks = 25, 8, 2
    draws = ranks * steps * copies
    exact = torch.stack([entries(rank).double() for rank in range(ranks)]).mean(0)
    # one draw lies within a step of the entry: scale for Ternary, scale / 127 and once more that for Int8. Its
    # standard deviation is at most half the step. The mean of all draws lies beyond 6.5 of its own in fewer than 2 of
    # 10^9 cases (Hoeffding), so that one of all entries does so in fewer than one of 10^6. For Int8 this is a quarter
    # of a step, where a rounding to the nearest is half a step off; what is smaller shows in the next test.
    largest = torch.stack([row.abs().max() for rank in range(ranks) for row in LAYOUT.split(entries(rank))])
    scale = float(largest.max())
    step = scale if compression == Ternary() else 2 * scale / 127
    bound = 6.5 * 0.5 * step / draws**0.5 * (1 if compression == Ternary() else 2**0.5)
    for mean in run_ranks(_mean_over_steps, compression, steps, copies, world_size=ranks):
        assert float((torch.from_numpy(mean) - exact).abs().max()) < bound


def test_rounding_keeps_the_expectation_to_within_2_to_the_minus_17():
    draw = torch.Generator().manual_seed(1)
    for value in (0.001, 0.5, 0.7309, -0.25):
        rounded = round_stochastically(torch.full((2**20,), value), torch.tensor(1.0), 127, draw)
        deviation = (abs(value) % 1 * (1 - abs(value) % 1) / 2**20) ** 0.5
        assert abs(float(rounded.double().mean()) - value) < 5 * deviation + 2**-17
        assert set(rounded.tolist()) <= {float(torch.tensor(value).floor()), float(torch.tensor(value).ceil())}


SWAPPED = Layout(tuple(reversed(LAYOUT.slots)))


def _layouts(rank, compression, cut_after):
    """The same two steps, with one bucket in the model's order, or two buckets the other way round."""
    codec, _ = codec_of(compression)
    steps = []
    for step in range(2):
        codec.begin_step()
        got = {}
        layouts = [LAYOUT] if cut_after is None or step == 0 else cut(cut_after)
        for layout in layouts:
            values = entries(rank, step, layout)
            run_alone(codec.mean(values, layout))
            got |= {slot.name: row.tolist() for slot, row in zip(layout.slots, layout.split(values), strict=True)}
        codec.end_step()
        steps.append(got)
    return steps


def cut(after):
    return [Layout(SWAPPED.slots[:after]), Layout(SWAPPED.slots[after:])]


@pytest.mark.parametrize(
    ("compression", "world_size"),  # each with buckets, and a ring in which the order of sums differs with both kinds
    few_of(itertools.product([Full(), Int8(), TopK(0.1), Ternary(), PowerSGD(2)], [2, 3]), 0, 3, 4, 6, 9),
    ids=name_of,
)
def test_how_parameters_are_cut_into_buckets_changes_nothing(run_ranks, compression, world_size):
    whole = run_ranks(_layouts, compression, None, world_size=world_size)
    in_parts = run_ranks(_layouts, compression, 2, world_size=world_size)
    exactly = world_size == 2 or not isinstance(compression, (Full, PowerSGD))  # the order of sums in a ring
    for one, other in zip(whole, in_parts, strict=True):
        for step in range(2):
            for name in SHAPES:
                if exactly:
                    assert one[step][name] == other[step][name], (step, name)
                else:
                    assert one[step][name] == pytest.approx(other[step][name], rel=1e-4, abs=1e-6)


def _resumed(rank, compression):
    codec, _ = codec_of(compression)
    for step in range(2):
        codec.begin_step()
        run_alone(codec.mean(entries(rank, step), LAYOUT))
        codec.end_step()
    state = codec.state_dict()
    other, _ = codec_of(compression)
    other.load_state_dict(state)
    results = []
    for each, layouts in ((codec, [LAYOUT]), (other, cut(3))):
        got = {}
        each.begin_step()
        for layout in layouts:
            values = entries(rank, 2, layout)
            run_alone(each.mean(values, layout))
            got |= {slot.name: row.tolist() for slot, row in zip(layout.slots, layout.split(values), strict=True)}
        each.end_step()
        results.append(got)
    return results


@pytest.mark.parametrize("compression", WHOLE, ids=name_of)
def test_a_resumed_codec_goes_on_bit_for_bit_also_with_other_buckets(run_ranks, compression):
    for went_on, resumed in run_ranks(_resumed, compression, world_size=2):
        assert went_on == resumed


def _not_finite(rank, compression, bad):
    codec, _ = codec_of(compression)
    spoilt = entries(rank)
    if rank == 1:
        spoilt[40] = bad  # in a.bias
    codec.begin_step()
    run_alone(codec.mean(spoilt, LAYOUT))
    codec.end_step()
    codec.begin_step()
    after = entries(rank, 1)
    run_alone(codec.mean(after, LAYOUT))
    codec.end_step()
    return torch.isfinite(LAYOUT.split(spoilt)[1]).all().item(), torch.isfinite(after).all().item(), spoilt.numpy()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("compression", [c for c in WHOLE if c != NoSync()], ids=name_of)
def test_an_entry_that_is_not_finite_shows_on_all_ranks_and_is_gone_at_the_next_step(run_ranks, compression, bad):
    answers = run_ranks(_not_finite, compression, bad, world_size=2)
    for was_finite, is_finite, spoilt in answers:
        assert not was_finite
        assert is_finite
        assert ((spoilt == answers[0][2]) | (spoilt != spoilt)).all()


def _zeros(rank, compression):
    codec, _ = codec_of(compression)
    results = []
    for values in (torch.zeros(LAYOUT.numel), entries(rank)):
        codec.begin_step()
        run_alone(codec.mean(values, LAYOUT))
        codec.end_step()
        results.append((float(values.abs().max()), bool(torch.isfinite(values).all())))
    return results


@pytest.mark.parametrize("compression", WHOLE, ids=name_of)
def test_a_gradient_of_zeros_stays_zero_and_spoils_nothing(run_ranks, compression):
    for zeros, after in run_ranks(_zeros, compression, world_size=2):
        assert zeros == (0.0, True)
        assert after[0] > 0.1
        assert after[1]


def _power_sgd_of_rank_one(rank):
    layout = Layout((Slot("w", 12, (4, 3)),))
    codec, _ = codec_of(PowerSGD(1), feedback=False)
    left, right = torch.arange(1.0, 5.0), torch.tensor([1.0, -2.0, 0.5])
    values = (torch.outer(left, right) * (rank + 1)).reshape(-1)
    run_alone(codec.mean(values, layout))
    return values.tolist(), (torch.outer(left, right) * 1.5).reshape(-1).tolist()


def test_power_sgd_sends_a_matrix_of_its_rank_exactly(run_ranks):
    for got, mean in run_ranks(_power_sgd_of_rank_one, world_size=2):
        assert got == pytest.approx(mean, rel=1e-5)


def _top_k_by_hand(rank):
    layout = Layout((Slot("w", 5, (5,)),))
    codec, _ = codec_of(TopK(0.4), feedback=False)
    values = torch.tensor([[5.0, -4.0, 3.0, 2.0, 1.0], [1.0, 2.0, 3.0, -4.0, 5.0]][rank])
    run_alone(codec.mean(values, layout))
    return values.tolist()


def test_top_k_adds_up_what_each_rank_chose(run_ranks):
    for got in run_ranks(_top_k_by_hand, world_size=2):
        assert got == [2.5, -2.0, 0.0, -2.0, 2.5]


def _too_many_ranks(rank):
    context = Context(Recorder(CommLedger()), "gradients")
    context.recorder.members.ranks = tuple(range(128))
    try:
        Ternary().codec(context)
    except ValueError as error:
        return str(error)
    return ""


def test_ternary_refuses_more_ranks_than_8_bits_can_sum(run_ranks):
    for said in run_ranks(_too_many_ranks, world_size=2):
        assert "127 ranks; got 128" in said
        assert "Int8" in said


def test_words_stand_for_compressions():
    assert {word: type(compression_of(word, "here")).__name__ for word in BY_NAME} == {
        "bf16": "Cast",
        "fp16": "Cast",
        "int8": "Int8",
        "powersgd": "PowerSGD",
        "topk": "TopK",
        "ternary": "Ternary",
        "sparse_mask": "SparseMask",
        "no_sync": "NoSync",
    }
    assert compression_of(TopK(0.5), "here") == TopK(0.5)
    assert all(isinstance(compression_of(word, "here"), Compression) for word in BY_NAME)


@pytest.mark.parametrize(
    ("make", "parts"),
    [
        (lambda: compression_of("pf16", "There"), ("There", "'pf16'", "Did you mean 'fp16'?")),
        (lambda: compression_of(7, "There"), ("There", "got 7", "Cast('bf16')")),
        (lambda: Cast("fp8"), ("Cast", "`dtype`", "'fp8'", "'bf16'")),
        (lambda: TopK(0.0), ("TopK", "`ratio`", "0.0", "0.01")),
        (lambda: TopK(5), ("TopK", "`ratio`", "5", "0.01")),
        (lambda: PowerSGD(0), ("PowerSGD", "`rank`", "0", "1 to 4")),
        (lambda: PowerSGD(1.5), ("PowerSGD", "`rank`", "1.5", "1 to 4")),
    ],
)
def test_bad_arguments_are_named_with_a_way_out(make, parts):
    with pytest.raises(ValueError) as caught:  # noqa: PT011  (the lines below read all of it)
        make()
    assert [part for part in parts if part not in str(caught.value)] == []


def test_the_group_of_these_tests_is_gone_again():
    assert not dist.is_initialized()


def _alone(rank):
    for size in (6, 7, 9):
        layout = Layout((Slot("a", size, (size,)),))
        for compression in WHOLE:
            codec, _ = codec_of(compression)
            values = entries(0, layout=layout)
            run_alone(codec.mean(values, layout))
            assert bool(torch.isfinite(values).all()), (compression, size)


def test_a_group_of_one_synchronises_buckets_of_any_size(run_ranks):
    run_ranks(_alone, world_size=1)
