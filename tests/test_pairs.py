"""Pairs: one-token answers proven, halves kept apart, nothing kept that was not answered."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from circuitune import pairs
from circuitune.config import PairsConfig
from circuitune.errors import UserError
from circuitune.models import Model
from circuitune.pairs import (
    PREFIXES,
    Pair,
    PairSet,
    answer_rate,
    answers_correctly,
    encode,
    make_pairs,
    own_pairs,
    read_pairs,
)
from circuitune.stats import proportion
from circuitune.writing import Writing, encode_text, find_writing, pad, shipped_paragraphs
from tests.conftest import byte_tokenizer

TOKENIZER = byte_tokenizer()
SUM = Pair("3 + 5 = ", "3 @ 5 = ", "8", "add", "own", "select", "3,5")


def pair(clean: str, answer: str) -> Pair:
    """A pair that differs from `SUM` in its question."""
    return Pair(clean, SUM.corrupt, answer, "add", "own", "select", clean)


def spaced_tokenizer() -> PreTrainedTokenizerFast:
    """A space belongs to the sign after it, as in many tokenizers trained on words."""
    signs = [*"0123456789+-x/=", " "]
    words = ["?", *signs, *(f" {sign}" for sign in signs[:-1])]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, "?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("Z.*| ?[^ ]| "), "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?")


# --------------------------------------------------------------------------------- one token


def test_pairs_are_encoded_as_their_texts() -> None:
    encoded = encode(TOKENIZER, [SUM, pair("2 + 1 = ", "3"), pair("4 + 4 = ", "8")])
    assert [TOKENIZER.decode(ids) for ids in encoded.clean] == ["3 + 5 = ", "2 + 1 = ", "4 + 4 = "]
    assert [TOKENIZER.decode(ids) for ids in encoded.corrupt] == [SUM.corrupt] * 3
    assert [TOKENIZER.decode([token]) for token in encoded.candidates] == ["3", "8"]
    assert encoded.answers.tolist() == [1, 0, 1]
    assert encoded.groups == ["3,5", "2 + 1 = ", "4 + 4 = "]


def test_further_answers_are_candidates_if_they_are_one_token() -> None:
    encoded = encode(TOKENIZER, [SUM], answers=["1", "8", "12"])
    assert [TOKENIZER.decode([token]) for token in encoded.candidates] == ["1", "8"]
    assert encoded.answers.tolist() == [1]


def test_a_two_token_answer_is_refused_by_name() -> None:
    with pytest.raises(UserError, match=r"'13' after '6 \+ 7 = ' is not; shorten the answer"):
        encode(TOKENIZER, [SUM, pair("6 + 7 = ", "13")])


def test_an_answer_that_changes_its_prompt_is_refused() -> None:
    with pytest.raises(UserError, match="move the space"):
        encode(spaced_tokenizer(), [SUM, pair("2 + 1 = ", "3")])
    merging = Tokenizer(models.WordLevel({"?": 0, "x": 1, "a": 2, "ab": 3, "c": 4, "d": 5}, "?"))
    merging.pre_tokenizer = pre_tokenizers.Split(Regex("ab|."), "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=merging, unk_token="?")
    assert encode(tokenizer, [pair("xa", "c"), pair("xa", "d")]).candidates == (4, 5)
    with pytest.raises(UserError, match="'bc' after 'xa' is not"):  # x a, then x ab c
        encode(tokenizer, [pair("xa", "bc"), pair("xa", "d")])


def test_one_answer_alone_cannot_be_compared() -> None:
    for too_few in ([], [SUM, pair("4 + 4 = ", "8")]):
        with pytest.raises(UserError, match="at least two different answers"):
            encode(TOKENIZER, too_few)


def test_special_tokens_are_the_tokenizers_own_but_nothing_ends_a_prompt() -> None:
    tokenizer = byte_tokenizer()
    plain = encode_text(tokenizer, "1 + 1 = ")
    assert len(plain) == len("1 + 1 = ")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 256), ("</s>", 257)]
    )
    assert encode_text(tokenizer, "1 + 1 = ") == [256, *plain]
    assert encode(tokenizer, [SUM, pair("2 + 1 = ", "3")]).clean[0][0] == 256


# -------------------------------------------------------------------------- where the space is


def test_the_space_stays_where_digits_are_tokens_of_their_own() -> None:
    writing = find_writing(TOKENIZER, "Math:\n")
    assert writing == Writing("Math:\n", spaced_answer=False)
    assert writing.write("3 + 5 = ", "8") == ("Math:\n3 + 5 = ", "8")


def test_the_space_moves_into_the_answer_where_it_belongs_to_the_digit() -> None:
    writing = find_writing(spaced_tokenizer())
    assert writing == Writing("", spaced_answer=True)
    assert writing.write("3 + 5 = ", "8") == ("3 + 5 =", " 8")
    assert "space in front" in writing.policy


@given(st.text(), st.text(), st.text(min_size=1), st.booleans())
def test_both_ways_of_writing_give_the_same_text(
    prefix: str, prompt: str, answer: str, spaced: bool
) -> None:
    text, written = Writing(prefix, spaced).write(prompt.rstrip(" ") + " ", answer)
    assert text + written == prefix + prompt.rstrip(" ") + " " + answer


def test_digits_of_two_tokens_are_refused() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("7", "seven")
    with pytest.raises(UserError, match="pass your own one-token pairs with --pairs"):
        find_writing(tokenizer)


def test_unknown_digits_are_refused() -> None:
    """All ten digits must be told apart, not just be one token each."""
    words = {"?": 0, " ": 1, "+": 2, "=": 3}
    tokenizer = Tokenizer(models.WordLevel(words, "?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    with pytest.raises(UserError, match="each digit as one token"):
        find_writing(PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?"))


# ----------------------------------------------------------------------- what the model answers


def test_a_correct_answer_is_the_first_choice_among_all_tokens(tiny: Callable[..., Model]) -> None:
    model = tiny()
    prompts = [encode_text(TOKENIZER, text) for text in ("1 + 1 = ", "7 - 2 = ", "a longer text")]
    first = [int(model.hf(torch.tensor([ids])).logits[0, -1].argmax()) for ids in prompts]
    assert answers_correctly(model, prompts, first).tolist() == [True, True, True]
    first[1] = (first[1] + 1) % 256
    assert answers_correctly(model, prompts, first).tolist() == [True, False, True]


Oracle = Callable[[Callable[[str, str], bool]], None]


@pytest.fixture
def oracle(monkeypatch: pytest.MonkeyPatch) -> Oracle:
    """Let a rule on prompt and answer decide what the model knows; random weights know nothing."""

    def install(knows: Callable[[str, str], bool]) -> None:
        def hits(
            model: Model, prompts: Sequence[Sequence[int]], tokens: Sequence[int]
        ) -> np.ndarray:
            decode = model.tokenizer.decode
            texts = zip(prompts, tokens, strict=True)
            return np.array([knows(decode(ids), decode([token])) for ids, token in texts])

        monkeypatch.setattr(pairs, "answers_correctly", hits)

    return install


SMALL = PairsConfig(operators=("add", "sub", "+"), per_split=20)


def test_the_halves_share_no_operands(tiny: Callable[..., Model], oracle: Oracle) -> None:
    oracle(lambda prompt, answer: True)
    found = make_pairs(tiny(), SMALL)
    assert found.tasks == ["add", "sub"]  # a repeated operator counts once
    groups = {split: set() for split in ("select", "test")}
    for task in found.tasks:
        for split, inside in groups.items():
            half = found.of(task, split)
            assert len(half) == 20
            inside |= {item.group for item in half}
    assert not groups["select"] & groups["test"]
    assert groups["select"] <= set(found.selection["select_groups"])
    assert groups["test"] <= set(found.selection["held_out_groups"])
    assert not set(found.selection["select_groups"]) & set(found.selection["held_out_groups"])


def test_generated_pairs_are_right_and_one_token(
    tiny: Callable[..., Model], oracle: Oracle
) -> None:
    oracle(lambda prompt, answer: True)
    found = make_pairs(tiny(), SMALL)
    encoded = encode(TOKENIZER, found.pairs, found.selection["admissible"])
    assert len(encoded.candidates) == 10
    assert len({(item.clean, item.task) for item in found.pairs}) == len(found.pairs)
    for item in found.pairs:
        first, second = sorted(int(number) for number in item.group.split(","))
        wanted = {"add": {first + second}, "sub": {second - first, first - second}}
        assert int(item.answer) in wanted[item.task]
        assert item.clean != item.corrupt


def test_pairs_depend_on_the_seed_alone(tiny: Callable[..., Model], oracle: Oracle) -> None:
    oracle(lambda prompt, answer: True)
    found = [make_pairs(tiny(), PairsConfig(("add",), 10, seed=seed)) for seed in (0, 0, 1)]
    assert found[0] == found[1]
    assert found[0].pairs != found[2].pairs
    assert found[0].selection["held_out_groups"] != found[2].selection["held_out_groups"]


def test_only_answered_prompts_are_kept(tiny: Callable[..., Model], oracle: Oracle) -> None:
    oracle(lambda prompt, answer: answer in "3456")
    found = make_pairs(tiny(), PairsConfig(("add",), per_split=30))
    assert {item.answer for item in found.pairs} <= set("3456")
    facts = found.selection["tasks"]["add"]
    assert 0 < facts["correct"] < facts["tried"]
    assert facts["rate"] == facts["correct"] / facts["tried"]
    assert facts["low"] < facts["rate"] < facts["high"]
    assert facts["select"] == len(found.of("add", "select"))


def test_a_model_that_cannot_calculate_is_refused(
    tiny: Callable[..., Model], oracle: Oracle
) -> None:
    oracle(lambda prompt, answer: False)
    with pytest.raises(UserError, match="at least 8 prompts of add correctly in each half"):
        make_pairs(tiny(), SMALL)


def test_the_best_prefix_is_kept(tiny: Callable[..., Model], oracle: Oracle) -> None:
    oracle(lambda prompt, answer: prompt.startswith("Math:\n") or answer == "5")
    found = make_pairs(tiny(), PairsConfig(("add",), per_split=10))
    assert found.selection["prefix"] == "Math:\n"
    trials = {trial["prefix"]: trial["accuracy"] for trial in found.selection["prefixes"]}
    assert list(trials) == list(PREFIXES)
    assert trials["Math:\n"] == 1.0 > max(trials[p] for p in PREFIXES if p != "Math:\n")
    assert all(item.clean.startswith("Math:\n") for item in found.pairs)
    assert all(item.corrupt.startswith("Math:\n") for item in found.pairs)


def test_a_given_prefix_is_taken_or_refused(tiny: Callable[..., Model], oracle: Oracle) -> None:
    oracle(lambda prompt, answer: True)
    found = make_pairs(tiny(), PairsConfig(("add",), per_split=10, prefix="Sum: "))
    assert found.selection["prefix"] == "Sum: "
    model = tiny()
    merging = Model(**{**vars(model), "tokenizer": spaced_tokenizer()})
    with pytest.raises(UserError, match="each digit as one token"):
        make_pairs(merging, PairsConfig(("add",), per_split=10, prefix="Z"))


# ------------------------------------------------------------------------------------ own pairs

FIELDS = {"clean": "1 + 2 = ", "corrupt": "1 @ 2 = ", "answer": "3"}


def write(path: Path, records: Sequence[dict[str, object]]) -> Path:
    """A pairs file, with an empty line at the end of each."""
    path.write_text("".join(json.dumps(record) + "\n\n" for record in records))
    return path


def test_defaults_of_a_pairs_file(tmp_path: Path) -> None:
    path = write(tmp_path / "sums.jsonl", [FIELDS | {"comment": 3}])
    assert read_pairs(path) == [Pair(**FIELDS, task="sums", template="own", split="select",
                                     group="1 + 2 = ")]  # fmt: skip
    given = {"task": "add", "template": "t", "split": "test", "group": "1,2"}
    assert read_pairs(write(path, [FIELDS | given])) == [Pair(**FIELDS, **given)]


@given(st.lists(st.integers(0, 9), min_size=1, max_size=30), st.integers(0, 5))
def test_groups_are_shared_out_whole_and_by_the_seed_alone(numbers: list[int], seed: int) -> None:
    records = [FIELDS | {"clean": f"{i} = ", "group": str(n)} for i, n in enumerate(numbers)]
    with TemporaryDirectory() as folder:
        path = write(Path(folder) / "own.jsonl", records)
        found = read_pairs(path, seed=seed)
        assert found == read_pairs(path, seed=seed)
    halves = {split: {p.group for p in found if p.split == split} for split in ("select", "test")}
    assert not halves["select"] & halves["test"]
    assert 0 <= len(halves["select"]) - len(halves["test"]) <= 1
    assert [item.clean for item in found] == [record["clean"] for record in records]


def test_another_seed_gives_another_split(tmp_path: Path) -> None:
    records = [FIELDS | {"clean": f"{i} = "} for i in range(20)]
    path = write(tmp_path / "own.jsonl", records)
    assert read_pairs(path, seed=0) != read_pairs(path, seed=1)


def own(tmp_path: Path, count: int = 8) -> Path:
    """Own pairs of which half the answers are 3 and half 4."""
    numbers = range(count)
    records = [FIELDS | {"clean": f"{i} = ", "answer": "34"[i % 2]} for i in numbers]
    for i in numbers:
        records[i]["split"] = "select" if i < count // 2 else "test"
    return write(tmp_path / "own.jsonl", records)


def test_own_pairs_are_all_kept_unless_asked(
    tiny: Callable[..., Model], oracle: Oracle, tmp_path: Path
) -> None:
    oracle(lambda prompt, answer: answer == "3")
    path = own(tmp_path)
    found = own_pairs(tiny(), PairsConfig(pairs=str(path)))
    assert list(found.pairs) == read_pairs(path)
    facts = found.selection["tasks"]["own"]
    assert (facts["tried"], facts["correct"], facts["rate"]) == (8, 4, 0.5)
    assert (facts["select"], facts["test"]) == (4, 4)
    fewer = own_pairs(tiny(), PairsConfig(pairs=str(path), correct_only=True))
    assert [item.answer for item in fewer.pairs] == ["3"] * 4


def test_a_half_that_is_nearly_empty_is_refused(
    tiny: Callable[..., Model], oracle: Oracle, tmp_path: Path
) -> None:
    oracle(lambda prompt, answer: prompt.startswith(("0", "1", "4")))
    path = own(tmp_path)
    with pytest.raises(UserError, match="own keeps 1 in test; add pairs to"):
        own_pairs(tiny(), PairsConfig(pairs=str(path), correct_only=True))


# ---------------------------------------------------------------------------------- on disk


@given(st.lists(st.builds(Pair, *[st.text()] * 5, st.sampled_from(["select", "test"]), st.text())))
def test_pairs_survive_their_file(items: list[Pair]) -> None:
    """Whatever the texts hold: quotes, line breaks, Unicode line separators."""
    saved = PairSet((*items, pair("a\u2028b\x85c\r\n", "\n")), {"prefix": "\u2029"})
    with TemporaryDirectory() as folder:
        saved.save(Path(folder))
        assert PairSet.load(Path(folder)) == saved


def test_shipped_text() -> None:
    paragraphs = shipped_paragraphs()
    assert len(paragraphs) == len(set(paragraphs)) == 200
    assert all(len(text.split()) >= 10 for text in paragraphs)


def test_padding_is_on_the_right() -> None:
    assert pad([[1, 2, 3], [4]], 0).tolist() == [[1, 2, 3], [4, 0, 0]]


def test_the_rate_of_answers_knows_that_prompts_share_their_operands() -> None:
    alike = np.repeat([False, True] * 20, 4)
    related = [pair(f"{place // 4} = ", "8") for place in range(160)]
    alone = [pair(f"{place} = ", "8") for place in range(160)]
    wilson = proportion(80, 160)
    found = answer_rate(alike, related)
    assert found["rate"] == 0.5
    assert found["high"] - found["low"] > 1.8 * (wilson.high - wilson.low)
    apart = answer_rate(alike, alone)
    assert apart["high"] - apart["low"] == pytest.approx(wilson.high - wilson.low, rel=0.1)
