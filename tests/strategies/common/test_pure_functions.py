"""Functions that may be called ahead are told from those with effects or state, without calling either."""

import functools
import math
import random

import numpy as np
import pytest
import torch

from lightning_comm.strategies.common.pure_functions import what_it_changes, why_not_pure

TOTAL, TABLE, ITERATOR = 10, [1.0, 0.1], iter([1.0, 0.1])
CALLS = 0


def warm_up_then_cosine(step, *, warmup_steps, total_steps=TOTAL):
    if step < warmup_steps:
        return float(step) / max(1, warmup_steps)
    done = (step - warmup_steps) / (total_steps - warmup_steps)
    return max(0.0, 0.5 * (1.0 + math.cos(math.pi * done)))


def counts_in_a_global(step):
    global CALLS
    CALLS += 1
    return 1.0


def counts_in_its_default(step, seen=[]):  # noqa: B006
    seen.append(step)
    return 1.0


def changes_what_it_is_given_by_another_name(step):
    same = TABLE
    same += [step]
    return 1.0


def takes_a_module_by_another_name(step):
    chosen = random if step else math
    return chosen.random()


def closures():
    calls, total = 0, 5

    def counts(step):
        nonlocal calls
        calls += 1
        return calls

    return counts, lambda step: 0.1 ** sum(step >= part * total for part in (3, 6))


COUNTS, DROPS = closures()


class Stateful:
    def __call__(self, step):
        self.calls = step
        return 1.0

    def method(self, step):
        return 1.0


PURE = {
    "a lambda": lambda step: 0.9**step,
    "a partial": functools.partial(warm_up_then_cosine, warmup_steps=3),
    "numbers of the closure, in a generator": DROPS,
    "a global number, and numpy": lambda step: np.cos(step * np.pi / TOTAL),
    "a function that calls another": lambda step: warm_up_then_cosine(step, warmup_steps=2) * 0.5,
    "a choice": lambda step: 1.0 if step < 5 else (0.1 if step < 9 else 0.01),
    "a tuple": lambda step: (1.0, 0.1, 0.01)[min(step // 3, 2)],
}
NOT_PURE = {
    "an iterator": (lambda step: next(ITERATOR), "`next`"),
    "a list": (lambda step: TABLE[step], "`TABLE`, a list"),
    "a counter in a closure": (COUNTS, "changes `calls`"),
    "a counter in a global": (counts_in_a_global, "STORE_GLOBAL"),
    "a default that grows": (counts_in_its_default, "`seen`, a list"),
    "another name": (changes_what_it_is_given_by_another_name, "`TABLE`, a list"),
    "another module": (takes_a_module_by_another_name, "`random`, a module"),
    "random numbers of numpy": (lambda step: np.random.rand(), "attribute `random`"),
    "random numbers of torch": (lambda step: torch.rand(1), "attribute `rand`"),
    "a file": (lambda step: np.save("rates", step), "attribute `save`"),
    "a message": (lambda step: print(step), "`print`"),
    "a partial of state": (functools.partial(warm_up_then_cosine, warmup_steps=TABLE), "`warmup_steps`, a list"),
    "a callable object": (Stateful(), "Stateful"),
    "a method": (Stateful().method, "method"),
    "a cache": (functools.lru_cache(warm_up_then_cosine), "_lru_cache_wrapper"),
    "evaluated code": (lambda step: eval("CALLS"), "`eval`"),
    "an import": (lambda step: __import__("os").getpid(), "`__import__`"),
}


@pytest.mark.parametrize("name", PURE)
def test_a_function_of_numbers_is_pure(name):
    assert why_not_pure(PURE[name]) is None


@pytest.mark.parametrize("name", NOT_PURE)
def test_a_function_with_effects_or_state_is_not_pure_and_the_reason_names_them(name):
    function, reason = NOT_PURE[name]
    assert reason in why_not_pure(function)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("an iterator", "uses up `ITERATOR`"),
        ("a counter in a closure", "changes `calls`"),
        ("a counter in a global", "changes `CALLS`"),
        ("a default that grows", "calls `append`"),
        ("a callable object", "changes `calls`"),
        ("a list", None),
        ("a method", None),
    ],
)
def test_what_a_call_changes_is_named_where_it_is_seen(name, reason):
    found = what_it_changes(NOT_PURE[name][0])
    assert found is None if reason is None else reason in found


@pytest.mark.parametrize("name", PURE)
def test_a_function_of_numbers_changes_nothing(name):
    assert what_it_changes(PURE[name]) is None
