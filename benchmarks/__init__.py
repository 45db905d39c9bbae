"""Measurements, each a program: `python -m benchmarks.<folder>.<name>`, from the root of the repository."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
