"""Methods: what trains, what stays, and that the model comes back as it was."""

import ast
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from circuitune import methods
from circuitune.components import Head, Mlp
from circuitune.deltas import load_delta, merged, save_tensors, tensor_digest
from circuitune.errors import UserError
from circuitune.methods import (
    METHODS,
    Attached,
    Method,
    attached,
    build,
    full,
    layers,
    lora,
    lora_heads,
    precise,
    random,
)
from circuitune.models import Model, projection_shape
from circuitune.slices import head_gains, head_slices, tensor_name
from tests.conftest import tiny_hf

FAMILIES = ["llama", "qwen2", "gpt2", "phi3", "gpt_neox", "gemma3_text"]
HEADS = (Head(2, 3), Head(1, 0), Head(2, 1))
TOKENS = torch.tensor([[5, 80, 200, 31, 7, 99], [1, 2, 3, 4, 5, 6]])


def fresh(tiny: Callable[..., Model], family: str, **overrides: object) -> Model:
    """A tiny model in float32."""
    if family == "phi3":
        overrides["pad_token_id"] = 0  # the default lies outside a small vocabulary
    model = tiny(family, **overrides)
    model.hf.float()
    return model


def made(name: str, model: Model, seed: int = 0) -> Method:
    """A method by name, on the usual heads and one MLP."""
    return build(name, model, HEADS, [Mlp(2)], "qo", np.random.default_rng(seed))


def traces(model: Model) -> dict[str, object]:
    """All that a method could leave behind: modules, their attributes, bytes, hooks, flags."""
    found: dict[str, object] = {"rng": tensor_digest(torch.get_rng_state())}
    for name, module in model.hf.named_modules():
        found[f"module {name}"] = (id(module), type(module), module.training)
        found[f"names {name}"] = (sorted(vars(module)), len(module._forward_hooks))
    for name, value in model.hf.state_dict().items():
        found[f"bytes {name}"] = tensor_digest(value)
    for name, value in model.hf.named_parameters():
        found[f"parameter {name}"] = (id(value), value.requires_grad, value.grad is None)
    return found


def logits(model: Model) -> Tensor:
    """Logits of two fixed texts, with gradients."""
    return model.hf(TOKENS, use_cache=False).logits


def loss(model: Model) -> Tensor:
    """Cross entropy of the next token."""
    values = logits(model)[:, :-1].flatten(0, 1)
    return torch.nn.functional.cross_entropy(values, TOKENS[:, 1:].flatten())


def trained(model: Model, held: Attached, steps: int = 3) -> None:
    """A few steps of AdamW with strong weight decay."""
    optimiser = torch.optim.AdamW(held.parameters, lr=0.05, weight_decay=0.3)
    for _ in range(steps):
        optimiser.zero_grad()
        loss(model).backward()
        optimiser.step()


def dense(model: Model, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The product of the two factors of each adapted weight, (outputs, inputs)."""
    names = {key.partition("#")[0] for key in tensors}
    return {name: tensors[f"{name}#lora_B"] @ tensors[f"{name}#lora_A"] for name in names}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", METHODS)
def test_model_comes_back_as_it_was(tiny: Callable[..., Model], family: str, name: str) -> None:
    model = fresh(tiny, family)
    method = made(name, model)
    before, expected = traces(model), logits(model)
    with attached(model, method) as held:
        assert torch.equal(logits(model), expected), "attaching must change nothing"
        trained(model, held, steps=1)
        assert not torch.equal(logits(model), expected)
    assert traces(model) == before
    with pytest.raises(KeyError, match="stop"), attached(model, method):
        raise KeyError("stop")
    assert traces(model) == before


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", METHODS)
def test_tensors_merge_into_the_tuned_model(
    tiny: Callable[..., Model], family: str, name: str, tmp_path: Path
) -> None:
    """What is written, added to the base, gives the outputs of the model that was trained."""
    model = fresh(tiny, family)
    with attached(model, made(name, model)) as held:
        trained(model, held)
        tensors, expected = held.tensors(), logits(model).detach()
        kept = {key: value.clone() for key, value in tensors.items()}
        trained(model, held, steps=1)
    assert all(torch.equal(tensors[key], kept[key]) for key in kept), "copies, not views"
    assert {value.dtype for value in tensors.values()} == {torch.float32}
    save_tensors(tmp_path, model, tensors, {})
    with torch.no_grad(), merged(model, load_delta(tmp_path)):
        assert torch.allclose(logits(model), expected, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", METHODS)
def test_parameters_are_all_that_trains(tiny: Callable[..., Model], family: str, name: str) -> None:
    model = fresh(tiny, family)
    method = made(name, model)
    orders = []
    for _ in range(2):
        with attached(model, method) as held:
            loss(model).backward()
            assert {id(p) for p in held.parameters} == {
                id(p) for p in model.hf.parameters() if p.requires_grad
            }
            assert all(p.grad is not None for p in held.parameters)
            assert {p.dtype for p in held.parameters} == {torch.float32}
            shapes = [tuple(p.shape) for p in held.parameters]
            orders.append(list(zip(held.names, shapes, strict=True)))
            parameters = dict(model.hf.named_parameters())
            assert all(
                parameters[name] is p for name, p in zip(held.names, held.parameters, strict=True)
            )
    assert orders[0] == orders[1]
    below = [name for name, _ in orders[0] if f"{model.family.layers}." in name]
    numbers = {int(name.split(f"{model.family.layers}.")[1].split(".")[0]) for name in below}
    assert min(numbers) == method.lowest


@pytest.mark.parametrize("family", FAMILIES)
def test_lora_on_heads_stays_in_the_heads(tiny: Callable[..., Model], family: str) -> None:
    """Outside the heads' rows and columns the delta is exactly 0, with weight decay and all."""
    model = fresh(tiny, family)
    method = lora_heads(model, HEADS, rank=4)
    with attached(model, method) as held:
        trained(model, held, steps=5)
        found = dense(model, held.tensors())
    inside = {name: torch.zeros_like(value, dtype=torch.bool) for name, value in found.items()}
    for part in head_slices(model, HEADS, "qo"):
        if part.leaf == "weight":
            span = slice(part.start, part.stop)
            name = tensor_name(model, part)
            inside[name][span if part.axis == "rows" else (slice(None), span)] = True
    assert len(found) == 4  # queries and outputs of two layers
    for name, value in found.items():
        assert 0 < inside[name].sum() < inside[name].numel()
        assert not value[~inside[name]].any()
        assert value[inside[name]].ne(0).float().mean() > 0.99


def test_lora_on_one_head_of_full_rank_can_be_any_delta(tiny: Callable[..., Model]) -> None:
    """A hand-made check of axes: the delta of a Conv1D weight, added by hand, moves the same."""
    model = fresh(tiny, "gpt2")
    with attached(model, lora_heads(model, [Head(1, 2)], rank=8)) as held:
        trained(model, held)
        tensors, expected = held.tensors(), logits(model).detach()
    with torch.no_grad():
        for name, value in dense(model, tensors).items():
            module = model.hf.get_submodule(name.removesuffix(".weight"))
            assert tuple(value.shape) == projection_shape(module)
            module.weight += value.T  # stored (in, out)
        assert torch.allclose(logits(model), expected, atol=1e-4)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing")  # PEFT asks transformers for it
@pytest.mark.parametrize(("rank", "alpha"), [(3, None), (3, 12.0)])
def test_lora_is_pefts(tiny: Callable[..., Model], rank: int, alpha: float | None) -> None:
    """Against PEFT's own all-linear model, with the same factors."""
    from peft import LoraConfig, get_peft_model

    model = fresh(tiny, "llama")
    with attached(model, lora(model, rank=rank, alpha=alpha, seed=5)) as held:
        trained(model, held)
        tensors, expected = held.tensors(), logits(model).detach()
    config = LoraConfig(r=rank, lora_alpha=alpha or rank, target_modules="all-linear")
    wrapped = get_peft_model(tiny_hf("llama").float(), config)
    names = {key.removesuffix(".default.weight") for key in dict(wrapped.named_parameters())}
    adapted = {name.rpartition(".lora_")[0] for name in names if ".lora_" in name}
    prefix = "base_model.model."
    assert {f"{name.removeprefix(prefix)}.weight" for name in adapted} == {
        key.partition("#")[0] for key in tensors
    }
    scale = (alpha or rank) / rank
    with torch.no_grad():
        for name in adapted:
            layer, key = wrapped.get_submodule(name), f"{name.removeprefix(prefix)}.weight"
            layer.lora_A["default"].weight.copy_(tensors[f"{key}#lora_A"])
            layer.lora_B["default"].weight.copy_(tensors[f"{key}#lora_B"] / scale)
        assert torch.allclose(wrapped(TOKENS).logits, expected, atol=1e-5)


def test_lora_factors_are_float32_over_a_bfloat16_base(tiny: Callable[..., Model]) -> None:
    model = fresh(tiny, "llama")
    model.hf.bfloat16()
    with attached(model, lora_heads(model, HEADS)) as held:
        assert {p.dtype for p in held.parameters} == {torch.float32}
        trained(model, held)
    assert model.dtype == torch.bfloat16


def test_the_seed_decides_the_random_factor(tiny: Callable[..., Model]) -> None:
    model = fresh(tiny, "llama")
    drawn = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed + 7)  # of no consequence
        with attached(model, lora(model, seed=seed)) as held:
            drawn.append(next(iter(held.tensors().values())))
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


@pytest.mark.parametrize("family", FAMILIES)
def test_full_is_every_parameter_once(tiny: Callable[..., Model], family: str) -> None:
    model = fresh(tiny, family, tie_word_embeddings=True)
    method = full(model)
    assert not method.prefix
    assert {tensor_name(model, part) for part in method.parts} == set(
        dict(model.hf.named_parameters())
    )
    with attached(model, method) as held:
        assert sum(p.numel() for p in held.parameters) == model.parameters


@pytest.mark.parametrize("tied", [True, False])
def test_full_is_ordinary_fine_tuning(tiny: Callable[..., Model], tied: bool) -> None:
    """Against a step of plain AdamW on the model's own parameters, tied embeddings or not."""
    model = fresh(tiny, "llama", tie_word_embeddings=tied)
    twin = fresh(tiny, "llama", tie_word_embeddings=tied)
    twin.hf.requires_grad_(True)
    plain = torch.optim.AdamW(twin.hf.parameters(), lr=0.01, weight_decay=0.1)
    with attached(model, full(model)) as held:
        ours = torch.optim.AdamW(held.parameters, lr=0.01, weight_decay=0.1)
        for _ in range(3):
            for each, optimiser in ((model, ours), (twin, plain)):
                optimiser.zero_grad()
                loss(each).backward()
                optimiser.step()
        assert torch.equal(logits(model), logits(twin))


@pytest.mark.parametrize("family", FAMILIES)
def test_random_heads_match_by_layer_and_cost(tiny: Callable[..., Model], family: str) -> None:
    model = fresh(tiny, family)
    chosen = precise(model, HEADS, [Mlp(2)])
    counts = set()
    for seed in range(5):
        method = random(model, HEADS, np.random.default_rng(seed), [Mlp(2)])
        assert not set(method.heads) & set(HEADS)
        assert sorted(head.layer for head in method.heads) == [1, 2, 2]
        assert method.mlps
        assert set(method.mlps) <= {Mlp(1), Mlp(3)}
        assert (method.lowest, method.prefix) == (chosen.lowest, chosen.prefix) == (1, True)
        counts.add(method.heads)
        sizes = [
            sum(p.numel() for p in held.parameters)
            for each in (chosen, method)
            for held in [_held(model, each)]
        ]
        assert sizes[0] == sizes[1]
    assert len(counts) > 1


def _held(model: Model, method: Method) -> Attached:
    with attached(model, method) as held:
        return held


def test_random_without_enough_other_components_is_refused(tiny: Callable[..., Model]) -> None:
    """A full layer takes its control from the next ones: a smaller one would flatter the set."""
    model = fresh(tiny, "llama")
    rng = np.random.default_rng(0)
    every = [Head(layer, index) for layer in range(model.layers) for index in range(model.heads)]
    whole = every[model.heads : 2 * model.heads]
    assert {head.layer for head in random(model, whole, rng).heads} <= {0, 2}
    for heads, mlps in ((every[1:], []), ([], [Mlp(1), Mlp(2), Mlp(3)])):
        with pytest.raises(UserError, match=r"needs .* other heads and .* other MLPs"):
            random(model, heads, rng, mlps)


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_are_the_whole_projections(tiny: Callable[..., Model], family: str) -> None:
    """Weights and biases of queries, keys, values and outputs, and no norm among them."""
    model = fresh(tiny, family)
    names = {tensor_name(model, part) for part in layers(model, HEADS).parts}
    inside = tuple(f"{model.family.layers}.{i}.{model.family.attention}." for i in (1, 2))
    expected = {
        name
        for name, _ in model.hf.named_parameters()
        if name.startswith(inside) and "norm" not in name
    }
    assert names == expected
    touched = {tensor_name(model, part) for part in head_slices(model, HEADS, "qkvo")}
    assert touched <= names


def test_gains_reach_the_slices(tiny: Callable[..., Model]) -> None:
    model = fresh(tiny, "llama")
    method = precise(model, [Head(1, 0)])
    gradients = []
    for gains in (None, head_gains(model, method.parts)):
        with attached(model, method, gains) as held:
            loss(model).backward()
            gradients.append([p.grad.clone() for p in held.parameters])
    assert all(torch.allclose(4 * a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: made("sideways", m), "one of precise, random, layers"),
        (lambda m: precise(m, []), "needs a head or an MLP"),
        (lambda m: lora_heads(m, []), "needs a head or an MLP"),
        (lambda m: precise(m, [Head(9, 0)]), "layers 0-3"),
        (lambda m: lora(m, rank=0), "at least 1"),
    ],
)
def test_mistakes_are_named(
    tiny: Callable[..., Model], call: Callable[[Model], Method], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        call(fresh(tiny, "llama"))


def test_peft_is_not_imported_early() -> None:
    """It takes seconds, and only LoRA needs it."""
    tree = ast.parse(Path(methods.__file__).read_text(encoding="utf-8"))
    early = [
        ast.unparse(node) for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)
    ]
    assert early
    assert not [line for line in early if "peft" in line]
