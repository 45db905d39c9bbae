"""Which checkpoints of a run that was hurt bring it back: they are given to ``fit``, the newest first."""

import json
import shutil
from pathlib import Path
from typing import Any

from benchmarks.faults.files import checkpoints, damage, left_over, lines_of
from benchmarks.faults.logs import degraded, last_error
from benchmarks.faults.plan import COMPARISON, STEPS, Case
from benchmarks.faults.workshop import Run, Workshop, equal

_TRIES = 4  # how many are resumed


def note_checkpoints(case: Case, workshop: Workshop, folder: Path, record: dict[str, Any], run: Run) -> None:
    """Resume checkpoints until one brings the run back whole, and note what became of each.

    Args:
        case: What happened.
        workshop: Makes runs.
        folder: Of the case.
        record: Takes what is found; has the ``order`` that the ranks were given.
        run: The one that was hurt.

    """
    order, files = record.pop("order"), folder / "files"
    record["floor"] = _floor(case, record, run)
    record["resumes"] = []
    if case.spec.expects == "refused" or case.strategy == COMPARISON:
        return
    hurt = damage(files, case.kind, case.detail, case.seed) if case.spec.expects == "damaged" else None
    record["damaged"] = None if hurt is None else hurt[0].name
    before = folder / "before"
    if files.exists():
        files.rename(before)
    record["saved"] = [path.name for path in checkpoints(before)]
    for path in checkpoints(before)[:_TRIES]:
        order["resume"] = str(files / path.relative_to(before.resolve()))
        tried, finals = _resume(case, workshop, order, before, folder / "resumed")
        if hurt is not None and not record["resumes"] and tried["whole"]:
            # it was loaded: the same as if nothing had happened to it?
            (before / hurt[0].relative_to(files)).write_bytes(hurt[1])
            _, undamaged = _resume(case, workshop, order, before, folder / "undamaged")
            tried["exact"] = all(map(equal, finals, undamaged))
        record["resumes"].append(tried)
        if tried["whole"]:
            break
    record["left_over"] = left_over(files)


def _resume(
    case: Case, workshop: Workshop, order: dict[str, Any], before: Path, folder: Path
) -> tuple[dict[str, Any], list[dict[str, Any] | None]]:
    """Return what became of a run that goes on from a checkpoint, and its weights at the end.

    Args:
        case: What happened before.
        workshop: Makes runs.
        order: What ranks are told; ``resume`` is the checkpoint.
        before: What the run left behind, which stays: one that is resumed removes and writes checkpoints.
        folder: Of the new run's logs.

    """
    files = Path(order["files"])
    shutil.rmtree(files, ignore_errors=True)
    shutil.copytree(before, files, symlinks=True)
    saves = "top1" if case.saves == "async" else case.saves
    plain = {"case": None, "how": "none", "workers": 0, "tmpdir": None, "saves": saves}
    run = workshop.start({**order, **plain}, folder)
    ended = run.wait(workshop.run_s, workshop.hang_s)
    if not ended:
        run.show_stacks()
    run.end()
    texts, finals = run.texts(), run.finals()
    codes = [rank.code for rank in run.ranks]
    # of the last step of a run there is nothing to train, and no start is told
    starts = [int(line.split()[-1]) for text in texts for line in text.splitlines() if line.startswith("START")]
    notes = [note for note in map(degraded, texts) if note]
    went_well = ended and codes == [0] * len(codes)
    tried: dict[str, Any] = {
        "began": bool(starts),
        "name": Path(order["resume"]).name, "codes": codes, "hang": not ended, "start": max(starts, default=STEPS),
        "notes": notes[:1], "errors": [last_error(text) for text in texts] if not went_well else [],
        "whole": went_well and not notes, "logs": [] if went_well else [text[-2500:] for text in texts],
    }  # fmt: skip
    if went_well:
        tried["equal"] = all(equal(finals[0], each) for each in finals)
        if workshop.compares_with(case) and not notes:
            tried["exact"] = all(map(equal, finals, workshop.reference(order)))
    return tried, finals


def _floor(case: Case, record: dict[str, Any], run: Run) -> int:
    """Return the step of the newest checkpoint that was certainly whole before the fault; 0 for none."""
    until = record["hit"]["time"] if record["hit"] else float("inf")
    saved = []
    for rank in range(case.ranks):
        lines = map(json.loads, lines_of(run.folder / f"saves{rank}.txt"))
        saved.append({step for step, _, when in lines if when <= until})
    by_all = sorted(set.intersection(*saved))
    if case.saves == "async":
        # a save returns before anything is written; what the slowest has written for certain is one save older
        logs = [lines_of(run.folder / f"written{rank}.txt") for rank in range(case.ranks)]
        logs = [log for rank, log in enumerate(logs) if log or rank == 0]
        written = [step for step in by_all if all(any(f"s{step}.ckpt" in path for path in log) for log in logs)]
        return written[-2] if len(written) > 1 else 0
    return by_all[-1] if by_all else 0
