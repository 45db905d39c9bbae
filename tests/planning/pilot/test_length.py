"""A pilot takes no more steps than the user's run has, and changes nothing that the user gave."""

import pytest

from lightning_comm.planning.pilot.length import FEWEST_COUNTED_STEPS, STEPS, WARMUP_STEPS, ended_early, fit_to_run


@pytest.mark.parametrize("total", [None, STEPS, STEPS + 1, 10**6])
def test_a_run_that_is_long_enough_or_of_unknown_length_changes_nothing(total):
    for given in ((), ("steps",), ("steps", "warmup_steps")):
        assert fit_to_run(STEPS, WARMUP_STEPS, total, given) == (STEPS, WARMUP_STEPS)


def test_every_shorter_run_is_measured_whole_with_enough_steps_behind_the_warm_up_or_refused():
    for total in range(STEPS):
        if total < FEWEST_COUNTED_STEPS + 1:
            with pytest.raises(
                ValueError, match=rf"must have at least 6; yours has {total} step.*--trainer.max_epochs"
            ):
                fit_to_run(STEPS, WARMUP_STEPS, total, ())
            continue
        steps, warmup = fit_to_run(STEPS, WARMUP_STEPS, total, ())
        assert steps == total
        assert 0 < warmup <= WARMUP_STEPS
        assert steps - warmup >= FEWEST_COUNTED_STEPS
        assert warmup >= min(WARMUP_STEPS, total // 4)


def test_what_the_user_gave_is_kept_or_refused_with_what_would_do():
    assert fit_to_run(60, 12, 16, ["warmup_steps"]) == (16, 12)
    for steps, warmup, given, must_say in (
        (30, 10, ["steps"], ["`--steps` must be at most", "16", "got 30", "max_epochs", "--steps 16 --warmup-steps 4"]),
        (30, 0, ["steps", "warmup_steps"], ["got 30", "--steps 16 --warmup-steps 0"]),
        (60, 16, ["warmup_steps"], ["`--warmup-steps` must be less", "16", "got 16", "or --warmup-steps 4"]),
    ):
        with pytest.raises(ValueError, match=r"--trainer\.max_steps") as caught:
            fit_to_run(steps, warmup, 16, given)
        assert [word for word in must_say if word not in str(caught.value)] == []


def test_what_would_do_does():
    for total in range(FEWEST_COUNTED_STEPS + 1, 30):
        with pytest.raises(ValueError, match="--steps") as caught:
            fit_to_run(30, 10, total, ["steps"])
        steps, warmup = (int(word) for word in str(caught.value).rstrip(".").split(" or --steps ")[1].split()[::2])
        assert fit_to_run(steps, warmup, total, ["steps", "warmup_steps"]) == (steps, warmup)


def test_a_trial_that_ended_early_says_how_far_it_came_and_what_would_do():
    said = ended_early(16, 60, 10)
    must_say = [
        "60 steps (`--steps`)",
        "after 16",
        "should_stop",
        "--trainer.max_epochs",
        "--steps 16 --warmup-steps 4",
    ]
    assert [word for word in must_say if word not in said] == []
    assert "or give --steps" not in ended_early(4, 60, 10)  # too few to measure
