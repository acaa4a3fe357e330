"""A made-up run: MiniLM's shape, and energies as concentrated as its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from ffsplit.report.plots import EnergyCurve, energy_curve
from ffsplit.store.manifest import Manifest

HIDDEN_SIZE, NUM_NEURONS = 384, 1536
TOP_5_PERCENT = (0.99, 0.96, 0.98, 0.89, 0.54, 0.24)


def energies(top_5_percent: float, *, num_neurons: int = NUM_NEURONS) -> np.ndarray:
    """Energies [N] that fall off as a power of the rank, with this share in the top 5 %."""
    rank_N = np.arange(1, num_neurons + 1, dtype=np.float64)
    num_heavy = round(num_neurons * 0.05)
    low, high = 0.0, 8.0
    for _ in range(60):
        power = (low + high) / 2
        energy_N = rank_N**-power
        low, high = (
            (power, high) if energy_N[:num_heavy].sum() / energy_N.sum() < top_5_percent else (low, power)
        )
    return energy_N


def curves_of(num_layers: int) -> list[EnergyCurve]:
    if num_layers == len(TOP_5_PERCENT):
        return [
            energy_curve(layer, energies(share), name=f"layer {layer}")
            for layer, share in enumerate(TOP_5_PERCENT)
        ]
    shares = np.linspace(0.98, 0.25, num_layers)
    return [energy_curve(layer, energies(share), name=f"layer {layer}") for layer, share in enumerate(shares)]


def layer_fields(layer: int, num_layers: int) -> dict[str, Any]:
    mixed = layer % 3 == 2
    dense = {"heavy": {"num_neurons": 512}, "light": None}
    factored = {
        "num_neurons": 1459,
        "up": {"format": "low_rank", "rank": 64},
        "down": {"format": "low_rank", "rank": 64},
    }
    parts = {"heavy": {"num_neurons": 77}, "light": factored} if mixed else dense
    num_elements = 395_000 + 3_000 * (layer % 5)
    return {
        "layer": layer,
        "name": f"layer {layer}",
        "num_tokens": 183_442,
        "layout": {**parts, "down_bias": True},
        "num_heavy_hitters": 77,
        "num_elements": num_elements,
        "size_bytes": 4 * num_elements,
        "relative_error": 0.021 + 0.18 * (layer / max(1, num_layers - 1)) ** 2,
        "energy_in_top_5_percent": TOP_5_PERCENT[layer % 6],
    }


def shape_fields(num_layers: int) -> dict[str, Any]:
    ffn = {"hidden_size": 384, "num_neurons": 1536, "gated": False, "up_bias": True, "down_bias": True}
    sizes = {"num_parameters": 22_713_216, "num_parameters_without_embeddings": 10_794_240}
    return {"shapes": (ffn,) * num_layers, "itemsize": 4, **sizes}


def latency_fields(batch_size: int, num_tokens: int, original_ms: float, speedup: float) -> dict[str, Any]:
    compressed_ms = original_ms / speedup
    per_s = 1000 * batch_size * num_tokens
    return {
        "batch_size": batch_size,
        "num_tokens": num_tokens,
        "original_p50_ms": original_ms,
        "original_p95_ms": original_ms * 1.09,
        "compressed_p50_ms": compressed_ms,
        "compressed_p95_ms": compressed_ms * 1.12,
        "original_tokens_per_s": per_s / original_ms,
        "compressed_tokens_per_s": per_s / compressed_ms,
        "speedup": speedup,
        "spread": {
            "p10": speedup * 0.95,
            "p90": speedup * 1.08,
            "low": speedup * 0.99,
            "high": speedup * 1.02,
        },
        "num_pairs": 30,
    }


def size_fields(parameters: int, without: int, ffn: int) -> dict[str, int]:
    return {
        "num_parameters": parameters,
        "num_parameters_without_embeddings": without,
        "ffn_elements": ffn,
        "ffn_bytes": 4 * ffn,
        "file_bytes": 4 * parameters + 15_000,
    }


def measurement_fields() -> dict[str, Any]:
    return {
        "original_size": size_fields(22_713_216, 10_794_240, 7_089_408),
        "compressed_size": size_fields(18_000_000, 6_081_024, 2_376_192),
        "fidelity": {"token_cosine": 0.97321, "pooled_cosine": 0.98764},
        "latency": (
            latency_fields(1, 32, 6.42, 1.18),
            latency_fields(8, 128, 96.3, 1.412),
            latency_fields(32, 128, 402.0, 1.446),
        ),
        "load": {"before": 0.42, "after": 1.71, "num_cpus": 2},
        "original_peak_memory_bytes": 412_000_000,
        "compressed_peak_memory_bytes": 371_000_000,
        "device": "cpu",
        "dtype": "float32",
        "num_threads": 2,
    }


def manifest_fields(num_layers: int) -> dict[str, Any]:
    sizes = {
        "model.safetensors": 72_015_000,
        "config.json": 1_432,
        "tokenizer.json": 466_247,
        "vocab.txt": 231_508,
    }
    stages = (
        ("calibrate", 8, 3, 38.4),
        ("plan", 6, 6, 0.41),
        ("compress", 6, 0, 74.2),
        ("measure", 1, 0, 41.0),
    )
    return {
        "kind": "model",
        "run_key": "9f2c51e07ab3d846",
        "attempt": "20250314T101500-7c2e",
        "created_at": "2025-03-14T10:17:33Z",
        "ffsplit_version": "0.1.0",
        "plain": True,
        "seed": 7,
        "compute": {"device": "cpu", "dtype": "float32", "threads": 1},
        "recipe": {"name": "fast", "compressor": {"method": "prune", "refit": True}, "samples": 2048},
        "keep": 0.35,
        "model": {
            "id": "sentence-transformers/all-MiniLM-L6-v2",
            "revision": "c9745ed1d9f207416be6d2e6f8de32d1f16199bf",
            "digest": "ab" * 32,
            "tokenizer_digest": "cd" * 32,
            "model_type": "bert",
            "architecture": "BertModel",
            "license": "apache-2.0",
            "shape": shape_fields(num_layers),
        },
        "calibration": {
            "sources": ("builtin:pydoc",),
            "text_digest": "ef" * 32,
            "num_rows": 2048,
            "num_tokens": 183_442,
            "max_length": 128,
            "num_shards": 8,
            "held_out_rows": 256,
            "held_out_is_disjoint": True,
        },
        "layers": tuple(layer_fields(layer, num_layers) for layer in range(num_layers)),
        "measurements": measurement_fields(),
        "stages": tuple(
            {"name": name, "key": f"{index:016x}", "num_items": items, "num_reused": reused, "wall_s": wall_s}
            for index, (name, items, reused, wall_s) in enumerate(stages, start=11)
        ),
        "environment": {
            "versions": {"python": "3.11.9", "torch": "2.13.0", "transformers": "5.23.0", "ray": "2.60.0"},
            "hardware": {"cpu": "AMD EPYC 7763", "num_cpus": 2, "memory_bytes": 8_321_000_000, "gpu": "none"},
        },
        "files": tuple(
            {"path": path, "size_bytes": size, "sha256": f"{size:064x}"} for path, size in sizes.items()
        ),
    }


@pytest.fixture
def make_manifest() -> Callable[..., Manifest]:
    """`make_manifest(num_layers=6, **fields)`: the made-up run, with any of its fields replaced."""

    def make(num_layers: int = 6, **changes: Any) -> Manifest:
        return Manifest.model_validate({**manifest_fields(num_layers), **changes})

    return make


@pytest.fixture
def make_curves() -> Callable[[int], list[EnergyCurve]]:
    return curves_of
