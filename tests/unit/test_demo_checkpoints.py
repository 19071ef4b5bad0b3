"""The embedded demo's checkpoints: the same bytes on every run, readable by the libraries, sensible to train on."""

import hashlib
import os

import pytest
import tiny
import torch

from qwen_image.demo.checkpoints import write_demo_checkpoints

PREFIX = (
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, "
    "spatial relationships of the objects and background:<|im_end|>\n<|im_start|>user\n"
)
EDIT_PREFIX = (
    "<|im_start|>system\nDescribe the key features of the input image (color, shape, size, texture, objects, "
    "background), then explain how the user's text instruction should alter or modify the image. Generate a new image "
    "that meets the user's requirements while maintaining consistency with the original input where appropriate."
    "<|im_end|>\n<|im_start|>user\n"
)
CLOSING = "<|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny.path("text_encoder"), local_files_only=True)


def _hashes(folder):
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_writing_twice_gives_the_same_bytes(tmp_path):
    torch.manual_seed(1234)  # the global generator must not matter
    write_demo_checkpoints(tmp_path)
    assert _hashes(tmp_path) == _hashes(tiny.folder())


def test_files_are_few_small_and_readable_by_others(tmp_path):
    files = [path for path in tiny.folder().rglob("*") if path.is_file()]
    names = {path.relative_to(tiny.folder()).as_posix() for path in files}
    assert names == {"dit.safetensors", "vae.safetensors"} | {
        f"text_encoder/{name}"
        for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
    }
    assert sum(path.stat().st_size for path in files) < 25_000_000
    umask = os.umask(0)
    os.umask(umask)
    assert {path.stat().st_mode & 0o777 for path in files} == {0o666 & ~umask}


def test_transformers_reads_the_text_encoder_folder():
    from transformers import Qwen2_5_VLForConditionalGeneration

    model, info = Qwen2_5_VLForConditionalGeneration.from_pretrained(
        tiny.path("text_encoder"), local_files_only=True, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert model.dtype == torch.bfloat16


@pytest.mark.parametrize(("text", "count"), [(PREFIX, 34), (EDIT_PREFIX, 64), (CLOSING, 5)])
def test_templates_have_as_many_tokens_as_with_the_real_tokenizer(tokenizer, text, count):
    assert len(tokenizer(text).input_ids) == count


def test_the_templates_are_those_of_diffusers():
    import inspect

    from diffusers import QwenImageEditPlusPipeline, QwenImagePipeline

    for pipeline, text in ((QwenImagePipeline, PREFIX), (QwenImageEditPlusPipeline, EDIT_PREFIX)):
        assert text.replace("\n", "\\n") in inspect.getsource(pipeline.__init__)


@pytest.mark.parametrize(
    "text", ["", "a red square", "東京の夜 🌃", "naïve café", "\t x\r\n\n y  ", "\x00\x7f", "it's 2024!"]
)
def test_any_text_survives_the_tokenizer(tokenizer, text):
    ids = tokenizer(text).input_ids
    assert tokenizer.decode(ids) == text
    assert all(0 <= number < 566 for number in ids)


def test_text_is_normalised_to_nfc(tokenizer):
    assert tokenizer("e\u0301").input_ids == tokenizer("\u00e9").input_ids


def test_special_tokens_are_single_ids_and_padding_is_endoftext(tokenizer):
    from qwen_image.demo.tokenizer import special_token_ids

    ids = special_token_ids()
    assert all(tokenizer(token).input_ids == [number] for token, number in ids.items())
    assert tokenizer.pad_token == "<|endoftext|>" and tokenizer.pad_token_id == ids["<|endoftext|>"]


def test_chat_template_frames_a_message(tokenizer):
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
    )
    assert text == f"<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\nhi{CLOSING}"


def test_latents_of_a_photograph_look_like_the_real_ones():
    import skimage.data

    from qwen_image.models.vae import load_vae

    vae = load_vae(tiny.path("vae"), dtype=torch.float32)
    normalised = vae.encode_pixels(skimage.data.chelsea()[None, :192, :256].copy())[0, :, 0]
    assert abs(normalised.mean()) < 0.5 and 0.4 < normalised.std() < 2
    assert normalised.std(dim=(1, 2)).min() > 0.1  # every channel carries something of the image


def test_a_lora_on_the_transformer_lowers_the_loss():
    from peft import LoraConfig

    from qwen_image.models.transformer import load_transformer

    torch.manual_seed(0)
    model = load_transformer(tiny.path("dit"), dtype=torch.float32)
    model.add_adapter(LoraConfig(r=8, lora_alpha=8, target_modules=["to_q", "to_k", "to_v", "to_out.0", "net.2"]))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-3)
    clean, noise, text, time = (
        torch.randn(1, 24, 64),
        torch.randn(1, 24, 64),
        torch.randn(1, 8, 256),
        torch.tensor([0.6]),
    )
    noisy = torch.lerp(clean, noise, time)
    losses = []
    for _ in range(12):
        velocity = model(noisy, text, timestep=time, img_shapes=[[(1, 4, 6)]], return_dict=False)[0]
        loss = (velocity - (noise - clean)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[0] < 5  # near the variance of the target plus that of the output, so nothing explodes
    assert losses[-1] < 0.9 * losses[0]
