"""What a checkpoint's tensors are called: in its files, and in the model that transformers makes of them.

Files may be older than the modelling code, or come from elsewhere, and transformers renames their tensors
as it loads them. The rules of the families in the table are data, so that headers alone tell where an FFN
is; whatever they leave open, transformers is asked (`names_read`). Before a run begins the two are held
against each other (`check_names`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ffsplit.errors import UnsupportedModelError

Rules = tuple[tuple[str, str], ...]
"""Parts of names, as a module has them and as files do, in the order in which they are replaced."""
LEGACY: Rules = (("LayerNorm.weight", "LayerNorm.gamma"), ("LayerNorm.bias", "LayerNorm.beta"))
"""Names from before PyTorch, which transformers reads in every family and writes in none."""


class ReadTensor(NamedTuple):
    """What a model has a stored tensor for."""

    name: str
    """The model's own tensor; of several in one the first."""
    renamed: str
    """The stored name with its parts renamed, before tensors are joined or split, and with its own prefix."""
    is_whole: bool
    """Whether the tensor is stored as the model has it, neither joined with others nor split."""


class TensorNames:
    """The two names of every tensor that belongs to the model, either way.

    `read` is what transformers makes of each stored name, None for one that it ignores; without it the
    rules alone decide, and nothing is ignored. Where two stored names are one module's, the first in
    order counts, as it does for transformers.
    """

    def __init__(
        self, stored: Iterable[str], *, rules: Rules, read: Mapping[str, ReadTensor | None] | None = None
    ) -> None:
        self._rules = rules
        self._stored: dict[str, str] = {}
        for name in sorted(stored):
            found = ReadTensor(name, name, True) if read is None or name not in read else read[name]
            if found is not None:
                self._stored.setdefault(self._module_name(found.renamed), name)

    @property
    def modules(self) -> Mapping[str, str]:
        """Stored names by the names that their modules have."""
        return self._stored

    def stored(self, module_name: str) -> str:
        """What the files call a module's tensor; what they would call it where they do not have it."""
        if module_name in self._stored:
            return self._stored[module_name]
        for of_module, of_file in self._rules:
            module_name = module_name.replace(of_module, of_file)
        return module_name

    def _module_name(self, stored: str) -> str:
        for of_module, of_file in (*self._rules, *LEGACY):
            stored = stored.replace(of_file, of_module)
        return stored


def names_read(model: Any, stored: Iterable[str]) -> dict[str, ReadTensor | None]:
    """What transformers makes of each stored name when it loads a model of this class; None: it ignores it.

    The same steps as in `transformers.core_model_loading.convert_and_load_state_dict_in_model` of version
    5.23: renamings, then one converter, then the base model's prefix.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        dot_natural_key,
        rename_source_key,
    )

    mapping = get_model_conversion_mapping(model)
    renamings = [each for each in mapping if isinstance(each, WeightRenaming)]
    converters = [each for each in mapping if isinstance(each, WeightConverter)]
    tensors, prefix = model.state_dict(), model.base_model_prefix
    found: dict[str, ReadTensor | None] = {}
    whole: set[str] = set()
    for name in sorted(stored, key=dot_natural_key):
        renamed, _ = rename_source_key(name, renamings, [])
        target, source = rename_source_key(name, renamings, converters, prefix, tensors)
        if target not in tensors and name in tensors:
            renamed = name
            target, source = rename_source_key(name, [], [], prefix, tensors)
        if target not in tensors or (source is None and target in whole):
            found[name] = None
            continue
        found[name] = ReadTensor(target, renamed, is_whole=source is None)
        if source is None:
            whole.add(target)
    return found


def empty_class(directory: Path, class_name: str) -> Any | None:
    """A model of transformers' own class without its weights, by the directory's config.

    None where transformers has no such class. Raises UnsupportedModelError where it makes none of the config.
    """
    import transformers
    from accelerate import init_empty_weights

    chosen = getattr(transformers, class_name or "AutoModel", None)
    if chosen is None:
        return None
    try:
        with init_empty_weights():
            kind = getattr(chosen, "config_class", None) or transformers.AutoConfig
            config = kind.from_pretrained(directory, local_files_only=True)
            return chosen(config) if class_name else chosen.from_config(config)
    except Exception as error:  # whatever a family's code raises on a config that it cannot read
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UnsupportedModelError(
            f"{directory}: transformers makes no {class_name or 'model'} of config.json ({reason})"
        ) from None


def below_base(model: Any, name: str) -> str:
    """A model tensor's name below the base model."""
    base = model.base_model_prefix
    inside = base and getattr(model, base, None) is not None
    return re.sub(rf"^{re.escape(base)}\.", "", name) if inside else name
