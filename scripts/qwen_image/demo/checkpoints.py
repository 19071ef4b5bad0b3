"""Three tiny checkpoints of the real model classes, so that the whole chain runs without a download.

The weights are random: nothing they make is a picture. They are scaled so that activations keep their size from layer
to layer, latents look like the real VAE's (mean 0 and deviation 1 once normalised) and a LoRA can lower the loss.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

from qwen_image.container import write_safetensors
from qwen_image.demo.tokenizer import special_token_ids, write_tokenizer
from qwen_image.files import atomic_write

if TYPE_CHECKING:
    import torch
    from diffusers import AutoencoderKLQwenImage, QwenImageTransformer2DModel
    from transformers import Qwen2_5_VLForConditionalGeneration

SEED = 20250804
HIDDEN = 256
"""Width of the text encoder's output and of the transformer: two heads of the real size, 128."""

BASE_DIM = 16
TRANSFORMER_CONFIG = {
    "num_layers": 2,
    "attention_head_dim": 128,
    "num_attention_heads": 2,
    "joint_attention_dim": HIDDEN,
}
TEXT_CONFIG = {
    "vocab_size": 640,
    "hidden_size": HIDDEN,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 128000,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0, "mrope_section": [16, 24, 24]},
}
VISION_CONFIG = {
    "depth": 1,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_heads": 2,
    "out_hidden_size": HIDDEN,
    "fullatt_block_indexes": [0],
}


def write_demo_checkpoints(folder: str | Path) -> None:
    """Write ``dit.safetensors``, ``vae.safetensors`` and ``text_encoder/`` (weights, config, tokenizer) in bf16.

    The same bytes on every run. The two bare files have official diffusers keys and no config; the folder is what
    transformers' ``from_pretrained`` reads.
    """
    folder = Path(folder)
    write_vae(folder / "vae.safetensors", demo_vae())
    write_safetensors(folder / "dit.safetensors", _bf16(demo_transformer()), {"format": "pt"})
    write_text_encoder(folder / "text_encoder", demo_text_encoder())


def write_vae(path: Path, model: AutoencoderKLQwenImage) -> None:
    """Write a VAE in bf16 as one file with official diffusers keys and no config."""
    write_safetensors(path, _bf16(model), {"format": "pt"})


def write_text_encoder(folder: Path, model: Qwen2_5_VLForConditionalGeneration) -> None:
    """Write weights in bf16, config and tokenizer as transformers' ``from_pretrained`` reads them."""
    write_safetensors(folder / "model.safetensors", hub_text_encoder(_bf16(model)), {"format": "pt"})
    atomic_write(folder / "config.json", model.config.to_json_string(use_diff=False))
    write_tokenizer(folder)


def demo_vae(base_dim: int = BASE_DIM) -> AutoencoderKLQwenImage:
    """Return a fp32 AutoencoderKLQwenImage of this base width (the real one's is 96).

    Its latents have the real model's mean and deviation.
    """
    import torch
    from diffusers import AutoencoderKLQwenImage

    model = AutoencoderKLQwenImage(base_dim=base_dim)
    _fill(model, SEED)
    channels = model.config.z_dim
    mean, std = torch.tensor(model.config.latents_mean), torch.tensor(model.config.latents_std)
    with torch.no_grad():
        # The mode of the posterior is the first half of quant_conv's output. 3: measured on photographs, so that the
        # normalised latents have a deviation near 1.
        model.quant_conv.weight[:channels] *= 3 * std.view(-1, 1, 1, 1, 1)
        model.quant_conv.bias[:channels] = mean
        # the decoder in turn expects latents of that mean and deviation
        model.post_quant_conv.weight /= std.view(1, -1, 1, 1, 1)
    return model


def demo_transformer() -> QwenImageTransformer2DModel:
    """Return a fp32 QwenImageTransformer2DModel of 2 blocks and width 256."""
    from diffusers import QwenImageTransformer2DModel

    model = QwenImageTransformer2DModel(**TRANSFORMER_CONFIG)
    _fill(model, SEED + 1)
    return model


def demo_text_encoder(**dimensions: int) -> Qwen2_5_VLForConditionalGeneration:
    """Return a fp32 Qwen2_5_VLForConditionalGeneration with a vision tower of one block.

    `dimensions` replace those of TEXT_CONFIG: 2 layers of width 256.
    """
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    ids = special_token_ids()
    config = Qwen2_5_VLConfig(
        text_config=TEXT_CONFIG
        | dimensions
        | {"bos_token_id": ids["<|endoftext|>"], "eos_token_id": ids["<|im_end|>"], "dtype": "bfloat16"},
        vision_config=VISION_CONFIG,
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        dtype="bfloat16",
        architectures=["Qwen2_5_VLForConditionalGeneration"],
    )
    model = Qwen2_5_VLForConditionalGeneration(config)
    _fill(model, SEED + 2)
    return model


def hub_text_encoder(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Rename transformers 5's keys to those of the published files: ``model.*``, ``visual.*`` and ``lm_head``."""
    old = {"model.language_model.": "model.", "model.visual.": "visual.", "lm_head.": "lm_head."}
    return {
        next(to + name.removeprefix(start) for start, to in old.items() if name.startswith(start)): tensor
        for name, tensor in tensors.items()
    }


def _bf16(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    import torch

    return {name: tensor.to(torch.bfloat16) for name, tensor in model.state_dict().items()}


def _fill(model: torch.nn.Module, seed: int) -> None:
    """Fill every parameter from one seeded generator: weights keep the variance, norms are near 1, biases near 0."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            for name, parameter in module.named_parameters(recurse=False):
                # Uniform numbers come straight from the generator's bits; normal ones would depend on the CPU's maths.
                noise = (torch.rand(parameter.shape, generator=generator) * 2 - 1) * math.sqrt(3)
                parameter.copy_(noise * _scale(module, name, parameter) + _offset(module, name, parameter))


def _is_norm(name: str, parameter: torch.Tensor) -> bool:
    # a norm's weight has one axis; the VAE's is called gamma and carries axes of length 1
    return name == "gamma" or (name == "weight" and parameter.ndim == 1)


def _scale(module: torch.nn.Module, name: str, parameter: torch.Tensor) -> float:
    import torch

    if isinstance(module, torch.nn.Embedding):
        return 1.0
    if name == "bias" or _is_norm(name, parameter):
        return 0.05
    return 1 / math.sqrt(math.prod(parameter.shape[1:]))


def _offset(module: torch.nn.Module, name: str, parameter: torch.Tensor) -> float:
    return 1.0 if _is_norm(name, parameter) else 0.0
