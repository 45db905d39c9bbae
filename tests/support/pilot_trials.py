"""Trials of a pilot with times set by hand."""

from lightning_comm.planning.pilot.costs import Trial


def trial(strategy, repeat=0, *, step_s, sync_s=0.0, period=0, steps=20, warmup=4, gradient_steps=0, ranks=2, **more):
    """A trial whose every step takes `step_s`, and one that ends a round `sync_s` more; rank 1 is a little slower."""
    ends = tuple(range(gradient_steps + period, steps + 1, period)) if period else ()
    rows = tuple(
        tuple(step_s * (1 + 0.1 * rank) + (sync_s if step in ends else 0.0) for step in range(1, steps + 1))
        for rank in range(ranks)
    )
    return Trial(strategy, repeat, warmup, gradient_steps, ends, rows, **more)


def ddp(repeat=0, step_s=0.2, steps=20, **more):
    return trial("ddp", repeat, step_s=step_s, gradient_steps=steps, steps=steps, ranks=1, **more)
