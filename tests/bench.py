"""A dataset of real photographs with its two caching programs, for the tests of the cache."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import io
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pandas
import qwen_image_cache_latents
import qwen_image_cache_text_encoder_outputs
import skimage
import tiny
from image_files import photo
from PIL import Image

PHOTOGRAPHS = Path(skimage.__file__).parent / "data"
SCRIPTS = Path(qwen_image_cache_latents.__file__).parent
VARIOUS = ("astronaut.png", "chelsea.png", "coffee.png", "camera.png", "rocket.jpg", "page.png", "coins.png")
_kept = []  # temporary folders live as long as the process
MAINS = {"latents": qwen_image_cache_latents.main, "text_encoder_outputs": qwen_image_cache_text_encoder_outputs.main}
MANIFESTS = {"latents": "m/latents.tsv", "text_encoder_outputs": "m/text_encoder_outputs.tsv"}


class Bench:
    """A folder with images, captions, checkpoints, a cache and manifests. An existing one is opened as it is."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.images = folder / "images"
        self.cache = folder / "cache"
        self.vae = folder / "vae.safetensors"
        self.text_encoder = folder / "te"
        self.output = ""
        if not self.images.exists():
            self._fill()
        self.names = sorted(path.stem for path in self.images.glob("*.png"))
        self.settings("resolution = 64")

    def copy(self, folder: Path) -> Bench:
        """Return a copy of everything in a new folder, with new modification times."""
        shutil.copytree(self.folder, folder, symlinks=True, copy_function=shutil.copy, dirs_exist_ok=True)
        return Bench(folder)

    def settings(self, *lines: str, **keys: str) -> None:
        """Write the dataset file: `lines` go into its table of general keys, beside those in `keys` or their usual."""
        self.config = self.folder / "dataset.toml"
        keys = {"enable_bucket": "true", "caption_extension": '".txt"'} | keys
        general = "\n".join([*lines, *(f"{key} = {value}" for key, value in keys.items())])
        self.config.write_text(
            f'[general]\n{general}\n[[datasets]]\nimage_directory = "{self.images}"\ncache_directory = "{self.cache}"\n'
        )

    def latents(self, *more: str, keep: bool = True) -> dict[str, int]:
        """Run the latent program; return the counts of its last line."""
        return self.run("latents", self.command("latents", *more, keep=keep))

    def texts(self, *more: str, keep: bool = True) -> dict[str, int]:
        """Run the text program; return the counts of its last line."""
        return self.run("text_encoder_outputs", self.command("text_encoder_outputs", *more, keep=keep))

    def encoded(self) -> tuple[int, int]:
        """Run both programs; return how many latents and how many texts they encoded."""
        return self.latents()["encoded"], self.texts()["encoded"]

    def command(self, kind: str, *more: str, keep: bool = True) -> list[str]:
        """Return the arguments of one program."""
        model = {"latents": ["--vae", self.vae], "text_encoder_outputs": ["--text_encoder", self.text_encoder]}[kind]
        common = ["--dataset_config", self.config, "--manifest", self.folder / MANIFESTS[kind], "--device", "cpu"]
        kept = ["--keep_cache"] if keep else []
        return [*map(str, [*model, *common]), "--skip_existing", *kept, *more]

    def run(self, kind: str, command: list[str]) -> dict[str, int]:
        """Run a program in this process with these arguments; its lines are then in `output`."""
        errors = io.StringIO()
        try:
            with contextlib.redirect_stderr(errors):
                assert MAINS[kind](command) == 0
        finally:
            self.output = errors.getvalue()
        counts = self.output.splitlines()[-1].partition(": ")[2].partition(" (")[0].split(", ")
        return {words.partition(" ")[2]: int(words.partition(" ")[0]) for words in counts}

    def process(self, kind: str, *more: str, **options) -> subprocess.Popen:
        """Start one program as a process of its own; its output comes as text in one pipe."""
        command = [sys.executable, str(SCRIPTS / f"qwen_image_cache_{kind}.py"), *self.command(kind, *more)]
        # one thread each: several processes on few CPUs would wait for one another's threads
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "env": environment} | options
        return subprocess.Popen(command, cwd=self.folder, **options)

    def manifest(self, kind: str = "latents", ending: str = "tsv") -> pandas.DataFrame:
        """Return a manifest, or with the ending ``rejects.tsv`` the table of what was left out."""
        path = (self.folder / MANIFESTS[kind]).with_suffix(f".{ending}")
        return pandas.read_csv(path, sep="\t", keep_default_na=False)

    def files(self) -> dict[str, bytes]:
        """Return the content of every cache file by its name."""
        return {path.name: path.read_bytes() for path in self.cache.glob("*.safetensors")}

    def _fill(self) -> None:
        self.images.mkdir(parents=True)
        for name in ("astronaut.png", "rocket.jpg", "motorcycle_left.png"):
            if (PHOTOGRAPHS / name).exists():
                image = Image.open(PHOTOGRAPHS / name).convert("RGB")
                image.thumbnail((160, 160))
                image.save((self.images / name).with_suffix(".png"))
        for index, path in enumerate(sorted(self.images.glob("*.png"))):
            path.with_suffix(".txt").write_text(f"a photograph, number {index}")
        shutil.copy(tiny.path("vae"), self.vae)
        shutil.copytree(tiny.path("text_encoder"), self.text_encoder)


def various_photographs(folder: Path) -> Bench:
    """Return a bench of photographs and captions of several sizes, named by numbers from 0 on."""
    bench = Bench(folder)
    for path in bench.images.iterdir():
        path.unlink()
    for number, name in enumerate(VARIOUS):
        photo(name, (100 + 7 * number, 90)).save(bench.images / f"{number}.png")
        (bench.images / f"{number}.txt").write_text(" ".join(["a photograph of something"] * (number**2 % 7)))
    return Bench(folder)


@functools.cache
def made() -> Bench:
    """Return a bench with both caches made, one for all tests of a process. Copy it before you change anything."""
    _kept.append(tempfile.TemporaryDirectory(prefix="made-bench-"))
    bench = Bench(Path(_kept[-1].name))
    Image.open(bench.images / f"{bench.names[0]}.png").resize((50, 40)).save(bench.images / "small.png")
    (bench.images / "small.txt").write_text("a small photograph")
    bench = Bench(bench.folder)
    bench.latents()
    bench.texts()
    return bench


def moved(folder: Path) -> Bench:
    """Return what `made` made in another folder, with new modification times and no memo: nothing is to be encoded."""
    bench = made().copy(folder)
    shutil.rmtree(bench.folder / "m")
    return bench


def mortal() -> None:
    """Make file modes hold for the process that a test is about to start, also where root runs the tests."""
    if os.geteuid() == 0:
        libc = ctypes.CDLL(None, use_errno=True)
        for capability in (1, 2):  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH, out of PR_CAPBSET_DROP's bounding set
            if libc.prctl(24, capability, 0, 0, 0):
                raise OSError(ctypes.get_errno(), "cannot give up the rights of root")
