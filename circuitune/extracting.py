r"""The number that a generated answer to a word problem gives.

Two readings, after the two filters of lm-eval's GSM8K task: `strict` takes only the form of GSM8K,
``#### 43``; `flexible` also reads ordinary prose. Both look at the first answer alone, because
models that are not stopped go on with questions of their own. lm-eval's flexible filter takes the
last number of the text, whatever it counts; `flexible` takes the number that is stated as the
answer or concluded, and none from working that was cut off before its conclusion.

A number may look like ``43``, ``-1,234.50``, ``$7.50``, ``25%`` (read as 25), ``3/4``, ``1 1/2``,
``\frac{3}{4}``, or ``forty-three`` where the answer has no digits.

On 300 outputs of two small models, labelled by reading each (``tests/data/outputs.jsonl``),
`flexible` agrees with 149 of the 150 labels that it was developed on and 132 of the 150 others.
"""

import re
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation

from circuitune.errors import UserError

TOLERANCE = Decimal("1e-6")  # relative; answers are written with few digits
SHORT = 160  # characters; a longer text that ends inside a sentence was cut off
LAST = 3  # sentences from the end among which a conclusion is looked for

# LaTeX and Markdown around numbers, and what to put in their place.
PLAIN = tuple(
    (re.compile(pattern), put)
    for pattern, put in (
        (r"\\[dt]?frac\s*\{\s*(-?\d+)\s*\}\s*\{\s*(\d+)\s*\}", r" \1/\2"),
        (r"\\(?:text|mathrm|mathbf|textbf)\s*\{([^{}]*)\}", r"\1"),
        (r"\\(?:times|cdot)\b", "*"),
        (r"(?<=\d)(?:\{,\}|\\,)(?=\d{3})", ","),
        (r"\\[()\[\],!; ]", " "),
        (r"\\([$%])", r"\1"),
        (r"\*\*|`|</?strong>", ""),
        ("[\u2212\u2013]", "-"),
        ("\u2248", "="),
        ("[\u00a0\u202f]", " "),
    )
)
# A further question of the model's own: a heading, or the word with a colon inside a line.
NEW_QUESTION = re.compile(
    r"(?:^|\n)[ \t#*]*(?:Q|Problem|Exercise|Example)[ \t]*\d*[ \t]*:"
    r"|\bQuestion[ \t]*\d*[ \t]*:|\[Question\]"
)
REPEATED = re.compile(r"(?:Answer|A|Solution)[ \t]*:")  # ends a question that was only repeated
# GSM8K's form closes an answer: after a blank line something else begins.
CIRCLE = re.compile(r"(\s\S.{2,80}?)\1{3,}", re.DOTALL)
CLOSED = re.compile(r"####[^\n]*\d[^\n]*\n[ \t]*(?=\n)")

# Spaces group digits only at the end of a phrase: "2 500 ml bottles" are two bottles.
WHOLE = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d{1,3}(?: \d{3})+(?=[ ]?(?:[\n.,;)]|$))|\d+)"
NUMBER = re.compile(
    r"(?<![\w.])(?P<sign>-?)(?:[$£€]\s?)?(?P<inner>-?)"
    r"(?:(?P<ones>\d+)\s+(?=\d+/\d))?"
    rf"(?P<value>{WHOLE}(?:\.\d+)?|\.\d+)(?:/(?P<below>\d+)(?!\d|\.\d))?"
    r"(?!\d|(?:st|nd|rd|th|[xyz])\b)"
)
OPERATED_BEFORE = re.compile(r"(?:[+*/\u00d7\u00f7^]|[\d)\s][xX]|\S[ \t]*-|\^\(-?)[ \t]*$")
OPERATED_AFTER = re.compile(r"\s*(?:[+*/\u00d7\u00f7^]|[xX]\s*[$(]?\d|-\s*[$(]?\d)")

FORM = re.compile(r"####[ \t]*")
FORM_LINE = re.compile(r"(?:^|\n)[ \t]*#{3,}[ \t]+([^\n]*)")
BOXED = re.compile(r"\\boxed\s*\{((?:[^{}]|\{[^{}]*\})*)\}")
STATED = re.compile(
    r"\banswer\b[^.\n:=\d]{0,60}?\b(?:is|are|was|would be|equals)\b|\bthe (?:final )?answer\s*[:=]",
    re.IGNORECASE,
)
LABELLED = re.compile(r"\banswer\s*:", re.IGNORECASE)
BARE = re.compile(
    r"\s*(?P<number>[^\s\w]*\s?[\d.,/$%\s]*\d%?)(?:[ \t]+[a-zA-Z]+){0,3}[ \t.!]*(?:\n|$)"
)
SENTENCE = re.compile(r"(?<=[.!?])\s+|\n+")
ITEM = re.compile(r"(?:^|(?<=\n))[ \t]*(?:\d{1,2}[.)]+|(?:Step|STEP)[ \t]+\d+[.:)]*)[ \t]+(?=\S)")
LAST_ITEM = re.compile(r"\n[ \t]*\d{1,2}[.)][ \t]*\s*$")  # its text was cut off
INNER_ITEM = re.compile(r"\b(?:Step|STEP)[ \t]+\d+[.:)]*")
CONCLUDES = re.compile(
    r"\b(?:so|therefore|thus|hence|total|altogether|in all|left|remain\w*|finally)\b", re.IGNORECASE
)
ENDED = re.compile(r"[.!?)\]}\"']\s*$")
RESULT_AND_UNIT = re.compile(r"=[^=\n,]*\d(?:[ \t]+[a-zA-Z]+){1,5}[ \t]*$")
TOTAL_OF = re.compile(r"\btotal of\s+", re.IGNORECASE)
# In front of a number that says when, or out of how many, rather than how many.
CIRCUMSTANCE = re.compile(
    r"\b(?:in|after|of|from|than|per|every|within|during|for the)"
    r"(?:\s+(?:the|her|his|their|its|those|these))?\s+$",
    re.IGNORECASE,
)

ONES = "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen"
TEENS = "fifteen sixteen seventeen eighteen nineteen"
TENS = "twenty thirty forty fifty sixty seventy eighty ninety"
WORDS = {word: place for place, word in enumerate(f"{ONES} {TEENS}".split())} | {
    word: 10 * place for place, word in enumerate(TENS.split(), start=2)
}
del WORDS["one"]  # "one of them" counts nothing
_TENS, _ONES = "|".join(TENS.split()), "|".join(["one", *ONES.split()[2:10]])
SPELLED = re.compile(
    rf"\b(?:({_TENS})[- ]({_ONES})|({'|'.join(WORDS)}))\b",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Number:
    """A number in a text.

    Attributes:
        start: where it begins.
        value: what it says.
        operand: whether an operator stands beside it, so that it is part of a calculation.
    """

    start: int
    value: Decimal
    operand: bool


def numbers(text: str) -> list[Number]:
    """The numbers of a plain text, in order; signs, money, fractions and commas understood."""
    found = []
    for match in NUMBER.finditer(text):
        before, below = text[: match.start()].rstrip(), match["below"]
        minus = "-" in (match["sign"], match["inner"])
        # "5 -3" and "(5)-3" subtract; a minus is a sign where no number stands before it.
        subtracted = match["sign"] == "-" and before[-1:].isalnum() | (before[-1:] in (")", "%"))
        value = Decimal(re.sub("[, ]", "", match["value"]))
        if below is not None:
            if not Decimal(below):
                continue
            value = Decimal(match["ones"] or 0) + value / Decimal(below)
        operand = (
            subtracted
            or OPERATED_BEFORE.search(text[: match.start()]) is not None
            or OPERATED_AFTER.match(text, match.end()) is not None
        )
        found.append(Number(match.start(), -value if minus and not subtracted else value, operand))
    return found


def first_answer(text: str) -> str:
    """The text without markup, up to the first question that the model asks itself."""
    for pattern, put in PLAIN:
        text = pattern.sub(put, text)
    parts = NEW_QUESTION.split(text)
    answer = parts[0]
    if not answer.strip() and len(parts) > 1:  # the question was repeated before its answer
        repeated = REPEATED.split(parts[1], maxsplit=1)
        answer = repeated[1] if len(repeated) > 1 else ""
    closed = CLOSED.search(answer)
    answer = answer[: closed.end()] if closed else answer
    circle = CIRCLE.search(answer)
    if circle and circle[1].startswith(answer[circle.end() :]):
        answer = answer[: circle.end(1)]  # a text that only repeats itself says it once
    return answer if re.search(r"\d", answer) else SPELLED.sub(_digits, answer)


def _digits(spelled: re.Match[str]) -> str:
    """``43`` for ``forty-three``."""
    tens, ones, alone = (word.lower() if word else None for word in spelled.groups())
    if alone is not None:
        return str(WORDS[alone])
    return str(WORDS[tens] + (1 if ones == "one" else WORDS[ones]))


def value_of(sentence: str) -> Decimal | None:
    """The number that one sentence comes to: behind its last ``=``, of its total, or its last."""
    plain = [number for number in numbers(sentence) if not number.operand]
    total = TOTAL_OF.search(sentence)
    for begin in (sentence.rfind("="), total.end() - 1 if total else -1):
        behind = [number for number in plain if number.start > begin]
        if begin >= 0 and behind:
            return behind[0].value
    results = [n for n in plain if not CIRCUMSTANCE.search(sentence[: n.start])] or plain
    return results[-1].value if results else None


def strict(text: str) -> Decimal | None:
    """The number behind the last ``####`` of the first answer, or None.

    Commas, money, units and a trailing dot are understood; words in front of the number are not.
    """
    return _strict(first_answer(text))


def _strict(answer: str) -> Decimal | None:
    """`strict` for a text that is one plain answer."""
    ends = {form.end() for form in FORM.finditer(answer)}
    found = [n.value for n in numbers(answer) if n.start in ends and not n.operand]
    return found[-1] if found else None


def flexible(text: str) -> Decimal | None:
    r"""The number that the first answer gives, however it is written, or None.

    In this order: `strict`; a line of ``###``; the last ``\boxed{}``; the last "the answer is"; a
    number alone at the start; the last "Answer:"; the conclusion (`concluded`).
    """
    answer = first_answer(text)
    found = _strict(answer)
    if found is not None:
        return found
    stated = [_sentence(answer, match.end()) for match in STATED.finditer(answer)]
    bare = BARE.match(answer)
    candidates = [
        *reversed(FORM_LINE.findall(answer)),
        *reversed(BOXED.findall(answer)),
        *reversed(stated),
        *([bare["number"]] if bare else []),
        *reversed([_sentence(answer, match.end()) for match in LABELLED.finditer(answer)]),
    ]
    values = (value_of(candidate) for candidate in candidates)
    return next((value for value in values if value is not None), concluded(answer))


def _sentence(text: str, start: int) -> str:
    """The rest of a sentence; what follows a colon may stand on the next line."""
    return SENTENCE.split(text[start:].lstrip(" \t\n:*"), maxsplit=1)[0]


def concluded(answer: str) -> Decimal | None:
    """The number that running text comes to, or None where it was cut off or only lists things."""
    if len(ITEM.findall(answer)) >= LAST:
        answer = LAST_ITEM.sub("", answer)
    lines = [line for line in answer.splitlines() if re.search(r"\w", line)]
    if not lines:
        return None
    listed = ITEM.match(lines[-1]) is not None
    cleaned = INNER_ITEM.sub("", ITEM.sub("", answer))
    sentences = [part for part in SENTENCE.split(cleaned) if re.search(r"\w", part)]
    counted = [part for part in sentences[-LAST:] if value_of(part) is not None]
    if not counted:
        return None
    last = counted[-1]
    concludes = CONCLUDES.search(last) is not None
    if not ENDED.search(answer) and len(answer) > SHORT:
        known = concludes and last is sentences[-1] and RESULT_AND_UNIT.search(last)
        return value_of(last) if known else None
    if listed and (sentences.count(last) >= LAST or not (concludes or "=" in last)):
        return None
    results = [part for part in sentences if "=" in part and value_of(part) is not None]
    return value_of(last if concludes or not results else results[-1])


def same_number(found: Decimal | None, answer: str | float | Decimal) -> bool:
    """Whether a number that was found is the right one: 43, 43.0 and ``"43"`` are the same.

    Raises:
        UserError: the right answer is not a finite number.
    """
    right = _right(answer)
    return found is not None and abs(found - right) <= TOLERANCE * max(abs(found), abs(right))


def _right(answer: str | float | Decimal) -> Decimal:
    """A right answer as a number.

    Raises:
        UserError: it is not a finite number.
    """
    try:
        right = Decimal(str(answer).replace(",", "").strip())
    except InvalidOperation:
        right = Decimal("NaN")
    if not right.is_finite():
        raise UserError(
            f"The right answer to a problem must be a finite number, found {answer!r}; "
            "take that problem out of the set or correct it."
        )
    return right
