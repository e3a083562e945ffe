"""Benchmarks for lm-eval: its own prompts on its own documents, ours, and what is refused."""

import ast
import csv
import json
import random
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lm_eval.tasks
import pytest
from lm_eval.api.task import Task
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml
from lm_eval.utils import apply_template

from circuitune import taskfiles
from circuitune.errors import UserError
from circuitune.readers import BBH_MATH, BBH_TASKS
from circuitune.taskfiles import TASKS, articles, number_results, write_task
from circuitune.wordproblems import word_problems

STOCK = Path(lm_eval.tasks.__file__).parent
Row = dict[str, Any]

ADDSUB = [
    {"sQuestion": f"{a} and {b} . How many ? ", "lEquations": [f"X = {a} + {b}"]}
    | {"lSolutions": [f"{a + b}.0"]}
    for a in range(2, 7)
    for b in range(7, 12)
]
GSM8K = [
    {
        "question": f" Ducks \u2013 {n}? ",
        "answer": f"So {n}+1=<<{n}+1={n + 1}>>{n + 1}.\n#### {n + 1}",
    }
    for n in range(30)
]
# What the hub has of CommonsenseQA; the file nests the stem and lists the choices.
COMMONSENSE = [
    {
        "question": f"Where is 'it' — {n}? ",
        "choices": {"label": list("ABCDE"), "text": [f"{place} {n}" for place in "vwxyz"]},
        "answerKey": "ABCDE"[n % 5],
    }
    for n in range(8)
]
MMLU = [
    {"question": 'He said "no, 1,5"\nand left. ', "choices": ["a", 'b "c"', "d, e", "f\ng"]}
    | {"answer": 2},
    {"question": "Is it?", "choices": ["1", "2", "3", "4"], "answer": 0},
]
BBH = {
    "boolean_expressions": ("not ( True ) is", "False"),
    "causal_judgement": ("Did he?\nOptions:\n- Yes\n- No", "No"),
    "disambiguation_qa": ("Who?\nOptions:\n(A) he\n(B) they\n(C) Ambiguous", "(C)"),
    "hyperbaton": ("Which:\nOptions:\n(A) a b\n(B) b a", "(B)"),
    "navigate": ("Take 1 step.\nOptions:\n- Yes\n- No", "Yes"),
    "sports_understanding": ('Plausible? "He swam."', "yes"),
    "multistep_arithmetic_two": ("((-1 + 2) - (-2 + -4)) =", "7"),
    "object_counting": ("I have two pens. How many pens?", "2"),
}
WIKITEXT = (
    " \n = First = \n \n Some text @-@ here , \n \n = = Part = = \n \n More . \n"
    " \n = Second ( a = b ) = \n \n Other . \n = = = Deep = = = \n Last . \n"
)


def write(path: Path, content: object) -> None:
    """Write text, JSON, or lines of JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".jsonl":
        assert isinstance(content, list)
        content = "".join(json.dumps(item) + "\n" for item in content)
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")


def nested(row: Row) -> Row:
    """A question of CommonsenseQA as its authors' file has it."""
    pairs = zip(*row["choices"].values(), strict=True)
    choices = [{"label": label, "text": text} for label, text in pairs]
    question = {"stem": row["question"], "question_concept": "it", "choices": choices}
    return {"id": "x", "answerKey": row["answerKey"], "question": question}


def write_mmlu(folder: Path, subject: str, dev: Sequence[Row], test: Sequence[Row]) -> None:
    """A subject in its two CSV files, without headers."""
    for part, rows in (("dev", dev), ("test", test)):
        path = folder / "mmlu" / part / f"{subject}_{part}.csv"
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", encoding="utf-8", newline="") as file:
            for row in rows:
                csv.writer(file).writerow([row["question"], *row["choices"], "ABCD"[row["answer"]]])


SUBJECTS = sorted(path.stem.removeprefix("mmlu_") for path in STOCK.glob("mmlu/default/mmlu_*"))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Every set with a few made-up records, in the files of their authors."""
    folder = tmp_path / "data"
    write(folder / "addsub/AddSub.json", ADDSUB)
    write(folder / "gsm8k/train.jsonl", GSM8K[:25])
    write(folder / "gsm8k/test.jsonl", GSM8K[25:])
    rows = [nested(row) for row in COMMONSENSE]
    write(folder / "commonsense_qa/dev_rand_split.jsonl", rows[:5])
    write(folder / "commonsense_qa/train_rand_split.jsonl", rows[5:])
    for task, (text, target) in BBH.items():
        examples = [{"input": text, "target": target}] * (1 + len(task) % 3)
        write(folder / f"bbh/{task}.json", {"canary": "-", "examples": examples})
    for subject in SUBJECTS:
        write_mmlu(folder, subject, [MMLU[1], MMLU[0]] * 3, MMLU)
    write(folder / "wikitext2/test.txt", WIKITEXT)
    return folder


def read(folder: Path, name: str) -> Task:
    """A task as lm-eval reads it."""
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    return manager.load([name])["tasks"][name]


def prompts(task: Task) -> list[str]:
    """What a model is asked, documents in order."""
    shots = task.config.num_fewshot or 0
    return [task.fewshot_context(doc, num_fewshot=shots) for doc in task.eval_docs]


def stock(path: str) -> Row:
    """A definition of lm-eval's own."""
    return load_yaml(STOCK / path)


def expected(definition: Row, documents: Sequence[Row], examples: Sequence[Row]) -> list[str]:
    """The prompts of a definition on documents of the hub, put together by hand."""

    def asked(row: Row) -> str:
        return apply_template(definition["doc_to_text"], row)

    def solved(row: Row) -> str:
        field = definition["doc_to_target"]
        target = row[field] if field in row else apply_template(field, row)
        choices = definition.get("doc_to_choice")
        return f"{asked(row)} {choices[target] if isinstance(target, int) else target}\n\n"

    front = definition.get("description", "") + "".join(solved(row) for row in examples)
    return [front + asked(row) for row in documents]


def own_examples(path: str) -> list[Row]:
    """Solved examples that a definition holds itself."""
    return stock(path)["fewshot_config"]["samples"]


def bbh_rows(task: str) -> list[Row]:
    """The documents of a task of BIG-Bench Hard on the hub."""
    text, target = BBH[task]
    return [{"input": text, "target": target}] * (1 + len(task) % 3)


BBH_FILES = {task: f"leaderboard/bbh_mc/{task}.yaml" for task in BBH_TASKS} | {
    task: f"bbh/fewshot/{task}.yaml" for task in BBH_MATH
}
CASES: dict[str, tuple[str, str, Sequence[Row], Sequence[Row]]] = {
    "gsm8k": ("gsm8k", "gsm8k/gsm8k.yaml", GSM8K[25:], GSM8K[:5]),
    "commonsense_qa": ("commonsense_qa", "commonsense_qa/default.yaml", COMMONSENSE[:5], []),
    "mmlu_anatomy": ("mmlu", "mmlu/default/mmlu_anatomy.yaml", MMLU, ([MMLU[1], MMLU[0]] * 3)[:5]),
} | {
    f"bbh_{task}": (
        "bbh_math" if task in BBH_MATH else "bbh",
        path,
        bbh_rows(task),
        own_examples(path),
    )
    for task, path in BBH_FILES.items()
}


# -------------------------------------------------------------------------------- lm-eval's tasks


@pytest.mark.parametrize("lm_name", CASES)
def test_prompts_are_those_of_lm_evals_own_tasks(lm_name: str, data: Path, tmp_path: Path) -> None:
    name, path, documents, examples = CASES[lm_name]
    file = write_task(name, data, tmp_path / "tasks", shots=None)
    task = read(tmp_path / "tasks", lm_name)
    assert prompts(task) == expected(stock(path), documents, examples)
    assert file.documents[lm_name] == len(documents)
    assert set(file.lm_names) == set(file.documents)
    if task.OUTPUT_TYPE == "multiple_choice":
        assert task.doc_to_choice(documents[0]) == stock(path)["doc_to_choice"]
    else:
        assert task.config.generation_kwargs == stock(path)["generation_kwargs"]
    names = {metric["metric"] for metric in task.config.metric_list or []}
    assert {metric.partition(",")[0] for metric in file.metrics} <= names


def test_gsm8k_keeps_its_filters(data: Path, tmp_path: Path) -> None:
    file = write_task("gsm8k", data, tmp_path, shots=0)
    task = read(tmp_path, "gsm8k")
    assert {f"exact_match,{item['name']}" for item in task.config.filter_list} == set(file.metrics)
    assert file.metrics[0] == "exact_match,flexible-extract"
    assert prompts(task) == expected(stock("gsm8k/gsm8k.yaml"), GSM8K[25:], [])


def test_mmlu_has_its_subjects_and_no_groups(data: Path, tmp_path: Path) -> None:
    file = write_task("mmlu", data, tmp_path, shots=2)
    assert file.lm_names == tuple(f"mmlu_{subject}" for subject in SUBJECTS)
    assert len(SUBJECTS) == 57
    assert set(file.documents.values()) == {2}
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    assert sorted(manager.all_tasks) == list(file.lm_names)  # a tag would be listed too
    one = stock("mmlu/default/mmlu_virology.yaml")
    assert prompts(read(tmp_path, "mmlu_virology")) == expected(one, MMLU, [MMLU[1], MMLU[0]])


def test_commonsense_takes_solved_examples_from_the_training_part(
    data: Path, tmp_path: Path
) -> None:
    write_task("commonsense_qa", data, tmp_path, shots=2)
    definition = stock("commonsense_qa/default.yaml")
    wanted = expected(definition, COMMONSENSE[:5], COMMONSENSE[5:7])
    assert prompts(read(tmp_path, "commonsense_qa")) == wanted


def test_commonsense_is_also_asked_by_the_texts_of_the_answers(data: Path, tmp_path: Path) -> None:
    file = write_task("commonsense_qa_text", data, tmp_path, shots=1)
    assert file.metrics == ("acc_norm",)
    task = read(tmp_path, "commonsense_qa_text")
    own, solved = COMMONSENSE[0], COMMONSENSE[5]
    answer = solved["choices"]["text"]["ABCDE".index(solved["answerKey"])]
    wanted = f"Question: {solved['question'].strip()}\nAnswer: {answer}\n\n"
    assert prompts(task)[0] == f"{wanted}Question: {own['question'].strip()}\nAnswer:"
    assert task.doc_to_choice(own) == own["choices"]["text"]
    assert task.doc_to_target(own) == "ABCDE".index(own["answerKey"])


def test_bbh_is_guessed_by_its_choices(data: Path, tmp_path: Path) -> None:
    file = write_task("bbh", data, tmp_path, shots=1)
    counts = [len(bbh_rows(task)) for task in BBH_TASKS]
    chances = [1 / 3 if task == "disambiguation_qa" else 1 / 2 for task in BBH_TASKS]
    right = sum(count * chance for count, chance in zip(counts, chances, strict=True))
    assert file.chance == pytest.approx(right / sum(counts))
    path = BBH_FILES["navigate"]
    wanted = expected(stock(path), bbh_rows("navigate"), own_examples(path)[:1])
    assert prompts(read(tmp_path, "bbh_navigate")) == wanted


def slow_articles(text: str) -> list[str]:
    """Line by line, as the hub's copy was made."""
    found: list[list[str]] = []
    for line in text.split("\n"):
        signs = line.split()
        title = len(signs) > 2 and signs[0] == signs[-1] == "=" and "=" not in (signs[1], signs[-2])
        if title:
            found.append([])
        if found:
            found[-1].append(line)
    return ["\n".join(lines) for lines in found]


def test_wikitext_is_cut_into_articles(data: Path, tmp_path: Path) -> None:
    file = write_task("wikitext", data, tmp_path, shots=None)
    task = read(tmp_path, "wikitext")
    pages = [doc["page"] for doc in task.eval_docs]
    assert pages == slow_articles(WIKITEXT)
    assert [page[:10] for page in pages] == [" = First =", " = Second "]
    assert file.documents == {"wikitext": 2}
    assert task.doc_to_target(task.eval_docs[0]).startswith(
        " = First =\n\nSome text-here,\n\n== Part"
    )
    assert {"word_perplexity"} <= {metric["metric"] for metric in task.config.metric_list}


def test_articles_are_those_of_the_slow_way() -> None:
    rng = random.Random(0)
    lines = [
        " = A = ",
        " = = B = = ",
        " = = = C = = = ",
        " d . ",
        " ",
        "",
        "= E =",
        " f = 1 ",
        " =",
    ]
    for _ in range(300):
        text = "\n".join(rng.choices(lines, k=rng.randrange(12)))
        assert articles(text) == slow_articles(text)


# ----------------------------------------------------------------------------- tasks of our own


def test_word_problems_are_asked_as_gsm8k_asks(data: Path, tmp_path: Path) -> None:
    file = write_task("addsub", data, tmp_path, shots=3)
    task = read(tmp_path, "addsub")
    train, test = ([vars(p) for p in word_problems("addsub", data, x)] for x in ("train", "test"))
    definition = stock("gsm8k/gsm8k.yaml") | {"doc_to_target": "{{solution}}"}
    assert prompts(task) == expected(definition, test, train[:3])
    assert task.config.generation_kwargs["until"] == definition["generation_kwargs"]["until"]
    assert file.documents == {"addsub": len(test)}
    assert (file.kind, file.metrics) == ("math", ("exact_match", "strict_match"))
    assert len(train) + len(test) == len(ADDSUB)


def test_generated_answers_are_read_by_extracting(data: Path, tmp_path: Path) -> None:
    write_task("addsub", data, tmp_path, shots=0)
    task = read(tmp_path, "addsub")
    doc = task.eval_docs[0]
    right = doc["answer"]
    for text, exact, strict in (
        (f" 2 + 2 = {right}\n#### {right}", 1, 1),
        (f" The answer is {right}.", 1, 0),
        (" The answer is 999.", 0, 0),
        ("", 0, 0),
    ):
        scores = {"exact_match": float(exact), "strict_match": float(strict)}
        assert task.process_results(doc, [text]) == scores == number_results(doc, [text])


@pytest.mark.parametrize(("text", "score"), [(" 7", 1.0), (" (3 - -4) = 7.\n", 1.0), (" -7", 0.0)])
def test_answers_of_bbh_math_need_not_be_letter_by_letter(
    text: str, score: float, data: Path, tmp_path: Path
) -> None:
    write_task("bbh_math", data, tmp_path, shots=None)
    task = read(tmp_path, "bbh_multistep_arithmetic_two")
    assert task.process_results(task.eval_docs[0], [text]) == {"exact_match": score}


def test_the_hubs_rows_make_the_same_documents(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("mmlu", "wikitext", "commonsense_qa"):
        write_task(name, data, tmp_path / "files", shots=1)

    def load_dataset(path: str, name: str = "", *, split: str) -> Iterable[Row]:
        if path == "EleutherAI/wikitext_document_level":
            assert (name, split) == ("wikitext-2-raw-v1", "test")
            return [{"page": page} for page in slow_articles(WIKITEXT)]
        if path == "tau/commonsense_qa":
            rows = {"validation": COMMONSENSE[:5], "train": COMMONSENSE[5:]}[split]
            return [{"id": "x", "question_concept": "it"} | row for row in rows]
        assert (path, name in SUBJECTS) == ("cais/mmlu", True)
        rows = {"dev": [MMLU[1], MMLU[0]] * 3, "test": MMLU}[split]
        return [row | {"subject": name} for row in rows]

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    for name in ("mmlu", "wikitext", "commonsense_qa"):
        write_task(name, None, tmp_path / "hub", shots=1)
    files = sorted((tmp_path / "files").glob("*.jsonl"))
    assert len(files) == 2 * len(SUBJECTS) + 3
    for file in files:
        assert file.read_text() == (tmp_path / "hub" / file.name).read_text()


def test_nothing_slow_is_imported_before_a_task_is_asked() -> None:
    """lm-eval takes seconds, and it need not be installed."""
    nodes = ast.parse(Path(taskfiles.__file__).read_text(encoding="utf-8")).body
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [str(node.module) for node in nodes if isinstance(node, ast.ImportFrom)]
    assert "yaml" in names
    assert not {name.partition(".")[0] for name in names} & {"lm_eval", "datasets"}


# ------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("name", "shots", "found"),
    [
        ("mawps", None, "must be one of addsub, .*, found 'mawps'"),
        ("addsub", 21, "between 0 and 20, found 21"),
        ("addsub", -1, "between 0 and 20, found -1"),
        ("addsub", 20, r"addsub has \d+ solved examples, --shots asks for 20"),
        ("bbh", 4, "bbh has 3 solved examples, --shots asks for 4"),
        ("bbh_math", 4, "bbh_math has 3 solved examples"),
        ("mmlu", 7, "mmlu_abstract_algebra has 6 solved examples"),
        ("commonsense_qa", 4, "commonsense_qa has 3 solved examples"),
    ],
)
def test_what_cannot_be_asked(
    name: str, shots: int | None, found: str, data: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=found):
        write_task(name, data, tmp_path / "tasks", shots=shots)


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("addsub", "addsub/AddSub.json"),
        ("gsm8k", "gsm8k/train.jsonl"),
        ("bbh_math", "bbh/object_counting.json"),
        ("commonsense_qa", "commonsense_qa/dev_rand_split.jsonl"),
        ("mmlu", "mmlu/dev/anatomy_dev.csv"),
        ("bbh", "bbh/navigate.json"),
        ("wikitext", "wikitext2/test.txt"),
    ],
)
def test_missing_files_are_named(name: str, file: str, data: Path, tmp_path: Path) -> None:
    (data / file).unlink()
    set_name = "bbh" if name == "bbh_math" else name
    with pytest.raises(UserError, match=f"The data set {set_name}.* must lie at .*{file}"):
        write_task(name, data, tmp_path / "tasks", shots=None)


@pytest.mark.parametrize(
    ("name", "file", "content", "found"),
    [
        ("mmlu", "mmlu/test/virology_test.csv", "", "the test part of mmlu_virology is empty"),
        ("mmlu", "mmlu/test/virology_test.csv", "a,b,c\n", "question 1 of .* has 3 cells"),
        ("mmlu", "mmlu/test/virology_test.csv", "q,a,b,c,d,E\n", "ends with .'E'.; download"),
        ("mmlu", "mmlu/test/virology_test.csv", 'q,a,b,c,d,A\n"q,a', "must be CSV, .* is not"),
        ("wikitext", "wikitext2/test.txt", "No heading.", "the test part of wikitext is empty"),
        ("bbh", "bbh/navigate.json", {"examples": []}, "the test part of bbh_navigate is empty"),
        (
            "bbh",
            "bbh/navigate.json",
            {"examples": [{"input": "?", "target": "Perhaps"}]},
            "usable target, record 1 of",
        ),
        (
            "bbh_math",
            "bbh/object_counting.json",
            {"examples": [{"input": "?", "target": "many"}]},
            "usable target, record 1 of",
        ),
        ("gsm8k", "gsm8k/test.jsonl", [{"question": "?"}], "usable answer, record 1 of"),
        ("gsm8k", "gsm8k/train.jsonl", GSM8K[:4], "gsm8k has 4 solved examples"),
        (
            "commonsense_qa",
            "commonsense_qa/dev_rand_split.jsonl",
            [nested(COMMONSENSE[0]) | {"answerKey": "F"}],
            "usable answerKey, record 1 of",
        ),
        (
            "commonsense_qa",
            "commonsense_qa/dev_rand_split.jsonl",
            [nested(COMMONSENSE[0]) | {"question": {"stem": "?", "choices": ["a"]}}],
            "usable question, record 1 of",
        ),
    ],
)
def test_malformed_files_are_named(
    name: str, file: str, content: object, found: str, data: Path, tmp_path: Path
) -> None:
    write(data / file, content)
    with pytest.raises(UserError, match=found):
        write_task(name, data, tmp_path / "tasks", shots=None)


def test_without_lm_eval_it_says_how_to_get_it(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for name in set(TASKS) - {"addsub", "singleeq", "svamp", "commonsense_qa_text"}:
        with pytest.raises(UserError, match=r"lm-eval, it is not installed; .*circuitune\[eval\]"):
            write_task(name, data, tmp_path / "tasks", shots=None)


def test_sets_that_the_hub_does_not_give_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load_dataset(*_: object, **__: object) -> None:
        raise ConnectionError("no network\nlong trace")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    with pytest.raises(UserError, match=r"cais/mmlu abstract_algebra.*no network\); give a folder"):
        write_task("mmlu", None, tmp_path, shots=None)
