"""What benchmarks share: statistics, tables, pages, files of results, options, and steps in turn."""

import argparse
import doctest
import importlib
import json
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest

from benchmarks.kit import hosts, options, results, steps
from benchmarks.kit.accuracy import arm_of, every_seed
from benchmarks.kit.pages import Page
from benchmarks.kit.results import Results, append, records

KIT = Path(hosts.__file__).parent
PAGE = Page("speed", "Speeds", lambda report: "Words.", lambda report: [f"{len(report['runs'])} runs"])


@pytest.mark.parametrize("name", ["options", "pages", "statistics", "steps", "tables", "hosts"])
def test_examples_hold(name):
    found = doctest.testmod(importlib.import_module(f"benchmarks.kit.{name}"))
    assert found.attempted
    assert not found.failed


@pytest.mark.parametrize(
    ("values", "expected"),
    [([5.0], (5.0, 5.0)), ([1, 2, 3, 4, 5], (2, 4)), ([5, 1, 4, 2, 3], (2, 4)), ([1, 2], (1.25, 1.75))],
)
def test_quartiles_lie_between_the_lowest_and_the_highest_value(values, expected):
    assert importlib.import_module("benchmarks.kit.statistics").quartiles(values) == expected


def test_no_benchmark_has_a_page_a_row_or_a_rule_of_its_own():
    sources = {path: path.read_text() for path in KIT.parent.rglob("*.py")}
    for words, most in (("def page(", 2), ("class Row", 1), ("def rows_of(", 2), ("LIMIT_SPREAD", 0)):
        having = [path for path, text in sources.items() if words in text]
        assert len(having) <= most, (words, having)  # pages of the GPU's findings and lines of its waits are no reports


def test_each_arm_comes_first_as_often_as_any_and_is_timed_once_a_repeat():
    order = list(steps.interleaved("abc", 6))
    firsts = [order[3 * repeat][1] for repeat in range(6)]
    assert sorted(firsts) == list("aabbcc")
    assert all(sorted(name for _, name in order[3 * k : 3 * k + 3]) == list("abc") for k in range(6))


def test_times_are_those_of_the_arm_alone_and_without_the_warm_up():
    now = [0.0]

    def passes(seconds):
        now[0] += seconds

    arms = {"fast": lambda: passes(1), "slow": lambda: passes(5)}
    found = steps.seconds_of(arms, 3, warm_up=2, clock=lambda: now[0], before=lambda: passes(100))
    assert found == {"fast": [1.0] * 3, "slow": [5.0] * 3}
    assert now == [5 * (2 * 100 + 6)]


def test_results_are_a_page_and_a_report_from_which_the_page_comes_again(tmp_path, capsys):
    written = Results(PAGE, str(tmp_path / "new" / "x.md"), runs=[])
    assert written.earlier() == {}
    written.report["runs"].append(1)
    written.write()
    assert written.path.read_text().endswith("1 runs\n")
    assert written.earlier() == json.loads(json.dumps(written.report))
    parser = options.Parser("")
    parser.results(PAGE)
    with pytest.raises(SystemExit) as ended:
        parser.parse_args(["--page-of", str(written.json)])
    assert ended.value.code == 0
    assert capsys.readouterr().out == written.path.read_text()


def test_a_file_that_is_not_named_has_the_stem_and_the_day():
    written = Results(PAGE, None)
    assert written.path == results.ROOT / "docs" / "results" / f"speed_{written.report['date']}.md"


def test_a_record_that_was_cut_off_is_passed_over_and_spoils_none_after_it(tmp_path):
    path = tmp_path / "x.jsonl"
    assert records(path) == []
    append(path, {"a": 1})
    path.write_text(path.read_text() + '{"a": 2, "b')
    append(path, {"a": 3})
    assert records(path) == [{"a": 1}, {"a": 3}]


@pytest.mark.parametrize("text", ["", "x", "1-", "-1", "2-1", "0-9"])
def test_numbers_that_cannot_be_meant_are_refused_with_what_may_be_given(text):
    with pytest.raises(argparse.ArgumentTypeError, match=r"got '.*'; give numbers of 0 to 8 and ranges by commas"):
        options.numbers(text, 8)


def test_a_name_that_is_not_known_is_refused_with_those_that_are(capsys):
    with pytest.raises(SystemExit):
        options.refuse_unknown(options.Parser(""), "--methods", ["c"], ["a", "b"])
    assert "--methods: unknown c; there are a, b" in capsys.readouterr().err


def test_the_command_names_the_module_and_its_arguments(monkeypatch):
    # under pytest's workers the main module has no spec
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", ModuleSpec("benchmarks.tools.__main__", None))
    monkeypatch.setattr(sys, "argv", ["x", "--links", "a b"])
    assert options.command() == "python -m benchmarks.tools --links 'a b'"


def test_host_0_is_heard_and_others_are_not(capsys):
    found = []
    listener = hosts.Listener(found.append)
    for host, line in (
        (0, "AT ours\n"),
        (1, "AT theirs\n"),
        (0, 'RESULT {"a": 1}'),
        (0, "PROGRESS half"),
        (0, "noise"),
    ):
        listener(host, line, False)
    assert (listener.at, found) == ("ours", [{"a": 1}])
    assert "half" in capsys.readouterr().out


def test_the_part_of_a_host_answers_in_a_line(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", hosts.as_host("x", {"n": 2})[2:])
    hosts.entry(lambda: pytest.fail("this is a host"), lambda told: told["n"] + 1)
    assert json.loads(capsys.readouterr().out) == 3


def test_an_arm_counts_at_the_seeds_that_both_were_run_at():
    own = {seed: {"accuracy": each} for seed, each in enumerate([0.9, 0.8, 0.7])}
    arm = arm_of(["ours"], own, {0: {"accuracy": 0.8}, 2: {"accuracy": 0.8}})
    assert arm.differences == pytest.approx((0.1, -0.1))
    assert arm_of(["ours"], own, {}) is None
    assert every_seed([arm], "arm")[1].splitlines()[-1] == "| ours | 90.00 % | 70.00 % |"
