"""The findings of the check: written one by one, read again, and put into a table and a page."""

import math
import operator
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

from benchmarks.kit.pages import joined
from benchmarks.kit.results import append, records
from benchmarks.kit.tables import Column, cells
from benchmarks.kit.tables import table as markdown

Finding = dict[str, Any]
RULES: dict[str, Callable[[Any, Any], bool]] = {
    "<=": operator.le,
    ">=": operator.ge,
    "==": operator.eq,
    "within 25 %": lambda measured, expected: abs(measured / expected - 1) <= 0.25,
}
VERDICTS = ("ok", "fails", "info", "needs CUDA", "left out", "not measured", "proves nothing")
MISSING = ("left out", "not measured", "proves nothing")  # nothing fails, but not all is shown that can be
WHOLE = "the whole part"
STREAMS = "gloo: futures keep their stream (pytorch#170812)"
SANITY, REST_ON_GLOO = 0, (2, 4)  # without that, what these parts find on a GPU proves nothing


@dataclass
class Check:
    """What a part is told, and where it writes what it finds.

    Args:
        part: Its number.
        device: `"cuda"` or `"cpu"`.
        out: The folder for results.
        tiny: Whether it is only to be seen that everything works.
        name: What the run is called: the device, or `"mock"`.
        run: Which run of the part in this folder it is: what an earlier one found counts no more.

    """

    part: int
    device: str
    out: Path
    tiny: bool = False
    name: str = ""
    run: int = 1
    _since: float = field(default_factory=time.monotonic)

    def note(self, name: str, measured: Any, expected: Any, rule: str, *, verdict: str | None = None) -> bool:
        """Write a finding down at once.

        Args:
            name: What it is about.
            measured: A number, a text, or nothing where it could not be measured.
            expected: What was expected before.
            rule: One of `RULES` decides between the two, and may be followed by `;` and a reason; other texts only say
                how they belong together.
            verdict: One of `VERDICTS`, where the rule does not decide; without both it is an `"info"`.

        Returns:
            Whether it does not fail.

        """
        if verdict is None:
            holds = RULES[_ruling(rule)](measured, expected) if _ruling(rule) in RULES else None
            verdict = "info" if holds is None else "ok" if holds else "fails"
        assert verdict in VERDICTS, verdict
        now = time.monotonic()
        finding = {"part": self.part, "name": name, "measured": _plain(measured), "expected": _plain(expected)}
        finding |= {"rule": rule, "verdict": verdict, "seconds": round(now - self._since, 3)}
        finding |= {"device": self.name or self.device, "run": self.run}
        self._since = now
        append(self.out / "results.jsonl", finding)
        return verdict != "fails"

    def needs_cuda(self, name: str, expected: Any) -> None:
        """Write down that something cannot be seen here."""
        self.note(name, None, expected, "on CUDA", verdict="needs CUDA")


def _ruling(rule: str) -> str:
    return rule.split(";")[0]


def _plain(value: Any) -> Any:
    """Return what JSON can hold: it has no NaN and no infinity."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    if isinstance(value, dict):
        return {str(key): _plain(each) for key, each in value.items()}
    return value if isinstance(value, (str, int, float, type(None))) else str(value)


def findings(out: Path) -> list[Finding]:
    """Read what is written; a line that was cut off when its process was ended is passed over."""
    return records(out / "results.jsonl")


def runs_of(found: Sequence[Finding], part: int) -> int:
    """Return how often a part was begun."""
    return max((int(each.get("run", 1)) for each in found if each["part"] == part), default=0)


def latest(found: Sequence[Finding]) -> list[Finding]:
    """Return what the last run of each part found, each thing once, in the order of the parts.

    What rests on gloo proves nothing where gloo loses the order of CUDA's streams.

    >>> old = [{"part": 1, "name": each, "verdict": "fails", "run": 1} for each in ("a", "the whole part")]
    >>> new = {"part": 1, "name": "a", "verdict": "ok", "run": 2}
    >>> latest([*old, {"part": 0, "name": "b", "verdict": "ok", "run": 1}, new]) == [
    ...     {"part": 0, "name": "b", "verdict": "ok", "run": 1}, new]
    True
    """
    runs = {each["part"]: runs_of(found, each["part"]) for each in found}
    by_name = {(each["part"], each["name"]): each for each in found if int(each.get("run", 1)) == runs[each["part"]]}
    loses = by_name.get((SANITY, STREAMS), {}).get("verdict") == "fails"
    told = [
        each | {"verdict": "proves nothing"}
        if loses and each["part"] in REST_ON_GLOO and each["verdict"] == "ok"
        else each
        for each in by_name.values()
    ]
    return sorted(told, key=lambda each: int(each["part"]))


def exit_code(found: Sequence[Finding]) -> int:
    """Return 1 if something fails in the last run of its part, 3 if something is missing, else 0.

    >>> exit_code([{"part": 0, "name": "the whole part", "verdict": "left out"}])
    3
    """
    verdicts = {each["verdict"] for each in latest(found)}
    if "fails" in verdicts:
        return 1
    return 3 if verdicts & set(MISSING) or not verdicts else 0


def summary(found: Sequence[Finding], seconds: float) -> str:
    """Return a line for a part, and one for each thing that fails.

    >>> print(summary([{"name": "a", "verdict": "fails", "measured": 2, "expected": 1, "rule": "<="}], 3.0))
    1 fails, in 3.0 s
      fails: a: 2, expected <= 1
    """
    counts = Counter(each["verdict"] for each in found)
    lines = [", ".join(f"{counts[verdict]} {verdict}" for verdict in VERDICTS if counts[verdict]) or "nothing"]
    lines[0] += f", in {seconds:.1f} s"
    lines += [f"  fails: {each['name']}: {_expectation(each)}" for each in found if each["verdict"] == "fails"]
    return "\n".join(lines)


def _expectation(each: Mapping[str, Any]) -> str:
    return f"{_short(each['measured'])}, expected {_bound(each)}".replace("  ", " ")


def _bound(each: Mapping[str, Any]) -> str:
    """Return the rule and what was expected, and after these the reason."""
    rule, _, reason = each["rule"].partition(";")
    return f"{rule} {_short(each['expected'])}{';' if reason else ''}{reason}".strip()


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list):
        return ", ".join(map(_short, value)) or "none"
    if isinstance(value, dict):
        return ", ".join(f"{key}: {_short(each)}" for key, each in value.items())
    return "-" if value is None else str(value)


def _columns(width: int, numbered: bool) -> list[Column]:
    """Return the columns of a table, whose cells are cut at a width."""
    return [
        Column("finding", lambda each: (f"{each['part']} " * numbered + each["name"])[:width]),
        Column("measured", lambda each: _short(each["measured"])[:width]),
        Column("expected", lambda each: _bound(each)[:width]),
        Column("verdict", lambda each: each["verdict"]),
    ]


def table(found: Sequence[Finding]) -> str:
    """Return figures, and all that is not as expected, for the terminal; tests that went well are only counted.

    What fails comes last, where it is seen.
    """
    now = latest(found)
    told = [each for each in now if each["verdict"] != "ok" or _ruling(each["rule"]) in RULES]
    rows = cells(_columns(100, numbered=True), sorted(told, key=lambda each: each["verdict"] == "fails"))
    width = max((len(row[0]) for row in rows), default=0)
    counts = Counter(each["verdict"] for each in now)
    total = ", ".join(f"{counts[verdict]} {verdict}" for verdict in VERDICTS if counts[verdict])
    lines = [f"{row[0]:<{width}}  {row[1]}  ({row[2]})  {row[3]}" for row in rows]
    return "\n".join([*lines, "", total or "nothing was found"])


def page(found: Sequence[Finding], told: Mapping[str, str], device: str, titles: Sequence[str]) -> str:
    """Return everything as a page for docs/results."""
    what = {"cuda": "one GPU", "cpu": "the CPU, with tiny sizes: it shows that the check works, and nothing else"}.get(
        device, "a device that is not there: every figure is without meaning"
    )
    intro = (
        "What was expected was written before it was run. *info* is a figure without a rule; *needs CUDA* could not be "
        "seen here; *not measured*: the machine was too restless; *proves nothing*: gloo lost the order of streams. "
        "One card shows nothing of NCCL between ranks, of sends between two GPUs, of a peer that fails under NCCL, and "
        "no speed-up."
    )
    command = (
        "`python -m benchmarks.gpu_check` on " + ", ".join(f"{name} {value}" for name, value in told.items()) + "."
    )
    parts = [f"# Check on {what}, {date.today()}", command, intro]
    plain = [column._replace(cell=_within_a_cell(column.cell)) for column in _columns(200, numbered=False)]
    now = latest(found)
    for number, title in enumerate(titles):
        if own := [each for each in now if each["part"] == number]:
            parts += [f"## {number} {title}", markdown(plain, own)]
    return joined(parts)


def _within_a_cell(cell: Callable[[Any], str]) -> Callable[[Any], str]:
    return lambda each: cell(each).replace("|", "\\|").replace("\n", " ")
