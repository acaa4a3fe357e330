"""The compute profile: those settings of a worker's hardware that can change a result's bytes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

from ffsplit.config import Attention, JobConfig, Record
from ffsplit.errors import ConfigError
from ffsplit.machine import check_device, multiplies_bfloat16
from ffsplit.models.load_options import attending, trusting


class _Shared:
    """A setting of the whole process that contexts change, several of them in threads of one worker.

    Those of one thread nest. Of several threads, the first changes it and the last changes it back.
    """

    def __init__(self) -> None:
        self._lock, self._own = threading.Lock(), threading.local()
        self._num_threads = 0
        self._restore: Callable[[], None] = lambda: None

    @contextmanager
    def changed(self, change: Callable[[], Callable[[], None]]) -> Iterator[None]:
        """Call `change`, which returns how to undo it, and undo it at the end."""
        if getattr(self._own, "is_inside", False):
            restore = change()
            try:
                yield
            finally:
                restore()
            return
        with self._lock:
            restore = change()
            self._num_threads += 1
            if self._num_threads == 1:
                self._restore = restore
        self._own.is_inside = True
        try:
            yield
        finally:
            self._own.is_inside = False
            with self._lock:
                self._num_threads -= 1
                if not self._num_threads:
                    self._restore()


_threads, _determinism = _Shared(), _Shared()


@contextmanager
def _deterministic() -> Iterator[None]:
    """Choose deterministic algorithms. New memory need not be filled for that: no algorithm here reads it."""
    import torch

    settings: Any = torch.utils.deterministic  # its attributes are properties that type checkers do not see

    def change() -> Callable[[], None]:
        before, fills = torch.are_deterministic_algorithms_enabled(), settings.fill_uninitialized_memory

        def restore() -> None:
            torch.use_deterministic_algorithms(before)
            settings.fill_uninitialized_memory = fills

        torch.use_deterministic_algorithms(True, warn_only=True)
        settings.fill_uninitialized_memory = False
        return restore

    with _determinism.changed(change):
        yield


class ComputeProfile(Record):
    """One worker's device, the dtype it runs the model in, and its CPU threads."""

    device: Literal["cpu", "cuda"]
    dtype: Literal["float32", "bfloat16", "float16"]
    threads: int
    trust_remote_code: bool = False
    attn_implementation: Attention | None = None

    @classmethod
    def resolve(cls, config: JobConfig) -> ComputeProfile:
        """CUDA in bfloat16 if GPUs are asked for; otherwise the CPU in float32."""
        if config.device == "cpu" and config.gpus_per_worker > 0:
            raise ConfigError("--device cpu and --gpus-per-worker contradict each other")
        device: Literal["cpu", "cuda"] = "cpu"
        if config.device == "cuda" or config.gpus_per_worker > 0:
            device = "cuda"
        dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16" if device == "cuda" else "float32"
        return cls(
            device=device,
            dtype=dtype if config.dtype == "auto" else config.dtype,
            threads=config.threads_per_worker,
            trust_remote_code=config.trust_remote_code,
            attn_implementation=config.attn_implementation,
        )

    @classmethod
    def fits_in_bfloat16(cls, config: JobConfig) -> bool:
        """Whether layers are fitted with bfloat16 products. The driver decides this for all workers.

        True if this process's device has instructions for it, unless --dtype float32 is given. GPUs may be
        on other hosts only: without one here they count as able.
        """
        import torch

        if config.dtype == "float32":
            return False
        device = cls.resolve(config).device
        if device == "cuda" and not torch.cuda.is_available():
            return True
        return multiplies_bfloat16(device)

    @property
    def key_inputs(self) -> dict[str, Any]:
        """What goes into a run key. The model's digest covers its code and its config's attention."""
        return self.model_dump(mode="json", exclude={"trust_remote_code"}, exclude_none=True)

    @contextmanager
    def pinned(self, *, threads: int | None = None) -> Iterator[None]:
        """Compute with the profile's CPU threads, or `threads`, in this context."""
        import torch

        def change() -> Callable[[], None]:
            before = torch.get_num_threads()
            torch.set_num_threads(threads or self.threads)
            return lambda: torch.set_num_threads(before)

        with _threads.changed(change):
            yield

    @contextmanager
    def loading(self) -> Iterator[None]:
        """Load models as the profile says in this context."""
        with trusting(self.trust_remote_code), attending(self.attn_implementation):
            yield

    @contextmanager
    def applied(self, *, threads: int | None = None) -> Iterator[None]:
        """Apply the profile to this process in this context, with other `threads` if they are given.

        Raises ConfigError if the process has no such device, or the device lacks the dtype.
        """
        check_device(self.device, self.dtype)
        with _deterministic(), self.pinned(threads=threads), self.loading():
            yield
