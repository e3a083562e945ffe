"""Control tasks: same form, honest counts, halves that share nothing."""

import random
from collections.abc import Callable

import numpy as np
import pytest

from circuitune import controls
from circuitune.controls import KINDS, LEAST, PER_SPLIT, answer_token, make_controls
from circuitune.models import Model
from circuitune.pairs import Pair

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
    assert numbers.facts == {
        **{"tried": 4 * PER_SPLIT, "one_token": 4 * PER_SPLIT, "correct": 4 * PER_SPLIT},
        **{"select": PER_SPLIT, "test": PER_SPLIT},
    }
    again = make_controls(tiny(), SELECTION)[0]
    assert again == numbers
    assert make_controls(tiny(), SELECTION, seed=1)[0] != numbers


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
    pair = Pair("1 2 ", "1 # ", "2", "copy", "", "test", "")
    assert answer_token(tokenizer, pair) == tokenizer("2").input_ids[-1]
    assert answer_token(tokenizer, Pair(**vars(pair) | {"answer": "22"})) is None


def test_the_real_model_answers_all_three(smollm2: Model) -> None:
    """On the real model all three are kept."""
    found = make_controls(smollm2, {"prefix": "Here is a problem: ", "spaced_answer": False})
    for control in found:
        facts = control.facts
        assert facts["correct"] <= facts["one_token"] <= facts["tried"]
        assert len(control.of("select")) == facts["select"] >= LEAST
        assert len(control.of("test")) == facts["test"] >= LEAST
