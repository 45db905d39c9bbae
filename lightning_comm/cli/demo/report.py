"""The report of the demo, computed from the results of its runs: tables, sentences, and the pages that hold them."""

import base64
from statistics import mean, stdev
from typing import Any

from lightning_comm.core.quantities import megabytes, percent
from lightning_comm.planning.pilot.advice import advise
from lightning_comm.reports.pieces import html_command, html_paragraphs, html_table, markdown_table, page
from lightning_comm.reports.pilot.page import emulated
from lightning_comm.reports.pilot.tables import measured_table, read, run_table

_TIMES = "Time on a slow network"
NAMES = {"ddp": "DDP", "local_sgd": "Local SGD", "qsr": "QSR"}
_HELD_OUT = 360  # images, in DigitsData

_WHAT_IS_COUNTED = (
    "Bytes are what training sends: gradients or averaged parameters, and the rows of numbers by which ranks agree. "
    "For local SGD and QSR every message is recorded where it leaves; for DDP it is the number of optimizer steps "
    "times the size of the gradients. Both are counted as a ring all-reduce sends them, 2(n-1)/n times the payload "
    "from each of n ranks. Averages for validation in the middle of a round come on top: {evaluation}. The weights "
    "that every method sends once at the start are left out."
)
_WHAT_TIME_SAYS = (
    "All processes of the training ran on one machine and shared its cores, so messages crossed no network. Their wall "
    "times say little about a cluster; the bytes are what a slow network would have had to carry."
)


def by_method(results: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Return the runs of each method in order of seed, the methods in order of their first run."""
    grouped: dict[str, list[dict[str, Any]]] = {}
    for run in results["runs"]:
        grouped.setdefault(run["method"], []).append(run)
    return {method: sorted(runs, key=lambda run: int(run["seed"])) for method, runs in grouped.items()}


def share_of_ddp(runs: list[dict[str, Any]], ddp: list[dict[str, Any]]) -> float:
    """Return the bytes of training as a share of DDP's."""
    own, reference = (sum(int(run["training_wire_bytes"]) for run in group) for group in (runs, ddp))
    return own / reference


def paired_points(runs: list[dict[str, Any]], ddp: list[dict[str, Any]]) -> list[float]:
    """Return the accuracy minus that of DDP with the same seed, in percentage points; negative is worse."""
    return [100 * (run["accuracy"] - other["accuracy"]) for run, other in zip(runs, ddp, strict=True)]


def summary_table(results: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Return the header and one row a method."""
    header = ["method", "accuracy", "synchronisations", "sent per rank", "share of DDP", "wall time"]
    grouped = by_method(results)
    rows = [
        [
            NAMES[method],
            _with_spread([run["accuracy"] for run in runs]),
            f"{mean(run['synchronisations'] for run in runs):,.0f}",
            megabytes(mean(run["training_wire_bytes"] for run in runs)),
            percent(share_of_ddp(runs, grouped["ddp"])),
            f"{mean(run['wall_s'] for run in runs):.0f} s",
        ]
        for method, runs in grouped.items()
    ]
    return header, rows


def seeds_table(results: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Return the header and one row a seed: every accuracy, and each method against DDP with the same seed."""
    grouped = by_method(results)
    others = [method for method in grouped if method != "ddp"]
    header = ["seed", *(NAMES[method] for method in grouped), *(f"{NAMES[other]} - DDP" for other in others)]
    differences = {other: paired_points(grouped[other], grouped["ddp"]) for other in others}
    rows = [
        [
            str(run["seed"]),
            *(f"{100 * runs[index]['accuracy']:.2f} %" for runs in grouped.values()),
            *(f"{differences[other][index]:+.2f}" for other in others),
        ]
        for index, run in enumerate(grouped["ddp"])
    ]
    return header, rows


def conclusions(results: dict[str, Any]) -> list[str]:
    """Return one sentence for each method that is compared with DDP, and what one image more or less makes."""
    grouped = by_method(results)
    ddp = grouped["ddp"]
    sentences = [_conclusion(NAMES[method], runs, ddp) for method, runs in grouped.items() if method != "ddp"]
    grain = f"One of the {_HELD_OUT} held-out images is {100 / _HELD_OUT:.2f} points"
    if len(ddp) == 1:
        return [*sentences, f"{grain}, and this is one seed: `--seeds 5` shows how much results spread."]
    return [*sentences, f"{grain}."]


def _conclusion(name: str, runs: list[dict[str, Any]], ddp: list[dict[str, Any]]) -> str:
    points = paired_points(runs, ddp)
    difference = mean(points)
    if abs(difference) < 0.005:
        outcome = "as accurate as DDP"
    else:
        outcome = f"{abs(difference):.2f} percentage points {'more' if difference > 0 else 'less'} accurate than DDP"
    spread = ""
    if len(points) > 1:
        spread = (
            f" on average over {len(points)} paired seeds (standard deviation {stdev(points):.2f}, from "
            f"{min(points):+.2f} to {max(points):+.2f})"
        )
    accuracy, reference = (mean(run["accuracy"] for run in group) for group in (runs, ddp))
    return (
        f"{name} sent {percent(share_of_ddp(runs, ddp))} of DDP's bytes and was {outcome}{spread}: "
        f"{percent(accuracy)} against {percent(reference)}."
    )


def times(results: dict[str, Any]) -> list[str]:
    """Return what the pilot on slow links found, sentence by sentence; nothing where it could not run."""
    if results.get("pilot") is None:
        return []
    advice = advise(read(results["pilot"]), "--pilot-repeats")
    return [*emulated(results["pilot"]), *advice.reasons, f"The pilot's advice there: {advice.headline}"]


def time_tables(results: dict[str, Any]) -> list[tuple[list[str], list[list[str]]]]:
    """Return the pilot's tables: what was measured, and the whole run."""
    if results.get("pilot") is None:
        return []
    summaries = read(results["pilot"])
    run = run_table(summaries, None)
    return [measured_table(summaries), *([run] if run else [])]


def how_measured(results: dict[str, Any]) -> list[str]:
    """Return what was trained, what is counted, and what the times are worth."""
    settings, run = results["settings"], results["runs"][0]
    trained = (
        f"A ViT with {run['parameter_bytes'] // 4:,} parameters on scikit-learn's handwritten digits (1,437 to train "
        f"on, {_HELD_OUT} held out); {settings['devices']} processes with batches of {settings['batch_size']}. For "
        f"every method the same seeds, {settings['epochs']} epochs = {run['steps']:,} optimizer steps = "
        f"{run['samples']:,} images; AdamW, peak learning rate {settings['lr']:g}, warm-up over a tenth of the run, "
        f"then cosine to 0. Local SGD averages every 8 steps. QSR has h_base {settings['h_base']} and alpha 'auto', "
        f"which is {settings['alpha']:.4g} here."
    )
    extra = [
        f"{NAMES[method]} {megabytes(mean(run['evaluation_wire_bytes'] for run in runs))}"
        for method, runs in by_method(results).items()
        if method != "ddp"
    ]
    return [trained, _WHAT_IS_COUNTED.format(evaluation=", ".join(extra)), _WHAT_TIME_SAYS]


def markdown(results: dict[str, Any]) -> str:
    """Return the report as Markdown, without the figure."""
    parts = [
        markdown_table(*summary_table(results)),
        "\n".join(f"- {sentence}" for sentence in conclusions(results)),
        *_times_in_markdown(results),
        "## Every seed\n\nAccuracy on the held-out digits after the last step; differences in percentage points.",
        markdown_table(*seeds_table(results)),
        "## How this was measured",
        "\n\n".join(how_measured(results)),
        f"    {results['command']}",
        markdown_table(["", ""], [[name, value] for name, value in results["environment"].items()]),
    ]
    return "\n\n".join(parts) + "\n"


def _times_in_markdown(results: dict[str, Any]) -> list[str]:
    tables = [markdown_table(*table) for table in time_tables(results)]
    bullets = [f"- {sentence}" for sentence in times(results)]
    return [f"## {_TIMES}", *tables, "\n".join(bullets)] if tables else []


def html_page(results: dict[str, Any], png: bytes) -> str:
    """Return the report as one page that needs no other file."""
    image = base64.b64encode(png).decode()
    seeds = "<h2>Every seed</h2>" + html_table(*seeds_table(results)) if results["settings"]["seeds"] > 1 else ""
    tables = "".join(html_table(*table) for table in time_tables(results))
    timed = f"<h2>{_TIMES}</h2>{tables}{html_paragraphs(times(results))}" if tables else ""
    environment = html_table(["", ""], [[name, value] for name, value in results["environment"].items()])
    return page(
        "lightning-comm demo",
        "<h1>DDP, local SGD and QSR on real digits</h1>"
        f"{html_table(*summary_table(results))}{html_paragraphs(conclusions(results))}"
        '<img alt="Learning rate and period over the steps of the run, and accuracy against bytes sent" '
        f'src="data:image/png;base64,{image}">{timed}{seeds}<h2>How this was measured</h2>'
        f"{html_paragraphs(how_measured(results))}{html_command(results['command'])}{environment}",
    )


def _with_spread(shares: list[float]) -> str:
    spread = f" ± {100 * stdev(shares):.1f}" if len(shares) > 1 else ""
    return f"{100 * mean(shares):.1f}{spread} %"
