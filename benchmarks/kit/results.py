"""Files of results: a report with its page, written again as it grows, and lines of JSON, written as they come."""

import json
from collections.abc import Iterable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from benchmarks import ROOT
from benchmarks.kit.environment import environment
from benchmarks.kit.options import command
from benchmarks.kit.pages import Page


class Results:
    """A report that grows, and its files: a page, and the report as JSON beside it.

    Args:
        page: Of the benchmark.
        out: The Markdown file; ``None`` for `docs/results/<stem>_<date>.md`.
        **fields: More than title, date, environment and command.

    """

    def __init__(self, page: Page, out: str | None, **fields: Any) -> None:
        self._page = page
        date = datetime.now(timezone.utc).strftime("%Y-%m-%d")
        self.report: dict[str, Any] = {"title": page.title, "date": date, "environment": environment()}
        self.report |= {"command": command(), **fields}
        self.path = Path(out) if out else ROOT / "docs" / "results" / f"{page.stem}_{date}.md"

    @property
    def json(self) -> Path:
        """The file that the report is in."""
        return self.path.with_suffix(".json")

    def earlier(self) -> dict[str, Any]:
        """Return the report that is in the file already; an empty one if there is none."""
        return dict(json.loads(self.json.read_text())) if self.json.exists() else {}

    def write(self) -> None:
        """Write the page, and the report beside it, so that an interruption loses nothing."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.json.write_text(json.dumps(self.report, indent=1) + "\n")
        self.path.write_text(self._page.of(self.report))

    def tell(self) -> None:
        """Print where the results are."""
        print(f"\n{self.path}\n{self.json}")


def append(path: Path, record: Any) -> None:
    """Add a line to a file of records; one that was cut off before stays a line of its own."""
    text = json.dumps(record, default=str) + "\n"
    if path.exists() and path.read_bytes()[-1:] not in (b"", b"\n"):
        text = "\n" + text
    with path.open("a") as file:
        file.write(text)


def records(path: Path) -> list[Any]:
    """Read what is written; a line that was cut off when its process was ended is passed over."""
    return list(_whole(path.read_text().splitlines())) if path.exists() else []


def _whole(lines: Iterable[str]) -> Iterable[Any]:
    for line in lines:
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            continue
