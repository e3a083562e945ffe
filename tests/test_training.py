"""The loop: exact losses, nothing but the given parameters moves, and a killed run goes on."""

import gc
import json
import math
import os
import random
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from circuitune import ranks, training
from circuitune.components import Head, Mlp
from circuitune.errors import UserError
from circuitune.examples import IGNORED, Example
from circuitune.models import Model, load
from circuitune.prefix import text_rows, training_text
from circuitune.slices import attached, head_slices, mlp_slices, trainable
from circuitune.supervised import (
    PASS_TOKENS,
    Course,
    LoopConfig,
    Supervised,
    TrainingSet,
    alike,
    collate,
    training_set,
)
from circuitune.training import LOG, Monitor, Outcome, checkpoints, train
from tests.test_families import EACH, make
from tests.test_ranks import launch

HEADS = [Head(2, 1), Head(3, 0)]
SMALL = LoopConfig(steps=6, batch_size=8, learning_rate=3e-3)


@pytest.fixture(scope="module", autouse=True)
def nothing_to_collect() -> Iterator[None]:
    """The Trainer collects garbage when it starts: a second each time, with all that is loaded."""
    gc.freeze()
    yield
    gc.unfreeze()


def examples(count: int = 20, seed: int = 0) -> list[Example]:
    """Texts of unequal length with one to five supervised tokens at the end."""
    chance = torch.Generator().manual_seed(seed)
    made = []
    for number in range(count):
        length = 6 + int(torch.randint(0, 14, (), generator=chance))
        row = torch.randint(97, 107, (length,), generator=chance).tolist()
        cut = length - 1 - number % 5
        made.append(Example(row, [IGNORED] * cut + row[cut:]))
    return made


@pytest.fixture
def model(tiny: Callable[..., Model]) -> Model:
    """A tiny Llama in the precision of training."""
    made = tiny()
    made.hf.float()
    return made


def plain(model: Model, count: int = 4) -> list[list[int]]:
    """Rows of plain text."""
    return text_rows(model, training_text()[: 2 * count])[:count]


@contextmanager
def slices(model: Model) -> Any:
    """The slices of two heads, attached."""
    with attached(model, head_slices(model, HEADS)):
        yield trainable(model)


def trained(
    model: Model, data: TrainingSet, config: LoopConfig, folder: Path, **more: Any
) -> tuple[list[Tensor], Outcome]:
    """The deltas after training, and what was told about it."""
    with slices(model) as parameters:
        outcome = train(model, parameters, data, config, folder, **more)
        return [parameter.detach().clone() for parameter in parameters], outcome


def same(one: Sequence[Tensor], two: Sequence[Tensor]) -> bool:
    """Whether two lists of tensors agree in every bit."""
    return all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


@pytest.fixture
def data(model: Model, tmp_path: Path) -> TrainingSet:
    """Texts, their cached hidden states, and plain text."""
    return training_set(model, examples(), 2, cache=tmp_path / "cache", rows=plain(model))


# ----------------------------------------------------------------------------------------- loss


def first_batch(data: TrainingSet, config: LoopConfig) -> dict[str, Tensor]:
    """The first step as one batch."""
    course = Course(data, config)
    return collate([course[place] for place in range(config.batch_size)])


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2"])
def test_loss_from_the_cache_is_the_loss_without(
    tiny: Callable[..., Model], tmp_path: Path, family: str
) -> None:
    """From cached states, with frozen layers run each time, and with the whole model run."""
    model, config = tiny(family), replace(SMALL, keep=2.0)
    losses = []
    for layer, prefix, cache in (
        (2, True, tmp_path),
        (1, True, tmp_path),
        (2, True, None),
        (0, False, None),
    ):
        data = training_set(model, examples(), layer, prefix=prefix, cache=cache, rows=plain(model))
        batch = first_batch(data, config)
        assert ("hidden" in batch) == (cache is not None)
        with slices(model) as parameters:
            for number, parameter in enumerate(parameters):
                nn.init.constant_(parameter, 0.01 * (number + 1))
            losses.append(Supervised(model, parameters, data, config)(**batch)["loss"].item())
    assert losses == pytest.approx([losses[0]] * 4, abs=1e-12)


def test_loss_is_the_mean_surprise_of_supervised_tokens(tiny: Callable[..., Model]) -> None:
    model = tiny()
    data = TrainingSet(examples(), 2, prefix=True)
    with slices(model) as parameters:
        loss = Supervised(model, parameters, data, SMALL)(**first_batch(data, SMALL))["loss"]
    terms = []
    for place in Course(data, SMALL).order[:8]:
        example = data.examples[place]
        logits = model.hf(torch.tensor([example.tokens])).logits[0].log_softmax(dim=-1)
        for at, label in enumerate(example.labels):
            if label != IGNORED:
                terms.append(-float(logits[at - 1, label]))
    assert loss.item() == pytest.approx(sum(terms) / len(terms), abs=1e-9)


def test_many_supervised_rows_give_the_same_loss_and_gradient(
    tiny: Callable[..., Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Replayed text, all tokens supervised, whose logits are made in portions."""
    model = tiny()
    data = TrainingSet([Example(e.tokens, e.tokens) for e in examples()], 2, prefix=True)
    found = []
    for rows in (2048, 7):
        monkeypatch.setattr("circuitune.supervised.LOGIT_ROWS", rows)
        with slices(model) as parameters:
            loss = Supervised(model, parameters, data, SMALL)(**first_batch(data, SMALL))["loss"]
            loss.backward()
            found.append([loss, *(parameter.grad for parameter in parameters)])
    torch.testing.assert_close(found[0], found[1], rtol=1e-10, atol=1e-13)


def test_kl_of_the_base_to_itself_is_zero_also_when_the_unembedding_moves(
    tiny: Callable[..., Model],
) -> None:
    model = tiny()
    config = replace(SMALL, keep=1.0)
    data = training_set(model, examples(), 0, prefix=False, rows=plain(model))
    embedding = model.hf.get_output_embeddings().weight
    module = Supervised(model, [embedding], data, config)
    batch = first_batch(data, config)
    rows = batch["rows"]
    assert module._divergence(rows).item() == pytest.approx(0, abs=1e-12)
    tokens = data.text.tokens[rows]
    base = model.hf(tokens).logits.log_softmax(dim=-1)
    with torch.no_grad():
        embedding.mul_(1.2)
    now = model.hf(tokens).logits.log_softmax(dim=-1)
    wanted = (base.exp() * (base - now)).sum(dim=-1).mean(dim=1).sum()
    assert wanted > 0.01
    assert module._divergence(rows).item() == pytest.approx(wanted.item(), abs=1e-10)


def gradients(model: Model, data: TrainingSet, config: LoopConfig) -> list[Tensor]:
    """Gradients of the first step, and whether anything below the lowest layer was tracked."""
    with slices(model) as parameters:
        module = Supervised(model, parameters, data, config)
        module(**first_batch(data, config))["loss"].backward()
        return [parameter.grad for parameter in parameters]


def test_checkpointing_changes_nothing_but_memory(model: Model, data: TrainingSet) -> None:
    config = replace(SMALL, keep=1.0)
    plainly = gradients(model, data, config)
    assert same(plainly, gradients(model, data, replace(config, checkpointing=True)))
    assert all(gradient.any() for gradient in plainly)
    assert all("forward" not in model.layer(index).__dict__ for index in range(model.layers))


@EACH
@pytest.mark.usefixtures("exact")
def test_groups_of_like_length_give_the_gradient_of_one_padded_batch(
    case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All texts at once, padded; those alike together; each alone."""
    model = make(case)
    unlike = [
        Example(e.tokens * times, e.labels * times)
        for e, times in zip(examples(8), (1, 3, 1, 2, 3, 1, 1, 2), strict=True)
    ]
    data, found, passes = TrainingSet(unlike, 1, prefix=True), [], Counter[int]()
    run = Supervised._final_states
    for cost in (1000, 10, 0):

        def counted(*args: Any, cost: int = cost) -> Tensor:
            passes[cost] += 1
            return run(*args)

        monkeypatch.setattr(Supervised, "_final_states", counted)
        monkeypatch.setitem(PASS_TOKENS, "cpu", cost)
        with attached(model, head_slices(model, [Head(1, 1), Head(2, 0)])):
            module = Supervised(model, trainable(model), data, SMALL)
            loss = module(**first_batch(data, SMALL))["loss"]
            loss.backward()
            found.append([loss.detach(), *(p.grad for p in module.trained)])
    assert 1 == passes[1000] < passes[10] < passes[0]
    for other in found[1:]:
        torch.testing.assert_close(found[0], other, rtol=1e-8, atol=1e-11)


@given(st.lists(st.integers(1, 60), min_size=1, max_size=7), st.integers(0, 40))
def test_texts_are_grouped_at_the_least_cost(lengths: list[int], cost: int) -> None:
    """Against all ways to cut the sorted texts; each text stands in one group."""
    groups = alike(lengths, cost)
    assert sorted(place for group in groups for place in group) == list(range(len(lengths)))
    ours = sum(len(group) * max(lengths[place] for place in group) + cost for group in groups)
    order, ways = sorted(lengths), []
    for cuts in range(2 ** (len(order) - 1)):
        ends = [n + 1 for n in range(len(order) - 1) if cuts >> n & 1] + [len(order)]
        starts = [0, *ends[:-1]]
        parts = zip(starts, ends, strict=True)
        ways.append(sum((b - a) * order[b - 1] + cost for a, b in parts))
    assert ours == min(ways)


def test_backward_stops_at_the_lowest_layer(model: Model, data: TrainingSet) -> None:
    tracked = {}

    def look(index: int) -> Callable[..., None]:
        def hook(*seen: Any) -> None:
            output = seen[-1][0] if isinstance(seen[-1], tuple) else seen[-1]
            tracked[index] = output.requires_grad

        return hook

    handles = [
        model.layer(index).register_forward_hook(look(index)) for index in range(model.layers)
    ]
    for states in (data.states, None):
        gradients(model, replace(data, states=states), replace(SMALL, keep=1.0))
        assert tracked == {0: False, 1: False, 2: True, 3: True}
    for handle in handles:
        handle.remove()


# ----------------------------------------------------------------------------------------- loop


def test_pieces_of_a_batch_add_up(model: Model, tmp_path: Path) -> None:
    """Texts of unequal length, KL and clipping included; float64, so that rounding is small."""
    model.hf.double()
    data = training_set(model, examples(), 2, rows=plain(model))
    deltas, losses = [], []
    for accumulate in (1, 2, 4, 8):
        config = replace(SMALL, accumulate=accumulate, keep=2.0, max_grad_norm=0.5)
        found, outcome = trained(model, data, config, tmp_path / str(accumulate))
        deltas.append(found)
        losses.append(outcome.losses)
    for found, loss in zip(deltas[1:], losses[1:], strict=True):
        torch.testing.assert_close(found, deltas[0], rtol=0, atol=2e-6)
        assert loss == pytest.approx(losses[0], abs=2e-6)
    assert deltas[0][0].abs().max() > 1e-3


def test_a_run_repeats_bit_by_bit_and_leaves_the_base(
    model: Model, data: TrainingSet, tmp_path: Path
) -> None:
    before = {name: value.clone() for name, value in model.hf.state_dict().items()}
    config = replace(SMALL, steps=30, learning_rate=1e-2, weight_decay=0.1, keep=0.5)
    one, told = trained(model, data, config, tmp_path / "one")
    two, _ = trained(model, data, config, tmp_path / "two")
    assert same(one, two)
    assert sum(told.losses[-5:]) < sum(told.losses[:5])
    assert (told.steps, told.kept, told.stopped, len(told.losses)) == (30, 30, "steps", 30)
    assert told.tokens == sum(
        len(data.examples[place].tokens) - 1 for place in Course(data, config).order
    )
    after = model.hf.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_the_order_is_whole_epochs_of_the_seed() -> None:
    data = TrainingSet(examples(12), 2, prefix=True)
    order = Course(data, replace(SMALL, steps=9, batch_size=4)).order
    assert [sorted(order[k : k + 12]) for k in (0, 12, 24)] == [list(range(12))] * 3
    assert order[:12] != order[12:24]
    assert order == Course(data, replace(SMALL, steps=9, batch_size=4)).order
    assert order != Course(data, replace(SMALL, steps=9, batch_size=4, seed=1)).order


def test_every_step_is_logged(model: Model, data: TrainingSet, tmp_path: Path) -> None:
    _, outcome = trained(model, data, replace(SMALL, max_grad_norm=0.0), tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run" / LOG).read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 7))
    assert [line["loss"] for line in lines] == outcome.losses
    for line in lines:
        wanted = ("grad_norm", "tokens_per_second", "seconds", "memory")
        assert all(line[name] > 0 for name in wanted)
    rates = [line["learning_rate"] for line in lines]
    assert rates == pytest.approx([0, 3e-3, 2.4e-3, 1.8e-3, 1.2e-3, 0.6e-3])
    assert [path.name for path in (tmp_path / "run").iterdir()] == [LOG]


def test_decay_pulls_deltas_as_adamw_does(model: Model, data: TrainingSet, tmp_path: Path) -> None:
    """Against torch's AdamW with its own decay, on the same gradients."""
    config = replace(
        SMALL, steps=12, weight_decay=5.0, schedule="constant", warmup=0.0, max_grad_norm=0.0
    )
    found, _ = trained(model, data, config, tmp_path / "run")
    course = Course(data, config)
    with slices(model) as parameters:
        module = Supervised(model, parameters, data, config)
        optimizer = torch.optim.AdamW(parameters, lr=3e-3, weight_decay=5.0)
        for step in range(12):
            batch = collate([course[step * 8 + number] for number in range(8)])
            module(**batch)["loss"].backward()
            optimizer.step()
            optimizer.zero_grad()
        wanted = [parameter.detach().clone() for parameter in parameters]
    torch.testing.assert_close(found, wanted, rtol=0, atol=3e-5)
    free, _ = trained(model, data, replace(config, weight_decay=0.0), tmp_path / "free")
    assert all(a.norm() < 0.95 * b.norm() for a, b in zip(found, free, strict=True))


def test_decay_pulls_whole_parameters_to_the_base_not_to_zero(
    model: Model, data: TrainingSet, tmp_path: Path
) -> None:
    weight = model.layer(3).mlp.down_proj.weight
    base = weight.detach().clone()
    moved = []
    for number, decay in enumerate((0.0, 100.0)):
        with torch.no_grad():
            weight.copy_(base)
        weight.requires_grad_(True)
        config = replace(SMALL, steps=15, weight_decay=decay)
        train(model, [weight], data, config, tmp_path / str(number))
        moved.append((weight.detach() - base).norm())
        weight.requires_grad_(False)
    assert 0 < moved[1] < 0.8 * moved[0]
    assert (weight - base).norm() < 0.05 * base.norm()  # towards zero would be 0.9


def test_what_trains_in_place_has_a_rate_of_its_own(
    model: Model, data: TrainingSet, tmp_path: Path
) -> None:
    """Against torch's AdamW with two groups; a resumed run has both rates too."""
    parts = [*head_slices(model, HEADS), *mlp_slices(model, [Mlp(3)])]
    config = replace(SMALL, in_place=0.1, save_every=4, schedule="constant", warmup=0.0)
    ends = []
    for name, runs in (("whole", (6,)), ("resumed", (4, 6))):
        for steps in runs:
            some = replace(config, steps=steps)
            with attached(model, parts), pytest.MonkeyPatch.context() as patch:
                patch.setattr(training, "_check", lambda *_: None)  # 4 steps go on to 6
                train(model, trainable(model), data, some, tmp_path / name)
                ends.append([value.detach().clone() for value in trainable(model)])
    assert same(ends[0], ends[2])
    with attached(model, parts):
        values = trainable(model)
        groups = [
            {"params": [v for v in values if v.any() == placed], "lr": rate}
            for placed, rate in ((False, 3e-3), (True, 3e-4))
        ]
        assert all(group["params"] for group in groups)
        module = Supervised(model, values, data, config)
        optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
        course = Course(data, config)
        for step in range(6):
            module(**collate([course[step * 8 + place] for place in range(8)]))["loss"].backward()
            nn.utils.clip_grad_norm_(values, config.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
        torch.testing.assert_close(ends[0], [v.detach() for v in values], rtol=0, atol=3e-6)


# --------------------------------------------------------------------------------------- resume


def die(*_: Any) -> None:
    """End as by a power cut."""
    os.kill(os.getpid(), signal.SIGKILL)


def killed(work: Callable[[], Any]) -> None:
    """Do something in another process that must not live to its end."""
    child = os.fork()
    if child == 0:
        signal.alarm(60)  # a child that hangs must not outlive the test
        try:
            torch.set_num_threads(1)
            work()
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status), "it was not killed"
    assert os.WTERMSIG(status) == signal.SIGKILL


def resumed_after(
    model: Model, data: TrainingSet, config: LoopConfig, folder: Path, steps: Sequence[int]
) -> tuple[list[Tensor], Outcome]:
    """Train, killed in the middle of each of some steps, and go on each time."""

    def killer(step: int) -> Monitor:
        return Monitor(lambda now: die() if now == step else {"seen": now}, 1)

    for step in steps:
        killed(lambda step=step: trained(model, data, config, folder, monitor=killer(step)))
    return trained(model, data, config, folder, monitor=Monitor(lambda now: {"seen": now}, 1))


@pytest.mark.parametrize(
    ("save_every", "steps", "more"),
    [
        (3, (5, 14), {}),
        (4, (4, 5, 9), {"accumulate": 2, "weight_decay": 0.3, "schedule": "cosine"}),
        (1, (1, 2, 15), {"keep": 1.0, "checkpointing": True}),
        (1, sorted(random.Random(0).choices(range(1, 16), k=20)), {"keep": 1.0}),
    ],
)
def test_a_killed_run_ends_as_if_it_had_not_been(
    model: Model,
    data: TrainingSet,
    tmp_path: Path,
    save_every: int,
    steps: Sequence[int],
    more: Mapping[str, Any],
) -> None:
    config = replace(SMALL, steps=15, save_every=save_every, **more)
    wanted, whole = trained(model, data, replace(config, save_every=0), tmp_path / "whole")
    found, outcome = resumed_after(model, data, config, tmp_path / "killed", steps)
    assert same(found, wanted)
    assert outcome.losses == whole.losses
    assert [entry["seen"] for entry in outcome.evaluations] == list(range(1, 16))
    logs = [(tmp_path / name / LOG).read_text().splitlines() for name in ("whole", "killed")]
    for one, two in zip(*logs, strict=True):
        assert [json.loads(one)[k] for k in ("step", "loss", "grad_norm")] == [
            json.loads(two)[k] for k in ("step", "loss", "grad_norm")
        ]


def test_killed_while_saving(
    model: Model, data: TrainingSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The checkpoint before is used; half a one is never seen."""
    config = replace(SMALL, save_every=2)
    wanted, _ = trained(model, data, replace(config, save_every=0), tmp_path / "whole")
    folder = tmp_path / "killed"
    with monkeypatch.context() as patch:
        real = torch.save
        patch.setattr(
            torch, "save", lambda *a, **k: die() if "checkpoint-4" in str(a[1]) else real(*a, **k)
        )
        killed(lambda: trained(model, data, config, folder))
    assert [path.name for path in checkpoints(folder)] == ["checkpoint-2"]
    found, _ = trained(model, data, config, folder)
    assert same(found, wanted)
    assert [path.name for path in checkpoints(folder)] == ["checkpoint-6"]
    again, outcome = trained(model, data, config, folder)  # a run that had finished
    assert same(again, wanted)
    assert (outcome.steps, len(outcome.losses)) == (6, 6)
    assert {path.name for path in folder.iterdir()} == {LOG, "checkpoint-6"}


@pytest.fixture
def half(model: Model, data: TrainingSet, tmp_path: Path) -> Path:
    """The folder of a run that was interrupted after its first checkpoint."""

    def interrupt(step: int) -> dict[str, float]:
        if step == 4:
            raise KeyboardInterrupt
        return {}

    config = replace(SMALL, save_every=3)
    with pytest.raises(KeyboardInterrupt):
        trained(model, data, config, tmp_path / "half", monitor=Monitor(interrupt, 1))
    return tmp_path / "half"


def test_seconds_of_earlier_processes_count(model: Model, data: TrainingSet, half: Path) -> None:
    log = half / LOG
    lines = [json.loads(line) | {"seconds": 1000.0} for line in log.read_text().splitlines()]
    log.write_text("".join(json.dumps(line) + "\n" for line in lines))
    _, outcome = trained(model, data, replace(SMALL, save_every=3), half)
    assert 1000 < outcome.seconds < 1100


def test_a_single_step_moves_the_deltas(model: Model, data: TrainingSet, tmp_path: Path) -> None:
    found, _ = trained(model, data, replace(SMALL, steps=1), tmp_path)
    assert all(value.any() for value in found)


def test_a_checkpoint_is_small(half: Path, data: TrainingSet) -> None:
    """Deltas and two moments of AdamW, beside a few thousand bytes of other state."""
    (path,) = checkpoints(half)
    deltas = (path / "model.safetensors").stat().st_size
    assert deltas < 4 * 4 * 8 * 24 * 4 + 1000  # four slices of 8 x 24, a few bytes of names
    assert sum(file.stat().st_size for file in path.iterdir()) < 3 * deltas + 60_000


def test_another_run_does_not_go_on_from_it(model: Model, data: TrainingSet, half: Path) -> None:
    config = replace(SMALL, save_every=3)
    other = replace(data, examples=examples(seed=1))
    for changed, what in (
        (lambda: trained(model, data, replace(config, learning_rate=1e-3), half), "options"),
        (lambda: trained(model, other, config, half), "training data"),
        (lambda: trained(model, data, config, half, facts={"heads": ["2.1"]}), "method"),
    ):
        with pytest.raises(UserError, match=f"the {what} of .*checkpoint-3 are others"):
            changed()
    with (
        attached(model, head_slices(model, HEADS[:1])),
        pytest.raises(UserError, match="the trained parameters of"),
    ):
        train(model, trainable(model), data, config, half)
    with slices(model) as parameters, torch.no_grad():
        parameters[0][0, 0] = 1
        with pytest.raises(UserError, match="the values at the start of"):
            train(model, parameters, data, config, half)


def test_a_damaged_checkpoint_is_one_sentence(model: Model, data: TrainingSet, half: Path) -> None:
    (path,) = checkpoints(half)
    weights = path / "optimizer.pt"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"optimizer\.pt is not; delete .* to start anew\."):
        trained(model, data, replace(SMALL, save_every=3), half)
    (path / training.RECORD).write_text("{")
    with pytest.raises(UserError, match=r"record\.json is not; delete"):
        trained(model, data, replace(SMALL, save_every=3), half)


def test_a_full_disk_leaves_the_checkpoint_before(
    model: Model, data: TrainingSet, half: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(training, "save_file", full)
        with pytest.raises(UserError, match=r"No space left on device.*the last checkpoint"):
            trained(model, data, replace(SMALL, save_every=3), half)
    assert [path.name for path in checkpoints(half)] == ["checkpoint-3"]
    with monkeypatch.context() as patch:
        real = Path.open
        patch.setattr(Path, "open", lambda p, *a, **k: full() if a == ("a",) else real(p, *a, **k))
        with pytest.raises(UserError, match=r"log\.jsonl, that failed \(No space left on device\)"):
            trained(model, data, replace(SMALL, save_every=3), half)
    assert trained(model, data, replace(SMALL, save_every=3), half)[1].steps == 6


# -------------------------------------------------------------------------------------- monitor


def reading(values: Mapping[int, dict[str, float]]) -> Callable[[int], dict[str, float]]:
    """Values that are known before."""
    return lambda step: values[step]


def after(model: Model, data: TrainingSet, steps: int, folder: Path) -> list[Tensor]:
    """The deltas after some steps of a run of six."""
    seen: list[Tensor] = []
    with slices(model) as parameters:

        def look(step: int) -> dict[str, float]:
            if step == steps:
                seen.extend(parameter.detach().clone() for parameter in parameters)
            return {}

        train(model, parameters, data, SMALL, folder, monitor=Monitor(look, 1))
    return seen


def test_the_budget_stops_and_puts_the_last_state_within_it_back(
    model: Model, data: TrainingSet, tmp_path: Path
) -> None:
    values = {2: {"kl": 0.1}, 4: {"kl": 0.3}, 6: {"kl": 0.0}}
    monitor = Monitor(reading(values), 2, budget=0.2)
    found, outcome = trained(model, data, SMALL, tmp_path / "run", monitor=monitor)
    assert (outcome.steps, outcome.kept, outcome.stopped) == (4, 2, "budget")
    assert outcome.evaluations == [{"step": 2, "kl": 0.1}, {"step": 4, "kl": 0.3}]
    assert same(found, after(model, data, 2, tmp_path / "other"))


@pytest.mark.parametrize("kl", [1.0, math.nan])
def test_a_budget_that_is_passed_at_once_leaves_the_start(
    model: Model, data: TrainingSet, tmp_path: Path, kl: float
) -> None:
    monitor = Monitor(lambda _: {"kl": kl}, 2, budget=0.2)
    found, outcome = trained(model, data, SMALL, tmp_path / "run", monitor=monitor)
    assert (outcome.kept, outcome.stopped) == (0, "budget")
    assert not any(delta.any() for delta in found)


def test_patience_puts_the_best_state_back(model: Model, data: TrainingSet, tmp_path: Path) -> None:
    values = {step: {"exact": value} for step, value in enumerate((0.1, 0.4, 0.2, 0.4, 0.9, 1), 1)}
    for patience, wanted in ((2, (4, 2, "patience")), (3, (6, 6, "steps"))):
        monitor = Monitor(reading(values), 1, patience=patience)
        folder = tmp_path / str(patience)
        found, outcome = trained(model, data, SMALL, folder, monitor=monitor)
        assert (outcome.steps, outcome.kept, outcome.stopped) == wanted
        assert same(found, after(model, data, wanted[1], folder / "other"))


def test_a_resumed_run_remembers_its_best_state(
    model: Model, data: TrainingSet, tmp_path: Path
) -> None:
    values = {1: 0.1, 2: 0.9, 3: 0.2, 4: 0.3, 5: 0.4, 6: 0.5}

    def read(step: int, last: int = 9) -> dict[str, float]:
        return die() if step > last else {"exact": values[step]}

    config = replace(SMALL, save_every=3)
    killed(
        lambda: trained(
            model,
            data,
            config,
            tmp_path / "run",
            monitor=Monitor(lambda step: read(step, 4), 1, patience=5),
        )
    )
    found, outcome = trained(
        model, data, config, tmp_path / "run", monitor=Monitor(read, 1, patience=5)
    )
    assert (outcome.steps, outcome.kept, outcome.stopped) == (6, 2, "steps")
    assert same(found, after(model, data, 2, tmp_path / "other"))


def test_what_stops_training_must_be_measured(
    model: Model, data: TrainingSet, tmp_path: Path
) -> None:
    monitor = Monitor(lambda _: {"exact": 1.0}, 1, patience=1, watch="accuracy")
    with pytest.raises(UserError, match="accuracy of exact; watch another value"):
        trained(model, data, SMALL, tmp_path / "run", monitor=monitor)


def test_exploding_training_stops_at_once(model: Model, data: TrainingSet, tmp_path: Path) -> None:
    config = replace(SMALL, steps=1000, learning_rate=1e38, warmup=0.0)
    with pytest.raises(UserError, match=r"step [23] gave loss .*; lower the learning rate\."):
        trained(model, data, config, tmp_path / "run")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 9, "accumulate": 2}, "9 examples do not into 2"),
        ({"tensorboard": True}, "pip install tensorboard"),
    ],
)
def test_options_that_do_not_fit(
    model: Model,
    data: TrainingSet,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: Mapping[str, Any],
    message: str,
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(UserError, match=message):
        trained(model, data, replace(SMALL, **change), tmp_path / "run")


def test_a_text_without_supervised_tokens_is_refused(
    model: Model, data: TrainingSet, tmp_path: Path
) -> None:
    silent = Example([5, 6, 7], [5, IGNORED, IGNORED])
    other = replace(data, examples=[*data.examples, silent])
    with pytest.raises(UserError, match="number 21 has none; leave it out"):
        trained(model, other, SMALL, tmp_path / "run")


# ---------------------------------------------------------------------------- several processes


def train_together(folder: Path, out: Path) -> None:
    """What each of several processes does; its results go into a file of its own."""
    with ranks.together():
        model = load(str(folder), dtype="float64")
        config = replace(SMALL, keep=2.0, weight_decay=0.1, save_every=4)
        data = training_set(model, examples(), 2, cache=out / "cache", rows=plain(model))
        monitor = Monitor(lambda _: {"rank": ranks.rank()}, 3)
        found, outcome = trained(model, data, config, out / "run", monitor=monitor)
        results = [found, outcome.losses, outcome.evaluations]
        torch.save(results, out / f"{ranks.rank()}.pt")


def test_two_processes_train_what_one_trains(tiny_folder: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    train_together(tiny_folder, tmp_path / "one")
    launch(2, "-m", __name__, tiny_folder, tmp_path / "two")
    one, *two = (torch.load(tmp_path / name) for name in ("one/0.pt", "two/0.pt", "two/1.pt"))
    for found, losses, evaluations in two:
        torch.testing.assert_close(found, one[0], rtol=0, atol=1e-6)
        assert losses == pytest.approx(one[1], abs=1e-6)
        assert evaluations == [{"step": 3, "rank": 0}, {"step": 6, "rank": 0}]
    assert same(two[0][0], two[1][0])
    assert one[0][0].abs().max() > 1e-3
    lines = (tmp_path / "two" / "run" / LOG).read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, 7))


if __name__ == "__main__":
    train_together(*map(Path, sys.argv[1:]))
