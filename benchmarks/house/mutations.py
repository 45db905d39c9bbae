"""Mutation testing of the package: how many of some seeded small changes its tests see.

    python benchmarks/house/mutations.py draw --count 200 --seed 20261201 --out mutants.jsonl
    python benchmarks/house/mutations.py run mutants.jsonl --results results.jsonl
    python benchmarks/house/mutations.py summary results.jsonl

In another tree, where files were moved and classes renamed, `again` finds the same changes:

    python benchmarks/house/mutations.py again mutants.jsonl --root ../other --out mutants_there.jsonl

A run can be ended and started again: what stands in its results is not done twice. A change is killed if a test fails
on it twice and passes without it, if the package cannot be imported, or if a run hangs: no process of it is at
work for a while, or one test uses up the seconds of CPU. Tests run in order of how close
they are to the changed module, until one fails or the seconds of CPU are used up; so a change that survives may still
be seen by a test that was not reached, which is said. Some changes are to lines for GPUs, which no test on a CPU sees.
"""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parent))
import mutants
from mutants import Mutant
from mutation_order import Imports

SEED = 20261201


def read(path: Path) -> list[dict[str, Any]]:
    """Return the objects of a file, one a line; nothing if there is none."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def read_mutants(path: Path) -> list[Mutant]:
    """Return the mutants of a file."""
    return [Mutant(**each) for each in read(path)]


def write_mutants(path: Path, drawn: Sequence[Mutant]) -> None:
    """Write mutants, one a line."""
    path.write_text("".join(json.dumps(each.as_dict()) + "\n" for each in drawn))


def run(options: argparse.Namespace) -> None:
    """Run tests against each mutant that has no result yet."""
    from mutation_runs import Bench, Limits, preload

    preload(tuple(filter(None, options.preload.split(","))) if options.preload is not None else preload.__defaults__[0])
    done = {each["key"] for each in read(options.results)}
    limits = Limits(options.cpu_s, options.idle_s, options.wall_s)
    bench = Bench(options.root, options.package, options.work, limits)
    imports = Imports(bench.tree, options.package)
    for mutant in read_mutants(options.mutants):
        if mutant.key in done:
            continue
        outcome = bench.run(mutant, imports.order(mutant.module))
        with options.results.open("a") as file:
            file.write(json.dumps({"key": mutant.key, **mutant.as_dict(), **outcome.as_dict()}) + "\n")
        print(f"{outcome.by or 'SURVIVED'}: {mutant.module}:{mutant.line} {mutant.kind}", flush=True)


def summary(results: list[dict[str, Any]]) -> str:
    """Return what was found as Markdown: the share that was killed, by part of the package, and what survived."""
    killed = [each for each in results if each["killed"]]
    hangs = sum(each["by"].startswith("hang") for each in killed)
    imports = sum(each["by"] == "import" for each in killed)
    said = [
        f"{len(killed)} of {len(results)} killed ({len(killed) / max(1, len(results)):.1%}); of these {hangs} hung and "
        f"{imports} could not be imported. {sum(each['out_of_time'] for each in results)} were given up for time.",
        "",
        "| part | mutants | killed |",
        "|---|---|---|",
    ]
    parts = [(_part(each["module"]), each["killed"]) for each in results]
    totals, dead = Counter(part for part, _ in parts), Counter(part for part, is_dead in parts if is_dead)
    said += [f"| `{part}` | {totals[part]} | {dead[part]} |" for part in sorted(totals)]
    said += ["", "Survived:", ""]
    for each in sorted(
        (each for each in results if not each["killed"]), key=lambda each: (each["module"], each["line"])
    ):
        time = ", out of time" if each["out_of_time"] else ""
        note = f", {each['note']}" if each["note"] else ""
        said.append(
            f"- `{each['module']}:{each['line']}` {each['function']}, {each['kind']}{time}{note}: "
            f"`{each['statement']}` → `{each['mutated']}`"
        )
    return "\n".join(said)


def _part(module: str) -> str:
    parts = module.split("/")
    return parts[1] if len(parts) > 2 else "top level"


def main(words: Sequence[str] | None = None) -> None:
    """Do what the first word says."""
    options = _options(words)
    if options.command == "draw":
        write_mutants(options.out, mutants.draw(options.root, options.package, options.count, options.seed))
    elif options.command == "again":
        names = json.loads(options.renames.read_text()) if options.renames else {}
        drawn = read_mutants(options.mutants)
        made, missing = mutants.again(options.root, options.package, drawn, names, options.fresh_seed)
        write_mutants(options.out, made)
        print(f"{len(drawn) - len(missing)} of {len(drawn)} found; not found:")
        for each in missing:
            print(f"- {each.module}:{each.line} {each.function}: {each.statement} → {each.mutated}")
    elif options.command == "run":
        run(options)
    else:
        print(summary(read(options.results)))


def _options(words: Sequence[str] | None) -> argparse.Namespace:
    here = Path(__file__).parents[2]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    draw, again, started, told = (commands.add_parser(word) for word in ("draw", "again", "run", "summary"))
    for each in (draw, again, started):
        each.add_argument("--root", type=Path, default=here, help="the tree (default: this one)")
        each.add_argument("--package", default="lightning_comm")
    for each in (again, started):
        each.add_argument("mutants", type=Path)
    for each in (draw, again):
        each.add_argument("--out", type=Path, required=True)
    draw.add_argument("--count", type=int, default=200)
    draw.add_argument("--seed", type=int, default=SEED)
    again.add_argument("--renames", type=Path, help="a JSON file with new identifiers by old ones")
    again.add_argument("--fresh-seed", type=int, help="draw others in the place of those that are not found")
    started.add_argument("--results", type=Path, required=True)
    started.add_argument("--work", type=Path, default=here / "build" / "mutations", help="a folder that is emptied")
    started.add_argument("--cpu-s", type=float, default=60.0, help="seconds of CPU a mutant")
    started.add_argument("--idle-s", type=float, default=75.0, help="seconds without work after which a run hangs")
    started.add_argument("--wall-s", type=float, default=1200.0, help="seconds in all after which a run hangs")
    started.add_argument("--preload", help="modules to import before anything is forked, with commas between")
    told.add_argument("results", type=Path)
    return parser.parse_args(words)


if __name__ == "__main__":
    main()
