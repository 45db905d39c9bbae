"""Masks outlast a resume under other settings, another number of ranks, or with damaged rank files."""

import shutil
import warnings
from datetime import timedelta
from functools import partial
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from support.processes import launch
from support.shared_ranks import SharedRanks
from support.training import Regression, loader, network, own_file, trainer, weights

from lightning_comm import (
    Averaging,
    Cast,
    CompressedDDPStrategy,
    FixedPeriod,
    Int8,
    LocalUpdateStrategy,
    MagnitudePruning,
    MaskFunction,
    PruningSchedule,
    SparseMask,
)

FIRST, SECOND = torch.arange(35).view(7, 5) % 3 == 0, torch.arange(35).view(7, 5) % 3 == 1
SAME = {
    "then bf16": lambda: SparseMask(chosen(), Cast("bf16")),
    "then int8": lambda: SparseMask(chosen(), Int8()),
    "dense_above": lambda: SparseMask(chosen(), dense_above=0.5),
    "schedule": lambda: SparseMask(chosen(), schedule=PruningSchedule(start_step=2)),
    "later": lambda: SparseMask(chosen(), schedule=PruningSchedule(start_step=7)),
}


def chosen():
    """A function that returns the mask that the model has: after a resume another one, so that a new choice shows."""
    return MaskFunction(lambda module: {"net.0.weight": module.given})


def strategy_of(kind, compression):
    if kind == "ddp":
        return CompressedDDPStrategy(compression, timeout=timedelta(seconds=40))
    return LocalUpdateStrategy(FixedPeriod(4), averaging=Averaging(1e-4, compression, 1), timeout=timedelta(seconds=40))


def fit(kind, compression, ranks, rank, steps, **kwargs):
    module = Regression(network(torch.float32), lambda parameters: torch.optim.AdamW(parameters, lr=0.02))
    module.given = SECOND if kwargs.get("ckpt_path") else FIRST
    save = kwargs.pop("save", None)
    if save:
        kwargs |= {
            "callbacks": [ModelCheckpoint(save, filename="{step}", every_n_train_steps=6, save_top_k=-1)],
            "enable_checkpointing": True,
        }
    ckpt_path = kwargs.pop("ckpt_path", None)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer(strategy_of(kind, compression), ranks, **kwargs).fit(
            module, loader(steps, rank, dtype=torch.float32), ckpt_path=ckpt_path
        )
    said = [str(each.message) for each in caught if "mask" in str(each.message).lower()]
    return module.net[0].weight.detach() != 0, weights(module), said


def _again(rank, kind, folder, first, second, damaged=False, change=None):
    before, *_ = fit(kind, first(), 2, rank, 8, save=folder)
    torch.distributed.barrier()
    path = Path(folder) / "step=6.ckpt"
    if damaged and rank == 1:
        own_file(path, 1).write_bytes(b"no checkpoint")
    if change is not None and rank == 0:
        content = torch.load(path, weights_only=True)
        change(content)
        torch.save(content, path)
    torch.distributed.barrier()
    after, final, said = fit(kind, second(), 2, rank, 12, ckpt_path=str(path))
    return torch.equal(before, FIRST), torch.equal(after, FIRST), int(after.sum()), final, said


def first_mask():
    return SparseMask(chosen())


def first_int8():
    return SparseMask(chosen(), Int8())


def second_int8():
    return SparseMask(chosen(), Int8())


GRID = [(kind, first, other) for other in SAME for kind in ("ddp", "local") for first in (first_mask, first_int8)]
CHOSEN = [  # every setting, strategy and first method
    ("ddp", first_mask, "then bf16"),
    ("local", first_int8, "then bf16"),
    ("local", first_mask, "then int8"),
    ("ddp", first_int8, "dense_above"),
    ("local", first_mask, "schedule"),
    ("ddp", first_mask, "later"),
]


def also(chosen, case):
    """A case that is run where all are, unless it is a chosen one."""
    return pytest.param(*case, marks=[] if case in chosen else [pytest.mark.exhaustive])


@pytest.mark.parametrize(
    ("kind", "first", "other"),
    [also(CHOSEN, case) for case in GRID],
    ids=lambda each: getattr(each, "__name__", each),
)
def test_masks_outlast_other_settings_of_the_same_pruning(of_two, kind, other, first):
    answers = of_two[kind, first.__name__, other]
    for before, kept, _, final, _ in answers:
        assert before
        assert kept
        assert all((a == b).all() for a, b in zip(final, answers[0][3], strict=True))


@pytest.mark.parametrize("kind", ["ddp", "local"])
def test_masks_outlast_a_damaged_rank_file_and_the_warning_says_so(of_two, kind):
    answers = of_two[kind, "damaged"]
    assert [answer[:2] for answer in answers] == [(True, True)] * 2
    assert any("masks" in text and "rank1.pt cannot be read" in text for text in answers[0][4])


def _write(rank, kind, folder):
    return bool(torch.equal(fit(kind, first_int8(), 2, rank, 8, save=folder)[0], FIRST))


def _read(rank, kind, folder):
    kept, final, _ = fit(kind, second_int8(), 3, rank, 12, ckpt_path=str(Path(folder) / "step=6.ckpt"))
    return torch.equal(kept, FIRST), final


ACROSS = [("ddp", "local"), ("local", "ddp")]


@pytest.mark.parametrize(
    ("wrote", "reads"), [also(ACROSS, case) for case in [("ddp", "ddp"), ("local", "local"), *ACROSS]]
)
def test_masks_outlast_another_number_of_ranks_and_the_other_strategy(of_two, of_three, wrote, reads):
    assert of_two[wrote, "written"] == [True] * 2
    answers = of_three[wrote, reads]
    for kept, final in answers:
        assert kept
        assert all((a == b).all() for a, b in zip(final, answers[0][1], strict=True))


def magnitude():
    return SparseMask(MagnitudePruning(0.5))


@pytest.mark.parametrize("kind", ["ddp", "local"])
def test_another_pruning_chooses_anew_and_says_so(of_two, kind):
    answers = of_two[kind, "magnitude"]
    assert not any(answer[1] for answer in answers)
    assert any("MaskFunction" in text for text in answers[0][4])
    assert answers[1][4] == []


def function_of(remainder):
    """A function of the same name with another constant in its code."""
    names = {"torch": torch, "__name__": "script"}
    source = f"def choose(module):\n    return {{'net.0.weight': torch.arange(35).view(7, 5) % 3 == {remainder}}}\n"
    exec(source, names)
    return SparseMask(MaskFunction(names["choose"]))


def first_function():
    return function_of(0)


def second_function():
    return function_of(1)


@pytest.mark.parametrize("kind", ["ddp", "local"])
def test_a_function_with_another_body_chooses_anew_and_the_warning_names_it(tmp_path, kind):
    answers = launch(_again, kind, str(tmp_path), first_function, second_function, world_size=2)
    assert [answer[:2] for answer in answers] == [(True, False)] * 2
    words = ("`ckpt_path`" if kind == "ddp" else "`pruning`", "script.choose", "whose code is another one now")
    assert [word for word in words if not any(word in text for text in answers[0][4])] == [], answers[0][4]


def as_an_earlier_version_wrote(content):
    for key in ("lightning_comm.compression", "lightning_comm.local_update"):
        entry = content.get(key, {})
        if "compression" in entry:
            entry["compression"] = repr(first_function())
        if entry:
            entry["masks"]["pruning"] = repr(first_function().pruning)


@pytest.mark.parametrize("kind", ["ddp", "local"])
def test_masks_of_an_earlier_version_are_kept_and_what_cannot_be_compared_is_said(tmp_path, kind):
    args = (str(tmp_path), first_function, second_function, False, as_an_earlier_version_wrote)
    answers = launch(_again, kind, *args, world_size=2)
    assert [answer[:2] for answer in answers] == [(True, True)] * 2
    words = ("cannot be told", "earlier version", "script.choose", "another setting")
    assert sum(all(word in text for word in words) for text in answers[0][4]) == 1
    assert answers[1][4] == []


def bf16():
    return Cast("bf16")


def int8():
    return Int8()


def nothing():
    return None


DENSE = [("ddp", bf16), ("ddp", int8), ("local", bf16), ("local", nothing)]
DENSE_CHOSEN = [("ddp", int8), ("local", nothing)]


@pytest.mark.parametrize(
    ("kind", "second"), [also(DENSE_CHOSEN, case) for case in DENSE], ids=lambda each: getattr(each, "__name__", each)
)
def test_a_pruned_model_does_not_become_dense_without_a_word(of_two, kind, second):
    answers = of_two[kind, second.__name__]
    assert {answer[2] for answer in answers} == {35}
    assert sum("becomes dense" in text and "MaskFunction(" in text for text in answers[0][4]) == 1
    assert answers[1][4] == []


def given(owner, module):
    return {"net.0.weight": module.given}


def _with_owners(rank, kind, folder, then, second_owner, files):
    """Resume with a setting that names something of its own on each rank, though rank 0 alone calls the function."""

    def mask(owner):
        return SparseMask(MaskFunction(partial(given, owner)), then)

    fit(kind, mask(f"rank {rank}"), 2, rank, 8, save=folder)
    torch.distributed.barrier()
    path = Path(folder) / "step=6.ckpt"
    if files == "gone on one rank" and rank == 1:
        shutil.rmtree(f"{path}.ranks", ignore_errors=True)
    torch.distributed.barrier()
    owner = second_owner.format(rank=rank)
    after, final, said = fit(kind, mask(owner), 2, rank, 12, ckpt_path=str(path))
    return torch.equal(after, FIRST), torch.equal(after, SECOND), final, said


OWNERS = {"each its own": "rank {rank}", "rank 0 its own": "rank 0", "rank 1 its own": "rank 1"}
WITH_OWNERS = [  # rank files or none; alike on rank 0, on rank 1, or on both
    *((kind, then, owners, "there") for kind in ("ddp", "local") for then in (None, "int8") for owners in OWNERS),
    *((kind, "int8", "each its own", "gone on one rank") for kind in ("ddp", "local")),
]


@pytest.mark.parametrize(("kind", "then", "owners", "files"), WITH_OWNERS)
def test_rank_0_tells_all_ranks_whether_masks_are_kept(of_two, kind, then, owners, files):
    answers = of_two[kind, then, owners, files]
    kept = owners != "rank 1 its own"
    assert [answer[:2] for answer in answers] == [(kept, not kept)] * 2
    assert all((a == b).all() for a, b in zip(answers[1][2], answers[0][2], strict=True))
    assert bool(answers[0][3]) == (not kept or files != "there")
    assert answers[1][3] == []


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("masks")


@pytest.fixture(scope="module")
def of_two(request, folder):
    everything = request.config.getoption("exhaustive")
    again = {
        **{
            (kind, first.__name__, other): (first, SAME[other])
            for kind, first, other in (GRID if everything else CHOSEN)
        },
        **{(kind, "magnitude"): (first_mask, magnitude) for kind in ("ddp", "local")},
        **{(kind, second.__name__): (first_mask, second) for kind, second in (DENSE if everything else DENSE_CHOSEN)},
        **{(kind, "damaged"): (first_int8, second_int8, True) for kind in ("ddp", "local")},
    }
    cases = {
        (kind, *name): (_again, kind, str(folder / f"{kind} {name}"), *how) for (kind, *name), how in again.items()
    }
    for number, case in enumerate(WITH_OWNERS):
        kind, then, owners, files = case
        cases[case] = (_with_owners, kind, str(folder / f"owners {number}"), then, OWNERS[owners], files)
    written = {(kind, "written"): (_write, kind, str(folder / kind)) for kind in ("ddp", "local")}
    return SharedRanks({**cases, **written}, world_size=2)


@pytest.fixture(scope="module")
def of_three(request, folder):
    same = [("ddp", "ddp"), ("local", "local")] if request.config.getoption("exhaustive") else []
    return SharedRanks(
        {(wrote, reads): (_read, reads, str(folder / wrote)) for wrote, reads in [*same, *ACROSS]}, world_size=3
    )
