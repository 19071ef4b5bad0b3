"""A watch on the time of a step: when steps become much slower than their like, memory is usually why.

A GPU whose memory is full spills into main memory (where its driver does so) or makes the allocator start over; a
machine whose main memory is full swaps. Neither is an error, both cost a night.
"""

from __future__ import annotations

import statistics
from collections import defaultdict, deque
from collections.abc import Callable, Hashable

import psutil

ENOUGH = 5
"""Steps of a shape before later ones are compared with them."""
REMEMBERED = 50
SLOW = 2.5
"""Times the median that a step must take to be called slow; steps of one shape vary by some 10 %."""
IN_A_ROW = 3
"""A single slow step has many causes; so many in a row have one."""
GIGABYTE = 1e9


class StepWatch:
    """Compares each step with earlier ones that trained on as much."""

    def __init__(self, facts: Callable[[], str]) -> None:
        """`facts` says how full memory is; see `memory_facts`."""
        self._facts = facts
        self._seconds: dict[Hashable, deque[float]] = defaultdict(lambda: deque(maxlen=REMEMBERED))
        self._slow = 0

    def note(self, seconds: float, shape: Hashable) -> str | None:
        """Note a step's time; return a warning when it is the last of several slow ones, once a series.

        `shape` names what must be equal for two steps to take as long: the pictures' sizes.
        """
        before = self._seconds[shape]
        usual = statistics.median(before) if len(before) >= ENOUGH else None
        if usual is None or seconds < SLOW * usual:
            self._slow = 0 if usual is not None else self._slow
            before.append(seconds)
            return None
        # a slow step is not remembered, so that the slow ones do not become the usual
        self._slow += 1
        if self._slow != IN_A_ROW:
            return None
        return f"{IN_A_ROW} steps in a row took over {SLOW} times as long as usual ({usual:.1f} s); {self._facts()}"


def memory_facts(device) -> str:
    """Return how full the device's memory is, and whether this machine swaps. `device` is a torch device."""
    swap = psutil.swap_memory()
    facts = [
        f"main memory is {psutil.virtual_memory().percent:.0f} % full, {swap.used / GIGABYTE:.1f} GB are swapped out"
    ]
    if device.type == "cuda":
        import torch

        free, total = torch.cuda.mem_get_info(device)
        retries = torch.cuda.memory_stats(device).get("num_alloc_retries", 0)
        used = (total - free) / GIGABYTE
        facts.insert(
            0, f"{used:.1f} of {total / GIGABYTE:.1f} GB of the GPU are in use, {retries} allocations were retried"
        )
    return f"{'; '.join(facts)}. If it stays so, lower batch_size or the resolution, or set gradient_checkpointing"
