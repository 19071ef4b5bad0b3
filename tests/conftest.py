"""What every test starts from."""

import logging
import os
import sys

import pytest

# before torch is imported, here and in every program: threads that wait for work do not keep the other tests from it
os.environ.setdefault("OMP_WAIT_POLICY", "passive")


@pytest.fixture(autouse=True)
def log_level():
    """Give the library's log the level that it has at first: programs that a test runs set their own."""
    log = logging.getLogger("qwen_image")
    log.setLevel(logging.NOTSET)
    yield
    log.setLevel(logging.NOTSET)


@pytest.fixture(autouse=True)
def accelerator_state():
    """Have every training be its process's first: accelerate keeps the precision of the one before."""
    yield
    if module := sys.modules.get("accelerate.state"):
        module.AcceleratorState._reset_state(reset_partial_state=True)
