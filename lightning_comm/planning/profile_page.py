"""The page of a profile: one HTML file that needs no other."""

import html
from collections.abc import Sequence

from lightning_comm.core.rank_profile import RankProfile, combine
from lightning_comm.planning.profile_text import figure_rows, milliseconds, sentences
from lightning_comm.planning.report import html_table, page


def profile_page(ranks: Sequence[RankProfile]) -> str:
    """Return the page of a run."""
    run = combine(ranks)
    said = "".join(f"<p>{html.escape(text)}</p>" for text in sentences(run))
    rows = [[str(r.rank), r.host, milliseconds(r.step_s), milliseconds(r.own_s)] for r in run.ranks]
    return page(
        "Communication profile",
        f"<h1>Communication profile</h1>{said}{html_table(['', 'per step', 'share'], figure_rows(run))}"
        f"{html_table(['rank', 'host', 'step', 'own'], rows)}",
    )
