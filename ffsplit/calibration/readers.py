"""Readers: they turn the rows of a run into batches for its model, one reader for each form of row.

A row is a string: a text, or a JSON list. The list holds a source and its target, or an encoded picture,
sound or list of frames and, if the model also reads one, a text.
"""

from __future__ import annotations

import base64
import io
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ffsplit.calibration.media import decode_sound
from ffsplit.calibration.model_inputs import Batch, DecoderInputs, PairReader, TextReader
from ffsplit.errors import ConfigError, explained
from ffsplit.models.checkpoint import Checkpoint
from ffsplit.models.load import forward_arguments, load_joint_processor, load_processor, load_tokenizer

Encoded = Any
MEDIA_BATCH_ROWS = 8


class Reader(Protocol):
    """Turns rows into batches; `encode` leaves out empty rows."""

    def encode(self, rows: Sequence[str]) -> list[Encoded]: ...

    def batches(self, encoded: Sequence[Encoded]) -> Iterator[Batch]: ...

    def num_tokens(self, encoded: Sequence[Encoded]) -> Mapping[str, int]:
        """Number of tokens without padding, by the name of their mask, where it is known."""
        ...


def make_reader(checkpoint: Checkpoint, *, max_length: int, batch_tokens: int) -> Reader:
    """The reader of a checkpoint's rows. Raises ConfigError when its tokenizer or processor is missing."""
    if checkpoint.reads_single_texts:
        return TextReader(checkpoint, max_length=max_length, batch_tokens=batch_tokens)
    if checkpoint.reads == ("text",):
        return PairReader(checkpoint, max_length=max_length, batch_tokens=batch_tokens)
    return MediaReader(checkpoint, max_length=max_length)


class _Row(NamedTuple):
    """A row as a MediaReader holds it: sounds decoded, pictures not yet; the target's token ids."""

    content: Any
    text: str
    target: list[int]


class MediaReader:
    """A picture, a sound or a video per row, and most often a text, through the model's own processor.

    Without a text, plain sound is cut to `max_length` tenths of a second and batched by length, so that
    there is no padding.
    """

    def __init__(self, checkpoint: Checkpoint, *, max_length: int) -> None:
        (self._medium,) = (each for each in checkpoint.reads if each != "text")
        self._arguments = forward_arguments(checkpoint)
        has_text, self._decoder = "text" in checkpoint.reads, None
        if checkpoint.makes == "target":
            self._decoder = DecoderInputs(checkpoint, load_tokenizer(checkpoint), max_length=max_length)
            has_text = has_text and "input_ids" in self._arguments
        self._prompts = Prompts(checkpoint, self._medium, max_length=max_length) if has_text else None
        if self._prompts is None or self._prompts.processor is None:
            self._processor = load_processor(checkpoint, "sound" if self._medium == "sound" else "image")
        self._rate = 0
        if self._medium == "sound":
            self._rate = int(self._sound_processor.sampling_rate)
        self._longest = max_length * self._rate // 10

    @property
    def _sound_processor(self) -> Any:
        if self._prompts is None or self._prompts.processor is None:
            return self._processor
        joint = self._prompts.processor
        return getattr(joint, "audio_processor", None) or joint.feature_extractor

    @property
    def _reads_medium_alone(self) -> bool:
        return self._prompts is None and self._decoder is None

    def encode(self, rows: Sequence[str]) -> list[_Row]:
        encoded = []
        for content, *texts in map(json.loads, rows):
            if self._medium == "sound":
                content = decode_sound(base64.b64decode(content), rate=self._rate)
                content = content[: self._longest] if self._reads_medium_alone else content
            text = texts[-1] if texts else ""
            encoded.append(_Row(content, text, [] if self._decoder is None else self._decoder.ids(text)))
        return encoded

    def batches(self, encoded: Sequence[_Row]) -> Iterator[Batch]:
        by_length: dict[int, list[_Row]] = {}
        for row in encoded:
            is_grouped = self._medium == "sound" and self._reads_medium_alone
            by_length.setdefault(len(row.content) if is_grouped else 0, []).append(row)
        for _, rows in sorted(by_length.items(), reverse=True):
            for start in range(0, len(rows), MEDIA_BATCH_ROWS):
                yield self.batch(rows[start : start + MEDIA_BATCH_ROWS])

    def num_tokens(self, encoded: Sequence[_Row]) -> dict[str, int]:
        if self._decoder is None:
            return {}
        return {"decoder_attention_mask": sum(len(row.target) for row in encoded)}

    def batch(self, rows: Sequence[_Row]) -> Batch:
        """One batch of all these rows, padded to the longest text."""
        contents = [self._decoded(row.content) for row in rows]
        targets = {} if self._decoder is None else self._decoder.arguments([row.target for row in rows])
        if self._prompts is None:
            found = self._of_medium(contents)
        elif self._prompts.processor is None:
            found = self._prompts.tokens([row.text for row in rows]) | self._of_medium(contents)
        else:
            found = self._prompts.joined([row.text for row in rows], contents, rate=self._rate)
        is_text = None if self._prompts is None else self._prompts.is_text(found)
        return Batch(self._accepted(targets | found), is_text)

    def _of_medium(self, contents: list[Any]) -> dict[str, Tensor]:
        options: dict[str, Any] = {"sampling_rate": self._rate} if self._medium == "sound" else {}
        found = self._processor(contents, return_tensors="pt", **options)
        return {name: value for name, value in found.items() if isinstance(value, Tensor)}

    def _accepted(self, found: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What the model's forward takes, token ids first: their first dimension is the rows."""
        order = sorted(found, key=lambda name: not name.endswith("input_ids"))
        return {
            name: found[name].float() if found[name].is_floating_point() else found[name]
            for name in order
            if not self._arguments or name in self._arguments
        }

    def _decoded(self, content: Any) -> Any:
        if self._medium == "video":
            return [_image(each) for each in content]
        return _image(content) if self._medium == "image" else content


class Prompts:
    """The texts beside pictures or sounds, as the model's joint processor wants them.

    With a chat template a row is a turn of the user, with the picture or sound and the text. Without one,
    the processor's own token marks the place of the picture or sound, unless the processor adds it.
    """

    def __init__(self, checkpoint: Checkpoint, medium: str, *, max_length: int) -> None:
        self.processor = load_joint_processor(checkpoint)
        self._tokenizer = getattr(self.processor, "tokenizer", None) or load_tokenizer(checkpoint)
        self._name = "audio" if medium == "sound" else medium
        self._has_mask = any(tower.mask for tower in checkpoint.towers)
        longest = checkpoint.max_positions
        self._max_length = max_length if longest is None else min(max_length, longest)
        self._padded_length = longest
        self._places = {*_places_in(checkpoint.config), *_places_in(vars(self.processor or self))}
        self._way: tuple[bool, str] | None = None

    def joined(self, texts: Sequence[str], contents: Sequence[Any], *, rate: int) -> dict[str, Tensor]:
        """The processor's tensors for texts and pictures or sounds, one of each per row."""
        if self._way is None:
            self._way = self._way_that_works(contents[0], rate=rate)
        found = self._processed(texts, contents, *self._way, rate=rate)
        return {name: value for name, value in found.items() if isinstance(value, Tensor)}

    def tokens(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """Token ids and their mask, of a model without a joint processor."""
        cut = [self._cut(each) for each in texts]
        found = self._tokenizer(cut, truncation=True, return_tensors="pt", **self._padding)
        return {
            name: found[name]
            for name in ("input_ids", "attention_mask")
            if self._has_mask or name != "attention_mask"
        }

    def is_text(self, found: Mapping[str, Tensor]) -> Tensor | None:
        """Which tokens are no places of pictures or sounds: [rows, length]."""
        ids = found.get("input_ids")
        return None if ids is None else ~torch.isin(ids, torch.tensor(sorted(self._places), dtype=ids.dtype))

    @property
    def _padding(self) -> dict[str, Any]:
        """To the longest row; to the full length if the model takes no mask."""
        if self._has_mask or self._padded_length is None:
            return {"padding": True}
        return {"padding": "max_length", "max_length": self._padded_length}

    def _processed(
        self, texts: Sequence[str], contents: Sequence[Any], nests: bool, mark: str, *, rate: int
    ) -> Mapping[str, Any]:
        """What the processor makes of texts that begin with a mark, and of pictures in lists of their own."""
        assert self.processor is not None
        media: dict[str, Any] = {"images": [[each] if nests else each for each in contents]}
        if self._name == "audio":
            media = {"audio": list(contents), "sampling_rate": rate}
        prompts = [self._prompt(each, mark) for each in texts]
        found: Mapping[str, Any] = self.processor(text=prompts, return_tensors="pt", **self._padding, **media)
        return found

    def _prompt(self, text: str, mark: str) -> str:
        assert self.processor is not None
        text = self._cut(text)
        if self.processor.chat_template is None:
            return f"{mark}{text}"
        parts = [{"type": self._name, self._name: ""}, {"type": "text", "text": text}]
        return str(self.processor.apply_chat_template([{"role": "user", "content": parts}], tokenize=False))

    def _way_that_works(self, content: Any, *, rate: int) -> tuple[bool, str]:
        """Whether each picture is in a list of its own, and which token marks its place in the text.

        The first way in which the processor takes two rows and marks the place, by the token or by itself.
        Raises the error of the last way if there is none.
        """
        token = str(getattr(self.processor, f"{self._name}_token", None) or "")
        ways = [(nests, mark) for mark in dict.fromkeys(("", token)) for nests in (True, False)]
        place = self._tokenizer.convert_tokens_to_ids(token) if token else None
        for way in ways:
            try:
                ids = self._processed(["a"] * 2, [content] * 2, *way, rate=rate)["input_ids"]
            except Exception:
                if way == ways[-1]:
                    raise
                continue
            if len(ids) == 2 and (place is None or bool((ids == place).any())):
                return way
        return ways[-1]

    def _cut(self, text: str) -> str:
        """The text's first tokens, as many as a row may have beside special ones."""
        room = max(1, self._max_length - self._tokenizer.num_special_tokens_to_add())
        ids = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        return text if len(ids) <= room else str(self._tokenizer.decode(ids[:room]))


_PLACE = re.compile(r"(image|audio|video|media)_(pad_)?token_(id|index)")


def _places_in(fields: Mapping[str, Any]) -> set[int]:
    """The ids of tokens that stand for a picture or sound, as configs and processors call them."""
    return {each for name, each in fields.items() if _PLACE.fullmatch(name) and isinstance(each, int)}


def _image(encoded: str) -> Any:
    """Decode a picture. Raises ConfigError when it is invalid, or Pillow is missing."""
    try:
        from PIL import Image
    except ImportError:
        raise ConfigError("pictures need Pillow: pip install 'ffsplit[image]'") from None
    with explained("a calibration picture cannot be decoded", advice="remove it"):
        return Image.open(io.BytesIO(base64.b64decode(encoded))).convert("RGB")
