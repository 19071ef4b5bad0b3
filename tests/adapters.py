"""Adapters on a tiny transformer for tests: of every kind, fresh or filled with random numbers."""

from __future__ import annotations

import torch
from training_data import HIDDEN_SIZE, tiny_transformer

from qwen_image.adapter.network import Network, add_adapter, trainable_parameters
from qwen_image.training.arguments import Settings, with_defaults

KIND_SETTINGS = {
    "lora": {},
    "dora": {"network_args": ["use_dora=True"]},
    "loha": {"network_module": "networks.loha"},
    "lokr": {"network_module": "networks.lokr", "network_args": ["factor=4"]},
    "lokr of equal factors": {"network_module": "networks.lokr"},
    "lokr of whole factors": {"network_module": "networks.lokr", "network_dim": 64},
    "lokr of products": {"network_module": "networks.lokr", "network_args": ["decompose_both=True", "factor=16"]},
}


def settings(**values: object) -> Settings:
    """Return checked-looking settings: rank 4, alpha 2, seed 42 and what is given."""
    return Settings(**with_defaults({"network_dim": 4, "network_alpha": 2, "seed": 42, **values}))


def adapted(name: str, *, layers: int = 1, **values: object) -> tuple[torch.nn.Module, Network]:
    """Return a tiny transformer with an adapter of `KIND_SETTINGS` and what was put on it."""
    transformer = tiny_transformer(layers=layers)
    more = [*KIND_SETTINGS[name].get("network_args", []), *(values.pop("network_args", None) or [])]
    chosen = {**KIND_SETTINGS[name], **values, **({"network_args": more} if more else {})}
    return transformer, add_adapter(transformer, settings(**chosen))


@torch.no_grad()
def fill(transformer: torch.nn.Module, seed: int = 0) -> None:
    """Give every weight of the adapter random numbers; magnitudes of a DoRA stay positive."""
    random = torch.Generator().manual_seed(seed)
    for parameter in trainable_parameters(transformer):
        noise = torch.randn(parameter.shape, generator=random)
        parameter.copy_(parameter * (1 + 0.3 * noise) if parameter.ndim == 1 else 0.3 * noise)


def inputs(dtype: torch.dtype = torch.float32) -> dict[str, object]:
    """Return the arguments of a forward pass: one picture of 4 tokens and a text of 3."""
    random = torch.Generator().manual_seed(0)
    return {
        "hidden_states": torch.randn(1, 4, 64, generator=random).to(dtype),
        "encoder_hidden_states": torch.randn(1, 3, HIDDEN_SIZE, generator=random).to(dtype),
        "timestep": torch.tensor([0.5]),
        "img_shapes": [[(1, 2, 2)]],
    }
