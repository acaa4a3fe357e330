"""Task scores, by which users judge a model. Each task is one file and one name in the union."""

from typing import Annotated

from pydantic import Field

from ffsplit.measurement.tasks.classification import Classification
from ffsplit.measurement.tasks.language_model import HarnessTasks, Perplexity
from ffsplit.measurement.tasks.sts import SentenceSimilarity

AnyTask = Annotated[
    SentenceSimilarity | Classification | Perplexity | HarnessTasks, Field(discriminator="kind")
]

__all__ = ["AnyTask", "Classification", "HarnessTasks", "Perplexity", "SentenceSimilarity"]
