"""Seeded runs of every strategy: digests of their weights, messages and checkpoints, to compare two commits by.

    PYTHONPATH=. python benchmarks/house/seeded_runs.py --out here.json
    PYTHONPATH=../other python benchmarks/house/seeded_runs.py --out there.json
    python benchmarks/house/seeded_runs.py --compare here.json there.json

Small models are trained on the CPU by real ranks over gloo, forked from this process, in one piece and saved in the
middle and resumed. Nothing of the package is named but what a user constructs, which is looked for in all modules, so
that the program runs on commits whose modules have other names. Comparing says what differs, and ends with 1 if
weights differ, or what was sent for a purpose that both know.
"""

import argparse
import json
import logging
import multiprocessing
import os
import queue
import random
import socket
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.append(str(Path(__file__).parent))
if TYPE_CHECKING:
    from seeded_cases import Case

BATCHES, BATCH = 12, 4
_TIMEOUT_S = 240.0


def train(case: "Case", rank: int, folder: str) -> list[dict[str, Any]]:
    """Carry out a run on this rank; return what it leaves behind."""
    whole, there = f"{folder}/end.ckpt", f"{folder}/middle.ckpt"
    from seeded_models import SaveAtEnd, Stop

    first = Stop(case.stop, there) if case.stop is not None else SaveAtEnd(whole)
    fits = [_fit(case, rank, [first], None)]
    if case.stop is not None:
        fits.append(_fit(case, rank, [SaveAtEnd(whole)], there))
    return fits


def _fit(case: "Case", rank: int, extra: list[Any], path: str | None) -> dict[str, Any]:
    import numpy as np
    import torch
    from lightning.pytorch import Trainer
    from seeded_digests import digest, messages, weights
    from seeded_models import MODULES, Data, Samples, network
    from torch.utils.data import DataLoader

    module = MODULES[case.module](network(case.net, case.dtype), case.optimizer, falls=case.falls)
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(rank)
    defaults: dict[str, Any] = {"limit_val_batches": 0, "max_epochs": 1, **_QUIET}
    runner = Trainer(
        strategy=case.strategy if isinstance(case.strategy, str) else case.strategy(),
        devices=case.ranks,
        callbacks=[*case.callbacks(), *extra],
        **{**defaults, **case.options},
    )
    data, validation = _data(case, rank), DataLoader(Samples(8, 90 + rank, case.dtype), 4)
    if case.data == "module":
        runner.fit(module, datamodule=Data(data, validation), ckpt_path=path)
    else:
        runner.fit(module, data, validation, ckpt_path=path)
    assert runner.world_size == case.ranks
    ledger = getattr(runner.strategy, "ledger", None)
    metrics = {name: value for name, value in runner.callback_metrics.items() if not name.endswith("_s")}
    found = {"weights": weights(module), "metrics": digest(metrics), "steps": runner.global_step}
    return {**found, "messages": {} if ledger is None else messages(ledger)}


_QUIET = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "use_distributed_sampler": False,
}


def _data(case: "Case", rank: int) -> Any:
    from seeded_cases import make
    from seeded_models import Samples, Stream, unequal
    from torch.utils.data import DataLoader

    samples = Samples(BATCHES * BATCH, rank, case.dtype)
    if case.data == "resumable":
        return make("ResumableLoader", samples, BATCH, seed=3, num_replicas=1, rank=0)
    if case.data == "partition":
        return make("PartitionedLoader", Samples(BATCHES * 12 + 7, 0, case.dtype), 12, seed=3)
    if case.data == "unequal":
        return unequal(samples)
    return DataLoader(Stream(samples) if case.data == "stream" else samples, BATCH)


# ---- ranks -------------------------------------------------------------------------------------------------------


def ranks_of(ranks: int, work: Callable[[int], Any]) -> list[Any]:
    """Do something in processes with the environment that Lightning expects.

    Raises:
        RuntimeError: If one of them fails or does not answer in time; all are ended then.

    """
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    processes = [context.Process(target=_rank, args=(work, rank, ranks, port, results)) for rank in range(ranks)]
    for process in processes:
        process.start()
    answers: dict[int, Any] = {}
    until = time.monotonic() + _TIMEOUT_S
    try:
        while len(answers) < ranks:
            rank, answer, error = results.get(timeout=max(0.1, until - time.monotonic()))
            if error is not None:
                raise RuntimeError(f"rank {rank}: {error}")
            answers[rank] = answer
    except queue.Empty:
        raise RuntimeError(f"no answer from all of {ranks} ranks within {_TIMEOUT_S:.0f} s") from None
    finally:
        for process in processes:
            process.join(10 if len(answers) == ranks else 0.5)
            process.kill()
    return [answers[rank] for rank in range(ranks)]


def _rank(work: Callable[[int], Any], rank: int, ranks: int, port: int, results: Any) -> None:
    import torch.distributed as dist

    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(ranks)}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "NODE_RANK": "0"}
    try:
        answer = work(rank)
        if dist.is_initialized():
            dist.barrier()
        results.put((rank, answer, None))
        if dist.is_initialized():
            dist.barrier()
            dist.destroy_process_group()
    except BaseException:
        results.put((rank, None, traceback.format_exc()))


def run_all(pattern: str) -> dict[str, Any]:
    """Carry out all runs whose names have a text in them; return the digests."""
    import torch
    from seeded_cases import cases, registered
    from seeded_digests import checkpoints

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for name in ("lightning", "lightning.pytorch", "lightning.fabric", "lightning_comm"):
        logging.getLogger(name).setLevel(logging.ERROR)
    runs: dict[str, Any] = {}
    for case in cases():
        if pattern not in case.name:
            continue
        began = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            os.chdir(folder)
            try:
                answers = _answers(case, folder)
                runs[case.name] = {"ranks": shortened(answers), "files": checkpoints(Path(folder))}
            except RuntimeError as error:
                runs[case.name] = {"error": str(error).strip().splitlines()[-1]}
                print(error, file=sys.stderr)
            finally:
                os.chdir("/")
        print(f"{time.monotonic() - began:5.1f} s  {case.name}", file=sys.stderr, flush=True)
    return {"names": registered(), "runs": runs}


def _answers(case: "Case", folder: str) -> list[Any]:
    for tries in range(4):
        try:
            return ranks_of(case.ranks, lambda rank: train(case, rank, folder))
        except RuntimeError as error:
            if "EADDRINUSE" not in str(error) or tries == 3:  # another program had the port meanwhile
                raise
    raise AssertionError


def shortened(ranks: list[Any]) -> list[Any]:
    """Return the answers of ranks with ``"as rank 0"`` for each that is the same."""
    return [each if rank == 0 or each != ranks[0] else "as rank 0" for rank, each in enumerate(ranks)]


def _whole(ranks: list[Any]) -> list[Any]:
    return [ranks[0] if each == "as rank 0" else each for each in ranks]


# ---- comparing ---------------------------------------------------------------------------------------------------


def differences(one: dict[str, Any], other: dict[str, Any]) -> tuple[list[str], list[str]]:
    """Compare the digests of two commits.

    Returns:
        What must not differ and does, and what else differs: what is new, and parts of checkpoints.

    """
    wrong = [f"name {name}: only in one" for name in sorted(set(one["names"]) ^ set(other["names"]))]
    noted: list[str] = []
    for name in sorted({*one["runs"], *other["runs"]}):
        if name not in one["runs"] or name not in other["runs"]:
            wrong.append(f"{name}: only in one")
            continue
        mine, theirs = one["runs"][name], other["runs"][name]
        if "error" in mine or "error" in theirs:
            wrong.append(f"{name}: error: {mine.get('error')} | {theirs.get('error')}")
            continue
        for rank, pair in enumerate(zip(_whole(mine["ranks"]), _whole(theirs["ranks"]), strict=True)):
            for k, (before, after) in enumerate(zip(*pair, strict=True)):
                _compare_fits(f"{name}, rank {rank}, fit {k + 1}", before, after, wrong, noted)
        noted += _compare_files(name, mine["files"], theirs["files"])
    return wrong, noted


def _compare_fits(
    where: str, before: dict[str, Any], after: dict[str, Any], wrong: list[str], noted: list[str]
) -> None:
    wrong += [f"{where}: {part} differ" for part in ("weights", "metrics", "steps") if before[part] != after[part]]
    old, new = before["messages"], after["messages"]
    for purpose in sorted({*old, *new}):
        if purpose not in old:
            noted.append(f"{where}: new purpose {purpose}: {new[purpose]}")
        elif purpose not in new:
            wrong.append(f"{where}: purpose {purpose} is gone")
        elif old[purpose] != new[purpose]:
            wrong.append(f"{where}: purpose {purpose}: {old[purpose]} | {new[purpose]}")


def _compare_files(name: str, mine: dict[str, Any], theirs: dict[str, Any]) -> list[str]:
    noted = [f"{name}: file {path} only in one" for path in sorted(set(mine) ^ set(theirs))]
    for path in sorted(set(mine) & set(theirs)):
        for key in sorted({*mine[path], *theirs[path]}):
            if mine[path].get(key) != theirs[path].get(key):
                what = "is new" if key not in mine[path] else "is gone" if key not in theirs[path] else "differs"
                noted.append(f"{name}: {path}: {key} {what}")
    return noted


def main(words: Sequence[str] | None = None) -> int:
    """Carry out all runs, or compare two files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="where the digests go")
    parser.add_argument("--only", default="", help="run those alone that have this in their names")
    parser.add_argument("--compare", type=Path, nargs=2, metavar=("BEFORE", "AFTER"))
    options = parser.parse_args(words)
    if options.compare:
        one, other = (json.loads(path.read_text()) for path in options.compare)
        wrong, noted = differences(one, other)
        print(f"{len(one['runs'])} and {len(other['runs'])} runs; {len(wrong)} differences that must not be")
        print("\n".join([*wrong, f"{len(noted)} other differences", *noted]))
        return 1 if wrong else 0
    if options.out is None:
        parser.error("--out FILE or --compare BEFORE AFTER is needed")
    target = options.out.resolve()
    found = run_all(options.only)
    lines = ",\n".join(
        f"{json.dumps(name)}:{json.dumps(run, separators=(',', ':'))}" for name, run in found["runs"].items()
    )
    target.write_text(f'{{"names":{json.dumps(found["names"])},\n"runs":{{\n{lines}}}}}\n')
    return 1 if any("error" in run for run in found["runs"].values()) else 0


if __name__ == "__main__":
    sys.exit(main())
