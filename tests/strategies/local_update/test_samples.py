"""Fits whose averages are weighted by samples: against one process that trains all ranks by hand."""

from itertools import accumulate
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from support.processes import launch
from support.training import Regression, Samples, local_update, network, own_file, sample, trainer, weights
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from lightning_comm import Averaging, FixedPeriod, LocalUpdateStrategy, TopK
from lightning_comm.data.resumable import ResumableLoader
from lightning_comm.ondevice.share import Share
from lightning_comm.strategies.common.rank_status import RankStatus
from lightning_comm.strategies.local_update.sample_weights import SampleWeights

BATCHES, PERIOD = 14, 4
EACH_BATCH = (range(1, BATCHES + 1), 1)
# saved in mid-round, where an average departs, and while it is in flight, as with a gradient phase of 5 steps;
# evaluated every third step, so at each place of a round
SOME_BATCHES = ((3, 5, 8, 10, 13), 3)
SIZES = (  # by rank; 0 is a batch of one sample that does not count, in the second round on all of rank 1's
    (4, 4, 6, 2, 1, 3, 5, 2, 4, 4, 4, 4, 2, 6),
    (2, 1, 1, 3, 0, 0, 0, 0, 6, 2, 1, 3, 4, 1),
    (3, 3, 3, 3, 2, 2, 0, 5, 1, 0, 0, 1, 0, 0),
)


def momentum(parameters):
    return torch.optim.SGD(parameters, 0.03, momentum=0.9)


def batches(rank):
    """Indices of each batch: as many as its size says, and one where that is 0."""
    sizes = [max(1, size) for size in SIZES[rank]]
    return [list(range(end - size, end)) for size, end in zip(sizes, accumulate(sizes), strict=True)]


class Counts(Callback):
    """What `AdaptivePartition` does of its own: asks for weights, and counts."""

    def __init__(self, sizes=SIZES):
        self.sizes = sizes

    def setup(self, trainer, pl_module, stage):
        if stage == "fit":
            trainer.strategy.weigh_by_samples()

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        sizes = self.sizes[trainer.global_rank]
        trainer.strategy.count_samples(sizes[batch_idx % len(sizes)])


class Trace(Callback):
    """This rank's weights after every batch, and what callbacks are told; averages that validation sees."""

    def __init__(self):
        self.weights, self.rounds, self.gradients, self.seen = [], [], [], []

    def on_train_batch_start(self, trainer, *_):
        self.gradients.append(trainer.strategy.averages_gradients)

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.weights.append(weights(pl_module))
        self.rounds.append(trainer.strategy.rounds_done)

    def on_validation_batch_start(self, trainer, pl_module, *_):
        if not trainer.sanity_checking:
            self.seen.append(weights(pl_module))


class SavesAt(ModelCheckpoint):
    """Saves at the given steps alone."""

    def __init__(self, folder, steps):
        super().__init__(folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)
        self.steps = steps

    def on_train_batch_end(self, trainer, *args):
        if trainer.global_step in self.steps:
            super().on_train_batch_end(trainer, *args)


def _fit(rank, world_size, folder, averaging, settings, kw, looked_at=SOME_BATCHES, weighted=True):
    """Train; with a folder, save after some batches, and evaluate after every so many."""
    trace, strategy = Trace(), local_update(FixedPeriod(PERIOD), averaging=averaging, **settings)
    saved, every = looked_at
    callbacks = [*([Counts()] if weighted else []), trace, *([SavesAt(folder, saved)] if folder else [])]
    if folder:
        kw = {**kw, "enable_checkpointing": True, "limit_val_batches": 1, "val_check_interval": every}
    module = Regression(optimizer=momentum)
    data = DataLoader(Samples(64, rank), batch_sampler=batches(rank))
    trainer(strategy, world_size, callbacks=callbacks, **kw).fit(module, data, DataLoader(Samples(2, rank)))
    messages = [(record.purpose, record.payload_bytes) for record in strategy.ledger.records]
    return trace.weights, trace.seen, trace.rounds, trace.gradients, messages


# ---- the same by hand ------------------------------------------------------------------------------------------------


class ByHand:
    """All ranks in one process."""

    def __init__(self, world_size, compression, overlap, optimizer_state):
        self.ranks = range(world_size)
        self.nets = [network() for _ in self.ranks]
        self.optimizers = [momentum(net.parameters()) for net in self.nets]
        self.compression, self.overlap, self.optimizer_state = compression, overlap, optimizer_state
        self.reference = [p.data.clone() for p in self.nets[0].parameters()]
        self.counts, self.last = [0] * world_size, [1 / world_size] * world_size
        self.due, self.landing = None, None

    def gradient(self, rank, turn, share):
        x, y = (torch.stack(each) for each in zip(*[sample(rank, k) for k in batches(rank)[turn]], strict=True))
        (share * nn.functional.mse_loss(self.nets[rank](x), y)).backward()

    def step(self):
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()

    def average_gradients(self):
        for same in zip(*(net.parameters() for net in self.nets), strict=True):
            mean = sum(p.grad for p in same) / len(same)
            for p in same:
                p.grad = mean.clone()

    @property
    def shares(self):
        total = sum(self.counts)
        return [count / total for count in self.counts] if total else self.last

    def tensors(self):
        return [list(each) for each in zip(*([p.data for p in net.parameters()] for net in self.nets), strict=True)]

    def average(self):
        """What the average of now is, with what is in flight."""
        due = self.due or [[0.0] * len(self.ranks)] * len(self.tensors())
        return [
            sum(w * (p + c) for w, p, c in zip(self.shares, same, moves, strict=True))
            for same, moves in zip(self.tensors(), due, strict=True)
        ]

    def land(self):
        for same, moves in zip(self.tensors(), self.due or [], strict=bool(self.due)):
            for p, move in zip(same, moves, strict=True):
                p += move
        self.due = self.landing = None

    def end_round(self, in_full):
        shares, states = self.shares, self.optimizers
        if in_full:
            for same, mean in zip(self.tensors(), self.average(), strict=True):
                for p in same:
                    p.copy_(mean)
        else:
            self.due = [self.corrections(k, same, shares) for k, same in enumerate(self.tensors())]
        if self.optimizer_state == "average":
            for same in zip(*(net.parameters() for net in self.nets), strict=True):
                buffers = [states[rank].state[p]["momentum_buffer"] for rank, p in enumerate(same)]
                mean = sum(w * b for w, b in zip(shares, buffers, strict=True))
                for buffer in buffers:
                    buffer.copy_(mean)
        self.counts, self.last = [0] * len(self.ranks), shares

    def corrections(self, k, same, shares):
        x = self.reference[k]
        differences = [p - x for p in same]
        if self.compression is None:
            mean = sum(w * d for w, d in zip(shares, differences, strict=True))
            x += mean
            return [mean - d for d in differences]
        wires = [(w * d).bfloat16() for w, d in zip(shares, differences, strict=True)]
        mean = sum(wires[1:], wires[0]).double()
        x += mean
        sent = [wire.double() / w if w else d for wire, w, d in zip(wires, shares, differences, strict=True)]
        return [mean - s for s in sent]


def by_hand(world_size, compression, overlap, optimizer_state="local", accumulated=1, gradient_steps=0):
    """Yield after each batch the weights of all ranks, the average of now, and how many rounds have ended."""
    every, steps, rounds = ByHand(world_size, compression, overlap, optimizer_state), 0, 0
    total = -(-BATCHES // accumulated)
    for turn in range(BATCHES):
        for rank in every.ranks:
            every.gradient(rank, turn, 1 / accumulated)
            every.counts[rank] += SIZES[rank][turn] if steps >= gradient_steps else 0
        if (turn + 1) % accumulated == 0 or turn + 1 == BATCHES:
            if steps < gradient_steps:
                every.average_gradients()
            every.step()
            steps += 1
            if steps <= gradient_steps:
                every.reference = [p.data.clone() for p in every.nets[0].parameters()]
            elif steps == total:
                every.land()
                every.end_round(in_full=True)
                rounds += 1
            elif (steps - gradient_steps) % PERIOD == 0:
                every.end_round(in_full=not compression and not overlap)
                rounds, every.landing = rounds + 1, steps + min(overlap, total - steps - 1)
            if every.landing is not None and steps >= every.landing:
                every.land()
        yield (
            [[p.clone().numpy() for p in each] for each in zip(*every.tensors(), strict=True)],
            every.average(),
            rounds,
        )


CASES = {
    "open": (None, 0, {}, {}),
    "momenta": (None, 0, {"optimizer_state": "average"}, {}),
    "bf16": ("bf16", 0, {}, {}),
    "overlap": (None, 2, {}, {}),
    "bf16-overlap": ("bf16", 3, {}, {}),
    "accumulation": (None, 0, {}, {"accumulate_grad_batches": 2}),
    "gradient-phase": (None, 1, {"gradient_steps": 5}, {}),
}


# not bf16 on three ranks, where the order of a sum in 16 bits is the backend's
ON_TWO, ON_THREE = ("momenta", "bf16-overlap", "gradient-phase"), ("open", "accumulation")
ON_RANKS = [*((case, 2) for case in ON_TWO), *((case, 3) for case in ON_THREE)]
ON_EACH = [(case, ranks) for case in CASES for ranks in (2, 3) if not (ranks == 3 and "bf16" in case)]


def assert_close(got, wanted, what):
    for one, other in zip(got, wanted, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-12, err_msg=what)


@pytest.mark.parametrize(
    ("case", "world_size", "looked_at"),
    [
        *(pytest.param(*each, SOME_BATCHES, id=f"{each[0]}-{each[1]}") for each in ON_RANKS),
        *(
            pytest.param(*each, EACH_BATCH, id=f"{each[0]}-{each[1]}-each-batch", marks=pytest.mark.exhaustive)
            for each in ON_EACH
        ),
    ],
)
def test_ranks_do_what_one_process_does_for_all(case, world_size, looked_at, tmp_path):
    compression, overlap, settings, kw = CASES[case]
    averaging = Averaging(1e-4, compression, overlap)
    folder = str(tmp_path) if "accumulate_grad_batches" not in kw else None
    answers = launch(_fit, world_size, folder, averaging, settings, kw, looked_at, world_size=world_size)
    phase = settings.get("gradient_steps", 0)
    state, accumulated = settings.get("optimizer_state", "local"), kw.get("accumulate_grad_batches", 1)
    expected = list(by_hand(world_size, compression, overlap, state, accumulated, phase))
    own, average, _ = expected[6]
    equal = [sum(same) / world_size for same in zip(*own, strict=True)]
    assert max(abs(a.numpy() - b).max() for a, b in zip(average, equal, strict=True)) > 1e-3, (
        "samples make no difference"
    )
    saved, every = looked_at
    for rank, (states, seen, rounds, gradients, _) in enumerate(answers):
        assert gradients == [turn < phase for turn in range(BATCHES)]
        assert len(states) == len(rounds) == BATCHES
        if folder:
            for turn, got in zip(range(every - 1, BATCHES, every), seen, strict=True):
                assert_close(got, expected[turn][1], f"rank {rank}, evaluated after batch {turn + 1}")
        for turn, (own, _, ended) in enumerate(expected):
            assert rounds[turn] == ended, f"after batch {turn + 1}"
            assert_close(states[turn], own[rank], f"rank {rank} after batch {turn + 1}")
    for step in saved if folder else ():
        stored = torch.load(Path(folder) / f"step={step}.ckpt", weights_only=True)["state_dict"]
        assert_close(stored.values(), expected[step - 1][1], f"saved after batch {step}")
    for one, two in zip(answers[0][0][-1], answers[1][0][-1], strict=True):
        np.testing.assert_array_equal(one, two)


class Stream(IterableDataset):
    """The same batches, without a length."""

    def __init__(self, rank):
        self.rank = rank

    def __iter__(self):
        for indices in batches(self.rank):
            yield tuple(torch.stack(each) for each in zip(*[sample(self.rank, k) for k in indices], strict=True))


def _stream(rank, averaging):
    strategy, module = local_update(FixedPeriod(PERIOD), averaging=averaging), Regression(optimizer=momentum)
    trainer(strategy, 3, callbacks=[Counts()]).fit(module, DataLoader(Stream(rank), batch_size=None))
    return weights(module), [done.step for done in strategy.history], strategy.rounds_done


@pytest.mark.parametrize("overlap", [pytest.param(0, marks=pytest.mark.exhaustive), 1])
def test_an_end_of_unknown_length_is_weighted_too(overlap):
    *_, (_, expected, _) = by_hand(3, None, overlap)
    for final, ends, rounds in launch(_stream, Averaging(1e-4, overlap_steps=overlap), world_size=3):
        assert ends == [4, 8, 12, 14]
        assert rounds == 4
        for got, wanted in zip(final, expected, strict=True):
            np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-12)


# ---- what is sent ----------------------------------------------------------------------------------------------------


# ranks that are together at a checkpoint have no row to send, and under compression they never are
@pytest.mark.parametrize(
    "averaging",
    [
        pytest.param(Averaging(1e-4), id="open"),
        pytest.param(Averaging(1e-4, "bf16", 2), id="bf16-overlap", marks=pytest.mark.exhaustive),
    ],
)
def test_a_weight_costs_8_bytes_in_a_meeting_and_a_row_before_a_checkpoint(averaging, tmp_path):
    def sent(rank):
        # names of one length, since paths are sent
        folders = {weighted: str(tmp_path / str(int(weighted))) for weighted in (False, True)}
        fits = [_fit(rank, 2, folders[weighted], averaging, {}, {}, weighted=weighted) for weighted in (False, True)]
        return [messages for *_, messages in fits]

    for without, weighted in launch(sent, world_size=2):
        others = [[each for each in messages if each[0] != "control"] for messages in (without, weighted)]
        assert others[0] == others[1]
        rows = [[payload for purpose, payload in messages if purpose == "control"] for messages in (without, weighted)]
        assert set(rows[0]) == {64}
        assert set(rows[1]) == {64, 72}
        assert rows[1].count(64) == 2  # the models and the numbers of batches are compared as ever
        saved, _ = SOME_BATCHES
        apart = [step for step in saved if averaging.compression or step % PERIOD]
        assert 1 < len(apart) == len(rows[1]) - len(rows[0])


# ---- resumption, other averages, stops -------------------------------------------------------------------------------


class Noisy(Regression):
    def __init__(self):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Dropout(0.3), nn.Linear(7, 1)).double()
        super().__init__(net, lambda parameters: torch.optim.AdamW(parameters, 0.02))


class States(Callback):
    def __init__(self):
        self.states = {}

    def on_train_batch_end(self, trainer, pl_module, *_):
        moments = [value for each in trainer.optimizers[0].state.values() for value in each.values()]
        tensors = [*pl_module.state_dict().values(), *moments]
        self.states[trainer.global_step] = [tensor.detach().clone() for tensor in tensors]


COUNTS = ((1, 7, 2, 0, 5, 3, 1), (3, 0, 0, 4, 1, 1, 6))


def _noisy(rank, folder, settings, ckpt_path=None, seed=0, callbacks=(), steps=range(15)):
    torch.manual_seed(100 * seed + rank)
    states, module = States(), Noisy()
    if folder:
        callbacks = [*callbacks, SavesAt(folder, steps)]
    kw = {"callbacks": [Counts(COUNTS), states, *callbacks], "max_epochs": 2, "enable_checkpointing": bool(callbacks)}
    data = ResumableLoader(Samples(7 * 4, rank), 4, seed=3, num_replicas=1, rank=0)
    torch.manual_seed(100 * seed + rank)
    trainer(local_update(**settings), 2, **kw).fit(module, data, ckpt_path=ckpt_path)
    return states.states, module


def each_place(settings):
    """Each place within the second round, the first step, the first epoch's end, and in front of the last step."""
    period = settings["period"].steps
    ended = period + settings.get("gradient_steps", 0)
    return sorted({1, 7, 13, *range(ended, ended + period)})


def _resume_everywhere(rank, folder, settings, stops):
    whole, _ = _noisy(rank, folder, settings, steps=stops)
    for step in stops:
        # nothing is saved from here on, which must not change the run
        states, _ = _noisy(rank, None, settings, Path(folder) / f"step={step}.ckpt", seed=9)
        assert sorted(states) == list(range(step + 1, 15))
        for after, tensors in states.items():
            for ours, theirs in zip(tensors, whole[after], strict=True):
                assert torch.equal(ours, theirs), f"resumed after {step}, differs at {after}"
    return True


SETTINGS = {
    "open": {"period": FixedPeriod(4)},
    "momenta-gradient-phase": {"period": FixedPeriod(5), "optimizer_state": "average", "gradient_steps": 2},
    "topk": {"period": FixedPeriod(4), "averaging": Averaging(3e-4, TopK(0.1))},
    "int8-overlap": {"period": FixedPeriod(5), "averaging": Averaging(3e-4, "int8", overlap_steps=3)},
    "mask-bf16-overlap": {
        "period": FixedPeriod(4),
        "averaging": Averaging(3e-4, ["sparse_mask", "bf16"], overlap_steps=2),
    },
    "mask-int8-overlap": {
        "period": FixedPeriod(5),
        "averaging": Averaging(3e-4, ["sparse_mask", "int8"], overlap_steps=3),
    },
}
# A weight enters what both codecs keep alike, of which there is int8's; what "open" sets is set in others as well. The
# stops are at the first step, where the second round has just begun, and at the end of the first epoch, in flight.
RESUMED = [("momenta-gradient-phase", [1, 8]), ("mask-int8-overlap", [6, 7])]
RESUMED += [
    pytest.param(name, each_place(settings), id=f"{name}-each-place", marks=pytest.mark.exhaustive)
    for name, settings in SETTINGS.items()
]


@pytest.mark.parametrize(("name", "stops"), RESUMED)
def test_a_run_resumed_at_any_step_repeats_bit_for_bit(tmp_path, name, stops):
    answers = launch(_resume_everywhere, str(tmp_path), SETTINGS[name], stops, world_size=2, timeout_s=150)
    assert answers == [True, True]


def _without_counts(rank, folder):
    settings = {"period": FixedPeriod(4)}
    _noisy(rank, folder, settings, steps=[6])
    torch.distributed.barrier()
    path = own_file(f"{folder}/step=6.ckpt", rank)
    saved = torch.load(path, weights_only=True)
    counted = saved.pop("samples")  # as a file of before there were any
    torch.save(saved, path)
    torch.distributed.barrier()
    states, module = _noisy(rank, None, settings, Path(folder) / "step=6.ckpt")
    return counted["samples"], sorted(states), weights(module)


def test_a_checkpoint_without_counts_goes_on_with_none(tmp_path):
    answers = launch(_without_counts, str(tmp_path), world_size=2)
    assert [counted for counted, *_ in answers] == [COUNTS[rank][4] + COUNTS[rank][5] for rank in range(2)]
    for _, steps, final in answers:
        assert steps == list(range(7, 15))
        for one, two in zip(final, answers[0][2], strict=True):
            np.testing.assert_array_equal(one, two)


def _moving_average(rank, averaging):
    ema = EMAWeightAveraging(decay=0.8)
    _, module = _noisy(rank, None, {"period": FixedPeriod(4), "averaging": averaging}, callbacks=[ema])
    return weights(module), weights(ema._average_model.module)


@pytest.mark.parametrize(
    "averaging",
    [
        pytest.param(Averaging(1e-4), id="open", marks=pytest.mark.exhaustive),
        pytest.param(Averaging(1e-4, "int8", 2), id="int8-overlap"),
    ],
)
def test_moving_averages_of_weights_end_equal_too(averaging):
    answers = launch(_moving_average, averaging, world_size=2)
    for final, shadow in answers:
        for one, two, same in zip(final, answers[0][0], shadow, strict=True):
            np.testing.assert_array_equal(one, two)
            np.testing.assert_array_equal(one, same)  # copied over the weights at the end


class Asks(Callback):
    """Rank 1 wants to stop in the middle of a round."""

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_rank == 1 and trainer.global_step == 6:
            trainer.should_stop = True


def _stop(rank, averaging):
    _, module = _noisy(rank, None, {"period": FixedPeriod(4), "averaging": averaging}, callbacks=[Asks()])
    return weights(module)


@pytest.mark.parametrize(
    "averaging",
    [
        pytest.param(Averaging(1e-4), id="open", marks=pytest.mark.exhaustive),
        pytest.param(Averaging(1e-4, "bf16", 3), id="bf16-overlap"),
    ],
)
def test_a_stop_leaves_equal_weights(averaging):
    one, two = launch(_stop, averaging, world_size=2)
    for mine, theirs in zip(one, two, strict=True):
        np.testing.assert_array_equal(mine, theirs)


def _two_fits(rank):
    """The first fit is weighted, and the second, without the callback, is not."""
    strategy = local_update(FixedPeriod(PERIOD))
    runner, module = trainer(strategy, 2, callbacks=[Counts()]), Regression()
    runner.fit(module, DataLoader(Samples(64, rank), batch_sampler=batches(rank)))
    first = {r.payload_bytes for r in strategy.ledger.records if r.purpose == "control"}, strategy.rounds_done
    runner.callbacks = [callback for callback in runner.callbacks if not isinstance(callback, Counts)]
    runner.fit_loop.max_epochs = 2
    runner.fit(module, DataLoader(Samples(64, rank), batch_sampler=batches(rank)))
    second = {r.payload_bytes for r in strategy.ledger.records if r.purpose == "control"}, strategy.rounds_done
    return first, second


def test_every_fit_is_asked_anew():
    for first, second in launch(_two_fits, world_size=2):
        assert first == ({64, 72}, 4)
        assert second == ({64}, 4)


# ---- counting --------------------------------------------------------------------------------------------------------


def test_weights_are_shares_of_the_samples_and_where_there_are_none_those_of_before():
    def members(rank, of=(0, 1, 2)):
        def share(counts=None):
            return Share.of([1] * len(of) if counts is None else counts, rank)

        return SimpleNamespace(share=share, ranks=of)

    weights_of = SampleWeights()
    rows = [RankStatus(samples=3.0), RankStatus(samples=0.0), RankStatus(samples=5.0)]
    assert weights_of.weight_of(members(0), rows) is None  # nobody has asked
    weights_of.begin()
    none = [RankStatus(samples=0.0)] * 3
    assert weights_of.weight_of(members(2), none) == 1 / 3
    shares = [weights_of.weight_of(members(rank), rows) for rank in range(3)]
    assert shares == [0.375, 0.0, 0.625]
    weights_of.begin_round(shares[0])
    assert weights_of.weight_of(members(0), none) == 0.375
    assert weights_of.weight_of(members(0, of=(0, 2)), none[:2]) == 1 / 2  # that weight was among others


def test_samples_count_once_their_batch_is_over_and_not_where_gradients_were_averaged():
    counted = SampleWeights()
    counted.begin()
    counted.count(4)
    assert counted.sent == 0
    counted.end_batch(in_round=False)
    counted.count(2)
    counted.count(1)
    counted.end_batch()
    assert counted.sent == 3
    again = SampleWeights()
    again.load_state_dict(counted.state_dict())
    again.begin()
    assert again.sent == 3


def test_gradients_are_averaged_first_where_there_is_such_a_phase():
    assert LocalUpdateStrategy(FixedPeriod(8), gradient_steps=3).averages_gradients
    assert not LocalUpdateStrategy(FixedPeriod(8)).averages_gradients
    assert LocalUpdateStrategy(FixedPeriod(8)).rounds_done == 0


@pytest.mark.parametrize("samples", [-1, 2.5, True, None, "4"])
def test_a_bad_count_is_named_with_its_value_and_a_way_out(samples):
    with pytest.raises(ValueError, match="LocalUpdateStrategy: `samples`") as caught:
        LocalUpdateStrategy(FixedPeriod(8)).count_samples(samples)
    assert all(word in str(caught.value) for word in (repr(samples), ">= 0", "Give 0"))
