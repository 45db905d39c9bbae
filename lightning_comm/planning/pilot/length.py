"""The length of a pilot's trials in steps: as requested, or less where the run is shorter.

Numbers in, numbers out.
"""

from collections.abc import Collection

STEPS, WARMUP_STEPS = 60, 10  # of a trial; what the user does not give
FEWEST_COUNTED_STEPS = 5  # in a trial that is shortened
_WARMUP_SHARE = 4  # a shortened trial warms up for one step in so many


def fit_to_run(steps: int, warmup_steps: int, total_steps: int | None, set_by_user: Collection[str]) -> tuple[int, int]:
    """Return the steps of a trial, and how many of them warm up, in a run that may be shorter.

    Args:
        steps: Optimizer steps of a trial, as asked for.
        warmup_steps: How many of them are not counted.
        total_steps: Optimizer steps of the user's run; ``None`` if that is not known.
        set_by_user: Which of ``steps`` and ``warmup_steps`` the user has set; these are not changed.

    Raises:
        ValueError: If the run is shorter and cannot be measured so; the message names the way out.

    Example:
        >>> fit_to_run(60, 10, 88, set_by_user=()), fit_to_run(60, 10, 16, set_by_user=())
        ((60, 10), (16, 4))
        >>> fit_to_run(60, 3, 16, set_by_user=["warmup_steps"])
        (16, 3)

    """
    if total_steps is None or total_steps >= steps:
        return steps, warmup_steps
    longer = "Give the run more steps (--trainer.max_epochs or --trainer.max_steps)"
    shorter = min(warmup_steps, total_steps // _WARMUP_SHARE)
    is_enough = total_steps - shorter >= FEWEST_COUNTED_STEPS
    if not is_enough and "steps" not in set_by_user:
        raise ValueError(
            f"a trial takes {FEWEST_COUNTED_STEPS} steps or more behind its warm-up, so the run must have at least "
            f"{FEWEST_COUNTED_STEPS + 1}; yours has {counted(total_steps)}. {longer}."
        )
    if "steps" in set_by_user:
        so = f", or --steps {total_steps} --warmup-steps {shorter}" if is_enough else ""
        raise ValueError(
            f"`--steps` must be at most the steps of your run, of which there are {total_steps}; got {steps}. "
            f"{longer}{so}."
        )
    if "warmup_steps" not in set_by_user:
        return total_steps, shorter
    if total_steps - warmup_steps < 1:
        raise ValueError(
            f"`--warmup-steps` must be less than the steps of your run, of which there are {total_steps}; got "
            f"{warmup_steps}. {longer}, or --warmup-steps {shorter}."
        )
    return total_steps, warmup_steps


def ended_early(taken: int, steps: int, warmup_steps: int) -> str:
    """Return the message on a trial that ended before its steps were taken, with the way out."""
    shorter = min(warmup_steps, taken // _WARMUP_SHARE)
    so = f", or give --steps {taken} --warmup-steps {shorter}" if taken - shorter >= FEWEST_COUNTED_STEPS else ""
    return (
        f"a trial must take {counted(steps)} (`--steps`); this one ended after {taken}: the data were used up, or a "
        "callback or the model ended the run (`trainer.should_stop`). Let the run go on for longer "
        f"(--trainer.max_epochs, or leave out what ends it){so}."
    )


def counted(steps: int) -> str:
    """Return a number of steps with its unit.

    Example:
        >>> counted(1), counted(16)
        ('1 step', '16 steps')

    """
    return f"{steps} step" if steps == 1 else f"{steps} steps"
