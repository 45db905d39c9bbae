"""What part 5 of the check for a GPU counts: torch's warnings, which come from C++, and whose they are."""

import ctypes
import warnings
from functools import partial
from pathlib import Path
from unittest import mock

import pytest
import torch

import lightning_comm
from benchmarks.gpu_check import host_waits
from benchmarks.gpu_check import waits as gpu_check_waits

SAID = b"called a synchronizing CUDA operation (Triggered internally at /pytorch/c10/cuda/CUDAFunctions.cpp:310.)"


def at(path, calls):
    """Return a function whose code is said to be line 51 of a file, which calls another one."""
    space = {"calls": calls}
    exec(compile("\n" * 50 + "def asks(*given): return calls(*given)", str(path), "exec"), space)
    return space["asks"]


HOME = Path(lightning_comm.__file__).parent
FLAT = HOME / "ondevice" / "flat.py"


@pytest.fixture
def told():
    """Collect what is told, on a device without a debug mode."""
    found = []
    with mock.patch.object(torch.cuda, "set_sync_debug_mode"), gpu_check_waits.torch_tells(found):
        yield found


def warning_at(path):
    """Return what warns, as torch's C++ does, right in a line of a file."""
    api = ctypes.pythonapi.PyErr_WarnEx
    api.argtypes = [ctypes.py_object, ctypes.c_char_p, ctypes.c_ssize_t]
    return partial(at(path, api), UserWarning, SAID, 1)


def test_a_wait_that_torch_warns_of_in_a_line_of_the_package_is_its_own(told):
    warning_at(FLAT)()
    assert [(each.own, each.where, each.by) for each in told] == [(True, *["lightning_comm/ondevice/flat.py:51"] * 2)]


def test_a_wait_within_torch_belongs_to_the_package_that_called_it(told):
    at(FLAT, warning_at(Path(torch.__file__).parent / "_tensor.py"))()
    assert [(each.own, each.where) for each in told] == [(True, "lightning_comm/ondevice/flat.py:51")]


@pytest.mark.parametrize("path", ["/somewhere/lightning_comm/benchmarks/mine.py", "/site-packages/lightning/loop.py"])
def test_a_wait_of_others_is_not_its_own_wherever_the_package_lies(told, path):
    warning_at(path)()
    at(FLAT, warning_at(path))()
    assert [(each.own, each.by.rsplit("/", 1)[1]) for each in told] == [(False, Path(path).name + ":51")] * 2
    assert [each.where for each in told] == ["", "lightning_comm/ondevice/flat.py:51"]


def test_other_warnings_are_none(told):
    warnings.warn("something else", stacklevel=1)
    assert not told


def test_a_stream_that_is_waited_for_is_counted_once_though_torch_warns_too_and_not_where_it_is_done():
    found, over = [], [False]

    class Stream:
        def query(self):
            return over[0]

        def synchronize(self):
            warning_at(Path(torch.__file__).parent / "cuda" / "streams.py")()

    with (
        mock.patch.object(torch.cuda, "set_sync_debug_mode"),
        mock.patch.object(torch.cuda, "Stream", Stream),
        gpu_check_waits.torch_tells(found),
    ):
        asks = at(FLAT, Stream().synchronize)
        asks()
        assert [(each.kind, each.own) for each in found] == [("synchronize", True)]
        over[0] = True
        asks()
    assert len(found) == 1


def test_fits_begin_with_each_kind_and_leave_none_out():
    names = gpu_check_waits.names_of_fits(tiny=False)
    assert sorted(names) == sorted(host_waits.cases())
    assert names[: len(host_waits.KINDS)] == gpu_check_waits.names_of_fits(tiny=True) == list(host_waits.KINDS)
