"""The journal of shares against a plain list of batches."""

import json
import random

import pytest

from lightning_comm.core.adaptive_partition.plan import BatchIndex, PartitionPlan, Shares

BATCHES = 7  # an epoch


def places(epochs):
    return [BatchIndex(epoch, batch) for epoch in range(epochs) for batch in range(BATCHES)]


def random_plan(rng, ranks, total, epochs):
    """A plan, and the shares of each place written down one by one."""

    def draw():
        cuts = sorted(rng.randint(0, total) for _ in range(ranks - 1))
        return tuple(b - a for a, b in zip([0, *cuts], [*cuts, total], strict=True))

    plan = PartitionPlan(first := draw())
    expected = dict.fromkeys(places(epochs), first)
    for place in sorted(rng.choices(places(epochs), k=rng.randint(0, 6))):
        plan.change_at(place, sizes := draw())
        expected.update({later: sizes for later in expected if later >= place})
    return plan, expected


def test_each_batch_has_the_shares_of_the_last_change_before_it():
    rng = random.Random(1)
    for _ in range(300):
        plan, expected = random_plan(rng, rng.randint(1, 5), rng.randint(1, 40), epochs=3)
        assert {place: plan.sizes_at(place) for place in expected} == expected


def test_a_change_at_the_place_of_the_last_one_replaces_it():
    plan = PartitionPlan((4, 4))
    plan.change_at(BatchIndex(0, 3), (6, 2))
    plan.change_at(BatchIndex(0, 3), (5, 3))
    assert plan.changes == (Shares(BatchIndex(0, 0), (4, 4)), Shares(BatchIndex(0, 3), (5, 3)))
    assert (plan.sizes_at(BatchIndex(0, 2)), plan.sizes_at(BatchIndex(0, 3))) == ((4, 4), (5, 3))


def test_a_change_at_the_very_start_replaces_the_shares_of_the_start():
    plan = PartitionPlan((4, 4))
    plan.change_at(BatchIndex(0, 0), (7, 1))
    assert plan.changes == (Shares(BatchIndex(0, 0), (7, 1)),)
    assert plan.sizes == (7, 1)


def test_a_last_batch_of_any_size_is_dealt_out_whole_and_near_the_shares():
    rng = random.Random(2)
    for _ in range(500):
        plan, expected = random_plan(rng, rng.randint(1, 5), rng.randint(1, 40), epochs=1)
        place, total = rng.choice(list(expected)), rng.randint(0, 90)
        sizes, full = plan.split(place, total), expected[place]
        assert sum(sizes) == total
        if total == sum(full):
            assert sizes == full
        # Who has no share of a full batch has none of any; the others are done at most a sample of the slowest later.
        assert all(n == 0 or share > 0 for n, share in zip(sizes, full, strict=True))
        busy = [n / share for n, share in zip(sizes, full, strict=True) if share]
        assert max(busy) <= total / sum(full) + 1 / min(share for share in full if share) + 1e-9


def test_no_rank_takes_more_than_its_most_of_a_larger_last_batch():
    plan = PartitionPlan((12, 4), hi=(13, 100))
    assert plan.split(BatchIndex(0, 9), 24) == (13, 11)


def test_a_last_batch_that_memory_cannot_hold_is_refused():
    with pytest.raises(ValueError, match="at most 17") as caught:
        PartitionPlan((12, 4), hi=(13, 4)).split(BatchIndex(0, 9), 24)
    assert "24 samples" in str(caught.value)


def test_a_journal_read_back_from_text_is_the_same_journal():
    rng = random.Random(3)
    for _ in range(100):
        plan, expected = random_plan(rng, 3, 30, epochs=2)
        again = PartitionPlan((10, 10, 10))
        again.load_state_dict(json.loads(json.dumps(plan.state_dict())))
        assert again.changes == plan.changes
        assert {place: again.sizes_at(place) for place in expected} == expected
        assert again.sizes == plan.sizes


@pytest.mark.parametrize(
    ("place", "sizes", "must_say"),
    [
        (
            BatchIndex(0, 4),
            (4, 4),
            ["BatchIndex(epoch=0, batch=4)", "after the last change at BatchIndex(epoch=0, batch=5)"],
        ),
        (BatchIndex(1, 0), (4, 5), ["(4, 5)", "sum to 8"]),
        (BatchIndex(1, 0), (4, 2, 2), ["(4, 2, 2)", "2 ranks"]),
    ],
)
def test_a_change_that_does_not_fit_is_named_and_leaves_the_plan_as_it_was(place, sizes, must_say):
    plan = PartitionPlan((4, 4))
    plan.change_at(BatchIndex(0, 5), (6, 2))
    before = plan.changes
    with pytest.raises(ValueError, match=r"PartitionPlan: `sizes`") as caught:
        plan.change_at(place, sizes)
    assert [word for word in must_say if word not in str(caught.value)] == []
    assert plan.changes == before
