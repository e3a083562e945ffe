"""The findings page shows the tables of the committed results, number by number."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType

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


def tuning_tables() -> ModuleType:
    """The tables of the tuning grid."""
    spec = importlib.util.spec_from_file_location("tuning_tables", TUNING / "tables.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


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
        points, drift = (cell.split("; ") for cell in line.strip("| ").split(" | ")[5::3])
        assert all(text in page for text in (*points, *drift))
    assert min(gaps) > 0
    assert tables.over_seeds(gaps).low > 0
