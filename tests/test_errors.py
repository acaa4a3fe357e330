"""Whatever a library raises becomes one line of ours that says what was being done, and keeps its cause."""

from __future__ import annotations

import pickle

import pytest
import torch

from ffsplit.errors import (
    LONGEST_REASON,
    ConfigError,
    FFSplitError,
    OutOfMemoryError,
    StoreError,
    explained,
    is_out_of_memory,
    reason_of,
)


class OddError(Exception):
    """As libraries have them: no one-string constructor, no pickling."""

    def __init__(self, code: int, place: object) -> None:
        super().__init__(code, place)

    def __str__(self) -> str:
        return f"\n\n  code {self.args[0]}\nand more\n"


class PanicException(BaseException):
    """What pyo3 makes of a panic in tokenizers or safetensors."""


REASONS: dict[str, tuple[BaseException, str]] = {
    "a bare Exception": (Exception("data did not match"), "data did not match"),
    "nothing to say": (ImportError(), "ImportError"),
    "several lines": (OddError(3, object()), "code 3"),
    "a heading": (ValueError("Validation error for field 'x':\n  expected int"), "field 'x': expected int"),
    "a key alone": (KeyError("text"), "KeyError: 'text'"),
    "a file": (FileNotFoundError(2, "No such file", "/a/b"), "No such file: /a/b"),
    "the file that is named already": (PermissionError(13, "Permission denied", "/the/file"), "denied"),
    "a panic": (PanicException("index out of bounds"), "index out of bounds"),
    "recursion": (RecursionError("maximum recursion depth exceeded"), "maximum recursion depth exceeded"),
}


@pytest.mark.parametrize("name", REASONS)
def test_every_error_is_one_line_with_its_cause(name: str) -> None:
    error, reason = REASONS[name]
    with pytest.raises(ConfigError) as caught, explained("cannot read /the/file"):
        raise error
    message = str(caught.value)
    assert message.startswith("cannot read /the/file: ") and message.endswith(reason)
    assert "\n" not in message and message.count("/the/file") == 1
    assert caught.value.__cause__ is error
    assert str(pickle.loads(pickle.dumps(caught.value))) == message


NO_MEMORY: dict[str, tuple[BaseException, str]] = {
    "Python": (MemoryError(), "MemoryError"),
    "torch, on a CPU": (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "tried"),
    "torch, on a GPU": (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"), "to allocate"),
    "a library of CUDA": (RuntimeError("CUBLAS_STATUS_ALLOC_FAILED when calling"), "calling"),
    "the system": (OSError(12, "Cannot allocate memory"), "Cannot allocate memory"),
}


@pytest.mark.parametrize("name", NO_MEMORY)
def test_a_lack_of_memory_is_told_from_other_errors(name: str) -> None:
    error, reason = NO_MEMORY[name]
    with pytest.raises(OutOfMemoryError) as caught, explained("loading a"):
        raise error
    assert str(caught.value) == f"loading a: {reason_of(error)}; give fewer --workers, or --block-by-block"
    assert reason in str(caught.value) and is_out_of_memory(error)
    assert is_out_of_memory(pickle.loads(pickle.dumps(caught.value))), "as it comes from a worker"
    wrapped = FFSplitError("Ray: RayTaskError")
    wrapped.__cause__ = error
    assert is_out_of_memory(wrapped)


def test_other_errors_have_enough_memory() -> None:
    assert not any(is_out_of_memory(error) for error, _ in REASONS.values())
    assert not is_out_of_memory(None) and not is_out_of_memory(OSError(28, "No space left on device"))


def test_what_to_do_stands_at_the_end() -> None:
    with (
        pytest.raises(StoreError, match=r"^sending failed: no route; check the network$"),
        explained("sending failed", kind=StoreError, advice="check the network"),
    ):
        raise OSError("no route.")


def test_our_own_errors_pass_as_they_are() -> None:
    with pytest.raises(StoreError, match=r"^gone$"), explained("reading"):
        raise StoreError("gone")


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(3), GeneratorExit()])
def test_an_interrupt_is_no_error(error: BaseException) -> None:
    with pytest.raises(type(error)), explained("reading"):
        raise error


def test_a_long_line_is_cut() -> None:
    assert len(reason_of(ValueError("x" * 10_000))) <= LONGEST_REASON + 3


def test_nothing_changes_where_nothing_is_raised() -> None:
    values = []
    with explained("reading", kind=FFSplitError):
        values.append(1)
    assert values == [1]
