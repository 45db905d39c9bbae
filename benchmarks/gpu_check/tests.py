"""Parts of the check that are tests of `tests/gpu`: each becomes a finding as soon as it is over."""

import os
from typing import Any

import pytest
from support.on_device import VARIABLE

from benchmarks import ROOT
from benchmarks.gpu_check.report import Check

# not the project's own file, which wants plugins that need not be there
SETTINGS = """[pytest]
addopts = --import-mode=importlib -ra
markers = gpu: runs on a GPU
pythonpath = {tests}
"""


class Writer:
    """A plugin of pytest that writes down how tests ended."""

    def __init__(self, check: Check) -> None:
        self._check = check
        self.seen = 0

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Take the report of a phase of a test."""
        if report.when != "call" and report.outcome == "passed":
            return
        self.seen += 1
        told = dict(report.user_properties)
        name = report.nodeid.split("::", 1)[-1].removeprefix("test_").replace("_", " ")
        rule, expected = told.get("rule", "it holds"), told.get("expected", "")
        if report.outcome == "skipped":
            self._check.needs_cuda(name, expected)
            return
        measured = told.get("measured", "it holds" if report.outcome == "passed" else _last_line(report))
        self._check.note(name, measured, expected, rule, verdict="ok" if report.outcome == "passed" else "fails")


def _last_line(report: Any) -> str:
    errors = [line[1:].strip() for line in str(report.longrepr).splitlines() if line.startswith("E ")]
    return (errors[-1] if errors else str(report.longrepr).strip().splitlines()[-1])[:300]


def units(check: Check) -> None:
    """Codecs, averages and state in one process."""
    _run(check, "test_units.py")


def two_ranks(check: Check) -> None:
    """Two ranks that share a device."""
    _run(check, "test_two_ranks.py")


def one_rank(check: Check) -> None:
    """One rank under Lightning."""
    _run(check, "test_one_rank.py")


def cyclic(check: Check) -> None:
    """Cyclic training."""
    _run(check, "test_cyclic.py")


def _run(check: Check, name: str) -> None:
    """Run a file of `tests/gpu` on the check's device, in this process."""
    os.environ[VARIABLE] = check.device
    os.environ.pop("PYTEST_ADDOPTS", None)  # of whoever runs this in a test
    settings = check.out / "pytest.ini"
    settings.write_text(SETTINGS.format(tests=ROOT / "tests"))
    writer = Writer(check)
    options = [
        "-c",
        str(settings),
        f"--rootdir={ROOT}",
        f"--confcutdir={ROOT / 'tests'}",
        "-p",
        "no:cacheprovider",
        "-q",
    ]
    status = pytest.main([*options, str(ROOT / "tests" / "gpu" / name)], plugins=[writer])
    assert status in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED), f"pytest ended with {status!r}"
    assert writer.seen, "pytest found no tests"
