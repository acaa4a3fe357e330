"""A recipe: how a model is calibrated, split, compressed and measured. Read from YAML."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import yaml
from pydantic import Field, PositiveInt, ValidationError, model_validator

from ffsplit.calibration.sampling import CalibrationSettings
from ffsplit.compressors import AnyCompressor, DistillCompressor, QuantizeCompressor
from ffsplit.config import Record, describe_validation_error
from ffsplit.directories import user_path
from ffsplit.errors import ConfigError, did_you_mean, explained, reason_of
from ffsplit.ffn.shapes import FFNShape, LayerLayout
from ffsplit.healing.settings import HealingSettings
from ffsplit.recipes import shipped_recipes
from ffsplit.splitting.layer import HeavyRule
from ffsplit.splitting.scores import ScoreName


class MeasurementSettings(Record):
    """What is timed: forward passes of (rows, tokens per row), original and compressed in turn."""

    latency_shapes: tuple[tuple[PositiveInt, PositiveInt], ...] = Field(
        default=((1, 128), (8, 128)), min_length=1
    )
    latency_pairs: int = Field(default=20, ge=1)
    peak_memory: bool = Field(default=True, description="load each model again, in its own process")

    def timing(self, shapes: Sequence[tuple[int, int]]) -> MeasurementSettings:
        """These settings, with these shapes timed too."""
        timed = tuple(dict.fromkeys([*self.latency_shapes, *shapes]))
        return self.model_copy(update={"latency_shapes": timed})


class Recipe(Record):
    """Heavy hitters, chosen by `score`, are kept as they are; `steps` shrink the rest, in order.

    Exactly one of the `heavy_` fields says how many there are; if the budget has no room for them, there are
    fewer. The result of the steps may be refitted, healed end to end, and then quantized. All three need a
    plain result; otherwise refits are skipped.
    """

    name: str
    description: str
    source: str | None = Field(default=None, description="the paper's address")
    keep: float = Field(default=0.3535, gt=0, le=1, description="used if --keep is not given")
    width_multiple: int | None = Field(
        default=None,
        ge=1,
        description="of widths and ranks; None: the largest of 64, 32, 16 and 8 that costs little",
    )
    score: ScoreName = "rms"
    heavy_share: float | None = Field(default=None, ge=0, le=1, description="of the budget")
    heavy_fraction: float | None = Field(default=None, ge=0, le=1, description="of the neurons")
    heavy_energy: float | None = Field(
        default=None, ge=0, le=1, description="of a layer's output energy, held by the fewest neurons"
    )
    expert_share: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="of the saving, made by dropping whole experts; narrower experts save the rest",
    )
    steps: tuple[AnyCompressor, ...] = Field(min_length=1)
    refits: tuple[DistillCompressor, ...] = Field(
        default=(), description="fits of all layers to the inputs that the compressed model gives them"
    )
    healing: HealingSettings | None = None
    after_healing: QuantizeCompressor | None = None
    linears: Literal["kept", "int8"] = Field(
        default="kept", description="the linear layers of attention; int8 goes with after_healing"
    )
    allocation: Literal["uniform", "search", "auto"] = Field(
        default="uniform",
        description="of the budget over the layers; search also tries widths that single layers' errors "
        "suggest, and takes them only if they beat uniform ones end to end; auto searches for classifiers "
        "and causal language models",
    )
    calibration: CalibrationSettings = CalibrationSettings()
    measurement: MeasurementSettings = MeasurementSettings()

    @model_validator(mode="after")
    def _has_one_rule(self) -> Recipe:
        if len(self._rules()) != 1:
            given = " and ".join(f"heavy_{rule.by}" for rule in self._rules()) or "none"
            raise ValueError(
                f"exactly one of heavy_share, heavy_fraction and heavy_energy is needed, {given} is given"
            )
        return self

    @model_validator(mode="after")
    def _drops_experts_before_statistics(self) -> Recipe:
        if self.expert_share and (self.heavy_energy is not None or self.allocation != "uniform"):
            raise ValueError("expert_share needs heavy_share or heavy_fraction, and allocation: uniform")
        return self

    @model_validator(mode="after")
    def _quantizes_last(self) -> Recipe:
        kinds = [step.kind for step in self.steps]
        after = kinds[kinds.index("quantize") :] if "quantize" in kinds else []
        if later := [kind for kind in after if kind != "quantize"]:
            raise ValueError(f"steps: {later[0]} works on floating point, so quantize must come after it")
        return self

    @model_validator(mode="after")
    def _quantizes_ffns_first(self) -> Recipe:
        if self.linears != "kept" and self.after_healing is None:
            raise ValueError("linears: int8 needs after_healing, which quantizes the FFNs")
        return self

    @property
    def healed_for(self) -> QuantizeCompressor | None:
        """The integers that healing rounds to. GPTQ chooses its own, so it starts from unrounded weights."""
        last = self.after_healing
        return None if last is None or last.method == "gptq" else last

    def samples_again(self, layouts: Sequence[LayerLayout], shapes: Sequence[FFNShape]) -> bool:
        """Whether `after_healing` uses inputs, and the FFNs have others by then than in the original.

        `layouts` are those before it.
        """
        is_original = self.healing is None and all(map(LayerLayout.is_whole, layouts, shapes))
        return self.after_healing is not None and self.after_healing.method == "gptq" and not is_original

    def _rules(self) -> list[HeavyRule]:
        rules: list[HeavyRule] = []
        if self.heavy_share is not None:
            rules.append(HeavyRule(by="share", value=self.heavy_share))
        if self.heavy_fraction is not None:
            rules.append(HeavyRule(by="fraction", value=self.heavy_fraction))
        if self.heavy_energy is not None:
            rules.append(HeavyRule(by="energy", value=self.heavy_energy))
        return rules

    def timing(self, shapes: Sequence[tuple[int, int]]) -> Recipe:
        """This recipe, with these shapes timed too."""
        return self.model_copy(update={"measurement": self.measurement.timing(shapes)})

    def reading(self, *, samples: int | None, max_length: int | None) -> Recipe:
        """This recipe, with the given numbers of calibration rows and tokens per row."""
        calibration = self.calibration.reading(samples=samples, max_length=max_length)
        return self.model_copy(update={"calibration": calibration})

    def in_multiples_of(self, width_multiple: int | None) -> Recipe:
        """This recipe, with the given multiple of widths and ranks; None: its own."""
        return self if width_multiple is None else self.model_copy(update={"width_multiple": width_multiple})

    def settled(self, *, windows: bool, max_positions: int | None, on_gpu: bool = False) -> Recipe:
        """This recipe, with calibration defaults for rows that are windows of running text, or not.

        `max_positions` None: no limit.
        """
        calibration = self.calibration.settled(windows=windows, max_positions=max_positions, on_gpu=on_gpu)
        return self.model_copy(update={"calibration": calibration})

    def searching(self, search: bool) -> Recipe:
        """This recipe, with `auto` decided."""
        if self.allocation != "auto":
            return self
        return self.model_copy(update={"allocation": "search" if search else "uniform"})

    def training(self, *, in_bfloat16: bool, on_gpu: bool, windows: bool) -> Recipe:
        """This recipe, with the precision of its fits and the steps of its healing decided for all hosts.

        `windows`: rows are windows of running text, which healing reads in steps that fill a GPU.
        """
        steps = tuple(
            step.settled(in_bfloat16=in_bfloat16) if isinstance(step, DistillCompressor) else step
            for step in self.steps
        )
        refits = tuple(step.settled(in_bfloat16=in_bfloat16) for step in self.refits)
        healing = self.healing and self.healing.settled(
            large_steps=on_gpu and windows, in_bfloat16=on_gpu and in_bfloat16
        )
        return self.model_copy(update={"steps": steps, "refits": refits, "healing": healing})

    @property
    def fits_in_bfloat16(self) -> bool:
        """Whether some fit multiplies in bfloat16."""
        fits = [step for step in (*self.steps, *self.refits) if isinstance(step, DistillCompressor)]
        return any(step.mixed_precision == "bfloat16" for step in fits)

    @property
    def heavy(self) -> HeavyRule:
        """How many of a layer's neurons are heavy hitters."""
        return self._rules()[0]


def load_recipe(name: str) -> Recipe:
    """A shipped recipe by its name, or one from a YAML file.

    Raises ConfigError in one line that names the invalid field and suggests the closest valid one.
    """
    shipped = shipped_recipes()
    if name in shipped:
        return parse_recipe(shipped[name], where=f"recipe {name}")
    path = user_path(name)
    if path.suffix not in (".yaml", ".yml"):
        near = did_you_mean(name, list(shipped))
        raise ConfigError(
            f"unknown recipe {name!r}{near} (shipped: {', '.join(shipped)}; or give a .yaml file)"
        )
    if not path.is_file():
        raise ConfigError(f"recipe file {name} does not exist")
    try:
        with explained(f"recipe file {name} cannot be read"):
            text = path.read_bytes()
        return parse_recipe(text.decode("utf-8"), where=name)
    except UnicodeDecodeError:
        raise ConfigError(f"recipe file {name} is not UTF-8 text") from None


def parse_recipe(text: str, *, where: str) -> Recipe:
    try:
        fields = yaml.safe_load(text)
    except Exception as error:  # the parser's errors, and those of values: a 30th of February
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark is not None else ""
        problem = getattr(error, "problem", None) or reason_of(error)
        raise ConfigError(f"{where}{line} is not YAML: {problem}") from error
    if not isinstance(fields, dict):
        raise ConfigError(f"{where} must be a YAML mapping with the fields {', '.join(Recipe.model_fields)}")
    try:
        return Recipe.model_validate(fields)
    except ValidationError as error:
        raise ConfigError(f"{where}: {_describe(error)}") from None


def recipe_of(fields: dict[str, Any], *, where: str) -> Recipe:
    """The recipe that a manifest records. Raises ConfigError when this version cannot read it."""
    try:
        return Recipe.model_validate(fields)
    except ValidationError as error:
        raise ConfigError(f"{where}: its recipe: {_describe(error)}: give --recipe") from None


def _describe(error: ValidationError) -> str:
    unknown = [each for each in error.errors() if each["type"] == "extra_forbidden"]
    if not unknown:
        return describe_validation_error(error)
    first = unknown[0]
    name = str(first["loc"][-1])
    path = ".".join(str(part) for part in first["loc"])
    return f"unknown field {path}{did_you_mean(name, _all_fields())}"


def _all_fields() -> list[str]:
    records: list[Any] = [Recipe, CalibrationSettings, MeasurementSettings, HealingSettings]
    records += AnyCompressor.__origin__.__args__  # type: ignore[attr-defined]
    return sorted({field for record in records for field in record.model_fields})
