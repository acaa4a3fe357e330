"""What cannot be done, refused before anything is computed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ffsplit.calibration.readers import Reader, TextReader, make_reader, num_rows_within, tokenize_rows
from ffsplit.calibration.sampling import CalibrationSettings, TextSample
from ffsplit.config import JobConfig
from ffsplit.errors import ConfigError, explained
from ffsplit.ffn.shapes import LayerLayout
from ffsplit.models.checkpoint import Checkpoint
from ffsplit.models.load import check_complete, check_model_class
from ffsplit.models.load_options import attention_advice
from ffsplit.models.rows import TEXT_KINDS
from ffsplit.recipes.recipe import Recipe
from ffsplit.runtime.assemble import is_plain, keeps_names

if TYPE_CHECKING:
    from ffsplit.run.job import Run


def check_inputs(run: Run) -> None:
    """What must hold before a run begins and takes more than config and headers to see.

    Raises ConfigError where the model does not load whole or cannot read its rows, UnsupportedModelError
    where FFNs were guessed wrongly.
    """
    assert run.text is not None  # reading it is the check
    with explained("the job cannot be checked"), run.profile.loading():
        check_complete(run.checkpoint)
        if run.checkpoint.is_guessed:
            from ffsplit.runtime.trial import check_by_trial

            check_by_trial(run.checkpoint, block_by_block=run.needs.block_by_block)


def check_rows(run: Run) -> None:
    """The part of it that a dry run has time for. Loads the tokenizer, and no modelling code.

    But attention that the config names may not be installed, which only loading the model shows.
    """
    assert run.text is not None
    if attention_advice(run.checkpoint.config):
        with explained("the job cannot be checked"), run.profile.loading():
            check_complete(run.checkpoint)


def check_calibrates(config: JobConfig) -> None:
    """Raise ConfigError for what is for compressed models alone."""
    if config.stats is not None:
        raise ConfigError("--stats is for compress: calibrate collects statistics of its own")
    if config.gate or config.require_speedup is not None:
        raise ConfigError("gates are for compress: statistics have nothing to judge")


def check_row_length(max_length: int, *, checkpoint: Checkpoint) -> None:
    """Raise ConfigError when rows are longer than the model reads."""
    longest = checkpoint.max_positions
    if longest is not None and max_length > longest and checkpoint.kind in TEXT_KINDS:
        raise ConfigError(f"--max-length {max_length} is more than the model's {longest} positions")


def check_capabilities(config: JobConfig, recipe: Recipe, checkpoint: Checkpoint) -> None:
    """Raise ConfigError for what is asked for and cannot be had with this family."""
    family = checkpoint.architecture.model_type
    if (
        recipe.healing is not None or recipe.after_healing is not None
    ) and not checkpoint.architecture.can_heal:
        raise ConfigError(
            f"recipe {recipe.name}: healing and after_healing do not work for {family} yet: "
            "take a recipe without, such as fast"
        )
    if config.block_by_block and not checkpoint.architecture.can_stream:
        raise ConfigError(f"--block-by-block is for models with one list of blocks; {family} is none")


def check_plain(checkpoint: Checkpoint, layouts: Sequence[LayerLayout], *, recipe: Recipe) -> None:
    """Raise ConfigError when a recipe would heal, or quantize afterwards, more than a narrower model."""
    if not keeps_names(checkpoint, layouts):
        raise ConfigError(
            f"recipe {recipe.name}: healing and after_healing need steps that leave one dense FFN "
            "a layer, without a bias that the architecture lacks: prune or distill"
        )


def can_refit(checkpoint: Checkpoint, layouts: Sequence[LayerLayout]) -> bool:
    """Whether the compressed FFNs are read as the original's are, and see the same tokens.

    Experts do not: which tokens are sent to them can change.
    """
    return keeps_names(checkpoint, layouts) and not checkpoint.has_experts


def check_stays_plain(checkpoint: Checkpoint, layouts: Sequence[LayerLayout], *, recipe: Recipe) -> None:
    """Raise ConfigError when the result of --plain would not be an ordinary checkpoint."""
    if recipe.allocation == "search":
        reason = "its search may give FFNs different widths"
    elif recipe.heavy.by == "energy":
        reason = "its rule by energy may give FFNs different widths"
    elif recipe.after_healing is not None:
        reason = "it ends with integer weights"
    elif not is_plain(checkpoint, layouts):
        reason = "it leaves more than one dense FFN of one width a layer, or a bias that the family lacks"
    else:
        return
    raise ConfigError(f"--plain: recipe {recipe.name} does not stay plain, {reason}: take fast or norm-prune")


CHECKED_ROWS = 256
"""Rows that are tokenized at once, until one holds a token to learn from."""


def readable(text: TextSample, *, settings: CalibrationSettings, checkpoint: Checkpoint) -> TextSample:
    """The part of a sample that a run reads: the first rows, as far as the settings' tokens allow.

    Raises ConfigError when transformers does not know the model's class, there is no tokenizer that
    belongs to it, or no row has a token to learn from.
    """
    check_model_class(checkpoint.class_name, where=checkpoint.directory)
    length = settings.row_length
    reader = make_reader(checkpoint, max_length=length, batch_tokens=length)
    with explained(f"{checkpoint.directory}: its tokenizer or processor cannot read the rows"):
        if not isinstance(reader, TextReader):
            _check_media(text.calibration, reader=reader)
            return text
        check_vocabulary(reader.tokenizer, checkpoint)
        _check_text(text.calibration, tokenizer=reader.tokenizer, max_length=length)
        return _within_tokens(text, settings=settings, tokenizer=reader.tokenizer)


def _within_tokens(text: TextSample, *, settings: CalibrationSettings, tokenizer: Any) -> TextSample:
    """The sample with no more rows than the settings' `max_tokens` and `held_out_tokens` have room for."""

    def count(rows: Sequence[str], most: int | None) -> int:
        if most is None or len(rows) * settings.row_length <= most:
            return len(rows)
        return num_rows_within(tokenizer, rows, max_length=settings.row_length, max_tokens=most)

    return text.first(
        count(text.calibration, settings.max_tokens),
        held_out=count(text.held_out, settings.held_out_tokens),
        judged=count(text.judged, settings.held_out_tokens),
    )


def _check_media(rows: Sequence[str], *, reader: Reader) -> None:
    """Raise ConfigError when the first rows hold nothing that the model reads."""
    if next(reader.batches(reader.encode(rows[:8])), None) is None:
        raise ConfigError("the calibration rows hold nothing that the model reads: give others")


def _check_text(rows: Sequence[str], *, tokenizer: Any, max_length: int) -> None:
    """Raise ConfigError when no row has a token to learn from."""
    num_special = tokenizer.num_special_tokens_to_add()
    if max_length <= num_special:
        raise ConfigError(
            f"--max-length {max_length} leaves no room beside {num_special} special tokens: "
            f"give {num_special + 1} or more"
        )
    for start in range(0, len(rows), CHECKED_ROWS):
        if tokenize_rows(tokenizer, rows[start : start + CHECKED_ROWS], max_length=max_length):
            return
    raise ConfigError(
        f"the calibration text is nothing but padding and special tokens at --max-length {max_length}: "
        "give other text or a larger --max-length"
    )


def check_vocabulary(tokenizer: Any, checkpoint: Checkpoint) -> None:
    """Raise ConfigError when the tokenizer gives tokens that the model has no embedding for, or none.

    transformers makes one up of special tokens alone where the vocabulary's file is missing.
    """
    stated, vocabulary = checkpoint.text_config.get("vocab_size"), tokenizer.get_vocab()
    if len(vocabulary.keys() - set(tokenizer.all_special_tokens)) <= 1:
        raise ConfigError(
            f"{checkpoint.directory} has no tokenizer: its vocabulary is missing; put its tokenizer.json "
            "beside the model"
        )
    token, index = max(vocabulary.items(), key=lambda pair: pair[1], default=("", -1))
    if isinstance(stated, int) and index >= stated:
        raise ConfigError(
            f"{checkpoint.directory}: the tokenizer does not belong to the model: it has token {token!r} as "
            f"number {index}, and the model reads numbers below {stated}"
        )
