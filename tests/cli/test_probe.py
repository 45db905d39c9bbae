"""``lightning-comm probe`` as a user starts it: alone, under torchrun, srun and the lab; and what it refuses."""

import json
import os
import subprocess
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from importlib import metadata
from io import StringIO
from pathlib import Path

import pytest
from support.command_lines import with_fewer_packages
from support.forked_python import forked
from support.processes import free_port, launch

from lightning_comm.cli.main import main
from lightning_comm.cli.probe import command as cli
from lightning_comm.cli.probe.arguments import parse
from lightning_comm.cli.probe.command import shape_of_job
from lightning_comm.core.costs import LinkProfile

QUICK = ["--sizes=4,64KiB,1MiB", "--repeats=3", "--seconds=6"]
WORDS = ["probe", "--accelerator=cpu", *QUICK]
PROBE = [str(Path(sys.executable).parent / "lightning-comm"), *WORDS]
LAUNCHERS = (
    "LOCAL_RANK",
    "NODE_RANK",
    "GROUP_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "RANK",
    "MASTER_",
    "SLURM_",
    "LIGHT",
)


def clean_environment(**more: str) -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith(LAUNCHERS)}
    return kept | {"OMP_NUM_THREADS": "1"} | more


def run(command, cwd, **env: str) -> subprocess.CompletedProcess:
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=clean_environment(**env), cwd=cwd)


def test_the_installed_command_started_alone_starts_the_processes_that_it_is_told_to(tmp_path):
    done = run([*PROBE, "--devices=2"], tmp_path, **with_fewer_packages())
    assert done.returncode == 0, done.stderr[-3000:]
    profile = LinkProfile.load(tmp_path / "probe.json")
    assert (profile.world_size, profile.backend) == (2, "gloo")
    assert profile.environment["command"] == f"lightning-comm {' '.join(WORDS)} --devices=2"
    assert {"torch", "lightning", "date", "platform", "python"} <= set(profile.environment)
    assert [point.payload_bytes for point in profile.curve("all_reduce").points] == [4, 2**16, 2**20]
    must_say = [
        "2 ranks on 1 host",
        "gloo, TCP on",
        "1 MiB",
        "lower quartile",
        "22.0 MB on 2 ranks takes",
        "probe.json",
    ]
    assert [word for word in must_say if word not in done.stdout] == []
    assert done.stdout.count("Latency") == 1  # one rank speaks for all
    assert "distributed_backend" not in done.stdout + done.stderr


def test_under_torchrun_it_measures_between_the_processes_of_that(tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={free_port()}"]
    with forked():
        done = run([*torchrun, "-m", "lightning_comm.cli.main", *WORDS, "--out=under.json"], tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert LinkProfile.load(tmp_path / "under.json").world_size == 2


def _under_srun(rank: int, folder: str) -> tuple[int, str, str]:
    """Do as srun does for one of two tasks, in a process that has everything imported already."""
    for name in [name for name in os.environ if name.startswith(LAUNCHERS) and not name.startswith("MASTER_")]:
        del os.environ[name]
    os.environ |= {"SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2", "SLURM_NNODES": "1", "SLURM_NODEID": "0"}
    os.environ |= {"SLURM_JOB_ID": "1", "SLURM_JOB_NAME": "x", "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)}
    with redirect_stdout(StringIO()) as out, redirect_stderr(StringIO()) as error:
        code = main([*WORDS, f"--out={folder}/probe.json"])
    return code, out.getvalue(), error.getvalue()


def test_under_srun_it_measures_between_the_tasks(tmp_path):
    ends = launch(_under_srun, str(tmp_path), world_size=2)
    assert [code for code, _, _ in ends] == [0, 0], ends
    assert LinkProfile.load(tmp_path / "probe.json").world_size == 2
    assert ["Latency" in out for _, out, _ in ends] == [True, False]


def test_a_file_that_cannot_be_written_ends_all_ranks_before_anything_is_measured(tmp_path):
    ends = launch(_under_srun, f"{tmp_path}/no/such", world_size=2)
    assert [(code, out) for code, out, _ in ends] == [(2, "")] * 2
    must_say = ["--out", "no/such/probe.json'", "No such file", "folder that exists", "Nothing was measured"]
    assert [word for word in must_say if word not in ends[0][2]] == []
    assert "--out" not in ends[1][2]  # one rank speaks for all


def test_in_the_lab_the_host_with_the_narrow_link_is_named(lab, tmp_path):
    hosts = lab(3, ["200mbit", "20mbit", "200mbit"])
    with forked():
        done = hosts.run([*PROBE, f"--out={tmp_path}/lab.json"], timeout_s=100)
    assert done.returncode == 0, done.output
    profile = LinkProfile.load(tmp_path / "lab.json")
    assert (profile.world_size, set(profile.hosts)) == (3, {"host 0", "host 1", "host 2"})
    assert json.loads(profile.environment["emulated"])["hosts"] == 3
    assert "Warning: host 1's link is slower than the others': it sends at" in done.output[0]
    # 20 and 200 Mbit/s are 2.5 and 25 MB/s; below that there is no bound on a machine that does other work as well
    assert min(link.bytes_per_s for link in profile.links) < 1.2 * 2.5e6
    assert 5e6 < max(link.bytes_per_s for link in profile.links) < 1.2 * 25e6
    # a ring waits for the narrow link, and lets four thirds of 1 MiB pass it
    assert 0.2 * 2.5e6 < profile.bytes_per_s < 1.2 * 2.5e6
    assert 0.4 < profile.time_s("all_reduce", 2**20) < 5


def test_a_package_on_the_python_path_that_is_not_installed_is_no_error(monkeypatch):
    def version(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", version)
    assert cli._environment(["--sizes=4"])["lightning-comm"] == "not installed"


def test_one_process_alone_is_told_how_to_start_two(tmp_path, capsys, monkeypatch):
    for name in [name for name in os.environ if name.startswith(LAUNCHERS)]:
        monkeypatch.delenv(name)
    assert main(["probe", "--accelerator=cpu", f"--out={tmp_path}/probe.json"]) == 2
    message = capsys.readouterr().err
    assert [word for word in ["one process", "--devices 2", "torchrun", "srun", "lab"] if word not in message] == []
    assert not (tmp_path / "probe.json").exists()


@pytest.mark.parametrize(
    ("words", "must_say"),
    [
        (["--min-bytes=1MiB", "--max-bytes=4KiB"], ["min_bytes", "max_bytes", "1048576 and 4096", "Swap"]),
        (["--min-bytes=2"], ["min_bytes", "got 2", "at least", "4"]),
        (["--sizes=4,10"], ["sizes", "got 10", "12"]),
        (["--sizes=4,1Kib,x"], ["--sizes", "'x'", "KiB"]),
        (["--sizes=4", "--max-bytes=8"], ["--sizes", "--max-bytes", "beside"]),
        (["--repeats=0"], ["repeats", "got 0", ">= 1"]),
        (["--seconds=-1"], ["seconds", "got -1.0", "> 0"]),
    ],
)
def test_a_bad_option_ends_the_command_with_its_name_value_and_a_way_out(words, must_say, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["probe", *words])
    assert caught.value.code == 2
    message = capsys.readouterr().err
    assert [word for word in must_say if word not in message] == []


def test_numbers_that_contradict_the_launcher_are_refused_before_anyone_waits(monkeypatch, capsys):
    monkeypatch.setenv("LIGHTNING_COMM_LAB", '{"hosts": 4, "devices_per_host": 1, "links": []}')
    assert main(["probe", "--devices=2"]) == 2
    message = capsys.readouterr().err
    assert [word for word in ["--devices", "launcher has, 1", "got 2", "Leave it away"] if word not in message] == []


def test_devices_that_the_machine_has_not_are_refused_in_a_sentence(capsys):
    assert main(["probe", "--accelerator=nonsense"]) == 2
    message = capsys.readouterr().err
    assert [word for word in ["could not be started", "nonsense", "cpu"] if word not in message] == []


@pytest.mark.parametrize(
    ("environment", "shape"),
    [
        ({}, (None, None)),
        ({"LIGHTNING_COMM_LAB": '{"hosts": 4, "devices_per_host": 2, "links": []}'}, (2, 4)),
        ({"WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "2"}, (2, 4)),
        ({"WORLD_SIZE": "8"}, (None, None)),  # Lightning sets this for processes that it started itself
        ({"SLURM_NTASKS": "6", "SLURM_NTASKS_PER_NODE": "3", "SLURM_NNODES": "2", "SLURM_JOB_NAME": "x"}, (3, 2)),
        ({"SLURM_NTASKS": "6", "SLURM_JOB_NAME": "bash"}, (None, None)),  # a shell on a node, not a job step
    ],
)
def test_the_shape_of_the_job_is_read_from_its_launcher(environment, shape, monkeypatch):
    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        monkeypatch.delenv(name)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert shape_of_job(environment) == shape


def test_a_result_that_is_there_is_not_touched_by_the_check_whether_it_can_be_written(tmp_path):
    old = tmp_path / "probe.json"
    old.write_text("old")
    assert cli._problem_with(old) is None
    assert cli._problem_with(tmp_path / "new.json") is None
    assert [path.name for path in tmp_path.iterdir()] == ["probe.json"]
    assert old.read_text() == "old"
    assert "It is a folder" in cli._problem_with(tmp_path)


def test_a_rank_that_starts_late_is_waited_for_beyond_the_time_of_the_measurement(monkeypatch):
    monkeypatch.setattr(cli, "_PATIENCE_S", 0)
    options = parse(["--accelerator=cpu", "--devices=2", "--seconds=1"])

    def start(rank):
        if rank == 1:
            time.sleep(1.5)
        began = time.monotonic()
        fabric = cli._fabric(options)
        fabric.launch()
        return fabric.world_size, time.monotonic() - began

    (ranks, waited_s), _ = launch(start, world_size=2)
    assert ranks == 2
    assert waited_s > 1.0  # what the group of a second would have allowed
