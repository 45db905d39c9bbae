"""The advice follows the measurements, and knows how to say no."""

import pytest
from support.pilot_trials import ddp, trial

from lightning_comm.planning.pilot.advice import advise
from lightning_comm.planning.pilot.costs import LIMIT, summarise
from lightning_comm.planning.projection import RunPlan


def advice(ddp_s, limit_s, **others):
    """The advice for repeats of DDP, of the limit, and of others; seconds of a step."""
    trials = [ddp(repeat, step_s=seconds) for repeat, seconds in enumerate(ddp_s)]
    trials += [trial(LIMIT, repeat, step_s=seconds, ranks=1) for repeat, seconds in enumerate(limit_s)]
    for name, values in others.items():
        trials += [trial(name, repeat, step_s=seconds, period=4, ranks=1) for repeat, seconds in enumerate(values)]
    return advise(summarise(trials, {}))


def test_the_fastest_strategy_is_named_with_its_interval():
    said = advice([0.2, 0.2, 0.2], [0.1, 0.1, 0.1], local_sgd=[0.15, 0.15, 0.15], qsr=[0.12, 0.121, 0.119])
    assert (said.best, said.bottleneck) == ("qsr", True)
    assert said.headline == "Try `qsr`: it is 1.67 times as fast as plain DDP (1.63 to 1.70 with 95 % confidence)."
    assert said.reasons == (
        "Without communication the same job is 2.00 times as fast as plain DDP (2.00 to 2.00 with 95 % confidence); "
        "sending less can make it no faster.",
        "`qsr` is 1.67 times as fast as plain DDP (1.63 to 1.70 with 95 % confidence), over the measured steps.",
        "`local_sgd` is 1.33 times as fast as plain DDP (1.33 to 1.33 with 95 % confidence), over the measured steps.",
    )


def test_without_a_bottleneck_plain_ddp_is_kept():
    said = advice([0.102] * 3, [0.1] * 3, qsr=[0.1] * 3)
    assert (said.best, said.bottleneck) == (None, False)
    assert said.headline.startswith("Not communication-bound: keep plain DDP.")
    assert "would be 1.02 times as fast" in said.headline


@pytest.mark.parametrize("limit_s", [0.15, 0.198, 0.2, 0.25], ids=["a gain", "no gain", "equal", "slower"])
def test_a_strategy_that_beats_the_job_without_communication_puts_both_in_doubt(limit_s):
    said = advice([0.2] * 3, [limit_s] * 3, qsr=[0.12, 0.121, 0.119])
    assert (said.best, said.bottleneck) == (None, None)
    assert said.headline.startswith("In doubt: `qsr` is 1.67 times as fast as plain DDP (1.63 to 1.70 with 95 % conf")
    assert f"the job without communication {0.2 / limit_s:.2f} times as fast as plain DDP" in said.headline
    assert said.headline.endswith(
        "measure again with more repeats (`--repeats 6`), more steps or on a quieter machine."
    )
    assert "`qsr` came out faster, which cannot be, so one of them is in doubt" in said.reasons[0]
    assert "can make it no faster" not in " ".join((said.headline, *said.reasons))
    assert "no more" not in said.headline


def test_a_strategy_that_is_faster_within_the_noise_puts_nothing_in_doubt():
    said = advice([0.2] * 3, [0.1, 0.12, 0.11], qsr=[0.105, 0.108, 0.106], local_sgd=[0.106, 0.107, 0.106])
    assert said.best == "qsr"
    assert said.reasons[0].endswith(
        "; `qsr` and `local_sgd` came out faster, which is within the noise of the repeats."
    )
    slower = advice([0.2] * 3, [0.22] * 3, qsr=[0.21] * 3)  # both are slower than DDP, so DDP stays in any case
    assert slower.headline.startswith("Not communication-bound: keep plain DDP.")
    assert slower.headline.endswith("would be 0.91 times as fast as plain DDP (0.91 to 0.91 with 95 % confidence).")


def test_a_job_that_is_no_faster_without_communication_is_not_called_a_limit():
    said = advice([0.2] * 3, [0.21] * 3, qsr=[0.22] * 3)
    assert said.reasons[0].endswith("; so the repeats show nothing that sending less could gain.")


@pytest.mark.parametrize("thousandth", range(1030, 1071))
def test_what_is_printed_as_worth_it_is_recommended_and_nothing_else_is(thousandth):
    """No headline says that no strategy is 1.05 times as fast beside a figure of 1.05."""
    said = advice([0.2] * 3, [0.1] * 3, qsr=[0.2 / (thousandth / 1000)] * 3)
    printed = said.reasons[1].split(" times")[0].removeprefix("`qsr` is ")
    assert (said.best == "qsr") == (float(printed) >= 1.05)
    limited = advice([0.2] * 3, [0.2 / (thousandth / 1000)] * 3, qsr=[0.2] * 3)
    assert limited.bottleneck == (float(printed) >= 1.05)


def test_but_stands_only_before_a_gain_that_was_missed():
    limit = [0.2, 0.22, 0.195]  # 0.98 times as fast, between 0.83 and 1.15: it may or may not be a bottleneck
    said = advice([0.2] * 3, limit, qsr=[0.21] * 3)
    assert said.headline.startswith("Keep plain DDP: without communication the job would be 0.9")
    assert said.headline.endswith("), and no strategy tried is 1.05 times as fast or more.")


def test_an_interval_that_does_not_contain_1_is_not_shown_as_one_that_does():
    said = advice([0.2] * 3, [0.1] * 3, qsr=[0.2 / 1.10, 0.2 / 1.15, 0.2 / 1.18])
    tight = advice([0.2] * 3, [0.1] * 3, qsr=[0.2 / ratio for ratio in (1.06, 1.06, 1.115)])
    for advised in (said, tight):
        assert advised.best == "qsr"
    low = float(tight.headline.split("(")[1].split(" to ")[0])
    assert 1 < low < 1.005


def test_a_limit_that_is_no_faster_for_sure_is_no_bottleneck_where_it_cannot_be_much_faster():
    said = advice([0.100, 0.101, 0.099], [0.1] * 3, qsr=[0.1] * 3)  # 1.00 (0.98 to 1.03)
    assert (said.best, said.bottleneck) == (None, False)


@pytest.mark.parametrize(
    "qsr", [[0.195, 0.195, 0.195], [0.21, 0.21, 0.21], [0.2, 0.201, 0.199]], ids=["too-little", "slower", "equal"]
)
def test_plain_ddp_is_kept_where_nothing_can_be_worth_it(qsr):
    said = advice([0.2] * 3, [0.1] * 3, qsr=qsr)
    assert (said.best, said.bottleneck) == (None, True)
    assert said.headline.startswith("Keep plain DDP: without communication the job would be 2.00 times as fast")
    assert said.headline.endswith("but no strategy tried is 1.05 times as fast or more.")


def test_noise_is_judged_against_the_size_of_the_saving():
    """43 % less time within 3 % of noise is a finding, though the limit itself spreads by 6 %."""
    ddp_s, limit_s = [0.200, 0.206, 0.194, 0.203, 0.197], [0.100, 0.103, 0.097, 0.101, 0.099]
    said = advice(ddp_s, limit_s, qsr=[0.57 * 0.2 * noise for noise in (1.0, 0.97, 1.03, 1.02, 0.98)])
    assert (said.best, said.bottleneck) == ("qsr", True)
    assert said.headline.startswith("Try `qsr`: it is 1.75 times as fast as plain DDP (1.6")
    assert said.reasons[1] == (
        "Shares of that limit are left out: the limit itself spreads by 6.0 % between repeats, more than 2.0 %."
    )


def test_a_ratio_whose_interval_contains_1_is_inconclusive():
    said = advice([0.2] * 3, [0.1] * 3, qsr=[0.15, 0.15, 0.21])
    assert (said.best, said.bottleneck) == (None, True)
    assert said.headline.startswith("Inconclusive: `qsr` is 1.19 times as fast as plain DDP (0.7")
    assert "That interval contains 1" in said.headline
    assert "--repeats 6" in said.headline
    assert said.reasons[1].endswith("over the measured steps: inconclusive, since the interval contains 1.")


def test_the_fastest_of_those_that_are_faster_for_sure_is_named_not_one_that_may_be():
    said = advice([0.2] * 3, [0.05] * 3, qsr=[0.08, 0.08, 0.3], local_sgd=[0.15] * 3)
    assert said.best == "local_sgd"


def test_a_strategy_that_is_slower_is_called_so_in_the_same_direction():
    said = advice([0.2] * 3, [0.1] * 3, qsr=[0.25, 0.251, 0.249])
    assert "`qsr` is 0.80 times as fast as plain DDP (0.79 to 0.81 with 95 % confidence), over" in said.reasons[1]
    assert said.reasons[1].endswith(": it is slower.")


@pytest.mark.parametrize(("repeats", "said_of"), [(1, "1 repeat has"), (2, "2 repeats have")])
def test_one_or_two_repeats_are_inconclusive_and_the_option_is_named(repeats, said_of):
    said = advice([0.2] * repeats, [0.1] * repeats, qsr=[0.12] * repeats)
    assert (said.best, said.bottleneck) == (None, None)
    assert said.headline.startswith(f"Inconclusive: {said_of} no interval")
    assert "--repeats 5" in said.headline
    assert any("`qsr` is 1.67 times as fast" in reason for reason in said.reasons)  # the numbers are shown all the same
    few = "Shares of that limit are left out: fewer than 3 repeats do not show how steady it is."
    assert said.reasons[1] == advice([0.2] * repeats, [0.1, 0.2][:repeats]).reasons[1] == few


def test_the_time_saved_of_the_whole_run_is_named():
    trials = [ddp(repeat, step_s=2.0) for repeat in range(3)]
    trials += [trial(LIMIT, repeat, step_s=1.0, ranks=1) for repeat in range(3)]
    trials += [trial("qsr", repeat, step_s=1.0, sync_s=0.0, period=4, ranks=1) for repeat in range(3)]
    plans = {"ddp": RunPlan(7200, 7200), "qsr": RunPlan(7200, 0, (7200,))}
    said = advise(summarise(trials, plans))
    assert said.headline.endswith("confidence), and saves 2.0 h of 4.0 h.")
    assert said.reasons[1].endswith("over the whole run.")


def test_strategies_that_the_repeats_do_not_tell_apart_are_named_by_their_own_ratio():
    """Both are slower in the last repeat, alike: ranges overlap, and their ratio tells them apart."""
    said = advice([0.2] * 3, [0.1] * 3, qsr=[0.11, 0.12, 0.13], local_sgd=[0.115, 0.119, 0.135])
    assert said.best == "qsr"
    assert said.reasons[-1] == (
        "The repeats do not tell `local_sgd` from `qsr`: the interval of their ratio contains 1."
    )
    apart = advice([0.2] * 3, [0.1] * 3, qsr=[0.11, 0.12, 0.13], local_sgd=[0.115, 0.126, 0.136])
    assert not [reason for reason in apart.reasons if "do not tell" in reason]


def test_without_ddp_there_is_no_answer():
    said = advise(summarise([trial("qsr", step_s=0.1, period=4), trial(LIMIT, step_s=0.1)], {}))
    assert said.best is said.bottleneck is None
    assert "`ddp` could not be measured" in said.headline


def test_without_the_limit_strategies_are_compared_with_ddp_all_the_same():
    said = advice([0.2] * 3, [], qsr=[0.12] * 3)
    assert (said.best, said.bottleneck) == ("qsr", None)
    assert said.reasons[0].startswith("The job without communication could not be measured")


def test_where_only_ddp_was_tried_the_answer_is_about_the_job_without_communication():
    assert advice([0.2] * 3, [0.1] * 3).headline.endswith("but no other strategy was measured.")
    said = advice([0.2, 0.2, 0.3], [0.2, 0.19, 0.18])
    assert said.headline.startswith("Inconclusive: the job without communication is 1.")
