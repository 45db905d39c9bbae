"""The user's own modules, which a config names: the folders searched for them, and messages on a missing one."""

import argparse
import difflib
import importlib
import os
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NoReturn

from lightning.pytorch.cli import LightningArgumentParser
from typing_extensions import override

from lightning_comm.cli.fit.arguments import modules_with

_CLASS_PATH = re.compile(r"class_path'?:? '([\w.]+\.\w+)'")
_GIVEN = re.compile(r"Given value: '?([\w.]+)'?$", re.MULTILINE)
_KEY = re.compile(r'key "([\w.]+)"')
_configs: list[Path] = []  # of this command, beside which modules are looked for as well


class Parser(LightningArgumentParser):
    """Lightning's parser, with one sentence on classes that could not be imported, and why."""

    @override
    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        imports = _GIVEN.findall(message) if "import path" in message or "Subtypes" in message else []
        problems = _problems([*_CLASS_PATH.findall(message), *imports])
        if problems:
            key = _KEY.search(message)
            others = [each for each in _problems(_named_in_configs()) if each not in problems]
            message = "\n       ".join([f"{key[1]}: {problems[0]}" if key else problems[0], *others])
            if self.exit_on_error:
                self.exit(2, f"error: {message}\n")  # without four screens of options above it
        super().error(message, ex)


def _problems(class_paths: Iterable[str]) -> list[str]:
    return [problem for each in dict.fromkeys(class_paths) if (problem := import_problem(each)) is not None]


def _named_in_configs() -> list[str]:
    """Return what the configs of this command name by `class_path`, in their order."""
    texts = [config.read_text(errors="replace") for config in _configs]
    return [name for text in texts for name in re.findall(r"\bclass_path: *['\"]?([\w.]+\.\w+)", text)]


def search_beside_configs(arguments: Sequence[str]) -> None:
    """Let modules beside a config be imported, where neither the current folder nor an installation has them.

    Args:
        arguments: Those of ``lightning-comm fit``.

    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config", "-c", action="append", default=[])
    _configs[:] = [Path(config) for config in parser.parse_known_args(arguments)[0].config if os.path.isfile(config)]
    for config in _configs:
        folder = str(config.resolve().parent)
        if folder not in sys.path:
            sys.path.append(folder)  # the last place, so that nothing is hidden by it


def import_problem(class_path: str) -> str | None:
    """Return why a class cannot be imported, and the way out, or ``None`` where it can be."""
    module_name, _, name = class_path.rpartition(".")
    if not module_name:
        return _short(name)
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
    verb = "is" if len(near) == 1 else "are"
    way_out = f"Near it {verb} {', '.join(near)}." if near else "Write the name that the class has there."
    return f"{wrong}, and {getattr(module, '__file__', module_name)} has no {name!r}. {way_out}"


def _short(name: str) -> str:
    """Return what is wrong with the name of a class alone."""
    near = [f"{module}.{name}" for module in modules_with(name, _own_folders())]
    way_out = f"Write {' or '.join(near)}." if near else f"Write the module in front of it, as in my_module.{name}."
    return f"`class_path` must be a module and a class in it; got {name!r}. {way_out}"


def _own_folders() -> list[Path]:
    return list(dict.fromkeys(path.resolve() for path in (Path(), *(config.parent for config in _configs))))


def _not_found(module: str, missing: str) -> str:
    """Return the rest of the sentence about a module that is missing: the named one, or one that it needs."""
    places = f"not in the current folder, {os.getcwd()}, not among what is installed"
    places += ", not beside the config" if _configs else ""
    what = f"and there is no module {missing!r}"
    if not f"{module}.".startswith(f"{missing}."):
        what = f"whose module needs {missing!r}, and there is no such module"
    path = missing.replace(".", "/")
    way_out = f"Start the command where {path}.py or the folder {path}/ lies, or install it."
    return f"{what}: {places}. {_near(missing)}{way_out}"


def _near(missing: str) -> str:
    top, _, _ = missing.partition(".")
    files = [path for folder in _own_folders() for path in folder.glob("*")]
    own = [path.stem for path in files if path.suffix == ".py" or (path / "__init__.py").is_file()]
    near = [name for name in difflib.get_close_matches(top, own, n=3) if name != top]
    return f"Near it {'is' if len(near) == 1 else 'are'} {', '.join(near)}. " if near else ""
