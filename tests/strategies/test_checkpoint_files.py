"""Checkpoint files are whole or not there, whenever a process is killed; and damage shows before anything is loaded."""

import io
import os
import sys
import time
from pathlib import Path
from threading import Event
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.plugins.io import AsyncCheckpointIO

from lightning_comm import CompressedDDPStrategy, CyclicStrategy, FixedPeriod, LocalUpdateStrategy
from lightning_comm.core.whole_files import write_whole
from lightning_comm.lightning_internals import wait_for_writes
from lightning_comm.strategies.checkpoints import sets
from lightning_comm.strategies.checkpoints.damage import _damage_of, damage, newest_whole
from lightning_comm.strategies.checkpoints.entry import Save, is_incomplete
from lightning_comm.strategies.checkpoints.loading import skip_unfinished
from lightning_comm.strategies.checkpoints.whole_files import WholeFileIO

RANKS = 2
FILE_OPERATIONS = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree")


# ---- killed between any two file operations ----------------------------------------------------------------------


def ranks_of(checkpoint_io, monkeypatch):
    """The ranks of a strategy as far as sets of files need them, one after the other in this process."""
    monkeypatch.setattr(sets, "first_problem", lambda strategy, recorder, problem: problem and (0, problem))
    return [
        SimpleNamespace(
            checkpoint_io=checkpoint_io,
            global_rank=rank,
            local_rank=rank,
            is_global_zero=rank == 0,
            broadcast=lambda value: value,
        )
        for rank in range(RANKS)
    ]


def on_rank_zero(rank, method, *args):
    return lambda: getattr(rank.checkpoint_io, method)(*args) if rank.is_global_zero else None


def save_set(ranks, path, version):
    save = sets.begin(ranks[0], path)
    for rank in ranks:
        sets.write_own(rank, None, "Strategy", save, {"content": version})
    checkpoint = {"content": version, "token": save.id, "weights": torch.ones(3)}
    save.write(checkpoint)
    for rank in ranks:
        sets.write_main(rank, None, "Strategy", save, on_rank_zero(rank, "save_checkpoint", checkpoint, path))


def remove_set(ranks, path):
    for rank in ranks:
        sets.remove(rank, path, on_rank_zero(rank, "remove_checkpoint", path))


def whole_versions(ranks, folder):
    """The versions of all main files that are whole, with the files of all ranks."""
    found = set()
    for path in Path(folder).glob("*.ckpt"):
        assert damage(path) is None, path  # a main file is never half there
        main = torch.load(path, weights_only=True)
        own = [sets.read_own(rank, path, main["token"])[0] for rank in ranks]
        if all(each is not None and each["content"] == main["content"] for each in own):
            found.add(main["content"])
    return found


def dies_at(operation, folder, change):
    """Run a change in a process that dies at the n-th file operation within a folder; return whether it did."""
    child = os.fork()
    if child == 0:
        left = operation

        def watch(event, args):
            nonlocal left
            if event in FILE_OPERATIONS and args and str(args[0]).startswith(folder):
                left -= 1
                if left == 0:
                    os._exit(9)

        sys.addaudithook(watch)
        try:
            change()
        except BaseException:
            os._exit(1)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, 9), f"the change failed at operation {operation}"
    return code == 9


def overwrite(ranks, folder):
    save_set(ranks, f"{folder}/last.ckpt", 2)


def replace(ranks, folder):
    save_set(ranks, f"{folder}/new.ckpt", 2)
    remove_set(ranks, f"{folder}/last.ckpt")


def replace_in_background(ranks, folder):
    replace(ranks, folder)
    save_set(ranks, f"{folder}/new.ckpt", 3)
    ranks[0].checkpoint_io.teardown()


class Slow(WholeFileIO):
    def save_checkpoint(self, *args, **kwargs):
        time.sleep(0.002)
        super().save_checkpoint(*args, **kwargs)


@pytest.mark.parametrize(
    ("change", "make_io", "before"),
    [
        (overwrite, WholeFileIO, "now"),
        (overwrite, WholeFileIO, "of old"),
        (replace, WholeFileIO, "now"),
        (replace_in_background, lambda: AsyncCheckpointIO(Slow()), "now"),
    ],
    ids=["overwritten", "old files overwritten", "replaced", "replaced in background"],
)
def test_a_whole_set_is_there_whenever_a_process_is_killed(tmp_path, monkeypatch, change, make_io, before):
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # for a loss of power, which this is not
    writers = ranks_of(WholeFileIO(), monkeypatch)
    operation, seen = 0, set()
    while True:
        operation += 1
        folder = tmp_path / str(operation)
        save_set(writers, f"{folder}/last.ckpt", 1)
        if before == "of old":  # the files of ranks lay in the folder itself before saves had ids in their paths
            (inner,) = (folder / "last.ckpt.ranks").iterdir()
            for file in inner.iterdir():
                file.rename(inner.parent / file.name)
            inner.rmdir()
        assert whole_versions(writers, folder) == {1}
        ranks = ranks_of(make_io(), monkeypatch)
        killed = dies_at(operation, str(folder), lambda ranks=ranks, folder=folder: change(ranks, folder))
        versions = whole_versions(writers, folder)
        assert versions, f"no whole set is left where the process dies at file operation {operation}"
        seen |= versions
        overwrite(writers, folder)  # what a killed process has left is in nobody's way
        assert 2 in whole_versions(writers, folder)
        left = [path.name for path in folder.rglob("last.ckpt*") if path.name.endswith(".partial")]
        assert left == []
        assert len(list((folder / "last.ckpt.ranks").iterdir())) == 1
        if not killed:
            break
    assert operation > 8
    assert {1, 2} <= seen


class FailsOnce(WholeFileIO):
    """Has no room for one main file, and says so once it is asked to."""

    def __init__(self, version):
        self.version, self.asked = version, Event()

    def save_checkpoint(self, checkpoint, path, storage_options=None):
        if str(path).endswith(".ckpt") and checkpoint["content"] == self.version:
            self.asked.wait(60)
            raise OSError(28, "No space left on device", str(path))
        super().save_checkpoint(checkpoint, path, storage_options)


def test_a_full_disk_in_the_background_shows_at_the_next_save_and_costs_no_set(tmp_path, monkeypatch):
    ranks, writers = ranks_of(AsyncCheckpointIO(FailsOnce(2)), monkeypatch), ranks_of(WholeFileIO(), monkeypatch)
    save_set(writers, f"{tmp_path}/last.ckpt", 1)
    save_set(ranks, f"{tmp_path}/last.ckpt", 2)
    remove_set(ranks, f"{tmp_path}/last.ckpt")
    ranks[0].checkpoint_io.checkpoint_io.asked.set()
    assert wait_for_writes(ranks[0].checkpoint_io) is not None
    assert whole_versions(writers, tmp_path) == {1}
    with pytest.raises(OSError, match=r"last\.ckpt' could not be written: rank 0: .*No space left"):
        save_set(ranks, f"{tmp_path}/last.ckpt", 3)
    with pytest.raises(OSError, match="No space left"):
        ranks[0].checkpoint_io.teardown()
    assert whole_versions(writers, tmp_path) == {3}


def test_a_host_without_rank_0_removes_what_rank_0_has_removed(tmp_path, monkeypatch):
    ranks = ranks_of(AsyncCheckpointIO(WholeFileIO()), monkeypatch)
    ranks[1].local_rank, ranks[1].checkpoint_io = 0, AsyncCheckpointIO(WholeFileIO())
    shared = ranks[0].broadcast

    def told_again(value):
        ranks[1].broadcast = lambda _: value
        return shared(value)

    ranks[0].broadcast = told_again
    for version in (1, 2, 3):
        save_set(ranks, f"{tmp_path}/{version}.ckpt", version)
        if version > 1:
            host = Path(sets.folder(f"{tmp_path}/{version - 1}.ckpt"))
            remove_set(ranks[1:], f"{tmp_path}/{version - 1}.ckpt")
            assert host.exists()  # rank 0 has yet to write what takes its place
            remove_set(ranks[:1], f"{tmp_path}/{version - 1}.ckpt")
            assert wait_for_writes(ranks[0].checkpoint_io) is None
            (host / "of the other disk").mkdir(parents=True)
            sets._removed[ranks[0].checkpoint_io].append(str(host / "of the other disk"))
            sets.begin(ranks[0], "any")
            sets.begin(ranks[1], "any")
            assert not host.exists()
    ranks[0].checkpoint_io.teardown()


# ---- one file ----------------------------------------------------------------------------------------------------


def test_a_file_that_cannot_be_written_leaves_the_old_one_and_names_it(tmp_path):
    path = tmp_path / "a.ckpt"
    WholeFileIO().save_checkpoint({"w": torch.ones(3)}, path)

    def fails(file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match=r"No space left on device: .*a\.ckpt"):
        write_whole(str(path), fails)
    assert [each.name for each in tmp_path.iterdir()] == ["a.ckpt"]
    assert torch.equal(torch.load(path)["w"], torch.ones(3))


def test_a_full_disk_is_told_as_such_also_where_torch_has_words_of_its_own(tmp_path):
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("/dev/full is not on this system")
    with pytest.raises(OSError, match="No space left on device"):
        WholeFileIO().save_checkpoint({"w": torch.ones(30_000)}, full)
    assert full.is_char_device()


def test_strategies_write_whole_files_unless_the_user_says_how(tmp_path):
    own = TorchCheckpointIO()
    for make in (lambda **kw: LocalUpdateStrategy(FixedPeriod(2), **kw), CyclicStrategy, _compressed):
        assert type(make().checkpoint_io) is WholeFileIO
        assert make(checkpoint_io=own).checkpoint_io is own
        assert type(make(checkpoint_io=AsyncCheckpointIO()).checkpoint_io.checkpoint_io) is WholeFileIO
        assert make(checkpoint_io=AsyncCheckpointIO(own)).checkpoint_io.checkpoint_io is own


def _compressed(**kwargs):
    return CompressedDDPStrategy("topk", **kwargs)


# ---- damage ------------------------------------------------------------------------------------------------------


def small_file():
    torch.manual_seed(0)
    content = {"weights": torch.randn(5), "steps": [1, 2.5, "abc"], "mask": torch.zeros(3, dtype=torch.bool)}
    file = io.BytesIO()
    torch.save(content, file)
    return content, file.getvalue()


def same(one, two):
    if isinstance(one, torch.Tensor):
        return isinstance(two, torch.Tensor) and one.dtype == two.dtype and torch.equal(one, two)
    return type(one) is type(two) and one == two


def is_found_or_harmless(content, data):
    if _damage_of(io.BytesIO(data)) is not None:
        return True
    try:
        loaded = torch.load(io.BytesIO(data), weights_only=True)
    except Exception:  # found as well, if later; a file with another beginning is no archive, so it may fail in any way
        return True
    return list(loaded) == list(content) and all(same(content[key], loaded[key]) for key in content)


def test_a_flipped_bit_is_found_or_changes_nothing_that_is_loaded():
    content, data = small_file()
    assert _damage_of(io.BytesIO(data)) is None
    directory = data.index(b"PK\x01\x02")
    places = [*range(0, directory, 3), *range(directory, len(data))]
    for place in places:
        flipped = bytearray(data)
        flipped[place] ^= 1 << (4 if place >= directory else place % 8)  # 4: what marks a record as a folder
        assert is_found_or_harmless(content, bytes(flipped)), f"bit in byte {place} of {len(data)}"


def test_a_file_that_is_cut_off_or_ends_in_zeros_is_found_whatever_its_length():
    content, data = small_file()
    for length in range(len(data)):
        if length == 0 or length >= 4:
            assert _damage_of(io.BytesIO(data[:length])) is not None, length
        zeros = data[:length] + bytes(len(data) - length)
        assert is_found_or_harmless(content, zeros), length


def test_files_without_checksums_are_not_taken_for_damaged(tmp_path):
    before = torch.serialization.get_crc32_options()
    try:
        torch.serialization.set_crc32_options(False)
        torch.save({"w": torch.ones(3)}, tmp_path / "none.ckpt")
    finally:
        torch.serialization.set_crc32_options(before)
    torch.save({"w": torch.ones(3)}, tmp_path / "old.ckpt", _use_new_zipfile_serialization=False)
    assert damage(tmp_path / "none.ckpt") is None
    assert damage(tmp_path / "old.ckpt") is None


def test_the_newest_whole_checkpoint_is_named(tmp_path):
    for age, name in enumerate(["bad.ckpt", "cut.ckpt", "alone.ckpt", "whole.ckpt", "older.ckpt"]):
        checkpoint = {"w": torch.ones(30)}
        Save("").write(checkpoint, incomplete=name == "alone.ckpt")
        torch.save(checkpoint, tmp_path / name)
        os.utime(tmp_path / name, (1e9 - age, 1e9 - age))
    (tmp_path / "cut.ckpt").write_bytes((tmp_path / "cut.ckpt").read_bytes()[:-30])
    assert newest_whole(tmp_path / "bad.ckpt") == str(tmp_path / "whole.ckpt")


# ---- files of ranks ----------------------------------------------------------------------------------------------


class RunsCode:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_a_file_of_a_rank_runs_no_code_and_says_how_types_are_let_pass(tmp_path, monkeypatch):
    rank = ranks_of(WholeFileIO(), monkeypatch)[0]
    path, made = Path(sets.rank_path(tmp_path / "a.ckpt", "id", 0)), tmp_path / "made by the file"
    path.parent.mkdir(parents=True)
    torch.save({"version": 1, "token": "id", "content": RunsCode(str(made))}, path)
    state, problem = sets.read_own(rank, tmp_path / "a.ckpt", "id")
    assert state is None
    assert not made.exists()
    assert [word for word in (str(path), "UnpicklingError", "add_safe_globals") if word not in problem] == []


def test_an_incomplete_checkpoint_goes_beside_a_complete_one_and_over_an_incomplete_one(tmp_path, monkeypatch):
    rank, path = ranks_of(WholeFileIO(), monkeypatch)[0], str(tmp_path / "last.ckpt")
    assert sets.incomplete_path(rank, "Strategy", path) == path
    for incomplete, expected in ((True, path), (False, path + ".incomplete")):
        checkpoint = {}
        Save(path).write(checkpoint, incomplete=incomplete)
        rank.checkpoint_io.save_checkpoint(checkpoint, path)
        assert is_incomplete(path) == incomplete
        if incomplete:
            assert sets.incomplete_path(rank, "Strategy", path) == expected
        else:
            with pytest.warns(UserWarning, match=r"complete checkpoint and stays.*last\.ckpt\.incomplete"):
                assert sets.incomplete_path(rank, "Strategy", path) == expected


def test_numbers_and_arrays_of_numpy_are_plain_in_a_file_of_a_rank(tmp_path, monkeypatch):
    ranks, path = ranks_of(WholeFileIO(), monkeypatch), str(tmp_path / "a.ckpt")
    state = {"seed": np.int64(7), "best": np.float32(0.5), "order": np.arange(4), "on": np.bool_(True)}
    save_set(ranks, path, state)
    token = torch.load(path, weights_only=False)["token"]
    loaded, problem = sets.read_own(ranks[1], path, token)
    assert problem is None
    assert loaded["content"].keys() == state.keys()
    for name, value in state.items():
        assert type(loaded["content"][name]) is type(value)
        np.testing.assert_array_equal(loaded["content"][name], value)


def test_a_checkpoint_for_slurm_that_was_never_finished_is_passed_over(tmp_path):
    (tmp_path / "hpc_ckpt_3.ckpt.ranks").mkdir()
    for number in (1, 2):
        (tmp_path / f"hpc_ckpt_{number}.ckpt").touch()
    with pytest.warns(UserWarning, match=r"hpc_ckpt_3\.ckpt' was never finished.*hpc_ckpt_2\.ckpt"):
        assert skip_unfinished("Strategy", tmp_path / "hpc_ckpt_3.ckpt") == str(tmp_path / "hpc_ckpt_2.ckpt")
    for name in ("hpc_ckpt_1.ckpt", "other.ckpt"):
        assert skip_unfinished("Strategy", tmp_path / name) == tmp_path / name
