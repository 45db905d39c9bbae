"""Pieces of reports: tables for terminal, Markdown and HTML, and a page in one file."""

import base64
import html
import re
import textwrap
from collections.abc import Sequence

MOST_COLUMNS = 120  # characters of a line on the terminal
_LONG = 34  # characters of a cell on a page, from which on it is text and wraps; shorter ones are figures and do not
_STYLE = (
    "body{font:16px/1.5 system-ui,sans-serif;max-width:72rem;margin:2rem auto;padding:0 1rem;color:#222;"
    "overflow-wrap:anywhere}p{max-width:60rem}"
    "table{border-collapse:collapse;margin:1rem 0;font-size:.875rem;display:block;max-width:100%;overflow-x:auto;"
    "overflow-wrap:normal}"
    "th,td{padding:.3rem .6rem;border-bottom:1px solid #ddd;text-align:right;vertical-align:top;"
    "font-variant-numeric:tabular-nums}th{vertical-align:bottom}td{white-space:pre}"
    "th:first-child,td:first-child{text-align:left}"
    "td.long{white-space:normal;overflow-wrap:anywhere;text-align:left;min-width:12rem;max-width:34rem}"
    ".card{display:inline-block;vertical-align:top;width:11.5rem;margin:0 .8rem .8rem 0;padding:.8rem 1rem;"
    "border:1px solid #ddd;border-radius:.5rem}.card div{font-size:1.6rem}"
    "img{max-width:100%}code{background:#f3f3f3;padding:.1rem .3rem}"
)


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table for the terminal; the first column is flush left, the others right.

    What is wider than a line gets titles of several lines; and columns that do not fit then either follow below, with
    the first one again.

    Example:
        >>> print(text_table(["strategy", "times as fast as ddp"], [["qsr", "1.55"], ["local_sgd", "1.50"]]))
        strategy   times as fast as ddp
        ---------  --------------------
        qsr                        1.55
        local_sgd                  1.50

    """
    columns = [list(column) for column in zip(header, *rows, strict=True)]
    titles = [[title] for title in header]
    widths = [max(map(len, cells)) for cells in columns]
    if sum(widths) + 2 * (len(widths) - 1) > MOST_COLUMNS:
        titles = [_broken(title, max(map(len, cells), default=0)) for title, *cells in columns]
        widths = [max(map(len, [*title, *cells])) for title, (_, *cells) in zip(titles, columns, strict=True)]
    return "\n\n".join(_block(columns, titles, widths, own) for own in _fitting(widths))


def _broken(title: str, width: int) -> list[str]:
    """Return a title in lines that are no wider than its column must be, or than eight characters."""
    longest = max(map(len, title.split()), default=0)
    return textwrap.wrap(title, max(width, longest, 8), break_long_words=False, break_on_hyphens=False) or [""]


def _fitting(widths: Sequence[int]) -> list[list[int]]:
    """Return the columns of each part of a table, of which every one has the first column."""
    parts, room = [[0]], MOST_COLUMNS - widths[0]
    for place, width in enumerate(widths[1:], start=1):
        if room < width + 2 and len(parts[-1]) > 1:
            parts.append([0])
            room = MOST_COLUMNS - widths[0]
        parts[-1].append(place)
        room -= width + 2
    return parts


def _block(
    columns: Sequence[Sequence[str]], titles: Sequence[Sequence[str]], widths: Sequence[int], own: Sequence[int]
) -> str:
    height = max(len(titles[place]) for place in own)
    head = [[""] * (height - len(titles[place])) + [*titles[place]] for place in own]
    body = [columns[place][1:] for place in own]

    def line(cells: Sequence[str]) -> str:
        first, *rest = cells
        shown = [first.ljust(widths[0]), *(c.rjust(widths[place]) for c, place in zip(rest, own[1:], strict=True))]
        return "  ".join(shown)

    rule = "  ".join("-" * widths[place] for place in own)
    return "\n".join([*map(line, zip(*head, strict=True)), rule, *map(line, zip(*body, strict=True))])


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table in Markdown; the first column is flush left, the others right."""
    rule = ["---", *("---:" for _ in header[1:])]
    return "\n".join("| " + " | ".join(row) + " |" for row in [header, rule, *rows])


def html_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table in HTML. Figures stay on one line; titles and text wrap."""
    head = "".join(f"<th>{html_text(cell)}</th>" for cell in header)
    body = "".join("<tr>" + "".join(map(_cell, row)) + "</tr>" for row in rows)
    return f"<table><tr>{head}</tr>{body}</table>"


def _cell(text: str) -> str:
    kind = ' class="long"' if len(text) > _LONG else ""
    return f"<td{kind}>{html_text(text)}</td>"


def html_cards(cards: Sequence[tuple[str, str]]) -> str:
    """Return the few main figures, each with its label."""
    return "".join(f'<div class="card"><div>{html_text(value)}</div>{html_text(label)}</div>' for value, label in cards)


def html_figure(title: str, caption: str, svg: bytes) -> str:
    """Return a figure with its title and a caption."""
    image = base64.b64encode(svg).decode()
    return (
        f"<h2>{html_text(title)}</h2><p>{html_text(caption)}</p>"
        f'<img alt="{html.escape(title)}" src="data:image/svg+xml;base64,{image}">'
    )


def html_text(text: str) -> str:
    """Return a text in HTML: escaped, and with what stands between backticks as code. All text of a page comes here.

    A backtick without a partner, as in the messages of some programs, becomes an apostrophe.

    Example:
        >>> html_text("give `--steps 60` & more"), html_text("unknown option `--stps'")
        ('give <code>--steps 60</code> &amp; more', 'unknown option &#x27;--stps&#x27;')

    """
    marked = re.sub(r"(`+)([^`]+)\1", r"<code>\2</code>", html.escape(text))
    return marked.replace("`", "&#x27;")


def html_paragraphs(sentences: Sequence[str]) -> str:
    """Return sentences in HTML, each in a paragraph of its own."""
    return "".join(f"<p>{html_text(text)}</p>" for text in sentences)


def html_command(command: str) -> str:
    """Return a command in HTML, as it is typed; backticks are the shell's there."""
    return f"<p><code>{html.escape(command).replace('`', '&#96;')}</code></p>"


def page(title: str, body: str) -> str:
    """Return an HTML page that needs no other file, from a plain title and a body in HTML."""
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{_STYLE}</style></head><body>{body}</body></html>\n"
    )
