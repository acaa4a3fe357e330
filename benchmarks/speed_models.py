"""The models that the speed page times: dense ones with random weights, and what recipes make of them."""

from __future__ import annotations

from typing import Any

import torch
import transformers

from ffsplit.ffn.quantization import quantize_rows, scales_of
from ffsplit.ffn.shapes import FFNShape, Integer, LayerLayout, PartLayout
from ffsplit.recipes.recipe import load_recipe
from ffsplit.runtime.attention_int8 import linears_config
from ffsplit.runtime.ffn_tensors import FORMAT_VERSION, FFNRun
from ffsplit.runtime.plugin import install_split_ffns
from ffsplit.runtime.quantized_linear import QuantizedLinear
from ffsplit.splitting.layer import uniform_layouts

KEEP = 0.3535
INT8, INT4 = Integer(num_bits=8), Integer(num_bits=4, group_size=64)
BERTS = {
    "bert-base": {"hidden_size": 768, "num_attention_heads": 12, "num_hidden_layers": 12},
    "bert-large": {"hidden_size": 1024, "num_attention_heads": 16, "num_hidden_layers": 24},
}
LLAMAS = {
    "cpu": {
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "num_hidden_layers": 8,
        "vocab_size": 32000,
    },
    "cuda": {  # a quarter of the layers of a Llama 2 of 7 billion parameters
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "num_hidden_layers": 8,
        "vocab_size": 32000,
    },
}
BERT_ATTENTION = (
    "attention.self.query",
    "attention.self.key",
    "attention.self.value",
    "attention.output.dense",
)
LLAMA_ATTENTION = tuple(f"self_attn.{name}_proj" for name in "qkvo")


def bert(name: str, *, width: int | None = None, num_layers: int | None = None) -> Any:
    """A dense BERT, of another FFN width where one is given."""
    fields = BERTS[name] | ({} if num_layers is None else {"num_hidden_layers": num_layers})
    config = transformers.BertConfig(**fields, intermediate_size=width or 4 * BERTS[name]["hidden_size"])
    return transformers.BertModel(config, add_pooling_layer=False).eval()


def bert_kept(name: str, **options: Any) -> Any:
    """What the fast recipe leaves: an ordinary BERT whose FFNs are narrower."""
    return bert(name, width=_layout(_shape(bert(name, num_layers=1).config), "fast").num_neurons, **options)


def bert_paper(name: str, **options: Any) -> Any:
    """Half the budget to heavy hitters, the rest of low rank."""
    model = bert(name, **options)
    shape = _shape(model.config)
    return split(model, _layout(shape, "paper"), shape)


def bert_int8(name: str, **options: Any) -> Any:
    """The fast recipe's width, and every linear layer of the blocks in int8."""
    model = bert(name, **options)
    shape = _shape(model.config)
    heavy = _integer_part(_layout(shape, "fast").num_neurons, INT8, gated=False)
    layout = LayerLayout(heavy=heavy, light=None, down_bias=True)
    return split(model, layout, shape, linears=_paths(model, "encoder.layer", BERT_ATTENTION))


def llama(device: str, *, width: int | None = None, num_layers: int | None = None) -> Any:
    """A dense causal model, of another FFN width where one is given."""
    fields = LLAMAS[device] | ({} if num_layers is None else {"num_hidden_layers": num_layers})
    fields |= {} if width is None else {"intermediate_size": width}
    with torch.device(device):
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**fields)).eval()


def llama_kept(device: str, *, keep: float, **options: Any) -> Any:
    """What the fast recipe leaves: an ordinary Llama whose FFNs are narrower."""
    return llama(device, width=_kept_width(device, keep), **options)


def llama_int8(device: str, *, keep: float, **options: Any) -> Any:
    """The same with every linear layer of the blocks in int8."""
    model = llama(device, **options)
    shape = _shape(model.config, gated=True)
    heavy = _integer_part(_kept_width(device, keep), INT8, gated=True)
    layout = LayerLayout(heavy=heavy, light=None, down_bias=False)
    with torch.device(device):
        return split(model, layout, shape, linears=_paths(model, "layers", LLAMA_ATTENTION))


def _kept_width(device: str, keep: float) -> int:
    return int(LLAMAS[device]["intermediate_size"] * keep) // 128 * 128


def llama_split(device: str, **options: Any) -> Any:
    """A quarter of its neurons heavy hitters in int8, the rest in int4, attention in int8."""
    model = llama(device, **options)
    shape = _shape(model.config, gated=True)
    heavy = shape.num_neurons // 4 // 64 * 64
    layout = LayerLayout(
        heavy=_integer_part(heavy, INT8, gated=True),
        light=_integer_part(shape.num_neurons - heavy, INT4, gated=True),
        down_bias=False,
    )
    with torch.device(device):
        return split(model, layout, shape, linears=_paths(model, "layers", LLAMA_ATTENTION))


@torch.no_grad()
def split(model: Any, layout: LayerLayout, shape: FFNShape, *, linears: tuple[str, ...] = ()) -> Any:
    """A random model with FFNs of a layout, in the form of its artifact."""
    count = model.config.num_hidden_layers
    attention = linears_config(linears) if linears else None
    runs = [FFNRun(count=count, layout=layout, shape=shape)]
    install_split_ffns(model, runs, linears=attention)
    for module in model.modules():
        if isinstance(module, QuantizedLinear):
            weight = 0.02 * torch.randn(module.num_rows, module.num_columns)
            options = {"num_bits": module.num_bits, "group_size": module.group_size}
            module.hold(quantize_rows(weight, scales_of(weight, **options), **options))
        elif "Norm" not in type(module).__name__:
            for tensor in module.parameters(recurse=False):
                tensor.normal_(std=0.02)
    model.config.quantization_config = {
        "quant_method": "ffsplit",
        "version": FORMAT_VERSION,
        "ffns": [run.model_dump(mode="json") for run in runs],
        "linears": attention,
    }
    return model.eval()


def _shape(config: Any, *, gated: bool = False) -> FFNShape:
    return FFNShape(
        num_neurons=config.intermediate_size,
        hidden_size=config.hidden_size,
        gated=gated,
        up_bias=not gated,
        down_bias=not gated,
    )


def _layout(shape: FFNShape, recipe: str) -> LayerLayout:
    chosen = load_recipe(recipe)
    return uniform_layouts([shape], keep=KEEP, heavy=chosen.heavy, steps=chosen.steps)[0]


def _integer_part(num_neurons: int, format: Integer, *, gated: bool) -> PartLayout:
    return PartLayout(num_neurons=num_neurons, up=format, gate=format if gated else None, down=format)


def _paths(model: Any, blocks: str, names: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(f"{blocks}.{i}.{name}" for i in range(model.config.num_hidden_layers) for name in names)
