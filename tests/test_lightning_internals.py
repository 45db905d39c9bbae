"""Each private name of Lightning that we touch is still there; a release that removes one fails here, by name."""

import ast
import inspect
import textwrap

import pytest

from lightning_comm import lightning_internals
from lightning_comm.lightning_internals import INTERNALS, Patches


@pytest.mark.parametrize(
    "internal", INTERNALS, ids=lambda internal: f"{internal.owner.rsplit('.', 1)[-1]}.{internal.name}"
)
def test_lightning_still_has(internal):
    owner = internal.find_owner()
    if hasattr(owner, internal.name):
        return
    assigned = {
        target.attr
        for base in getattr(owner, "__mro__", [owner])
        if base.__module__.startswith(("lightning", "torch.nn.parallel", "torch.optim"))
        for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(base))))
        if isinstance(node, (ast.Assign, ast.AnnAssign))
        for target in _flat([node.target] if isinstance(node, ast.AnnAssign) else node.targets)
        if isinstance(target, ast.Attribute)
    }
    assert internal.name in assigned, f"{internal.owner} has lost {internal.name}, needed for: {internal.why}"


def _flat(targets):
    for target in targets:
        yield from _flat(target.elts) if isinstance(target, ast.Tuple) else [target]


def test_every_private_name_that_the_module_uses_is_listed():
    source = inspect.getsource(lightning_internals)
    used = {
        node.attr
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__")
    } - {"_replaced"}
    assert used - {internal.name for internal in INTERNALS} == set()


def test_no_other_module_reads_private_names_of_lightning():
    listed = {internal.name for internal in INTERNALS if internal.name.startswith("_")}
    from pathlib import Path

    package = Path(lightning_internals.__file__).parent
    offenders = {}
    for path in package.rglob("*.py"):
        if path.name == "lightning_internals.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and node.attr in listed and not _is_self(node.value):
                offenders.setdefault(path.name, set()).add(node.attr)
    assert offenders == {}


def _is_self(node):
    return isinstance(node, ast.Name) and node.id in ("self", "cls")


class _Thing:
    def method(self):
        return "class"


def test_patches_put_back_methods_of_the_class_and_attributes_of_the_instance():
    thing = _Thing()
    thing.own = "own"
    patches = Patches()
    patches.set(thing, "method", lambda: "patched")
    patches.set(thing, "method", lambda: "twice")
    patches.set(thing, "own", "patched")
    assert (thing.method(), thing.own) == ("twice", "patched")
    patches.undo()
    assert (thing.method(), thing.own) == ("class", "own")
    assert vars(thing) == {"own": "own"}
