"""Control tasks: same form, honest counts, halves that share nothing."""

import random
from collections.abc import Callable

import numpy as np
import pytest

from circuitune import controls
from circuitune.controls import (
    KINDS,
    LEAST,
    PER_SPLIT,
    Question,
    answer_token,
    halve,
    keep,
    make_controls,
)
from circuitune.models import Model
from circuitune.writing import Writing

SELECTION = {"prefix": "Math:\n", "spaced_answer": False}


@pytest.fixture
def knows_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the model answered every prompt."""
    monkeypatch.setattr(controls, "answers_correctly", lambda _, p, __: np.ones(len(p), bool))


def only_first(_: Model, prompts: list[list[int]], __: list[int]) -> np.ndarray:
    """As if the model answered fewer prompts than a half needs."""
    return np.arange(len(prompts)) < LEAST - 1


@pytest.mark.parametrize("name", KINDS)
def test_questions_come_in_pairs_of_one_form(name: str) -> None:
    questions = KINDS[name].make(random.Random(0))
    assert questions == KINDS[name].make(random.Random(0))
    assert questions != KINDS[name].make(random.Random(1))
    assert len({question.template for question in questions}) > 1
    for question in questions:
        words, others = question.clean.split(" "), question.corrupt.split(" ")
        assert len(words) == len(others)
        different = [pair for pair in zip(words, others, strict=True) if pair[0] != pair[1]]
        assert len(different) == 1
        assert question.clean.endswith(" ")
        assert not question.answer.endswith(" ")


@pytest.mark.parametrize("name", ["copy_number", "copy_word"])
def test_what_is_copied_stands_in_the_clean_prompt_alone(name: str) -> None:
    for question in KINDS[name].make(random.Random(0)):
        corrupt = question.corrupt.replace(",", "").replace(".", "").replace(":", "").split()
        assert question.answer in question.clean
        assert question.answer not in corrupt


@pytest.mark.usefixtures("knows_all")
def test_halves_are_full_and_share_no_group(tiny: Callable[..., Model]) -> None:
    found = {control.name: control for control in make_controls(tiny(), SELECTION)}
    assert list(found) == list(KINDS)
    numbers = found["copy_number"]
    select, test = numbers.of("select"), numbers.of("test")
    assert len(select) == len(test) == PER_SPLIT
    assert not {pair.group for pair in select} & {pair.group for pair in test}
    assert not {pair.clean for pair in select} & {pair.clean for pair in test}
    assert all(pair.clean.startswith("Math:\n") for pair in numbers.pairs)
    assert all(pair.task == "copy_number" for pair in numbers.pairs)
    commonest = numbers.facts.pop("commonest")
    rates = [numbers.facts.pop(name) for name in ("low", "rate", "high")]
    assert rates[0] < rates[1] == rates[2] == 1
    assert 4 * PER_SPLIT / 10 <= commonest < PER_SPLIT
    assert numbers.facts == {
        **{"tried": 4 * PER_SPLIT, "one_token": 4 * PER_SPLIT, "correct": 4 * PER_SPLIT},
        **{"select": PER_SPLIT, "test": PER_SPLIT},
    }
    again = make_controls(tiny(), SELECTION)[0]
    assert again.pairs == numbers.pairs
    assert make_controls(tiny(), SELECTION, seed=1)[0].pairs != numbers.pairs


@pytest.mark.usefixtures("knows_all")
def test_answers_of_several_tokens_are_dropped_with_a_count(tiny: Callable[..., Model]) -> None:
    word = next(c for c in make_controls(tiny(), SELECTION) if c.name == "copy_word")
    assert word.pairs == ()
    assert (word.facts["one_token"], word.facts["correct"]) == (0, 0)
    assert word.facts["tried"] == 4 * PER_SPLIT


def test_too_few_right_answers_drop_the_task(
    tiny: Callable[..., Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(controls, "answers_correctly", only_first)
    number = make_controls(tiny(), SELECTION)[0]
    assert number.pairs == ()
    assert number.facts["correct"] == 2 * (LEAST - 1)


@pytest.mark.usefixtures("knows_all")
def test_tasks_of_the_run_keep_their_names(tiny: Callable[..., Model]) -> None:
    found = make_controls(tiny(), SELECTION, taken=["copy_number"])
    assert [control.name for control in found] == ["copy_word", "capital"]


def test_an_answer_is_one_token_after_its_prompt(tiny: Callable[..., Model]) -> None:
    tokenizer = tiny().tokenizer
    assert answer_token(tokenizer, "1 2 ", "2") == tokenizer("2").input_ids[-1]
    assert answer_token(tokenizer, "1 2 ", "22") is None


def test_the_real_model_answers_all_three(smollm2: Model) -> None:
    """On the real model all three are kept."""
    found = make_controls(smollm2, {"prefix": "Here is a problem: ", "spaced_answer": False})
    for control in found:
        facts = control.facts
        assert facts["correct"] <= facts["one_token"] <= facts["tried"]
        assert len(control.of("select")) == facts["select"] >= LEAST
        assert len(control.of("test")) == facts["test"] >= LEAST


def asked(*groups: str) -> list[Question]:
    """Questions of some groups."""
    return [Question(f"{place}: ", f"{place}# ", "1", "", g) for place, g in enumerate(groups)]


def test_known_groups_keep_their_half_and_the_others_are_shared_out() -> None:
    groups = [*"aabbccddee", "3,5", "2,2"]
    known = {"3,5": "test", "2,2": "select"}
    halves = halve(asked(*groups), random.Random(0), known)
    inside = {split: {question.group for question in side} for split, side in halves.items()}
    assert inside["select"] & inside["test"] == set()
    assert inside["select"] | inside["test"] == set(groups)
    assert "2,2" in inside["select"]
    assert "3,5" in inside["test"]
    assert len(inside["select"]) == 4
    assert halve(asked(*groups) * 2, random.Random(0), known) == halves


def test_a_prompt_that_ends_within_its_answer_goes_on_without_space(
    tiny: Callable[..., Model], knows_all: None
) -> None:
    del knows_all
    halves = {
        split: [
            Question(f"{place} + 13 = 4", f"{place} @ 13 = 4", str(place % 10), "t", str(place))
            for place in places
        ]
        for split, places in (("select", range(20, 30)), ("test", range(30, 40)))
    }
    kept = keep(tiny(), "sums", halves, Writing("P\n", spaced_answer=True), per_split=8, batch=16)
    assert [pair.clean for pair in kept.of("select")][:2] == ["P\n20 + 13 = 4", "P\n21 + 13 = 4"]
    assert kept.pairs[0].corrupt == "P\n20 @ 13 = 4"
    assert kept.pairs[0].answer == "0"


def test_more_questions_are_tried_only_until_there_are_enough(
    tiny: Callable[..., Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    # One of four prompts is right, so 16 questions at a time give 4 pairs; answers come in fours.
    monkeypatch.setattr(controls, "answers_correctly", lambda _, p, __: np.arange(len(p)) % 4 == 0)
    halves = {
        split: [
            Question(f"{split} {place} ", "# ", str(place // 4 % 10), "t", split)
            for place in range(200)
        ]
        for split in ("select", "test")
    }
    writing = Writing("", spaced_answer=False)
    kept = keep(tiny(), "t", halves, writing, per_split=8, batch=16, batches=3)
    assert kept.facts.pop("rate") == 0.25
    # Two groups that do not differ: as much is known as from two questions.
    assert kept.facts.pop("low") < 0.05
    assert kept.facts.pop("high") > 0.65
    assert kept.facts == {"tried": 64, "one_token": 64, "correct": 16} | {
        **{"commonest": 8, "select": 8, "test": 8}
    }
    short = keep(tiny(), "t", halves, writing, per_split=8, batch=16, batches=1)
    assert short.facts["tried"] == 2 * 16
    assert short.facts["select"] == 4
    assert short.pairs == ()
