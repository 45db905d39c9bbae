"""The send window of a link: it decides which of the waiting messages are given to the socket."""

import heapq

Urgency = tuple[int, ...]

MESSAGES = 2  # so the link is busy while the acknowledgement of the message before comes back
SMALL_BYTES = 2**17  # of small messages there may be more, up to this many bytes together


class SendWindow:
    """Lets the messages of a link go, the most urgent first, no more than a few at a time.

    A message may go if fewer than ``messages`` are on their way, or if it and they are small together, or if it is more
    urgent than all of them. Without the last rule ranks could deadlock: a message may be on its way to a rank that does
    not receive it yet, because that rank waits for a message that is queued behind it.
    :func:`lightning_comm.core.cyclic.link_proof.check_links` shows for which urgencies this rule suffices.

    Args:
        messages: How many may be on their way at a time; at least 1.
        small_bytes: There may be more messages, as long as all together hold no more bytes than this.

    Note:
        *Communication.* None.

    Example:
        >>> window = SendWindow(messages=1, small_bytes=0)
        >>> for name, urgency in enumerate([(3,), (5,), (4,)]):
        ...     window.add(name, urgency, message_bytes=100)
        >>> window.release(), window.release()
        ([0], [])
        >>> window.arrived(0)
        >>> window.release()
        [2]

    """

    def __init__(self, messages: int = MESSAGES, small_bytes: int = SMALL_BYTES) -> None:
        self._messages, self._small_bytes = messages, small_bytes
        self._waiting: list[tuple[Urgency, int, int]] = []  # a heap: urgency, name, bytes
        self._on_the_way: dict[int, tuple[Urgency, int]] = {}  # by name

    def add(self, name: int, urgency: Urgency, message_bytes: int) -> None:
        """Queue a message; the smallest urgency goes first, and of equal ones the smallest name."""
        heapq.heappush(self._waiting, (urgency, name, message_bytes))

    def release(self) -> list[int]:
        """Return the names of the messages that go now, in this order."""
        gone = []
        while self._waiting and self._may_go(*self._waiting[0]):
            urgency, name, message_bytes = heapq.heappop(self._waiting)
            self._on_the_way[name] = urgency, message_bytes
            gone.append(name)
        return gone

    def arrived(self, name: int) -> None:
        """Note that a message has been acknowledged."""
        del self._on_the_way[name]

    def _may_go(self, urgency: Urgency, name: int, message_bytes: int) -> bool:
        on_the_way = self._on_the_way
        return (
            len(on_the_way) < self._messages
            or message_bytes + sum(size for _, size in on_the_way.values()) <= self._small_bytes
            or (urgency, name) < min((each, other) for other, (each, _) in on_the_way.items())
        )
