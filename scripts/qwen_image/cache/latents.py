"""Pictures to latents: the VAE's posterior mode, normalised per channel, one file an image.

Shapes: B images, H and W the bucket's sides in pixels, h = H/8, w = W/8.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from itertools import groupby, islice
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from qwen_image.cache import names
from qwen_image.cache.fingerprint import LATENT_ENCODER_VERSION, PREPROCESSING_VERSION
from qwen_image.cache.manifest import LATENT_COLUMNS
from qwen_image.cache.pixels import Picture, PixelReader
from qwen_image.cache.stage import Encoded, Entry, Stopwatch
from qwen_image.container import DTYPE_BYTES, Header
from qwen_image.dataset.buckets import choose_bucket
from qwen_image.dataset.config import DatasetSettings
from qwen_image.dataset.images import image_size
from qwen_image.dataset.items import Item, Reject
from qwen_image.files import FileMemo, is_sha256, sha256_file
from qwen_image.models.checkpoint import open_checkpoint

if TYPE_CHECKING:
    import numpy

    from qwen_image.models.image_vae import ImageVae

HEADER_BYTES = 1500
"""A cache file's header with its metadata, the fingerprint and its parts."""
COMPILED_CODE = "results/torch_compile"
"""Where compiled encoders are kept, unless TORCHINDUCTOR_CACHE_DIR says otherwise."""


class LatentStage:
    """The latent cache of the original (text-to-image) model."""

    title = "cache latents"
    suffix = names.LATENT_SUFFIX
    columns = LATENT_COLUMNS

    def __init__(
        self,
        *,
        vae: str,
        model_identity: str,
        device: str,
        batch_size: int,
        num_workers: int,
        deterministic: bool,
        memo: FileMemo,
    ) -> None:
        """`vae` is a checkpoint path and `model_identity` the hash of its content."""
        self._vae = vae
        self._model_identity = model_identity
        self._device = device
        self._batch_size = batch_size
        self._num_workers = num_workers
        self._deterministic = deterministic
        self._memo = memo
        self.watch = Stopwatch()

    def plan(self, item: Item, settings: DatasetSettings) -> list[Entry]:
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
        picture = Picture(item.image_path, source_sha256, bucket, settings.alpha_background)
        path = Path(settings.cache_directory) / names.latent_file_name(item.stem, (width, height))
        return [Entry(item, path, parts, columns, metadata, picture)]

    def output_bytes(self, entries: list[Entry]) -> list[int]:
        """Return the files' sizes: 16 values a latent position in the dtype that the VAE is stored in."""
        width = DTYPE_BYTES[open_checkpoint(self._vae, "vae").main_dtype()]
        area = names.VAE_SCALE**2
        return [
            HEADER_BYTES + names.LATENT_CHANNELS * width * (entry.payload.bucket[0] * entry.payload.bucket[1] // area)
            for entry in entries
        ]

    def encode(self, entries: list[Entry]) -> Iterator[Encoded | Reject]:
        """Decode and resize in processes that stay a bounded way ahead of the encoder; yield one result an entry."""
        from qwen_image.device import describe_device, pick_device, use_deterministic_algorithms

        device = pick_device(self._device)
        print(f"{self.title}: {describe_device(device)}", file=sys.stderr)
        if self._deterministic:
            use_deterministic_algorithms(device)
        # on a CPU a batch is no faster than its images one by one, and alone each keeps the same bytes
        batch_size = 1 if device == "cpu" or self._deterministic else self._batch_size
        batches = list(_batches(entries, batch_size))
        pictures = [entry.payload for batch in batches for entry in batch]
        ahead = max(2 * self._num_workers, 2 * batch_size)
        with PixelReader(pictures, workers=self._num_workers, ahead=ahead) as reader:
            vae, compiled = self._load(pictures, device)
            deterministic = self._deterministic or (device == "cpu" and not compiled)
            pixels = iter(reader)
            with tqdm(total=len(entries), unit="img", desc=self.title, ncols=100) as bar:
                for batch in batches:
                    yield from self._encode_batch(vae, batch, list(islice(pixels, len(batch))), deterministic)
                    bar.update(len(batch))

    def _load(self, pictures: list[Picture], device: str) -> tuple[ImageVae, bool]:
        """Return the VAE and whether it was compiled, which the work ahead must be worth."""
        from qwen_image.models.image_vae import worth_compiling
        from qwen_image.models.vae import load_vae

        vae = load_vae(self._vae, device=device)
        total = sum(picture.bucket[0] * picture.bucket[1] for picture in pictures)
        if self._deterministic or not worth_compiling(total, vae.config["base_dim"], device):
            return vae, False
        return vae, vae.compile(COMPILED_CODE)

    def _encode_batch(
        self, vae: ImageVae, batch: list[Entry], pixels: list[numpy.ndarray | str], deterministic: bool
    ) -> Iterator[Encoded | Reject]:
        import numpy
        import torch

        yield from (entry.reject(one) for entry, one in zip(batch, pixels, strict=True) if isinstance(one, str))
        decoded = [(entry, one) for entry, one in zip(batch, pixels, strict=True) if not isinstance(one, str)]
        if not decoded:
            return
        with self.watch:
            latents = vae.encode_pixels(numpy.stack([one for _, one in decoded])).cpu()
        for (entry, _), latent in zip(decoded, latents, strict=True):
            if not torch.isfinite(latent).all():
                yield entry.reject("the VAE gave NaN or Inf; check the picture, or use a float32 VAE file")
                continue
            dtype = str(latent.dtype).removeprefix("torch.")
            tensors = {names.latent_tensor_name(entry.payload.bucket, dtype): latent.clone()}
            yield Encoded(entry, tensors, deterministic)

    def describe(self, header: Header) -> dict[str, object]:
        """Read the stored dtype off the file."""
        (tensor,) = header.tensors.values()
        return {"dtype": tensor.torch_dtype}

    def misfit(self, entry: Entry, header: Header) -> str | None:
        """Return why another program's file is no latent of this image in this bucket."""
        if len(header.tensors) != 1:
            return f"it holds {len(header.tensors)} tensors, not one"
        ((name, info),) = header.tensors.items()
        width, height = entry.payload.bucket
        shape = (names.LATENT_CHANNELS, 1, height // names.VAE_SCALE, width // names.VAE_SCALE)
        if name != names.latent_tensor_name(entry.payload.bucket, info.torch_dtype) or info.shape != shape:
            return f"it holds {name} {info.shape}; the bucket {width}x{height} needs {shape}"
        differing = [key for key, value in entry.metadata.items() if header.metadata.get(key) != value]
        return f"its metadata says otherwise: {', '.join(differing)}" if differing else None


def _batches(entries: list[Entry], batch_size: int) -> Iterator[list[Entry]]:
    """Group by bucket; the order is the bucket's, then the item's."""
    ordered = sorted(entries, key=lambda entry: entry.payload.bucket)
    for _, same_bucket in groupby(ordered, key=lambda entry: entry.payload.bucket):
        while batch := list(islice(same_bucket, batch_size)):
            yield batch


def is_hash_and_size(values: list) -> bool:
    """Whether remembered values are what a picture is known by: the hash of its file, its upright width and height."""
    return len(values) == 3 and is_sha256(values[0]) and all(type(side) is int for side in values[1:])


def _hash_and_size(path: str | Path) -> list:
    return [sha256_file(path), *image_size(path)]
