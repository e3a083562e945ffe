"""Training: the cached prefix is exact, nothing outside the slices moves, data never overlap."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from circuitune.components import Head
from circuitune.config import TuneConfig
from circuitune.errors import UserError
from circuitune.models import Model
from circuitune.pairs import PairSet, Writing, _halves
from circuitune.slices import attached, head_slices, load_delta, merged, save_delta, trainable
from circuitune.tune import (
    IGNORED,
    PlainText,
    Supervised,
    collate,
    held_out_problems,
    in_precision,
    plain_text,
    prefix_states,
    to_example,
    train,
    training_precision,
    training_problems,
    training_set,
    training_text,
)

HEADS = [Head(2, 1), Head(3, 0)]
SMALL = TuneConfig(steps=4, batch_size=8, learning_rate=3e-3, weight_decay=0.1)


@pytest.fixture
def pair_set() -> PairSet:
    """An empty set of pairs with the split of operands that every run has."""
    _, wide = _halves([], seed=0)
    groups = {split: sorted({p.group for p in side}) for split, side in wide.items()}
    selection = {"select_groups": groups["select"], "held_out_groups": groups["test"]}
    return PairSet((), selection)


@pytest.fixture
def examples(tiny: Callable[..., Model], pair_set: PairSet) -> list:
    """Training texts of the tiny tokenizer."""
    problems = training_problems(pair_set, [], SMALL)
    return [to_example(tiny(), problem, Writing("", False)) for problem in problems]


def batch(model: Model, examples: list, layer: int) -> dict[str, torch.Tensor]:
    """The first four examples as the collator gives them, for training from a layer."""
    hidden = prefix_states(model, examples, layer)
    text = plain_text(model, training_text()[:6], layer)
    items = [{"example": examples[i], "hidden": hidden[i], "place": i} for i in range(4)]
    return collate(items, text)


def test_loss_from_the_cached_prefix_is_the_loss_without(
    tiny: Callable[..., Model], examples: list
) -> None:
    model = tiny()
    losses = []
    for layer in (0, 1, 2):
        inputs = batch(model, examples, layer)
        with attached(model, head_slices(model, HEADS)):
            for delta in trainable(model):
                torch.nn.init.constant_(delta, 0.01)
            losses.append(Supervised(model, layer, keep=1.0)(**inputs)["loss"].item())
    assert losses[1] == pytest.approx(losses[0], abs=1e-12)
    assert losses[2] == pytest.approx(losses[0], abs=1e-12)


def test_loss_is_the_cross_entropy_of_the_answer_tokens(
    tiny: Callable[..., Model], examples: list
) -> None:
    model = tiny()
    inputs = batch(model, examples, 2)
    with attached(model, head_slices(model, HEADS)):
        loss = Supervised(model, 2, keep=0.0)(**inputs)["loss"].item()
    terms = []
    for example in examples[:4]:
        logits = model.hf(torch.tensor([example.tokens])).logits[0].log_softmax(dim=-1)
        terms += [
            -logits[i - 1, example.tokens[i]] for i in range(example.start, len(example.tokens))
        ]
    assert loss == pytest.approx(float(torch.stack(terms).mean()), abs=1e-9)


def test_labels_cover_the_answer_and_the_line_break_only(
    tiny: Callable[..., Model], examples: list
) -> None:
    inputs = batch(tiny(), examples, 2)
    for row, example in enumerate(examples[:4]):
        kept = inputs["labels"][row][inputs["labels"][row] != IGNORED].tolist()
        assert kept == example.tokens[example.start :]
        text = tiny().tokenizer.decode(kept)
        assert text.endswith("\n")
        assert text[:-1].isdigit()


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_training_leaves_every_byte_outside_the_slices(
    tiny: Callable[..., Model], examples: list, tmp_path: Path, family: str
) -> None:
    """With weight decay, momentum and clipping; the base itself is untouched."""
    model = in_precision(tiny(family), torch.float32)
    before = {name: value.clone() for name, value in model.hf.state_dict().items()}
    parts = head_slices(model, HEADS)
    outcome = train(model, parts, training_set(model, examples, 2), SMALL, tmp_path)
    after = model.hf.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(value.abs().max() > 0 for value in outcome.deltas.values())
    save_delta(tmp_path, model, outcome.deltas, {})
    with merged(model, load_delta(tmp_path)):
        tuned = {name: value.clone() for name, value in model.hf.state_dict().items()}
    touched = {name for name in before if not torch.equal(before[name], tuned[name])}
    assert touched == {
        f"model.layers.{layer}.self_attn.{name}_proj.weight" for layer in (2, 3) for name in "qo"
    }
    change = (
        tuned["model.layers.2.self_attn.q_proj.weight"]
        - before["model.layers.2.self_attn.q_proj.weight"]
    )
    assert change[8:16].abs().max() > 0
    assert torch.equal(change[:8], torch.zeros_like(change[:8]))
    assert torch.equal(change[16:], torch.zeros_like(change[16:]))


def test_training_lowers_the_loss_and_repeats_exactly(
    tiny: Callable[..., Model], pair_set: PairSet, tmp_path: Path
) -> None:
    config = TuneConfig(steps=40, batch_size=8, learning_rate=1e-2, keep=0.0)
    model = in_precision(tiny(), torch.float32)
    problems = training_problems(pair_set, [], config)
    texts = [to_example(model, problem, Writing("", False)) for problem in problems]
    data = training_set(model, texts, 2)
    runs = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        runs.append(train(model, head_slices(model, HEADS), data, config, tmp_path / name))
    assert sum(runs[0].losses[-5:]) < sum(runs[0].losses[:5])
    for part, value in runs[0].deltas.items():
        assert torch.equal(value, runs[1].deltas[part])


def test_training_and_test_operands_are_disjoint(pair_set: PairSet) -> None:
    test = held_out_problems(pair_set, ("add", "sub", "mul"), digits=2, n=600, seed=0)
    training = training_problems(pair_set, test, TuneConfig())
    groups = {problem.group for problem in training}
    assert not groups & {problem.group for problem in test}
    assert not groups & set(pair_set.selection["held_out_groups"])
    assert not {p.group for p in test} & set(pair_set.selection["select_groups"])


def test_exploding_training_is_one_sentence(
    tiny: Callable[..., Model], examples: list, tmp_path: Path
) -> None:
    model = in_precision(tiny(), torch.float32)
    wild = TuneConfig(steps=4, batch_size=8, learning_rate=1e38)
    with pytest.raises(UserError, match="lower --learning-rate"):
        train(model, head_slices(model, HEADS), training_set(model, examples, 2), wild, tmp_path)


def test_precision_names(tiny: Callable[..., Model]) -> None:
    assert training_precision(tiny(), "float32") is torch.float32
    with pytest.raises(UserError, match="precision must be"):
        training_precision(tiny(), "int8")


def test_plain_text_rows_have_one_length(tiny: Callable[..., Model]) -> None:
    text = plain_text(tiny(), training_text()[:4], 1)
    assert isinstance(text, PlainText)
    assert text.hidden.shape == (*text.tokens.shape, 24)
