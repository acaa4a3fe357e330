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
from ffsplit.models.checkpoint import activation_name
from ffsplit.models.detect import architecture_of
from ffsplit.models.find import ffns_of
from ffsplit.runtime.linears import install_linears
from ffsplit.runtime.split_experts import SplitExperts
from ffsplit.runtime.split_ffn import Form, SplitFFN, install_split_ffn

METHOD = "ffsplit"
FORMAT_VERSION = 3


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

    def __deepcopy__(self, memo: dict[int, Any]) -> SplitConfig:
        """Itself: nobody changes it, and a config is copied several times while a model is loaded."""
        return self

    def to_dict(self) -> dict[str, Any]:
        return dict(self.__dict__)


@register_quantizer(METHOD)
class SplitQuantizer(HfQuantizer):  # type: ignore[misc]
    """Swaps the FFNs of a model that is about to be loaded; the weights are read as they are."""

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        config = self.quantization_config
        layouts = [LayerLayout.model_validate(layer) for layer in config.layers]
        shapes = [FFNShape.model_validate(shape) for shape in config.shapes]
        return install_split_ffns(model, layouts, shapes, linears=config.linears, version=config.version)

    @property
    def is_trainable(self) -> bool:
        return True

    def is_serializable(self) -> bool:
        return True

    def update_parallel_plan(self, model: nn.Module, plan: dict[str, str]) -> None:
        """Nothing: no tensor is stored under a name of its own, which is what this would look for."""


def install_split_ffns(
    model: Any,
    layouts: list[LayerLayout],
    shapes: list[FFNShape],
    *,
    linears: dict[str, Any] | None = None,
    version: int = FORMAT_VERSION,
) -> nn.Module:
    """Replace every FFN of a model by an empty SplitFFN, on whatever device the model is.

    The linear layers that `linears` names become integer maps; `version` is the checkpoint's format.
    """
    prefix, places = ffns_of(model)
    if len(places) != len(layouts):
        raise ArtifactError(f"config.json describes {len(layouts)} split FFNs, the model has {len(places)}")
    config = model.config.to_dict()
    kind = architecture_of(model).kind
    form = Form(per_token=kind != "encoder", is_old=version < 3)  # a few tokens of decoders are very large
    experts: dict[str, SplitExperts] = {}
    for place, layout, shape in zip(places, layouts, shapes, strict=True):
        activation = ACT2FN[activation_name(config, place.tower)]
        guard = place.paths.guard
        if place.expert is None:
            split_ffn = SplitFFN(layout, shape, activation, guard=guard, form=form)
            install_split_ffn(model.get_submodule(f"{prefix}{place.block}"), place.paths, split_ffn)
            continue
        if place.index == place.unit:
            experts[place.split_path] = SplitExperts(guard=guard)
            model.set_submodule(f"{prefix}{place.split_path}", experts[place.split_path])
        experts[place.split_path].append(SplitFFN(layout, shape, activation, form=form))
    if linears is not None:
        base = model.get_submodule(prefix.removesuffix("."))
        install_linears(base, linears, form=form)
    return model  # type: ignore[no-any-return]
