"""Digests of what a seeded run leaves behind: weights, messages and checkpoints.

Left out, since it differs from one run to the next: whatever a name ending in ``_s`` says, which is a time; waits,
which are recorded where there were any; the random id of a save, in files and in their names; and the folder in which
a run was. The order of messages is left out as well, since threads send some of them; and the version of Lightning.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

_LENGTH = 8
_LEFT_OUT = ("id", "save_id", "token", "pytorch-lightning_version", "epoch", "global_step")  # steps are in `loops`


def digest(value: Any, folder: str = "") -> str:
    """Return a digest of plain values and tensors: of types, shapes and every bit."""
    found = hashlib.sha256()
    _take(value, found.update, folder)
    return found.hexdigest()[:_LENGTH]


def _take(value: Any, add: Any, folder: str) -> None:
    if isinstance(value, torch.Tensor):
        dense = value.detach().cpu().contiguous()
        add(f"tensor {dense.dtype} {tuple(dense.shape)} ".encode())
        add(dense.view(-1).view(torch.uint8).numpy().tobytes() if dense.numel() else b"")
    elif isinstance(value, Mapping):
        add(f"map {len(value)} ".encode())
        for key in sorted(value, key=lambda each: (type(each).__name__, str(each))):
            add(f"{type(key).__name__} {_without(str(key), folder)}: ".encode())
            if not _is_left_out(key):
                _take(value[key], add, folder)
    elif isinstance(value, (list, tuple)):
        add(f"list {len(value)} ".encode())
        for each in value:
            _take(each, add, folder)
    elif isinstance(value, (set, frozenset)):
        _take(sorted(map(str, value)), add, folder)
    elif value is None or isinstance(value, (bool, int, float, str, bytes)):
        add(f"{type(value).__name__} {_without(repr(value), folder)} ".encode())
    elif hasattr(value, "tobytes"):
        add(f"array {value.dtype} {value.shape} ".encode() + value.tobytes())
    else:
        add(f"object {type(value).__name__} ".encode())
        _take(vars(value) if hasattr(value, "__dict__") else None, add, folder)


def _is_left_out(key: Any) -> bool:
    return isinstance(key, str) and (key.endswith("_s") or key in _LEFT_OUT)


def _without(text: str, folder: str) -> str:
    return text.replace(folder, "FOLDER") if folder else text


def weights(module: torch.nn.Module) -> str:
    """Return a digest of parameters and buffers."""
    return digest(dict(module.state_dict()))


def messages(ledger: Any) -> dict[str, str]:
    """Return what a rank sent, by purpose.

    How many messages of each kind, the bytes handed over and those on the wire, and a digest of all records.
    """
    found: dict[str, str] = {}
    records = [record for record in ledger.records if record.kind != "receive"]
    for purpose in sorted({record.purpose for record in records}):
        own = [record for record in records if record.purpose == purpose]
        kinds = Counter(record.kind for record in own)
        rows = sorted((record.step, record.kind, record.payload_bytes, record.wire_bytes) for record in own)
        counted = " ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))
        if purpose == "checkpoint" and "send" in kinds:  # files as bytes, whose lengths differ by a few from run to run
            found[purpose] = counted
            continue
        payload, wire = sum(record.payload_bytes for record in own), sum(record.wire_bytes for record in own)
        found[purpose] = f"{counted}, {payload} B, {wire} B sent, {digest(json.dumps(rows))}"
    return found


def checkpoints(folder: Path) -> dict[str, dict[str, Any]]:
    """Return digests of each part of each file below a folder; what the package adds is taken apart once more."""
    found = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        parts = path.relative_to(folder).parts
        name = "/".join("ID" if k and parts[k - 1].endswith(".ranks") else part for k, part in enumerate(parts))
        if path.suffix in (".ckpt", ".pt"):
            content = torch.load(path, map_location="cpu", weights_only=False)
            found[name] = _parts(content, str(folder))
    return compact(found)


def compact(files: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return the digests without what is empty, and of all ranks but the first with one for each file."""
    found = {}
    for name, parts in files.items():
        kept = {key.removeprefix("lightning_comm."): each for key, each in parts.items() if each not in (None, [])}
        is_other = "/rank" in name and not name.endswith("/rank0.pt")
        found[name] = {"all": digest(kept)} if is_other else kept
    return found


def _parts(content: Any, folder: str) -> dict[str, Any]:
    if not isinstance(content, Mapping):
        return {"": digest(content, folder)}
    found = {}
    for key in sorted(content, key=str):
        value = content[key]
        if "lightning_comm" in str(key) and isinstance(value, Mapping):
            found.update({f"{key}/{inner}": _shown(each, folder) for inner, each in _kept(value)})
        elif not _is_left_out(key):
            found[str(key)] = _shown(value, folder)
    return found


def _kept(value: Mapping[Any, Any]) -> list[tuple[Any, Any]]:
    return [(key, value[key]) for key in sorted(value, key=str) if not _is_left_out(key)]


def _shown(value: Any, folder: str) -> Any:
    """Return a number, a truth or nothing as it is, and of everything else a digest."""
    if value is None or isinstance(value, (bool, int)):
        return value
    return [] if isinstance(value, (Mapping, list, tuple)) and not value else digest(value, folder)
