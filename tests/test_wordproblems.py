"""Word problems of public sets: their parts, their solutions, and what is refused."""

import json
import random
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace

import pytest

from circuitune.errors import UserError
from circuitune.extracting import same_number, strict
from circuitune.wordproblems import (
    PARTS,
    SETS,
    SPLIT,
    Part,
    WordProblem,
    part_of,
    plain_number,
    shared,
    word_problems,
)

WITHOUT = ("addsub", "singleeq", "svamp")  # sets without parts of their own
# Some problems of one set stand in another, with other words, spaces and spellings of numbers.
ADDSUB = [
    ("Joan found 70 shells . She gave away 27 . How many ? ", "X = 70 - 27", "43"),
    ("Kevin bought 2 melons of 9.5 and 4.25 pounds . How heavy ? ", "X = 9.5 + 4.25", "13.75"),
    ("Ann has 1,200 pens and 3 cups . How many things ? ", "X = 1200.0 + 3.0 ", "1203.0"),
    ("Dan has 8 cats and 5 dogs . How many pets ? ", "X = 8 = 5", "13"),
]
SINGLEEQ = [
    ("Joan found 70 shells. She gave away 27. How many?", "70-x=27", "43"),
    ("Kevin bought two melons of 9.5 and 4.25 pounds. How heavy?", "9.5+4.25=x", "13.75"),
    ("A box holds 6 eggs. How many hold 42 eggs?", "42=(6.0*x)", "7"),
    ("Half of it and 8 make 12. What is it?", "((x/2.0)+8.0)=12.0", "8"),
    ("He had 5 and lost 9. What is left?", "X=-4.0", "-4"),
    ("The key of 2 and 3 is wrong.", "X=2+3", "6"),
    ("Nothing is shared by 4 of 0.", "X=4/0", "1"),
    ("There are 11 powers.", "X=2**3", "8"),
    ("There are 12 letters.", "y=5", "5"),
    ("There are 13 more.", "5=5", "5"),
    ("There are 14 sides.", "X=2+3=5", "5"),
]
SVAMP = [
    ("Joan found 70 shells", "She gave away 27, how many?", "( 70.0 - 27.0 )", 43.0),
    ("A tree had 4 apples and 2 and 3.", "How many?", "( ( 4.0 - 2.0 ) + 3.0 )", 5.0),
    ("Two rows of 15 and 16,", "how many?", "( ( 15.0 + 16.0 ) * ( 1.0 + 1.0 ) )", 62.0),
]
SOLUTIONS = {
    "addsub": ("70 - 27 = 43", "9.5 + 4.25 = 13.75", "1200 + 3 = 1203", ""),
    "singleeq": (
        *("70 - x = 27, x = 43", "9.5 + 4.25 = 13.75", "42 = 6 * x, x = 7"),
        *("(x / 2) + 8 = 12, x = 8", "- 4 = -4", *[""] * 6),
    ),
    "svamp": ("70 - 27 = 43", "(4 - 2) + 3 = 5", "(15 + 16) * (1 + 1) = 62"),
}
GSM8K = {"question": " Ducks? ", "answer": "She has 40*27 = <<40*27=1080>>1080.\n#### 1,080"}


def write(path: Path, content: object) -> None:
    """Write JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Every set with a few problems, in the files of their authors."""
    for name, rows in (("addsub/AddSub.json", ADDSUB), ("singleeq/questions.json", SINGLEEQ)):
        keys = ("sQuestion", "lEquations", "lSolutions")
        listed = [dict(zip(keys, (text, [x], [y]), strict=True)) for text, x, y in rows]
        write(tmp_path / name, listed)
    keys = ("Body", "Question", "Equation", "Answer")
    write(tmp_path / "svamp/SVAMP.json", [dict(zip(keys, row, strict=True)) for row in SVAMP])
    for part in PARTS:
        write(tmp_path / f"gsm8k/{part}.jsonl", GSM8K)
    return tmp_path


def held(name: str, part: Part, folder: Path | None) -> list[WordProblem]:
    """One part of a small set, which may be empty."""
    try:
        return word_problems(name, folder, part)
    except UserError as error:
        if "is empty" not in str(error):
            raise
        return []


def both(name: str, folder: Path | None) -> list[WordProblem]:
    """A set in its order."""
    found = [problem for part in PARTS for problem in held(name, part, folder)]
    return sorted(found, key=lambda problem: int(problem.id.rpartition("/")[2]))


# ------------------------------------------------------------------------------------------ parts


def test_the_same_numbers_lie_in_the_same_part() -> None:
    rng = random.Random(0)
    for _ in range(50):
        a, b, c = rng.sample(range(100), 3)
        texts = {f"{a} pens, {b} and {c}.", f"Of {c}.0 and {c} : {a} plus 0{b} ?"}
        assert len({part_of(text) for text in texts}) == 1
    assert part_of("Two dogs ate 1,500 of them.") == part_of("2 dogs of 1500 and two .")


def test_parts_never_change_within_a_version() -> None:
    """Other parts need another `SPLIT`: scores on them do not compare."""
    assert SPLIT == 1
    texts = ["70 and 27", "2, 9.5 and 4.25", "No number", "eight", "6 or 7", "11", "1,000"]
    parts = ["test", "test", "train", "train", "test", "test", "train"]
    assert [part_of(text) for text in texts] == parts


def test_parts_are_halves() -> None:
    counts = Counter(part_of(f"{a} and {b}") for a in range(60) for b in range(a))
    assert abs(counts["train"] / counts.total() - 0.5) < 3 * (0.25 / counts.total()) ** 0.5


def test_no_test_problem_of_one_set_is_a_training_problem_of_another(folder: Path) -> None:
    train, test = ([p for name in WITHOUT for p in held(name, part, folder)] for part in PARTS)
    assert train
    assert test
    assert shared(train, test) == []
    for other in ("Joan found", "Kevin bought"):
        twins = [problem for problem in (*train, *test) if other in problem.question]
        assert len({problem.id.partition("/")[0] for problem in twins}) > 1
        assert len({part_of(problem.question) for problem in twins}) == 1


def test_shared_problems_are_found() -> None:
    def problem(question: str) -> WordProblem:
        return WordProblem("", question, "1", "")

    train = [problem("Ann has 3 pens."), problem("Bob has 1,000 cats !")]
    test = [problem("Eve has 5 dogs."), problem("bob has 1000 cats"), problem("Ann has 3 pens.")]
    assert [(x.test, x.train, x.kind) for x in shared(train, test)] == [
        (1, 1, "normalised"),
        (2, 0, "exact"),
    ]


def test_gsm8k_keeps_its_own_parts(folder: Path) -> None:
    write(folder / "gsm8k/train.jsonl", GSM8K | {"question": "Geese?"})
    (train,), (test,) = (word_problems("gsm8k", folder, part) for part in PARTS)
    assert (train.question, train.id) == ("Geese?", "gsm8k/train/1")
    assert (test.question, test.id) == ("Ducks?", "gsm8k/test/1")
    assert (test.answer, test.solution) == ("1080", GSM8K["answer"])


# -------------------------------------------------------------------------------------- solutions


@pytest.mark.parametrize("name", WITHOUT)
def test_solutions_work_out_the_equation_if_it_is_right(name: str, folder: Path) -> None:
    problems = both(name, folder)
    lines = [problem.solution.splitlines() for problem in problems]
    assert ["\n".join(line[:-1]) for line in lines] == list(SOLUTIONS[name])
    assert [line[-1] for line in lines] == [f"#### {problem.answer}" for problem in problems]


def test_every_solution_reads_as_its_answer(folder: Path) -> None:
    for name in SETS:
        for problem in both(name, folder):
            assert same_number(strict(problem.solution), problem.answer)


def test_svamp_joins_body_and_question(folder: Path) -> None:
    asked = [problem.question for problem in both("svamp", folder)]
    assert asked[0] == "Joan found 70 shells. She gave away 27, how many?"
    assert asked[2] == "Two rows of 15 and 16, how many?"


@pytest.mark.parametrize(
    ("written", "plain"),
    [("43.0", "43"), ("100", "100"), ("1,000", "1000"), ("0.75", "0.75"), (" -2.50 ", "-2.5")],
)
def test_numbers_are_written_plainly(written: str, plain: str) -> None:
    assert plain_number(written) == plain


# ------------------------------------------------------------------------------- hub, and refused


def test_singleeq_from_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [
        {"input": f"{a} and 1? ", "output_program": f"print({a} + 1)", "output_answer": str(a + 1)}
        for a in range(8)
    ] + [{"input": "Many 99?", "output_program": "print(1+2+3)", "output_answer": ["6.0"]}]

    def load_dataset(path: str, *, split: str, data_files: str) -> Iterable[dict]:
        assert (path, split) == ("parquet", "train")
        assert "allenai/lila" in data_files
        assert "/singleq/" in data_files
        return iter(rows)

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    problems = both("singleeq", None)
    assert [problem.question for problem in problems][:2] == ["0 and 1?", "1 and 1?"]
    assert problems[7].solution == "7 + 1 = 8\n#### 8"
    assert (problems[8].answer, problems[8].solution) == ("6", "#### 6")


@pytest.mark.parametrize(
    ("name", "record", "found"),
    [
        ("addsub", {"lSolutions": []}, "usable lSolutions, record 1"),
        ("addsub", {"lSolutions": ["many"]}, "usable lSolutions, record 1"),
        ("addsub", {"lSolutions": ["nan"]}, "usable lSolutions, record 1"),
        ("addsub", {"lEquations": "X=1"}, "usable lEquations, record 1"),
        ("addsub", {"sQuestion": None}, "usable sQuestion, record 1"),
        ("svamp", {"Answer": "?"}, "usable Answer, record 1"),
        ("svamp", {"Equation": 3}, "usable Equation, record 1"),
        ("gsm8k", {"answer": "It is 5."}, "usable answer, record 1"),
    ],
)
def test_malformed_records_are_refused(
    name: str, record: dict[str, object], found: str, folder: Path
) -> None:
    files = {"addsub": "AddSub.json", "svamp": "SVAMP.json", "gsm8k": "test.jsonl"}
    path = folder / name / files[name]
    value = json.loads(path.read_text())
    rows = value if isinstance(value, list) else [value]
    changed = [rows[0] | record, *rows[1:]]
    write(path, changed if isinstance(value, list) else changed[0])
    with pytest.raises(UserError, match=found):
        word_problems(name, folder, "test")


def test_sets_that_cannot_be_had_are_named(folder: Path) -> None:
    with pytest.raises(UserError, match="addsub, singleeq, svamp, gsm8k, found 'mawps'"):
        word_problems("mawps", folder, "test")
    (folder / "singleeq/questions.json").unlink()
    with pytest.raises(UserError, match=r"singleeq must lie at .*questions\.json"):
        word_problems("singleeq", folder, "test")
    write(folder / "svamp/SVAMP.json", [])
    with pytest.raises(UserError, match="the train part of svamp is empty; download"):
        word_problems("svamp", folder, "train")
