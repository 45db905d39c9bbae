"""The advice follows the measurements, and knows how to say no."""

import pytest
from support.pilot_trials import ddp, trial

from lightning_comm.planning.pilot import LIMIT, summarise
from lightning_comm.planning.pilot_advice import advise
from lightning_comm.planning.projection import RunPlan


def advice(ddp_s, limit_s, **others):
    """The advice for repeats of DDP, of the limit, and of others; seconds of a step."""
    trials = [ddp(repeat, step_s=seconds) for repeat, seconds in enumerate(ddp_s)]
    trials += [trial(LIMIT, repeat, step_s=seconds, ranks=1) for repeat, seconds in enumerate(limit_s)]
    for name, values in others.items():
        trials += [trial(name, repeat, step_s=seconds, period=4, ranks=1) for repeat, seconds in enumerate(values)]
    return advise(summarise(trials, {}))


def test_the_strategy_that_saves_most_is_named():
    said = advice([0.2, 0.2, 0.2], [0.1, 0.1, 0.1], local_sgd=[0.15, 0.15, 0.15], qsr=[0.12, 0.12, 0.12])
    assert (said.best, said.bottleneck) == ("qsr", True)
    assert said.headline == "Try `qsr`: it takes 40.0 % off the time of plain DDP."
    assert said.reasons[0].startswith("Communication that compute does not hide costs plain DDP 50.0 % of its time")
    assert said.reasons[1].startswith("`qsr` takes 60.0 % of DDP's time")


def test_without_a_bottleneck_plain_ddp_is_kept_however_fast_the_others_are():
    said = advice([0.102] * 3, [0.1] * 3, qsr=[0.05] * 3)
    assert (said.best, said.bottleneck) == (None, False)
    assert said.headline.startswith("Not communication-bound: keep plain DDP.")
    assert "2.0 %" in said.headline


@pytest.mark.parametrize(
    "qsr",
    [[0.195, 0.195, 0.195], [0.21, 0.21, 0.21], [0.15, 0.15, 0.21]],
    ids=["saves-too-little", "is-slower", "not-in-every-repeat"],
)
def test_plain_ddp_is_kept_where_nothing_helps_for_sure(qsr):
    said = advice([0.2] * 3, [0.1] * 3, qsr=qsr)
    assert (said.best, said.bottleneck) == (None, True)
    assert said.headline.startswith("Keep plain DDP: communication costs 50.0 %")


def test_a_limit_that_spreads_makes_the_result_inconclusive():
    assert advice([0.2] * 5, [0.1, 0.1, 0.1, 0.101, 0.101], qsr=[0.12] * 5).best == "qsr"
    said = advice([0.2] * 5, [0.1, 0.1, 0.1, 0.103, 0.103], qsr=[0.12] * 5)
    assert (said.best, said.bottleneck) == (None, None)
    assert said.headline.startswith("Inconclusive")
    assert "3.0 %" in said.headline
    assert any("`qsr` takes 60.0 %" in reason for reason in said.reasons)  # the numbers are shown all the same


def test_one_repeat_is_inconclusive():
    said = advice([0.2], [0.1], qsr=[0.12])
    assert (said.best, said.bottleneck) == (None, None)
    assert said.headline.startswith("Inconclusive: one repeat")
    assert "--repeats 5" in said.headline


def test_the_time_saved_of_the_whole_run_is_named():
    trials = [ddp(0, step_s=2.0), ddp(1, step_s=2.0), *(trial(LIMIT, r, step_s=1.0, ranks=1) for r in range(2))]
    trials += [trial("qsr", repeat, step_s=1.0, sync_s=0.0, period=4, ranks=1) for repeat in range(2)]
    plans = {"ddp": RunPlan(7200, 7200), "qsr": RunPlan(7200, 0, (7200,))}
    said = advise(summarise(trials, plans))
    assert said.headline == "Try `qsr`: it takes 50.0 % off the time of plain DDP, 2.0 h of 4.0 h."


def test_strategies_that_the_repeats_do_not_tell_apart_are_named():
    said = advice([0.2] * 3, [0.1] * 3, qsr=[0.11, 0.12, 0.13], local_sgd=[0.125, 0.13, 0.14])
    assert said.best == "qsr"
    assert said.reasons[-1] == "The repeats do not tell `local_sgd` from `qsr`: their ranges overlap."


@pytest.mark.parametrize("gone", ["ddp", LIMIT])
def test_without_something_to_compare_with_there_is_no_answer(gone):
    trials = [trial("qsr", step_s=0.1, period=4)]
    trials += [ddp()] if gone == LIMIT else [trial(LIMIT, step_s=0.1)]
    said = advise(summarise(trials, {}))
    assert said.best is said.bottleneck is None
    assert f"`{gone}` could not be measured" in said.headline
