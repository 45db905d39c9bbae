"""Where hosts cannot be emulated, one line says what this machine lacks or forbids, and what helps."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lightning_comm.lab import namespaces, permissions
from lightning_comm.lab.cluster import Lab, LabError, unavailable

LAB = [
    str(Path(sys.executable).parent / "lightning-comm"),
    *("lab", "--hosts", "1", "--", sys.executable, "-I", "-S", "-c", "print('on a host')"),
]
NO_USER_NAMESPACES = 'echo 0 > /proc/sys/user/max_user_namespaces && exec "$@"'


@pytest.fixture
def run_without(labs_can_be_made):
    """Run the console's `lab` as root without some capabilities; return its exit code and what it printed."""
    if labs_can_be_made is not None:
        pytest.skip(labs_can_be_made)
    if os.geteuid() != 0 or shutil.which("setpriv") is None:
        pytest.skip("capabilities are root's, and setpriv drops them")

    def run(names, user_namespaces):
        dropped = ",".join(f"-{name}" for name in names)
        command = ["setpriv", f"--bounding-set={dropped}", "--inh-caps=-all", *LAB]
        if not user_namespaces:
            command = ["unshare", "--user", "--map-root-user", "sh", "-c", NO_USER_NAMESPACES, "sh", *command]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        return done.returncode, done.stdout + done.stderr

    return run


def test_tools_are_found_where_the_path_lacks_the_folders_of_the_system(labs_can_be_made, tmp_path, monkeypatch):
    if labs_can_be_made is not None:
        pytest.skip(labs_can_be_made)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert shutil.which("ip") is None
    with Lab(2, "100mbit") as lab:
        lab.set_link(1, "10mbit")
        done = lab.run(["/bin/sh", "-c", "echo $PATH"], timeout_s=20)
    assert done.output == [f"{tmp_path}\n"] * 2  # the command's own search goes on as it was


@pytest.mark.parametrize("names", [("net_admin",), ("sys_admin",), ("net_admin", "sys_admin")], ids=" and ".join)
def test_a_container_without_capabilities_is_named_with_those_it_lacks_and_how_to_grant_them(names, run_without):
    code, said = run_without(names, user_namespaces=False)
    assert code == 1
    wanted = " and ".join(f"CAP_{name.upper()}" for name in names)
    flags = " ".join(f"--cap-add={name.upper()}" for name in names)
    assert [
        words for words in (f"root without {wanted}, as in a container", f"`docker run {flags}`") if words not in said
    ] == []
    assert len(said.splitlines()) == 1


def test_where_users_may_make_namespaces_root_needs_no_capability(run_without):
    assert run_without(("net_admin", "sys_admin"), user_namespaces=True) == (0, "[host 0] on a host\n")


def test_another_system_and_missing_programs_are_named(monkeypatch):
    monkeypatch.setattr(permissions.platform, "system", lambda: "Darwin")
    assert "Darwin" in unavailable()
    monkeypatch.undo()
    monkeypatch.setattr(permissions, "program", lambda name: None if name in ("ip", "tc") else name)
    must_say = ["programs ip, tc", "/usr/sbin", "apt-get install iproute2)"]
    assert [words for words in must_say if words not in unavailable()] == []
    with pytest.raises(LabError, match="programs ip, tc"):
        Lab(2)


def test_what_unshare_says_is_one_line_of_the_answer(monkeypatch):
    monkeypatch.setattr(namespaces, "_NEW", ("sh", "-c", "echo unshare: no, you >&2; echo may not >&2; exit 1"))
    said = unavailable()
    assert "may not make them (unshare: no, you; may not)" in said
    assert "\n" not in said
    with pytest.raises(LabError, match="no, you; may not"):
        Lab(2)


@pytest.mark.parametrize(
    ("name", "closed", "opened"),
    [
        ("kernel.unprivileged_userns_clone", "0", "1"),
        ("kernel.apparmor_restrict_unprivileged_userns", "1", "0"),
        ("user.max_user_namespaces", "0", "10000"),
    ],
)
def test_the_setting_that_keeps_users_from_namespaces_is_named_with_its_change(
    name, closed, opened, tmp_path, monkeypatch
):
    file = tmp_path / name.replace(".", "/")
    file.parent.mkdir()
    monkeypatch.setattr(permissions, "_SETTINGS", tmp_path)
    monkeypatch.setattr(permissions.os, "geteuid", lambda: 1000)
    file.write_text(f"{closed}\n")
    assert f"`sysctl -w {name}={opened}`" in permissions.why_not("unshare: Operation not permitted")
    file.write_text(f"{opened}\n")
    assert "sysctl" not in (said := permissions.why_not("unshare: Operation not permitted"))
    assert "needs root" in said


@pytest.mark.parametrize(
    ("command", "error", "module"),
    [
        ("ip link add br0 type bridge", "Error: Unknown device type.", "bridge"),
        ("ip link add p0 type veth peer name p1", "RTNETLINK answers: Operation not supported", "veth"),
        ("tc qdisc replace dev p0 root tbf rate 1mbit", "Error: Specified qdisc kind is unknown.", "sch_tbf"),
    ],
)
def test_a_module_that_the_kernel_lacks_is_named(command, error, module):
    said = permissions.what_failed(tuple(command.split()), error)
    assert said.startswith(f"{command}: {error}")
    assert f"`modprobe {module}`" in said
    assert "modprobe" not in permissions.what_failed(tuple(command.split()), "Cannot find device")


def test_a_python_that_cannot_be_executed_is_not_taken_for_a_kernel_that_forbids():
    said = permissions.why_not("unshare: failed to execute /root/python: Permission denied")
    assert "may not make them" not in said
    assert "Python that everyone may execute" in said
