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
