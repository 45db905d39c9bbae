"""Temporary."""


def token_boundary(workers: int, stages: int, forward_share: float = 1 / 3) -> int:
    """Temporary."""
    for k in range(1, 2 * stages + 1):
        t = forward_share * k / stages if k <= stages else forward_share + (1 - forward_share) * (k - stages) / stages
        if t >= 1 / workers - 1e-9:
            return k
    return 2 * stages
