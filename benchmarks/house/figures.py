"""Figures of the house: how long files, functions and classes are, what is public, how much there is to read.

    python benchmarks/house/figures.py
    python benchmarks/house/figures.py --compare ../before ../after

Read from the source alone; nothing of the package is imported. Tests are counted as functions in the source, and as
cases where ``--cases`` has pytest collect them, which takes a while.
"""

import argparse
import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
_NOT_OURS = {".git", ".venv", "build", "_build", "node_modules", "__pycache__"}
_TALKED_TO = {"self", "cls", "super"}


@dataclass
class Figures:
    """What was counted in a tree.

    Args:
        rows: Figures by their names, in the order of a table.
        large: Classes of more than 10 own methods, with their numbers.

    """

    rows: dict[str, str] = field(default_factory=dict)
    large: list[tuple[int, str]] = field(default_factory=list)


def figures(root: Path, package: str, *, cases: bool = False, launches: int | None = None) -> Figures:
    """Count what a tree has.

    Args:
        root: The tree.
        package: Its package.
        cases: Whether pytest collects the tests.
        launches: How many ranks a run of the tests launched, if that is known.

    """
    found = Figures()
    trees = {path: ast.parse(path.read_text()) for path in sorted((root / package).rglob("*.py"))}
    _count_files(found, root, trees)
    _count_functions(found, trees)
    _count_classes(found, root, trees)
    _count_access(found, trees)
    _count_words(found, root, trees)
    _count_tests(found, root, cases, launches)
    top = root / package / "__init__.py"
    found.rows["public names at the top level"] = str(len(_exported(trees[top])))
    return found


def _count_files(found: Figures, root: Path, trees: dict[Path, ast.Module]) -> None:
    lines = {path: len(path.read_text().splitlines()) for path in trees}
    longest = max(lines, key=lambda path: lines[path])
    named = f"{lines[longest]} (`{longest.relative_to(root)}`)"
    found.rows["files"] = str(len(lines))
    found.rows["folders with files"] = str(len({path.parent for path in lines}))
    found.rows["lines"] = f"{sum(lines.values()):,}"
    found.rows["lines of a file: median"] = f"{median(lines.values()):.0f}"
    found.rows["lines of a file: longest"] = named
    for limit in (250, 400):
        found.rows[f"files above {limit} lines"] = str(sum(each > limit for each in lines.values()))
    short = sum(each < 40 for path, each in lines.items() if path.name != "__init__.py")
    found.rows["files below 40 lines, without `__init__.py`"] = str(short)


def _count_functions(found: Figures, trees: dict[Path, ast.Module]) -> None:
    lengths = {}
    for path, tree in trees.items():
        for node in ast.walk(tree):
            if isinstance(node, _FUNCTIONS):
                lengths[path, node.name, node.lineno] = _length(node)
    longest = max(lengths, key=lambda each: lengths[each])
    found.rows["functions"] = f"{len(lengths):,}"
    found.rows["lines of a function, without its docstring: median"] = f"{median(lengths.values()):.0f}"
    found.rows["lines of a function, without its docstring: longest"] = f"{lengths[longest]} (`{longest[1]}`)"
    found.rows["functions above 40 lines"] = str(sum(each > 40 for each in lengths.values()))


def _length(node: Any) -> int:
    docstring = node.body[0] if ast.get_docstring(node, clean=False) is not None else None
    said = docstring.end_lineno - docstring.lineno + 1 if docstring is not None else 0
    return node.end_lineno - node.lineno + 1 - said


def _count_classes(found: Figures, root: Path, trees: dict[Path, ast.Module]) -> None:
    methods: list[tuple[int, int, int, str]] = []
    for path, tree in trees.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                methods.append((*_methods(node), f"`{node.name}` ({path.relative_to(root)})"))
    found.rows["classes"] = str(len(methods))
    for limit in (10, 20):
        name = f"classes of more than {limit} methods"
        found.rows[name] = str(sum(own + magic + overriding > limit for own, magic, overriding, _ in methods))
        without = sum(own + magic > limit for own, magic, *_ in methods)
        found.rows[f"{name}, not counting those that override"] = str(without)
        found.rows[f"{name}, nor magic ones"] = str(sum(own > limit for own, *_ in methods))
    large = [(own + magic, name) for own, magic, _, name in methods if own + magic > 10]
    found.large = sorted(large, key=lambda each: (-each[0], each[1]))


def _methods(node: ast.ClassDef) -> tuple[int, int, int]:
    """Return the numbers of methods, of magic ones and of those with `@override`; a property with a setter is one."""
    names: dict[str, bool] = {}
    for each in node.body:
        if isinstance(each, _FUNCTIONS):
            is_override = any(ast.unparse(mark).endswith("override") for mark in each.decorator_list)
            names[each.name] = names.get(each.name, False) or is_override
    own = [name for name, is_override in names.items() if not is_override]
    magic = sum(name.startswith("__") for name in own)
    return len(own) - magic, magic, len(names) - len(own)


def _count_access(found: Figures, trees: dict[Path, ast.Module]) -> None:
    strings, private = 0, 0
    for tree in trees.values():
        strings += sum(_looks_up_a_string(node) for node in ast.walk(tree))
        private += sum(1 for _ in _private(tree))
    found.rows["`getattr`, `setattr`, `hasattr` with a string"] = str(strings)
    found.rows["private attributes of other objects"] = str(private)


def _looks_up_a_string(node: ast.AST) -> bool:
    if not isinstance(node, ast.Call) or ast.unparse(node.func) not in {"getattr", "setattr", "hasattr"}:
        return False
    return len(node.args) > 1 and isinstance(node.args[1], ast.Constant) and isinstance(node.args[1].value, str)


def _private(tree: ast.Module) -> Iterator[ast.Attribute]:
    """Yield uses of private attributes that the module itself does not define, but through ``self``."""
    own = {node.name for node in ast.walk(tree) if isinstance(node, (*_FUNCTIONS, ast.ClassDef))}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            own.add(node.attr)
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            own.add(node.target.id)
    for node in ast.walk(tree):
        if not isinstance(node, ast.Attribute) or not re.match(r"_[^_]", node.attr) or node.attr in own:
            continue
        if not (isinstance(node.value, ast.Name) and node.value.id in _TALKED_TO):
            yield node


def _count_words(found: Figures, root: Path, trees: dict[Path, ast.Module]) -> None:
    pages = [path for path in root.rglob("*.md") if not _NOT_OURS & set(path.relative_to(root).parts)]
    docs = {path: len(path.read_text().split()) for path in pages}
    found.rows["pages (`*.md`)"] = str(len(docs))
    found.rows["words in pages"] = f"{sum(docs.values()):,}"
    results = sum(words for path, words in docs.items() if "results" in path.relative_to(root).parts)
    found.rows["words in pages without results"] = f"{sum(docs.values()) - results:,}"
    readme = root / "README.md"
    found.rows["words in README.md"] = f"{docs.get(readme, 0):,}"
    said = [ast.get_docstring(node) or "" for tree in trees.values() for node in ast.walk(tree) if _has_docstring(node)]
    found.rows["words in docstrings"] = f"{sum(len(each.split()) for each in said):,}"


def _has_docstring(node: ast.AST) -> bool:
    return isinstance(node, (*_FUNCTIONS, ast.ClassDef, ast.Module))


def _count_tests(found: Figures, root: Path, cases: bool, launches: int | None) -> None:
    paths = sorted((root / "tests").rglob("*.py"))
    trees = [ast.parse(path.read_text()) for path in paths]
    functions = [node for tree in trees for node in ast.walk(tree) if isinstance(node, _FUNCTIONS)]
    found.rows["files of tests"] = str(len(paths))
    found.rows["lines of tests"] = f"{sum(len(path.read_text().splitlines()) for path in paths):,}"
    found.rows["test functions"] = f"{sum(node.name.startswith('test_') for node in functions):,}"
    if cases:
        found.rows["test cases"] = _collected(root)
    if launches is not None:
        found.rows["launches of ranks in a run of the tests"] = f"{launches:,}"


def _collected(root: Path) -> str:
    words = [
        sys.executable,
        "-m",
        "pytest",
        "-c",
        "../pyproject.toml",
        "--collect-only",
        "-q",
        "-p",
        "no:cacheprovider",
    ]
    paths = f"{root.resolve()}:{root.resolve() / 'tests'}"
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, cwd=root / "tests", capture_output=True, text=True, env=environment)
    counted = re.search(r"(\d+)(?:/\d+)? tests? collected", done.stdout)
    return f"{int(counted[1]):,}" if counted else "not known: " + done.stdout.strip().splitlines()[-1]


def _exported(tree: ast.Module) -> list[str]:
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return list(ast.literal_eval(node.value))
    return []


def table(counted: Sequence[tuple[str, Figures]]) -> str:
    """Return the figures of some trees as columns of a Markdown table, and the classes that are large."""
    names = list(dict.fromkeys(name for _, each in counted for name in each.rows))
    heads = " | ".join(name for name, _ in counted)
    said = [f"| | {heads} |", "|---|" + "---|" * len(counted)]
    said += [f"| {name} | {' | '.join(each.rows.get(name, '') for _, each in counted)} |" for name in names]
    for name, each in counted:
        said += ["", f"Classes of more than 10 methods, not counting those that override ({name}):", ""]
        said += [f"- {own}: {where}" for own, where in each.large]
    return "\n".join(said)


def main(words: Sequence[str] | None = None) -> None:
    """Print the figures of this tree, or of two."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=Path(__file__).parents[2], help="the tree (default: this one)")
    parser.add_argument("--package", default="lightning_comm")
    parser.add_argument("--compare", type=Path, nargs=2, metavar=("BEFORE", "AFTER"), help="two trees")
    parser.add_argument("--cases", action="store_true", help="have pytest count the cases")
    parser.add_argument("--launches", type=int, nargs="+", help="launches of ranks in a run of the tests, by tree")
    options = parser.parse_args(words)
    trees = list(zip(("before", "after"), options.compare, strict=True)) if options.compare else [("now", options.root)]
    launches = [*(options.launches or []), *[None] * len(trees)]
    print(
        table(
            [
                (name, figures(root, options.package, cases=options.cases, launches=launches[k]))
                for k, (name, root) in enumerate(trees)
            ]
        )
    )


if __name__ == "__main__":
    main()
