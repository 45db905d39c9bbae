"""The point of a batch at which a worker lets the next one begin, so that workers follow each other evenly."""

import math


def token_boundary(workers: int, stages: int, forward_share: float = 1 / 3) -> int:
    """Return after how many of the 2 S stage passes of a batch a worker has used 1/N of the batch's time.

    The passes are the S forwards and then the S backwards, each as long as the others of its kind. Where 1/N falls
    inside a pass, the boundary is before that pass (but after the first): so N turns fit into one batch, and waiting
    for one's turn costs no time once all are at work.

    Args:
        workers: N, at least 1.
        stages: S, at least 1.
        forward_share: The part of a batch's time that its forward takes; above 0 and below 1.

    Raises:
        ValueError: If an argument is out of range.

    Note:
        *Communication.* None. The worker sends its token to the next one at this point.

    Example:
        >>> [token_boundary(workers, stages=3 * workers) for workers in (1, 2, 3, 4)]
        [6, 7, 9, 9]

    """
    if workers < 1:
        raise ValueError(f"token_boundary: `workers` must be >= 1; got {workers!r}. It is the number of ranks.")
    if stages < 1:
        raise ValueError(f"token_boundary: `stages` must be >= 1; got {stages!r}. Give as many as workers, or more.")
    if not 0 < forward_share < 1:
        raise ValueError(
            f"token_boundary: `forward_share` must be above 0 and below 1; got {forward_share!r}. It is the part of a "
            "batch's time that its forward takes; 1/3 is usual."
        )
    part = 1 / workers
    forwards = stages * min(1.0, part / forward_share)
    backwards = stages * max(0.0, (part - forward_share) / (1 - forward_share))
    # A boundary on the edge of a pass must not fall before it by a rounding error.
    return max(1, math.floor(forwards + backwards + 1e-9))
