"""The moments at which layers of an emulated device are done: shares of a pass, from the work of those that ran.

Numbers only. What ran is recorded by :mod:`lightning_comm.lab.device.pacer` in one step, and what is planned from it
holds for all that follow.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

CallKey = tuple[str, int]  # a layer, and which of its calls within the pass it is


class Call(NamedTuple):
    """One call of a layer.

    Args:
        layer: Its name within the module; ``""`` is the module itself.
        begun_after: How many calls were over when it began. Less than its own place where calls are nested.
        elements: Entries of its output.
        positions: How often each of its weights is multiplied; 0 where weights are looked up, not multiplied.

    """

    layer: str
    begun_after: int
    elements: int
    positions: int


class Weights(NamedTuple):
    """One parameter.

    Args:
        layers: The modules that own it; several where it is tied.
        matrix_entries: Its entries, or 0 if it has fewer than two dimensions.

    """

    layers: tuple[str, ...]
    matrix_entries: int


class Pass(NamedTuple):
    """What was seen of a forward pass and of the backward pass through it: calls as they ended, and gradients."""

    calls: list[Call]
    gradients: set[str]


@dataclass(frozen=True)
class PassPlan:
    """When the parts of a pass are done.

    Args:
        share: This pass's share of all passes of a step, by work.
        forward: For each call the share of the forward pass's time after which it is done.
        backward: For each parameter the share of the backward pass's time after which its gradient is ready.

    """

    share: float
    forward: dict[CallKey, float]
    backward: dict[str, float]


def plan_step(passes: Sequence[Pass], parameters: Mapping[str, Weights]) -> list[PassPlan]:
    """Plan the passes of a step by the work in them.

    The work of a call is its multiply-adds: the entries of its weight matrices times the positions they are applied
    to, plus one for each entry of its output. Layers without parameters take no time of their own. The backward pass
    goes through the same work in the reverse order: a gradient is ready when the backward of the call that used the
    parameter first is done. The last gradient of all is ready at the end, also where the first layers are frozen.

    Args:
        passes: What was seen.
        parameters: By name, all that the module has.

    Example:
        >>> calls = [Call("first", 0, elements=0, positions=1), Call("second", 1, elements=0, positions=1)]
        >>> parameters = {"first.weight": Weights(("first",), 30), "second.weight": Weights(("second",), 10)}
        >>> (plan,) = plan_step([Pass(calls, set(parameters))], parameters)
        >>> plan.forward
        {('first', 0): 0.75, ('second', 0): 1.0}
        >>> sorted(plan.backward.items())
        [('first.weight', 1.0), ('second.weight', 0.25)]

    """
    works = [_done_after(each, parameters) for each in passes]
    total = sum(done[-1] for done in works)
    return [
        _plan_pass(each, done, done[-1] / total if total else 1 / len(passes), parameters)
        for each, done in zip(passes, works, strict=True)
    ]


def _done_after(seen: Pass, parameters: Mapping[str, Weights]) -> list[int]:
    """Return the work that is done after none of the calls, after the first, and so on."""
    ran = {call.layer for call in seen.calls}
    # a module around others only holds parameters for them, such as an embedding of positions
    around = {layer for layer in ran if any(other != layer and _is_within(other, layer) for other in ran)}
    entries: Counter[str] = Counter()
    for weights in parameters.values():
        for layer in _users(weights, ran):
            entries[layer] += weights.matrix_entries
    done = [0]
    for call in seen.calls:
        work = 0 if call.layer in around else call.elements + entries[call.layer] * call.positions
        done.append(done[-1] + work)
    return done


def _plan_pass(seen: Pass, done: list[int], share: float, parameters: Mapping[str, Weights]) -> PassPlan:
    total = done[-1] or 1
    forward: dict[CallKey, float] = {}
    begins: dict[str, float] = {}
    nth: Counter[str] = Counter()
    for place, call in enumerate(seen.calls):
        forward[call.layer, nth[call.layer]] = done[place + 1] / total
        nth[call.layer] += 1
        begins[call.layer] = min(begins.get(call.layer, 1.0), done[call.begun_after] / total)
    if seen.calls:
        last = seen.calls[-1].layer
        forward[last, nth[last] - 1] = 1.0  # also where no call has any work
    # what is used outside of any layer's forward may be used anywhere, so its gradient comes last
    first_use = {
        name: min((begins[layer] for layer in _users(parameters[name], begins)), default=0.0) for name in seen.gradients
    }
    longest = 1 - min(first_use.values(), default=0.0)
    backward = {name: (1 - use) / longest if longest else 1.0 for name, use in first_use.items()}
    return PassPlan(share, forward, backward)


def _users(weights: Weights, ran: Iterable[str]) -> set[str]:
    """Return the layers that used a parameter: its owners, or, where an owner did not run, what it lies within.

    ``nn.MultiheadAttention``, for one, uses the weights of its output layer without calling that layer.
    """
    ran = set(ran)
    users = set()
    for layer in weights.layers:
        while layer and layer not in ran:
            layer = layer.rpartition(".")[0]
        if layer in ran:
            users.add(layer)
    return users


def _is_within(inner: str, outer: str) -> bool:
    return outer == "" or inner.startswith(outer + ".")
