"""A moving average of the adapter's weights: what is saved, validated and sampled when ``ema_decay`` is set."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch


class Average:
    """An exponential moving average of parameters, in float32 on their device."""

    def __init__(self, parameters: Sequence[torch.nn.Parameter], decay: float) -> None:
        """`decay` is the share that the average keeps of itself in a step, in (0, 1)."""
        self._parameters = list(parameters)
        self._decay = decay
        self.updates = 0
        self.values = [parameter.detach().clone().float() for parameter in self._parameters]

    @torch.no_grad()
    def update(self) -> None:
        """Move towards the parameters; early on faster, or the average would hold the start for long."""
        self.updates += 1
        decay = min(self._decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(self.values, [parameter.float() for parameter in self._parameters], 1 - decay)

    def state_dict(self) -> dict[str, object]:
        """Return what `load_state_dict` needs."""
        return {"updates": self.updates, "values": self.values}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, object]) -> None:
        """Go on from a state, to the bit."""
        self.updates = state["updates"]
        for value, saved in zip(self.values, state["values"], strict=True):
            value.copy_(saved)

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Let the parameters hold the average for a while."""
        own = [parameter.detach().clone() for parameter in self._parameters]
        self._fill(self.values)
        try:
            yield
        finally:
            self._fill(own)

    @torch.no_grad()
    def _fill(self, values: Sequence[torch.Tensor]) -> None:
        for parameter, value in zip(self._parameters, values, strict=True):
            parameter.copy_(value)
