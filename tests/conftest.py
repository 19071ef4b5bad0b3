"""What every test starts from."""

import logging

import pytest


@pytest.fixture(autouse=True)
def log_level():
    """Give the library's log the level that it has at first: programs that a test runs set their own."""
    log = logging.getLogger("qwen_image")
    log.setLevel(logging.NOTSET)
    yield
    log.setLevel(logging.NOTSET)
