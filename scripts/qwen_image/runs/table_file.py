"""The table of runs as a file: .tsv or .csv, read within bounds, each row with the line that it begins in."""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Iterator
from pathlib import Path, PurePath

from qwen_image.bounded import read_bytes
from qwen_image.config import known_keys
from qwen_image.problems import InputError, Problem
from qwen_image.runs.keys import MAX_RUNS, TABLE, cut

SEPARATORS = {".tsv": "\t", ".csv": ","}
Row = tuple[int, list[str]]
"""Its first line, counted from 1, and its cells."""


def read_table(table: object, file: str) -> tuple[list[str], list[tuple[int, dict[str, str]]]]:
    """Return the columns' names, and of each row its line and the cells that are not empty, by column.

    `table` is what the configuration `file` names. Space around names and cells does not count, nor do blank lines.
    Raises InputError for what is no such table.
    """
    if not isinstance(table, str) or PurePath(table).suffix.lower() not in SEPARATORS:
        mend = "name a table that ends in .tsv or .csv"
        raise InputError([Problem(file=file, key=TABLE, found=f"found {cut(repr(table))}", mend=mend)])
    try:
        (_, names), *rows = _rows(_text(table, file), SEPARATORS[PurePath(table).suffix.lower()])
    except (csv.Error, ValueError) as error:
        mend = "save it as UTF-8, a column a key, with as many cells in each line as there are columns"
        raise InputError([Problem(file=table, found=f"is no such table ({error})", mend=mend)]) from error
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        found = f"these columns stand there twice: {cut(', '.join(map(repr, twice)))}"
        raise InputError([Problem(file=table, found=found, mend="keep one of each")])
    return names, [
        (line, {name: cell for name, cell in zip(names, cells, strict=False) if cell}) for line, cells in rows
    ]


def _text(table: str, file: str) -> str:
    """The file's text. UnicodeDecodeError is left to the caller."""
    try:
        content = read_bytes(table)
    except OSError as error:
        mend = f"check `{TABLE}` in {file}; relative paths start at {Path.cwd()}"
        found = f"cannot be read: {error.strerror or error}"
        raise InputError([Problem(file=table, found=found, mend=mend)]) from error
    except ValueError as error:
        mend = "name a table of runs, a file of text"
        raise InputError([Problem(file=table, found=f"cannot be read: {error}", mend=mend)]) from error
    return content.decode("utf-8-sig")


def _rows(text: str, separator: str) -> list[Row]:
    """Return the rows, that of the names first. Raises ValueError, or csv.Error, where this is no table of runs."""
    rows = list(_numbered(text, separator))
    if not rows:
        raise ValueError("it is empty")
    width = len(rows[0][1])
    for line, cells in rows:
        if len(cells) > width:
            raise ValueError(f"line {line} has {len(cells)} cells, there are {width} columns")
    return rows


def _numbered(text: str, separator: str) -> Iterator[Row]:
    # a quoted cell may hold line breaks
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    count, line = 0, 1
    for cells in reader:
        stripped = [cell.strip() for cell in cells]
        if len(stripped) > 1 or any(stripped):
            if not count and len(stripped) > len(known_keys()):
                raise ValueError(f"it has {len(stripped)} columns, and there are only {len(known_keys())} keys")
            if count > MAX_RUNS:
                raise ValueError(f"it has more than {MAX_RUNS} rows, which are the most")
            count += 1
            yield line, stripped
        line = reader.line_num + 1
