"""The text encoder: captions a second of ours against the public pipeline's on the same captions.

Ours is what the caching stage does once its model is loaded (tokenizing, batches of like length, the template shared);
the other is QwenImagePipeline.encode_prompt in batches of 16 in the order of the dataset: template included, padded to
the longest, hidden states of all layers kept, and the language model's head computed for every token. The weights are
random; widths and heads have the real model's proportions, and so has the head: 8.3 % of the layers' parameters (545M
of 6.5G). The real vision tower, which only the other side would load, is left out. A row's token count is that of the
captions themselves; where all have that many, the worst case for us, nothing is padded on the other side either.
"""

from __future__ import annotations

import random
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

from measure import Row, faster, medians

ROOT = Path(__file__).parents[1]
DIMENSIONS = {
    "hidden_size": 1536, "intermediate_size": 8192, "num_hidden_layers": 8, "num_attention_heads": 12,
    "num_key_value_heads": 2, "vocab_size": 18_700,
}  # fmt: skip
"""Eight layers of 43M parameters each, a head and an embedding of 29M each."""
Encode = Callable[[list[str]], None]
BATCH = 16
ROUNDS = 5
TARGETS = {12: ">= 2.5", 25: ">= 2.5", 60: ">= 1.6", 150: ">= 1.3"}
"""By the number of tokens in a caption."""
MIXED = 48
"""Captions of different lengths; of those of 8 to 120 tokens short ones are more frequent than long ones."""
WORDS = (" photo", " drawing", " in", " on", " over", " left", " right", " small", " large", " red", " green", " blue")
"""Each is one token of the demo's tokenizer, which the benchmark uses; other text would fall back to bytes."""

PEAK = """
import sys
from pathlib import Path
sys.path[:0] = [{benchmarks!r}, {scripts!r}]
import text_encoder
text_encoder.{side}({folder!r})(text_encoder.captions([25] * text_encoder.BATCH))
print(next(line for line in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in line).split()[1])
"""


def rows() -> list[Row]:
    """Return the rows: speed by caption length, of a mixed dataset, of the deterministic mode; peak memory."""
    with tempfile.TemporaryDirectory(prefix="text-encoder-") as folder:
        _write_model(folder)
        found = [_memory(folder)] if Path("/proc/self/status").exists() else []
        mine, other = ours(folder), pipeline(folder)
        one_by_one = partial(mine, batch_size=1)
        for count, target in TARGETS.items():
            found.append(_compare(f"text encoder, {count} tokens a caption", [count] * BATCH, mine, other, target))
        drawn = random.Random(1)
        short = [drawn.randint(12, 25) for _ in range(MIXED)]
        found.append(_compare(f"text encoder, {MIXED} captions of 12 to 25 tokens", short, mine, other, TARGETS[12]))
        lengths = [int(drawn.triangular(8, 120, 20)) for _ in range(MIXED)]
        found.append(_compare(f"text encoder, {MIXED} captions of 8 to 120 tokens", lengths, mine, other))
        found.append(
            _compare("text encoder, 25 tokens a caption, fast / deterministic", [25] * BATCH, mine, one_by_one)
        )
        return found


def ours(folder: str, *, fp8: bool = False) -> Encode:
    """Load our encoder; return what encodes captions."""
    from qwen_image.cache.text_encoder_outputs import TEMPLATE_PREFIX, batches, tokenize
    from qwen_image.device import pick_device
    from qwen_image.models.prompt_prefix import PrefixEncoder
    from qwen_image.models.text_encoder import load_text_encoder
    from qwen_image.models.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(folder)
    model = load_text_encoder(folder, device=pick_device("auto"), fp8=fp8)
    encoder = PrefixEncoder(model, tokenizer(TEMPLATE_PREFIX).input_ids)

    def encode(captions: list[str], batch_size: int = BATCH) -> None:
        tokens = dict(zip(captions, tokenize(tokenizer, captions), strict=True))
        for batch in batches(tokens, batch_size):
            encoder.encode([tokens[caption] for caption in batch])

    return encode


def pipeline(folder: str) -> Encode:
    """Load the public pipeline's encoder; return what encodes captions."""
    import torch
    from diffusers import QwenImagePipeline
    from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2TokenizerFast

    from qwen_image.device import pick_device

    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype=torch.bfloat16).to(pick_device("auto"))
    tokenizer = Qwen2TokenizerFast.from_pretrained(folder)
    whole = QwenImagePipeline(scheduler=None, vae=None, text_encoder=model, tokenizer=tokenizer, transformer=None)

    def encode(captions: list[str]) -> None:
        with torch.inference_mode():
            for start in range(0, len(captions), BATCH):
                embeddings, _ = whole.encode_prompt(captions[start : start + BATCH], device=model.device)
                embeddings.cpu()  # as ours does; a GPU has finished then

    return encode


def captions(lengths: list[int]) -> list[str]:
    """Return different captions of so many tokens each; the same ones on every call."""
    drawn = random.Random(0)
    return ["a" + "".join(drawn.choices(WORDS, k=length - 1)) for length in lengths]


def _compare(name: str, lengths: list[int], mine: Encode, other: Encode, target: str | None = None) -> Row:
    texts = captions(lengths)
    seconds = medians({"ours": lambda: mine(texts), "other": lambda: other(texts)}, rounds=ROUNDS)
    unit = "captions/s"
    return faster(name, ours=seconds["ours"], other=seconds["other"], count=len(texts), unit=unit, target=target)


def _memory(folder: str) -> Row:
    """Peak of a process that loads the model and encodes one batch."""
    peak = {}
    for side in ("ours", "pipeline"):
        code = PEAK.format(side=side, folder=folder, benchmarks=str(ROOT / "benchmarks"), scripts=str(ROOT / "scripts"))
        run = subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.PIPE, text=True)
        peak[side] = int(run.stdout.split()[-1]) * 1024 / 1e6
    name = f"text encoder, load and {BATCH} captions: peak memory"
    return Row(name=name, ours=peak["ours"], other=peak["pipeline"], unit="MB", ratio=peak["pipeline"] / peak["ours"])


def _write_model(folder: str) -> None:
    from qwen_image.demo.checkpoints import demo_text_encoder, write_text_encoder

    write_text_encoder(Path(folder), demo_text_encoder(**DIMENSIONS))


if __name__ == "__main__":
    from run import main

    sys.exit(main(["--only", "text_encoder", *sys.argv[1:]]))
