"""A small byte-level tokenizer that behaves like Qwen2.5-VL's: same pre-tokenizer, special tokens and chat template.

Its merges are built by hand so that every word of the Qwen-Image prompt templates is one token, as it is in the real
vocabulary: the text template then has the real number of leading (34) and closing (5) tokens, the edit template its 64,
while any other text falls back to bytes.
"""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path

from qwen_image.files import atomic_write

WORDS = (
    # The text template, in order.
    "system",
    "Describe the image by detailing the color, shape, size, texture, quantity, text, "
    "spatial relationships of the objects and background:",
    "user",
    "assistant",
    # The edit templates.
    "Describe the key features of the input image (color, shape, size, texture, objects, background), then explain how "
    "the user's text instruction should alter or modify the image. Generate a new image that meets the user's "
    "requirements while maintaining consistency with the original input where appropriate.",
    "Picture 1:",
    # Words that captions are full of, so that demo captions are not all bytes.
    "a photo drawing in on with over under left right small large red green blue yellow black white round square",
)
"""Text whose pieces (as the pre-tokenizer cuts them) become single tokens."""

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
"""Qwen2.5's special tokens in the order of their ids (151643 on in the real vocabulary)."""

PRE_TOKENIZER_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""How Qwen2 cuts text into pieces before merging (public tokenizer.json of Qwen2.5)."""

CHAT_TEMPLATE = (
    "{% set image_count = namespace(value=0) %}{% set video_count = namespace(value=0) %}"
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}<|im_end|>\n"
    "{% else %}{% for content in message['content'] %}"
    "{% if content['type'] == 'image' or 'image' in content or 'image_url' in content %}"
    "{% set image_count.value = image_count.value + 1 %}"
    "{% if add_vision_id %}Picture {{ image_count.value }}: {% endif %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif content['type'] == 'video' or 'video' in content %}"
    "{% set video_count.value = video_count.value + 1 %}"
    "{% if add_vision_id %}Video {{ video_count.value }}: {% endif %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif 'text' in content %}{{ content['text'] }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""Qwen2.5-VL's public chat template."""


def write_tokenizer(folder: str | Path) -> None:
    """Write ``tokenizer.json`` and ``tokenizer_config.json`` into ``folder``; the same bytes on every run."""
    folder = Path(folder)
    vocabulary, merges = _vocabulary()
    ids = special_token_ids()
    atomic_write(folder / "tokenizer.json", _tokenizer_json(vocabulary, merges, ids))
    atomic_write(folder / "tokenizer_config.json", _tokenizer_config_json(ids))


def special_token_ids() -> dict[str, int]:
    """Ids of the special tokens; as in the real vocabulary they follow the ordinary tokens."""
    vocabulary, _ = _vocabulary()
    return {token: len(vocabulary) + position for position, token in enumerate(SPECIAL_TOKENS)}


def _vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary (token to id) and merges: the 256 byte symbols, then one token for each piece of `WORDS`."""
    merges: list[tuple[str, str]] = []
    for piece in _pieces():
        # Later merges never undo an earlier word: BPE applies the earlier ones first.
        while len(symbols := _encode(piece, merges)) > 1:
            merges.append((symbols[0], symbols[1]))
    tokens = dict.fromkeys([*_byte_symbols().values(), *(left + right for left, right in merges)])
    return {token: position for position, token in enumerate(tokens)}, merges


def _pieces() -> list[str]:
    """The distinct pieces of `WORDS` in byte symbols; ASCII only, so ``re`` can stand in for the real pattern."""
    letters, digits = "a-zA-Z", "0-9"
    ascii_pattern = PRE_TOKENIZER_PATTERN.replace(r"\p{L}+", f"[{letters}]+").replace(r"|\p{N}|", f"|[{digits}]|")
    ascii_pattern = ascii_pattern.replace(r"\p{L}", letters).replace(r"\p{N}", digits)
    symbols = _byte_symbols()
    pieces = [piece for text in WORDS for piece in re.findall(ascii_pattern, text)]
    return list(dict.fromkeys("".join(symbols[byte] for byte in piece.encode()) for piece in pieces))


def _encode(piece: str, merges: list[tuple[str, str]]) -> list[str]:
    """Byte-pair encoding of one piece: the earliest merge that applies, again and again."""
    ranks = {pair: rank for rank, pair in enumerate(merges)}
    symbols = list(piece)
    while True:
        found = [(ranks[pair], at) for at, pair in enumerate(itertools.pairwise(symbols)) if pair in ranks]
        if not found:
            return symbols
        _, at = min(found)
        symbols[at : at + 2] = [symbols[at] + symbols[at + 1]]


def _byte_symbols() -> dict[int, str]:
    """The printable character that stands for each byte in a byte-level vocabulary (GPT-2's table)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + at) for at, byte in enumerate(others)}


def _tokenizer_json(vocabulary: dict[str, int], merges: list[tuple[str, str]], ids: dict[str, int]) -> str:
    """The ``tokenizers`` library's own serialisation."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRE_TOKENIZER_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in ids])
    assert all(tokenizer.token_to_id(token) == at for token, at in ids.items())
    # The library writes the vocabulary in the order of the ids and the merges in the order given: stable bytes.
    return tokenizer.to_str(pretty=True) + "\n"


def _tokenizer_config_json(ids: dict[str, int]) -> str:
    """The settings that transformers reads beside ``tokenizer.json``."""
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    config = {
        "add_prefix_space": False,
        "added_tokens_decoder": {str(at): {"content": token} | flags for token, at in ids.items()},
        "additional_special_tokens": list(SPECIAL_TOKENS[1:]),
        "bos_token": None,
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "errors": "replace",
        "model_max_length": 131072,
        "pad_token": "<|endoftext|>",
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }
    return json.dumps(config, indent=2, ensure_ascii=False) + "\n"
