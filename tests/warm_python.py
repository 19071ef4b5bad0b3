"""A `python` that starts at once: a process that has torch, diffusers and their like imported forks for each program.

    with warm_python(folder) as python:
        subprocess.run([python, "-m", "snakemake", ...])    or python.with_name("snakemake")

Whatever the program starts by the name `python` or as `sys.executable` starts like that too. What it does is what it
always does, but not in all ways: a program is no descendant of what asked for it, though it ends with that; limits and
niceness stay the server's, and so does what libraries read of the environment when they are imported; all programs have
one seed of Python's hashes. Tests that are about such things take the real one. A file that RUN_FIRST names is run in
each of them before the program.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import marshal
import os
import random
import runpy
import select
import signal
import socket
import subprocess
import sys
import threading
import traceback
from collections.abc import Iterator
from pathlib import Path

SCRIPTS = Path(__file__).parents[1] / "scripts"
LENGTH = 8
"""Bytes that tell how long a request is."""

CLIENT = """\
#!{python} -SE
import contextlib, marshal, os, signal, socket, sys


def forward(number, _frame):
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


words = sys.argv[1:]
# options of the interpreter, and other libraries than those that are imported already, need one of their own
if not words or words[0][0] == "-" and words[0] not in ("-m", "-P") or os.environ.get("PYTHONPATH") != {libraries!r}:
    os.execv({python!r}, [{python!r}, *words])
mask = os.umask(0)
os.umask(mask)
request = marshal.dumps((words, dict(os.environ), os.getcwd(), mask, os.getpgrp()))
with socket.socket(socket.AF_UNIX) as server:
    server.connect({address!r})
    socket.send_fds(server, [len(request).to_bytes({length}, "big")], [0, 1, 2])
    server.sendall(request)
    answers = server.makefile()
    pid = int(answers.readline())
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, forward)
    code = int(answers.readline())
if code < 0:
    if code != -signal.SIGKILL:
        signal.signal(-code, signal.SIG_DFL)
    os.kill(os.getpid(), -code)
os._exit(code)
"""


@contextlib.contextmanager
def warm_python(folder: Path) -> Iterator[Path]:
    """Yield the path of such a `python`, which works as long as the block lasts. The folder must be new, its name short
    enough for a socket's."""
    folder.mkdir()
    python, address = folder / "python", str(folder / "socket")
    client = CLIENT.format(
        python=sys.executable, libraries=os.environ.get("PYTHONPATH"), address=address, length=LENGTH
    )
    snakemake = f"#!{python}\nimport sys\n\nfrom snakemake.cli import main\n\nsys.exit(main())\n"
    for name, text in (("python", client), ("snakemake", snakemake)):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    own = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    server = subprocess.Popen(
        [sys.executable, __file__, address, python], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=own
    )
    try:
        assert server.stdout.readline() == b"ready\n"
        yield python
    finally:
        server.stdin.close()
        server.wait()


def serve(address: str, python: str) -> None:
    """Answer requests until stdin is closed."""
    _import()
    # children share what is never looked at again
    gc.collect()
    gc.freeze()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        listener.listen(64)
        print("ready", flush=True)
        while True:
            ready, _, _ = select.select([listener, sys.stdin], [], [])
            if sys.stdin in ready:
                return
            connection, _ = listener.accept()
            if os.fork() == 0:
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                listener.close()
                _attend(connection, python)
            connection.close()


def _import() -> None:
    """Import what the programs import, but nothing of this project."""
    # it keeps others from importing bitsandbytes
    sys.path.insert(0, str(SCRIPTS))
    import qwen_image  # noqa: F401, I001

    import accelerate.commands.launch  # noqa: F401
    import pandas  # noqa: F401
    import peft  # noqa: F401
    import snakemake.cli  # noqa: F401
    import toml  # noqa: F401
    import torch._dynamo  # noqa: F401
    from diffusers import AutoencoderKLQwenImage, FlowMatchEulerDiscreteScheduler, QwenImageTransformer2DModel  # noqa: F401
    from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer  # noqa: F401

    for name in [name for name in sys.modules if name.partition(".")[0] == "qwen_image"]:
        del sys.modules[name]
    # neither the tests' modules nor those of the programs, which have them beside themselves
    own = {str(SCRIPTS), str(Path(__file__).parent)}
    sys.path[:] = [path for path in sys.path if path not in own]


def _attend(connection: socket.socket, python: str) -> None:
    """Start one program, tell its number, and its exit code when it has ended; end it if who asked for it is gone."""
    head, files, _, _ = socket.recv_fds(connection, LENGTH, 3)
    stream = connection.makefile("rb")
    request = marshal.loads(stream.read(int.from_bytes(head, "big")))
    pid = os.fork()
    if pid == 0:
        connection.close()
        _become(files, python, *request)
    for file in files:
        os.close(file)
    connection.sendall(f"{pid}\n".encode())
    ended = os.pidfd_open(pid)
    ready, _, _ = select.select([ended, connection], [], [])
    if ended not in ready:
        os.kill(pid, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    with contextlib.suppress(OSError):
        connection.sendall(f"{code}\n".encode())
    os._exit(0)


def _become(files: list[int], python: str, words: list[str], env: dict, folder: str, mask: int, group: int) -> None:
    """Be the program: with its files, environment, folder, group and arguments."""
    import numpy
    import torch

    # who asked may live in another session
    with contextlib.suppress(OSError):
        os.setpgid(0, group)
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    os.environ.clear()
    os.environ.update(env)
    os.chdir(folder)
    os.umask(mask)
    random.seed()
    numpy.random.seed()
    if "OMP_NUM_THREADS" in env:
        torch.set_num_threads(int(env["OMP_NUM_THREADS"]))
    sys.executable = python
    gc.unfreeze()
    code = 0
    try:
        _run(words)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        code = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code & 0xFF)


def _run(words: list[str]) -> None:
    if first := os.environ.get("RUN_FIRST"):
        # not runpy, which puts the file's own name into sys.argv
        sys.argv = words
        exec(compile(Path(first).read_text(), first, "exec"), {"__name__": "first"})
    safe = words[0] == "-P"
    words = words[safe:]
    is_module = words[0] == "-m"
    if not safe:
        sys.path.insert(0, os.getcwd() if is_module else str(Path(words[0]).resolve().parent))
    sys.argv = words[is_module:]
    if is_module:
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(words[0], run_name="__main__")


if __name__ == "__main__":
    serve(*sys.argv[1:])
