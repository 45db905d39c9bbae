"""The check for the day a GPU is at hand: its frame, its judgement, and some of its parts, run on the CPU."""

import json
import os
import time
from pathlib import Path

import gpu_check
import pytest
import torch
from gpu_check_packing import moved_bytes
from gpu_check_report import Check, findings, latest, page, summary, table

BRIEF = ("0", "1", "4")  # parts that take seconds on a CPU; all are run by `make benchmark-gpu DEVICE=cpu`


@pytest.fixture
def carried_out(tmp_path, monkeypatch):
    """Run the check, with parts of this test's own if any; return the exit code and the findings."""

    def run(*arguments, parts=None):
        if parts is not None:
            monkeypatch.setattr(gpu_check, "PARTS", parts)
        monkeypatch.setenv("LIGHTNING_COMM_MOCK_CUDA", "0")
        code = gpu_check.main(["--out", str(tmp_path), "--device", "cpu", *arguments])
        return code, findings(tmp_path)

    return run


def goes_well(check):
    print("to the log")
    check.note("a figure", 0.5, 1.0, "<=")


def goes_wrong(check):
    check.note("before", 1, 1, "==")
    raise ValueError("boom")


def falls_short(check):
    check.note("a bound", 2.0, 1.0, "<=")


def dies(check):
    os.kill(os.getpid(), 9)


def hangs(check):
    check.note("before", 1, 1, "==")
    if os.fork() == 0:
        Path(check.out / "child").write_text(str(os.getpid()))
        time.sleep(600)
    time.sleep(600)


def is_gone(pid):
    """Whether a process ends within some seconds: it is there no more, or only waits for its parent to take note."""
    for _ in range(100):
        try:
            os.kill(pid, 0)
            if " Z " in Path(f"/proc/{pid}/stat").read_text():
                return True
        except (ProcessLookupError, FileNotFoundError):
            return True
        time.sleep(0.05)
    return False


def of(*functions, expected_s=0.0, limit_s=10.0):
    return tuple(
        gpu_check.Part(each.__name__, f"{__name__}:{each.__name__}", expected_s, limit_s) for each in functions
    )


def test_a_part_that_breaks_ends_neither_the_others_nor_what_it_has_found(carried_out, tmp_path):
    code, found = carried_out("--parts", "0,1,2,3", parts=of(goes_wrong, dies, falls_short, goes_well))
    assert code == 1
    assert [(each["part"], each["name"], each["verdict"]) for each in found] == [
        (0, "before", "ok"),
        (0, "the whole part", "fails"),
        (1, "the whole part", "fails"),
        (2, "a bound", "fails"),
        (3, "a figure", "ok"),
    ]
    assert found[1]["measured"] == "ValueError: boom"
    assert found[2]["measured"] == "exit code -9"
    assert "boom" in (tmp_path / "part0.log").read_text()
    assert (tmp_path / "part3.log").read_text() == "to the log\n"


def test_a_part_that_is_too_slow_is_ended_with_all_its_processes(carried_out, tmp_path):
    slow = of(hangs)[0]._replace(limit_s=0.25)  # six times that on a CPU
    code, found = carried_out("--parts", "0,1", parts=(slow, *of(goes_well)))
    assert code == 1
    assert [(each["part"], each["name"], each["verdict"]) for each in found] == [
        (0, "before", "ok"),
        (0, "the whole part", "fails"),
        (1, "a figure", "ok"),
    ]
    assert found[1]["measured"].startswith("ended after")
    child = int((tmp_path / "child").read_text())
    assert is_gone(child)


def test_what_does_not_fit_is_left_out_by_name_and_a_rerun_takes_its_place(carried_out, capsys):
    parts = of(goes_well, expected_s=30.0)
    code, found = carried_out("--minutes", "0.1", parts=parts)
    assert code == 0
    assert [each["verdict"] for each in found] == ["left out"]
    assert "part 0, goes_well: LEFT OUT" in capsys.readouterr().out
    code, found = carried_out("--minutes", "1", "--parts", "0", parts=parts)
    assert code == 0
    assert [each["verdict"] for each in found] == ["left out", "ok"]


def test_a_part_that_is_not_there_is_refused_by_number(carried_out, capsys):
    with pytest.raises(SystemExit):
        carried_out("--parts", "0,9")
    assert "there are 0 to 8; got [9]" in capsys.readouterr().err


def test_a_gpu_that_is_not_there_is_missed_at_once_with_a_way_out(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(SystemExit):
        gpu_check.main(["--out", str(tmp_path)])
    said = " ".join(capsys.readouterr().err.split())
    assert "--device: 'cuda' needs a GPU" in said
    assert "give 'cpu'" in said
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("measured", "expected", "rule", "verdict"),
    [
        (1.0, 1.0, "<=", "ok"),
        (1.1, 1.0, "<=", "fails"),
        (float("nan"), 1.0, "<=", "fails"),
        (2, 1, ">=", "ok"),
        (0, 1, ">=", "fails"),
        ([1, 2], [1, 2], "==", "ok"),
        ("wrong", "right", "==", "fails"),
        (5, 4, "times as fast", "info"),
    ],
)
def test_the_rule_decides(tmp_path, measured, expected, rule, verdict):
    check = Check(3, "cpu", tmp_path)
    assert check.note("a", measured, expected, rule) == (verdict != "fails")
    assert [each["verdict"] for each in findings(tmp_path)] == [verdict]
    json.dumps(findings(tmp_path), allow_nan=False)


def test_findings_are_written_one_by_one_and_a_line_cut_off_is_passed_over(tmp_path):
    check = Check(0, "cpu", tmp_path)
    check.note("a", 1, 1, "==")
    with (tmp_path / "results.jsonl").open("a") as file:
        file.write('{"part": 0, "name"')
    assert [each["name"] for each in findings(tmp_path)] == ["a"]


def test_the_last_run_of_a_finding_counts_in_table_and_page(tmp_path):
    for measured in (3.0, 0.5):
        Check(1, "cpu", tmp_path).note("a | b", measured, 1.0, "<=")
    Check(0, "cpu", tmp_path).needs_cuda("streams", 7)
    found = findings(tmp_path)
    assert [each["verdict"] for each in latest(found)] == ["needs CUDA", "ok"]
    assert table(found).endswith("1 ok, 1 needs CUDA")
    told = page(found, {"torch": "2.15"}, "cpu", ["sanity", "units"])
    assert "| a \\| b | 0.5 | <= 1 | ok |" in told
    assert "on the CPU, with tiny sizes" in told
    assert "nothing of NCCL between ranks" in told
    assert summary(found[:1], 1.0) == "1 fails, in 1.0 s\n  fails: a | b: 3, expected <= 1"


def test_packing_moves_each_entry_four_times():
    # 86.6 million entries of a ViT-B/16 in float32: read and written by packing, and again by unpacking
    assert moved_bytes(86_567_656, torch.float32) == 1_385_082_496


@pytest.mark.timeout(500)  # on a machine that may be busy
def test_parts_carried_out_on_the_cpu_find_nothing_wrong(carried_out):
    code, found = carried_out("--parts", ",".join(BRIEF), "--minutes", "8")
    assert [each for each in found if each["verdict"] == "fails"] == []
    assert code == 0
    assert {str(each["part"]) for each in found} == set(BRIEF)
    assert {each["verdict"] for each in found} == {"ok", "info", "needs CUDA"}
    assert len(found) > 80
