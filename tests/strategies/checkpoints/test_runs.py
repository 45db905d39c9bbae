"""Runs of several ranks whose checkpoints meet full disks, slow writers, failing ranks and damage."""

import os
import random
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import AsyncCheckpointIO
from support.cyclic import cyclic
from support.processes import launch, outcomes
from support.training import Regression, Samples, loader, local_update, network, trainer, weights

from lightning_comm import CompressedDDPStrategy, FixedPeriod, TopK
from lightning_comm.data.resumable import ResumableLoader
from lightning_comm.strategies.checkpoints import whole_files
from lightning_comm.strategies.checkpoints.entry import is_incomplete

STEPS = 8


def fit(rank, strategy, *callbacks, ckpt_path=None, **options):
    torch.manual_seed(rank)
    module = Regression(network(), lambda p: torch.optim.AdamW(p, lr=0.02))
    data = ResumableLoader(Samples(STEPS * 4, rank), 4, seed=3, num_replicas=1, rank=0)
    runner = trainer(strategy, 2, callbacks=list(callbacks), enable_checkpointing=True, **options)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        runner.fit(module, data, ckpt_path=ckpt_path)
    return weights(module), [str(each.message) for each in caught if "Strategy:" in str(each.message)]


def local(**kwargs):
    return local_update(FixedPeriod(5), **kwargs)


def compressed(**kwargs):
    return CompressedDDPStrategy(TopK(0.2), **kwargs)


TWO = {"local": local, "compressed": compressed}  # which write and read files in one way


def files_in(folder):
    return {str(path.relative_to(folder)) for path in Path(folder).rglob("*") if not path.is_dir()}


def saves_elsewhere(make, folder, steps):
    """What lets a run save at the same steps where that makes a difference: the cyclic schedule is flushed for it."""
    if make is not cyclic:
        return []
    return [ModelCheckpoint(f"{folder} elsewhere", filename="{step}", every_n_train_steps=steps, save_top_k=1)]


def resumes_exactly(rank, make, path, whole, *callbacks):
    again, said = fit(rank, make(), *callbacks, ckpt_path=path)
    for mine, theirs in zip(again, whole, strict=True):
        np.testing.assert_array_equal(mine, theirs, err_msg=str(path))
    assert said == []


# ---- written in the background -----------------------------------------------------------------------------------


class Slow(TorchCheckpointIO):
    """Takes its time, and a different one each time."""

    def save_checkpoint(self, *args, **kwargs):
        time.sleep(random.random() / 20)
        super().save_checkpoint(*args, **kwargs)


class WholeSets(Callback):
    """Looks after every step whether the folder has a whole set, as it would if the process were killed here."""

    def __init__(self, folder):
        self.folder, self.seen, self.broken = folder, [], False

    def on_train_batch_end(self, *args):
        # again, since while this looks the new set may come and the old one go
        self.seen.append(any(_is_whole(path) for _ in range(20) for path in Path(self.folder).glob("*.ckpt")))
        link = Path(self.folder) / "last.ckpt"
        self.broken |= link.is_symlink() and not link.exists()


def _is_whole(path):
    try:
        token = torch.load(path, weights_only=True)["lightning_comm.save"]["id"]
    except FileNotFoundError:
        return False  # removed meanwhile, and then a newer one is there
    return all((path.parent / f"{path.name}.ranks/{token}/rank{rank}.pt").exists() for rank in range(2))


def _in_background(rank, folder, names):
    for name in names:
        place, make = Path(folder) / name, TWO[name]
        save = ModelCheckpoint(place, filename="{step}", every_n_train_steps=1, save_top_k=1, save_last="link")
        every = ModelCheckpoint(place / "every", filename="{step}", every_n_train_steps=3, save_top_k=-1)
        sets = WholeSets(place)
        whole, _ = fit(rank, make(checkpoint_io=AsyncCheckpointIO(Slow())), sets, save, every)
        torch.distributed.barrier()
        first = sets.seen.index(True)
        assert all(sets.seen[first:]), "at some step no whole set was there"
        assert not sets.broken, "at some step the link led nowhere"
        ids = {path.name for path in (place / "step=8.ckpt.ranks").iterdir()}
        assert len(ids) == 1
        expected = {f"step=8.ckpt.ranks/{each}/rank{r}.pt" for each in ids for r in range(2)}
        left = {name for name in files_in(place) if not name.startswith("every/")}
        assert left == expected | {"step=8.ckpt", "last.ckpt"}
        resumes_exactly(rank, make, place / "every" / "step=3.ckpt", whole)


@pytest.mark.parametrize(
    "names", [pytest.param(("local",), id="local"), pytest.param(tuple(TWO), id="each", marks=pytest.mark.exhaustive)]
)
def test_checkpoints_written_in_the_background_are_whole_at_every_step_and_resume_exactly(tmp_path, names):
    launch(_in_background, str(tmp_path), names, world_size=2)


# ---- a disk that is full -----------------------------------------------------------------------------------------


class FullDisk(Callback):
    """From a step on, this rank has no room for files whose names end in some way."""

    def __init__(self, step, rank, end):
        self.step, self.rank, self.end, self.replace = step, rank, end, os.replace

    def on_train_batch_start(self, runner, *args):
        if runner.global_step == self.step and runner.global_rank == self.rank:
            whole_files.os.replace = self._replace

    def _replace(self, source, target):
        if str(target).endswith(self.end):
            raise OSError(28, "No space left on device")
        self.replace(source, target)


FULL = {
    "own file, local": (local, 1, "rank1.pt"),
    "main file, local": (local, 0, ".ckpt"),
    "own file, compressed": (compressed, 1, "rank1.pt"),
    "main file, compressed": (compressed, 0, ".ckpt"),
    "main file, cyclic": (cyclic, 0, ".ckpt"),
}
SOME_FULL = ("own file, local", "main file, compressed", "main file, cyclic")  # each strategy and each kind of file


def _full_disk(rank, folder, names):
    makes = dict.fromkeys(FULL[name][0] for name in names)  # in one order on all ranks
    wholes = {make: fit(rank, make(), *saves_elsewhere(make, folder, 3))[0] for make in makes}
    for name in names:
        make, full_rank, end = FULL[name]
        place = Path(folder) / name
        full = FullDisk(5, full_rank, end)
        save = ModelCheckpoint(place, filename="a", every_n_train_steps=3, save_top_k=1, enable_version_counter=False)
        with pytest.raises(OSError, match=rf"a\.ckpt.*rank {full_rank}: OSError: .*No space left.*{end}.*folder"):
            fit(rank, make(), full, save)
        os.replace = full.replace
        torch.distributed.barrier()
        saves = {path.parent.name for path in place.rglob("rank*.pt")}
        assert len(saves) == (0 if "cyclic" in name else 1), f"{name}: {saves}"
        assert len(files_in(place)) == (1 if "cyclic" in name else 3), f"{name}: {files_in(place)}"
        resumes_exactly(rank, make, place / "a.ckpt", wholes[make], *saves_elsewhere(make, place, 3))
    if rank == 0:
        raise RuntimeError("all was as it should be")  # and the process ends, as it does after a failure


@pytest.mark.parametrize(
    "names",
    [
        pytest.param(SOME_FULL, id="some"),
        pytest.param(tuple(FULL), id="each", marks=pytest.mark.exhaustive),
    ],
)
def test_a_full_disk_of_one_rank_is_named_on_all_and_leaves_the_checkpoint_that_was_there(tmp_path, names):
    for _, error in outcomes(_full_disk, str(tmp_path), names, world_size=2, ends_within_s=0.2):
        assert error is None or "all was as it should be" in error, error


# ---- a rank that fails -------------------------------------------------------------------------------------------


class Fail(Callback):
    def on_train_batch_end(self, runner, *args):
        if runner.global_step == 6 and runner.global_rank == 1:
            raise ValueError("boom")


def _failing(rank, folder, make):
    name, options = "last-{step}", {"enable_version_counter": False, "save_on_exception": True}
    save = ModelCheckpoint(folder, filename="a", every_n_train_steps=4, save_top_k=1, save_last=True, **options)
    save.CHECKPOINT_NAME_LAST = name
    linked = f"{folder} linked"
    link = ModelCheckpoint(
        linked, filename="{step}", every_n_train_steps=4, save_last="link", save_on_exception=True, mode="max"
    )
    fit(rank, make(), Fail(), save, link)


def _after_a_failure(rank, folder, make):
    complete, _ = fit(rank, make(), *saves_elsewhere(make, folder, 4))
    for name in ("a.ckpt", "last-step=4.ckpt"):
        resumes_exactly(rank, make, f"{folder}/{name}", complete, *saves_elsewhere(make, folder, 4))
    return fit(rank, make(), ckpt_path=f"{folder}/a.ckpt.incomplete")[1]


@pytest.mark.parametrize("make", [local, cyclic], ids=["local", "cyclic"])
def test_a_save_after_a_failure_takes_nothing_from_a_complete_checkpoint(tmp_path, make):
    answers = outcomes(_failing, str(tmp_path), make, world_size=2, ends_within_s=0.2)
    assert "boom" in answers[0][1]
    assert "boom" in answers[1][1]
    # under its own name where nothing is, and else beside; rank 0 may have been some steps ahead
    names = {name for name in files_in(tmp_path) if ".ranks" not in name}
    assert {"a.ckpt", "a.ckpt.incomplete", "last-step=4.ckpt"} < names
    (alone,) = names - {"a.ckpt", "a.ckpt.incomplete", "last-step=4.ckpt"}
    assert is_incomplete(str(tmp_path / alone))
    assert os.readlink(f"{tmp_path} linked/last.ckpt") == "step=4.ckpt"
    said = launch(_after_a_failure, str(tmp_path), make, world_size=2)[0]
    assert any("a.ckpt.incomplete" in text and ("had failed" in text or "after an error" in text) for text in said)


# ---- damage ------------------------------------------------------------------------------------------------------


def damaged(data, tensor):
    place = data.index(tensor.numpy().tobytes())
    return {
        "cut off": data[:-40],
        "half": data[: len(data) // 2],
        "empty": b"",
        "garbage": bytes(range(7, 250)) * 9,
        "flipped": data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :],
        "zeros": data[: len(data) // 2] + bytes(len(data) - len(data) // 2),
    }


EACH_KIND = ("cut off", "half", "empty", "garbage", "flipped", "zeros")
# all strategies read files in one way: each kind of damage once, what one rank alone meets in all
SOME_KINDS = {"local": ("cut off", "half", "flipped"), "cyclic": ("flipped", "garbage")}
SOME_KINDS["compressed"] = ("flipped", "empty", "zeros")


def _damaged_files(rank, folder, kinds):
    makes = {"local": local, "cyclic": cyclic, "compressed": lambda: CompressedDDPStrategy("bf16")}
    for name, make in makes.items():
        place = Path(folder) / name
        fit(rank, make(), ModelCheckpoint(place, filename="{step}", every_n_train_steps=4, save_top_k=-1))
        torch.distributed.barrier()
        tensor = torch.load(place / "step=8.ckpt", weights_only=True)["state_dict"]["net.0.weight"]
        files = damaged((place / "step=8.ckpt").read_bytes(), tensor)
        assert set(files) == set(EACH_KIND)
        for kind in kinds[name]:
            data = files[kind]
            alone = kind == "flipped"  # the file of one rank only, as on disks of their own
            path = place / f"{kind}-{rank if alone else 'all'}.ckpt"
            if rank == (1 if alone else 0):
                path.write_bytes(data)
            elif alone:
                path.write_bytes((place / "step=8.ckpt").read_bytes())
            torch.distributed.barrier()
            _refused(rank, make, path, f"{len(data)} bytes" if data else "empty", alone, kind)
        with pytest.raises(FileNotFoundError, match=r"ckpt_path.*no such file"):
            fit(rank, make(), ckpt_path=place / "never.ckpt")
        with pytest.raises(Exception, match=r"ckpt_path.*is a folder"):
            fit(rank, make(), ckpt_path=place)


def _refused(rank, make, path, why, alone, kind):
    """Fit and, for some, a validation are refused on all ranks, with the file, the reason and a way out."""
    runs = [lambda: fit(rank, make(), ckpt_path=path)]
    if kind in ("half", "flipped"):
        runs.append(lambda: trainer(make(), 2).validate(Regression(), loader(1, rank), ckpt_path=path))
    for run in runs:
        with pytest.raises(OSError, match="ckpt_path") as error:
            run()
        said = str(error.value)
        must_say = [path.name]
        must_say += (
            ["rank 1"] if alone and rank == 0 else [why, "earlier checkpoint", "newest whole one", str(path.parent)]
        )
        assert [word for word in must_say if word not in said] == [], f"{kind}: {said}"


@pytest.mark.parametrize(
    "kinds",
    [
        pytest.param(SOME_KINDS, id="some kinds"),
        pytest.param(dict.fromkeys(SOME_KINDS, EACH_KIND), id="each kind", marks=pytest.mark.exhaustive),
    ],
)
def test_a_damaged_checkpoint_is_refused_on_all_ranks_by_name_and_reason(tmp_path, kinds):
    launch(_damaged_files, str(tmp_path), kinds, world_size=2)


# ---- files from before saves had ids ------------------------------------------------------------------------------


def _older_files(rank, folder, names):
    for name in names:
        place, make = Path(folder) / name, TWO[name]
        whole, _ = fit(rank, make(), ModelCheckpoint(place, filename="a", every_n_train_steps=3, save_top_k=1))
        torch.distributed.barrier()
        (own,) = place.glob(f"a.ckpt.ranks/*/rank{rank}.pt")
        own.rename(own.parent.parent / own.name)
        torch.distributed.barrier()
        if rank == 0:
            content = torch.load(place / "a.ckpt", weights_only=True)
            del content["lightning_comm.save"]
            torch.save(content, place / "a.ckpt")
        torch.distributed.barrier()
        resumes_exactly(rank, make, place / "a.ckpt", whole)


@pytest.mark.parametrize(
    "names",
    [
        pytest.param(("compressed",), id="compressed"),
        pytest.param(tuple(TWO), id="each", marks=pytest.mark.exhaustive),
    ],
)
def test_files_of_ranks_without_an_id_in_their_path_are_read_as_ever(tmp_path, names):
    launch(_older_files, str(tmp_path), names, world_size=2)
