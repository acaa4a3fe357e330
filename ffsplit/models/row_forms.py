"""What rows of families that are alike have in common."""

from __future__ import annotations

from typing import Any

from ffsplit.models.rows import Architecture, FFNPaths, ModelKind, Tower


def row(
    model_type: str, kind: ModelKind, blocks: str, *ffns: FFNPaths, options: Any = (), **tower: Any
) -> Architecture:
    """A family of one tower; `options` are fields of the row, the other ones of its tower."""
    towers = (Tower(blocks=blocks, ffns=ffns, **tower),)
    return Architecture(model_type=model_type, kind=kind, towers=towers, **dict(options))


def bert_like(model_type: str, *, norm_eps: float = 1e-12, **options: Any) -> Architecture:
    ffn = FFNPaths(
        up="intermediate.dense",
        down="output.dense",
        activation="intermediate.intermediate_act_fn",
        output_norm="output.LayerNorm",
    )
    return row(model_type, "encoder", "encoder.layer.*", ffn, norm_eps=norm_eps, options=options)


def mlp(up: str, down: str, **options: Any) -> FFNPaths:
    return FFNPaths(up=f"mlp.{up}", down=f"mlp.{down}", **{"module": "mlp", **options})


LLAMA_MLP = mlp("up_proj", "down_proj", gate="mlp.gate_proj")
NEOX_MLP = ("dense_h_to_4h", "dense_4h_to_h")


def llama_like(model_type: str, *more: FFNPaths, blocks: str = "layers.*", **tower: Any) -> Architecture:
    tower = {"default_activation": "silu", **tower}
    return row(model_type, "causal_lm", blocks, LLAMA_MLP, *more, **tower)


def experts(**options: Any) -> FFNPaths:
    path = "mlp.experts"
    return FFNPaths(
        up=f"{path}.*.up_proj",
        gate=f"{path}.*.gate_proj",
        down=f"{path}.*.down_proj",
        experts=True,
        module=path,
        **options,
    )


def shared_expert() -> FFNPaths:
    path = "mlp.shared_expert"
    return FFNPaths(
        up=f"{path}.up_proj",
        gate=f"{path}.gate_proj",
        down=f"{path}.down_proj",
        module=path,
        width_field="shared_expert_intermediate_size",
        label="shared expert",
    )


def fc_ffn(width_field: str, *, output_norm: str | None = None) -> FFNPaths:
    """Two linear layers right in the block."""
    return FFNPaths(
        up="fc1", down="fc2", activation="activation_fn", width_field=width_field, output_norm=output_norm
    )


def bart_like(
    model_type: str, kind: ModelKind, *, encoder_mask: str | None, output_norm: str | None, **options: Any
) -> Architecture:
    def tower(side: str, mask: str | None) -> Tower:
        return Tower(
            name=side,
            blocks=f"{side}.layers.*",
            ffns=(fc_ffn(f"{side}_ffn_dim", output_norm=output_norm),),
            layers_field=f"{side}_layers",
            activation_field="activation_function",
            norm_eps=1e-5,
            mask=mask,
        )

    towers = (tower("encoder", encoder_mask), tower("decoder", "decoder_attention_mask"))
    return Architecture(model_type=model_type, kind=kind, towers=towers, **options)


def t5_like(model_type: str) -> Architecture:
    def tower(side: str, layer: int, layers_field: str, mask: str) -> Tower:
        path = f"layer.{layer}.DenseReluDense"
        shared: dict[str, Any] = {"down": f"{path}.wo", "module": path, "width_field": "d_ff"}
        return Tower(
            name=side,
            blocks=f"{side}.block.*",
            ffns=(
                FFNPaths(up=f"{path}.wi", **shared),
                FFNPaths(up=f"{path}.wi_1", gate=f"{path}.wi_0", **shared),
            ),
            layers_field=layers_field,
            activation_field="feed_forward_proj",
            default_activation="relu",
            mask=mask,
        )

    towers = (
        tower("encoder", 1, "num_layers", "attention_mask"),
        tower("decoder", 2, "num_decoder_layers", "decoder_attention_mask"),
    )
    return Architecture(model_type=model_type, kind="seq2seq", towers=towers)


def clip_like(model_type: str, *, activation: str, text_mask: str | None, head: bool) -> Architecture:
    def tower(side: str, blocks: str, mask: str | None) -> Tower:
        return Tower(
            name=side.replace("_", " "),
            blocks=blocks,
            ffns=(mlp("fc1", "fc2"),),
            config=f"{side.partition('_')[0]}_config",
            default_activation=activation,
            mask=mask,
        )

    towers = [
        tower("text", "text_model.encoder.layers.*", text_mask),
        tower("vision", "vision_model.encoder.layers.*", None),
    ]
    if head:
        towers.append(tower("vision_head", "vision_model.head", None))
    return Architecture(model_type=model_type, kind="image_text", towers=tuple(towers))
