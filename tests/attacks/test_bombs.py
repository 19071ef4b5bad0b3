"""No file makes a program hang, crash or fill the memory; what it is refused for is said in few words."""

import json
import subprocess
import sys
from pathlib import Path

import bombs

from qwen_image.problems import MAX_MESSAGE

SILENT = ("memo of hashes", "facts of a state")
"""Read as if they were not there; what they held is found out again."""
SOUND = ("claims frames", "many frames", "more than its pixels")
"""Pictures of which only as much is read as is needed."""
MOST_SECONDS = 60
"""Of CPU time for a single one; the slowest takes three."""


def test_every_bomb_is_refused_in_bounded_time_and_memory(tmp_path):
    result = subprocess.run([sys.executable, bombs.__file__, tmp_path], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    fallen = [json.loads(line) for line in result.stdout.splitlines()]
    assert len(fallen) > 130
    for one in fallen:
        assert one["said"] or one["bomb"].startswith(SILENT) or one["bomb"].endswith(SOUND), one
        assert one["length"] <= MAX_MESSAGE, one
        assert one["seconds"] <= MOST_SECONDS, one
    assert not list(Path(tmp_path).rglob("*canary*"))
