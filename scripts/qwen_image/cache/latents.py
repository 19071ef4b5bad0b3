"""Pictures to latents: the VAE's posterior mode, normalised per channel, one file an image.

Shapes: B images, H and W the bucket's sides in pixels, h = H/8, w = W/8.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby, islice
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from qwen_image.cache import names
from qwen_image.cache.fingerprint import LATENT_ENCODER_VERSION, PREPROCESSING_VERSION
from qwen_image.cache.manifest import LATENT_COLUMNS
from qwen_image.cache.update import Encoded, Entry
from qwen_image.container import Header
from qwen_image.dataset.buckets import choose_bucket
from qwen_image.dataset.config import DatasetSettings
from qwen_image.dataset.images import ImageError, fit_to_bucket, image_size, load_image
from qwen_image.dataset.items import Item, Reject
from qwen_image.files import FileMemo, sha256_file

if TYPE_CHECKING:
    import numpy
    import torch
    from diffusers import AutoencoderKLQwenImage


@dataclass(frozen=True)
class _Picture:
    bucket: tuple[int, int]
    background: str


class LatentStage:
    """The latent cache of the original (text-to-image) model."""

    title = "cache latents"
    suffix = names.LATENT_SUFFIX
    columns = LATENT_COLUMNS

    def __init__(
        self, *, vae: str, model_identity: str, device: str, batch_size: int, num_workers: int, memo: FileMemo
    ) -> None:
        """`vae` is a checkpoint path and `model_identity` the hash of its content."""
        self._vae = vae
        self._model_identity = model_identity
        self._device = device
        self._batch_size = batch_size
        self._num_workers = num_workers
        self._memo = memo

    def plan(self, item: Item, settings: DatasetSettings) -> Entry:
        """Choose the bucket from the upright size and name what the latent is made from."""
        source_sha256, width, height = self._memo.value(item.image_path, _hash_and_size)
        bucket = choose_bucket((width, height), settings.resolution, settings.enable_bucket, settings.bucket_no_upscale)
        parts = {
            "kind": "latents",
            "architecture": names.ARCHITECTURE_TAG,
            "source": source_sha256,
            "bucket": f"{bucket[0]}x{bucket[1]}",
            "background": settings.alpha_background,
            "preprocessing": PREPROCESSING_VERSION,
            "encoder": LATENT_ENCODER_VERSION,
            "model": self._model_identity,
        }
        columns = {
            "width": width, "height": height, "bucket_width": bucket[0], "bucket_height": bucket[1],
            "source_sha256": source_sha256,
        }  # fmt: skip
        metadata = {
            "architecture": names.ARCHITECTURE, "format_version": names.FORMAT_VERSION,
            "width": str(width), "height": str(height),
        }  # fmt: skip
        path = Path(settings.cache_directory) / names.latent_file_name(item.stem, (width, height))
        return Entry(item, path, parts, columns, metadata, _Picture(bucket, settings.alpha_background))

    def encode(self, entries: list[Entry]) -> Iterator[Encoded | Reject]:
        """Decode and resize in threads that stay a bounded way ahead of the encoder; yield one result an entry."""
        from qwen_image.device import pick_device
        from qwen_image.models.vae import load_vae

        device = pick_device(self._device)
        vae = load_vae(self._vae, device=device)
        # on a CPU a batch is no faster than its images one by one, and alone each keeps the same bytes
        batch_size = 1 if device == "cpu" else self._batch_size
        with tqdm(total=len(entries), unit="img", desc=self.title, ncols=100) as bar:
            for group in _groups(entries, batch_size, self._num_workers):
                yield from _encode_group(vae, group)
                bar.update(len(group))

    def describe(self, header: Header) -> dict[str, object]:
        """Read the stored dtype off the file."""
        return {"dtype": _only_tensor(header).torch_dtype}


def encode_pixels(vae: AutoencoderKLQwenImage, pixels: numpy.ndarray) -> torch.Tensor:
    """Encode uint8 RGB pixels (B, H, W, 3) to normalised latents (B, 16, 1, h, w) in the VAE's dtype.

    The posterior's mode, then (z - mean) * (1/std) with both vectors cast to the VAE's dtype first, as the field's
    training code expects it.
    """
    import torch

    x_bchw = torch.from_numpy(pixels).to(vae.device).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.inference_mode():
        z_bcfhw = vae.encode(x_bchw.to(vae.dtype).unsqueeze(2)).latent_dist.mode()
        mean, std = (
            torch.tensor(values, dtype=vae.dtype, device=vae.device).view(1, -1, 1, 1, 1)
            for values in (vae.config.latents_mean, vae.config.latents_std)
        )
        return (z_bcfhw - mean) * (1.0 / std)


def _encode_group(vae: AutoencoderKLQwenImage, group: list[tuple[Entry, Future]]) -> Iterator[Encoded | Reject]:
    import numpy
    import torch

    decoded = []
    for entry, future in group:
        try:
            decoded.append((entry, future.result()))
        except (ImageError, OSError) as error:
            yield _reject(entry, str(error))
    if not decoded:
        return
    latents = encode_pixels(vae, numpy.stack([pixels for _, pixels in decoded])).cpu()
    for (entry, _), latent in zip(decoded, latents, strict=True):
        if not torch.isfinite(latent).all():
            yield _reject(entry, "the VAE gave NaN or Inf; check the picture, or use a float32 VAE file")
            continue
        dtype = str(latent.dtype).removeprefix("torch.")
        yield Encoded(entry, {names.latent_tensor_name(entry.payload.bucket, dtype): latent.clone()})


def _groups(entries: list[Entry], batch_size: int, num_workers: int) -> Iterator[list[tuple[Entry, Future]]]:
    """Yield batches of one bucket with their pictures under way; at most `ahead` pictures are held in memory."""
    ahead = max(2 * num_workers, 2 * batch_size)
    with ThreadPoolExecutor(max(1, num_workers), thread_name_prefix="decode") as pool:
        batches = _batches(entries, batch_size)
        waiting: list[list[tuple[Entry, Future]]] = []
        held = 0
        try:
            while True:
                while held < ahead and (batch := next(batches, None)):
                    waiting.append([(entry, pool.submit(_pixels, entry)) for entry in batch])
                    held += len(batch)
                if not waiting:
                    return
                group = waiting.pop(0)
                yield group
                held -= len(group)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _batches(entries: list[Entry], batch_size: int) -> Iterator[list[Entry]]:
    """Group by bucket, biggest picture first within none: the order is the bucket's, then the item's."""
    ordered = sorted(entries, key=lambda entry: entry.payload.bucket)
    for _, same_bucket in groupby(ordered, key=lambda entry: entry.payload.bucket):
        members: Iterable[Entry] = iter(same_bucket)
        while batch := list(islice(members, batch_size)):
            yield batch


def _pixels(entry: Entry) -> numpy.ndarray:
    picture: _Picture = entry.payload
    return fit_to_bucket(load_image(entry.item.image_path, picture.background), picture.bucket)


def _hash_and_size(path: str | Path) -> list:
    return [sha256_file(path), *image_size(path)]


def _reject(entry: Entry, reason: str) -> Reject:
    return Reject(entry.item.dataset, entry.item.key, entry.item.image_path, reason)


def _only_tensor(header: Header):
    (tensor,) = header.tensors.values()
    return tensor
