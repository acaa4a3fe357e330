"""How transformers loads a split checkpoint: by a quantization method called "ffsplit".

`config.json` of a split checkpoint has the layout of every layer. Before the weights are read, each FFN of
the empty model is replaced by a SplitFFN of that layout. `import ffsplit` imports this module as soon as
transformers itself is imported, and never before.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from typing import Any

from pydantic import ValidationError
from torch import nn
from transformers.activations import ACT2FN
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ffsplit.errors import ArtifactError
from ffsplit.models.checkpoint import NARROWED
from ffsplit.models.family import activation_name
from ffsplit.models.ffns import FFNPlace, ffns_of
from ffsplit.runtime.attention_int8 import install_linears
from ffsplit.runtime.cuda_graphs import use_cuda_graphs
from ffsplit.runtime.ffn_tensors import FORMAT_VERSION, FFNRun, guarded
from ffsplit.runtime.modules import SplitExperts, SplitFFN, install_split_ffn, narrow_experts, narrow_ffn
from ffsplit.store.pull import materialize

METHOD = "ffsplit"


@register_quantization_config(METHOD)
class SplitConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """The `quantization_config` of a split checkpoint.

    `form` is NARROWED, or None if FFNs are split. `left_out` are the towers whose FFNs are as they were.
    """

    def __init__(
        self,
        version: int,
        *,
        ffns: Sequence[dict[str, Any]] = (),
        linears: dict[str, Any] | None = None,
        form: str | None = None,
        left_out: Sequence[str] = (),
        **_: Any,
    ) -> None:
        if version != FORMAT_VERSION:
            raise ArtifactError(
                f"config.json has checkpoint format {version!r}; this version of ffsplit reads "
                f"{FORMAT_VERSION}: upgrade ffsplit"
            )
        self.quant_method = METHOD
        self.version = version
        self.ffns, self.linears = ffns, linears
        self.form = form
        self.left_out = tuple(left_out)

    @property
    def runs(self) -> list[FFNRun]:
        """The model's FFNs. Raises ArtifactError when config.json does not describe them."""
        try:
            return [FFNRun.model_validate(ffns) for ffns in self.ffns]
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(("ffns", *map(str, first["loc"])))
            raise ArtifactError(f"config.json, quantization_config: {where}: {first['msg']}") from None

    def __deepcopy__(self, memo: dict[int, Any]) -> SplitConfig:
        """Return itself: it is never changed, and loading a model copies its config several times."""
        return self

    def to_dict(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if value is not None}


@register_quantizer(METHOD)
class SplitQuantizer(HfQuantizer):  # type: ignore[misc]
    """Replaces the FFNs of a model before its weights are loaded. The weights are read unchanged."""

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        config = self.quantization_config
        if config.form == NARROWED:
            return narrow_ffns(model, config.runs, left_out=config.left_out)
        return install_split_ffns(model, config.runs, linears=config.linears, left_out=config.left_out)

    @property
    def is_trainable(self) -> bool:
        return True

    def is_serializable(self) -> bool:
        return True

    def update_parallel_plan(self, model: nn.Module, plan: dict[str, str]) -> None:
        """Do nothing: this would look for renamed tensors, and there are none."""


def install_split_ffns(
    model: Any,
    runs: Sequence[FFNRun],
    *,
    linears: dict[str, Any] | None = None,
    left_out: Sequence[str] = (),
) -> nn.Module:
    """Replace every FFN of a model by an empty SplitFFN on the model's device.

    The linear layers named in `linears` become quantized ones.
    """
    prefix, places, ffns = paired(model, runs, left_out=left_out)
    config = model.config.to_dict()
    experts: dict[str, SplitExperts] = {}
    guards = guarded(places)
    for place, ffn in zip(places, ffns, strict=True):
        paths, block = place.paths, model.get_submodule(f"{prefix}{place.block}")
        trained = paths.trained_in_module
        if trained is None:
            activation = ACT2FN[paths.function or activation_name(config, place.tower)]
        else:
            activation = block.get_submodule(paths.activation)
        guard = paths.guard if place.index in guards else None
        if not place.is_stacked:
            split_ffn = SplitFFN(ffn.layout, ffn.shape, activation, guard=guard, trained=trained)
            install_split_ffn(block, paths, split_ffn)
            if place.expert is not None:
                _keep_initialized(model, f"{prefix}{place.runner}")
            continue
        if place.index == place.unit:
            experts[place.split_path] = SplitExperts(guard=guard)
            model.set_submodule(f"{prefix}{place.split_path}", experts[place.split_path])
        experts[place.split_path].append(SplitFFN(ffn.layout, ffn.shape, activation))
    _keep_wide(model, [f"{place.block}.{place.paths.down}.weight" for place in places])
    if linears is not None:
        base = model.get_submodule(prefix.removesuffix("."))
        install_linears(base, linears)
    return model  # type: ignore[no-any-return]


def _keep_initialized(model: Any, runner: str) -> None:
    """Stop the module around experts, and theirs, from initializing matrices that split experts lack.

    Switch's does so. The other modules in them still initialize themselves.
    """
    for path in (runner, runner.rpartition(".")[0]):
        model.get_submodule(path)._is_hf_initialized = True


def _keep_wide(model: Any, downs: Sequence[str]) -> None:
    """Load down projections in float32 if the family always does so, such as T5 in float16."""
    patterns = set(model._keep_in_fp32_modules or ())
    if any(re.search(pattern, name) for pattern in patterns for name in downs):
        model._keep_in_fp32_modules = patterns | {r"\.(?:heavy|light)\.down\."}


def narrow_ffns(model: Any, runs: Sequence[FFNRun], *, left_out: Sequence[str] = ()) -> nn.Module:
    """Give every FFN of an empty model the width of its layout."""
    prefix, places, ffns = paired(model, runs, left_out=left_out)
    for place, ffn in zip(places, ffns, strict=True):
        if not place.is_stacked:
            for block in (place.block, *place.twins):
                narrow_ffn(model.get_submodule(f"{prefix}{block}"), place.paths, ffn.layout.num_neurons)
        elif place.index == place.unit:
            assert place.paths.stack is not None, "experts that a model runs are stacked"
            for block in (place.block, *place.twins):
                experts = model.get_submodule(f"{prefix}{block}").get_submodule(place.paths.split_path)
                narrow_experts(experts, place.paths.stack, ffn.layout.num_neurons)
    return model  # type: ignore[no-any-return]


def paired(
    model: Any, runs: Sequence[FFNRun], *, left_out: Sequence[str]
) -> tuple[str, Sequence[FFNPlace], list[FFNRun]]:
    """The prefix of the base model, its FFNs, and the config.json entry of each."""
    prefix, places = ffns_of(model, left_out=left_out)
    ffns = [run for run in runs for _ in range(run.count)]
    if len(places) != len(ffns):
        raise ArtifactError(f"config.json describes {len(ffns)} split FFNs, the model has {len(places)}")
    return prefix, places, ffns


# Loading a published artifact as a model of the original's class.


def load(uri: str | os.PathLike[str], *, cuda_graphs: bool = False, **options: Any) -> Any:
    """The compressed model, of the original's class, in eval mode.

    `uri` is an output URI (its newest run), a run or an attempt, local or s3://. `options` go to
    `from_pretrained`, such as `dtype` and `device_map`. With `cuda_graphs` the model replays its forward
    passes on a GPU, as `use_cuda_graphs` says. Raises ConfigError if there is no artifact, or no GPU for the
    graphs, and ArtifactError if the artifact is invalid.
    """
    from ffsplit.models.load import load_whole_model

    directory = materialize(os.fspath(uri))
    config = json.loads((directory / "config.json").read_text("utf-8"))
    model = load_whole_model(directory, (config.get("architectures") or [""])[0], **options)
    return use_cuda_graphs(model) if cuda_graphs else model
