"""The shape of the house: one stem for each technique, and limits that keep files, classes and names few and small."""

import ast
import re
from pathlib import Path

import pytest
import yaml
from lightning.pytorch.strategies import StrategyRegistry

import lightning_comm
from lightning_comm.transport.compression.names import compression_of

ROOT = Path(__file__).parents[1]
PACKAGE = Path(lightning_comm.__file__).parent
CARDS = {path.stem: yaml.safe_load(path.read_text().split("---")[1]) for path in ROOT.glob("docs/techniques/*.md")}
STEMS = sorted(front["stem"] for front in CARDS.values())
PART_OF = {front["stem"]: front["part_of"] for front in CARDS.values() if "part_of" in front}
# words by which a file would say that it is of a technique without standing in its folder
TELLING = {
    "adaptive_partition": r"partition|balanc",
    "compression": r"compress",
    "cyclic": r"cyclic",
    "local_update": r"local_update|^rounds?_",
    "sparse_mask": r"mask|prun",
}
# what does not follow its stem, and why
ELSEWHERE = {
    "transport/compressed_average.py": "an average of parameters; a compression is an argument of it",
    "ondevice/pruning": "chooses masks, without messages; what is done with them is the technique",
}
TESTED_ELSEWHERE = {"strategies/sparse_mask": "by the strategies that use it, in their folders"}
WITHOUT_CARD = {
    "callbacks/comm_profiler": "an instrument and not a technique: docs/how-to/measure.md, notebooks/measure.ipynb",
    "strategies/checkpoints": "what all strategies share",
    "strategies/common": "what all strategies share",
}


def shell_folder(stem):
    """Where the strategy or callback of a technique is."""
    return next(path for path in (PACKAGE / "strategies" / stem, PACKAGE / "callbacks" / stem) if path.exists())


def test_there_are_techniques():
    assert set(STEMS) == set(TELLING)


@pytest.mark.parametrize("stem", STEMS)
def test_a_technique_has_one_stem_in_every_layer_and_beside_the_package(stem):
    assert (shell_folder(stem) / "__init__.py").exists()
    assert CARDS[stem]["stem"] == stem
    assert (ROOT / "notebooks" / f"{stem}.ipynb").exists()
    assert list((ROOT / "docs" / "results").glob(f"{stem}_*.md"))
    # two files or more are a folder, and one file has the stem itself
    for folder in (path for path in PACKAGE.rglob(stem) if path.is_dir()):
        where = str(folder.relative_to(PACKAGE))
        assert len([path for path in folder.glob("*.py") if path.stem != "__init__"]) >= 2, where
        assert not folder.with_suffix(".py").exists()
        assert (ROOT / "tests" / where).is_dir() != (where in TESTED_ELSEWHERE), where


@pytest.mark.parametrize("stem", STEMS)
def test_what_is_of_a_technique_by_its_name_has_the_stem_in_its_path(stem):
    own = {stem, PART_OF.get(stem, stem)}
    outside = [
        str(path.relative_to(PACKAGE))
        for path in PACKAGE.rglob("*.py")
        if path.name != "__init__.py"
        and any(re.search(TELLING[stem], part) for part in path.relative_to(PACKAGE).with_suffix("").parts)
        and not own & set(path.relative_to(PACKAGE).with_suffix("").parts)
    ]
    assert [path for path in outside if not path.startswith(tuple(ELSEWHERE))] == []


def test_each_folder_of_a_shell_is_a_technique_or_is_listed_and_each_exception_is_there():
    shells = [path for layer in ("strategies", "callbacks") for path in (PACKAGE / layer).iterdir()]
    folders = {str(path.relative_to(PACKAGE)) for path in shells if (path / "__init__.py").exists()}
    assert {path for path in folders if Path(path).name not in STEMS} == set(WITHOUT_CARD)
    assert [path for path in (*ELSEWHERE, *TESTED_ELSEWHERE) if not (PACKAGE / path).exists()] == []


def techniques_of_config(path):
    """The stems of the strategy, its compression and the callbacks that a config builds."""
    trainer = yaml.safe_load(path.read_text()).get("trainer", {})
    strategy = trainer.get("strategy", "auto")
    names = re.findall(r"'class_path': '[\w.]*?(\w+)'", str([strategy, trainer.get("callbacks")]))
    classes = [getattr(lightning_comm, name, None) for name in names]
    if isinstance(strategy, str) and strategy in StrategyRegistry:
        registered = StrategyRegistry[strategy]
        compression = registered["init_params"].get("compression")
        classes += [registered["strategy"], compression and type(compression_of(compression, path.name))]
    return {part for each in classes if each is not None for part in each.__module__.split(".")}


@pytest.mark.parametrize("stem", STEMS)
def test_a_technique_has_a_config_that_builds_it(stem):
    assert [path.name for path in ROOT.glob("configs/*.yaml") if stem in techniques_of_config(path)]


def test_every_card_is_of_a_technique_of_its_own_in_core_or_says_of_which_it_is_a_part():
    own = {path.name for path in (PACKAGE / "core").iterdir() if (path / "__init__.py").exists()}
    assert own == set(STEMS) - set(PART_OF)
    assert set(PART_OF.values()) <= own


def test_composes_with_is_said_on_both_sides():
    for name, front in CARDS.items():
        for other in front["composes_with"]:
            if other in CARDS:
                assert name in CARDS[other]["composes_with"], (name, other)
        for other in front["does_not_compose_with"]:
            if other in CARDS:
                assert name in CARDS[other]["does_not_compose_with"], (name, other)


def test_the_top_level_has_at_most_thirty_names():
    assert len(lightning_comm.__all__) <= 30
    assert len(set(lightning_comm.__all__)) == len(lightning_comm.__all__)


def own_methods(tree):
    """The classes of a module, each with the names of its methods that override nothing of Lightning's."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            methods = [each for each in node.body if isinstance(each, (ast.FunctionDef, ast.AsyncFunctionDef))]
            own = [each.name for each in methods if "override" not in map(ast.unparse, each.decorator_list)]
            yield node.name, [name for name in own if not (name.startswith("__") and name != "__init__")]


def test_no_public_class_name_occurs_twice():
    modules = {}
    for path in PACKAGE.rglob("*.py"):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                modules.setdefault(node.name, []).append(str(path.relative_to(PACKAGE)))
    assert {name: paths for name, paths in modules.items() if len(paths) > 1} == {}


MANY_METHODS = {}  # class: why it has more than 20 of its own; at most three


def test_no_class_has_more_than_twenty_methods_of_its_own():
    found = {
        name: len(set(methods))
        for path in PACKAGE.rglob("*.py")
        for name, methods in own_methods(ast.parse(path.read_text()))
        if len(set(methods)) > 20
    }
    assert set(found) == set(MANY_METHODS), found
    assert len(MANY_METHODS) <= 3


# path in the package: why it has more than 400 lines
_SHELL = "a class that Lightning wants whole: its docstring, and 64 lines that hand Lightning's methods on"
LONG_FILES = {f"strategies/{stem}/strategy.py": _SHELL for stem in ("compression", "cyclic", "local_update")}


def test_no_file_has_more_than_four_hundred_lines():
    found = {
        str(path.relative_to(PACKAGE)): lines
        for path in PACKAGE.rglob("*.py")
        if (lines := path.read_text().count("\n")) > 400
    }
    assert set(found) == set(LONG_FILES), found
    assert len(LONG_FILES) <= 3


def test_ondevice_sends_nothing():
    for path in (PACKAGE / "ondevice").rglob("*.py"):
        assert "torch.distributed" not in path.read_text().replace("``torch.distributed``", ""), path
