"""Captions to embeddings: the last hidden state of Qwen2.5-VL behind the model's prompt template, one file a caption.

Shapes: L tokens kept of one caption, D the encoder's hidden size (3584 in the 7B model).
"""

from __future__ import annotations

import hashlib
import sys
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from qwen_image.cache import names
from qwen_image.cache.fingerprint import TEXT_ENCODER_VERSION
from qwen_image.cache.manifest import TEXT_COLUMNS
from qwen_image.cache.stage import Encoded, Entry, Stopwatch
from qwen_image.container import Header
from qwen_image.dataset.config import DatasetSettings
from qwen_image.dataset.items import Item, Reject, read_captions
from qwen_image.models.checkpoint import open_checkpoint

if TYPE_CHECKING:
    import torch
    from transformers import Qwen2Tokenizer

    from qwen_image.models.prompt_prefix import PrefixEncoder

# the text-to-image template of the public Qwen-Image model, before and after the caption
TEMPLATE_PREFIX = (
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, spatial "
    "relationships of the objects and background:<|im_end|>\n<|im_start|>user\n"
)
TEMPLATE_SUFFIX = "<|im_end|>\n<|im_start|>assistant\n"
MAX_TOKENS = 1024  # kept of one caption, the closing template tokens included
BATCH_TOKENS = 2048
"""Most tokens that are encoded together: on a CPU nothing is gained beyond 500, and memory stays bounded."""
TOKENIZED_TOGETHER = 1_000_000
"""Characters handed to the tokenizer at once: enough for all its threads; it takes up to 60 bytes for each."""
HEADER_BYTES = 1500
"""A cache file's header with the fingerprint and its parts, without the caption."""


class TextEncoderStage:
    """The text-encoder output cache of the original (text-to-image) model."""

    title = "cache text-encoder outputs"
    suffix = names.TEXT_SUFFIX
    columns = TEXT_COLUMNS

    def __init__(
        self,
        *,
        text_encoder: str,
        tokenizer: str | None,
        model_identity: str,
        fp8: bool,
        device: str,
        batch_size: int,
        deterministic: bool,
    ) -> None:
        """`text_encoder` is a checkpoint path; `model_identity` the hash of its content and of the tokenizer's."""
        self._text_encoder = text_encoder
        self._tokenizer_path = tokenizer
        self._model_identity = model_identity
        self._fp8 = fp8
        self._device = device
        self._batch_size = 1 if deterministic else batch_size
        self._deterministic = self._batch_size == 1
        self._tokens: dict[str, array[int]] = {}
        self.watch = Stopwatch()

    def plan(self, item: Item, settings: DatasetSettings) -> list[Entry]:
        """Read the captions and name what each embedding is made from."""
        folder = Path(settings.cache_directory)
        return [
            self._entry(item, folder / names.text_file_name(item.stem, number), caption)
            for number, caption in enumerate(read_captions(item, settings), start=1)
        ]

    def output_bytes(self, entries: list[Entry]) -> list[int]:
        """Return the files' sizes: two bytes a value, and the caption again in the header. Tokenizes the captions."""
        self._tokenize(entries)
        kept = [len(self._tokens[entry.payload]) - len(self._prefix) for entry in entries]
        return [
            HEADER_BYTES + len(entry.payload.encode()) + tokens * self._width * 2
            for entry, tokens in zip(entries, kept, strict=True)
        ]

    def encode(self, entries: list[Entry]) -> Iterator[Encoded | Reject]:
        """Encode each different caption once, in batches of similar length; yield one result an entry."""
        self._tokenize(entries)
        by_caption: dict[str, list[Entry]] = {}
        for entry in entries:
            by_caption.setdefault(entry.payload, []).append(entry)
        tokens = {caption: self._tokens[caption] for caption in by_caption}
        encoder = self._load_encoder()
        with tqdm(total=len(entries), unit="caption", desc=self.title, ncols=100) as bar:
            for batch in batches(tokens, self._batch_size):
                with self.watch:
                    embeddings = encoder.encode([tokens[caption] for caption in batch])
                for caption, embedding in zip(batch, embeddings, strict=True):
                    yield from self._results(by_caption[caption], embedding)
                    bar.update(len(by_caption[caption]))

    def describe(self, header: Header) -> dict[str, object]:
        """Read the number of tokens and the stored dtype off the file."""
        (tensor,) = header.tensors.values()
        return {"tokens": tensor.shape[0], "dtype": tensor.torch_dtype}

    def misfit(self, entry: Entry, header: Header) -> str | None:
        """Return why another program's file is no embedding of this caption by an encoder of this width."""
        if len(header.tensors) != 1:
            return f"it holds {len(header.tensors)} tensors, not one"
        ((name, info),) = header.tensors.items()
        width = self._width
        if name != names.text_tensor_name(info.torch_dtype) or len(info.shape) != 2 or info.shape[1] != width:
            return f"it holds {name} {info.shape}; this text encoder gives (tokens, {width})"
        differing = [key for key, value in entry.metadata.items() if header.metadata.get(key) != value]
        return f"its metadata says otherwise: {', '.join(differing)}" if differing else None

    def _entry(self, item: Item, path: Path, caption: str) -> Entry:
        try:
            caption_sha256 = hashlib.sha256(caption.encode("utf-8")).hexdigest()
        except UnicodeEncodeError as error:
            raise ValueError(f"the caption holds half a character pair ({error.reason})") from error
        parts = {
            "kind": "text_encoder_outputs",
            "architecture": names.ARCHITECTURE_TAG,
            "caption": caption_sha256,
            "encoder": TEXT_ENCODER_VERSION,
            "max_tokens": str(MAX_TOKENS),
            "model": self._model_identity,
            "weights": "float8_e4m3fn" if self._fp8 else "bfloat16",
        }
        metadata = {
            "architecture": names.ARCHITECTURE, "format_version": names.FORMAT_VERSION, "caption1": caption,
        }  # fmt: skip
        return Entry(item, path, parts, {"caption_sha256": caption_sha256}, metadata, caption)

    @cached_property
    def _width(self) -> int:
        """D, told from the checkpoint's header."""
        checkpoint = open_checkpoint(self._text_encoder, "text_encoder")
        official = checkpoint.official_names()
        return next(info.shape[1] for _, name, info in checkpoint.tensors() if official[name] == "embed_tokens.weight")

    @cached_property
    def _tokenizer(self) -> Qwen2Tokenizer:
        from qwen_image.models.tokenizer import load_tokenizer

        return load_tokenizer(self._text_encoder, self._tokenizer_path)

    @cached_property
    def _prefix(self) -> list[int]:
        """The template's ids before a caption; they are dropped from its embedding."""
        return self._tokenizer(TEMPLATE_PREFIX).input_ids

    def _tokenize(self, entries: list[Entry]) -> None:
        captions = list(dict.fromkeys(entry.payload for entry in entries if entry.payload not in self._tokens))
        self._tokens |= zip(captions, tokenize(self._tokenizer, captions), strict=True)

    def _load_encoder(self) -> PrefixEncoder:
        import torch

        from qwen_image.device import describe_device, pick_device, use_deterministic_algorithms
        from qwen_image.models.prompt_prefix import PrefixEncoder
        from qwen_image.models.text_encoder import load_text_encoder

        device = pick_device(self._device)
        print(f"{self.title}: {describe_device(device)}", file=sys.stderr)
        if self._deterministic:
            use_deterministic_algorithms(device)
        model = load_text_encoder(self._text_encoder, device=device, dtype=torch.bfloat16, fp8=self._fp8)
        with self.watch:
            return PrefixEncoder(model, self._prefix)

    def _results(self, entries: list[Entry], embedding_ld: torch.Tensor) -> Iterator[Encoded | Reject]:
        """The one embedding of a caption, for each of the entries that have it."""
        import torch

        if not torch.isfinite(embedding_ld).all():
            reason = "the text encoder gave NaN or Inf; check the caption and the checkpoint"
            yield from (entry.reject(reason) for entry in entries)
            return
        dtype = str(embedding_ld.dtype).removeprefix("torch.")
        # a copy, because the embeddings of a batch lie in one block of memory
        tensors = {names.text_tensor_name(dtype): embedding_ld.clone()}
        yield from (Encoded(entry, tensors, self._deterministic) for entry in entries)


def tokenize(tokenizer: Qwen2Tokenizer, captions: Sequence[str]) -> Iterator[array[int]]:
    """Yield the token ids of each caption inside the template. A long caption is cut, its closing template kept.

    Template and caption are tokenized as one text, because a caption's first character may merge with the template's
    last. After the prefix is dropped at most 1024 tokens remain.
    """
    before, closing = tokenizer([TEMPLATE_PREFIX, TEMPLATE_SUFFIX]).input_ids
    limit = len(before) + MAX_TOKENS
    for together in _cut(captions, len(captions), TOKENIZED_TOGETHER, len):
        texts = [TEMPLATE_PREFIX + caption + TEMPLATE_SUFFIX for caption in together]
        for ids in tokenizer(texts, return_attention_mask=False).input_ids:
            yield array("i", ids if len(ids) <= limit else ids[: limit - len(closing)] + closing)


def batches(tokens: Mapping[str, Sequence[int]], size: int) -> Iterator[list[str]]:
    """Yield the captions by length, at most `size` together and, unless one alone has more, 2048 tokens."""
    captions = sorted(tokens, key=lambda caption: (len(tokens[caption]), caption))
    return _cut(captions, size, BATCH_TOKENS, lambda caption: len(tokens[caption]))


def _cut(captions: Sequence[str], size: int, limit: int, weight: Callable[[str], int]) -> Iterator[list[str]]:
    """Yield lists of at most `size` captions that together weigh no more than `limit`, or of one that does."""
    together, total = [], 0
    for caption in captions:
        if together and (len(together) == size or total + weight(caption) > limit):
            yield together
            together, total = [], 0
        together.append(caption)
        total += weight(caption)
    if together:
        yield together
