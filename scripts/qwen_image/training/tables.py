"""Tables that grow while a training runs: CSV, one line a step, the same bytes whether it was interrupted or not.

A table grows under the name ``<name>.part``, so that it can be watched, and gets its own name when it is closed. A
training that goes on keeps the rows of the steps that its state holds, byte for byte, and drops those after them.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from qwen_image.files import atomic_write

Rows = list[tuple[dict[str, str], bytes]]
"""Rows of a table: what stands in their columns, and the line itself."""


class Table:
    """A CSV that a training adds a line a step to. The first column is the step."""

    def __init__(
        self, path: Path, columns: Sequence[str], *, start_step: int, belongs: Callable[[list[dict[str, str]]], bool]
    ) -> None:
        """Keep the rows up to `start_step`, of the table there is whose rows `belongs` takes for this training's."""
        self._final, self._partial = path, path.with_name(f"{path.name}.part")
        header = f"{','.join(columns)}\n".encode()
        # a killed training leaves the first, a stopped one the second
        files = (self._partial, self._final) if start_step else ()
        found = [rows for file in files if (rows := _read(file, header, start_step))]
        self._kept = max((rows for rows in found if belongs([values for values, _ in rows])), key=len, default=[])
        atomic_write(self._partial, header + b"".join(line for _, line in self._kept))
        # every line is written whole and at once
        self._stream = open(self._partial, "a", encoding="utf-8", newline="", buffering=1)  # noqa: SIM115
        self._rows = csv.DictWriter(self._stream, columns, lineterminator="\n")

    @property
    def kept_rows(self) -> int:
        """The number of rows that were there already."""
        return len(self._kept)

    def write(self, row: Mapping[str, object]) -> None:
        """Add a row."""
        self._rows.writerow(row)

    def close(self) -> None:
        """Give the table its own name, also that of a training that failed: it shows what happened."""
        self._stream.flush()
        os.fsync(self._stream.fileno())
        self._stream.close()
        os.replace(self._partial, self._final)


def _read(path: Path, header: bytes, last_step: int) -> Rows:
    """Return the rows up to this step, and none of a table with other columns. A line that was cut short ends them."""
    rows: Rows = []
    with suppress(FileNotFoundError):
        first, *lines = path.read_bytes().splitlines(keepends=True) or [b""]
        columns = header.decode().strip().split(",")
        for line in lines if first == header else []:
            fields = line.decode("utf-8", errors="replace").removesuffix("\n").split(",")
            step = int(fields[0]) if fields[0].isdecimal() else 0
            newer = step > (int(rows[-1][0][columns[0]]) if rows else 0)
            if not line.endswith(b"\n") or len(fields) != len(columns) or not newer or step > last_step:
                break
            rows.append((dict(zip(columns, fields, strict=True)), line))
    return rows
