"""The house rules, held by the syntax tree: budgets, import order, hooks, docstrings, axes."""

import ast
import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import pytest

import circuitune
from circuitune import cli, components

ROOT = Path(circuitune.__file__).parent
TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in sorted(ROOT.rglob("*.py"))}
Function = ast.FunctionDef | ast.AsyncFunctionDef

# A module imports only from rows above its own; the package report/ is one row.
ROWS = [
    *(
        "errors",
        "components",
        "config",
        "stats",
        "comparing",
        "effects",
        "racing",
        "problems",
        "runs",
    ),
    *("ranks", "families", "checkpoints", "weights", "models", "memory", "sites", "prompts"),
    "writing",
    *("patching", "ports", "paths", "attribution", "selftest", "pairs", "roles", "chains"),
    *("graph", "slices", "deltas", "tensorfiles", "bases", "merging", "exporting", "verifying"),
    *("texts", "examples", "exercises", "answering", "extracting", "retention", "controls"),
    *("packs", "readers", "wordproblems", "taskfiles", "sources"),
    *("tasks", "selection", "knockout", "masks", "joint", "locate", "criteria", "validate"),
    *(
        "attention",
        "subjects",
        "readout",
        "neurons",
        "explain",
        "choosing",
        "scoring",
        "methods",
        "rates",
        "prefix",
    ),
    *(
        "supervised",
        "training",
        "plan",
        "picking",
        "tune",
        "changes",
        "transfer",
        "suites",
        "evaluate",
    ),
    *("report", "recipes", "cli", "__main__"),
]

FILE_LINES, FUNCTION_LINES, CLASS_LINES, PARAMETERS = 500, 60, 250, 7


def name_of(path: Path) -> str:
    """``report/load.py`` for a module of the package."""
    return path.relative_to(ROOT).as_posix()


def row_of(path: Path) -> str:
    """The row of ``ROWS`` that a file belongs to."""
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def nodes(*kinds: type[ast.AST]) -> Iterator[tuple[str, ast.AST]]:
    """Every node of some kinds, with where it is."""
    for path, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, kinds):
                yield f"{name_of(path)}:{getattr(node, 'lineno', 1)}", node


def lines_of(node: ast.AST) -> int:
    """Lines from ``def`` or ``class`` to the end."""
    return node.end_lineno - node.lineno + 1


def test_there_is_something_to_check() -> None:
    assert {"cli.py", "stats.py", "report/__init__.py"} <= {name_of(path) for path in TREES}
    assert len(list(nodes(ast.FunctionDef))) > 200


# -------------------------------------------------------------------------------------- budgets


def test_files_are_short() -> None:
    lengths = {name_of(path): len(path.read_text().splitlines()) for path in TREES}
    assert {name: n for name, n in lengths.items() if n > FILE_LINES} == {}


def test_functions_are_short() -> None:
    long = {where: lines_of(node) for where, node in nodes(*Function.__args__)}
    assert {where: n for where, n in long.items() if n > FUNCTION_LINES} == {}


def test_classes_are_short() -> None:
    long = {where: lines_of(node) for where, node in nodes(ast.ClassDef)}
    assert {where: n for where, n in long.items() if n > CLASS_LINES} == {}


def parameters(node: Function) -> list[str]:
    """Names of a function's parameters but for self and cls."""
    given = node.args
    named = [*given.posonlyargs, *given.args, *given.kwonlyargs, given.vararg, given.kwarg]
    return [item.arg for item in named if item is not None and item.arg not in ("self", "cls")]


def test_functions_take_few_parameters() -> None:
    counts = {where: len(parameters(node)) for where, node in nodes(*Function.__args__)}
    assert {where: n for where, n in counts.items() if n > PARAMETERS} == {}


def test_no_drawer_for_everything() -> None:
    assert {path.stem for path in TREES} & {"utils", "util", "base", "helpers", "common"} == set()


# --------------------------------------------------------------------------------- import order


def imported_rows(tree: ast.Module) -> set[str]:
    """Rows of circuitune that a module imports from, wherever the statement stands."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    own = {name.split(".")[1] for name in found if name.startswith("circuitune.")}
    return own - {"__version__"}


def test_imports_are_found_wherever_they_stand() -> None:
    code = """
from circuitune import config as configs, __version__
if TYPE_CHECKING:
    from circuitune.report.page import page
def later():
    import circuitune.cli
"""
    assert imported_rows(ast.parse(code)) == {"config", "report", "cli"}


def test_every_module_has_a_row() -> None:
    assert {row_of(path) for path in TREES} - set(ROWS) == {"__init__"}


@pytest.mark.parametrize("path", TREES, ids=name_of)
def test_modules_import_only_from_rows_above(path: Path) -> None:
    row = row_of(path)
    above = set(ROWS[: ROWS.index(row)]) if row in ROWS else set()
    if path.parent != ROOT:
        above.add(row)  # the modules of report/ use each other
    assert imported_rows(TREES[path]) - above == set()


def in_fresh_python(code: str) -> set[str]:
    """Top-level modules that are loaded after running some code in a new process."""
    script = (
        f"import sys, json\ntry:\n    {code}\nexcept SystemExit: pass\n"
        "print(json.dumps(sorted({name.split('.')[0] for name in sys.modules})))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    return set(json.loads(done.stdout.splitlines()[-1]))


HEAVY = {"torch", "transformers", "pandas", "numpy", "plotly", "gguf", "accelerate"}


@pytest.mark.parametrize(
    ("code", "unwanted"),
    [
        ("import circuitune", HEAVY | {"typer"}),
        ("from circuitune.cli import app; app(['--help'])", HEAVY),
        ("from circuitune.cli import app; app(['run', '--help'])", HEAVY),
        ("import circuitune.runs, circuitune.config", HEAVY),
        ("import circuitune.report", {"torch", "transformers", "gguf", "accelerate"}),
    ],
)
def test_nothing_heavy_is_imported_early(code: str, unwanted: set[str]) -> None:
    loaded = in_fresh_python(code)
    assert "circuitune" in loaded
    assert loaded & unwanted == set()


# ------------------------------------------------------------------------------ hooks and style

# selftest.py holds the slow reference, which must not share code with what it checks.
MAY_HOOK = {"sites.py", "selftest.py"}
HOOK = re.compile(r"register_(\w+_)?(forward|backward|hook|prehook)\w*")


def test_hooks_live_in_one_file() -> None:
    users = {
        where.partition(":")[0] for where, node in nodes(ast.Attribute) if HOOK.fullmatch(node.attr)
    }
    assert "sites.py" in users
    assert users <= MAY_HOOK


def test_no_bare_except() -> None:
    assert [where for where, node in nodes(ast.ExceptHandler) if node.type is None] == []


def documented(tree: ast.Module) -> Iterator[ast.AST]:
    """The module, its public classes and functions, and their public methods."""
    yield tree
    inside = [tree]
    while inside:
        for node in inside.pop().body:
            kinds = (*Function.__args__, ast.ClassDef)
            if isinstance(node, kinds) and not node.name.startswith("_"):
                yield node
                if isinstance(node, ast.ClassDef):
                    inside.append(node)


@pytest.mark.parametrize("path", TREES, ids=name_of)
def test_everything_public_says_what_it_is(path: Path) -> None:
    silent = [
        getattr(node, "name", "module")
        for node in documented(TREES[path])
        if not ast.get_docstring(node)
    ]
    assert silent == []


def test_everything_is_annotated() -> None:
    bare = []
    for where, node in nodes(*Function.__args__):
        given = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        if node.returns is None and node.name != "__init__":
            bare.append(where)
        bare += [where for a in given if a.annotation is None and a.arg not in ("self", "cls")]
    assert bare == []


# ----------------------------------------------------------------------------------- axis names


def declared_axes() -> set[str]:
    """The names that the docstring of components.py declares."""
    assert components.__doc__ is not None
    _, _, passage = components.__doc__.partition("Axis names of array shapes:")
    return set(re.findall(r"``(\w+)``", passage))


def used_axes() -> dict[str, str]:
    """Every axis name in a jaxtyping annotation, with one place where it is used."""
    found = {}
    for where, node in nodes(ast.Subscript):
        kind = getattr(node.value, "id", "")
        if kind not in ("Float", "Int", "Bool", "Shaped", "Num") or not isinstance(
            node.slice, ast.Tuple
        ):
            continue
        shape = node.slice.elts[1]
        assert isinstance(shape, ast.Constant), where
        for word in shape.value.split():
            axis = word.lstrip("*#_?")
            if axis and axis != "..." and not axis.isdigit():
                found.setdefault(axis, where)
    return found


def test_axis_names_are_declared_once_for_all() -> None:
    declared = declared_axes()
    used = used_axes()
    assert {"example", "sender", "d_model"} <= used.keys()
    assert {axis: where for axis, where in used.items() if axis not in declared} == {}


# -------------------------------------------------------------------------- options and versions


@pytest.mark.parametrize("stage", cli.IMPLEMENTATION)
def test_every_option_is_read_by_its_stage(stage: str) -> None:
    """An option that neither the stage nor what it imports reads is a promise nobody keeps."""
    implementation, config_class = cli.IMPLEMENTATION[stage]
    module = implementation.partition(":")[0].rpartition(".")[2]
    own = TREES[ROOT / f"{module}.py"]
    trees = [own, *(TREES[path] for path in TREES if path.stem in imported_rows(own))]
    read = {
        node.attr
        for tree in trees
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and getattr(node.value, "id", "") == "config"
    }
    assert {item.name for item in fields(config_class)} - read == set()


@pytest.mark.parametrize("stage", cli.IMPLEMENTATION)
def test_every_option_has_a_help_text(stage: str) -> None:
    for item in fields(cli.IMPLEMENTATION[stage][1]):
        assert item.metadata["help"].endswith((".", ")")), item.name


def test_one_version() -> None:
    project = tomllib.loads((ROOT.parent / "pyproject.toml").read_text())["project"]
    assert circuitune.__version__ == project["version"]


def test_every_file_that_is_read_is_installed() -> None:
    """A wheel holds what ``package-data`` names, a checkout all of it."""
    project = tomllib.loads((ROOT.parent / "pyproject.toml").read_text())
    named = project["tool"]["setuptools"]["package-data"]["circuitune"]
    installed = {path for pattern in named for path in ROOT.glob(pattern)}
    here = {path for path in ROOT.rglob("*") if path.is_file() and "__pycache__" not in path.parts}
    assert here - set(TREES) == installed
    assert len(installed) == 5
