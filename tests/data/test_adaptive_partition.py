"""The loader by itself, as several ranks in one process: what each global step is made of, whoever takes which part."""

import os
import random
import warnings

import numpy as np
import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from lightning_comm.core.partition_plan import PartitionPlan, Place
from lightning_comm.data.adaptive_partition import PartitionedLoader
from lightning_comm.data.resumable import ResumableLoader


def ranks(plan: PartitionPlan, new) -> list[PartitionedLoader]:
    """One loader for each rank of a plan, all in this process; ``new(rank)`` makes them."""
    loaders = [new(rank) for rank in range(plan.ranks)]
    for rank, loader in enumerate(loaders):
        loader.follow(plan, rank)
    return loaders


def draw(loaders: list[PartitionedLoader], before_step=lambda step: None, steps: int | None = None):
    """Yield for each step what every rank was given, as lists, and its slice."""
    passes = [iter(loader) for loader in loaders]
    for step in range(len(loaders[0]) if steps is None else steps):
        before_step(step)
        batches = [next(each).tolist() for each in passes]
        yield batches, [loader.latest for loader in loaders]


def union(batches, slices) -> list[int]:
    """The global batch: what the ranks were given, one behind the other, without dummies."""
    return [each for batch, part in zip(batches, slices, strict=True) for each in batch[: part.samples]]


def single(*args, epochs=1, **kwargs) -> list[list[int]]:
    """The global batches, from a loader of one rank."""
    loader, whole = PartitionedLoader(*args, **kwargs), []
    for epoch in range(epochs):
        loader.set_epoch(epoch)
        whole += [batch.tolist() for batch in loader]
    return whole


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
            assert {part.place for part in slices} == {Place(epoch, step)}
            assert {part.sizes for part in slices} == {plan.split(Place(epoch, step), total)}
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
    outcomes = [cover_exactly(rng, tail, lambda rank: {}) for _ in range(60)]
    dummies, changed = (sum(each) for each in zip(*outcomes, strict=True))
    assert changed > 30
    assert dummies > 0 or tail != "keep"


@pytest.mark.parametrize("tail", ["keep", "drop", "merge"])
@pytest.mark.parametrize("persistent", [False, True])
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


def test_orders_differ_by_seed_epoch_and_pass_and_not_by_the_global_random_state():
    def order(seed=0, epoch=0, passes=0, global_seed=0):
        torch.manual_seed(global_seed)
        loader = PartitionedLoader(range(40), 40, seed=seed)
        loader.set_epoch(epoch)
        for _ in range(passes):
            list(loader)
        fingerprint = loader.order_fingerprint() if not passes else None
        (batch,) = loader
        assert fingerprint in (None, loader.order_fingerprint())
        return tuple(batch.tolist()), loader.order_fingerprint()

    assert order() == order(global_seed=1)
    different = [order(), order(seed=1), order(epoch=1), order(passes=1), order(epoch=1, passes=1)]
    assert len({batch for batch, _ in different}) == len({fingerprint for _, fingerprint in different}) == 5
    assert all(0 <= fingerprint < 2**48 for _, fingerprint in different)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("sampler", [None, WeightedRandomSampler(torch.ones(9), 9)])
@pytest.mark.parametrize("seed_samples", [False, True])
def test_the_global_random_state_does_not_move(workers, sampler, seed_samples):
    def state():
        numbers = np.random.get_state()
        return torch.get_rng_state().tolist(), random.getstate(), numbers[1].tolist(), numbers[2]

    before = state()
    list(PartitionedLoader(range(9), 2, sampler=sampler, num_workers=workers, seed_samples=seed_samples))
    assert state() == before


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


def test_two_passes_at_once_are_refused():
    loader = PartitionedLoader(range(8), 2)
    with pytest.raises(RuntimeError, match=r"PartitionedLoader: `iter`.*another pass.*Make a loader for each"):
        list(zip(loader, loader, strict=True))


@pytest.mark.parametrize("tail", ["keep", "drop", "merge"])
@pytest.mark.parametrize(
    ("plan", "options"),
    [
        ((3, 2), {}),
        ((1, 4), {}),
        ((5,), {}),
        ((1, 1, 3), {"num_workers": 2}),
        ((4, 1), {"num_workers": 2, "persistent_workers": True}),
    ],
    ids=str,
)
def test_a_stop_at_any_batch_can_be_taken_up_by_any_plan_and_number_of_ranks(plan, options, tail):
    def new(sizes, options) -> list[PartitionedLoader]:
        return ranks(PartitionPlan(sizes), lambda _: PartitionedLoader(range(18), 5, seed=3, tail=tail, **options))

    whole = single(range(18), 5, epochs=2, seed=3, tail=tail)
    for ahead in ({}, {"num_workers": 1}):
        first = new((3, 2), ahead)
        length = len(first[0])
        for done, _ in enumerate(draw(first), start=1):
            state, other = (loader.state_dict() for loader in first)
            assert state == other
            epoch = done // length
            assert (state["epoch"], state["passes"], state["batches_done"]) == (0, epoch, done % length)
            again = new(plan, options)
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


@pytest.mark.parametrize(
    ("change", "must_say"),
    [
        ({"global_batch_size": 3}, "global_batch_size was 2 and is 3"),
        ({"seed": 1}, "seed was 0 and is 1"),
        ({"shuffle": False}, "shuffle was 1 and is 0"),
        ({"tail": "drop"}, "tail was 'keep' and is 'drop'"),
        ({"dataset": range(12)}, "samples was 10 and is 12"),
        ({"sampler": SubsetRandomSampler(range(10))}, "sampler was '' and is 'SubsetRandomSampler'"),
    ],
)
def test_settings_that_changed_in_the_middle_of_a_pass_are_refused_by_name(change, must_say):
    def new(**arguments):
        return PartitionedLoader(**{"dataset": range(10), "global_batch_size": 2, **arguments})

    loader, changed = new(), new(**change)
    next(iter(loader))
    changed.load_state_dict(loader.state_dict())
    with pytest.raises(ValueError, match=f"1 batches of epoch 0 .*{must_say}.*resume from a checkpoint of the end"):
        next(iter(changed))


def test_a_sampler_that_draws_another_order_than_before_the_stop_is_refused():
    first, second = (
        PartitionedLoader(range(10), 2, sampler=SubsetRandomSampler(range(low, low + 8))) for low in (0, 2)
    )
    next(iter(first))
    second.load_state_dict(first.state_dict())
    with pytest.raises(ValueError, match=r"1 batches of epoch 0 .*order was \d+ and is \d+\. Restore these"):
        next(iter(second))


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


class Curriculum(Sampler):
    """Easy samples first, and more of the hard ones in later epochs."""

    def __init__(self) -> None:
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return 9

    def __iter__(self):
        drawn = np.random.permutation(9 + 3 * self.epoch)[:9]
        return iter(random.sample(list(drawn), 9))


@pytest.mark.parametrize(
    "sampler",
    [
        lambda: WeightedRandomSampler(torch.arange(1.0, 31), 9),
        lambda: WeightedRandomSampler(torch.arange(1.0, 31), 9, generator=torch.Generator()),
        lambda: SubsetRandomSampler(range(0, 30, 3)),
        lambda: SubsetRandomSampler(range(0, 30, 3), generator=torch.Generator().manual_seed(4)),
        lambda: RandomSampler(range(30), num_samples=9),
        Curriculum,
    ],
)
def test_a_global_sampler_draws_alike_on_all_ranks_and_after_a_resume_whatever_the_random_state(sampler):
    def new(rank: int) -> PartitionedLoader:
        own = sampler()
        if getattr(own, "generator", None) is not None:
            own.generator.manual_seed(rank)
        return PartitionedLoader(range(30), 4, sampler=own, seed=1)

    def steps(loaders, epoch):
        for loader in loaders:
            loader.set_epoch(epoch)
        assert len({loader.order_fingerprint() for loader in loaders}) == 1
        done = loaders[0].state_dict()["batches_done"]
        for step in draw(loaders, steps=len(loaders[0]) - done):
            torch.manual_seed(random.getrandbits(20))  # the state moves on between steps
            yield union(*step)

    whole = [list(steps(loaders, epoch)) for loaders in [ranks(PartitionPlan((1, 3)), new)] for epoch in range(3)]
    alone = ranks(PartitionPlan((4,)), new)
    assert [list(steps(alone, epoch)) for epoch in range(3)] == whole
    assert len({str(batches) for batches in whole}) == 3
    stopped, resumed = ranks(PartitionPlan((2, 2)), new), ranks(PartitionPlan((1, 2, 1)), new)
    assert next(steps(stopped, 1)) == whole[1][0]
    for loader in resumed:
        loader.load_state_dict(stopped[0].state_dict())
    assert list(steps(resumed, 1)) == whole[1][1:]
    assert list(steps(resumed, 2)) == whole[2]


def test_the_generator_and_the_epoch_of_a_sampler_are_as_the_user_and_the_loop_set_them():
    own = torch.Generator().manual_seed(5)
    before = own.get_state()
    sampler = SubsetRandomSampler(range(10), generator=own)
    list(PartitionedLoader(range(10), 3, sampler=sampler))
    assert sampler.generator is own
    assert torch.equal(own.get_state(), before)
    loader = PartitionedLoader(range(30), 3, sampler=(curriculum := Curriculum()))
    loader.set_epoch(4)
    next(iter(loader))
    assert curriculum.epoch == 4


class Drifting(Curriculum):
    """Draws from a source of randomness that nobody can see."""

    def __init__(self) -> None:
        super().__init__()
        self._own = random.Random(0)

    def __iter__(self):
        return iter(self._own.sample(range(30), 9))


class Shrinking(Curriculum):
    def __iter__(self):
        return iter(range(9 - self.epoch))


def test_a_sampler_whose_order_nobody_could_repeat_is_refused():
    loader = PartitionedLoader(range(30), 3, sampler=Drifting())
    with pytest.raises(ValueError, match=r"`sampler` must draw the same order .*Drifting did not.*`generator`"):
        next(iter(loader))


def test_a_sampler_that_yields_another_number_than_its_length_is_refused():
    loader = PartitionedLoader(range(30), 3, sampler=Shrinking())
    assert len(list(loader)) == 3
    loader.set_epoch(2)
    with pytest.raises(ValueError, match=r"`sampler` must yield .* 9, .*Shrinking yielded 7 in epoch 2\. Let it"):
        next(iter(loader))


class Noise(Dataset):
    def __len__(self) -> int:
        return 13

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.tensor([index, torch.rand(()), np.random.rand(), random.random()], dtype=torch.float64)


def noise(plan=(4,), options=None, epochs=2, seed=0, shuffle=True):
    loaders = ranks(
        PartitionPlan(plan),
        lambda _: PartitionedLoader(Noise(), 4, seed=seed, shuffle=shuffle, seed_samples=True, **(options or {})),
    )
    drawn = {}
    for epoch in range(epochs):
        for loader in loaders:
            loader.set_epoch(epoch)
        for batches, slices in draw(loaders):
            for batch, part in zip(batches, slices, strict=True):
                drawn |= {(epoch, int(index)): values for index, *values in batch[: part.samples]}
    return drawn


def test_augmentation_of_a_sample_depends_on_no_rank_plan_worker_or_order():
    drawn = noise()
    assert len({value for values in drawn.values() for value in values}) == 3 * 2 * 13
    torch.manual_seed(1)
    assert noise((1, 3)) == drawn
    assert noise((2, 1, 1), {"num_workers": 2}) == drawn
    assert noise(shuffle=False) == drawn
    assert not set(map(tuple, noise(seed=1).values())) & set(map(tuple, drawn.values()))


def test_overfitting_repeats_the_order_and_the_augmentation_of_the_first_epoch():
    loader = PartitionedLoader(Noise(), 4, seed_samples=True)
    loader.repeat_first_epoch()
    assert loader.settings["shuffle"] == 0
    epochs = []
    for epoch in (0, 1):
        loader.set_epoch(epoch)
        epochs.append(torch.cat(list(loader)))
    assert epochs[0][:, 0].tolist() == list(range(13))
    assert torch.equal(*epochs)
    sampled = PartitionedLoader(range(30), 3, sampler=SubsetRandomSampler(range(12)))
    first = [batch.tolist() for batch in sampled]
    sampled.repeat_first_epoch()
    sampled.set_epoch(3)
    assert [batch.tolist() for batch in sampled] == first


def test_options_go_to_the_inner_loader_and_lightning_finds_what_it_looks_for():
    loader = PartitionedLoader(dataset := range(8), 2, collate_fn=tuple, num_workers=1)
    assert (loader.dataset, loader.collate_fn, loader.num_workers, loader.batch_size) == (dataset, tuple, 1, None)
    assert not hasattr(loader, "sampler")
    assert not isinstance(loader, DataLoader)
    started = []
    loader.worker_init_fn = started.append
    assert loader.worker_init_fn == started.append
    assert type(next(iter(loader))) is tuple


def test_a_worker_calls_the_function_that_was_set_later():
    loader = PartitionedLoader(Noise(), 13, num_workers=1, shuffle=False)
    loader.worker_init_fn = lambda worker: torch.manual_seed(7)
    (batch,) = loader
    torch.manual_seed(7)
    assert batch[:, 1].tolist() == torch.stack([torch.rand(()) for _ in range(13)]).double().tolist()


def test_the_fetch_is_timed_from_the_request_until_the_batch_is_there():
    loader = PartitionedLoader(Watched(), 4)
    assert loader.latest is None
    ends = 0.0
    for _ in loader:
        part = loader.latest
        assert part.fetch_s > 0
        assert part.fetch_started_s >= ends
        ends = part.fetch_started_s + part.fetch_s


@pytest.mark.parametrize(
    ("loader", "expected"),
    [
        (DataLoader(range(10), 3), {"shuffle": False}),
        (DataLoader(range(10), 3, shuffle=True, drop_last=True), {"shuffle": True, "tail": "drop"}),
        (DataLoader(range(10), 3, sampler=(subset := SubsetRandomSampler(range(4, 10)))), {"sampler": subset}),
        (DataLoader(range(10), 3, sampler=(few := RandomSampler(range(10), num_samples=7))), {"sampler": few}),
        (DataLoader(range(10), 3, sampler=(drawn := RandomSampler(range(10), True))), {"sampler": drawn}),
        (DataLoader(range(10), 3, sampler=(half := SequentialSampler(range(5)))), {"sampler": half}),
    ],
)
def test_a_data_loader_is_taken_over_with_its_order(loader, expected):
    ours = PartitionedLoader.from_dataloader(loader, global_batch_size=4, seed=5)
    theirs = PartitionedLoader(range(10), 4, seed=5, **expected)
    assert ours.settings == theirs.settings
    assert [batch.tolist() for batch in ours] == [batch.tolist() for batch in theirs]


def test_a_data_loader_is_taken_over_with_its_options():
    options = {
        "num_workers": 2,
        "collate_fn": tuple,
        "timeout": 60,
        "worker_init_fn": print,
        "prefetch_factor": 3,
        "persistent_workers": True,
        "multiprocessing_context": "fork",
    }
    inner = PartitionedLoader.from_dataloader(DataLoader(Subset(range(9), [1, 2]), 2, **options), 2)._inner
    for name in options:
        expected = options[name]
        got = getattr(inner, name)
        assert (got.get_start_method() if name == "multiprocessing_context" else got) == expected
    assert list(inner.dataset.indices) == [1, 2]


def test_without_a_plan_one_process_is_one_rank_and_nothing_is_warned_of():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loader = PartitionedLoader(range(10), 4, shuffle=False)
        assert [batch.tolist() for batch in loader] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert loader.latest.weight == 1.0


class Stream(IterableDataset):
    def __iter__(self):
        return iter(range(8))


class Unsized(Sampler):
    def __iter__(self):
        return iter(range(8))


@pytest.mark.parametrize(
    ("kwargs", "error", "must_say"),
    [
        ({"global_batch_size": 0}, ValueError, ["global_batch_size", "got 0", ">= 1", "all ranks", "times the ranks"]),
        ({"global_batch_size": 2.5}, ValueError, ["global_batch_size", "got 2.5", "whole number"]),
        ({"global_batch_size": True}, ValueError, ["global_batch_size", "got True", "whole number"]),
        ({"seed": -1}, ValueError, ["seed", "got -1", ">= 0"]),
        ({"seed": None}, ValueError, ["seed", "got None", "whole number"]),
        ({"tail": "pad"}, ValueError, ["tail", "'pad'", "keep", "drop", "merge", "loses none"]),
        ({"global_batch_size": 9, "tail": "drop"}, ValueError, ["8 samples", "`global_batch_size`=9", 'tail="keep"']),
        ({"global_batch_size": 9, "tail": "merge"}, ValueError, ["8 samples", "`global_batch_size`=9", "'merge'"]),
        ({"dataset": range(0)}, ValueError, ["dataset", "0 samples"]),
        ({"dataset": Stream()}, TypeError, ["dataset", "length", "Stream", "map-style", "DataLoader"]),
        ({"dataset": Stream(), "sampler": range(8)}, TypeError, ["dataset", "Stream", "map-style"]),
        ({"dataset": iter([1])}, TypeError, ["dataset", "length", "list_iterator"]),
        ({"sampler": Unsized()}, TypeError, ["sampler", "length", "Unsized", "__len__"]),
        ({"sampler": BatchSampler(range(8), 2, False)}, TypeError, ["sampler", "single indices", "BatchSampler"]),
        (
            {"sampler": DistributedSampler(range(8), 2, 0)},
            TypeError,
            ["sampler", "DistributedSampler", "one rank", "`shuffle` and `seed`"],
        ),
        ({"sampler": range(8), "shuffle": False}, TypeError, ["shuffle", "got False", "range", "Leave out one"]),
        ({"batch_size": 4}, TypeError, ["batch_size", "got 4", "`global_batch_size`, of all ranks"]),
        ({"batch_sampler": [[1]]}, TypeError, ["batch_sampler", "got [[1]]", "`sampler`"]),
        ({"generator": None}, TypeError, ["generator", "got None", "`seed`"]),
        ({"drop_last": True}, TypeError, ["drop_last", "got True", "`tail`"]),
        ({"in_order": False}, TypeError, ["in_order", "got False", "prefetch_factor"]),
    ],
)
def test_a_bad_argument_is_named_with_its_value_and_a_way_out(kwargs, error, must_say):
    with pytest.raises(error) as caught:
        PartitionedLoader(**{"dataset": range(8), "global_batch_size": 2, **kwargs})
    assert [word for word in ["PartitionedLoader: ", *must_say] if word not in str(caught.value)] == []


@pytest.mark.parametrize(
    ("loader", "error", "must_say"),
    [
        (DataLoader(range(8), 2), ValueError, ["global_batch_size", "got None", "`batch_size`=2 times the ranks"]),
        (DataLoader(range(8), batch_size=None), TypeError, ["loader", "`batch_size`=None", "nobody", "Construct"]),
        (
            DataLoader(range(8), batch_sampler=BatchSampler(range(8), 2, False)),
            TypeError,
            ["loader", "batch_size", "BatchSampler", "global sampler"],
        ),
        (DataLoader(Stream(), 2), TypeError, ["dataset", "Stream", "map-style"]),
        (ResumableLoader(range(8), 2), TypeError, ["loader", "got ResumableLoader", "Construct PartitionedLoader"]),
        ([1, 2], TypeError, ["loader", "got list", "Construct PartitionedLoader"]),
    ],
)
def test_a_data_loader_that_cannot_be_shared_anew_is_refused(loader, error, must_say):
    with pytest.raises(error) as caught:
        PartitionedLoader.from_dataloader(loader)
    assert [word for word in ["PartitionedLoader", *must_say] if word not in str(caught.value)] == []


def test_a_data_loader_of_one_rank_is_refused():
    loader = DataLoader(range(8), 2, sampler=DistributedSampler(range(8), 2, 0))
    with pytest.raises(TypeError, match=r"`sampler` must draw the order of all ranks.*DistributedSampler"):
        PartitionedLoader.from_dataloader(loader, 4)


@pytest.mark.parametrize(
    ("plan", "rank", "must_say"),
    [
        ((2, 3), 0, ["plan", "4 samples", "(2, 3)", "sum to 5", "global_batch_size"]),
        ((1, 1, 1, 1, 0), 0, ["global_batch_size", "ranks, 5", "got 4", "all ranks together"]),
        ((2, 2), 2, ["rank", "< 2", "got 2"]),
        ((2, 2), -1, ["rank", ">= 0", "got -1"]),
    ],
)
def test_a_plan_that_does_not_fit_is_refused(plan, rank, must_say):
    with pytest.raises(ValueError, match="PartitionedLoader: ") as caught:
        PartitionedLoader(range(8), 4).follow(PartitionPlan(plan), rank)
    assert [word for word in must_say if word not in str(caught.value)] == []


def test_a_state_of_another_kind_of_loader_is_refused():
    with pytest.raises(ValueError, match=r"`state` must be of version 1; got None\. Resume"):
        PartitionedLoader(range(8), 4).load_state_dict(ResumableLoader(range(8), 2).state_dict())
