"""Values of a setting as plain data: what a user has given, so far as its content can be told.

A tensor or an array is a digest of its bytes, a function one of its code with what it reads outside of itself, an
object its class and its fields. What a function uses of installed packages is known by its name. What cannot be
compared says so: it has an entry :data:`UNCOMPARED` with the reason.
"""

import dis
import hashlib
import json
import os
import site
import sys
import sysconfig
from collections.abc import Callable, Iterator, Mapping
from collections.abc import Set as AnySet
from dataclasses import fields, is_dataclass
from functools import cache, partial
from pathlib import Path
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

#: The depth of values within each other.
DEPTH = 24
#: The key under which plain data says why a value cannot be compared.
UNCOMPARED = "uncompared"
_VALUES = 20_000  # in one setting
_ARRAY_BYTES = 2**30
_OF_A_RUN = ("LightningModule", "Trainer", "LightningDataModule", "Optimizer", "DataLoader", "Logger")  # and derived
_PASSING = ("training", "_is_full_backward_hook", "__orig_class__")  # fields of objects that say nothing of a setting


def plain_value(value: object) -> Any:
    """Return a value as plain data: dictionaries with texts as keys, lists, numbers and texts."""
    return _Walk().plain(value, DEPTH)


def python_version() -> str:
    """Return the version of Python, as far as the code that it compiles depends on it."""
    return f"{sys.version_info.major}.{sys.version_info.minor}"


class _Walk:
    """One way through a value: code that was seen is not gone through again, and objects within themselves end it."""

    def __init__(self) -> None:
        self._seen_code: dict[int, object] = {}  # functions and classes; kept, so that their addresses stay theirs
        self._around: list[object] = []
        self._left = _VALUES

    def plain(self, value: object, depth: int) -> Any:
        if value is None or type(value) in (bool, int, float, str):
            return value
        self._left -= 1
        again = None if isinstance(value, (FunctionType, type)) else self._place(value)
        if again is not None:  # within itself
            return {"class": name_of(type(value)), "again": again}
        if depth == 0 or self._left < 0:
            return {"class": name_of(type(value)), UNCOMPARED: "it lies too deep"}
        self._around.append(value)
        try:
            return self._one(value, depth - 1)
        except Exception as error:  # whatever an object of the user's raises when it is asked for its fields
            return {"class": name_of(type(value)), UNCOMPARED: f"it cannot be read ({type(error).__name__})"}
        finally:
            self._around.pop()

    def _place(self, value: object) -> int | None:
        return next((place for place, each in enumerate(self._around) if each is value), None)

    def _one(self, value: Any, depth: int) -> Any:
        code = self._code(value, depth)
        if code is not None:
            return code
        if isinstance(value, (bytes, bytearray)):
            return {"bytes": _hash(bytes(value))}
        if isinstance(value, os.PathLike):
            return os.fspath(value)
        if _is_array(value):
            return self._array(value, depth)
        if type(value) in (list, tuple):
            return [self.plain(each, depth) for each in value]
        if isinstance(value, AnySet):
            return {"set": sorted((self.plain(each, depth) for each in value), key=_in_order)}
        if isinstance(value, Mapping) and type(value).__module__ in ("builtins", "collections", "types"):
            return {"items": {self._key(key, depth): self.plain(each, depth) for key, each in value.items()}}
        return self._object(value, depth)

    def _key(self, key: object, depth: int) -> str:
        return str(key) if isinstance(key, (bool, int, float, str)) else _in_order(self.plain(key, depth))

    # ---- data ----------------------------------------------------------------------------------------------------

    def _array(self, value: Any, depth: int) -> dict[str, Any]:
        kind = {"array": f"{value.dtype}{list(value.shape)}"}
        if getattr(value, "requires_grad", False):
            return kind | {UNCOMPARED: "it is trained"}
        if value.nbytes > _ARRAY_BYTES:
            return kind | {UNCOMPARED: f"it has {value.nbytes} bytes"}
        array = _on_host(value)
        if array.dtype.hasobject:
            return kind | {"content": self.plain(array.tolist(), depth)}
        return kind | {"content": _hash(array.tobytes())}

    def _object(self, value: Any, depth: int) -> dict[str, Any]:
        kind: dict[str, Any] = {"class": name_of(type(value))}
        if any(each.__name__ in _OF_A_RUN for each in type(value).__mro__):
            return kind | {UNCOMPARED: "it changes as a run goes on"}
        if _is_module(value) and any(each.requires_grad for each in value.parameters()):
            return kind | {UNCOMPARED: "its weights are trained"}
        if is_dataclass(value):
            own = {each.name: getattr(value, each.name) for each in fields(value) if each.compare}
        elif getattr(value, "__dict__", None) or (hasattr(value, "__dict__") and _is_users(type(value).__module__)):
            own = {name: each for name, each in sorted(vars(value).items()) if not _is_passing(name)}
        else:
            own = _parts(value)
        found = kind | {"fields": {name: self.plain(each, depth) for name, each in own.items()}}
        builtins: tuple[Any, ...] = (list, tuple, dict, str, int, float)
        for builtin in builtins:  # a class derived from one
            if isinstance(value, builtin):
                found["fields"]["content"] = self.plain(builtin(value), depth)
                break
        methods = self._methods(type(value), depth)
        return found | ({"methods": methods} if methods else {})

    # ---- code ----------------------------------------------------------------------------------------------------

    def _code(self, value: Any, depth: int) -> dict[str, Any] | None:
        if isinstance(value, MethodType):
            return {"of": self.plain(value.__self__, depth), "method": self.plain(value.__func__, depth)}
        if isinstance(value, partial):
            args = self.plain([list(value.args), value.keywords], depth)
            return {"partial": self.plain(value.func, depth), "args": args}
        if isinstance(value, FunctionType):
            return self._function(value, depth)
        if isinstance(value, BuiltinFunctionType):
            function, owner = {"function": f"{value.__module__}.{value.__qualname__}"}, value.__self__
            alone = owner is None or isinstance(owner, ModuleType)
            return function if alone else {"of": self.plain(owner, depth), "method": function}
        if isinstance(value, type):
            methods = self._methods(value, depth)
            return {"type": name_of(value)} | ({"methods": methods} if methods else {})
        if isinstance(value, ModuleType):
            return {"module": value.__name__}
        return None

    def _function(self, function: FunctionType, depth: int) -> dict[str, Any]:
        name = {"function": f"{function.__module__}.{function.__qualname__}"}
        if id(function) in self._seen_code:
            return name
        self._seen_code[id(function)] = function
        closed = [_contents(cell) for cell in function.__closure__ or ()]
        given = [list(function.__defaults__ or ()), dict(function.__kwdefaults__ or {}), closed]
        return name | {
            "python": python_version(),
            "code": _digest(function.__code__),
            "values": self.plain(given, depth),
            "reads": dict(self._reads(function, depth)) if _is_users(function.__module__) else {},
        }

    def _reads(self, function: FunctionType, depth: int) -> Iterator[tuple[str, Any]]:
        """Yield what a function of the user's reads of its module, and of other modules of the user's."""
        names, attributes = _names_read(function.__code__)
        for name in names:
            if name not in function.__globals__:
                continue  # a built-in, or not there yet
            value = function.__globals__[name]
            if isinstance(value, ModuleType):
                if _is_users(value.__name__):
                    inside = [each for each in attributes if each in vars(value)]
                    yield from ((f"{name}.{each}", self._global(vars(value)[each], depth)) for each in inside)
            else:
                yield name, self._global(value, depth)

    def _global(self, value: Any, depth: int) -> Any:
        """Return plain values and code; other objects, such as arguments of a script, change from run to run."""
        if isinstance(value, (FunctionType, type)):
            return self.plain(value, depth) if _is_users(value.__module__) else {"function": name_of(value)}
        plain = (bool, int, float, str, bytes, list, tuple, AnySet, Mapping, partial, BuiltinFunctionType, os.PathLike)
        if value is None or isinstance(value, plain) or _is_array(value):
            return self.plain(value, depth)
        if not _is_users(type(value).__module__) and not hasattr(value, "__dict__"):
            return self.plain(value, depth)  # such as a dtype
        return {"class": name_of(type(value)), UNCOMPARED: "it is an object of a module"}

    def _methods(self, kind: type, depth: int) -> dict[str, Any]:
        """Return the code of a class, as far as it is the user's."""
        found: dict[str, Any] = {}
        for each in reversed(kind.__mro__):
            if not _is_users(each.__module__) or id(each) in self._seen_code:
                continue
            self._seen_code[id(each)] = each
            for name, member in sorted(vars(each).items()):
                function = getattr(member, "__func__", getattr(member, "fget", member))  # of a method, of a property
                plain = type(function) in (bool, int, float, str, list, tuple, dict, set) or _is_array(function)
                if isinstance(function, FunctionType) or (plain and not name.startswith("__")):
                    found[name] = self.plain(function, depth)
        return found


def _parts(value: object) -> dict[str, Any]:
    """Return what a copy of an object without fields is made of."""
    made = value.__reduce_ex__(2)
    if isinstance(made, str):
        return {"name": made}
    arguments = [each for each in made[1] if each is not type(value)]
    state = made[2] if len(made) > 2 else None
    return {name: each for name, each in (("arguments", arguments), ("state", state)) if each}


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def _in_order(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


def _is_array(value: Any) -> bool:
    """Whether a value is a tensor or an array, also a NumPy number: this package's core does not import torch."""
    return all(hasattr(value, name) for name in ("dtype", "shape", "nbytes", "tolist")) and not isinstance(value, type)


def _on_host(value: Any) -> Any:
    """Return a NumPy array or number with the values of a tensor or an array; exact also for types that NumPy lacks."""
    if not hasattr(value, "detach"):
        return value
    tensor = value.detach().cpu()
    try:
        return tensor.numpy()
    except TypeError:  # bfloat16 and narrower ones
        return tensor.float().numpy()


def _is_module(value: Any) -> bool:
    return hasattr(value, "_parameters") and hasattr(value, "_buffers") and hasattr(value, "_modules")


def _is_passing(name: str) -> bool:
    return name in _PASSING or name.endswith(("_hooks", "_hooks_with_kwargs", "_hooks_always_called"))


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


def _names_read(code: CodeType) -> tuple[list[str], list[str]]:
    """Return the names that code reads of its module, and those of attributes, also in functions within it."""
    names, attributes = set(), set()
    for each in dis.get_instructions(code):
        if each.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
            names.add(str(each.argval))
        elif each.opname in ("LOAD_ATTR", "LOAD_METHOD"):
            attributes.add(str(each.argval))
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            inner = _names_read(constant)
            names.update(inner[0])
            attributes.update(inner[1])
    return sorted(names), sorted(attributes)


@cache
def _installed() -> tuple[str, ...]:
    paths = [sysconfig.get_path(each) for each in ("stdlib", "platstdlib", "purelib", "platlib")]
    return tuple(str(Path(each).resolve()) + os.sep for each in [*paths, site.getusersitepackages()] if each)


def _is_users(module: str | None) -> bool:
    """Whether a module is the user's own: a script, or one that no package manager has installed."""
    if module is None or module.partition(".")[0] in ("lightning_comm", "builtins"):
        return False
    if module.partition(".")[0] in sys.builtin_module_names:
        return False
    file = getattr(sys.modules.get(module), "__file__", None)
    if file is None:
        return True
    path = Path(file).resolve()
    # the folders of this Python, and those that another one has lent by a `.pth` file or PYTHONPATH
    return not (str(path).startswith(_installed()) or {"site-packages", "dist-packages"} & set(path.parts))


def name_of(kind: type | Callable[..., Any]) -> str:
    """Return the name of a class, with its module if that is not this package's."""
    own = kind.__module__ is not None and kind.__module__.partition(".")[0] == "lightning_comm"
    return kind.__qualname__ if own else f"{kind.__module__}.{kind.__qualname__}"
