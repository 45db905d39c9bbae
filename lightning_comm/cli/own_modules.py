"""The user's own modules, which a config names: where they are looked for, and what is said where one is not found."""

import argparse
import difflib
import importlib
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from lightning.pytorch.cli import LightningArgumentParser
from typing_extensions import override

_CLASS_PATH = re.compile(r"class_path'?:? '([\w.]+\.\w+)'")
_KEY = re.compile(r'key "([\w.]+)"')


class Parser(LightningArgumentParser):
    """Lightning's parser, which says in one sentence which class could not be imported, and why."""

    @override
    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        problems = (import_problem(class_path) for class_path in dict.fromkeys(_CLASS_PATH.findall(message)))
        if (problem := next(filter(None, problems), None)) is not None:
            key = _KEY.search(message)
            message = f"{key[1]}: {problem}" if key else problem
        super().error(message, ex)


def search_beside_configs(words: Sequence[str]) -> None:
    """Let modules be imported that lie beside a config, where neither the current folder nor an installation has them.

    Args:
        words: Those of ``lightning-comm fit``.

    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config", "-c", action="append", default=[])
    for config in parser.parse_known_args(words)[0].config:
        folder = str(Path(config).resolve().parent)
        if os.path.isfile(config) and folder not in sys.path:
            sys.path.append(folder)  # the last place, so that nothing is hidden by it


def import_problem(class_path: str) -> str | None:
    """Return why a class cannot be imported, and the way out, or ``None`` where it can be."""
    module_name, _, name = class_path.rpartition(".")
    wrong = f"`class_path` must be a class that can be imported; got {class_path!r}"
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None:  # a sentence of ours, which names what is not installed, and the command
            return f"{wrong}. {error}"
        return f"{wrong}, {_not_found(module_name, error.name)}"
    except Exception as error:  # whatever a module raises
        return f"{wrong}, and its module cannot be imported: {type(error).__name__}: {error}. Mend it first."
    if hasattr(module, name):
        return None
    near = difflib.get_close_matches(name, vars(module), n=3)
    way_out = f"Near it are {', '.join(near)}." if near else "Write the name that the class has there."
    return f"{wrong}, and {getattr(module, '__file__', module_name)} has no {name!r}. {way_out}"


def _not_found(module: str, missing: str) -> str:
    if not f"{module}.".startswith(f"{missing}."):
        return f"whose module needs {missing!r}, which is neither installed nor in the current folder. Install it."
    return (
        f"and there is no module {missing!r}: not in the current folder, {os.getcwd()}, not among what is installed, "
        f"not beside the config. Start the command where {missing.replace('.', '/')}.py lies, or install it."
    )
