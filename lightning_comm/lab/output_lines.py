"""Whole lines out of what a program writes piece by piece."""

_MOST_BYTES = 65_536


class LineSplitter:
    r"""Cuts pieces of output into lines. What a progress bar draws over itself, by carriage returns, are lines too.

    Example:
        >>> splitter = LineSplitter()
        >>> splitter.feed(b"one\ntw"), splitter.feed(b"o\r\n\r 1 %\r 2 %"), splitter.end()
        (['one'], ['two', ' 1 %'], [' 2 %'])

    """

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, piece: bytes) -> list[str]:
        """Return the lines that a piece ends; one that does not end for 64 KiB is cut."""
        *whole, self._rest = (self._rest + piece).split(b"\n")
        lines = [text for line in whole for text in _drawn(line)]
        *drawn, last = self._rest.split(b"\r")
        if drawn and not last:
            last = drawn.pop() + b"\r"  # which may be half of a line's end
        lines += [text.decode(errors="replace") for text in drawn if text]
        self._rest = last
        if len(self._rest) > _MOST_BYTES:
            lines += self.end()
        return lines

    def end(self) -> list[str]:
        """Return what is left when nothing more comes."""
        rest, self._rest = self._rest, b""
        return _drawn(rest) if rest.strip(b"\r") else []


def _drawn(line: bytes) -> list[str]:
    """Return what was drawn one over the other on one line; an empty line is one."""
    return [text.decode(errors="replace") for text in line.split(b"\r") if text] or ([] if line else [""])
