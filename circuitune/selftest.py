"""Does the fast sweep tell the truth about *this* model? Ask the slow way and compare.

Three differences in logits, on random tokens and a random sample of components:

- fast against slow: the sweep against one full forward pass per component, without a cache and
  without replay, in which every other head is held at END by overwriting its output;
- clean into clean: patching nothing, the noise floor of the sweep;
- cached against plain: END from prefilled keys and values against an ordinary forward pass.

The first and the last must stay within a tolerance that depends on the dtype. A fourth number
asks whether the output projection reads one slice per head: with one feature of the keys (or of
joint queries, keys and values) negated, only the slices of one key-value head may change.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from circuitune.components import Component, Head, Mlp
from circuitune.errors import UserError
from circuitune.models import Model, projection_shape
from circuitune.patching import direct_effects, end_states, noise_floor, unembed, wide
from circuitune.prompts import prefill
from circuitune.sites import Trace, intervene, record, substitute

# Largest allowed difference, as a share of the largest logit. Norms and softmax of most models
# round to float32 inside, whatever the dtype of the weights is.
TOLERANCE = {
    torch.float64: 1e-6,
    torch.float32: 2e-5,
    torch.float16: 2e-3,
    torch.bfloat16: 1e-2,
}
SHARE_OF_EFFECT = 0.25  # and never more than this share of the largest effect
LENGTHS = (5, 8, 6, 9)  # of the prompts, in tokens: batches are padded
FEATURES = 6  # of the key projection, changed one by one
MOST_LEAK = 1e-4


@dataclass(frozen=True)
class Report:
    """What the self-test found; all differences are in logits.

    Attributes:
        source: the name of the model.
        dtype: dtype of its weights.
        samples: number of components that were compared.
        difference: largest difference of fast and slow.
        effect: largest change of a logit by patching, for scale.
        noise: largest change of the logit difference by patching clean into clean.
        cached: largest difference of cached END and a plain forward pass.
        leak: how far a key-value head changes slices of other heads, as a share of the largest
            value of a slice.
        tolerance: what ``difference`` and ``cached`` may reach, by the dtype and the effect.
    """

    source: str
    dtype: str
    samples: int
    difference: float
    effect: float
    noise: float
    cached: float
    leak: float
    tolerance: float

    @property
    def passed(self) -> bool:
        """Whether both differences are numbers within the tolerance, and heads are separate."""
        same = self.difference <= self.tolerance and self.cached <= self.tolerance
        return same and self.leak <= MOST_LEAK

    def __str__(self) -> str:
        return (
            f"fast sweep against {self.samples} slow passes: {self.difference:.1e} logits, cached "
            f"END against plain forward: {self.cached:.1e}, tolerance {self.tolerance:.1e} in "
            f"{self.dtype} (noise floor {self.noise:.1e}, largest effect {self.effect:.1e}, leak "
            f"between heads {self.leak:.1e})"
        )


@torch.no_grad()
def run(model: Model, *, samples: int = 8, seed: int = 0) -> Report:
    """Compare the fast sweep with the slow one on random components.

    Args:
        model: the model.
        samples: number of components, at least one of them an MLP and one a head.
        seed: of the tokens and of the sample.
    """
    rng = random.Random(seed)
    vocab = model.hf.get_input_embeddings().weight.shape[0]
    clean = [[rng.randrange(vocab) for _ in range(length)] for length in LENGTHS]
    corrupt = [[rng.randrange(vocab) for _ in range(length)] for length in reversed(LENGTHS)]
    senders = _sample(model, samples, rng)
    answers = np.array(rng.sample(range(16), len(clean)))
    candidates = rng.sample(range(vocab), 16)
    clean_states, corrupt_states = (end_states(model, prefill(model, p)) for p in (clean, corrupt))
    options = {"candidates": candidates, "answers": answers, "senders": senders}
    fast = direct_effects(model, clean_states, corrupt_states, **options).patched["relative_logit"]
    floor = noise_floor(model, clean_states, candidates=candidates, answers=answers)
    plain = [_forward(model, tokens) for tokens in clean]
    patched_in = [_forward(model, tokens)[1] for tokens in corrupt]
    logits = unembed(model, clean_states.final)
    slow = []
    for row, sender in enumerate(senders):
        example = row % len(clean)
        edits = _held(model, plain[example][1], patched_in[example], sender)
        patched = _forward(model, clean[example], edits)[0]
        answer = candidates[answers[example]]
        change = patched[answer] - plain[example][0][answer]
        slow.append((fast[row, example] - float(patched[answer]), float(change)))
    difference, effect = np.abs(slow).max(axis=0)
    clean_logits = torch.stack([logit for logit, _ in plain])
    dtype = next(model.hf.parameters()).dtype
    by_dtype = TOLERANCE.get(dtype, 0.0) * max(1.0, float(clean_logits.abs().max()))
    return Report(
        source=model.source,
        dtype=str(dtype).removeprefix("torch."),
        samples=len(senders),
        difference=float(difference),
        effect=float(effect),
        noise=float(floor["logit_diff"].max()),
        cached=float((logits - clean_logits).abs().max()),
        leak=_leak(model, clean[-1], rng),
        tolerance=min(by_dtype, SHARE_OF_EFFECT * float(effect)),
    )


def prove(model: Model) -> Report:
    """The report of a model that may be measured.

    Raises:
        UserError: the self-test failed, or could not run at all.
    """
    try:
        report = run(model)
    except UserError:
        raise
    except Exception as error:  # an architecture that does not fit can fail anywhere
        reason = (str(error).splitlines() or [""])[0][:120]
        raise UserError(
            f"The self-test must run before a model is measured, on {model.source} (type "
            f"{model.hf.config.model_type!r}) it stopped with {type(error).__name__}: "
            f"{reason}; choose another model or add a record to circuitune/families.py."
        ) from error
    if not report.passed:
        raise UserError(
            f"The fast sweep must equal the slow one before a model is measured, on {model.source} "
            f"it does not ({report}); use --dtype float32, or choose another model."
        )
    return report


def _sample(model: Model, samples: int, rng: random.Random) -> list[Component]:
    """Random components, a quarter of them MLPs."""
    heads = [Head(layer, index) for layer in range(model.layers) for index in range(model.heads)]
    mlps = [Mlp(layer) for layer in range(model.layers)]
    wanted = min(len(mlps), max(1, samples // 4))
    return [
        *rng.sample(mlps, wanted),
        *rng.sample(heads, min(len(heads), max(1, samples - wanted))),
    ]


def _leak(model: Model, tokens: Sequence[int], rng: random.Random) -> float:
    """Largest change outside one key-value head's slices of z when one key feature is negated."""
    module = model.part(0, model.family.key)
    forward = module.forward
    before = _forward(model, tokens)[1].z[0][0]
    group = model.heads // model.kv_heads * model.d_head
    leaks = []
    for feature in rng.sample(range(projection_shape(module)[0]), FEATURES):

        def changed(x: Tensor, feature: int = feature) -> Tensor:
            y = forward(x).clone()
            y[..., feature] *= -1
            return y

        with substitute(module, changed):
            after = _forward(model, tokens)[1].z[0][0]
        change = (after - before).abs().reshape(-1, group).amax(dim=1).sort(descending=True).values
        leaks.append(float(change[1:].sum() / before.abs().max()))
    return float(np.max(leaks))  # NaN stays NaN


def _forward(
    model: Model, tokens: Sequence[int], edits: Mapping[Component, Tensor] | None = None
) -> tuple[Float[Tensor, " vocab"], Trace]:
    """Logits at END of an ordinary forward pass, and what passed END."""
    ids = torch.tensor([list(tokens)], device=model.device)
    with intervene(model, edits or {}), record(model) as trace:
        logits = model.hf(input_ids=ids, use_cache=False).logits
    return wide(logits[0, -1]), trace


def _held(model: Model, clean: Trace, corrupt: Trace, sender: Component) -> dict[Component, Tensor]:
    """Every head at its clean output, the sender at its corrupt one."""
    edits: dict[Component, Tensor] = {}
    for layer in range(model.layers):
        for index in range(model.heads):
            head = Head(layer, index)
            z = (corrupt if head == sender else clean).z[layer]
            edits[head] = z[:, index * model.d_head : (index + 1) * model.d_head]
    if isinstance(sender, Mlp):
        edits[sender] = corrupt.mlp[sender.layer]
    return edits
