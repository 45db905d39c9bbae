"""PowerSGD depends neither on the scale of gradients nor on the rank: against QR in float64, and torch's hook."""

import logging

import numpy as np
import pytest
import torch
from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook
from transport.compression.test_compressions import codec_of

from lightning_comm.transport.compression.base import Layout, Slot, run_alone
from lightning_comm.transport.compression.power_sgd import PowerSGD, orthonormal_rows

SHAPES = {"a": (9, 7), "b": (12, 5), "vector": (6,)}
LAYOUT = Layout(tuple(Slot(name, torch.Size(shape).numel(), shape) for name, shape in SHAPES.items()))
SOME_SCALES = (1e-30, 1e-9, 1e-4, 1.0, 1e30)
DECADES = (1e-30, *(10.0**exponent for exponent in range(-9, 1)), 1e30)
STEPS = 3


def gradient(rank, step, layout=LAYOUT):
    return torch.randn(layout.numel, generator=torch.Generator().manual_seed(100 * rank + step))


def synchronise(codec, values, layout=LAYOUT):
    codec.begin_step()
    run_alone(codec.mean(values, layout))
    codec.end_step()
    return values


def _scaled(rank, scales):
    """Return the means of some steps at each scale, over the scale, and the spans of the bases that begin them."""
    means = []
    for scale in scales:
        codec, _ = codec_of(PowerSGD(2))
        steps = [synchronise(codec, scale * gradient(rank, step)).double() / scale for step in range(STEPS)]
        means.append(torch.stack(steps).numpy())
        lengths = [basis @ basis.T for basis in codec.state_dict()["codec"]["bases"].values()]
        assert len(lengths) == 2
        for each in lengths:
            torch.testing.assert_close(each, torch.eye(2), rtol=0, atol=1e-6)
    context = codec.context
    starts = {
        name: torch.randn((2, SHAPES[name][1]), generator=context.generator(name, 0, torch.device("cpu"), shared=True))
        for name in ("a", "b")
    }
    return means, {name: start.numpy() for name, start in starts.items()}


def by_hand(starts, ranks):
    """Power iteration with error feedback as the paper has it, in float64."""
    bases = {name: torch.from_numpy(start).double().T for name, start in starts.items()}
    kept = [torch.zeros(LAYOUT.numel, dtype=torch.float64) for _ in range(ranks)]
    means = []
    for step in range(STEPS):
        due = [gradient(rank, step).double() + kept[rank] for rank in range(ranks)]
        mean = torch.stack([gradient(rank, step).double() for rank in range(ranks)]).mean(0)
        sent = [row.clone() for row in due]
        for number, slot in enumerate(LAYOUT.slots):
            if slot.name not in bases:
                continue
            matrices = [LAYOUT.split(row)[number].view(slot.shape) for row in due]
            left = torch.linalg.qr(sum(matrix @ bases[slot.name] for matrix in matrices) / ranks).Q
            own = [matrix.T @ left for matrix in matrices]
            bases[slot.name] = sum(own) / ranks
            LAYOUT.split(mean)[number].copy_((left @ bases[slot.name].T).view(-1))
            for row, base in zip(sent, own, strict=True):
                LAYOUT.split(row)[number].copy_((left @ base.T).view(-1))
        kept = [row - gone for row, gone in zip(due, sent, strict=True)]
        means.append(mean)
    return torch.stack(means)


@pytest.mark.parametrize(
    "scales",
    [pytest.param(SOME_SCALES, id="some"), pytest.param(DECADES, id="each", marks=pytest.mark.exhaustive)],
)
def test_at_any_scale_it_is_the_power_iteration_of_the_paper_in_float64(run_ranks, scales):
    answers = run_ranks(_scaled, scales, world_size=3)
    expected = by_hand(answers[0][1], 3)
    for means, _ in answers:
        for scale, got in zip(scales, means, strict=True):
            torch.testing.assert_close(torch.from_numpy(got), expected, rtol=0, atol=2e-5, msg=f"scale {scale}")


class OneBucket:
    """What torch's hook asks of a bucket."""

    def __init__(self, values, layout):
        self.values, self.layout = values, layout

    def buffer(self):
        return self.values

    def index(self):
        return 0

    def is_last(self):
        return True

    def gradients(self):
        return [
            row.view(slot.shape) for slot, row in zip(self.layout.slots, self.layout.split(self.values), strict=True)
        ]


def _beside_torch(rank, scale, feedback):
    """The same five steps by torch's hook and by ours, from the same start."""
    layout = Layout((Slot("w", 12 * 8, (12, 8)), Slot("v", 5, (5,))))
    state = powerSGD_hook.PowerSGDState(
        None, matrix_approximation_rank=2, start_powerSGD_iter=2, use_error_feedback=feedback, random_seed=3
    )
    state.iter = 2
    codec, _ = codec_of(PowerSGD(2), feedback=feedback)
    drawn = torch.Generator().manual_seed(int(np.random.RandomState(3).randint(1_000_000_000)))
    start = {"step": 0, "bases": {"w": orthonormal_rows(torch.randn(1, 8, 2, generator=drawn)[0].T)}}
    codec.load_state_dict({"step": 0, "residuals": {}, "codec": start} if feedback else start)
    worst = 0.0
    for step in range(5):
        # torch keeps what the mean lacks, and ours what this rank has not sent: the same where gradients are
        values = scale * gradient(0 if feedback else rank, step, layout)
        theirs = powerSGD_hook.powerSGD_hook(state, OneBucket(values.clone(), layout)).wait()
        ours = synchronise(codec, values, layout)
        worst = max(worst, float((theirs - ours).abs().max()) / scale)
    return worst


def _all_beside_torch(rank):
    logging.disable(logging.CRITICAL)
    try:
        return [_beside_torch(rank, scale, feedback) for scale in (1.0, 1e-7) for feedback in (True, False)]
    finally:
        logging.disable(logging.NOTSET)


def test_it_sends_what_torchs_hook_sends_in_one_bucket(run_ranks):
    for worst in run_ranks(_all_beside_torch, world_size=2):
        assert max(worst) < 1e-5


def _few_directions(rank):
    """Matrices of rank 1, of zeros and with a NaN, one after the other."""
    layout = Layout((Slot("w", 40, (8, 5)),))
    found = {}
    for scale in (1.0, 1e-12):
        codec, _ = codec_of(PowerSGD(2), feedback=False)
        outer = scale * (rank + 1) * torch.outer(torch.arange(1.0, 9.0), torch.tensor([1.0, -2.0, 0.5, 0.0, 3.0]))
        for _ in range(3):  # the same again, also from bases that it has left
            values = synchronise(codec, outer.reshape(-1).clone(), layout)
            found.setdefault("rank 1", []).append(
                float((values - 1.5 / (rank + 1) * outer.view(-1)).abs().max()) / scale
            )
        found.setdefault("zeros", []).append(float(synchronise(codec, torch.zeros(40), layout).abs().max()))
        before = codec.state_dict()["bases"]["w"]
        spoilt = torch.ones(40)
        spoilt[7] = torch.nan if rank == 1 else 1.0
        found.setdefault("finite", []).append(bool(torch.isfinite(synchronise(codec, spoilt, layout)).any()))
        found.setdefault("kept", []).append(torch.equal(before, codec.state_dict()["bases"]["w"]))
        left, _, right = torch.linalg.svd(torch.randn(8, 5, generator=torch.Generator().manual_seed(1)))
        whole, best = ((left[:, :5] * torch.tensor(sizes)) @ right for sizes in ([2, 1, 0.1, 0.1, 0], [2, 1, 0, 0, 0]))
        for _ in range(10):  # from the basis that a matrix of rank 1 has left
            values = synchronise(codec, scale * whole.reshape(-1), layout)
        found.setdefault("best", []).append(float((values.view(8, 5) / scale - best).abs().max()))
    return found


def _new_directions(rank):
    """The residual after gradients whose rows change: of rank 1 all the time, each orthogonal to those before."""
    layout, kept = Layout((Slot("w", 120, (12, 10)),)), []
    for asked in (1, 4):
        codec, _ = codec_of(PowerSGD(asked))
        for step in range(36):
            outer = torch.zeros(12, 10)
            outer[step % 12, step // 12] = 1.0  # the same on both ranks
            synchronise(codec, outer.reshape(-1), layout)
        for _ in range(4 * asked + 12):
            synchronise(codec, torch.zeros(120), layout)
        kept.append(float(codec.state_dict()["residuals"]["w"].abs().max()))
    return kept


def test_a_gradient_in_a_new_direction_is_sent_sooner_or_later(run_ranks):
    for kept in run_ranks(_new_directions, world_size=2):
        assert max(kept) < 1e-5


@pytest.mark.parametrize(
    ("rows", "spare"),
    [
        ([[0, 0, 0], [1, 0, 0]], None),
        ([[1, 2, 3], [1, 2, 3], [0, 1, 0]], None),
        ([[1e-14, 0, 0], [3, 4, 0]], None),
        ([[1, 0, 0], [0, 0, 0]], [[1, 0, 0], [1, 1, 0]]),
    ],
    ids=["zeros first", "repeated", "tiny first", "a spare one"],
)
def test_the_span_of_dependent_rows_is_kept_and_the_rows_are_orthonormal_or_zero(rows, spare):
    rows = torch.tensor(rows, dtype=torch.float64)
    found = orthonormal_rows(rows, None if spare is None else torch.tensor(spare, dtype=torch.float64))
    torch.testing.assert_close(rows @ found.T @ found, rows, rtol=0, atol=1e-12)
    products = found @ found.T
    live = torch.linalg.matrix_rank(rows) if spare is None else len(rows)
    torch.testing.assert_close(products, torch.diag(products.diagonal().round()), rtol=0, atol=1e-12)
    assert int(products.diagonal().sum().round()) == int(live)


def test_rank_one_is_exact_zeros_stay_zeros_nan_keeps_the_basis_and_no_direction_is_lost_for_good(run_ranks):
    for found in run_ranks(_few_directions, world_size=2):
        assert max(found["rank 1"]) < 1e-5
        assert found["zeros"] == [0.0, 0.0]
        assert found["finite"] == [False, False]
        assert found["kept"] == [True, True]
        assert max(found["best"]) < 1e-5


def _trained(rank):
    """Least squares with the loss times a factor and the rate over it."""
    layout = Layout((Slot("w", 48, (8, 6)),))
    draw = torch.Generator().manual_seed(rank)
    inputs, targets = torch.randn(20, 6, generator=draw), torch.randn(20, 8, generator=draw)
    losses = []
    for factor in (1.0, 1e-4, 1e-9):
        codec, _ = codec_of(PowerSGD(1))
        weights = torch.zeros(8, 6)
        for _ in range(20):
            wrong = inputs @ weights.T - targets
            weights -= (0.1 / factor) * synchronise(codec, (factor / 20 * wrong.T @ inputs).reshape(-1), layout).view(
                8, 6
            )
        losses.append(float((inputs @ weights.T - targets).square().mean()))
    return losses


def test_a_loss_times_a_factor_at_the_rate_over_it_trains_the_same(run_ranks):
    for losses in run_ranks(_trained, world_size=2):
        assert losses == pytest.approx([losses[0]] * 3, rel=1e-4)


def test_directions_that_only_rounding_would_choose_are_zeros():
    matrices = [torch.zeros(2, 6), torch.ones(2, 6), torch.eye(2, 6), torch.full((2, 6), 1e-44)]
    zeros, ones, eye, smallest = map(orthonormal_rows, matrices)
    assert not zeros.any()
    assert eye.abs().tolist() == torch.eye(2, 6).tolist()
    for each in (ones, smallest):
        assert each[0].abs().tolist() == pytest.approx([6**-0.5] * 6)
        assert not each[1].any()
