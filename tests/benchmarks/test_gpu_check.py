"""The check for the day a GPU is at hand: its frame, its judgement, and some of its parts, run on the CPU."""

import gc
import json
import multiprocessing
import os
import signal
import sys
import time
import weakref
from pathlib import Path

import pytest
import torch

from benchmarks.gpu_check import __main__ as gpu_check
from benchmarks.gpu_check import memory as gpu_check_memory
from benchmarks.gpu_check import profiler as gpu_check_profiler
from benchmarks.gpu_check import sanity as gpu_check_sanity
from benchmarks.gpu_check.memory import ARMS, Case
from benchmarks.gpu_check.packing import moved_bytes
from benchmarks.gpu_check.profiler import cost_of, verdict_of
from benchmarks.gpu_check.report import STREAMS, Check, exit_code, findings, latest, page, summary, table
from benchmarks.gpu_check.tests import Writer

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
    child = os.fork()
    if child:
        (check.out / "new").write_text(f"{os.getpid()} {child}")
        (check.out / "new").rename(check.out / "processes")
    time.sleep(600)


def falls_short_at_first(check):
    check.note("of the first run alone" if check.run == 1 else "a figure", check.run, 2, "==")
    if check.run == 1:
        raise ValueError("boom")


def loses_streams(check):
    check.note(STREAMS, [2.0], [1.0], "==")


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


def told(found):
    return [(each["part"], each["name"], each["verdict"]) for each in found]


def test_a_part_that_breaks_ends_neither_the_others_nor_what_it_has_found(carried_out, tmp_path):
    code, found = carried_out("--parts", "0-2,3", parts=of(goes_wrong, dies, falls_short, goes_well))
    assert code == 1
    assert told(found) == [
        (0, "before", "ok"),
        (0, "the whole part", "fails"),
        (1, "the whole part", "fails"),
        (2, "a bound", "fails"),
        (2, "the whole part", "ok"),
        (3, "a figure", "ok"),
        (3, "the whole part", "ok"),
    ]
    assert found[1]["measured"] == "ValueError: boom"
    assert found[2]["measured"] == "exit code -9"
    assert "boom" in (tmp_path / "part0.log").read_text()
    assert (tmp_path / "part3.log").read_text() == "to the log\n"


def test_a_part_that_is_too_slow_is_ended_with_all_its_processes(carried_out, tmp_path):
    slow = of(hangs)[0]._replace(limit_s=0.25)  # six times that on a CPU
    code, found = carried_out("--parts", "0,1", parts=(slow, *of(goes_well)))
    assert code == 1
    assert told(found)[:3] == [(0, "before", "ok"), (0, "the whole part", "fails"), (1, "a figure", "ok")]
    assert found[1]["measured"].startswith("ended after")
    assert all(is_gone(int(pid)) for pid in (tmp_path / "processes").read_text().split())


def by_itself(out):
    """The check in a process of its own."""
    gpu_check.PARTS = of(goes_well, hangs, goes_well, limit_s=60.0)
    sys.exit(gpu_check.main(["--out", str(out), "--device", "cpu"]))


@pytest.fixture
def hanging(tmp_path):
    """A check in a process of its own, whose part hangs, and the processes of that part."""
    process = multiprocessing.get_context("fork").Process(target=by_itself, args=(tmp_path,))
    process.start()
    for _ in range(1200):
        if (tmp_path / "processes").exists():
            break
        time.sleep(0.05)
    processes = [int(pid) for pid in (tmp_path / "processes").read_text().split()]
    yield process, processes
    process.kill()
    process.join(10)
    for pid in processes:  # which are gone, unless the test fails
        if not is_gone(pid):
            os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_check_that_is_told_to_end_leaves_no_process_and_a_page_of_what_it_has(hanging, tmp_path, number):
    check, processes = hanging
    os.kill(check.pid, number)
    check.join(30)
    assert check.exitcode == 128 + number
    assert len(processes) == 2
    assert all(is_gone(pid) for pid in processes)
    assert told(findings(tmp_path)) == [
        (0, "a figure", "ok"),
        (0, "the whole part", "ok"),
        (1, "before", "ok"),
        (1, "the whole part", "fails"),
        (2, "the whole part", "left out"),
    ]
    assert f"ended by {number.name} after" in (tmp_path / "page.md").read_text()


def test_a_check_that_is_killed_leaves_no_process_and_the_page_of_the_part_before(hanging, tmp_path):
    check, processes = hanging
    os.kill(check.pid, signal.SIGKILL)
    assert all(is_gone(pid) for pid in processes)
    assert "| a figure | 0.5 | <= 1 | ok |" in (tmp_path / "page.md").read_text()


def test_what_does_not_fit_is_left_out_by_name_and_a_rerun_takes_its_place(carried_out, capsys):
    parts = of(goes_well, expected_s=30.0)
    code, found = carried_out("--minutes", "0.1", parts=parts)
    assert code == 3
    assert told(found) == [(0, "the whole part", "left out")]
    assert "part 0, goes_well: LEFT OUT" in capsys.readouterr().out
    code, found = carried_out("--minutes", "1", "--parts", "0", parts=parts)
    assert code == 0
    assert told(latest(found)) == [(0, "a figure", "ok"), (0, "the whole part", "ok")]


def test_a_good_rerun_takes_the_place_of_all_that_a_failed_run_found(carried_out, tmp_path):
    parts = of(falls_short_at_first)
    assert carried_out(parts=parts)[0] == 1
    code, found = carried_out(parts=parts)
    assert code == 0
    assert "boom" in str(found)
    assert told(latest(found)) == [(0, "a figure", "ok"), (0, "the whole part", "ok")]
    assert "boom" not in (tmp_path / "page.md").read_text()


def test_where_gloo_loses_streams_what_rests_on_it_proves_nothing(carried_out):
    code, found = carried_out(parts=of(loses_streams, goes_well, goes_well, goes_well, goes_well))
    assert code == 1
    verdicts = {each["part"]: each["verdict"] for each in latest(found) if each["name"] == "a figure"}
    assert verdicts == {1: "ok", 2: "proves nothing", 3: "ok", 4: "proves nothing"}
    assert exit_code([each for each in found if each["part"] != 0]) == 0


def test_results_of_another_device_are_not_added_to(carried_out, tmp_path, capsys):
    carried_out(parts=of(goes_well))
    before = (tmp_path / "results.jsonl").read_text()
    with pytest.raises(SystemExit):
        gpu_check.main(["--out", str(tmp_path), "--device", "mock"])
    said = " ".join(capsys.readouterr().err.split())
    assert "holds results of another device (cpu), and this run is for 'mock'; give a folder for each device" in said
    assert (tmp_path / "results.jsonl").read_text() == before


@pytest.mark.parametrize(
    ("before", "now", "another"),
    [("H200", "H200", False), ("H200", "H100", True), ("H200", "not known (busy)", False), (None, "H200", False)],
)
def test_another_card_is_another_device(tmp_path, before, now, another):
    Check(0, "cuda", tmp_path).note("a", 1, 1, "==")
    (tmp_path / "versions.json").write_text(json.dumps({gpu_check.CARD: before} if before else {}))
    assert gpu_check._another_card(tmp_path, {gpu_check.CARD: now}) == another


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--parts", "0,9"], "argument --parts: there are 0 to 8; got '0,9'; give numbers of 0 to 8 and ranges"),
        (["--parts", "3-1"], "argument --parts: there are 0 to 8; got '3-1'"),
        (["--parts", "a"], "argument --parts: got 'a'; give numbers of 0 to 8 and ranges by commas, as in 0-3,5"),
        (["--parts", ""], "argument --parts: got ''; give numbers"),
        (["--parts", "0-"], "argument --parts: got '0-'; give numbers"),
        (["--minutes", "0"], "argument --minutes: got '0'; give a number above 0"),
        (["--minutes", "nan"], "argument --minutes: got 'nan'; give a number above 0"),
        (["--out", __file__], "cannot be a folder for results (File exists); give another one"),
    ],
)
def test_arguments_that_cannot_be_meant_are_refused_with_a_way_out(carried_out, capsys, arguments, said):
    with pytest.raises(SystemExit) as ended:
        carried_out(*arguments)
    assert ended.value.code == 2
    assert said in " ".join(capsys.readouterr().err.split())


def test_ranges_of_parts_are_each_run_once_in_order():
    assert gpu_check.numbers_of("7, 0-2,1,4-4") == [7, 0, 1, 2, 4]


def test_all_parts_fit_into_eight_minutes_with_a_reserve():
    parts = gpu_check.PARTS
    assert sorted(gpu_check.ORDER) == list(range(len(parts)))
    assert gpu_check.START_S + sum(part.expected_s for part in parts) + gpu_check.RESERVE_S <= 480
    assert all(part.limit_s >= 1.5 * part.expected_s for part in parts)


def test_a_gpu_that_is_not_there_is_missed_at_once_with_a_way_out(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(SystemExit):
        gpu_check.main(["--out", str(tmp_path)])
    said = " ".join(capsys.readouterr().err.split())
    assert "--device: 'cuda' needs a GPU" in said
    assert "give 'cpu'" in said
    assert not list(tmp_path.iterdir())


def test_what_the_profiler_costs_fails_above_its_bound_whatever_the_noise_and_is_not_measured_in_much_of_it():
    cost, noise = cost_of({"off": [0.1, 0.1, 0.1], "on": [0.11, 0.11, 0.11], "off again": [0.11, 0.11, 0.11]})
    assert cost == pytest.approx(0.0476, abs=1e-4)
    assert noise == pytest.approx(0.1)
    assert verdict_of(cost, noise) == "not measured"
    assert verdict_of(0.0101, 0.004) == "fails"
    assert verdict_of(0.0099, 0.004) == "ok"


def stages_alive(workers, order):
    """The most stages that a staggered schedule of equal stages keeps, in an order within a slot."""
    most = 0
    for parity in (0, 1):
        slots = range(parity, 2 * workers, 2)  # of a worker's own 2N slots: forwards, then backwards
        live = sum(min(slot, 2 * workers - slot) for slot in slots)
        forwards = sum(slot < workers for slot in slots)
        most = max(most, live, live + forwards if order == "forward_first" else live)
    return most


@pytest.mark.parametrize("workers", [2, 4, 8])
@pytest.mark.parametrize("arm", ["backward_first", "forward_first"])
def test_predicted_peaks_are_those_of_the_schedule(workers, arm):
    assert ARMS[arm].share(workers) == stages_alive(workers, arm) / workers**2


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
        (0.62, 0.5, "within 25 %; a reason", "ok"),
        (0.63, 0.5, "within 25 %", "fails"),
        (0.37, 0.5, "within 25 %", "fails"),
        (0.7, 0.8, ">=; 0.7 of something", "fails"),
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


@pytest.mark.parametrize(
    ("tiny", "rate", "verdict"), [(False, 3.1e12, "ok"), (False, 3e12, "fails"), (True, 1.0, "info")]
)
def test_a_copy_on_a_gpu_is_held_against_seven_tenths_of_what_was_expected(tmp_path, tiny, rate, verdict):
    gpu_check_sanity._judge_rate(Check(0, "cuda", tmp_path, tiny), "device to device", rate, 1024)
    assert told(findings(tmp_path)) == [(0, "copy, device to device", verdict)]


@pytest.mark.parametrize(("off", "on", "step", "cost"), [(0.1, 0.1005, "ok", "ok"), (0.2, 0.21, "fails", "fails")])
def test_a_step_of_another_length_than_was_meant_fails_as_a_cost_above_the_bound_does(tmp_path, off, on, step, cost):
    found = {"off": [off] * 3, "off again": [off] * 3, "on": [on] * 3}
    gpu_check_profiler._judge_profiler(Check(8, "cuda", tmp_path), found)
    assert [each["verdict"] for each in findings(tmp_path)] == [step, "info", cost]


@pytest.fixture
def few_objects():
    """Let collections of garbage look at none of what has been loaded, half a million objects each time."""
    gc.freeze()
    yield
    gc.unfreeze()


def equal_stages(workers, batch, deep):
    """Stages of which each keeps as much as the others, each of so many layers."""
    stages = [torch.nn.Sequential(*(torch.nn.Linear(64, 64) for _ in range(deep))) for _ in range(workers)]
    batches = [(torch.randn(batch, 64), torch.zeros(batch, dtype=torch.long)) for _ in range(workers)]
    model = torch.nn.Sequential(*stages)
    return Case("equal", True, {"coarse": model, "fine": model}, [batches])


@pytest.mark.usefixtures("few_objects")
def test_peaks_of_equal_stages_are_within_a_quarter_of_the_prediction(tmp_path):
    gpu_check_memory._measure(Check(7, "cpu", tmp_path), equal_stages(4, 256, 8))
    found = {each["name"]: each for each in findings(tmp_path)}
    assert [name for name, each in found.items() if each["verdict"] == "ok"] == [
        *(f"equal, {arm}, of one batch" for arm in list(ARMS)[1:]),
        "equal: accumulation needs least, one batch most",
    ]
    assert found["equal, forward_first, of one batch"]["measured"] > 0.55


@pytest.mark.usefixtures("few_objects")
def test_a_peak_far_from_the_prediction_fails(tmp_path, monkeypatch):
    monkeypatch.setitem(gpu_check_memory.METHODS, "backward_first", gpu_check_memory.METHODS["one batch"])
    gpu_check_memory._measure(Check(7, "cpu", tmp_path), equal_stages(4, 256, 8))
    assert [each["name"] for each in findings(tmp_path) if each["verdict"] == "fails"] == [
        "equal, backward_first, of one batch"
    ]


@pytest.mark.usefixtures("few_objects")
def test_memory_is_given_back_when_the_arm_that_ran_out_of_it_holds_nothing_any_more(tmp_path, monkeypatch):
    case, held, seen = equal_stages(2, 4, 1), [], []

    def runs_out(model, *_):
        own = torch.ones(10)
        held.append(weakref.ref(own))
        model(torch.ones(1, 64)).sum().backward()
        raise torch.OutOfMemoryError("as a device says it")

    def seen_by_the_allocator():
        seen.append((held[0](), [each.grad for each in case.models["coarse"].parameters() if each.grad is not None]))

    monkeypatch.setattr(gpu_check_memory, "ARMS", {"one batch": ARMS["one batch"]})
    monkeypatch.setitem(gpu_check_memory.METHODS, "one batch", runs_out)
    monkeypatch.setattr(torch.cuda, "empty_cache", seen_by_the_allocator)
    gpu_check_memory._measure(Check(7, "cuda", tmp_path), case)
    assert seen == [(None, [])]
    assert told(findings(tmp_path)) == [(7, "equal, one batch", "info")]


def test_packing_moves_each_entry_four_times():
    # 86.6 million entries of a ViT-B/16 in float32: read and written by packing, and again by unpacking
    assert moved_bytes(86_567_656, torch.float32) == 1_385_082_496


def leave_out_two_of_three(self, items):
    """Of each test the first of three cases: each setting, order and number of workers is among them."""
    functions = [item.originalname for item in items]
    items[:] = [item for k, item in enumerate(items) if functions[:k].count(functions[k]) % 3 == 0]


@pytest.mark.timeout(500)  # on a machine that may be busy
@pytest.mark.parametrize("whole", [False, pytest.param(True, marks=pytest.mark.exhaustive)])
def test_parts_carried_out_on_the_cpu_find_nothing_wrong(carried_out, monkeypatch, whole):
    if not whole:
        monkeypatch.setattr(Writer, "pytest_collection_modifyitems", leave_out_two_of_three, raising=False)
    code, found = carried_out("--parts", ",".join(BRIEF), "--minutes", "8")
    assert [each for each in found if each["verdict"] == "fails"] == []
    assert code == 0
    assert {str(each["part"]) for each in found} == set(BRIEF)
    assert {each["verdict"] for each in found} == {"ok", "info", "needs CUDA"}
    assert len(found) > (80 if whole else 35)
