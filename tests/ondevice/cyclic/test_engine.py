"""The engine against the sequential reference, bit for bit, and its activations against exact counts."""

import copy
import gc
import itertools
import weakref
from functools import cache

import pytest
import torch
from support.grids import few_of
from torch import nn

from lightning_comm.core.cyclic.schedule import CyclicSchedule
from lightning_comm.ondevice.activation_meter import ActivationMeter
from lightning_comm.ondevice.cyclic import CyclicEngine, simulate_delay

STEPS, FEATURES = 6, 5


def stages(count: int, norm: bool = False) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        *(
            nn.Sequential(nn.Linear(FEATURES, FEATURES), nn.BatchNorm1d(FEATURES) if norm else nn.Identity(), nn.Tanh())
            for _ in range(count)
        )
    ).double()


def micro_batches(count: int):
    generator = torch.Generator().manual_seed(1)
    for _ in range(count):
        x = torch.randn(4, FEATURES, generator=generator, dtype=torch.float64)
        yield x, x.roll(1, 1) * x


def error(output, batch):
    return nn.functional.mse_loss(output, batch[1])


def momentum(parameters):
    return torch.optim.SGD(parameters, 0.05, momentum=0.9, weight_decay=1e-2)


def adamw(parameters):
    return torch.optim.AdamW(parameters, 0.01, weight_decay=0.1)


def falling(optimizer):
    return torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.7)


def by_the_engine(model, workers, make=momentum, flush_after=(), scheduled=False, **kwargs):
    model = copy.deepcopy(model)
    optimizer = make(model.parameters())
    engine = CyclicEngine(model, optimizer, scheduler=falling(optimizer) if scheduled else None, **kwargs)
    return model, engine.run(micro_batches(workers * STEPS), error, flush_after=flush_after)


def by_the_reference(model, workers, make=momentum, scheduled=False, **kwargs):
    model = copy.deepcopy(model)
    optimizer = make(model.parameters())
    run = simulate_delay(
        model,
        micro_batches(workers * STEPS),
        lambda network, batch: error(network(batch[0]), batch),
        optimizer,
        workers=workers,
        stages=[[name for name, _ in model.named_parameters() if name.startswith(f"{k}.")] for k in range(len(model))],
        addition="arrival",
        scheduler=falling(optimizer) if scheduled else None,
        **kwargs,
    )
    return model, run


@cache
def reference_of(workers, count, make, kwargs):
    """The reference of that many equal stages, which both orders of the engine are compared with; `kwargs` as items."""
    return by_the_reference(stages(count), workers, make, **dict(kwargs))


def equal(a, b) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


RULES = [{"rule": "v1"}, {"rule": "v2"}, {"lag": 1}, {"lag": 2}]


@pytest.mark.parametrize("order", ["backward_first", "forward_first"])
@pytest.mark.parametrize(
    ("workers", "kwargs", "make"),
    # each rule, lag, optimizer and number of workers
    few_of(itertools.product([2, 3, 4, 6], RULES, [momentum, adamw]), 1, 2, 9, 12, 15, 20, 31),
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_parameters_and_losses_are_those_of_the_reference_bit_for_bit(workers, kwargs, make, order):
    start = stages(workers)
    model, run = by_the_engine(start, workers, make, order=order, **kwargs)
    reference, expected = reference_of(workers, workers, make, tuple(kwargs.items()))
    assert equal(model, reference)
    assert run == expected
    assert not equal(model, reference_of(workers, workers, make, (("warmup_sync_steps", STEPS),))[0])


SEVERAL = itertools.product(
    [(2, 2), (2, 3), (3, 2), (4, 2), (4, 3)], ["backward_first", "forward_first"], ["v1", "v2"], [momentum, adamw]
)


@pytest.mark.parametrize(
    ("workers", "per_worker", "order", "rule", "make"),
    # each size in both orders, and each rule and optimizer with both of them
    few_of([(*size, *rest) for size, *rest in SEVERAL], 0, 7, 10, 13, 19, 20, 27, 30, 33, 38),
)
def test_several_stages_for_each_worker_are_as_in_the_reference(workers, per_worker, order, rule, make):
    model = stages(workers * per_worker)
    engine = CyclicEngine(model, make(model.parameters()), workers=workers, order=order, rule=rule)
    run = engine.run(micro_batches(workers * STEPS), error, flush_after=(3,))
    kwargs = (("rule", rule), ("flush_after", (3,)))
    reference, expected = reference_of(workers, workers * per_worker, make, kwargs)
    assert equal(model, reference)
    assert run == expected


@pytest.mark.parametrize(
    "kwargs",
    [
        {"flush_after": (1, 4)},
        {"scheduled": True},
        {"warmup_sync_steps": 1},
        {"warmup_sync_steps": 3, "flush_after": (2, 5)},
        {"warmup_sync_steps": STEPS},
        {"rule": "v1", "warmup_sync_steps": 2, "scheduled": True, "flush_after": (4,)},
    ],
    ids=str,
)
def test_flushes_schedules_and_warm_ups_are_those_of_the_reference(kwargs):
    start = stages(4)
    model, run = by_the_engine(start, 4, **kwargs)
    reference, expected = by_the_reference(start, 4, **kwargs)
    assert equal(model, reference)
    assert run == expected


def test_batch_norms_train_on_their_micro_batch_as_in_the_reference_and_share_their_statistics():
    start = stages(3, norm=True)
    model, _ = by_the_engine(start, 3)
    assert equal(model, by_the_reference(start, 3)[0])
    counted = {int(value) for name, value in model.state_dict().items() if name.endswith("num_batches_tracked")}
    assert counted == {3 * STEPS}  # each micro-batch once; a rank would have seen a third of them


def test_steps_can_be_given_one_by_one_and_a_flush_returns_what_is_still_on_its_way():
    start = stages(4)
    model, whole = copy.deepcopy(start), by_the_engine(start, 4, flush_after=(3,))
    engine = CyclicEngine(model, momentum(model.parameters()))
    batches, found, ended = list(micro_batches(4 * STEPS)), [], []
    for step in range(STEPS):
        found.append(engine.step(batches[4 * step : 4 * step + 4], error))
        ended += found[-1]
        if step == 2:
            ended += engine.flush()
    ended += engine.flush()
    assert engine.flush() == []
    assert [len(each) for each in found] == [0, 1, 1, 0, 1, 1]
    assert tuple(ended) == whole[1].losses
    assert equal(model, whole[0])


# ---- what travels between stages -----------------------------------------------------------------------------------


class Skip(nn.Module):
    """Hands its input on beside what it made of it, and adds what it was handed."""

    def __init__(self, first: bool = False, last: bool = False) -> None:
        super().__init__()
        self.first, self.last = first, last
        self.linear = nn.Linear(FEATURES, FEATURES)

    def forward(self, x):
        value, beside = (x, x) if self.first else x
        value = self.linear(value).tanh()
        return value + beside if self.last else (value, beside)


class Frozen(nn.Linear):
    def __init__(self) -> None:
        super().__init__(FEATURES, FEATURES)
        self.requires_grad_(False)


class Tied(nn.Module):
    """One module under two names, and another with the same weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first = self.second = nn.Linear(FEATURES, FEATURES)
        self.third = nn.Linear(FEATURES, FEATURES)
        self.third.weight = self.first.weight

    def forward(self, x):
        return self.third(self.second(self.first(x).tanh()).tanh())


@pytest.mark.parametrize(
    "middle",
    [
        lambda: [Skip(first=True), Skip(), Skip(last=True)],
        lambda: [nn.Linear(FEATURES, FEATURES), Frozen(), Tied()],
        lambda: [Frozen(), nn.Tanh(), nn.Linear(FEATURES, FEATURES)],
    ],
    ids=["tuples", "frozen and tied", "no parameters"],
)
def test_tuples_frozen_tied_and_empty_stages_are_as_in_the_reference(middle):
    torch.manual_seed(0)
    start = nn.Sequential(*middle()).double()
    model, _ = by_the_engine(start, 3)
    assert equal(model, by_the_reference(start, 3)[0])
    assert not equal(model, start)


# ---- memory --------------------------------------------------------------------------------------------------------

UNIT = 4 * 8 * 4  # bytes of 4 rows of 8 in fp32


class Shift(nn.Module):
    """Saves one activation, its output, and nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(8))

    def forward(self, x):
        return (x + self.bias).tanh()


def peak_units(depth: int, step) -> float:
    model = nn.Sequential(*(Shift() for _ in range(depth)))
    with ActivationMeter(model) as meter:
        step(model)
        assert meter.live_bytes == 0
    return meter.peak_bytes / UNIT


def engine_peak(workers: int, order: str, rule: str = "v2", per_worker: int = 1) -> float:
    def train(model):
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        engine = CyclicEngine(model, optimizer, workers=workers, order=order, rule=rule)
        engine.run([torch.ones(4, 8)] * (3 * workers), lambda output, _: output.sum())

    return peak_units(workers * per_worker, train)


@pytest.mark.parametrize("workers", [2, 3, 4, 5, 8])
@pytest.mark.parametrize("rule", ["v1", "v2"])
def test_the_peak_with_forwards_first_is_exactly_half_of_n_times_n_plus_one(workers, rule):
    assert engine_peak(workers, "forward_first", rule) == workers * (workers + 1) / 2


@pytest.mark.parametrize("workers", [2, 4, 6, 8])
@pytest.mark.parametrize("rule", ["v1", "v2"])
def test_the_peak_with_backwards_first_is_exactly_half_of_n_squared_where_n_is_even(workers, rule):
    assert engine_peak(workers, "backward_first", rule) == workers**2 / 2


@pytest.mark.parametrize(("workers", "per_worker"), [(2, 2), (4, 2), (4, 3), (3, 2)])
def test_the_peak_with_several_stages_for_each_worker_is_what_the_schedule_says(workers, per_worker):
    schedule = CyclicSchedule(workers, workers * per_worker)
    expected = max(schedule.live_stages(slot) for slot in range(6 * schedule.stages))
    assert engine_peak(workers, "forward_first", per_worker=per_worker) == expected


@pytest.mark.parametrize("workers", [2, 3, 4, 8])
def test_one_batch_of_all_peaks_at_n_squared_and_accumulation_at_n(workers):
    def accumulation(model):
        for _ in range(workers):
            model(torch.ones(4, 8)).sum().backward()

    assert peak_units(workers, lambda model: model(torch.ones(4 * workers, 8)).sum().backward()) == workers**2
    assert peak_units(workers, accumulation) == workers


def test_saved_parameters_of_either_version_do_not_count_where_the_engine_names_them():
    model = stages(4)
    engine = CyclicEngine(model, momentum(model.parameters()))
    peaks = []
    for source in ([engine.tensors], []):
        with ActivationMeter(*source) as meter:
            engine.run(micro_batches(12), error)
        peaks.append(meter.peak_bytes)
    unit = 8 * 4 * FEATURES
    # stages keep their output, the first its input too, and the loss a target: all of one size
    assert peaks[0] % unit == 0
    assert peaks[0] < peaks[1]


def test_two_versions_are_kept_and_no_more():
    model = stages(4)
    engine = CyclicEngine(model, momentum(model.parameters()))
    engine.run(micro_batches(12), error)
    storages = {each.untyped_storage().data_ptr() for each in engine.tensors()}
    assert len(storages) == 2 * len(list(model.parameters()))


# ---- arguments -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "kwargs", "must_say"),
    [
        (lambda: stages(1), {}, ["model", "got 1", "nn.Sequential"]),
        (lambda: [nn.Linear(2, 2)] * 2, {}, ["model", "0.weight", "1.bias", "same stage"]),
        (lambda: stages(2), {"order": "any"}, ["order", "any", "forward_first"]),
        (lambda: stages(2), {"lag": 3}, ["lag", "3", "2"]),
        (lambda: stages(2), {"workers": 4}, ["workers", "4", "2", "multiple"]),
        (lambda: stages(3), {"workers": 2}, ["stages", "3", "2"]),
    ],
)
def test_a_bad_argument_is_named_with_its_value_and_a_way_out(model, kwargs, must_say):
    built = model()
    with pytest.raises(ValueError, match=r"^(CyclicEngine|CyclicSchedule): ") as caught:
        CyclicEngine(built, momentum(list(built[0].parameters())), **kwargs)
    assert [word for word in must_say if word not in str(caught.value)] == []


def test_too_few_micro_batches_for_a_step_are_refused_by_step_and_counted_by_run():
    model = stages(3)
    engine = CyclicEngine(model, momentum(model.parameters()))
    with pytest.raises(ValueError, match=r"CyclicEngine: `micro_batches` .* 3; got 2"):
        engine.step(list(micro_batches(2)), error)
    run = engine.run(micro_batches(8), error)
    assert (run.steps, run.flushes, run.left_over) == (2, (2,), 2)


def test_another_run_of_an_engine_counts_its_steps_and_flushes_from_its_own_beginning():
    model = stages(3)
    engine = CyclicEngine(model, momentum(model.parameters()))
    engine.run(micro_batches(6), error)
    again = engine.run(micro_batches(9), error, flush_after=(1,))
    assert (again.steps, again.flushes, again.left_over) == (3, (1, 3), 0)


def test_autocast_around_the_engine_keeps_no_older_versions_and_does_what_it_does_within_stages():
    def losses(engine, batches):
        return engine.run(batches, lambda output, batch: nn.functional.mse_loss(output.float(), batch[1])).losses

    batches = [(x.float(), y.float()) for x, y in micro_batches(3 * STEPS)]
    model = stages(3).float()
    network = copy.deepcopy(model)
    engine = CyclicEngine(network, momentum(network.parameters()))
    older = [weakref.ref(leaf) for versions in engine._versions for leaf in versions[0].values()]
    with torch.autocast("cpu", torch.bfloat16):
        around = losses(engine, batches)
        gc.collect()
        assert [each for each in older if each() is not None] == []
    inside = copy.deepcopy(model)
    for stage in inside:
        stage.forward = torch.autocast("cpu", torch.bfloat16)(stage.forward)
    assert len(around) == STEPS
    assert losses(CyclicEngine(inside, momentum(inside.parameters())), batches) == around
