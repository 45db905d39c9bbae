"""Options that the benchmarks share, and the command that a page names."""

import argparse
import json
import re
import shlex
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NoReturn

from benchmarks.kit.pages import Page


class Parser:
    """A parser of the command line, with the options that benchmarks share.

    Args:
        doc: The module's docstring, which is shown as it is written.

    """

    def __init__(self, doc: str | None) -> None:
        parser = argparse.ArgumentParser(
            prog=program(), description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        self.add_argument, self.parse_args, self.error = parser.add_argument, parser.parse_args, parser.error

    def number(self, name: str, default: Any, said: str | None = None) -> None:
        """Add an option for a number, of the type of its default."""
        self.add_argument(name, type=type(default), default=default, help=f"{said or '%(type)s'} (%(default)s)")

    def numbers(self, **defaults: Any) -> None:
        """Add options for numbers, each by its name and default."""
        for name, default in defaults.items():
            self.number(f"--{name.replace('_', '-')}", default)

    def links(self, hosts: int, links: Iterable[str]) -> None:
        """Add the options for emulated hosts and the rates of their links."""
        self.number("--hosts", hosts, "emulated hosts")
        self.add_argument("--links", nargs="+", default=list(links), help="rates of their links")

    def results(self, page: Page) -> None:
        """Add the options of whatever writes a page."""
        said = f"the Markdown file; docs/results/{page.stem}_<date>.md by default"
        self.add_argument("--out", help=said)
        said = "print the page of results that are there, and measure nothing"
        self.add_argument("--page-of", type=Path, action=_PageOf, page=page, metavar="JSON", help=said)

    def some(self, name: str, known: Iterable[str]) -> None:
        """Add an option for some of what is known; all by default."""
        known = list(known)
        self.add_argument(name, nargs="+", choices=known, default=known, metavar=name.strip("-").upper())


class _PageOf(argparse.Action):
    def __init__(self, page: Page, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._page = page

    def __call__(self, parser: Any, namespace: Any, values: Any, option: Any = None) -> NoReturn:
        print(self._page.of(json.loads(values.read_text())), end="")
        sys.exit(0)


def chosen(asked: Iterable[str] | None, known: Iterable[str], always: Iterable[str] = ()) -> list[str]:
    """Return what was asked for, in the order of what is known, and what is always there; all if nothing was asked for.

    >>> chosen(["c"], "abcd", always="a"), chosen(None, "ab")
    (['a', 'c'], ['a', 'b'])
    """
    known = list(known)
    wanted = {*(known if asked is None else asked), *always}
    return [name for name in known if name in wanted]


def refuse_unknown(parser: Parser, option: str, asked: Iterable[str] | None, known: Any) -> None:
    """End with a message if an option names what is not known; for what is too slow to load for `choices`."""
    if unknown := set(asked or ()) - set(known):
        parser.error(f"{option}: unknown {', '.join(sorted(unknown))}; there are {', '.join(known)}")


def numbers(text: str, last: int | None = None) -> list[int]:
    """Return the numbers in a list of numbers and ranges, each once.

    >>> numbers("0-2,5,1")
    [0, 1, 2, 5]

    Args:
        text: What was given.
        last: The highest that there is, if there is one.

    """
    between = "" if last is None else f" of 0 to {last}"
    way_out = f"give numbers{between} and ranges by commas, as in 0-3,5"
    found: list[int] = []
    for each in text.split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", each.strip())
        if match is None:
            raise argparse.ArgumentTypeError(f"got {text!r}; {way_out}")
        ranged = range(int(match[1]), int(match[2] or match[1]) + 1)
        if last is not None and (not ranged or ranged[-1] > last):
            raise argparse.ArgumentTypeError(f"there are 0 to {last}; got {text!r}; {way_out}")
        found += [number for number in ranged if number not in found]
    return found


def settings_of(options: argparse.Namespace, *names: str) -> dict[str, Any]:
    """Return some options as fields of a report."""
    return {name: getattr(options, name) for name in names}


def program() -> str:
    """Return how this process was started, without its arguments."""
    spec = sys.modules["__main__"].__spec__
    return f"python -m {'' if spec is None else spec.name.removesuffix('.__main__')}"


def command() -> str:
    """Return the command that started this process, as a page names it."""
    return " ".join([program(), *map(shlex.quote, sys.argv[1:])])
