"""Both encoders on a GPU: the libraries' values; with `deterministic`, bytes that tell nothing of the neighbours."""

from pathlib import Path

import numpy
import pytest
import skimage
import tiny
import torch
from bench import VARIOUS, various_photographs
from library_vae import decoded, library_vae, normalised_mode
from safetensors.torch import load
from transformers import Qwen2_5_VLForConditionalGeneration

from qwen_image.cache.text_encoder_outputs import TEMPLATE_PREFIX, tokenize
from qwen_image.dataset.images import fit_to_bucket, load_image
from qwen_image.models.prompt_prefix import PrefixEncoder
from qwen_image.models.text_encoder import load_text_encoder
from qwen_image.models.tokenizer import load_tokenizer
from qwen_image.models.vae import load_vae

DEVICE = "cuda"
PHOTOGRAPHS = Path(skimage.__file__).parent / "data"
CAPTIONS = [
    "",
    "a cat",
    "An astronaut in an orange suit, smiling, in front of a flag.",
    "一只三色猫的特写镜头",
    " word" * 300,
]


@pytest.fixture(autouse=True)
def exact(monkeypatch):
    """fp32 is compared as fp32: cuDNN would take TF32 for convolutions."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)


@pytest.fixture(scope="module")
def library():
    return library_vae().to(DEVICE)


def pixels(size):
    """Photographs as uint8 pixels (B, H, W, 3); `size` is (W, H)."""
    return numpy.stack([fit_to_bucket(load_image(PHOTOGRAPHS / name), size) for name in VARIOUS[:4]])


@pytest.mark.parametrize("size", [(64, 64), (160, 112), (16, 512)], ids=str)
def test_latents_equal_those_of_diffusers(library, size):
    ours = load_vae(tiny.path("vae"), device=DEVICE, dtype=torch.float32).encode_pixels(pixels(size))
    expected = normalised_mode(library, pixels(size))
    assert ours.device.type == "cuda" and expected.std() > 0.1
    torch.testing.assert_close(ours, expected, atol=2e-5, rtol=0)


def test_bfloat16_latents_are_no_further_from_float32_than_those_of_diffusers(library):
    rounded = library_vae().to(DEVICE, torch.bfloat16)
    expected = normalised_mode(library, pixels((160, 112)))
    ours = load_vae(tiny.path("vae"), device=DEVICE).encode_pixels(pixels((160, 112)))
    assert ours.dtype == torch.bfloat16
    mine = (ours.float() - expected).abs().mean()
    theirs = (normalised_mode(rounded, pixels((160, 112))) - expected).abs().mean()
    assert 0 < mine <= 1.05 * theirs


def test_pictures_equal_those_of_diffusers(library):
    latents = normalised_mode(library, pixels((160, 112)))
    ours = load_vae(tiny.path("vae"), device=DEVICE, dtype=torch.float32).decode_latents(latents)
    torch.testing.assert_close(ours, decoded(library, latents), atol=1e-4, rtol=0)


def encoded(**options):
    """Every caption's embedding, encoded together and one by one."""
    folder = tiny.path("text_encoder")
    tokenizer = load_tokenizer(folder)
    model = load_text_encoder(folder, device=DEVICE, **options)
    encoder = PrefixEncoder(model, tokenizer(TEMPLATE_PREFIX).input_ids)
    tokens = list(tokenize(tokenizer, CAPTIONS))
    return tokens, encoder.encode(tokens), [encoder.encode([ids])[0] for ids in tokens]


def test_embeddings_equal_those_of_transformers():
    tokens, together, alone = encoded(dtype=torch.float32)
    library = Qwen2_5_VLForConditionalGeneration.from_pretrained(tiny.path("text_encoder"), dtype=torch.float32)
    library.to(DEVICE)
    for ids, one, other in zip(tokens, together, alone, strict=True):
        with torch.no_grad():
            states = library(input_ids=torch.tensor([list(ids)], device=DEVICE), output_hidden_states=True)
        expected = states.hidden_states[-1][0, 34:].cpu()
        assert expected.std() > 0.1
        torch.testing.assert_close(one, expected, atol=1e-4, rtol=0)
        torch.testing.assert_close(other, expected, atol=1e-4, rtol=0)


def test_fp8_weights_change_embeddings_as_much_as_on_a_cpu():
    _, exact, _ = encoded(dtype=torch.float32)
    for options in ({"fp8": True}, {}):
        _, together, alone = encoded(**options)
        for expected, one, other in zip(exact, together, alone, strict=True):
            for found in (one, other):
                cosine = torch.nn.functional.cosine_similarity(found.float(), expected).mean()
                assert cosine > (0.99 if options else 0.999)


# ---- the programs


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    return various_photographs(tmp_path_factory.mktemp("photographs"))


def made(bench, folder, *more):
    """The cache files that the two programs make in a process each, as users start them."""
    copy = bench.copy(folder)
    copy.settings("resolution = 128")
    for kind in ("latents", "text_encoder_outputs"):
        process = copy.process(kind, "--device", DEVICE, *more)
        said = process.communicate()[0]
        assert process.returncode == 0, said
        assert f"computed on cuda, {torch.cuda.get_device_name()}" in said
    return copy.files()


@pytest.fixture(scope="module")
def deterministic(bench, tmp_path_factory):
    return made(bench, tmp_path_factory.mktemp("one") / "copy", "--deterministic", "--batch_size", "1")


def test_deterministic_bytes_do_not_tell_the_batch_or_the_workers(bench, deterministic, tmp_path):
    again = made(bench, tmp_path / "copy", "--deterministic", "--batch_size", "8", "--num_workers", "3")
    assert len(again) == 2 * len(VARIOUS) and again == deterministic


def test_deterministic_bytes_do_not_tell_the_neighbours(bench, deterministic, tmp_path):
    few = bench.copy(tmp_path / "few")
    for path in list(few.images.iterdir()):
        if path.stem not in ("2", "5"):
            path.unlink()
    alone = made(few, tmp_path / "copy", "--deterministic")
    assert len(alone) == 4 and alone.items() <= deterministic.items()


def test_what_need_not_be_deterministic_stays_close(bench, deterministic, tmp_path):
    fast = made(bench, tmp_path / "copy", "--batch_size", "4")
    assert fast.keys() == deterministic.keys()
    for name, content in fast.items():
        ((_, found),), ((_, expected),) = load(content).items(), load(deterministic[name]).items()
        assert torch.nn.functional.cosine_similarity(found.flatten().float(), expected.flatten().float(), 0) > 0.999
