"""A check of what one GPU can show: `python -m benchmarks.gpu_check`; it takes devices and cases from the tests."""

import sys

from benchmarks import ROOT

if str(ROOT / "tests") not in sys.path:
    sys.path.append(str(ROOT / "tests"))
