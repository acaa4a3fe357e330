"""Loading a published artifact as the model it was made from."""

from __future__ import annotations

import json
from typing import Any

from ffsplit.artifacts.pull import materialize


def load(uri: str, **options: Any) -> Any:
    """The compressed model, of the original's class, in eval mode.

    `uri` is an output URI (its newest run), a run or an attempt, local or s3://; `options` go to
    `from_pretrained`, as `dtype` and `device_map`. Raises ConfigError when there is no artifact and
    ArtifactError when it is not whole.
    """
    from ffsplit.models.load import load_whole_model

    directory = materialize(uri)
    config = json.loads((directory / "config.json").read_text("utf-8"))
    return load_whole_model(directory, (config.get("architectures") or [""])[0], **options)
