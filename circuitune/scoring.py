"""Requests of lm-eval on our model: what texts share is computed once, tokens of many run together.

lm-eval owns tasks, prompts, filters and metrics; `Backend` is its Hugging Face model (``HFLM``)
and answers the same requests with the same tokens, truncation, stop strings and limits. Only the
forward passes differ: texts run in packs (`circuitune.packs`), so that what they share is computed
once; logits are computed where a token is scored or chosen; answers that are generated run one
token each per step, one that is finished leaves, and the next question takes its place.

Numbers equal those of ``HFLM`` with batch size 1 up to float rounding, and generated answers are
the same: where two tokens come so close that rounding could swap them, ``HFLM`` itself generates
the answer. In half precision rounding is too coarse for that, and an answer may differ, as it does
between any two batch sizes. Sampling, and models that packs do not fit, are left to ``HFLM``.

This module needs the package lm-eval; import it where it is used.
"""

import copy
import logging
import sys
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import lm_eval
import numpy as np
import torch
from jaxtyping import Float
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import (
    handle_stop_sequences,
    normalize_gen_kwargs,
    postprocess_generated_text,
)
from lm_eval.tasks import TaskManager
from torch import Tensor
from tqdm import tqdm
from transformers.generation import GenerationMode, LogitsProcessorList, StoppingCriteriaList

from circuitune.errors import UserError
from circuitune.memory import most_tokens
from circuitune.models import Model
from circuitune.packs import STEM, Columns, Pack, Texts, fine, longest_packed, run
from circuitune.patching import UNEMBED_ROWS, unembed

# Tokens of a pack. Each looks at all others before the mask hides them, which costs a CPU more.
PACK_TOKENS = {"cpu": 1024, "other": 4096}
# Logits closer than this may change places by float32 rounding; ten times what was seen.
TIE = 3e-4
# lm-eval's own seeds; a task that draws its examples draws those that lm-eval's users see.
OTHERS = ("numpy_random_seed", "torch_random_seed", "fewshot_random_seed")
SEEDS = {"random_seed": 0} | dict.fromkeys(OTHERS, 1234)


@dataclass(frozen=True)
class Tally:
    """Log probabilities of the tokens that requests ask for, as they come in.

    Attributes:
        model: the model.
        dtype: in which log probabilities are computed and summed.
        targets: per request the tokens to score.
        asking: text -> the requests whose tokens it predicts, at its end.
        values: per request the log probability of each token, in nats.
        greedy: per request whether each token is the most probable one.
    """

    model: Model
    dtype: torch.dtype
    targets: list[list[int]]
    asking: dict[tuple[int, ...], list[int]]
    values: list[list[float]]
    greedy: list[list[bool]]

    def wanted(
        self, row: tuple[int, ...], start: int, columns: Sequence[int]
    ) -> Iterator[tuple[int, int, int]]:
        """Column, request and step of each token that a part of a text predicts.

        Args:
            row: the text.
            start: where the part begins.
            columns: where its tokens stand in their pack.
        """
        for request in self.asking[row]:
            first = len(row) - len(self.targets[request])
            for place in range(max(first, start), start + len(columns)):
                yield columns[place - start], request, place - first

    def add(
        self, hidden: Float[Tensor, "token width"], wanted: Sequence[tuple[int, int, int]]
    ) -> None:
        """Score the wanted tokens; each column's logits are computed once, a few at a time."""
        order = deque(sorted(wanted))
        columns = sorted({column for column, _, _ in order})
        for begin in range(0, len(columns), UNEMBED_ROWS):
            some = columns[begin : begin + UNEMBED_ROWS]
            logs = unembed(self.model, hidden[some]).log_softmax(dim=-1, dtype=self.dtype)
            best = logs.argmax(dim=-1).tolist()
            here = [order.popleft() for _ in range(sum(item[0] <= some[-1] for item in order))]
            rows = {column: row for row, column in enumerate(some)}
            spots = [rows[column] for column, _, _ in here]
            tokens = [self.targets[request][step] for _, request, step in here]
            values = logs[spots, tokens].tolist()
            for (_, request, step), spot, token, value in zip(
                here, spots, tokens, values, strict=True
            ):
                self.values[request][step] = value
                self.greedy[request][step] = best[spot] == token

    def answer(self, request: int) -> tuple[float, bool]:
        """Log probability of a request's tokens, and whether each is the most probable one."""
        total = torch.tensor(self.values[request], dtype=self.dtype).sum()
        return float(total), all(self.greedy[request])


@dataclass
class Answer:
    """An answer while it is generated.

    Attributes:
        number: number of the request.
        tokens: prompt and answer.
        prompt: how many tokens the prompt has.
        processors: what Hugging Face does to the logits.
        criteria: what ends the answer.
        until: stop strings.
        run: how many of the tokens have run.
        close: whether rounding could have changed a choice.
    """

    number: int
    tokens: list[int]
    prompt: int
    processors: LogitsProcessorList
    criteria: StoppingCriteriaList
    until: list[str]
    run: int = 0
    close: bool = False

    @property
    def left(self) -> range:
        """Places of the tokens that have not run."""
        return range(self.run, len(self.tokens))

    def ends(self) -> bool:
        """Whether the answer is finished, as Hugging Face's ``generate`` sees it."""
        return bool(self.criteria(torch.tensor([self.tokens]), None))


def generate(
    model: Model, prompts: Sequence[Answer], shared: int, batch_tokens: int
) -> Iterator[Answer]:
    """Generate the most probable answers, each yielded when it is finished.

    Args:
        model: the model.
        prompts: answers that hold their prompts alone.
        shared: how many tokens all prompts begin with; each goes on after them.
        batch_tokens: how many tokens behind the shared ones are kept when a prompt joins.
    """
    queue, live = deque(prompts), list[Answer]()
    columns = Columns()
    if shared:
        run(model, columns, Pack.plain(queue[0].tokens[:shared], 0))
    while queue or live:
        room = batch_tokens - sum(len(answer.tokens) - shared for answer in live)
        while queue and (not live or len(queue[0].tokens) - shared <= room):
            live.append(queue.popleft())
            live[-1].run = shared
            room -= len(live[-1].tokens) - shared
        logits = _next_logits(model, live, columns)
        two = logits.topk(2).values
        close = (two[:, 0] - two[:, 1] < (TIE if fine(model) else 0.0)).tolist()
        for answer, token, near in zip(live, logits.argmax(-1).tolist(), close, strict=True):
            answer.run = len(answer.tokens)
            answer.tokens.append(token)
            answer.close |= near
        ended = [answer.ends() for answer in live]
        yield from (answer for answer, end in zip(live, ended, strict=True) if end)
        live = [answer for answer, end in zip(live, ended, strict=True) if not end]
        columns.keep({answer.number for answer in live})


def _next_logits(
    model: Model, live: Sequence[Answer], columns: Columns
) -> Float[Tensor, "example vocab"]:
    """Run what has not run of each answer; logits of what comes next, as ``generate`` has them.

    A token sees the shared ones and those of its own text up to itself.
    """
    parts = [(a.number, place, a.tokens[place]) for a in live for place in a.left]
    owners, places, tokens = (list(part) for part in zip(*parts, strict=True))
    every = np.array(columns.owners + owners)
    visible = np.equal.outer(owners, every) | (every == STEM)
    visible &= np.greater_equal.outer(places, columns.places + places)
    hidden = run(model, columns, Pack(tokens, places, owners, visible))
    last = np.cumsum([len(answer.left) for answer in live]) - 1
    logits = unembed(model, hidden[last.tolist()]).float()
    for row, answer in enumerate(live):
        if answer.processors:
            ids = torch.tensor([answer.tokens], device=logits.device)
            logits[row] = answer.processors(ids, logits[row][None])[0]
    return logits


class Backend(HFLM):
    """lm-eval's Hugging Face model with other forward passes; made by `backend`.

    Attributes:
        wrapped: the model.
        batch_tokens: how many tokens run together, and how many of answers are kept.
        longest: how many tokens a text may have to run in a pack; longer ones go to ``HFLM``.
    """

    def __init__(self, model: Model, batch_tokens: int) -> None:
        """See `backend`."""
        super().__init__(
            pretrained=model.hf,
            # A padding token is added to it.
            tokenizer=copy.deepcopy(model.tokenizer),
            backend="causal",
            batch_size=1,
            softmax_dtype=torch.promote_types(model.dtype, torch.float32),
        )
        self._device = model.device
        self.wrapped = model
        self.batch_tokens = batch_tokens
        self.longest = longest_packed(model)

    @contextmanager
    def _batches_of(self, size: int) -> Iterator[None]:
        """How many requests the methods of ``HFLM`` take together."""
        before, self.batch_size_per_gpu = self.batch_size_per_gpu, size
        try:
            yield
        finally:
            self.batch_size_per_gpu = before

    # ------------------------------------------------------------------------- log likelihoods

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Log likelihood of whole documents in nats, by ``HFLM``'s windows, all of them at once."""
        with self._batches_of(sys.maxsize):
            return super().loglikelihood_rolling(requests, disable_tqdm=disable_tqdm)

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[Any, list[int], list[int]]],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[tuple[float, bool]]:
        """Score continuations of contexts.

        Args:
            requests: for each what it is cached by, its context and its continuation.
            disable_tqdm: show no progress.
            override_bs: not used, packs take its place.

        Returns:
            for each the log probability of the continuation in nats, and whether each of its
            tokens is the most probable one.

        Raises:
            UserError: a continuation has no token, or more than the model has positions.
        """
        asking: dict[tuple[int, ...], list[int]] = {}
        long = []
        for number, (_, context, continuation) in enumerate(requests):
            self._check_length(continuation)
            row = tuple((context + continuation)[-(self.max_length + 1) : -1])
            if len(row) <= self.longest:
                asking.setdefault(row, []).append(number)
            else:
                long.append(number)
        targets = [list(continuation) for _, _, continuation in requests]
        tally = Tally(
            self.wrapped,
            self.softmax_dtype,
            targets,
            asking,
            [[0.0] * len(tokens) for tokens in targets],
            [[False] * len(tokens) for tokens in targets],
        )
        with tqdm(total=len(asking), disable=disable_tqdm, desc="Scoring texts") as bar:
            alone = Texts.of(list(asking)).alone(self.batch_tokens)
            for row in alone:
                self._score_pack(Texts.of([row]), [0], Columns(), tally, bar)
            if rest := list(asking.keys() - set(alone)):
                self._score(Texts.of(rest), (0, len(rest)), Columns(), tally, bar)
        answers = {number: tally.answer(number) for row in asking.values() for number in row}
        for number, answer in answers.items():
            if requests[number][0] is not None:
                self.cache_hook.add_partial("loglikelihood", requests[number][0], answer)
        if long:
            with self._batches_of(1):
                slow = super()._loglikelihood_tokens([requests[i] for i in long], disable_tqdm)
            answers |= dict(zip(long, slow, strict=True))
        return [answers[number] for number in range(len(requests))]

    def _check_length(self, continuation: Sequence[int]) -> None:
        if not 0 < len(continuation) <= self.max_length:
            raise UserError(
                f"A continuation must add 1 to {self.max_length} tokens to its context, found one "
                f"that adds {len(continuation)}; correct the task's choices or leave it out."
            )

    def _score(
        self, texts: Texts, stretch: tuple[int, int], stem: Columns, tally: Tally, bar: tqdm
    ) -> None:
        """Score texts that begin with the stem: what is small in packs, what is large by parts."""
        start = len(stem.places)
        waiting: list[int] = []
        room = self.batch_tokens
        for first, stop in texts.branches(*stretch, start):
            size = texts.size(first, stop, start)
            if size > room:
                self._score_pack(texts, waiting, stem, tally, bar)
                waiting, room = [], self.batch_tokens
            if size <= room:
                waiting += range(first, stop)
                room -= size
                continue
            end = texts.shared(first, stop)
            columns = stem.copy()
            part = Pack.plain(texts.rows[first][start:end], start)
            hidden = run(self.wrapped, columns, part)
            spots = range(end - start)
            rows = texts.rows[first:stop]
            tally.add(hidden, [item for row in rows for item in tally.wanted(row, start, spots)])
            bar.update(len(rows[0]) == end)
            self._score(texts, (first, stop), columns, tally, bar)
        self._score_pack(texts, waiting, stem, tally, bar)

    def _score_pack(
        self, texts: Texts, which: Sequence[int], stem: Columns, tally: Tally, bar: tqdm
    ) -> None:
        """Score texts whose tokens behind the stem fit into a pack."""
        if which:
            start = len(stem.places)
            pack, paths = Pack.tree(texts, which, start)
            hidden = run(self.wrapped, stem.copy(), pack)
            rows = ((texts.rows[place], path) for place, path in paths.items())
            tally.add(hidden, [item for row, at in rows for item in tally.wanted(row, start, at)])
            bar.update(len(which))

    # ------------------------------------------------------------------------------ generation

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Generated answers, each up to its first stop string.

        Raises:
            UserError: an answer may be as long as the model has positions.
        """
        found: dict[int, str] = {}
        asked = [self._asked(number, *request.args) for number, request in enumerate(requests)]
        fast = {answer.number: answer for answer in asked if answer is not None}
        texts = Texts.of([tuple(answer.tokens) for answer in fast.values()])
        # Answers in the order of the texts, which may hold one several times.
        order = sorted(fast.values(), key=lambda answer: answer.tokens)
        with tqdm(total=len(fast), disable=disable_tqdm, desc="Generating answers") as bar:
            for length, places in texts.stems(0, len(order), 2 * self.batch_tokens):
                for answer in generate(
                    self.wrapped, [order[place] for place in places], length, self.batch_tokens
                ):
                    bar.update()
                    if not answer.close:
                        found[answer.number] = self._text(answer)
        for number, request in enumerate(requests):
            if number in found:
                self.cache_hook.add_partial("generate_until", request.args, found[number])
            else:
                found[number] = super().generate_until([request], disable_tqdm=True)[0]
        return [found[number] for number in range(len(requests))]

    def _text(self, answer: Answer) -> str:
        """The text of a finished answer."""
        text = self.tok_decode(answer.tokens[answer.prompt :])
        return postprocess_generated_text(text, answer.until, think_end_token=None)

    def _asked(self, number: int, context: str, settings: Mapping[str, Any]) -> Answer | None:
        """A request as ``HFLM`` prepares it for ``generate``; None if it is not for packs.

        Raises:
            UserError: the answer may be as long as the model has positions.
        """
        kwargs = dict(normalize_gen_kwargs(dict(settings), self.max_gen_toks))
        eos = self.tok_decode(self.eot_token_id, skip_special_tokens=False)
        until = handle_stop_sequences(kwargs.pop("until", None), eos=eos)
        new = kwargs.pop("max_gen_toks")
        if new >= self.max_length:
            raise UserError(
                f"An answer must leave room for a question, {new} new tokens of the "
                f"{self.max_length} positions do not; lower max_gen_toks of the task."
            )
        ids, mask = self.tok_batch_encode(
            [context], left_truncate_len=self.max_length - new, truncation=self.truncation
        )
        most = kwargs.pop("max_length", ids.shape[1] + new)
        if not ids.shape[1] or most > self.longest:
            return None
        answers = []

        def prepared(
            _: Any,
            input_ids: Tensor,
            logits_processor: LogitsProcessorList,
            stopping_criteria: StoppingCriteriaList,
            generation_config: Any,
            **__: Any,
        ) -> Tensor:
            """Stand in for the decoding loop, to see what was prepared for it."""
            if generation_config.get_generation_mode() is GenerationMode.GREEDY_SEARCH:
                tokens = input_ids[0].tolist()
                parts = (logits_processor, stopping_criteria, until)
                answers.append(Answer(number, tokens, len(tokens), *parts))
            return input_ids

        self._model_generate(
            context=ids.to(self.device),
            attention_mask=mask.to(self.device),
            stop=until,
            max_length=most,
            custom_generate=prepared,
            **kwargs,
        )
        return answers[0] if answers else None


def backend(model: Model, *, batch_tokens: int | None = None) -> Backend:
    """The model as lm-eval asks it.

    Args:
        model: the model; weights may change between requests, nothing computed is kept.
        batch_tokens: how many tokens run together; None for a number that suits the device and
            the model's bound on memory.

    Log probabilities are taken in float32 at least, where ``HFLM`` rounds them to the model's type
    unless its ``softmax_dtype`` says otherwise.
    """
    usual = PACK_TOKENS["cpu" if model.device.type == "cpu" else "other"]
    with _quiet():
        return Backend(model, batch_tokens or most_tokens(model, usual))


@contextmanager
def _quiet() -> Iterator[None]:
    """Leave out lm-eval's warning that a model was given, which is meant for its command line."""
    logger = logging.getLogger(HFLM.__module__)
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def ask(
    lm: HFLM,
    tasks: Sequence[str],
    folder: Path,
    *,
    samples: Mapping[str, Sequence[int]] | None = None,
    chat: bool = False,
) -> dict[str, Any]:
    """Ask a model the tasks of a folder.

    Args:
        lm: from `backend`, or any model of lm-eval.
        tasks: lm-eval's names of tasks in the folder.
        folder: files that define them, see `circuitune.taskfiles`.
        samples: task -> numbers of the documents to ask; None for all.
        chat: write questions through the tokenizer's chat template, solved examples as turns.

    Returns:
        lm-eval's results; ``samples`` holds every document with what was answered.
    """
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    # lm-eval asks for the revision of the current folder; outside a repository git complains.
    with mock.patch("lm_eval.evaluator.get_git_commit_hash", return_value=None):
        return lm_eval.simple_evaluate(
            model=lm,
            tasks=list(tasks),
            task_manager=manager,
            samples=None if samples is None else {name: list(own) for name, own in samples.items()},
            bootstrap_iters=0,
            log_samples=True,
            apply_chat_template=chat,
            fewshot_as_multiturn=chat,
            cache_requests=False,
            **SEEDS,
        )
