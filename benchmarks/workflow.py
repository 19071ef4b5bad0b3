"""What the workflow itself costs: runs with nothing to do and with one thing to do, up to 100,000 items.

Beside it runs a bare Snakefile with the same images and captions as inputs, one rule for each kind, by turns. The
checkpoints are the demo's; every image has the same few pixels, so its latents are encoded once and linked.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "scripts")]

import yaml  # noqa: E402
from measure import Row, as_table, medians  # noqa: E402
from PIL import Image  # noqa: E402

from qwen_image.cache.names import latent_file_name  # noqa: E402
from qwen_image.demo.checkpoints import write_demo_checkpoints  # noqa: E402

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
COUNTS = (100, 1_000, 10_000)
MANY = 100_000
ROUNDS = 3
SIDE = 32
"""Pixels of an image and of its bucket."""
LINKS = 10_000
"""Names of one file: some file systems have no more than 65,000."""
CONFIG = {
    "dit": "models/dit.safetensors", "vae": "models/vae.safetensors", "text_encoder": "models/text_encoder",
    "output_dir": "results/models", "network_dim": 4, "max_train_steps": 1,
}  # fmt: skip
BARE = """
from glob import glob

rule all:
    input: "bare/{name}.latents", "bare/{name}.texts"

rule latents:
    input: sorted(glob("{name}/*.png"))
    output: "bare/{name}.latents"
    message: "latents"
    shell: "touch {{output}}"

rule texts:
    input: sorted(glob("{name}/*.txt"))
    output: "bare/{name}.texts"
    message: "texts"
    shell: "touch {{output}}"
"""


def rows() -> list[Row]:
    """Return the rows: no-ops and their cost an item, one edited caption and image, and a dry run of many items."""
    with tempfile.TemporaryDirectory(prefix="workflow-") as name:
        folder = Path(name)
        write_demo_checkpoints(folder / "models")
        for count in (1, *COUNTS, MANY):
            _write_dataset(folder, count)
        return [*_idle(folder), *_edited(folder, COUNTS[-1]), *_planned(folder)]


def _idle(folder: Path) -> list[Row]:
    """Everything is made and trained: no-ops of both sides by turns, at each size."""
    found, seconds = [], {}
    for count in COUNTS:
        if count > COUNTS[0]:
            _link_latents(folder, COUNTS[0], count)
        for command in (_ours(count), _bare(count)):
            _run(folder, command)
        turn = {"ours": lambda count=count: _nothing(folder, _ours(count))}
        turn["bare"] = lambda count=count: _nothing(folder, _bare(count))
        seconds[count] = medians(turn, rounds=ROUNDS)
        ours, bare = seconds[count]["ours"], seconds[count]["bare"]
        target = "<= 2" if count == COUNTS[-1] else None
        name = f"workflow with nothing to do, {count:,} items: time against bare Snakemake's"
        found.append(Row(name=name, ours=ours, other=bare, unit="s", ratio=ours / bare, target=target))
    found.append(Row(name=f"workflow with nothing to do, {COUNTS[-1]:,} items", ours=ours, unit="s", target="<= 6"))
    first, second, last = COUNTS
    steep, flat = (
        (seconds[more]["ours"] - seconds[fewer]["ours"]) / (more - fewer) * 1000
        for more, fewer in ((last, second), (second, first))
    )
    name = f"workflow with nothing to do: an item more, up to {last:,} items against up to {second:,}"
    return [*found, Row(name=name, ours=steep, other=flat, unit="ms")]


def _edited(folder: Path, count: int) -> list[Row]:
    """One caption or one image among many is edited; the no-op and what its encoding takes alone are subtracted."""
    found = []
    for kind, stage in (("caption", "text_encoder_outputs"), ("image", "latents")):
        turn = {
            "idle": lambda: _nothing(folder, _ours(count, "cache_only")),
            "edit": lambda kind=kind: (_edit(folder / f"n{count}", kind), _run(folder, _ours(count, "cache_only"))),
            "alone": lambda kind=kind, stage=stage: (_edit(folder / "n1", kind), _run(folder, _alone(stage))),
        }
        seconds = medians(turn, rounds=ROUNDS, warmup=0)
        more = seconds["edit"] - seconds["idle"] - seconds["alone"]
        name = f"one edited {kind} among {count:,}: beyond a run with nothing to do and its encoding alone"
        found.append(Row(name=name, ours=more, unit="s", target="<= 3"))
    return found


def _planned(folder: Path) -> list[Row]:
    """A dry run before anything is cached."""
    peaks: dict[str, float] = {}

    def dry(name: str, command: list[str]) -> None:
        peaks[name] = _run(folder, command)

    ours, bare = _ours(MANY, "cache_only", more=["--dry-run"]), [*_bare(MANY), "--dry-run"]
    turn = {"ours": lambda: dry("ours", ours), "bare": lambda: dry("bare", bare)}
    seconds = medians(turn, rounds=1, warmup=0)
    name = f"workflow planned for {MANY:,} items"
    return [
        Row(name=f"{name}: time against bare Snakemake's", ours=seconds["ours"], other=seconds["bare"], unit="s",
            ratio=seconds["ours"] / seconds["bare"]),
        Row(name=f"{name}: peak memory", ours=peaks["ours"], other=peaks["bare"], unit="MB"),
    ]  # fmt: skip


def _write_dataset(folder: Path, count: int) -> None:
    """Write images, captions, the dataset file, the configuration, and the bare Snakefile."""
    images = folder / f"n{count}"
    images.mkdir()
    for number in range(count):
        image, caption = images / f"{number:06d}.png", images / f"{number:06d}.txt"
        if number % LINKS == 0:
            Image.new("RGB", (SIDE, SIDE), (200, 120, 40)).save(image)
            caption.write_text("a plain square")
            source = image, caption
        else:
            os.link(source[0], image)
            os.link(source[1], caption)
    (folder / f"n{count}.toml").write_text(
        f'[general]\nresolution = {SIDE}\ncaption_extension = ".txt"\n'
        f'[[datasets]]\nimage_directory = "n{count}"\ncache_directory = "cache{count}"\n'
    )
    config = CONFIG | {"dataset_config": f"n{count}.toml", "output_name": f"n{count}"}
    (folder / f"n{count}.yaml").write_text(yaml.safe_dump(config))
    (folder / f"n{count}.smk").write_text(BARE.format(name=f"n{count}"))


def _link_latents(folder: Path, source: int, count: int) -> None:
    """Give every image the latents of one that has the same pixels; their fingerprint is the same."""
    made = folder / f"cache{source}" / latent_file_name(f"{0:06d}", (SIDE, SIDE))
    cache = folder / f"cache{count}"
    cache.mkdir()
    for number in range(count):
        os.link(made, cache / latent_file_name(f"{number:06d}", (SIDE, SIDE)))


def _edit(images: Path, kind: str) -> None:
    """Write another caption or another image in place of the first one, which is a link."""
    new = time.time_ns()
    if kind == "caption":
        target = images / f"{0:06d}.txt"
        target.unlink()
        target.write_text(f"the square number {new}")
    else:
        target = images / f"{0:06d}.png"
        target.unlink()
        Image.new("RGB", (SIDE, SIDE), (new % 251, new % 241, new % 239)).save(target)


def _ours(count: int, *targets: str, more: Sequence[str] = ()) -> list[str]:
    return [*_snakemake(str(ROOT / "Snakefile")), *more, "--configfile", f"n{count}.yaml", "--", *targets]


def _bare(count: int) -> list[str]:
    return _snakemake(f"n{count}.smk")


def _snakemake(snakefile: str) -> list[str]:
    return [str(BIN / "snakemake"), "--snakefile", snakefile, "--cores", "2"]


def _alone(stage: str) -> list[str]:
    """The stage's program on a dataset of one item, as the workflow calls it."""
    model = "vae" if stage == "latents" else "text_encoder"
    more = [] if stage == "latents" else ["--fp8_vl"]
    program = ROOT / "scripts" / f"qwen_image_cache_{stage}.py"
    return [
        sys.executable, str(program), "--dataset_config", "n1.toml", f"--{model}", CONFIG[model], *more,
        "--skip_existing", "--keep_cache",
    ]  # fmt: skip


def _nothing(folder: Path, command: list[str]) -> None:
    _run(folder, command, "Nothing to be done")


def _run(folder: Path, command: list[str], expected: str = "") -> float:
    """Run a command that must succeed and say what is expected; return its peak memory in MB."""
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(command, cwd=folder, stdout=output, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        output.seek(0)
        text = output.read().decode(errors="replace")
    assert process.returncode == 0 and expected in text, text
    return usage.ru_maxrss / 1024


if __name__ == "__main__":
    print(as_table(rows()))
