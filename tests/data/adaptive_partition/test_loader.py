"""The loader by itself, as several ranks in one process: what each global step is made of, whoever takes which part."""

import functools
import itertools
import os
import random
import warnings

import pytest
import torch
from support.grids import few_of
from support.ranks_in_one import draw, ranks, single, union
from torch.utils.data import DataLoader, Dataset

from lightning_comm.core.adaptive_partition.plan import BatchIndex, PartitionPlan
from lightning_comm.data.adaptive_partition.loader import PartitionedLoader


def composition(rng: random.Random, total: int, parts: int) -> tuple[int, ...]:
    cuts = sorted(rng.sample(range(1, total), parts - 1))
    return tuple(b - a for a, b in zip([0, *cuts], [*cuts, total], strict=True))


def cut(order: list[int], size: int, tail: str) -> list[list[int]]:
    """An order in batches, by hand."""
    batches: list[list[int]] = []
    while len(order) >= size:
        batches.append(order[:size])
        order = order[size:]
    if order and tail == "keep":
        batches.append(order)
    if order and tail == "merge":
        batches[-1] = batches[-1] + order
    return batches


def cover_exactly(rng: random.Random, tail: str, workers) -> tuple[bool, bool]:
    """Check a run of 3 epochs with random numbers; return whether a rank had a dummy and whether shares changed."""
    parts = rng.randint(1, 4)
    size = rng.randint(parts, 12)
    samples = rng.randint(size, 40)
    seed = rng.randint(0, 99)
    plan = PartitionPlan(composition(rng, size, parts))
    loaders = ranks(plan, lambda rank: PartitionedLoader(range(samples), size, seed=seed, tail=tail, **workers(rank)))

    def perhaps_change(step: int) -> None:
        if rng.random() < 0.3:
            plan.change_at(max(loader.dispatched for loader in loaders), composition(rng, size, parts))

    dummies, orders = False, []
    for epoch in range(3):
        for loader in loaders:
            loader.batch_sampler.sampler.set_epoch(epoch)
        seen = []
        for step, (batches, slices) in enumerate(draw(loaders, perhaps_change)):
            (total,) = {part.total for part in slices}
            assert {part.place for part in slices} == {BatchIndex(epoch, step)}
            assert {part.sizes for part in slices} == {plan.split(BatchIndex(epoch, step), total)}
            seen.append(union(batches, slices))
            assert len(seen[-1]) == total
            for batch, part in zip(batches, slices, strict=True):
                assert len(batch) == max(1, part.samples)
                assert set(batch) <= set(seen[-1])
                assert part.weight == part.samples * parts / total
            dummies |= any(part.samples == 0 for part in slices)
        assert len(seen) == len(loaders[0])
        (whole,) = single_order(samples, size, seed, epoch)
        assert seen == cut(whole, size, tail)
        assert sorted(whole) == list(range(samples))
        orders.append(whole)
    assert samples < 8 or orders[0] != orders[1] != orders[2]
    return dummies, len(plan.changes) > 1


def single_order(samples: int, size: int, seed: int, epoch: int) -> list[list[int]]:
    """The order of an epoch: that of one batch with everything."""
    loader = PartitionedLoader(range(samples), samples, seed=seed)
    loader.set_epoch(epoch)
    return [batch.tolist() for batch in loader]


@pytest.mark.parametrize("tail", ["keep", "drop", "merge"])
def test_each_step_is_its_part_of_the_order_exactly_once_whatever_the_plan(tail):
    rng = random.Random(0)
    outcomes = [cover_exactly(rng, tail, lambda rank: {}) for _ in range(40)]
    dummies, changed = (sum(each) for each in zip(*outcomes, strict=True))
    assert changed > 20
    assert dummies > 0 or tail != "keep"


@pytest.mark.parametrize(
    ("persistent", "tail"), few_of(itertools.product([False, True], ["keep", "drop", "merge"]), 0, 4, 5)
)
def test_the_same_holds_with_workers_and_prefetch_of_another_number_on_each_rank(tail, persistent):
    rng = random.Random(1)

    def workers(rank: int) -> dict[str, int | bool]:
        number = (rank + rng.randint(0, 2)) % 3
        ahead = {"prefetch_factor": rng.randint(1, 4), "persistent_workers": persistent}
        return {"num_workers": number, **(ahead if number else {})}

    assert any(changed for _, changed in (cover_exactly(rng, tail, workers) for _ in range(3)))


@pytest.mark.parametrize(("workers", "ahead"), [(0, None), (1, None), (2, None), (1, 3), (2, 5)])
def test_what_is_dispatched_is_ahead_by_workers_times_prefetch_factor(workers, ahead):
    loader = PartitionedLoader(range(60), 2, num_workers=workers, **({"prefetch_factor": ahead} if ahead else {}))
    assert loader.dispatched == (0, 0)
    for done, _ in enumerate(loader, start=1):
        assert loader.dispatched == (0, min(30, done + workers * (ahead or 2)))
    assert loader.dispatched == (0, 30)
    loader.set_epoch(1)
    assert loader.dispatched == (1, 0)


def test_a_rank_that_gets_nothing_of_the_tail_has_one_sample_of_it_and_weight_0():
    plan = PartitionPlan((1, 2, 5))
    *_, (batches, slices) = draw(ranks(plan, lambda rank: PartitionedLoader(range(10), 8, shuffle=False)))
    assert (batches, slices[0].sizes) == ([[8], [8], [8, 9]], (0, 0, 2))
    assert [part.samples for part in slices] == [0, 0, 2]
    assert [part.weight for part in slices] == [0.0, 0.0, 3.0]


def test_passes_without_a_new_epoch_go_on_counting_and_have_orders_of_their_own():
    loader = PartitionedLoader(range(10), 3)
    seen, places = [], []
    for _ in range(3):
        for batch in loader:
            seen.append(batch.tolist())
            places.append(loader.latest.place)
    assert places == [(0, batch) for batch in range(12)]
    assert len({tuple(map(tuple, seen[first : first + 4])) for first in (0, 4, 8)}) == 3
    loader.set_epoch(0)
    assert [batch.tolist() for batch in loader] == seen[:4]
    assert loader.latest.place == (0, 3)


def test_a_pass_that_is_broken_off_is_followed_by_one_from_the_start():
    loader = PartitionedLoader(range(12), 3, num_workers=1)
    next(iter(loader))
    assert sorted(sample for batch in loader for sample in batch.tolist()) == list(range(12))
    assert loader.latest.place == (0, 7)


@pytest.mark.parametrize("workers", [0, 2])
def test_an_iterator_draws_nothing_before_its_first_batch(workers):
    loader = PartitionedLoader(range(8), 2, num_workers=workers)
    early = iter(loader)
    loader.set_epoch(5)
    assert [batch.tolist() for batch in early] == single(range(8), 2, epochs=6)[-4:]


def test_a_pass_that_goes_on_after_the_next_epoch_was_set_leaves_that_one_whole():
    loader = PartitionedLoader(range(12), 3)
    old = iter(loader)
    first = next(old).tolist()
    loader.set_epoch(1)
    assert [first, *(batch.tolist() for batch in old)] == single(range(12), 3)
    assert [batch.tolist() for batch in loader] == single(range(12), 3, epochs=2)[4:]


def test_two_passes_at_once_are_refused():
    loader = PartitionedLoader(range(8), 2)
    with pytest.raises(RuntimeError, match=r"PartitionedLoader: `iter`.*another pass.*Make a loader for each"):
        list(zip(loader, loader, strict=True))


ALL = range(1, 99)
WITH_WORKERS = [  # which load what the same sampler says: each tail with them once
    ((1, 1, 3), "merge", {"num_workers": 2}),
    ((4, 1), "keep", {"num_workers": 2, "persistent_workers": True}),
    ((4, 1), "drop", {"num_workers": 1}),
]


def loaders_of_18(sizes, tail, options) -> list[PartitionedLoader]:
    return ranks(PartitionPlan(sizes), lambda _: PartitionedLoader(range(18), 5, seed=3, tail=tail, **options))


@functools.cache
def states_of_two(tail, workers) -> list[dict[str, int | str]]:
    """The state of two ranks after each batch of an epoch, which is the same on both."""
    first, states = loaders_of_18((3, 2), tail, {"num_workers": workers}), []
    for done, _ in enumerate(draw(first), start=1):
        state, other = (loader.state_dict() for loader in first)
        assert state == other
        assert (state["epoch"], state["passes"], state["batches_done"]) == (0, 0, done)
        states.append(state)
    assert len(states) == len(first[0])
    return states


@pytest.mark.parametrize(
    ("plan", "tail", "options", "stops"),
    [
        *[(plan, tail, {}, ALL) for plan in ((3, 2), (1, 4), (5,), (1, 1, 3)) for tail in ("keep", "drop", "merge")],
        *[pytest.param(*case, [2], marks=pytest.mark.slow) for case in WITH_WORKERS],
        *[pytest.param(*case, ALL, marks=pytest.mark.exhaustive) for case in WITH_WORKERS],
    ],
    ids=str,
)
def test_a_stop_at_any_batch_can_be_taken_up_by_any_plan_and_number_of_ranks(plan, options, tail, stops):
    whole = single(range(18), 5, epochs=2, seed=3, tail=tail)
    for workers in (0, 1) if stops is ALL else (1,):
        states = states_of_two(tail, workers)
        length = len(states)
        for done, state in enumerate(states, start=1):
            if done not in stops:
                continue
            epoch = done // length
            again = loaders_of_18(plan, tail, options)
            seen = []
            for loader in again:
                loader.load_state_dict(state)
                assert (len(loader), loader.state_dict()) == (length, state)
            for now in range(epoch, 2):
                resumed = draw(again, steps=length - done if now == 0 else length)
                for loader in again:
                    loader.set_epoch(now)
                seen += [union(*step) for step in resumed]
            assert seen == whole[done:]


@pytest.mark.parametrize("done", range(1, 9))
def test_a_loop_without_epochs_resumes_in_the_pass_where_it_was(done):
    def steps(loader):
        while True:
            yield from (batch.tolist() for batch in loader)

    first, again, whole = (PartitionedLoader(range(10), 3) for _ in range(3))
    taken = steps(first)
    seen = [next(taken) for _ in range(done)]
    again.load_state_dict(first.state_dict())
    resumed, expected = steps(again), steps(whole)
    assert seen + [next(resumed) for _ in range(9)] == [next(expected) for _ in range(done + 9)]


def test_a_state_of_another_epoch_is_dropped_and_one_of_a_start_binds_nothing():
    loader = PartitionedLoader(range(10), 3)
    next(iter(loader))
    state = loader.state_dict()
    resumed = PartitionedLoader(range(12), 4)
    resumed.load_state_dict(state)
    resumed.set_epoch(1)
    assert len(list(resumed)) == 3
    list(loader)  # ends the epoch
    resumed.load_state_dict(loader.state_dict())
    assert len(list(resumed)) == 3


class Watched(Dataset):
    def __init__(self) -> None:
        self.loaded: list[int] = []

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> int:
        self.loaded.append(index)
        return index


def test_a_resumed_loader_loads_nothing_of_what_it_skips():
    first = PartitionedLoader(Watched(), 4)
    next(iter(first))
    resumed = PartitionedLoader(dataset := Watched(), 4)
    resumed.load_state_dict(first.state_dict())
    assert [sample for batch in resumed for sample in batch.tolist()] == dataset.loaded
    assert sorted(first.dataset.loaded + dataset.loaded) == list(range(12))


def test_the_state_is_plain():
    loader = PartitionedLoader(range(10), 2, seed=4, sampler=None)
    next(iter(loader))
    assert {type(value) for value in loader.state_dict().values()} == {int, str}
    assert loader.settings == {
        "samples": 10,
        "global_batch_size": 2,
        "shuffle": 1,
        "seed": 4,
        "tail": "keep",
        "sampler": "",
    }


class Pids(Dataset):
    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> int:
        return os.getpid()


@pytest.mark.parametrize("persistent", [False, True])
def test_workers_are_not_restarted_when_shares_change(persistent):
    plan, epochs = PartitionPlan((2, 2)), []
    (loader, _) = ranks(plan, lambda _: PartitionedLoader(Pids(), 4, num_workers=2, persistent_workers=persistent))
    for epoch in range(2):
        loader.set_epoch(epoch)
        pids, sizes = set(), set()
        for batch in loader:
            pids |= set(batch.tolist())
            sizes.add(len(batch))
            if loader.latest.place.batch in (0, 3):
                plan.change_at(loader.dispatched, (3, 1) if loader.latest.place.batch else (1, 3))
        assert (len(pids), len(sizes)) == (2, 3 - epoch)
        epochs.append(pids)
    assert os.getpid() not in epochs[0]
    assert (epochs[0] == epochs[1]) == persistent


def test_options_go_to_the_inner_loader_and_lightning_finds_what_it_looks_for():
    loader = PartitionedLoader(dataset := range(8), 2, collate_fn=tuple, num_workers=1)
    assert (loader.dataset, loader.collate_fn, loader.num_workers, loader.batch_size) == (dataset, tuple, 1, None)
    assert not hasattr(loader, "sampler")
    assert not isinstance(loader, DataLoader)
    started = []
    loader.worker_init_fn = started.append
    assert loader.worker_init_fn == started.append
    assert type(next(iter(loader))) is tuple


class Drawn(Dataset):
    def __len__(self) -> int:
        return 5

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.rand(())


def test_a_worker_calls_the_function_that_was_set_later():
    loader = PartitionedLoader(Drawn(), 5, num_workers=1)
    loader.worker_init_fn = lambda worker: torch.manual_seed(7)
    (batch,) = loader
    torch.manual_seed(7)
    assert batch.tolist() == [torch.rand(()).item() for _ in range(5)]


def test_the_fetch_is_timed_from_the_request_until_the_batch_is_there():
    loader = PartitionedLoader(Watched(), 4)
    assert loader.latest is None
    ends = 0.0
    for _ in loader:
        part = loader.latest
        assert part.fetch_s > 0
        assert part.fetch_started_s >= ends
        ends = part.fetch_started_s + part.fetch_s


def test_without_a_plan_one_process_is_one_rank_and_nothing_is_warned_of():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loader = PartitionedLoader(range(10), 4, shuffle=False)
        assert [batch.tolist() for batch in loader] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert loader.latest.weight == 1.0
