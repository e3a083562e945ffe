"""The number a generated answer gives: labelled outputs of real models, properties, hard cases."""

import json
from decimal import Decimal
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from circuitune.errors import UserError
from circuitune.extracting import flexible, same_number, strict

LINES = (Path(__file__).parent / "data" / "outputs.jsonl").read_text(encoding="utf-8").splitlines()
OUTPUTS = [json.loads(line) for line in LINES]

# What was measured. The fresh part was labelled before the extractor was run on it: 83 of 100.
# Some faults that it showed were mended since, so the next honest number needs new outputs.
LEAST = {"develop": 297, "fresh": 91}


def agrees(record: dict) -> bool:
    found = flexible(record["output"])
    return found is None if record["label"] is None else same_number(found, record["label"])


def test_flexible_agrees_with_the_reader() -> None:
    right = {part: [agrees(r) for r in OUTPUTS if r["part"] == part] for part in LEAST}
    message = "; ".join(f"{part}: {sum(ok)} of {len(ok)}" for part, ok in right.items())
    missed = [r["output"][:80] for r in OUTPUTS if not agrees(r)]
    assert all(sum(right[part]) >= least for part, least in LEAST.items()), f"{message}; {missed}"


def test_the_labelled_outputs_are_of_many_kinds() -> None:
    assert [sum(r["part"] == part for r in OUTPUTS) for part in LEAST] == [300, 100]
    assert {r["model"] for r in OUTPUTS} == {"smollm2-135m-instruct", "gemma-3-270m"}
    assert {tuple(r) for r in OUTPUTS} == {("model", "style", "output", "label", "part")}
    assert len({r["style"] for r in OUTPUTS}) == 12
    assert sum(r["label"] is None for r in OUTPUTS) > 50


def test_strict_finds_only_the_form_and_flexible_follows_it() -> None:
    found = {r["output"]: strict(r["output"]) for r in OUTPUTS}
    with_form = [text for text, value in found.items() if value is not None]
    assert len(with_form) > 50
    assert all("####" in text and flexible(text) == found[text] for text in with_form)


# ------------------------------------------------------------------------------------ properties

CENTS = st.decimals(-(10**9), 10**9, places=2, allow_nan=False, allow_infinity=False)
WRITTEN = ["{:,f}", "{:f}", "${:,f}", "{:f}%", "{:,f} apples", "**{:f}**", "\\${:,f}"]
FRAMES = [
    "{}",
    "#### {}",
    "5 + 3 = {}",
    "The answer is {}.",
    "So the final answer is: {}",
    "In 3 days, 2 of them had 7.\nAnswer: {}",
]


@given(CENTS, st.sampled_from(WRITTEN), st.sampled_from(FRAMES))
def test_a_formatted_number_is_read_back(value: Decimal, written: str, frame: str) -> None:
    text = frame.format(written.format(value))
    assert flexible(text) == value
    assert strict(text) == (value if "####" in frame else None)


@given(CENTS)
def test_extraction_of_what_was_extracted_changes_nothing(value: Decimal) -> None:
    once = flexible(f"The answer is ${value:,f}.")
    assert flexible(f"{once:f}") == once == value


@given(st.integers(-(10**6), 10**6), st.integers(1, 10**4))
def test_fractions_are_divided(above: int, below: int) -> None:
    right = Decimal(above) / below
    assert same_number(flexible(f"The answer is {above}/{below}."), right)
    assert same_number(strict(f"#### {above}/{below}"), right)
    assert same_number(flexible(rf"\boxed{{\frac{{{above}}}{{{below}}}}}"), right)


@given(CENTS, st.sampled_from(FRAMES), st.integers(0, 999))
def test_a_new_question_is_not_looked_at(value: Decimal, frame: str, other: int) -> None:
    text = frame.format(f"{value:f}")
    for heading in ("Question:", "Q:", "Problem 2:", "### Question 2:"):
        more = f"{text}\n\n{heading} Ann has {other} pens.\nAnswer: The answer is {other}. #### 1"
        assert (flexible(more), strict(more)) == (flexible(text), strict(text))


@given(st.text(alphabet="0123456789.,-/$%=+x#\\{} \nQuestion:answerstd"))
def test_no_text_is_an_error(text: str) -> None:
    found = strict(text)
    assert found is None or flexible(text) == found


@given(CENTS, st.sampled_from(["{}", "{:,f}", "{:f}0"]))
def test_equal_numbers_are_the_same(value: Decimal, written: str) -> None:
    assert same_number(value, written.format(value))
    assert same_number(value, float(value))
    assert not same_number(value, value + max(abs(value), 1) * Decimal("1e-5"))


# ------------------------------------------------------------------------------------ hard cases


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("#### 43", "43"),
        (" 70 - 27 = 43\n#### 43", "43"),
        ("####43", "43"),
        ("#### $1,234.50.", "1234.50"),
        ("#### -7 degrees", "-7"),
        ("#### 25%", "25"),
        ("#### 1 1/2 cups", "1.5"),
        ("#### **43**", "43"),
        ("#### 5\nNo, I forgot two.\n#### 7", "7"),
        ("#### 5\n\nAnn has 3 pens.\n#### 8", "5"),
        ("#### 5\nQuestion: What is 2 + 2?\n#### 4", "5"),
        ("#### forty-three", "43"),
        ("#### about 43", None),
        ("#### 6 * 2", None),
        ("####", None),
        ("43", None),
        ("", None),
    ],
)
def test_strict(text: str, right: str | None) -> None:
    assert strict(text) == (None if right is None else Decimal(right))


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("There are 7 apples.", "7"),
        ("There are seven apples.", "7"),
        ("She has twenty-five cents.", "25"),
        ("3 + 4 = 7 apples in 2 boxes", "7"),
        ("5 + 3 = 8. So after giving 2 away, she has 6 left.", "6"),
        ("5 + 3 = 8\n8 - 2 = 6", "6"),
        ("The answer is 27 - 20 = 7.", "7"),
        ("The answer is 4. No, the answer is 5.", "5"),
        (r"Thus \boxed{1{,}250} pens, 3 each.", "1250"),
        (r"\boxed{\text{\$12.50}}", "12.50"),
        (r"So 4 boxes. The answer is \boxed{}.", "4"),
        ("A total of 9 were made, 4 in May and 5 in June.", "9"),
        ("Mia gave away 43 of her 70 shells.", "43"),
        ("It costs $ 1,200", "1200"),
        ("20 kilograms\nQuestion: and 16?\nAnswer: 16 kg", "20"),
        ("\nQuestion: Ann has 3 pens.\nAnswer: 5", "5"),
        ("12\nExplanation: 25 trees and 13 trees.", "12"),
        ("x = \u22125", "-5"),
        ("5-3 = 2", "2"),
        ("10 - 26 = - 4. The answer is - 4.", "-4"),
        (" A: $8.65 .\nIt was computed by the 3 rules.", "8.65"),
        ("$5. The change came after a tax of 10%.", "5"),
        ("So the answer's 48\nWhat are 3 and 4", "48"),
        ("The answer must be 12.", "12"),
        ("There are 28 people.\nReasoning: 2 of 3 is the square of 9.", "28"),
        (" 3.\n\nTom ate 4 pears. How many are left?\nAnswer: 5.", "3"),
        ("We have 7 bales. The answer is \\boxed{}. You can solve it by 9", "7"),
        ("This gives us 12 ways. So that's the answer.", "12"),
        ("He has 5 pens. So there are no pens in the bag.", None),
        ("Ann ate 3 pears and 4 plums.", None),
        ("They are 12 or 13.", None),
        (" 1. 1. 2. 3. 4. 5. 6. 7", None),
        ("10" + "0" * 60, None),
        ("First: Write 1.\nSecond: Add 2.\nThird: Add 5.", None),
        ("12 * 4", None),
        ("3x", None),
        ("80^(-5)", None),
        ("On the 3rd", None),
        ("I do not know.", None),
        ("", None),
        ("\n", None),
    ],
)
def test_flexible(text: str, right: str | None) -> None:
    assert flexible(text) == (None if right is None else Decimal(right))


def test_working_that_was_cut_off_gives_none() -> None:
    working = "First we count the pens in all of the boxes that were bought on Monday. " * 2
    assert len(working) > 100
    assert (
        flexible(working + "There are 4 boxes with 12 pens. Then we multiply 4 by 12 and") is None
    )
    assert flexible(working + "So the total is 4 * 12 = 48 pens in the box") == 48


def test_a_list_without_a_conclusion_gives_none() -> None:
    items = [f"{place}. Ann has {place + 3} pens." for place in range(1, 5)]
    assert flexible("\n" + "\n".join(items)) is None
    assert flexible("\n" + "\n".join([*items, "5. So Ann has 9 pens in all."])) == 9


def test_a_text_in_circles_says_its_number_once() -> None:
    assert flexible("There are 8 pens." + " There are 8 pens." * 9 + " There are") == 8
    long = " Amy has 2 boxes with 4 pens each. So she has 2 * 4 = 8 pens left in her boxes."
    assert flexible(long * 2 + " Amy has 2 boxes with 4 pens each. So") == 8


def test_what_follows_a_begun_conclusion_is_not_waited_for() -> None:
    working = "First we count the pens in all of the boxes that were bought on Monday. " * 3
    assert flexible(working + "So, 108 more pens were bought than those that") == 108
    assert flexible(working + "So Ann has 8 pens.\n\nThe final answer is") == 8
    assert flexible(working + "So, if Ann has 8 pens, then 5 of") is None


@pytest.mark.parametrize("answer", ["43", 43.0, "43.0", "43.00", " 43 ", Decimal(43)])
def test_same_number(answer: str | float | Decimal) -> None:
    assert same_number(Decimal("43"), answer)
    assert same_number(Decimal("43.00001"), answer)
    assert not same_number(Decimal("43.001"), answer)
    assert not same_number(Decimal(-43), answer)
    assert not same_number(None, answer)


def test_nothing_is_near_zero_but_zero() -> None:
    assert same_number(Decimal("0.0"), 0.0)
    assert not same_number(Decimal("1e-9"), 0.0)


@pytest.mark.parametrize("answer", ["pens", "", "nan", float("inf"), "3/4"])
def test_a_right_answer_must_be_a_number(answer: str | float) -> None:
    with pytest.raises(UserError, match=r"must be a finite number, found .*take that problem out"):
        same_number(Decimal(1), answer)
