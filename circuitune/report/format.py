"""Numbers as text: one place decides digits, units and signs.

An interval follows its value without repeating the unit, as in `14 % [9, 21]`.
"""

import math
from dataclasses import dataclass

from circuitune.report.estimate import Estimate

MISSING = "\u2013"


@dataclass(frozen=True)
class Cell:
    """One entry of a table; `interval` is the part that a reader may skip, `[9, 21]`."""

    text: str
    interval: str = ""

    def __str__(self) -> str:
        """The value, and the interval after a space."""
        return f"{self.text} {self.interval}".rstrip()


def percent(estimate: Estimate, *, signed: bool = False, digits: int | None = None) -> Cell:
    """A fraction as percent: 0.14 -> `14 %`."""
    return _cell(estimate.scaled(100.0), " %", signed=signed, digits=digits)


def accuracy(estimate: Estimate) -> Cell:
    """A share of right answers as whole percent.

    Finer where the interval is below 1 %, and where rounding would claim all or none.
    """
    narrow = estimate.low is not None and estimate.high is not None
    narrow = narrow and 0 < estimate.high - estimate.low < 0.01
    nearly = 0 < estimate.value < 0.005 or 0.995 <= estimate.value < 1
    return percent(estimate, digits=1 if narrow or nearly else 0)


def points(estimate: Estimate, *, digits: int = 0) -> Cell:
    """A difference of two fractions, in percentage points: 0.46 -> `+46 pts`."""
    return _cell(estimate.scaled(100.0), " pts", signed=True, digits=digits)


def plain(estimate: Estimate, *, signed: bool = False, digits: int | None = None) -> Cell:
    """A number in its own unit, such as an effect in logits."""
    return _cell(estimate, "", signed=signed, digits=digits)


def count(value: int) -> str:
    """A count with thin spaces between thousands: 134515008 -> `134 515 008`."""
    return f"{value:,}".replace(",", "\u202f")


def short_count(value: int) -> str:
    """A count to three digits: 134515008 -> `135 M`."""
    for limit, unit in ((1e9, " B"), (1e6, " M"), (1e3, " k")):
        if value >= limit:
            return f"{value / limit:.3g}{unit}"
    return str(value)


def duration(seconds: float) -> str:
    """A time span: 61.2 -> `1 min 1 s`."""
    whole = round(seconds)
    if whole < 1:
        return f"{seconds:.2g} s"
    hours, minutes, rest = whole // 3600, whole // 60 % 60, whole % 60
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def tiny(value: float) -> str:
    """A number far below 1 to one digit: 2.1e-06 -> `2e-6`."""
    if value == 0:
        return "0"
    mantissa, _, exponent = f"{value:.0e}".partition("e")
    return f"{mantissa}e{int(exponent)}".replace("-", "\u2212")


def token(text: str) -> str:
    """A token as it is told apart in print: a space is `\u2423`, what cannot be seen is escaped."""
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return shown.replace(" ", "\u2423") or "\u2205"


def p_value(value: float) -> str:
    """A p-value: three decimals, or one digit where that would be 0."""
    return number(value, 3) if value >= 0.0005 else tiny(value)


def number(value: float, digits: int, *, signed: bool = False) -> str:
    """A rounded number with a true minus sign, and never `-0`."""
    rounded = round(value, digits) + 0.0
    sign = "\u2212" if rounded < 0 else "+" if signed and rounded > 0 else ""
    return f"{sign}{abs(rounded):.{digits}f}"


def _cell(estimate: Estimate, unit: str, *, signed: bool, digits: int | None) -> Cell:
    places = _places(estimate) if digits is None else digits
    text = number(estimate.value, places, signed=signed) + unit
    exact = estimate.low == estimate.value == estimate.high  # by construction, not by sampling
    if estimate.low is None or estimate.high is None or exact:
        return Cell(text)
    ends = (number(end, places, signed=signed) for end in (estimate.low, estimate.high))
    return Cell(text, f"[{', '.join(ends)}]")


def _places(estimate: Estimate) -> int:
    """Digits for one significant digit of half the interval, or two of a value without one."""
    if estimate.low is None or estimate.high is None or estimate.high <= estimate.low:
        scale = abs(estimate.value) / 10.0
    else:
        scale = (estimate.high - estimate.low) / 2.0
    return min(4, max(0, -math.floor(math.log10(scale)))) if scale > 0 else 0


@dataclass(frozen=True)
class Unit:
    """How the effects of one metric are printed.

    Attributes:
        name: The metric in words.
        axis: The unit in words.
        factor: From the metric's own number to this unit.
        digits: Decimals in this unit.
        sign: The unit right after a number; empty where the table's head names it.
    """

    name: str
    axis: str
    factor: float
    digits: int
    sign: str = ""


_UNITS = {
    "logit_diff": Unit("logit difference", "logits", 1.0, 2),
    "relative_logit": Unit("relative logit", "% of the clean logit", 100.0, 2, " %"),
    "prob": Unit("probability", "percentage points", 100.0, 1, " pts"),
}


def unit_of(metric: str) -> Unit:
    """The unit of a metric's effects; an unknown metric keeps its name and numbers."""
    return _UNITS.get(metric, Unit(metric.replace("_", " "), metric.replace("_", " "), 1.0, 3))


def effect(metric: str, estimate: Estimate) -> Cell:
    """A signed effect for a table, in the unit of its metric."""
    unit = unit_of(metric)
    return _cell(estimate.scaled(unit.factor), unit.sign, signed=False, digits=unit.digits)


def effect_in_words(metric: str, estimate: Estimate) -> str:
    """A signed effect for a sentence: `\u22122.10 logits [\u22122.48, \u22121.79]`."""
    cell, unit = effect(metric, estimate), unit_of(metric)
    return f"{cell.text}{'' if unit.sign else f' {unit.axis}'} {cell.interval}".rstrip()


def noise(metric: str, floor: float) -> str:
    """A noise floor for a table, in the unit of its metric: `2e\u22126`."""
    unit = unit_of(metric)
    return tiny(floor * unit.factor) + unit.sign


def noise_in_words(metric: str, floor: float) -> str:
    """A noise floor for a sentence: `2e\u22126 logits`."""
    unit = unit_of(metric)
    return noise(metric, floor) + ("" if unit.sign else f" {unit.axis}")


def task_name(task: str) -> str:
    """A task in words: add -> addition; a task of the user's own keeps its name."""
    names = {
        "add": "addition",
        "sub": "subtraction",
        "mul": "multiplication",
        "div": "division",
        "copy": "copying",
        "copy_number": "copying a number",
        "copy_word": "copying a word",
        "capital": "capitals",
        "digits_2": "2-digit sums",
        "digits_3": "3-digit sums",
        "digits_4": "4-digit sums",
        "carry": "sums with carry",
        "no_carry": "sums without carry",
        "borrow": "differences with borrow",
        "no_borrow": "differences without borrow",
        "power": "powers",
        "number_words": "number words",
        "year_span": "year spans",
        "objects": "counting objects",
        "svamp": "SVAMP",
        "addsub": "AddSub",
        "gsm8k": "GSM8K",
        "commonsense_qa": "CommonsenseQA",
        "bbh": "BIG-Bench Hard",
        "singleeq": "SingleEq",
        "mmlu": "MMLU",
        "wikitext": "WikiText-2",
        "word_problems": "mean of the word problems",
    }
    return names.get(task, task)


def set_name(kind: str) -> str:
    """A kind of ablated set in words."""
    names = {
        "top": "circuit",
        "single_pass": "single-pass ranking",
        "matched": "random, same layers",
        "random": "random",
        "least": "least important",
        "other_task": "circuits of other tasks",
        "own_circuit": "its own circuit",
        "proposal": "proposed sets",
        "iterated": "iterated patching",
        "greedy": "greedy search",
        "mask": "gradient mask",
    }
    return names.get(kind, kind.replace("_", " "))
