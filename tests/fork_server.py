"""Starts trainings in processes that have everything imported already, so that a test can kill many of them.

    python tests/fork_server.py     one JSON command a line on stdin, one answer a line on stdout

A command is {"flags": [...], "log": path, "kill_at": n or null}: a child trains with these flags, and kills itself with
SIGKILL at its n-th call of an operation on the disk (fsync, replace, rename, unlink). The answer is the child's pid,
then, once it has ended, its exit code (negative for a signal) and how many such calls it made.
"""

from __future__ import annotations

import json
import os
import pathlib
import shutil
import signal
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "scripts"))

import peft  # noqa: F401
import torch
from diffusers import QwenImageTransformer2DModel  # noqa: F401
from qwen_image_train_network import main

from qwen_image.problems import run

OPERATIONS = ((os, "fsync"), (os, "replace"), (pathlib.Path, "rename"), (pathlib.Path, "unlink"), (shutil, "rmtree"))


def serve() -> None:
    """Answer commands until stdin ends."""
    torch.set_num_threads(1)
    for line in sys.stdin:
        command = json.loads(line)
        calls_read, calls_write = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(calls_read)
            _train(command, calls_write)
        os.close(calls_write)
        print(pid, flush=True)
        _, status = os.waitpid(pid, 0)
        with os.fdopen(calls_read, "rb") as stream:
            calls = len(stream.read())
        print(os.waitstatus_to_exitcode(status), calls, flush=True)


def _train(command: dict, calls: int) -> None:
    log = os.open(command["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    count = 0

    def counted(original):
        def operation(*arguments, **more):
            nonlocal count
            count += 1
            os.write(calls, b".")
            if count == command["kill_at"]:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*arguments, **more)

        return operation

    for owner, name in OPERATIONS:
        setattr(owner, name, counted(getattr(owner, name)))
    code = 1
    try:
        code = run(lambda: main(command["flags"]))
    except SystemExit as leaving:
        code = leaving.code
    finally:
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    serve()
