"""The way into the console command: loads as much of ``lightning_comm`` as the arguments on the line need, and no more.

Importing ``lightning_comm`` registers its strategies with Lightning, and so loads torch: five seconds, and a quarter of
a minute on a machine that has just started. Help, the version and an answer to a wrong word need none of that. Python
executes a package before any module in it, so this one stands outside: it puts the package in its place without
executing it, and executes it once a command needs all of it.
"""

import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path

# What nothing here works without. A file of such a name, or of one of Python's own modules, would take its place.
_NEEDED = {
    *("jsonargparse", "lightning", "numpy", "pytorch_lightning"),
    *("torch", "torchmetrics", "typing_extensions", "yaml"),
}


def main() -> int:
    """Run the command line that this process was started with, and return its exit code."""
    execute = _put_in_place("lightning_comm")
    from lightning_comm.cli.main import main as run

    def load_all() -> None:
        _import_from_current_folder()
        execute()

    return run(load_all=load_all)


def _import_from_current_folder() -> None:
    """Let modules in the current folder be imported first, as under ``python -m``, and say what they hide."""
    if getattr(sys.flags, "safe_path", False):  # python -P, PYTHONSAFEPATH: the user wants none of that
        return
    here = Path.cwd()
    sys.path.insert(0, str(here))
    if os.environ.get("LOCAL_RANK", "0") == "0" and (hiding := _hiding(here)):
        print(_warning(here, hiding), file=sys.stderr)


def _put_in_place(package: str) -> Callable[[], None]:
    """Let modules of a package be imported that is not executed; return what executes it."""
    if package in sys.modules:
        return lambda: None
    spec = importlib.util.find_spec(package)
    assert spec is not None
    assert spec.loader is not None
    module, loader = importlib.util.module_from_spec(spec), spec.loader
    sys.modules[package] = module
    return lambda: loader.exec_module(module)


def _hiding(folder: Path) -> list[str]:
    """Return the files in a folder that take the place of a module of Python's, or of a package that is needed here."""
    names = sys.stdlib_module_names | _NEEDED
    hiding = [path for path in folder.glob("*.py") if path.stem in names]
    hiding += [path for path in folder.glob("*/__init__.py") if path.parent.name in names]
    return sorted(str(path.relative_to(folder)) for path in hiding)


def _warning(folder: Path, hiding: list[str]) -> str:
    return (
        f"lightning-comm: the current folder, {folder}, is searched for modules first, and it has {', '.join(hiding)}, "
        "by whose name other modules import something else. If an import fails, rename it, or start the command "
        "elsewhere."
    )
