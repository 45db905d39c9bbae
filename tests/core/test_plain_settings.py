"""Settings as plain fields: equal settings are equal there, others name the field that differs."""

import json
import os
import types
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from lightning_comm.core import plain_values
from lightning_comm.core.plain_settings import difference, not_compared, plain, shown
from lightning_comm.core.plain_values import python_version


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


def module_with(value):
    module = types.ModuleType("own")
    module.T = value
    return module


class Caller:
    def __init__(self, field):
        self.field = field

    def __call__(self, x):
        return self.field + self.helped(x)

    def helped(self, x):
        return x


class Other(Caller):
    def helped(self, x):
        return x + 1


Other.__qualname__ = "Caller"


class Slots:
    __slots__ = ("field",)

    def __init__(self, field):
        self.field = field


SAME = "def call(x):\n    return x + 1\n"
READS = "def call(x):\n    return helper(x) > T\n"
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
    "a method that a callable object uses": (
        Outer(call=Caller(1)),
        Outer(call=Other(1)),
        "whose class is another one now: `helped`",
    ),
    "a field of a callable object": (Outer(call=Caller(1)), Outer(call=Caller(2)), "`call.field` was 1 and is 2"),
    "a field in a slot": (Outer(call=Slots(1)), Outer(call=Slots(2)), "`call.state[1].field` was 1 and is 2"),
    "an array": (
        Outer(call=Caller(np.zeros(3))),
        Outer(call=Caller(np.ones(3))),
        "`call.field` is an array float64[3], whose values are others now",
    ),
    "the type of an array": (
        Outer(call=Caller(np.zeros(3, np.int32))),
        Outer(call=Caller(np.zeros(3))),
        "`call.field` was an array int32[3] and is an array float64[3]",
    ),
    "an array of objects": (
        Outer(call=np.array([None, "a"])),
        Outer(call=np.array([None, "b"])),
        "`call` is an array object[2], whose values are others now",
    ),
    "a closed-over array": (Outer(call=factor(np.zeros(3))), Outer(call=factor(np.ones(3))), "closed-over values"),
    "a closed-over set": (Outer(call=factor({"a"})), Outer(call=factor({"b"})), "closed-over values"),
    "bytes": (Outer(call=factor(b"a")), Outer(call=factor(b"b")), "closed-over values"),
    "a complex number": (Outer(call=1j), Outer(call=2j), "`call.arguments[1]` was 1.0 and is 2.0"),
    "what the module has": (
        Outer(call=written(READS, T=1, helper=written(SAME))),
        Outer(call=written(READS, T=2, helper=written(SAME))),
        "what it reads has changed: `T` was 1 and is 2",
    ),
    "a helper": (
        Outer(call=written(READS, T=1, helper=written(SAME))),
        Outer(call=written(READS, T=1, helper=written(SAME.replace("1", "2")))),
        "what it reads has changed: `helper` is script.call, whose code is another one now",
    ),
    "a class that is made": (
        Outer(call=written(READS, T=1, helper=Caller)),
        Outer(call=written(READS, T=1, helper=Other)),
        "whose class is another one now: `helped`",
    ),
    "a constant within": (
        Outer(call=written("def call(x):\n    return [T for _ in x]\n", T=1)),
        Outer(call=written("def call(x):\n    return [T for _ in x]\n", T=2)),
        "`T` was 1 and is 2",
    ),
    "a constant of a module of the user's": (
        Outer(call=written("def call(x):\n    return own.T\n", own=module_with(1))),
        Outer(call=written("def call(x):\n    return own.T\n", own=module_with(2))),
        "`own.T` was 1 and is 2",
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


def test_code_of_another_python_is_no_other_and_is_said_not_to_be_compared():
    saved = plain(Outer(call=factor(2), code=Caller(1)))
    method = saved["fields"]["code"]["methods"]["__call__"]
    saved["fields"]["call"] |= {"python": "3.1", "code": "as that one compiles it"}
    method |= {"python": "3.1", "code": "as that one compiles it"}
    now = Outer(call=factor(2), code=Caller(1))
    assert difference(saved, now) is None
    found = not_compared(saved, now)
    assert [word for word in ("`call`", "`code.__call__`", "Python 3.1 ", python_version()) if word not in found] == []
    assert "`call` is" in difference(saved, Outer(call=factor(3), code=Caller(1)))
    assert "`code.field` was 1 and is 2" in difference(saved, Outer(call=factor(2), code=Caller(2)))


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
    assert plain(endless) == [{"class": "builtins.list", "again": 0}]
    deep: list = []
    for _ in range(2 * plain_values.DEPTH):
        deep = [deep]
    assert json.dumps(plain(deep)).count("[") == plain_values.DEPTH
    assert "too deep" in not_compared(plain(deep), deep)
    assert "too deep" in not_compared(plain([[]] * 30_000), [[]] * 30_000)


def test_other_values_are_known_by_their_class():
    assert plain(object()) == {"class": "builtins.object", "fields": {}}


def test_a_set_is_the_same_in_whatever_order_it_is_kept():
    kept = [Outer(call=factor(names)) for names in ({"a", "b", "c"}, {"c", "b", "a"}, frozenset("cab"))]
    assert all(plain(each) == plain(kept[0]) for each in kept)


def test_a_function_that_calls_itself_and_one_that_is_read_twice_are_gone_through_once():
    source = "def call(x):\n    return call(x) + helper(x) + other(x)\n"
    helper = written(SAME)
    found = plain(written(source, helper=helper, other=helper))
    assert found["reads"]["call"] == {"function": "script.call"}
    assert found["reads"]["other"] == {"function": "script.call"}
    assert found["reads"]["helper"]["code"]


class Restless:
    def __reduce_ex__(self, version):
        raise OSError("no")

    __slots__ = ()


def test_what_cannot_be_compared_is_no_other_and_is_said_with_its_reason():
    class Trainer:
        """As Lightning's: it changes as a run goes on."""

    reads = "def call(x):\n    return settings.T\n"
    for one, two, said in (
        (factor(Restless()), factor(Restless()), "cannot be read (OSError)"),
        (factor(Trainer()), factor(Trainer()), "changes as a run goes on"),
        (written(reads, settings=Caller(1)), written(reads, settings=Caller(2)), "it is an object of a module"),
    ):
        assert difference(through_a_file(Outer(call=one)), Outer(call=two)) is None
        assert said in not_compared(through_a_file(Outer(call=one)), Outer(call=two))


def test_what_installed_packages_do_is_known_by_name():
    found = plain(written("def call(x):\n    return np.sort(json.dumps(x)), ndarray(x)\n", np=np, ndarray=np.ndarray))
    assert found["reads"] == {"ndarray": {"function": "numpy.ndarray"}}
    assert not_compared(found, written("def call(x):\n    return np.sort(x)\n", np=np)) is None


def test_not_a_number_is_no_other():
    assert difference(plain(float("nan")), float("nan")) is None
