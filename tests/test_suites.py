"""Benchmarks: all tasks offline on made-up data, resumed, damaged, missing, and what they say."""

import json
import math
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from circuitune import cli, suites
from circuitune.errors import UserError
from circuitune.models import Model, load
from circuitune.report import write_report
from circuitune.report.benchmarks import benchmarks
from circuitune.report.format import MISSING
from circuitune.report.load import load as load_run
from circuitune.suites import (
    COLUMNS,
    PERPLEXITY,
    Answered,
    Questions,
    ask_suite,
    drawn,
    named_tasks,
    sample_frame,
    suite_records,
)
from circuitune.taskfiles import TaskFile
from tests.fixture_run import write_run

WORDS = ["apples", "pens", "cards", "cats", "shells", "bales"]


def data_dir(folder: Path) -> Path:
    """Every set of the paper's suite but MMLU, a few made-up records each."""
    asked = [
        (f"Ann has {a} {WORDS[a % 6]} and gets {b} more. How many has she?", a, b)
        for a in range(2, 9)
        for b in range(2, 6)
    ]
    sums = [
        {"sQuestion": text, "lEquations": [f"X = {a} + {b}"], "lSolutions": [str(a + b)]}
        for text, a, b in asked
    ]
    svamp = [
        {"Body": text, "Question": "?", "Equation": f"( {a}.0 + {b}.0 )", "Answer": float(a + b)}
        for text, a, b in asked
    ]
    files: dict[str, Any] = {
        "addsub/AddSub.json": sums,
        "singleeq/questions.json": sums,
        "svamp/SVAMP.json": svamp,
        "bbh/navigate.json": {"examples": [{"input": "Do you? Turn.", "target": "Yes"}] * 3},
        "bbh/boolean_expressions.json": {"examples": [{"input": "True is", "target": "True"}] * 3},
        "bbh/causal_judgement.json": {"examples": [{"input": "Did he?", "target": "No"}] * 3},
        "bbh/disambiguation_qa.json": {"examples": [{"input": "Who?", "target": "(A)"}] * 3},
        "bbh/hyperbaton.json": {"examples": [{"input": "Which?", "target": "(B)"}] * 3},
        "bbh/sports_understanding.json": {"examples": [{"input": "He ran", "target": "yes"}] * 3},
    }
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(content), encoding="utf-8")
    lines: dict[str, list[dict[str, Any]]] = {
        "gsm8k/train.jsonl": [{"question": "Two and 2?", "answer": "So <<2+2=4>>4\n#### 4"}] * 6,
        "gsm8k/test.jsonl": [{"question": t, "answer": f"#### {a + b}"} for t, a, b in asked],
        "commonsense_qa/dev_rand_split.jsonl": [
            {
                "id": str(place),
                "answerKey": "ABCDE"[place % 5],
                "question": {
                    "stem": f"Where is cat {place}?",
                    "choices": [{"label": key, "text": f"on {key}"} for key in "ABCDE"],
                },
            }
            for place in range(12)
        ],
    }
    for name, rows in lines.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / name).write_text(text, encoding="utf-8")
    (folder / "wikitext2").mkdir()
    article = " = {} = \n \n The cat sat on the mat and saw a dog . \n"
    text = "".join(article.format(name) for name in ("One", "Two", "Three"))
    (folder / "wikitext2" / "test.txt").write_text(text, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return data_dir(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def model(tiny_folder: Path) -> Model:
    return load(str(tiny_folder), device="cpu", dtype="float32")


def answered(model: Model, data: Path, kept: Path, tasks: tuple[str, ...], **more: Any) -> Answered:
    """The base and a copy of it, which answers alike."""
    kept.mkdir(exist_ok=True)
    variants = {"base": nullcontext, "precise": nullcontext}
    return ask_suite(model, variants, Questions(tasks, data, limit=2, **more), kept)


def test_suites_and_lists_of_tasks_have_names() -> None:
    assert named_tasks("paper")[:4] == ("addsub", "singleeq", "svamp", "gsm8k")
    assert named_tasks("svamp, bbh,svamp") == ("svamp", "bbh")
    assert named_tasks("bbh_math") == ("bbh_math",)
    with pytest.raises(UserError, match="must be paper, word-problems, retention or some of"):
        named_tasks("addsub,nonsense")


def test_a_model_is_asked_and_its_table_printed(
    tiny_folder: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the command line, offline; MMLU is not there and says so."""
    words = ["evaluate", str(tiny_folder), "--suite", "paper", "--data-dir", str(data)]
    words += ["--limit", "2", "--problems", "10", "--out", str(tmp_path / "run")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["circuitune", *words])
        patch.setenv("COLUMNS", "200")
        patch.setattr("circuitune.taskfiles.NEW_TOKENS", 8)
        with pytest.raises(SystemExit) as ended:
            cli.main()
    assert not ended.value.code
    records = json.loads((tmp_path / "run" / "eval.json").read_text())
    by = {(r["task"], r["metric"]): r for r in records}
    asked = {"addsub", "singleeq", "svamp", "commonsense_qa", "bbh", "wikitext"}
    assert {task for task, metric in by if by[task, metric].get("kind")} == asked
    assert "mmlu" in by["mmlu", "missing"]["reason"]
    assert by["bbh", "acc_norm"]["n"] == 2
    assert by["commonsense_qa", "acc"]["chance"] == 0.2
    # The tiny model has 64 positions, and GSM8K may take 256 for an answer.
    assert "256 new tokens of the 64 positions" in by["gsm8k", "missing"]["reason"]
    assert by["wikitext", "word_perplexity"]["value"] > 1
    samples = pd.read_parquet(tmp_path / "run" / "samples.parquet")
    assert list(samples.columns) == COLUMNS
    assert len(samples[(samples["task"] == "addsub") & (samples["metric"] == "exact_match")]) == 2
    shown = capsys.readouterr().out
    assert "CommonsenseQA" in shown
    assert "MMLU: not asked." in shown


def test_a_chat_needs_a_template(tiny_folder: Path, data: Path, tmp_path: Path) -> None:
    """Said before anything is measured."""
    words = ["evaluate", str(tiny_folder), "--suite", "svamp", "--data-dir", str(data), "--chat"]
    with pytest.raises(UserError, match="--chat needs a tokenizer with a chat template"):
        cli.app([*words, "--out", str(tmp_path / "run")], standalone_mode=False)
    assert not (tmp_path / "run").exists()


def test_equal_variants_do_not_differ(model: Model, data: Path, tmp_path: Path) -> None:
    found = answered(model, data, tmp_path, ("commonsense_qa", "wikitext"))
    records = suite_records(found, seed=0)
    gaps = [r for r in records if r["variant"] == "precise - base"]
    assert {r["task"] for r in gaps} == {"commonsense_qa", "wikitext"}
    assert all(r["value"] == 0 and r["p"] == 1 for r in gaps)
    by = {r["task"]: r for r in gaps}
    assert by["commonsense_qa"]["not_worse"] is False  # two questions show nothing
    assert by["wikitext"]["not_worse"] is None


def test_an_interrupted_suite_goes_on_with_the_next_task(
    model: Model, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks = ("commonsense_qa", "wikitext")
    whole = answered(model, data, tmp_path / "whole", tasks)
    from circuitune import scoring

    plain, asked = scoring.ask, []

    def dying(backend: Any, names: tuple[str, ...], *rest: Any, **more: Any) -> Any:
        asked.append(names[0])
        if len(asked) == 3:
            raise KeyboardInterrupt
        return plain(backend, names, *rest, **more)

    monkeypatch.setattr(scoring, "ask", dying)
    with pytest.raises(KeyboardInterrupt):
        answered(model, data, tmp_path / "cut", tasks)
    again = answered(model, data, tmp_path / "cut", tasks)
    assert asked == ["commonsense_qa", "wikitext", *["commonsense_qa"] * 2, "wikitext"]
    pd.testing.assert_frame_equal(again.samples, whole.samples)


def test_a_task_that_cannot_be_read_is_named_and_the_rest_is_asked(
    model: Model, data: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "data"
    broken.mkdir()
    data_dir(broken)
    (broken / "svamp" / "SVAMP.json").write_text("[{")
    (broken / "gsm8k" / "train.jsonl").unlink()
    row = {"sQuestion": "How many?", "lEquations": [], "lSolutions": ["many"]}
    (broken / "addsub" / "AddSub.json").write_text(json.dumps([row]))
    tasks = ("svamp", "gsm8k", "addsub", "wikitext")
    found = answered(model, broken, tmp_path / "kept", tasks)
    assert list(found.main) == ["wikitext"]
    assert "must be JSON" in found.missing["svamp"]
    assert "train.jsonl" in found.missing["gsm8k"]
    assert "lSolutions" in found.missing["addsub"]
    lines = [r for r in suite_records(found, seed=0) if r["metric"] == "missing"]
    assert [r["task"] for r in lines] == ["svamp", "gsm8k", "addsub"]
    with pytest.raises(UserError, match="at least one task that can be asked"):
        answered(model, broken, tmp_path / "none", ("svamp",))


def test_a_model_that_says_nothing_is_wrong_not_an_error() -> None:
    file = TaskFile("addsub", "math", ("addsub",), ("exact_match", "strict_match"), {}, 0.0)
    record = {"doc_id": 0, "filter": "none", "filtered_resps": [""], "resps": [[""]]}
    record |= {"metrics": ["exact_match", "strict_match"], "exact_match": 0.0, "strict_match": 0.0}
    frame = sample_frame({"addsub": [record]}, file, "base")
    assert frame["value"].tolist() == [0.0, 0.0]
    assert frame["output"].tolist() == ["", ""]


def test_the_draw_is_the_same_for_all_variants_and_spread_over_parts() -> None:
    parts = {f"part{number}": 30 for number in range(10)}
    file = TaskFile("mmlu", "retention", tuple(parts), ("acc",), parts, 0.25)
    questions = Questions(("mmlu",), None, limit=40)
    found = drawn(file, questions)
    assert found == drawn(file, questions)
    assert sum(map(len, found.values())) == 40
    assert len(found) > 6
    assert found != drawn(file, replace(questions, seed=1))
    assert drawn(file, replace(questions, limit=0)) == {name: list(range(30)) for name in parts}


@pytest.mark.parametrize(("limit", "articles"), [(1, 2), (10, 2), (30, 3), (31, 4), (0, 9)])
def test_a_limit_leaves_at_least_two_articles(limit: int, articles: int) -> None:
    file = TaskFile("wikitext", "retention", ("wikitext",), (PERPLEXITY,), {"wikitext": 9}, 0.0)
    assert len(drawn(file, Questions(("wikitext",), None, limit=limit))["wikitext"]) == articles


def test_one_article_has_no_interval_and_eval_json_stays_json() -> None:
    samples = pd.DataFrame(
        [
            ("wikitext", name, PERPLEXITY, "a", 2.0 + more, 100.0, "")
            for name, more in (("base", 0.0), ("tuned", 0.5))
        ],
        columns=COLUMNS,
    )
    answered = Answered(samples, {"wikitext": "retention"}, {"wikitext": PERPLEXITY}, {})
    records = suite_records(answered, seed=0)
    assert len(records) == 3
    assert all(record["low"] is record["high"] is None for record in records)
    json.dumps(records, allow_nan=False)


def frame_of(values: dict[str, dict[str, np.ndarray]], metric: str = "exact_match") -> pd.DataFrame:
    rows = [
        (task, variant, metric, f"q{place}", float(value), 1.0, "")
        for task, own in values.items()
        for variant, array in own.items()
        for place, value in enumerate(array)
    ]
    return pd.DataFrame(rows, columns=COLUMNS)


def test_records_by_hand(tmp_path: Path) -> None:
    """40 questions of two word problem sets and one that must not suffer."""
    better, base = np.arange(40) < 30, np.arange(40) < 10
    values = {
        "svamp": {"base": base, "precise": better, "random": base},
        "addsub": {"base": base, "precise": base, "random": base},
        "bbh": {"base": better, "precise": base, "random": better},
    }
    kinds = {"svamp": "math", "addsub": "math", "bbh": "retention"}
    main = dict.fromkeys(kinds, "exact_match")
    found = Answered(frame_of(values), kinds, main, {"mmlu": "It is not there."})
    records = suite_records(found, seed=0)
    by = {(r["task"], r["variant"]): r for r in records}
    assert by["svamp", "precise"]["value"] == 0.75
    gain = by["svamp", "precise - base"]
    assert gain["value"] == pytest.approx(0.5)
    assert gain["p"] == pytest.approx(2 * 0.5**20)
    assert gain["p_holm"] == pytest.approx(3 * gain["p"])  # bbh has the same p
    assert by["bbh", "precise - base"]["not_worse"] is False
    assert by["svamp", "precise - random"]["value"] == pytest.approx(0.5)
    assert ("svamp", "base - precise") not in by
    assert by["word_problems", "precise - base"]["value"] == pytest.approx(0.25)
    assert by["mmlu", ""]["reason"] == "It is not there."


def test_perplexity_is_shown_as_such() -> None:
    values = {"wikitext": {"base": np.full(5, 2.0), "precise": np.full(5, 2.1)}}
    metric = suites.PERPLEXITY
    found = Answered(frame_of(values, metric), {"wikitext": "retention"}, {"wikitext": metric}, {})
    by = {r["variant"]: r for r in suite_records(found, seed=0)}
    assert by["base"]["value"] == pytest.approx(math.exp(2))
    assert by["precise - base"]["value"] == pytest.approx(math.exp(0.1) - 1)


def test_the_report_shows_benchmarks(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    records = json.loads((run / "eval.json").read_text())
    kinds = {"svamp": "math", "bbh": "retention"}
    values = {task: {"base": np.arange(20) < 5, "precise": np.arange(20) < 9} for task in kinds}
    main = dict.fromkeys(kinds, "exact_match")
    found = Answered(frame_of(values), kinds, main, {"mmlu": "No file of it."})
    (run / "eval.json").write_text(json.dumps(records + suite_records(found, seed=0)))
    page = write_report(run).read_text(encoding="utf-8")
    assert "Benchmarks" in page
    assert "Not worse by a point" in page
    assert "MMLU: not asked. No file of it." in page


def test_many_variants_stand_one_below_the_other(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    names = ["base", "precise", "full", "layers", "lora", "random"]
    values = {"svamp": {name: np.arange(20) < 3 + place for place, name in enumerate(names)}}
    found = Answered(frame_of(values), {"svamp": "math"}, {"svamp": "exact_match"}, {})
    (run / "eval.json").write_text(json.dumps(suite_records(found, seed=0)))
    tables = benchmarks(load_run(run).benchmarks)
    scores = [[str(cell) for cell in line.cells] for line in tables.scores.rows]
    assert [line[3] for line in scores] == names
    assert len({line[4] for line in scores}) == len(names)
    pairs = [str(line.cells[0]) for line in tables.differences.rows]
    assert len(pairs) == 5 + 4  # all against the base, precise against the others
    assert "precise - full" in pairs
    assert "full - lora" not in pairs
    assert "All pairs of variants are in eval.json." in tables.differences.note


def test_a_base_that_guesses_is_told_from_one_that_knows(tmp_path: Path) -> None:
    """Of 40 questions with two choices 20 are right, of those with five choices 24."""
    run = write_run(tmp_path / "run")
    half, most = np.arange(40) < 20, np.arange(40) < 24
    values = {
        "bbh": {"base": half, "precise": half},
        "commonsense_qa": {"base": most, "precise": most},
        "svamp": {"base": half, "precise": most},
    }
    kinds = dict.fromkeys(values, "retention") | {"svamp": "math"}
    chance = {"bbh": 0.5, "commonsense_qa": 0.2}
    found = Answered(frame_of(values), kinds, dict.fromkeys(kinds, "exact_match"), {}, chance)
    records = suite_records(found, seed=0)
    assert {r["task"]: r["chance"] for r in records if "chance" in r} == chance
    (run / "eval.json").write_text(json.dumps(records))
    tables = benchmarks(load_run(run).benchmarks)
    assert [column.label for column in tables.scores.columns][3] == "Guessing"
    scores = {str(line.cells[0]): str(line.cells[3]) for line in tables.scores.rows}
    assert scores == {"BIG-Bench Hard": "50.0 %", "CommonsenseQA": "20.0 %", "SVAMP": MISSING}
    judged = {str(line.cells[1]): str(line.cells[4]) for line in tables.differences.rows}
    assert judged == {
        "BIG-Bench Hard": "not shown, base at guessing",
        "CommonsenseQA": "not shown",
        "SVAMP": "",
    }
    assert "has little to lose" in tables.differences.note
