"""Masked DDP is plain DDP with gradients masked by hand, bit for bit, and sends what the formula says."""

import contextlib
import itertools
from functools import cache

import pytest
import torch
from support.grids import few_of
from support.processes import one_launch
from torch.nn.parallel import DistributedDataParallel
from transport.test_ddp_hook import SMALL, Net, picture

from lightning_comm.core.compression.pruning_schedule import PruningSchedule
from lightning_comm.core.ledger import CommLedger
from lightning_comm.ondevice.pruning import MagnitudePruning, ModulePruning
from lightning_comm.transport.compression.base import Context, Layout, Slot, run_alone
from lightning_comm.transport.compression.cast import Cast
from lightning_comm.transport.compression.int8 import Int8
from lightning_comm.transport.compression.names import compression_of
from lightning_comm.transport.compression.no_sync import NoSync
from lightning_comm.transport.compression.power_sgd import PowerSGD
from lightning_comm.transport.compression.sparse_mask import SparseMask
from lightning_comm.transport.compression.ternary import Ternary
from lightning_comm.transport.compression.top_k import TopK
from lightning_comm.transport.ddp_hook import GradientSync
from lightning_comm.transport.recording import Recorder

MODES = {
    "default": {},
    "channels_last": {},
    "views": {"gradient_as_bucket_view": True},
    "static_graph": {"static_graph": True},
    "unused": {"find_unused_parameters": True},
    "no_sync": {},
    "views_channels_last_no_sync": {"gradient_as_bucket_view": True},
}


def _masked(rank, mode, dense_above, steps=6):
    """Train under masks: by hand where `dense_above` is `None`."""
    torch.manual_seed(0)
    model = Net()
    if "channels_last" in mode:
        model = model.to(memory_format=torch.channels_last)
    if mode != "unused":
        model.branch.requires_grad_(False)
    masks = MagnitudePruning(0.8).masks(model)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, mask in masks.items():
            parameters[name].masked_fill_(~mask, 0)
    ddp = DistributedDataParallel(model, bucket_cap_mb=SMALL, **MODES[mode])
    ledger = CommLedger()
    if dense_above is not None:
        recorder = Recorder(ledger)
        codec = SparseMask(dense_above=dense_above).codec(Context(recorder, "gradients"))
        codec.install(masks, parameters.items())
        ddp.register_comm_hook(None, GradientSync(codec, recorder, parameters.items()).hook)
    optimizer = torch.optim.AdamW([p for p in parameters.values() if p.requires_grad], lr=0.01)
    for step in range(steps):
        quiet = mode.endswith("no_sync") and step % 3 < 2
        with ddp.no_sync() if quiet else contextlib.nullcontext():
            ddp(picture(rank, step), branch=mode == "unused" and rank == 1).square().mean().backward()
        if not quiet:
            for name, mask in masks.items() if dense_above is None else ():
                if parameters[name].grad is not None:
                    parameters[name].grad.masked_fill_(~mask, 0)
            optimizer.step()
            optimizer.zero_grad()
    zero = all(bool((parameters[name].detach()[~mask] == 0).all()) for name, mask in masks.items())
    return [each.detach().clone().numpy() for each in parameters.values()], zero, ledger.payload_bytes()


GRID = list(itertools.product(MODES, (0.9, 0.0)))  # gathered, and dense
FEW = (0, 1, 6, 9, 12)  # of these: views, channels_last and no_sync by the mode that has all three


@cache
def masked(exhaustive):
    """All runs, in one launch: by mode and `dense_above`, which is `None` for a mask by hand."""
    pairs = [pair for number, pair in enumerate(GRID) if exhaustive or number in FEW]
    by_hand = [(mode, None) for mode in dict(pairs)]
    return one_launch(_masked, [*by_hand, *pairs], world_size=2)


@pytest.mark.parametrize(("mode", "dense_above"), few_of(GRID, *FEW), ids=str)
def test_masked_training_is_plain_ddp_with_gradients_masked_by_hand_bit_for_bit(request, mode, dense_above):
    runs = masked(request.config.getoption("exhaustive"))
    by_hand, ours = (runs[mode, above] for above in (None, dense_above))
    for (expected, *_), (got, zero, payload_bytes) in zip(by_hand, ours, strict=True):
        assert zero
        assert payload_bytes > 0
        assert all((a == b).all() for a, b in zip(expected, got, strict=True))


SHAPES = {"a.weight": (40, 25), "a.bias": (40,), "b.weight": (30, 40)}
LAYOUT = Layout(tuple(Slot(name, torch.Size(shape).numel(), shape) for name, shape in SHAPES.items()))
KEPT = {"a.weight": 250, "b.weight": 300}
CHAINS = [None, Cast("bf16"), Int8(), Ternary(), TopK(0.1)]


def masks_and_parameters():
    torch.manual_seed(5)
    parameters = {name: torch.nn.Parameter(torch.randn(shape)) for name, shape in SHAPES.items()}
    masks = {name: torch.zeros(SHAPES[name], dtype=torch.bool) for name in KEPT}
    for name, kept in KEPT.items():
        masks[name].view(-1)[torch.randperm(masks[name].numel())[:kept]] = True
    return masks, parameters


def _sent(rank, then, feedback):
    ledger = CommLedger()
    codec = SparseMask(then=then).codec(Context(Recorder(ledger), "gradients", feedback=feedback))
    masks, parameters = masks_and_parameters()
    codec.install(masks, parameters.items())
    generator = torch.Generator().manual_seed(rank)
    values = torch.randn(LAYOUT.numel, generator=generator)
    before, sent = values.clone(), torch.full_like(values, torch.nan)
    codec.begin_step()
    run_alone(codec.mean(values, LAYOUT, sent))
    codec.end_step()
    outside = torch.cat(
        [~masks[s.name].view(-1) if s.name in masks else torch.zeros(s.numel, dtype=torch.bool) for s in LAYOUT.slots]
    )
    return (
        values.numpy(),
        sent.numpy(),
        before.numpy(),
        outside.numpy(),
        ledger.payload_bytes(),
    )


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("then", CHAINS, ids=repr)
def test_a_chain_sends_what_the_formula_says_and_nothing_outside_the_mask(run_ranks, then, world_size):
    kept, slots = 250 + 40 + 300, 3
    part = -(-kept // world_size)
    formula = {
        "NoneType": 4 * kept,
        "Cast": 2 * kept,
        "Int8": world_size * (part + 4 * slots) + part,
        "Ternary": kept + 4 * slots,
        "TopK": 8 * (25 + 4 + 30),
    }[type(then).__name__]
    answers = run_ranks(_sent, then, False, world_size=world_size)
    mean_sent = torch.stack([torch.from_numpy(sent).double() for _, sent, *_ in answers]).mean(0)
    for values, sent, before, outside, counted in answers:
        assert counted == formula
        assert (values[outside] == 0).all()
        assert (sent[outside] == 0).all()
        assert (values == answers[0][0]).all(), "ranks differ"
        atol = {"Cast": 0.03, "Int8": 4 / 127}.get(type(then).__name__, 1e-5)
        torch.testing.assert_close(torch.from_numpy(values).double(), mean_sent, rtol=0, atol=atol)
        if then is None:
            assert (sent[~outside] == before[~outside]).all()


def _all_whole(rank, dense_above):
    return [_whole(rank, then, dense_above, masked) for then in CHAINS for masked in (True, False)]


def _whole(rank, then, dense_above, masked):
    """A bucket of which more than `dense_above` is kept, or without any masked parameter beside one that has some."""
    ledger = CommLedger()
    codec = SparseMask(then=then, dense_above=dense_above).codec(Context(Recorder(ledger), "gradients", feedback=False))
    masks, parameters = masks_and_parameters()
    layout = Layout(LAYOUT.slots if masked else LAYOUT.slots[1:2])
    values = [torch.randn(layout.numel, generator=torch.Generator().manual_seed(rank)) for _ in range(4)]
    counted = []
    for step, row in enumerate(values):
        if step == 1:
            codec.install(masks, parameters.items())
        if step == 3:
            codec.request_dense(1)
        codec.begin_step()
        run_alone(codec.mean(row, layout))
        codec.end_step()
        counted.append(ledger.payload_bytes() - sum(counted))
    return [row.numpy() for row in values], counted


def test_a_whole_bucket_goes_as_the_method_behind_the_mask_sends_it(run_ranks):
    gathered = run_ranks(_all_whole, 1.0, world_size=2)
    answers = run_ranks(_all_whole, 0.0, world_size=2)
    cases = [(then, masked) for then in CHAINS for masked in (True, False)]
    for number, (then, masked) in enumerate(cases):
        _check_whole(then, masked, [each[number] for each in answers], [each[number] for each in gathered])


def _check_whole(then, masked, answers, gathered):
    entries, kept = (1000 + 40 + 1200, 250 + 40 + 300) if masked else (40, 40)
    slots = 3 if masked else 1
    formula = {
        "NoneType": 4 * entries,
        "Cast": 2 * entries,
        # those that look at a whole row are given the kept entries, however DDP cuts its buckets
        "Int8": 2 * (kept // 2 + 4 * slots) + kept // 2,
        "Ternary": kept + 4 * slots,
        "TopK": 8 * (25 + 4 + 30 if masked else 4),
    }[type(then).__name__]
    for (means, counted), (others, *_) in zip(answers, gathered, strict=True):
        # exactly and in full before anything is pruned, and where that was asked for
        assert counted == [4 * entries, formula, formula, 4 * entries]
        assert (means[0] == means[3]).all()
        assert all((one == other).all() for one, other in zip(means, others, strict=True))


def _dense_on_request(rank):
    codec = SparseMask().codec(Context(Recorder(CommLedger()), "gradients"))
    masks, parameters = masks_and_parameters()
    codec.install(masks, parameters.items())
    codec.request_dense(2)
    zeros = []
    for step in range(4):
        values = torch.randn(LAYOUT.numel, generator=torch.Generator().manual_seed(10 * rank + step))
        codec.begin_step()
        run_alone(codec.mean(values, LAYOUT))
        codec.end_step()
        zeros.append(int((values == 0).sum()))
    return zeros


def test_asked_for_dense_gradients_it_sends_them_whole_for_so_many_steps(run_ranks):
    pruned = 1000 - 250 + 1200 - 300
    assert run_ranks(_dense_on_request, world_size=2) == [[0, 0, pruned, pruned]] * 2


def _narrowed(rank, then):
    codec = SparseMask(then=then).codec(Context(Recorder(CommLedger()), "gradients"))
    wide, parameters = masks_and_parameters()
    narrow = {name: mask & (torch.arange(mask.numel()).view(mask.shape) % 3 > 0) for name, mask in wide.items()}
    codec.install(wide, parameters.items())
    values = torch.randn(LAYOUT.numel, generator=torch.Generator().manual_seed(rank))
    run_alone(codec.mean(values, LAYOUT))
    left = residuals_in_full(codec, wide)
    saved = codec.state_dict()
    codec.install(narrow, parameters.items())
    moved = residuals_in_full(codec, narrow)
    run_alone(codec.mean(values, LAYOUT))
    resumed = SparseMask(then=then).codec(Context(Recorder(CommLedger()), "gradients"))
    resumed.load_state_dict(saved)
    resumed.install(wide, parameters.items())
    same = residuals_in_full(resumed, wide)
    outside = {name: narrow[name].view(-1) if name in narrow else torch.ones(40).bool() for name in left}
    return (
        all(torch.equal(moved[name], left[name] * outside[name]) for name in left),
        all(torch.equal(same[name], left[name]) for name in left),
        all(bool(each.any()) for each in moved.values()),
    )


def residuals_in_full(codec, masks):
    """What error feedback has kept, each entry where it belongs in its parameter."""
    rows = {}
    for name, row in codec.state_dict()["inner"]["residuals"].items():
        mask = masks[name].view(-1) if name in masks else torch.ones(SHAPES[name]).bool().view(-1)
        rows[name] = torch.zeros(mask.numel()).masked_scatter_(mask, row)
    return rows


@pytest.mark.parametrize("then", [Int8(), TopK(0.1)], ids=repr)
def test_residuals_follow_their_entries_when_masks_change(run_ranks, then):
    assert run_ranks(_narrowed, then, world_size=2) == [(True, True, True)] * 2


def _not_finite(rank):
    codec = SparseMask().codec(Context(Recorder(CommLedger()), "gradients"))
    masks, parameters = masks_and_parameters()
    codec.install(masks, parameters.items())
    first = masks["a.weight"].view(-1)
    found = []
    for place in (int(first.nonzero()[0]), int((~first).nonzero()[0])):
        values = torch.ones(LAYOUT.numel)
        values[place] = torch.inf if rank == 1 else 1.0
        run_alone(codec.mean(values, LAYOUT))
        found.append(bool(torch.isfinite(values).all()))
    return found


def test_infinity_shows_on_all_ranks_where_it_is_kept_and_on_none_where_it_is_pruned(run_ranks):
    assert run_ranks(_not_finite, world_size=2) == [[False, True]] * 2


def test_a_list_is_a_mask_and_what_is_done_with_the_rest():
    assert compression_of([SparseMask(), Cast("bf16")], "here") == SparseMask(then=Cast("bf16"))
    assert compression_of(["sparse_mask", "ternary"], "here") == SparseMask(then=Ternary())
    assert compression_of(["bf16"], "here") == Cast("bf16")
    assert SparseMask(then="bf16") == SparseMask(then=Cast("bf16"))


@pytest.mark.parametrize(
    ("make", "parts"),
    [
        (
            lambda: compression_of(["bf16", "sparse_mask"], "Here"),
            ("Here", "[SparseMask(), Cast('bf16')]", "got [Cast"),
        ),
        (lambda: compression_of(["sparse_mask", "bf16", "int8"], "Here"), ("Here", "cannot follow")),
        (lambda: compression_of([], "Here"), ("Here", "got []")),
        (lambda: SparseMask(then=PowerSGD()), ("`then`", "PowerSGD(rank=2)", "whole matrices")),
        (lambda: SparseMask(then=NoSync()), ("`then`", "NoSync()", "Cast")),
        (lambda: SparseMask(then="bf61"), ("SparseMask", "`then`", "'bf61'", "Did you mean 'bf16'?")),
        (lambda: SparseMask(then="powersgd"), ("`then`", "PowerSGD(rank=2)", "whole matrices")),
        (lambda: SparseMask(then=8), ("`then`", "got 8", "Cast('bf16')")),
        (lambda: SparseMask(pruning=0.8), ("`pruning`", "got 0.8", "MagnitudePruning(sparsity=0.8)")),
        (lambda: SparseMask(dense_above=90), ("`dense_above`", "got 90")),
        (lambda: SparseMask(dense_above="aut"), ("`dense_above`", "or 'auto'", "got 'aut'")),
        (lambda: SparseMask(dense_above="auto"), ("`dense_above`='auto'", "`link`", "lightning-comm probe")),
        (lambda: SparseMask(link="a.json"), ("`link`", "'a.json'", "`dense_above`=0.9", "Leave out one")),
        (lambda: SparseMask(schedule=500), ("`schedule`", "got 500", "PruningSchedule(start_step=500)")),
        (
            lambda: SparseMask(ModulePruning(), schedule=PruningSchedule(0, 100)),
            ("`schedule`", "step 100", "got ModulePruning()", "leave out `end_step`"),
        ),
    ],
)
def test_bad_arguments_are_named_with_a_way_out(make, parts):
    with pytest.raises(ValueError) as caught:  # noqa: PT011  (the line below reads all of it)
        make()
    assert [part for part in parts if part not in str(caught.value)] == []
