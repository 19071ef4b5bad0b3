"""What a training follows from: the settings and the inputs that bear on its result. Imports no torch.

A state is gone on from only with the same of both, so that what comes out is what an uninterrupted training gives.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from qwen_image.dataset.config import load_dataset_config
from qwen_image.files import sha256_file
from qwen_image.models.checkpoint import checkpoint_files
from qwen_image.models.identity import model_identity
from qwen_image.problems import InputError, Problem
from qwen_image.training.captions import empty_caption

if TYPE_CHECKING:
    from collections.abc import Callable

    from qwen_image.training.arguments import Settings

LENGTH = frozenset({"max_train_steps", "max_train_epochs"})
"""Settings that say how far a training goes: a larger number extends one."""
INPUTS = frozenset({
    "dataset_config", "latents_manifest", "text_encoder_outputs_manifest", "dit", "network_weights", "base_weights",
})  # fmt: skip
"""Settings that name an input. What it holds bears on the result, not where it lies."""
TRACKERS = frozenset({
    "logging_dir", "log_with", "log_prefix", "log_tracker_name", "log_tracker_config", "log_config", "wandb_run_name",
    "wandb_api_key",
})  # fmt: skip
"""Settings of where a training is logged."""
COPIES = frozenset({
    "huggingface_repo_id", "huggingface_repo_type", "huggingface_path_in_repo", "huggingface_token",
    "huggingface_repo_visibility", "save_state_to_huggingface", "resume_from_huggingface", "async_upload",
})  # fmt: skip
"""Settings of copies elsewhere."""
BESIDE = TRACKERS | COPIES | frozenset({
    # names and checks
    "config_file", "vae", "text_encoder", "num_layers", "model_version", "show_timesteps",
    # how the work is shared out, which changes no number
    "max_data_loader_n_workers", "persistent_data_loader_workers", "gradient_checkpointing", "ddp_timeout",
    "ddp_gradient_as_bucket_view", "ddp_static_graph",
    # what is written, when and where
    "output_dir", "output_name", "save_precision", "save_format", "save_every_n_epochs", "save_every_n_steps",
    "save_last_n_epochs", "save_last_n_steps", "save_state", "save_state_on_train_end", "save_state_every_n_minutes",
    "save_last_n_epochs_state", "save_last_n_steps_state", "resume", "stop_before", "max_skipped_steps",
    "validate_every_n_steps", "validate_every_n_epochs",
    # what the file says about itself
    "no_metadata", "training_comment", "metadata_title", "metadata_author", "metadata_description",
    "metadata_license", "metadata_tags", "metadata_reso", "metadata_arch",
    # what is shown meanwhile
    "sample_every_n_steps", "sample_every_n_epochs", "sample_at_first", "sample_prompts", "prompts_manifest",
})  # fmt: skip
"""Settings that change no weight."""
IN_THE_MANIFESTS = frozenset({
    "image_directory", "image_jsonl_file", "cache_directory", "control_directory", "caption_extension", "resolution",
    "enable_bucket", "bucket_no_upscale", "multiple_captions", "multiple_target", "no_resize_control",
    "control_resolution", "alpha_background",
})  # fmt: skip
"""Settings of a dataset that bear on its cache files alone, which the manifests describe."""


def result_settings(settings: Settings) -> dict[str, object]:
    """Return the settings that bear on the trained weights, but for the training's length and the inputs' paths."""
    return {key: value for key, value in settings.as_dict().items() if key not in LENGTH | INPUTS | BESIDE}


def inputs_digest(settings: Settings) -> dict[str, str]:
    """Return what the training's inputs hold, by name: hashes of files, and the datasets' settings as JSON.

    Raises InputError for an input that cannot be read. Checkpoints are hashed once and remembered beside the manifests.
    """
    folder = Path(settings.latents_manifest).parent
    digests = {
        "datasets": json.dumps(dataset_settings(settings.dataset_config), sort_keys=True),
        "latents_manifest": _readable(settings.latents_manifest, sha256_file),
        "text_encoder_outputs_manifest": _readable(settings.text_encoder_outputs_manifest, sha256_file),
        "dit": _readable(settings.dit, lambda path: model_identity(checkpoint_files(path, "dit"), folder)),
    }
    if (empty := empty_caption(settings)) is not None:
        digests["empty_caption"] = empty.fingerprint
    adapters = {"network_weights": settings.network_weights} if settings.network_weights is not None else {}
    adapters |= {f"base_weights[{number}]": path for number, path in enumerate(settings.base_weights or [])}
    return digests | {
        key: _readable(path, lambda path: model_identity([path], folder)) for key, path in adapters.items()
    }


def dataset_settings(dataset_config: str) -> list[dict[str, object]]:
    """Return the settings of each dataset that bear on the training itself."""
    return [
        {key: value for key, value in asdict(dataset).items() if key not in IN_THE_MANIFESTS}
        for dataset in load_dataset_config(dataset_config)
    ]


def _readable(path: str, compute: Callable[[str], str]) -> str:
    try:
        return compute(path)
    except OSError as error:
        found, mend = f"cannot be read ({error.strerror})", "make the file readable, or name another one"
        raise InputError([Problem(file=path, found=found, mend=mend)]) from error
