r"""Benchmarks as lm-eval reads them: a YAML file for each task, its documents beside it.

Prompts, filters and metrics of GSM8K, CommonsenseQA, MMLU, BIG-Bench Hard and WikiText are those of
lm-eval's own tasks, which the files include; only where the documents lie is said anew, so that
scores compare with anyone's and no network is needed. lm-eval has no AddSub, SingleEq and SVAMP:
these ask as its GSM8K does (``Question: ...\nAnswer:``, solved examples in front) and are read by
`circuitune.extracting`.

==============  =====================================================  ======================
task            documents                                              main metric
==============  =====================================================  ======================
addsub          the test part of `circuitune.wordproblems`, 5 shots    exact match, flexible
singleeq, svamp the same                                               exact match, flexible
gsm8k           test, 5 shots                                          exact match, flexible
bbh_math        the two tasks that calculate or count, 3 shots         exact match, flexible
commonsense_qa  dev, 0 shots                                           accuracy of the letter
c..._qa_text    the same questions, by the texts of their answers      normalised accuracy
mmlu            57 subjects, 5 shots of the dev part                   accuracy of the letter
bbh             six other tasks, 3 shots                               normalised accuracy
wikitext        WikiText-2 test, whole articles                        word perplexity
==============  =====================================================  ======================

Solved examples are always the first ones, so that a model computes them once; lm-eval draws those
of GSM8K and CommonsenseQA anew for every question. The generated answers of bbh_math are read by
`circuitune.extracting` too: lm-eval compares them letter by letter, with the space in front.
Small models answer every question of CommonsenseQA with the same letter, so ``commonsense_qa_text``
asks for the texts of the answers, none of which is shown. Published perplexities are of WikiText's
raw text; a file with ``<unk>`` for rare words, as older copies have it, gives lower ones, which
compare only with each other.
"""

import csv
import importlib
import importlib.util
import io
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import yaml

from circuitune.errors import UserError
from circuitune.extracting import flexible, same_number, strict
from circuitune.readers import BBH_MATH, BBH_TASKS, Record, records
from circuitune.wordproblems import PARTS, word_problems

Kind = Literal["math", "retention"]
Row = dict[str, Any]

# A heading of a section has more than one sign on each side, " = = Section = = ".
_TITLE = re.compile(r"^ *= (?!= ).*(?<! =) = *$", re.MULTILINE)

SHOTS, BBH_SHOTS, MOST_SHOTS = 5, 3, 20
CACHE = "cache"  # of the documents as lm-eval holds them; it goes when the folder goes
NEW_TOKENS = 128  # the worked equation of a word problem and its answer


@dataclass(frozen=True)
class TaskFile:
    """A task that lies ready for lm-eval.

    Attributes:
        name: as in the table above.
        kind: whether it calculates, or shows what tuning must not change.
        lm_names: lm-eval's names of its parts.
        metrics: metrics with their filter, ``METRIC,FILTER``; the main one first.
        documents: number of documents of each part.
        chance: score of guessing.
    """

    name: str
    kind: Kind
    lm_names: tuple[str, ...]
    metrics: tuple[str, ...]
    documents: dict[str, int]
    chance: float


def write_task(name: str, data_dir: Path | None, folder: Path, *, shots: int | None) -> TaskFile:
    """Write a task for lm-eval's ``TaskManager(include_path=folder)``.

    Args:
        name: one of `TASKS`.
        data_dir: folder with the data sets as their authors publish them; None for the hub.
        folder: where the files go.
        shots: solved examples in front of a question; None for the task's own number.

    Raises:
        UserError: the task is unknown, its data cannot be had or read, it has not so many examples,
            or lm-eval is not installed.
    """
    if name not in TASKS:
        raise UserError(f"A task must be one of {', '.join(TASKS)}, found {name!r}; use one.")
    if shots is not None and not 0 <= shots <= MOST_SHOTS:
        raise UserError(f"--shots must be between 0 and {MOST_SHOTS}, found {shots}; choose fewer.")
    folder.mkdir(parents=True, exist_ok=True)
    return TASKS[name](name, data_dir, folder, shots)


def number_results(doc: Row, results: Sequence[str]) -> dict[str, float]:
    """Scores of one generated answer, called by lm-eval: flexible and strict reading."""
    text = results[0]
    readings = {"exact_match": flexible(text), "strict_match": strict(text)}
    return {name: float(same_number(found, doc["answer"])) for name, found in readings.items()}


def target_results(doc: Row, results: Sequence[str]) -> dict[str, float]:
    """Score of one generated answer to a task of `BBH_MATH`, called by lm-eval."""
    return {"exact_match": float(same_number(flexible(results[0]), doc["target"]))}


# ------------------------------------------------------------------------------------- files


def _stock(path: str) -> str:
    """Where a YAML file of lm-eval's own lies; lm-eval is not imported, which takes seconds."""
    spec = importlib.util.find_spec("lm_eval")
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            "A suite needs the package lm-eval, it is not installed; "
            '`pip install "circuitune[eval]"`.'
        )
    return str(Path(spec.submodule_search_locations[0]) / "tasks" / path)


def _data(folder: Path, task: str, parts: dict[str, Sequence[Row]]) -> Row:
    """Documents as JSON lines, and what the YAML says of them."""
    files = {}
    for part, rows in parts.items():
        if not rows:
            raise UserError(
                f"A data set must have documents, the {part} part of {task} is empty; download it "
                "anew."
            )
        path = folder / f"{task}-{part}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        files[part] = str(path.resolve())
    return {
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": files, "cache_dir": str((folder / CACHE).resolve())},
        "training_split": None,
        "validation_split": None,
        "test_split": "test",
    }


def _few_shot(task: str, rows: Sequence[Row], part: str, shots: int) -> Row:
    """Always the first examples of a part."""
    if shots > len(rows):
        raise UserError(
            f"{task} has {len(rows)} solved examples, --shots asks for {shots}; choose fewer."
        )
    return {"fewshot_split": part, "fewshot_config": {"sampler": "first_n"}, "num_fewshot": shots}


def _write(folder: Path, task: str, content: Row, *, results: str = "") -> None:
    """A YAML file; ``results`` names a function of this module, which plain YAML cannot."""
    text = yaml.safe_dump({"task": task} | content, sort_keys=False, allow_unicode=True)
    text += f"process_results: !function {__name__}.{results}\n" if results else ""
    (folder / f"{task}.yaml").write_text(text, encoding="utf-8")


def _metrics(*names: str) -> Row:
    found = [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in names]
    return {"metric_list": found}


# -------------------------------------------------------------------------------- word problems


def _word_problems(name: str, data_dir: Path | None, folder: Path, shots: int | None) -> TaskFile:
    rows = {
        part: [vars(problem) for problem in word_problems(name, data_dir, part)] for part in PARTS
    }
    rows["train"] = rows["train"][:MOST_SHOTS]
    content = _data(folder, name, rows) | _metrics("exact_match", "strict_match")
    content |= _few_shot(name, rows["train"], "train", SHOTS if shots is None else shots)
    content |= {
        "output_type": "generate_until",
        "doc_to_text": "Question: {{question}}\nAnswer:",
        "doc_to_target": "{{solution}}",
        "generation_kwargs": {
            "until": ["Question:", "</s>", "<|im_end|>"],
            "do_sample": False,
            "max_gen_toks": NEW_TOKENS,
        },
        "metadata": {"version": 1.0},
    }
    _write(folder, name, content, results=number_results.__name__)
    count = {name: len(rows["test"])}
    return TaskFile(name, "math", (name,), ("exact_match", "strict_match"), count, 0.0)


def _gsm8k(name: str, data_dir: Path | None, folder: Path, shots: int | None) -> TaskFile:
    rows = {
        part: [
            {"question": record.get("question"), "answer": record.get("answer")}
            for record in records(f"gsm8k/{part}", data_dir)
        ]
        for part in PARTS
    }
    rows["train"] = rows["train"][:MOST_SHOTS]
    content = {"include": _stock("gsm8k/gsm8k.yaml"), "tag": None} | _data(folder, name, rows)
    content |= _few_shot(name, rows["train"], "train", SHOTS if shots is None else shots)
    _write(folder, name, content)
    metrics = ("exact_match,flexible-extract", "exact_match,strict-match")
    return TaskFile(name, "math", (name,), metrics, {name: len(rows["test"])}, 0.0)


# ------------------------------------------------------------------------------------ retention

COMMONSENSE_TEXT = "commonsense_qa_text"
_BY_TEXT = {
    "output_type": "multiple_choice",
    "doc_to_text": "Question: {{question.strip()}}\nAnswer:",
    "doc_to_choice": "{{choices['text']}}",
    "doc_to_target": "{{choices['label'].index(answerKey)}}",
    "metadata": {"version": 1.0},
} | _metrics("acc", "acc_norm")


def _commonsense(name: str, data_dir: Path | None, folder: Path, shots: int | None) -> TaskFile:
    parts = {"test": records("commonsense_qa", data_dir)}
    if shots:
        parts["train"] = islice(records("commonsense_qa/train", data_dir), MOST_SHOTS)
    rows = {part: [_commonsense_row(record) for record in found] for part, found in parts.items()}
    by_text = name == COMMONSENSE_TEXT
    own = _BY_TEXT if by_text else {"include": _stock("commonsense_qa/default.yaml")}
    content: Row = own | _data(folder, name, rows)
    content |= _few_shot(name, rows["train"], "train", shots) if shots else {}
    _write(folder, name, content)
    metrics = ("acc_norm" if by_text else "acc",)
    return TaskFile(name, "retention", (name,), metrics, {name: len(rows["test"])}, 0.2)


def _commonsense_row(record: Record) -> Row:
    """The hub's columns, which lm-eval's task reads."""
    question = record.get("question", dict)
    stem, listed = question.get("stem"), question.get("choices")
    if not isinstance(stem, str) or not isinstance(listed, list):
        raise record.malformed("question")
    options = [item if isinstance(item, dict) else {} for item in listed]
    choices = {key: [item.get(key) for item in options] for key in ("label", "text")}
    if choices["label"] != list("ABCDE") or not all(choices["text"]):
        raise record.malformed("question")
    if record.get("answerKey") not in choices["label"]:
        raise record.malformed("answerKey")
    return {"question": stem, "choices": choices, "answerKey": record.get("answerKey")}


def _bbh(name: str, data_dir: Path | None, folder: Path, shots: int | None) -> TaskFile:
    documents, chances = {}, 0.0
    for task in BBH_TASKS:
        stock = _stock(f"leaderboard/bbh_mc/{task}.yaml")
        choices = yaml.safe_load(Path(stock).read_text(encoding="utf-8"))["doc_to_choice"]
        rows = []
        for record in records(f"bbh/{task}", data_dir):
            if record.get("target") not in choices:
                raise record.malformed("target")
            rows.append({"input": record.get("input"), "target": record.get("target")})
        _write(folder, f"bbh_{task}", _bbh_content(name, stock, rows, folder, shots))
        documents[f"bbh_{task}"] = len(rows)
        chances += len(rows) / len(choices)
    chance = chances / sum(documents.values())
    return TaskFile(name, "retention", tuple(documents), ("acc_norm",), documents, chance)


def _bbh_math(name: str, data_dir: Path | None, folder: Path, shots: int | None) -> TaskFile:
    documents = {}
    for task in BBH_MATH:
        rows = []
        for record in records(f"bbh/{task}", data_dir):
            if not re.fullmatch(r"-?\d+", record.get("target")):
                raise record.malformed("target")
            rows.append({"input": record.get("input"), "target": record.get("target")})
        content = _bbh_content(name, _stock(f"bbh/fewshot/{task}.yaml"), rows, folder, shots)
        content |= _metrics("exact_match")
        _write(folder, f"bbh_{task}", content, results=target_results.__name__)
        documents[f"bbh_{task}"] = len(rows)
    return TaskFile(name, "math", tuple(documents), ("exact_match",), documents, 0.0)


def _bbh_content(
    name: str, stock: str, rows: Sequence[Row], folder: Path, shots: int | None
) -> Row:
    """A task with the solved examples of lm-eval's own definition."""
    if shots is not None and shots > BBH_SHOTS:
        raise UserError(
            f"{name} has {BBH_SHOTS} solved examples, --shots asks for {shots}; choose fewer."
        )
    content = {"include": stock} | _data(folder, f"bbh_{Path(stock).stem}", {"test": rows})
    return content | ({} if shots is None else {"num_fewshot": shots})


def _mmlu(name: str, data_dir: Path | None, folder: Path, shots: int | None) -> TaskFile:
    documents = {}
    for file in sorted(Path(_stock("mmlu/default")).glob("mmlu_*.yaml")):
        task, subject = file.stem, file.stem.removeprefix("mmlu_")
        rows = {part: list(_mmlu_rows(data_dir, subject, part)) for part in ("dev", "test")}
        content = {"include": str(file), "tag": None} | _data(folder, task, rows)
        content |= _few_shot(task, rows["dev"], "dev", SHOTS if shots is None else shots)
        _write(folder, task, content)
        documents[task] = len(rows["test"])
    return TaskFile(name, "retention", tuple(documents), ("acc",), documents, 0.25)


def _mmlu_rows(data_dir: Path | None, subject: str, part: str) -> Iterator[Row]:
    if data_dir is None:
        for row in _hub("mmlu", "cais/mmlu", subject, part):
            yield {key: row[key] for key in ("question", "choices", "answer")}
        return
    path = data_dir / "mmlu" / part / f"{subject}_{part}.csv"
    try:
        lines = list(csv.reader(io.StringIO(_text(path, "mmlu")), strict=True))
    except csv.Error as error:
        raise UserError(
            f"The questions of MMLU must be CSV, {path} is not ({error}); download the file anew."
        ) from error
    for number, cells in enumerate(lines, start=1):
        if len(cells) != 6 or cells[5] not in tuple("ABCD"):
            raise UserError(
                "A question of MMLU must have a text, four choices and a letter, question "
                f"{number} of {path} has {len(cells)} cells and ends with {cells[-1:]}; download "
                "the file anew."
            )
        yield {"question": cells[0], "choices": cells[1:5], "answer": "ABCD".index(cells[5])}


def _wikitext(name: str, data_dir: Path | None, folder: Path, shots: int | None) -> TaskFile:
    del shots  # text is not asked
    if data_dir is None:
        hub = _hub("wikitext", "EleutherAI/wikitext_document_level", "wikitext-2-raw-v1", "test")
        pages = [row["page"] for row in hub]
    else:
        pages = articles(_text(data_dir / "wikitext2" / "test.txt", "wikitext"))
    content = {"include": _stock("wikitext/wikitext.yaml")}
    content |= _data(folder, name, {"test": [{"page": page} for page in pages]})
    _write(folder, name, content)
    count = {name: len(pages)}
    return TaskFile(name, "retention", (name,), ("word_perplexity",), count, float("inf"))


def articles(text: str) -> list[str]:
    """WikiText's articles, cut as in the hub's document-level copy.

    An article starts at a line as `` = Title = ``; two lines of formulas in the test part of
    WikiText-2 look so too, which makes 62 of its 60 articles. What stands before the first is left
    out.
    """
    starts = [found.start() for found in _TITLE.finditer(text)]
    # The line break in front of a title belongs to neither article.
    ends = [*(start - 1 for start in starts[1:]), len(text)]
    return [text[start:end] for start, end in zip(starts, ends, strict=False)]


def _text(path: Path, name: str) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"The data set {name} must lie at {path}, it cannot be read there ({error}); give its "
            "folder with --data-dir, or leave --data-dir out to get it from the Hugging Face hub."
        ) from error


def _hub(name: str, address: str, config: str, split: str) -> Sequence[Row]:
    try:
        return importlib.import_module("datasets").load_dataset(address, config, split=split)
    # The library raises dozens of kinds for one cause: the set cannot be had.
    except Exception as error:
        reason = str(error).strip().split("\n")[0][:120]
        raise UserError(
            f"The data set {name} must be on the Hugging Face hub as {address} {config}, it cannot "
            f"be read ({type(error).__name__}: {reason}); give a folder with --data-dir."
        ) from error


TASKS: dict[str, Callable[[str, Path | None, Path, int | None], TaskFile]] = {
    "addsub": _word_problems,
    "singleeq": _word_problems,
    "svamp": _word_problems,
    "gsm8k": _gsm8k,
    "bbh_math": _bbh_math,
    "commonsense_qa": _commonsense,
    COMMONSENSE_TEXT: _commonsense,
    "mmlu": _mmlu,
    "bbh": _bbh,
    "wikitext": _wikitext,
}
