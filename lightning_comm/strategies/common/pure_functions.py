"""A check that a function has no side effects and no state, so that it may be called ahead and returns the same later.

It reads the compiled code and the values that the function refers to, and calls nothing. It is conservative: a function
that it cannot read, such as one with an unknown instruction of a newer Python, does not pass.
"""

import builtins
import dis
import functools
import inspect
import math
import sys
import types
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

_BUILTINS = (abs, all, any, bool, divmod, float, int, len, max, min, pow, range, round, sum)
_OF_ARRAYS = frozenset(
    (
        *("pi", "e", "inf", "abs", "ceil", "clip", "clamp", "cos", "cosh", "exp", "exp2", "expm1", "floor", "interp"),
        *("log", "log10", "log1p", "log2", "maximum", "minimum", "pow", "power", "sin", "sinh", "sqrt", "square"),
        *("tan", "tanh", "float32", "float64", "int32", "int64"),
    )
)
_FROM_MODULES = {"math": frozenset(vars(math)), "numpy": _OF_ARRAYS, "torch": _OF_ARRAYS}
_CONSTANTS = (int, float, complex, str, bool, type(None), range)
_INSTRUCTIONS = (  # beginnings of their names, from Python 3.10 on: arithmetic, local names, jumps, and calls
    *("BINARY_", "INPLACE_", "UNARY_", "COMPARE_OP", "IS_OP", "CONTAINS_OP", "TO_BOOL", "CALL", "PRECALL", "KW_NAMES"),
    *("LOAD_CONST", "LOAD_FAST", "LOAD_SMALL_INT", "LOAD_GLOBAL", "LOAD_DEREF", "LOAD_CLOSURE", "LOAD_ATTR"),
    *("LOAD_METHOD", "STORE_FAST", "STORE_DEREF", "MAKE_CELL", "MAKE_FUNCTION", "SET_FUNCTION_ATTRIBUTE"),
    *("COPY", "SWAP", "ROT_", "DUP_TOP", "POP_TOP", "POP_ITER", "PUSH_NULL", "NOP", "NOT_TAKEN", "RESUME", "CACHE"),
    *("JUMP", "POP_JUMP", "FOR_ITER", "GET_ITER", "END_FOR", "RETURN_", "YIELD_VALUE", "GEN_START", "EXTENDED_ARG"),
    *("BUILD_TUPLE", "BUILD_LIST", "BUILD_SLICE", "LIST_APPEND", "LIST_EXTEND", "LIST_TO_TUPLE", "UNPACK_SEQUENCE"),
)
_LEFT_OUT = ("CALL_INTRINSIC", "CALL_FUNCTION_EX")


def why_not_pure(function: object) -> str | None:
    """Return why a function may have side effects or state, or ``None`` if it certainly has neither.

    Certain are plain functions, and `functools.partial` of one, that compute with numbers, strings and tuples of these,
    call builtins of numbers and functions of the modules `math`, `numpy` and `torch`, or other such functions.

    Example:
        >>> table = [1.0, 0.1]
        >>> why_not_pure(lambda step: 0.9**step), why_not_pure(lambda step: table.pop())
        (None, '<lambda> reads `table`, a list')

    """
    return next(_problems(function, set()), None)


_CHANGES = ("STORE_GLOBAL", "STORE_ATTR", "STORE_SUBSCR", "DELETE_")
_CHANGING = frozenset(("append", "add", "extend", "insert", "pop", "popleft", "remove", "send", "setdefault", "update"))


def what_it_changes(function: object) -> str | None:
    """Return what a call of a function certainly changes or uses up, or ``None``.

    The opposite of :func:`why_not_pure`: ``None`` does not prove that there is nothing.

    Example:
        >>> table, factors = [1.0, 0.1], iter([1.0, 0.1])
        >>> what_it_changes(lambda step: table[step]), what_it_changes(lambda step: next(factors))
        (None, '<lambda> uses up `factors`, a list_iterator')

    """
    if isinstance(function, functools.partial):
        held = (*function.args, *function.keywords.values())
        used_up = [f"partial uses up a {type(each).__name__}" for each in held if isinstance(each, Iterator)]
        return used_up[0] if used_up else what_it_changes(function.func)
    plain = getattr(function, "__func__", function)
    if not isinstance(plain, types.FunctionType):
        plain = vars(type(function)).get("__call__")
    return next(_changes(plain), None) if isinstance(plain, types.FunctionType) else None


def _changes(function: types.FunctionType) -> Iterator[str]:
    code, name = function.__code__, function.__name__
    outer = inspect.getclosurevars(function)
    for key, value in {**outer.globals, **outer.nonlocals}.items():
        if isinstance(value, Iterator):
            yield f"{name} uses up `{key}`, a {type(value).__name__}"
    for each in _instructions(code):
        of_outer = each.opname == "STORE_DEREF" and each.argval in code.co_freevars
        if of_outer or each.opname.startswith(_CHANGES):
            yield f"{name} changes {f'`{each.argval}`' if isinstance(each.argval, str) else 'an entry'}"
        if each.opname in ("LOAD_ATTR", "LOAD_METHOD") and each.argval in _CHANGING:
            yield f"{name} calls `{each.argval}`"


def _problems(function: object, seen: set[int]) -> Iterator[str]:
    if id(function) in seen:
        return
    seen.add(id(function))
    if type(function) is functools.partial:
        yield from _problems(function.func, seen)
        held: dict[Any, object] = {**dict(enumerate(function.args)), **function.keywords}
        yield from _held("partial", "holds", held, seen)
    elif type(function) is types.FunctionType:
        yield from _problems_of_plain(function, seen)
    else:
        yield f"{type(function).__name__} is no plain function"


def _problems_of_plain(function: types.FunctionType, seen: set[int]) -> Iterator[str]:
    name = function.__name__
    if inspect.isgeneratorfunction(function) or inspect.iscoroutinefunction(function):
        yield f"{name} is a generator or a coroutine"
    count, defaults = function.__code__.co_argcount, function.__defaults__ or ()
    named = dict(zip(function.__code__.co_varnames[count - len(defaults) : count], defaults, strict=True))
    yield from _held(name, "has by default", named | (function.__kwdefaults__ or {}), seen)
    cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
    names: dict[str, Any] = {}
    for key, cell in cells:
        try:
            names[key] = cell.cell_contents
        except ValueError:
            yield f"{name} reads `{key}`, which has no value yet"
    yield from _held(name, "reads", names, seen)
    yield from _problems_of_code(function.__code__, function.__globals__, names, seen)


def _held(where: str, does: str, values: Mapping[Any, object], seen: set[int]) -> Iterator[str]:
    for key, value in values.items():
        known = _is_constant(value) or _is_module(value) or any(value is allowed for allowed in _BUILTINS)
        if not known and any(True for _ in _problems(value, seen)):
            yield f"{where} {does} `{key}`, a {type(value).__name__}"


def _is_constant(value: object) -> bool:
    if type(value) is tuple:
        return all(map(_is_constant, value))
    of_numpy = isinstance(value, (np.number, np.bool_)) and type(value).__module__ == "numpy"
    return type(value) in _CONSTANTS or of_numpy


def _is_module(value: object) -> bool:
    name = getattr(value, "__name__", None) if isinstance(value, types.ModuleType) else None
    return name in _FROM_MODULES and sys.modules.get(str(name)) is value


def _problems_of_code(
    code: types.CodeType, names: dict[str, Any], closure: Mapping[str, object], seen: set[int]
) -> Iterator[str]:
    top: object = None  # of the stack, where that is a name just read from outside of the function
    for each in _instructions(code):
        before, top = top, None
        if each.opname in ("LOAD_ATTR", "LOAD_METHOD"):
            if each.is_jump_target or not _gives(before, each.argval):
                yield f"{code.co_name} looks up the attribute `{each.argval}`"
        elif each.opname == "LOAD_GLOBAL":
            top = names.get(each.argval, getattr(builtins, each.argval, None))
            yield from _held(code.co_name, "reads", {each.argval: top}, seen)
        elif each.opname == "LOAD_DEREF":
            top = closure.get(each.argval)  # what it holds has been checked
        elif each.opname == "STORE_DEREF" and each.argval in code.co_freevars:
            yield f"{code.co_name} changes `{each.argval}`"
        elif not each.opname.startswith(_INSTRUCTIONS) or each.opname.startswith(_LEFT_OUT):
            yield f"{code.co_name} is not plain arithmetic ({each.opname})"
    for inner in code.co_consts:
        if isinstance(inner, types.CodeType):
            yield from _problems_of_code(inner, names, closure, seen)


def _gives(value: object, name: str) -> bool:
    """Whether this is a module, and the name one of its functions and numbers that have no state."""
    return isinstance(value, types.ModuleType) and _is_module(value) and name in _FROM_MODULES[value.__name__]


def _instructions(code: types.CodeType) -> Iterable[dis.Instruction]:
    """Yield what is carried out, without what only widens the argument of the next instruction."""
    return (each for each in dis.get_instructions(code) if each.opname not in ("CACHE", "EXTENDED_ARG"))
