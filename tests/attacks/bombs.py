"""Small files that stand for very much, each given to its parser in a process whose memory and time are limited.

    python tests/attacks/bombs.py FOLDER

Writes the bombs there one after the other and prints a line of JSON for each: its name, what the parser said, the CPU
seconds it took and the megabytes by which the process grew.
"""

from __future__ import annotations

import io
import itertools
import json
import os
import resource
import signal
import struct
import sys
import tarfile
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "scripts"), str(ROOT / "tests"), str(Path(__file__).parent)]

from image_files import chunk, claiming, png  # noqa: E402
from parsers import LOCK, LORA, PARSERS, container, picture  # noqa: E402

from qwen_image.adapter.files import PEFT_KEY  # noqa: E402
from qwen_image.lock.archive import HEAD as HEAD_OF_TABLE  # noqa: E402
from qwen_image.lock.rows import HEAD as HEAD_OF_LOCK  # noqa: E402

MEGABYTE = 2**20
LARGE = 100 * MEGABYTE
MEMORY = 1536 * MEGABYTE
"""What a parser may take beyond what the process has when it starts."""
SECONDS = 300
"""Of CPU time, for all bombs together."""
READ = {parser.name: parser for parser in PARSERS}
ALARM = 1800
"""Seconds after which a parser that waits for something ends the process."""
Write = Callable[[Path], object]


def content(data: bytes) -> Write:
    return lambda path: path.write_bytes(data)


def sparse(size: int, start: bytes = b"") -> Write:
    """A file of this size that takes no room on the disk."""

    def write(path: Path) -> None:
        path.write_bytes(start)
        os.truncate(path, size)

    return write


def laughs(opening: str, between: str, closing: str, levels: int = 12) -> bytes:
    """YAML whose anchors repeat each other nine times a level."""
    names = "abcdefghijklmnop"[: levels + 1]
    lines = [f"{names[0]}: &{names[0]} {{x: 1}}"]
    for old, new in itertools.pairwise(names):
        lines.append(f"{new}: &{new} {opening}{between.join([f'*{old}'] * 9)}{closing}")
    return "\n".join([*lines, f"optimizer_args: *{names[levels]}", ""]).encode()


def gigapixels(side: int) -> bytes:
    """A PNG file of one-bit pixels that is whole: two gigapixels and more in a few hundred kilobytes."""
    packer, row = zlib.compressobj(9), bytes(1 + side // 8)
    data = b"".join(packer.compress(row * 500) for _ in range(side // 500)) + packer.flush()
    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def text_bomb(kind: bytes, head: bytes) -> bytes:
    """A PNG file whose compressed text or profile is 500 MB long."""
    return png(struct.pack(">IIBBBBB", 1, 1, 8, 2, 0, 0, 0), bytes(4), chunk(kind, head + zeros(500)))


def zeros(megabytes: int) -> bytes:
    """So many megabytes of zeros, packed."""
    packer = zlib.compressobj(9)
    return b"".join(packer.compress(bytes(MEGABYTE)) for _ in range(megabytes)) + packer.flush()


def resized(kind: str, at: int, layout: str, *size: int) -> bytes:
    """A small picture whose header claims another size."""
    data = bytearray(picture(kind))
    struct.pack_into(layout, data, at, *size)
    return bytes(data)


def jpeg(width: int, height: int) -> bytes:
    data = picture("JPEG")
    at = data.index(b"\xff\xc0") + 5
    return data[:at] + struct.pack(">HH", height, width) + data[at + 4 :]


def beside(suffix: str, write: Write) -> Write:
    """An ordinary file, with another one beside it."""

    def both(path: Path) -> None:
        path.write_bytes(b"")
        path.with_suffix(suffix).unlink(missing_ok=True)
        write(path.with_suffix(suffix))

    return both


def header(name: str, size: int, kind: bytes = tarfile.REGTYPE) -> bytes:
    """A tar header."""
    info = tarfile.TarInfo(name)
    info.size, info.type = size, kind
    return info.tobuf(tarfile.GNU_FORMAT)


def named(size: int) -> bytes:
    """A tar header behind which a long name follows."""
    return header("././@LongLink", size, tarfile.GNUTYPE_LONGNAME)


def archive_of(table: bytes) -> bytes:
    """An archive with this table and nothing else."""
    return header("table.tsv", len(table)) + table + bytes(10_240)


def frames(kind: str, count: int) -> bytes:
    """A small picture that moves."""
    stream, size = io.BytesIO(), (8, 8)
    first, *others = (Image.new("RGB", size, (83 * n % 256, n // 256, 31 * n % 256)) for n in range(count))
    first.save(stream, kind, save_all=True, append_images=others, lossless=True)
    return stream.getvalue()


def canvas(width: int, height: int) -> bytes:
    """A moving WebP picture that claims this canvas."""
    data = bytearray(frames("WEBP", 3))
    at = data.index(b"VP8X") + 12
    data[at : at + 6] = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    return bytes(data)


def avif(width: int, height: int) -> bytes:
    """An AVIF picture that claims this size."""
    data = picture("AVIF")
    at = data.index(b"ispe") + 8
    return data[:at] + struct.pack(">II", width, height) + data[at + 8 :]


def apng(count: int, claimed: int) -> bytes:
    """A PNG picture of one pixel that moves."""
    control = struct.pack(">IIIIHHBB", 1, 1, 0, 0, 1, 10, 0, 0)
    parts = [chunk(b"acTL", struct.pack(">II", claimed, 0)), chunk(b"fcTL", struct.pack(">I", 0) + control)]
    whole = png(struct.pack(">IIBBBBB", 1, 1, 8, 2, 0, 0, 0), bytes(4), b"".join(parts))
    for number in range(1, 2 * count - 1, 2):
        parts.append(chunk(b"fcTL", struct.pack(">I", number) + control))
        parts.append(chunk(b"fdAT", struct.pack(">I", number + 1) + zlib.compress(bytes(4))))
    return whole[:-12] + b"".join(parts[2:]) + whole[-12:]


def tiff(width: int, height: int, strip: bytes = bytes(16), pages: int = 1, **others: tuple[int, int, int]) -> bytes:
    """A grey TIFF picture of one strip, packed if it is long; `others` are tags by number: type, count, value."""
    size = 10 + 12 * 9 + 4 - 8
    tags = {
        256: (4, 1, width), 257: (4, 1, height), 258: (3, 1, 8), 259: (3, 1, 1 if len(strip) <= 16 else 8),
        262: (3, 1, 1), 273: (4, 1, 8 + pages * size), 277: (3, 1, 1), 278: (4, 1, height), 279: (4, 1, len(strip)),
    }  # fmt: skip
    tags |= {int(name[1:]): value for name, value in others.items()}
    entries = b"".join(struct.pack("<HHII", tag, *value) for tag, value in sorted(tags.items()))
    later = [8 + number * size for number in range(1, pages)]
    listed = b"".join(struct.pack("<H", len(tags)) + entries + struct.pack("<I", at) for at in [*later, 0])
    return b"II*\0" + struct.pack("<I", 8) + listed + strip


def pictures() -> Iterator[tuple[str, str, Write]]:
    """Yield pictures that are larger than they look, or have more to them than the one frame that is read."""
    yield "claims gigapixels", "image, PNG", content(claiming(60_000, 60_000))
    yield "is gigapixels", "image, PNG", content(gigapixels(50_000))
    for kind, head in ((b"zTXt", b"a\0\0"), (b"iCCP", b"a\0\0"), (b"iTXt", b"a\0\1\0\0\0")):
        yield kind.decode(), "image, PNG", content(text_bomb(kind, head))
    yield "claims gigapixels", "image, JPEG", content(jpeg(65_500, 65_500))
    yield "claims gigapixels", "image, GIF", content(resized("GIF", 6, "<HH", 65_535, 65_535))
    yield "claims gigapixels", "image, BMP", content(resized("BMP", 18, "<ii", 60_000, 60_000))
    yield "claims gigapixels", "image, AVIF", content(avif(60_000, 60_000))
    yield "claims gigapixels", "image, WEBP", content(canvas(60_000, 60_000))
    yield "claims gigapixels", "image, TIFF", content(tiff(60_000, 60_000))
    yield "claims all pixels", "image, TIFF", content(tiff(2**32 - 1, 2**32 - 1))
    yield "claims samples", "image, TIFF", content(tiff(1, 1, _277=(3, 1, 65_535)))
    yield "claims strips", "image, TIFF", content(tiff(1, 1, _273=(4, 2**30, 64)))
    yield "a frame of gigapixels", "image, GIF", content(_with_large_frame())
    yield "claims frames", "image, PNG", content(apng(2, 2**31 - 1))
    yield "many frames", "image, PNG", content(apng(20_000, 20_000))
    for kind, count in (("GIF", 3000), ("WEBP", 1000), ("AVIF", 50)):
        yield "many frames", f"image, {kind}", content(frames(kind, count))
    yield "many frames", "image, TIFF", content(tiff(1, 1, pages=50_000))
    yield "more than its pixels", "image, TIFF", content(tiff(1, 1, zeros(100)))
    yield (
        "more than its pixels",
        "image, PNG",
        content(png(struct.pack(">IIBBBBB", 1, 1, 8, 2, 0, 0, 0), bytes(100 * MEGABYTE))),
    )


def _with_large_frame() -> bytes:
    data = frames("GIF", 2)
    at = data.index(b"\x2c") + 5
    return data[:at] + struct.pack("<HH", 65_535, 65_535) + data[at + 4 :]


def shaped(shape: bytes, end: int = 1) -> bytes:
    """A safetensors file with this shape."""
    return container(b'{"a":{"dtype":"U8","shape":%b,"data_offsets":[0,%d]}}' % (shape, end), bytes(end))


def bombs() -> Iterator[tuple[str, str, Write]]:
    """Yield each bomb's name, the parser it is for and what writes it."""
    for name in ("dataset TOML", "prompts, TOML", "training TOML", "tracker TOML"):
        yield "brackets", name, content(b"a = " + b"[" * 100_000)
        yield "inline tables", name, content(b"a = " + b"{a = " * 100_000)
        yield "a dotted key", name, content(b"a." * 100_000 + b"a = 1")
        yield "a dotted table", name, content(b"[" + b"a." * 190 + b"a]")
        yield "decimal digits", name, content(b"a = " + b"9" * 500_000)
        yield "hexadecimal digits", name, content(b"seed = 0x" + b"f" * 500_000)
        yield "a long line", name, content(b'a = "' + b"x" * LARGE + b'"')
        yield "a huge file", name, sparse(2**40)
        yield "a device", name, lambda path: path.symlink_to("/dev/zero")
        yield "a pipe", name, os.mkfifo
    for name in ("dataset JSON", "prompts, JSON", "index of shards", "model's config", "tokenizer"):
        yield "brackets", name, content(b"[" * 1_000_000)
        yield "objects", name, content(b'{"a":' * 100_000)
        yield "decimal digits", name, content(b'{"a": ' + b"9" * 500_000 + b"}")
        yield "a huge file", name, sparse(2**40)
    for merge in (b"<<: ", b""):
        opening = "{" + merge.decode() + "[" if merge else "["
        yield f"anchors {merge.decode()}", "configuration YAML", content(laughs(opening, ",", "]}" if merge else "]"))
    yield "brackets", "configuration YAML", content(b"a: " + b"[" * 100_000)
    yield "an anchor in itself", "configuration YAML", content(b"optimizer_args: &a [*a]\nbase_weights: &b {c: *b}\n")
    yield "a long line", "configuration YAML", content(b"dit: " + b"x" * LARGE)
    yield "a huge file", "configuration YAML", sparse(2**40)
    yield "brackets", "dataset JSONL", content(b'{"image_path": ' + b"[" * LARGE)
    yield "a long caption", "dataset JSONL", content(b'{"image_path": "a.png", "caption": "' + b"x" * LARGE + b'"}')
    yield "a huge file", "dataset JSONL", sparse(2**40)
    yield "a device", "dataset JSONL", lambda path: path.symlink_to("/dev/zero")
    yield "a long line", "caption file", content(b"x" * LARGE)
    yield "a huge file", "caption file", sparse(2**40)
    yield "a device", "caption file", lambda path: path.symlink_to("/dev/zero")
    yield "a long line", "manifest TSV", content(b"x" * LARGE)
    yield "columns", "manifest TSV", content(b"key\t" * 1_000_000 + b"\n1\n")
    yield "an open quote", "manifest TSV", content(b'dataset\tkey\tcache_file\n0\t"' + b"x\t\n" * 10_000_000)
    for name in ("manifest TSV", "lock of a dataset", "packed cache"):
        yield "a huge file", name, sparse(2**40)
        yield "a device", name, lambda path: path.symlink_to("/dev/zero")
        yield "a pipe", name, os.mkfifo
    yield "a pipe as its digest", "manifest TSV", beside(".sha256", os.mkfifo)
    yield "a device as its digest", "manifest TSV", beside(".sha256", lambda path: path.symlink_to("/dev/zero"))
    yield "a long line", "lock of a dataset", content(HEAD_OF_LOCK.encode() + b"x\tx\tx\t" + b"x" * LARGE)
    yield "tabs", "lock of a dataset", content(HEAD_OF_LOCK.encode() + b"\t" * LARGE)
    yield (
        "a setting of brackets",
        "lock of a dataset",
        content(LOCK.encode() + b"run b\tsetting\tseed\t" + b"[" * LARGE),
    )
    yield "a long name of 1 TB", "packed cache", sparse(2**40, named(2**40))
    yield "long names", "packed cache", content((named(2) + b"a".ljust(512, b"\0")) * 10_000)
    yield "a table of 1 TB", "packed cache", sparse(2**40, header("table.tsv", 2**40))
    yield "a table of brackets", "packed cache", content(archive_of(HEAD_OF_TABLE.encode() + b"[" * LARGE))
    yield "a long line", "prompts, text", content(b"x" * LARGE)
    yield "switches", "prompts, text", content(b"x" + b" --q 1" * 150_000)
    for text in (b"(" * 100_000, b"[" * 100_000, b"-" * 100_000 + b"1", b"{1:" * 90, b"9" * 100_000, b"a." * 50_000):
        yield f"conv_dim={text[:3].decode()}", "key=value arguments", content(b"conv_dim=" + text)
    yield "conv_dim=9**9", "key=value arguments", content(b"conv_dim=9**9**9**9")
    yield "header of 8 EB", "safetensors header", content(b"\xff" * 100)
    yield "header of 99 MB", "safetensors header", sparse(LARGE, struct.pack("<Q", 99_000_000))
    yield "brackets", "safetensors header", content(container(b'{"a":' + b"[" * 30_000_000))
    yield "entries", "safetensors header", content(container(b"{%b}" % b",".join(b'"%x":0' % i for i in range(10**6))))
    yield "sizes", "safetensors header", content(shaped(b"[%b]" % b",".join([b"4611686018427387904"] * 100_000)))
    yield "sizes and a zero", "safetensors header", content(shaped(b"[0,%b]" % b",".join([b"9" * 18] * 9), 0))
    yield "digits", "safetensors header", content(shaped(b"[%b]" % b",".join([b"9" * 4000] * 2000)))
    yield "dimensions", "safetensors header", content(shaped(b"[%b]" % b",".join([b"1"] * 10**6)))
    for name in ("safetensors header", "adapter"):
        yield "a device", name, lambda path: path.symlink_to("/dev/zero")
        yield "a pipe", name, os.mkfifo
    yield "brackets", "tree of a state", content(container({"__metadata__": {"tree": '{"list":[' * 100_000}}))
    yield "brackets", "adapter", content(container(LORA | {"__metadata__": {PEFT_KEY: "[" * 100_000}}, bytes(16)))
    yield "brackets", "memo of hashes", content(b"[" * 1_000_000)
    yield "brackets", "facts of a state", content(b"[" * 1_000_000)
    yield from pictures()
    yield from wrong_everywhere()


def many(form: bytes, count: int, before: bytes = b"", between: bytes = b"\n", after: bytes = b"") -> Write:
    """A text that has very many problems, all of them different."""
    return content(before + between.join(form % number for number in range(count)) + after)


def wrong_everywhere() -> Iterator[tuple[str, str, Write]]:
    """Yield bombs whose message would be many times as long as they are themselves."""
    yield "unknown keys", "configuration YAML", many(b"learning_rat%d: 1", 5000)
    yield "dates", "configuration YAML", many(b"k%d: 2001-01-01", 5000)
    yield "a long key", "configuration YAML", content(b"? " + b"x" * 500_000 + b"\n: 1")
    # a text of 400 kB in a value that is shown whole: 400 MB
    repeated = b"dit: &x " + b"x" * 400_000 + b"\nseed: [" + b"*x," * 1000 + b"]"
    yield "a repeated text", "configuration YAML", content(repeated)
    yield "unknown keys", "dataset TOML", many(b"image_directora%d = 1", 5000, b"[[datasets]]\n")
    yield "datasets", "dataset TOML", content(b"[[datasets]]\n" * 5000)
    yield "unknown keys", "dataset JSON", many(b'"image_dir%d": 1', 5000, b'{"datasets": [{', b",", b"}]}")
    yield "unknown keys", "training TOML", many(b"learning_rat%d = 1", 5000)
    yield "texts", "training TOML", content(b"optimizer_args = [" + b'"a",' * 5000 + b"]")
    yield "unknown keys", "tracker TOML", many(b"projec%d = 1", 5000, b"[wandb]\n")
    yield "unknown keys", "prompts, TOML", many(b"cfg_scal%d = 1", 5000, b"[prompt]\n[[prompt.subset]]\n")
    yield "unknown keys", "prompts, JSON", many(b'"cfg_scal%d": 1', 5000, b"[{", b",", b"}]")
    yield "unknown keys", "key=value arguments", many(b"weight_deca%d=1", 5000)
    yield "keys", "dataset JSONL", many(b'"image_pat%d": 1', 5000, b"{", b",", b"}")


def fall(kind: str, parser: str, write: Write, folder: Path) -> dict[str, object]:
    """Give a bomb to its parser; return what came of it."""
    path = folder / READ[parser].file
    path.parent.mkdir(parents=True, exist_ok=True)
    write(path)
    begun, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        result = READ[parser].read(path)
        said = "\n".join(map(str, result)) if isinstance(result, list) else ""
    except READ[parser].refuses as error:
        said = str(error)
    finally:
        path.unlink()
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    seconds = round(time.process_time() - begun, 2)
    return {
        "bomb": f"{parser}: {kind}",
        "said": said[:2000],
        "length": len(said),
        "seconds": seconds,
        "mb": grown // 1024,
    }


def main(folder: Path) -> None:
    """Let all bombs fall."""
    os.chdir(folder)
    signal.alarm(ALARM)
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmData"))
    used = int(line.split()[1]) * 1024
    resource.setrlimit(resource.RLIMIT_DATA, (used + MEMORY, used + MEMORY))
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    for kind, parser, write in bombs():
        print(json.dumps(fall(kind, parser, write, folder)), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
