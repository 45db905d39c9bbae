"""Lines are whole, whatever the pieces in which they come."""

import pytest

from lightning_comm.lab.output_lines import LineSplitter

TEXT = b"one\ntwo\r\n\nfour\r 1 %\r 2 %\r\nfive"
LINES = ["one", "two", "", "four", " 1 %", " 2 %", "five"]


@pytest.mark.parametrize("size", range(1, len(TEXT) + 1))
def test_the_size_of_the_pieces_does_not_matter(size):
    splitter = LineSplitter()
    lines = [line for at in range(0, len(TEXT), size) for line in splitter.feed(TEXT[at : at + size])]
    assert lines + splitter.end() == LINES


@pytest.mark.parametrize("bar", [b"\r%d", b"%d\r"])
def test_a_progress_bar_is_seen_while_it_is_drawn(bar):
    splitter = LineSplitter()
    seen = [splitter.feed(bar % step) for step in range(5)]
    assert seen == [[], ["0"], ["1"], ["2"], ["3"]]
    assert splitter.end() == ["4"]


def test_a_line_without_an_end_does_not_gather_in_memory():
    splitter = LineSplitter()
    assert [len(line) for line in splitter.feed(b"x" * 70_000)] == [70_000]
    assert splitter.end() == []


def test_what_is_not_text_is_shown_all_the_same():
    assert LineSplitter().feed(b"\xff!\n") == ["�!"]
