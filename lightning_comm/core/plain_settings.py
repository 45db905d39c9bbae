"""Settings as plain fields: their form in a file, and their comparison with those of another run.

A setting is a dictionary of its class and its fields (:mod:`lightning_comm.core.plain_values`). A function in it is its
name, a digest of its code and what it reads: defaults, what it has closed over, and constants, functions and classes of
the user's own modules. So a function that does something else is another setting.
"""

from collections.abc import Iterable, Iterator
from typing import Any

from lightning_comm.core.plain_values import UNCOMPARED, plain_value

_MISSING = "nothing"
_KINDS = ("class", "type", "function", "array", "module")  # keys under which the same thing has the same text
_GROUPS = ("fields", "items", "reads", "methods")  # keys of plain data whose own keys are names of the user's
_CODE = {"python", "code", "values", "reads", "methods"}  # keys that stand where code is seen for the first time
_SHOWN = 3  # parts that cannot be compared


def plain(setting: object) -> Any:
    """Return a setting as plain data: dictionaries with texts as keys, lists, numbers and texts.

    Example:
        >>> from lightning_comm import TopK
        >>> plain(TopK(0.25))
        {'class': 'TopK', 'fields': {'ratio': 0.25}}

    """
    return plain_value(setting)


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

    Earlier versions have not written down functions, one version of Python compiles them otherwise than another, and of
    some objects nobody can tell whether they are what they were.
    """
    after = plain(now)
    if isinstance(saved, str) and not isinstance(now, str):
        functions = _functions(after)
        listed = ", ".join(sorted(functions))
        return f"it was written by an earlier version, which has not noted the code of {listed}" if functions else None
    found = list(dict.fromkeys(_uncompared("", saved, after)))
    more = f"; and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
    return "; ".join(found[:_SHOWN]) + more if found else None


def _uncompared(path: str, saved: Any, now: Any) -> Iterator[str]:
    where = f"`{path}`" if path else "it"
    if isinstance(saved, list) and isinstance(now, list):
        for place, (one, two) in enumerate(zip(saved, now, strict=False)):
            yield from _uncompared(f"{path}[{place}]", one, two)
    if not (isinstance(saved, dict) and isinstance(now, dict)):
        return
    reason = saved.get(UNCOMPARED, now.get(UNCOMPARED))
    if isinstance(reason, str):
        yield f"{where} is {_shown(now)}, and {reason}"
    elif _by_another_python(saved, now):
        yield f"{where} is {_shown(now)}, which Python {saved['python']} has compiled, and this is {now['python']}"
    for key in sorted(saved.keys() & now.keys()):
        if key in _GROUPS and isinstance(now[key], dict):
            for name in sorted(saved[key].keys() & now[key].keys()):
                yield from _uncompared(f"{path}.{name}" if path else name, saved[key][name], now[key][name])
        else:
            yield from _uncompared(f"{path}.{key}" if path else key, saved[key], now[key])


def _by_another_python(saved: dict[str, Any], now: dict[str, Any]) -> bool:
    return "code" in saved and "code" in now and saved["python"] != now["python"]


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
        same = saved == now or (saved != saved and now != now)  # not a number
        return None if same else other
    if any(saved.get(key) != now.get(key) for key in _KINDS):
        return other
    if UNCOMPARED in saved or UNCOMPARED in now:
        return None
    if saved.keys() - _CODE != now.keys() - _CODE:
        return other
    if "code" in saved and "code" in now:
        return _function_difference(where, saved, now)
    if "array" in now:
        return None if saved == now else f"{where} is {_shown(now)}, whose values are others now"
    for inside in ("fields", "items"):
        if inside in now:
            found = _difference_of_each(f"{path}." if path else "", saved[inside], now[inside])
            return found or _methods_difference(where, saved, now)
    return _methods_difference(where, saved, now) if "type" in now else _difference_of_keys(path, saved, now)


def _difference_of_keys(path: str, saved: dict[str, Any], now: dict[str, Any]) -> str | None:
    return _difference_of_each(f"{path}." if path else "", saved, now)


def _methods_difference(where: str, saved: dict[str, Any], now: dict[str, Any]) -> str | None:
    if "methods" not in saved or "methods" not in now:
        return None
    before, after = saved["methods"], now["methods"]
    names = dict.fromkeys([*before, *after])
    both = [name for name in names if name in before and name in after]
    if any(_by_another_python(before[name], after[name]) for name in both if isinstance(before[name], dict)):
        names = dict.fromkeys(both)  # another version may write other methods into a class
    found = _first(_difference(name, before.get(name, _MISSING), after.get(name, _MISSING)) for name in names)
    return None if found is None else f"{where} is {_shown(now)}, whose class is another one now: {found}"


def _difference_of_each(prefix: str, saved: dict[str, Any], now: dict[str, Any]) -> str | None:
    names = dict.fromkeys([*saved, *now])
    return _first(_difference(prefix + name, saved.get(name, _MISSING), now.get(name, _MISSING)) for name in names)


def _first(differences: Iterable[str | None]) -> str | None:
    return next((each for each in differences if each is not None), None)


def _function_difference(where: str, saved: dict[str, Any], now: dict[str, Any]) -> str | None:
    same_python = saved["python"] == now["python"]
    if same_python and saved["code"] != now["code"]:
        return f"{where} is {_shown(now)}, whose code is another one now"
    if _difference("values", saved["values"], now["values"]) is not None:
        return f"{where} is {_shown(now)}, whose defaults or closed-over values differ"
    found = _difference_of_each("", saved["reads"], now["reads"]) if same_python else None
    return None if found is None else f"{where} is {_shown(now)}, and what it reads has changed: {found}"


def _shown(value: Any) -> str:
    """Return plain data as people read it."""
    if not isinstance(value, dict):
        return repr(value)
    if "items" in value:
        return f"{{{', '.join(f'{key!r}: {_shown(each)}' for key, each in value['items'].items())}}}"
    if "class" in value:
        inside = value.get("fields", {}).items()
        return f"{value['class']}({', '.join(f'{name}={_shown(each)}' for name, each in inside)})"
    if "array" in value:
        return f"an array {value['array']}"
    keys = ("function", "type", "method", "partial", "module")
    name = next((value[key] for key in keys if key in value), value)
    if isinstance(name, dict) and name is value:  # a set, or bytes
        return ", ".join(f"{key}({_shown(each)})" for key, each in value.items())
    return name if isinstance(name, str) else _shown(name)


def shown(saved: Any) -> str:
    """Return a setting that was saved as people read it; that of an earlier version as it was written.

    Example:
        >>> shown({'class': 'TopK', 'fields': {'ratio': 0.1}})
        'TopK(ratio=0.1)'

    """
    return saved if isinstance(saved, str) else _shown(saved)
