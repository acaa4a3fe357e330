"""What works with which family, as a page: `python -m ffsplit.models.support_page > docs/models.md`."""

from __future__ import annotations

from ffsplit.models.architectures import ARCHITECTURES
from ffsplit.models.family import Architecture, ModelKind

READS: dict[ModelKind, str] = {
    "encoder": "text",
    "causal_lm": "running text",
    "seq2seq": "pairs of texts",
    "speech": "sound and its transcript",
    "image": "pictures",
    "image_text": "pictures and texts",
    "audio": "sound",
}
COMPARED: dict[ModelKind, str] = {
    "encoder": "token and pooled states",
    "causal_lm": "token distributions",
    "seq2seq": "the decoder's states",
    "speech": "the decoder's states",
    "image": "patch and pooled states",
    "image_text": "picture and text embeddings",
    "audio": "frame and pooled states",
}
_CLASSIFIERS = ("ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering")
_ENCODER_HEADS = ("ForMaskedLM", *_CLASSIFIERS)
_DECODER_HEADS = ("ForCausalLM", "ForSequenceClassification")
HEADS: dict[str, tuple[str, ...]] = {
    "bert": ("ForPreTraining", "ForNextSentencePrediction", *_ENCODER_HEADS),
    "electra": ("ForPreTraining", *_ENCODER_HEADS),
    **dict.fromkeys(
        ("roberta", "xlm-roberta", "mpnet", "deberta-v2", "distilbert", "modernbert"), _ENCODER_HEADS
    ),
    "gpt2": ("LMHeadModel", "DoubleHeadsModel", *_CLASSIFIERS),
    **dict.fromkeys(("gpt_neox", "falcon", "bloom", "llama"), ("ForCausalLM", *_CLASSIFIERS)),
    **dict.fromkeys(
        ("opt", "mistral", "qwen2", "qwen3", "gemma2", "phi3", "starcoder2", "mixtral"), _DECODER_HEADS
    ),
    **dict.fromkeys(("qwen2_moe", "qwen3_moe"), _DECODER_HEADS),
    "gemma3_text": ("ForCausalLM", "TextForSequenceClassification"),
    "t5": ("ForConditionalGeneration", "EncoderModel"),
    "bart": ("ForConditionalGeneration",),
    "marian": ("MTModel",),
    "whisper": ("ForConditionalGeneration", "ForAudioClassification"),
    "vit": ("ForImageClassification", "ForMaskedImageModeling"),
    "clip": ("ForImageClassification",),
    "siglip": ("ForImageClassification",),
    "wav2vec2": ("ForCTC", "ForSequenceClassification"),
}
"""The task heads that tests try with each family, as class name endings."""


def table() -> str:
    """One line per family, from the rows of the table of architectures, and its heads."""
    lines = [
        "# Models",
        "",
        "Made by `make docs` from `ffsplit/models/architectures.py`; a test keeps the two in sync, and",
        "`tests/test_families.py` tries every line with every task head it lists, on small models of random",
        "weights.",
        "",
        "Families that read pictures or sound are experimental: no benchmark has measured them with trained",
        "weights. Every family that is not listed is experimental too: its FFNs are found by their structure",
        "and accepted if an exact split of them leaves the model's outputs unchanged. A run reports this.",
        "",
        "| `model_type` | reads | FFNs | compared by | without ffsplit | healing | one block at a time |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += map(_line, ARCHITECTURES.values())
    lines += ["", "## Task heads", "", "| `model_type` | the base model, and with |", "|---|---|"]
    lines += [f"| `{row}` | {', '.join(f'`{head}`' for head in HEADS[row])} |" for row in ARCHITECTURES]
    return "\n".join(lines) + "\n"


def _line(row: Architecture) -> str:
    plain = all(ffn.width_field for tower in row.towers for ffn in tower.ffns)
    cells = (
        f"`{row.model_type}`",
        READS[row.kind],
        _ffns(row),
        COMPARED[row.kind],
        "if plain" if plain else "no",
        "yes" if row.can_heal else "no",
        "yes" if row.can_stream else "no",
    )
    return f"| {' | '.join(cells)} |"


def _ffns(row: Architecture) -> str:
    """What kinds of FFNs a family has, in words."""
    words = []
    for tower in row.towers:
        for ffn in tower.ffns:
            form = "gated, fused" if ffn.fused else "gated" if ffn.gate else "plain"
            form = f"{form}, Conv1D" if ffn.transposed else form
            what = " ".join(
                part for part in (tower.name, ffn.label, "experts" if ffn.experts else "") if part
            )
            words.append(f"{what}: {form}" if what else form)
    return "; ".join(dict.fromkeys(words))


if __name__ == "__main__":
    print(table(), end="")
