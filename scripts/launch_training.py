"""Start a training's processes: `accelerate launch` here or, for several machines, on each node of a SLURM job.

    python scripts/launch_training.py --num_processes 2 --multi_gpu -- scripts/qwen_image_train_network.py \
        --config_file train.toml

What stands before -- is for `accelerate launch`. With --num_machines N and without --machine_rank it must run in a
SLURM job of N nodes: srun starts the launcher on each, the first node is where all meet, on a port that is free there.
Asked to stop (SIGTERM, SIGUSR1, Ctrl-C), it asks every node, and waits; a node that fails ends all.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import re
import signal
import socket
import subprocess
import sys

from qwen_image.problems import InputError, Problem, run
from qwen_image.slurm import JOB_ID

STEP = ["--overlap", "--input=none", "--mpi=none", "--export=ALL"]
"""Of every step: beside the one in which Snakemake runs, whose input is Snakemake's own script."""
LAUNCHER = [sys.executable, "-P", "-m", "accelerate.commands.launch"]
"""The command `accelerate launch`, without what its other commands import, a second at each start, and without the
working directory among the places where modules are looked for."""
ON_NODE = f'trap "" TERM USR1; exec "$0" {" ".join(LAUNCHER[1:])} --machine_rank "$SLURM_NODEID" "$@"'
"""SLURM signals every process of a step. The launcher would end its program soon after, so it must not listen."""
LAUNCHER_SIGNALS = {"PET_SIGNALS_TO_HANDLE": "SIGHUP,SIGQUIT"}
"""Keeps the launcher of several processes from listening nevertheless."""
JOB_VARIABLES = re.compile("SLURM_(JOB_?ID|JOB_(START|END)_TIME|ARRAY_.*|CLUSTER_NAME|CONF|SUBMIT_.*|RESTART_COUNT)")
"""What a new step is told; SLURM's other variables describe the step that this program runs in, and would shape it."""
PORTS = range(15000, 30000)
"""Below those that outgoing connections are given, on Linux from 32768 on, which may take one at any moment."""
REPEAT_SECONDS = 10
"""A training that has only begun to load hears nothing yet; it is asked once more."""


def main(argv: list[str] | None = None) -> int:
    """Start the training; return its exit code, or that of the launchers between."""
    argv = sys.argv[1:] if argv is None else argv
    args, launch, program = _parse(argv)
    if args.free_port:
        print(free_port())
        return 0
    if args.num_processes % args.num_machines:
        found = f"{args.num_processes} processes cannot be shared evenly by {args.num_machines} machines"
        raise _problem("num_processes", found, "make num_processes a multiple of num_machines: it counts all processes")
    if args.num_machines == 1 or args.machine_rank is not None:
        return _become([*LAUNCHER, *launch, *program])
    nodes = job_nodes(args.num_machines)
    address = args.main_process_ip or node_address(nodes[0])
    port = args.main_process_port or _port_of(nodes[0])
    print(
        f"train: {len(nodes)} nodes ({', '.join(nodes)}), which meet at {address}:{port}", file=sys.stderr, flush=True
    )
    # of two values the launcher takes the last
    meeting = ["--main_process_ip", address, "--main_process_port", str(port)]
    return _run([*step_command(nodes), "bash", "-c", ON_NODE, LAUNCHER[0], *launch, *meeting, *program])


def job_nodes(machines: int) -> list[str]:
    """Return the names of the SLURM job's nodes, as many as asked for. Raises InputError when they are not there."""
    job = os.environ.get(JOB_ID)
    if job is None:
        mend = (
            "submit it to SLURM (docs/cluster.md); or start it by hand on each machine, with --machine_rank (0 on the "
            "first), and on all with the first one's --main_process_ip and --main_process_port"
        )
        raise _problem("num_machines", f"{machines} machines are asked for, but this is no SLURM job", mend)
    # SLURM_JOB_NODELIST may be that of the step which Snakemake's plugin has made for itself
    listed = re.search(r"(^|\s)NodeList=(\S+)", _answer("scontrol", "--oneliner", "show", "job", job))
    nodes = _answer("scontrol", "show", "hostnames", listed[2]).split() if listed else []
    if len(nodes) < machines:
        found = f"{machines} machines are asked for, but the SLURM job has {len(nodes)} ({', '.join(nodes)})"
        raise _problem("num_machines", found, f"submit it with --nodes={machines} (docs/cluster.md), or lower it")
    return nodes[:machines]


def node_address(node: str) -> str:
    """Return where SLURM itself reaches a node: its name, unless the site says otherwise."""
    address = re.search(r"\bNodeAddr=(\S+)", _answer("scontrol", "show", "node", node))
    name = address[1] if address else node
    try:
        socket.getaddrinfo(name, None)
    except OSError as error:
        found, mend = f"node {node} cannot be found as {name} ({error})", "give its address as --main_process_ip"
        raise _problem("main_process_ip", found, mend) from error
    return name


def free_port() -> int:
    """Return a TCP port of this machine that nobody listens on. Raises OSError when there is none."""
    for port in random.sample(PORTS, len(PORTS)):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("", port))
            return port
    raise OSError(f"no free port between {PORTS.start} and {PORTS.stop}")


def step_command(nodes: list[str]) -> list[str]:
    """Return the call of srun that runs what follows once on each node, with all that the job has there."""
    cpus = os.environ.get("SLURM_CPUS_PER_TASK")
    return [
        "srun", *STEP, f"--nodelist={','.join(nodes)}", f"--nodes={len(nodes)}", f"--ntasks={len(nodes)}",
        "--ntasks-per-node=1", *([f"--cpus-per-task={cpus}"] if cpus else []),
        # one that fails ends all; one that is done waits for the others however long they take
        "--kill-on-bad-exit=1", "--wait=0",
    ]  # fmt: skip


def step_environment() -> dict[str, str]:
    """Return this process's environment without what would shape another step of the job."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not re.match("SLURM_|SRUN_|SBATCH_", name) or JOB_VARIABLES.fullmatch(name)
    }
    return kept | LAUNCHER_SIGNALS


def _parse(argv: list[str]) -> tuple[argparse.Namespace, list[str], list[str]]:
    """Return what is looked at here, the words for the launcher, and the program with its arguments."""
    parser = argparse.ArgumentParser(
        description="Start a training on this machine, or on the nodes of a SLURM job.",
        usage="%(prog)s [options of accelerate launch] -- program [arguments]",
        allow_abbrev=False,
    )
    parser.add_argument("--num_processes", type=int, default=1, help="of all machines together")
    parser.add_argument("--num_machines", type=int, default=1, help="of several machines: how many")
    parser.add_argument("--machine_rank", type=int, help="which one this is, from 0; on SLURM it is known")
    parser.add_argument("--main_process_ip", help="address of the first; on SLURM it is known")
    parser.add_argument(
        "--main_process_port", type=int, help="port of the first; on SLURM 0 takes one that is free there"
    )
    parser.add_argument(
        "--free_port", action="store_true", help="print a free port of this machine, and do nothing else"
    )
    launch, program = argv, []
    if "--" in argv:
        launch, program = argv[: argv.index("--")], argv[argv.index("--") + 1 :]
    args, _ = parser.parse_known_args(launch)
    if not program and not args.free_port:
        parser.error("which program? It stands after --")
    return args, launch, program


def _become(command: list[str]) -> int:
    """Have the command in this process's place, so that signals and exit codes are its own."""
    try:
        os.execvp(command[0], command)
    except OSError as error:
        print(f"{command[0]}: {error.strerror}", file=sys.stderr)
        return 127


def _port_of(node: str) -> int:
    """A port that is free on a node, as found there."""
    own = [sys.executable, __file__, "--free_port"]
    return int(_answer("srun", *STEP, f"--nodelist={node}", "--nodes=1", "--ntasks=1", *own))


def _answer(*command: str) -> str:
    """What a SLURM command prints. Raises InputError when it fails."""
    done = subprocess.run(command, capture_output=True, text=True, env=step_environment(), check=False)
    if done.returncode:
        found = f"{' '.join(command)} failed: {done.stderr.strip() or f'exit code {done.returncode}'}"
        raise _problem("num_machines", found, "see to SLURM, or start it by hand on each machine with --machine_rank")
    return done.stdout


def _run(command: list[str]) -> int:
    """Run srun to its end. Whoever asks this process to stop asks all nodes."""
    asked: list[int] = []
    steps: list[subprocess.Popen] = []

    def ask(number: int, _frame: object) -> None:
        asked.append(number)
        for step in steps:
            # on SIGTERM srun kills what it has started; SIGUSR1 it hands to every process of it
            step.send_signal(signal.SIGTERM if asked.count(signal.SIGINT) > 1 else signal.SIGUSR1)

    # before srun starts: a signal that comes meanwhile would end this process and leave srun behind
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, ask)
    # srun is not to hear the terminal's Ctrl-C
    step = subprocess.Popen(command, env=step_environment(), start_new_session=True)
    steps.append(step)
    if asked:
        step.send_signal(signal.SIGUSR1)
    while True:
        with contextlib.suppress(subprocess.TimeoutExpired):
            code = step.wait(timeout=REPEAT_SECONDS)
            return 128 - code if code < 0 else code
        if asked:
            step.send_signal(signal.SIGUSR1)


def _problem(key: str, found: str, mend: str) -> InputError:
    return InputError([Problem(file="launch_training", key=key, found=found, mend=mend)])


if __name__ == "__main__":
    sys.exit(run(main))
