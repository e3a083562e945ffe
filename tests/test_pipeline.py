"""The whole path on a tiny model with own pairs: every stage, every file, and resuming."""

import json
import random
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest

from circuitune import cli
from circuitune.deltas import load_delta
from circuitune.report import summarise


@pytest.fixture(scope="module")
def pairs_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty pairs that a random model need not answer."""
    rng = random.Random(0)
    lines = []
    for _ in range(20):
        a, b = rng.randint(1, 4), rng.randint(1, 5)
        pair = {"clean": f"{a} + {b} = ", "corrupt": f"{a} @ {b} = ", "answer": str(a + b)}
        lines.append(json.dumps(pair | {"task": "add", "group": f"{a},{b}"}))
    path = tmp_path_factory.mktemp("pairs") / "own.jsonl"
    path.write_text("\n".join(lines))
    return path


@pytest.fixture(scope="module")
def finished(tiny_folder: Path, pairs_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory with every stage done."""
    run = tmp_path_factory.mktemp("runs") / "tiny"
    command(*arguments(tiny_folder, pairs_file, run))
    return run


def arguments(model: Path, pairs: Path, run: Path) -> list[str]:
    """A small run of everything."""
    options = "--most 4 --sizes 1,2,4 --controls 10 --heads 2 --steps 3 --batch-size 4"
    more = "--problems 20 --precision float32"
    return [
        "run",
        str(model),
        "--out",
        str(run),
        "--pairs",
        str(pairs),
        *options.split(),
        *more.split(),
    ]


def own_size(run: Path, smallest: int) -> int:
    """Size of the circuit, which is always knocked out too; the smallest if it has none."""
    return json.loads((run / "circuit.json").read_text())["size"] or smallest


def command(*words: str) -> None:
    """Run the command line in this process."""
    cli.app(list(words), standalone_mode=False)


def test_every_file_is_there_and_readable(finished: Path) -> None:
    names = {path.name for path in finished.iterdir()}
    assert names == {
        "manifest.json",
        "pairs.jsonl",
        "selection.json",
        "effects.parquet",
        "circuit.json",
        "paths.parquet",
        "knockout.parquet",
        "explain",
        "validate.json",
        "tuned",
        "tune.json",
        "eval.json",
        "samples.parquet",
        "report.html",
    }
    effects = pd.read_parquet(finished / "effects.parquet")
    assert effects["component"].nunique() == 4 * 5
    assert set(effects["metric"]) == {"logit_diff", "prob", "relative_logit"}
    knockout = pd.read_parquet(finished / "knockout.parquet")
    curves = knockout.query("k > 0 and ablation == 'mean' and where == 'end'")
    counts = curves.groupby("set").size()
    assert counts["matched"] == counts["random"] == len({1, 2, 4, own_size(finished, 1)}) * 10
    assert load_delta(finished / "tuned").facts["method"] == "precise"
    assert load_delta(finished / "tuned" / "random").facts["method"] == "random"
    records = json.loads((finished / "eval.json").read_text())
    assert {"base", "precise", "random"} <= {record["variant"] for record in records}
    assert all(record["low"] <= record["value"] <= record["high"] for record in records)


def test_precise_and_random_heads_are_matched_and_disjoint(finished: Path) -> None:
    variants = json.loads((finished / "tune.json").read_text())["variants"]
    layers = [sorted(part.split(".")[0] for part in v["components"]) for v in variants.values()]
    assert layers[0] == layers[1]
    chosen, control = (set(v["components"]) for v in variants.values())
    assert not chosen & control


def test_a_second_run_repeats_no_stage_and_loads_no_model(
    finished: Path,
    tiny_folder: Path,
    pairs_file: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the model must not be loaded")

    monkeypatch.setattr("circuitune.models.load", refuse)
    command(*arguments(tiny_folder, pairs_file, finished))
    assert capsys.readouterr().err.count("done before") == 6


def test_a_stage_repeats_bit_for_bit(
    finished: Path, tiny_folder: Path, pairs_file: Path, tmp_path: Path
) -> None:
    command(*arguments(tiny_folder, pairs_file, tmp_path / "again"))
    for name in ("pairs.jsonl", "circuit.json", "eval.json", "tuned/delta.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (finished / name).read_bytes(), name


def test_changed_options_redo_only_what_depends_on_them(
    finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command("validate", str(finished), "--sizes", "1,2", "--controls", "10")
    shown = capsys.readouterr()
    assert "validate:" in shown.err
    told = summarise(finished)
    steps = [f"next: {step.command}" for step in told.steps[:1]]
    assert shown.out.splitlines() == [*map(str, told.headline), *told.outdated, *steps]
    sizes = {0, 1, 2, own_size(finished, 1)}
    assert set(pd.read_parquet(finished / "knockout.parquet")["k"]) == sizes
    command(
        "tune",
        str(finished),
        *["--heads", "2", "--steps", "3", "--batch-size", "4", "--precision", "float32"],
    )
    assert "tune: done before" in capsys.readouterr().err


def test_interrupted_stage_leaves_the_run_as_it_was(
    finished: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
    monkeypatch.setattr("circuitune.evaluate.evaluate", interrupted)
    with pytest.raises(OSError, match="disk full"):
        command("evaluate", str(finished), "--problems", "10")
    capsys.readouterr()
    after = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
    assert before == after


def interrupted(model: object, config: object, run: Path, work: Path) -> None:
    """A stage that dies half-way through writing."""
    (work / "eval.json").write_text("half")
    raise OSError("disk full")


def test_recipe_gives_options_and_flags_win(
    tiny_folder: Path, pairs_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, object] = {}

    def keep(name: str, run: Path, options: object, model: Callable[[], object]) -> None:
        seen[name] = options

    monkeypatch.setattr(cli, "run_stage", keep)
    monkeypatch.setattr(cli, "_tell", lambda run: None)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"pairs: {{pairs: {pairs_file}, seed: 3}}\nlocate: {{most: 5, seed: 3}}\n")
    run = str(tmp_path / "run")
    command("locate", str(tiny_folder), "--out", run, "--config", str(recipe), "--most", "6")
    assert seen["pairs"].seed == 3
    assert seen["locate"].most == 6
    assert seen["locate"].seed == 3
