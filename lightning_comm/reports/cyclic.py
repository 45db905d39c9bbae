"""The figure of a cyclic schedule: the stage of each worker, slot by slot. It needs matplotlib."""

from typing import TYPE_CHECKING

from lightning_comm.core.cyclic.schedule import CyclicSchedule, Transfer
from lightning_comm.reports.svg import cannot_draw, new_figure, to_svg

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# By step: forward in the light shade, backward in the dark one.
_SHADES = (("#a9cdeb", "#1f6fb4"), ("#f8d9a5", "#c98414"), ("#a8d5bf", "#3f8f6b"), ("#e6a5ae", "#c8374a"))
_MOST_WITH_NUMBERS = 90  # slots; a number does not fit into narrower cells


def schedule_figure(schedule: CyclicSchedule, slots: int | None = None, *, messages: bool = False) -> str:
    """Return the figure of a schedule as SVG: a row for each worker, a column for each slot.

    A cell is a stage's forward (light) or backward (dark), with the stage's number, coloured by step. It is struck
    through where the worker uses the version before the newest.

    Args:
        schedule: The rules.
        slots: How many slots; by default two steps of the last worker.
        messages: Whether to draw the messages of the first step: solid lines for sums of gradients, each from where
            the sum is ready to where the next worker can add its own, dashed ones for new parameters, each hop as long
            as workers are apart.

    Raises:
        ValueError: If ``slots`` is below 1.
        ModuleNotFoundError: If matplotlib is not installed.

    Note:
        *Communication.* None.

    """
    if slots is not None and slots < 1:
        raise ValueError(f"schedule_figure: `slots` must be >= 1; got {slots!r}. Leave it out for two steps.")
    if (why := cannot_draw()) is not None:
        raise ModuleNotFoundError(f"schedule_figure: the figure needs matplotlib, but {why}.")
    count = slots or 4 * schedule.stages + schedule.delay_slots * (schedule.workers - 1)
    font = min(8.0, 380 / count) if count <= _MOST_WITH_NUMBERS else None
    figure, axes = new_figure(0.55 * schedule.workers + 0.4)
    for worker in range(schedule.workers):
        for slot in range(count):
            _cell(axes, schedule, worker, slot, font)
    if messages:
        for message in schedule.transfers(0):
            _arrow(axes, schedule, message, count)
    axes.set_xlim(0, count)
    axes.set_ylim(schedule.workers - 0.5, -0.5)
    axes.set_yticks(range(schedule.workers), [f"worker {worker}" for worker in range(schedule.workers)])
    axes.locator_params(axis="x", integer=True)
    axes.tick_params(left=False)
    axes.spines["left"].set_visible(False)
    axes.set_xlabel("slot (light: forward, dark: backward, colour: step, struck through: one update old)")
    return to_svg(figure).decode()


def _cell(axes: "Axes", schedule: CyclicSchedule, worker: int, slot: int, font: float | None) -> None:
    turn = schedule.turn(worker, slot)
    if turn is None:
        return
    colour = _SHADES[turn.step % len(_SHADES)][0 if turn.forward else 1]
    name = (
        f"worker-{worker}-slot-{slot}-step-{turn.step}-stage-{turn.stage}-{'forward' if turn.forward else 'backward'}"
    )
    axes.barh(worker, 1, height=0.62, left=slot, color=colour, edgecolor="white", linewidth=0.8)[0].set_gid(name)
    if font:
        ink = "black" if turn.forward else "white"
        axes.text(slot + 0.5, worker, str(turn.stage), ha="center", va="center", fontsize=font, color=ink)
    if schedule.version(worker, turn.stage, turn.step) < turn.step:
        ink = "#444444" if turn.forward else "white"
        (line,) = axes.plot((slot + 0.15, slot + 0.85), (worker + 0.24, worker - 0.24), color=ink, linewidth=0.8)
        line.set_gid(f"stale-{name}")


def _arrow(axes: "Axes", schedule: CyclicSchedule, message: Transfer, count: int) -> None:
    begin, end = _times(schedule, message)
    if end > count:
        return
    down = 0.34 if message.target > message.source else -0.34
    axes.annotate(
        "",
        xy=(end, message.target - down),
        xytext=(begin, message.source + down),
        arrowprops={
            "arrowstyle": "-|>",
            "linestyle": "-" if message.kind == "gradient" else "--",
            "color": "#222222",
            "linewidth": 0.7,
            "mutation_scale": 7,
            "gid": f"{message.kind}-{message.source}-{message.target}-stage-{message.stage}",
        },
    )


def _times(schedule: CyclicSchedule, message: Transfer) -> tuple[int, int]:
    """Return the slots between which a message may be under way."""
    path, hop = schedule.path(message.stage), schedule.delay_slots
    ends = [
        2 * schedule.stages * (message.step + 1) - message.stage + hop * worker  # of the backward
        for worker in path
    ]
    if message.kind == "gradient":
        place = path.index(message.source)
        return max(ends[: place + 1]), max(ends[: place + 2])
    behind = (message.source - schedule.owner(message.stage)) % schedule.workers
    return max(ends) + hop * behind, max(ends) + hop * (behind + 1)
