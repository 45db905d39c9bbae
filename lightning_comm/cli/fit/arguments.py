"""Checks of the arguments of ``lightning-comm fit`` and its like, as far as that is possible without torch.

The parser behind them names a wrong argument below four screens of options; here it is one line with the way out.
"""

import difflib
import re
import sys
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path

_WITHOUT_VALUE = re.compile(r"-h|--help(\.\w+)*|--print_\w+")
_ENOUGH = re.compile(r"-h|-c|--help|--print_|--config|--model")
_CONFIGS = (".yaml", ".yml", ".json")
_LONGEST_MODULE = 1_000_000  # bytes, to look for classes in
_MOST_MODULES = 200


def check(command: str, arguments: Sequence[str]) -> int:
    """Return 0, or 2 after saying what is wrong with the arguments of a command."""
    if (problem := problem_of(arguments)) is None:
        return 0
    print(f"lightning-comm {command}: error: {problem}", file=sys.stderr)
    return 2


check_fit, check_validate, check_test, check_predict = (
    partial(check, name) for name in ("fit", "validate", "test", "predict")
)


def problem_of(arguments: Sequence[str]) -> str | None:
    """Return what is wrong with the arguments, and the way out, or ``None``."""
    strays, configs = _read(arguments)
    if strays:
        return stray_problem(strays[0])
    for config in configs:
        if (problem := _config_problem(config)) is not None:
            return problem
    if any(_ENOUGH.match(each) for each in arguments):
        return None
    config = next((path.name for path in _files("*.y*ml")), "my.yaml")
    found = ((path.stem, name) for path in _files("*.py") for name, bases in _classes_in(path) if "Module" in bases)
    model = next((f"{module}.{name}" for module, name in found), "my_module.Net")
    return (
        "`--config` must name a config that has a model, or `--model` a module and a class in it; got neither. Write "
        f"--config {config}, or --model {model}."
    )


def stray_problem(word: str) -> str:
    """Return what is wrong with an argument that is neither an option nor its value, and the way out."""
    path = Path(word)
    if path.suffix in _CONFIGS:
        way_out = f"A config is named by `--config`: write --config {word}."
    elif path.suffix == ".ckpt":
        way_out = f"A checkpoint is named by `--ckpt_path`: write --ckpt_path {word}."
    elif path.suffix == ".py":
        classes = sorted(_classes_in(path), key=lambda each: "Module" not in each[1])
        model = f"{path.stem}.{classes[0][0] if classes else 'Net'}"
        way_out = f"A model is named by its module and class: write --model {model}, or --config FILE."
    else:
        way_out = "Write --config FILE for a config, --model MODULE.CLASS for a model; --help shows the others."
    return f"every word must be an option or the value of one; got {word!r}. {way_out}"


def strays(arguments: Sequence[str]) -> list[str]:
    """Return the arguments that are neither an option nor the value of one.

    Example:
        >>> strays(["own.yaml", "--a", "1", "--b=2", "x", "--c", "-1", "--print_config", "y"])
        ['own.yaml', 'x', 'y']

    """
    return _read(arguments)[0]


def _read(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the arguments that belong to no option, and the configs."""
    found, configs, rest = [], [], list(arguments)
    while rest:
        argument = rest.pop(0)
        if not argument.startswith("-"):
            found.append(argument)
            continue
        name, has_value, value = argument.partition("=")
        if not has_value and not _WITHOUT_VALUE.fullmatch(argument) and rest:
            value = rest.pop(0)
        if name in ("--config", "-c"):
            configs.append(value)
    return found, configs


def _config_problem(config: str) -> str | None:
    path = Path(config)
    if path.suffix == ".py":
        return f"`--config` must be a YAML file; got {config!r}. {stray_problem(config).split('. ', 1)[1]}"
    if path.suffix not in _CONFIGS or "\n" in config or path.is_file():
        return None  # whatever it is, the parser reads it
    near = difflib.get_close_matches(path.name, [each.name for each in _files("*.y*ml", path.parent)], n=1, cutoff=0.5)
    way_out = f"Near it is {path.parent / near[0]}." if near else "Give its path from the folder you are in."
    return f"`--config` must be a file; got {config!r}, and there is none in {path.parent.resolve()}. {way_out}"


def _classes_in(path: Path) -> list[tuple[str, str]]:
    """Return the names of the classes in a file, with the rest of the line that they begin on."""
    return re.findall(r"^class +(\w+)(.*)", _text(path), re.MULTILINE)


def modules_with(name: str, folders: Iterable[Path]) -> list[str]:
    """Return the modules right in some folders that have a class of a name."""
    files = (path for folder in folders for path in _files("*.py", folder))
    return [path.stem for path in files if re.search(rf"^class +{re.escape(name)}\b", _text(path), re.MULTILINE)]


def _files(pattern: str, folder: Path = Path()) -> list[Path]:
    return sorted(folder.glob(pattern))[:_MOST_MODULES] if folder.is_dir() else []


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace") if path.stat().st_size <= _LONGEST_MODULE else ""
    except OSError:  # it is only looked at for advice
        return ""
