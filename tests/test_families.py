"""Every architecture: fast = slow, cached = plain, replayed = run; and what must be refused."""

import random
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM

from circuitune import selftest
from circuitune.components import Mlp, all_components
from circuitune.errors import UserError
from circuitune.families import FAMILIES
from circuitune.models import Model, text_config, wrap
from circuitune.patching import direct_effects, end_states, finish, prefill, unembed
from circuitune.sites import resume, states_entering
from tests.conftest import byte_tokenizer, tiny_hf
from tests.reference.slow_effects import slow_patched_logits

CANDIDATES = list(range(16, 26))
WINDOWS = {
    "sliding_window": 4,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}
CAPS = {"query_pre_attn_scalar": 5, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}
GRANITE = {
    "residual_multiplier": 0.4,
    "logits_scaling": 3.0,
    "embedding_multiplier": 2.0,
    "attention_multiplier": 0.3,
}
# The grouped kernels of expert layers know no float64.
EXPERTS = {"experts_implementation": "eager", "num_local_experts": 4, "num_experts_per_tok": 2}

# Name of the case -> architecture, options. Sizes are in conftest: 4 heads, head width 8 and
# model width 24 or (where heads must fill the model) 32; 2 key-value heads unless said otherwise.
CASES: dict[str, tuple[str, dict[str, object]]] = {
    "llama": ("llama", {}),
    "llama, biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama, one key-value head": ("llama", {"num_key_value_heads": 1}),
    "mistral, windows": ("mistral", {"sliding_window": 4}),
    "qwen2": ("qwen2", {}),
    "qwen2, windows": ("qwen2", WINDOWS | {"use_sliding_window": True}),
    "qwen3": ("qwen3", {}),
    "gemma2": ("gemma2", WINDOWS | CAPS),
    "gemma3": ("gemma3_text", WINDOWS | CAPS | {"num_key_value_heads": 1}),
    "phi3, windows": ("phi3", {"pad_token_id": 0, "sliding_window": 4}),
    "phi3, all key-value heads": ("phi3", {"pad_token_id": 0, "num_key_value_heads": 4}),
    "phi": ("phi", {}),
    "phi, grouped, q/k norm": ("phi", {"num_key_value_heads": 2, "qk_layernorm": True}),
    "gpt2": ("gpt2", {"scale_attn_by_inverse_layer_idx": True}),
    "gptj": ("gptj", {}),
    "neox, parallel": ("gpt_neox", {}),
    "neox, sequential": ("gpt_neox", {"use_parallel_residual": False}),
    "olmo2": ("olmo2", {"pad_token_id": 0}),
    "granite": ("granite", GRANITE),
    "smollm3": ("smollm3", {"no_rope_layers": [1, 0, 1], "pad_token_id": 0}),
    "falcon, one key-value head": ("falcon", {}),
    "falcon, all key-value heads": ("falcon", {"multi_query": False, "bias": True}),
    "falcon, sequential": ("falcon", {"parallel_attn": False}),
    "falcon, alibi": ("falcon", {"alibi": True, "parallel_attn": False, "multi_query": False}),
    "falcon, new": ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon, new, one norm": (
        "falcon",
        {"new_decoder_architecture": True, "num_kv_heads": 2, "num_ln_in_parallel_attn": 1},
    ),
    "opt": ("opt", {}),
    "opt, norm after, projected": (
        "opt",
        {"do_layer_norm_before": False, "word_embed_proj_dim": 24},
    ),
    "mixtral": ("mixtral", EXPERTS),
    "qwen3-moe": ("qwen3_moe", EXPERTS | {"moe_intermediate_size": 12, "mlp_only_layers": [1]}),
}
EACH = pytest.mark.parametrize("case", CASES)


def make(case: str) -> Model:
    """The tiny model of a case: three layers, float64."""
    family, options = CASES[case]
    hf = tiny_hf(family, num_hidden_layers=3, **options)
    return wrap(hf, byte_tokenizer(), source=f"tiny {case}")


def prompts(lengths: list[int], seed: int = 0) -> list[list[int]]:
    """Random token lists of the given lengths."""
    rng = random.Random(seed)
    return [[rng.randrange(256) for _ in range(length)] for length in lengths]


@pytest.fixture
def exact(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Norms and softmax of most models round to float32; here they keep float64.

    The identities are statements about the arithmetic, and hold to 1e-9 only without rounding.
    """
    monkeypatch.setattr(torch, "float32", torch.float64)
    yield


@EACH
@pytest.mark.usefixtures("exact")
def test_fast_sweep_equals_one_forward_per_component(case: str) -> None:
    model = make(case)
    # Of unequal length, so that batches are padded on the left; longer than the windows.
    clean, corrupt = prompts([5, 9, 7], seed=1), prompts([9, 7, 5], seed=2)
    answers = np.array([1, 2, 3])
    clean_states, corrupt_states = (end_states(model, prefill(model, p)) for p in (clean, corrupt))
    options = {"candidates": CANDIDATES, "answers": answers}
    table = direct_effects(model, clean_states, corrupt_states, **options)
    assert table.components == all_components(3, 4)
    for example in (0, 1):
        slow = slow_patched_logits(
            model, clean[example], corrupt[example], table.components, CANDIDATES
        )
        fast = table.patched["relative_logit"][:, example]
        np.testing.assert_allclose(fast, slow[:, answers[example]], atol=1e-9, rtol=0)
    assert (np.abs(table.effect("logit_diff")).max(axis=1) > 1e-3).all(), "patching does nothing"
    nothing = direct_effects(model, clean_states, clean_states, **options)
    for metric in nothing.patched:
        assert np.abs(nothing.effect(metric)).max() <= 1e-12


@EACH
@pytest.mark.usefixtures("exact")
def test_cached_end_equals_a_plain_forward(case: str) -> None:
    """Also for a prompt of one token, alone in the padding of a longer one."""
    model = make(case)
    texts = prompts([1, 2, 2, 3, 5, 9, 12], seed=3)
    logits = unembed(model, end_states(model, prefill(model, texts)).final)
    for row, tokens in enumerate(texts):
        plain = model.hf(torch.tensor([tokens])).logits[0, -1]
        torch.testing.assert_close(logits[row], plain, atol=1e-9, rtol=0)


@EACH
@pytest.mark.usefixtures("exact")
def test_all_corrupt_outputs_make_the_corrupt_run(case: str) -> None:
    """The final state of END is a function of its entry and of all head and MLP outputs at END.

    So the clean run with every z and every MLP output of the corrupt run ends like the corrupt
    run if both enter END alike (same last token, same position), and not otherwise.
    """
    model = make(case)
    clean, corrupt = prompts([7, 7], seed=4)
    last = corrupt[-1]
    states = end_states(model, prefill(model, [corrupt]))
    parts = all_components(model.layers, model.heads)
    edits = {part: states.output(part, model.d_head) for part in parts}
    alike = end_states(model, prefill(model, [[*clean[:-1], last]]), edits=edits).final
    torch.testing.assert_close(alike, states.final, atol=1e-9, rtol=0)
    other = end_states(model, prefill(model, [[*clean[:-1], last - 1]]), edits=edits).final
    assert (other - states.final).abs().max() > 1e-3 or "norm after" in case


@EACH
@pytest.mark.usefixtures("exact")
def test_a_run_can_be_resumed_at_every_layer(case: str) -> None:
    model = make(case)
    tokens = torch.tensor(prompts([6, 6], seed=5))
    whole = model.trunk(input_ids=tokens, use_cache=False).last_hidden_state
    for layer in range(model.layers):
        hidden = states_entering(model, layer, tokens)
        assert hidden.shape == (2, 6, model.d_model)
        with resume(model, layer, hidden):
            again = model.hf.base_model(input_ids=tokens, use_cache=False).last_hidden_state
        torch.testing.assert_close(again, whole, atol=1e-12, rtol=0)
    last = model.layer(model.layers - 1)(hidden, **_arguments(model, tokens))
    ended = last[0] if isinstance(last, tuple) else last
    torch.testing.assert_close(finish(model, ended), whole, atol=1e-12, rtol=0)
