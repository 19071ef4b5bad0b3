"""Which device a stage runs on."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

from qwen_image.problems import InputError, Problem


def pick_device(name: str, *, key: str = "--device") -> str:
    """Return the torch device to use: the one named; for ``auto`` the GPU if there is one, else the CPU.

    Raises InputError when a GPU is asked for that torch does not see.
    """
    import torch

    seen = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        return "cuda" if seen else "cpu"
    if name.startswith("cuda") and int(name.partition(":")[2] or 0) >= seen:
        mend = "use cpu, or install the GPU build of torch and its driver"
        raise InputError([Problem(file="device", key=key, found=f"{name}, but torch sees {seen} GPUs", mend=mend)])
    return name


def describe_device(device: str) -> str:
    """Return what the last bits of a result depend on, for a stage's log: ``computed on cpu, 2 threads``."""
    import torch

    if device.startswith("cuda"):
        return f"computed on cuda, {torch.cuda.get_device_name(device)}"
    threads = torch.get_num_threads()
    return f"computed on {device}, {threads} {'thread' if threads == 1 else 'threads'}"


def use_deterministic_algorithms(device: str) -> None:
    """Let this process compute the same bits from the same input every time. Slower on a GPU, free on a CPU."""
    import torch

    if device != "cpu":
        prepare_deterministic_algorithms()
        torch.use_deterministic_algorithms(True)


def prepare_deterministic_algorithms() -> None:
    """Set what `deterministic_algorithms` needs; call it before anything is computed on a GPU."""
    import torch

    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # read when cuBLAS starts
    torch.backends.cudnn.benchmark = False
    # nothing here reads memory that it did not write
    torch.utils.deterministic.fill_uninitialized_memory = False


@contextlib.contextmanager
def deterministic_algorithms(device: str) -> Iterator[None]:
    """Compute the same bits from the same input within the block; what has no algorithm for that is an error there."""
    import torch

    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(before or device != "cpu")
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
