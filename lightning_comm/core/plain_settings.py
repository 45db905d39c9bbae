"""Settings as plain fields: their form in a file, and their comparison with those of another run.

A setting is a dictionary of its class and its fields. A function in it is its module and name and a digest of its code:
of its instructions, constants and names, and of the plain values of its defaults and of what it has closed over. So a
function with another body is another setting. Values that are none of these are known by their class alone.
"""

import hashlib
import os
import sys
from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass
from functools import partial
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType
from typing import Any

_DEPTH = 8  # of values within each other
_MISSING = "nothing"


def plain(setting: object) -> Any:
    """Return a setting as plain data: dictionaries with texts as keys, lists, numbers and texts.

    Example:
        >>> from lightning_comm import TopK
        >>> plain(TopK(0.25))
        {'class': 'TopK', 'fields': {'ratio': 0.25}}

    """
    return _plain(setting, _DEPTH)


def difference(saved: Any, now: object) -> str | None:
    """Return the first difference between what :func:`plain` returned and a setting, as text; ``None`` without any.

    Text is taken for what an earlier version has written: the setting as Python prints it, without functions.

    Example:
        >>> from lightning_comm import TopK
        >>> difference({'class': 'TopK', 'fields': {'ratio': 0.1}}, TopK(0.25))
        '`ratio` was 0.1 and is 0.25'

    """
    if isinstance(saved, str) and not isinstance(now, str):
        return None if saved == repr(now) else f"it was {saved} and is {now!r}"
    return _difference("", saved, plain(now))


def not_compared(saved: Any, now: object) -> str | None:
    """Return which part of a setting cannot be compared with what was saved, as text; ``None`` if all of it can.

    Earlier versions have not written down functions, and one version of Python compiles them otherwise than another.
    """
    functions = _functions(plain(now))
    if isinstance(saved, str) and functions:
        return f"it was written by an earlier version, which has not noted the code of {', '.join(sorted(functions))}"
    return None


def _plain(value: object, depth: int) -> Any:
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if depth == 0:
        return {"class": _name(type(value))}
    if isinstance(value, (list, tuple)):
        return [_plain(each, depth - 1) for each in value]
    if isinstance(value, Mapping):
        return {"items": {str(key): _plain(each, depth - 1) for key, each in value.items()}}
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, type):
        return {"type": _name(value)}
    function = _plain_function(value, depth - 1)
    if function is not None:
        return function
    return {"class": _name(type(value)), "fields": _fields(value, depth - 1)}


def _fields(value: object, depth: int) -> dict[str, Any]:
    if is_dataclass(value):
        return {each.name: _plain(getattr(value, each.name), depth) for each in fields(value) if each.compare}
    own = vars(value) if hasattr(value, "__dict__") else {}
    return {name: _plain(each, depth) for name, each in sorted(own.items()) if _is_plain(each)}


def _plain_function(value: object, depth: int) -> dict[str, Any] | None:
    if isinstance(value, MethodType):
        return {"of": _plain(value.__self__, depth), "method": _plain(value.__func__, depth)}
    if isinstance(value, partial):
        return {"partial": _plain(value.func, depth), "args": _plain([list(value.args), value.keywords], depth)}
    if isinstance(value, FunctionType):
        closed = [_contents(cell) for cell in value.__closure__ or ()]
        given = [list(value.__defaults__ or ()), dict(value.__kwdefaults__ or {}), closed]
        return {
            "function": f"{value.__module__}.{value.__qualname__}",
            "python": f"{sys.version_info.major}.{sys.version_info.minor}",
            "code": _digest(value.__code__),
            "values": _plain(given, depth),
        }
    if isinstance(value, BuiltinFunctionType):
        return {"function": f"{value.__module__}.{value.__qualname__}"}
    return None


def _contents(cell: Any) -> object:
    try:
        return cell.cell_contents
    except ValueError:  # not filled yet
        return None


def _digest(code: CodeType) -> str:
    """Return a digest of what a function does, wherever its file and its lines are."""
    digest = hashlib.sha256(code.co_code)
    for constant in code.co_consts:
        text = _digest(constant) if isinstance(constant, CodeType) else _constant(constant)
        digest.update(f"{type(constant).__name__} {text};".encode())
    digest.update(" ".join([*code.co_names, *code.co_varnames, *code.co_freevars]).encode())
    return digest.hexdigest()[:16]


def _constant(value: object) -> str:
    """Return a constant as text; a set in one order, whatever order Python keeps it in."""
    return str(sorted(map(repr, value))) if isinstance(value, frozenset) else repr(value)


def _is_plain(value: object) -> bool:
    return value is None or isinstance(value, (bool, int, float, str, list, tuple, Mapping, FunctionType, partial))


def _name(kind: type) -> str:
    return kind.__qualname__ if kind.__module__.partition(".")[0] == "lightning_comm" else _full_name(kind)


def _full_name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _functions(value: Any) -> set[str]:
    """Return the names of the functions in plain data."""
    if isinstance(value, list):
        return set().union(*map(_functions, value))
    if not isinstance(value, dict):
        return set()
    inside = value.get("fields", value.get("items"))
    if inside is not None:
        return set().union(*map(_functions, inside.values()))
    own = {str(value["function"])} if "code" in value else set()
    return own.union(*map(_functions, value.values()))


def _difference(path: str, saved: Any, now: Any) -> str | None:
    where = f"`{path}`" if path else "it"
    other = f"{where} was {_shown(saved)} and is {_shown(now)}"
    if isinstance(saved, list) and isinstance(now, list) and len(saved) == len(now):
        pairs = enumerate(zip(saved, now, strict=True))
        return _first(_difference(f"{path}[{place}]", one, two) for place, (one, two) in pairs)
    if not (isinstance(saved, dict) and isinstance(now, dict)):
        return None if saved == now else other
    if saved.keys() != now.keys() or any(saved.get(key) != now.get(key) for key in ("class", "type", "function")):
        return other
    if "code" in now:
        return _function_difference(where, saved, now)
    for inside in ("fields", "items"):
        if inside in now:
            return _difference_of_each(f"{path}." if path else "", saved[inside], now[inside])
    return _difference_of_each(f"{path}." if path else "", saved, now)


def _difference_of_each(prefix: str, saved: dict[str, Any], now: dict[str, Any]) -> str | None:
    names = dict.fromkeys([*saved, *now])
    return _first(_difference(prefix + name, saved.get(name, _MISSING), now.get(name, _MISSING)) for name in names)


def _first(differences: Iterable[str | None]) -> str | None:
    return next((each for each in differences if each is not None), None)


def _function_difference(where: str, saved: dict[str, Any], now: dict[str, Any]) -> str | None:
    if saved["python"] != now["python"]:
        return (
            f"{where} is {_shown(now)}, whose code Python {saved['python']} has compiled, so it cannot be compared "
            f"under {now['python']}"
        )
    if saved["code"] != now["code"]:
        return f"{where} is {_shown(now)}, whose code is another one now"
    if _difference("values", saved["values"], now["values"]) is not None:
        return f"{where} is {_shown(now)}, whose defaults or closed-over values differ"
    return None


def _shown(value: Any) -> str:
    """Return plain data as people read it."""
    if not isinstance(value, dict):
        return repr(value)
    if "items" in value:
        return f"{{{', '.join(f'{key!r}: {_shown(each)}' for key, each in value['items'].items())}}}"
    if "class" in value:
        inside = value.get("fields", {}).items()
        return f"{value['class']}({', '.join(f'{name}={_shown(each)}' for name, each in inside)})"
    name = next((value[key] for key in ("function", "type", "method", "partial") if key in value), value)
    return name if isinstance(name, str) else _shown(name)


def shown(saved: Any) -> str:
    """Return a setting that was saved as people read it; that of an earlier version as it was written.

    Example:
        >>> shown({'class': 'TopK', 'fields': {'ratio': 0.1}})
        'TopK(ratio=0.1)'

    """
    return saved if isinstance(saved, str) else _shown(saved)
