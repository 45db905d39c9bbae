"""Settings that all tests share."""

import logging
import os
from contextlib import ExitStack

import pytest
import torch
import torch.distributed as dist
from support.processes import start_ranks

from lightning_comm.lab.cluster import Lab, unavailable

os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(1)  # torch is loaded already; processes forked while its threads exist can hang


def _shared_by_all_tests():
    """What later tests, and ranks forked for them, inherit from this process."""
    loggers = ("", "lightning", "lightning.pytorch", "lightning.fabric", "lightning_comm")
    return {
        "levels of loggers": {name: logging.getLogger(name).level for name in loggers},
        "logging disabled up to": logging.root.manager.disable,
        "folder": os.getcwd(),
        "process group": dist.is_initialized(),
        "torch's threads": torch.get_num_threads(),
        "torch's default dtype": torch.get_default_dtype(),
    }


@pytest.fixture(autouse=True)
def nothing_is_left_to_later_tests():
    """Name the test that changes its process, instead of one that fails because of it much later."""
    before = _shared_by_all_tests()
    yield
    assert _shared_by_all_tests() == before


@pytest.fixture
def run_ranks():
    """Run ``fn(rank, *args)`` in ``world_size`` processes joined by gloo; return the answers in order of rank."""
    return start_ranks


@pytest.fixture
def in_own_folder(tmp_path, monkeypatch):
    """Run in an empty folder, for what writes files where it is started."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="session")
def labs_can_be_made():
    """`None`, or one line that says why emulated hosts cannot be had here."""
    return unavailable()


@pytest.fixture
def lab(labs_can_be_made):
    """Make emulated hosts, as ``Lab`` does, that are gone when the test ends."""
    if labs_can_be_made is not None:
        pytest.skip(labs_can_be_made)
    with ExitStack() as open_labs:
        yield lambda *args, **kwargs: open_labs.enter_context(Lab(*args, **kwargs))


@pytest.fixture(scope="module")
def module_lab(labs_can_be_made):
    """The same for a whole module, whose tests share the hosts."""
    if labs_can_be_made is not None:
        pytest.skip(labs_can_be_made)
    with ExitStack() as open_labs:
        yield lambda *args, **kwargs: open_labs.enter_context(Lab(*args, **kwargs))
