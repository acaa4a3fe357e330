"""Checks that refuse an impossible job before anything is computed."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import takewhile
from typing import TYPE_CHECKING, Any

from ffsplit.calibration.mixture import Mixture
from ffsplit.calibration.model_inputs import TextReader, num_rows_within, ordinary_ids, tokenize_rows
from ffsplit.calibration.readers import Reader, make_reader
from ffsplit.calibration.sampling import CalibrationSettings, TextSample
from ffsplit.compressors import AnyCompressor, LowRankCompressor, PruneCompressor
from ffsplit.compressors.base import Compressor
from ffsplit.compute_profile import ComputeProfile
from ffsplit.config import JobConfig
from ffsplit.errors import ConfigError, explained
from ffsplit.ffn.shapes import LayerLayout, is_narrowed_form
from ffsplit.measurement.tasks.evaluations import share_known
from ffsplit.models.checkpoint import Checkpoint
from ffsplit.models.family import TEXT
from ffsplit.models.load import check_complete, check_model_class, load_tokenizer
from ffsplit.models.load_options import attention_advice
from ffsplit.recipes.recipe import Recipe
from ffsplit.runtime.assemble import is_plain, keeps_names

if TYPE_CHECKING:
    from ffsplit.run.job import Run


TRIAL_ROWS = 4
"""Rows of the calibration data on which FFNs that were found by structure are tried."""


def check_inputs(run: Run) -> None:
    """Check before a run what config and headers cannot show.

    Raises ConfigError if the model does not load completely or cannot read its rows, and
    UnsupportedModelError if its FFNs were guessed wrongly.
    """
    assert run.text is not None  # reading it is the check
    with explained("the job cannot be checked"), run.profile.loading():
        check_complete(run.checkpoint)
        if run.checkpoint.is_guessed:
            from ffsplit.runtime.trial import check_by_trial

            length = run.recipe.calibration.row_length
            reader = make_reader(run.checkpoint, max_length=length, batch_tokens=TRIAL_ROWS * length)
            rows = run.text.calibration[:TRIAL_ROWS] or made_up_rows(run.checkpoint, TRIAL_ROWS)
            (batch, *_) = reader.batches(reader.encode(rows))
            check_by_trial(run.checkpoint, batch.arguments, block_by_block=run.needs.block_by_block)


def check_rows(run: Run) -> None:
    """The quick part of `check_inputs`, for a dry run. Loads the tokenizer, but no modelling code.

    One exception: if the config names an attention kernel, only loading the model shows whether it is
    installed.
    """
    assert run.text is not None
    if attention_advice(run.checkpoint.config):
        with explained("the job cannot be checked"), run.profile.loading():
            check_complete(run.checkpoint)


def default_text(run: Run) -> str | None:
    """One line for a run that was given no text: which one it reads. None if it was given one."""
    if run.config.has("calibration"):
        return None
    (text,) = run.config.calibration
    return (
        f"no --calibration: the run reads {text}, general English that comes with Python and ffsplit; "
        "text like what the model will read gives a better result"
    )


def slow_on_a_gpu(run: Run) -> str | None:
    """One line on what low-rank parts cost on a GPU. None on a CPU, or if the recipe has none.

    Source: benchmarks/speed-notes.md.
    """
    if run.profile.device != "cuda" or not any(
        isinstance(step, LowRankCompressor) for step in run.recipe.steps
    ):
        return None
    return (
        f"recipe {run.recipe.name} on a GPU: its low-rank parts are slower than the original below about "
        "4,000 tokens per batch, and slower than narrower FFNs of the same size at any (docs/recipes.md)"
    )


LEAST_KNOWN = 0.9
"""Below this share of an evaluation's tokens in the calibration text, the two are called far apart.

Training and test splits of one data set have .94 to .97, two unlike data sets .86, documentation and
everyday sentences .63.
"""


def far_from_evaluation(run: Run) -> list[str]:
    """One warning per --eval whose text uses other words than the calibration text. Loads the tokenizer."""
    texts = {spec: task.texts for spec, task in run.tasks.items() if task.texts}
    if not texts or not run.checkpoint.reads_single_texts:
        return []
    with explained("the job cannot be checked"), run.profile.loading():
        tokenizer, length = load_tokenizer(run.checkpoint), run.recipe.calibration.row_length
        shares = {
            spec: share_known(rows, run.text.calibration, tokenizer=tokenizer, max_length=length)
            for spec, rows in texts.items()
        }
    return [
        f"warning: only {share:.0%} of the tokens of {spec} occur in the calibration text: the result is "
        "better on text like that of --calibration; give text like what the model will read"
        for spec, share in shares.items()
        if share < LEAST_KNOWN
    ]


def check_calibrates(config: JobConfig) -> None:
    """Raise ConfigError for options that only compress takes."""
    if config.stats is not None:
        raise ConfigError("--stats is for compress: calibrate collects its own statistics")
    if config.gate or config.require_speedup is not None:
        raise ConfigError("gates are for compress: calibrate has no model to measure")


def made_up_rows(checkpoint: Checkpoint, num_rows: int, *, num_words: int = 32) -> list[str]:
    """Rows of random tokens, for a trial before the model has written any text."""
    tokenizer, chosen = load_tokenizer(checkpoint), random.Random(0)
    ids = ordinary_ids(tokenizer)
    return [tokenizer.decode(chosen.choices(ids, k=num_words)) for _ in range(num_rows)]


def check_writes(mixture: Mixture, *, checkpoint: Checkpoint, config: JobConfig) -> bool:
    """Whether the model can write calibration text. Raises ConfigError if it cannot, and was asked to."""
    family = checkpoint.architecture.model_type
    if not checkpoint.reads_single_texts or checkpoint.compared_as != "next_tokens":
        reason = f"needs a causal language model with its head, and this {family} writes no text"
    elif config.block_by_block:
        reason = "needs the whole model in memory, and --block-by-block holds one block at a time"
    else:
        return True
    if mixture.is_named:
        raise ConfigError(f"--calibration self: {reason}: name a text, such as file.txt")
    return False


def check_row_length(max_length: int, *, checkpoint: Checkpoint) -> None:
    """Raise ConfigError when rows are longer than the model reads."""
    longest = checkpoint.max_positions
    if longest is not None and max_length > longest and checkpoint.reads == TEXT:
        raise ConfigError(f"--max-length {max_length} is more than the model's {longest} positions")


def check_capabilities(config: JobConfig, recipe: Recipe, checkpoint: Checkpoint) -> None:
    """Raise ConfigError for options that this model family does not support."""
    family = checkpoint.architecture.model_type
    if (recipe.healing is not None or recipe.after_healing is not None) and not checkpoint.can_heal:
        raise ConfigError(
            f"recipe {recipe.name}: healing and after_healing do not work for {family} yet: "
            "use a recipe without them, such as fast"
        )
    is_divided = config.healing_workers > 1 and ComputeProfile.resolve(config).device == "cuda"
    if is_divided and recipe.healing is not None and recipe.healing.mixed_precision == "fp16":
        raise ConfigError(
            f"recipe {recipe.name}: with --healing-workers {config.healing_workers} on GPUs, "
            "healing.mixed_precision may be auto, bf16 or no"
        )
    if recipe.expert_share:
        check_has_experts(checkpoint, recipe=recipe)
    if config.block_by_block and not checkpoint.can_stream:
        raise ConfigError(
            "--block-by-block needs a model with a single stack of blocks, each with an FFN of its own; "
            f"{family} has another form"
        )
    by_position = [ffn for ffn in checkpoint.ffns if ffn.paths.per_neuron]
    if by_position and not all(map(_only_drops, (*recipe.steps, *recipe.refits))):
        raise ConfigError(
            f"recipe {recipe.name}: {by_position[0].name} of this {family} has a convolution or a batch norm "
            "between its projections, so its neurons can only be dropped, not fitted: use norm-prune"
        )


def check_has_experts(checkpoint: Checkpoint, *, recipe: Recipe) -> None:
    """Raise ConfigError if a recipe that drops experts is given a model without any."""
    if all(ffn.expert is None for ffn in (*checkpoint.ffns, *checkpoint.left_out)):
        raise ConfigError(
            f"recipe {recipe.name} drops experts, and this {checkpoint.architecture.model_type} has none: "
            "use fast"
        )


def check_plain(checkpoint: Checkpoint, layouts: Sequence[LayerLayout], *, recipe: Recipe) -> None:
    """Raise ConfigError if a recipe heals or quantizes a result whose FFNs are not merely narrower."""
    if not keeps_names(checkpoint, layouts):
        raise ConfigError(
            f"recipe {recipe.name}: healing and after_healing need steps that leave one dense FFN "
            "per layer, without a bias that the architecture lacks: use prune or distill"
        )


def can_refit(checkpoint: Checkpoint, layouts: Sequence[LayerLayout]) -> bool:
    """Whether the compressed FFNs keep the original's tensor names and see the same tokens.

    Experts do not: the router may send them other tokens.
    """
    return keeps_names(checkpoint, layouts) and not checkpoint.has_experts


def closed_form(steps: Sequence[AnyCompressor]) -> tuple[PruneCompressor, ...]:
    """The steps that a recipe begins with, without descent: they change nothing but the down projection."""
    first = takewhile(lambda step: isinstance(step, PruneCompressor), steps)
    return tuple(step for step in first if isinstance(step, PruneCompressor))


def measures_widths(
    checkpoint: Checkpoint, layouts: Sequence[LayerLayout], steps: Sequence[AnyCompressor]
) -> bool:
    """Whether a search measures tables of widths: a language model whose FFNs one closed form narrows."""
    is_text = checkpoint.compared_as == "next_tokens" and checkpoint.reads_single_texts
    is_narrowed = len(closed_form(steps)) == 1 and is_narrowed_form(layouts, checkpoint.shapes)
    return is_text and is_narrowed and not checkpoint.has_experts


def check_splits(checkpoint: Checkpoint, layouts: Sequence[LayerLayout], *, recipe: Recipe) -> None:
    """Raise ConfigError if FFNs are to be split whose modules no split FFN can replace."""
    adapted = next((ffn for ffn in checkpoint.ffns if ffn.adapters), None)
    if adapted is not None and not all(map(_only_drops, (*recipe.steps, *recipe.refits))):
        raise ConfigError(
            f"recipe {recipe.name}: {adapted.name} of this {checkpoint.architecture.model_type} can only "
            "lose neurons, because adapters add to its up projection and a refit would ignore them: "
            "use norm-prune"
        )
    fixed = [ffn for ffn in checkpoint.ffns if not ffn.paths.can_split]
    if fixed and (recipe.after_healing is not None or not keeps_names(checkpoint, layouts)):
        raise ConfigError(
            f"recipe {recipe.name}: {fixed[0].name} of this {checkpoint.architecture.model_type} can only be "
            "made narrower, because the model's own code computes a step between its projections: "
            "use fast or norm-prune"
        )
    if not keeps_names(checkpoint, layouts):
        _check_left_out_experts(checkpoint, recipe=recipe)


def _check_left_out_experts(checkpoint: Checkpoint, *, recipe: Recipe) -> None:
    """Raise ConfigError if experts are to be split beside others of their block that are left out.

    Files may number both through, as ERNIE's do with those for text and those for pictures. Without the
    first, transformers would not find the others, and make them up.
    """
    blocks = {ffn.block for ffn in checkpoint.ffns if ffn.expert is not None}
    beside = [ffn for ffn in checkpoint.left_out if ffn.expert is not None and ffn.block in blocks]
    if beside:
        raise ConfigError(
            f"recipe {recipe.name}: {beside[0].name} of this {checkpoint.architecture.model_type} is left "
            "out, so the other experts of its block can only be made narrower: use fast or norm-prune"
        )


def _only_drops(step: Compressor) -> bool:
    return isinstance(step, PruneCompressor) and step.only_drops


def check_stays_plain(checkpoint: Checkpoint, layouts: Sequence[LayerLayout], *, recipe: Recipe) -> None:
    """Raise ConfigError when the result of --plain would not be an ordinary checkpoint."""
    if recipe.allocation == "search":
        reason = "its search may give FFNs different widths"
    elif recipe.heavy.by == "energy":
        reason = "its energy rule may give FFNs different widths"
    elif recipe.after_healing is not None:
        reason = "it ends with integer weights"
    elif not is_plain(checkpoint, layouts):
        reason = "its layers are not single dense FFNs of one width, or have a bias that the family lacks"
    else:
        return
    raise ConfigError(f"--plain: recipe {recipe.name} does not stay plain, {reason}: use fast or norm-prune")


CHECKED_ROWS = 256
"""Rows that are tokenized at a time, until one has a usable token."""


def readable(text: TextSample, *, settings: CalibrationSettings, checkpoint: Checkpoint) -> TextSample:
    """The part of a sample that a run reads: its first rows, up to the settings' token limits.

    Raises ConfigError if transformers does not know the model's class, its tokenizer is missing or does
    not match, or no row has a usable token.
    """
    check_model_class(checkpoint.class_name, where=checkpoint.directory)
    length = settings.row_length
    reader = make_reader(checkpoint, max_length=length, batch_tokens=length)
    with explained(f"{checkpoint.directory}: its tokenizer or processor cannot read the rows"):
        if not isinstance(reader, TextReader):
            _check_media(text.calibration, reader=reader)
            return text
        check_vocabulary(reader.tokenizer, checkpoint)
        if not text.calibration:  # the model writes every row
            return text
        _check_text(text.calibration, tokenizer=reader.tokenizer, max_length=length)
        return _within_tokens(text, settings=settings, tokenizer=reader.tokenizer)


def _within_tokens(text: TextSample, *, settings: CalibrationSettings, tokenizer: Any) -> TextSample:
    """The first rows of the sample, as many as `max_tokens` and `held_out_tokens` allow."""

    def count(rows: Sequence[str], most: int | None) -> int:
        if most is None or len(rows) * settings.row_length <= most:
            return len(rows)
        return num_rows_within(tokenizer, rows, max_length=settings.row_length, max_tokens=most)

    return text.first(
        count(text.calibration, settings.max_tokens),
        held_out=count(text.held_out, settings.held_out_tokens),
        validation=count(text.validation, settings.held_out_tokens),
    )


def _check_media(rows: Sequence[str], *, reader: Reader) -> None:
    """Raise ConfigError when the first rows hold nothing that the model reads."""
    if next(reader.batches(reader.encode(rows[:8])), None) is None:
        raise ConfigError("the calibration rows hold nothing that the model reads: give others")


def _check_text(rows: Sequence[str], *, tokenizer: Any, max_length: int) -> None:
    """Raise ConfigError when no row has a usable token."""
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
    """Raise ConfigError if the tokenizer is missing, or has tokens without an embedding in the model.

    If the vocabulary's file is missing, transformers makes up a tokenizer of special tokens alone.
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
            f"{checkpoint.directory}: the tokenizer does not belong to the model: its token {token!r} has id "
            f"{index}, and the model takes ids below {stated}"
        )
