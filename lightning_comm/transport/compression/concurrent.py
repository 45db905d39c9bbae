"""Control of several codecs at once: each of their generators goes on when its caller wants it to."""

from lightning_comm.transport.compression.base import Conversation, StartedMessage


class Talk:
    """A generator of :meth:`Codec.mean` whose first message has been started.

    Args:
        conversation: The generator; its first message starts here.

    """

    def __init__(self, conversation: Conversation) -> None:
        self._conversation = conversation
        self._message: StartedMessage | None = None
        self.go_on()

    @property
    def more(self) -> bool:
        """Whether another message must be started once the one under way has arrived."""
        return self._message is not None and self._message.more

    def go_on(self) -> None:
        """Wait for the message under way and start the next one, if there is one."""
        if self._message is not None:
            self._message.pending.wait()
        self._message = next(self._conversation, None)

    def finish(self) -> None:
        """Wait for all that is under way and all that follows."""
        while self._message is not None:
            self.go_on()
