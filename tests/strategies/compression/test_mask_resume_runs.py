"""Masks outlast a resume under other settings, another number of ranks, or with damaged rank files."""

import shutil
import warnings
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
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

SAVED = "step=6.ckpt"
FIRST, SECOND = torch.arange(35).view(7, 5) % 3 == 0, torch.arange(35).view(7, 5) % 3 == 1
SAME = {
    "then bf16": lambda rank: SparseMask(chosen(), Cast("bf16")),
    "then int8": lambda rank: SparseMask(chosen(), Int8()),
    "dense_above": lambda rank: SparseMask(chosen(), dense_above=0.5),
    "schedule": lambda rank: SparseMask(chosen(), schedule=PruningSchedule(start_step=2)),
    "later": lambda rank: SparseMask(chosen(), schedule=PruningSchedule(start_step=7)),
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


def _write(rank, kind, folder, first):
    """Train with a checkpoint, from which all cases go on that begin so; return whether the mask is as chosen."""
    return torch.equal(fit(kind, first(rank), 2, rank, 8, save=folder)[0], FIRST)


class Resumed(NamedTuple):
    """What a rank has after it has gone on: which of the masks, how many entries that are not zero, warnings."""

    first: bool
    second: bool
    entries: int
    final: list
    said: list


def _change(rank, written, folder, change):
    """Leave a copy of what was written that is not as it was."""
    if rank == 0:
        shutil.copytree(written, folder)
        change(Path(folder) / SAVED)


def _again(rank, kind, written, second):
    """Go on with another setting."""
    mask, final, said = fit(kind, second(rank), 2, rank, 9, ckpt_path=str(Path(written) / SAVED))
    return Resumed(torch.equal(mask, FIRST), torch.equal(mask, SECOND), int(mask.sum()), final, said)


def _end_equal(answers):
    return all((a == b).all() for a, b in zip(answers[0].final, answers[1].final, strict=True))


# what runs are begun, and gone on, with; each is called with the rank


def first_mask(rank):
    return SparseMask(chosen())


def first_int8(rank):
    return SparseMask(chosen(), Int8())


second_int8 = first_int8


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
    assert of_two["written", kind, first] == [True] * 2
    answers = of_two[kind, first, other]
    assert [answer.first for answer in answers] == [True] * 2
    assert _end_equal(answers)


def damage_rank_1(path):
    own_file(path, 1).write_bytes(b"no checkpoint")


@pytest.mark.parametrize("kind", ["ddp", "local"])
def test_masks_outlast_a_damaged_rank_file_and_the_warning_says_so(of_two, kind):
    answers = of_two[kind, "damaged"]
    assert [answer.first for answer in answers] == [True] * 2
    assert any("masks" in text and "rank1.pt cannot be read" in text for text in answers[0].said)


def _read(rank, kind, folder):
    kept, final, _ = fit(kind, second_int8(rank), 3, rank, 9, ckpt_path=str(Path(folder) / SAVED))
    return torch.equal(kept, FIRST), final


ACROSS = [("ddp", "local"), ("local", "ddp")]


@pytest.mark.parametrize(
    ("wrote", "reads"), [also(ACROSS, case) for case in [("ddp", "ddp"), ("local", "local"), *ACROSS]]
)
def test_masks_outlast_another_number_of_ranks_and_the_other_strategy(of_two, of_three, wrote, reads):
    assert of_two["written", wrote, first_int8] == [True] * 2
    answers = of_three[wrote, reads]
    for kept, final in answers:
        assert kept
        assert all((a == b).all() for a, b in zip(final, answers[0][1], strict=True))


def magnitude(rank):
    return SparseMask(MagnitudePruning(0.5))


@pytest.mark.parametrize("kind", ["ddp", pytest.param("local", marks=pytest.mark.exhaustive)])
def test_another_pruning_chooses_anew_and_says_so(of_two, kind):
    answers = of_two[kind, "magnitude"]
    assert not any(answer.first for answer in answers)
    assert any("MaskFunction" in text for text in answers[0].said)
    assert answers[1].said == []


def function_of(remainder):
    """A function of the same name with another constant in its code."""
    names = {"torch": torch, "__name__": "script"}
    source = f"def choose(module):\n    return {{'net.0.weight': torch.arange(35).view(7, 5) % 3 == {remainder}}}\n"
    exec(source, names)
    return SparseMask(MaskFunction(names["choose"]))


def first_function(rank=0):
    return function_of(0)


def second_function(rank=0):
    return function_of(1)


@pytest.mark.parametrize("kind", ["ddp", "local"])
def test_a_function_with_another_body_chooses_anew_and_the_warning_names_it(of_two, kind):
    assert of_two["written", kind, first_function] == [True] * 2
    answers = of_two[kind, "another body"]
    assert [(answer.first, answer.second) for answer in answers] == [(False, True)] * 2
    words = ("`ckpt_path`" if kind == "ddp" else "`pruning`", "script.choose", "whose code is another one now")
    assert [word for word in words if not any(word in text for text in answers[0].said)] == [], answers[0].said


def as_an_earlier_version_wrote(path):
    content = torch.load(path, weights_only=True)
    for key in ("lightning_comm.compression", "lightning_comm.local_update"):
        entry = content.get(key, {})
        if "compression" in entry:
            entry["compression"] = repr(first_function())
        if entry:
            entry["masks"]["pruning"] = repr(first_function().pruning)
    torch.save(content, path)


@pytest.mark.parametrize("kind", [pytest.param("ddp", marks=pytest.mark.exhaustive), "local"])
def test_masks_of_an_earlier_version_are_kept_and_what_cannot_be_compared_is_said(of_two, kind):
    answers = of_two[kind, "earlier version"]
    assert [answer.first for answer in answers] == [True] * 2
    words = ("cannot be told", "earlier version", "script.choose", "another setting")
    assert sum(all(word in text for word in words) for text in answers[0].said) == 1
    assert answers[1].said == []


def bf16(rank):
    return Cast("bf16")


def int8(rank):
    return Int8()


def nothing(rank):
    return None


DENSE = [("ddp", bf16), ("ddp", int8), ("local", bf16), ("local", nothing)]
DENSE_CHOSEN = [("ddp", int8), ("local", nothing)]


@pytest.mark.parametrize(
    ("kind", "second"), [also(DENSE_CHOSEN, case) for case in DENSE], ids=lambda each: getattr(each, "__name__", each)
)
def test_a_pruned_model_does_not_become_dense_without_a_word(of_two, kind, second):
    answers = of_two[kind, second]
    assert {answer.entries for answer in answers} == {35}
    assert sum("becomes dense" in text and "MaskFunction(" in text for text in answers[0].said) == 1
    assert answers[1].said == []


def given(owner, module):
    return {"net.0.weight": module.given}


class Owned(NamedTuple):
    """Settings that name something of their own on each rank, though rank 0 alone calls the function."""

    then: str | None
    owner: str

    def __call__(self, rank):
        return SparseMask(MaskFunction(partial(given, self.owner.format(rank=rank))), self.then)


def remove_rank_files(path):
    shutil.rmtree(f"{path}.ranks")


OWNERS = {"each its own": "rank {rank}", "rank 0 its own": "rank 0", "rank 1 its own": "rank 1"}
OWNER_GRID = [  # rank files or none; alike on rank 0, on rank 1, or on both
    *((kind, then, owners, "there") for kind in ("ddp", "local") for then in (None, "int8") for owners in OWNERS),
    *((kind, "int8", "each its own", "gone") for kind in ("ddp", "local")),
]
OWNERS_CHOSEN = [  # each strategy with masks that are kept, that are chosen anew, and without files; each with a method
    ("ddp", None, "each its own", "there"),
    ("local", "int8", "rank 0 its own", "there"),
    ("ddp", None, "rank 1 its own", "there"),
    ("local", "int8", "rank 1 its own", "there"),
    *(case for case in OWNER_GRID if case[-1] != "there"),
]


@pytest.mark.parametrize(("kind", "then", "owners", "files"), [also(OWNERS_CHOSEN, case) for case in OWNER_GRID])
def test_rank_0_tells_all_ranks_whether_masks_are_kept(of_two, kind, then, owners, files):
    answers = of_two[kind, then, owners, files]
    kept = owners != "rank 1 its own"
    assert [(answer.first, answer.second) for answer in answers] == [(kept, not kept)] * 2
    assert _end_equal(answers)
    assert bool(answers[0].said) == (not kept or files != "there")
    assert answers[1].said == []


def _place(kind, first):
    """The folder with the checkpoint of a run, by what it began with."""
    return f"{kind} {getattr(first, '__name__', getattr(first, 'then', None))}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("masks")


@pytest.fixture(scope="module")
def of_two(request, folder):
    """What was written, and how runs went on from it: for each case with what they began, go on, and what was done."""
    everything = request.config.getoption("exhaustive")
    again = {
        **{(kind, first, other): (first, SAME[other]) for kind, first, other in (GRID if everything else CHOSEN)},
        **{(kind, second): (first_mask, second) for kind, second in (DENSE if everything else DENSE_CHOSEN)},
    }
    for kind in ("ddp", "local"):
        again[kind, "damaged"] = first_int8, second_int8, damage_rank_1
        again[kind, "another body"] = first_function, second_function
        if everything or kind == "ddp":
            again[kind, "magnitude"] = first_mask, magnitude
        if everything or kind == "local":
            again[kind, "earlier version"] = first_function, second_function, as_an_earlier_version_wrote
    for case in OWNER_GRID if everything else OWNERS_CHOSEN:
        _, then, owners, files = case
        change = () if files == "there" else (remove_rank_files,)
        again[case] = Owned(then, OWNERS["each its own"]), Owned(then, OWNERS[owners]), *change
    written, went_on = {}, {}
    for number, (case, (first, second, *change)) in enumerate(again.items()):
        kind = case[0]
        place = str(folder / _place(kind, first))
        written["written", kind, first] = _write, kind, place, first
        if change:
            place, of_all = str(folder / f"changed {number}"), place
            went_on[("changed", *case)] = _change, of_all, place, *change
        went_on[case] = _again, kind, place, second
    return SharedRanks({**written, **went_on}, world_size=2)


@pytest.fixture(scope="module")
def of_three(request, folder, of_two):
    same = [("ddp", "ddp"), ("local", "local")] if request.config.getoption("exhaustive") else []
    return SharedRanks(
        {(wrote, reads): (_read, reads, str(folder / _place(wrote, first_int8))) for wrote, reads in [*same, *ACROSS]},
        world_size=3,
    )
