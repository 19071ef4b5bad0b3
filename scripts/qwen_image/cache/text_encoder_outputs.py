"""Captions to embeddings: the last hidden state of Qwen2.5-VL behind the model's prompt template, one file an image.

Shapes: B captions, T tokens with the template, L tokens kept, D the encoder's hidden size (3584 in the 7B model).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from qwen_image.cache import names
from qwen_image.cache.fingerprint import TEXT_ENCODER_VERSION
from qwen_image.cache.manifest import TEXT_COLUMNS
from qwen_image.cache.update import Encoded, Entry
from qwen_image.container import Header
from qwen_image.dataset.config import DatasetSettings
from qwen_image.dataset.items import Item, Reject, read_caption

if TYPE_CHECKING:
    import torch

# the text-to-image template of the public Qwen-Image model, before and after the caption
TEMPLATE_PREFIX = (
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, spatial "
    "relationships of the objects and background:<|im_end|>\n<|im_start|>user\n"
)
TEMPLATE_SUFFIX = "<|im_end|>\n<|im_start|>assistant\n"
MAX_TOKENS = 1024  # kept of one caption, the closing template tokens included


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
    ) -> None:
        """`text_encoder` is a checkpoint path; `model_identity` the hash of its content and of the tokenizer's."""
        self._text_encoder = text_encoder
        self._tokenizer = tokenizer
        self._model_identity = model_identity
        self._fp8 = fp8
        self._device = device
        self._batch_size = batch_size

    def plan(self, item: Item, settings: DatasetSettings) -> Entry:
        """Read the caption and name what the embedding is made from."""
        caption = item.caption if item.caption is not None else read_caption(item)
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
        path = Path(settings.cache_directory) / names.text_file_name(item.stem)
        return Entry(item, path, parts, {"caption_sha256": caption_sha256}, metadata, caption)

    def encode(self, entries: list[Entry]) -> Iterator[Encoded | Reject]:
        """Encode each different caption once, in batches of similar length; yield one result an entry."""
        import torch

        from qwen_image.device import pick_device
        from qwen_image.models.text_encoder import load_text_encoder
        from qwen_image.models.tokenizer import load_tokenizer

        device = pick_device(self._device)
        tokenizer = load_tokenizer(self._text_encoder, self._tokenizer)
        model = load_text_encoder(self._text_encoder, device=device, dtype=torch.bfloat16, fp8=self._fp8)
        by_caption: dict[str, list[Entry]] = {}
        for entry in entries:
            by_caption.setdefault(entry.payload, []).append(entry)
        tokens = {caption: tokenize_caption(tokenizer, caption) for caption in by_caption}
        dropped = len(tokenizer(TEMPLATE_PREFIX).input_ids)
        captions = sorted(by_caption, key=lambda caption: (len(tokens[caption]), caption))
        with tqdm(total=len(entries), unit="caption", desc=self.title, ncols=100) as bar:
            for start in range(0, len(captions), self._batch_size):
                batch = captions[start : start + self._batch_size]
                embeddings = encode_tokens(model, [tokens[caption] for caption in batch], dropped)
                for caption, embedding in zip(batch, embeddings, strict=True):
                    yield from (_result(entry, embedding.cpu()) for entry in by_caption[caption])
                    bar.update(len(by_caption[caption]))

    def describe(self, header: Header) -> dict[str, object]:
        """Read the number of tokens and the stored dtype off the file."""
        (tensor,) = header.tensors.values()
        return {"tokens": tensor.shape[0], "dtype": tensor.torch_dtype}


def tokenize_caption(tokenizer, caption: str) -> list[int]:
    """Return the token ids of the caption inside the template. A long caption is cut, its closing template kept.

    Template and caption are tokenized as one text, because a caption's first character may merge with the template's
    last. After the prefix is dropped at most 1024 tokens remain.
    """
    ids = tokenizer(TEMPLATE_PREFIX + caption + TEMPLATE_SUFFIX).input_ids
    limit = len(tokenizer(TEMPLATE_PREFIX).input_ids) + MAX_TOKENS
    if len(ids) <= limit:
        return ids
    closing = tokenizer(TEMPLATE_SUFFIX).input_ids
    return ids[: limit - len(closing)] + closing


def encode_tokens(model, token_ids: Sequence[Sequence[int]], dropped: int) -> list[torch.Tensor]:
    """Run the language model over B token lists; return for each its last hidden states (L, D), L = T - `dropped`.

    The states are those after the final norm. Shorter lists are padded on the right; attention is causal and masked,
    so the padding reaches no kept value.
    """
    import torch

    longest = max(map(len, token_ids))
    ids_bt = torch.zeros(len(token_ids), longest, dtype=torch.long)
    mask_bt = torch.zeros_like(ids_bt)
    for row, ids in enumerate(token_ids):
        ids_bt[row, : len(ids)] = torch.tensor(ids)
        mask_bt[row, : len(ids)] = 1
    with torch.inference_mode():
        hidden_btd = model(
            input_ids=ids_bt.to(model.device), attention_mask=mask_bt.to(model.device), use_cache=False
        ).last_hidden_state
    return [hidden_btd[row, dropped : len(ids)] for row, ids in enumerate(token_ids)]


def _result(entry: Entry, embedding: torch.Tensor) -> Encoded | Reject:
    import torch

    if not torch.isfinite(embedding).all():
        reason = "the text encoder gave NaN or Inf; check the caption and the checkpoint"
        return Reject(entry.item.dataset, entry.item.key, entry.item.image_path, reason)
    dtype = str(embedding.dtype).removeprefix("torch.")
    return Encoded(entry, {names.text_tensor_name(dtype): embedding.clone()})
