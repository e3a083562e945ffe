"""Tasks of the transfer matrix: right answers, corrupt prompts without a sum, honest halves."""

import json
import random
import re
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path

import numpy as np
import pytest

from circuitune import controls, sources
from circuitune.controls import LEAST, Question
from circuitune.errors import UserError
from circuitune.models import Model
from circuitune.sources import SOURCES, TRIES, Wanted, make_sources

SELECT = {"3,5", "2,3", "4,4", "1,2", "2,4", "2,2", "3,4", "1,5", "2,5", "2,6", "3,6", "1,7"}
EVERY = {f"{a},{b}" for a in range(10) for b in range(a, 10)}
SELECTION = {
    **{"prefix": "Math:\n", "spaced_answer": False},
    **{"select_groups": sorted(SELECT), "held_out_groups": sorted(EVERY - SELECT)},
}
MADE = [
    name
    for name, source in SOURCES.items()
    if source.family != "control" and name not in ("svamp", "addsub", "gsm8k")
]
NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
WORDS = {word: number for number, word in enumerate(NAMES)}


def questions(name: str, *, seed: int = 0, data_dir: Path | None = None) -> list[Question]:
    """Questions of a task, before any model has seen them."""
    return SOURCES[name].make(random.Random(seed), Wanted(200, data_dir))


def numbers(text: str) -> list[str]:
    """Runs of digits."""
    return re.findall(r"\d+", text)


@pytest.fixture
def knows_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the model answered every prompt."""
    monkeypatch.setattr(controls, "answers_correctly", lambda _, p, __: np.ones(len(p), bool))


@pytest.fixture
def knows_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the model answered no prompt."""
    monkeypatch.setattr(controls, "answers_correctly", lambda _, p, __: np.zeros(len(p), bool))


@pytest.fixture
def svamp(tmp_path: Path) -> Path:
    """A folder with 80 word problems."""
    rows = [
        {"Body": f"Tom has {a} pens", "Question": f"How many with {b}?"}
        | {"Equation": f"( {a}.0 + {b}.0 )", "Answer": float(a + b)}
        for a in range(11, 19)
        for b in range(30, 40)
    ]
    (tmp_path / "svamp").mkdir()
    (tmp_path / "svamp/SVAMP.json").write_text(json.dumps(rows))
    return tmp_path


# --------------------------------------------------------------------------------- what they ask


@pytest.mark.parametrize("name", MADE)
def test_corrupt_prompts_have_the_same_numbers_and_something_else(name: str) -> None:
    found = questions(name)
    assert found == questions(name)
    assert found != questions(name, seed=1)
    assert len(found) > 2 * LEAST
    assert len({question.template for question in found}) > 1
    assert len({question.answer for question in found}) > 4
    for question in found:
        assert question.clean != question.corrupt
        assert numbers(question.clean) == numbers(question.corrupt)
        assert len(question.clean.split(" ")) == len(question.corrupt.split(" "))
        assert question.clean[-1] == question.corrupt[-1]
        assert not re.search(
            r"[-+^]|\*|plus|minus|power|lasted|more|lost|sold|gives", question.corrupt
        )


@pytest.mark.parametrize("length", [2, 3, 4])
def test_sums_ask_for_every_digit_and_carry_those_before(length: int) -> None:
    places = set()
    for question in questions(f"digits_{length}"):
        a, b, *stem = numbers(question.clean)
        assert len(a) == len(b) == length
        known = "".join(stem)
        assert str(int(a) + int(b)).startswith(known + question.answer)
        assert len(question.answer) == 1
        places.add(len(known))
    assert places >= set(range(length))


@pytest.mark.parametrize("name", ["carry", "no_carry"])
def test_tens_of_a_sum_receive_a_carry_or_do_not(name: str) -> None:
    for question in questions(name):
        a, b, *stem = numbers(question.clean)
        total = int(a) + int(b)
        received = total // 10 - int(a[0]) - int(b[0])
        assert received == (name == "carry")
        assert "".join(stem) == ("1" if total > 99 else "")
        assert int(question.answer) == total // 10 % 10


@pytest.mark.parametrize("name", ["borrow", "no_borrow"])
def test_first_digit_of_a_difference_gives_a_borrow_or_does_not(name: str) -> None:
    for question in questions(name):
        a, b = numbers(question.clean)
        rest = int(a) - int(b)
        assert 10 <= rest <= 99
        assert int(a[0]) - int(b[0]) - rest // 10 == (name == "borrow")
        assert int(question.answer) == rest // 10


def test_decimals_ask_for_the_tenths() -> None:
    for question in questions("decimals"):
        a, b, stem = re.findall(r"\d+\.\d?", question.clean)
        assert Decimal(stem + question.answer) == Decimal(a) + Decimal(b)
        assert question.clean.endswith(stem)


def test_powers_ask_for_every_digit() -> None:
    for question in questions("power"):
        a, b, *stem = numbers(question.clean)
        known = "".join(stem)
        assert str(int(a) ** int(b)).startswith(known + question.answer)
    assert {len("".join(numbers(q.clean)[2:])) for q in questions("power")} == {0, 1, 2}


def test_number_words_are_added_and_subtracted() -> None:
    for question in questions("number_words"):
        asked = question.clean.rpartition(", ")[2]
        a, b = (WORDS[word] for word in asked.split() if word in WORDS)
        assert WORDS[question.answer] == (a - b if "minus" in asked else a + b)
        assert question.group == f"{min(a, b)},{max(a, b)}"
        example = question.clean.rpartition(", ")[0]
        assert not example or (a, b) not in {(1, 2), (2, 1), (2, 2)}


def test_year_spans_end_within_the_decade() -> None:
    for question in questions("year_span"):
        years, start, stem = map(int, numbers(question.clean))
        assert years + start == int(f"{stem}{question.answer}")
        assert start // 10 == stem
        assert not question.clean.endswith(" ")


def test_objects_are_gained_or_lost() -> None:
    for question in questions("objects"):
        a, b = map(int, numbers(question.clean))
        gained = "more" in question.clean
        assert int(question.answer) == (a + b if gained else a - b)
    assert len({" more " in question.clean for question in questions("objects")}) == 2


def test_word_problems_lose_only_their_operator(svamp: Path) -> None:
    for question in questions("svamp", data_dir=svamp):
        problem, _, line = question.clean.partition("\n")
        a, b, *stem = numbers(line)
        known = "".join(stem)
        assert str(int(a) + int(b)).startswith(known + question.answer)
        assert line == f"{a} + {b} = {known}"
        assert question.corrupt == f"{problem}\n{a} @ {b} = {known}"
        assert question.group == f"{a},{b}"


# ------------------------------------------------------------------------------------- on a model


@pytest.mark.usefixtures("knows_all")
@pytest.mark.parametrize("name", [*MADE, "svamp"])
def test_halves_share_no_operands_and_follow_the_run(
    name: str, tiny: Callable[..., Model], svamp: Path
) -> None:
    (task,) = make_sources(tiny(), SELECTION, [name], data_dir=svamp, per_split=10, seed=0)
    groups = {split: {pair.group for pair in task.of(split)} for split in ("select", "test")}
    if name == "number_words":  # no word is one byte
        assert (task.pairs, task.facts["one_token"]) == ((), 0)
        return
    assert len(task.of("select")) == len(task.of("test")) == 10
    assert not groups["select"] & groups["test"]
    assert groups["select"] & EVERY <= SELECT
    assert not groups["test"] & SELECT
    assert all(pair.clean.startswith("Math:\n") and pair.task == name for pair in task.pairs)
    assert {key: task.facts[key] for key in ("tried", "one_token", "correct")} == {
        **{"tried": 20, "one_token": 20, "correct": 20}
    }
    assert task.facts["commonest"] <= 4  # of 20, so the answers take turns


@pytest.mark.usefixtures("knows_all")
def test_a_task_depends_on_the_seed_and_not_on_the_other_tasks(tiny: Callable[..., Model]) -> None:
    options = {"data_dir": None, "per_split": 8}
    alone = make_sources(tiny(), SELECTION, ["power"], **options, seed=0)
    beside = make_sources(tiny(), SELECTION, ["digits_2", "power"], **options, seed=0)
    other = make_sources(tiny(), SELECTION, ["power"], **options, seed=1)
    assert alone[0] == beside[1] != other[0]


@pytest.mark.usefixtures("knows_all")
def test_controls_are_the_same_questions_as_in_validation(tiny: Callable[..., Model]) -> None:
    (task,) = make_sources(
        tiny(), SELECTION, ["copy_number"], data_dir=None, per_split=controls.PER_SPLIT, seed=0
    )
    validated = {control.name: control for control in controls.make_controls(tiny(), SELECTION)}
    assert task.pairs == validated["copy_number"].pairs


@pytest.mark.usefixtures("knows_all")
def test_the_space_stands_where_the_answer_needs_it(tiny: Callable[..., Model]) -> None:
    spaced = SELECTION | {"spaced_answer": True}
    options = {"data_dir": None, "per_split": 20, "seed": 0}
    (task,) = make_sources(tiny(), spaced, ["digits_3"], **options)
    # A space and a digit are two bytes, so only questions that carry a digit are left.
    assert 0 < task.facts["one_token"] < task.facts["tried"]
    assert all(re.fullmatch(r"\d", pair.answer) for pair in task.pairs)
    assert all(pair.clean[-1].isdigit() and pair.corrupt[-1].isdigit() for pair in task.pairs)


@pytest.mark.usefixtures("knows_nothing")
def test_weak_models_get_more_questions_and_the_facts_say_so(tiny: Callable[..., Model]) -> None:
    (task,) = make_sources(tiny(), SELECTION, ["digits_2"], data_dir=None, per_split=9, seed=0)
    assert task.pairs == ()
    counted = task.facts["tried"], task.facts["one_token"], task.facts["correct"]
    assert counted == (2 * TRIES * 9, 2 * TRIES * 9, 0)


def test_what_cannot_be_had_is_said_before_the_model_runs(
    tiny: Callable[..., Model], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(controls, "answers_correctly", lambda *_: pytest.fail("the model ran"))
    options = {"data_dir": tmp_path, "per_split": 8, "seed": 0}
    with pytest.raises(UserError, match=r"SVAMP\.json"):
        make_sources(tiny(), SELECTION, ["digits_2", "svamp"], **options)
    with pytest.raises(UserError, match=r"one of digits_2, .*capital, found 'digits_9'"):
        make_sources(tiny(), SELECTION, ["digits_9"], **options)


def test_every_family_has_tasks() -> None:
    families = {name: source.family for name, source in SOURCES.items()}
    assert set(families.values()) == set(sources.Family.__args__)
    assert {name for name, family in families.items() if family == "control"} == set(controls.KINDS)
    assert len(families) == 18
