"""Each private name of Lightning that we touch is still there; a release that removes one fails here, by name."""

import ast
import inspect
import textwrap
from pathlib import Path

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


PACKAGE = Path(lightning_internals.__file__).parent.parent
OWN = Path(lightning_internals.__file__).parent


def _modules():
    for path in PACKAGE.rglob("*.py"):
        yield path.relative_to(PACKAGE).as_posix(), ast.parse(path.read_text()), OWN in path.parents


def test_every_private_name_that_the_package_uses_is_listed():
    used = {
        node.attr
        for _, tree, own in _modules()
        for node in ast.walk(tree)
        if own and isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__")
    } - {"_replaced"}
    assert len(used) > 20
    assert used - {internal.name for internal in INTERNALS} == set()


def _touched_elsewhere():
    """Yield where a private name that is listed is touched outside of the package that lists it, and which."""
    listed = {internal.name for internal in INTERNALS if internal.name.startswith("_")}
    for path, tree, own in _modules():
        for node in () if own else ast.walk(tree):
            if isinstance(node, ast.Attribute) and node.attr in listed and not _is_self(node.value):
                yield path, node.attr


def test_no_other_module_reads_private_names_but_those_that_are_listed_for_it():
    allowed = {}
    for internal in INTERNALS:
        allowed.setdefault(internal.name, []).extend(internal.elsewhere)
    touched = set(_touched_elsewhere())
    assert {(path, name) for path, name in touched if not path.startswith(tuple(allowed[name]))} == set()


def test_private_modules_of_torch_are_imported_where_that_is_listed_and_nowhere_else():
    listed = {}
    for internal in INTERNALS:
        for name in (internal.owner, f"{internal.owner}.{internal.name}"):
            listed[name] = (*listed.get(name, ()), *internal.elsewhere)
    found = {
        (f"{node.module}.{alias.name}", path)
        for path, tree, own in _modules()
        for node in ast.walk(tree)
        if not own and isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "torch"
        for alias in node.names
        if any(part.startswith("_") for part in f"{node.module}.{alias.name}".split("."))
    }
    assert ("torch._C._distributed_c10d.GradBucket", "transport/ddp_hook.py") in found
    assert {(name, path) for name, path in found if not path.startswith(listed.get(name, ()))} == set()


def test_what_is_listed_for_another_place_is_touched_there():
    sources = {path.relative_to(PACKAGE).as_posix(): path.read_text() for path in PACKAGE.rglob("*.py")}
    for internal in INTERNALS:
        for place in internal.elsewhere:
            there = [source for path, source in sources.items() if path.startswith(place)]
            assert any(internal.name in source for source in there), (internal.owner, internal.name, place)


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
