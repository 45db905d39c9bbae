"""Mutants of a package: small changes drawn by a seed, and what is needed to make each of them again elsewhere.

A mutant is known by the name of the function it is in, the text of its statement and how many equal ones come before
it there; all texts are as ``ast.unparse`` writes them, so that neither formatting nor line numbers matter.
"""

import ast
import copy
import functools
import random
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

TALKS = re.compile(
    r"(^|\.)(rank_zero_\w+|warn|warn_\w+|debug|info|warning|error|exception|critical|print|getLogger|overload|cast|set_\w*label|set_title)$"
)
_FLIPPED: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
}
_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
_HEADERS: dict[type[ast.stmt], tuple[str, ...]] = {
    ast.If: ("test",),
    ast.While: ("test",),
    ast.For: ("iter",),
    ast.With: ("items",),
    ast.Match: ("subject",),
}
_MOST_TRIES = 2000  # for one draw
_SIMPLE = (ast.Expr, ast.Assign, ast.AugAssign, ast.AnnAssign, ast.Return, ast.Assert, ast.Delete)


@dataclass(frozen=True)
class Mutant:
    """One change.

    Args:
        module: The file, from the tree's root.
        function: Qualified name of the function or class that the statement is in; empty at the top of the module.
        kind: What was changed.
        statement: The statement as it was; of one with a body the first line.
        mutated: The same after the change.
        occurrence: How many equal statements of that function come before it.
        line: Where it stood when it was drawn.
        note: What became of it in another tree; empty where it was drawn.

    """

    module: str
    function: str
    kind: str
    statement: str
    mutated: str
    occurrence: int
    line: int
    note: str = ""

    @property
    def key(self) -> str:
        """What tells it from others, in any tree."""
        return "|".join((self.function, self.statement, self.mutated, str(self.occurrence)))

    def as_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)


@dataclass(frozen=True)
class Place:
    """A statement of a module: which function it is in, its text and how many equal ones come before it there."""

    module: str
    function: str
    text: str
    occurrence: int
    node: ast.stmt


def header(statement: ast.stmt) -> str:
    """Return a statement's text, without the body that it may have."""
    if type(statement) not in _HEADERS:
        return ast.unparse(statement)
    alone = copy.copy(statement)
    for field in ("body", "orelse", "cases"):
        if hasattr(alone, field):
            setattr(alone, field, [] if field != "body" else [ast.Expr(ast.Constant(...))])
    if isinstance(alone, ast.Match):
        return f"match {ast.unparse(alone.subject)}:"
    return ast.unparse(alone).splitlines()[0]


def places(source: str, module: str) -> Iterator[Place]:
    """Yield the statements of a module that may be changed, without docstrings, imports and what raises."""
    seen: dict[tuple[str, str], int] = {}
    for function, node in _statements(ast.parse(source), ""):
        text = header(node)
        before = seen.get((function, text), 0)
        seen[function, text] = before + 1
        yield Place(module, function, text, before, node)


def _statements(parent: ast.AST, function: str) -> Iterator[tuple[str, ast.stmt]]:
    for node in ast.iter_child_nodes(parent):
        if isinstance(node, (*_FUNCTIONS, ast.ClassDef)):
            yield from _statements(node, f"{function}.{node.name}".lstrip("."))
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        else:
            if (isinstance(node, _SIMPLE) and not _is_text(node)) or type(node) in _HEADERS:
                yield function, node
            yield from _statements(node, function)


def _is_text(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def changes(place: Place) -> list[tuple[str, str]]:
    """Return the changes that a statement allows, as a kind and the text of the statement after it."""
    found: list[tuple[str, str]] = []
    if place.text.startswith("__all__"):
        return found
    for path, node in _expressions(place.node):
        for kind, other in _changed(node):
            found.append((kind, header(_with(place.node, path, other))))
    found += _changed_whole(place)
    return [(kind, text) for kind, text in dict.fromkeys(found) if text != place.text]


def _expressions(statement: ast.stmt) -> Iterator[tuple[list[Any], ast.expr]]:
    """Yield each expression that may be changed, and the way to it."""
    fields = _HEADERS.get(type(statement), statement._fields)
    for name in fields:
        if name in {"annotation", "target", "targets", "msg"}:
            continue
        yield from _within(getattr(statement, name), [name])


def _within(node: Any, path: list[Any]) -> Iterator[tuple[list[Any], ast.expr]]:
    if isinstance(node, list):
        for index, each in enumerate(node):
            yield from _within(each, [*path, index])
        return
    if not isinstance(node, ast.AST) or isinstance(node, ast.JoinedStr) or _talks(node) or _words(node):
        return
    if isinstance(node, ast.expr):
        yield path, node
    for name, each in ast.iter_fields(node):
        yield from _within(each, [*path, name])


def _talks(node: ast.AST) -> bool:
    """Whether a call only tells somebody something, or makes an error to be raised."""
    if not isinstance(node, ast.Call):
        return False
    name = ast.unparse(node.func)
    return bool(TALKS.search(name)) or name.endswith(("Error", "Exception", "Warning", "TypeVar", "refuse"))


def _words(node: ast.AST) -> bool:
    """Whether an expression chooses between two texts."""
    if not isinstance(node, ast.IfExp):
        return False
    return any(isinstance(side, ast.JoinedStr) or _is_string(side) for side in (node.body, node.orelse))


def _is_string(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def _with(statement: ast.stmt, path: list[Any], other: ast.expr) -> ast.stmt:
    """Return a copy of a statement with another expression at the end of a way."""
    alone = copy.copy(statement)
    for field in ("body", "orelse", "cases"):
        if type(statement) in _HEADERS and hasattr(alone, field):
            setattr(alone, field, [])  # is not copied, and not shown
    changed = copy.deepcopy(alone)
    node: Any = changed
    for step in path[:-1]:
        node = node[step] if isinstance(step, int) else getattr(node, step)
    if isinstance(path[-1], int):
        node[path[-1]] = other
    else:
        setattr(node, path[-1], other)
    return changed


def _changed(node: ast.expr) -> Iterator[tuple[str, ast.expr]]:
    for kind, change in _CHANGES:
        other = change(node)
        if other is not None:
            yield kind, other


def _flipped(node: ast.expr) -> ast.expr | None:
    if not isinstance(node, ast.Compare):
        return None
    return ast.Compare(node.left, [_FLIPPED[type(node.ops[0])](), *node.ops[1:]], node.comparators)


def _plus_and_minus(node: ast.expr) -> ast.expr | None:
    if not isinstance(node, ast.BinOp) or not isinstance(node.op, (ast.Add, ast.Sub)):
        return None
    sides = [each for each in ast.walk(node) if isinstance(each, (ast.JoinedStr, ast.List, ast.Tuple))]
    if sides or any(map(_is_string, ast.walk(node))):  # a minus between them is an error wherever it is run
        return None
    return ast.BinOp(node.left, ast.Sub() if isinstance(node.op, ast.Add) else ast.Add(), node.right)


def _off_by_one(node: ast.expr) -> ast.expr | None:
    if isinstance(node, ast.Constant) and type(node.value) is int:
        return ast.Constant(node.value + 1)
    return None


def _and_or(node: ast.expr) -> ast.expr | None:
    if not isinstance(node, ast.BoolOp):
        return None
    return ast.BoolOp(ast.Or() if isinstance(node.op, ast.And) else ast.And(), node.values)


def _without_not(node: ast.expr) -> ast.expr | None:
    return node.operand if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not) else None


def _swapped_arguments(node: ast.expr) -> ast.expr | None:
    if not isinstance(node, ast.Call) or len(node.args) < 2 or any(isinstance(a, ast.Starred) for a in node.args[:2]):
        return None
    if ast.unparse(node.func) in {"isinstance", "getattr", "setattr", "hasattr", "issubclass", "max", "min"}:
        return None  # an error wherever it is run, or no change
    first, second, *others = node.args
    if ast.unparse(first) == ast.unparse(second):
        return None
    return ast.Call(node.func, [second, first, *others], node.keywords)


_CHANGES: tuple[tuple[str, Callable[[ast.expr], ast.expr | None]], ...] = (
    ("comparison flipped", _flipped),
    ("plus and minus", _plus_and_minus),
    ("constant off by one", _off_by_one),
    ("and, or", _and_or),
    ("not dropped", _without_not),
    ("arguments swapped", _swapped_arguments),
)


def _changed_whole(place: Place) -> Iterator[tuple[str, str]]:
    """Yield changes of a statement as a whole: another value returned, or nothing done."""
    node = place.node
    if isinstance(node, ast.Return) and node.value is not None:
        if not (isinstance(node.value, ast.JoinedStr) or _talks(node.value) or _words(node.value)):
            yield from _other_values(node.value)
    elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call) and place.function and not _talks(node.value):
        yield "statement deleted", "pass"
    elif isinstance(node, (ast.Assign, ast.AugAssign)):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        if all(ast.unparse(target).startswith("self.") for target in targets):
            yield "statement deleted", "pass"


def _other_values(value: ast.expr) -> Iterator[tuple[str, str]]:
    if isinstance(value, ast.Constant):
        if isinstance(value.value, bool):
            yield "return value", f"return {not value.value}"
        elif isinstance(value.value, (int, float)):
            yield "return value", "return None"
        return
    if isinstance(value, ast.Tuple) and len(value.elts) >= 2:
        first, second, *others = value.elts
        yield "return value", ast.unparse(ast.Return(ast.Tuple([second, first, *others], ast.Load())))
    yield "return value", "return None"


# ---- drawing -----------------------------------------------------------------------------------------------------


def modules_of(root: Path, package: str) -> list[str]:
    """Return the package's files, from the tree's root, in the order of their names."""
    return sorted(str(path.relative_to(root)) for path in (root / package).rglob("*.py"))


def places_of(root: Path, package: str) -> dict[str, list[Place]]:
    """Return the statements of each module."""
    return {module: list(places((root / module).read_text(), module)) for module in modules_of(root, package)}


def draw(root: Path, package: str, count: int, seed: int) -> list[Mutant]:
    """Draw mutants: a module by the number of its statements, then one of its statements, then one of its changes.

    Args:
        root: The tree.
        package: The folder in it whose modules are changed.
        count: How many; all of them are different.
        seed: Of the draw.

    Raises:
        ValueError: If the package has fewer.

    """
    generator = random.Random(seed)
    return list(_drawn(places_of(root, package), count, generator, set()))


def _drawn(found: Mapping[str, list[Place]], count: int, generator: random.Random, taken: set[str]) -> Iterator[Mutant]:
    names = [module for module, each in found.items() if each]
    sizes = [len(found[module]) for module in names]
    changes_of = functools.cache(changes)
    for _ in range(count):
        for _ in range(_MOST_TRIES):
            (module,) = generator.choices(names, sizes)
            shuffled = generator.sample(found[module], len(found[module]))
            place = next((each for each in shuffled if changes_of(each)), None)
            if place is None:
                continue
            kinds = changes_of(place)
            kind = generator.choice(sorted({each for each, _ in kinds}))
            text = generator.choice([each for other, each in kinds if other == kind])
            mutant = Mutant(module, place.function, kind, place.text, text, place.occurrence, place.node.lineno)
            if mutant.key not in taken:
                taken.add(mutant.key)
                yield mutant
                break
        else:
            raise ValueError(f"mutants: `count` must not be more than the package has; got {count}. Draw fewer.")


# ---- making ------------------------------------------------------------------------------------------------------


def find(mutant: Mutant, found: Mapping[str, list[Place]]) -> tuple[Place, str] | None:
    """Find where a mutant belongs in a tree, and say how it was found; ``None`` if that is not clear."""
    alike = [place for each in found.values() for place in each if place.text == mutant.statement]
    last = mutant.function.rpartition(".")[2]
    steps: tuple[tuple[str, Callable[[Place], bool]], ...] = (
        ("", lambda p: (p.module, p.function, p.occurrence) == (mutant.module, mutant.function, mutant.occurrence)),
        ("by function", lambda p: p.function == mutant.function and p.occurrence == mutant.occurrence),
        ("by name of the function", lambda p: p.function.rpartition(".")[2] == last),
        ("by statement", lambda p: True),
    )
    for how, is_it in steps:
        candidates = [place for place in alike if is_it(place)]
        if len(candidates) == 1 and (mutant.function or how != "by function"):
            return candidates[0], how
    return None


def renamed(mutant: Mutant, names: Mapping[str, str]) -> Mutant:
    """Return a mutant as it reads where identifiers have other names."""
    if not names:
        return mutant
    words = re.compile(r"\b(" + "|".join(map(re.escape, names)) + r")\b")
    new = {
        field: words.sub(lambda match: names[match[1]], getattr(mutant, field))
        for field in ("function", "statement", "mutated")
    }
    return replace(mutant, **new)


def again(
    root: Path, package: str, mutants: list[Mutant], names: Mapping[str, str], seed: int | None
) -> tuple[list[Mutant], list[Mutant]]:
    """Find mutants in another tree.

    Args:
        root: The tree.
        package: The folder in it.
        mutants: Those that were drawn.
        names: New names by old ones.
        seed: Of fresh draws in the place of those that are not found, which are marked; ``None`` for none.

    Returns:
        Those to make in that tree, and those that were not found.

    """
    found, made, missing = places_of(root, package), [], []
    for mutant in mutants:
        place = find(renamed(mutant, names), found)
        if place is None:
            missing.append(mutant)
            continue
        where, how = place
        text = renamed(mutant, names).mutated
        made.append(
            Mutant(
                where.module, where.function, mutant.kind, where.text, text, where.occurrence, where.node.lineno, how
            )
        )
    if seed is not None:
        fresh = _drawn(found, len(missing), random.Random(f"{seed} again"), {each.key for each in made})
        made += [replace(each, note="fresh") for each in fresh]
    return made, missing


def mutated_source(source: str, mutant: Mutant) -> str:
    """Return a module's source with the change; nothing else of it differs.

    Raises:
        LookupError: If the statement is not there.

    """
    for place in places(source, mutant.module):
        same = (place.function, place.text, place.occurrence)
        if same == (mutant.function, mutant.statement, mutant.occurrence):
            break
    else:
        raise LookupError(
            f"mutants: `{mutant.statement}` must stand in {mutant.module}, {mutant.function}; it does not."
        )
    if type(place.node) not in _HEADERS:
        return _spliced(source, place.node, mutant.mutated)
    body = "\n    case _: pass" if isinstance(place.node, ast.Match) else " pass"
    (other,) = ast.parse(mutant.mutated + body).body
    for field in _HEADERS[type(place.node)]:
        pairs = _pairs(getattr(place.node, field), getattr(other, field))
        for old, new in reversed(pairs):
            if ast.unparse(old) != ast.unparse(new):
                source = _spliced(source, old, f"({ast.unparse(new)})")
    return source


def _pairs(old: Any, new: Any) -> list[tuple[ast.expr, ast.expr]]:
    if isinstance(old, list):
        return [(each.context_expr, other.context_expr) for each, other in zip(old, new, strict=True)]
    return [(old, new)]


def _spliced(source: str, node: Any, text: str) -> str:
    lines = source.encode().splitlines(keepends=True)
    first, last = node.lineno - 1, node.end_lineno - 1
    before = b"".join(lines[:first]) + lines[first][: node.col_offset]
    after = lines[last][node.end_col_offset :] + b"".join(lines[last + 1 :])
    return (before + text.encode() + after).decode()
