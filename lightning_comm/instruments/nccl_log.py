"""NCCL's log of the transports it uses. Needs no root: NCCL writes it where ``NCCL_DEBUG`` is ``INFO``.

The form of the lines was taken from logs in public reports. No GPU was at hand, so nothing of this has been run against
NCCL itself.
"""

import re

# "… NCCL INFO Channel 00/0 : 1[1] -> 0[0] [send] via NET/Socket/0" or "… via P2P/CUMEM", "… via SHM/direct/direct"
_WAY = re.compile(r"NCCL INFO Channel .* via ((?:NET/\w+)|P2P|SHM|COLLNET|NVLS)")


def ways_taken(log: str) -> list[str]:
    """Return what carried NCCL's messages, each once: ``NET/IB``, ``NET/Socket``, ``P2P``, ``SHM``.

    Args:
        log: The text of a log that NCCL wrote at level ``INFO``.

    Example:
        >>> ways_taken("a:1:2 [0] NCCL INFO Channel 00/0 : 1[1] -> 0[0] [send] via NET/Socket/0")
        ['NET/Socket']

    """
    return sorted(set(_WAY.findall(log)))
