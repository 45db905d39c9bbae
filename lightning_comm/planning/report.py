"""Pieces of reports: tables for terminal, Markdown and HTML, numbers as people read them, and a page in one file."""

import base64
import html
from collections.abc import Sequence

_STYLE = (
    "body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222}"
    "table{border-collapse:collapse;margin:1rem 0}th,td{padding:.3rem .8rem;border-bottom:1px solid #ddd;"
    "text-align:right}th:first-child,td:first-child{text-align:left}img{max-width:100%}"
    "code{background:#f3f3f3;padding:.2rem .4rem}"
)
_CARD = (
    "display:inline-block;vertical-align:top;width:11.5rem;margin:0 .8rem .8rem 0;padding:.8rem 1rem;"
    "border:1px solid #ddd;border-radius:.5rem"
)


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table for the terminal; the first column is flush left, the others right."""
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        first, *rest = cells
        return "  ".join([first.ljust(widths[0]), *(c.rjust(w) for c, w in zip(rest, widths[1:], strict=True))])

    return "\n".join([line(header), "  ".join("-" * width for width in widths), *map(line, rows)])


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table in Markdown; the first column is flush left, the others right."""
    rule = ["---", *("---:" for _ in header[1:])]
    return "\n".join("| " + " | ".join(row) + " |" for row in [header, rule, *rows])


def html_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table in HTML, its text escaped."""
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><tr>{head}</tr>{body}</table>"


def html_cards(cards: Sequence[tuple[str, str]]) -> str:
    """Return the few figures that a reader in a hurry wants, each with its label."""
    return "".join(
        f'<div style="{_CARD}"><div style="font-size:1.6rem">{html.escape(value)}</div>{html.escape(label)}</div>'
        for value, label in cards
    )


def html_figure(title: str, said: str, svg: bytes) -> str:
    """Return a figure with its title and what is to be said of it."""
    image = base64.b64encode(svg).decode()
    return (
        f"<h2>{html.escape(title)}</h2><p>{html.escape(said)}</p>"
        f'<img alt="{html.escape(title)}" src="data:image/svg+xml;base64,{image}">'
    )


def html_text(text: str) -> str:
    """Return a sentence in HTML, with what stands between backticks as code."""
    plain, *rest = html.escape(text).split("`")
    return plain + "".join(f"<code>{part}</code>" if place % 2 == 0 else part for place, part in enumerate(rest))


def megabytes(count: float, digits: int = 1) -> str:
    """Return a number of bytes in MB, of 10**6 bytes."""
    return f"{count / 1e6:,.{digits}f} MB"


def data_size(count: float) -> str:
    """Return a number of bytes in kB or MB.

    Example:
        >>> data_size(1_234), data_size(2_345_678)
        ('1.2 kB', '2.3 MB')

    """
    return f"{count / 1e3:.1f} kB" if count < 1e6 else megabytes(count)


def duration(seconds: float) -> str:
    """Return a time as people say it.

    Example:
        >>> [duration(seconds) for seconds in (0.0123, 5.04, 61, 530, 3000, 8000, 200000)]
        ['12.3 ms', '5.0 s', '61 s', '8.8 min', '50 min', '2.2 h', '55.6 h']

    """
    if seconds < 1:
        return f"{1000 * seconds:.1f} ms"
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.{1 if seconds < 1200 else 0}f} min"
    return f"{seconds / 3600:.1f} h"


def percent(share: float) -> str:
    """Return a share of 1 in percent."""
    return f"{100 * share:.1f} %"


def page(title: str, body: str) -> str:
    """Return an HTML page that needs no other file, from a plain title and a body in HTML."""
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{_STYLE}</style></head><body>{body}</body></html>\n"
    )
