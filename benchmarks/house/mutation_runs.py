"""Tests run against changed packages, in processes forked from one that has loaded everything but the package.

A change that a test fails on is made sure of: the test has to fail again, and to pass where nothing was changed; a
test that flickers is noted and the next one is tried. A run that has no process at work for a while is a hang, and
counts as killed.
"""

import contextlib
import ctypes
import doctest
import importlib
import io
import json
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from mutants import Mutant, mutated_source

_POLL_S = 0.2
_TICKS = os.sysconf("SC_CLK_TCK")
_SUBREAPER = 36  # of prctl: what is left behind by a child becomes ours, so that it can be ended
_NOT_COPIED = shutil.ignore_patterns(".git", ".venv", "build", "__pycache__", "_build", ".*_cache", "node_modules")
_MODULES = ("torch", "lightning.pytorch", "lightning.pytorch.cli", "timm", "sklearn.datasets", "torchmetrics", "numpy")


@dataclass(frozen=True)
class Limits:
    """When a mutant is given up.

    Args:
        cpu_s: Seconds of CPU, of all processes, after which no other test is begun; it has survived then, unless one
            test used a third of them, and needs less than half of that without the change: that one has no end.
        idle_s: Seconds in which none of its processes was at work; it hangs.
        wall_s: Seconds in all; it hangs.

    """

    cpu_s: float = 60.0
    idle_s: float = 75.0
    wall_s: float = 1200.0


@dataclass
class Outcome:
    """What became of a mutant.

    Args:
        by: The test that fails, ``"import"``, or ``"hang"``, with the test that has no end; ``None`` if it has
            survived.
        files: How many test files were run to their ends.
        cpu_s: Seconds of CPU.
        wall_s: Seconds.
        out_of_time: Whether it was given up before all tests were run.
        flickering: Tests that failed, and then passed, or failed without the change.

    """

    by: str | None = None
    files: int = 0
    cpu_s: float = 0.0
    wall_s: float = 0.0
    out_of_time: bool = False
    flickering: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return {**vars(self), "killed": self.by is not None}


def preload(modules: tuple[str, ...] = _MODULES) -> None:
    """Import what all runs need, but not the package, and become the parent of whatever is left behind."""
    os.environ["OMP_NUM_THREADS"] = "1"
    for name in modules:
        importlib.import_module(name)
    if "torch" in modules:
        importlib.import_module("torch").set_num_threads(1)
        _load_the_twin()
    with tempfile.TemporaryDirectory() as empty, contextlib.redirect_stdout(io.StringIO()):
        pytest.main(["-c", os.devnull, "--rootdir", empty, "-q", empty])  # loads its plugins
    ctypes.CDLL(None).prctl(_SUBREAPER, 1, 0, 0, 0)


def _load_the_twin() -> None:
    from lightning_utilities.core import rank_zero

    log = rank_zero.log
    try:
        importlib.import_module("pytorch_lightning.strategies")
    except ImportError:
        return
    finally:
        rank_zero.log = log  # the twin takes over the logger that both packages share


class Bench:
    """A copy of a tree in which one module at a time is changed.

    Args:
        root: The tree.
        package: The name of its package.
        work: A folder for the copy, which is made anew.
        limits: When a mutant is given up.

    """

    def __init__(self, root: Path, package: str, work: Path, limits: Limits) -> None:
        self.package, self.limits = package, limits
        self.tree, self._log, self._said = work / "tree", work / "log.txt", work / "said.jsonl"
        shutil.rmtree(work, ignore_errors=True)
        shutil.copytree(root, self.tree, ignore=_NOT_COPIED, symlinks=True)
        self._times = int(time.time()) - 10_000_000  # a time of its own for each change, for Python's cache of code

    def run(self, mutant: Mutant, order: list[str]) -> Outcome:
        """Make a change, run tests until one fails, and undo the change."""
        path = self.tree / mutant.module
        source, status = path.read_text(), path.stat()
        outcome = Outcome()
        began = time.monotonic()
        self._times += 1
        try:
            path.write_text(mutated_source(source, mutant))
            os.utime(path, (self._times, self._times))
            waiting = [f"doctest {mutant.module}", *order]
            while waiting and outcome.by is None and not outcome.out_of_time:
                failed, waiting = self._until_a_failure(waiting, outcome, began)
                if failed is None:
                    break
                path.write_text(source)
                os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
                if self._passes_unchanged(failed):
                    outcome.by = failed
                elif failed.startswith("hang "):  # a long test, which is long without the change as well
                    outcome.out_of_time = True
                else:
                    outcome.flickering.append(failed)
                    path.write_text(mutated_source(source, mutant))
                    os.utime(path, (self._times, self._times))
        finally:
            path.write_text(source)
            os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
        outcome.wall_s = round(time.monotonic() - began, 1)
        outcome.cpu_s = round(outcome.cpu_s, 1)
        return outcome

    def _until_a_failure(self, tests: list[str], outcome: Outcome, began: float) -> tuple[str | None, list[str]]:
        """Run tests in order; return what has failed twice, and the tests that are left."""
        limits = Limits(self.limits.cpu_s - outcome.cpu_s, self.limits.idle_s, self.limits.wall_s)
        cpu_s, ended = self._watched(lambda: self._run_all(tests, sure=True), limits, began)
        said = self._heard()
        outcome.cpu_s += cpu_s
        outcome.files += sum("passed" in each for each in said)
        outcome.flickering += [each["flickers"] for each in said if "flickers" in each]
        failed = next((each["failed"] for each in said if "failed" in each), None)
        if failed is not None:
            return failed, tests[
                next(k for k, each in enumerate(tests) if failed.startswith(each) or k == len(tests) - 1) + 1 :
            ]
        begun = [each["begins"] for each in said if "begins" in each]
        if ended == "endless" and begun:
            return f"hang {begun[-1]}", []
        if ended in ("hang", "import"):
            outcome.by = ended
        outcome.out_of_time = ended in ("cpu", "endless")
        return None, []

    def _passes_unchanged(self, failed: str) -> bool:
        cpu_s = 120.0
        if failed.startswith("hang "):
            failed, cpu_s = failed.removeprefix("hang "), self.limits.cpu_s / 6
        limits = Limits(cpu_s, self.limits.idle_s, self.limits.wall_s)
        _, ended = self._watched(lambda: self._run_all([failed], sure=False), limits, time.monotonic())
        return ended == "" and not any("failed" in each for each in self._heard())

    def _heard(self) -> list[dict[str, Any]]:
        if not self._said.exists():
            return []
        lines = self._said.read_text().splitlines()
        return [json.loads(line) for line in lines if line.endswith("}")]

    # ---- the parent's side -------------------------------------------------------------------------------------

    def _watched(self, work: Callable[[], None], limits: Limits, began: float) -> tuple[float, str]:
        """Do something in a child; return seconds of CPU, and what ended it: nothing, a limit, or a failed import."""
        self._said.unlink(missing_ok=True)
        child = os.fork()
        if child == 0:
            self._become_child(work)
        cpu_s, worked, ended = 0.0, time.monotonic(), ""
        said, since_s = 0, 0.0  # when it last said that something begins or ends
        while not ended:
            pid, status = os.waitpid(child, os.WNOHANG)
            if pid:
                ended = "import" if os.waitstatus_to_exitcode(status) == 3 else ""
                break
            now_s, at_work = _tree()
            if at_work or now_s > cpu_s + 0.05:
                worked = time.monotonic()
            cpu_s = max(cpu_s, now_s)
            size = self._said.stat().st_size if self._said.exists() else 0
            if cpu_s > limits.cpu_s and (size != said or cpu_s - since_s > self.limits.cpu_s / 3):
                ended = "cpu" if size != said else "endless"
            elif time.monotonic() - worked > limits.idle_s or time.monotonic() - began > limits.wall_s:
                ended = "hang"
            if size != said:
                said, since_s = size, cpu_s
            time.sleep(_POLL_S)
        _end_all()
        return cpu_s, ended

    def _become_child(self, work: Callable[[], None]) -> None:
        code = 1
        try:
            os.setsid()
            log = os.open(self._log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            nothing = os.open(os.devnull, os.O_RDONLY)
            for old, new in ((nothing, 0), (log, 1), (log, 2)):
                os.dup2(old, new)
            sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w", buffering=1)
            paths = [str(self.tree), str(self.tree / "tests")]
            sys.path[:0] = paths
            os.environ["PYTHONPATH"] = os.pathsep.join(paths)
            os.chdir(self.tree / "tests")
            code = 3
            found = importlib.import_module(self.package).__file__
            assert found is not None
            assert found.startswith(str(self.tree)), f"{found} is not the copy"
            code = 1
            work()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)

    # ---- the child's side --------------------------------------------------------------------------------------

    def _run_all(self, tests: list[str], *, sure: bool) -> None:
        for test in tests:
            failed = self._failed(test)
            if failed is None:
                self._say({"passed": test})
            elif sure and failed != test and self._failed(failed) is None:
                self._say({"flickers": failed})
            else:
                self._say({"failed": failed})
                return

    def _say(self, what: dict[str, str]) -> None:
        with self._said.open("a") as file:
            file.write(json.dumps(what) + "\n")

    def _failed(self, test: str) -> str | None:
        """Run a test file or one test in a fork; return what fails first."""
        reading, writing = os.pipe()
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                os.close(reading)
                failed = self._doctest(test) if test.startswith("doctest ") else self._pytest(test)
                os.write(writing, (failed or "").encode()[:60_000])
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        os.close(writing)
        with os.fdopen(reading, "rb") as answer:
            failed = b""
            while chunk := os.read(answer.fileno(), 65_536):
                failed += chunk
        _, status = os.waitpid(pid, 0)
        return test if status and not failed else (failed.decode() or None)

    def _doctest(self, test: str) -> str | None:
        path = test.removeprefix("doctest ").removesuffix(".py").removesuffix("/__init__")
        module = importlib.import_module(path.replace("/", "."))
        return test if doctest.testmod(module).failed else None

    def _pytest(self, test: str) -> str | None:
        first = _First(self._say)
        options = [
            "-c",
            "../pyproject.toml",
            "-x",
            "-q",
            "-p",
            "no:cacheprovider",
            f"--basetemp={self._log.parent}/tmp",
        ]
        code = pytest.main([*options, test], plugins=[first])
        if code in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
            return None
        return first.failed or test


class _First:
    """Notes the first test that fails, and says which begins."""

    def __init__(self, say: Callable[[dict[str, str]], None]) -> None:
        self.failed: str | None = None
        self._say = say

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self._say({"begins": nodeid.removeprefix("tests/")})

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed and self.failed is None:
            self.failed = str(report.nodeid).removeprefix("tests/")


def _below() -> dict[int, list[str]]:
    """Return what the kernel says of each process below this one."""
    found, parents = {}, {}
    for folder in os.listdir("/proc"):
        if not folder.isdigit():
            continue
        try:
            text = Path(f"/proc/{folder}/stat").read_text()
        except (FileNotFoundError, ProcessLookupError):
            continue
        fields = text.rpartition(")")[2].split()
        found[int(folder)], parents[int(folder)] = fields, int(fields[1])

    def is_below(pid: int) -> bool:
        while pid in parents:
            pid = parents[pid]
            if pid == os.getpid():
                return True
        return False

    return {pid: fields for pid, fields in found.items() if is_below(pid)}


def _tree() -> tuple[float, bool]:
    """Return the seconds of CPU of all processes below this one, and whether one of them is at work."""
    rows = _below().values()
    ticks = sum(sum(map(int, fields[11:15])) for fields in rows)
    return ticks / _TICKS, any(fields[0] in "RD" for fields in rows)


def _end_all() -> None:
    """End every process below this one, and wait for them."""
    while True:
        for pid in _below():
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return
        time.sleep(0.02)
