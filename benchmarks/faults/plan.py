"""Cases of injected faults, each drawn from a seed: what happens to which rank, where in which run.

Numbers and names alone; nothing here knows torch. The same seed is always the same case.
"""

import random
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Expected = Literal["fails", "finishes", "interrupted", "terminated", "requeued", "stops", "refused", "damaged", "full"]

# The places of a run at which a rank can be hurt, in the order in which it comes through them.
PLACES = (
    "start", "setup", "train_start", "batch_start", "getitem", "training_step", "backward", "clip", "optimizer_step",
    "round", "batch_end", "validation_step", "validation_end", "save", "epoch_end", "train_end", "finish",
)  # fmt: skip
PHASES = {
    "start": "set-up", "setup": "set-up", "train_start": "set-up",
    "batch_start": "step", "getitem": "step", "training_step": "step", "backward": "step", "clip": "step",
    "optimizer_step": "step", "round": "round end", "batch_end": "round end",
    "validation_step": "validation", "validation_end": "validation", "save": "save", "file": "save",
    "epoch_end": "epoch end", "train_end": "end of fit", "finish": "end of fit",
}  # fmt: skip
STEPS, EPOCH_STEPS, SAVE_EVERY, VALIDATE_EVERY, ROUND = 60, 24, 5, 12, 4
CHECKPOINTS = "checkpoints"  # their folder in that of the run's files
_ANYWHERE = ("setup", "training_step", "backward", "round", "batch_end", "validation_step", "save", "train_end")
_DURING = ("training_step", "backward", "round", "batch_end", "validation_step", "save")
_HOOKS = ("train_start", "batch_start", "batch_end", "epoch_end", "train_end")


@dataclass(frozen=True)
class Kind:
    """A kind of fault.

    Args:
        expects: How the run should end.
        how: What the rank does to itself, or has done to it.
        places: Where it can happen.
        rank: The rank that is hurt; ``None`` draws one.
        all_ranks: Whether it happens to every rank.
        may_be_late: Whether it may also come some milliseconds after the place, and so in the middle of anything.
        in_lab: Whether it needs emulated hosts.
        saves: How the run saves; ``None`` draws it.

    """

    expects: Expected
    how: str
    places: tuple[str, ...] = _DURING
    rank: int | None = None
    all_ranks: bool = False
    may_be_late: bool = False
    in_lab: bool = False
    saves: str | None = None


KINDS = {
    "kill": Kind("fails", "kill", _ANYWHERE, may_be_late=True),
    "kill_rank0": Kind("fails", "kill", _ANYWHERE, rank=0, may_be_late=True),
    "exit0": Kind("fails", "exit0", ("training_step", "batch_end")),
    "os_exit": Kind("fails", "os_exit", _DURING),
    "segv": Kind("fails", "segv", ("training_step", "validation_step")),
    "stop": Kind("fails", "stop", _ANYWHERE, may_be_late=True),
    "stop_rank0": Kind("fails", "stop", _ANYWHERE, rank=0, may_be_late=True),
    "pause": Kind("finishes", "pause", may_be_late=True),
    "isolate": Kind("fails", "isolate", in_lab=True, may_be_late=True),
    "isolate_rank0": Kind("fails", "isolate", rank=0, in_lab=True, may_be_late=True),
    "isolate_2s": Kind("finishes", "isolate_2s", in_lab=True, may_be_late=True),
    "slow_link": Kind("finishes", "slow_link", in_lab=True, may_be_late=True),
    "sigterm_one": Kind("terminated", "sigterm", may_be_late=True),
    "sigterm_all": Kind("terminated", "sigterm", all_ranks=True, may_be_late=True),
    "sigint_one": Kind("interrupted", "sigint", may_be_late=True),
    "sigint_all": Kind("interrupted", "sigint", all_ranks=True, may_be_late=True),
    "requeue_one": Kind("requeued", "sigusr1", may_be_late=True),
    "requeue_all": Kind("requeued", "sigusr1", all_ranks=True, may_be_late=True),
    "raise_step": Kind("fails", "raise", ("training_step", "backward", "clip", "optimizer_step")),
    "raise_hook": Kind("fails", "raise", _HOOKS),
    "raise_validation": Kind("fails", "raise", ("validation_step", "validation_end")),
    "raise_save": Kind("fails", "raise", ("save",)),
    "raise_loader": Kind("fails", "raise", ("getitem",)),
    "raise_worker": Kind("fails", "raise", ("worker",)),
    "kill_worker": Kind("fails", "kill", ("worker",)),
    "nan": Kind("finishes", "nan", ("training_step",)),
    "disk_full": Kind("full", "disk_full", ("file",), saves="all"),
    "kill_file_operation": Kind("fails", "kill_operation", ("file",)),
    "kill_within_write": Kind("fails", "kill_write", ("file",)),
    "damage_main": Kind("damaged", "kill", ("batch_end",), all_ranks=True, saves="all"),
    "damage_rank": Kind("damaged", "kill", ("batch_end",), all_ranks=True, saves="all"),
    "rank_missing": Kind("damaged", "kill", ("batch_end",), all_ranks=True, saves="all"),
    "should_stop": Kind("stops", "should_stop", ("batch_end",)),
    "max_time": Kind("stops", "max_time", ("train_start",), all_ranks=True),
    "unequal_known": Kind("refused", "unequal", ("train_start",)),
    "unequal_unknown": Kind("refused", "unequal", ("exhausted",)),
    "exception_save": Kind("fails", "kill", ("training_step", "batch_end", "save"), saves="on_exception"),
    "async": Kind("finishes", "none", ("batch_end",), saves="async"),
    "async_kill": Kind("fails", "kill", ("training_step", "batch_end"), saves="async", may_be_late=True),
}

# Strategies by their name here: those whose checkpoints have files of single ranks, and what they can take.
STRATEGIES = (
    "local_sgd", "local_long", "local_overlap", "local_int8", "post_local", "qsr",
    "cyclic", "cyclic_v1", "cyclic_staggered", "ddp_bf16", "ddp_topk", "ddp_powersgd", "pactrain",
)  # fmt: skip
COMPARISON = "ddp"  # Lightning's own; its outcomes are shown and not judged
RANK_FILES = ("local_sgd", "local_long", "local_overlap", "local_int8", "post_local", "qsr", "ddp_topk", "ddp_powersgd")
_SAVES = ("top1", "top1", "last", "all", "top1_last", "link")
_OVERWRITING = ("last", "last", "top1", "link")  # where what is written next takes the place of what was whole
_DAMAGES = ("truncate", "empty", "flip", "flip", "garbage", "zeros")


@dataclass(frozen=True)
class Case:
    """One run with one fault.

    Args:
        seed: What it was drawn from.
        kind: A name in ``KINDS``.
        strategy: A name in ``STRATEGIES``, or ``"ddp"``.
        ranks: How many.
        rank: Which one is hurt.
        place: Where.
        step: From which optimizer step on.
        late_s: How long after the place, where the driver does it; ``None`` does it at the place itself.
        saves: How checkpoints are saved.
        partition: ``"none"``, ``"fixed"`` shares or ``"balance"``.
        step_ms: For each rank, what a step takes at least.
        detail: What else a kind needs.

    """

    seed: int
    kind: str
    strategy: str
    ranks: int
    rank: int
    place: str
    step: int
    late_s: float | None
    saves: str
    partition: str
    step_ms: tuple[int, ...]
    detail: dict[str, Any] = field(default_factory=dict)

    @property
    def spec(self) -> Kind:
        """What is common to the kind."""
        return KINDS[self.kind]

    @property
    def hurt(self) -> set[int]:
        """The ranks that a survivor may name."""
        return set(range(self.ranks)) if self.spec.all_ranks else {self.rank}

    @property
    def phase(self) -> str:
        """The phase of the run that the place belongs to."""
        return PHASES.get(self.place, "step")

    @property
    def repeats_exactly(self) -> bool:
        """Whether a resumed run must repeat one that was never stopped bit for bit, as the cards promise.

        DDP reorders its buckets after the first step, so that on three ranks sums round otherwise; shares that follow
        measured speeds differ from run to run; and where all ranks agree on a stop or a save between two checkpoints,
        local updates synchronise and a cyclic run flushes once more.
        """
        if self.partition == "balance" or self.kind == "nan":
            return False
        through_ddp = self.strategy.startswith(("ddp", "pactrain"))
        if self.spec.expects in ("terminated", "requeued", "stops") and not through_ddp:
            return False
        in_steps = through_ddp or self.strategy == "post_local"
        return not (in_steps and self.ranks > 2)

    def as_json(self) -> dict[str, Any]:
        """Return it as what JSON can hold."""
        return asdict(self)


def draw(seed: int, kind: str | None = None, strategy: str | None = None, ranks: int | None = None) -> Case:
    """Return the case of a seed; what is given replaces what would be drawn.

    Raises:
        ValueError: If a name is not known, or the strategy cannot have the fault.

    """
    names = list(KINDS)
    block, index = divmod(seed, len(names))
    drawn_kind = kind or names[index]
    if drawn_kind not in KINDS:
        raise ValueError(f"faults: `--kind` must be one of {', '.join(KINDS)}; got {drawn_kind!r}.")
    if strategy is not None and strategy not in (*STRATEGIES, COMPARISON):
        raise ValueError(f"faults: `--strategy` must be one of {', '.join(STRATEGIES)}, ddp; got {strategy!r}.")
    spec, random_ = KINDS[drawn_kind], random.Random(seed)
    # another strategy for a kind in every block of seeds
    turn = [STRATEGIES[(seed + 5 * block + k) % len(STRATEGIES)] for k in range(len(STRATEGIES))]
    chosen = strategy or next(each for each in turn if _can_have(each, drawn_kind))
    if not _can_have(chosen, drawn_kind):
        raise ValueError(f"faults: {chosen!r} writes no files of single ranks, so {drawn_kind!r} cannot happen to it.")
    number = ranks or random_.choice([2, 2, 3])
    rank = spec.rank if spec.rank is not None else random_.randrange(number)
    place = random_.choice([each for each in spec.places if _can_be_at(chosen, each)])
    detail = _detail(drawn_kind, chosen, number, random_)
    if drawn_kind in ("kill_file_operation", "kill_within_write") and chosen not in RANK_FILES:
        rank = 0  # the only one that writes
    step = random_.randrange(8, 40)
    late = spec.may_be_late and place not in ("setup", "train_end") and random_.random() < 0.5
    saves = spec.saves or random_.choice(_OVERWRITING if place == "file" else _SAVES)
    partition = random_.choice(["none"] * 4 + ["fixed", "balance"])
    if chosen not in ("local_sgd", "ddp_bf16", "ddp_topk", "qsr") or place in ("worker", "exhausted"):
        partition = "none"
    if spec.expects in ("refused", "damaged", "stops") or drawn_kind == "async":
        partition = "none"
    return Case(
        seed, drawn_kind, chosen, number, rank, place, step, random_.uniform(0, 0.06) if late else None, saves,
        partition, tuple(random_.choice([5, 10, 15]) for _ in range(number)), detail,
    )  # fmt: skip


def _can_have(strategy: str, kind: str) -> bool:
    return strategy in RANK_FILES or kind not in ("damage_rank", "rank_missing")


def _can_be_at(strategy: str, place: str) -> bool:
    return place != "clip" or not strategy.startswith("cyclic")  # which refuses an override that would clip nothing


def _detail(kind: str, strategy: str, ranks: int, random_: random.Random) -> dict[str, Any]:
    """Draw what only some kinds need."""
    if kind in ("damage_main", "damage_rank"):
        return {"damage": random_.choice(_DAMAGES), "where": random_.random(), "bit": random_.randrange(8)}
    if kind == "rank_missing":
        return {"damage": "missing", "where": random_.random()}
    if kind == "kill_file_operation":
        return {"operation": random_.randrange(1, 7)}
    if kind == "disk_full":
        return {"sets": random_.choice([1.3, 1.7, 2.4, 3.1])}
    if kind.startswith("async"):
        return {"slow_s": [random_.choice([0.0, 0.1, 0.25]) for _ in range(ranks)]}
    if kind == "max_time":
        return {"seconds": random_.uniform(0.4, 1.0)}
    if kind.startswith("raise"):
        return {"error": random_.choice(["ValueError", "OSError", "MemoryError"])}
    return {}
