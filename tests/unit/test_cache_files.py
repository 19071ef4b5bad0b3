"""Cache files on the disk: whether they fit, what is in the way, and those that another program wrote."""

import errno
import hashlib
import os
import shutil
import socket
from collections import namedtuple
from pathlib import Path

import pytest
import qwen_image_cache_latents
import torch
from bench import Bench
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from qwen_image import container
from qwen_image.cache import foreign, saver, space
from qwen_image.container import read_header
from qwen_image.problems import InputError

KINDS = ("latents", "texts")


@pytest.fixture
def bench(tmp_path):
    return Bench(tmp_path)


# ---- room ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_disk_that_is_too_small_stops_before_the_first_file(bench, monkeypatch, kind):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(space.shutil, "disk_usage", lambda _: usage(10**9, 10**9, 5000))
    with pytest.raises(InputError, match=r"kB of cache files do not fit, 5\.0 kB are free") as error:
        getattr(bench, kind)()
    assert "cache_directory" in str(error.value)
    assert not bench.cache.exists()


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_killed_run_was_writing_goes_with_the_next_that_writes(bench, kind):
    bench.cache.mkdir()
    here = hashlib.sha256(socket.gethostname().encode()).hexdigest()[:4]
    elsewhere, old = (f".tmp-{'0000' if here != '0000' else '1111'}{rest}" for rest in ("0123456789ab", "ba9876543210"))
    for name in (f".tmp-{here}0123456789ab", elsewhere, old, ".tmp-mine", "notes.txt"):
        (bench.cache / name).write_text("half")
    # what another machine writes may have a lock that is not seen here
    os.utime(bench.cache / old, (1_600_000_000, 1_600_000_000))
    getattr(bench, kind)()
    left = {path.name for path in bench.cache.iterdir() if path.suffix != ".safetensors"}
    assert left == {elsewhere, ".tmp-mine", "notes.txt"}


@pytest.mark.parametrize("kind", KINDS)
def test_the_estimate_is_what_is_then_written(bench, kind):
    getattr(bench, kind)()
    (line,) = [line for line in bench.output.splitlines() if "to write" in line]
    blocks = sum(-(-path.stat().st_size // space.BLOCK) * space.BLOCK for path in bench.cache.iterdir())
    assert line.endswith(f"about {space.readable(blocks)} to write")


def test_what_is_replaced_makes_room_for_what_replaces_it(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(space.shutil, "disk_usage", lambda _: usage(10**9, 10**9, 200_000))
    files = [(tmp_path / str(number), 100_000) for number in range(50)]
    with pytest.raises(InputError, match="do not fit"):
        space.check_space(files, waiting=1)
    for path, size in files:
        path.write_bytes(bytes(size))
    assert space.check_space(files, waiting=1) == 50 * 102_400
    with pytest.raises(InputError, match="do not fit"):
        space.check_space(files, waiting=4)


def test_sizes_are_readable():
    assert [space.readable(size) for size in (0, 999, 1000, 52_300_000, 3.21e9, 4e13)] == [
        "0 bytes", "999 bytes", "1.0 kB", "52.3 MB", "3.2 GB", "40.0 TB",
    ]  # fmt: skip


def test_a_disk_that_fills_up_stops_and_keeps_what_is_written(bench, monkeypatch):
    real, written = saver.write_safetensors, []

    def write(path, *more):
        if written:
            raise OSError(errno.ENOSPC, "No space left on device")
        written.append(path)
        real(path, *more)

    monkeypatch.setattr(saver, "write_safetensors", write)
    with pytest.raises(InputError, match=r"_qi\.safetensors: cannot be written: No space left on device"):
        bench.latents()
    assert list(bench.cache.iterdir()) == written
    monkeypatch.undo()
    assert bench.latents()["encoded"] == len(bench.names) - 1


def test_what_stands_in_one_files_way_costs_that_item_alone(bench):
    bench.latents()
    (path,) = bench.cache.glob("astronaut_*")
    path.unlink()
    (path / "folder").mkdir(parents=True)
    with pytest.raises(InputError, match=r"astronaut\.png: its cache file .* cannot be written") as error:
        bench.latents()
    assert len(error.value.problems) == 1
    assert (path / "folder").is_dir()


# ---- another program's files -----------------------------------------------------------------------------------------


def as_foreign(bench, pattern="*.safetensors", **metadata):
    """Turn cache files into what musubi-tuner writes: the same names, tensors and metadata, no fingerprint."""
    found = []
    for path in bench.cache.glob(pattern):
        kept = {
            key: value
            for key, value in read_header(path).metadata.items()
            if key in ("architecture", "format_version", "width", "height", "caption1")
        }
        save_file(load_file(path), path, metadata=kept | metadata)
        found.append(path)
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_a_foreign_file_is_encoded_anew_and_kept_beside(bench, kind):
    run = getattr(bench, kind)
    run()
    before = {path: path.read_bytes() for path in as_foreign(bench)}
    assert run()["encoded"] == len(bench.names)
    for path, content in before.items():
        assert path.with_name(f"{path.name}.replaced").read_bytes() == content
        assert "fingerprint" in read_header(path).metadata
    as_foreign(bench)
    run()
    assert len(list(bench.cache.glob("*.replaced-2"))) == len(bench.names), "an older one is not overwritten"
    assert run()["encoded"] == 0


@pytest.mark.parametrize("kind", KINDS)
def test_a_fitting_foreign_file_is_adopted_when_asked(bench, kind):
    run = getattr(bench, kind)
    run()
    before = {path: load_file(path) for path in as_foreign(bench)}
    counts = run("--adopt_existing")
    assert (counts["encoded"], counts["adopted"]) == (0, len(bench.names))
    assert set(bench.manifest({"texts": "text_encoder_outputs"}.get(kind, kind))["arithmetic"]) == {"adopted"}
    for path, tensors in before.items():
        for name, tensor in load_file(path).items():
            assert torch.equal(tensor, tensors[name])
    assert run()["encoded"] == 0, "what was adopted stays"
    assert run("--deterministic")["encoded"] == len(bench.names), "but nobody knows how it came about"


def change_tensors(bench, change):
    for path in bench.cache.iterdir():
        tensors = {name: change(tensor).contiguous() for name, tensor in load_file(path).items()}
        save_file(tensors, path, metadata=read_header(path).metadata)


@pytest.mark.parametrize(
    ("kind", "spoil", "reason"),
    [
        ("latents", lambda bench: bench.settings("resolution = 96"), "bucket"),
        ("latents", lambda bench: as_foreign(bench, width="63"), "metadata says otherwise: width"),
        ("latents", lambda bench: as_foreign(bench, architecture="other"), "metadata says otherwise: architecture"),
        ("texts", lambda bench: as_foreign(bench, caption1="another caption"), "metadata says otherwise: caption1"),
        ("texts", lambda bench: change_tensors(bench, lambda x: x[:, 1:]), "gives"),
        ("texts", lambda bench: change_tensors(bench, lambda x: x * torch.nan), "NaN"),
    ],
)  # fmt: skip
def test_a_foreign_file_that_does_not_fit_is_not_adopted(bench, kind, spoil, reason):
    run = getattr(bench, kind)
    run()
    as_foreign(bench)
    spoil(bench)
    counts = run("--adopt_existing")
    assert counts["encoded"] == len(bench.names)
    assert "adopted" not in counts
    assert bench.output.count(": not adopted ") == len(bench.names)
    assert reason in bench.output


def test_a_foreign_file_that_cannot_be_read_any_more_is_not_adopted(bench, monkeypatch):
    """Its header was sound a moment before."""
    bench.texts()
    as_foreign(bench)

    def damaged(path):
        raise SafetensorError("Error while deserializing header: incomplete metadata")

    monkeypatch.setattr("safetensors.torch.load_file", damaged)
    assert bench.texts("--adopt_existing")["encoded"] == len(bench.names)
    assert bench.output.count("it cannot be read (Error while deserializing header") == len(bench.names)


def test_everything_anew_adopts_nothing(bench):
    bench.latents()
    as_foreign(bench)
    command = [word for word in bench.command("latents", "--adopt_existing") if word != "--skip_existing"]
    assert qwen_image_cache_latents.main(command) == 0
    assert set(bench.manifest()["arithmetic"]) == {"deterministic"}


def test_adopting_where_nothing_can_be_written_is_told(bench, monkeypatch):
    bench.texts()
    as_foreign(bench)

    def refuse(*_):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(container, "write_safetensors", refuse)
    with pytest.raises(InputError, match="cannot be adopted: Permission denied"):
        bench.texts("--adopt_existing")


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_that_another_program_changed_in_place_is_foreign(bench, kind):
    """musubi-tuner keeps the metadata that it finds in a text-encoder file, ours with it."""
    run = getattr(bench, kind)
    run()
    for path in bench.cache.iterdir():
        metadata = read_header(path).metadata
        save_file({name: tensor + 1 for name, tensor in load_file(path).items()}, path, metadata=metadata)
    before = {path: path.read_bytes() for path in bench.cache.iterdir()}
    assert run()["encoded"] == len(bench.names)
    for path, content in before.items():
        assert path.with_name(f"{path.name}.replaced").read_bytes() == content


def test_somebody_elses_key_of_our_name_makes_no_file_ours(bench):
    bench.latents()
    (path, *_) = as_foreign(bench, fingerprint="of another kind")
    content = path.read_bytes()
    bench.latents()
    assert path.with_name(f"{path.name}.replaced").read_bytes() == content


def test_what_is_set_aside_is_never_written_over(bench, monkeypatch):
    """Two runs at once: both find the foreign file, one is faster."""
    bench.latents()
    path = as_foreign(bench, "astronaut_*")[0]
    content, link = path.read_bytes(), os.link

    def slow(source, target):
        monkeypatch.setattr(os, "link", link)
        foreign.set_aside(path)
        save_file({"x": torch.zeros(1)}, path)
        link(source, target)

    monkeypatch.setattr(os, "link", slow)
    foreign.set_aside(path)
    assert path.with_name(f"{path.name}.replaced").read_bytes() == content
    assert path.exists()


def test_a_file_system_without_links_keeps_the_foreign_file_too(bench, monkeypatch):
    bench.latents()
    path = as_foreign(bench, "astronaut_*")[0]
    content = path.read_bytes()

    def refuse(*_):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    bench.latents()
    assert path.with_name(f"{path.name}.replaced").read_bytes() == content


def test_a_damaged_file_is_nobodys_and_simply_replaced(bench):
    bench.latents()
    path = next(bench.cache.iterdir())
    path.write_bytes(path.read_bytes()[:100])
    assert bench.latents()["encoded"] == 1
    assert not list(bench.cache.glob("*.replaced*"))


def test_adopting_and_determinism_exclude_each_other(bench):
    with pytest.raises(InputError, match="nobody knows"):
        bench.latents("--adopt_existing", "--deterministic")


def test_a_shard_beyond_the_last_is_refused(bench):
    with pytest.raises(InputError, match=r"--shard: found 3, with --num_shards 2"):
        bench.latents("--shard", "3", "--num_shards", "2")


def test_a_shards_table_does_not_pass_for_the_datasets(bench, monkeypatch):
    monkeypatch.chdir(bench.folder)
    command = bench.command("latents")
    at = command.index("--manifest")
    del command[at : at + 2]
    for shard in ("1", "2"):
        assert qwen_image_cache_latents.main([*command, "--shard", shard, "--num_shards", "2"]) == 0
    tables = sorted(path.name for path in Path("results/manifests/dataset").rglob("latents.*"))
    assert tables == [
        f"latents.{shard}-of-2.{ending}" for shard in (1, 2) for ending in ("rejects.tsv", "sha256", "tsv")
    ]


def test_an_orphan_goes_only_where_all_items_are_known(bench):
    bench.latents()
    shutil.copy(next(bench.cache.glob("astronaut_*")), bench.cache / "gone_0001x0001_qi.safetensors")
    bench.latents("--shard", "1", "--num_shards", "2", keep=False)
    assert (bench.cache / "gone_0001x0001_qi.safetensors").exists()
    assert bench.latents(keep=False)["removed"] == 1
