"""What is read from a whole checkpoint's headers, and its digests."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoTokenizer

from ffsplit.models.checkpoint import open_checkpoint, tokenizer_files
from ffsplit.models.load import load_tokenizer, quiet_transformers
from ffsplit.models.tensor_files import INDEX_NAME
from tests.conftest import CheckpointFactory
from tests.tiny_models import CAUSAL, FAMILIES, MAX_POSITIONS, NUM_LAYERS


@pytest.fixture
def bert(checkpoint_of: CheckpointFactory, tmp_path: Path) -> Path:
    """A copy that a test may write to."""
    return Path(shutil.copytree(checkpoint_of("bert", head="ForSequenceClassification"), tmp_path / "bert"))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_longest_row_is_one_that_the_model_can_read(
    checkpoint_of: CheckpointFactory, family: str
) -> None:
    checkpoint = open_checkpoint(checkpoint_of(family))
    model = transformers.AutoModel.from_pretrained(checkpoint.directory)
    ids = torch.full((1, checkpoint.max_positions or 0), 7)
    with torch.no_grad():
        assert model(ids)[0].isfinite().all()
    assert checkpoint.max_positions == (MAX_POSITIONS - 2 if "roberta" in family else MAX_POSITIONS)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("with_head", [False, True])
def test_the_ffns_are_found_with_their_shapes(
    checkpoint_of: CheckpointFactory, family: str, with_head: bool
) -> None:
    head = "ForCausalLM" if family in CAUSAL else "ForSequenceClassification"
    checkpoint = open_checkpoint(checkpoint_of(family, head=head if with_head else ""))
    tensors = load_file(checkpoint.directory / "model.safetensors")
    assert len(checkpoint.ffns) == NUM_LAYERS
    assert checkpoint.class_name.endswith(head if with_head else "Model")
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == {
        name: info.shape for name, info in checkpoint.tensors.items()
    }
    assert sum(info.size_bytes for info in checkpoint.tensors.values()) == sum(
        tensor.nbytes for tensor in tensors.values()
    )
    for ffn, shape in zip(checkpoint.ffns, checkpoint.shapes, strict=True):
        assert shape.num_elements == sum(tensors[name].numel() for name in ffn.tensor_names)
        assert tensors[ffn.up.name].shape == (shape.num_neurons, shape.hidden_size)
        assert shape.gated == (family in ("llama", "mistral", "qwen2", "qwen3"))
        assert shape.up_bias == shape.down_bias == (family not in ("mistral", "qwen2", "qwen3"))


@pytest.mark.parametrize(("dtype", "itemsize"), [(torch.float32, 4), (torch.float16, 2), (torch.bfloat16, 2)])
def test_the_itemsize_is_of_the_ffns(
    checkpoint_of: CheckpointFactory, dtype: torch.dtype, itemsize: int
) -> None:
    assert open_checkpoint(checkpoint_of("bert", dtype=dtype)).itemsize == itemsize


def test_a_sharded_checkpoint_reads_as_a_single_one(checkpoint_of: CheckpointFactory) -> None:
    whole = open_checkpoint(checkpoint_of("llama"))
    sharded = open_checkpoint(checkpoint_of("llama", max_shard_size="30KB"))
    assert (sharded.directory / INDEX_NAME).is_file() and len(sharded.weight_files) > 3
    assert sharded.shapes == whole.shapes
    assert sharded.tensors.keys() == whole.tensors.keys()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_activation_is_the_one_transformers_would_use_where_the_config_is_silent(
    checkpoint_of: CheckpointFactory, tmp_path: Path, family: str
) -> None:
    """Configs written by hand leave out what is a class's default; Llama's is silu, OPT's is relu."""
    shutil.copytree(checkpoint_of(family), tmp_path, dirs_exist_ok=True)
    checkpoint = open_checkpoint(tmp_path)
    (tower,) = checkpoint.architecture.towers
    field = tower.activation_field
    config = {name: value for name, value in checkpoint.config.items() if name != field}
    (tmp_path / "config.json").write_text(json.dumps(config))
    expected = getattr(transformers.AutoConfig.from_pretrained(tmp_path), field)
    assert open_checkpoint(tmp_path).activation == expected


@pytest.mark.parametrize(
    ("card", "expected"),
    [
        ("---\nlanguage: en\nlicense: apache-2.0\n---\n# Model\n", "apache-2.0"),
        ('---\nlicense: "mit"\n---\n', "mit"),
        ("---\nlicense: cc-by-sa-4.0\ntags: [a]\n---\n", "cc-by-sa-4.0"),
        ("---\ntags: [a]\n---\nThe text.\nlicense: unlimited\n", None),
        ("# Model\nlicense: mit\n", None),
        ("", None),
        ("---\nlicense:\n- mit\n---\n", "mit"),
        ("---\r\nlicense: mit\r\n---\r\n", "mit"),
        ("---\nlicense:\ntags: [a]\n---\n", None),
        ("---\ndate: 2026-02-30\nlicense: mit\n---\n", "mit"),
        ("---\nlicense: [\n---\n", None),
    ],
)
def test_the_license_is_of_the_cards_front_matter(bert: Path, card: str, expected: str | None) -> None:
    (bert / "README.md").write_bytes(card.encode())
    assert open_checkpoint(bert).folder.license == expected


def test_without_a_card_no_license(checkpoint_of: CheckpointFactory) -> None:
    assert open_checkpoint(checkpoint_of("bert")).folder.license is None


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def test_the_model_digest_changes_with_any_byte_of_weights_or_config(bert: Path) -> None:
    seen = {open_checkpoint(bert).model_digest()}
    flip(bert / "model.safetensors", -1)
    seen.add(open_checkpoint(bert).model_digest())
    flip(bert / "model.safetensors", -5000)
    seen.add(open_checkpoint(bert).model_digest())
    (bert / "config.json").write_text((bert / "config.json").read_text() + " ")
    seen.add(open_checkpoint(bert).model_digest())
    assert len(seen) == 4 and all(len(digest) == 64 for digest in seen)


def test_the_tokenizer_digest_changes_with_the_tokenizer_alone(bert: Path) -> None:
    checkpoint = open_checkpoint(bert)
    before = checkpoint.tokenizer_digest()
    assert "tokenizer.json" in tokenizer_files(bert)
    flip(bert / "model.safetensors", -1)
    (bert / "README.md").write_text("A card.")
    assert open_checkpoint(bert).tokenizer_digest() == before
    (bert / "vocab.txt").write_text("word")
    with_vocabulary = open_checkpoint(bert).tokenizer_digest()
    (bert / "tokenizer.json").write_text((bert / "tokenizer.json").read_text() + "\n")
    assert len({before, with_vocabulary, open_checkpoint(bert).tokenizer_digest()}) == 3


def test_digests_do_not_depend_on_the_place_or_the_name(bert: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(bert, tmp_path / "copy"))
    first, second = open_checkpoint(bert), open_checkpoint(copy)
    assert first.model_digest() == second.model_digest()
    assert first.tokenizer_digest() == second.tokenizer_digest()


@pytest.mark.parametrize("family", ["bert", "llama", "opt"])
@pytest.mark.parametrize("named", ["PreTrainedTokenizerFast", "BertTokenizer", "GPT2TokenizerFast", None])
def test_the_tokenizer_is_the_one_that_transformers_finds(
    checkpoint_of: CheckpointFactory, tmp_path: Path, family: str, named: str | None
) -> None:
    directory = Path(shutil.copytree(checkpoint_of(family), tmp_path / "model"))
    path = directory / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tokenizer_class": named}))
    with quiet_transformers():
        expected = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    found = load_tokenizer(open_checkpoint(directory))
    assert type(found) is type(expected)
    assert found.backend_tokenizer.to_str() == expected.backend_tokenizer.to_str()
    assert found.special_tokens_map == expected.special_tokens_map
