"""The plan against what real steps take: FLOPs, parameters, optimiser state, saved tensors."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from circuitune.components import Head, Mlp
from circuitune.examples import IGNORED
from circuitune.methods import METHODS, Method, attached, build, full, lora, precise
from circuitune.models import Model
from circuitune.plan import Plan, Workload, flops, plan
from circuitune.prefix import plain_text
from circuitune.sites import states_entering
from circuitune.supervised import LoopConfig, Supervised, TrainingSet

NAMES = [name for name in METHODS if name != "random"]  # of the shapes of precise
FAMILIES = ["llama", "qwen2", "gpt2", "phi3", "gpt_neox", "gemma3_text"]
HEADS = (Head(2, 3), Head(1, 0), Head(2, 1))
ROWS, LENGTH, SUPERVISED = 3, 20, 12
ANCHOR_ROWS = 2
WORK = Workload(ROWS * LENGTH, SUPERVISED, LENGTH, steps=10)
ANCHORED = replace(WORK, anchor_tokens=ANCHOR_ROWS * LENGTH)


def fresh(tiny: Callable[..., Model], family: str, **overrides: object) -> Model:
    """A tiny model in float32, whose attention is written out in products that can be counted."""
    if family == "phi3":
        overrides["pad_token_id"] = 0  # the default lies outside a small vocabulary
    model = tiny(family, **overrides)
    model.hf.float().set_attn_implementation("eager")
    return model


def made(name: str, model: Model) -> Method:
    """A method by name, on the usual heads and one MLP."""
    return build(name, model, HEADS, [Mlp(2)], "qo", np.random.default_rng(0))


class Step:
    """One step as the training loop computes it."""

    def __init__(self, model: Model, method: Method, work: Workload, *, cached: bool) -> None:
        chance = torch.Generator().manual_seed(0)
        self.tokens = torch.randint(0, 256, (ROWS, LENGTH), generator=chance)
        self.labels = torch.full_like(self.tokens, IGNORED)
        self.labels[:, -SUPERVISED // ROWS :] = 7
        self.hidden, self.rows, text = None, None, None
        if cached and method.prefix:
            with torch.no_grad():
                self.hidden = states_entering(model, method.lowest, self.tokens)
        if work.anchor_tokens:
            rows = self.tokens[:ANCHOR_ROWS].tolist()
            text = plain_text(model, rows, method.lowest, prefix=method.prefix)
            self.rows = torch.arange(ANCHOR_ROWS)
        self.data = TrainingSet([], method.lowest, method.prefix, text=text)
        self.config = LoopConfig(
            1, ROWS, 1e-3, keep=float(text is not None), checkpointing=work.checkpointing
        )
        self.model = model

    def loss(self, parameters: list[torch.nn.Parameter]) -> Tensor:
        """Its loss, with the graph for the backward pass."""
        module = Supervised(self.model, parameters, self.data, self.config)
        return module(self.tokens, self.labels, self.hidden, self.rows)["loss"]


def counted(model: Model, method: Method, work: Workload, *, cached: bool) -> int:
    """FLOPs of a real step by torch's counter."""
    step = Step(model, method, work, cached=cached)
    with attached(model, method) as held, FlopCounterMode(display=False) as counter:
        step.loss(held.parameters).backward()
    return counter.get_total_flops()


def near(value: float, share: float) -> object:
    """Within a share of a measured value."""
    return pytest.approx(value, rel=share)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_flops_are_those_of_a_real_step(
    tiny: Callable[..., Model], family: str, name: str, cached: bool
) -> None:
    model = fresh(tiny, family)
    method = made(name, model)
    found = flops(model, method, WORK, cached=cached)
    assert found.total == near(counted(model, method, WORK, cached=cached), 0.03)
    assert (found.prefix > 0) == (method.lowest > 0 and not cached)


@pytest.mark.parametrize("name", ["precise", "full"])
@pytest.mark.parametrize("work", [ANCHORED, replace(WORK, checkpointing=True)])
def test_flops_with_plain_text_and_with_checkpointing(
    tiny: Callable[..., Model], name: str, work: Workload
) -> None:
    model = fresh(tiny, "qwen2")
    method = made(name, model)
    found = flops(model, method, work, cached=True).total
    assert found > 1.1 * flops(model, method, WORK, cached=True).total
    assert found == near(counted(model, method, work, cached=True), 0.05)


@pytest.mark.parametrize("parts", [{"heads": [Head(3, 1)]}, {"heads": [], "mlps": [Mlp(3)]}])
@pytest.mark.parametrize("family", ["llama", "gpt_neox", "opt"])
def test_flops_where_only_the_last_layer_trains(
    tiny: Callable[..., Model], family: str, parts: dict[str, list]
) -> None:
    """The lowest layer needs less than the others, and in parallel blocks less again."""
    model = fresh(tiny, family)
    method = precise(model, **parts)
    found = flops(model, method, WORK, cached=True).total
    assert found == near(counted(model, method, WORK, cached=True), 0.03)


def test_flops_of_a_mixture_of_experts(tiny: Callable[..., Model]) -> None:
    model = fresh(tiny, "mixtral", num_local_experts=4, num_experts_per_tok=2)
    model.hf.set_experts_implementation("eager")
    for method in (full(model), precise(model, HEADS)):
        found = flops(model, method, WORK, cached=False).total
        assert found == near(counted(model, method, WORK, cached=False), 0.03)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", NAMES)
def test_parameters_and_optimiser_are_exact(
    tiny: Callable[..., Model], family: str, name: str
) -> None:
    model = fresh(tiny, family)
    method = made(name, model)
    found = plan(model, method, WORK, cached=True)
    step = Step(model, method, WORK, cached=True)
    with attached(model, method) as held:
        optimiser = torch.optim.AdamW(held.parameters)
        step.loss(held.parameters).backward()
        optimiser.step()
        numbers = sum(p.numel() for p in held.parameters)
        masters = sum(p.nbytes for p in held.parameters)
        gradients = sum(p.grad.nbytes for p in held.parameters)
        states = optimiser.state.values()
        moments = sum(s["exp_avg"].nbytes + s["exp_avg_sq"].nbytes for s in states)
    assert found.trainable == numbers
    assert (found.masters, found.gradients, found.moments) == (masters, gradients, moments)
    assert found.weights == sum(p.nbytes for p in model.hf.parameters())
    assert found.share == numbers / model.parameters


def kept_bytes(model: Model, method: Method, work: Workload, *, cached: bool) -> int:
    """Bytes of all tensors that autograd keeps in a real step, weights and inputs left out."""
    step = Step(model, method, work, cached=cached)
    sizes: dict[int, int] = {}
    with attached(model, method) as held:
        given = [step.tokens, step.labels, *model.hf.parameters(), *model.hf.buffers()]
        weights = {value.untyped_storage().data_ptr() for value in given}

        def keep(value: Tensor) -> Tensor:
            place = value.untyped_storage().data_ptr()
            if place not in weights:
                sizes[place] = value.untyped_storage().nbytes()
            return value

        with saved_tensors_hooks(keep, lambda value: value):
            loss = step.loss(held.parameters)
        assert loss.requires_grad
    return sum(sizes.values())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", ["precise", "lora", "full"])
def test_activations_are_near_what_a_step_keeps(
    tiny: Callable[..., Model], family: str, name: str
) -> None:
    model = fresh(tiny, family)
    method = made(name, model)
    for work in (WORK, ANCHORED):
        found = plan(model, method, work, cached=True)
        assert found.activations == near(kept_bytes(model, method, work, cached=True), 0.2)


def test_activations_in_bfloat16_include_the_cast_weights(tiny: Callable[..., Model]) -> None:
    model = fresh(tiny, "llama")
    model.hf.bfloat16()
    method = full(model)
    found = plan(model, method, WORK, cached=True)
    assert found.activations == near(kept_bytes(model, method, WORK, cached=True), 0.2)
    assert found.masters == 2 * found.weights


def test_the_loaded_base_stays_beside_one_of_another_precision(
    tiny: Callable[..., Model],
) -> None:
    model = fresh(tiny, "llama")
    own = plan(model, made("precise", model), WORK, cached=True)
    low = plan(model, made("precise", model), WORK, cached=True, dtype=torch.bfloat16)
    assert low.weights == 1.5 * own.weights == 6 * model.parameters


def test_what_saves_memory_is_seen(tiny: Callable[..., Model]) -> None:
    model = fresh(tiny, "llama")
    method = full(model)
    whole = plan(model, method, WORK, cached=False).activations
    halves = plan(model, method, replace(WORK, pieces=2), cached=False).activations
    twice = plan(model, method, replace(WORK, checkpointing=True), cached=False).activations
    assert halves == near(whole / 2, 0.05)
    assert twice < 0.6 * whole


def test_attaching_for_the_plan_leaves_no_trace(tiny: Callable[..., Model]) -> None:
    model = fresh(tiny, "llama")
    modules = dict(model.hf.named_modules())
    plan(model, full(model), WORK, cached=False)
    plan(model, lora(model), WORK, cached=False)
    assert dict(model.hf.named_modules()) == modules
    assert not [p for p in model.hf.parameters() if p.requires_grad]


def test_cache_holds_what_enters_the_lowest_layer(tiny: Callable[..., Model]) -> None:
    model = fresh(tiny, "llama")
    method = made("precise", model)
    width = model.d_model * 4
    assert plan(model, method, WORK, cached=True).cache == WORK.tokens * WORK.steps * width
    some = plan(model, method, replace(WORK, stored=90), cached=True)
    assert some.cache == 90 * width
    assert plan(model, method, WORK, cached=False).cache == 0
    assert plan(model, full(model), WORK, cached=True).cache == 0  # the embeddings train


def test_full_is_the_measure_of_all(tiny: Callable[..., Model]) -> None:
    model = fresh(tiny, "llama")
    ratios = [
        plan(model, precise(model, [Head(layer, 0)]), WORK, cached=True).ratio
        for layer in range(model.layers)
    ]
    assert ratios == sorted(ratios, reverse=True)
    assert 0 < ratios[-1] < ratios[0] < 1
    assert plan(model, full(model), WORK, cached=True).ratio == 1


def test_lines_and_time(tiny: Callable[..., Model]) -> None:
    model = fresh(tiny, "llama")
    found: Plan = plan(model, made("precise", model), WORK, cached=True)
    text = "\n".join(found.lines())
    assert f"precise: {found.trainable:,} parameters" in text
    assert "backward through 3 of 4, down to layer 1" in text
    assert f"{found.ratio:.0%} of full" in text
    assert found.seconds_left([9.0, 2.0, 2.0]) == 7 * 2.0
    parts = (found.weights, found.masters, found.gradients, found.moments, found.activations)
    assert found.memory == sum(parts)
    assert all(len(line) <= 140 for line in found.lines())
