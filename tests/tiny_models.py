"""Tiny models of every supported family, with random weights and non-zero biases, as checkpoints on disk."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

HIDDEN_SIZE = 32
NUM_LAYERS = 3
VOCAB_SIZE = 200
MAX_POSITIONS = 160
SPECIAL_TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
_COMMON_WORDS = (
    "the of and to in is that it was for as with his he be on by at have are not this but had they you "
    "from or which one all were her she there would their we him been has when who will no more if out "
    "so said what up its about into than them can only other new some could time these two may then do "
    "first any my now such like our over man me even most made after also did many before must through "
    "back years where much your way down should because long each just state those people too"
)
WORDS = _COMMON_WORDS.split()

_BERT_LIKE = {"intermediate_size": 96, "num_attention_heads": 4, "max_position_embeddings": MAX_POSITIONS}
_LLAMA_LIKE = {
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": MAX_POSITIONS,
}

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("Bert", _BERT_LIKE),
    "roberta": ("Roberta", _BERT_LIKE),
    "xlm-roberta": ("XLMRoberta", _BERT_LIKE),
    "electra": ("Electra", _BERT_LIKE | {"embedding_size": 16}),
    "distilbert": (
        "DistilBert",
        {"dim": HIDDEN_SIZE, "hidden_dim": 80, "n_layers": NUM_LAYERS, "n_heads": 4}
        | {"max_position_embeddings": MAX_POSITIONS},
    ),
    "opt": (
        "OPT",
        {"ffn_dim": 96, "num_attention_heads": 4, "max_position_embeddings": MAX_POSITIONS}
        | {"word_embed_proj_dim": HIDDEN_SIZE},
    ),
    "llama": ("Llama", _LLAMA_LIKE | {"mlp_bias": True}),
    "mistral": ("Mistral", _LLAMA_LIKE | {"head_dim": 8, "sliding_window": None}),
    "qwen2": ("Qwen2", _LLAMA_LIKE),
    "qwen3": ("Qwen3", _LLAMA_LIKE | {"head_dim": 8}),
}
"""Each family's prefix of class names, and its own fields. Llama's FFN has biases, Mistral's has none."""

ENCODERS = ("bert", "roberta", "xlm-roberta", "electra", "distilbert")
CAUSAL = ("opt", "llama", "mistral", "qwen2", "qwen3")


def model_class(family: str, head: str = "") -> Any:
    """The transformers class, as in `model_class("bert", "ForMaskedLM")`; without a head, the base model."""
    return getattr(transformers, f"{FAMILIES[family][0]}{head or 'Model'}")


def make_model(family: str, *, head: str = "", seed: int = 0, **overrides: Any) -> Any:
    """A random model in eval mode. Weights are large enough for every part to show in the output."""
    prefix, own = FAMILIES[family]
    fields = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": HIDDEN_SIZE,
        "num_hidden_layers": NUM_LAYERS,
        "pad_token_id": 0,
        "bos_token_id": 2,
        "eos_token_id": 3,
    }
    if family == "distilbert":
        del fields["hidden_size"], fields["num_hidden_layers"]
    model = model_class(family, head)(
        getattr(transformers, f"{prefix}Config")(**{**fields, **own, **overrides})
    )
    randomize(model, seed=seed)
    return model.eval()


@torch.no_grad()
def randomize(model: nn.Module, *, seed: int) -> None:
    """Matrices keep the scale of their input, biases are not zero, norms and scales are not quite one."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(model.named_parameters()):
        if not parameter.is_floating_point():
            continue
        noise = torch.randn(parameter.shape, generator=generator)
        if name.endswith("bias"):
            parameter.copy_(0.3 * noise)
        elif parameter.dim() <= 1:
            parameter.copy_(1 + 0.1 * noise)
        else:
            fan_in = parameter[0].numel() if parameter.dim() == 4 else parameter.shape[-1]
            parameter.copy_(noise / max(fan_in, 1) ** 0.5)


def save_checkpoint(
    directory: Path,
    family: str,
    *,
    head: str = "",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    max_shard_size: str = "5GB",
    **overrides: Any,
) -> Path:
    """A random model and its tokenizer on disk, as save_pretrained leaves them."""
    model = make_model(family, head=head, seed=seed, **overrides).to(dtype)
    if dtype is torch.float64:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1 + 1e-9)  # what no float32 can hold
    model.save_pretrained(directory, max_shard_size=max_shard_size)
    save_tokenizer(directory)
    return directory


def save_tokenizer(directory: Path, *, special: Mapping[str, int] | None = None, named: bool = False) -> Any:
    """A lower-casing WordPiece tokenizer that knows every printable ASCII character and common words.

    `special` are more special tokens and their ids, which replace words; `named`: also its attributes.
    """
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    letters = "abcdefghijklmnopqrstuvwxyz0123456789"
    pieces = [*SPECIAL_TOKENS, *letters, *(f"##{letter}" for letter in letters), *".,;:!?'\"()-/"]
    pieces += [word for word in WORDS if word not in pieces]
    special = special or {}
    vocabulary = {
        piece: index for index, piece in enumerate(pieces[:VOCAB_SIZE]) if index not in special.values()
    }
    vocabulary |= special
    taken = set(vocabulary.values())
    vocabulary |= {f"[unused{index}]": index for index in range(max(taken)) if index not in taken}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B [SEP]",
        special_tokens=[("[CLS]", vocabulary["[CLS]"]), ("[SEP]", vocabulary["[SEP]"])],
    )
    options: dict[str, Any] = {}
    if special:
        options = {"bos_token": "[CLS]", "eos_token": "[SEP]", "additional_special_tokens": list(special)}
    if named:
        names = [name for name in special if name[1:-1].isidentifier()]
        options["extra_special_tokens"] = {f"{name[1:-1]}_token": name for name in names}
    found = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_max_length=MAX_POSITIONS - 4,
        **options,
    )
    found.save_pretrained(directory)
    return found


def random_rows(num_rows: int, *, longest: int = 24, seed: int = 0) -> list[list[int]]:
    """Token ids of rows of different lengths, none of them a special token."""
    generator = torch.Generator().manual_seed(seed)
    first = len(SPECIAL_TOKENS)
    lengths = torch.randint(3, longest + 1, (num_rows,), generator=generator).tolist()
    return [torch.randint(first, VOCAB_SIZE, (length,), generator=generator).tolist() for length in lengths]
