"""Every page that the package writes: readable at 1,200 pixels, without backticks, its texts escaped."""

import re
import sys
from dataclasses import asdict
from html.parser import HTMLParser

import pytest
from support.partition_journals import run_of, window
from support.pilot_trials import ddp, trial

from lightning_comm.cli.demo import report
from lightning_comm.core.key_figures import StepFigures
from lightning_comm.core.rank_profile import RankProfile
from lightning_comm.formats.adaptive_partition import Change, PartitionJournal
from lightning_comm.formats.profile import Profile
from lightning_comm.planning.pilot.advice import advise
from lightning_comm.planning.pilot.costs import LIMIT
from lightning_comm.reports.adaptive_partition.page import partition_page
from lightning_comm.reports.pieces import MOST_COLUMNS, html_cards, html_figure, html_table, html_text, text_table
from lightning_comm.reports.pilot import page as pilot_page
from lightning_comm.reports.pilot.tables import measured_table, read, run_table
from lightning_comm.reports.profile.page import profile_page

LONG = "ddp_with_a_name_that_its_author_wanted_to_say_everything_that_it_does_in_one_word"
EVIL = "<script>alert('1')</script> & `--steps 60`, ``double``, and a lone ` too"
CHARACTER, PADDING, TEXT, ROOM = (
    8,
    20,
    12 * 16,
    1150,
)  # pixels: at 14 px a digit takes under 8; of 1,200 some are margin


class Tables(HTMLParser):
    """The width that each table of a page needs at least, in pixels, and the text outside of images."""

    def __init__(self, page):
        super().__init__()
        self.widths, self.text = [], []
        self._rows, self._kind, self._style = [], None, False
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self._style = tag == "style"
        if tag == "table":
            self._rows = []
        elif tag == "tr":
            self._rows.append([])
        elif tag in ("td", "th"):
            self._kind = "long" if ("class", "long") in attrs else tag
            self._rows[-1].append([self._kind, ""])

    def handle_data(self, data):
        if self._style:
            return
        self.text.append(data)
        if self._kind:
            self._rows[-1][-1][1] += data

    def handle_endtag(self, tag):
        if tag in ("td", "th"):
            self._kind = None
        elif tag == "table":
            columns = zip(*self._rows, strict=True)
            self.widths.append(sum(PADDING + max(self._needs(*cell) for cell in column) for column in columns))
        self._style = False

    @staticmethod
    def _needs(kind, text):
        if kind == "long":
            return TEXT
        return CHARACTER * (len(text) if kind == "td" else max(map(len, text.split()), default=0))


def pilot_results(strategies=("ddp", "local_sgd", "qsr"), repeats=5, **changes):
    """A pilot of a slow model on a long run, whose figures have as many digits as such figures get."""
    trials = []
    for repeat in range(repeats):
        noise = 1 + 0.013 * repeat
        more = {"loss": 12.3456, "samples": (4096.0,) * 20, "exposed_s": (0.123,) * 20, "sent_bytes": (2.2e9,) * 20}
        trials += [ddp(repeat, step_s=1.834 * noise, **more), trial(LIMIT, repeat, step_s=1.234, ranks=1, **more)]
        for name in strategies[1:]:
            trials.append(trial(name, repeat, step_s=1.3 * noise, sync_s=2.345, period=4, ranks=1, **more))
    ends = {name: [] if name in ("ddp", LIMIT) else list(range(4, 1_000_001, 400)) for name in (*strategies, LIMIT)}
    return {
        "command": "lightning-comm pilot --config my.yaml " + "--model.init_args.lr=0.001 " * 8,
        "settings": {
            "strategies": [*strategies],
            "steps": 20,
            "warmup_steps": 4,
            "repeats": repeats,
            "cost_per_hour": 120.0,
            "lab": {"hosts": 4, "devices_per_host": 1, "links": ["100 Mbit/s"]},
        },
        "environment": {"torch": "2.15.0+cpu", "system": "Linux-6.8.0-1052-aws-x86_64-with-glibc2.39 " * 3},
        "job": {"world_size": 4, "total_steps": 1_000_000},
        "plans": {
            name: {
                "total_steps": 1_000_000,
                "gradient_steps": 1_000_000 if name == "ddp" else 0,
                "round_ends": ends[name],
            }
            for name in ends
        },
        "problems": {},
        "trials": [asdict(one) for one in trials],
        "failures": {},
        **changes,
    }


def pilot(**changes):
    found = pilot_results(**changes)
    return pilot_page.html_page(found, advise(read(found)), None)


def demo(seeds=5):
    runs = []
    for seed in range(seeds):
        for method in ("ddp", "local_sgd", "qsr"):
            own = {"method": method, "seed": seed, "steps": 1320, "samples": 84480, "parameter_bytes": 809_000}
            own |= {"accuracy": 0.97, "synchronisations": 1320, "training_wire_bytes": 1.6e9, "wall_s": 123.0}
            runs.append(own | {"evaluation_wire_bytes": 6e6})
    settings = {"devices": 4, "epochs": 60, "seeds": seeds, "lr": 0.002, "batch_size": 16, "alpha": 0.2, "h_base": 4}
    results = {"command": "lightning-comm demo", "settings": settings, "environment": {"torch": "2"}, "runs": runs}
    return report.html_page({**results, "pilot": pilot_results()}, b"png")


def profile(ranks=3, host="node-{}", stopped=None, steps=12):
    made = []
    for rank in range(ranks):
        header = {"rank": rank, "world_size": ranks, "warmup_steps": 2, "host": host.format(rank)}
        header["environment"] = {"strategy": "`ddp`", "callbacks": ["EmulatedDevice", "CommProfiler"] * 6}
        made.append(RankProfile({**header, "link_bytes_per_s": 12.5e6}, stopped=stopped))
        for batch in range(2 + steps):
            times = {"comm_s": 1.0, "exposed_s": 1.0, "wait_s": 0.5, "lightning_s": 0.1, "other_s": 0.0}
            sent = {"payload_bytes": {"gradients": 10**9}, "wire_bytes": {"gradients": 2 * 10**9}}
            made[-1].add_step(StepFigures(batch, batch, 1, 12.0 * batch, 12.0, **sent, dense_bytes=10**9, **times))
    return profile_page(Profile(made))


def partition(ranks=16, why="balance: 1.83 times as fast", **run):
    sizes = tuple(1000 + rank for rank in range(ranks))
    windows = [window(sizes, busy_s=(1.2,) * ranks, fetch_s=(1.1,) * ranks, batch=20 * n + 19) for n in range(3)]
    changes = (Change(0, 0, sizes, "start"), Change(1, 40, sizes, why))
    return partition_page(PartitionJournal(run_of(ranks, sum(sizes)) | run, "balance", changes, tuple(windows)))


PAGES = {
    "pilot": pilot,
    "pilot, a limit that spreads": lambda: pilot(repeats=3),
    "pilot, one repeat": lambda: pilot(repeats=1),
    "pilot, long names": lambda: pilot(strategies=("ddp", *(f"{LONG}_{n}" for n in range(12)))),
    "pilot, everything failed": lambda: pilot(
        failures={name: {"repeat": 0, "error": EVIL} for name in ("local_sgd", "qsr")},
        problems={"qsr": EVIL, LIMIT: EVIL},
        environment={"torch": EVIL},
    ),
    "demo": demo,
    "demo, one seed": lambda: demo(1),
    "profile": profile,
    "profile, long names of hosts": lambda: profile(64, "a-node-with-a-very-long-name-{}.of.some.cluster.example.org"),
    "profile, stopped": lambda: profile(stopped=EVIL),
    "profile, no step": lambda: profile(stopped=EVIL, steps=-2),
    "partition": partition,
    "partition, long texts": lambda: partition(64, why=EVIL, sampler=EVIL),
}


@pytest.fixture(autouse=True)
def without_figures(monkeypatch):
    """As if matplotlib were not installed: pages then say how to get it, and take no time to draw."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)


@pytest.mark.parametrize("make", PAGES.values(), ids=PAGES)
def test_every_table_of_a_page_can_be_read_at_1200_pixels(make):
    made = make()
    widths = Tables(made).widths
    assert widths
    assert max(widths) <= ROOM, widths
    assert "overflow-x:auto" in made  # for what nobody thought of


@pytest.mark.parametrize("make", PAGES.values(), ids=PAGES)
def test_no_page_has_backticks_or_markup_from_a_text(make):
    made = make()
    assert "`" not in made
    assert "<script" not in made
    assert "`" not in "".join(Tables(made).text)
    assert made.count("<code>") == made.count("</code>") > 0
    assert not re.search(r"<code>[^<]*<(?!/code>)", made)


def test_the_room_that_a_table_needs_is_counted_in_characters_and_text_wraps():
    assert Tables(html_table(["a", "bb cc"], [["123", "4"]])).widths == [2 * PADDING + 8 * 3 + 8 * 2]
    assert Tables(html_table(["a"], [["word " * 40]])).widths == [PADDING + TEXT]
    assert Tables(html_table(["a"], [["123 (120-130) ms"] * 1] * 3)).widths == [PADDING + 8 * 16]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("`a` & `b`", "<code>a</code> &amp; <code>b</code>"),
        ("``a``", "<code>a</code>"),
        ("a ` b", "a &#x27; b"),
        ("`<b>`", "<code>&lt;b&gt;</code>"),
        ("``` x ```", "<code> x </code>"),
    ],
)
def test_what_stands_between_backticks_is_code_wherever_text_reaches_a_page(text, shown):
    assert html_text(text) == shown
    for made in (html_table([text], [[text]]), html_cards([(text, text)]), html_figure(text, text, b"")):
        assert shown in made
    assert html_table([text], [[text]]).count(shown) == 2


def widest(table):
    return max(len(line) for line in text_table(*table).splitlines())


def test_tables_on_the_terminal_fit_into_a_line_of_120_characters():
    found = read(pilot_results())
    assert len(measured_table(found)[0]) == 9
    for table in (measured_table(found), run_table(found, 120.0)):
        assert widest(table) <= MOST_COLUMNS == 120
        assert len(text_table(*table).split("\n\n")) == 1


@pytest.mark.parametrize("count", [1, 4, 15])
def test_columns_that_do_not_fit_follow_below_with_the_first_one_again(count):
    header = ["name", *(f"column number {n} with a long title" for n in range(count))]
    rows = [[f"{LONG[:60]}_{row}", *(f"{row}.{n}" for n in range(count))] for row in range(3)]
    text = text_table(header, rows)
    assert max(map(len, text.splitlines())) <= MOST_COLUMNS
    for row in range(3):
        lines = [line.split() for line in text.splitlines() if line.startswith(rows[row][0])]
        assert [cell for name, *cells in lines for cell in cells] == rows[row][1:]
        assert len(lines) == len(text.split("\n\n"))


def test_a_table_that_fits_keeps_its_titles_in_one_line():
    assert text_table(["a long title", "b"], [["1", "2"]]).splitlines()[0] == "a long title  b"
