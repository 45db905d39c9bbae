"""One case carried out: the run, the fault, how every process ended, and which checkpoints can be resumed.

What is found is a record of plain values; :mod:`faults_judge` says what it is worth. All of it is seen from outside:
exit codes, logs, files, and whether a checkpoint that is given to ``fit`` brings the run back.
"""

import json
import os
import shutil
import signal
import time
import traceback
from pathlib import Path
from typing import Any

from benchmarks.faults.files import SmallDisk, beside, checkpoints, lines_of
from benchmarks.faults.logs import last_error
from benchmarks.faults.plan import Case
from benchmarks.faults.resume import note_checkpoints
from benchmarks.faults.strike import GO, SIGNALS, STRUCK
from benchmarks.faults.workshop import LAB_LINK, Run, Workshop, equal

_PAUSE_S, _SLOW_S = 2.0, 3.0
_SLOW_LINK = "2mbit"
_LOADERS_END_S = 10.0  # a loading process looks every 5 s whether its rank is there
_sizes: dict[tuple[str, int], int] = {}


def carry_out(case: Case, workshop: Workshop) -> dict[str, Any]:
    """Return the record of a case."""
    folder = workshop.folder / f"seed{case.seed}_{case.kind}_{case.strategy}_{case.ranks}"
    record: dict[str, Any] = {"case": case.as_json(), "phase": case.phase, "folder": str(folder)}
    began = time.monotonic()
    try:
        if case.spec.in_lab:
            with workshop.lab_turn:
                _Attempt(case, workshop, folder, record).make()
        else:
            _Attempt(case, workshop, folder, record).make()
    except Exception:
        record["driver_error"] = traceback.format_exc()
    record["took_s"] = round(time.monotonic() - began, 1)
    return record


class _Attempt:
    """A case under way; fills the record."""

    def __init__(self, case: Case, workshop: Workshop, folder: Path, record: dict[str, Any]) -> None:
        self._case, self._workshop, self._folder, self._record = case, workshop, folder, record
        self._files = folder / "files"
        self._disk: SmallDisk | None = None
        shutil.rmtree(folder, ignore_errors=True)

    def make(self) -> None:
        spec = self._case.spec
        if spec.in_lab:
            self._workshop.mend_lab()
        try:
            order = self._order()
            slurm = spec.expects == "requeued"
            run = self._workshop.start(order, self._folder / "run", in_lab=spec.in_lab, slurm=slurm)
            try:
                self._wait_for_fault(run)
                self._watch(run)
            finally:
                if spec.in_lab:
                    self._workshop.mend_lab()
                run.end()
            if self._disk is not None:
                self._disk.copy_out()
        finally:
            if self._disk is not None:
                self._disk.close()
            if (elsewhere := self._record.get("order", {}).get("tmpdir")) is not None:
                shutil.rmtree(elsewhere, ignore_errors=True)
        note_checkpoints(self._case, self._workshop, self._folder, self._record, run)

    # ---- the run -------------------------------------------------------------------------------------------------

    def _order(self) -> dict[str, Any]:
        """Return what every rank is told."""
        case, kind = self._case, self._case.kind
        loader = "partitioned" if case.partition != "none" else "resumable"
        order = {
            "case": case.as_json(), "how": self._how(), "strategy": case.strategy, "ranks": case.ranks,
            "saves": case.saves, "partition": case.partition, "step_ms": case.step_ms, "detail": case.detail,
            "files": str(self._files), "resume": None, "workers": int(case.place == "worker"), "tmpdir": None,
            "loader": "stream" if kind == "unequal_unknown" else loader,
            "fewer": [5 * (kind.startswith("unequal") and rank == case.rank) for rank in range(case.ranks)],
        }  # fmt: skip
        if kind == "disk_full":
            size = int(case.detail["sets"] * self._set_bytes(order))
            self._disk = SmallDisk(self._files, size)
            if not self._disk.is_mounted:
                order["how"] = "fail_write"
            self._record["disk"] = f"{size} bytes" if self._disk.is_mounted else "a limit on the size of files"
        if order["how"] in ("kill_operation", "kill_write", "fail_write") and os.access("/dev/shm", os.W_OK):
            # what is first written to a temporary folder on another disk cannot be renamed into its place
            order["tmpdir"] = f"/dev/shm/faults_{os.getpid()}_{case.seed}"
            os.makedirs(order["tmpdir"], exist_ok=True)
        self._record["order"] = order
        return order

    def _how(self) -> str:
        """Return what the rank does itself at the place."""
        case, how = self._case, self._case.spec.how
        if how in ("none", "disk_full"):
            return "none"
        if how == "unequal" or case.late_s is not None:
            return "mark"
        if case.spec.in_lab:
            return "wait"
        if how == "max_time":
            return "max_time_all"
        return "mark" if case.spec.all_ranks else how

    def _set_bytes(self, order: dict[str, Any]) -> int:
        """Return the size of a checkpoint with all that belongs to it, as a run without a fault writes it."""
        key = (order["strategy"], order["ranks"])
        if key not in _sizes:
            folder = self._folder / "sizes"
            plain = {**order, "case": None, "how": "none", "files": str(folder / "files"), "saves": "last"}
            run = self._workshop.start(plain, folder)
            run.wait(self._workshop.run_s, self._workshop.hang_s)
            run.end()
            newest = checkpoints(folder / "files")[0]
            _sizes[key] = sum(path.stat().st_size for path in (newest, *beside(newest)))
        return _sizes[key]

    def _wait_for_fault(self, run: Run) -> None:
        """Wait until it happens, and do the driver's part of it."""
        case = self._case
        deadline = time.monotonic() + self._workshop.run_s
        struck = Path(run.folder, STRUCK)
        while not (marks := lines_of(struck)) and run.alive and time.monotonic() < deadline:
            time.sleep(0.002)
        marks = marks or lines_of(struck)  # of one that ended in between
        self._record["hit"] = json.loads(marks[0]) if marks else None
        self._record["where_all_stood"] = [list(row[:2]) for row in run.progress.rows()]
        if not marks:
            return
        if case.late_s is not None:
            time.sleep(case.late_s)
        if case.spec.in_lab:
            self._hurt_link(run)
        else:
            self._send_signals(run)

    def _send_signals(self, run: Run) -> None:
        case, how = self._case, self._case.spec.how
        if how not in SIGNALS or case.place == "worker":
            return
        if case.spec.all_ranks or case.late_s is not None:
            for rank in sorted(case.hurt):
                run.ranks[rank].signal(SIGNALS[how])
            self._record["hit"]["time"] = time.time()
        if how == "pause":
            time.sleep(_PAUSE_S)
            run.ranks[case.rank].signal(signal.SIGCONT)

    def _hurt_link(self, run: Run) -> None:
        case, lab = self._case, self._workshop.lab
        slow = case.spec.how == "slow_link"
        if slow:
            lab.set_link(case.rank, _SLOW_LINK)
        else:
            lab.cut(case.rank)
        self._record["hit"]["time"] = time.time()
        Path(run.folder, GO).touch()
        if case.spec.how == "isolate":
            return
        time.sleep(_SLOW_S if slow else _PAUSE_S)
        if slow:
            lab.set_link(case.rank, LAB_LINK)
        else:
            lab.restore(case.rank)

    def _watch(self, run: Run) -> None:
        """Wait for the end and note how every rank came to it."""
        case, record = self._case, self._record
        hit = record["hit"]
        stopped = {case.rank} if case.spec.how == "stop" else set()
        if case.spec.expects == "fails" and hit is not None:
            deadline = hit["time"] + self._workshop.hang_s
            while run.alive - stopped and time.time() < deadline:
                time.sleep(0.01)
        else:
            run.wait(self._workshop.run_s, self._workshop.hang_s)
        hang = sorted(run.alive - stopped)
        since = hit["time"] if hit else run.began_at
        record["codes"] = [rank.code for rank in run.ranks]
        record["ends_s"] = [None if rank.ended_at is None else round(rank.ended_at - since, 2) for rank in run.ranks]
        record["hang"], record["stopped"] = hang, sorted(stopped)
        if hang:
            run.show_stacks()
            record["stacks"] = [text[-6000:] for text in run.texts()]
        if not case.spec.in_lab:
            record["left_processes"] = _left_processes(run, stopped)
        texts = run.texts()
        record["errors"] = [last_error(text) for text in texts]
        record["aborted"] = ["terminate called" in text for text in texts]
        record["done"] = ["DONE rank" in text for text in texts]
        record["steps"] = [row[0] for row in run.progress.rows()]
        record["started"] = ["START rank" in text for text in texts]
        record["logs"] = [text[-2500:] for text in texts]
        finals = run.finals()
        if all(record["done"]):
            record["equal"] = all(equal(finals[0], each) for each in finals)
            if case.spec.expects in ("finishes", "requeued") and self._workshop.compares_with(case):
                expected = self._workshop.reference(record["order"])
                record["exact"] = all(map(equal, finals, expected))
        scontrol = Path(run.folder, "scontrol.log")
        record["requeued"] = scontrol.read_text() if scontrol.exists() else ""


def _left_processes(run: Run, stopped: set[int]) -> list[str]:
    """Return what is left, after a while, of the sessions of ranks that have ended."""
    sessions = {rank.pid for index, rank in enumerate(run.ranks) if rank.code is not None and index not in stopped}
    deadline = time.monotonic() + _LOADERS_END_S
    while (left := _processes_of(sessions)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return left


def _processes_of(sessions: set[int]) -> list[str]:
    found = []
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        try:
            fields = (folder / "stat").read_text().rsplit(")", 1)[1].split()
            if int(fields[3]) in sessions and fields[0] != "Z":
                found.append(f"{folder.name}: {(folder / 'cmdline').read_text()[:80]}")
        except OSError:
            continue  # it has just ended
    return found
