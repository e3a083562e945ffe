"""Public data sets: what is read of each record, both ways to get it, and what is refused."""

import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from circuitune.errors import UserError
from circuitune.readers import MultipleChoice, Step, questions, steps

SVAMP = [
    (
        "Each pack costs 76 dollars. There is a discount of 25 dollars",
        "How much?",
        "( 76.0 - 25.0 )",
        51.0,
    ),
    ("Dan had $ 3 left.", "How much is a half?", "( 3.0 / 2.0 )", 1.5),
    ("Paco had 26 cookies. He ate 14 and 9.", "How many?", "( ( 26.0 - 14.0 ) - 9.0 )", 3.0),
    ("He owed 3 and paid 5.", "How much does he owe?", "( 3.0 - 5.0 )", -2.0),
    ("Six boxes hold 18 pens,", "how many are in one?", "( 18.0 / 6.0 )", 3.0),
    ("A price is 2.5 and another 2.5.", "How much?", "( 2.5 + 2.5 )", 5.0),
    ("The key is wrong.", "How many?", "( 2.0 + 2.0 )", 5.0),
    ("Nothing can be shared.", "How many?", "( 2.0 / 0.0 )", 0.0),
]
SVAMP_FIELDS = ("Body", "Question", "Equation", "Answer")
ADDSUB = [
    ("Joan found 70 seashells . How many ? ", ["X = 70 - 27"], ["43"]),
    ("Three of them . ", ["X = 1 + 2 + 3"], ["6"]),
    ("The unknown is on the left . ", ["5 + X = 8"], ["3"]),
    ("Two equations . ", ["X = 1 + 2", "Y = 3"], ["3", "3"]),
    ("Point zero . ", ["X = 4.0 + 3.0 "], ["7.0"]),
    ("Cents . ", ["X = 0.5 + 0.5"], ["1"]),
]
GSM8K = [
    ("Ducks?", "She has 16 - 3 - 4 = <<16-3-4=9>>9 eggs.\nShe makes 9*2 = <<9*2=18>>18.\n#### 18"),
    ("Money?", "She makes 9 * 2 = $<<9*2=18>>18.\n#### 18"),
    ("Robes?", "It takes 2/2=<<2/2=1>>1 bolt.\nThe total is 2+1=<<2+1=3>>3 bolts\n#### 3"),
    ("Large?", "There are 800x50 = <<800*50=40000>>40,000.\n#### 40000"),
    ("Games?", "There are 8 x 20 = <<8*20=160>>160 games.\n#### 160"),
    ("Parts?", "So 3+16 - 3 = <<16-3=13>>13.\n#### 13"),
    ("Wrong?", "So 2 + 2 = <<2+2=5>>5.\n#### 5"),
    ("Point?", "So 2 + 2 = <<2+2=4>>4.5 of them.\n#### 4"),
]
COMMONSENSE = {
    "id": "x1",
    "answerKey": "B",
    "question": {
        "stem": "Where is a bank?",
        "choices": [{"label": "A", "text": "in a sock"}, {"label": "B", "text": "in a town"}],
    },
}
BBH = {
    "boolean_expressions": ("not ( True ) is", "False", (" True", " False"), 1),
    "causal_judgement": ("Did he?\nOptions:\n- Yes\n- No", "No", (" Yes", " No"), 1),
    "disambiguation_qa": (
        "Who?\nOptions:\n(A) he said\n(B) Ambiguous",
        "(B)",
        (" he said", " Ambiguous"),
        1,
    ),
    "hyperbaton": ("Which one:\nOptions:\n(A) a b\n(B) b a", "(B)", (" a b", " b a"), 1),
    "navigate": ("Take 1 step. Back?\nOptions:\n- Yes\n- No", "Yes", (" Yes", " No"), 0),
    "sports_understanding": ('Plausible? "He swam."', "yes", (" yes", " no"), 0),
}


def write(path: Path, content: object) -> None:
    """Write JSON, or lines of JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(item) for item in content] if path.suffix == ".jsonl" else []
    path.write_text("\n".join(lines) + "\n" if lines else json.dumps(content), encoding="utf-8")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Every set with a few records, in the files of their authors."""
    write(
        tmp_path / "svamp/SVAMP.json", [dict(zip(SVAMP_FIELDS, row, strict=True)) for row in SVAMP]
    )
    fields = ("sQuestion", "lEquations", "lSolutions")
    write(tmp_path / "addsub/AddSub.json", [dict(zip(fields, row, strict=True)) for row in ADDSUB])
    lines = [{"question": question, "answer": answer} for question, answer in GSM8K]
    write(tmp_path / "gsm8k/test.jsonl", lines[:3])
    write(tmp_path / "gsm8k/train.jsonl", lines[3:])
    write(tmp_path / "commonsense_qa/dev_rand_split.jsonl", [COMMONSENSE])
    for task, (text, target, *_) in BBH.items():
        examples = [{"input": text, "target": target}] * 3
        write(tmp_path / f"bbh/{task}.json", {"canary": "-", "examples": examples})
    return tmp_path


# ----------------------------------------------------------------------------------- word problems


def test_svamp_asks_for_one_operation_of_whole_numbers(folder: Path) -> None:
    first, second = steps("svamp", folder, limit=100)
    problem = "Each pack costs 76 dollars. There is a discount of 25 dollars. How much?\n"
    assert first == Step(problem, "76 - 25 = ", 76, "-", 25, 51, "svamp/1")
    assert second.before == "Six boxes hold 18 pens, how many are in one?\n"
    assert (second.expression, second.answer, second.id) == ("18 / 6 = ", 3, "svamp/5")


def test_addsub_takes_what_stands_alone_on_the_right(folder: Path) -> None:
    first, second = steps("addsub", folder, limit=100)
    before = "Joan found 70 seashells . How many ?\n"
    assert first == Step(before, "70 - 27 = ", 70, "-", 27, 43, "addsub/1")
    assert (second.expression, second.answer) == ("4 + 3 = ", 7)


def test_gsm8k_ends_where_the_calculator_comes_in(folder: Path) -> None:
    found = steps("gsm8k", folder, limit=100)
    assert [step.id for step in found] == ["gsm8k/test/1", "gsm8k/test/3", "gsm8k/train/2"]
    later, whole, letter = found
    assert later.before == "Ducks?\nShe has 16 - 3 - 4 = 9 eggs.\nShe makes "
    assert (later.expression, later.sign, later.answer) == ("9*2 = ", "*", 18)
    assert (whole.before, whole.expression, whole.answer) == ("Robes?\nIt takes ", "2/2=", 1)
    assert (letter.expression, letter.sign, letter.answer) == ("8 x 20 = ", "x", 160)


def test_steps_come_in_order_up_to_a_limit(folder: Path) -> None:
    assert steps("gsm8k", folder, limit=1) == steps("gsm8k", folder, limit=9)[:1]
    (folder / "gsm8k/train.jsonl").unlink()  # not needed for so few
    assert len(steps("gsm8k", folder, limit=2)) == 2


# --------------------------------------------------------------------------------- multiple choice


def test_commonsense_gives_full_texts(folder: Path) -> None:
    choices = (" in a sock", " in a town")
    assert questions("commonsense_qa", folder, limit=5, seed=0) == [
        MultipleChoice("commonsense_qa/1", "Question: Where is a bank?\nAnswer:", choices, 1)
    ]


def test_bbh_gives_the_texts_of_answers_and_its_tasks_take_turns(folder: Path) -> None:
    found = questions("bbh", folder, limit=6, seed=0)
    assert [item.id.split("/")[1] for item in found] == list(BBH)
    for item, (text, _, choices, answer) in zip(found, BBH.values(), strict=True):
        asked = text.partition("\nOptions:\n(")[0]
        assert (item.prompt, item.choices) == (f"Question: {asked}\nAnswer:", choices)
        assert item.answer == answer


def test_tasks_that_calculate_are_left_out(folder: Path) -> None:
    for task in ("multistep_arithmetic_two", "object_counting", "date_understanding"):
        write(folder / f"bbh/{task}.json", {"examples": [{"input": "1 + 1 =", "target": "2"}]})
    assert {item.id.split("/")[1] for item in questions("bbh", folder, limit=99, seed=0)} == set(
        BBH
    )


def test_a_seed_draws_the_same_questions(folder: Path) -> None:
    path = folder / "commonsense_qa/dev_rand_split.jsonl"
    many = [
        COMMONSENSE | {"question": COMMONSENSE["question"] | {"stem": f"{number}?"}}
        for number in range(30)
    ]
    write(path, many)
    first, again, other = (
        questions("commonsense_qa", folder, limit=8, seed=seed) for seed in (0, 0, 1)
    )
    assert first == again
    assert len(set(first)) == len(other) == 8
    assert set(first) != set(other)
    assert first[:3] == questions("commonsense_qa", folder, limit=3, seed=0)


# ------------------------------------------------------------------------------------------ the hub

HUB_ROWS: dict[tuple[str, ...], list[dict[str, Any]]] = {
    ("ChilleD/SVAMP", "train"): [
        {"ID": "c", "Body": "A", "Question": "B?", "Equation": "( 8.0 - 3.0 )", "Answer": "5.0"}
    ],
    ("ChilleD/SVAMP", "test"): [
        {"ID": "d", "Body": "C.", "Question": "D?", "Equation": "( 8.0 + 3.0 )", "Answer": "11"}
    ],
    ("openai/gsm8k", "main", "test"): [{"question": GSM8K[2][0], "answer": GSM8K[2][1]}],
    ("openai/gsm8k", "main", "train"): [{"question": GSM8K[4][0], "answer": GSM8K[4][1]}],
    ("tau/commonsense_qa", "validation"): [
        {
            **{"id": "x", "question": "Where?", "question_concept": "y", "answerKey": "A"},
            "choices": {"label": ["A", "B"], "text": ["here", "there"]},
        }
    ],
    ("parquet", "train"): [
        {
            "input": "Joan .",
            "output_program": "a = 70\nb = 27\nprint(a - b)",
            "output_answer": "43",
        },
        {
            "input": "Sam .",
            "output_program": ["answer = 4.0 + 3.0\nprint(answer)", "print(7)"],
            "output_answer": ["7.0"],
        },
        {"input": "Two .", "output_program": "print(1 + 2 + 3)", "output_answer": "6"},
        {"input": "Broken .", "output_program": "print(", "output_answer": "6"},
        {"input": "Bits .", "output_program": "print(6 | 1)", "output_answer": "7"},
        {"input": "Names .", "output_program": "print(a + 1)", "output_answer": "7"},
    ],
} | {
    ("SaylorTwift/bbh", task, "test"): [{"input": text, "target": target}]
    for task, (text, target, *_) in BBH.items()
}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if ``datasets`` were installed and the hub could be reached."""

    def load_dataset(path: str, name: str = "", *, split: str, data_files: str = "") -> Iterable:
        assert (path == "parquet") == data_files.startswith("hf://datasets/allenai/lila@")
        return iter(HUB_ROWS[tuple(part for part in (path, name, split) if part)])

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))


@pytest.mark.usefixtures("hub")
def test_steps_from_the_hub() -> None:
    assert steps("svamp", None, limit=9) == [
        Step("A. B?\n", "8 - 3 = ", 8, "-", 3, 5, "svamp/train/1"),
        Step("C. D?\n", "8 + 3 = ", 8, "+", 3, 11, "svamp/test/1"),
    ]
    assert [step.expression for step in steps("addsub", None, limit=9)] == [
        "70 - 27 = ",
        "4 + 3 = ",
    ]
    assert [step.expression for step in steps("gsm8k", None, limit=9)] == ["2/2=", "8 x 20 = "]


@pytest.mark.usefixtures("hub")
def test_questions_from_the_hub() -> None:
    (question,) = questions("commonsense_qa", None, limit=9, seed=0)
    assert (question.prompt, question.choices) == ("Question: Where?\nAnswer:", (" here", " there"))
    assert question.answer == 0
    assert [item.answer for item in questions("bbh", None, limit=9, seed=0)] == [
        answer for *_, answer in BBH.values()
    ]


# --------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("read", "path"),
    [
        (lambda at: steps("svamp", at, limit=1), "svamp/SVAMP.json"),
        (lambda at: steps("gsm8k", at, limit=1), "gsm8k/test.jsonl"),
        (lambda at: questions("bbh", at, limit=1, seed=0), "bbh/boolean_expressions.json"),
    ],
)
def test_a_missing_file_is_named_with_both_ways_out(
    read: Callable[[Path], object], path: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError) as caught:
        read(tmp_path)
    message = str(caught.value)
    assert str(tmp_path / path) in message
    assert "--data-dir" in message
    assert "pip install datasets" in message


def test_without_datasets_or_network_the_hub_is_named_with_both_ways_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def offline(*_: object, **__: object) -> None:
        raise ConnectionError("no route\nto host")

    for module in (None, SimpleNamespace(load_dataset=offline)):
        monkeypatch.setitem(sys.modules, "datasets", module)
        with pytest.raises(UserError) as caught:
            steps("gsm8k", None, limit=1)
        for part in ("openai/gsm8k", "gsm8k/test.jsonl", "--data-dir", "pip install datasets"):
            assert part in str(caught.value)
        assert "\n" not in str(caught.value)


def broken(folder: Path, file: str, **fields: object) -> Path:
    """Change fields of the second record of a file."""
    path = folder / file
    lines = path.suffix == ".jsonl"
    text = path.read_text()
    records = [json.loads(line) for line in text.splitlines()] if lines else json.loads(text)
    listed = records["examples"] if isinstance(records, dict) else records
    listed[1 if len(listed) > 1 else 0].update(fields)
    write(path, records)
    return path


@pytest.mark.parametrize(
    ("file", "fields", "name"),
    [
        ("svamp/SVAMP.json", {"Equation": None}, "Equation"),
        ("svamp/SVAMP.json", {"Answer": "many"}, "Answer"),
        ("addsub/AddSub.json", {"lEquations": "X = 1 + 1"}, "lEquations"),
        ("addsub/AddSub.json", {"lSolutions": ["six"]}, "lSolutions"),
        ("gsm8k/test.jsonl", {"answer": 18}, "answer"),
    ],
)
def test_a_malformed_word_problem_is_named(
    file: str, fields: dict[str, object], name: str, folder: Path
) -> None:
    path = broken(folder, file, **fields)
    with pytest.raises(UserError, match=f"usable {name}, record 2 of {path} has"):
        steps(file.partition("/")[0], folder, limit=9)


@pytest.mark.parametrize(
    ("file", "fields", "name"),
    [
        ("commonsense_qa/dev_rand_split.jsonl", {"answerKey": "C"}, "answerKey"),
        ("commonsense_qa/dev_rand_split.jsonl", {"question": {"stem": "?"}}, "question"),
        ("bbh/navigate.json", {"target": "Perhaps"}, "target"),
    ],
)
def test_a_malformed_question_is_named(
    file: str, fields: dict[str, object], name: str, folder: Path
) -> None:
    path = broken(folder, file, **fields)
    with pytest.raises(UserError, match=f"usable {name}, record [12] of {path} has"):
        questions(file.partition("/")[0], folder, limit=99, seed=0)


@pytest.mark.parametrize(
    ("file", "text", "found"),
    [
        ("svamp/SVAMP.json", "[{", "SVAMP.json is not"),
        ("svamp/SVAMP.json", '{"a": 1}', "must be a JSON list of records"),
        ("svamp/SVAMP.json", "[{}, 3]", "usable Body, record 1 of"),
        ("svamp/SVAMP.json", "[3]", "record 1 of"),
        ("gsm8k/test.jsonl", '{"question": "?", "answer": ""}\nno\n', "record 2 of"),
        ("gsm8k/test.jsonl", '{"question": "?", "answer": ""}\n[]\n', "record 2 of"),
    ],
)
def test_what_is_not_a_list_of_records_is_refused(
    file: str, text: str, found: str, folder: Path
) -> None:
    (folder / file).write_text(text)
    with pytest.raises(UserError, match=found):
        steps(file.partition("/")[0], folder, limit=9)


def test_unknown_names_list_the_known_ones(folder: Path) -> None:
    with pytest.raises(UserError, match=r"svamp, addsub, gsm8k, found 'mawps'"):
        steps("mawps", folder, limit=1)
    with pytest.raises(UserError, match=r"commonsense_qa, bbh, found 'mmlu'"):
        questions("mmlu", folder, limit=1, seed=0)
