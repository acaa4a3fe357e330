"""Compressors: each has one file, and one name in the union."""

from typing import Annotated

from pydantic import Field

from ffsplit.compressors.distill import DistillCompressor
from ffsplit.compressors.low_rank import LowRankCompressor
from ffsplit.compressors.prune import PruneCompressor
from ffsplit.compressors.quantize import QuantizeCompressor

AnyCompressor = Annotated[
    LowRankCompressor | PruneCompressor | DistillCompressor | QuantizeCompressor, Field(discriminator="kind")
]

__all__ = [
    "AnyCompressor",
    "DistillCompressor",
    "LowRankCompressor",
    "PruneCompressor",
    "QuantizeCompressor",
]
