"""Running the text model on token lists that begin alike: the common beginning runs once, and nothing is padded.

Shapes: N tokens in a row, those of all lists one after the other; C tokens of the prefix before a list's own S ones;
B lists; H heads, G key-value heads of size E; D the model's width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, groupby

import torch
from torch.nn import functional
from transformers import AttentionInterface, DynamicCache
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLTextModel

ATTENTION = "shared_prefix"
"""The name under which transformers' models find `_attend`."""


class PrefixEncoder:
    """A text model that knows the keys and values of a prefix, which is causal: what follows does not change them."""

    def __init__(self, model: Qwen2_5_VLTextModel, prefix: Sequence[int]) -> None:
        """Run the prefix. From now on the model serves this encoder alone."""
        self._model = model
        self._prefix = list(prefix)
        self._states = DynamicCache(config=model.config)
        with torch.inference_mode():
            model(input_ids=torch.tensor([self._prefix], device=model.device), past_key_values=self._states)
        model.set_attn_implementation(ATTENTION)

    def encode(self, token_lists: Sequence[Sequence[int]]) -> list[torch.Tensor]:
        """Return each list's last hidden states behind as many tokens as the prefix has, (tokens, D), on the CPU.

        Each list must be longer than the prefix, but need not begin with it: of a list that departs from the prefix
        only as much is shared as is equal. The linear layers see the tokens of all lists as one sequence; attention
        keeps the lists apart, so that one that gives NaN spoils no other.
        """
        parts = [_Part(index, ids, _equal(self._prefix, ids)) for index, ids in enumerate(token_lists)]
        parts.sort(key=lambda part: part.shape)
        ids_1n = torch.tensor([list(chain.from_iterable(part.ids[part.shared :] for part in parts))])
        positions_1n = torch.cat([torch.arange(part.shared, len(part.ids)) for part in parts])[None]
        device = self._model.device
        with torch.inference_mode():
            hidden_1nd = self._model(
                input_ids=ids_1n.to(device),
                position_ids=positions_1n.to(device),
                attention_mask=dict.fromkeys(self._model.config.layer_types),  # the runs have their own
                use_cache=False,
                prefix=self._states,
                runs=list(_runs(parts, device, self._model.dtype)),
            ).last_hidden_state.cpu()
        hidden_sd = hidden_1nd[0].split([len(part.ids) - part.shared for part in parts])
        kept = {part.index: h[len(self._prefix) - part.shared :] for part, h in zip(parts, hidden_sd, strict=True)}
        return [kept[index] for index in range(len(parts))]


@dataclass(frozen=True)
class _Part:
    """One list: where it stood, and how many of its first tokens are the prefix's."""

    index: int
    ids: Sequence[int]
    shared: int

    @property
    def shape(self) -> tuple[int, int]:
        return self.shared, len(self.ids)


@dataclass(frozen=True)
class _Run:
    """Neighbouring lists of one shape, which attention takes together."""

    rows: slice
    """Where their tokens lie among the N."""
    count: int
    shared: int
    mask_sk: torch.Tensor
    """Added to the scores: what each of S tokens sees of the C + S keys."""


def _equal(prefix: Sequence[int], ids: Sequence[int]) -> int:
    """How many of the first tokens are equal."""
    pairs = enumerate(zip(prefix, ids, strict=False))
    return next((position for position, (one, other) in pairs if one != other), len(prefix))


def _runs(parts: list[_Part], device: torch.device, dtype: torch.dtype) -> Iterator[_Run]:
    start = 0
    for (shared, length), same in groupby(parts, key=lambda part: part.shape):
        count, own = len(list(same)), length - shared
        hidden_sk = torch.ones(own, length, dtype=torch.bool, device=device).triu(shared + 1)
        mask_sk = torch.zeros(own, length, dtype=dtype, device=device).masked_fill_(hidden_sk, float("-inf"))
        yield _Run(slice(start, start + count * own), count, shared, mask_sk)
        start += count * own


def _attend(
    module: torch.nn.Module,
    query_1hne: torch.Tensor,
    key_1gne: torch.Tensor,
    value_1gne: torch.Tensor,
    attention_mask: None,
    *,
    scaling: float,
    prefix: DynamicCache,
    runs: list[_Run],
    **_others: object,
) -> tuple[torch.Tensor, None]:
    """Attention in the form that transformers calls; returns (1, N, H, E)."""
    layer = prefix.layers[module.layer_idx]
    query_nhe, key_nge, value_nge = (states[0].transpose(0, 1) for states in (query_1hne, key_1gne, value_1gne))
    out_nhe = torch.empty_like(query_nhe, memory_format=torch.contiguous_format)
    for run in runs:
        out_bhse = functional.scaled_dot_product_attention(
            _of_run(query_nhe, run),
            torch.cat([layer.keys[:, :, : run.shared].expand(run.count, -1, -1, -1), _of_run(key_nge, run)], dim=2),
            torch.cat([layer.values[:, :, : run.shared].expand(run.count, -1, -1, -1), _of_run(value_nge, run)], dim=2),
            attn_mask=run.mask_sk,
            scale=scaling,
            enable_gqa=True,
        )
        _of_run(out_nhe, run).copy_(out_bhse)
    return out_nhe[None], None


def _of_run(states_nhe: torch.Tensor, run: _Run) -> torch.Tensor:
    """A view of the run's lists, (B, H, S, E)."""
    return states_nhe[run.rows].unflatten(0, (run.count, -1)).transpose(1, 2)


AttentionInterface.register(ATTENTION, _attend)
