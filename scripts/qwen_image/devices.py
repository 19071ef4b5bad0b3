"""Which GPUs there are, by the names that the user gives them and by names that are the same for everybody."""

from __future__ import annotations

import os
import re
import socket
import subprocess
from dataclasses import dataclass
from pathlib import Path

from qwen_image.problems import InputError, Problem

VISIBLE = "CUDA_VISIBLE_DEVICES"
ORDER = "CUDA_DEVICE_ORDER"
ANY = ("all", "auto", "cuda")
LIST_COMMAND = ("nvidia-smi", "--query-gpu=index,uuid,memory.total", "--format=csv,noheader,nounits")
TIMEOUT_SECONDS = 60
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


@dataclass(frozen=True)
class Device:
    """One GPU."""

    word: str
    """How CUDA_VISIBLE_DEVICES names it."""
    name: str
    """How a reader knows it: its index where there is one."""
    identity: str
    """The same for everybody who means this device, and different for every other one: its UUID where it is known."""


@dataclass(frozen=True)
class _Card:
    index: str
    uuid: str


def candidates(gpu_ids: str) -> list[Device]:
    """Return the devices that a stage may use: all that are visible, or those of them that `gpu_ids` names.

    `gpu_ids` is ``all``, a list as CUDA_VISIBLE_DEVICES has it, or a device as torch names it: ``auto`` and ``cuda``
    may be any, ``cuda:1`` is the second of the visible ones. In a SLURM job a list is not looked at: its numbers are
    those of a machine. Empty where nothing is known of any device. Raises InputError for one that is not visible.
    """
    if gpu_ids == "cpu":
        return []
    cards = _cards()
    visible = _visible(cards)
    if position := re.fullmatch(r"cuda:(\d+)", gpu_ids):
        # the program says so itself when there is no such device
        return visible[int(position[1]) :][:1]
    if gpu_ids in ANY or not visible or os.environ.get("SLURM_JOB_ID"):
        return visible
    identities = {device.identity for device in visible}
    named = [_device(word, cards) for word in dict.fromkeys(map(str.strip, gpu_ids.split(",")))]
    if unknown := [device.word for device in named if device.identity not in identities]:
        found = f"{','.join(unknown)}: no such GPU; visible are {','.join(device.name for device in visible)}"
        mend = f"name some of these, or leave it out to use any ({VISIBLE} limits what is visible)"
        raise InputError([Problem(file="GPUs of this machine", key="gpu_ids", found=found, mend=mend)])
    return named


def _visible(cards: list[_Card]) -> list[Device]:
    """Return the devices that a program started now would see, in CUDA's order, as far as that can be told."""
    told = os.environ.get(VISIBLE)
    if told is not None:
        return [_device(word, cards) for word in _words(told)]
    # a cluster that gives no GPU by name may give none at all
    return [] if os.environ.get("SLURM_JOB_ID") else [Device(card.uuid, card.index, card.uuid) for card in cards]


def _words(text: str) -> list[str]:
    """Return the names in a list of devices, each once; as CUDA does, up to the first that is none."""
    words = []
    for word in map(str.strip, text.split(",")):
        if not re.fullmatch(r"\d+|(GPU|MIG)-\S+", word):
            break
        words.append(word)
    return list(dict.fromkeys(words))


def _device(word: str, cards: list[_Card]) -> Device:
    if word.isdecimal():
        known = cards[int(word) :][:1]
    else:
        # the first characters are enough for CUDA
        known = [card for card in cards if word and card.uuid.startswith(word)]
    return Device(word, word, known[0].uuid if len(known) == 1 else f"{_machine()} {word}")


def _machine() -> str:
    """Return what tells this machine, or SLURM's part of it, from all others. A container has its host's boot id."""
    machine = BOOT_ID.read_text().strip() if BOOT_ID.exists() else socket.gethostname()
    return f"{machine} {os.environ.get('SLURM_JOB_ID', '')}".strip()


def _cards() -> list[_Card]:
    """Return the machine's GPUs in the order in which CUDA counts them: the fastest first, or as asked for.

    CUDA alone knows which it takes for the fastest. Memory tells as much as can be told from outside; cards with the
    same stay in nvidia-smi's order.
    """
    try:
        listing = subprocess.run(LIST_COMMAND, capture_output=True, text=True, timeout=TIMEOUT_SECONDS)
    except (OSError, subprocess.TimeoutExpired):
        return []
    rows = [line.split(", ") for line in listing.stdout.splitlines()] if listing.returncode == 0 else []
    if os.environ.get(ORDER) != "PCI_BUS_ID":
        rows.sort(key=lambda row: -int(row[2]) if row[2].isdecimal() else 0)
    return [_Card(index, uuid) for index, uuid, _ in rows]
