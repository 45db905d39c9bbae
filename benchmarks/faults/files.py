"""Checkpoints seen from outside: which there are, what belongs to them, and how files are damaged."""

import os
import random
import shutil
import subprocess
from pathlib import Path
from typing import Any

from benchmarks.faults.plan import CHECKPOINTS


def lines_of(path: Path) -> list[str]:
    """Return the lines of a file that somebody may be writing; none if it is not there."""
    return path.read_text().splitlines() if path.exists() else []


def checkpoints(files: Path) -> list[Path]:
    """Return the checkpoints under a folder, the newest first; a link and what it points to are one."""
    found = {path.resolve(): path for path in sorted(files.rglob("*.ckpt"), reverse=True) if path.is_file()}
    return sorted(found, key=lambda path: path.stat().st_mtime_ns, reverse=True)


def beside(checkpoint: Path) -> list[Path]:
    """Return the files of single ranks that belong to a checkpoint: those whose path begins with its own."""
    return sorted(
        path
        for entry in checkpoint.parent.iterdir()
        if entry.name.startswith(checkpoint.name) and entry != checkpoint
        for path in ([entry] if entry.is_file() else entry.rglob("*"))
        if path.is_file()
    )


def left_over(files: Path) -> list[str]:
    """Return the files in the folder of checkpoints that belong to no checkpoint."""
    folder = files / CHECKPOINTS
    names = [path.name for path in folder.glob("*.ckpt")]
    kept: list[Path] = []
    for entry in folder.iterdir() if folder.exists() else ():
        if not any(entry.name.startswith(name) for name in names):
            kept += [entry] if not entry.is_dir() else [path for path in entry.rglob("*") if path.is_file()]
    return sorted(str(path.relative_to(folder)) for path in kept)


def damage(files: Path, kind: str, detail: dict[str, Any], seed: int) -> tuple[Path, bytes] | None:
    """Damage a file of the newest checkpoint.

    Returns:
        The file and what it held, or ``None`` if there is none to damage.

    """
    found = checkpoints(files)
    if not found:
        return None
    own = beside(found[0])
    if kind != "damage_main" and not own:
        return None
    random_ = random.Random(seed)
    path = found[0] if kind == "damage_main" else random_.choice(own)
    times, content = path.stat(), path.read_bytes()
    if detail["damage"] == "missing":
        path.unlink()
    else:
        path.write_bytes(_damaged(content, detail, random_))
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    return path, content


def _damaged(content: bytes, detail: dict[str, Any], random_: random.Random) -> bytes:
    at = int(detail["where"] * len(content))
    changed = bytearray(content)
    if detail["damage"] == "truncate":
        return bytes(changed[: max(1, at)])
    if detail["damage"] == "empty":
        return b""
    if detail["damage"] == "flip":
        changed[at] ^= 1 << detail["bit"]
    elif detail["damage"] == "garbage":
        at = min(at, len(content) - 64)
        changed[at : at + 64] = random_.randbytes(64)
    elif detail["damage"] == "zeros":
        changed[at:] = bytes(len(content) - at)
    return bytes(changed)


class SmallDisk:
    """A file system of a few hundred kilobytes in memory, if this process may mount one.

    Args:
        folder: Where it is to be.
        size: How much it holds, in bytes.

    """

    def __init__(self, folder: Path, size: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        words = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
        self.is_mounted = (
            os.geteuid() == 0
            and shutil.which("mount") is not None
            and subprocess.run(words, capture_output=True).returncode == 0
        )

    def copy_out(self) -> None:
        """Take the file system away and leave its files in the folder."""
        if not self.is_mounted:
            return
        aside = self._folder.with_name(self._folder.name + ".aside")
        shutil.copytree(self._folder, aside, symlinks=True)
        self.close()
        shutil.rmtree(self._folder)
        aside.rename(self._folder)

    def close(self) -> None:
        """Take it away with its files."""
        if self.is_mounted:
            subprocess.run(["umount", "-l", str(self._folder)], check=True)
            self.is_mounted = False
