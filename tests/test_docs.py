"""Documentation that can rot is executed: code blocks, links, and the parts that each technique must have."""

import ast
import doctest
import importlib
import inspect
import json
import re
from pathlib import Path

import pytest
import yaml

import lightning_comm

ROOT = Path(__file__).parents[1]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted(path for path in ROOT.glob("docs/**/*.md") if "_build" not in path.parts)]
CARDS = sorted(ROOT.glob("docs/techniques/*.md"))

_FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_EXECUTED = re.compile(r"^<!-- executed -->\n```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


def page_id(path: Path) -> str:
    return str(path.relative_to(ROOT))


def sessions(path: Path) -> str:
    """All ``>>>`` sessions of a page as one, so that a later one may use the names of an earlier one."""
    return "\n".join(body for language, body in _FENCE.findall(path.read_text()) if language == "pycon")


@pytest.mark.parametrize("path", [path for path in PAGES if sessions(path)], ids=page_id)
def test_sessions_on_a_page_give_what_they_show(path):
    test = doctest.DocTestParser().get_doctest(sessions(path), {}, page_id(path), str(path), 0)
    said: list[str] = []
    doctest.DocTestRunner().run(test, out=said.append)
    assert "".join(said) == ""


@pytest.mark.parametrize("path", [path for path in PAGES if _EXECUTED.search(path.read_text())], ids=page_id)
def test_code_marked_as_executed_runs(path):
    for block in _EXECUTED.findall(path.read_text()):
        exec(compile(block, page_id(path), "exec"), {})


def test_the_readme_and_the_card_have_code_that_is_executed():
    assert _EXECUTED.search((ROOT / "README.md").read_text())
    assert _EXECUTED.search((ROOT / "docs/techniques/local_update.md").read_text())
    assert _EXECUTED.search((ROOT / "docs/how-to/resume.md").read_text())


@pytest.mark.parametrize("path", PAGES, ids=page_id)
def test_every_relative_link_leads_to_a_file(path):
    targets = [link.split("#")[0] for link in _LINK.findall(path.read_text()) if "://" not in link]
    assert [target for target in targets if target and not (path.parent / target).exists()] == []


@pytest.mark.parametrize("path", CARDS, ids=page_id)
def test_each_card_says_what_a_reader_looks_for(path):
    front = yaml.safe_load(path.read_text().split("---")[1])
    assert {"name", "stem", "source", "needs", "composes_with", "does_not_compose_with"} <= set(front)


def names_defined(body, within=""):
    """Functions, classes and values that statements define, those in a class behind its name and a dot."""
    for node in body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield within + node.name
            yield from names_defined(node.body, f"{within}{node.name}.") if isinstance(node, ast.ClassDef) else ()
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            yield from (within + target.id for target in targets if isinstance(target, ast.Name))


def test_every_file_and_name_in_the_architecture_is_there_and_no_other_file_is_meant():
    page = (ROOT / "docs" / "explanation" / "architecture.md").read_text()
    files = [path for folder in ("lightning_comm", "tests") for path in ROOT.glob(f"{folder}/**/*.py")]
    wrong = []
    for path, name in set(re.findall(r"`([\w/]+\.py)(?::([\w.]+))?`", page)):
        found = [file for file in files if f"/{page_id(file)}".endswith(f"/{path}")]
        if len(found) != 1 or (name and name not in names_defined(ast.parse(found[0].read_text()).body)):
            wrong.append((path, name, [page_id(file) for file in found]))
    assert wrong == []


IMPORT = re.compile(r"from (lightning_comm[\w.]*) import (?:\(([^)]*)\)|([\w, ]+))")
DOTTED = re.compile(r"\blightning_comm(?:\.[A-Za-z_]\w*)+")
ENTRIES = {f"lightning_comm.{name}" for name in ("save", "compression", "local_update", "cyclic", "profile")}


def what_users_read():
    """Pages, configs, the code of notebooks, and the docstrings and messages of modules."""
    notebooks = {path: json.loads(path.read_text())["cells"] for path in ROOT.glob("notebooks/*.ipynb")}
    texts = {path: "\n".join("".join(cell["source"]) for cell in cells) for path, cells in notebooks.items()}
    files = [*PAGES, *ROOT.glob("configs/*.yaml"), *ROOT.glob("lightning_comm/**/*.py")]
    return texts | {path: path.read_text() for path in files}


def can_be_imported(dotted):
    """Whether a name is a module, or what a module has."""
    parts = dotted.split(".")
    for depth in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:depth]))
        except ModuleNotFoundError:
            continue
        for name in parts[depth:]:
            found = getattr(found, name, None)
        return found is not None
    return False


def test_every_import_and_every_name_with_its_module_that_users_read_can_be_imported():
    imports, dotted = set(), set()
    for text in what_users_read().values():
        imports |= {
            f"{module}.{name.split(' as ')[0].strip()}"
            for module, many, few in IMPORT.findall(text)
            for name in (many or few).split(",")
            if name.strip() and "#" not in name
        }
        dotted |= set(DOTTED.findall(text))
    assert {"lightning_comm.data.ResumableLoader", "lightning_comm.LocalUpdateStrategy"} <= imports
    assert [name for name in sorted((imports | dotted) - ENTRIES) if not can_be_imported(name)] == []


def test_the_reference_shows_each_name_where_it_is_public():
    documented = set(re.findall(r"auto\w+:: (lightning_comm[\w.]+)", (ROOT / "docs" / "reference.md").read_text()))
    hidden = {name for name in documented if name.count(".") > 1 and name.rpartition(".")[2] in lightning_comm.__all__}
    assert hidden == set()
    for module in (
        "lightning_comm.data",
        "lightning_comm.examples",
        "lightning_comm.strategies",
        "lightning_comm.callbacks",
    ):
        assert [
            name for name in importlib.import_module(module).__all__ if not can_be_imported(f"{module}.{name}")
        ] == []


def test_the_citation_names_the_version_and_the_papers():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == lightning_comm.__version__
    assert citation["cff-version"] == "1.2.0"
    assert {"message", "title", "authors"} <= set(citation)
    assert "2310.14423" in citation["references"][0]["url"]
    cited = {reference["url"].rsplit("/", 1)[1] for reference in citation["references"]}
    sources = {yaml.safe_load(path.read_text().split("---")[1])["source"] for path in CARDS}
    assert {re.search(r"arXiv:([\d.]+)", source)[1] for source in sources} <= cited


def test_every_public_name_is_in_the_reference():
    reference = (ROOT / "docs" / "reference.md").read_text()
    assert [name for name in lightning_comm.__all__ if f"lightning_comm.{name}\n" not in reference] == []


SECTIONS = re.compile(r"^(Args|Raises|Returns|Note|Example|References):$", re.MULTILINE)
MOST_WORDS, MOST_OUTSIDE_OF_ARGUMENTS = 400, 200  # of a docstring, and of it without arguments, errors and references


def words_by_section(docstring):
    first, *parts = SECTIONS.split(docstring)
    words = {"": len(first.split())}
    for title, body in zip(parts[::2], parts[1::2], strict=True):
        words[title] = words.get(title, 0) + len(body.split())
    return words


@pytest.mark.parametrize("name", lightning_comm.__all__)
def test_a_public_name_says_what_it_sends_and_keeps_has_an_example_and_is_read_in_a_minute(name):
    docstring = inspect.getdoc(getattr(lightning_comm, name))
    assert [part for part in ("*Communication.*", "*Memory.*", ">>> ") if part not in docstring] == []
    words = words_by_section(docstring)
    assert sum(words.values()) <= MOST_WORDS
    assert words[""] + words["Note"] <= MOST_OUTSIDE_OF_ARGUMENTS


@pytest.mark.parametrize("name", ["MaskFile", "MaskFunction"])
def test_a_source_of_masks_that_only_rank_0_has_says_so_in_its_first_line(name):
    assert "Rank 0 alone" in inspect.getdoc(getattr(lightning_comm, name)).splitlines()[0]


def results_linked_from(readme, stem):
    (linked,) = {link for link in _LINK.findall(readme) if re.fullmatch(rf"docs/results/{stem}_[-\d]+\.md", link)}
    return (ROOT / linked).read_text()


def test_the_figures_of_the_readme_are_those_of_the_results_file():
    readme = (ROOT / "README.md").read_text()
    rows = re.findall(r"^\| (DDP|Local SGD|QSR)[^|]*\| (.+ %) \|$", readme, re.MULTILINE)
    assert [method for method, _ in rows] == ["DDP", "Local SGD", "QSR"]
    measured = results_linked_from(readme, "local_update_digits")
    assert [row for row in rows if f"| {row[0]} | {row[1]} |" not in measured] == []


def test_the_step_times_of_the_readme_are_those_of_the_comparison_of_tools():
    readme = (ROOT / "README.md").read_text()
    rows = re.findall(r"^\| (.+?) \| ([\d.]+) ms \| ([\d.]+ to [\d.]+) \| ([\d.]+) \|$", readme, re.MULTILINE)
    assert len(rows) >= 5
    section = results_linked_from(readme, "tools").split("## 4 hosts, 500mbit")[1].split("\n## ")[0]
    assert [row for row in rows if f"| {' | '.join(row)} |" not in section] == []


def rows_by_title(path):
    """The table rows of a page, by the title above them and by their first cell."""
    found, title = {}, ""
    for line in path.read_text().splitlines():
        if line.startswith("#"):
            title = line.lstrip("# ")
        elif line.startswith("| ") and not line.startswith("| ---"):
            label, *cells = (cell.strip() for cell in line.strip("|").split("|"))
            found.setdefault(title, {})[label] = cells
    return found


def test_the_speeds_on_the_card_of_compression_are_those_of_the_results_file():
    card = rows_by_title(ROOT / "docs/techniques/compression.md")["Results"]
    measured = rows_by_title(ROOT / "docs/results/compression_steps_2026-11-24.md")
    configurations = [
        next(rows for title, rows in measured.items() if title.startswith(model) and title.endswith(link))
        for model in ("vit", "resnet")
        for link in (" 100mbit", " 500mbit", " 1gbit")
    ]
    assert len(card) > 10
    for label, speeds in card.items():
        if label != "method":
            assert speeds == [rows[label][2] for rows in configurations], label


@pytest.mark.parametrize(
    ("card", "section", "results", "columns"),
    [
        ("compression", "Break-even bandwidths", "sparse_mask_synchronisation_2026-11-24", [0, 1, 2, 3]),
        ("sparse_mask", "Results", "compression_accuracy_2026-11-24", [0, 1, 2, 4]),
        ("adaptive_partition", "Results", "adaptive_partition_2026-11-27", [3, 4, 5, 7, 8]),
    ],
)
def test_other_figures_on_the_cards_are_those_of_the_results_files(card, section, results, columns):
    shown = rows_by_title(ROOT / f"docs/techniques/{card}.md")[section]
    measured = {}
    for rows in rows_by_title(ROOT / f"docs/results/{results}.md").values():
        measured = rows | measured  # of tables with the same labels, the first
    assert len(shown) > 5
    for label, cells in list(shown.items())[1:]:
        assert cells == [measured[label][column] for column in columns], label


def test_the_accuracy_on_the_card_of_cyclic_is_that_of_the_results_file():
    measured = {}
    for line in (
        (ROOT / "docs/results/cyclic_accuracy_2026-11-27.md").read_text().split("## Every seed")[0].splitlines()
    ):
        case, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        if len(cells) == 7 and cells[1].endswith("%"):
            measured.setdefault(case, []).append(cells[1])
    shown = rows_by_title(ROOT / "docs/techniques/cyclic.md")["Delay with momentum"]
    assert len(measured) == 7
    shown.pop("case, peak of the learning rate")
    assert shown == measured


def test_the_step_times_on_the_card_of_cyclic_are_those_of_the_results_file():
    shown = rows_by_title(ROOT / "docs/techniques/cyclic.md")["Results"]
    shown.pop("method")
    assert len(shown) == 7
    page = (ROOT / "docs/results/cyclic_steps_2026-11-27.md").read_text()
    measured = {}
    for section in page.split("\n## transfer ")[1:]:  # of its two tables, the first has the times
        rows = (line.strip("|").split("|") for line in section.split("\n\n")[1].splitlines())
        measured[section.split()[0]] = {label.strip(): [cell.strip() for cell in cells] for label, *cells in rows}
    assert set(measured) == {"0.5", "1", "2", "0.1"}
    for label, cells in shown.items():
        half, one, two = (measured[ratio][label] for ratio in ("0.5", "1", "2"))
        assert cells == [half[2], one[2], two[2], one[4], two[4], one[5], one[6]], label


def test_the_memory_on_the_card_of_cyclic_is_that_of_the_results_files():
    shown = rows_by_title(ROOT / "docs/techniques/cyclic.md")["Memory"]
    engine = rows_by_title(ROOT / "docs/results/cyclic_memory_2026-11-27.md")
    shared = rows_by_title(ROOT / "docs/results/cyclic_shared_memory_2026-11-27.md")
    one_device = [engine[model] for model in ("resnet50", "vit_base_patch16_224")]
    processes = [shared[model] for model in ("vit_tiny_patch16_224", "resnet26")]
    compared = 0
    for label, cells in shown.items():
        if label in one_device[0]:
            assert cells == [rows[label][1] for rows in one_device], label
            compared += 1
        elif label in processes[0]:
            assert cells == [rows[label][2] for rows in processes], label
            compared += 1
    assert compared == 7
    staggered = '`CyclicStrategy(stagger="step")`'
    assert shown["predicted from one rank's profile"] == [rows[staggered][3] for rows in processes]
