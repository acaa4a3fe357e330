"""The commits that branches and tags of hub models name when a batch begins."""

from __future__ import annotations

from collections.abc import Callable

from ffsplit.errors import FFSplitError
from ffsplit.models.fetch import hub_commit
from ffsplit.zoo.zoo_file import Zoo


def at_commits(zoo: Zoo, say: Callable[[str], None]) -> tuple[Zoo, dict[int, str]]:
    """The zoo with each hub model's revision replaced by its commit, and the commits by index.

    Two models of one branch, and every attempt of a model, then read the same files. A model whose commit
    cannot be found keeps its revision: its own run reports the problem.
    """
    models, commits, known = [], dict[int, str](), dict[tuple[str, str | None], str | None]()
    for index, model in enumerate(zoo.models):
        asked = (model.job.model, model.job.revision)
        if asked not in known:
            known[asked] = None
            try:
                known[asked] = hub_commit(model.job.model, revision=model.job.revision)
            except FFSplitError as error:
                say(f"{model.name} | its revision could not be looked up: {error}")
        if (commit := known[asked]) is not None:
            commits[index] = commit
            model = model.model_copy(update={"job": model.job.model_copy(update={"revision": commit})})
        models.append(model)
    return zoo.model_copy(update={"models": tuple(models)}), commits
