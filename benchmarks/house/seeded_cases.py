"""The list of seeded runs: every registered strategy, and the settings that change what is computed or sent."""

import importlib
import pkgutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from lightning.pytorch.strategies import StrategyRegistry
from seeded_models import alternating, squares

import lightning_comm

_OTHER_STARTS = ("_spawn", "_fork", "_notebook")  # the same with processes started otherwise


@dataclass(frozen=True)
class Case:
    """One run, or two of which the second resumes the first.

    Args:
        name: Its name.
        strategy: Makes the strategy, or is its registered name.
        ranks: How many.
        net: The name of the network.
        optimizer: That of the optimizer.
        module: How it is trained: ``"automatic"``, ``"manual"``, ``"manual one"``.
        dtype: Of weights and data.
        data: ``"plain"``, ``"unequal"``, ``"stream"``, ``"module"``, ``"resumable"`` or ``"partition"``.
        stop: After how many batches it is saved and resumed; ``None`` for a run in one piece.
        falls: Whether the learning rate falls.
        callbacks: Make callbacks.
        options: The Trainer's.

    """

    name: str
    strategy: Callable[[], Any] | str
    ranks: int = 2
    net: str = "wide"
    optimizer: str = "momentum"
    module: str = "automatic"
    dtype: torch.dtype = torch.float32
    data: str = "plain"
    stop: int | None = 5
    falls: bool = False
    callbacks: Callable[[], list[Any]] = list
    options: dict[str, Any] = field(default_factory=dict)


def public(name: str) -> Any:
    """Return a class of the package by its name, wherever it is.

    Raises:
        LookupError: If no module has it.

    """
    if hasattr(lightning_comm, name):
        return getattr(lightning_comm, name)
    for module in _modules():
        found = getattr(module, name, None)
        if isinstance(found, type) and found.__module__.startswith("lightning_comm"):
            return found
    raise LookupError(f"seeded runs: a class `{name}` must be somewhere in lightning_comm; no module has it.")


def _modules() -> Iterator[Any]:
    yield from [module for name, module in list(sys.modules.items()) if name.startswith("lightning_comm.")]
    for found in pkgutil.walk_packages(lightning_comm.__path__, "lightning_comm."):
        if found.name not in sys.modules and ".cli" not in found.name and ".lab" not in found.name:
            yield importlib.import_module(found.name)


def make(name: str, *args: Any, **kwargs: Any) -> Any:
    """Return an object of a class of the package."""
    return public(name)(*args, **kwargs)


def registered() -> list[str]:
    """Return the registered names whose class is the package's."""
    names = StrategyRegistry.available_strategies()
    return sorted(name for name in names if _class_of(name).__module__.startswith("lightning_comm."))


def _class_of(name: str) -> Any:
    return StrategyRegistry[name]["strategy"]


def cases() -> list[Case]:
    """Return all runs."""
    found = [*_named(), *_local(), *_averaging(), *_compressed(), *_masks(), *_cyclic(), *_with_data()]
    names = [case.name for case in found]
    assert len(set(names)) == len(names), "two runs have one name"
    return found


def _named() -> Iterator[Case]:
    for name in registered():
        if name.endswith(_OTHER_STARTS):
            continue
        net = "deep6" if name.startswith("cyclic") else "wide"
        yield Case(f"{name}, 2 ranks", name, net=net, optimizer="adamw", falls=True)
        yield Case(f"{name}, 3 ranks", name, ranks=3, net=net, dtype=torch.float64, stop=None)
        yield Case(f"{name}, bf16-mixed", name, net=net, options={"precision": "bf16-mixed"})
        yield Case(f"{name}, accumulation", name, net=net, options={"accumulate_grad_batches": 2}, stop=6)
        yield Case(f"{name}, BatchNorm", name, net="norm", stop=None)


def _fixed(period: int = 4, **kwargs: Any) -> Callable[[], Any]:
    return lambda: make("LocalUpdateStrategy", make("FixedPeriod", period), **kwargs)


def _local() -> Iterator[Case]:
    def rule(name: str, **kwargs: Any) -> Callable[[], Any]:
        return lambda: make("LocalUpdateStrategy", make(name, **kwargs), warmup_steps=2)

    validated = {"val_check_interval": 3, "limit_val_batches": 2}
    yield Case("local, power period", rule("PowerPeriod", alpha=0.05, exponent=1.0, h_base=2, h_max=6), falls=True)
    yield Case("local, quadratic period", rule("QuadraticPeriod", alpha=0.03, h_base=2, h_max=6), falls=True)
    yield Case("local, gradient steps", _fixed(gradient_steps=3), stop=6)
    yield Case("local, gradient steps, stopped among them", _fixed(3, gradient_steps=0.5), stop=3)
    yield Case("local, state averaged", _fixed(optimizer_state="average"), optimizer="adamw")
    yield Case("local, state averaged, 3 ranks", _fixed(optimizer_state="average"), ranks=3, optimizer="adamw")
    yield Case("local, buffers averaged", _fixed(buffers="average"), net="norm")
    yield Case("local, buffers kept", _fixed(buffers="keep"), net="norm")
    yield Case("local, average validated", _fixed(evaluate_weights="average"), net="norm", options=validated)
    yield Case("local, own weights validated", _fixed(evaluate_weights="local"), net="norm", options=validated)
    yield Case("local, clipped", _fixed(), options={"gradient_clip_val": 0.1})
    yield Case("local, two optimizers", _fixed(counted_optimizer=1), module="manual", stop=6)
    yield Case("local, by hand", _fixed(), module="manual one")
    for net in ("tied", "frozen", "drop", "conv"):
        yield Case(f"local, {net}", _fixed(), net=net, dtype=torch.float64)
    yield Case("local, unequal batches", _fixed(), data="unequal")
    yield Case("local, length unknown", _fixed(), data="stream", options={"max_epochs": 2})
    yield Case("local, moving average", _fixed(), callbacks=_moving_average, stop=None)
    yield Case("local, BatchNorm estimated again", _fixed(), net="norm", callbacks=_estimated, data="module", **_OFTEN)


_OFTEN: dict[str, Any] = {"options": {"val_check_interval": 3, "limit_val_batches": 2}}


def _moving_average() -> list[Any]:
    from lightning.pytorch.callbacks import EMAWeightAveraging

    return [EMAWeightAveraging(decay=0.9)]


def _estimated() -> list[Any]:
    return [make("BatchNormReestimation", 3)]


def _averaging() -> Iterator[Case]:
    def averaged(**kwargs: Any) -> Callable[[], Any]:
        return lambda: make("LocalUpdateStrategy", make("FixedPeriod", 4), averaging=make("Averaging", **kwargs))

    small = 0.0005  # MiB, below the size of the model
    for k, word in enumerate((None, "bf16", "fp16", "int8", "powersgd", "topk")):
        said = word or "full"
        for overlap in (0, 2):
            settings = {"compression": word, "overlap_steps": overlap, "bucket_mib": small}
            yield Case(f"averaging, {said}, overlap {overlap}", averaged(**settings))
        settings = {"compression": word, "overlap_steps": k % 2, "bucket_mib": small}
        yield Case(f"averaging, {said}, 3 ranks", averaged(**settings), ranks=3, dtype=torch.float64)

    def masked(then: str | None, overlap: int) -> Callable[[], Any]:
        def strategy() -> Any:
            mask = make("SparseMask", make("MagnitudePruning", 0.5), then)
            averaging = make("Averaging", compression=mask, overlap_steps=overlap, bucket_mib=small)
            return make("LocalUpdateStrategy", make("FixedPeriod", 4), averaging=averaging)

        return strategy

    for then in (None, "bf16", "int8", "topk"):
        yield Case(f"averaging, mask then {then}", masked(then, 0))
        yield Case(f"averaging, mask then {then}, overlap", masked(then, 2))


def _compressed() -> Iterator[Case]:
    def ddp(compression: Any, **kwargs: Any) -> Callable[[], Any]:
        def strategy() -> Any:
            method = compression() if callable(compression) else compression
            return make("CompressedDDPStrategy", method, bucket_cap_mb=0.0005, **kwargs)

        return strategy

    for word in ("bf16", "fp16", "int8", "powersgd", "topk", "ternary", "no_sync"):
        yield Case(f"ddp, {word}", ddp(word, seed=5), stop=4)
        yield Case(f"ddp, {word}, float64, 3 ranks", ddp(word), ranks=3, dtype=torch.float64, stop=4)
        yield Case(f"ddp, {word}, bf16-mixed", ddp(word), options={"precision": "bf16-mixed"}, stop=None)
    yield Case("ddp, powersgd rank 1, conv", ddp(lambda: make("PowerSGD", 1)), net="conv")
    yield Case("ddp, topk 0.2", ddp(lambda: make("TopK", 0.2)), net="conv")
    yield Case("ddp, bucket views", ddp("int8", gradient_as_bucket_view=True))
    yield Case("ddp, static graph", ddp("topk", static_graph=True))
    yield Case("ddp, by hand", ddp("topk"), module="manual one")
    yield Case("ddp, two optimizers", ddp("bf16", find_unused_parameters=True), module="manual", stop=6)
    yield Case("ddp, clipped and validated", ddp("powersgd"), options=_CLIPPED)
    yield Case("ddp, frozen", ddp("int8"), net="frozen")
    yield Case("ddp, tied", ddp("powersgd"), net="tied")


_CLIPPED: dict[str, Any] = {"gradient_clip_val": 0.1, "val_check_interval": 4, "limit_val_batches": 2}


def _masks() -> Iterator[Case]:
    def ddp(pruning: Callable[[], Any], then: Any = None, **kwargs: Any) -> Callable[[], Any]:
        def strategy() -> Any:
            schedule = {"schedule": make("PruningSchedule", **kwargs)} if kwargs else {}
            mask = make("SparseMask", pruning(), then, **schedule)
            return make("CompressedDDPStrategy", mask, bucket_cap_mb=0.0005)

        return strategy

    def magnitude(**kwargs: Any) -> Callable[[], Any]:
        return lambda: make("MagnitudePruning", 0.6, **kwargs)

    for then in ("bf16", "fp16", "int8", "topk", "ternary"):
        yield Case(f"mask, then {then}", ddp(magnitude(), then))
    for scope in ("global", "layer", "erk"):
        yield Case(f"mask, by {scope}", ddp(magnitude(scope=scope)), ranks=3)
    yield Case("mask, pruned later", ddp(magnitude(), start_step=3))
    yield Case("mask, ever sparser", ddp(magnitude(), "int8", start_step=1, end_step=8, every_steps=3))
    yield Case("mask, ever sparser, accumulation", ddp(magnitude(), start_step=1, end_step=4, every_steps=1), **_TWO)
    yield Case("mask, GraSP", ddp(lambda: make("GraSPPruning", 0.5, samples=8, loss=squares)))
    yield Case(
        "mask, GraSP by layer", ddp(lambda: make("GraSPPruning", 0.5, samples=8, loss=squares, scope="layer"), "bf16")
    )
    yield Case("mask, function", ddp(lambda: make("MaskFunction", alternating)))
    yield Case("mask, of torch", ddp(lambda: make("ModulePruning")), net="pruned")
    yield Case("mask, conv", ddp(magnitude()), net="conv", optimizer="adamw")


_TWO: dict[str, Any] = {"options": {"accumulate_grad_batches": 2}, "stop": 6}


def _cyclic() -> Iterator[Case]:
    def ring(rule: str = "v2", **kwargs: Any) -> Callable[[], Any]:
        return lambda: make("CyclicStrategy", rule, **kwargs)

    double = torch.float64
    for n in (2, 3):
        for rule in ("v1", "v2"):
            for k in (1, 2, 3):
                net = f"deep{n * k}"
                yield Case(f"cyclic, {rule}, {n} ranks, {n * k} stages", ring(rule, stages=n * k), n, net, dtype=double)
    yield Case("cyclic, lag 1, 3 ranks", ring(lag=1, stages=3), 3, "deep3", dtype=double)
    yield Case("cyclic, lag 2, 2 ranks", ring(lag=2, stages=2), 2, "deep4")
    yield Case("cyclic, synchronous at first", ring(warmup_sync_steps=7), 2, "deep6")
    yield Case("cyclic, stagger", ring(stagger="step"), 2, "deep6")
    yield Case("cyclic, stagger, 3 ranks", ring(stagger="step"), 3, "deep9", stop=None)
    yield Case("cyclic, stages by name", ring(stages=["net.0", "net.4"]), 2, "deep4")
    yield Case("cyclic, clipped by stage", ring(clip_norm=0.1), 2, "deep6")
    yield Case("cyclic, clipped by norm before", ring(clip_norm=0.1, clip_by="previous_norm"), 2, "deep6")
    yield Case("cyclic, AdamW", ring(), 3, "deep9", "adamw", falls=True)
    yield Case("cyclic, BatchNorm, validated", ring(), 2, "norm", options=_VALIDATED)
    yield Case("cyclic, by hand", ring(), 2, "deep6", module="manual one")
    yield Case("cyclic, dropout", ring(), 2, "drop")
    yield Case("cyclic, tied", ring(), 2, "tied")
    yield Case("cyclic, frozen", ring(), 2, "frozen")
    yield Case("cyclic, moving average", ring(), 2, "deep6", callbacks=_moving_average, stop=None)


_VALIDATED: dict[str, Any] = {"val_check_interval": 4, "limit_val_batches": 2}


def _with_data() -> Iterator[Case]:
    def ddp() -> Any:
        return make("CompressedDDPStrategy", "bf16")

    yield Case("resumable, local", _fixed(), data="resumable", options={"max_epochs": 2}, stop=7)
    yield Case("resumable, ddp", ddp, data="resumable", options={"max_epochs": 2}, stop=7)
    yield Case("resumable, cyclic", lambda: make("CyclicStrategy"), net="deep6", data="resumable", stop=7)
    shares = {"mode": "fixed", "batch_sizes": [9, 3]}
    three = {"mode": "fixed", "shares": [0.5, 0.25, 0.25]}
    yield Case("partition, plain ddp", "ddp", data="partition", callbacks=_partition(shares))
    yield Case("partition, plain ddp, 3 ranks", "ddp", 3, data="partition", callbacks=_partition(three))
    yield Case("partition, compressed", ddp, data="partition", callbacks=_partition(shares))
    yield Case("partition, local", _fixed(), data="partition", callbacks=_partition(shares))
    yield Case("partition, local, 3 ranks", _fixed(), 3, data="partition", callbacks=_partition(three))
    state = {"optimizer_state": "average", "gradient_steps": 3}
    yield Case("partition, local, all averaged", _fixed(3, **state), net="norm", **_shared(shares))
    yield Case("partition, local, overlap", _overlapped, **_shared(shares))
    yield Case("partition, ddp, accumulation", "ddp", **_shared(shares), options={"accumulate_grad_batches": 2})


def _overlapped() -> Any:
    averaging = make("Averaging", compression="topk", overlap_steps=2)
    return make("LocalUpdateStrategy", make("FixedPeriod", 4), averaging=averaging)


def _partition(settings: dict[str, Any]) -> Callable[[], list[Any]]:
    return lambda: [make("AdaptivePartition", **settings)]


def _shared(settings: dict[str, Any]) -> dict[str, Any]:
    return {"data": "partition", "callbacks": _partition(settings)}
