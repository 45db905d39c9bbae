"""What a speed model learns from windows, against the line that the windows were drawn from."""

import json
import math
import random

import pytest

from lightning_comm.core.adaptive_partition.shares import RankCost
from lightning_comm.core.adaptive_partition.speed import CHANGED, SpeedModel


def fed(*windows):
    model = SpeedModel()
    for samples, seconds in windows:
        model.add(samples, seconds)
    return model


def test_before_the_first_window_nothing_is_known():
    assert SpeedModel().cost() is None


def test_two_sizes_without_noise_give_the_exact_line():
    rng = random.Random(1)
    for case in range(500):
        per_sample_s = rng.uniform(1e-5, 1.0)
        n = rng.randint(1, 500)
        # A slope of a quarter of the seconds per sample is the least that is believed.
        cost = RankCost(rng.choice([0.0, rng.random() * 2]) * per_sample_s * n, per_sample_s)
        other = rng.choice([math.ceil(n * rng.uniform(1.06, 3)), 2 * n])
        sizes = [n] * rng.randint(1, 5) + [other] * rng.randint(1, 5)
        got = fed(*((size, cost.seconds(size)) for size in sizes)).cost()
        assert got.seconds(n) == pytest.approx(cost.seconds(n), rel=1e-9), case
        assert got.per_sample_s == pytest.approx(cost.per_sample_s, rel=1e-6), case


@pytest.mark.parametrize("sizes", [(100,), (100, 100, 100), (100, 103, 105)])
def test_sizes_within_five_percent_count_all_time_as_per_sample(sizes):
    cost = fed(*((n, 0.5 + 0.01 * n) for n in sizes)).cost()
    assert cost.fixed_s == 0.0
    assert cost.seconds(100) == pytest.approx(1.5, rel=0.03)


def test_the_slope_stays_within_its_bounds_whatever_the_noise():
    rng = random.Random(2)
    flat = steep = 0
    for _ in range(500):
        windows = [(n, 0.01 * n * rng.uniform(0.5, 2)) for n in rng.choices(range(20, 60), k=rng.randint(1, 12))]
        cost = fed(*windows).cost()
        assert cost.fixed_s >= 0.0
        assert cost.per_sample_s > 0.0
        share = cost.per_sample_s * 40 / cost.seconds(40)
        assert 0.1 < share <= 1.0
        flat, steep = flat + (share < 0.4), steep + (share == 1.0)
    assert min(flat, steep) > 50


def test_more_windows_of_a_steady_rank_spread_the_model_less():
    rng = random.Random(3)
    spread = []
    for windows in (1, 4, 20):
        errors = [fed(*((32, rng.gauss(1.0, 0.028)) for _ in range(windows))).cost().seconds(32) for _ in range(400)]
        spread.append(math.sqrt(sum((error - 1) ** 2 for error in errors) / 400))
    # Discounted by 0.8, one window has the spread of a window, and many have (1 - 0.8) / (1 + 0.8) of its square.
    assert spread == pytest.approx([0.028, 0.0144, 0.028 / 3], rel=0.15)


def test_a_lone_slow_window_is_forgotten_and_two_are_a_change_of_speed():
    steady = fed(*[(32, 1.0)] * 5, (32, 3.0))
    assert (steady.cost().seconds(32), steady.changes) == (1.0, 0)
    steady.add(32, 1.0)
    steady.add(32, 3.0)
    assert (steady.cost().seconds(32), steady.changes) == (1.0, 0)
    steady.add(32, 3.1)
    assert steady.changes == 1
    assert 3.0 <= steady.cost().seconds(32) <= 3.1


def test_one_slow_and_one_fast_window_are_no_change_of_speed():
    model = fed(*[(32, 1.0)] * 5, (32, 1.5), (32, 0.5))
    assert (model.changes, model.cost().seconds(32)) == (0, 1.0)


@pytest.mark.parametrize("factor", [0.25, 0.8, 1.2, 4.0])
def test_two_windows_after_a_change_of_all_speed_the_line_is_exact_again(factor):
    before = RankCost(0.2, 0.01)
    after = RankCost(0.2 * factor, 0.01 * factor)
    model = fed(*((n, before.seconds(n)) for n in (32, 48, 48, 48)), *[(48, after.seconds(48))] * 2)
    assert model.changes == 1
    assert model.cost() == pytest.approx(after)


def test_after_any_change_two_new_sizes_give_the_exact_line_and_what_was_before_counts_no_more():
    before, after = RankCost(0.2, 0.01), RankCost(0.3, 0.004)
    model = fed(*((n, before.seconds(n)) for n in (32, 48, 48)), *((n, after.seconds(n)) for n in (48, 48, 60)))
    assert model.changes == 1
    assert model.cost() == pytest.approx(after)


def test_a_rank_that_slows_by_and_by_keeps_its_proportion_of_fixed_time():
    cost, model = RankCost(0.2, 0.01), SpeedModel()
    model.add(32, cost.seconds(32))
    for window in range(12):
        model.add(48, cost.seconds(48) * 1.02**window)
    got = model.cost()
    assert got.fixed_s / got.seconds(48) == pytest.approx(cost.fixed_s / cost.seconds(48), rel=1e-9)
    assert model.changes == 0


def test_a_size_not_measured_for_long_is_forgotten():
    model = fed((32, 0.52), *[(48, 0.68)] * 40)
    assert model.cost() == pytest.approx(RankCost(0.0, 0.68 / 48))


@pytest.mark.parametrize("bad", [(32, math.nan), (32, math.inf), (32, -math.inf), (32, 0.0), (32, -1.0), (0, 1.0)])
def test_what_is_no_measurement_is_ignored_and_counted(bad):
    model, clean = fed((32, 1.0), bad, (48, 1.5)), fed((32, 1.0), (48, 1.5))
    assert (model.ignored, clean.ignored) == (1, 0)
    assert model.cost() == clean.cost()
    assert not model.add(*bad)


@pytest.mark.parametrize("stop_at", range(24))
def test_a_resumed_model_goes_on_bit_for_bit(stop_at):
    rng = random.Random(5)
    speeds = [1.0] * 8 + [2.0] * 8 + [0.5] * 8
    windows = [(rng.choice([32, 33, 48]), speed * rng.gauss(1, 0.03)) for speed in speeds]
    never_stopped, first, resumed = SpeedModel(), fed(*windows[:stop_at]), SpeedModel()
    resumed.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for index, window in enumerate(windows):
        never_stopped.add(*window)
        if index >= stop_at:
            resumed.add(*window)
    assert resumed.state_dict() == never_stopped.state_dict()
    assert resumed.cost() == never_stopped.cost()
    assert never_stopped.changes > 0


def test_the_threshold_of_a_change_lies_well_above_the_jitter_of_a_window():
    assert 4 * 1.2533 * 0.1 / math.sqrt(20) < CHANGED
