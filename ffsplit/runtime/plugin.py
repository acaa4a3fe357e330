"""How transformers learns to load a split checkpoint: a quantization method called "ffsplit".

`config.json` of a split checkpoint carries the layout of every layer; before the weights are read,
each FFN of the empty model is replaced by a SplitFFN of that layout. Imported by `import ffsplit` as
soon as transformers itself is, and never before.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers.activations import ACT2FN
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ffsplit.errors import ArtifactError
from ffsplit.ffn import FFNShape, LayerLayout
from ffsplit.models.architectures import ARCHITECTURES, Architecture
from ffsplit.runtime.linears import install_linears
from ffsplit.runtime.split_ffn import SplitFFN

METHOD = "ffsplit"
FORMAT_VERSION = 2


@register_quantization_config(METHOD)
class SplitConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """The `quantization_config` of a split checkpoint."""

    def __init__(
        self,
        layers: list[dict[str, Any]],
        shapes: list[dict[str, Any]],
        version: int,
        linears: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        if version > FORMAT_VERSION:
            raise ArtifactError(
                f"checkpoint format {version} is newer than {FORMAT_VERSION}: upgrade ffsplit"
            )
        self.quant_method = METHOD
        self.version = version
        self.layers = layers
        self.shapes = shapes
        self.linears = linears


@register_quantizer(METHOD)
class SplitQuantizer(HfQuantizer):  # type: ignore[misc]
    """Swaps the FFNs of a model that is about to be loaded; the weights are read as they are."""

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        config = self.quantization_config
        layouts = [LayerLayout.model_validate(layer) for layer in config.layers]
        shapes = [FFNShape.model_validate(shape) for shape in config.shapes]
        return install_split_ffns(model, layouts, shapes, linears=config.linears)

    @property
    def is_trainable(self) -> bool:
        return True

    def is_serializable(self) -> bool:
        return True


def install_split_ffns(
    model: Any, layouts: list[LayerLayout], shapes: list[FFNShape], *, linears: dict[str, Any] | None = None
) -> nn.Module:
    """Replace every FFN of a model by an empty SplitFFN, on whatever device the model is.

    The linear layers that `linears` names become integer maps.
    """
    row = ARCHITECTURES[model.config.model_type]
    base = getattr(model, model.base_model_prefix, model)
    blocks = base.get_submodule(row.blocks)
    if len(blocks) != len(layouts):
        raise ArtifactError(f"config.json describes {len(layouts)} split layers, the model has {len(blocks)}")
    per_token = row.kind == "causal_lm"  # a few tokens of these are very large
    for block, layout, shape in zip(blocks, layouts, shapes, strict=True):
        activation = ACT2FN[getattr(model.config, row.activation_field)]
        install_split_ffn(
            block, row, SplitFFN(layout, shape, activation, guard=row.guard, per_token=per_token)
        )
        if linears is not None:
            install_linears(block, linears, per_token=per_token)
    return model  # type: ignore[no-any-return]


def install_split_ffn(block: nn.Module, row: Architecture, split_ffn: nn.Module) -> None:
    """Put a split FFN where a block has its own; whatever ran around it becomes an identity."""
    block.set_submodule(row.split_path, split_ffn)
    if row.ffn is None:
        block.set_submodule(row.down, nn.Identity())
        if row.activation is not None:
            block.set_submodule(row.activation, nn.Identity())
