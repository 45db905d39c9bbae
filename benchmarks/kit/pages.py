"""Pages of results in Markdown, made of a report: what the JSON file beside a page holds, and nothing else."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

Report = Mapping[str, Any]


def joined(parts: Iterable[str]) -> str:
    """Return a page of its parts, without those that are empty."""
    return "\n\n".join(part for part in parts if part) + "\n"


def page(report: Report, introduction: str, sections: Iterable[str], *, conditions_last: bool = False) -> str:
    r"""Return a page: title with date, introduction, command, versions and hardware, sections.

    Args:
        report: Has `title`, `date`, `environment` and, unless sections name their own, `command`.
        introduction: What was measured, and what columns mean.
        sections: Tables, and what is to be said of them.
        conditions_last: Whether command, versions and hardware stand below the sections.

    >>> page({"title": "T", "date": "2026-01-02", "environment": "torch 9", "command": "python x"}, "Words.", ["| |"])
    '# T, 2026-01-02\n\nWords.\n\n    python x\n\ntorch 9\n\n| |\n'
    """
    command = f"    {report['command']}" if "command" in report else ""
    conditions = [command, report["environment"]]
    parts = [*sections, *conditions] if conditions_last else [*conditions, *sections]
    return joined([f"# {report['title']}, {report['date']}", introduction, *parts])


class Page(NamedTuple):
    """The page of a benchmark.

    Args:
        stem: Of its files' names, before the date.
        title: What it is about.
        introduction: Returns what was measured, and what columns mean.
        sections: Returns its tables, and what is to be said of them.
        conditions_last: Whether command, versions and hardware stand below the sections.

    """

    stem: str
    title: str
    introduction: Callable[[Report], str]
    sections: Callable[[Report], Iterable[str]]
    conditions_last: bool = False

    def of(self, report: Report) -> str:
        """Return the page of a report."""
        titled = {"title": self.title, **report}
        sections = self.sections(report)
        return page(titled, self.introduction(report), sections, conditions_last=self.conditions_last)
