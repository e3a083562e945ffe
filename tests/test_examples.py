"""Training texts: every layout and file, what the loss covers, contamination, and bad data."""

import csv
import hashlib
import json
import sys
import types
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from circuitune.errors import UserError
from circuitune.examples import (
    IGNORED,
    Encoded,
    Example,
    Overlap,
    arithmetic_example,
    digest,
    overlap,
    preview,
    text_examples,
    to_examples,
)
from circuitune.problems import Operator, Problem
from circuitune.texts import Chat, Completion, Turn, read_training_data
from circuitune.writing import Writing, encode_text
from tests.conftest import byte_tokenizer

CHATML = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] "
    "+ '</s>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
# Earlier turns of the assistant lose what stands before their last </think>.
FORGETFUL = (
    "{% for message in messages %}{% set said = message['content'] %}"
    "{% if not loop.last and message['role'] == 'assistant' %}"
    "{% set said = said.split('</think>')[-1] %}{% endif %}"
    "{{ '<|' + message['role'] + '|>' + said + '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
TALK = [
    {"role": "system", "content": "Be short."},
    {"role": "user", "content": "1 + 1?"},
    {"role": "assistant", "content": "2"},
    {"role": "user", "content": "And 3 more?"},
    {"role": "assistant", "content": "5"},
]
TURNS = tuple(Turn(item["role"], item["content"]) for item in TALK)


def chatty(template: str | None = CHATML) -> PreTrainedTokenizerFast:
    """The byte tokenizer with a chat template."""
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def without_eos() -> PreTrainedTokenizerFast:
    """The byte tokenizer, which now knows no end mark."""
    return PreTrainedTokenizerFast(tokenizer_object=byte_tokenizer().backend_tokenizer)


def with_specials() -> PreTrainedTokenizerFast:
    """The byte tokenizer that writes a BOS and an EOS around every text."""
    inner = byte_tokenizer().backend_tokenizer
    marks = [("<s>", 256), ("</s>", 257)]
    inner.post_processor = processors.TemplateProcessing("<s> $A </s>", special_tokens=marks)
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>")


def merging() -> PreTrainedTokenizerFast:
    """Bytes, but a space and a letter, and two line breaks at the end of a text, are one token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    extra = ["\u0120B", "\u010a\u010a", "</s>"]
    vocab = {symbol: number for number, symbol in enumerate([*alphabet, *extra])}
    merges = [("\u0120", "B"), ("\u010a", "\u010a")]
    inner = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>")


def parts(tokenizer: PreTrainedTokenizerFast, example: Example) -> list[tuple[bool, str]]:
    """Runs of the text, each with whether it is supervised, by decoding the tokens themselves."""
    runs: list[tuple[bool, list[int]]] = []
    for token, label in zip(example.tokens, example.labels, strict=True):
        assert label in (token, IGNORED)
        if not runs or runs[-1][0] != (label != IGNORED):
            runs.append((label != IGNORED, []))
        runs[-1][1].append(token)
    return [(learned, tokenizer.decode(tokens)) for learned, tokens in runs]


def only(encoded: Encoded) -> Example:
    (example,) = encoded.examples
    return example


@pytest.fixture
def written(tmp_path: Path) -> Callable[..., Path]:
    """A JSON-lines file with the given records."""

    def write(*records: object, name: str = "data.jsonl") -> Path:
        path = tmp_path / name
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        return path

    return write


# ----------------------------------------------------------------------------------- layouts

ALPACA = {"instruction": "Add.", "input": "3, 4", "output": "7"}
ALPACA_PROMPT = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request.\n\n### Instruction:\n"
    "Add.\n\n### Input:\n3, 4\n\n### Response:\n"
)
BARE_PROMPT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes "
    "the request.\n\n### Instruction:\nAdd.\n\n### Response:\n"
)
GSM = {"question": "Two and two? ", "answer": "2+2=<<2+2=4>>4\n#### 4"}


@pytest.mark.parametrize(
    ("record", "prompt", "completion", "question"),
    [
        ({"prompt": "3+4=", "completion": "7"}, "3+4=", "7", "3+4="),
        ({"prompt": "3+4=", "completion": 7}, "3+4=", "7", "3+4="),
        ({"prompt": "", "completion": "Hello"}, "", "Hello", "Hello"),
        (ALPACA, ALPACA_PROMPT, "7", "Add.\n\n3, 4"),
        (ALPACA | {"input": ""}, BARE_PROMPT, "7", "Add."),
        (ALPACA | {"input": None}, BARE_PROMPT, "7", "Add."),
        ({"instruction": "Add.", "output": "7"}, BARE_PROMPT, "7", "Add."),
        (
            GSM,
            "Question: Two and two?\nAnswer:",
            " 2+2=<<2+2=4>>4\n#### 4",
            "Two and two?",
        ),
        (
            {"Body": "I had 5 and ate 2", "Question": "What is left?", "Answer": 3.0},
            "Question: I had 5 and ate 2. What is left?\nAnswer:",
            " 3",
            "I had 5 and ate 2. What is left?",
        ),
        (
            {"Body": "I had 5.", "Question": "Half?", "Answer": 2.5},
            "Question: I had 5. Half?\nAnswer:",
            " 2.5",
            "I had 5. Half?",
        ),
        (
            {"sQuestion": "5 and 2 ? ", "lSolutions": ["7"]},
            "Question: 5 and 2 ?\nAnswer:",
            " 7",
            "5 and 2 ?",
        ),
        (
            {"sQuestion": "5 and 2 ? ", "lSolutions": [7.0]},
            "Question: 5 and 2 ?\nAnswer:",
            " 7",
            "5 and 2 ?",
        ),
        ({"text": "Once upon a time."}, "", "Once upon a time.", "Once upon a time."),
    ],
)
def test_layouts(
    written: Callable[..., Path], record: dict, prompt: str, completion: str, question: str
) -> None:
    read = read_training_data(written(record | {"id": 3}))
    assert read.records == (Completion(prompt, completion, question),)
    assert read.questions == [question]


SHARED = [{"from": "human", "value": "1 + 1?"}, {"from": "gpt", "value": "2"}]


@pytest.mark.parametrize(
    ("record", "turns"),
    [
        ({"messages": TALK}, TURNS),
        ({"messages": json.dumps(TALK)}, TURNS),
        ({"conversations": SHARED}, TURNS[1:3]),
        ({"conversations": SHARED, "system": "Be short."}, TURNS[:3]),
        ({"conversations": [{"from": "system", "value": " "}, *SHARED]}, TURNS[1:3]),
        ({"conversations": TALK[1:3]}, TURNS[1:3]),
    ],
)
def test_chats(written: Callable[..., Path], record: dict, turns: tuple[Turn, ...]) -> None:
    read = read_training_data(written(record))
    assert read.records == (Chat(turns),)
    assert read.layout == "chat"
    assert read.questions[0].startswith("1 + 1?")


def test_what_was_detected_is_announced(written: Callable[..., Path]) -> None:
    """Blank records, of which public sets have some, are counted and left out."""
    path = written(GSM, GSM | {"answer": " "}, GSM | {"question": ""}, GSM)
    read = read_training_data(path)
    assert len(read.records) == 2
    said = "2 records of question and answer (columns question, answer), 2 blank ones left out."
    assert read.announcement == f"{path}: {said}"


def test_the_first_layout_that_fits_wins(written: Callable[..., Path]) -> None:
    assert read_training_data(written(GSM | {"messages": TALK})).layout == "chat"
    assert read_training_data(written(GSM | {"text": "all of it"})).layout == "question and answer"


def test_a_limit_draws_the_same_records_for_the_same_seed(written: Callable[..., Path]) -> None:
    path = written(*({"text": str(number)} for number in range(50)))
    drawn = [
        [item.completion for item in read_training_data(path, limit=5, seed=seed)]
        for seed in (1, 1, 2)
    ]
    assert drawn[0] == drawn[1] != drawn[2]
    assert sorted(drawn[0], key=int) == drawn[0]
    assert "drawn from 50 with seed 2" in read_training_data(path, limit=5, seed=2).announcement
    assert len(read_training_data(path, limit=99).records) == 50


# ------------------------------------------------------------------------------------- files

PAIRS = [{"prompt": "a,\u2028b", "completion": 'say "x"\n'}, {"prompt": "c", "completion": "NA"}]
EXPECTED = (Completion(PAIRS[0]["prompt"], 'say "x"\n', "a,\u2028b"), Completion("c", "NA", "c"))


def as_lines(path: Path) -> None:
    lines = [json.dumps(item, ensure_ascii=False) for item in PAIRS]
    path.write_text("\n\n".join(lines), encoding="utf-8-sig")


def as_csv(path: Path) -> None:
    with path.open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.DictWriter(file, ["prompt", "completion"])
        writer.writeheader()
        writer.writerows(PAIRS)


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("a.jsonl", as_lines),
        ("a.NDJSON", as_lines),
        ("a.json", as_lines),
        ("b.json", lambda path: path.write_text(json.dumps(PAIRS, indent=1))),
        ("c.json", lambda path: path.write_text(json.dumps({"version": 1, "data": PAIRS}))),
        ("a.csv", as_csv),
        ("a.parquet", lambda path: pd.DataFrame(PAIRS).to_parquet(path)),
    ],
)
def test_every_file_gives_the_same(
    tmp_path: Path, name: str, write: Callable[[Path], object]
) -> None:
    write(tmp_path / name)
    assert read_training_data(tmp_path / name).records == EXPECTED
    assert read_training_data(str(tmp_path / name)).records == EXPECTED


def test_one_record_may_be_the_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "one.json"
    path.write_text(json.dumps({"messages": TALK}))
    assert read_training_data(path).records == (Chat(TURNS),)


def test_chats_in_parquet(tmp_path: Path) -> None:
    pd.DataFrame({"messages": [TALK, TALK[1:3]]}).to_parquet(tmp_path / "a.parquet")
    read = read_training_data(tmp_path / "a.parquet")
    assert read.records == (Chat(TURNS), Chat(TURNS[1:3]))


def test_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load(*arguments: object, **further: object) -> list[dict]:
        asked.append((arguments, further))
        if arguments[0] == "absent":
            raise FileNotFoundError("no such set\nin the cache")
        return [GSM]

    library = types.ModuleType("datasets")
    library.load_dataset = load
    monkeypatch.setitem(sys.modules, "datasets", library)
    read = read_training_data("hub:openai/gsm8k:main")
    assert asked == [(("openai/gsm8k", "main"), {"split": "train"})]
    assert read.announcement.startswith("hub:openai/gsm8k:main: 1 records of question and answer")
    with pytest.raises(UserError, match="FileNotFoundError: no such set in the cache"):
        read_training_data("hub:absent")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"pip install 'circuitune\[data\]'"):
        read_training_data("hub:openai/gsm8k:main")


# ------------------------------------------------------------------------------------- masks


def test_the_loss_is_on_the_completion_and_its_end() -> None:
    tokenizer = chatty()
    encoded = to_examples(tokenizer, [Completion("3+4=", "7", "3+4=")], max_tokens=99)
    assert parts(tokenizer, only(encoded)) == [(False, "3+4="), (True, "7</s>")]
    assert only(encoded).supervised == 2


def test_without_an_eos_a_line_break_ends() -> None:
    tokenizer = without_eos()
    encoded = to_examples(tokenizer, [Completion("3+4=", "7", "")], max_tokens=99)
    assert parts(tokenizer, only(encoded)) == [(False, "3+4="), (True, "7\n")]


def test_all_tokens_but_the_first_can_be_supervised() -> None:
    tokenizer = byte_tokenizer()
    records = [Completion("3+4=", "7", ""), Chat(TURNS[1:3])]
    encoded = to_examples(tokenizer, records, max_tokens=99, supervise="all")
    assert [parts(tokenizer, item) for item in encoded.examples] == [
        [(False, "3"), (True, "+4=7</s>")],
        [(False, "u"), (True, "ser: 1 + 1?\nassistant: 2</s>")],
    ]
    whole = to_examples(chatty(), records[1:], max_tokens=99, supervise="all")
    shown = "|user|>1 + 1?</s>\n<|assistant|>2</s>\n"
    assert parts(tokenizer, only(whole)) == [(False, "<"), (True, shown)]


def test_plain_text_is_supervised_but_for_what_nothing_predicts() -> None:
    (example,) = text_examples(byte_tokenizer(), ["Once."], max_tokens=99)
    assert parts(byte_tokenizer(), example) == [(False, "O"), (True, "nce.</s>")]
    (example,) = text_examples(with_specials(), ["Once."], max_tokens=99)
    assert parts(byte_tokenizer(), example) == [(False, "<s>"), (True, "Once.</s>")]


def test_special_tokens_of_the_tokenizer_stand_once() -> None:
    tokenizer = with_specials()
    for answer in ("7", "7</s>"):
        encoded = to_examples(tokenizer, [Completion("3+4=", answer, "")], max_tokens=99)
        assert parts(tokenizer, only(encoded)) == [(False, "<s>3+4="), (True, "7</s>")]
    encoded = to_examples(tokenizer, [Chat(TURNS[1:])], max_tokens=99)
    assert parts(tokenizer, only(encoded)) == [
        (False, "<s>user: 1 + 1?\nassistant:"),
        (True, " 2</s>"),
        (False, "\nuser: And 3 more?\nassistant:"),
        (True, " 5</s>"),
    ]
    tokenizer.chat_template = "<s>" + CHATML
    encoded = to_examples(tokenizer, [Chat(TURNS[1:3])], max_tokens=99)
    assert parts(tokenizer, only(encoded)) == [
        (False, "<s><|user|>1 + 1?</s>\n<|assistant|>"),
        (True, "2</s>"),
        (False, "\n"),
    ]


def test_every_answer_of_a_chat_is_supervised() -> None:
    tokenizer = chatty()
    encoded = to_examples(tokenizer, [Chat(TURNS)], max_tokens=200)
    assert parts(tokenizer, only(encoded)) == [
        (False, "<|system|>Be short.</s>\n<|user|>1 + 1?</s>\n<|assistant|>"),
        (True, "2</s>"),
        (False, "\n<|user|>And 3 more?</s>\n<|assistant|>"),
        (True, "5</s>"),
        (False, "\n"),
    ]
    assert encoded.split == encoded.merged == 0


@pytest.mark.parametrize(
    ("tokenizer", "end"), [(byte_tokenizer(), "</s>"), (without_eos(), "\n")], ids=["eos", "none"]
)
def test_chats_without_a_template(tokenizer: PreTrainedTokenizerFast, end: str) -> None:
    encoded = to_examples(tokenizer, [Chat(TURNS)], max_tokens=200)
    between = "\n" if end == "</s>" else ""
    assert parts(tokenizer, only(encoded)) == [
        (False, "system: Be short.\nuser: 1 + 1?\nassistant:"),
        (True, f" 2{end}"),
        (False, f"{between}user: And 3 more?\nassistant:"),
        (True, f" 5{end}"),
    ]


def test_the_template_is_left_and_taken_on_demand() -> None:
    tokenizer = chatty()
    plain = to_examples(tokenizer, [Chat(TURNS[1:3])], max_tokens=99, chat=False)
    assert parts(tokenizer, only(plain)) == [
        (False, "user: 1 + 1?\nassistant:"),
        (True, " 2</s>"),
    ]
    record = Completion("Question: 1 + 1?\nAnswer:", " 2", "1 + 1?")
    turned = to_examples(tokenizer, [record], max_tokens=99, chat=True)
    assert turned == to_examples(tokenizer, [Chat(TURNS[1:3])], max_tokens=99)
    text = Completion("", "Once.", "Once.")
    assert to_examples(tokenizer, [text], max_tokens=99, chat=True).examples == (
        *text_examples(tokenizer, ["Once."], max_tokens=99),
    )


def test_a_template_that_rewrites_earlier_turns_gives_an_example_for_each() -> None:
    """What is learned is what the template writes when the model is asked at that turn."""
    tokenizer = chatty(FORGETFUL)
    said = [Turn("assistant", f"<think>{word}</think>{word}") for word in ("a", "b")]
    turns = (TURNS[1], said[0], TURNS[3], said[1])
    encoded = to_examples(tokenizer, [Chat(turns), Chat(TURNS[1:])], max_tokens=200)
    assert [parts(tokenizer, item) for item in encoded.examples[:2]] == [
        [(False, "<|user|>1 + 1?</s><|assistant|>"), (True, "<think>a</think>a</s>")],
        [
            (False, "<|user|>1 + 1?</s><|assistant|>a</s><|user|>And 3 more?</s><|assistant|>"),
            (True, "<think>b</think>b</s>"),
        ],
    ]
    assert (encoded.split, len(encoded.examples)) == (1, 3)
    assert "1 were split, since the chat template rewrites earlier turns" in encoded.summary


def test_what_the_template_asks_with_is_not_supervised() -> None:
    """Some templates open the reasoning themselves, and write the opening once."""
    opening = CHATML.replace("'<|assistant|>' }}{% endif", "'<|assistant|><think>' }}{% endif")
    tokenizer = chatty(opening)
    turns = (TURNS[1], Turn("assistant", "<think>easy</think>2"))
    example = only(to_examples(tokenizer, [Chat(turns)], max_tokens=99))
    assert parts(tokenizer, example)[1] == (True, "easy</think>2</s>")
    example = only(to_examples(tokenizer, [Chat(TURNS[1:3])], max_tokens=99))
    assert parts(tokenizer, example)[1] == (True, "2</s>")


def test_a_template_without_an_end_mark_gets_one() -> None:
    template = CHATML.replace(" + '</s>\n'", "")
    tokenizer = chatty(template)
    example = only(to_examples(tokenizer, [Chat(TURNS[1:3])], max_tokens=99))
    assert parts(tokenizer, example)[1:] == [(True, "2</s>")]
    example = only(to_examples(tokenizer, [Chat(TURNS[1:4])], max_tokens=99))
    assert parts(tokenizer, example)[1:] == [(True, "2"), (False, "<|user|>And 3 more?")]


def test_an_answer_to_nothing_is_not_supervised() -> None:
    for tokenizer in (chatty(), byte_tokenizer()):
        turns = (Turn("assistant", "Hello!"), *TURNS[1:3])
        example = only(to_examples(tokenizer, [Chat(turns)], max_tokens=99))
        assert [text.strip() for learned, text in parts(tokenizer, example) if learned] == ["2</s>"]


# --------------------------------------------------------------------- borders and lengths


def test_a_token_over_the_border_belongs_to_the_completion() -> None:
    tokenizer = merging()
    encoded = to_examples(tokenizer, [Completion("A: ", "B!", "")], max_tokens=99)
    assert parts(tokenizer, only(encoded)) == [(False, "A:"), (True, " B!</s>")]
    assert encoded.merged == 1
    assert "1 have a token that spans prompt and completion" in encoded.summary
    clean = to_examples(tokenizer, [Completion("A:", " B!", "")], max_tokens=99)
    assert clean.examples == encoded.examples
    assert clean.merged == 0
    assert "spans" not in clean.summary


def test_the_unsupervised_start_is_a_start_of_the_prompts_own_tokens() -> None:
    """Also where no token spans the border, but the prompt's last ones fall otherwise."""
    tokenizer = merging()
    prompts = ["A:", "A: ", "A\n\n", "A\n\n\n", " B ", "A  "]
    records = [Completion(prompt, text, "") for prompt in prompts for text in ("B", "x", "\n", "7")]
    encoded = to_examples(tokenizer, records, max_tokens=99)
    counted = 0
    for record, example in zip(records, encoded.examples, strict=True):
        alone = tokenizer(record.prompt).input_ids
        start = len(example.tokens) - example.supervised
        assert example.tokens[:start] == alone[:start]
        assert tokenizer.decode(example.tokens) == f"{record.prompt}{record.completion}</s>"
        learned = tokenizer.decode(example.tokens[start:])
        assert learned.endswith(f"{record.completion}</s>")
        counted += start < len(alone)
    assert 0 < counted == encoded.merged < len(records)


def test_long_texts_lose_their_end() -> None:
    tokenizer = byte_tokenizer()
    records = [
        Completion("ab", "cdefgh", ""),
        Completion("abcdefgh", "i", ""),
        Completion("a", "bcd", ""),
        Chat((Turn("user", "no answer"),)),
    ]
    encoded = to_examples(tokenizer, records, max_tokens=5)
    assert [parts(tokenizer, item) for item in encoded.examples] == [
        [(False, "ab"), (True, "cde")],
        [(False, "a"), (True, "bcd</s>")],
    ]
    assert encoded.facts == {
        "records": 4,
        "examples": 2,
        "tokens": 10,
        "supervised": 7,
        "longest": 5,
        "median": 5,
        "truncated": 1,
        "dropped": 2,
        "merged": 0,
        "split": 0,
    }
    assert encoded.summary == (
        "4 records gave 2 examples of 10 tokens, 7 of them supervised (median length 5, longest "
        "5); 1 were cut at 5 tokens; 2 had nothing supervised within 5 tokens and were dropped."
    )


def test_arithmetic_ends_with_a_line_break() -> None:
    """As prompts and answers are written for measuring: the same tokens, the line break last."""
    problem = Problem(Operator.parse("+"), 12, 7)
    for writing, prompt, answer in (
        (Writing("", False), "12 + 7 = ", "19\n"),
        (Writing("\n", True), "\n12 + 7 =", " 19\n"),
    ):
        tokenizer = byte_tokenizer()
        example = arithmetic_example(tokenizer, problem, writing)
        assert parts(tokenizer, example) == [(False, prompt), (True, answer)]
        assert example.tokens == encode_text(tokenizer, prompt + answer)
    inner = merging().backend_tokenizer
    inner.add_tokens([" 1"])
    odd = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>")
    with pytest.raises(UserError, match="A prompt must keep its tokens"):
        arithmetic_example(odd, problem, Writing("", False))


# ------------------------------------------------------------------------ preview and digest


def test_the_preview_shows_the_mask() -> None:
    tokenizer = chatty()
    example = only(to_examples(tokenizer, [Chat(TURNS[1:])], max_tokens=99))
    shown = preview(tokenizer, example)
    assert shown.plain == (
        "<|user|>1 + 1?</s>\n<|assistant|>⟦2</s>⟧\n<|user|>And 3 more?</s>\n<|assistant|>⟦5</s>⟧\n"
    )
    bold = [shown.plain[span.start : span.end] for span in shown.spans if "bold" in str(span.style)]
    assert bold == ["⟦2</s>⟧", "⟦5</s>⟧"]
    dim = [shown.plain[span.start : span.end] for span in shown.spans if "dim" in str(span.style)]
    assert "".join(dim) == shown.plain.replace("⟦2</s>⟧", "").replace("⟦5</s>⟧", "")


def test_the_preview_is_safe_and_keeps_letters() -> None:
    tokenizer = byte_tokenizer()
    record = Completion("\x1b[31m[bold]caf\N{LATIN SMALL LETTER E WITH ACUTE}", "é", "")
    shown = preview(tokenizer, only(to_examples(tokenizer, [record], max_tokens=99)))
    assert shown.plain == "\N{REPLACEMENT CHARACTER}[31m[bold]café⟦é</s>⟧"


def test_the_digest_tells_tokens_and_labels() -> None:
    one, other = Example([1, 2], [IGNORED, 2]), Example([3], [IGNORED])
    assert digest([one, other]) == digest([one, other])
    different = [
        [one, other],
        [other, one],
        [one],
        [],
        [Example([1, 2], [IGNORED, IGNORED]), other],
        [Example([1, 2, 3], [IGNORED, 2, IGNORED])],
    ]
    assert len({digest(examples) for examples in different}) == len(different)
    # SHA-256 of the little-endian 64-bit words 1, 3, -100.
    known = bytes([1, *[0] * 7, 3, *[0] * 7, 156, *[255] * 7])
    assert digest([other]) == hashlib.sha256(known).hexdigest()


# ------------------------------------------------------------------------------ contamination

PROBLEM = "Tom has 1,000.50 dollars and spends 4 of them. How many are left?"


@pytest.mark.parametrize(
    ("train", "test", "kind"),
    [
        (PROBLEM, PROBLEM, "exact"),
        (PROBLEM.upper(), PROBLEM, "normalised"),
        (
            "tom has  1000.5 dollars, and spends 4.0 of them; how many are left",
            PROBLEM,
            "normalised",
        ),
        ("3 + 5 =", "3+5", None),
        ("3 + 5", "3+5", "normalised"),
        ("3 + 5", "3 - 5", None),
        ("12 \N{MULTIPLICATION SIGN} 5 \N{MINUS SIGN} 1", "12*5-1", "normalised"),
        ("a 120-page book", "A 120 page book", "normalised"),
        ("Lists: 3,4", "lists 34", None),
        ("take .5 of 007", "Take 0.50 of 7", "normalised"),
        ("He has 10 apples", "He has 1 apples", None),
        (f"Solve this. {PROBLEM} Think.", PROBLEM, "contained"),
        (PROBLEM.replace("4 of", "5 of"), PROBLEM, None),
        (PROBLEM, f"{PROBLEM} And then?", None),
        ("What is 3 + 5 exactly?", "3 + 5", None),
        ("!!!", "?", None),
    ],
)
def test_contamination(train: str, test: str, kind: str | None) -> None:
    found = overlap(["Other text.", train], ["Unseen.", test])
    assert found == ([] if kind is None else [Overlap(1, 1, kind)])


def test_every_place_is_returned_in_order() -> None:
    found = overlap(["b b", "A", "a!"], ["a", "B, b", "a"])
    assert [(item.test, item.train) for item in found] == [(0, 1), (0, 2), (1, 0), (2, 1), (2, 2)]


# ----------------------------------------------------------------------------------- bad data


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.jsonl", b"", "is empty; check the file"),
        ("a.json", b"[]", "has none; check the file"),
        ("a.csv", b"prompt,completion\n", "has none; check the file"),
        ("a.json", b"[1, 2", r"must be json as its name says, .*a.json is not"),
        ("a.jsonl", b'{"text": "a"}\n{"text"', r"is not \(line 2: "),
        ("a.json", b"[" * 100_000, "must be json as its name says"),
        ("a.jsonl", b'{"text": "\xff"}', "must be UTF-8 text as its name says"),
        ("a.csv", b"text\n\xff\n", "must be UTF-8 text as its name says"),
        ("a.csv", b"prompt,completion\na\n", "line 2 has not as many cells as the first line"),
        ("a.csv", b"prompt,completion\na,b,c\n", "line 2 has not as many cells"),
        ("a.csv", b'text\n"open\n', "must be csv as its name says"),
        ("a.parquet", b"no table", "must be parquet as its name says"),
        ("a.txt", b"plain", r"must be one of .json, .*found .*a.txt; convert the file"),
        ("a.json", b'{"a": 1, "b": [1], "c": [2]}', "has a, b, c; rename its columns"),
        ("a.jsonl", b"[1]\n", "has no columns"),
        ("a.csv", b"frage,antwort\n1,2\n", r"prompt, completion; .*has frage, antwort; rename"),
    ],
)
def test_files_that_cannot_be_read(tmp_path: Path, name: str, content: bytes, says: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=says) as caught:
        read_training_data(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_files_that_are_not_there(tmp_path: Path) -> None:
    (tmp_path / "folder.json").mkdir()
    for name in ("nowhere.json", "folder.json"):
        with pytest.raises(UserError, match=r"must be a readable file, .* is not .*check the path"):
            read_training_data(tmp_path / name)


@pytest.mark.parametrize(
    ("record", "says"),
    [
        ({"prompt": 3, "completion": "a"}, "prompt must be a text, record 2 of .* has 3"),
        ({"prompt": "a", "completion": True}, "completion must be a text, record 2 of .* has True"),
        ({"prompt": "a"}, "completion must be a text, record 2 of .* has None"),
        ({"prompt": "\ud800", "completion": "a"}, "prompt must be a text"),
        ([1], "prompt must be a text, record 2 of"),
        ({"prompt": ["long"] * 99, "completion": "a"}, r"has \['long', .{60,75}\.\.\.; correct"),
    ],
)
def test_records_that_cannot_be_used(
    written: Callable[..., Path], record: object, says: str
) -> None:
    with pytest.raises(UserError, match=says):
        read_training_data(written({"prompt": "1+1=", "completion": "2"}, record))


@pytest.mark.parametrize(
    ("record", "says"),
    [
        ({"messages": "hello"}, "messages must be a list, record 1 of .* has 'hello'"),
        ({"messages": []}, "messages must be a list"),
        ({"messages": ["hello"]}, "a list of turns with a role and a text each, turn 1 of record"),
        ({"messages": [{"role": "user"}]}, "content must be a text, turn 1 of record 1 of"),
        (
            {"messages": [TALK[1], {"role": "assistant", "content": None}]},
            "content must be a text, turn 2 of record 1 of .* has None",
        ),
        (
            {"messages": [{"role": "wizard", "content": "a"}]},
            "role must be one of system, user, human, assistant, gpt, turn 1 .* has 'wizard'",
        ),
        ({"conversations": [{"from": "gpt", "text": "a"}]}, "value must be a text"),
        ({"sQuestion": "a?", "lSolutions": []}, "lSolutions must be a list"),
        ({"sQuestion": "a?", "lSolutions": [[1]]}, r"lSolutions must be a text, .* has \[1\]"),
        ({"instruction": "a", "input": 3, "output": "b"}, "input must be a text"),
        ({"text": " "}, "all 1 records of .* are blank in text"),
        ({"messages": [TALK[1], {"role": "assistant", "content": ""}]}, "are blank in messages"),
    ],
)
def test_single_records_that_cannot_be_used(
    written: Callable[..., Path], record: dict, says: str
) -> None:
    with pytest.raises(UserError, match=says):
        read_training_data(written(record))


def test_limits_that_cannot_be(written: Callable[..., Path]) -> None:
    with pytest.raises(UserError, match="must be at least 1, found 0"):
        read_training_data(written(GSM), limit=0)
    with pytest.raises(UserError, match="at least 2 tokens, found 1"):
        to_examples(byte_tokenizer(), [Completion("a", "b", "")], max_tokens=1)


@pytest.mark.parametrize(
    "records",
    [
        [],
        [Completion("a long prompt", "b", "")],
        [Chat((Turn("user", "a"), Turn("user", "b")))],
        [Chat((Turn("assistant", "a"), Turn("user", "b")))],
    ],
)
@pytest.mark.parametrize("tokenizer", [byte_tokenizer(), chatty()], ids=["plain", "chat"])
def test_nothing_to_learn(records: list, tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(UserError, match="nothing is supervised within 5 tokens; allow more tokens"):
        to_examples(tokenizer, records, max_tokens=5)


def test_templates_that_cannot_be_used() -> None:
    chat = [Chat(TURNS[1:3])]
    with pytest.raises(UserError, match="needs a tokenizer with a chat template, this one has"):
        to_examples(byte_tokenizer(), chat, max_tokens=99, chat=True)
    strict = chatty("{{ raise_exception('Only the weather.') }}")
    with pytest.raises(UserError, match=r"the one with '1 \+ 1\?' it cannot \(Only the weather"):
        to_examples(strict, chat, max_tokens=99)
    deaf = chatty(CHATML.replace("message['content']", "'...'"))
    with pytest.raises(UserError, match="that of this tokenizer changes '2'; take that record out"):
        to_examples(deaf, chat, max_tokens=99)
