"""What a run that was hurt is worth: classes from a record, by rules that know nothing of how the library works.

A record says how processes ended, what they printed last, and which checkpoints brought the run back. The worst that
is found of a run is its class.
"""

import re
from dataclasses import dataclass, field
from typing import Any

from benchmarks.faults.logs import OURS, named
from benchmarks.faults.plan import COMPARISON, Case

# from the worst to the best
BAD = ("driver error", "HANG", "ABORT", "LOST", "CORRUPT LOADED", "WRONG RESULT", "WRONG NAME", "LEFT BEHIND")
GOOD = ("unclear message", "invalid", "refused clearly", "ok")
CLASSES = (*BAD, *GOOD)
_ABORTED = -6
_FULL = ("No space left", "File too large")
_LAST_PLACES = ("train_end", "finish")


@dataclass
class Judgement:
    """A class and what was found.

    Args:
        found: Pairs of a class and a sentence.

    """

    found: list[tuple[str, str]] = field(default_factory=list)
    best: str = "ok"

    def add(self, kind: str, why: str) -> None:
        """Note something."""
        self.found.append((kind, why))

    @property
    def word(self) -> str:
        """The class: the worst of what was found."""
        return min((kind for kind, _ in self.found), key=CLASSES.index, default=self.best)

    @property
    def why(self) -> str:
        """What was found, the worst first."""
        return "; ".join(why for _, why in sorted(self.found, key=lambda each: CLASSES.index(each[0])))


def judge(record: dict[str, Any]) -> Judgement:
    """Return what a record is worth."""
    case = Case(**record["case"])
    result = Judgement()
    if "driver_error" in record:
        result.add("driver error", record["driver_error"].strip().splitlines()[-1])
        return result
    if not _happened(case, record):
        result.add("invalid", "the fault did not happen")
        return result
    _processes(case, record, result)
    _ENDS[case.spec.expects](case, record, result)
    _checkpoints(case, record, result)
    return result


def _happened(case: Case, record: dict[str, Any]) -> bool:
    if case.kind == "async" or case.spec.expects == "refused":  # by how the case is made
        return True
    if case.spec.expects == "full":
        return any(word in text for text in record["logs"] for word in _FULL)
    if case.spec.expects == "damaged":
        return record["hit"] is not None and record.get("damaged") is not None
    return record["hit"] is not None


def _processes(case: Case, record: dict[str, Any], result: Judgement) -> None:
    """What holds for every kind: nobody hangs, aborts or leaves processes behind."""
    if record["hang"]:
        ranks = ", ".join(map(str, record["hang"]))
        result.add("HANG", f"rank {ranks} had not ended in time; all stood at {record['where_all_stood']}")
    for rank, code in enumerate(record["codes"]):
        hurt_so = case.spec.how == "segv" and rank == case.rank
        if (code == _ABORTED or record["aborted"][rank]) and not hurt_so:
            result.add("ABORT", f"rank {rank} aborted")
    if record.get("left_processes"):
        result.add("LEFT BEHIND", f"processes: {record['left_processes']}")


def _survivors(case: Case, record: dict[str, Any]) -> list[int]:
    apart = case.hurt | set(record["stopped"]) | set(record["hang"])
    return [rank for rank in range(case.ranks) if rank not in apart]


def _fails(case: Case, record: dict[str, Any], result: Judgement) -> None:
    """A rank is lost or raises: the others fail too, and name it."""
    hurt_code = record["codes"][case.rank]
    if case.spec.how in ("raise", "isolate") and hurt_code == 0 and case.place not in _LAST_PLACES:
        result.add("WRONG RESULT", f"rank {case.rank} was hurt and ended with exit code 0")
    _check_survivors(case, record, result, _survivors(case, record), case.hurt)


def _check_survivors(
    case: Case, record: dict[str, Any], result: Judgement, survivors: list[int], hurt: set[int]
) -> None:
    for rank in survivors:
        message = record["errors"][rank]
        if record["codes"][rank] == 0:
            if case.place not in _LAST_PLACES or not record["done"][rank]:
                result.add("WRONG RESULT", f"rank {rank} ended with exit code 0 though another had failed")
            continue
        blamed = named(message, rank)
        first = message.splitlines()[0][:300] if message else "(no error)"
        if blamed - hurt:
            result.add("WRONG NAME", f"rank {rank} blames {sorted(blamed)}, and {sorted(hurt)} was hurt: {first}")
        elif not blamed:
            result.add("unclear message", f"rank {rank} names nobody: {first}")
        elif case.spec.how == "raise" and "fault: boom" not in message and "is killed by signal" not in message:
            result.add("unclear message", f"rank {rank} does not say what the error was: {first}")


def _full(case: Case, record: dict[str, Any], result: Judgement) -> None:
    """A disk is full on some rank: it says so, and the others name it."""
    own = {rank for rank, message in enumerate(record["errors"]) if any(word in message for word in _FULL)}
    first_hand = {rank for rank in own if not named(record["errors"][rank], rank)} or own
    others = [rank for rank in range(case.ranks) if rank not in first_hand and rank not in record["hang"]]
    for rank in first_hand:
        if record["codes"][rank] == 0:
            result.add("WRONG RESULT", f"rank {rank} could not write and ended with exit code 0")
    if not own and not record["hang"]:
        result.add("unclear message", "no rank's last error says that the disk is full")
    _check_survivors(case, record, result, others, first_hand)


def _finishes(case: Case, record: dict[str, Any], result: Judgement) -> None:
    """Nothing that should end the run: it ends as it would have."""
    if record["hang"]:
        return
    if any(code != 0 for code in record["codes"]):
        result.add("WRONG RESULT", f"the run failed, with exit codes {record['codes']}: {_first(record['errors'])}")
        return
    if not record.get("equal", False):
        result.add("WRONG RESULT", "ranks ended with different weights")
    if record.get("exact") is False:
        result.add("WRONG RESULT", "the weights are not those of a run that nothing happened to")


def _interrupted(case: Case, record: dict[str, Any], result: Judgement) -> None:
    """Ctrl-C: all processes end with an exit code of their own; where one rank had it, the others name it."""
    for rank in sorted(case.hurt - set(record["hang"])):
        if record["codes"][rank] == 0 and not record["done"][rank]:
            result.add("WRONG RESULT", f"rank {rank} was interrupted and ended with exit code 0")
    if not case.spec.all_ranks:
        _check_survivors(case, record, result, _survivors(case, record), case.hurt)


def _terminated(case: Case, record: dict[str, Any], result: Judgement) -> None:
    """SIGTERM: agreed, saved, and every process ends by itself and without an error, as Lightning has it."""
    if record["hang"] or all(record["done"]):
        return  # a hang is told already; or it came when the run was over
    for rank, code in enumerate(record["codes"]):
        if code not in (0, 128 + 15, -15):
            first = _first([record["errors"][rank]])
            result.add("WRONG RESULT", f"told to end, rank {rank} failed with exit code {code}: {first}")
    # a checkpoint that was due at that step anyway is the newer of two
    saved = record.get("saved", [each["name"] for each in record["resumes"]])
    if all(record["started"]) and not any("terminated" in name for name in saved[:2]):
        result.add("WRONG RESULT", "nothing was saved when the run was told to end")


def _requeued(case: Case, record: dict[str, Any], result: Judgement) -> None:
    """SLURM announces the end of the job: saved, requeued, and trained on until it comes."""
    _finishes(case, record, result)
    if not record["hang"] and "requeue 4242" not in record["requeued"]:
        result.add("WRONG RESULT", "the job was not requeued")


def _stops(case: Case, record: dict[str, Any], result: Judgement) -> None:
    """One rank wants to stop: all do, at one step, as after a run that went well."""
    if record["hang"]:
        return
    if any(code != 0 for code in record["codes"]):
        result.add("WRONG RESULT", f"the run failed, with exit codes {record['codes']}: {_first(record['errors'])}")
    elif not record.get("equal", False):
        result.add("WRONG RESULT", "ranks stopped apart, or with different weights")


def _refused(case: Case, record: dict[str, Any], result: Judgement) -> None:
    """Ranks have different numbers of batches: all say so and how to mend it, and nobody waits for a time-out."""
    result.best = "refused clearly"
    for rank, (code, message) in enumerate(zip(record["codes"], record["errors"], strict=True)):
        if rank in record["hang"]:
            continue
        if code == 0:
            result.add("WRONG RESULT", f"rank {rank} ended with exit code 0 after epochs of unequal length")
        elif not OURS.search(message) or not re.search(r"batch|epoch", message):
            result.add("unclear message", f"rank {rank} does not say that epochs differ: {_first([message])}")
    if case.kind == "unequal_known" and any(step > 0 for step in record["steps"]):
        result.add("unclear message", "unequal numbers of batches are known, and ranks trained")


def _damaged(case: Case, record: dict[str, Any], result: Judgement) -> None:
    """A file of the newest checkpoint is damaged: it is refused by name, or what is loaded is what was saved."""
    result.best = "refused clearly"
    newest = record["resumes"][0]
    name = record["damaged"]
    words = " ".join([*newest["errors"], *newest["notes"]])
    if newest["whole"]:
        if newest.get("exact") is not True:
            result.add("CORRUPT LOADED", f"{name} was damaged ({case.detail['damage']}) and loaded without a word")
        else:
            result.best = "ok"  # what was damaged is not content
    elif newest["began"] and not newest["notes"]:
        result.add("CORRUPT LOADED", f"{name} was damaged ({case.detail['damage']}), loaded and trained on")
    elif name not in words or not OURS.search(words):
        result.add("unclear message", f"{name} was damaged, and the message is: {_first([words])}")


_ENDS = {
    "fails": _fails, "finishes": _finishes, "interrupted": _interrupted, "terminated": _terminated,
    "requeued": _requeued, "stops": _stops, "refused": _refused, "damaged": _damaged, "full": _full,
}  # fmt: skip


def _checkpoints(case: Case, record: dict[str, Any], result: Judgement) -> None:
    """No checkpoint that was whole is lost, and each brings the run back or says why not."""
    if case.strategy == COMPARISON or case.spec.expects == "refused":
        return
    resumes = record["resumes"]
    for place, each in enumerate(resumes):
        _resumed(each, result, hurt_itself=case.spec.expects == "damaged" and place == 0)
    whole = [each for each in resumes if each["whole"]]
    if case.spec.expects == "damaged":
        if not whole and len(resumes) > 1:
            result.add("LOST", "no checkpoint beside the damaged one can be resumed")
    elif record["floor"] and not whole:
        notes = [note for each in resumes for note in (*each["notes"], *each["errors"])]
        result.add("LOST", f"that of step {record['floor']} was whole, and none can be resumed: {_first(notes)}")
    elif record["floor"] and whole[0]["start"] < record["floor"]:
        result.add("LOST", f"that of step {record['floor']} was whole; now the newest is of step {whole[0]['start']}")
    if len(record.get("left_over", [])) > case.ranks + 1:
        result.add("LEFT BEHIND", f"files that belong to no checkpoint: {record['left_over'][:6]}")


def _resumed(tried: dict[str, Any], result: Judgement, *, hurt_itself: bool) -> None:
    """One checkpoint that was resumed."""
    name = tried["name"]
    if tried["hang"]:
        result.add("HANG", f"resuming {name} hangs")
    elif tried["whole"] and tried.get("equal") is False:
        result.add("WRONG RESULT", f"resumed from {name}, ranks end with different weights")
    elif tried["whole"] and tried.get("exact") is False and not hurt_itself:
        result.add("WRONG RESULT", f"resumed from {name}, the run does not repeat bit for bit")
    elif not tried["whole"] and not tried["notes"] and not _is_clear(tried) and not hurt_itself:
        result.add("unclear message", f"{name} cannot be resumed: {_first(tried['errors'])}")


def _is_clear(tried: dict[str, Any]) -> bool:
    words = " ".join(tried["errors"])
    return tried["name"] in words and OURS.search(words) is not None


def _first(messages: list[str]) -> str:
    return next((message.splitlines()[0][:300] for message in messages if message), "(no error)")
