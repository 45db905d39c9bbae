"""Tables of what became of runs that were hurt, and their page."""

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

from benchmarks.faults.judge import BAD, CLASSES
from benchmarks.faults.plan import COMPARISON, KINDS, STRATEGIES
from benchmarks.kit.pages import Report, page
from benchmarks.kit.tables import listed
from lightning_comm.reports.pieces import markdown_table, text_table

Record = dict[str, Any]


def line(record: Record) -> str:
    """Return one line on a run, for the terminal."""
    case, hit = record["case"], record.get("hit") or {}
    where = f"{hit.get('place', '-')}, step {hit.get('step', '-')}"
    ends = ", ".join("-" if each is None else f"{each:.1f}" for each in record.get("ends_s", []))
    text = f"{case['seed']:4} {record['class']:<16} {case['kind']:<20} {case['strategy']:<17} {case['ranks']} ranks"
    text += f"  rank {case['rank']}, {where}; ends after {ends or '-'} s; {record['took_s']:.0f} s"
    return text + (f"\n     {record['why']}" if record["why"] else "")


def counted(records: Iterable[Record], name: Callable[[Record], str]) -> list[list[str]]:
    """Return rows of a table: a name, the number of runs, and how many there are of each class."""
    groups: dict[str, Counter[str]] = {}
    for record in records:
        groups.setdefault(name(record), Counter())[record["class"]] += 1
    order = {each: place for place, each in enumerate((*KINDS, *STRATEGIES, COMPARISON))}
    names = sorted(groups, key=lambda each: order.get(each, -1))
    return [[each, str(groups[each].total()), *(str(groups[each][word] or "") for word in CLASSES)] for each in names]


def failures(records: Iterable[Record]) -> list[Record]:
    """Return the runs in a bad class; Lightning's own strategy is not judged."""
    return [each for each in records if each["class"] in BAD and each["case"]["strategy"] != COMPARISON]


def tables(records: list[Record]) -> list[tuple[str, list[str], list[list[str]]]]:
    """Return title, header and rows of every table; classes that no run is in have no column."""
    found = []
    used = [place for place, word in enumerate(CLASSES) if any(each["class"] == word for each in records)]
    groups: list[tuple[str, Callable[[Record], str]]] = [
        ("class", lambda _: "all"),
        ("kind", lambda each: str(each["case"]["kind"])),
        ("strategy", lambda each: str(each["case"]["strategy"])),
        ("phase", lambda each: str(each["phase"])),
        ("ranks", lambda each: str(each["case"]["ranks"])),
    ]
    for title, name in groups:
        rows = [[*row[:2], *(row[2 + place] for place in used)] for row in counted(records, name)]
        found.append((title, [title, "runs", *(CLASSES[place] for place in used)], rows))
    return found


def terminal(records: list[Record]) -> str:
    """Return the tables for the terminal."""
    return "\n\n".join(text_table(header, rows) for _, header, rows in tables(records))


_INTRODUCTION = """What becomes of runs in which a rank, a link, a process of the loader, a disk or a file is hurt, and
of their checkpoints. One seed is one run; each is judged from outside, by exit codes, logs and files."""


def page_of(records: list[Record], report: Report) -> str:
    """Return the page of results, in Markdown.

    Args:
        records: What became of each run.
        report: Has `date`, `environment` and `command`.

    """
    return page({"title": "Injected faults", **report}, _INTRODUCTION, sections(records))


def sections(records: list[Record]) -> Iterable[str]:
    """Yield the tables, and what was found."""
    for title, header, rows in tables(records):
        if title != "class":
            yield f"## By {title}"
        yield markdown_table(header, rows)
    told = [each for each in records if each["why"]]
    if told:
        yield "## What was found"
    yield listed(map(_told, sorted(told, key=lambda each: (CLASSES.index(each["class"]), each["case"]["seed"]))))


def _told(record: Record) -> str:
    case, why = record["case"], record["why"].replace("\n", " ")[:400]
    what = f"seed {case['seed']}, {case['kind']}, `{case['strategy']}`, {case['ranks']} ranks"
    return f"{what}: **{record['class']}**: {why}"
