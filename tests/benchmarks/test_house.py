"""The house's tools: mutants that are made again elsewhere and killed by tests, digests compared, figures counted."""

import ast
import copy
import json
import subprocess
import sys
from pathlib import Path

import figures
import mutants
import mutations
import pytest
import seeded_runs
from mutation_order import Imports

SUMS = '''"""Sums that say `1 < 2` in their docstring."""

import warnings

LEAST = 1


def larger(a: int, b: int) -> int:
    """Return the larger one.

    >>> larger(1, 2)
    2

    """
    if a > b:
        return a
    return b


def unseen(a: int) -> int:
    """Return one more; nobody tests it."""
    if a < LEAST and a != 3:
        warnings.warn(f"{a + 1} is small", stacklevel=2)
        raise ValueError("a < 1")
    return a + 1


def count(k: int) -> int:
    while k < 3:
        k = k + 1
    return k


class Box:
    def __init__(self, size: int) -> None:
        self.size = size
        self.note(size, 4)

    def note(self, size: int, most: int) -> None:
        self.full = size >= most
'''
TESTS = """from toy.sums import count, larger


def test_larger():
    assert larger(1, 2) == larger(2, 1) == 2


def test_count():
    assert count(0) == 3
"""


@pytest.fixture
def toy(tmp_path):
    root = tmp_path / "tree"
    for path, text in (
        ("toy/__init__.py", '"""A toy."""\n'),
        ("toy/sums.py", SUMS),
        ("toy/other.py", "from toy.sums import count\n\n\ndef twice(k):\n    return 2 * count(k)\n"),
        ("tests/test_sums.py", TESTS),
        ("tests/test_twice.py", "from toy.other import twice\n\n\ndef test_twice():\n    assert twice(0) == 6\n"),
        ("pyproject.toml", '[tool.pytest.ini_options]\naddopts = "--import-mode=importlib"\n'),
        ("README.md", "four words are here\n"),
    ):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text)
    return root


def all_changes(root):
    found = mutants.places_of(root, "toy")
    return {(place.text, text) for each in found.values() for place in each for _, text in mutants.changes(place)}


def test_changes_are_of_code_and_never_of_docstrings_messages_or_annotations(toy):
    found = all_changes(toy)
    assert {
        ("if a > b:", "if a >= b:"),
        ("if a < LEAST and a != 3:", "if a < LEAST or a != 3:"),
        ("if a < LEAST and a != 3:", "if a < LEAST and a != 4:"),
        ("return a + 1", "return a - 1"),
        ("return b", "return None"),
        ("self.size = size", "pass"),
        ("self.note(size, 4)", "self.note(4, size)"),
        ("LEAST = 1", "LEAST = 2"),
    } < found
    assert not [text for text, _ in found if "warn" in text or "raise" in text or "docstring" in text]


def test_a_draw_is_that_of_its_seed_and_each_mutant_changes_one_statement(toy):
    drawn = mutants.draw(toy, "toy", 20, seed=4)
    assert drawn == mutants.draw(toy, "toy", 20, seed=4)
    assert drawn != mutants.draw(toy, "toy", 20, seed=5)
    assert len({each.key for each in drawn}) == 20
    for each in drawn:
        source = (toy / each.module).read_text()
        changed = mutants.mutated_source(source, each)
        ast.parse(changed)
        before, after = source.splitlines(), changed.splitlines()
        assert len(before) == len(after)
        assert [k for k, pair in enumerate(zip(before, after, strict=True)) if len(set(pair)) > 1] == [each.line - 1]
    with pytest.raises(ValueError, match=r"mutants: `count` must not be more than the package has; got 9999.*fewer"):
        mutants.draw(toy, "toy", 9999, seed=4)


def test_a_mutant_is_found_again_where_files_were_moved_names_changed_and_lines_broken(toy):
    drawn = mutants.draw(toy, "toy", 20, seed=4)
    moved = (toy / "toy/sums.py").read_text().replace("if a > b:", "if (\n        a > b\n    ):")
    moved = moved.replace("class Box", "class Case").replace("count", "counted").replace("return a + 1", "return 1 + a")
    (toy / "toy/inner").mkdir()
    (toy / "toy/inner/added.py").write_text(moved)
    (toy / "toy/sums.py").unlink()
    names = {"Box": "Case", "count": "counted", "sums": "added"}
    made, missing = mutants.again(toy, "toy", drawn, names, seed=None)
    assert {each.statement for each in missing} <= {"return a + 1", "return 2 * counted(k)", "return 2 * count(k)"}
    assert len(made) + len(missing) == 20
    for each in made:
        assert each.module == "toy/inner/added.py" or each.function == "twice"
        ast.parse(mutants.mutated_source((toy / each.module).read_text(), each))
    fresh, missing = mutants.again(toy, "toy", drawn, names, seed=1)
    assert len(fresh) == 20
    assert [each.note for each in fresh].count("fresh") == len(missing)


def test_tests_that_are_named_alike_or_import_a_module_come_before_those_that_reach_it(toy):
    assert Imports(toy, "toy").order("toy/sums.py") == ["test_sums.py", "test_twice.py"]
    assert Imports(toy, "toy").order("toy/other.py") == ["test_twice.py"]


def test_a_run_kills_what_tests_see_ends_what_hangs_and_goes_on_where_it_was_ended(toy, tmp_path):
    wanted = {
        "return b": "return None",  # seen by the doctest
        "k = k + 1": "k = k - 1",  # has no end
        "return k": "return None",
        "return a + 1": "return a - 1",  # nobody looks
    }
    chosen = []
    for place in mutants.places_of(toy, "toy")["toy/sums.py"]:
        if place.text in wanted:
            text = wanted[place.text]
            chosen.append(
                mutants.Mutant(place.module, place.function, "", place.text, text, place.occurrence, place.node.lineno)
            )
    drawn, results = tmp_path / "drawn.jsonl", tmp_path / "results.jsonl"
    mutations.write_mutants(drawn, chosen)
    program = Path(mutations.__file__)
    words = [sys.executable, str(program), "run", str(drawn), "--root", str(toy), "--package", "toy", "--preload", ""]
    words += ["--results", str(results), "--work", str(tmp_path / "work"), "--cpu-s", "2.4"]
    for _ in range(2):  # the second time there is nothing to do
        subprocess.run(words, check=True, capture_output=True, timeout=100)
    found = {each["statement"]: each["by"] for each in mutations.read(results)}
    assert found == {
        "return b": "doctest toy/sums.py",
        "k = k + 1": "hang test_sums.py::test_count",
        "return k": "test_sums.py::test_count",
        "return a + 1": None,
    }
    assert len(results.read_text().splitlines()) == 4
    said = mutations.summary(mutations.read(results))
    assert "3 of 4 killed (75.0%); of these 1 hung and 0 could not be imported" in said
    assert "`toy/sums.py:25` unseen, : `return a + 1` → `return a - 1`" in said
    assert (toy / "toy/sums.py").read_text() == SUMS


def runs():
    fit = {"weights": "a", "metrics": "b", "steps": 5, "messages": {"parameters": "1 all_reduce, 8 B"}}
    return {"names": ["qsr"], "runs": {"one": {"ranks": [[fit], "as rank 0"], "files": {"end.ckpt": {"loops": "c"}}}}}


def test_digests_that_differ_are_told_by_run_and_kind(tmp_path):
    assert seeded_runs.differences(runs(), runs()) == ([], [])
    other = runs()
    other["runs"]["one"]["files"]["end.ckpt"] = {"loops": "d", "more": 1}
    other["runs"]["one"]["ranks"][0][0]["messages"]["start"] = "1 broadcast"
    wrong, noted = seeded_runs.differences(runs(), other)
    assert wrong == []
    assert noted[:2] == [f"one, rank {rank}, fit 1: new purpose start: 1 broadcast" for rank in range(2)]
    assert noted[2:] == ["one: end.ckpt: loops differs", "one: end.ckpt: more is new"]
    paths = [tmp_path / "before.json", tmp_path / "after.json"]
    for path, content in zip(paths, (runs(), other), strict=True):
        path.write_text(json.dumps(content))
    assert seeded_runs.main(["--compare", *map(str, paths)]) == 0
    for change, said in (
        (lambda run: run["ranks"][0][0].update(weights="z"), "one, rank 1, fit 1: weights differ"),
        (
            lambda run: run["ranks"].__setitem__(1, [copy.deepcopy(run["ranks"][0][0]) | {"steps": 6}]),
            "rank 1, fit 1: st",
        ),
        (
            lambda run: run["ranks"][0][0]["messages"].update(parameters="2"),
            "purpose parameters: 1 all_reduce, 8 B | 2",
        ),
        (lambda run: run["ranks"][0][0]["messages"].clear(), "purpose parameters is gone"),
        (lambda run: run.update(error="boom"), "one: error: None | boom"),
    ):
        other = runs()
        change(other["runs"]["one"])
        paths[1].write_text(json.dumps(other))
        wrong, _ = seeded_runs.differences(runs(), other)
        assert any(said in each for each in wrong), wrong
        assert seeded_runs.main(["--compare", *map(str, paths)]) == 1


def test_figures_are_those_of_the_tree(toy):
    rows = figures.figures(toy, "toy", launches=7).rows
    assert rows["files"] == "3"
    assert rows["lines of a file: longest"] == f"{len(SUMS.splitlines())} (`toy/sums.py`)"
    assert rows["functions"] == "6"
    assert rows["test functions"] == "3"
    assert rows["words in pages"] == "4"
    assert rows["launches of ranks in a run of the tests"] == "7"
    (toy / "toy/large.py").write_text(
        "class Large:\n" + "".join(f"    def f{k}(self): return self._g, self.other._h\n" for k in range(12))
    )
    found = figures.figures(toy, "toy")
    assert found.rows["classes of more than 10 methods, not counting those that override"] == "1"
    assert found.large == [(12, "`Large` (toy/large.py)")]
    assert found.rows["private attributes of other objects"] == "12"
    assert "| files | 3 | 4 |" in figures.table([("before", figures.Figures({"files": "3"})), ("after", found)])
