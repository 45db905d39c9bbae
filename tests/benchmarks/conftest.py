"""Lets tests import the benchmarks, and the scripts of ``benchmarks/house``, which are run by their paths."""

import sys
from pathlib import Path

# at the end: a name there must not hide one of a package
sys.path += [str(Path(__file__).parents[2]), str(Path(__file__).parents[2] / "benchmarks" / "house")]
