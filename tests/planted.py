"""A hand-built Llama whose working heads are known: the ground truth for locating.

Two layers of four heads, no MLP output, uniform attention (W_Q = W_K = 0). A prompt is a start
token, a *carrier* that names the answer, and a noise token. The corrupt prompt has a null token
in place of the carrier. Working heads read the carrier and push its answer. Null heads read the
noise token, which is drawn anew for clean and corrupt, and push random answers: their effects are
not zero, but zero on average.
"""

import random
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Int
from transformers import LlamaConfig, LlamaForCausalLM

from circuitune.components import Head
from circuitune.models import Model, wrap
from tests.conftest import byte_tokenizer

LAYERS, HEADS, D_HEAD = 2, 4, 16
CARRIERS = tuple(range(10))  # token a names answer a, and answer a is token a
NULL, START, FIRST_NOISE, NOISE = 10, 11, 12, 16
VOCAB = FIRST_NOISE + NOISE
# With so large an epsilon the norms are the identity; otherwise the working heads of the first
# layer would change the scale at which null heads of the second read, a real effect.
FLAT_NORM = 1e4


@dataclass(frozen=True)
class Planted:
    """The model, its working heads, and prompts with their answers."""

    model: Model
    heads: tuple[Head, ...]
    clean: list[list[int]]
    corrupt: list[list[int]]
    answers: Int[np.ndarray, " example"]


def build(seed: int, *, prompts: int = 40) -> Planted:
    """A planted model with two working heads, at places that depend on the seed."""
    rng = random.Random(seed)
    places = [Head(layer, index) for layer in range(LAYERS) for index in range(HEADS)]
    working = tuple(sorted(rng.sample(places, 2)))
    answers = [rng.choice(CARRIERS) for _ in range(prompts)]
    noise = [[FIRST_NOISE + rng.randrange(NOISE) for _ in range(2)] for _ in range(prompts)]
    clean = [[START, answer, pair[0]] for answer, pair in zip(answers, noise, strict=True)]
    corrupt = [[START, NULL, pair[1]] for pair in noise]
    model = wrap(_weights(seed, working), byte_tokenizer(), source=f"planted {seed}")
    return Planted(model, working, clean, corrupt, np.array(answers))


def _weights(seed: int, working: tuple[Head, ...]) -> LlamaForCausalLM:
    answer_space = slice(VOCAB, VOCAB + len(CARRIERS))
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=VOCAB + len(CARRIERS) + 2,  # a multiple of the heads
        intermediate_size=8,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        head_dim=D_HEAD,
        tie_word_embeddings=False,
        rms_norm_eps=FLAT_NORM**2,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = LlamaForCausalLM(config).double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(FLAT_NORM if "norm" in name else 0.0)
        model.model.embed_tokens.weight[:, :VOCAB] = torch.eye(VOCAB)
        model.lm_head.weight[: len(CARRIERS), answer_space] = torch.eye(len(CARRIERS)).double()
        for layer in range(LAYERS):
            attention = model.model.layers[layer].self_attn
            for index in range(HEADS):
                rows = slice(index * D_HEAD, (index + 1) * D_HEAD)
                value, out = attention.v_proj.weight[rows], attention.o_proj.weight[:, rows]
                if Head(layer, index) in working:
                    value[: len(CARRIERS), : len(CARRIERS)] = torch.eye(len(CARRIERS))
                    out[answer_space, : len(CARRIERS)] = torch.eye(len(CARRIERS)).double()
                else:
                    value[:, FIRST_NOISE:VOCAB] = torch.randn(D_HEAD, NOISE, generator=generator)
                    push = torch.randn(len(CARRIERS), D_HEAD, generator=generator)
                    out[answer_space] = push.double() / 16
    return model
