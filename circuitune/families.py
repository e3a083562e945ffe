"""One declarative record per architecture: where things are, not what to do with them.

The sweep runs the model's own decoder layers, so a record needs only names. A new family is a
new record; the parity self-test (`circuitune check`) decides whether it is right.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Family:
    """Names of the parts of one architecture, as attribute paths.

    Attributes:
        name: the ``model_type`` of the Hugging Face configuration.
        layers: path from the causal model to the list of decoder layers.
        attention: attribute of a layer that holds the attention block.
        out: path from a layer to the output projection W_O; its input is z, the concatenated
            head outputs.
        mlp: path from a layer to the module whose output is the MLP's output.
        query: path from a layer to the query projection W_Q.
        final_norm: path from the causal model to the norm before the unembedding.
        norm_before_attention: attribute of a layer whose norm feeds the attention *alone*, or
            None. With the attention substituted its result is not needed.
    """

    name: str
    layers: str = "model.layers"
    attention: str = "self_attn"
    out: str = "self_attn.o_proj"
    mlp: str = "mlp"
    query: str = "self_attn.q_proj"
    final_norm: str = "model.norm"
    norm_before_attention: str | None = "input_layernorm"


FAMILIES: dict[str, Family] = {
    family.name: family for family in (Family("llama"), Family("mistral"), Family("qwen2"))
}
