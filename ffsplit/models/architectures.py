"""Where the feed-forward networks of each model family live: the table, one row per family."""

from __future__ import annotations

from ffsplit.models.family import (
    NEOX_MLP,
    Architecture,
    FFNPaths,
    bart_like,
    bert_like,
    clip_like,
    experts,
    fc_ffn,
    llama_like,
    mlp,
    row,
    shared_expert,
    t5_like,
)

_GEMMA = {"activation_field": "hidden_activation", "default_activation": "gelu_pytorch_tanh"}

_ROWS = (
    bert_like("bert"),
    bert_like("roberta", position_offset=2),
    bert_like("xlm-roberta", position_offset=2),
    bert_like("electra"),
    bert_like("mpnet", position_offset=2),
    bert_like("deberta-v2", norm_eps=1e-7),
    row(
        "distilbert",
        "states",
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
    row(
        "modernbert",
        "states",
        "layers.*",
        mlp("Wi", "Wo", fused=True),
        activation_field="hidden_activation",
    ),
    row(
        "gpt2",
        "next_tokens",
        "h.*",
        mlp("c_fc", "c_proj", transposed=True, width_field="n_inner"),
        layers_field="n_layer",
        activation_field="activation_function",
        default_activation="gelu_new",
        options={"positions_field": "n_positions"},
    ),
    row("gpt_neox", "next_tokens", "layers.*", mlp(*NEOX_MLP)),
    row(
        "falcon",
        "next_tokens",
        "h.*",
        mlp(*NEOX_MLP, width_field="ffn_hidden_size"),
        activation_field="activation",
    ),
    row(
        "bloom",
        "next_tokens",
        "h.*",
        mlp(*NEOX_MLP, module=None, activation="mlp.gelu_impl", width_field=None),
        layers_field="n_layer",
        activation_field=None,
        default_activation="gelu_new",
    ),
    row(
        "opt",
        "next_tokens",
        "decoder.layers.*",
        fc_ffn("ffn_dim"),
        activation_field="activation_function",
        default_activation="relu",
    ),
    llama_like("llama"),
    llama_like("mistral"),
    llama_like("qwen2"),
    llama_like("qwen3"),
    llama_like("gemma2", **_GEMMA),
    llama_like("gemma3_text", **_GEMMA),
    row(
        "phi3",
        "next_tokens",
        "layers.*",
        mlp("gate_up_proj", "down_proj", fused=True),
        default_activation="silu",
    ),
    row(
        "starcoder2", "next_tokens", "layers.*", mlp("c_fc", "c_proj"), default_activation="gelu_pytorch_tanh"
    ),
    row(
        "mixtral",
        "next_tokens",
        "layers.*",
        experts(),
        default_activation="silu",
        options={
            "file_names": (
                (".mlp.", ".block_sparse_moe."),
                (".up_proj.", ".w3."),
                (".gate_proj.", ".w1."),
                (".down_proj.", ".w2."),
            )
        },
    ),
    llama_like("qwen2_moe", experts(width_field="moe_intermediate_size"), shared_expert()),
    llama_like("qwen3_moe", experts(width_field="moe_intermediate_size")),
    t5_like("t5"),
    bart_like("bart", encoder_mask="attention_mask", output_norm="final_layer_norm"),
    bart_like("marian", encoder_mask="attention_mask", output_norm="final_layer_norm"),
    bart_like(
        "whisper", reads="sound", encoder_mask=None, output_norm=None, positions_field="max_target_positions"
    ),
    row(
        "vit",
        "states",
        "layers.*",
        mlp("fc1", "fc2"),
        reads="image",
        mask=None,
        options={
            "file_names": (
                ("layers.", "encoder.layer."),
                ("q_proj", "attention.query"),
                ("k_proj", "attention.key"),
                ("v_proj", "attention.value"),
                ("attention.o_proj", "attention.output.dense"),
                ("mlp.fc1", "intermediate.dense"),
                ("mlp.fc2", "output.dense"),
            )
        },
    ),
    clip_like("clip", activation="quick_gelu", text_mask="attention_mask", head=False),
    clip_like("siglip", activation="gelu_pytorch_tanh", text_mask=None, head=True),
    row(
        "wav2vec2",
        "states",
        "encoder.layers.*",
        FFNPaths(
            up="feed_forward.intermediate_dense", down="feed_forward.output_dense", module="feed_forward"
        ),
        reads="sound",
        mask=None,
    ),
)

ARCHITECTURES: dict[str, Architecture] = {row.model_type: row for row in _ROWS}
