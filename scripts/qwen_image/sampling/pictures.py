"""Sample pictures during training: when they are due, and making them without leaving a trace in the training."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from qwen_image.cache.prompts import read_prompts, text_sha256
from qwen_image.files import atomic_write
from qwen_image.models.checkpoint import check_checkpoint
from qwen_image.problems import InputError, Problem
from qwen_image.sampling.generate import (
    decode,
    evaluating,
    generate_latents,
    initial_noise,
    make_schedule,
    scheduler_config,
)
from qwen_image.sampling.prompts import SamplePrompt, load_prompts
from qwen_image.training.items import TEXT_PREFIX, CacheFile
from qwen_image.training.loading import read_tensor

if TYPE_CHECKING:
    from diffusers import QwenImageTransformer2DModel
    from PIL import Image

    from qwen_image.models.image_vae import ImageVae
    from qwen_image.training.arguments import Settings
    from qwen_image.training.batches import Step

log = logging.getLogger(__name__)


class Painter:
    """Makes the pictures of a list of prompts with whatever weights the transformer has.

    The embeddings are read from the cache each time; the VAE is loaded once, and is on the device only while it works.
    """

    def __init__(
        self,
        prompts: Sequence[SamplePrompt],
        *,
        manifest: str | None,
        dit: str,
        vae: str | None,
        device: torch.device,
    ) -> None:
        """Raises InputError when there is no VAE, or a text is not in the manifest."""
        self.prompts = prompts
        problems = _wrong_vae(vae)
        files, missing = _find_texts(prompts, manifest)
        if problems + missing:
            raise InputError(problems + missing)
        self._files = files
        self._scheduler_config = scheduler_config(dit)
        self._vae_path = vae
        self._vae: ImageVae | None = None
        self._device = device

    def paint(self, transformer: QwenImageTransformer2DModel, prompt: SamplePrompt) -> Image.Image:
        """Return one picture."""
        with evaluating(transformer):
            latents_bc1hw = generate_latents(
                transformer,
                initial_noise(prompt),
                self._embedding(prompt.prompt),
                self._embedding(prompt.negative_prompt) if prompt.guided else None,
                make_schedule(self._scheduler_config, prompt),
                cfg_scale=prompt.cfg_scale,
                seed=prompt.seed,
            )
        if self._vae is None:
            from qwen_image.models.vae import load_vae

            self._vae = load_vae(self._vae_path)
        try:
            return decode(self._vae.to(self._device), latents_bc1hw)
        finally:
            self._vae.to("cpu")

    def _embedding(self, text: str) -> torch.Tensor:
        return read_tensor(self._files[text], TEXT_PREFIX)


class SamplePictures:
    """The sample pictures of a training; with none of the sample keys set it does nothing and reads nothing."""

    def __init__(self, settings: Settings, device: torch.device) -> None:
        """Raises InputError when the prompt file is bad, or something that the pictures need is missing."""
        self._steps = settings.sample_every_n_steps
        self._epochs = settings.sample_every_n_epochs
        self._folder = Path(settings.output_dir, "sample")
        self._name = settings.output_name
        self._painter = None
        self.failures: list[str] = []
        """What went wrong, to be said again when the training ends."""
        if self._steps or self._epochs or settings.sample_at_first:
            self._painter = Painter(
                load_prompts(settings.sample_prompts, seed=settings.seed),
                manifest=settings.prompts_manifest,
                dit=settings.dit,
                vae=settings.vae,
                device=device,
            )

    def due(self, step: Step, *, last: bool) -> bool:
        """Whether pictures are made after this step: every so many steps or epochs, and after the last one."""
        if not self._steps and not self._epochs:
            return False
        return last or self._due_by_epoch(step.epoch if step.ends_epoch else None) or self._due_by_step(step.number)

    def make(self, transformer: QwenImageTransformer2DModel, *, step: int, epoch: int | None) -> list[Path]:
        """Make the pictures of every prompt and return their files; `epoch` is the one that ends with this step.

        What goes wrong is said and costs the pictures, not the training.
        """
        paths: list[Path] = []
        if self._painter is None:
            return paths
        mark = f"e{epoch:06d}" if self._due_by_epoch(epoch) else f"{step:06d}"
        for index, prompt in enumerate(self._painter.prompts):
            path = self._folder / f"{self._name}_{mark}_{index:02d}_{prompt.seed}.png"
            try:
                save_picture(path, self._painter.paint(transformer, prompt))
            except Exception as error:  # out of memory, a full disk, a lost cache file: none is worth a training
                reason = str(error).strip() or type(error).__name__
                self.failures.append(f"step {step}: no sample picture {path.name}: {reason}")
                log.warning("train: %s; the training goes on", self.failures[-1])
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()
                break
            paths.append(path)
        return paths

    def _due_by_epoch(self, epoch: int | None) -> bool:
        return bool(self._epochs and epoch and epoch % self._epochs == 0)

    def _due_by_step(self, step: int) -> bool:
        return bool(self._steps and step % self._steps == 0)


def save_picture(path: Path, picture: Image.Image) -> None:
    """Write a PNG file whole or not at all."""
    stream = BytesIO()
    picture.save(stream, format="PNG")
    atomic_write(path, stream.getvalue())


def _wrong_vae(vae: str | None) -> list[Problem]:
    if vae is None:
        mend = "set it to the VAE's checkpoint, or remove the keys of sample pictures"
        return [Problem(file="settings", key="vae", found="is not set; sample pictures need it", mend=mend)]
    return check_checkpoint(vae, "vae")


def _find_texts(prompts: Sequence[SamplePrompt], manifest: str | None) -> tuple[dict[str, CacheFile], list[Problem]]:
    """Return the cache file of each text, and a problem for each that is in no cache."""
    mend = "run scripts/qwen_image_cache_prompts.py with these prompts; the workflow does it by itself"
    if manifest is None:
        found = "is not set; sample pictures need the embeddings of their prompts"
        return {}, [Problem(file="settings", key="prompts_manifest", found=found, mend=mend)]
    cached = read_prompts(manifest)
    files, problems = {}, []
    for text in dict.fromkeys(text for prompt in prompts for text in prompt.texts):
        file = cached.get(text_sha256(text))
        if file is None:
            problems.append(Problem(file=manifest, key=repr(text), found="this text is not cached", mend=mend))
        else:
            files[text] = file
    return files, problems
