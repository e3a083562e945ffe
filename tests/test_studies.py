"""The findings page shows the tables of the committed results, number by number."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "studies" / "interpretation"
RESULTS = sorted(FOLDER.glob("*.json"))


def by_path(name: str) -> ModuleType:
    """A module of the study, which is no package."""
    spec = importlib.util.spec_from_file_location(f"interpretation_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_results_are_there() -> None:
    assert "smollm2" in [path.stem for path in RESULTS]


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_the_page_shows_what_was_measured(path: Path) -> None:
    page = (ROOT / "docs" / "findings.md").read_text(encoding="utf-8").splitlines()
    content = json.loads(path.read_text(encoding="utf-8"))
    printed = [line for line in by_path("tables").tables(content) if line.startswith("|")]
    missing = [line for line in printed if line not in page]
    assert missing == []
    assert len(printed) > 20


def test_the_study_asks_for_fifty_random_sets_beside_every_joint_set() -> None:
    words = list(by_path("run").commands("MODEL", Path("runs"), "DATA", sizes="1", controls=3))
    joint = [line for line in words if line[0] == "validate" and line[1].endswith("joint")]
    assert len(joint) == 5
    assert all(line[line.index("--controls") + 1] == "50" for line in joint)
