"""Tests that need a CUDA device. Where torch sees none they skip."""

from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items):
    there = torch.cuda.is_available()
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            if not there:
                item.add_marker(pytest.mark.skip(reason="torch sees no CUDA device"))
