"""Sound files to mono samples at a model's rate: WAV by the standard library, others by soundfile."""

from __future__ import annotations

import io
import math
import wave
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ffsplit.errors import ConfigError, explained

_WIDTHS = {1: (np.uint8, 128.0, 128.0), 2: (np.int16, 0.0, 32768.0), 4: (np.int32, 0.0, 2147483648.0)}


def decode_sound(data: bytes, *, rate: int) -> NDArray[np.float32]:
    """Samples in [-1, 1] at `rate` per second. Raises ConfigError for what cannot be decoded."""
    try:
        samples, found_rate = _decode_wav(data)
    except Exception:  # whatever is wrong with it as WAV, soundfile reads more and says what it is
        samples, found_rate = _decode_other(data)
    if found_rate != rate:
        from scipy.signal import resample_poly

        with explained(f"a sound of {found_rate} samples a second cannot be brought to {rate}"):
            divisor = math.gcd(found_rate, rate)
            samples = resample_poly(samples, rate // divisor, found_rate // divisor)
    return samples.astype(np.float32)


def _decode_wav(data: bytes) -> tuple[NDArray[np.float32], int]:
    with wave.open(io.BytesIO(data)) as file:
        dtype, middle, scale = _WIDTHS[file.getsampwidth()]
        values = np.frombuffer(file.readframes(file.getnframes()), dtype=dtype).astype(np.float32)
        channels = values.reshape(-1, file.getnchannels())
        return (channels.mean(axis=1) - np.float32(middle)) / np.float32(scale), file.getframerate()


def _decode_other(data: bytes) -> tuple[NDArray[np.float32], int]:
    try:
        import soundfile
    except ImportError:
        raise ConfigError(
            "a sound that is no PCM WAV file needs soundfile: pip install 'ffsplit[audio]', or give WAV"
        ) from None
    with explained("a sound cannot be decoded"):
        found: Any = soundfile.read(io.BytesIO(data), dtype="float32", always_2d=True)
    return found[0].mean(axis=1), int(found[1])
