"""Packages that only parts of this one need: which are missing, and the command that installs them."""

import importlib.util

_DISTRIBUTIONS = {"sklearn": "scikit-learn"}  # where the registry's name is not the module's


def missing_extras(where: str, *modules: str) -> str | None:
    """Return a sentence that names all modules that are not installed, or ``None`` if they all are.

    Nothing is imported. The command is right both for a package from a registry and for a checkout.

    Args:
        where: What needs them; the sentence begins with it.
        modules: Their names, as they are imported.

    Example:
        >>> missing_extras("the demo", "json", "no_such_module")
        "the demo: it needs 'no_such_module', which is not installed. `pip install no_such_module` gets it."

    """
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if not missing:
        return None
    command = " ".join(["pip install", *(_DISTRIBUTIONS.get(name, name) for name in missing)])
    one = len(missing) == 1
    return (
        f"{where}: it needs {', '.join(map(repr, missing))}, which {'is' if one else 'are'} not installed. "
        f"`{command}` gets {'it' if one else 'them'}."
    )
