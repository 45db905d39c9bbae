"""What the logs of ranks say: the last error, whom it names, and whether a resumed run lacks something."""

import re

OURS = re.compile(r"(?:LocalUpdateStrategy|CyclicStrategy|CompressedDDPStrategy|AdaptivePartition|lightning_comm)\b")
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")
_PREFIX = re.compile(r"^\[rank\d+\]:? ?", re.MULTILINE)
_ERROR = re.compile(r"^(?:[\w.]+\.)?\w*(?:Error|Exception|Failure|Interrupt|SystemExit|BatchNotFound)\b", re.MULTILINE)
_ENDED = re.compile(r"^rank \d+ has waited for \d+ s in .*, and ends\. .*", re.MULTILINE)  # by the watchdog
_NOISE = re.compile(r"^(?:Traceback|Exception ignored|\[[WE]\d|During handling|The above exception)", re.MULTILINE)
_RANKS = re.compile(r"\branks? (\d+(?:(?:, | and | or )\d+)*)", re.IGNORECASE)


def last_error(text: str) -> str:
    """Return the message of the last error that a process printed, or an empty string."""
    text = _PREFIX.sub("", _COLOURS.sub("", text))
    if (ended := _ENDED.search(text)) is not None:
        return ended.group()[:1500]
    matches = [match for match in _ERROR.finditer(text) if "Exception ignored" not in text[: match.start()][-80:]]
    if not matches:
        return ""
    message = text[matches[-1].start() :]
    noise = _NOISE.search(message, 1)
    return message[: noise.start() if noise else None].strip()[:1500]


def degraded(text: str) -> str:
    """Return the warning by which a resumed run said that it is not brought back whole, or an empty string."""
    text = _COLOURS.sub("", text)
    lines = [line for line in text.splitlines() if "ckpt_path" in line and OURS.search(line)]
    return lines[0].strip()[:600] if lines else ""


def named(message: str, own: int) -> set[int]:
    """Return the ranks that a rank's message speaks of, without itself."""
    groups = (re.findall(r"\d+", match.group(1)) for match in _RANKS.finditer(message))
    return {int(number) for group in groups for number in group} - {own}
