"""Settings that all tests share.

The process that hands the tests out to its workers reads this file too, and runs none of them: what loads torch is
imported where it is used.
"""

import logging
import os
from collections import Counter
from contextlib import ExitStack
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")

HERE = Path(__file__).parent
# Files and folders whose tests are judged by seconds: `make tests` runs them while nothing else runs.
TIMING = [HERE / line for line in (HERE / "timing.txt").read_text().splitlines()]


def pytest_addoption(parser):
    parser.addoption("--exhaustive", action="store_true", help="run the tests marked so too")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    """Mark what is judged by seconds, leave out what is exhaustive, and begin with the files that hold most slow tests.

    So no worker is left alone with one of them at the end.
    """
    if not config.getoption("exhaustive"):
        left_out = [item for item in items if item.get_closest_marker("exhaustive")]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if not item.get_closest_marker("exhaustive")]
    for item in items:
        if any(item.path.is_relative_to(place) for place in TIMING):
            item.add_marker("timing")
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[item.path])


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """Let torch start no threads of its own: processes forked while they exist can hang."""
    import torch

    torch.set_num_threads(1)


def _shared_by_all_tests():
    """What later tests, and ranks forked for them, inherit from this process."""
    import torch
    import torch.distributed as dist

    loggers = ("", "lightning", "lightning.pytorch", "lightning.fabric", "lightning_comm")
    return {
        "levels of loggers": {name: logging.getLogger(name).level for name in loggers},
        "logging disabled up to": logging.root.manager.disable,
        "folder": os.getcwd(),
        "process group": dist.is_initialized(),
        "torch's threads": torch.get_num_threads(),
        "torch's default dtype": torch.get_default_dtype(),
        "CUDA": torch.cuda.is_initialized(),  # which processes forked later could not use
    }


@pytest.fixture(autouse=True)
def nothing_is_left_to_later_tests():
    """Name the test that changes its process, instead of one that fails because of it much later."""
    before = _shared_by_all_tests()
    yield
    assert _shared_by_all_tests() == before


@pytest.fixture(autouse=True, scope="module")
def ranks_end_with_their_file():
    """Ranks that stay know the functions of the file for which they were forked."""
    yield
    from support.processes import end_idle_ranks

    end_idle_ranks()


@pytest.fixture
def run_ranks():
    """Run ``fn(rank, *args)`` in ``world_size`` processes joined by gloo; return the answers in order of rank."""
    from support.processes import start_ranks

    return start_ranks


@pytest.fixture
def in_own_folder(tmp_path, monkeypatch):
    """Run in an empty folder, for what writes files where it is started."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="session")
def labs_can_be_made():
    """`None`, or one line that says why emulated hosts cannot be had here."""
    from lightning_comm.lab.cluster import unavailable

    return unavailable()


@pytest.fixture
def lab(labs_can_be_made):
    """Make emulated hosts, as ``Lab`` does, that are gone when the test ends."""
    if labs_can_be_made is not None:
        pytest.skip(labs_can_be_made)
    from lightning_comm.lab.cluster import Lab

    with ExitStack() as open_labs:
        yield lambda *args, **kwargs: open_labs.enter_context(Lab(*args, **kwargs))


@pytest.fixture(scope="module")
def module_lab(labs_can_be_made):
    """The same for a whole module, whose tests share the hosts."""
    if labs_can_be_made is not None:
        pytest.skip(labs_can_be_made)
    from lightning_comm.lab.cluster import Lab

    with ExitStack() as open_labs:
        yield lambda *args, **kwargs: open_labs.enter_context(Lab(*args, **kwargs))
