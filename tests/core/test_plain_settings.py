"""Settings as plain fields: equal settings are equal there, others name the field that differs."""

import json
import os
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import pytest

from lightning_comm.core import plain_settings
from lightning_comm.core.plain_settings import difference, not_compared, plain, shown


@dataclass(frozen=True)
class Inner:
    share: float = 0.5
    names: tuple[str, ...] = ()


@dataclass(frozen=True)
class Outer:
    """Its fields have the names that plain data has for functions."""

    inner: Inner = field(default_factory=Inner)
    function: object = None
    code: object = None
    call: object = field(default=None, repr=False)
    path: object = None
    _cache: list = field(default_factory=list, compare=False)


def written(source, name="call", **names):
    """A function as a script defines it, wherever its lines are."""
    space = {"__name__": "script", **names}
    exec(source, space)
    return space[name]


def through_a_file(setting):
    return json.loads(json.dumps(plain(setting)))


def factor(times):
    return lambda value: value * times


SAME = "def call(x):\n    return x + 1\n"
PAIRS = {
    "a number": (Outer(Inner(0.1)), Outer(Inner(0.2)), "`inner.share` was 0.1 and is 0.2"),
    "a list": (Outer(Inner(names=("a",))), Outer(Inner(names=("b",))), "`inner.names[0]` was 'a' and is 'b'"),
    "a longer list": (Outer(Inner(names=("a",))), Outer(Inner(names=("a", "b"))), "`inner.names` was ['a']"),
    "a class": (Outer(Inner()), Outer(Outer()), "`inner` was"),
    "a field named code": (Outer(code=1), Outer(code=2), "`code` was 1 and is 2"),
    "a field named function": (
        Outer(function=written(SAME)),
        Outer(function=written("def call(x):\n    return x - 1\n")),
        "`function` is script.call, whose code is another one now",
    ),
    "a mapping": (Outer(path={"code": 1}), Outer(path={"code": 2}), "`path.code` was 1 and is 2"),
    "a path": (Outer(path=Path("a")), Outer(path=Path("b")), "`path` was 'a' and is 'b'"),
    "a function": (Outer(call=os.getcwd), Outer(call=os.getpid), "`call` was posix.getcwd and is posix.getpid"),
    "no function": (Outer(call=None), Outer(call=factor(1)), "`call` was None and is"),
    "a body": (
        Outer(call=written(SAME)),
        Outer(call=written("def call(x):\n    return x - 1\n")),
        "`call` is script.call, whose code is another one now",
    ),
    "a constant": (
        Outer(call=written(SAME)),
        Outer(call=written("def call(x):\n    return x + 2\n")),
        "`call` is script.call, whose code is another one now",
    ),
    "a name": (
        Outer(call=written("def call(x):\n    return x.a\n")),
        Outer(call=written("def call(x):\n    return x.b\n")),
        "whose code is another one now",
    ),
    "a function within": (
        Outer(call=written("def call(x):\n    return [each + 1 for each in x]\n")),
        Outer(call=written("def call(x):\n    return [each + 2 for each in x]\n")),
        "whose code is another one now",
    ),
    "a default": (
        Outer(call=written("def call(x, y=1):\n    return x\n")),
        Outer(call=written("def call(x, y=2):\n    return x\n")),
        "whose defaults or closed-over values differ",
    ),
    "what is closed over": (Outer(call=factor(2)), Outer(call=factor(3)), "closed-over values differ"),
    "an argument of a partial": (
        Outer(call=partial(written(SAME), 1)),
        Outer(call=partial(written(SAME), 2)),
        "`call.args[0][0]` was 1 and is 2",
    ),
    "the owner of a method": (
        Outer(call=Path("a").exists),
        Outer(call=Path("b").exists),
        "`call.of` was 'a' and is 'b'",
    ),
}


@pytest.mark.parametrize("what", PAIRS)
def test_a_difference_is_named_by_its_field_after_a_way_through_a_file(what):
    before, after, said = PAIRS[what]
    assert said in (difference(through_a_file(before), after) or "no difference")


@pytest.mark.parametrize("what", PAIRS)
def test_a_setting_is_no_other_than_itself(what):
    for setting in PAIRS[what][:2]:
        assert difference(through_a_file(setting), setting) is None


def test_a_function_is_the_same_wherever_its_lines_are():
    moved = written("\n\n\n" + SAME)
    assert moved.__code__.co_firstlineno != written(SAME).__code__.co_firstlineno
    assert difference(plain(written(SAME)), moved) is None


def test_a_field_that_does_not_count_for_equality_is_left_out():
    assert difference(plain(Outer(_cache=[1])), Outer(_cache=[2])) is None


def test_code_of_another_python_is_said_not_to_be_comparable():
    saved = plain(Outer(call=factor(2)))
    saved["fields"]["call"]["python"] = "3.1"
    found = difference(saved, Outer(call=factor(2)))
    assert [word for word in ("`call`", "Python 3.1 ", "cannot be compared") if word not in found] == []


def test_text_of_an_earlier_version_is_compared_as_far_as_it_goes():
    old = repr(Outer(call=factor(2)))
    assert difference(old, Outer(call=factor(3))) is None
    said = not_compared(old, Outer(call=factor(3)))
    assert [word for word in ("earlier version", "factor.<locals>.<lambda>") if word not in said] == []
    assert not_compared(old, Outer()) is None
    assert not_compared(plain(Outer(call=factor(2))), Outer(call=factor(2))) is None
    assert "share=0.5" in difference(old, Outer(Inner(0.7)))
    assert shown(old) == old


def test_a_setting_is_shown_with_its_fields():
    assert shown(plain(Outer(Inner(0.25), call=os.getcwd))).endswith(
        "Outer(inner=" + shown(plain(Inner(0.25))) + ", function=None, code=None, call=posix.getcwd, path=None)"
    )


def test_values_within_each_other_end_somewhere():
    endless: list = []
    endless.append(endless)
    assert json.dumps(plain(endless)).count("[") == plain_settings._DEPTH


def test_other_values_are_known_by_their_class():
    assert plain(object()) == {"class": "builtins.object", "fields": {}}
