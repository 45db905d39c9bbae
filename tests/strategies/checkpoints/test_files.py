"""Checkpoint files are whole or not there, whenever a process is killed; and damage shows before anything is loaded."""

import gc
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
from lightning_comm.core.whole_files import partial_path, write_whole
from lightning_comm.lightning_internals import wait_for_writes, writer_in_background
from lightning_comm.strategies.checkpoints import removal, sets
from lightning_comm.strategies.checkpoints.damage import _damage_of, damage, newest_whole
from lightning_comm.strategies.checkpoints.entry import Save, is_incomplete
from lightning_comm.strategies.checkpoints.loading import _load, skip_unfinished
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
            world_size=RANKS,
            lightning_module=None,
        )
        for rank in range(RANKS)
    ]


def on_rank_zero(rank, method, *args):
    return lambda: getattr(rank.checkpoint_io, method)(*args) if rank.is_global_zero else None


def save_set(ranks, path, version):
    save = sets.begin(ranks[0], path, ranks[0].broadcast)
    for rank in ranks:
        sets.write_own(rank, None, "Strategy", save, {"content": version})
    checkpoint = {"content": version, "token": save.id, "weights": torch.ones(3)}
    save.write(checkpoint)
    for rank in ranks:
        sets.write_main(rank, None, "Strategy", save, on_rank_zero(rank, "save_checkpoint", checkpoint, path))


def remove_set(ranks, path):
    for rank in ranks:
        removal.remove(rank, path, on_rank_zero(rank, "remove_checkpoint", path))


def remove_and_wait(ranks, path):
    remove_set(ranks, path)
    if (background := writer_in_background(ranks[0].checkpoint_io)) is not None:
        assert wait_for_writes(background) is None


def whole_versions(ranks, folder):
    """The versions of all main files that are whole, with the files of all ranks; links lead to one."""
    found = set()
    for path in Path(folder).glob("*.ckpt"):
        assert damage(path) is None, path  # a main file is never half there, and no link leads nowhere
        main = torch.load(path, weights_only=True)
        own = [sets.read_own(rank, path, main["token"])[0] for rank in ranks]
        if all(each is not None and each["content"] == main["content"] for each in own):
            found.add(main["content"])
    return found


def linked_version(folder):
    return torch.load(f"{folder}/last-v1.ckpt", weights_only=True)["content"]


def dies_at(operation, folder, change):
    """Run a change in a process that dies at the n-th file operation within a folder; return whether it did."""
    child = os.fork()
    if child == 0:
        gc.disable()  # to look at all that the parent has loaded copies its memory
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


def slow_in_background():
    return AsyncCheckpointIO(Slow())


# Where a thread writes too, every third operation: which one that is differs from run to run anyhow. Where files of old
# go, every second one, since what goes before its time is gone for two at least: the main file is opened, and renamed.
@pytest.mark.parametrize(
    ("change", "make_io", "before", "stride"),
    [
        pytest.param(overwrite, WholeFileIO, "now", 1, id="overwritten"),
        pytest.param(overwrite, WholeFileIO, "of old", 2, id="old files overwritten"),
        pytest.param(replace, WholeFileIO, "now", 2, id="replaced"),
        pytest.param(replace_in_background, slow_in_background, "now", 3, id="replaced in background"),
        pytest.param(overwrite, WholeFileIO, "of old", 1, id="each over old files", marks=pytest.mark.exhaustive),
        pytest.param(replace, WholeFileIO, "now", 1, id="each replaced", marks=pytest.mark.exhaustive),
        pytest.param(
            replace_in_background, slow_in_background, "now", 1, id="each in background", marks=pytest.mark.exhaustive
        ),
    ],
)
def test_a_whole_set_is_there_whenever_a_process_is_killed(tmp_path, monkeypatch, change, make_io, before, stride):
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # for a loss of power, which this is not
    writers = ranks_of(WholeFileIO(), monkeypatch)
    operation, seen = 1 - stride, set()
    while True:
        operation += stride
        folder = tmp_path / str(operation)
        save_set(writers, f"{folder}/last.ckpt", 1)
        if before == "of old":  # the files of ranks lay in the folder itself before saves had ids in their paths
            (inner,) = (folder / "last.ckpt.ranks").iterdir()
            for file in inner.iterdir():
                file.rename(inner.parent / file.name)
            inner.rmdir()
        (folder / "last-v1.ckpt").symlink_to("last.ckpt")  # as `save_last="link"` makes it
        assert whole_versions(writers, folder) == {1}
        ranks = ranks_of(make_io(), monkeypatch)
        killed = dies_at(operation, str(folder), lambda ranks=ranks, folder=folder: change(ranks, folder))
        versions = whole_versions(writers, folder)
        assert linked_version(folder) in versions
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
            host = Path(removal.folder(f"{tmp_path}/{version - 1}.ckpt"))
            remove_set(ranks[1:], f"{tmp_path}/{version - 1}.ckpt")
            assert host.exists()  # rank 0 has yet to write what takes its place
            remove_set(ranks[:1], f"{tmp_path}/{version - 1}.ckpt")
            assert wait_for_writes(ranks[0].checkpoint_io) is None
            (host / "of the other disk").mkdir(parents=True)
            removal.notes_of(ranks[0]).removed.append(str(host / "of the other disk"))
            sets.begin(ranks[0], "any", ranks[0].broadcast)
            sets.begin(ranks[1], "any", ranks[1].broadcast)
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


def test_names_that_are_as_long_as_the_file_system_takes_are_written_and_leave_nothing(tmp_path):
    names = [letter * 250 + ".ckpt" for letter in "ab"] + ["c" * 249 + "a.ckpt", "c" * 249 + "b.ckpt"]
    for name in names:
        WholeFileIO().save_checkpoint({"name": name}, tmp_path / name)
    assert sorted(each.name for each in tmp_path.iterdir()) == names
    assert len({partial_path(name) for name in names}) == len(names)


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


# ---- a `CheckpointIO` of the user's --------------------------------------------------------------------------------


class Elsewhere(TorchCheckpointIO):
    """Keeps files under other names."""

    def __init__(self, store):
        self.store = Path(store)

    def place(self, path):
        return self.store / str(path).replace("/", "|")

    def save_checkpoint(self, checkpoint, path, storage_options=None):
        super().save_checkpoint(checkpoint, self.place(path), storage_options)

    def load_checkpoint(self, path, map_location=None, weights_only=None):
        return super().load_checkpoint(self.place(path), map_location, weights_only)

    def remove_checkpoint(self, path):
        self.place(path).unlink()


class OnlyFiles(TorchCheckpointIO):
    def remove_checkpoint(self, path):
        os.remove(path)


@pytest.mark.parametrize("make_io", [Elsewhere, lambda _: OnlyFiles()], ids=["elsewhere", "files alone"])
@pytest.mark.parametrize("in_background", [False, True])
def test_sets_of_a_checkpoint_io_that_is_not_ours_are_read_and_removed_through_it(
    tmp_path, monkeypatch, make_io, in_background
):
    inner = make_io(tmp_path / "store")
    ranks = ranks_of(AsyncCheckpointIO(inner) if in_background else inner, monkeypatch)
    path, new = str(tmp_path / "a.ckpt"), str(tmp_path / "new.ckpt")
    for version in (1, 2, 3):
        save_set(ranks, path, version)
    save_set(ranks, new, 4)
    if in_background:
        assert wait_for_writes(ranks[0].checkpoint_io) is None
    token = inner.load_checkpoint(path, weights_only=True)["token"]
    assert [sets.read_own(rank, path, token)[0]["content"] for rank in ranks] == [3, 3]
    state, problem = sets.read_own(ranks[0], path, "never written")
    assert state is None
    assert "FileNotFoundError" in problem
    remove_and_wait(ranks, path)
    left = [each.name.rsplit("|", 1)[-1] for each in tmp_path.rglob("*") if each.is_file()]
    assert sorted(left) == ["new.ckpt", "rank0.pt", "rank1.pt"]
    with pytest.warns(UserWarning, match=r"nobody can tell whether .*new\.ckpt' is an earlier, complete checkpoint"):
        assert sets.incomplete_path(ranks[0], "Strategy", new) == f"{new}.incomplete"


def test_a_checkpoint_io_that_is_not_ours_loads_first_and_its_errors_are_explained(tmp_path, monkeypatch):
    io = Elsewhere(tmp_path / "store")
    rank, path = ranks_of(io, monkeypatch)[0], str(tmp_path / "a.ckpt")

    def load(_):
        return _load(rank, "Strategy", path, lambda each: io.load_checkpoint(each, weights_only=True))

    with pytest.raises(FileNotFoundError, match="store"):
        load(path)
    io.save_checkpoint({"w": 1}, path)
    assert load(path) == {"w": 1}
    Path(path).write_bytes(b"")  # of somebody else
    assert load(path) == {"w": 1}
    io.place(path).unlink()
    with pytest.raises(OSError, match=r"a\.ckpt' cannot be loaded \(FileNotFoundError.*it is empty"):
        load(path)


class Keeps(WholeFileIO):
    def remove_checkpoint(self, path):
        raise PermissionError(13, "not allowed", str(path))


@pytest.mark.parametrize("in_background", [False, True])
def test_a_removal_that_fails_is_a_warning_and_leaves_the_whole_set(tmp_path, monkeypatch, in_background):
    ranks = ranks_of(AsyncCheckpointIO(Keeps()) if in_background else Keeps(), monkeypatch)
    writers = ranks_of(WholeFileIO(), monkeypatch)
    save_set(ranks, f"{tmp_path}/1.ckpt", 1)
    save_set(ranks, f"{tmp_path}/2.ckpt", 2)
    with pytest.warns(UserWarning, match=r"1\.ckpt' was to be removed.*PermissionError.*not allowed.*stays"):
        remove_and_wait(ranks, f"{tmp_path}/1.ckpt")
    save_set(ranks, f"{tmp_path}/3.ckpt", 3)
    if in_background:
        ranks[0].checkpoint_io.teardown()
    assert whole_versions(writers, tmp_path) == {1, 2, 3}


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
