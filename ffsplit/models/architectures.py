"""Where the feed-forward networks of each model family live, as rows of data.

Paths are relative to the base model (no task head) and, below `blocks`, to one block. Where the
whole FFN is one module, `ffn` names it; where it is spread over a block, `ffn` is None and the
split FFN takes the place of `up` while `activation` and `down` become identities. `output_norm` is
the layer norm of x + FFN(x), in families that normalise there; `position_offset` counts the positions
that a family reserves before its first token.
"""

from __future__ import annotations

from typing import Literal

from ffsplit.config import Record

ModelKind = Literal["encoder", "causal_lm"]


class Architecture(Record):
    """One model family, by the `model_type` of its config.json."""

    model_type: str
    kind: ModelKind
    blocks: str
    up: str
    down: str
    gate: str | None = None
    ffn: str | None = None
    activation: str | None = None
    width_field: str = "intermediate_size"
    layers_field: str = "num_hidden_layers"
    activation_field: str = "hidden_act"
    default_activation: str = "gelu"
    position_offset: int = 0
    output_norm: str | None = None

    @property
    def split_path(self) -> str:
        """The module, below a block, whose place a split FFN takes."""
        return self.ffn if self.ffn is not None else self.up

    @property
    def guard(self) -> str:
        """The original tensor, below `split_path`, that a split FFN stores with a shape that cannot match."""
        path = self.down if self.ffn is not None else self.up
        return f"{path}.weight".removeprefix(f"{self.split_path}.")


def _bert_like(model_type: str, *, position_offset: int = 0) -> Architecture:
    return Architecture(
        model_type=model_type,
        kind="encoder",
        blocks="encoder.layer",
        up="intermediate.dense",
        down="output.dense",
        activation="intermediate.intermediate_act_fn",
        output_norm="output.LayerNorm",
        position_offset=position_offset,
    )


def _llama_like(model_type: str) -> Architecture:
    return Architecture(
        model_type=model_type,
        kind="causal_lm",
        blocks="layers",
        up="mlp.up_proj",
        gate="mlp.gate_proj",
        down="mlp.down_proj",
        ffn="mlp",
        default_activation="silu",
    )


ARCHITECTURES: dict[str, Architecture] = {
    row.model_type: row
    for row in (
        _bert_like("bert"),
        _bert_like("roberta", position_offset=2),
        _bert_like("xlm-roberta", position_offset=2),
        _bert_like("electra"),
        Architecture(
            model_type="distilbert",
            kind="encoder",
            blocks="transformer.layer",
            up="ffn.lin1",
            down="ffn.lin2",
            activation="ffn.activation",
            width_field="hidden_dim",
            layers_field="n_layers",
            activation_field="activation",
            output_norm="output_layer_norm",
        ),
        Architecture(
            model_type="opt",
            kind="causal_lm",
            blocks="decoder.layers",
            up="fc1",
            down="fc2",
            activation="activation_fn",
            width_field="ffn_dim",
            activation_field="activation_function",
            default_activation="relu",
        ),
        _llama_like("llama"),
        _llama_like("mistral"),
        _llama_like("qwen2"),
        _llama_like("qwen3"),
    )
}
