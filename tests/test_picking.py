"""Rules that pick heads to tune, each against a plain way to the same order."""

from collections.abc import Callable
from itertools import combinations
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from circuitune.components import Head, Mlp
from circuitune.effects import EffectTable
from circuitune.errors import UserError
from circuitune.examples import IGNORED, Example
from circuitune.models import Model
from circuitune.picking import (
    RULES,
    by_gradient,
    direct_means,
    for_their_price,
    pick_heads,
    pick_mlps,
    prices,
    upstream,
)

COMPONENTS = (Head(0, 1), Head(2, 0), Mlp(1), Head(3, 2), Mlp(3))
MEANS = (-0.3, -1.0, -0.6, -0.8, 0.1)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The files of a run that rules read."""
    clean = {"logit_diff": np.zeros(2)}
    patched = {"logit_diff": np.array([[mean - 0.01, mean + 0.01] for mean in MEANS])}
    EffectTable(COMPONENTS, clean, patched).to_frame().to_parquet(tmp_path / "effects.parquet")
    rows = [
        ("edge", "select", "1.1", "23.0.q", 0.2),
        ("edge", "select", "1.1", "23.0.v", -0.6),
        ("edge", "select", "2.0", "23.0.v", 0.5),
        ("edge", "test", "0.0", "23.0.v", 9.0),
        ("direct", "select", "0.2", "answer", 9.0),
        ("edge", "select", "mlp.1", "23.0.k", 2.0),
        ("edge", "select", "embed", "23.0.k", 2.0),
    ]
    columns = ["stage", "split", "sender", "receiver", "effect"]
    table = pd.DataFrame(rows, columns=columns)
    table = table.assign(contrast="operator", role="end", at=None, then=None, example=0)
    table.to_parquet(tmp_path / "paths.parquet")
    return tmp_path


def test_direct_goes_by_the_mean_effect(run: Path, tiny: Callable[..., Model]) -> None:
    assert list(direct_means(run)) == [Head(0, 1), Head(2, 0), Head(3, 2)]
    assert pick_heads(tiny(), run, 2, rule="direct") == (Head(2, 0), Head(3, 2))
    assert pick_mlps(run, 1) == (Mlp(1),)
    assert pick_mlps(run, 0) == ()


def test_upstream_goes_by_the_largest_mean_path_into_a_head(run: Path) -> None:
    assert upstream(run) == (Head(1, 1), Head(2, 0))


def test_gradient_is_that_of_the_whole_matrices(tiny: Callable[..., Model]) -> None:
    """Rows of the gradient of W_Q and columns of that of W_O, by plain backward passes."""
    model = tiny("qwen2")
    rng = np.random.default_rng(0)
    examples = []
    for length in (5, 7, 6):
        tokens = rng.integers(1, 200, length).tolist()
        examples.append(Example(tokens, [IGNORED] * (length - 2) + tokens[-2:]))
    squares = {}
    for example in examples:
        tokens, labels = torch.tensor([example.tokens]), torch.tensor([example.labels])
        for parameter in model.hf.parameters():
            parameter.requires_grad_(True)
        model.hf(tokens, labels=labels).loss.mul(2).backward()
    width = model.d_head
    for layer in range(model.layers):
        attention = model.layer(layer).self_attn
        for index in range(model.heads):
            own = slice(index * width, (index + 1) * width)
            parts = (
                attention.q_proj.weight.grad[own],
                attention.q_proj.bias.grad[own],
                attention.o_proj.weight.grad[:, own],
            )
            squares[Head(layer, index)] = sum(float((part**2).sum()) for part in parts)
    for parameter in model.hf.parameters():
        parameter.grad = None
        parameter.requires_grad_(False)
    expected = sorted(squares, key=lambda head: -squares[head])
    assert by_gradient(model, examples) == tuple(expected)


def test_every_rule_refuses_what_it_cannot_give(run: Path, tiny: Callable[..., Model]) -> None:
    with pytest.raises(UserError, match="--pick must be one of direct, circuit"):
        pick_heads(tiny(), run, 2, rule="best")
    with pytest.raises(UserError, match="must be at most 2, the number that the rule upstream"):
        pick_heads(tiny(), run, 3, rule="upstream")
    with pytest.raises(UserError, match="needs training texts"):
        pick_heads(tiny(), run, 2, rule="gradient")
    pd.DataFrame().to_parquet(run / "paths.parquet")
    with pytest.raises(UserError, match="locate again with --graph"):
        pick_heads(tiny(), run, 1, rule="upstream")
    assert RULES[0] == "direct"


TEXTS = [Example([1, 2, 3, 4, 5, 6, 7], [IGNORED] * 6 + [7])] * 8


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "phi3", "gpt_neox", "gemma3_text"])
def test_prices_fall_by_a_layer_at_a_time(tiny: Callable[..., Model], family: str) -> None:
    """Equal layers take equal shares; with more supervised tokens, which all layers pay, less."""
    model = tiny(family, **({"pad_token_id": 0} if family == "phi3" else {}))
    found = prices(model, TEXTS)
    assert found[0] == 1
    falls = -np.diff(found)
    assert falls == pytest.approx(falls[0], rel=0.1)
    assert falls[0] > 0
    every = [Example(text.tokens, text.tokens) for text in TEXTS]
    assert found[-1] < prices(model, every)[-1] < 1


def by_hand(strengths: dict[Head, float], price: list[float], count: int) -> set[Head]:
    """Every set of heads, valued by its own lowest layer: slow and plain."""
    return set(
        max(
            combinations(strengths, count),
            key=lambda heads: (
                sum(strengths[head] for head in heads) / price[min(head.layer for head in heads)]
            ),
        )
    )


@pytest.mark.parametrize("price", [[1.0] * 4, [1.0, 0.8, 0.6, 0.4], [1.0, 0.75, 0.5, 0.01]])
@pytest.mark.parametrize("count", [1, 3, 5])
def test_the_set_worth_its_price_is_the_best_of_all(price: list[float], count: int) -> None:
    rng = np.random.default_rng(3)
    strengths = {Head(layer, i): float(rng.random()) for layer in range(4) for i in range(3)}
    chosen = for_their_price(strengths, price, count)
    assert set(chosen) == by_hand(strengths, price, count)
    sizes = [strengths[head] for head in chosen]
    assert sizes == sorted(sizes, reverse=True)


def test_cost_prefers_high_layers(run: Path, tiny: Callable[..., Model]) -> None:
    """Layer 3 alone holds 0.8 of the 1.0 in layer 2, whose steps cost nearly twice as much."""
    assert pick_heads(tiny(), run, 1, rule="cost", examples=TEXTS) == (Head(3, 2),)
    with pytest.raises(UserError, match="needs training texts"):
        pick_heads(tiny(), run, 1, rule="cost")
    with pytest.raises(UserError, match="must be at most 3, the number that the rule cost"):
        pick_heads(tiny(), run, 9, rule="cost", examples=TEXTS)
