"""What the processes of one training decide together."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from qwen_image.problems import InputError

if TYPE_CHECKING:
    from accelerate import Accelerator

T = TypeVar("T")


def first_decides(accelerator: Accelerator, decide: Callable[[], T]) -> T:
    """Return in every process what `decide` returns in the first one, where alone it is called.

    Raises InputError in all of them when it does there, so that none waits for the others.
    """
    from accelerate.utils import broadcast_object_list

    found: list[T | InputError | None] = [None]
    if accelerator.is_main_process:
        try:
            found = [decide()]
        except InputError as error:
            found = [error]
    decided = broadcast_object_list(found)[0] if accelerator.num_processes > 1 else found[0]
    if isinstance(decided, InputError):
        raise decided
    return decided
