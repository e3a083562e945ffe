"""Own tasks through every stage with `transfer`, what an interrupted stage does not repeat."""

import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from itertools import combinations
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

import circuitune.transfer
import circuitune.validate
from circuitune import cli
from circuitune.choosing import Scores
from circuitune.components import Head, parse_heads
from circuitune.config import TransferConfig
from circuitune.errors import UserError
from circuitune.models import Model
from circuitune.pairs import Pair, encode
from circuitune.readers import MultipleChoice
from circuitune.runs import progress
from circuitune.stats import proportion
from circuitune.transfer import (
    Place,
    _by_task,
    _rows,
    near_chance,
    overlaps,
    shared_by_chance,
    wanted,
)
from circuitune.validate import Knockout
from tests.reference.slow_knockout import head_outputs, logits_without
from tests.test_readers import folder as data_folder

ROOT = Path(__file__).parents[1]
TRANSFER = ("--tasks", "carry,copy_number", "--per-split", "8", "--controls", "2", "--heads", "2")
VALIDATE = ("--sizes", "1,2", "--controls", "2", "--where", "end")

__all__ = ["data_folder"]  # a fixture


def command(*words: object) -> None:
    """Run the command line in this process."""
    cli.app(list(map(str, words)), standalone_mode=False)


def read(run: Path, name: str) -> dict:
    """A JSON file of a run."""
    return json.loads((run / name).read_text())


def parts_files(run: Path) -> list[Path]:
    """The finished parts of interrupted stages."""
    return [path for path in run.iterdir() if path.name.startswith(".") and path.is_file()]


@pytest.fixture(scope="module")
def located(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on own pairs of two tasks, sums and differences."""
    top = tmp_path_factory.mktemp("own")
    lines = [
        {
            "clean": f"{a} {sign} {b} = ",
            "corrupt": f"{a} @ {b} = ",
            "answer": str(a + b if sign == "+" else a - b),
            "task": task,
            "group": f"{a},{b}",
        }
        for task, sign in (("sums", "+"), ("rest", "-"))
        for a in range(4, 8)
        for b in range(1, 4)
        if a + b < 10
    ]
    (top / "own.jsonl").write_text("\n".join(map(json.dumps, lines)))
    options = ("--most", 3, "--draws", 100, "--no-graph")
    command("locate", tiny_folder, "--out", top / "run", "--pairs", top / "own.jsonl", *options)
    return top / "run"


@pytest.fixture
def run(located: Path, tmp_path: Path) -> Path:
    """A located run of one's own."""
    return Path(shutil.copytree(located, tmp_path / "run"))


@pytest.fixture(scope="module")
def finished(located: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Validated, explained and transferred, without an interruption."""
    run = Path(shutil.copytree(located, tmp_path_factory.mktemp("finished") / "run"))
    command("validate", run, *VALIDATE)
    command("explain", run, "--prompts", "8", "--mlps", "0")
    command("transfer", run, *TRANSFER)
    return run


# --------------------------------------------------------------------------------- what it writes


def test_an_own_task_goes_through_every_stage(finished: Path) -> None:
    names = {"knockout.parquet", "validate.json", "explain", "transfer.parquet", "transfer.json"}
    assert names <= {path.name for path in finished.iterdir()}
    assert not parts_files(finished)


def test_every_target_has_every_source_and_random_heads(finished: Path) -> None:
    table, content = pd.read_parquet(finished / "transfer.parquet"), read(finished, "transfer.json")
    assert list(table.columns) == list(pd.read_parquet(finished / "knockout.parquet").columns)
    facts = {item["task"]: item for item in content["tasks"]}
    assert list(facts) == ["sums", "rest", "carry", "copy_number"]
    kept = [name for name, item in facts.items() if item["kept"]]
    assert kept[:2] == ["sums", "rest"]
    for target in kept:
        rows = table[table["task"] == target]
        assert list(rows["set"]) == ["top", *["source"] * len(kept), "matched", "matched"]
        assert list(rows[rows["set"] == "source"]["source"]) == kept
        assert (rows["n"] == facts[target]["test"]).all()
        assert rows.iloc[0]["kl"] == pytest.approx(0, abs=1e-9)
        for _, row in rows[rows["set"] == "source"].iterrows():
            assert row["heads"].split() == facts[row["source"]]["heads"]
            assert row["k"] == 2
    own = {str(head) for head in parse_heads(facts["sums"]["heads"])}
    matched = table[table["set"] == "matched"]["heads"]
    assert not any(own & set(heads.split()) for heads in matched)
    circuit = read(finished, "circuit.json")
    heads = [item["id"] for item in circuit["components"] if not item["id"].startswith("mlp")]
    assert facts["sums"]["heads"] == heads[:2]


def test_tasks_that_are_not_kept_say_how_many_prompts_were_right(finished: Path) -> None:
    for item in read(finished, "transfer.json")["tasks"]:
        if item["family"] == "own":
            assert "near_chance" not in item
            continue
        assert item["correct"] <= item["one_token"] <= item["tried"]
        assert item["near_chance"] == near_chance(item)
        assert item["kept"] == bool(item["ranked"])


def test_what_could_not_be_made_is_a_note(finished: Path) -> None:
    content = read(finished, "transfer.json")
    assert content["choices"] == []
    assert "--data-dir" in content["notes"]["data"]
    assert "circuitune tune" in content["tuned"]["note"]


def test_public_questions_are_scored_with_and_without_the_heads(
    run: Path, data_folder: Path
) -> None:
    own = ("--tasks", "svamp", "--data-dir", data_folder, "--questions", 2)
    command("transfer", run, *own, "--controls", 1, "--per-split", 8)
    content = read(run, "transfer.json")
    assert content["notes"] == {}
    assert content["tasks"][-1]["task"] == "svamp"
    places = [(item["data"], item["set"]) for item in content["choices"]]
    sets = ("source", "matched")
    assert places == [(data, kind) for data in ("commonsense_qa", "bbh") for kind in sets]
    assert {item["n"] for item in content["choices"]} == {1, 2}


def test_tuning_is_compared_and_redone_when_it_changes(run: Path) -> None:
    few = ("--tasks", "none", "--controls", "0")
    command("transfer", run, *few)
    note = read(run, "transfer.json")["tuned"]
    tune = ("--heads", 2, "--steps", 1, "--batch-size", 2, "--precision", "float32")
    command("tune", run, *tune)
    command("transfer", run, *few)
    tuned = read(run, "transfer.json")["tuned"]
    assert list(note) == ["note"]
    assert set(tuned["variants"]) == {"precise", "random"}
    assert len(tuned["variants"]["precise"]["tuned"]) == 2


# --------------------------------------------------------------------------------- small functions


def test_chance_is_what_drawing_every_set_gives() -> None:
    first = {Head(0, 0), Head(0, 1), Head(1, 2)}
    second = {Head(0, 1), Head(0, 3), Head(1, 2), Head(2, 0)}
    counts: Counter[int] = Counter()
    for zero in combinations(range(4), 2):
        for one in range(4):
            drawn = {*(Head(0, i) for i in zero), Head(1, one), Head(2, 0)}
            counts[len(drawn & first)] += 1
    chance = shared_by_chance(first, second, 4)
    total = math.comb(4, 2) * 4
    assert chance == pytest.approx([counts[number] / total for number in range(len(chance))])
    (row,) = overlaps({"a": sorted(first), "b": sorted(second)}, 9, 4)
    assert (row["a"], row["b"], row["k"], row["shared"]) == ("a", "b", 3, 2)
    assert row["expected"] == pytest.approx(2 * 2 / 4 + 1 / 4)
    assert row["p"] == pytest.approx((counts[2] + counts[3]) / total)
    assert np.cumsum(chance)[row["high"]] >= 0.975
    assert overlaps({"a": [Head(0, 0)], "b": [Head(1, 0)]}, 5, 4)[0]["p"] == 1


@pytest.mark.parametrize(
    ("correct", "asked", "commonest", "expected"),
    [(20, 40, 10, False), (12, 40, 10, True), (0, 40, 10, True), (40, 40, 40, True)],
)
def test_near_chance_means_not_shown_to_beat_the_commonest_answer(
    correct: int, asked: int, commonest: int, expected: bool
) -> None:
    low = proportion(correct, asked).low
    facts = {"correct": correct, "one_token": asked, "commonest": commonest, "low": low}
    assert near_chance(facts) == expected


def test_which_tasks_are_asked_for() -> None:
    assert wanted(TransferConfig(tasks=("none",)), ["add"]) == []
    assert wanted(TransferConfig(tasks=("carry", "power")), ["carry"]) == ["power"]
    without, whole = wanted(TransferConfig(), []), wanted(TransferConfig(data_dir="hub"), [])
    assert set(whole) - set(without) == {"svamp", "addsub", "gsm8k"} | {"year_span", "objects"}
    with pytest.raises(UserError, match="svamp must have its data set; give --data-dir"):
        wanted(TransferConfig(tasks=("carry", "svamp")), [])


# ------------------------------------------------------------------------- interrupted and resumed

RESULTS = {
    "validate": ("knockout.parquet", "validate.json"),
    "transfer": ("transfer.parquet", "transfer.json"),
}
OPTIONS = {"validate": VALIDATE, "transfer": TRANSFER}


class Counted:
    """A function that counts its calls and is interrupted at the one after ``most``."""

    def __init__(self, function: Callable, most: int | None = None) -> None:
        self.function, self.most, self.calls = function, most, 0

    def __call__(self, *args: object, **kwargs: object) -> object:
        if self.calls == self.most:
            raise KeyboardInterrupt
        self.calls += 1
        return self.function(*args, **kwargs)


def counted(
    monkeypatch: pytest.MonkeyPatch, stage: str, name: str, most: int | None = None
) -> Counted:
    """Count the calls of a function that a stage uses."""
    module = {"validate": circuitune.validate, "transfer": circuitune.transfer}[stage]
    function = getattr(module, name)
    mine = Counted(getattr(function, "function", function), most)
    monkeypatch.setattr(module, name, mine)
    return mine


def stop(stage: str, run: Path) -> None:
    """Run a stage that is interrupted."""
    words = [stage, str(run), *OPTIONS[stage]]
    assert cli.app(words, standalone_mode=False) == 130  # what Ctrl-C ends with


@pytest.mark.parametrize(("stage", "step"), [("validate", 1), ("transfer", 5)])
def test_an_interrupted_stage_goes_on_where_it_was(
    run: Path, finished: Path, monkeypatch: pytest.MonkeyPatch, stage: str, step: int
) -> None:
    """A part of validate is one knockout; one of transfer all five of a target."""
    whole = len(pd.read_parquet(finished / RESULTS[stage][0]))
    before = {path.name for path in run.iterdir()}
    counted(monkeypatch, stage, "knock_out", 7)
    stop(stage, run)
    (parts,) = parts_files(run)
    assert {path.name for path in run.iterdir()} == {*before, parts.name}
    with parts.open("a") as file:
        file.write('\n["knockout/sums/top/0/0/sums/mean/end", {"set": "to')  # cut off
    again = counted(monkeypatch, stage, "knock_out")
    command(stage, run, *OPTIONS[stage])
    assert again.calls == whole - 7 // step * step
    assert not parts_files(run)
    for name in RESULTS[stage]:
        assert (run / name).read_bytes() == (finished / name).read_bytes(), name


def test_found_heads_and_criteria_are_not_found_again(
    run: Path, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(circuitune.validate, "write_json", interrupt)
    stop("validate", run)
    monkeypatch.undo()
    monkeypatch.setattr(circuitune.transfer, "write_json", interrupt)
    stop("transfer", run)
    monkeypatch.undo()
    for stage, names in (
        ("validate", ("knock_out", "control_circuit", "judge")),
        ("transfer", ("knock_out", "control_circuit")),
    ):
        never = [counted(monkeypatch, stage, name, 0) for name in names]
        command(stage, run, *OPTIONS[stage])
        assert not any(item.calls for item in never)
        for name in RESULTS[stage]:
            assert (run / name).read_bytes() == (finished / name).read_bytes(), name


def interrupt(*_: object) -> None:
    """What Ctrl-C does."""
    raise KeyboardInterrupt


def test_other_options_start_afresh(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counted(monkeypatch, "validate", "knock_out", 5)
    stop("validate", run)
    (old,) = parts_files(run)
    again = counted(monkeypatch, "validate", "knock_out")
    command("validate", run, *VALIDATE, "--seed", "1")
    assert again.calls == len(pd.read_parquet(run / "knockout.parquet"))
    assert not old.exists()


def test_a_killed_stage_goes_on_where_it_was(run: Path, finished: Path) -> None:
    """SIGKILL leaves no time to tidy up, nor to finish the line that is being written."""
    words = [sys.executable, "-m", "circuitune", "validate", str(run), *VALIDATE]
    how = {"env": os.environ | {"HF_HUB_OFFLINE": "1"}, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(words, **how)
    deadline = time.monotonic() + 60
    while not [path for path in parts_files(run) if path.stat().st_size]:
        assert process.poll() is None, "it was done before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (run / "validate.json").exists()
    (parts,) = parts_files(run)
    assert parts.read_text().count("\n")
    command("validate", run, *VALIDATE)
    assert parts_files(run) == []
    for name in RESULTS["validate"]:
        assert (run / name).read_bytes() == (finished / name).read_bytes(), name


def test_without_a_run_directory_nothing_is_kept(tmp_path: Path) -> None:
    parts = progress(tmp_path, circuitune.runs.STAGES["validate"], TransferConfig())
    assert parts.once("a", lambda: [1]) == parts.once("a", lambda: [2]) == [1]
    parts.forget()
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------ the page on a task


def test_the_commands_of_the_page_exist() -> None:
    """Every command of docs/own-task.md is a real one, and every option one of its options."""
    text = (ROOT / "docs" / "own-task.md").read_text()
    assert len(text.splitlines()) <= 60
    blocks = re.findall(r"^```sh\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)
    commands = [shlex.split(line, comments=True) for block in blocks for line in block.splitlines()]
    assert [words[1] for words in commands] == ["locate", "validate", "explain", "transfer"]
    by_name = {item.name: item.callback for item in cli.app.registered_commands}
    for program, name, *rest in commands:
        assert program == "circuitune"
        known = {word.replace("_", "-") for word in by_name[name].__annotations__}
        assert {word[2:] for word in rest if word.startswith("--")} <= known
    (example,) = re.findall(r"^```json\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)
    for line in example.splitlines():
        assert set(json.loads(line)) == {"clean", "corrupt", "answer", "group"}


# ----------------------------------------------------------------------------- against plain hooks


def test_a_cell_of_the_matrix_equals_plain_hooks(tiny: Callable[..., Model]) -> None:
    """Heads get their mean over the corrupt prompts of the target's test half, at END."""
    model, heads = tiny("llama"), (Head(1, 0), Head(2, 3), Head(3, 1))
    pairs = tuple(
        Pair(f"{a} - {b} = ", f"{a} @ {b} = ", str(a - b), "rest", "", split, f"{a},{b}")
        for a in range(5, 9)
        for b in range(1, 4)
        for split in [("select", "test")[b % 2]]
    )
    place, knockout = Place("rest", "own", pairs, (), {}), Knockout("source", 3, 0, heads, "sums")
    (row,) = _rows(model, place, [knockout], TransferConfig())
    half = place.of("test")
    encoded = encode(model.tokenizer, half)
    passed = [head_outputs(model, tokens) for tokens in encoded.corrupt]
    given = {}
    for head in heads:
        width = slice(head.index * model.d_head, (head.index + 1) * model.d_head)
        given[head] = torch.stack([layers[head.layer][-1, width] for layers in passed]).mean(dim=0)
    right, differences = [], []
    for tokens, answer in zip(encoded.clean, encoded.answers, strict=True):
        logits = logits_without(model, tokens, given, slice(-1, None))
        right.append(int(logits.argmax()) == encoded.candidates[answer])
        own = logits[list(encoded.candidates)]
        others = torch.cat([own[:answer], own[answer + 1 :]])
        differences.append(float(own[answer] - others.logsumexp(dim=0)))
    assert (row["set"], row["source"], row["n"]) == ("source", "sums", len(half))
    assert row["accuracy"] == pytest.approx(np.mean(right))
    assert row["logit_diff"] == pytest.approx(np.mean(differences), abs=1e-9)


def test_a_data_set_of_several_tasks_is_also_told_task_by_task() -> None:
    items = [
        MultipleChoice(f"bbh/{task}/{number}", "Is it?", choices, 0)
        for task, choices in (("navigate", (" Yes", " No")), ("dates", (" a", " b", " c", " d")))
        for number in range(3)
    ]
    none = np.zeros(6, dtype=int)
    right = Scores((np.zeros(2),) * 6, none, none, none)
    wrong = Scores((np.zeros(2),) * 6, np.array([0, 1, 1, 0, 0, 0]), none, none)
    rows = _by_task(items, right, wrong, seed=0)
    assert [(row["task"], row["n"], row["chance"]) for row in rows] == [
        ("bbh/navigate", 3, 0.5),
        ("bbh/dates", 3, 0.25),
    ]
    assert [row["acc"]["change"][0] for row in rows] == pytest.approx([-2 / 3, 0.0])
    assert _by_task(items[:3], right.of([0, 1, 2]), wrong.of([0, 1, 2]), seed=0) == []
