"""What is not installed is named at once, with the command that installs it wherever this package came from."""

import sys

import pytest

from lightning_comm.core.extras import missing_extras


@pytest.mark.parametrize(
    ("missing", "ending"),
    [
        (["sklearn"], "'sklearn', which is not installed. `pip install scikit-learn` gets it."),
        (["timm", "sklearn"], "'timm', 'sklearn', which are not installed. `pip install timm scikit-learn` gets them."),
    ],
)
def test_all_that_is_missing_is_named_in_one_sentence_and_nothing_is_imported(missing, ending, monkeypatch):
    for name in missing:
        monkeypatch.setitem(sys.modules, name, None)
    before = set(sys.modules)
    assert missing_extras("here", "json", "timm", "sklearn") == f"here: it needs {ending}"
    assert set(sys.modules) == before


def test_where_all_is_there_nothing_is_said():
    assert missing_extras("here", "json", "os") is None
