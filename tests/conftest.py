"""Settings that all tests share."""

import os

import pytest
import torch
from support.processes import start_ranks

os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(1)  # torch is loaded already; processes forked while its threads exist can hang


@pytest.fixture
def run_ranks():
    """Run ``fn(rank, *args)`` in ``world_size`` processes joined by gloo; return the answers in order of rank."""
    return start_ranks
