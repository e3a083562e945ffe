"""One declarative record per architecture: where things are, not what to do with them.

The sweep runs the model's own decoder layers, so a record needs only names. Norms, parallel
blocks, residual scales, expert routing, soft-caps and sliding windows need no line here: they are
in the code of the layer. A new family is a new record; the parity self-test
(`circuitune check`) decides whether it is right.

The second half lists what the attributes of a Hugging Face configuration mean for the
measurement. Nearly all are harmless, since the model's own code acts on them; an attribute that
no list names is refused (`circuitune.models.wrap`), so that nothing unknown passes in silence.
"""

from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class Family:
    """Names of the parts of one architecture, as attribute paths.

    Attributes:
        name: the ``model_type`` of the Hugging Face configuration.
        trunk: path from the causal model to the module that it calls for the final hidden states.
        layers: path from the causal model to the list of decoder layers.
        attention: path from a layer to the attention block.
        out: path from a layer to the output projection W_O; its input is z, the concatenated
            head outputs.
        mlp: path from a layer to the module whose output is the MLP's output.
        key: path from a layer to the projection that makes the keys.
        fused: whether ``key`` makes queries, keys and values at once.
        layout: how these lie in a fused output: ``stacked``, the queries of all heads, then all
            keys, then all values; ``grouped``, for each key-value head the queries that share it,
            its key, its value; None if that is not known.
        qkv: paths from a layer to the modules that give the queries, keys and values of all
            heads; by default ``key`` and its siblings. A norm over all heads belongs to them.
        norm_before_attention: path from a layer to a norm that feeds the attention *alone*, or
            None. With the attention substituted its result is not needed.
        proven: whether the record is known to fit; one found by structure alone is not, nor that of
            a quantised model, and `circuitune.selftest.prove` decides.
    """

    name: str
    trunk: str = "model"
    layers: str = "model.layers"
    attention: str = "self_attn"
    out: str = "self_attn.o_proj"
    mlp: str = "mlp"
    key: str = "self_attn.k_proj"
    fused: bool = False
    layout: Literal["stacked", "grouped"] | None = None
    qkv: tuple[str, str, str] | None = None
    norm_before_attention: str | None = "input_layernorm"
    proven: bool = True


LLAMA_LIKE = (
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma2",
    "gemma3_text",
    "granite",
    "smollm3",
    "mixtral",
    "qwen3_moe",
)

OTHERS = (
    Family(
        "olmo2",
        qkv=("self_attn.q_norm", "self_attn.k_norm", "self_attn.v_proj"),  # norms over all heads
        norm_before_attention=None,
    ),
    Family(
        "phi3",
        key="self_attn.qkv_proj",
        fused=True,
        layout="stacked",
    ),
    Family("phi", out="self_attn.dense", norm_before_attention=None),  # the MLP reads the norm too
    Family(
        "gpt2",
        trunk="transformer",
        layers="transformer.h",
        attention="attn",
        out="attn.c_proj",
        key="attn.c_attn",
        fused=True,
        layout="stacked",
        norm_before_attention="ln_1",
    ),
    Family(
        "gptj",
        trunk="transformer",
        layers="transformer.h",
        attention="attn",
        out="attn.out_proj",
        key="attn.k_proj",
        norm_before_attention=None,  # the MLP reads the norm too
    ),
    Family(
        "gpt_neox",
        trunk="gpt_neox",
        layers="gpt_neox.layers",
        attention="attention",
        out="attention.dense",
        key="attention.query_key_value",
        fused=True,
        layout="grouped",
    ),
    Family(
        "falcon",
        trunk="transformer",
        layers="transformer.h",
        attention="self_attention",
        out="self_attention.dense",
        key="self_attention.query_key_value",
        fused=True,
        layout="grouped",  # all variants: one key-value head, as many as heads, or between
        norm_before_attention=None,  # shared with the MLP in some variants
    ),
    Family(
        "opt",
        trunk="model.decoder",
        layers="model.decoder.layers",
        out="self_attn.out_proj",
        mlp="fc2",
        norm_before_attention=None,  # it comes after the attention in one variant
    ),
)

FAMILIES: dict[str, Family] = {
    family.name: family for family in (*(Family(name) for name in LLAMA_LIKE), *OTHERS)
}

# Where architectures without a record usually keep their parts, each tried in this order.
USUAL: dict[str, tuple[str, ...]] = {
    "trunk": ("model.decoder", "model", "transformer"),
    "layers": ("layers", "h", "blocks"),
    "attention": ("self_attn", "attn", "attention", "self_attention", "self_attn_layer"),
    "out": ("o_proj", "out_proj", "dense", "c_proj", "wo", "proj", "output"),
    "mlp": ("mlp", "feed_forward", "ffn", "block_sparse_moe", "moe"),
    "key": ("k_proj", "wk", "key"),
    "fused": ("qkv_proj", "query_key_value", "c_attn", "Wqkv", "qkv", "wqkv"),
}

# Attributes that may differ from their defaults, by the reason why that is harmless.
UNDERSTOOD: dict[str, tuple[str, ...]] = {
    "sizes are read from the weights": (
        *("vocab_size", "hidden_size", "n_embd", "intermediate_size", "ffn_dim", "n_inner"),
        *("num_hidden_layers", "n_layer", "num_attention_heads", "n_head", "head_dim"),
        *("num_key_value_heads", "num_kv_heads", "multi_query", "ffn_hidden_size"),
        *("max_position_embeddings", "n_positions", "n_ctx", "word_embed_proj_dim"),
        *("moe_intermediate_size", "num_local_experts", "num_experts", "num_experts_per_tok"),
    ),
    "the layers' own code dequantises": ("quantization_config",),
    "positions and masks are made by the model's own code": (
        *("rope_parameters", "rope_theta", "rope_scaling", "original_max_position_embeddings"),
        *("rotary_dim", "no_rope_layers", "no_rope_layer_interval", "alibi", "layer_types"),
        *("sliding_window", "use_sliding_window", "max_window_layers", "_sliding_window_pattern"),
    ),
    "the model's own layers compute with it": (
        *("hidden_act", "hidden_activation", "activation", "activation_function"),
        *("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "layer_norm_elementwise_affine"),
        *("attention_bias", "mlp_bias", "bias", "enable_bias", "qk_layernorm"),
        *("attn_logit_softcapping", "final_logit_softcapping", "query_pre_attn_scalar"),
        *("embedding_multiplier", "residual_multiplier", "attention_multiplier", "logits_scaling"),
        *("scale_attn_weights", "scale_attn_by_inverse_layer_idx", "reorder_and_upcast_attn"),
        *("use_parallel_residual", "parallel_attn", "num_ln_in_parallel_attn"),
        *("new_decoder_architecture", "do_layer_norm_before", "_remove_final_layer_norm"),
        *("decoder_sparse_step", "mlp_only_layers", "norm_topk_prob", "router_jitter_noise"),
        *("tie_word_embeddings", "chunk_size_feed_forward", "pretraining_tp"),
    ),
    "it acts in training or at the start of training only": (
        *("attention_dropout", "hidden_dropout", "dropout", "layerdrop", "classifier_dropout"),
        *("resid_pdrop", "embd_pdrop", "attn_pdrop", "initializer_range", "init_std"),
        *("router_aux_loss_coef", "output_router_logits"),
    ),
    "the tokenizer or generation uses it": (
        *("bos_token_id", "eos_token_id", "pad_token_id", "use_cache"),
        *("task_specific_params", "tokenizer_class", "prefix"),
    ),
    "it belongs to classification or to bookkeeping": (
        *("id2label", "label2id", "problem_type", "summary_type", "summary_use_proj"),
        *("summary_activation", "summary_proj_to_labels", "summary_first_dropout"),
        *("architectures", "auto_map", "model_type", "transformers_version", "dtype"),
        *("torch_dtype", "_name_or_path", "name_or_path", "_attn_implementation"),
        *("_attn_implementation_internal", "_experts_implementation_internal"),
        *("output_hidden_states", "output_attentions", "_output_attentions", "is_decoder"),
    ),
}

# Attributes that break the measurement unless they have one of these values (or are absent).
REQUIRED: dict[str, tuple[tuple[Any, ...], str]] = {
    "is_encoder_decoder": ((False,), "an encoder feeds the decoder besides its own tokens"),
    "add_cross_attention": ((False,), "an encoder feeds the decoder besides its own tokens"),
    "use_bidirectional_attention": ((False,), "earlier tokens attend to END"),
    "is_causal": ((True,), "earlier tokens attend to END"),
    "num_kv_shared_layers": ((0,), "layers read the keys and values of other layers"),
    "is_heterogeneous": ((False,), "its layers differ in size"),
    "return_dict": ((True,), "its outputs have no names"),
}

# Kinds of layers whose only way to carry information between tokens is softmax attention.
LAYER_TYPES = ("full_attention", "sliding_attention", "chunked_attention", "attention")
