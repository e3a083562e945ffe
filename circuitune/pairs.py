"""Clean/corrupt prompt pairs for a tokenizer: verified, answered correctly, split by operands.

1. Answer policy: the answer must be *one* token that follows the prompt unchanged (`writing`).
2. Prefix: a few neutral first lines are measured on the select half and the best is kept, since
   without a BOS token the first token becomes the attention sink and arithmetic collapses.
3. Only prompts whose answer is the model's first choice among all tokens are kept (Zhang et al.
   2024, section 3); the selection rate is reported with its interval.
4. Operand pairs are split in two before anything is measured: components are chosen on the
   ``select`` half, every claim is made on the ``test`` half.
"""

import json
import random
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from jaxtyping import Bool, Int
from transformers import PreTrainedTokenizerBase

from circuitune.config import PairsConfig
from circuitune.errors import UserError
from circuitune.memory import check_fits
from circuitune.models import Model
from circuitune.patching import end_states, first_choice, sweep_seconds
from circuitune.problems import Operator, Problem, enumerate_problems, split_groups, templates
from circuitune.prompts import prefill
from circuitune.runs import damaged
from circuitune.stats import clustered_proportion
from circuitune.writing import Writing, answer_token, encode_text, find_writing

Split = Literal["select", "test"]
PREFIXES = ("", "\n", "Math:\n", "Calculate:\n", "Here is a problem: ", "Answer the question.\n")
PROBE_PROMPTS = 96
# A half tries up to this many prompts for each pair that it may keep.
TRIES = 4
TYPICAL_TOKENS = 16


@dataclass(frozen=True)
class Pair:
    """One clean prompt with its corrupt counterpart; the fields of a line of ``pairs.jsonl``.

    ``clean`` and ``corrupt`` are whole prompts with their prefix, ``answer`` is the text of the
    one token that must follow ``clean``. Pairs of one ``group`` are never split.
    """

    clean: str
    corrupt: str
    answer: str
    task: str
    template: str
    split: Split
    group: str


@dataclass(frozen=True)
class Encoded:
    """Pairs as token ids.

    Attributes:
        clean, corrupt: token ids of the prompts, in the order of the pairs.
        candidates: token ids of all admissible answers (the answers that occur).
        answers: place of each pair's answer among the candidates.
        groups: the group of each pair.
    """

    clean: list[list[int]]
    corrupt: list[list[int]]
    candidates: tuple[int, ...]
    answers: Int[np.ndarray, " example"]
    groups: list[str]


def encode(
    tokenizer: PreTrainedTokenizerBase, pairs: Sequence[Pair], answers: Iterable[str] = ()
) -> Encoded:
    """Tokenise pairs and prove that every answer is one token.

    Args:
        tokenizer: the model's tokenizer.
        pairs: the pairs.
        answers: further admissible answers beside those that occur in the pairs.

    Raises:
        UserError: an answer is not exactly one token after its prompt, or there are fewer than
            two admissible answers.
    """
    tokens = [answer_token(tokenizer, pair.clean, pair.answer) for pair in pairs]
    for pair, token in zip(pairs, tokens, strict=True):
        if token is None:
            raise UserError(
                f"An answer must be one token after its prompt, {pair.answer!r} after "
                f"{pair.clean!r} is not; shorten the answer or move the space between them, or "
                "locate anew if the tokenizer has changed."
            )
    context = pairs[0].clean if pairs else ""
    extra = [answer_token(tokenizer, context, answer) for answer in answers]
    candidates = tuple(sorted({token for token in [*tokens, *extra] if token is not None}))
    if len(candidates) < 2:
        raise UserError(
            f"Pairs must have at least two different answers to compare, found {len(candidates)}; "
            "add pairs."
        )
    return Encoded(
        clean=[encode_text(tokenizer, pair.clean) for pair in pairs],
        corrupt=[encode_text(tokenizer, pair.corrupt) for pair in pairs],
        candidates=candidates,
        answers=np.array([candidates.index(token) for token in tokens]),
        groups=[pair.group for pair in pairs],
    )


@dataclass(frozen=True)
class PairSet:
    """Pairs and how they were selected (``pairs.jsonl`` and ``selection.json``)."""

    pairs: tuple[Pair, ...]
    selection: dict[str, Any]

    def of(self, task: str, split: Split) -> list[Pair]:
        """The pairs of one task and split."""
        return [pair for pair in self.pairs if pair.task == task and pair.split == split]

    @property
    def answers(self) -> list[str]:
        """Admissible answers beside those that occur in the pairs."""
        return self.selection.get("admissible", [])

    @property
    def tasks(self) -> list[str]:
        """Tasks in order of appearance."""
        return list(dict.fromkeys(pair.task for pair in self.pairs))

    def save(self, folder: Path) -> None:
        """Write both files."""
        lines = [json.dumps(asdict(pair), ensure_ascii=False) for pair in self.pairs]
        (folder / "pairs.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        text = json.dumps(self.selection, indent=1, ensure_ascii=False)
        (folder / "selection.json").write_text(text + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> "PairSet":
        """Read both files.

        Raises:
            UserError: one of them is absent or damaged.
        """
        path = folder / "selection.json"
        try:
            selection = dict(json.loads(path.read_text(encoding="utf-8")))
            path = folder / "pairs.jsonl"
            # Not splitlines: a text may hold U+2028 and its like, which JSON leaves unescaped.
            lines = path.read_text(encoding="utf-8").split("\n")
            pairs = tuple(Pair(**json.loads(line)) for line in lines if line)
        except (OSError, ValueError, TypeError) as error:
            raise damaged(path, error) from error
        return cls(pairs, selection)


def answers_correctly(
    model: Model, prompts: Sequence[Sequence[int]], tokens: Sequence[int]
) -> np.ndarray:
    """Whether the model's first choice among all tokens is the given answer token."""
    states = end_states(model, prefill(model, prompts))
    top = first_choice(model, states.final)
    return top == np.asarray(tokens)


def make_pairs(model: Model, config: PairsConfig) -> PairSet:
    """Generate, verify and filter arithmetic pairs for a model.

    Raises:
        UserError: the tokenizer has no one-token digits, or the model answers too few prompts.
    """
    operators = list(dict.fromkeys(Operator.parse(text) for text in config.operators))
    problems = {op: enumerate_problems(op, low=1, high=9, max_answer=9) for op in operators}
    halves, wide = _halves([p for op in operators for p in problems[op]], seed=config.seed)
    find_writing(model.tokenizer)
    writing, trials = _choose_prefix(model, halves["select"], config)
    kept: list[Pair] = []
    tasks: dict[str, Any] = {}
    for operator in operators:
        mine = {half: [p for p in side if p.operator is operator] for half, side in halves.items()}
        pairs, tasks[operator.id] = _select(model, operator, mine, writing, config)
        kept += pairs
    selection = {
        "seed": config.seed,
        "prefixes": trials,
        "prefix": writing.prefix,
        "answer_policy": writing.policy,
        "spaced_answer": writing.spaced_answer,
        "admissible": [writing.write("", str(digit))[1] for digit in range(10)],
        "tasks": tasks,
        "select_groups": sorted({problem.group for problem in wide["select"]}),
        "held_out_groups": sorted({problem.group for problem in wide["test"]}),
    }
    return PairSet(tuple(kept), selection)


def _halves(
    problems: Sequence[Problem], *, seed: int
) -> tuple[dict[Split, list[Problem]], dict[Split, list[Problem]]]:
    """Split all one-digit operand pairs in two; the given problems, and all, of each half."""
    every = [p for op in Operator for p in enumerate_problems(op, low=0, high=9)]
    select, test = split_groups(every, seed=seed)
    wide: dict[Split, list[Problem]] = {"select": select, "test": test}
    inside = {split: {problem.group for problem in side} for split, side in wide.items()}
    return {split: [p for p in problems if p.group in inside[split]] for split in wide}, wide


def _prompts(
    problems: Sequence[Problem], writing: Writing, split: Split, rng: random.Random
) -> list[Pair]:
    """Every problem in every template of its operator, shuffled."""
    pairs = []
    for problem in problems:
        for template in templates(problem.operator):
            clean, corrupt = template.render(problem)
            text, answer = writing.write(clean, str(problem.answer))
            other, _ = writing.write(corrupt, "")
            pairs.append(
                Pair(text, other, answer, problem.operator.id, template.id, split, problem.group)
            )
    rng.shuffle(pairs)
    return pairs


def _choose_prefix(
    model: Model, problems: Sequence[Problem], config: PairsConfig
) -> tuple[Writing, list[dict[str, Any]]]:
    """Measure each prefix on the same sample of select-half prompts and keep the best."""
    # The order in which operators were asked for must not change the sample.
    problems = sorted(problems, key=lambda problem: tuple(Operator).index(problem.operator))
    trials = []
    writings = {}
    for prefix in PREFIXES if config.prefix is None else (config.prefix,):
        try:
            writings[prefix] = writing = find_writing(model.tokenizer, prefix)
        except UserError:
            if config.prefix is not None:
                raise
            continue  # this prefix merges with the digits; find_writing has passed without it
        sample = _prompts(problems, writing, "select", random.Random(config.seed))[:PROBE_PROMPTS]
        rate = answer_rate(_hits(model, sample), sample)
        trials.append({"prefix": prefix, "accuracy": rate.pop("rate")} | rate | {"n": len(sample)})
    best = max(trials, key=lambda trial: trial["accuracy"])
    return writings[best["prefix"]], trials


def _hits(model: Model, pairs: Sequence[Pair]) -> np.ndarray:
    encoded = encode(model.tokenizer, pairs)
    tokens = [encoded.candidates[answer] for answer in encoded.answers]
    return answers_correctly(model, encoded.clean, tokens)


def answer_rate(hits: Bool[np.ndarray, " example"], pairs: Sequence[Pair]) -> dict[str, float]:
    """How often a model answers (``rate``, with its 95 % interval from ``low`` to ``high``).

    Prompts of one group, such as the templates of one problem, count as related.
    """
    groups = [pair.group for pair in pairs]
    rate = clustered_proportion(hits, rng=np.random.default_rng(0), groups=groups)
    return {"rate": rate.estimate, "low": rate.low, "high": rate.high}


def _answered(hits: Bool[np.ndarray, " example"], pairs: Sequence[Pair]) -> dict[str, Any]:
    return {"tried": len(pairs), "correct": int(hits.sum())} | answer_rate(hits, pairs)


def _select(
    model: Model,
    operator: Operator,
    halves: dict[Split, list[Problem]],
    writing: Writing,
    config: PairsConfig,
) -> tuple[list[Pair], dict[str, Any]]:
    """Keep up to ``config.per_split`` correctly answered prompts of each half."""
    kept: list[Pair] = []
    tried: list[Pair] = []
    right: list[np.ndarray] = []
    counts = {}
    for split, problems in halves.items():
        rng = random.Random(f"{config.seed}/{operator.id}/{split}")
        pool = _prompts(problems, writing, split, rng)[: TRIES * config.per_split]
        hits = _hits(model, pool)
        good = [pair for pair, hit in zip(pool, hits, strict=True) if hit][: config.per_split]
        if len(good) < 8 or len({pair.answer for pair in good}) < 2:
            raise UserError(
                f"The model must answer at least 8 prompts of {operator.id} correctly in each "
                f"half, it answers {int(hits.sum())} of {len(pool)}; leave this operator out with "
                "--operators or choose a stronger model."
            )
        kept += good
        counts[split] = len(good)
        tried, right = tried + pool, [*right, hits]
    return kept, _answered(np.concatenate(right), tried) | counts


def own_pairs(model: Model, config: PairsConfig) -> PairSet:
    """A user's pairs in place of generated ones; all are kept unless ``correct_only``.

    Raises:
        UserError: the file is not usable, an answer is not one token, or a half is empty.
    """
    pairs = read_pairs(Path(config.pairs or ""), seed=config.seed)
    hits = _hits(model, pairs)
    tasks = {}
    for task in dict.fromkeys(pair.task for pair in pairs):
        mine = np.array([pair.task == task for pair in pairs])
        tasks[task] = _answered(hits[mine], [pair for pair in pairs if pair.task == task])
    if config.correct_only:
        pairs = [pair for pair, hit in zip(pairs, hits, strict=True) if hit]
    for task in tasks:
        for split in ("select", "test"):
            count = sum(pair.task == task and pair.split == split for pair in pairs)
            tasks[task][split] = count
            if count < 2:
                raise UserError(
                    f"Each task must keep at least two pairs in each half, {task} keeps {count} in "
                    f"{split}; add pairs to {config.pairs}."
                )
    _, wide = _halves([], seed=config.seed)
    try:
        spaced = find_writing(model.tokenizer).spaced_answer
    except UserError:  # own answers need not be digits; only tuning on arithmetic would
        spaced = False
    selection = {
        "seed": config.seed,
        "prefixes": [],
        "prefix": "",
        "answer_policy": "Own pairs: the answer is one token; all answers are admissible.",
        "spaced_answer": spaced,
        "admissible": [],
        "tasks": tasks,
        "select_groups": sorted({problem.group for problem in wide["select"]}),
        "held_out_groups": sorted({problem.group for problem in wide["test"]}),
    }
    return PairSet(tuple(pairs), selection)


def preflight(model: Model, config: PairsConfig) -> list[str]:
    """What `circuitune check` says of a model's digits, its prefix, and the cost of a sweep.

    Raises:
        UserError: the tokenizer has no one-token digits.
    """
    operators = [Operator.parse(text) for text in config.operators]
    problems = [p for op in operators for p in enumerate_problems(op, low=1, high=9, max_answer=9)]
    halves, _ = _halves(problems, seed=config.seed)
    find_writing(model.tokenizer)
    writing, trials = _choose_prefix(model, halves["select"], config)
    lines = [writing.policy]
    for trial in trials:
        kept = "  <- kept" if trial["prefix"] == writing.prefix else ""
        lines.append(
            f"prefix {trial['prefix']!r}: answers {trial['accuracy']:.0%} "
            f"[{trial['low']:.0%}, {trial['high']:.0%}] of {trial['n']} prompts{kept}"
        )
    pairs, tokens = config.per_split, TYPICAL_TOKENS
    cost = f"{sweep_seconds(model, pairs):.0f} s, {check_fits(model, [tokens] * pairs)}"
    return [*lines, f"a sweep over {pairs} pairs of {tokens} tokens: {cost}"]


def collect(model: Model, config: PairsConfig, run: Path, work: Path) -> None:
    """The stage: generated or own pairs into ``pairs.jsonl`` and ``selection.json``."""
    del run  # the first stage reads nothing
    pair_set = own_pairs(model, config) if config.pairs else make_pairs(model, config)
    pair_set.save(work)


def read_pairs(path: Path, *, seed: int = 0) -> list[Pair]:
    """Read a user's own pairs: one JSON object a line with ``clean``, ``corrupt``, ``answer``.

    ``task``, ``template``, ``split`` and ``group`` are optional; without a split, groups (by
    default each pair is its own) are shared out at random, half for selection.

    Raises:
        UserError: the file is absent or not text, a line is not JSON or lacks a field, or a
            group lies in both halves.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"--pairs must be a readable text file, {path} is not ({error}); check the path."
        ) from error
    places = [number for number, line in enumerate(lines, start=1) if line.strip()]
    records = [_read_record(lines[number - 1], f"line {number} of {path}") for number in places]
    groups = sorted({record.get("group", record["clean"]) for record in records})
    random.Random(seed).shuffle(groups)
    selected = set(groups[: (len(groups) + 1) // 2])
    pairs = []
    halves: dict[str, Split] = {}
    for number, record in zip(places, records, strict=True):
        group = record.setdefault("group", record["clean"])
        split = record.setdefault("split", "select" if group in selected else "test")
        if halves.setdefault(group, split) != split:
            raise UserError(
                f"Pairs of one group must lie in one half, line {number} of {path} puts {group!r} "
                "in the other half too; correct its split or its group."
            )
        pairs.append(Pair(**{"task": path.stem, "template": "own"} | record))
    return pairs


def _read_record(line: str, where: str) -> dict[str, Any]:
    """The fields of a `Pair` that one line of a pairs file gives; further fields are left out."""
    try:
        record = json.loads(line)
    except ValueError as error:
        raise UserError(
            f"A pairs file must hold one JSON object a line, {where} is not JSON ({error}); see "
            "the README for an example."
        ) from error
    needed = ("clean", "corrupt", "answer")
    if not isinstance(record, dict) or not all(record.get(name) for name in needed):
        raise UserError(
            f"Every line of a pairs file must give clean, corrupt and answer, {where} does not; "
            "correct that line."
        )
    if record["clean"] == record["corrupt"]:
        raise UserError(
            f"A corrupt prompt must differ from its clean one, in {where} they are the same; "
            "replace what asks for the answer."
        )
    kept = {item.name: record[item.name] for item in fields(Pair) if item.name in record}
    for name, value in kept.items():
        if not isinstance(value, str) or (name == "split" and value not in get_args(Split)):
            wanted = "select or test" if name == "split" else "a text"
            raise UserError(
                f"In a pairs file {name} must be {wanted}, {where} has {value!r}; correct that "
                "line."
            )
    return kept
