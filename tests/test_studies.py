"""The findings page shows the tables of the committed results, number by number."""

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "studies" / "interpretation"
# One file a model; products.json holds one task of one model.
RESULTS = [path for path in sorted(FOLDER.glob("*.json")) if path.stem != "products"]


def by_path(name: str) -> ModuleType:
    """A module of the study, which is no package."""
    spec = importlib.util.spec_from_file_location(f"interpretation_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_results_are_there() -> None:
    assert [path.stem for path in RESULTS] == ["gemma3", "smollm2"]


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_the_page_of_tables_is_that_of_the_results(path: Path) -> None:
    page = (ROOT / "docs" / f"findings-{path.stem}.md").read_text(encoding="utf-8")
    assert page == by_path("tables").page(path.stem, json.loads(path.read_text(encoding="utf-8")))
    assert page.count("|") > 500


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
@pytest.mark.parametrize("section", ["components", "joint selection"])
def test_the_findings_show_what_was_measured(path: Path, section: str) -> None:
    page = (ROOT / "docs" / "findings.md").read_text(encoding="utf-8").splitlines()
    content = json.loads(path.read_text(encoding="utf-8"))
    printed = by_path("tables").tables(content)[section]
    assert [line for line in printed if line not in page] == []
    assert len(printed) > 5


def test_the_study_asks_for_fifty_random_sets_beside_every_joint_set() -> None:
    words = list(by_path("run").commands("MODEL", Path("runs"), "DATA", sizes="1", controls=3))
    joint = [line for line in words if line[0] == "validate" and line[1].endswith("joint")]
    assert len(joint) == 5
    assert all(line[line.index("--controls") + 1] == "50" for line in joint)


def test_the_findings_on_products_are_those_measured() -> None:
    page = (ROOT / "docs" / "findings.md").read_text(encoding="utf-8")
    found = json.loads((FOLDER / "products.json").read_text(encoding="utf-8"))
    left = found["test"]["mul_ones"]
    assert ", ".join(found["heads"]) in page
    assert (
        f"{found['pairs']['rate']:.0%}".replace("%", " %") + f" of {found['pairs']['tried']}"
        in page
    )
    assert f"{left['n']} held out" in page
    assert "{accuracy:.0%} [{low:.0%}, {high:.0%}]".format(**left).replace("%", "") in page.replace(
        "%", ""
    ).replace("  ", " ")


# -------------------------------------------------------------------------------------- tuning

TUNING = ROOT / "studies" / "tuning"


def tables_of(folder: Path) -> ModuleType:
    """The tables of a grid."""
    spec = importlib.util.spec_from_file_location(f"{folder.name}_tables", folder / "tables.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def tuning_tables() -> ModuleType:
    """The tables of the tuning grid."""
    return tables_of(TUNING)


def test_the_page_of_the_tuning_grid_is_that_of_its_results() -> None:
    page = (ROOT / "docs" / "findings-tuning.md").read_text(encoding="utf-8")
    tables = tuning_tables()
    assert page == tables.page()
    picture = (ROOT / "docs" / tables.PICTURE).read_text(encoding="utf-8")
    assert picture == tables.picture()
    assert len(list((TUNING / "results").glob("*.json"))) > 10


def test_cells_of_a_seed_answer_the_same_problems_and_read_the_same_text() -> None:
    seen: dict[str, tuple[str, list[str]]] = {}
    for path in sorted((TUNING / "results").glob("*.json")):
        cell, seed = json.loads(path.read_text(encoding="utf-8")), path.stem.rpartition("-")[2]
        own = (cell["text"], cell["groups"])
        assert seen.setdefault(seed, own) == own, path.name
        for variant in cell["variants"].values():
            assert len(variant["hits"]) == len(cell["groups"])
            assert len(variant["drift"]) == 200


def test_what_the_findings_say_of_the_circuit_is_what_was_measured() -> None:
    tables = tuning_tables()
    found = tables.cells("circuit 5")
    page = (ROOT / "docs" / "findings.md").read_text(encoding="utf-8")
    gaps = [tables.difference(cell, "random", tables.hits) for cell in found.values()]
    for line in tables.pairs(["circuit 5"])[2:]:
        points, drift = (cell.split("; ") for cell in line.strip("| ").split(" | ")[5:9:3])
        assert all(text in page for text in (*points, *drift))
    assert min(gaps) > 0
    assert tables.over_seeds(gaps).low > 0


def test_what_the_findings_say_of_numbers_of_heads_is_what_was_measured() -> None:
    tables = tuning_tables()
    page = " ".join((ROOT / "docs" / "findings.md").read_text(encoding="utf-8").split())
    for heads in (4, 5, 8, 13):
        found = tables.cells(f"direct {heads}")
        gaps = [tables.difference(cell, "random", tables.hits) for cell in found.values()]
        assert len(gaps) >= 3
        over = tables.over_seeds(gaps)
        assert over.low > 0
        shown = [100 * value + 1e-9 for value in (over.estimate, over.low, over.high)]
        assert "{:.1f} [{:.1f}, {:.1f}]".format(*shown) in page


# ----------------------------------------------------------------------------- the paper's table

PAPER = ROOT / "studies" / "paper_table"


@pytest.fixture
def planted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The tables of planted results: precise is right on 20 % more questions than the base."""
    tables = tables_of(PAPER)
    rng = np.random.default_rng(0)
    sure = {task: rng.random(400) for task in (*tables.MATH, *tables.KEPT)}

    def cell(share: float) -> dict:
        hits = {
            task: "".join(
                "01"[int(level < (share if task in tables.MATH else 0.4))] for level in own
            )
            for task, own in sure.items()
        }
        drift = [[50, 150.0 + share, share / 10]] * 40
        return {"hits": hits, "drift": drift, "parameters": 7, "cpu_seconds": 60}

    for name, share in {"base": 0.2, "precise": 0.4, "random": 0.3, "8 heads": 0.35}.items():
        for seed in (0,) if name == "base" else (1, 2, 3):
            path = tmp_path / f"smollm2-{name.replace(' ', '_')}-{seed}.json"
            path.write_text(json.dumps(cell(share)))
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    return tables


def test_the_papers_table_shows_what_was_planted(planted: ModuleType) -> None:
    found = planted.gain(*planted.together("smollm2", "precise", "base"))
    assert found.low < 0.2 < found.high
    assert found.estimate == pytest.approx(0.2, abs=0.03)
    lines = planted.differences("smollm2", minus=[("precise", "base"), ("precise", "random")])
    base, random, base_kept, random_kept = (line for line in lines if "| precise" in line)
    assert base.count("\\*") == random.count("\\*") == len(planted.MATH)
    assert "\\*" not in base_kept + random_kept
    assert base_kept.count("(not worse)") == len(planted.KEPT)
    assert "not worse" not in base + random + random_kept
    assert random_kept.endswith("| +0.0002 [0.0002, 0.0002] |")  # 0.04 less 0.03, of 50 tokens
    page = planted.page("What held.")
    assert page.count("| base |  |") == page.count("| guessing |  | 25.0 |") + 1 == 2
    assert page.count("| precise, 32 heads | 3 |") == 2  # what it gains, what it keeps
    assert "0.0008 [" in page  # 0.04 of 50 tokens
    assert page.count("| 7 | 60 |") == 5  # parameters and seconds, also of numbers of heads
    for paper in ("25.4", "45.1"):  # GSM8K and MMLU of 8 heads
        assert (
            sum(
                line.startswith("| 8 heads | 1 |") and line.endswith(f" {paper} |")
                for line in page.splitlines()
            )
            == 1
        )
    assert "full SFT" not in page.partition("## The paper's")[0].partition("## SmolLM2")[2]
    assert planted.picture("smollm2").count("<circle") == 2 * 3  # in the picture, and in the list


def test_only_seeds_of_both_are_compared(planted: ModuleType) -> None:
    (planted.RESULTS / "smollm2-random-2.json").unlink()
    ours, theirs = planted.together("smollm2", "precise", "random")
    assert list(ours) == list(theirs) == [1, 3]
    lines = planted.differences("smollm2", minus=[("precise", "random"), ("precise", "lora")])
    assert [line for line in lines if "32 heads" in line and "| 2 |" not in line] == []
    assert not any("LoRA" in line for line in lines)
    first = planted.percent(planted.gain({1: ours[1]}, planted.cells("smollm2", "base")), sign=True)
    rows = planted.rows_of("smollm2", {"precise": "it"}, planted.calculating, seeds=[1])
    assert rows["it"][:3] == ["it", "1", first]


def test_the_papers_page_is_that_of_its_results() -> None:
    tables = tables_of(PAPER)
    words = (PAPER / "words.md").read_text(encoding="utf-8")
    page = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    assert page == tables.page(words)
    assert (ROOT / "docs" / tables.PICTURE).read_text("utf-8") == tables.picture("smollm2")
    numbers = page.replace(words.strip(), "")
    said = re.findall(r"[+-]?[0-9.]+(?: points)? \[[^]]+\]", " ".join(words.split()))
    assert len(said) > 2
    assert [text for text in said if text.replace(" points", "") not in numbers] == []


def test_a_cell_is_run_by_one_process_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(ROOT / "studies")
    from grids import claimed

    target, folder = tmp_path / "results" / "full-1.json", tmp_path / "runs" / "full-1"
    with claimed(target, folder) as first:
        assert first
        other = (
            "import sys; from pathlib import Path; from grids import claimed\n"
            "with claimed(*map(Path, sys.argv[1:])) as ours: print(ours)"
        )
        words = [sys.executable, "-c", other, str(target), str(folder)]
        said = subprocess.run(
            words, cwd=ROOT / "studies", check=True, capture_output=True, text=True
        )
        assert said.stdout.strip() == "False"
    target.parent.mkdir()
    target.write_text("{}")
    with claimed(target, folder) as again:
        assert not again
