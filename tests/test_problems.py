"""Problems, templates and splits: exact texts, and properties that hold for any input."""

import re
from collections import Counter
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from circuitune.errors import UserError
from circuitune.problems import (
    FORMATS,
    MAX_DIGITS,
    STYLES,
    Operator,
    Problem,
    Template,
    completion,
    enumerate_problems,
    sample_problems,
    split_groups,
    templates,
)

OPERATOR_WORDS = {
    Operator.ADD: {"+", "plus", "sum", "added"},
    Operator.SUB: {"-", "minus", "difference", "reduced"},
    Operator.MUL: {"*", "x", "times", "product", "multiplied"},
    Operator.DIV: {"/", "over", "ratio", "divided"},
}
NULL_WORDS = {"nothing", "none", "@", "<", "#"}

operators = st.sampled_from(list(Operator))
operator_lists = st.lists(operators, min_size=1, max_size=4, unique=True)
seeds = st.integers(0, 2**32)


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    """Any problem with operands below a thousand."""
    operator = draw(operators)
    a, b = draw(st.integers(0, 999)), draw(st.integers(0, 999))
    if operator is Operator.DIV:
        b = max(b, 1)
        a *= b
    return Problem(operator, a, b)


def one_digit() -> list[Problem]:
    """All problems of all operators with digits 1 to 9 as operands and as answer."""
    return [
        problem
        for operator in Operator
        for problem in enumerate_problems(operator, low=1, high=9, max_answer=9)
    ]


def pieces(text: str) -> list[str]:
    """Cut a prompt into numbers, words, single signs and spaces."""
    return re.findall(r"\d+|[A-Za-z]+|\S|\s", text)


def groups(listed: list[Problem]) -> set[str]:
    """The groups that occur in a list."""
    return {problem.group for problem in listed}


# Operators ----------------------------------------------------------------------------------


@given(operators)
def test_parse_reads_every_name_of_an_operator(operator: Operator) -> None:
    names = [operator.id, operator.name, operator.symbol, operator.keyboard_symbol, str(operator)]
    assert {Operator.parse(f" {name} ") for name in names} == {operator}


@pytest.mark.parametrize(
    ("text", "operator"),
    [
        ("\N{MULTIPLICATION SIGN}", Operator.MUL),
        ("*", Operator.MUL),
        ("X", Operator.MUL),
        ("\N{DIVISION SIGN}", Operator.DIV),
        ("\N{MINUS SIGN}", Operator.SUB),
    ],
)
def test_parse_reads_other_symbols(text: str, operator: Operator) -> None:
    assert Operator.parse(text) is operator


@pytest.mark.parametrize("text", ["", "plus", "%", "+-"])
def test_parse_refuses_other_text(text: str) -> None:
    with pytest.raises(UserError, match="one of add, sub, mul, div") as caught:
        Operator.parse(text)
    assert repr(text) in str(caught.value)


@pytest.mark.parametrize(
    ("operator", "a", "b", "result"),
    [
        (Operator.ADD, 3, 5, 8),
        (Operator.SUB, 3, 5, -2),
        (Operator.MUL, 3, 5, 15),
        (Operator.DIV, 15, 5, 3),
        (Operator.DIV, 0, 5, 0),
        (Operator.DIV, 3, 5, None),
        (Operator.DIV, 5, 0, None),
        (Operator.DIV, 0, 0, None),
    ],
)
def test_apply(operator: Operator, a: int, b: int, result: int | None) -> None:
    assert operator.apply(a, b) == result


# Problems -----------------------------------------------------------------------------------


def test_group_is_the_unordered_pair_of_operands() -> None:
    same = [
        Problem(Operator.ADD, 3, 5),
        Problem(Operator.ADD, 5, 3),
        Problem(Operator.MUL, 3, 5),
        Problem(Operator.SUB, 5, 3),
    ]
    assert groups(same) == {"3,5"}
    assert Problem(Operator.DIV, 12, 4).group == "4,12"


@given(problems())
def test_answer_undoes_the_operator(problem: Problem) -> None:
    a, b, answer = problem.a, problem.b, problem.answer
    back = {
        Operator.ADD: answer - b == a,
        Operator.SUB: answer + b == a,
        Operator.MUL: answer == sum([a] * b),
        Operator.DIV: answer * b == a,
    }
    assert back[problem.operator]


@pytest.mark.parametrize(
    ("operator", "a", "b", "shown"),
    [
        (Operator.DIV, 7, 2, "7 / 2"),
        (Operator.DIV, 7, 0, "7 / 0"),
        (Operator.ADD, -1, 2, "-1 \\+ 2"),
    ],
)
def test_problem_refuses_what_has_no_whole_answer(
    operator: Operator, a: int, b: int, shown: str
) -> None:
    with pytest.raises(UserError, match=shown):
        Problem(operator, a, b)


# Templates ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("template", "clean", "corrupt"),
    [
        ("add.equation.1", "6 + 2 = ", "6 @ 2 = "),
        ("sub.equation.3", "6-2 = ", "6@2 = "),
        ("mul.equation.1", "6 * 2 = ", "6 @ 2 = "),
        ("mul.equation.2", "(6 x 2) = ", "(6 < 2) = "),
        ("div.equation.4", "Calculate 6 / 2 = ", "Calculate 6 # 2 = "),
        ("add.statement.1", "6 plus 2 equals ", "6 nothing 2 equals "),
        ("add.statement.3", "The sum of 6 and 2 is ", "The none of 6 and 2 is "),
        ("div.statement.2", "6 divided by 2 is equal to ", "6 none by 2 is equal to "),
        ("div.statement.3", "The ratio of 6 to 2 is ", "The none of 6 to 2 is "),
        ("div.statement.4", "The result of 6 over 2 is ", "The result of 6 nothing 2 is "),
        ("mul.question.1", "Q: What is 6 times 2? A: ", "Q: What is 6 nothing 2? A: "),
        (
            "sub.question.2",
            "Q: What is the difference between 6 and 2? A: ",
            "Q: What is the none between 6 and 2? A: ",
        ),
        (
            "mul.question.3",
            "Question: What is 6 x 2? Answer: ",
            "Question: What is 6 @ 2? Answer: ",
        ),
    ],
)
def test_rendered_text(template: str, clean: str, corrupt: str) -> None:
    operator = Operator.parse(template.split(".")[0])
    by_id = {each.id: each for each in templates(operator)}
    assert by_id[template].render(Problem(operator, 6, 2)) == (clean, corrupt)


@pytest.mark.parametrize("operator", Operator)
def test_every_style_has_templates(operator: Operator) -> None:
    by_style = {style: templates(operator, style) for style in STYLES}
    assert all(len(found) >= 3 for found in by_style.values())
    assert len(templates(operator)) >= 9
    assert templates(operator) == tuple(t for found in by_style.values() for t in found)
    for style, found in by_style.items():
        assert [t.id for t in found] == [
            f"{operator.id}.{style}.{k}" for k in range(1, 1 + len(found))
        ]
        assert {(t.style, t.operator) for t in found} == {(style, operator)}


def test_no_two_templates_share_a_clean_sentence() -> None:
    listed = [template.clean for operator in Operator for template in templates(operator)]
    assert len(set(listed)) == len(listed)


@given(problems())
def test_corrupt_differs_in_the_operator_word_only(problem: Problem) -> None:
    for template in templates(problem.operator):
        clean, corrupt = map(pieces, template.render(problem))
        assert len(clean) == len(corrupt)
        changed = [pair for pair in zip(clean, corrupt, strict=True) if pair[0] != pair[1]]
        assert len(changed) == 1
        assert changed[0][0] in OPERATOR_WORDS[problem.operator]
        assert changed[0][1] in NULL_WORDS
        operands = [piece for piece in corrupt if piece.isdigit()]
        assert operands == [str(problem.a), str(problem.b)]


@given(problems())
def test_every_prompt_ends_with_one_space(problem: Problem) -> None:
    prompts = [
        text for template in templates(problem.operator) for text in template.render(problem)
    ]
    prompts += [completion(problem, format)[0] for format in FORMATS]
    assert all(re.search(r"\S $", prompt) for prompt in prompts)


def test_templates_refuse_an_unknown_style() -> None:
    with pytest.raises(UserError, match="equation, statement, question, found 'poem'"):
        templates(Operator.ADD, "poem")


def test_render_refuses_another_operator() -> None:
    with pytest.raises(UserError, match=r"add\.equation\.1 .* operator add, found 6 / 2"):
        templates(Operator.ADD)[0].render(Problem(Operator.DIV, 6, 2))


@pytest.mark.parametrize(
    ("clean", "corrupt", "message"),
    [
        ("{a} + {b} =", "{a} @ {b} =", "end with one space"),
        ("{a} + {b} =  ", "{a} @ {b} =  ", "end with one space"),
        ("{a} + = ", "{a} @ = ", "each of {a}, {b} once"),
        ("{a} + {b} = ", "{a} @ {a} = ", "each of {a}, {b} once"),
        ("{a} + {b} = ", "{a} + {b} = ", "differs from the clean one"),
        ("{a} + {b} = ", "{a} {b} = ", "as many words"),
    ],
)
def test_template_refuses_sentences_that_do_not_match(
    clean: str, corrupt: str, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        Template("mine", "equation", Operator.ADD, clean, corrupt)


# Formats ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("problem", "expected"),
    [
        (Problem(Operator.ADD, 3, 5), ("3 + 5 = ", "8")),
        (Problem(Operator.SUB, 3, 5), ("3 - 5 = ", "-2")),
        (Problem(Operator.MUL, 12, 5), ("12 * 5 = ", "60")),
        (Problem(Operator.DIV, 12, 4), ("12 / 4 = ", "3")),
    ],
)
def test_completion(problem: Problem, expected: tuple[str, str]) -> None:
    assert completion(problem) == completion(problem, FORMATS[0]) == expected


@pytest.mark.parametrize("format", ["{a} {op} {b} =", "{a} + {b} = "])
def test_completion_refuses_a_bad_format(format: str) -> None:
    with pytest.raises(UserError, match=r"A format must contain each of \{a\}, \{op\}, \{b\} once"):
        completion(Problem(Operator.ADD, 3, 5), format)


# Enumeration --------------------------------------------------------------------------------


def test_enumeration_of_one_digit_problems() -> None:
    counts = Counter(problem.operator for problem in one_digit())
    # By hand: pairs with a + b <= 9; with a >= b; with a * b <= 9, which are also the quotients.
    assert counts == {Operator.ADD: 36, Operator.SUB: 45, Operator.MUL: 23, Operator.DIV: 23}


def test_enumeration_order() -> None:
    listed = enumerate_problems(Operator.DIV, low=1, high=4, max_answer=3)
    assert list(map(str, listed)) == ["1 / 1", "2 / 1", "2 / 2", "3 / 1", "3 / 3", "4 / 2", "4 / 4"]


@given(operators, st.integers(0, 12), st.integers(0, 12), st.integers(-12, 12), st.integers(0, 80))
def test_enumeration_finds_all_and_only_what_is_asked(
    operator: Operator, low: int, span: int, least: int, most: int
) -> None:
    high = low + span
    listed = enumerate_problems(operator, low=low, high=high, max_answer=most, min_answer=least)
    expected = {
        (a, b)
        for a in range(low, high + 1)
        for b in range(low, high + 1)
        if (answer := operator.apply(a, b)) is not None and least <= answer <= most
    }
    assert len(listed) == len(set(listed))
    assert {(problem.a, problem.b) for problem in listed} == expected


@pytest.mark.parametrize(("low", "high"), [(-1, 3), (4, 3)])
def test_enumeration_refuses_empty_bounds(low: int, high: int) -> None:
    with pytest.raises(UserError, match=f"found low={low} and high={high}"):
        enumerate_problems(Operator.ADD, low=low, high=high)


# Splits -------------------------------------------------------------------------------------


@given(seeds, st.floats(0.1, 0.9))
def test_split_keeps_groups_together_and_loses_nothing(seed: int, share: float) -> None:
    listed = one_digit()
    first, second = split_groups(listed, seed=seed, share=share)
    assert not groups(first) & groups(second)
    assert Counter(first) + Counter(second) == Counter(listed)
    for side in (first, second):
        assert side == sorted(side, key=listed.index)


@given(seeds, st.sampled_from([0.2, 0.5, 0.8]))
def test_split_gives_each_operator_its_share(seed: int, share: float) -> None:
    listed = one_digit()
    first, _ = split_groups(listed, seed=seed, share=share)
    total = Counter(problem.operator for problem in listed)
    found = Counter(problem.operator for problem in first)
    assert all(abs(found[each] - share * total[each]) <= 4 for each in Operator)


@given(seeds, st.randoms(use_true_random=False), st.floats(0.1, 0.9))
def test_split_depends_on_seed_and_not_on_order(seed: int, shuffler: Random, share: float) -> None:
    listed = one_digit()
    first, _ = split_groups(listed, seed=seed, share=share)
    shuffler.shuffle(listed)
    assert groups(split_groups(listed, seed=seed, share=share)[0]) == groups(first)


def test_seeds_split_differently_and_no_group_is_fixed() -> None:
    listed = one_digit()
    counts = Counter(
        group for seed in range(100) for group in groups(split_groups(listed, seed=seed)[0])
    )
    assert groups(listed) == set(counts)
    # Binomial with n=100, p=1/2: outside 25..75 with probability below 1e-6 a group.
    assert 25 <= min(counts.values()) <= max(counts.values()) <= 75


@pytest.mark.parametrize("share", [0.0, 1.0, -0.5, float("nan")])
def test_split_refuses_a_share_out_of_range(share: float) -> None:
    with pytest.raises(UserError, match="share must be above 0 and below 1"):
        split_groups(one_digit(), seed=0, share=share)


def test_split_refuses_an_empty_side() -> None:
    same = [Problem(Operator.ADD, 3, 5), Problem(Operator.MUL, 5, 3)]
    with pytest.raises(UserError, match="found 1 groups"):
        split_groups(same, seed=0)


# Samples ------------------------------------------------------------------------------------


@settings(max_examples=50)
@given(operator_lists, st.integers(1, 3), st.integers(0, 120), seeds)
def test_sample_is_balanced_valid_and_deterministic(
    chosen: list[Operator], digits: int, n: int, seed: int
) -> None:
    drawn = sample_problems(chosen, digits=digits, n=n, seed=seed)
    assert len(drawn) == n
    assert drawn == sample_problems(chosen, digits=digits, n=n, seed=seed)
    assert drawn[: n // 2] == sample_problems(chosen, digits=digits, n=n // 2, seed=seed)
    assert all(problem.answer >= 0 for problem in drawn)
    assert all(max(problem.a, problem.b) < 10**digits for problem in drawn)


@settings(max_examples=50)
@given(operator_lists, st.integers(0, 300), seeds)
def test_sample_has_no_duplicates_while_possible(chosen: list[Operator], n: int, seed: int) -> None:
    drawn = sample_problems(chosen, digits=2, n=n, seed=seed)
    assert len(set(drawn)) == n  # the smallest space, division, holds more than 300 problems


@pytest.mark.parametrize("operator", Operator)
def test_sample_repeats_only_when_all_problems_are_used(operator: Operator) -> None:
    space = enumerate_problems(operator, low=0, high=9)
    drawn = sample_problems([operator], digits=1, n=2 * len(space) + 5, seed=3)
    assert set(drawn[: len(space)]) == set(space)
    assert set(drawn[len(space) : 2 * len(space)]) == set(space)


def test_sample_mixes_operators_evenly_and_keeps_one_factor_short() -> None:
    drawn = sample_problems(Operator, digits=2, n=160, seed=1)
    assert Counter(each.operator for each in drawn) == dict.fromkeys(Operator, 40)
    products = [each for each in drawn if each.operator is Operator.MUL]
    assert all(min(each.a, each.b) <= 9 for each in products)
    assert any(max(each.a, each.b) > 9 for each in products)


def test_sample_of_one_operator_ignores_the_others() -> None:
    alone = sample_problems([Operator.SUB], digits=3, n=30, seed=5)
    mixed = sample_problems(Operator, digits=3, n=120, seed=5)
    assert [problem for problem in mixed if problem.operator is Operator.SUB] == alone


@settings(max_examples=50)
@given(st.integers(1, 2), st.integers(0, 400), seeds)
def test_excluded_groups_never_occur(digits: int, n: int, seed: int) -> None:
    kept_out = groups(split_groups(one_digit(), seed=seed)[0])
    drawn = sample_problems(Operator, digits=digits, n=n, seed=seed, exclude=kept_out)
    assert len(drawn) == n
    assert not groups(drawn) & kept_out


def test_sample_draws_uniformly() -> None:
    listed = [sample_problems([Operator.ADD], digits=1, n=1, seed=seed)[0] for seed in range(2000)]
    counts = Counter(listed)
    assert len(counts) == 100
    # Poisson with mean 20: above 45 with probability below 1e-6 a problem.
    assert max(counts.values()) <= 45


def test_sample_reaches_the_longest_operands() -> None:
    drawn = sample_problems([Operator.ADD], digits=MAX_DIGITS, n=40, seed=0)
    assert max(max(problem.a, problem.b) for problem in drawn) >= 1000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"operators": []}, "found 0 operators"),
        ({"digits": 0}, "digits=0"),
        ({"digits": MAX_DIGITS + 1}, f"digits={MAX_DIGITS + 1}"),
        ({"n": -1}, "n=-1"),
        ({"exclude": "3,5"}, "collection of groups"),
        ({"exclude": ["5,3"]}, "'5,3'"),
        ({"exclude": ["3, 5"]}, "'3, 5'"),
        (
            {"exclude": groups(enumerate_problems(Operator.ADD, low=0, high=9))},
            "found none for add",
        ),
    ],
)
def test_sample_refuses_bad_arguments(arguments: dict, message: str) -> None:
    good = {"operators": [Operator.ADD], "digits": 1, "n": 5, "seed": 0}
    with pytest.raises(UserError, match=message):
        sample_problems(**(good | arguments))
