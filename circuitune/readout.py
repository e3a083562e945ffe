"""What vectors in the residual stream of END say about the next token.

The *logit lens* puts the residual stream between two blocks through the model's own final norm
and unembedding, as if the layers above did not exist. A *contribution* is what one block, or one
head, adds to a logit if the scale of every norm on the way is held at that of the clean run
("direct logit attribution"): the contributions of the embedding, all heads and all MLPs then sum
to the logit, before any soft-cap or logit scale of the model. Neither is an effect: layers above
react to what is written, which only `circuitune.patching` measures.

Norms are not looked up but probed: `freeze` finds gain and scale of whatever the model's own code
does, so post-norms and residual scales need no line here; what does not have the form of a norm is
refused.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from accelerate.utils import align_module_device
from jaxtyping import Float, Int
from torch import Tensor

from circuitune.components import Head
from circuitune.errors import UserError
from circuitune.models import Model
from circuitune.patching import UNEMBED_ROWS, EndStates, finish, run_layer, unembed, wide
from circuitune.weights import widened

# A norm is recognised if gain times scale gives its output to this relative error.
FORM = 1e-3


@dataclass(frozen=True)
class Frozen:
    """A norm (or a plain factor) with its scale held: a linear map, its bias left out.

    Attributes:
        gain: factor of each dimension.
        scale: factor of each example.
        centred: whether the mean over the dimensions is taken off first (LayerNorm).
    """

    gain: Float[Tensor, " d_model"]
    scale: Float[Tensor, " example"]
    centred: bool

    def __call__(
        self, values: Float[Tensor, "*batch example d_model"]
    ) -> Float[Tensor, "*batch example d_model"]:
        """What the norm makes of a part of its input."""
        return self.scale[:, None] * self.weigh(values)

    def weigh(self, values: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        """What the norm makes of directions, scale left out."""
        return self.gain * _centre(values, self.centred)

    def rows(self, weight: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        """Directions before the norm that stand for ``weight`` behind it, scale left out."""
        return _centre(weight * self.gain, self.centred)


def _centre(values: Tensor, centred: bool) -> Tensor:
    return values - values.mean(dim=-1, keepdim=True) if centred else values


@torch.no_grad()
def freeze(
    function: Callable[[Tensor], Tensor], states: Float[Tensor, "example d_model"]
) -> Frozen:
    """Gain and scale of a norm at given states.

    Args:
        function: maps vectors to vectors, row by row, as RMSNorm, LayerNorm or a factor does.
        states: where the scale is read.

    Raises:
        UserError: the function is none of these.
    """
    width = states.shape[-1]
    probe = torch.ones(width).to(states)
    probe[1::2] = -1
    if width % 2:  # the mean must be zero, so that a LayerNorm gives its gain too
        probe[-3:] = probe.new_tensor([2, -1, -1])
    bias, probed = function(torch.stack([torch.zeros_like(probe), probe]))
    gain = (probed - bias) / probe
    target = function(states) - bias
    found = []
    for centred in (False, True):
        base = gain * _centre(states, centred)
        size = base.square().sum(-1)
        scale = torch.where(size > 0, (base * target).sum(-1) / size.clamp(min=1e-30), 0.0)
        rest = (target - scale[:, None] * base).norm(dim=-1)
        worst = float((rest / target.norm(dim=-1).clamp(min=1e-30)).max())
        found.append((worst, Frozen(gain, scale, centred)))
    error, best = min(found, key=lambda item: item[0])
    if not error < FORM:
        raise UserError(
            "Contributions need norms that multiply by a gain and a scale, the model's do "
            f"something else (relative error {error:.1g}); read the effects instead."
        )
    return best


# ------------------------------------------------------------------------- the residual stream


@torch.no_grad()
def added(
    model: Model,
    states: EndStates,
    layer: int,
    *,
    attention: Float[Tensor, "example d_model"] | None = None,
    mlp: Float[Tensor, "example d_model"] | None = None,
) -> Float[Tensor, "example d_model"]:
    """What a layer adds to the residual stream for given block outputs (nothing where None)."""
    given = attention if attention is not None else mlp
    nothing = torch.zeros_like(given)
    one, other = (nothing if part is None else part for part in (attention, mlp))
    return run_layer(model, states, layer, nothing[None], one[None], mlp=other[None])[0]


@dataclass(frozen=True)
class Stream:
    """The residual stream at END between the blocks, in the order in which it grows.

    Attributes:
        middle: between attention and MLP of each layer (in parallel blocks: as if the MLP came
            second).
        after: after each layer.
        attention, mlp: what the blocks of each layer add, post-norms and factors included.
    """

    middle: Float[Tensor, "layer example d_model"]
    after: Float[Tensor, "layer example d_model"]
    attention: Float[Tensor, "layer example d_model"]
    mlp: Float[Tensor, "layer example d_model"]


@torch.no_grad()
def stream(model: Model, states: EndStates) -> Stream:
    """The residual stream at END of a run.

    Raises:
        UserError: the layers do not add to the residual stream, but pass it through a norm.
    """
    attention, mlp = [], []
    for layer in range(model.layers):
        with widened(model.layer(layer)):
            attention.append(added(model, states, layer, attention=states.attention[layer]))
            mlp.append(added(model, states, layer, mlp=states.mlp[layer]))
    middle = states.entry + torch.stack(attention)
    last = middle[-1] + mlp[-1]
    after = torch.cat([states.entry[1:], last[None]])
    error = (middle + torch.stack(mlp) - after).norm() / after.norm()
    if not max(error, (finish(model, last) - states.final).norm() / states.final.norm()) < FORM:
        raise UserError(
            f"Contributions need layers that add to the residual stream, those of {model.source} "
            "pass it through a norm; read the effects instead."
        )
    return Stream(middle, after, torch.stack(attention), torch.stack(mlp))


@torch.no_grad()
def head_writes(
    model: Model, states: EndStates, head: Head, z: Float[Tensor, "example z"] | None = None
) -> Float[Tensor, "example d_model"]:
    """What a head adds to the residual stream at END: its slice of z through its columns of W_O.

    A norm behind the attention block keeps its scale of ``states``.

    Args:
        model: the model.
        states: the run that gives the scales.
        head: the head.
        z: head outputs of its layer in another run; those of ``states`` by default.
    """
    layer, z = head.layer, states.z[head.layer] if z is None else z
    own = torch.zeros_like(z)
    width = slice(head.index * model.d_head, (head.index + 1) * model.d_head)
    own[:, width] = z[:, width]
    out = model.part(layer, model.family.out)
    with widened(model.layer(layer)):
        written = wide(out(own) - out(torch.zeros_like(own)))  # without the bias
        norm = freeze(
            lambda values: added(model, states, layer, attention=values), states.attention[layer]
        )
    return norm(written)


# ------------------------------------------------------------------------------- to the logits


def final_norm(model: Model, states: EndStates, last: Float[Tensor, "example d_model"]) -> Frozen:
    """The final norm at the scale that it has in a run.

    Raises:
        UserError: what follows the last layer is more than a norm.
    """
    if states.final.shape != last.shape:
        raise UserError(
            "Contributions need an unembedding that reads the residual stream, "
            f"{model.source} projects it to {states.final.shape[-1]} dimensions first; read the "
            "effects instead."
        )
    return freeze(lambda values: finish(model, values), last)


@torch.no_grad()
def unembedding(model: Model, tokens: Sequence[int]) -> Float[Tensor, "candidate width"]:
    """Rows of the unembedding, in float32 or wider."""
    embedding = model.hf.get_output_embeddings()
    with align_module_device(embedding):
        return wide(embedding.weight[list(tokens)])


@torch.no_grad()
def contributions(
    model: Model,
    norm: Frozen,
    written: Float[Tensor, "example d_model"],
    tokens: Sequence[int],
) -> Float[Tensor, "example candidate"]:
    """What a part of the residual stream adds to the logits of some tokens, in logits."""
    return norm(written) @ unembedding(model, tokens).T


@torch.no_grad()
def top_tokens(model: Model, direction: Float[Tensor, " width"], count: int) -> list[str]:
    """The tokens whose unembedding a normed vector meets most, the strongest first."""
    embedding = model.hf.get_output_embeddings()
    with align_module_device(embedding):
        scores = embedding.weight @ direction.to(embedding.weight)
    best = scores.float().topk(min(count, len(scores))).indices.tolist()
    return [model.tokenizer.decode([token]) for token in best]


@dataclass(frozen=True)
class Lens:
    """The logit lens: of each token asked for, at each state.

    Attributes:
        rank: place among all tokens, 1 for the first choice.
        probability: among all tokens.
    """

    rank: Int[np.ndarray, "layer example candidate"]
    probability: Float[np.ndarray, "layer example candidate"]


@torch.no_grad()
def lens(
    model: Model,
    finals: Float[Tensor, "layer example width"],
    tokens: Int[np.ndarray, "example candidate"],
) -> Lens:
    """Rank and probability of tokens at normed states.

    Args:
        model: the model.
        finals: states after the final norm (`finish`).
        tokens: token ids, other ones for each example.
    """
    places, count = finals.shape[:2]
    flat = finals.reshape(places * count, -1)
    wanted = torch.as_tensor(tokens, device=flat.device).repeat(places, 1)
    ranks, chances = [], []
    parts = zip(flat.split(UNEMBED_ROWS), wanted.split(UNEMBED_ROWS), strict=True)
    for rows, asked in parts:
        logits = unembed(model, rows)
        own = logits.gather(1, asked)
        ranks.append(torch.stack([(logits > one[:, None]).sum(1) + 1 for one in own.T], dim=1))
        chances.append((own - logits.logsumexp(dim=1, keepdim=True)).exp())
    shape = (places, count, tokens.shape[1])
    return Lens(
        torch.cat(ranks).reshape(shape).cpu().numpy(),
        torch.cat(chances).double().reshape(shape).cpu().numpy(),
    )


@torch.no_grad()
def first_tokens(
    model: Model, final: Float[Tensor, " width"], count: int
) -> list[dict[str, str | float]]:
    """The most probable tokens of one normed state, with their probabilities."""
    best = unembed(model, final[None])[0].softmax(dim=-1).topk(count)
    return [
        {"token": model.tokenizer.decode([token]), "probability": chance}
        for token, chance in zip(best.indices.tolist(), best.values.tolist(), strict=True)
    ]


def cosines(
    values: Float[Tensor, "layer example d_model"], rows: Float[Tensor, "example d_model"]
) -> Float[np.ndarray, "layer example"]:
    """Cosine of vectors with one direction of each example."""
    return torch.cosine_similarity(values, rows[None], dim=-1).double().cpu().numpy()
