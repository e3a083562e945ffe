"""A sweep of a checkpoint larger than the memory it may use, against the same in memory.

    python bench/streaming.py --out bench/streaming.json

Writes a random Llama of 4 GB into a temporary folder, then sweeps it twice, each time in a fresh
process: with all weights in memory, and under a hard limit of 1.5 GB, set by ``RLIMIT_DATA`` before
anything is imported (it bounds all memory that is not a plain read-only map of a file). The disk is
warm in both. Order: in memory, limited, limited, in memory, so that drift of the machine cancels.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, PreTrainedTokenizerFast

LAYERS, WIDTH, HEADS = 15, 2048, 16
LIMIT = 1500  # MB
BOS = 256

CHILD = """
import resource, sys
folder, limit, pairs, out = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
if limit:
    resource.setrlimit(resource.RLIMIT_DATA, (limit * 10**6, limit * 10**6))
import json, time
import numpy as np
from circuitune.memory import check_fits
from circuitune.models import load
from circuitune.patching import direct_effects, pair_states
from circuitune.prompts import prefill_pairs
model = load(folder, device="cpu", max_memory=f"{limit}M" if limit else None)
assert model.offloaded == bool(limit)
sums = [(1 + n % 5, 1 + n // 5 % 4) for n in range(pairs)]
clean, corrupt = ([[256, *f"{a} {sign} {b} = ".encode()] for a, b in sums] for sign in "+@")
check_fits(model, [len(tokens) for tokens in clean])
for parameter in model.hf.parameters():
    parameter.is_meta or parameter.sum()  # in memory for good, also where it was mapped
started = time.perf_counter()
states = pair_states(model, prefill_pairs(model, clean, corrupt))
digits = [ord(digit) for digit in "0123456789"]
answers = np.array([a + b for a, b in sums])
effects = direct_effects(model, *states, candidates=digits, answers=answers).effect()
seconds = time.perf_counter() - started
status = open("/proc/self/status").read()  # ru_maxrss would be that of the parent, if larger
peak = int(status.split("VmHWM:")[1].split()[0]) // 1024
np.save(out, effects)
print(json.dumps({"seconds": seconds, "peak_mib": peak}))
"""


def tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {symbol: number for number, symbol in enumerate(alphabet)} | {"<s>": BOS}
    made = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex("."), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    made.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>")


def write_checkpoint(folder: Path, *, layers: int = LAYERS, seed: int = 0) -> None:
    """A random Llama with one shard per layer, every layer different; 268 MB each in float32."""
    LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=BOS + 1,
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=layers,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        bos_token_id=BOS,
        eos_token_id=None,
        tie_word_embeddings=True,
    ).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    generator = torch.Generator().manual_seed(seed)
    files: dict[str, str] = {}

    def random(rows: int, columns: int) -> torch.Tensor:
        return torch.rand(rows, columns, generator=generator).sub_(0.5).mul_(0.05)

    def write(named: dict[str, torch.Tensor], file: str) -> None:
        save_file(named, folder / file)
        files.update(dict.fromkeys(named, file))

    for layer in range(layers):
        parts = {f"self_attn.{name}_proj": random(WIDTH, WIDTH) for name in "qkvo"}
        parts |= {f"mlp.{name}_proj": random(4 * WIDTH, WIDTH) for name in ("gate", "up")}
        parts["mlp.down_proj"] = random(WIDTH, 4 * WIDTH)
        parts |= {f"{name}_layernorm": torch.ones(WIDTH) for name in ("input", "post_attention")}
        named = {f"model.layers.{layer}.{name}.weight": part for name, part in parts.items()}
        write(named, f"layer-{layer:02}.safetensors")
    top = {"model.embed_tokens": random(BOS + 1, WIDTH) * 20, "model.norm": torch.ones(WIDTH)}
    write({f"{name}.weight": part for name, part in top.items()}, "top.safetensors")
    index = {"metadata": {}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def sweep(folder: Path, out: Path, *, limit: int, pairs: int) -> tuple[np.ndarray, dict[str, Any]]:
    """Sweep in a fresh process.

    Args:
        folder: the checkpoint.
        out: where the effects are left.
        limit: memory in MB; 0 for none, and then all weights are in memory.
        pairs: number of prompt pairs.

    Returns:
        the effects, and seconds (without loading) and peak of resident memory in MiB.
    """
    command = [sys.executable, "-c", CHILD, str(folder), str(limit), str(pairs), str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"The sweep with limit {limit} failed:\n{done.stderr[-2000:]}")
    return np.load(out), json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=16)
    parser.add_argument("--out", type=Path, default=Path("bench/streaming.json"))
    given = parser.parse_args()
    runs: dict[int, list[dict[str, Any]]] = {0: [], LIMIT: []}
    effects = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_checkpoint(folder)
        size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        for limit in (0, LIMIT, LIMIT, 0):
            effects[limit], facts = sweep(
                folder, folder / "effects.npy", limit=limit, pairs=given.pairs
            )
            runs[limit].append(facts)
            print(limit, facts, flush=True)
    seconds = {limit: min(run["seconds"] for run in found) for limit, found in runs.items()}
    result = {
        "command": "python bench/streaming.py --out bench/streaming.json",
        "checkpoint_gb": round(size / 1e9, 2),
        "limit_mb": LIMIT,
        "pairs": given.pairs,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "in_memory": runs[0],
        "limited": runs[LIMIT],
        "time_ratio": round(seconds[LIMIT] / seconds[0], 3),
        "largest_effect": float(np.abs(effects[0]).max()),
        "largest_difference": float(np.abs(effects[0] - effects[LIMIT]).max()),
    }
    given.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
