"""The order of all ranks: the same on each, whatever the random state, and with a sampler of the user's."""

import itertools
import random

import numpy as np
import pytest
import torch
from support.ranks_in_one import draw, ranks, union
from torch.utils.data import Dataset, RandomSampler, Sampler, SubsetRandomSampler, WeightedRandomSampler

from lightning_comm.core.adaptive_partition.plan import PartitionPlan
from lightning_comm.data.adaptive_partition.loader import PartitionedLoader


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


@pytest.mark.parametrize("batch", [[3, 4], torch.tensor([3, 4]), np.array([3, 4]), range(3, 5)], ids=repr)
def test_a_batch_sampler_in_place_of_a_sampler_is_refused_before_any_sample_is_loaded(batch):
    loaded = []

    class Loads(Dataset):
        def __len__(self):
            return 30

        def __getitem__(self, index):
            loaded.append(index)
            return index

    loader = PartitionedLoader(Loads(), 3, sampler=[batch, batch, batch])
    with pytest.raises(
        TypeError, match=r"one index at a time; list yields batches, such as .*sampler of single samples"
    ):
        next(iter(loader))
    assert loaded == []


def test_a_sampler_may_yield_keys_and_numbers_of_other_libraries():
    keys = [("a", 1), np.int64(2), torch.tensor(3), "b"]
    data = {("a", 1): 10, 2: 20, 3: 30, "b": 40}
    assert next(iter(PartitionedLoader(data, 4, sampler=keys))).tolist() == [10, 20, 30, 40]


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
    shuffled = loader.order_fingerprint()
    loader.repeat_first_epoch()
    assert loader.order_fingerprint() != shuffled
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


class Endless:
    """Says that it has nine, and never ends."""

    def __len__(self):
        return 9

    def __iter__(self):
        return itertools.cycle(range(9))


def test_a_sampler_that_never_ends_is_refused():
    loader = PartitionedLoader(range(9), 3, sampler=Endless())
    with pytest.raises(ValueError, match=r"9, .*Endless yielded more in epoch 0\. Let it"):
        next(iter(loader))
