"""A fresh Python process for a module of ours, which adds the user's folder where the console command does.

``python -m`` searches the current folder from its first line on, so that a ``random.py`` of the user's takes the place
of Python's own module while torch is loaded. The console command adds the folder once its modules are loaded; a process
that it starts must do so too, or what works under ``fit`` fails there.
"""

import importlib
import sys

_START = """\
import importlib, importlib.util, os, sys
from_here = sys.path[:1] == [""]
if from_here:
    del sys.path[0]
spec = importlib.util.spec_from_file_location({package!r}, {file!r})
package = sys.modules[{package!r}] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(package)
module = importlib.import_module({module!r})
if from_here:
    sys.path.insert(0, os.getcwd())
sys.argv[0] = "lightning-comm"
module.start()
"""


def fresh_python(module: str, *arguments: str) -> list[str]:
    """Return the command that calls ``start()`` of a module, with arguments that it finds in ``sys.argv[1:]``.

    Args:
        module: Its full name; the package is taken from where it was taken here.
        *arguments: Its arguments.

    """
    package = module.partition(".")[0]
    file = importlib.import_module(package).__file__  # the same as here, wherever it lies
    safe = ["-P"] if getattr(sys.flags, "safe_path", False) else []  # the user wants nothing of the folder
    return [sys.executable, *safe, "-c", _START.format(package=package, file=file, module=module), *arguments]
