"""The run directory: what is redone and what is not, and what a failure leaves behind."""

import json
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from circuitune import cli, runs
from circuitune.config import EvaluateConfig, PairsConfig, TuneConfig, ValidateConfig, overrides
from circuitune.errors import UserError
from circuitune.runs import (
    STAGES,
    Stage,
    is_done,
    opened,
    progress,
    read_manifest,
    write_json,
    writing,
)

CONFIG = ValidateConfig(controls=3)
STAGE = replace(STAGES["validate"], outputs=("knockout.parquet",))
LOAD = {"device": "cpu", "dtype": "float32"}


def files(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    found = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Something that can stand for a checkpoint folder."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    return tmp_path / "model"


@pytest.fixture
def run(tmp_path: Path, model: Path) -> Path:
    """A run directory with the inputs of ``validate``."""
    folder = tmp_path / "run"
    with opened(folder, str(model), LOAD, ["circuitune", "locate"]):
        for name in STAGE.inputs:
            (folder / name).write_text(name)
    return folder


def perform(run: Path, stage: Stage = STAGE) -> None:
    """Let a stage write one file."""
    with writing(run, stage, CONFIG) as work:
        (work / "knockout.parquet").write_text("result")


# ----------------------------------------------------------------------------------- resuming


def test_a_finished_stage_is_done(run: Path) -> None:
    assert not is_done(run, STAGE, CONFIG)
    perform(run)
    assert is_done(run, STAGE, CONFIG)
    assert (run / "knockout.parquet").read_text() == "result"
    manifest = read_manifest(run)
    assert manifest["config"]["validate"] == json.loads(json.dumps(asdict(CONFIG)))
    assert set(files(run)) == {*STAGE.inputs, "knockout.parquet", "manifest.json"}


def touch_model(run: Path, model: Path) -> None:
    (model / "config.json").write_text("[]")  # of the same size
    os.utime(model / "config.json", ns=(1, 1))


def add_to_model(run: Path, model: Path) -> None:
    (model / "model.safetensors").write_text("weights")


def change_input(run: Path, model: Path) -> None:
    (run / "circuit.json").write_text("another circuit")


def change_output(run: Path, model: Path) -> None:
    (run / "knockout.parquet").write_text("edited by hand")


def remove_output(run: Path, model: Path) -> None:
    (run / "knockout.parquet").unlink()


def load_otherwise(run: Path, model: Path) -> None:
    with opened(run, str(model), LOAD | {"dtype": "bfloat16"}, ["circuitune"]):
        pass


@pytest.mark.parametrize(
    "change",
    [touch_model, add_to_model, change_input, change_output, remove_output, load_otherwise],
)
def test_a_stage_is_redone_when_what_it_depends_on_changes(
    run: Path, model: Path, change: Callable[[Path, Path], None]
) -> None:
    perform(run)
    change(run, model)
    assert not is_done(run, STAGE, CONFIG)
    perform(run)
    assert is_done(run, STAGE, CONFIG)


def test_a_stage_is_redone_with_other_options(run: Path) -> None:
    perform(run)
    assert not is_done(run, STAGE, ValidateConfig(controls=4))
    assert is_done(run, STAGE, ValidateConfig(controls=3))


def test_a_stage_is_redone_by_another_version(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    perform(run)
    monkeypatch.setattr(runs, "__version__", "99")
    assert not is_done(run, STAGE, CONFIG)


def test_a_stage_is_done_again_when_a_change_is_taken_back(run: Path) -> None:
    perform(run)
    change_input(run, run)
    assert not is_done(run, STAGE, CONFIG)
    (run / "circuit.json").write_text("circuit.json")
    assert is_done(run, STAGE, CONFIG)


@pytest.mark.parametrize(
    ("stage", "make"),
    [
        ("pairs", lambda file: PairsConfig(pairs=str(file))),
        ("tune", lambda file: TuneConfig(data=str(file))),
        ("evaluate", lambda file: EvaluateConfig(retention=str(file))),
    ],
)
def test_the_content_of_a_users_file_counts(
    run: Path, tmp_path: Path, stage: str, make: Callable[[Path], object]
) -> None:
    file = tmp_path / "mine.txt"
    keys = set()
    for text in ("one", "two", "one"):
        file.write_text(text)
        keys.add(runs.stage_key(run, STAGES[stage], make(file)))
    assert len(keys) == 2


# ------------------------------------------------------------------------------------ failing


def fail_half_way(run: Path, failure: type[BaseException]) -> None:
    """A stage with other options dies while it writes."""
    with writing(run, STAGE, ValidateConfig(controls=9)) as work:
        (work / "knockout.parquet").write_text("half")
        raise failure


def test_a_failing_stage_leaves_the_run_as_it_was(run: Path) -> None:
    perform(run)
    before = files(run)
    for failure in (ValueError, KeyboardInterrupt):
        with pytest.raises(failure):
            fail_half_way(run, failure)
    assert files(run) == before
    assert {path.name for path in run.iterdir()} == set(before)
    assert is_done(run, STAGE, CONFIG)


def test_a_stage_must_write_what_it_promises(run: Path) -> None:
    before = files(run)
    both = Stage("validate", (), ("knockout.parquet", "more.json"))
    with pytest.raises(RuntimeError, match=r"must write more\.json; it did not"):
        perform(run, both)
    assert files(run) == before


def test_a_folder_is_replaced_as_a_whole(run: Path) -> None:
    stage = Stage("tune", (), ("tuned",))
    for name in ("old", "new"):
        with writing(run, stage, CONFIG) as work:
            (work / "tuned").mkdir()
            (work / "tuned" / name).write_text(name)
    assert {path.name for path in (run / "tuned").iterdir()} == {"new"}
    assert is_done(run, stage, CONFIG)
    (run / "tuned" / "further").write_text("")
    assert not is_done(run, stage, CONFIG)


def test_json_is_written_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "facts.json"
    write_json(path, {"text": "3 \N{MULTIPLICATION SIGN} 5"})
    before = files(tmp_path)
    assert json.loads(before["facts.json"]) == {"text": "3 × 5"}  # noqa: RUF001
    with pytest.raises(TypeError):
        write_json(path, {"text": object()})

    def full(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OSError, match="no space left"):
        write_json(path, {"text": "other"})
    assert files(tmp_path) == before


def test_json_is_as_readable_as_any_other_file(tmp_path: Path) -> None:
    write_json(tmp_path / "facts.json", {})
    (tmp_path / "plain").write_text("")
    modes = {path.stat().st_mode for path in tmp_path.iterdir()}
    assert len(modes) == 1


# ----------------------------------------------------------------------------- finished parts


def test_finished_parts_are_found_again(run: Path) -> None:
    made = []

    def make(value: object) -> object:
        made.append(value)
        return value

    before = set(files(run))
    parts = progress(run, STAGE, CONFIG)
    assert set(files(run)) == before  # a stage that is refused leaves nothing
    assert parts.once("a", lambda: make({"x": (0.1, None)})) == {"x": [0.1, None]}
    assert parts.once("b", lambda: make(float("inf"))) == float("inf")
    assert parts.path is not None
    with parts.path.open("a") as file:
        file.write('\n["c", [1, 2')  # the process is killed here
    again = progress(run, STAGE, CONFIG)
    assert again.done == {"a": {"x": [0.1, None]}, "b": float("inf")}
    assert again.once("a", lambda: make("never")) == {"x": [0.1, None]}
    assert again.once("c", lambda: make(3)) == 3
    assert progress(run, STAGE, CONFIG).done["c"] == 3
    assert made == [{"x": (0.1, None)}, float("inf"), 3]
    for other in (
        progress(run, STAGE, ValidateConfig(controls=4)),
        progress(run, STAGE, CONFIG, process="-1-of-2"),
        progress(run, STAGES["transfer"], CONFIG),
    ):
        assert other.done == {}
    perform(run)
    assert set(files(run)) == before | {"knockout.parquet"}


def test_changed_inputs_make_finished_parts_worthless(run: Path) -> None:
    progress(run, STAGE, CONFIG).once("a", lambda: 1)
    change_input(run, run)
    assert progress(run, STAGE, CONFIG).done == {}


# ------------------------------------------------------------------------------------ opening


@pytest.mark.parametrize("failure", [UserError("no"), KeyboardInterrupt()])
def test_a_run_in_which_nothing_finished_disappears(
    tmp_path: Path, model: Path, failure: BaseException
) -> None:
    run = tmp_path / "a" / "b"
    with suppress(type(failure)), opened(run, str(model), LOAD, []):
        assert (run / "manifest.json").is_file()
        raise failure
    assert not (tmp_path / "a").exists()


def test_data_sets_that_are_put_there_are_asked(run: Path, tmp_path: Path) -> None:
    """A suite that missed one is not done when it comes, nor when one has changed."""
    data = tmp_path / "data"
    (data / "svamp").mkdir(parents=True)
    stage, config = STAGES["evaluate"], EvaluateConfig(suite="svamp", data_dir=str(data))
    keys = [runs.stage_key(run, stage, config)]
    (data / "svamp" / "SVAMP.json").write_text("[]")
    keys.append(runs.stage_key(run, stage, config))
    (data / "svamp" / "SVAMP.json").write_text("[1]")
    keys.append(runs.stage_key(run, stage, config))
    assert len(set(keys)) == 3
    assert runs.stage_key(run, stage, config) == keys[-1]


def test_a_stage_is_outdated_when_its_input_was_made_anew(run: Path) -> None:
    """Also by way of a stage between; not where an input was absent, nor where none was noted."""

    def found() -> dict[str, str]:
        return runs.outdated(run, read_manifest(run)["stages"])

    for name in ("tune", "evaluate"):
        with writing(run, STAGES[name], CONFIG) as work:
            for output in STAGES[name].outputs:
                (work / output).write_text(name)
    perform(run)
    (run / "paths.parquet").write_text("traced later")  # which `tune` can do without
    assert found() == {}
    (run / "circuit.json").write_text("another circuit")
    assert found() == {"validate": "locate", "tune": "locate", "evaluate": "locate"}
    (run / "circuit.json").write_text("circuit.json")
    (run / "tune.json").write_text("tuned anew")
    assert found() == {"evaluate": "tune"}
    stages = {name: {"hash": "of an older version"} for name in STAGES}
    assert runs.outdated(run, stages) == {}


def test_a_first_stage_that_was_interrupted_can_go_on(tmp_path: Path, model: Path) -> None:
    folder = tmp_path / "run"
    for _ in range(2):
        with suppress(KeyboardInterrupt), opened(folder, str(model), LOAD, ["circuitune"]):
            progress(folder, STAGES["benchmark"], CONFIG).once("first", lambda: 1)
            raise KeyboardInterrupt
        assert [path.name[:17] for path in folder.iterdir()] == [".benchmark-parts-"]
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="holds other files"):
        opened(folder, str(model), LOAD, ["circuitune"]).__enter__()


def test_a_run_made_with_a_relative_path_goes_on_with_the_absolute_one(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with opened(tmp_path / "run", "model", LOAD, ["circuitune"]):
        pass
    with opened(tmp_path / "run", str(model), LOAD, ["circuitune"]):
        pass
    with pytest.raises(UserError, match="belongs to one model"):
        opened(tmp_path / "run", str(model.parent), LOAD, ["circuitune"]).__enter__()


def test_an_empty_folder_stays_empty(tmp_path: Path, model: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    with suppress(UserError), opened(run, str(model), LOAD, []):
        raise UserError("no")
    assert list(run.iterdir()) == []


def test_a_run_keeps_what_finished_before_a_failure(tmp_path: Path, model: Path) -> None:
    run = tmp_path / "run"
    stage = Stage("pairs", (), ("pairs.jsonl",))
    with suppress(UserError), opened(run, str(model), LOAD, []):
        with writing(run, stage, CONFIG) as work:
            (work / "pairs.jsonl").write_text("pairs")
        raise UserError("the next stage")
    assert is_done(run, stage, CONFIG)


def test_a_failing_command_leaves_the_manifest_of_a_run(run: Path, model: Path) -> None:
    perform(run)
    before = files(run)
    with suppress(UserError), opened(run, str(model), LOAD | {"dtype": "none"}, ["other"]):
        raise UserError("no")
    assert files(run) == before


def test_the_manifest_tells_how_the_run_was_made(tmp_path: Path, model: Path) -> None:
    command = ["circuitune", "locate", str(model), "--prefix", "Math: "]
    with opened(tmp_path / "run", str(model), LOAD, command):
        pass
    manifest = read_manifest(tmp_path / "run")
    assert manifest["command"] == f"circuitune locate {model} --prefix 'Math: '"
    assert manifest["model"] == {"id": str(model)}
    assert manifest["load"] == LOAD
    assert {"python", "torch", "transformers", "numpy"} <= manifest["versions"].keys()
    assert manifest["machine"]["cores"] == os.cpu_count()


# -------------------------------------------------------------------------------- fingerprints


def test_a_name_of_the_hub_is_its_own_fingerprint() -> None:
    assert runs.fingerprint("org/model") == "org/model"
    assert runs.fingerprint("package:not-there") == "package:not-there"
    assert runs.fingerprint("package:pytest") == f"pytest=={pytest.__version__}"


def test_a_single_file_has_a_fingerprint(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_text("weights")
    first = runs.fingerprint(str(path))
    assert first == runs.fingerprint(str(path)) != str(path)
    path.write_text("other weights")
    assert runs.fingerprint(str(path)) != first


def test_a_model_is_known_again_by_its_content(tmp_path: Path) -> None:
    """A copy is the same model; another tokenizer, or other weights of the same size, are not."""
    model, copy = tmp_path / "model", tmp_path / "copy"
    model.mkdir()
    (model / "tokenizer.json").write_text("{}")
    long = bytes(3 * runs.SAMPLES * runs.SAMPLE_BYTES)
    (model / "model.safetensors").write_bytes(long)
    first = runs.identity(str(model))
    shutil.copytree(model, copy)
    os.utime(copy / "tokenizer.json", ns=(1, 1))
    (copy / "README.md").write_text("about it")
    assert runs.identity(str(copy)) == first != runs.fingerprint(str(copy))
    for content in (b"\1" + long[1:], long[:-1] + b"\1", bytes([1] * len(long)), long + b"\0"):
        (copy / "model.safetensors").write_bytes(content)
        assert runs.identity(str(copy)) != first
    (copy / "model.safetensors").write_bytes(long)
    (copy / "tokenizer.json").write_text("[]")
    assert runs.identity(str(copy)) != first
    assert runs.identity("org/model") == "org/model"


def test_digests_see_names_and_contents(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    assert runs.digest(folder) == ""
    (folder / "deep").mkdir(parents=True)
    found = set()
    for name, text in [("a", "1"), ("a", "2"), ("b", "1"), ("deep/a", "1")]:
        (folder / name).write_text(text)
        found |= {runs.digest(folder), runs.digest(folder / name)}
        (folder / name).unlink()
    assert len(found) == 4 + 2  # four folders, two contents


# ------------------------------------------------------------------------------------- stages


def test_every_input_is_written_by_an_earlier_stage() -> None:
    written: set[str] = set()
    for stage in STAGES.values():
        assert set(stage.inputs) <= written, stage.name
        written |= set(stage.outputs)


@pytest.fixture(scope="module")
def finished(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small run with every stage done."""
    folder = tmp_path_factory.mktemp("finished")
    pairs = [
        {"clean": f"{a} + {b} = ", "corrupt": f"{a} @ {b} = ", "answer": str(a + b)}
        for a in range(1, 4)
        for b in range(1, 4)
    ]
    (folder / "sums.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    (folder / "text.txt").write_text("one two three four five six seven eight nine ten\n" * 10)
    recipe = {
        "pairs": {"pairs": str(folder / "sums.jsonl")},
        "locate": {"most": 2},
        "validate": {"sizes": [1], "controls": 1},
        "explain": {"prompts": 8, "mlps": 0},
        "transfer": {"tasks": ["none"], "controls": 1},
        "tune": {"heads": 1, "steps": 1, "batch_size": 2, "precision": "float32"},
        "evaluate": {"problems": 1, "retention": str(folder / "text.txt")},
    }
    (folder / "recipe.yaml").write_text(json.dumps(recipe))
    words = ["locate", str(tiny_folder), "--out", str(folder / "run")]
    cli.app([*words, "--config", str(folder / "recipe.yaml")], standalone_mode=False)
    for stage in ("validate", "explain", "transfer", "tune", "evaluate"):
        words = [stage, str(folder / "run"), "--config", str(folder / "recipe.yaml")]
        cli.app(words, standalone_mode=False)
    return folder / "run"


@pytest.mark.parametrize("name", ["locate", "validate", "explain", "transfer", "tune", "evaluate"])
def test_a_stage_reads_nothing_but_its_inputs(finished: Path, tmp_path: Path, name: str) -> None:
    """Else a changed file would leave an old result standing."""
    stage = STAGES[name]
    for item in ("manifest.json", *stage.inputs):
        copy = shutil.copytree if (finished / item).is_dir() else shutil.copy
        copy(finished / item, tmp_path / item)
    manifest = read_manifest(finished)
    options = overrides(cli.IMPLEMENTATION[name][1], manifest["config"][name])
    model = cli.LoadedModel(manifest["model"]["id"], manifest["load"])
    cli.run_stage(name, tmp_path, options, model)
    for output in stage.outputs:
        assert (tmp_path / output).exists()
