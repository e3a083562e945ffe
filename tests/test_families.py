"""Every architecture: fast = slow, cached = plain, replayed = run; and what must be refused."""

import functools
import random
from collections.abc import Callable
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
from circuitune.patching import direct_effects, end_states, prefill, unembed
from circuitune.sites import intervene, record, resume, states_entering
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
    "phi": ("phi", {"pad_token_id": 0}),
    "phi, grouped, q/k norm": (
        "phi",
        {"pad_token_id": 0, "num_key_value_heads": 2, "qk_layernorm": True},
    ),
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


@functools.cache
def make(case: str) -> Model:
    """The tiny model of a case: three layers, float64. Tests leave it as it was."""
    family, options = CASES[case]
    hf = tiny_hf(family, num_hidden_layers=3, **options)
    return wrap(hf, byte_tokenizer(), source=f"tiny {case}")


def prompts(lengths: list[int], seed: int = 0) -> list[list[int]]:
    """Random token lists of the given lengths."""
    rng = random.Random(seed)
    return [[rng.randrange(256) for _ in range(length)] for length in lengths]


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
    for example in (0, 1):  # every component in one of two prompts
        some = table.components[example::2]
        slow = slow_patched_logits(model, clean[example], corrupt[example], some, CANDIDATES)
        fast = table.patched["relative_logit"][example::2, example]
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
    assert (other - states.final).abs().max() > 1e-3


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


@pytest.mark.parametrize("case", ["llama", "falcon, new", "opt", "gptj"])
@pytest.mark.parametrize("where", ["end", "all"])
def test_mlps_can_be_overwritten_at_one_or_all_positions(case: str, where: str) -> None:
    """Also OPT's, which see batch and token as one axis."""
    model = make(case)
    tokens = torch.tensor(prompts([5, 5], seed=7))
    value = torch.randn(2, model.d_model, generator=torch.Generator().manual_seed(0)).double()
    plain = model.hf(tokens).logits
    with intervene(model, {Mlp(1): value}, where=where), record(model) as trace:
        changed = model.hf(tokens, use_cache=False).logits
    torch.testing.assert_close(trace.mlp[1], value)
    before_end = (changed - plain)[:, :-1].abs().max()
    assert before_end < 1e-12 if where == "end" else before_end > 1e-3
    assert (changed - plain)[:, -1].abs().max() > 1e-3


FLOAT32 = ["llama", "gemma2", "gpt2", "falcon, alibi", "opt", "mixtral", "qwen3-moe"]


@pytest.mark.parametrize("case", FLOAT32)
def test_float32_agrees_within_rounding(case: str) -> None:
    """With the kernels that float32 models get: grouped experts, fused attention."""
    family, options = CASES[case]
    options = {key: value for key, value in options.items() if key != "experts_implementation"}
    hf = tiny_hf(family, num_hidden_layers=3, **options).float()
    model = wrap(hf, byte_tokenizer(), source=case)
    clean, corrupt = prompts([5, 9], seed=1), prompts([9, 5], seed=2)
    answers = np.array([1, 2])
    states = [end_states(model, prefill(model, texts)) for texts in (clean, corrupt)]
    table = direct_effects(model, *states, candidates=CANDIDATES, answers=answers)
    some = table.components[::2]
    slow = slow_patched_logits(model, clean[0], corrupt[0], some, CANDIDATES)
    fast = table.patched["relative_logit"][::2, 0]
    np.testing.assert_allclose(fast, slow[:, 1], atol=1e-5, rtol=0)


SIZES = {
    "llama": (24, 4, 2, 8),
    "llama, one key-value head": (24, 4, 1, 8),
    "gemma3": (24, 4, 1, 8),
    "phi3, windows": (24, 4, 2, 8),
    "phi3, all key-value heads": (24, 4, 4, 8),
    "phi, grouped, q/k norm": (32, 4, 2, 8),
    "gpt2": (32, 4, 4, 8),
    "gptj": (32, 4, 4, 8),
    "neox, parallel": (32, 4, 4, 8),
    "falcon, one key-value head": (32, 4, 1, 8),
    "falcon, all key-value heads": (32, 4, 4, 8),
    "falcon, new": (32, 4, 2, 8),
    "opt, norm after, projected": (32, 4, 4, 8),
    "mixtral": (24, 4, 2, 8),
}


@pytest.mark.parametrize("case", SIZES)
def test_sizes_are_read_from_the_weights(case: str) -> None:
    model = make(case)
    assert (model.d_model, model.heads, model.kv_heads, model.d_head) == SIZES[case]


@pytest.mark.parametrize("case", ["mistral, windows", "phi3, windows", "gemma2", "gemma3"])
def test_windows_are_shorter_than_the_prompts(case: str) -> None:
    """The parity tests would pass in silence if the windows did nothing."""
    family, options = CASES[case]
    tokens = torch.tensor(prompts([9], seed=1))
    narrow, open_ = (
        tiny_hf(family, num_hidden_layers=3, **(options | {"sliding_window": width}))(tokens)
        for width in (4, 64)
    )
    assert (narrow.logits - open_.logits)[0, -1].abs().max() > 1e-3


def test_a_stray_window_does_not_shorten_the_cache() -> None:
    """Llama's code ignores ``sliding_window``, transformers' cache does not."""
    model = wrap(tiny_hf("llama", sliding_window=3), byte_tokenizer(), source="stray")
    (tokens,) = prompts([9], seed=1)
    logits = unembed(model, end_states(model, prefill(model, [tokens])).final)[0]
    plain = model.hf(torch.tensor([tokens])).logits[0, -1]
    torch.testing.assert_close(logits, plain, atol=1e-6, rtol=0)


def refusal(action: Callable[[], object]) -> str:
    """The message of a refusal, which must be one sentence that ends in a next step."""
    with pytest.raises(UserError) as caught:
        action()
    message = str(caught.value)
    assert "\n" not in message
    assert message.endswith(".")
    assert ";" in message
    return message


TINY_BERT = {
    "vocab_size": 258,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


@pytest.mark.parametrize("kind", [AutoModelForMaskedLM, AutoModelForCausalLM])
def test_an_encoder_is_refused(kind: type) -> None:
    hf = kind.from_config(AutoConfig.for_model("bert", **TINY_BERT))
    message = refusal(lambda: wrap(hf, byte_tokenizer(), source="some-bert"))
    assert "must be a decoder" in message
    assert "some-bert" in message


def test_linear_attention_is_refused() -> None:
    hf = tiny_hf("qwen3_next", pad_token_id=0, num_experts=4, num_experts_per_tok=2)
    message = refusal(lambda: wrap(hf, byte_tokenizer(), source="hybrid"))
    assert "linear_attention" in message


def test_a_model_that_also_sees_is_refused() -> None:
    config = AutoConfig.for_model("gemma3")
    assert "vision_config" in refusal(lambda: text_config(config, "gemma-3-4b"))
    assert text_config(config.text_config, "its language part").model_type == "gemma3_text"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("is_encoder_decoder", True),
        ("add_cross_attention", True),
        ("use_bidirectional_attention", True),
        ("num_kv_shared_layers", 2),
        ("layer_types", ["full_attention", "mamba"]),
        ("return_dict", False),
    ],
)
def test_what_breaks_the_measurement_is_refused_by_name(name: str, value: object) -> None:
    hf = tiny_hf("llama", num_hidden_layers=2)
    setattr(hf.config, name, value)
    message = refusal(lambda: wrap(hf, byte_tokenizer(), source="odd"))
    assert name in message or str(value[-1]) in message


def test_an_attribute_that_nobody_explained_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    hf = tiny_hf("granite", num_hidden_layers=2, residual_multiplier=0.5)
    known = {"sizes": tuple(hf.config.to_dict().keys() - {"residual_multiplier"})}
    monkeypatch.setattr("circuitune.models.UNDERSTOOD", known)
    message = refusal(lambda: wrap(hf, byte_tokenizer(), source="odd"))
    assert "residual_multiplier = 0.5" in message


def test_an_extra_attribute_counts_only_if_the_code_reads_it() -> None:
    hf = tiny_hf("llama", num_hidden_layers=2, is_llama_config=True)
    wrap(hf, byte_tokenizer(), source="harmless")
    # Read by the masks of transformers, whatever the architecture.
    hf = tiny_hf("llama", num_hidden_layers=2, attention_chunk_size=4)
    assert "attention_chunk_size" in refusal(lambda: wrap(hf, byte_tokenizer(), source="odd"))


# Extra keys in the configurations of well-known checkpoints.
PUBLISHED = {
    "llama": {"is_llama_config": True, "rope_interleaved": False, "transformers.js_config": {}},
    "qwen2": {"use_mrope": False, "max_window_layers": 21, "use_sliding_window": False},
    "gemma2": {"cache_implementation": "hybrid", "hidden_act": "gelu_pytorch_tanh"},
    "phi3": {"auto_map": {"AutoConfig": "x"}, "rope_scaling": None, "pad_token_id": 0},
    "gpt2": {"task_specific_params": {}, "n_ctx": 64, "summary_type": "cls_index"},
    "gptj": {"rotary": True, "gradient_checkpointing": False, "tokenizer_class": "GPT2Tokenizer"},
    "gpt_neox": {"rotary_pct": 0.25, "rotary_emb_base": 10000},
    "falcon": {"apply_residual_connection_post_layernorm": False},
    "opt": {"activation_dropout": 0.0, "prefix": "</s>", "output_projection": True},
    "mixtral": EXPERTS | {"output_router_logits": True, "router_aux_loss_coef": 0.02},
}


@pytest.mark.parametrize("family", PUBLISHED)
@pytest.mark.usefixtures("exact")
def test_configurations_as_published_are_accepted(family: str) -> None:
    hf = tiny_hf(family, num_hidden_layers=2, **PUBLISHED[family])
    model = wrap(hf, byte_tokenizer(), source=family)
    assert selftest.run(model, samples=2).passed


@pytest.mark.parametrize("case", ["llama", "falcon, new", "opt"])
def test_the_self_test_passes(case: str) -> None:
    report = selftest.prove(make(case))
    assert report.passed
    assert report.samples == 8
    assert 0 <= report.difference < 1e-6 < report.effect
    assert report.noise <= 1e-12
    assert "float64" in str(report)


@pytest.mark.parametrize(
    ("case", "wrong"),
    [
        ("phi", {"norm_before_attention": "input_layernorm"}),  # the MLP reads that norm too
        ("llama", {"norm_before_attention": "post_attention_layernorm"}),
        ("olmo2", {"norm_before_attention": "post_attention_layernorm"}),
        ("llama", {"attention": "self_attn.o_proj"}),
    ],
)
def test_the_self_test_sees_a_wrong_record(case: str, wrong: dict[str, str]) -> None:
    model = make(case)
    broken = replace(model, family=replace(model.family, **wrong))
    message = refusal(lambda: selftest.prove(broken))
    assert "self-test" in message or "fast sweep" in message


def test_the_self_test_sees_heads_that_are_not_slices() -> None:
    """Differential attention joins two heads in every slice."""
    model = wrap(tiny_hf("diffllama", num_key_value_heads=4), byte_tokenizer(), source="diff")
    report = selftest.run(model)
    assert report.leak > 1e-3
    assert not report.passed


@pytest.mark.parametrize("family", ["starcoder2", "glm4", "persimmon"])
def test_an_unknown_architecture_is_accepted_if_it_proves_itself(family: str) -> None:
    sizes = {"hidden_size": 32} if family == "persimmon" else {}
    hf = tiny_hf(family, num_hidden_layers=2, pad_token_id=0, **sizes)
    model = wrap(hf, byte_tokenizer(), source=family)
    assert family not in FAMILIES
    assert not model.family.proven
    assert selftest.prove(model).passed


def test_an_unknown_architecture_that_differs_is_refused() -> None:
    """BLOOM adds the residual stream inside its attention and its MLP."""
    config = AutoConfig.for_model("bloom", vocab_size=258, hidden_size=32, n_head=4, n_layer=2)
    model = wrap(AutoModelForCausalLM.from_config(config), byte_tokenizer(), source="a bloom")
    assert "a bloom" in refusal(lambda: selftest.prove(model))


def test_one_mlp_and_one_head_at_least_are_sampled() -> None:
    model = make("llama")
    for samples in (1, 2, 8, 100):
        rng = random.Random(samples)
        kinds = [isinstance(part, Mlp) for part in selftest._sample(model, samples, rng)]
        assert True in kinds
        assert False in kinds
