"""The machine's means for emulated hosts: programs, capabilities, and user namespaces that this process may make."""

import os
import platform
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path

_TOOLS = {"ip": "iproute2", "tc": "iproute2", "unshare": "util-linux", "nsenter": "util-linux"}
_SYSTEM_FOLDERS = ("/usr/local/sbin", "/usr/sbin", "/sbin", "/usr/bin", "/bin")  # which a user's PATH may lack
_CAPABILITIES = {"CAP_NET_ADMIN": 12, "CAP_SYS_ADMIN": 21}  # numbers of <linux/capability.h>
# What keeps users from making namespaces, with the values that do.
_SWITCHES = {
    "kernel.unprivileged_userns_clone": ("0", "1"),
    "kernel.apparmor_restrict_unprivileged_userns": ("1", "0"),
    "user.max_user_namespaces": ("0", "10000"),
}
_SETTINGS = Path("/proc/sys")
_MODULES = {
    "bridge": "bridge",
    "veth": "veth",
    "tbf": "sch_tbf",
}  # of the kernel, by an argument of the command that fails
_NO_MODULE = ("Operation not supported", "Unknown device type", "qdisc kind is unknown", "Not supported")


def program(name: str) -> str | None:
    """Return the path of a program, also where the user's PATH lacks the folders of the system's, or ``None``."""
    path = os.pathsep.join([os.environ.get("PATH", ""), *_SYSTEM_FOLDERS])
    return shutil.which(name, path=path)


def with_path(command: tuple[str, ...]) -> list[str]:
    """Return a command of the lab's own with the path of its program."""
    return [program(command[0]) or command[0], *command[1:]]


def missing() -> str | None:
    """Return in a sentence what the machine lacks, or ``None``."""
    if platform.system() != "Linux":
        return f"the lab needs network namespaces, which only Linux has; this is {platform.system()}"
    absent = [tool for tool in _TOOLS if program(tool) is None]
    if not absent:
        return None
    packages = " ".join(sorted({_TOOLS[tool] for tool in absent}))
    return (
        f"the lab needs the programs {', '.join(absent)}, which are neither on the PATH nor in "
        f"{', '.join(_SYSTEM_FOLDERS[1:3])}; install them (apt-get install {packages})"
    )


def may_administer() -> bool:
    """Whether this process may make namespaces and links on its own, as root may outside of most containers."""
    if lacking():
        return False
    return (
        subprocess.run(with_path(("unshare", "--net", program("true") or "true")), capture_output=True).returncode == 0
    )


def lacking() -> list[str]:
    """Return the capabilities that the lab needs and this process has not."""
    status = Path("/proc/self/status").read_text()
    effective = next(int(line.split()[1], 16) for line in status.splitlines() if line.startswith("CapEff:"))
    return [name for name, number in _CAPABILITIES.items() if not effective >> number & 1]


def why_not(error: str) -> str:
    """Return in one line why namespaces could not be made, and what helps.

    Args:
        error: The output of ``unshare``.

    """
    text = "; ".join(error.splitlines()).strip("; ") or "unshare ended without a message"
    if "failed to execute" in text or "unrecognized option" in text:
        return f"the lab could not start a host: {text}. It needs a Python that everyone may execute, and util-linux"
    first = "the lab needs network namespaces, and may not make them"
    if os.geteuid() == 0 and (names := lacking()):
        return (
            f"{first} ({text}): this is root without {' and '.join(names)}, as in a container. Start it with "
            f"`docker run {_flags(names)}`; in Kubernetes, list them under `securityContext.capabilities.add`"
        )
    if switch := _switch():
        name, value = switch
        return f"{first} ({text}): {name} keeps users from it. Run it as root, or let `sysctl -w {name}={value}` be set"
    return (
        f"{first} ({text}): it needs root, or a kernel that lets users make namespaces; in a container, root and "
        f"`docker run {_flags(_CAPABILITIES)}`"
    )


def _flags(capabilities: Iterable[str]) -> str:
    return " ".join(f"--cap-add={name.removeprefix('CAP_')}" for name in capabilities)


def _switch() -> tuple[str, str] | None:
    """Return the kernel's setting that keeps users from making namespaces, and the value that does not."""
    for name, (closed, opened) in _SWITCHES.items():
        file = _SETTINGS / name.replace(".", "/")
        if file.exists() and file.read_text().strip() == closed:
            return name, opened
    return None


def what_failed(command: tuple[str, ...], error: str) -> str:
    """Return one line about a command in a namespace that failed, and what helps where that is known."""
    text = f"{' '.join(command)}: {'; '.join(error.splitlines())}"
    module = next((module for name, module in _MODULES.items() if name in command), None)
    if module is not None and any(text in error for text in _NO_MODULE):
        return f"{text}. The kernel lacks its module {module}; as root of the machine, `modprobe {module}` loads it"
    return text
