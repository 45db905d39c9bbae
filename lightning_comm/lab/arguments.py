"""Checks of the arguments that describe a lab, before anything is made."""

import math
from collections.abc import Sequence
from typing import Any

from lightning_comm.lab.namespaces import check_rate

_MOST_HOSTS = 64


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def check_arguments(
    hosts: int, link: str | Sequence[str], speeds: Sequence[float] | None, devices_per_host: int
) -> None:
    """Refuse arguments that describe no :class:`Lab`.

    Raises:
        ValueError: If one is out of range.

    """
    if not _is_count(hosts) or hosts > _MOST_HOSTS:
        raise ValueError(
            f"Lab: `hosts` must be a whole number from 1 to {_MOST_HOSTS}; got {hosts!r}. All of them share this "
            "machine's processors and memory: a few show what a network does."
        )
    links = [link] * hosts if isinstance(link, str) else list(link)
    if len(links) != hosts:
        raise ValueError(
            f"Lab: `link` must be one rate, or one for each of the {hosts} hosts; got {len(links)}: {links!r}. "
            "'100mbit' is a rate."
        )
    for each in links:
        check_rate(each)
    if speeds is not None and (len(speeds) != hosts or not all(math.isfinite(each) and each > 0 for each in speeds)):
        raise ValueError(
            f"Lab: `speeds` must be one number > 0 for each of the {hosts} hosts; got {list(speeds)!r}. 1 is the "
            "speed that the emulated device states, 0.5 half of it."
        )
    if not _is_count(devices_per_host):
        raise ValueError(
            f"Lab: `devices_per_host` counts processes, so it must be a whole number >= 1; got {devices_per_host!r}. 1 "
            "stands for hosts with one device."
        )
