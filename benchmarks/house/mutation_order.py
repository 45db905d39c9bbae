"""The order in which tests are run against a changed module: those that look at it most closely come first.

By a static graph of imports: nothing is imported to find out.
"""

import ast
from collections import deque
from collections.abc import Iterator
from pathlib import Path

_LEFT_OUT = ("test_docs.py", "test_wheel.py", "test_notebooks.py")  # they look at texts and files, or take minutes
_OTHERS, _FAR = 3, 1000


class Imports:
    """Which module imports which, for a package and its tests.

    Args:
        root: The tree.
        package: The name of its folder with the package.
        tests: That of its folder with tests.

    """

    def __init__(self, root: Path, package: str, tests: str = "tests") -> None:
        self.root, self.package, self.folder = root, package, tests
        self._files = {_name(path, root): path for path in sorted((root / package).rglob("*.py"))}
        support = {_name(path, root / tests): path for path in sorted((root / tests).rglob("*.py"))}
        self._files |= {name: path for name, path in support.items() if not path.name.startswith("test_")}
        self._tops = {name.partition(".")[0] for name in self._files}
        self._direct: dict[Path, set[str]] = {}
        self._exports: dict[str, dict[str, str]] = {}
        self._graph: dict[str, set[str]] = {}
        self.tests = [path for path in sorted((root / tests).rglob("test_*.py")) if path.name not in _LEFT_OUT]

    def order(self, module: str) -> list[str]:
        """Return the test files that reach a module, the closest first, as paths from the folder of tests.

        First those named alike, then those that import it, then those of its technique, which may reach it through
        another process, then the others; of these those of its layer, then by the number of imports in between, then
        the shorter file.
        """
        target = _name(self.root / module, self.root)
        ranked = []
        for path in self.tests:
            distance = self._distance(path, target)
            test = path.relative_to(self.root / self.folder)
            tier = _tier(test, Path(module), distance)
            if distance is None and tier == _OTHERS:
                continue
            elsewhere = test.parts[0] not in Path(module).parts
            ranked.append((tier, elsewhere, _FAR if distance is None else distance, path.stat().st_size, str(test)))
        return [path for *_, path in sorted(ranked)]

    def _distance(self, test: Path, target: str) -> int | None:
        seen, waiting = set(self._imported(test)), deque((name, 1) for name in sorted(self._imported(test)))
        while waiting:
            name, distance = waiting.popleft()
            if name == target:
                return distance
            fresh = self._neighbours(name) - seen
            seen |= fresh
            waiting.extend((each, distance + 1) for each in sorted(fresh))
        return None

    def _neighbours(self, name: str) -> set[str]:
        if name not in self._graph:
            path = self._files.get(name)
            # what imports a name of the package's top reaches the module that has it, not all that is named there
            at_top = name == self.package
            self._graph[name] = set() if path is None or at_top else self._imported(path)
        return self._graph[name]

    def _imported(self, path: Path) -> set[str]:
        if path not in self._direct:
            ours = ((module, name) for module, name in _imports(path) if module.partition(".")[0] in self._tops)
            self._direct[path] = {self._home(module, name) for module, name in ours}
        return self._direct[path]

    def _home(self, module: str, name: str | None) -> str:
        """Return the module that a name comes from, through packages that pass it on."""
        for _ in range(5):
            if name is None:
                return module
            if f"{module}.{name}" in self._files:
                return f"{module}.{name}"
            above = self._passed_on(module).get(name)
            if above is None:
                return module
            module = above
        return module

    def _passed_on(self, module: str) -> dict[str, str]:
        if module not in self._exports:
            path = self._files.get(module)
            found = _imports(path) if path is not None and path.name == "__init__.py" else ()
            self._exports[module] = {name: other for other, name in found if name is not None}
        return self._exports[module]


def _name(path: Path, root: Path) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _imports(path: Path) -> Iterator[tuple[str, str | None]]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, None
        elif isinstance(node, ast.ImportFrom) and node.module is not None and node.level == 0:
            for alias in node.names:
                yield node.module, alias.name


def _tier(test: Path, module: Path, distance: int | None) -> int:
    stem, own = test.stem.removeprefix("test_"), module.stem
    if stem == own or stem.startswith(f"{own}_") or own.startswith(f"{stem}_"):
        return 0
    if distance == 1:
        return 1
    words = {own.partition("_")[0], *module.parent.parts[2:]}
    of_technique = words & set(test.parent.parts) or any(word in stem for word in words)
    return 2 if of_technique or (distance is None and test.parts[0] in module.parts) else _OTHERS
