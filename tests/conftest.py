"""What every test starts from."""

import logging
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from warm_python import warm_python

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


@pytest.fixture(scope="session")
def python() -> Iterator[Path]:
    """A `python` that starts at once, for tests that start hundreds of programs."""
    with tempfile.TemporaryDirectory() as folder, warm_python(Path(folder, "warm")) as python:
        yield python
