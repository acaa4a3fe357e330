"""Maps the names of a checkpoint's tensors in its files to their names in the transformers model.

Files may be older than the modelling code, or come from elsewhere, and transformers renames their tensors
as it loads them. The table holds each family's renaming rules as data, so that headers alone tell where an
FFN is. If they leave a name open, transformers decides (`names_read`). Before a run begins, the two are
compared (`check_names`).
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ffsplit.compat.transformers import ReadTensor
from ffsplit.errors import UnsupportedModelError

Rules = tuple[tuple[str, str], ...]
"""Pairs of name parts, the module's and the files', in the order in which they are replaced."""
LEGACY: Rules = (("LayerNorm.weight", "LayerNorm.gamma"), ("LayerNorm.bias", "LayerNorm.beta"))
"""Names from before PyTorch, which transformers reads in every family and writes in none."""


class TensorNames:
    """Maps stored names to module names, and back, for every tensor that belongs to the model.

    `read` says how transformers reads each stored name, None for one that it ignores. Without it the rules
    alone decide, and nothing is ignored. If two stored names belong to one module tensor, the first in
    sorted order wins, as in transformers.
    """

    def __init__(
        self, stored: Iterable[str], *, rules: Rules, read: Mapping[str, ReadTensor | None] | None = None
    ) -> None:
        self._rules = rules
        self._stored: dict[str, str] = {}
        self._parts: dict[str, dict[int, str]] = {}
        self._halves: dict[str, tuple[str, int]] = {}
        self._interleaved: set[str] = set()
        for name in sorted(stored):
            found = ReadTensor(name, name, True) if read is None or name not in read else read[name]
            if found is None:
                continue
            self._stored.setdefault(self._module_name(found.renamed), name)
            if found.interleaved:
                self._interleaved.add(name)
            if found.part is not None:
                self._parts.setdefault(found.name, {})[found.part] = name
            if len(found.rows_of) == 2:
                self._halves |= {each: (name, half) for half, each in enumerate(found.rows_of)}

    def half_of(self, module_name: str) -> tuple[str, int] | None:
        """The stored tensor of which a module's tensor is one half, and which half."""
        return self._halves.get(module_name)

    def is_interleaved(self, stored_name: str) -> bool:
        """Whether a stored tensor has the rows of two halves by turns, though the model has not."""
        return stored_name in self._interleaved

    def part_of(self, module_name: str, part: int) -> str | None:
        """The stored tensor that is one part of a module's tensor."""
        return self._parts.get(module_name, {}).get(part)

    @property
    def modules(self) -> Mapping[str, str]:
        """Stored names by module names."""
        return self._stored

    def stored(self, module_name: str) -> str:
        """The stored name of a module's tensor, or the name it would have if the files lack it."""
        if module_name in self._stored:
            return self._stored[module_name]
        for of_module, of_file in self._rules:
            module_name = module_name.replace(of_module, of_file)
        return module_name

    def _module_name(self, stored: str) -> str:
        for of_module, of_file in (*self._rules, *LEGACY):
            stored = stored.replace(of_file, of_module)
        return stored


def empty_class(directory: Path, class_name: str) -> Any | None:
    """Build a model of a transformers class, without its weights, from the directory's config.

    None if transformers has no such class. Raises UnsupportedModelError if it cannot build the model.
    """
    import torch
    import transformers

    chosen = getattr(transformers, class_name or "AutoModel", None)
    if chosen is None:
        return None
    try:
        with torch.device("meta"):
            kind = getattr(chosen, "config_class", None) or transformers.AutoConfig
            config = kind.from_pretrained(directory, local_files_only=True)
            return chosen(config) if class_name else chosen.from_config(config)
    except Exception as error:  # whatever a family's code raises on a config that it cannot read
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UnsupportedModelError(
            f"{directory}: transformers cannot build {class_name or 'a model'} from config.json ({reason})"
        ) from None


def base_of(model: Any) -> Any:
    """The model without its task head: the part that `base_model_prefix` names, or the model itself.

    Some base models have a part by that name too, which does not take the model's inputs, and some heads
    decode a text for a base model that reads something else.
    """
    inner = getattr(model, model.base_model_prefix, None) if model.base_model_prefix else None
    if inner is None:
        return model
    outer_takes, takes = (inspect.signature(each.forward).parameters for each in (model, inner))
    decodes = "decoder_input_ids" in outer_takes and "decoder_input_ids" not in takes
    return model if decodes or main_inputs(model)[0] not in takes else inner


def main_inputs(model: Any) -> tuple[str, ...]:
    """The arguments that a model makes its states from, the main one first. Some models name several.

    A model that names none of its arguments reads pictures or sounds if it has an argument for them.
    """
    name = getattr(model, "main_input_name", None) or "input_ids"
    names = (name,) if isinstance(name, str) else tuple(name)
    arguments = inspect.signature(model.forward).parameters
    if not arguments.keys().isdisjoint(names):
        return names
    return next(((each,) for each in _MEDIA if each in arguments), names)


_MEDIA = ("pixel_values", "input_values", "input_features")


def below_base(model: Any, name: str) -> str:
    """A model tensor's name relative to the base model."""
    base = model.base_model_prefix
    return name if base_of(model) is model else re.sub(rf"^{re.escape(base)}\.", "", name)
