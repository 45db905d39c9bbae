"""A pilot's figures against numbers worked out by hand."""

import pytest
from support.pilot_trials import ddp, trial

from lightning_comm.planning.pilot.costs import LIMIT, Trial, costs, summarise, timed_steps
from lightning_comm.planning.projection import RunPlan


def test_rounds_are_counted_whole_and_from_the_end_of_the_warm_up():
    seen = timed_steps(trial("local_sgd", step_s=0.1, period=6, warmup=7))
    assert (seen.inside, seen.syncing) == ((13, 14, 15, 16, 17), (18,))


def test_a_trial_that_starts_without_warm_up_counts_its_first_round():
    assert timed_steps(trial("local_sgd", step_s=0.1, period=10, warmup=0)).syncing == (10, 20)


def test_a_synchronisation_costs_what_its_step_takes_longer_on_the_slowest_rank():
    found = costs(trial("local_sgd", step_s=0.1, sync_s=0.05, period=4))
    assert found.step_s == pytest.approx(0.11)
    assert found.sync_s == pytest.approx(0.05)


def test_steps_and_synchronisations_add_up_to_the_measured_time():
    uneven = Trial("qsr", 0, 2, 0, (2, 5, 9), ((9.0, 9.0, 0.1, 0.3, 0.9, 0.2, 0.1, 0.4, 1.1, 7.0),))
    found, seen = costs(uneven), timed_steps(uneven)
    steps = len(seen.inside) + len(seen.syncing)
    total = sum(uneven.step_s[0][2:9])
    assert steps * found.step_s + len(seen.syncing) * found.sync_s == pytest.approx(total)


def test_a_period_of_one_keeps_its_whole_time():
    every = trial("local_sgd", step_s=0.1, sync_s=0.05, period=1, ranks=1)
    found = costs(every)
    assert (found.step_s, found.sync_s) == (pytest.approx(0.15), 0.0)


def test_both_phases_of_post_local_updates_are_seen():
    row = (9.0,) * 4 + (0.3,) * 6 + (0.1, 0.1, 0.1, 0.1, 0.6) * 2
    found = costs(Trial("post_local_sgd", 0, 4, 10, (15, 20), (row,)))
    assert found.gradient_step_s == pytest.approx(0.3)
    assert found.step_s == pytest.approx(0.1)
    assert found.sync_s == pytest.approx(0.5)


def test_too_few_steps_for_a_round_are_refused():
    with pytest.raises(ValueError, match="pilot: ") as caught:
        timed_steps(trial("local_sgd", step_s=0.1, period=18))
    said = str(caught.value)
    assert [
        word for word in ("--steps", "whole round", "4 steps of warm-up", "got 20", "[18]") if word not in said
    ] == []


@pytest.mark.parametrize("name", ["ddp", "local_sgd", LIMIT])
def test_a_trial_that_ended_in_its_warm_up_is_refused_and_one_that_ended_early_is_counted_to_its_end(name):
    with pytest.raises(ValueError, match="must be more than the 10 steps of warm-up; got 10 under"):
        timed_steps(Trial(name, 0, 10, 60, (), ((0.1,) * 10,)))
    short = timed_steps(Trial("ddp", 0, 10, 60, (), ((0.1,) * 16,)))
    assert short.gradient == tuple(range(11, 17))


def test_the_limit_has_no_rounds():
    assert timed_steps(trial(LIMIT, step_s=0.1, period=0)).inside == tuple(range(5, 21))


def test_the_whole_run_is_projected_and_compared_in_pairs():
    local = [trial("local_sgd", r, step_s=s, sync_s=0.4, period=4, ranks=1) for r, s in enumerate((0.1, 0.2, 0.3))]
    base = [ddp(r, step_s=s) for r, s in enumerate((0.4, 0.4, 0.8))]
    limit = [trial(LIMIT, r, step_s=0.1, ranks=1) for r in range(3)]
    plans = {"ddp": RunPlan(100, 100), "local_sgd": RunPlan(100, 0, (50, 100))}
    found = summarise([*base, *local, *limit], plans)
    assert found["local_sgd"].run_s.values == pytest.approx((10.8, 20.8, 30.8))
    assert found["ddp"].run_s.values == pytest.approx((40.0, 40.0, 80.0))
    assert found["local_sgd"].speedup.values == pytest.approx((40 / 10.8, 40 / 20.8, 80 / 30.8))
    assert found["local_sgd"].of_limit.values == pytest.approx((1 / 1.08, 1 / 2.08, 1 / 3.08))
    assert found["local_sgd"].plan.synchronisations == 2
    assert found[LIMIT].run_s is None  # of which no plan was given
    assert found["ddp"].sync_s is None


def test_without_a_plan_the_measured_steps_stand_for_the_run():
    found = summarise([trial("local_sgd", step_s=0.1, sync_s=0.4, period=4, ranks=1)], {})["local_sgd"]
    assert found.run_step_s.median == pytest.approx(0.1 + 0.4 / 4)
    assert (found.plan, found.run_s, found.speedup, found.of_limit) == (None, None, None, None)


def test_a_repeat_that_only_one_strategy_has_is_in_no_ratio():
    found = summarise([ddp(0), ddp(1), trial("local_sgd", 1, step_s=0.1, period=4, ranks=1)], {})
    assert found["local_sgd"].speedup.values == pytest.approx((2.0,))
    assert found["local_sgd"].run_step_by_repeat == {1: pytest.approx(0.1)}


@pytest.mark.parametrize(("limit_s", "shares"), [((0.1, 0.1, 0.1019), 3), ((0.1, 0.1, 0.1021), 0), ((0.1, 0.1), 0)])
def test_shares_of_a_limit_are_given_where_it_is_steady_and_ratios_to_ddp_always(limit_s, shares):
    trials = [trial(LIMIT, repeat, step_s=seconds, ranks=1) for repeat, seconds in enumerate(limit_s)]
    trials += [ddp(repeat) for repeat in range(len(limit_s))]
    found = summarise(trials, {})
    assert len(found["ddp"].of_limit.values if found["ddp"].of_limit else ()) == shares
    assert found[LIMIT].speedup.values == pytest.approx([0.2 / seconds for seconds in limit_s])


def test_bytes_samples_and_exposed_time_follow_the_run():
    sent = tuple(100.0 if step % 4 == 0 else 0.0 for step in range(1, 21))
    exposed = tuple(0.3 if step % 4 == 0 else 0.0 for step in range(1, 21))
    one = trial(
        "local_sgd", step_s=0.1, sync_s=0.4, period=4, ranks=1, sent_bytes=sent, exposed_s=exposed, samples=(32,) * 20
    )
    found = summarise([one], {"local_sgd": RunPlan(100, 0, (50, 100))})["local_sgd"]
    assert found.run_bytes.median == pytest.approx(200)
    assert found.step_bytes.median == pytest.approx(2)
    assert found.exposed.median == pytest.approx(2 * 0.3 / 10.8)
    assert found.samples_per_s.median == pytest.approx(32 * 100 / 10.8)


def test_what_the_profiler_could_not_measure_is_not_made_up():
    found = summarise([trial("local_sgd", step_s=0.1, period=4)], {})["local_sgd"]
    assert (found.step_bytes, found.exposed, found.samples_per_s, found.run_bytes) == (None, None, None, None)


def test_a_record_of_the_results_file_is_read_whole():
    record = {
        "strategy": "qsr",
        "repeat": 1,
        "warmup_steps": 2,
        "gradient_steps": 0,
        "sync_steps": [4],
        "step_s": [[0.1, 0.2], [0.3, 0.4]],
        "samples": [8, 8],
        "sent_bytes": None,
        "exposed_s": [0.0, 0.1],
        "loss": 1.5,
        "anything": "else",
    }
    assert Trial.read(record) == Trial("qsr", 1, 2, 0, (4,), ((0.1, 0.2), (0.3, 0.4)), (8, 8), None, (0.0, 0.1), 1.5)
