"""From a plan of batches to tensors: cache files are read and noise is drawn, in worker processes.

B items, C latent channels (16), h and w latent sides, L text tokens, D hidden size of the text.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch.utils.data import DataLoader, Dataset

from qwen_image.cache.fingerprint import DATA_KEY
from qwen_image.container import data_sha256
from qwen_image.problems import InputError, Problem
from qwen_image.training.batches import Batch
from qwen_image.training.items import LATENT_PREFIX, RERUN, TEXT_PREFIX, CacheFile, TrainingItem, find_tensor
from qwen_image.training.randomness import generator

if TYPE_CHECKING:
    from qwen_image.training.captions import CaptionChoice
    from qwen_image.training.noise_levels import NoiseLevels


class LoadedBatch(NamedTuple):
    """One batch as tensors."""

    latents_bc1hw: torch.Tensor
    noise_bc1hw: torch.Tensor
    t_b: torch.Tensor
    weight_b: torch.Tensor
    """What each item counts in the loss."""
    text_bld: torch.Tensor
    mask_bl: torch.Tensor | None
    """True where there is a token; None when no caption is padded."""

    def to(self, device: torch.device) -> LoadedBatch:
        """Return the batch on a device."""
        moved = (None if tensor is None else tensor.to(device, non_blocking=True) for tensor in self)
        return LoadedBatch(*moved)


class CachedBatches(Dataset):
    """Maps a planned batch to its tensors. The result depends on the plan alone, not on what was loaded before."""

    def __init__(
        self, items: Sequence[TrainingItem], levels: NoiseLevels, captions: CaptionChoice, *, seed: int
    ) -> None:
        self._items = items
        self._levels = levels
        self._captions = captions
        self._seed = seed

    def __getitem__(self, batch: Batch) -> LoadedBatch | InputError:
        """Read the batch's files and draw its noise.

        A bad file's error is returned, not raised: torch would raise another in its place on the way out of a worker.
        """
        try:
            return self._load(batch)
        except InputError as error:
            return error

    def _load(self, batch: Batch) -> LoadedBatch:
        latents, noises, levels, weights, texts = [], [], [], [], []
        for index, repeat in batch.draws:
            item = self._items[index]
            latent = read_tensor(item.latents, LATENT_PREFIX).float()
            latents.append(latent)
            # not the step but the visit is named, so the draw does not depend on how the batches were cut
            random = generator("noise", self._seed, batch.epoch, item.dataset, item.key, repeat)
            noises.append(torch.randn(latent.shape, generator=random))
            tokens = latent.shape[-2] * latent.shape[-1] // 4
            levels.append(self._levels.level(index, batch.epoch, repeat, tokens))
            weights.append(self._levels.visit_weight(index, levels[-1]))
            texts.append(read_tensor(self._captions.file(item, batch.epoch, repeat), TEXT_PREFIX))
        text_bld, mask_bl = pad_text(texts)
        return LoadedBatch(
            torch.stack(latents), torch.stack(noises), torch.tensor(levels), torch.tensor(weights), text_bld, mask_bl
        )


def make_loader(
    batches: Iterable[Batch], dataset: CachedBatches, *, workers: int, pin_memory: bool, persistent: bool
) -> DataLoader:
    """Return a loader over the batches of the whole training, in their order whatever the number of workers."""
    return DataLoader(
        dataset,
        sampler=batches,
        batch_size=None,
        num_workers=workers,
        collate_fn=_as_it_is,
        pin_memory=pin_memory,
        persistent_workers=persistent and workers > 0,
        worker_init_fn=_outlive_one_sigterm,
        # its own generator: the default would take a number from the global one
        generator=torch.Generator().manual_seed(0),
    )


def worker_count(wanted: int, processes_here: int) -> int:
    """Return the number of workers for one process: what is wanted, but never more than its share of the CPUs."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(wanted, max(1, cpus // processes_here))


def pad_text(texts: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return embeddings (L, D) of several lengths as (B, L, D) with zeros behind, and the mask where some are."""
    lengths = torch.tensor([len(text) for text in texts])
    text_bld = torch.nn.utils.rnn.pad_sequence(list(texts), batch_first=True)
    mask_bl = torch.arange(text_bld.shape[1])[None, :] < lengths[:, None]
    return text_bld, None if mask_bl.all() else mask_bl


def read_tensor(file: CacheFile, prefix: str) -> torch.Tensor:
    """Read a cache file's tensor.

    Raises InputError when the file went away or changed since it was checked, or when a bit of it did since it was
    written.
    """
    try:
        with safe_open(file.path, "pt") as stream:
            tensors = {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118, it is no mapping
            written = (stream.metadata() or {}).get(DATA_KEY)
        tensor = tensors[find_tensor(list(tensors), prefix)]
    except (OSError, SafetensorError, KeyError) as error:
        found = f"changed or went away during the training ({error})"
        raise InputError([Problem(file=file.path, found=found, mend=RERUN)]) from error
    if written is not None and written != data_sha256(tensors):
        found = "is damaged: its values are not those that were written"
        raise InputError([Problem(file=file.path, found=found, mend=f"delete it, and {RERUN}")])
    return tensor


def _outlive_one_sigterm(_worker: int) -> None:
    """Let a worker live on when a scheduler signals every process of its job: one more step needs it.

    A second signal ends it: that is how multiprocessing ends workers that are left behind.
    """
    signal.signal(signal.SIGTERM, lambda number, _: signal.signal(number, signal.SIG_DFL))


def _as_it_is(batch: LoadedBatch | InputError) -> LoadedBatch | InputError:
    return batch
