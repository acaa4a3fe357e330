"""Task scores, by which users judge a model. Each task has one file, and one name in the union.

It is a record of the data, as read and checked. It has `kind`, the first word of its SPEC; `form`, the whole
SPEC; `read`, which makes it from a SPEC; `digest` and `max_length`, which are part of the run's key; `texts`,
which are searched for in the calibration set, sentence by sentence if they are running text; and `score`.
"""

from typing import Annotated

from pydantic import Field

from ffsplit.measurement.tasks.classification import Classification
from ffsplit.measurement.tasks.language_model import HarnessTasks, Perplexity
from ffsplit.measurement.tasks.sts import SentenceSimilarity

AnyTask = Annotated[
    SentenceSimilarity | Classification | Perplexity | HarnessTasks, Field(discriminator="kind")
]

__all__ = ["AnyTask", "Classification", "HarnessTasks", "Perplexity", "SentenceSimilarity"]
