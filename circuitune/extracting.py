r"""The number that a generated answer to a word problem gives.

Two readings, after the two filters of lm-eval's GSM8K task: `strict` takes only the form of GSM8K,
``#### 43``; `flexible` also reads ordinary prose. Both look at the first answer alone, because
models that are not stopped go on with questions of their own. lm-eval's flexible filter takes the
last number of the text, whatever it counts; `flexible` takes the number that is stated as the
answer or concluded, and none from working that was cut off before its conclusion.

A number may look like ``43``, ``-1,234.50``, ``$7.50``, ``25%`` (read as 25), ``3/4``, ``1 1/2``,
``\frac{3}{4}``, or ``forty-three`` where the answer has no digits.

On 300 outputs of two small models, labelled by reading each (``tests/data/outputs.jsonl``), on
which it was developed, `flexible` agrees with 298 labels, lm-eval's filter with 106. Of 100 fresh
ones it agreed with 83 (lm-eval's: 37), and with 91 after plain faults that they showed were mended.
"""

import re
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation

from circuitune.errors import UserError

TOLERANCE = Decimal("1e-6")  # relative; answers are written with few digits
SHORT = 160  # characters; a longer text that ends inside a sentence was cut off
LONGEST = 25  # characters; a model that cannot stop writes longer numbers
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
        (r"((?:=|\b(?:is|are|was|equals)\b)[ \t]*)-[ \t]+(?=[$\u00a3\u20ac]?\d)", r"\1-"),
    )
)
# A further question of the model's own: a heading, or the word with a colon inside a line.
NEW_QUESTION = re.compile(
    r"(?:^|\n)[ \t#*]*(?:Q|Problem|Exercise|Example)[ \t]*\d*[ \t]*:"
    r"|\bQuestion[ \t]*\d*[ \t]*:|\[Question\]"
)
LEADING_LABEL = re.compile(r"\A\s*(?:Answer|A|Solution)[ \t]*:(?=[^\n]*\d)")
REPEATED = re.compile(r"(?:Answer|A|Solution)[ \t]*:")  # ends a question that was only repeated
# A text that goes round: a few words often, or whole sentences twice.
CIRCLE = re.compile(r"(\s\S.{2,80}?)\1{3,}|(\s\S.{60,300}?)\2+", re.DOTALL)
# A number alone, a blank line, and further on another answer: a question without its heading.
REASKED = re.compile(
    r"\s*[$\u00a3\u20ac]?\d[\d.,]*%?[ \t.]*\n[ \t]*(?=\n(?:[^\n]*\n)+?[ \t]*Answer[ \t]*:)"
)
# GSM8K's form closes an answer: after a blank line something else begins.
CLOSED = re.compile(r"####[^\n]*\d[^\n]*\n[ \t]*(?=\n)")

# Spaces group digits only at the end of a phrase: "2 500 ml bottles" are two bottles.
WHOLE = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d{1,3}(?: \d{3})+(?=[ ]?(?:[\n.,;)]|$))|\d+)"
NUMBER = re.compile(
    r"(?<![\w.])(?P<sign>-?)(?:[$£€]\s?)?(?P<inner>-?)"
    r"(?:(?P<ones>\d+)\s+(?=\d+/\d))?"
    rf"(?P<value>{WHOLE}(?:\.\d+)?|\.\d+)(?:/(?P<below>\d+)(?!\d|\.\d))?"
    r"(?!\d|(?:st|nd|rd|th|[xyz])\b)"
)
OPERATED_BEFORE = re.compile(
    r"(?:[+*/\u00d7\u00f7^]|[\d)\s][xX]|\S[ \t]*-|\^\(-?"
    r"|\b(?:square|cube|root|half|third|quarter|multiple|power)s? of)[ \t]*$"
)
OPERATED_AFTER = re.compile(r"\s*(?:[+*/\u00d7\u00f7^]|[xX]\s*[$(]?\d|-\s*[$(]?\d)")

FORM = re.compile(r"####[ \t]*")
FORM_LINE = re.compile(r"(?:^|\n)[ \t]*#{3,}[ \t]+([^\n]*)")
BOXED = re.compile(r"\\boxed\s*\{((?:[^{}]|\{[^{}]*\})*)\}")
STATED = re.compile(
    r"\banswer(?:\b[^.\n:=\d]{0,60}?\b(?:is|are|was|would be|must be|equals)\b|['\u2019]s\b)"
    r"|\bthe (?:final )?answer\s*[:=]",
    re.IGNORECASE,
)
LABELLED = re.compile(r"\banswer\s*:", re.IGNORECASE)
BARE = re.compile(
    r"\s*(?P<number>[^\s\w]*\s?\d[\d.,]*(?:[ ]\d{3})*(?:[ ]?\d*/\d+)?[ ]?%?)"
    r"(?:[ \t]+[a-zA-Z]+){0,3}(?:[ \t.!]*(?:\n|$)|(?<!\s1)\.[ \t]+(?=[A-Z]))"
)
SENTENCE = re.compile(r"(?<=[.!?])\s+|\n+")
ITEM = re.compile(
    r"(?:^|(?<=\n))[ \t]*(?:\d{1,2}[.)]+|(?:Step|STEP)[ \t]+\d+[.:)]*"
    r"|(?:First|Second|Third|Fourth|Fifth|Sixth|Next|Then):)[ \t]+(?=\S)"
)
LAST_ITEM = re.compile(r"\n[ \t]*\d{1,2}[.)][ \t]*\s*$")  # its text was cut off
INNER_ITEM = re.compile(r"\b(?:Step|STEP)[ \t]+\d+[.:)]*")
FOLLOWS = re.compile(r"\b(?:so|therefore|thus|hence)\b", re.IGNORECASE)
# What two numbers say that are joined like this is not one answer.
OFFERED = re.compile(r"\d[ \t]+or[ \t]+(?:[$\u00a3\u20ac]?[ \t]*)\d")
JOINED = re.compile(r"\band[ \t]+(?:[$\u00a3\u20ac][ \t]*)?$")
# An answer in a line of its own, whose reasons are given behind it.
GIVEN_FIRST = re.compile(
    r"\s*([^\n]*\d[^\n]*)\n\s*(?:Reason(?:ing|s)?|Explanation|Justification|Because)\b"
)
# A statement that was left empty, or cut off: what stands before it is the conclusion.
EMPTY = re.compile(r"[^.!?\n]*(?:\\boxed\s*\{\s*\}|\banswer\b[^.\n\d]*$)", re.IGNORECASE)
CONCLUDES = re.compile(
    r"\b(?:so|therefore|thus|hence|total|altogether|in all|left|remain\w*|finally)\b", re.IGNORECASE
)
ENDED = re.compile(r"[.!?)\]}\"']\s*$")
RESULT_AND_UNIT = re.compile(r"=[ \t$]*[\d,.]*\d(?:,?[ \t]+[a-zA-Z]+){1,6}[ \t]*$")
# An unfinished conclusion with its one number.
BEGUN = re.compile(
    r"\s*(?:so|therefore|thus|hence)\b[^\d]*[\d.,]*\d[ \t]+[^\d]*$",
    re.IGNORECASE,
)
THAT = re.compile(r"\bthat(?:['\u2019]s| is| would be) (?:the|our|your) answer\b", re.IGNORECASE)
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
        if len(match["value"]) > LONGEST:
            continue
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
    answer = LEADING_LABEL.sub("", answer)
    closed = CLOSED.search(answer) or REASKED.match(answer)
    answer = answer[: closed.end()] if closed else answer
    circle = CIRCLE.search(answer)
    if circle and (circle[1] or circle[2]).startswith(answer[circle.end() :]):
        once = circle.end(1 if circle[1] else 2)
        answer = answer[:once]  # a text that only repeats itself says it once
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
    number alone at the start; a first line whose reasons follow; the last "Answer:"; the
    conclusion (`concluded`).
    """
    answer = first_answer(text)
    found = _strict(answer)
    if found is not None:
        return found
    stated = [_sentence(answer, match.end()) for match in STATED.finditer(answer)]
    bare, given = BARE.match(answer), GIVEN_FIRST.match(answer)
    candidates = [
        *reversed(FORM_LINE.findall(answer)),
        *reversed(BOXED.findall(answer)),
        *reversed(stated),
        *([bare["number"]] if bare else []),
        *([given[1]] if given else []),
        *reversed([_sentence(answer, match.end()) for match in LABELLED.finditer(answer)]),
    ]
    values = (value_of(candidate) for candidate in candidates)
    return next((value for value in values if value is not None), concluded(answer))


def _sentence(text: str, start: int) -> str:
    """The rest of a sentence; what follows a colon may stand on the next line."""
    return SENTENCE.split(text[start:].lstrip(" \t\n:*"), maxsplit=1)[0]


def concluded(answer: str) -> Decimal | None:
    """The number that running text comes to, or None where it was cut off or only lists things."""
    answer = EMPTY.split(answer, maxsplit=1)[0]
    if len(ITEM.findall(answer)) >= LAST:
        answer = LAST_ITEM.sub("", answer)
    if not re.search(r"[^\W\d]|=", answer) and len(numbers(answer)) > LAST:
        return None
    sentences, listed = [], []
    for line in answer.splitlines():
        parts = SENTENCE.split(INNER_ITEM.sub("", ITEM.sub("", line)))
        sentences += [part for part in parts if re.search(r"\w", part)]
        listed += [ITEM.match(line) is not None] * (len(sentences) - len(listed))
    counted = [k for k, part in enumerate(sentences) if value_of(part) is not None]
    if not counted or counted[-1] < len(sentences) - LAST:
        return None
    place = counted[-1]
    last, is_end, whole = sentences[place], place == len(sentences) - 1, ENDED.search(answer)
    if whole and not is_end and FOLLOWS.search(sentences[-1]) and not THAT.search(sentences[-1]):
        return None  # it concludes something that is no number
    concludes = CONCLUDES.search(last) is not None
    if not whole and len(answer) > SHORT:
        known = is_end and (BEGUN.match(last) or (concludes and RESULT_AND_UNIT.search(last)))
        return value_of(last) if known else None
    if listed[place] and (sentences.count(last) >= LAST or not (concludes or "=" in last)):
        return None
    results = [part for part in sentences if "=" in part and value_of(part) is not None]
    return _single(last if concludes or not results else results[-1])


def _single(sentence: str) -> Decimal | None:
    """`value_of`, or None for a sentence that offers several: "12 or 13", "3 pens and 4 cups"."""
    value, plain = value_of(sentence), [n for n in numbers(sentence) if not n.operand]
    ends = [n for n in plain if n.value == value and JOINED.search(sentence[: n.start])]
    several = "=" not in sentence and not TOTAL_OF.search(sentence) and len(plain) > 1 and ends
    return None if several or OFFERED.search(sentence) else value


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
