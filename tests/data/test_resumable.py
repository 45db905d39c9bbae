"""The loader by itself: its order against torch's own, what it loads, what it saves, what it refuses."""

import pytest
import torch
import torch.distributed as dist
from support.processes import launch
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from lightning_comm.data.resumable import ResumableLoader


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("shuffle", [False, True])
def test_order_and_number_of_batches_are_those_of_distributed_sampler(shuffle, drop_last):
    for ranks in (1, 2, 3):
        for rank in range(ranks):
            order = {"num_replicas": ranks, "rank": rank, "shuffle": shuffle, "seed": 7, "drop_last": drop_last}
            ours = ResumableLoader(range(20), 3, **order)
            theirs = DataLoader(
                range(20), 3, sampler=(sampler := DistributedSampler(range(20), **order)), drop_last=drop_last
            )
            for epoch in range(3):
                ours.sampler.set_epoch(epoch)
                sampler.set_epoch(epoch)
                assert [batch.tolist() for batch in ours] == [batch.tolist() for batch in theirs]
            assert len(ours) == len(theirs)


def test_the_global_random_state_neither_decides_the_order_nor_moves():
    orders = []
    for global_seed in (0, 1):
        torch.manual_seed(global_seed)
        before = torch.get_rng_state()
        orders.append([batch.tolist() for batch in ResumableLoader(range(20), 3)])
        assert torch.equal(torch.get_rng_state(), before)
    assert orders[0] == orders[1]


class Noise(Dataset):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> float:
        return torch.rand(()).item()


def test_the_noise_of_workers_follows_from_seed_epoch_and_rank_alone():
    def draw(rank=0, epoch=0, seed=0):
        loader = ResumableLoader(Noise(), 2, seed=seed, rank=rank, num_replicas=2, num_workers=1)
        loader.sampler.set_epoch(epoch)
        return tuple(noise for batch in loader for noise in batch.tolist())

    torch.manual_seed(0)
    once = draw()
    torch.manual_seed(1)
    assert draw() == once
    assert len({once, draw(rank=1), draw(epoch=1), draw(rank=1, epoch=1), draw(seed=7)}) == 5


class Watched(Dataset):
    def __init__(self) -> None:
        self.loaded: list[int] = []

    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> int:
        self.loaded.append(index)
        return index


def test_a_resumed_loader_keeps_its_length_and_loads_nothing_of_what_it_skips():
    first = ResumableLoader(Watched(), 2)
    batches = iter(first)
    seen = [next(batches).tolist() for _ in range(3)]
    resumed = ResumableLoader(dataset := Watched(), 2)
    resumed.load_state_dict(first.state_dict())
    assert len(resumed) == 5
    rest = [batch.tolist() for batch in resumed]
    assert dataset.loaded == [sample for batch in rest for sample in batch]
    assert sorted(dataset.loaded + [sample for batch in seen for sample in batch]) == list(range(10))


def test_the_state_is_plain_numbers_and_survives_being_loaded_and_saved_again():
    loader = ResumableLoader(range(10), 2, seed=4, shuffle=True)
    loader.sampler.set_epoch(6)
    next(iter(loader))
    state = loader.state_dict()
    assert {type(value) for value in state.values()} == {int}
    assert (state["epoch"], state["batches_done"]) == (6, 1)
    resumed = ResumableLoader(range(10), 2, seed=4, shuffle=True)
    resumed.load_state_dict(state)
    assert resumed.state_dict() == state


@pytest.mark.parametrize(
    ("change", "must_say"),
    [
        ({"batch_size": 3}, "batch_size was 2 and is 3"),
        ({"num_replicas": 2, "rank": 1}, "num_replicas was 1 and is 2"),
        ({"seed": 1}, "seed was 0 and is 1"),
        ({"shuffle": False}, "shuffle was 1 and is 0"),
        ({"drop_last": True}, "drop_last was 0 and is 1"),
        ({"dataset": range(12)}, "samples was 10 and is 12"),
    ],
)
def test_a_plan_that_changed_in_mid_epoch_is_refused_and_at_the_end_of_an_epoch_it_is_not(change, must_say):
    def new(**arguments):
        return ResumableLoader(**{"dataset": range(10), "batch_size": 2, **arguments})

    loader = new()
    next(iter(loader))
    changed = new(**change)
    changed.load_state_dict(loader.state_dict())
    with pytest.raises(ValueError, match=f"1 batches of epoch 0 .*{must_say}.*resume from a checkpoint of the end"):
        next(iter(changed))

    changed = new(**change)
    changed.load_state_dict(loader.state_dict())
    changed.sampler.set_epoch(1)
    assert len(list(changed)) == len(changed)


@pytest.mark.parametrize(
    ("kwargs", "error", "must_say"),
    [
        ({"batch_size": 0}, ValueError, ["batch_size", "got 0", "on one rank"]),
        ({"seed": -1}, ValueError, ["seed", "got -1"]),
        ({"num_replicas": 0}, ValueError, ["num_replicas", "got 0"]),
        ({"num_replicas": 2, "rank": 2}, ValueError, ["rank", "got 2", "process group"]),
        (
            {"batch_size": 8, "drop_last": True},
            ValueError,
            ["dataset", "5 samples", "batch_size`=8", "drop_last=False"],
        ),
        ({"dataset": range(0)}, ValueError, ["dataset", "0 samples"]),
        ({"dataset": iter([1])}, TypeError, ["dataset", "length", "list_iterator", "StatefulDataLoader"]),
        ({"sampler": [3]}, TypeError, ["sampler", "got [3]", "shuffle", "limit_train_batches"]),
        (
            {"batch_sampler": [[3]]},
            TypeError,
            ["batch_sampler", "got [[3]]", "PartitionedLoader", "StatefulDataLoader"],
        ),
        ({"batch_size": None, "sampler": [[3]]}, TypeError, ["sampler", "got [[3]]", "yields single samples"]),
        ({"batch_size": None}, ValueError, ["batch_size", "got None"]),
        ({"generator": None}, TypeError, ["generator", "seed"]),
        (
            {"generator": 7, "sampler": [3], "batch_sampler": [[3]]},
            TypeError,
            ["`sampler` and `batch_sampler` and `generator` cannot be", "got [3] and [[3]] and 7.", "shuffle", "seed"],
        ),
    ],
)
def test_a_bad_argument_is_named_with_its_value_and_a_way_out(kwargs, error, must_say):
    with pytest.raises(error) as caught:
        ResumableLoader(**{"dataset": range(5), "batch_size": 2, **kwargs})
    assert [word for word in ["ResumableLoader", *must_say] if word not in str(caught.value)] == []


def test_a_loader_that_was_built_before_the_ranks_were_joined_is_refused_and_one_that_names_them_is_not():
    def first_batches(rank):
        early, told = ResumableLoader(range(8), 2), ResumableLoader(range(8), 2, num_replicas=1, rank=0)
        dist.init_process_group("gloo")
        with pytest.raises(ValueError, match=r"`num_replicas` must be the number of ranks, 2.*`train_data"):
            next(iter(early))
        return len(list(told)), len(list(ResumableLoader(range(8), 2)))

    assert launch(first_batches, world_size=2) == [(4, 2), (4, 2)]
