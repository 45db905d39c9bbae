"""Tests that run on a GPU, and are skipped without one, unless they are told to run on the CPU."""

from contextlib import ExitStack

import pytest
from support.on_device import VARIABLE, Ranks, backend_of, chosen_device


@pytest.fixture(scope="session")
def device():
    """The device that is tested, which the process of the tests itself never touches."""
    found = chosen_device()
    if found is None:
        pytest.skip(f"needs a GPU, and torch finds none here; {VARIABLE}=cpu runs the same on the CPU")
    return found


@pytest.fixture(scope="session")
def needs_nccl(device):
    """Skip where there is no NCCL: on a CPU, and on a mock of a GPU."""
    if backend_of(device) != "nccl":
        pytest.skip("needs CUDA: what NCCL does not send cannot be seen without it")


@pytest.fixture
def figure(record_property):
    """Note what was measured, beside what was expected and the rule, for the page of `benchmarks/gpu_check`."""

    def note(measured, expected, rule="at most"):
        for name, value in (("measured", measured), ("expected", expected), ("rule", rule)):
            record_property(name, value)

    return note


@pytest.fixture(scope="module")
def ranks_of(device):
    """Make ranks that stay up until the module's tests are done."""
    with ExitStack() as stack:
        made = {}

        def of(world_size, on=None, backend=None):
            key = world_size, on or device, backend
            if key not in made:
                made[key] = Ranks(*key)
                stack.callback(made[key].close)
            return made[key]

        yield of


@pytest.fixture(scope="module")
def one_rank(ranks_of, device):
    """One process: its group is NCCL's on a GPU."""
    return ranks_of(1, backend=backend_of(device))


@pytest.fixture(scope="module")
def on_the_cpu(ranks_of):
    """The same on the CPU."""
    return ranks_of(1, "cpu", "gloo")
