"""Lets tests import the benchmarks' modules, which import each other by name as programs in one folder do."""

import sys
from pathlib import Path

# at the end: a name there must not hide one of a package
sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
sys.path.append(str(Path(__file__).parents[2] / "benchmarks" / "house"))
