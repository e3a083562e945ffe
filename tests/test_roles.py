"""Roles and contrasts: right for tokenizers of several kinds, and what does not fit is counted."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from circuitune.errors import UserError
from circuitune.models import Model
from circuitune.pairs import Pair
from circuitune.problems import Operator, Problem, Template, enumerate_problems, templates
from circuitune.roles import (
    ARITHMETIC_CONTRASTS,
    ARITHMETIC_ROLES,
    OWN_ROLES,
    Contrasts,
    Prompt,
    find_contrasts,
)
from tests.conftest import byte_tokenizer

PREFIX = "Math 1:\n"  # a digit in the prefix is no operand


def write(problem: Problem, template: Template, *, stripped: bool = False) -> Pair:
    """A pair as `circuitune.pairs` writes it."""
    texts = [PREFIX + text for text in template.render(problem)]
    clean, corrupt = (text.rstrip(" ") if stripped else text for text in texts)
    task = problem.operator.id
    return Pair(clean, corrupt, str(problem.answer), task, template.id, "select", problem.group)


def every_pair(*, stripped: bool = False) -> list[Pair]:
    """Some problems of every operator in each of its templates."""
    pairs = []
    for operator in Operator:
        problems = enumerate_problems(operator, low=1, high=9, max_answer=9)[1::7]
        for number, template in enumerate(templates(operator)):
            pairs.append(write(problems[number % len(problems)], template, stripped=stripped))
    return pairs


def sentencepiece_like() -> PreTrainedTokenizerFast:
    """A unigram tokenizer over words with a leading mark, trained on the prompts themselves."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(prepend_scheme="always"), pre_tokenizers.Digits(True)]
    )
    digits = [str(digit) for digit in range(10)]
    trainer = trainers.UnigramTrainer(vocab_size=400, special_tokens=["<s>", *digits, "@", "#"])
    texts = [text for pair in every_pair() for text in (pair.clean, pair.corrupt)]
    tokenizer.train_from_iterator(texts * 3, trainer)
    tokenizer.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>")


def found_in(tokenizer: PreTrainedTokenizerBase, pairs: list[Pair], seed: int = 0) -> Contrasts:
    """The contrasts of pairs, from a fixed seed."""
    return find_contrasts(tokenizer, pairs, rng=np.random.default_rng(seed))


def text_of(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, role: str) -> str:
    """What the tokens of a role say."""
    return tokenizer.decode([prompt.tokens[place] for place in prompt.roles[role]]).strip()


def words(pair: Pair) -> dict[str, str]:
    """Operands and operator as a person would read them in the prompt."""
    operator = Operator.parse(pair.task)
    template = next(item for item in templates(operator) if item.id == pair.template)
    a, b = (int(number) for number in pair.group.split(","))
    if not pair.clean.rstrip().endswith(template.clean.format(a=a, b=b).rstrip()):
        a, b = b, a
    filled = [text.format(a=a, b=b) for text in (template.clean, template.corrupt)]
    one, other = (Counter(text.replace("(", "( ").split()) for text in filled)
    (word,) = one - other
    operator_text = word.strip("0123456789")
    return {"operand 1": str(a), "operator": operator_text, "operand 2": str(b)}


@pytest.mark.parametrize("stripped", [False, True])
def test_bytes_of_every_role_spell_it(stripped: bool) -> None:
    tokenizer = byte_tokenizer()
    pairs = every_pair(stripped=stripped)
    operands = ("operand 1", "operand 2")
    # Words of other lengths have other numbers of bytes; symbols have one.
    pairs = [pair for pair in pairs if len(pair.clean) == len(pair.corrupt)]
    found = found_in(tokenizer, pairs)
    assert found.names == ARITHMETIC_CONTRASTS
    assert found.roles == ARITHMETIC_ROLES
    assert len(found.prompts) > 10
    for prompt in found.prompts:
        pair = pairs[prompt.place]
        for role, text in words(pair).items():
            assert text_of(tokenizer, prompt, role) == text
        last = max(place for role in operands for place in prompt.roles[role])
        assert prompt.roles["end"] == list(range(last + 1, len(prompt.tokens)))


def check(tokenizer: PreTrainedTokenizerBase, pairs: list[Pair], found: Contrasts) -> None:
    """What must hold for any tokenizer."""
    for prompt in found.prompts:
        pair = pairs[prompt.place]
        tokens = tokenizer(pair.clean).input_ids
        assert prompt.tokens == tokens
        places = [place for own in prompt.roles.values() for place in own]
        assert sorted(places) == list(range(len(tokens)))
        for role, text in words(pair).items():
            assert text in text_of(tokenizer, prompt, role)
        for name, other in prompt.contrasts.items():
            changed = {i for i, (x, y) in enumerate(zip(tokens, other, strict=True)) if x != y}
            assert changed & set(prompt.roles[name])
            # A space before a word may be a token of its own, or a part of the word.
            assert changed <= {*prompt.roles[name], min(prompt.roles[name]) - 1}
        assert tokenizer.decode(prompt.contrasts["operator"]) == tokenizer.decode(
            tokenizer(pair.corrupt).input_ids
        )


def test_roles_of_a_sentencepiece_tokenizer() -> None:
    tokenizer, pairs = sentencepiece_like(), every_pair()
    found = found_in(tokenizer, pairs)
    assert len(found.prompts) + sum(found.dropped.values()) == len(pairs) == found.given
    assert len(found.prompts) > 20
    check(tokenizer, pairs, found)


def test_roles_of_a_real_tokenizer_agree_with_its_offsets(smollm2: Model) -> None:
    tokenizer, pairs = smollm2.tokenizer, every_pair()
    found = found_in(tokenizer, pairs)
    assert len(found.prompts) > 40
    check(tokenizer, pairs, found)
    for prompt in found.prompts:
        pair = pairs[prompt.place]
        offsets = tokenizer(pair.clean, return_offsets_mapping=True)["offset_mapping"]
        for role in ("operand 1", "operator", "operand 2"):
            (place,) = prompt.roles[role]
            start, end = offsets[place]
            assert pair.clean[start:end].strip() == words(pair)[role]


def test_the_other_operand_changes_the_answer_and_keeps_it_one_digit() -> None:
    tokenizer = byte_tokenizer()
    pairs = [
        write(problem, templates(operator)[0])
        for operator in Operator
        for problem in enumerate_problems(operator, low=1, high=9, max_answer=9)
    ]
    found = found_in(tokenizer, pairs)
    drawn: dict[str, set[str]] = {"operand 1": set(), "operand 2": set()}
    for prompt in found.prompts:
        pair = pairs[prompt.place]
        operator, read = Operator.parse(pair.task), words(pair)
        for name, digits in drawn.items():
            (place,) = prompt.roles[name]
            digit = tokenizer.decode([prompt.contrasts[name][place]])
            digits.add(digit)
            changed = read | {name: digit}
            result = operator.apply(int(changed["operand 1"]), int(changed["operand 2"]))
            assert 0 <= result <= 9
            assert str(result) != pair.answer
    assert all(len(digits) == 9 for digits in drawn.values())
    assert set(found.dropped) == {f"{name}: no other digit fits" for name in drawn}
    # 1 + 8 has no other first operand from one to nine.
    (hopeless,) = (p for p in pairs if p.clean.endswith("1 + 8 = "))
    assert pairs.index(hopeless) not in {prompt.place for prompt in found.prompts}


def test_the_same_seed_draws_the_same() -> None:
    pairs = every_pair()
    tokenizer = byte_tokenizer()
    assert found_in(tokenizer, pairs, 3) == found_in(tokenizer, pairs, 3)
    assert found_in(tokenizer, pairs, 3) != found_in(tokenizer, pairs, 4)


def own(clean: str, corrupt: str, group: str = "g") -> Pair:
    """A user's pair."""
    return Pair(clean, corrupt, "x", "mine", "own", "test", group)


def test_own_pairs_have_roles_around_what_differs() -> None:
    found = found_in(byte_tokenizer(), [own("ab+c+d", "ab-c-d"), own("abcd", "abce")])
    assert (found.names, found.roles) == (("changed",), OWN_ROLES)
    first, second = found.prompts
    assert first.roles == {"before": [0, 1], "changed": [2, 4], "after": [3], "end": [5]}
    assert second.roles == {"before": [0, 1, 2], "changed": [], "after": [], "end": [3]}
    assert byte_tokenizer().decode(first.contrasts["changed"]) == "ab-c-d"


@pytest.mark.parametrize(
    "change",
    [
        {"template": "add.equation.9"},
        {"task": "sums"},
        {"group": "3,4"},
        {"group": "three"},
        {"corrupt": "Math 1:\n3 & 5 = "},
        {"clean": "Math 2:\n3 + 5 = "},
    ],
)
def test_pairs_that_no_template_wrote_are_a_users_own(change: dict[str, str]) -> None:
    pair = write(Problem(Operator.ADD, 3, 5), templates(Operator.ADD)[0])
    assert found_in(byte_tokenizer(), [pair]).names == ARITHMETIC_CONTRASTS
    other = replace(pair, **change)
    assert found_in(byte_tokenizer(), [other]).names == ("changed",)
    assert found_in(byte_tokenizer(), [pair, other]).names == ("changed",)


def test_what_was_dropped_is_counted_by_reason() -> None:
    pairs = [own("ab", "cb"), own("ab", "cbd"), own("abc", "d")]
    found = found_in(byte_tokenizer(), pairs)
    assert [prompt.place for prompt in found.prompts] == [0]
    assert found.dropped == {"corrupt prompt of another length": 2}


@pytest.mark.parametrize("pairs", [[], [own("ab", "cde")]])
def test_nothing_left_is_an_error(pairs: list[Pair]) -> None:
    with pytest.raises(UserError, match=f"none of {len(pairs)} pairs has them"):
        found_in(byte_tokenizer(), pairs)


def test_a_sample_is_balanced_over_groups_and_of_one_half() -> None:
    pairs = [own(f"{n}ab", f"{n}cb", group=str(n % 3 if n < 12 else 3)) for n in range(10, 60)]
    pairs += [replace(own("xab", "xcb"), split="select")]
    found = found_in(byte_tokenizer(), pairs)
    sample = found.sample("test", 6, rng=np.random.default_rng(0))
    counts = Counter(prompt.group for prompt in sample.prompts)
    assert counts == {"1": 1, "2": 1, "3": 4}  # each group once before any comes twice
    assert all(prompt.split == "test" for prompt in sample.prompts)
    assert sample.given == 51
    everything = found.sample("select", 6, rng=np.random.default_rng(0))
    assert [prompt.place for prompt in everything.prompts] == [50]
