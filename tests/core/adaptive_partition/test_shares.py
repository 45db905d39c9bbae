"""Exact shares against brute force and an exchange argument, and the closed forms against the exact shares."""

import heapq
import itertools
import random

import pytest

from lightning_comm.core.adaptive_partition.shares import (
    RankCost,
    optimal_seconds,
    proportional_sizes,
    solve_partition,
    speedup_of_balancing,
    step_speedup,
)


def slowest_s(costs, sizes):
    return max(cost.seconds(n) for cost, n in zip(costs, sizes, strict=True))


def brute_force_s(costs, total, lo, hi):
    """The least maximum over every way of sharing: no idea of the solver is in it."""
    choices = itertools.product(*(range(low, min(high, total) + 1) for low, high in zip(lo, hi, strict=True)))
    return min((slowest_s(costs, sizes) for sizes in choices if sum(sizes) == total), default=None)


def greedy_s(costs, total):
    """One sample after the other to whoever is done first: slow, and without bisection."""
    sizes = [0] * len(costs)
    heap = [(cost.seconds(1), rank) for rank, cost in enumerate(costs)]
    heapq.heapify(heap)
    for _ in range(total):
        _, rank = heap[0]
        sizes[rank] += 1
        heapq.heapreplace(heap, (costs[rank].seconds(sizes[rank] + 1), rank))
    return slowest_s(costs, sizes)


def random_costs(rng, ranks):
    """Ties, ranks that work in no time, and fixed times beyond the optimum are all common among them."""
    draw = rng.choice([lambda: rng.choice([0, 1, 2, 3]), lambda: rng.random() * 4])
    return [RankCost(rng.choice([0.0, 0.0, 1.0, 20.0]) * rng.random(), draw() / 8) for _ in range(ranks)]


def test_no_other_shares_are_faster_in_any_small_case():
    rng, feasible, bound, fixed = random.Random(1), 0, 0, 0
    for case in range(2000):
        ranks, total = rng.randint(1, 4), rng.randint(0, 9)
        costs = random_costs(rng, ranks)
        lo = [rng.choice([0, 0, 1, 2]) for _ in range(ranks)]
        hi = [low + rng.choice([0, 1, 3, 9, 9]) for low in lo]
        best_s = brute_force_s(costs, total, lo, hi)
        if best_s is None:
            with pytest.raises(ValueError, match="must take"):
                solve_partition(costs, total, lo, hi)
            continue
        sizes = solve_partition(costs, total, lo, hi)
        assert sum(sizes) == total, case
        assert all(low <= n <= high for low, n, high in zip(lo, sizes, hi, strict=True)), case
        assert slowest_s(costs, sizes) == best_s, f"case {case}: {costs} {total} {lo} {hi} {sizes}"
        feasible += 1
        bound += any(n == high for n, high in zip(sizes, hi, strict=True))
        fixed += any(cost.fixed_s > best_s - cost.per_sample_s for cost in costs)
    # All kinds of cases must have been met, or the above proves little.
    assert min(feasible, bound, fixed) > 250


def test_no_single_sample_can_be_moved_for_a_faster_step_in_large_cases():
    rng = random.Random(2)
    for case in range(150):
        ranks, total = rng.randint(2, 64), rng.randint(1, 20_000)
        costs = [RankCost(rng.choice([0.0, rng.random()]), rng.uniform(1e-5, 1e-2)) for _ in range(ranks)]
        lo, hi = rng.randint(0, total // ranks), total // ranks + rng.randint(1, total)
        sizes = solve_partition(costs, total, lo, hi)
        assert sum(sizes) == total, case
        assert all(lo <= n <= hi for n in sizes), case
        step_s = slowest_s(costs, sizes)
        # The step gets shorter only if the slowest gives a sample away, and then whoever takes it must be faster.
        slowest = [m for m in range(ranks) if costs[m].seconds(sizes[m]) == step_s]
        takers = [costs[m].seconds(sizes[m] + 1) for m in range(ranks) if sizes[m] < hi and m not in slowest]
        assert any(sizes[m] == lo for m in slowest) or min(takers, default=step_s) >= step_s, case


def test_large_batches_are_shared_as_by_dealing_them_out_one_by_one():
    rng = random.Random(3)
    for case in range(60):
        costs = [RankCost(rng.choice([0.0, rng.random()]), rng.uniform(1e-4, 1e-2)) for _ in range(rng.randint(2, 32))]
        total = rng.randint(1, 5000)
        assert slowest_s(costs, solve_partition(costs, total)) == greedy_s(costs, total), case


def test_equal_costs_give_even_shares():
    assert solve_partition([RankCost(0.1, 0.01)] * 4, 64) == (16, 16, 16, 16)


def test_the_unit_of_time_changes_no_share():
    rng = random.Random(4)
    for _ in range(100):
        costs = [RankCost(rng.random(), rng.random()) for _ in range(5)]
        for unit in (2.0**-40, 2.0**40):
            scaled = [RankCost(cost.fixed_s * unit, cost.per_sample_s * unit) for cost in costs]
            assert solve_partition(scaled, 333, lo=1) == solve_partition(costs, 333, lo=1)


def test_proportional_shares_are_exact_where_whole_numbers_can_be():
    rng = random.Random(5)
    for _ in range(300):
        shares = [rng.randint(0, 9) for _ in range(rng.randint(1, 8))]
        if any(shares):
            times = rng.randint(1, 50)
            assert proportional_sizes(times * sum(shares), shares) == tuple(times * share for share in shares)


def test_proportional_shares_keep_sum_and_bounds():
    rng = random.Random(6)
    for _ in range(500):
        ranks, total = rng.randint(1, 8), rng.randint(20, 300)
        lo, hi = rng.randint(0, total // ranks), total // ranks + rng.randint(1, 20)
        sizes = proportional_sizes(total, [rng.random() for _ in range(ranks)], lo, hi)
        assert sum(sizes) == total
        assert all(lo <= n <= hi for n in sizes)


@pytest.mark.parametrize(
    ("total", "lo", "hi", "must_say"),
    [
        (3, 2, 9, ["solve_partition", "3 samples", "`lo`=2", "at least 4", "Change the bounds or the batch"]),
        (30, 0, 9, ["solve_partition", "30 samples", "`hi`=9", "at most 18", "Change the bounds or the batch"]),
        (9, [5, 1], [4, 9], ["`lo`=[5, 1]", "`hi`=[4, 9]", "within its bounds"]),
    ],
)
def test_bounds_that_cannot_be_met_are_named_with_a_way_out(total, lo, hi, must_say):
    with pytest.raises(ValueError, match="must take") as caught:
        solve_partition([RankCost(0.0, 1.0)] * 2, total, lo, hi)
    assert [word for word in must_say if word not in str(caught.value)] == []


@pytest.mark.parametrize("shares", [[1, -3], [0, 0], [1, float("nan")], [float("inf"), 1], []])
def test_shares_that_are_no_ratio_are_named_with_a_way_out(shares):
    with pytest.raises(ValueError, match="not all 0") as caught:
        proportional_sizes(64, shares)
    assert [w for w in ("proportional_sizes", "`shares`", repr(shares), "[1, 3]") if w not in str(caught.value)] == []


def test_whole_samples_cost_at_most_one_sample_of_the_slowest_rank_over_the_continuous_optimum():
    rng, balanced = random.Random(7), 0
    for case in range(1000):
        costs = [RankCost(rng.choice([0.0, rng.random()]), rng.uniform(1e-3, 1.0)) for _ in range(rng.randint(1, 9))]
        total = rng.randint(1, 60)
        ideal_s = optimal_seconds(costs, total)
        whole_s = slowest_s(costs, solve_partition(costs, total))
        assert ideal_s * (1 - 1e-12) <= whole_s, case
        assert whole_s <= (ideal_s + max(cost.per_sample_s for cost in costs)) * (1 + 1e-12), case
        balanced += ideal_s > max(cost.fixed_s for cost in costs)
    assert balanced > 250


def test_the_continuous_optimum_has_the_batch_done_in_time_and_not_before():
    rng = random.Random(8)
    for _ in range(500):
        costs = [RankCost(rng.choice([0.0, rng.random()]), rng.uniform(1e-3, 1.0)) for _ in range(rng.randint(1, 9))]
        ideal_s, total = optimal_seconds(costs, 100), 100
        done = sum(max(0.0, ideal_s - cost.fixed_s) / cost.per_sample_s for cost in costs)
        assert done >= total * (1 - 1e-9)
        assert done == pytest.approx(total) or ideal_s == max(cost.fixed_s for cost in costs)


def test_a_rank_that_works_in_no_time_takes_all():
    assert optimal_seconds([RankCost(0.5, 0.0), RankCost(0.25, 1.0)], 1000) == 0.5


@pytest.mark.parametrize(
    ("speeds", "speedup"), [([1, 3], 2.0), ([1, 2, 4], 7 / 3), ([1, 1, 1, 0.5], 1.75), ([5, 5], 1.0)]
)
def test_the_closed_form_is_what_the_exact_shares_reach(speeds, speedup):
    costs = [RankCost(0.0, 1 / speed) for speed in speeds]
    total = 28 * len(speeds) * 6
    assert speedup_of_balancing(speeds) == pytest.approx(speedup)
    assert step_speedup(costs, total) == pytest.approx(speedup)


def test_a_constant_delay_of_one_of_two_equal_ranks_costs_half_of_it():
    delayed = [RankCost(0.3, 0.01), RankCost(0.1, 0.01)]
    even_s, best_s = slowest_s(delayed, (50, 50)), slowest_s(delayed, solve_partition(delayed, 100))
    assert even_s - best_s == pytest.approx(0.2 / 2)
    assert step_speedup(delayed, 100) == pytest.approx(even_s / best_s)


def test_time_that_no_share_changes_dilutes_the_speedup_towards_one():
    costs = [RankCost(0.0, 0.01), RankCost(0.0, 0.03)]
    speedups = [step_speedup(costs, 64, exposed_s=exposed_s) for exposed_s in (0.0, 0.48, 1e9)]
    assert speedups == pytest.approx([2.0, (0.96 + 0.48) / (0.48 + 0.48), 1.0])
