"""Compressors: one file each, and one name in the union."""

from typing import Annotated

from pydantic import Field

from ffsplit.compressors.low_rank import LowRankCompressor
from ffsplit.compressors.prune import PruneCompressor

AnyCompressor = Annotated[LowRankCompressor | PruneCompressor, Field(discriminator="kind")]

__all__ = ["AnyCompressor", "LowRankCompressor", "PruneCompressor"]
