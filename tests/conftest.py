"""Settings that all tests share."""

import os

import pytest
from support.processes import start_ranks

os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture
def run_ranks():
    """Run ``fn(rank, *args)`` in ``world_size`` processes joined by gloo; return the answers in order of rank."""
    return start_ranks
