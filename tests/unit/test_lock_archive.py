"""A cache packed and unpacked: the same bytes, all or nothing, and nothing that an archive could do beside that."""

import hashlib
import io
import json
import os
import stat
import tarfile
from pathlib import Path

import cache_archive
import pytest
from locked import NAMES, cache, write_project

from qwen_image.dataset.config import load_dataset_config
from qwen_image.files import temporary_folder, temporary_name
from qwen_image.lock.archive import Member, table_text
from qwen_image.problems import InputError
from qwen_image.training.items import check_cache_files, join_manifests

KINDS = ("latents", "text_encoder_outputs")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A project and its packed cache."""
    folder = tmp_path_factory.mktemp("packed")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        write_project(folder)
        assert pack() == 0
    return folder


@pytest.fixture
def elsewhere(made, tmp_path, monkeypatch):
    """The working directory of another machine."""
    monkeypatch.chdir(tmp_path)
    Path("pets.tar").write_bytes((made / "pets.tar").read_bytes())
    return tmp_path


def pack(archive="pets.tar"):
    return cache_archive.main(["pack", "--dataset_config", "pets.toml", "--archive", archive])


def unpack(folder="moved", archive="pets.tar"):
    return cache_archive.main(["unpack", "--archive", archive, "--folder", folder])


def test_the_same_cache_is_the_same_bytes_without_time_owner_or_path(made, monkeypatch):
    monkeypatch.chdir(made)
    for path in Path("cache").iterdir():
        os.utime(path, (1, 1))
    assert pack("again.tar") == 0
    content = Path("again.tar").read_bytes()
    assert content == Path("pets.tar").read_bytes()
    assert str(made).encode() not in content
    with tarfile.open("again.tar") as tar:
        members = tar.getmembers()
    assert members[0].name == "table.tsv"
    assert all(
        (one.mtime, one.uid, one.gid, one.uname, one.gname, one.mode) == (0, 0, 0, "", "", 0o644) for one in members
    )


def test_what_arrives_is_what_was_packed_and_a_training_finds_everything(made, elsewhere):
    assert unpack() == 0
    for name in NAMES:
        for file in (f"{name}_0064x0064_qi.safetensors", f"{name}_qi_te.safetensors"):
            assert (elsewhere / "moved/cache/0/cache" / file).read_bytes() == (made / "cache" / file).read_bytes()
    for kind in KINDS:
        for ending in (".tsv", ".sha256", ".rejects.tsv"):
            arrived = elsewhere / f"moved/manifests/{kind}{ending}"
            assert arrived.read_bytes() == (made / f"results/manifests/pets/{kind}{ending}").read_bytes()
    settings = load_dataset_config("moved/pets.toml")
    assert settings[0].resolution == (64, 64) and not Path(settings[0].image_directory).exists()
    joined = join_manifests(*(f"moved/manifests/{kind}.tsv" for kind in KINDS), settings)
    assert len(joined.items) == len(NAMES)
    check_cache_files(joined.items)
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE(os.stat("moved").st_mode) == 0o777 & ~umask
    assert sorted(os.listdir()) == ["moved", "pets.tar"], "no temporary is left"


def test_a_folder_that_holds_anything_is_never_written_to(elsewhere):
    Path("moved").mkdir()
    assert unpack() == 0, "an empty one may stand there"
    before = sorted(Path("moved").rglob("*"))
    with pytest.raises(InputError, match="not empty"):
        unpack()
    Path("mine").write_text("mine")
    with pytest.raises(InputError, match="not empty"):
        unpack("mine")
    Path("link").symlink_to("nowhere")
    with pytest.raises(InputError, match="not empty"):
        unpack("link")
    assert sorted(Path("moved").rglob("*")) == before and Path("mine").read_text() == "mine"


@pytest.mark.parametrize("position", [0.02, 0.3, 0.5, 0.7])
def test_a_damaged_archive_leaves_nothing(elsewhere, position):
    content = bytearray(Path("pets.tar").read_bytes())
    used = len(content.rstrip(b"\0"))
    content[int(used * position)] ^= 0x41
    Path("pets.tar").write_bytes(content)
    # most bytes belong to some member; a few only fill its last block
    try:
        unpack()
    except InputError as error:
        assert "nothing was unpacked" in str(error)
        assert os.listdir() == ["pets.tar"]
    else:
        assert sorted(os.listdir()) == ["moved", "pets.tar"]


@pytest.mark.parametrize("part", [0.0, 0.1, 0.6, 0.9])
def test_a_truncated_archive_leaves_nothing(elsewhere, part):
    content = Path("pets.tar").read_bytes()
    Path("pets.tar").write_bytes(content[: int(len(content.rstrip(b"\0")) * part)])
    with pytest.raises(InputError, match="nothing was unpacked"):
        unpack()
    assert os.listdir() == ["pets.tar"]


def forged(entries, path="pets.tar", table=None):
    """Write an archive of these entries, or with a table of others: pairs of a name, or a tar header, and content."""
    members = [
        Member(getattr(name, "name", name), len(data), hashlib.sha256(data).hexdigest())
        for name, data in (entries if table is None else table)
    ]
    with tarfile.open(path, "w") as tar:
        for name, data in [("table.tsv", table_text(members).encode()), *entries]:
            info = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def link(name, target, kind):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


@pytest.mark.parametrize(
    "name",
    [
        "../canary", "/canary", "cache/0/../../canary", "cache/0/cache/..", "canary", "manifests/../canary",
        "cache/x/cache/file", "cache/0/a/b/c/d", "manifests/latents.tsv/x", "cache//0/file", "manifests/prompts/../x",
        "table.tsv", "cache/0/cache/nul\0",
    ],
)  # fmt: skip
def test_a_member_that_leads_elsewhere_is_refused(elsewhere, name):
    forged([(name, b"x")])
    with pytest.raises(InputError, match="nothing was unpacked"):
        unpack()
    assert os.listdir() == ["pets.tar"] and not (elsewhere.parent / "canary").exists()


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.DIRTYPE])
def test_only_files_are_members(elsewhere, kind):
    forged([(link("cache/0/cache/x", "/etc/passwd", kind), b"")])
    with pytest.raises(InputError, match="nothing was unpacked"):
        unpack()
    assert os.listdir() == ["pets.tar"]


def extended(*records):
    """The bytes of a header of the kind that says more about the next one."""
    body = b""
    for key, value in records:
        length = next(n for n in range(len(key + value) + 3, 10**6) if n == len(f"{n} {key}={value}\n"))
        body += f"{length} {key}={value}\n".encode()
    info = tarfile.TarInfo("x")
    info.type, info.size = tarfile.XHDTYPE, len(body)
    return info.tobuf(tarfile.USTAR_FORMAT) + body + bytes(-len(body) % 512)


def header(kind, size=0, name="table.tsv"):
    info = tarfile.TarInfo(name)
    info.type, info.size = kind, size
    return info.tobuf(tarfile.GNU_FORMAT)


HEADERS = {
    "sparse, old": header(tarfile.GNUTYPE_SPARSE),
    "sparse, map": extended(("GNU.sparse.map", "abc"), ("GNU.sparse.size", "1")),
    "sparse, 1.0": extended(("GNU.sparse.major", "1"), ("GNU.sparse.minor", "0")),
    "sparse, 0.0": extended(("GNU.sparse.offset", "x"), ("GNU.sparse.size", "y")),
    "sparse, digits": extended(("GNU.sparse.size", "1" * 5000)),
    "size, digits": extended(("size", "1" * 5000)),
    "size, negative": extended(("size", "-5")),
    "path with NUL": extended(("path", "a\0b")),
    "global": header(tarfile.XGLTYPE, 5) + b"x" * 512,
    "long names": (header(tarfile.GNUTYPE_LONGNAME, 2, "././@LongLink") + b"a".ljust(512, b"\0")) * 3000,
    "long name of 1 TB": header(tarfile.GNUTYPE_LONGNAME, 2**40, "././@LongLink"),
    "long link": header(tarfile.GNUTYPE_LONGLINK, 2) + bytes(512),
}


@pytest.mark.parametrize("name", HEADERS)
def test_headers_that_no_archive_has_are_refused_in_words(elsewhere, name):
    table = table_text([Member("datasets.json", 0, hashlib.sha256().hexdigest())]).encode()
    sound = header(tarfile.REGTYPE, len(table)) + table.ljust(512, b"\0")
    for before in (b"", sound):
        Path("pets.tar").write_bytes(before + HEADERS[name] + header(tarfile.REGTYPE, 0, "datasets.json") + bytes(2048))
        with pytest.raises(InputError, match="nothing was unpacked"):
            unpack()
        assert os.listdir() == ["pets.tar"]


def test_a_member_that_stands_twice_is_refused(elsewhere):
    twice = [("datasets.json", b"{}"), ("datasets.json", b"{}")]
    forged(twice)
    with pytest.raises(InputError, match="stands twice in its table"):
        unpack()
    # once in the table, twice behind it
    forged(twice, table=twice[:1])
    with pytest.raises(InputError, match="more than its table says"):
        unpack()
    assert os.listdir() == ["pets.tar"]


DATASET = {
    "index": 0, "resolution": [64, 64], "enable_bucket": False, "bucket_no_upscale": False,
    "caption_extension": ".txt", "multiple_captions": False, "batch_size": 1, "num_repeats": 1, "loss_weight": 1.0,
    "image_directory": "im", "image_jsonl_file": None, "cache_directory": "c", "control_directory": None,
    "multiple_target": False, "no_resize_control": False, "control_resolution": None, "alpha_background": "white",
}  # fmt: skip


@pytest.mark.parametrize(
    "changes",
    [
        {"cache_directory": None}, {"cache_directory": 5}, {"cache_directory": ".."}, {"image_directory": "\ud800"},
        {"image_directory": "a/b"}, {"caption_extension": ".\ud800"}, {"caption_extension": None}, {"evil": 1},
        {"caption_extension": "/../x."}, {"loss_weight": float("nan")}, {"resolution": [[1]]}, {"index": 1},
        {"file": "\ud800.toml"}, {"file": "../x.toml"}, {"file": 5}, {"file": "datasets.json"}, {"file": "x" * 99},
    ],
)  # fmt: skip
def test_settings_that_no_dataset_has_are_refused(elsewhere, changes):
    file = changes.get("file", "pets.toml")
    settings = DATASET | {key: value for key, value in changes.items() if key != "file"}
    forged([("datasets.json", json.dumps({"file": file, "datasets": [settings]}).encode())])
    with pytest.raises(InputError, match="settings cannot be read"):
        unpack()
    assert os.listdir() == ["pets.tar"]


def test_a_name_that_no_file_can_have_is_refused(elsewhere):
    table = b'member\tbytes\tsha256\n"cache/0/c/\\ud800"\t1\t' + b"0" * 64 + b"\n"
    Path("pets.tar").write_bytes(header(tarfile.REGTYPE, len(table)) + table.ljust(512, b"\0") + bytes(1024))
    with pytest.raises(InputError, match="is no member of a cache's archive"):
        unpack()


def test_what_a_killed_unpacking_left_is_removed_and_what_is_at_work_stays(elsewhere):
    with temporary_folder(elsewhere) as at_work:
        left, mine = Path(temporary_name()), Path(".tmp-mine")
        (left / "deep").mkdir(parents=True)
        (left / "deep/file").write_text("x")
        mine.mkdir()
        assert unpack() == 0
        assert at_work.exists() and mine.exists() and not left.exists()


def test_an_archive_of_other_things_is_refused(elsewhere):
    for content in (b"", b"no tar at all" * 100):
        Path("pets.tar").write_bytes(content)
        with pytest.raises(InputError, match="no whole archive"):
            unpack()
    forged([("datasets.json", b'{"file": "../x.toml", "datasets": []}')])
    with pytest.raises(InputError, match="settings cannot be read"):
        unpack()
    forged([("datasets.json", b"[" * 100_000)])
    with pytest.raises(InputError, match="settings cannot be read"):
        unpack()
    with pytest.raises(InputError, match="No such file"):
        unpack(archive="absent.tar")
    assert os.listdir() == ["pets.tar"]


def test_an_archive_larger_than_the_disk_is_refused_before_anything_is_written(elsewhere, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: _Usage())
    with pytest.raises(InputError, match="do not fit"):
        unpack()
    assert os.listdir() == ["pets.tar"]


class _Usage:
    free = 1000


def test_a_cache_that_is_not_whole_is_not_packed(made, tmp_path, monkeypatch):
    monkeypatch.chdir(made)
    file = Path("cache/cat_qi_te.safetensors")
    content = file.read_bytes()
    try:
        file.write_bytes(content[:-1])
        with pytest.raises(InputError, match="truncated"):
            pack(str(tmp_path / "bad.tar"))
        file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        with pytest.raises(InputError, match=rf"{file}: is damaged.*\n    -> delete it"):
            pack(str(tmp_path / "bad.tar"))
        file.unlink()
        with pytest.raises(InputError, match="cannot be read"):
            pack(str(tmp_path / "bad.tar"))
    finally:
        file.write_bytes(content)
    assert os.listdir(tmp_path) == []


def test_names_of_any_kind_survive(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_project(tmp_path)
    odd = "-ein Fuchs \\ 🦊 'x' \"y\" {z}\n$(w)\t" + "ü" * 80
    for ending in ("png", "txt"):
        os.rename(f"images/fox.{ending}", f"images/{odd}.{ending}")
    cache()
    assert pack() == 0 and unpack() == 0
    assert f"{odd}_qi_te.safetensors" in os.listdir("moved/cache/0/cache")
