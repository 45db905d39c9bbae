"""Pages in docs/results: a JSON file gives the page beside it, and the commands that pages name are understood."""

import difflib
import importlib
import json
import re
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "docs" / "results"
PAGES = {
    "adaptive_partition_2026-11-27": "benchmarks.adaptive_partition.__main__",
    "adaptive_partition_accuracy_2026-11-27": "benchmarks.adaptive_partition.accuracy",
    "compression_accuracy_2026-11-24": "benchmarks.compression.accuracy",
    "compression_steps_2026-11-24": "benchmarks.compression.steps",
    "cyclic_accuracy_2026-11-27": "benchmarks.cyclic.accuracy",
    "cyclic_memory_2026-11-27": "benchmarks.cyclic.memory",
    "cyclic_shared_memory_2026-11-27": "benchmarks.cyclic.shared_memory",
    "cyclic_steps_2026-11-27": "benchmarks.cyclic.steps",
    "local_update_overlap_1gbit_2026-11-24": "benchmarks.local_update.overlap",
    "local_update_overlap_2026-11-24": "benchmarks.local_update.overlap",
    "local_update_overlap_batch1_2026-11-24": "benchmarks.local_update.overlap",
    "tools_2026-11-24": "benchmarks.tools.report",
    "tools_quiet_2026-11-24": "benchmarks.tools.report",
}
# in how many lines of the committed page stands what its JSON file does not say: what was written by hand (the first
# number), and sentences by the rule of that time, which compared times by their spread and not by an interval
BY_HAND = {"cyclic_steps_2026-11-27": (4, 4), "tools_2026-11-24": (5, 6), "tools_quiet_2026-11-24": (3, 1)}
OLD_RULE = re.compile(r"- (ours is no slower than the best peer|a step of v2 takes|v2 is )")
TITLE = "# "
WITHOUT_PAGE = {  # the table that the page takes from the file has less columns, or it holds what was printed
    "power_sgd_2026-11-30",
    "sparse_mask_synchronisation_2026-11-24",
}
SOURCES = [ROOT / "Makefile", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
COMMAND = re.compile(r"python3? -m (benchmarks(?:\.\w+)+)([^`\n|\\]*)")


def named_commands():
    return [
        pytest.param(module, arguments.replace("$(DEVICE)", "cpu"), id=f"{path.name}: {module}{arguments}")
        for path in SOURCES
        for module, arguments in dict.fromkeys(COMMAND.findall(path.read_text()))
    ]


def program(module):
    """Return the module that a command runs: of a folder its `__main__`."""
    name = f"{module}.__main__" if (ROOT / module.replace(".", "/")).is_dir() else module
    return importlib.import_module(name)


def test_every_json_file_has_a_page_that_is_made_of_it_or_a_reason():
    assert {path.stem for path in RESULTS.glob("*.json")} == set(PAGES) | WITHOUT_PAGE


@pytest.mark.parametrize("stem", PAGES)
def test_a_page_is_what_its_json_file_gives_but_for_what_was_written_by_hand(stem):
    made = importlib.import_module(PAGES[stem]).PAGE.of(json.loads((RESULTS / f"{stem}.json").read_text()))
    lines = list(difflib.ndiff((RESULTS / f"{stem}.md").read_text().splitlines(), made.splitlines()))
    committed = [line[2:] for line in lines if line.startswith("- ")]
    new = [line[2:] for line in lines if line.startswith("+ ")]
    old_rule = [line for line in committed if OLD_RULE.match(line)]
    by_hand = [line for line in committed if line and line not in old_rule]
    assert (len(by_hand), len(old_rule)) == BY_HAND.get(stem, (0, 0))
    assert not [line for line in by_hand if line.startswith("|")]  # no row of a table
    assert all(line.startswith(TITLE) or OLD_RULE.match(line) for line in new)


def test_the_figures_of_power_sgd_are_those_of_its_json_file():
    report = json.loads((RESULTS / "power_sgd_2026-11-30.json").read_text())
    made = program("benchmarks.compression.steps").PAGE.of(report)
    rows = [line.strip("| ").split(" | ") for line in made.splitlines() if line.startswith("| ")][2:]
    page = (RESULTS / "power_sgd_2026-11-30.md").read_text()
    assert len(rows) == 4
    for label, step, quartiles, times, *_, sent in rows:
        assert f"| {label} | {step} | {quartiles} | {times} | {sent} |" in page


@pytest.mark.parametrize(("module", "arguments"), named_commands())
def test_a_command_that_a_page_names_is_understood(module, arguments, tmp_path, monkeypatch):
    words = shlex.split(re.sub(r"\[(.*?)\]", r"\1", arguments).split(",")[0].split(")")[0])
    if module == "benchmarks.gpu_check":
        monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
        words = [*words, "--out", str(tmp_path)]
    found = vars(program(module).options(words))
    for option in (word for word in words if word.startswith("--")):
        assert option.removeprefix("--").replace("-", "_") in found


def test_there_are_commands_for_every_program():
    named = {parameter.values[0] for parameter in named_commands()}
    programs = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__main__")
        for path in (ROOT / "benchmarks").rglob("*.py")
        if re.search(r"^def options\(", path.read_text(), re.MULTILINE)
    }
    assert named == programs
