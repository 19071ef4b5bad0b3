"""A model's dimensions, told from the shapes of its tensors, so that a bare file needs no config.json.

Every function takes shapes by official name and returns the keyword arguments of the model class. They raise
ValueError with the reason when the shapes do not describe such a model. Nothing here imports torch.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

Shapes = Mapping[str, tuple[int, ...]]

HEAD_DIM = 128
"""Width of one attention head, in every published Qwen-Image transformer and Qwen2.5-VL text model."""
AXES_DIMS_ROPE = (16, 56, 56)
"""How the transformer's 128 rotary dimensions are shared by frame, height and width (its published config)."""


def transformer_config(shapes: Shapes) -> dict:
    """Return the arguments of diffusers' QwenImageTransformer2DModel."""
    head_dim = _shape(shapes, "transformer_blocks.0.attn.norm_q.weight", 1)[0]
    if head_dim != HEAD_DIM:
        raise ValueError(f"its attention heads are {head_dim} wide, not {HEAD_DIM}: the rotary axes are unknown")
    inner, in_channels = _shape(shapes, "img_in.weight")
    layered = "time_text_embed.addition_t_embedding.weight" in shapes
    return {
        "patch_size": 2,
        "in_channels": in_channels,
        "out_channels": _shape(shapes, "proj_out.weight")[0] // 4,
        "num_layers": _count(shapes, "transformer_blocks"),
        "attention_head_dim": head_dim,
        "num_attention_heads": inner // head_dim,
        "joint_attention_dim": _shape(shapes, "txt_in.weight")[1],
        "axes_dims_rope": AXES_DIMS_ROPE,
        "zero_cond_t": "__index_timestep_zero__" in shapes,
        # the layered model is the one with an embedding for its second condition, and it has its own positions
        "use_additional_t_cond": layered,
        "use_layer3d_rope": layered,
    }


def vae_config(shapes: Shapes) -> dict:
    """Return the arguments of diffusers' AutoencoderKLQwenImage; the latents' mean and deviation are its defaults."""
    base_dim, input_channels = _shape(shapes, "encoder.conv_in.weight", 5)[:2]
    # The encoder's blocks are one flat list: residual blocks of a level, its downsampler, the next level's, ...
    widths: list[list[int]] = [[]]
    temporal: list[bool] = []
    for index in range(_count(shapes, "encoder.down_blocks")):
        block = f"encoder.down_blocks.{index}"
        if f"{block}.resample.1.weight" in shapes:
            temporal.append(f"{block}.time_conv.weight" in shapes)
            widths.append([])
        elif f"{block}.conv1.weight" in shapes:
            widths[-1].append(_shape(shapes, f"{block}.conv1.weight", 5)[0])
        else:
            raise ValueError(f"{block} is of an unknown kind")
    if len({len(level) for level in widths}) != 1 or not widths[0]:
        raise ValueError("the levels of its encoder differ in their number of residual blocks")
    return {
        "base_dim": base_dim,
        "z_dim": _shape(shapes, "post_quant_conv.weight", 5)[0],
        "dim_mult": [level[0] // base_dim for level in widths],
        "num_res_blocks": len(widths[0]),
        "attn_scales": [],
        "temperal_downsample": temporal,
        "input_channels": input_channels,
    }


def text_config(shapes: Shapes) -> dict:
    """Return the arguments of transformers' Qwen2_5_VLTextConfig.

    Rotary base, sections and epsilon are those of all published Qwen2.5-VL models.
    """
    vocab_size, hidden_size = _shape(shapes, "embed_tokens.weight")
    query, key = (_shape(shapes, f"layers.0.self_attn.{name}_proj.weight")[0] for name in "qk")
    if query != hidden_size or query % HEAD_DIM or key % HEAD_DIM:
        raise ValueError(f"its attention ({query} and {key} wide) is not made of heads of {HEAD_DIM}")
    return {
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "intermediate_size": _shape(shapes, "layers.0.mlp.gate_proj.weight")[0],
        "num_hidden_layers": _count(shapes, "layers"),
        "num_attention_heads": query // HEAD_DIM,
        "num_key_value_heads": key // HEAD_DIM,
        "max_position_embeddings": 128000,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0, "mrope_section": [16, 24, 24]},
        # the class's defaults lie outside a small vocabulary, and nothing is generated here
        "bos_token_id": None,
        "eos_token_id": None,
    }


CONFIG_OF_ROLE = {"dit": transformer_config, "vae": vae_config, "text_encoder": text_config}

_ASSUMED = (
    "axes_dims_rope",
    "attn_scales",
    "max_position_embeddings",
    "rms_norm_eps",
    "rope_parameters",
    "bos_token_id",
    "eos_token_id",
    "zero_cond_t",
    "use_layer3d_rope",
)
"""Values that shapes do not tell, so config.json has the last word."""


def differences(config: Mapping, inferred: Mapping) -> list[str]:
    """Return where a config.json contradicts the shapes, each as "name is 3 there and 4 in the tensors"."""
    config = config.get("text_config") or config
    return [
        f"{name} is {config[name]} there and {value} in the tensors"
        for name, value in inferred.items()
        if name not in _ASSUMED and config.get(name) is not None and config[name] != value
    ]


def _shape(shapes: Shapes, name: str, axes: int = 2) -> tuple[int, ...]:
    if name not in shapes:
        raise ValueError(f"the tensor {name!r} is missing")
    if len(shapes[name]) != axes:
        raise ValueError(f"the tensor {name!r} has {len(shapes[name])} axes, not {axes}")
    return shapes[name]


def _count(shapes: Shapes, stem: str) -> int:
    """How many blocks ``stem.0`` to ``stem.n-1`` there are; a gap is an error."""
    pattern = re.compile(re.escape(stem) + r"\.(\d+)\.")
    numbers = {int(match[1]) for name in shapes if (match := pattern.match(name))}
    missing = sorted(set(range(max(numbers, default=0) + 1)) - numbers)
    if missing:
        raise ValueError(f"{stem} {', '.join(map(str, missing[:5]))} missing")
    return len(numbers)
