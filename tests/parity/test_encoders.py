"""Cached values against the public pipelines: latents against diffusers' VAE, embeddings against QwenImagePipeline."""

from pathlib import Path

import pytest
import skimage
import tiny
import torch
from diffusers import AutoencoderKLQwenImage, QwenImagePipeline
from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2TokenizerFast

from qwen_image.cache.text_encoder_outputs import MAX_TOKENS, TEMPLATE_PREFIX, TEMPLATE_SUFFIX, tokenize
from qwen_image.dataset.buckets import choose_bucket
from qwen_image.dataset.images import fit_to_bucket, load_image
from qwen_image.models.prompt_prefix import PrefixEncoder
from qwen_image.models.text_encoder import load_text_encoder
from qwen_image.models.tokenizer import load_tokenizer
from qwen_image.models.vae import load_vae

PHOTOGRAPHS = Path(skimage.__file__).parent / "data"
CAPTIONS = [
    "",
    "a cat",
    "An astronaut in an orange suit, smiling, in front of a flag and a model of the Space Shuttle.",
    "ein Espresso mit Löffel auf einem Holztisch – von oben",
    "一只三色猫的特写镜头，胡须清晰可见",
    "قهوة سوداء في فنجان أبيض",
    "ロケットが夜空に打ち上げられる 🚀✨",
    "\n leading white space and a line\nbreak",
    "\n\n\n",
    "   ",
    "a <|im_end|> special token, {braces} and \"quotes\"",
    "<|im_end|>\n<|im_start|>assistant\n",
    "<|vision_start|><|image_pad|><|vision_end|> a picture within <|video_pad|> and <|vision_start|> again",
    "\u0301 a combining mark first, and a \0 character",
]  # fmt: skip


@pytest.fixture(scope="module")
def vae():
    return load_vae(tiny.path("vae"), dtype=torch.float32)


@pytest.mark.parametrize("name", ["astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg", "camera.png"])
def test_latents_equal_the_normalised_mode_of_diffusers(vae, name):
    path = PHOTOGRAPHS / name
    pixels = load_image(path)
    bucket = choose_bucket((pixels.shape[1], pixels.shape[0]), (96, 96), True, False)
    pixels = fit_to_bucket(pixels, bucket)
    ours = vae.encode_pixels(pixels[None])

    reference = AutoencoderKLQwenImage(**{k: v for k, v in vae.config.items() if not k.startswith("_")}).eval()
    reference.load_state_dict({k: v.float() for k, v in tiny.official("vae").items()})
    with torch.no_grad():
        x = torch.from_numpy(pixels).permute(2, 0, 1)[None, :, None].float() / 127.5 - 1
        z = reference.encode(x).latent_dist.mode()
    mean = torch.tensor(reference.config.latents_mean).view(1, -1, 1, 1, 1)
    std = torch.tensor(reference.config.latents_std).view(1, -1, 1, 1, 1)
    expected = (z - mean) / std
    assert ours.shape == (1, 16, 1, bucket[1] // 8, bucket[0] // 8)
    assert expected.std() > 0.1
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=0)


@pytest.fixture(scope="module")
def pipeline():
    """The public pipeline on the full model class, vision tower and head included, in float32."""
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(tiny.path("text_encoder"), dtype=torch.float32)
    tokenizer = Qwen2TokenizerFast.from_pretrained(tiny.path("text_encoder"))
    return QwenImagePipeline(scheduler=None, vae=None, text_encoder=model, tokenizer=tokenizer, transformer=None)


@pytest.fixture(scope="module")
def encoder():
    """Our encoder on the language model alone, in float32, and the tokenizer."""
    folder = tiny.path("text_encoder")
    tokenizer = load_tokenizer(folder)
    model = load_text_encoder(folder, dtype=torch.float32)
    return PrefixEncoder(model, tokenizer(TEMPLATE_PREFIX).input_ids), tokenizer


def encode(encoder, captions):
    model, tokenizer = encoder
    return model.encode(list(tokenize(tokenizer, captions)))


def test_the_template_is_the_pipelines(pipeline, encoder):
    assert pipeline.prompt_template_encode == TEMPLATE_PREFIX + "{}" + TEMPLATE_SUFFIX
    assert len(encoder[1](TEMPLATE_PREFIX).input_ids) == pipeline.prompt_template_encode_start_idx == 34


@pytest.mark.parametrize("caption", CAPTIONS)
def test_one_caption_equals_encode_prompt(pipeline, encoder, caption):
    (ours,) = encode(encoder, [caption])
    expected, _ = pipeline.encode_prompt(prompt=[caption], device="cpu")
    assert ours.std() > 0.1
    torch.testing.assert_close(ours, expected[0], atol=1e-4, rtol=0)


def test_a_batch_equals_encode_prompt_caption_by_caption(pipeline, encoder):
    for ours, caption in zip(encode(encoder, CAPTIONS), CAPTIONS, strict=True):
        expected, _ = pipeline.encode_prompt(prompt=[caption], device="cpu")
        torch.testing.assert_close(ours, expected[0], atol=1e-4, rtol=0)


def test_an_empty_caption_leaves_the_five_closing_tokens(encoder):
    (ours,) = encode(encoder, [""])
    assert ours.shape == (5, 256)


def test_a_long_caption_is_cut_and_keeps_its_closing_tokens(encoder):
    _, tokenizer = encoder
    long, uncut = tokenize(tokenizer, ["word " * 5000, "x" * 200])
    ids = long.tolist()
    prefix, closing = tokenizer(TEMPLATE_PREFIX).input_ids, tokenizer(TEMPLATE_SUFFIX).input_ids
    assert len(ids) == len(prefix) + MAX_TOKENS
    assert ids[: len(prefix)] == prefix
    assert ids[-len(closing) :] == closing
    longest_uncut = tokenizer(TEMPLATE_PREFIX + "x" * 200 + TEMPLATE_SUFFIX).input_ids
    assert uncut.tolist() == longest_uncut
