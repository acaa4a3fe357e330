"""A real Jupyter kernel, in which cells run as in a notebook."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from jupyter_client.manager import KernelManager

START_WITHIN_S, RUN_WITHIN_S = 120, 300
ROOT = Path(__file__).parents[1]


class Outputs(NamedTuple):
    """What a cell leaves: its streams, its displays in their last state, and its error."""

    streams: dict[str, str]
    displays: dict[str, list[dict[str, str]]]
    error: str | None


class Kernel:
    def __init__(self, manager: KernelManager) -> None:
        self._manager, self._client = manager, manager.client()
        self._client.start_channels()
        self._client.wait_for_ready(timeout=START_WITHIN_S)

    def run(self, code: str) -> Outputs:
        """Run a cell to its end. `displays` has every state of each, by its id."""
        found = Outputs({}, {}, None)

        def collect(message: dict[str, Any]) -> None:
            nonlocal found
            kind, content = message["msg_type"], message["content"]
            if kind == "stream":
                found.streams[content["name"]] = found.streams.get(content["name"], "") + content["text"]
            elif kind in ("display_data", "update_display_data"):
                identity = content["transient"].get("display_id", "none")
                found.displays.setdefault(identity, []).append(content["data"])
            elif kind == "error":
                found = found._replace(error=content["ename"])

        self._client.execute_interactive(code, output_hook=collect, timeout=RUN_WITHIN_S, stop_on_error=False)
        return found

    def value(self, expression: str) -> str:
        found = self.run(f"print({expression})")
        assert found.error is None, found
        return found.streams["stdout"].strip()

    def close(self) -> None:
        self._client.stop_channels()


@contextmanager
def kernel() -> Iterator[Kernel]:
    manager = KernelManager(kernel_name="python3")
    manager.start_kernel(env=os.environ | {"PYTHONPATH": str(ROOT)}, stderr=None)
    try:
        started = Kernel(manager)
        yield started
        started.close()
    finally:
        manager.shutdown_kernel(now=True)
