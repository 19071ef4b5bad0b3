"""The text-encoder stage by itself: batches, bytes, sizes, odd captions, and what it imports and loads."""

import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

import qwen_image
from qwen_image.cache.saver import Saver
from qwen_image.cache.stage import Encoded
from qwen_image.cache.text_encoder_outputs import BATCH_TOKENS, MAX_TOKENS, TextEncoderStage, batches, tokenize
from qwen_image.dataset.config import load_dataset_config
from qwen_image.dataset.items import Item, Reject
from qwen_image.models.prompt_prefix import PrefixEncoder
from qwen_image.models.tokenizer import load_tokenizer

CAPTIONS = [
    "",
    "a cat",
    "a dog",
    "a red square over a blue one, with a small yellow round under it",
    "\nthree lines\n\nof text",
    "一只三色猫的特写镜头，胡须清晰可见",
    "a <|im_end|> within",
    "a photo of a large white drawing " * 9,
]


@pytest.fixture
def settings(tmp_path):
    file = tmp_path / "dataset.toml"
    file.write_text(
        '[general]\nresolution = 64\ncaption_extension = ".txt"\n'
        f'[[datasets]]\nimage_directory = "images"\ncache_directory = "{tmp_path / "cache"}"\n'
    )
    return load_dataset_config(file)[0]


def stage(batch_size, *, deterministic=False, text_encoder=None, fp8=False):
    return TextEncoderStage(
        text_encoder=str(text_encoder or tiny.path("text_encoder")),
        tokenizer=None,
        model_identity="0" * 64,
        fp8=fp8,
        device="cpu",
        batch_size=batch_size,
        deterministic=deterministic,
    )


def plan(stage, settings, captions):
    items = (Item(0, f"{i}.png", f"images/{i}.png", None, caption) for i, caption in enumerate(captions))
    return [entry for item in items for entry in stage.plan(item, settings)]


def encode(stage, settings, captions):
    """Return the stage's results by caption."""
    return {result.entry.payload: result for result in stage.encode(plan(stage, settings, captions))}


def bits(result):
    ((name, tensor),) = result.tensors.items()
    return name, tuple(tensor.shape), tensor.view(torch.int16).numpy().tobytes()


# ---- deterministic ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fp8", [False, True])
def test_deterministic_bytes_depend_on_nothing_but_the_caption(settings, fp8):
    first = {c: bits(r) for c, r in encode(stage(1, deterministic=True, fp8=fp8), settings, CAPTIONS).items()}
    assert len(set(first.values())) == len(CAPTIONS)
    for size, captions in [(3, CAPTIONS), (8, CAPTIONS[::-1]), (8, CAPTIONS[3:6]), (3, [*CAPTIONS, "one more"] * 2)]:
        found = encode(stage(size, deterministic=True, fp8=fp8), settings, captions)
        assert all(result.deterministic for result in found.values())
        assert {c: bits(found[c]) for c in captions if c in first} == {c: first[c] for c in captions if c in first}
    (alone,) = encode(stage(8, deterministic=True, fp8=fp8), settings, CAPTIONS[3:4]).values()
    assert bits(alone) == first[CAPTIONS[3]]


def test_a_batch_of_one_says_that_it_is_deterministic_and_others_do_not(settings):
    certain = encode(stage(8, deterministic=True), settings, CAPTIONS)
    single, together = encode(stage(1), settings, CAPTIONS), encode(stage(8), settings, CAPTIONS)
    assert {result.deterministic for result in single.values()} == {True}
    assert {result.deterministic for result in together.values()} == {False}
    for caption, result in certain.items():
        assert bits(single[caption]) == bits(result)
        (ours,), (exact,) = together[caption].tensors.values(), result.tensors.values()
        assert (ours - exact).norm() < 0.02 * exact.norm()


# ---- sizes and batches -----------------------------------------------------------------------------------------------


def test_output_bytes_are_the_files_sizes_and_need_no_weights(settings, monkeypatch):
    import qwen_image.models.text_encoder

    captions = [*CAPTIONS, "é" * 20_000]
    with monkeypatch.context() as patch:
        patch.setattr(qwen_image.models.text_encoder, "load_text_encoder", lambda *_, **__: pytest.fail("loaded"))
        text = stage(4)
        entries = plan(text, settings, captions)
        promised = text.output_bytes(entries)
    with Saver() as saver:
        for result in text.encode(entries):
            list(saver.save(result))
        list(saver.rest())
    sizes = [entry.path.stat().st_size for entry in entries]
    assert max(sizes) > 500_000
    assert all(abs(size - found) < 1000 for size, found in zip(sizes, promised, strict=True))


def test_batches_keep_to_the_size_and_to_the_tokens():
    tokens = {f"{length:04d}": range(length) for length in (5, 5000, 900, 40, 700, 41, 42, 600, 43)}
    found = list(batches(tokens, 3))
    assert found == [["0005", "0040", "0041"], ["0042", "0043", "0600"], ["0700", "0900"], ["5000"]]
    assert 600 + 700 + 42 + 43 < BATCH_TOKENS < 700 + 900 + 5000
    assert list(batches({}, 3)) == []


def test_equal_captions_run_once_and_every_entry_gets_the_result(settings, monkeypatch):
    seen = []
    real = PrefixEncoder.encode
    monkeypatch.setattr(PrefixEncoder, "encode", lambda self, lists: seen.extend(lists) or real(self, lists))
    text = stage(2)
    results = list(text.encode(plan(text, settings, ["a cat", "a dog", "a cat", "a cat"])))
    assert len(seen) == 2
    assert sorted(result.entry.item.key for result in results) == ["0.png", "1.png", "2.png", "3.png"]
    assert len({bits(result) for result in results if result.entry.payload == "a cat"}) == 1


# ---- odd captions ----------------------------------------------------------------------------------------------------

LONG = {
    "a word": "x" * 100_000,
    "words": "a photo of red " * 6_700,
    "line breaks": "\n" * 100_000,
    "other letters": "猫" * 33_000,
    "special tokens": "<|im_end|><|image_pad|>" * 4_400,
}


@pytest.mark.parametrize("kind", LONG)
def test_a_very_long_caption_is_cut_to_what_the_model_takes(settings, kind):
    results = encode(stage(4), settings, [LONG[kind], "a cat"])
    (tensor,) = results[LONG[kind]].tensors.values()
    assert tensor.shape == (MAX_TOKENS, 256)
    (other,) = results["a cat"].tensors.values()
    assert other.shape[0] < 20


def test_captions_are_tokenized_in_portions_but_as_if_each_were_alone(monkeypatch):
    tokenizer = load_tokenizer(tiny.path("text_encoder"))
    alone = [next(tokenize(tokenizer, [caption])) for caption in CAPTIONS]
    monkeypatch.setattr("qwen_image.cache.text_encoder_outputs.TOKENIZED_TOGETHER", 30)
    assert list(tokenize(tokenizer, CAPTIONS)) == alone
    assert list(tokenize(tokenizer, [])) == []


def test_a_caption_that_gives_nan_is_rejected_and_its_batch_is_not(settings, tmp_path):
    folder = tmp_path / "text_encoder"
    folder.mkdir()
    for file in tiny.path("text_encoder").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    good = encode(stage(8, text_encoder=folder), settings, CAPTIONS)
    tensors = load_file(folder / "model.safetensors")
    tokenizer = load_tokenizer(folder)
    broken = list(set(tokenizer("ß").input_ids) - {token for ids in tokenizer(CAPTIONS).input_ids for token in ids})
    tensors["model.embed_tokens.weight"][broken] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    text = stage(9, text_encoder=folder)
    results = list(text.encode(plan(text, settings, [*CAPTIONS, "a ß"])))
    (reject,) = (result for result in results if isinstance(result, Reject))
    assert reject.key == "8.png" and "NaN" in reject.reason
    assert len(results) == len(CAPTIONS) + 1
    for result in results:
        if isinstance(result, Encoded):
            (ours,), (exact,) = result.tensors.values(), good[result.entry.payload].tensors.values()
            assert (ours - exact).norm() < 0.02 * exact.norm()


# ---- what is loaded when ---------------------------------------------------------------------------------------------

IMPORT = """
import sys
import qwen_image.cache.text_encoder_outputs
print(sorted({"torch", "transformers", "tokenizers", "accelerate", "numpy"} & sys.modules.keys()))
"""


def test_importing_the_stage_imports_no_library_of_models():
    scripts = Path(qwen_image.__file__).parents[1]
    run = subprocess.run([sys.executable, "-c", IMPORT], cwd=scripts, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
