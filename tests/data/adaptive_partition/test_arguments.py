"""What the partitioned loader takes over from a DataLoader, and what it refuses."""

import pytest
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
)

from lightning_comm.core.adaptive_partition.plan import PartitionPlan
from lightning_comm.data.adaptive_partition.loader import PartitionedLoader
from lightning_comm.data.resumable import ResumableLoader


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
            {"sampler": [[0, 1], [2, 3]], "global_batch_size": 4, "tail": "drop"},
            ValueError,
            ["2 samples", "by the length of list", "must not yield batches"],
        ),
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
