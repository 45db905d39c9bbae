"""What `make test` tests is the built wheel, and the wheel has what it should."""

import importlib.metadata
import os
from pathlib import Path

import pytest

import lightning_comm

PACKAGE = Path(lightning_comm.__file__).parent
REPOSITORY = Path(__file__).parents[1]


def test_the_tests_run_against_the_installed_wheel():
    if "LIGHTNING_COMM_WHEEL" not in os.environ:
        pytest.skip("not started by `make test`, so the package may be the source folder")
    assert PACKAGE.parent.name == "site-packages"
    assert PACKAGE != REPOSITORY / "lightning_comm"


def test_the_package_is_typed_and_has_every_module_of_the_source_folder():
    assert (PACKAGE / "py.typed").exists()
    source = REPOSITORY / "lightning_comm"
    expected = {path.relative_to(source) for path in source.rglob("*.py")}
    assert expected <= {path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py")}


def test_the_metadata_excludes_the_malicious_releases_of_lightning():
    requires = importlib.metadata.requires("lightning-comm") or []
    (lightning,) = (each for each in requires if each.startswith("lightning<") or each.startswith("lightning!"))
    assert "!=2.6.2" in lightning
    assert "!=2.6.3" in lightning
    assert importlib.metadata.metadata("lightning-comm")["License-Expression"] == "Apache-2.0"
