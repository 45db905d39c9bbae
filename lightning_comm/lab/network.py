"""The network of a lab: the hosts' namespaces, and the switch that joins them by shaped links."""

from collections.abc import Sequence

from lightning_comm.lab import namespaces
from lightning_comm.lab.namespaces import INTERFACE, LabError, Namespace


def host_address(host: int) -> str:
    """Return the address of a host in the network of its lab."""
    return f"10.77.0.{host + 1}"


class HostNetwork:
    """Namespaces of hosts around that of a switch.

    Args:
        rates: The rate of each host's link, one for each.

    Raises:
        LabError: If namespaces cannot be made.

    """

    def __init__(self, rates: Sequence[str]) -> None:
        self.number = len(rates)
        self.hosts: list[Namespace] = []  # none once it is closed
        self._switch: Namespace | None = None
        try:
            self._build(rates)
        except BaseException:
            self.close()
            raise

    def _build(self, rates: Sequence[str]) -> None:
        self._switch = Namespace()
        self._switch.run("ip", "link", "add", "br0", "type", "bridge")
        self._switch.run("ip", "link", "set", "br0", "up")
        for index, rate in enumerate(rates):
            self.hosts.append(Namespace(self._switch))
            namespaces.connect(self._switch, self.hosts[index], index, f"{host_address(index)}/24", rate)

    @property
    def is_open(self) -> bool:
        """Whether it has not been closed."""
        return self._switch is not None

    @property
    def switch(self) -> Namespace:
        """The switch.

        Raises:
            LabError: If the network is closed.

        """
        if self._switch is None:
            raise LabError("Lab: it is closed, and its hosts are gone. Make a new one.")
        return self._switch

    def checked(self, host: int) -> int:
        """Return the number of a host.

        Raises:
            ValueError: If there is no such host.

        """
        if not 0 <= host < self.number:
            raise ValueError(f"Lab: `host` must be from 0 to {self.number - 1}; got {host!r}. Hosts count from 0.")
        return host

    def alive(self, host: int) -> Namespace:
        """Return a host.

        Raises:
            ValueError: If there is no such host.
            LabError: If it has been killed, or the network is closed.

        """
        self.checked(host)
        if self._switch is None:
            raise LabError("Lab: it is closed, and its hosts are gone. Make a new one.")
        if not self.hosts[host].alive:
            raise LabError(f"Lab: host {host} has been killed, which is for good. Make a new lab.")
        return self.hosts[host]

    def shape(self, host: int, up: str, down: str) -> None:
        """Change the rates of a host's link, from the host and towards it."""
        namespace = self.alive(host)
        for rate in (up, down):
            namespaces.check_rate(rate)
        namespaces.shape(namespace, INTERFACE, up)
        namespaces.shape(self.switch, f"p{host}", down)

    def plug(self, host: int, *, into_switch: bool) -> None:
        """Put a host's cable into the switch, or pull it out."""
        self.alive(host)
        self.switch.run("ip", "link", "set", f"p{host}", "up" if into_switch else "down")

    def close(self) -> None:
        """Take hosts, links and switch down. Doing so again changes nothing."""
        hosts, self.hosts = self.hosts, []
        for host in hosts:
            host.close()
        if self._switch is not None:
            self._switch.close()
            self._switch = None
