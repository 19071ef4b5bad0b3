"""Writing files whole or not at all, and remembering what was computed from a file's content."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qwen_image.files import (
    FileMemo,
    atomic_write,
    remove_abandoned,
    safe_name,
    sha256_file,
    sha256_files,
    write_if_changed,
)


def _age(path: Path, seconds: float = 60) -> None:
    stamp = time.time() - seconds
    os.utime(path, (stamp, stamp))


def test_a_failed_write_leaves_the_old_file_and_no_temporary(tmp_path):
    path = tmp_path / "x"
    atomic_write(path, "old")

    def fail(stream):
        stream.write(b"half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        atomic_write(path, fail)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["x"]


def test_only_temporaries_whose_writer_is_dead_are_removed(tmp_path):
    code = (
        "import os, signal, sys; sys.path.insert(0, 'scripts'); from qwen_image.files import atomic_write\n"
        "def die(stream):\n    stream.write(b'half'); stream.flush(); os.kill(os.getpid(), signal.SIGKILL)\n"
        "atomic_write(sys.argv[1], die)"
    )
    subprocess.run([sys.executable, "-c", code, tmp_path / "x"], cwd=Path(__file__).parents[2], check=False)
    (abandoned,) = os.listdir(tmp_path)
    others = (".tmp-0123456789abcde", ".tmp-0123456789abcdef0", "tmp-0123456789abcdef", "x")
    for name in others:
        (tmp_path / name).touch()
    (tmp_path / ".tmp-aaaaaaaaaaaaaaaa").mkdir()
    (tmp_path / ".tmp-bbbbbbbbbbbbbbbb").symlink_to(tmp_path / "x")

    def look(stream):
        remove_abandoned(tmp_path)
        stream.write(b"whole")

    atomic_write(tmp_path / "y", look)
    assert (tmp_path / "y").read_bytes() == b"whole"
    assert abandoned not in os.listdir(tmp_path)
    assert set(os.listdir(tmp_path)) == {*others, "y", ".tmp-aaaaaaaaaaaaaaaa", ".tmp-bbbbbbbbbbbbbbbb"}
    remove_abandoned(tmp_path / "nowhere")


def test_what_a_killed_writer_has_left_goes_when_the_next_writes_there(tmp_path):
    code = (
        "import os, signal, sys; sys.path.insert(0, 'scripts'); from qwen_image.files import write_if_changed\n"
        "if 'die' in sys.argv: os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
        "write_if_changed(sys.argv[1], 'whole')"
    )
    for words, left in ((["die"], 1), ([], 1), (["die"], 1), ([], 1)):
        subprocess.run([sys.executable, "-c", code, tmp_path / "x", *words], cwd=Path(__file__).parents[2], check=False)
        assert len(os.listdir(tmp_path)) == left
    assert os.listdir(tmp_path) == ["x"]


def test_the_longest_file_name_can_be_written(tmp_path):
    path = tmp_path / ("x" * 255)
    atomic_write(path, b"1")
    assert path.read_bytes() == b"1"


def test_equal_content_is_not_written_again(tmp_path):
    path = tmp_path / "folder" / "x"
    assert write_if_changed(path, "a")
    before = path.stat().st_mtime_ns, path.stat().st_ino
    assert not write_if_changed(path, "a")
    assert (path.stat().st_mtime_ns, path.stat().st_ino) == before
    assert write_if_changed(path, "b")


class _Counter:
    def __init__(self):
        self.paths = []

    def __call__(self, path):
        self.paths.append(Path(path).name)
        return [sha256_file(path)]


def test_the_memo_answers_without_reading_an_unchanged_file(tmp_path):
    path, count = tmp_path / "x", _Counter()
    path.write_text("a")
    _age(path)
    for _ in range(2):
        memo = FileMemo(tmp_path / "memo", bool)
        assert memo.value(path, count) == [sha256_file(path)]
        memo.save()
    assert count.paths == ["x"]


@pytest.mark.parametrize("change", ["content", "mtime", "size", "memo damaged"])
def test_the_memo_looks_again_when_anything_changed(tmp_path, change):
    path, count, memo_path = tmp_path / "x", _Counter(), tmp_path / "memo"
    path.write_text("a")
    _age(path)
    memo = FileMemo(memo_path, bool)
    memo.value(path, count)
    memo.save()
    if change == "memo damaged":
        memo_path.write_text('{"broken')
    elif change == "mtime":
        _age(path, 30)
    else:
        path.write_text("b" if change == "content" else "aa")
    assert FileMemo(memo_path, bool).value(path, count) == [sha256_file(path)]
    assert len(count.paths) == 2


def test_a_file_changed_a_moment_ago_is_not_remembered(tmp_path):
    path, count = tmp_path / "x", _Counter()
    path.write_text("a")
    for _ in range(2):
        memo = FileMemo(tmp_path / "memo", bool)
        memo.value(path, count)
        memo.save()
    assert len(count.paths) == 2


def test_a_memo_that_cannot_be_written_does_no_harm(tmp_path):
    path = tmp_path / "x"
    path.write_text("a")
    _age(path)
    memo = FileMemo("/proc/nowhere/memo", bool)
    assert memo.value(path, _Counter()) == [sha256_file(path)]
    memo.save()


def test_the_hash_of_several_files_knows_content_and_order_but_not_folders(tmp_path):
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a").write_text("a")
        (tmp_path / folder / "b").write_text("b")
    memo = FileMemo(tmp_path / "memo", bool)
    first = sha256_files([tmp_path / "one/a", tmp_path / "one/b"], memo)
    assert sha256_files([tmp_path / "two/a", tmp_path / "two/b"], memo) == first
    assert sha256_files([tmp_path / "one/b", tmp_path / "one/a"], memo) != first
    assert sha256_files([tmp_path / "one/a"], memo) != first


@pytest.mark.parametrize("text", ["demo", "my_lora-1.0", "A" * 64])
def test_a_plain_name_stays_as_it_is(text):
    assert safe_name(text) == text


def test_strange_names_become_safe_and_stay_apart():
    strange = ["", ".", "..", "-rf", "a b", "a  b", "{run}", "$(x)", "漢字", "日本", "a/b", "x" * 300, "it's"]
    safe = [safe_name(text) for text in strange]
    assert len(set(safe)) == len(strange)
    assert all(name.replace("-", "").replace("_", "").isalnum() and name.isascii() for name in safe), safe
    assert all(not name.startswith("-") and len(name) < 80 for name in safe)
