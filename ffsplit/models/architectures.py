"""Where the feed-forward networks of each model family live: the table, one row a family."""

from __future__ import annotations

from typing import Any

from ffsplit.models.rows import Architecture, FFNPaths, ModelKind, Tower


def _row(
    model_type: str, kind: ModelKind, blocks: str, *ffns: FFNPaths, options: Any = (), **tower: Any
) -> Architecture:
    """A family of one tower; `options` are fields of the row, the other ones of its tower."""
    towers = (Tower(blocks=blocks, ffns=ffns, **tower),)
    return Architecture(model_type=model_type, kind=kind, towers=towers, **dict(options))


def _bert_like(model_type: str, *, norm_eps: float = 1e-12, **options: Any) -> Architecture:
    ffn = FFNPaths(
        up="intermediate.dense",
        down="output.dense",
        activation="intermediate.intermediate_act_fn",
        output_norm="output.LayerNorm",
    )
    return _row(model_type, "encoder", "encoder.layer.*", ffn, norm_eps=norm_eps, options=options)


def _mlp(up: str, down: str, **options: Any) -> FFNPaths:
    return FFNPaths(up=f"mlp.{up}", down=f"mlp.{down}", **{"module": "mlp", **options})


_LLAMA_MLP = _mlp("up_proj", "down_proj", gate="mlp.gate_proj")
_NEOX_MLP = ("dense_h_to_4h", "dense_4h_to_h")


def _llama_like(model_type: str, *more: FFNPaths, **tower: Any) -> Architecture:
    tower = {"default_activation": "silu", **tower}
    return _row(model_type, "causal_lm", "layers.*", _LLAMA_MLP, *more, **tower)


def _experts(**options: Any) -> FFNPaths:
    path = "mlp.experts"
    return FFNPaths(
        up=f"{path}.*.up_proj",
        gate=f"{path}.*.gate_proj",
        down=f"{path}.*.down_proj",
        experts=True,
        module=path,
        **options,
    )


def _shared_expert() -> FFNPaths:
    path = "mlp.shared_expert"
    return FFNPaths(
        up=f"{path}.up_proj",
        gate=f"{path}.gate_proj",
        down=f"{path}.down_proj",
        module=path,
        width_field="shared_expert_intermediate_size",
        label="shared expert",
    )


def _fc_ffn(width_field: str, *, output_norm: str | None = None) -> FFNPaths:
    """Two linear layers right in the block."""
    return FFNPaths(
        up="fc1", down="fc2", activation="activation_fn", width_field=width_field, output_norm=output_norm
    )


def _bart_like(
    model_type: str, kind: ModelKind, *, encoder_mask: str | None, output_norm: str | None, **options: Any
) -> Architecture:
    def tower(side: str, mask: str | None) -> Tower:
        return Tower(
            name=side,
            blocks=f"{side}.layers.*",
            ffns=(_fc_ffn(f"{side}_ffn_dim", output_norm=output_norm),),
            layers_field=f"{side}_layers",
            activation_field="activation_function",
            norm_eps=1e-5,
            mask=mask,
        )

    towers = (tower("encoder", encoder_mask), tower("decoder", "decoder_attention_mask"))
    return Architecture(model_type=model_type, kind=kind, towers=towers, **options)


def _t5_like(model_type: str) -> Architecture:
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


def _clip_like(model_type: str, *, activation: str, text_mask: str | None, head: bool) -> Architecture:
    def tower(side: str, blocks: str, mask: str | None) -> Tower:
        return Tower(
            name=side.replace("_", " "),
            blocks=blocks,
            ffns=(_mlp("fc1", "fc2"),),
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


_GEMMA = {"activation_field": "hidden_activation", "default_activation": "gelu_pytorch_tanh"}

_ROWS = (
    _bert_like("bert"),
    _bert_like("roberta", position_offset=2),
    _bert_like("xlm-roberta", position_offset=2),
    _bert_like("electra"),
    _bert_like("mpnet", position_offset=2),
    _bert_like("deberta-v2", norm_eps=1e-7),
    _row(
        "distilbert",
        "encoder",
        "transformer.layer.*",
        FFNPaths(
            up="ffn.lin1",
            down="ffn.lin2",
            activation="ffn.activation",
            width_field="hidden_dim",
            output_norm="output_layer_norm",
        ),
        layers_field="n_layers",
        activation_field="activation",
    ),
    _row(
        "modernbert",
        "encoder",
        "layers.*",
        _mlp("Wi", "Wo", fused=True),
        activation_field="hidden_activation",
    ),
    _row(
        "gpt2",
        "causal_lm",
        "h.*",
        _mlp("c_fc", "c_proj", transposed=True, width_field="n_inner"),
        layers_field="n_layer",
        activation_field="activation_function",
        default_activation="gelu_new",
        options={"positions_field": "n_positions"},
    ),
    _row("gpt_neox", "causal_lm", "layers.*", _mlp(*_NEOX_MLP)),
    _row(
        "falcon",
        "causal_lm",
        "h.*",
        _mlp(*_NEOX_MLP, width_field="ffn_hidden_size"),
        activation_field="activation",
    ),
    _row(
        "bloom",
        "causal_lm",
        "h.*",
        _mlp(*_NEOX_MLP, module=None, activation="mlp.gelu_impl", width_field=None),
        layers_field="n_layer",
        activation_field=None,
        default_activation="gelu_new",
    ),
    _row(
        "opt",
        "causal_lm",
        "decoder.layers.*",
        _fc_ffn("ffn_dim"),
        activation_field="activation_function",
        default_activation="relu",
    ),
    _llama_like("llama"),
    _llama_like("mistral"),
    _llama_like("qwen2"),
    _llama_like("qwen3"),
    _llama_like("gemma2", **_GEMMA),
    _llama_like("gemma3_text", **_GEMMA),
    _row(
        "phi3",
        "causal_lm",
        "layers.*",
        _mlp("gate_up_proj", "down_proj", fused=True),
        default_activation="silu",
    ),
    _row(
        "starcoder2", "causal_lm", "layers.*", _mlp("c_fc", "c_proj"), default_activation="gelu_pytorch_tanh"
    ),
    _row(
        "mixtral",
        "causal_lm",
        "layers.*",
        _experts(),
        default_activation="silu",
        options={
            "file_names": (
                ("mlp.experts.*.up_proj", "block_sparse_moe.experts.*.w3"),
                ("mlp.experts.*.gate_proj", "block_sparse_moe.experts.*.w1"),
                ("mlp.experts.*.down_proj", "block_sparse_moe.experts.*.w2"),
            )
        },
    ),
    _llama_like("qwen2_moe", _experts(width_field="moe_intermediate_size"), _shared_expert()),
    _llama_like("qwen3_moe", _experts(width_field="moe_intermediate_size")),
    _t5_like("t5"),
    _bart_like("bart", "seq2seq", encoder_mask="attention_mask", output_norm="final_layer_norm"),
    _bart_like(
        "whisper", "speech", encoder_mask=None, output_norm=None, positions_field="max_target_positions"
    ),
    _row(
        "vit",
        "image",
        "layers.*",
        _mlp("fc1", "fc2"),
        mask=None,
        options={
            "file_names": (
                ("layers.*", "encoder.layer.*"),
                ("mlp.fc1", "intermediate.dense"),
                ("mlp.fc2", "output.dense"),
            )
        },
    ),
    _clip_like("clip", activation="quick_gelu", text_mask="attention_mask", head=False),
    _clip_like("siglip", activation="gelu_pytorch_tanh", text_mask=None, head=True),
    _row(
        "wav2vec2",
        "audio",
        "encoder.layers.*",
        FFNPaths(
            up="feed_forward.intermediate_dense", down="feed_forward.output_dense", module="feed_forward"
        ),
        mask=None,
    ),
)

ARCHITECTURES: dict[str, Architecture] = {row.model_type: row for row in _ROWS}
