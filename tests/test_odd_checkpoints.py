"""Checkpoints as they lie about: what transformers reads of them is what is compressed, and nothing else.

Each is saved as transformers saves it and then changed, as other versions and other hands leave it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import ffsplit
from ffsplit.errors import ConfigError
from ffsplit.ffn.shapes import LayerLayout
from ffsplit.models.checkpoint import Checkpoint, open_checkpoint
from ffsplit.models.load import check_complete, load_base_model, load_whole_model, model_class
from ffsplit.models.streamed import StreamedModel
from ffsplit.models.tensor_files import INDEX_NAME, WEIGHTS_NAME
from ffsplit.runtime.assemble import assemble
from ffsplit.runtime.ffn_tensors import layer_tensors, load_ffn
from tests.small_jobs import SmallJob
from tests.test_families import split_exactly
from tests.tiny_families import make_model, outputs, save_checkpoint
from tests.tiny_rows import calibration

CPU = torch.device("cpu")
Tensors = dict[str, Tensor]


def configure(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def rewrite(folder: Path, change: Callable[[Tensors], Tensors]) -> None:
    tensors = change(load_file(folder / WEIGHTS_NAME))
    save_file(
        {n: t.clone().contiguous() for n, t in tensors.items()}, folder / WEIGHTS_NAME, {"format": "pt"}
    )


def renamed(*pairs: tuple[str, str]) -> Callable[[Tensors], Tensors]:
    def name_of(name: str) -> str:
        for old, new in pairs:
            name = name.replace(old, new)
        return name

    return lambda tensors: {name_of(name): tensor for name, tensor in tensors.items()}


def without(*parts: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {n: t for n, t in tensors.items() if not any(part in n for part in parts)}


def copied(old: str, new: str) -> Callable[[Tensors], Tensors]:
    """Other values of some tensors under other names, beside the true ones."""
    return lambda tensors: tensors | {n.replace(old, new, 1): 3 * t for n, t in tensors.items() if old in n}


def sharded(tensors: Tensors, folder: Path, index: str, *, stem: str) -> None:
    file = f"{stem}-00001-of-00001.safetensors"
    save_file(tensors, folder / file, {"format": "pt"})
    stated = {"metadata": {}, "weight_map": dict.fromkeys(tensors, file)}
    (folder / index).write_text(json.dumps(stated))


def stale(folder: Path) -> Tensors:
    return {name: tensor + 1 for name, tensor in load_file(folder / WEIGHTS_NAME).items()}


def saved(family: str, head: str, change: Callable[[Tensors], Tensors] | None = None, **config: Any) -> Any:
    def make(folder: Path) -> None:
        save_checkpoint(folder, family, head)
        configure(folder, **config)
        if change is not None:
            rewrite(folder, change)

    return make


def stale_shards(folder: Path) -> None:
    save_checkpoint(folder, "llama", "ForCausalLM")
    sharded(stale(folder), folder, INDEX_NAME, stem="model")


def stale_variant(folder: Path) -> None:
    save_checkpoint(folder, "llama", "ForCausalLM")
    save_file(stale(folder), folder / "model.fp16.safetensors", {"format": "pt"})


def named_file(folder: Path) -> None:
    save_checkpoint(folder, "llama", "ForCausalLM")
    (folder / WEIGHTS_NAME).rename(folder / "weights.safetensors")
    save_file(
        {n: t + 1 for n, t in load_file(folder / "weights.safetensors").items()},
        folder / WEIGHTS_NAME,
        {"format": "pt"},
    )
    configure(folder, transformers_weights="weights.safetensors")


def named_index(folder: Path) -> None:
    save_checkpoint(folder, "llama", "ForCausalLM")
    tensors = load_file(folder / WEIGHTS_NAME)
    save_file(stale(folder), folder / WEIGHTS_NAME, {"format": "pt"})
    sharded(tensors, folder, "consolidated.safetensors.index.json", stem="consolidated")
    configure(folder, transformers_weights="consolidated.safetensors.index.json")


def half_precision_t5(family: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        save_checkpoint(folder, family, "ForConditionalGeneration")
        model = load_whole_model(folder, "T5ForConditionalGeneration", dtype=torch.float16)
        model.save_pretrained(folder)
        kept = {t.dtype for n, t in load_file(folder / WEIGHTS_NAME).items() if n.endswith("wo.weight")}
        assert kept == {torch.float32}

    return make


def module_names(family: str, head: str) -> Callable[[Path], None]:
    """Tensors as the modules have them, experts in stacks: what `state_dict` gives."""

    def make(folder: Path) -> None:
        save_checkpoint(folder, family, head)
        tensors = dict(make_model(family, head).state_dict())
        rewrite(folder, lambda _: tensors)

    return make


LEGACY = (("LayerNorm.weight", "LayerNorm.gamma"), ("LayerNorm.bias", "LayerNorm.beta"))
LEGACY_IN_ONE = tuple((f"layer.1.output.{new}", f"layer.1.output.{old}") for new, old in LEGACY)
WEIGHT_NORM = (
    ("parametrizations.weight.original0", "weight_g"),
    ("parametrizations.weight.original1", "weight_v"),
)

ODD: dict[str, Callable[[Path], None]] = {
    "shards that are not read": stale_shards,
    "a variant that is not read": stale_variant,
    "a file that the config names": named_file,
    "an index that the config names": named_index,
    "gamma and beta": saved("bert", "ForMaskedLM", renamed(*LEGACY)),
    "gamma and beta in a base model": saved("bert", "", renamed(*LEGACY)),
    "gamma and beta in one layer": saved("bert", "ForMaskedLM", renamed(*LEGACY_IN_ONE)),
    "gamma and beta of an electra": saved("electra", "ForMaskedLM", renamed(*LEGACY)),
    "a head's class without the prefix": saved("bert", "ForSequenceClassification", renamed(("bert.", ""))),
    "a base class with prefix and head": saved("bert", "ForMaskedLM", architectures=["BertModel"]),
    "no class": saved("bert", "ForMaskedLM", architectures=None),
    "both prefixes": saved("bert", "ForMaskedLM", copied("bert.", "")),
    "a base model under its head's class": saved("mpnet", "", architectures=["MPNetForMaskedLM"]),
    "a base model without its pooler": saved("bert", "", without("pooler")),
    "blocks for multi-token prediction": saved("llama", "ForCausalLM", copied("model.layers", "mtp.layers")),
    "a teacher's blocks": saved("llama", "ForCausalLM", copied("model.layers", "teacher.model.layers")),
    "blocks that the config does not state": saved("llama", "ForCausalLM", copied("layers.1.", "layers.2.")),
    "only the extra block is ignored": saved("qwen3_moe", "ForCausalLM", copied("layers.1.", "layers.2.")),
    "tied weights stored": saved("gpt2", "LMHeadModel", copied("transformer.wte", "lm_head")),
    "buffers of older code": saved(
        "gpt2",
        "LMHeadModel",
        lambda t: t | {f"transformer.h.{i}.attn.bias": torch.ones(1, 1, 4, 4) for i in (0, 1)},
    ),
    "weight norm of older code": saved("wav2vec2", "ForCTC", renamed(*WEIGHT_NORM)),
    "no masked_spec_embed": saved("wav2vec2", "ForCTC", without("masked_spec_embed")),
    "float32 beside float16": half_precision_t5("t5"),
    "float32 beside float16, gated": half_precision_t5("t5-gated"),
    "an encoder's class for two towers": saved(
        "t5", "ForConditionalGeneration", architectures=["T5EncoderModel"]
    ),
    "an encoder's class for two towers, of sound": saved(
        "whisper", "ForAudioClassification", copied("encoder.layers", "decoder.layers")
    ),
    "sinusoidal positions": saved("marian", "MTModel"),
    "sinusoidal positions of a base model": saved("marian", ""),
    "names of new code: vit": module_names("vit", "ForImageClassification"),
    "names of new code: mixtral": module_names("mixtral", "ForCausalLM"),
    "names of new code: qwen2_moe": module_names("qwen2_moe", "ForCausalLM"),
    "names of new code: gemma3": module_names("gemma3", "ForConditionalGeneration"),
    "a doubled model": saved(
        "gemma3",
        "ForConditionalGeneration",
        renamed(("language_model.model.", "model.language_model.model.")),
    ),
}


@pytest.fixture(params=ODD)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    ODD[request.param](tmp_path / "model")
    return tmp_path / "model"


def keep_all(checkpoint: Checkpoint, directory: Path) -> None:
    """An artifact with every neuron of every FFN."""
    files, layouts = [], [LayerLayout.dense(shape) for shape in checkpoint.shapes]
    for ffn in checkpoint.ffns:
        weights = load_ffn(checkpoint, ffn.index, activation=torch.relu, device=CPU)
        files.append(directory.with_name(f"ffn-{ffn.index}.safetensors"))
        save_file(layer_tensors(checkpoint, ffn.index, weights, plain=True), files[-1])
    assemble(checkpoint, files, layouts, directory)


def stored(folder: Path) -> Tensors:
    return {n: t for path in sorted(folder.glob("*.safetensors")) for n, t in load_file(path).items()}


def test_keeping_everything_keeps_the_model_to_the_bit(folder: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(folder)
    check_complete(checkpoint)
    keep_all(checkpoint, tmp_path / "same")
    torch.manual_seed(0)  # for what transformers makes up
    expected = outputs(load_whole_model(folder, checkpoint.class_name))
    torch.manual_seed(0)
    found = outputs(load_whole_model(tmp_path / "same", checkpoint.class_name))
    assert torch.equal(found, expected)
    after = load_file(tmp_path / "same" / WEIGHTS_NAME)
    assert after.keys() >= checkpoint.tensors.keys() - checkpoint.ffn_names
    dtypes = {n: info.dtype for n, info in open_checkpoint(tmp_path / "same").tensors.items()}
    assert all(dtypes[name] == info.dtype for name, info in checkpoint.tensors.items() if name in dtypes)


def test_what_is_split_is_what_runs(folder: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(folder)
    split_exactly(checkpoint, tmp_path / "split")
    torch.manual_seed(0)
    expected = outputs(load_whole_model(folder, checkpoint.class_name))
    torch.manual_seed(0)
    model = load_whole_model(tmp_path / "split", checkpoint.class_name)
    assert [type(each).__name__ for each in model.modules()].count("SplitFFN") == len(checkpoint.ffns)
    tolerance = 2e-2 if "F16" in {info.dtype for info in checkpoint.tensors.values()} else 1e-5
    assert (outputs(model) - expected).abs().max() <= tolerance


def test_whoever_reads_it_reads_the_same(folder: Path) -> None:
    """Whole, without its head, and a block at a time."""
    checkpoint = open_checkpoint(folder)
    whole = load_whole_model(folder, checkpoint.class_name, dtype=torch.float32)
    base = load_base_model(checkpoint, device=CPU, dtype=torch.float32)
    models = [base]
    if checkpoint.can_stream:
        streamed = StreamedModel(checkpoint, device=CPU, dtype=torch.float32)
        streamed.start([])
        for index in range(len(streamed.blocks)):
            with streamed.block(index) as block:
                values = block.state_dict()
                expected = base.get_submodule(streamed.block_paths[index]).state_dict()
                assert all(torch.equal(values[name], expected[name]) for name in expected)
        models.append(streamed.model)
    inside = getattr(whole, whole.base_model_prefix, whole).state_dict()
    for model in models:
        for name, value in model.state_dict().items():
            is_made_up = "pooler" in name or "masked_spec_embed" in name
            assert is_made_up or value.is_meta or torch.equal(value, inside[name]), name


RUNS: dict[str, dict[str, Any]] = {
    "shards that are not read": {},
    "a file that the config names": {},
    "gamma and beta": {},
    "gamma and beta in a base model": {"block_by_block": True},
    "a base model under its head's class": {"block_by_block": True},
    "blocks for multi-token prediction": {"block_by_block": True},
    "blocks that the config does not state": {},
    "no masked_spec_embed": {},
    "weight norm of older code": {},
    "float32 beside float16": {},
    "an encoder's class for two towers": {},
    "sinusoidal positions": {},
}


@pytest.mark.matrix()
@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("keep", [1.0, 0.5])
def test_a_run_keeps_what_it_should(tmp_path: Path, name: str, keep: float) -> None:
    """From the original to a published artifact, loaded as transformers loads it."""
    ODD[name](tmp_path / "model")
    checkpoint = open_checkpoint(tmp_path / "model")
    job = SmallJob(tmp_path, checkpoint.directory)
    recipe = job.recipe(step="{kind: prune}")
    rows = (calibration(checkpoint, tmp_path),)
    options: dict[str, Any] = RUNS[name] | {"keep": keep, "samples": 12, "calibration": rows}
    manifest = ffsplit.compress(job.config(tmp_path / "out", recipe=recipe, **options))
    assert manifest.plain
    (artifact,) = (path.parent for path in (tmp_path / "out").glob("*/*/config.json"))
    made = []
    for directory in (checkpoint.directory, artifact):
        torch.manual_seed(0)
        model = model_class(checkpoint.class_name, where=directory)
        made.append(outputs(model.from_pretrained(directory).eval()))
    assert torch.equal(*made) == (keep == 1.0) and made[1].isfinite().all()
    after = stored(artifact)
    before = {name: info.shape for name, info in checkpoint.tensors.items()}
    assert {name for name in before if tuple(after[name].shape) != before[name]} <= checkpoint.ffn_names
    assert after.keys() == before.keys()


def refused(folder: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        check_complete(open_checkpoint(folder))
    message = str(caught.value)
    assert "\n" not in message and str(folder) in message
    return message


@pytest.mark.parametrize(
    ("family", "head", "parts", "missing"),
    [
        ("bert", "ForSequenceClassification", ("classifier",), "classifier.bias"),
        ("bert", "ForSequenceClassification", ("classifier.weight",), "classifier.weight"),
        ("bert", "ForSequenceClassification", ("pooler.dense.weight",), "bert.pooler.dense.weight"),
        (
            "bert",
            "ForMaskedLM",
            ("predictions.transform.dense.bias",),
            "cls.predictions.transform.dense.bias",
        ),
        (
            "bert",
            "ForMaskedLM",
            ("layer.1.output.LayerNorm.bias",),
            "bert.encoder.layer.1.output.LayerNorm.bias",
        ),
        ("llama", "ForCausalLM", ("lm_head",), "lm_head.weight"),
        ("llama", "ForSequenceClassification", ("score",), "score.weight"),
        ("t5", "ForConditionalGeneration", ("shared",), "decoder.embed_tokens.weight"),
        ("marian", "MTModel", ("shared",), "lm_head.weight"),
        ("wav2vec2", "ForCTC", ("lm_head.bias",), "lm_head.bias"),
        ("wav2vec2", "ForCTC", ("parametrizations.weight.original0",), "weight.original0"),
    ],
)
def test_what_the_class_of_the_config_would_make_up_is_asked_for(
    tmp_path: Path, family: str, head: str, parts: tuple[str, ...], missing: str
) -> None:
    saved(family, head, without(*parts))(tmp_path)
    assert f"holds no tensor for {missing}" in refused(tmp_path).replace(
        "wav2vec2.encoder.pos_conv_embed.conv.parametrizations.", ""
    )


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (
            saved("bart", "ForConditionalGeneration", architectures=["BartForCausalLM"]),
            "holds no tensor for lm_head.weight",
        ),
        (
            saved("clip", "", architectures=["CLIPTextModel"]),
            "transformers reads it as encoder.layers.0.layer_norm1.bias, not as text_model.encoder.layers.0",
        ),
        (
            saved("llama", "ForCausalLM", renamed(("model.layers", "module.model.layers"))),
            "holds no tensor for model.layers.0.input_layernorm.weight",
        ),
        (
            saved("bert", "", lambda tensors: {n: t.to(torch.float8_e4m3fn) for n, t in tensors.items()}),
            "is F8_E4M3, which needs scales to be read",
        ),
    ],
    ids=["a tied table", "a tower", "another prefix", "float8"],
)
def test_what_transformers_reads_otherwise_is_refused(
    tmp_path: Path, make: Callable[[Path], None], complaint: str
) -> None:
    make(tmp_path)
    assert complaint in refused(tmp_path)
