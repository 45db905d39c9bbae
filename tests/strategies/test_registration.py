"""The names that the Trainer finds, here and in the twin package."""

import subprocess
import sys

import pytest
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import StrategyRegistry

import lightning_comm
from lightning_comm import FixedPeriod, LocalUpdateStrategy, QuadraticPeriod
from lightning_comm.strategies import register_strategies

BASES = {"local_sgd": FixedPeriod(8), "post_local_sgd": FixedPeriod(8), "qsr": QuadraticPeriod()}
START_METHODS = {"": "popen", "_spawn": "spawn", "_fork": "fork", "_notebook": "fork"}


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("suffix", START_METHODS)
def test_a_name_gives_the_strategy_with_its_period_and_start_method(base, suffix):
    strategy = Trainer(
        strategy=(base + suffix).upper(), accelerator="cpu", devices=2, logger=False, enable_checkpointing=False
    ).strategy
    assert type(strategy) is LocalUpdateStrategy
    assert strategy.settings.period == BASES[base]
    assert strategy.settings.gradient_steps == (0.5 if base == "post_local_sgd" else 0)
    assert strategy._start_method == START_METHODS[suffix]


def test_registering_again_changes_nothing():
    before = dict(StrategyRegistry)
    register_strategies()
    assert dict(StrategyRegistry) == before


def test_the_names_in_the_twin_package_raise_an_error_that_names_both_imports():
    import pytorch_lightning

    for base in BASES:
        for suffix in START_METHODS:
            with pytest.raises(ImportError) as caught:
                pytorch_lightning.Trainer(strategy=base + suffix, accelerator="cpu", logger=False)
            assert "from lightning.pytorch import Trainer" in str(caught.value)
            assert "from pytorch_lightning import Trainer" in str(caught.value)


def test_everything_public_is_there_and_documented():
    for name in lightning_comm.__all__:
        assert getattr(lightning_comm, name).__doc__


def test_core_imports_neither_torch_nor_lightning():
    code = "import sys, importlib.util as u; spec = u.find_spec('lightning_comm'); " \
        "sys.modules['lightning_comm'] = type(sys)('lightning_comm'); " \
        "sys.modules['lightning_comm'].__path__ = list(spec.submodule_search_locations); " \
        "import lightning_comm.core.local_update, lightning_comm.core.ledger; " \
        "assert not {'torch', 'lightning', 'numpy'} & set(sys.modules), sorted(sys.modules)"  # fmt: skip
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
