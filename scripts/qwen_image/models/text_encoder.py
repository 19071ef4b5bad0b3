"""Loading the language model of Qwen2.5-VL: no vision tower, no head, if wanted with its linear weights in fp8."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import Qwen2_5_VLConfig
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLTextConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLTextModel

from qwen_image.models.checkpoint import Checkpoint, open_checkpoint
from qwen_image.models.float8 import use_float8
from qwen_image.models.streaming import empty_model, fill


def load_text_encoder(
    path: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    fp8: bool = False,
) -> Qwen2_5_VLTextModel:
    """Load the text model from a file, sharded set, folder or pipeline.

    With ``fp8`` each linear weight is stored as float8_e4m3fn while it streams in (the whole model never exists in
    ``dtype``) and computing is done in ``dtype``; embeddings, norms and biases stay in ``dtype``. Returns it in eval
    mode without gradients. Raises InputError.
    """
    checkpoint = open_checkpoint(path, "text_encoder")
    config = _text_config(checkpoint)
    # the model's own dtype is what transformers casts masks and reports as model.dtype to
    config.dtype = dtype
    model = empty_model(lambda: Qwen2_5_VLTextModel(config))
    if fp8:
        use_float8(model, dtype)
    return fill(model, checkpoint, device, dtype)


def _text_config(checkpoint: Checkpoint) -> Qwen2_5_VLTextConfig:
    config = checkpoint.model_config()
    if checkpoint.config is None or config["model_type"] == "qwen2_5_vl_text":
        return Qwen2_5_VLTextConfig(**config)
    # the published config.json is flat, newer ones nest the text part; the class knows both
    return Qwen2_5_VLConfig(**config).text_config
