"""Run one stage's program: show its output, keep it in a log, and explain a failure.

    python scripts/run_stage.py --stage train --log results/logs/train.log -- accelerate launch ...

Exits with the program's own code (128 + n when signal n ended it, 127 when the program is missing, 75 when it saved
its state to go on later, whatever the launcher between them makes of that; the SLURM job that Snakemake submitted for
it goes back into the queue then). On failure it leaves the explanation beside the log with the ending .failed; the
workflow shows it last of all.

    python scripts/run_stage.py --stage train --gpus 2 --log results/logs/train.log -- accelerate launch ...

With --gpus the program gets GPUs that no other stage of this user on this machine has, and waits for them. The log says
first where it runs, where that is known: "job 17 on n1, devices 0,1".
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

import psutil

from qwen_image.leases import Lease, lease_devices
from qwen_image.problems import InputError
from qwen_image.slurm import describe_job, requeue_job
from qwen_image.tokens import TokenFilter
from qwen_image.training.interruption import GOES_ON, GOES_ON_LATER, STATE_IS_SAVED

LAST_LINES = 15
HINTS = (
    ("CUDA out of memory", "lower the batch size or the resolution, or set gradient_checkpointing: true"),
    ("No space left on device", "free some disk space; what is cached so far is kept"),
    ("problem was found", "mend what is listed above"),
    ("problems were found", "mend what is listed above"),
    ("No module named", "the environment is not whole: run `make clean setup`, or `pip install -r requirements.txt`"),
)
NOT_FOUND = 127
LAUNCHERS = {"accelerate", "accelerate.commands.launch"}
"""They end at once, and with any code, when they are signalled or their program stops; so neither is left to them."""
DEFAULT_HINT = "mend the cause and run the same command again; what is done so far is kept"
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


def main(argv: list[str] | None = None) -> int:
    """Run the command after ``--`` and return its exit code."""
    parser = argparse.ArgumentParser(description="Run a stage, log it, and explain a failure.")
    parser.add_argument("--stage", required=True, help="the stage's name, for the failure message")
    parser.add_argument("--log", required=True, type=Path, help="file that keeps the output")
    parser.add_argument("--gpus", type=int, default=0, help="GPUs to use, of which no other stage gets any meanwhile")
    parser.add_argument("--gpu_ids", default="all", help="which: all, 0,1 or a device such as cuda:1")
    parser.add_argument("command", nargs="+", help="program and arguments, after --")
    args = parser.parse_args(argv)
    args.log.parent.mkdir(parents=True, exist_ok=True)
    report = args.log.with_suffix(".failed")
    report.unlink(missing_ok=True)
    code = _run(args)
    text = args.log.read_text(encoding="utf-8", errors="replace")
    if code and GOES_ON in text:
        code = GOES_ON_LATER
    if code and not (STATE_IS_SAVED in text and requeue_job()):
        lines = text.splitlines()[-LAST_LINES:]
        report.write_text(_explain(args.stage, code, lines, _hint(code, text), args.log), encoding="utf-8")
    return code


def _run(args: argparse.Namespace) -> int:
    holder = f"{args.stage} in {Path.cwd()} (process {os.getpid()})"
    with args.log.open("wb") as log:
        say = functools.partial(_say, log)
        try:
            with lease_devices(args.gpus, args.gpu_ids, holder, say) as lease:
                if place := _place(lease):
                    say(place)
                return _run_program(args.command, lease, log)
        except (FileNotFoundError, PermissionError) as error:
            say(f"{args.command[0]}: {error.strerror}")
            return NOT_FOUND
        except InputError as error:
            say(str(error))
            return 2
        except KeyboardInterrupt:  # while it waited for a GPU
            return 128 + signal.SIGINT


def _run_program(command: list[str], lease: Lease, log: BinaryIO) -> int:
    # its own output arrives unbuffered, whatever Python runs it
    environment = os.environ | {"PYTHONUNBUFFERED": "1"} | lease.environment
    with _forward_signals() as start:
        # whatever the program starts inherits its input, and with it the lease
        child = subprocess.Popen(
            command, stdin=lease.descriptor, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment
        )
        start(child)
        assert child.stdout is not None
        _copy(child.stdout, log)
        code = child.wait()
    return 128 - code if code < 0 else code


def _say(log: BinaryIO, text: str) -> None:
    for stream in (sys.stderr.buffer, log):
        stream.write(f"{text}\n".encode())
        stream.flush()


def _place(lease: Lease) -> str:
    """What the log says first, as far as it is known: ``job 17 on n1, devices 0,1``."""
    devices = ",".join(device.name for device in lease.devices)
    place = describe_job() or (f"on {socket.gethostname()}" if devices else "")
    return f"{place}, devices {devices}" if devices else place


def _copy(source: BinaryIO, log: BinaryIO) -> None:
    """Copy to the terminal as it comes; to the log line by line, of a progress bar only its last state."""
    line = b""
    for chunk in _without_tokens(source):
        sys.stderr.buffer.write(chunk)
        sys.stderr.buffer.flush()
        *whole, line = (line + chunk).split(b"\n")
        for text in whole:
            log.write(_last_state(text) + b"\n")
        line = _last_state(line, keep_end=True)
        log.flush()
    if line:
        log.write(_last_state(line) + b"\n")


def _without_tokens(source: BinaryIO) -> Iterator[bytes]:
    """Yield what comes, as it comes. A program's own messages hold no tokens; those of its libraries may."""
    tokens = TokenFilter()
    while chunk := source.read1(65536):
        yield tokens.pass_on(chunk)
    yield tokens.rest()


def _last_state(line: bytes, *, keep_end: bool = False) -> bytes:
    states = line.split(b"\r")
    if keep_end and not states[-1]:
        return b"\r".join(states[-2:])  # the next chunk decides whether this carriage return ended the line
    return next((state for state in reversed(states) if state.strip()), b"")


@contextlib.contextmanager
def _forward_signals() -> Iterator[Callable[[subprocess.Popen], None]]:
    """Pass the signals that ask a job to stop on to the program, and wait for it rather than leave it behind.

    Yields what is told the program once it runs. A signal that came before is passed on then.
    """
    children: list[subprocess.Popen] = []
    early: list[int] = []

    def forward(number: int, _frame: object) -> None:
        if not children:
            early.append(number)
        for child in children:
            for process in _programs(child):
                with contextlib.suppress(ProcessLookupError, psutil.NoSuchProcess):
                    process.send_signal(number)

    def start(child: subprocess.Popen) -> None:
        children.append(child)
        for number in early:
            forward(number, None)

    before = {number: signal.signal(number, forward) for number in SIGNALS}
    # the terminal's Ctrl-C reaches the program by itself
    before[signal.SIGINT] = signal.signal(signal.SIGINT, lambda *_: None)
    try:
        yield start
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _programs(child: subprocess.Popen) -> list:
    """The processes to signal: the program itself, or those that a launcher has started."""
    try:
        process = psutil.Process(child.pid)
        launched = process.children() if LAUNCHERS & {Path(word).name for word in process.cmdline()[:4]} else []
        return launched or [process]
    except psutil.NoSuchProcess:
        return []


def _hint(code: int, text: str) -> str:
    if code == NOT_FOUND:
        return "it is not installed where the workflow looks: run `make clean setup`, or activate its environment"
    if code == GOES_ON_LATER:
        return f"it was asked to stop and saved its state; {GOES_ON}"
    if code == 128 + signal.SIGKILL:
        return "it was killed, most often because memory ran out: ask for more, or lower the batch size"
    if code > 128:
        return "it was stopped from outside; run the same command again, what is done so far is kept"
    return next((hint for word, hint in HINTS if word in text), DEFAULT_HINT)


def _explain(stage: str, code: int, lines: list[str], hint: str, log: Path) -> str:
    shown = "\n".join(f"    {line}" for line in lines)
    return f"\nStage {stage} failed with return code {code}. Last lines of {log}:\n{shown}\nHint: {hint}.\n"


if __name__ == "__main__":
    sys.exit(main())
