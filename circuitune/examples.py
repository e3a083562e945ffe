r"""Training texts as tokens and labels: what the loss covers, and how to look at it.

The loss covers completions only, unless all is asked for:

1. A text is tokenised as a whole. Supervision starts where its tokens leave those of the prompt
   alone: a token that spans the border belongs to the completion, and all that stands in front of
   it is what the model sees when it is asked.
2. A chat follows the tokenizer's chat template; what the template writes for an assistant's turn
   is found by writing growing prefixes of the conversation. Where a template writes earlier turns
   otherwise than the last one (it drops their reasoning), each assistant's turn becomes an example
   of its own. Without a template a turn is a line ``role: text``. A first turn of the assistant
   answers nothing and is not supervised.
3. A completion ends with the tokenizer's EOS, without one with a line break; a template writes its
   own end. Generated arithmetic ends with a line break.
4. A text of more than ``max_tokens`` loses its end. One that keeps nothing supervised is dropped.
"""

import hashlib
import re
import statistics
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Literal

import numpy as np
from jinja2 import TemplateError
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from circuitune.errors import UserError
from circuitune.problems import Problem, completion
from circuitune.texts import Chat, Completion, Record, Turn
from circuitune.texts import read_training_data as read_training_data
from circuitune.writing import Writing, encode_text

IGNORED = -100  # label of positions without a loss, the convention of torch's cross entropy
CONTAINED_WORDS = 8  # a test problem of fewer words inside a longer text may be chance
Supervise = Literal["completion", "all"]


@dataclass(frozen=True)
class Example:
    """One training text.

    Attributes:
        tokens: token ids.
        labels: as many; the token itself where it is supervised, elsewhere ``IGNORED``.
    """

    tokens: list[int]
    labels: list[int]

    @property
    def supervised(self) -> int:
        """Number of supervised tokens."""
        return sum(label != IGNORED for label in self.labels)


@dataclass(frozen=True)
class Encoded:
    """Examples, and what became of the records.

    Attributes:
        examples: the examples, in the order of the records.
        records: number of records.
        limit: most tokens of an example.
        truncated: examples that were cut at the limit.
        dropped: examples that had nothing supervised within the limit.
        merged: examples in which a token spans a prompt and its completion.
        split: records that gave an example for each assistant's turn.
    """

    examples: tuple[Example, ...]
    records: int
    limit: int
    truncated: int
    dropped: int
    merged: int
    split: int

    @property
    def facts(self) -> dict[str, int]:
        """All counts, and the lengths in tokens, for a record."""
        lengths = [len(example.tokens) for example in self.examples]
        return {
            "records": self.records,
            "examples": len(lengths),
            "tokens": sum(lengths),
            "supervised": sum(example.supervised for example in self.examples),
            "longest": max(lengths),
            "median": round(statistics.median(lengths)),
            "truncated": self.truncated,
            "dropped": self.dropped,
            "merged": self.merged,
            "split": self.split,
        }

    @property
    def summary(self) -> str:
        """One sentence for the user."""
        facts = self.facts
        said = (
            f"{facts['records']} records gave {facts['examples']} examples of {facts['tokens']} "
            f"tokens, {facts['supervised']} of them supervised (median length {facts['median']}, "
            f"longest {facts['longest']})"
        )
        told = {
            f"were cut at {self.limit} tokens": self.truncated,
            f"had nothing supervised within {self.limit} tokens and were dropped": self.dropped,
            "have a token that spans prompt and completion, so that the loss starts with it": (
                self.merged
            ),
            "were split, since the chat template rewrites earlier turns": self.split,
        }
        further = [f"{count} {what}" for what, count in told.items() if count]
        return f"{'; '.join([said, *further])}."


# --------------------------------------------------------------------- records to examples


def to_examples(
    tokenizer: PreTrainedTokenizerBase,
    records: Iterable[Record],
    *,
    max_tokens: int,
    supervise: Supervise = "completion",
    chat: bool | None = None,
) -> Encoded:
    """Tokenise records and mark what is supervised, see the module's docstring.

    Args:
        tokenizer: the model's tokenizer.
        records: from ``circuitune.texts``.
        max_tokens: most tokens of an example.
        supervise: completions only, or all tokens but the first, which nothing predicts.
        chat: write also prompts and completions as turns in the tokenizer's chat template (True),
            or also chats without it (False); None writes chats in it where there is one.

    Raises:
        UserError: nothing is supervised, or the chat template is absent or unusable.
    """
    if max_tokens < 2:
        raise UserError(f"A text must have at least 2 tokens, found {max_tokens}; allow more.")
    if chat and tokenizer.chat_template is None:
        raise UserError(
            "Writing turns needs a tokenizer with a chat template, this one has none; choose an "
            "instruction-tuned model or leave the chat option out."
        )
    listed = list(records)
    examples = []
    truncated = dropped = merged = split = 0
    for record in listed:
        written = _write(tokenizer, record, supervise, chat)
        split += len(written) > 1
        for item in written:
            whole, spans_border = _labelled(tokenizer, item)
            example = Example(whole.tokens[:max_tokens], whole.labels[:max_tokens])
            if not example.supervised:
                dropped += 1
                continue
            examples.append(example)
            truncated += len(whole.tokens) > max_tokens
            merged += spans_border
    if not examples:
        raise UserError(
            f"Training data must have something to learn, in all {len(listed)} records nothing is "
            f"supervised within {max_tokens} tokens; allow more tokens, or give prompts a "
            "completion and chats a turn of the assistant after one of the user."
        )
    return Encoded(tuple(examples), len(listed), max_tokens, truncated, dropped, merged, split)


def text_examples(
    tokenizer: PreTrainedTokenizerBase, texts: Iterable[str], *, max_tokens: int
) -> list[Example]:
    """Plain texts as examples in which every token but the first is supervised.

    Raises:
        UserError: there is no text.
    """
    records = [Completion("", text, text) for text in texts]
    return list(to_examples(tokenizer, records, max_tokens=max_tokens).examples)


def arithmetic_example(
    tokenizer: PreTrainedTokenizerBase, problem: Problem, writing: Writing
) -> Example:
    """Prompt, answer and a line break, which tells the model to stop; loss on the last two.

    Raises:
        UserError: the tokenizer merges the prompt with the answer.
    """
    prompt, answer = writing.write(*completion(problem))
    whole = encode_text(tokenizer, f"{prompt}{answer}\n")
    before = encode_text(tokenizer, prompt)
    if whole[: len(before)] != before:
        raise UserError(
            f"A prompt must keep its tokens when the answer follows, {prompt!r} does not; use a "
            "tokenizer that writes numbers digit by digit."
        )
    return Example(whole, [IGNORED] * len(before) + whole[len(before) :])


@dataclass(frozen=True)
class _Written:
    """A text and its supervised parts, before it is tokenised.

    Attributes:
        text: the whole text.
        spans: first and end character of each supervised part.
        special: whether the tokenizer adds its BOS; a chat template has written it already.
        end: whether the EOS is still to follow, supervised.
    """

    text: str
    spans: tuple[tuple[int, int], ...]
    special: bool
    end: bool


def _write(
    tokenizer: PreTrainedTokenizerBase, record: Record, supervise: Supervise, chat: bool | None
) -> list[_Written]:
    """One text for a record, or several where the chat template does not grow."""
    if isinstance(record, Completion) and chat and record.prompt:
        asked, answer = Turn("user", record.question), Turn("assistant", record.completion.strip())
        record = Chat((asked, answer))
    if isinstance(record, Completion):
        written = [_joined(tokenizer, record)]
    elif chat is False or tokenizer.chat_template is None:
        written = [_lines(tokenizer, record.turns)]
    elif supervise == "all":
        whole = _render(tokenizer, record.turns)
        written = [_Written(whole, (), special=False, end=False)]
    else:
        written = _templated(tokenizer, record.turns)
    if supervise == "all":
        written = [_Written(x.text, ((0, len(x.text)),), x.special, x.end) for x in written]
    return written


def _joined(tokenizer: PreTrainedTokenizerBase, record: Completion) -> _Written:
    """Prompt and completion as they are; an EOS that the data bring along is not doubled."""
    mark = tokenizer.eos_token or ""
    text = record.prompt + record.completion.removesuffix(mark) + ("" if mark else "\n")
    spans = ((len(record.prompt), len(text)),)
    return _Written(text, spans, special=True, end=bool(mark))


def _lines(tokenizer: PreTrainedTokenizerBase, turns: Sequence[Turn]) -> _Written:
    """A line ``role: text`` for each turn, for tokenizers without a chat template."""
    mark = tokenizer.eos_token or ""
    text, spans = "", []
    for place, turn in enumerate(turns):
        text += f"{turn.role}:"
        start = len(text)
        text += f" {turn.text.strip()}"
        last = place == len(turns) - 1
        if turn.role == "assistant":
            text += "" if last else mark  # the last one's is added as a token
            spans += [(start, len(text) + (not mark))] if place else []
        text += "" if last and mark else "\n"
    end = bool(mark) and turns[-1].role == "assistant"
    return _Written(text, tuple(spans), special=True, end=end)


def _templated(tokenizer: PreTrainedTokenizerBase, turns: Sequence[Turn]) -> list[_Written]:
    """The conversation with what the template writes for the assistant's turns."""
    whole = _render(tokenizer, turns)
    parts: list[_Written] = []
    for place, turn in enumerate(turns):
        if turn.role != "assistant" or not place:
            continue
        before = _render(tokenizer, turns[:place], ask=True)
        after = whole if place == len(turns) - 1 else _render(tokenizer, turns[: place + 1])
        start = _shared(before, after)
        said = turn.text.strip()
        if said not in after or after.rindex(said) + len(said) <= start:
            raise UserError(
                "The chat template must write an assistant's turn as it is, that of this "
                f"tokenizer changes {turn.text[:60]!r}; take that record out or write chats "
                "without the template."
            )
        mark = after.rfind(tokenizer.eos_token or "\0", start)
        stop = len(after) if mark < 0 else mark + len(tokenizer.eos_token)
        # A template that ends a turn with nothing would not teach where to stop.
        bare = tokenizer.eos_token_id is not None and after.endswith(said)
        parts.append(_Written(after, ((start, stop),), special=False, end=bare))
    if not all(whole.startswith(part.text) for part in parts):
        return parts
    spans = tuple(span for part in parts for span in part.spans)
    end = bool(parts) and parts[-1].end and parts[-1].text == whole
    return [_Written(whole, spans, special=False, end=end)]


def _render(tokenizer: PreTrainedTokenizerBase, turns: Sequence[Turn], *, ask: bool = False) -> str:
    """The turns as the chat template writes them; with ``ask`` up to the assistant's next turn."""
    messages = [{"role": turn.role, "content": turn.text} for turn in turns]
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=ask)
    except (TemplateError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            "The tokenizer's chat template must be able to write every chat, the one with "
            f"{turns[0].text[:60]!r} it cannot ({reason}); correct that record or "
            "write chats without the template."
        ) from error


def _labelled(tokenizer: PreTrainedTokenizerBase, written: _Written) -> tuple[Example, bool]:
    """Tokens and labels of a text, and whether a token spans the start of a supervised part."""

    def raw(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=written.special, verbose=False).input_ids)

    # A special token that the tokenizer appends must not stand between the text and its end mark.
    plain = (lambda text: encode_text(tokenizer, text)) if written.special else raw
    tokens = list(plain(written.text))
    labels = [IGNORED] * len(tokens)
    merged = False
    for start, stop in written.spans:
        before = plain(written.text[:start])
        first = _shared(before, tokens)
        merged |= bool(start) and first < len(before)
        whole = stop == len(written.text)
        last = len(tokens) if whole else _shared(raw(written.text[:stop]), tokens)
        labels[first:last] = tokens[first:last]
    if written.end:
        tokens.append(tokenizer.eos_token_id)
        labels.append(tokenizer.eos_token_id)
    labels[:1] = [IGNORED] * len(labels[:1])  # nothing predicts the first token
    return Example(tokens, labels), merged


def _shared(start: Sequence[int] | str, whole: Sequence[int] | str) -> int:
    """How many first tokens, or characters, two sequences have in common."""
    if whole[: len(start)] == start:
        return len(start)
    pairs = zip(start, whole, strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


# ------------------------------------------------------------------- looking at examples


def preview(tokenizer: PreTrainedTokenizerBase, example: Example) -> Text:
    """The text of an example; what is supervised stands bold between the marks ⟦ and ⟧.

    ``.plain`` of the result is the same without colours.
    """
    borders = [
        place
        for place in range(1, len(example.labels))
        if (example.labels[place] == IGNORED) != (example.labels[place - 1] == IGNORED)
    ]
    shown = Text()
    done = ""
    for start, stop in zip([0, *borders], [*borders, len(example.tokens)], strict=True):
        # Growing prefixes: some tokenizers drop the space in front of a text of its own.
        text = tokenizer.decode(example.tokens[:stop], clean_up_tokenization_spaces=False)
        new = "".join(
            c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}"
            for c in text[_shared(done, text) :]
        )
        done = text
        if example.labels[start] == IGNORED:
            shown.append(new, style="dim")
        else:
            shown.append(f"⟦{new}⟧", style="bold green")
    return shown


def digest(examples: Iterable[Example]) -> str:
    """SHA-256 over tokens and labels, which tells whether a model was tuned on the same data."""
    found = hashlib.sha256()
    for example in examples:
        row = [len(example.tokens), *example.tokens, *example.labels]
        found.update(np.array(row, dtype="<i8").tobytes())
    return found.hexdigest()


# ----------------------------------------------------------------------- contamination


@dataclass(frozen=True, order=True)
class Overlap:
    """A test problem that stands in the training texts.

    Attributes:
        test, train: places in the two lists.
        kind: ``exact`` (the same text), ``normalised`` (the same words and numbers) or
            ``contained`` (the same, inside a longer training text).
    """

    test: int
    train: int
    kind: Literal["exact", "normalised", "contained"]


def overlap(train_texts: Sequence[str], test_texts: Sequence[str]) -> list[Overlap]:
    """Every place where a test problem stands in the training texts, by test, then train.

    Normalised texts are their words in lower case, their numbers (``1,000`` is ``1000.0``) and
    the signs of calculations; other punctuation and white space do not count. Problems of fewer
    than ``CONTAINED_WORDS`` words are not looked for inside longer texts. Paraphrases are not
    found.

    Args:
        train_texts: problem texts of the training data, e.g. ``Texts.questions``.
        test_texts: problem texts of the evaluation.
    """
    asked = [normal_words(text) for text in test_texts]
    same, inside = defaultdict(list), defaultdict(list)
    for test, words in enumerate(asked):
        if words:
            same[words].append(test)
        if len(words) >= CONTAINED_WORDS:
            inside[words[:CONTAINED_WORDS]].append(test)
    found = set()
    for train, text in enumerate(train_texts):
        words = normal_words(text)
        for test in same.get(words, ()):
            kind = "exact" if text == test_texts[test] else "normalised"
            found.add(Overlap(test, train, kind))
        for place in range(len(words) - CONTAINED_WORDS + 1):
            for test in inside.get(words[place : place + CONTAINED_WORDS], ()):
                longer = len(asked[test]) < len(words)
                if longer and words[place : place + len(asked[test])] == asked[test]:
                    found.add(Overlap(test, train, "contained"))
    return sorted(found)


_SIGNS = str.maketrans(
    {"\N{MULTIPLICATION SIGN}": "*", "\N{DIVISION SIGN}": "/", "\N{MINUS SIGN}": "-"}
)
# Numbers, words, and the signs of calculations; a minus is one only in front of a number.
_PIECES = re.compile(
    r"\d{1,3}(?:,\d{3})+(?!\d)(?:\.\d+)?|\d*\.\d+|\d+|[^\W\d_]+|-(?=\s*[\d.])|[+*/=^%<>]"
)


def normal_words(text: str) -> tuple[str, ...]:
    """The normalised words, numbers and signs of a text, see `overlap`."""
    plain = unicodedata.normalize("NFKC", text).translate(_SIGNS).casefold()
    return tuple(_number(piece) for piece in _PIECES.findall(plain))


def _number(piece: str) -> str:
    """A number without what does not change it: ``1000.5`` for ``1,000.50``; words as they are."""
    if not piece[-1].isdigit():
        return piece
    whole, _, part = piece.replace(",", "").partition(".")
    part = part.rstrip("0")
    return (whole.lstrip("0") or "0") + (f".{part}" if part else "")
