"""What `make test` tests is the built wheel, and the wheel has what it should."""

import importlib.metadata
import os
import re
from pathlib import Path

import pytest

import lightning_comm
import lightning_comm_command

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
    assert Path(lightning_comm_command.__file__).parent == PACKAGE.with_name("lightning_comm_command")


def test_the_metadata_excludes_the_malicious_releases_of_lightning():
    requires = importlib.metadata.requires("lightning-comm") or []
    (lightning,) = (each for each in requires if re.match(r"lightning[^\w-]", each))
    assert "!=2.6.2" in lightning
    assert "!=2.6.3" in lightning
    assert importlib.metadata.metadata("lightning-comm")["License-Expression"] == "Apache-2.0"


def test_nothing_but_the_argument_parser_of_lightnings_extra_packages_is_required():
    base = {
        re.match(r"[\w.-]+", each)[0]
        for each in importlib.metadata.requires("lightning-comm")
        if "extra ==" not in each
    }
    assert base == {"torch", "lightning", "jsonargparse", "torchmetrics", "numpy", "typing-extensions"}
