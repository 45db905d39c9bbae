"""Tables of the benchmarks: columns as data, each a title and what it says of a row; and figures as cells."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from lightning_comm.reports.pieces import markdown_table, text_table


class Column(NamedTuple):
    """A column of a table.

    Args:
        title: What stands above it.
        cell: Returns its cell for a row.

    """

    title: str
    cell: Callable[[Any], str]


def cells(columns: Sequence[Column], rows: Iterable[Any]) -> list[list[str]]:
    """Return the cells of a table, row by row."""
    return [[column.cell(row) for column in columns] for row in rows]


def table(columns: Sequence[Column], rows: Iterable[Any]) -> str:
    """Return a table in Markdown.

    >>> print(table([Column("name", str), Column("double", lambda row: str(2 * row))], [1, 2]))
    | name | double |
    | --- | ---: |
    | 1 | 2 |
    | 2 | 4 |
    """
    return markdown_table([column.title for column in columns], cells(columns, rows))


def terminal(columns: Sequence[Column], rows: Iterable[Any]) -> str:
    """Return a table for the terminal."""
    return text_table([column.title for column in columns], cells(columns, rows))


def ends(values: Sequence[float], scale: float = 1.0, form: str = ".1f") -> str:
    """Return the lowest and the highest of some values.

    >>> ends([0.2, 0.1], 1e3), ends([0.1, -0.1], 100, "+.2f")
    ('100.0 to 200.0', '-10.00 to +10.00')
    """
    return f"{scale * min(values):{form}} to {scale * max(values):{form}}"


def known(value: Any, form: str, scale: float = 1.0) -> str:
    """Return a figure, and nothing for one that is not known.

    >>> known(1.5e6, ".2f", 1e-6), known(None, ".2f")
    ('1.50', '')
    """
    return "" if value is None else f"{scale * value:{form}}"


def listed(sentences: Iterable[str]) -> str:
    """Return sentences as a list.

    >>> print(listed(["one", "two"]))
    - one
    - two
    """
    return "\n".join(f"- {each}" for each in sentences)


def indented(text: str) -> str:
    """Return a text as a block of code, within an item of a list too."""
    return "\n".join(f"      {line}" for line in text.strip().splitlines())
