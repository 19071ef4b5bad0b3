"""Caching on two nodes against one, through the SLURM profile on the throwaway cluster of the tests.

Each node has one core of this machine to itself. What counts is the time from the submission of the first caching job
to the end of the last. The VAE is of the real size, with random weights.
"""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

from measure import Row, faster

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "tests"))

from cluster.driving import ON_THE_CLUSTER, Project, Run  # noqa: E402
from cluster.slurm import NODES, missing_programs, throwaway_cluster  # noqa: E402

IMAGES_PER_NODE = 24
RESOLUTION = 512
ROUNDS = 2


def rows() -> list[Row]:
    """Return the row; none where SLURM is not installed or the machine has fewer cores than the cluster has nodes."""
    cores = sorted(os.sched_getaffinity(0))
    if missing_programs() or len(cores) < len(NODES):
        print("nodes: left out, it needs SLURM (bash .ci/install_slurm.sh) and two cores", file=sys.stderr)
        return []
    with tempfile.TemporaryDirectory(prefix="nodes-") as name, throwaway_cluster() as cluster:
        for node, core in zip(NODES, cores, strict=False):
            _pin(cluster.daemons[f"slurmd-{node}"].pid, core)
        project = Project(Path(name), cluster)
        _prepare(project)
        turns = [(_seconds(project, shards=1), _seconds(project, shards=len(NODES))) for _ in range(ROUNDS)]
    one, two = map(statistics.median, zip(*turns, strict=True))
    images = len(NODES) * IMAGES_PER_NODE
    title = f"latents of {images} images at {RESOLUTION}² on SLURM: 2 nodes of one core against 1"
    return [faster(title, ours=two, other=one, count=images, unit="images/s", target=">= 1.8")]


def _seconds(project: Project, *, shards: int) -> float:
    """Cache all latents anew in so many jobs, each with a node to itself."""
    for made in ("results", ".snakemake"):
        shutil.rmtree(project.folder / made, ignore_errors=True)
    before = project.jobs("cache_latents")
    project.configure(
        dataset_config="dataset.toml", vae="vae.safetensors", caching_latent_device="cpu", caching_shards=shards
    )
    exclusive = ["--set-resources", "cache_latents:slurm_extra=--exclusive"]
    target = ["--", "results/manifests/dataset/latents.tsv"]
    run = Run(project, project.command(*ON_THE_CLUSTER, *exclusive, *target))
    assert run.wait() == 0, run.report()
    jobs = [project.cluster.facts(job) for job in project.jobs("cache_latents") if job not in before]
    assert len({job["NodeList"] for job in jobs}) == shards, run.report()
    times = [[datetime.fromisoformat(job[key]) for job in jobs] for key in ("SubmitTime", "EndTime")]
    return (max(times[1]) - min(times[0])).total_seconds()


def _pin(pid: int, core: int) -> None:
    """Give a daemon, and all that it starts, one core."""
    for thread in Path(f"/proc/{pid}/task").iterdir():
        os.sched_setaffinity(int(thread.name), {core})


def _prepare(project: Project) -> None:
    """Write the demo's checkpoints, the VAE in its real size, and photographs."""
    from qwen_image.demo.checkpoints import demo_vae, write_vae

    subprocess.run([sys.executable, ROOT / "scripts/make_demo.py"], cwd=project.folder, check=True)
    write_vae(project.folder / "vae.safetensors", demo_vae(base_dim=96))
    _write_photographs(project.folder / "images")
    (project.folder / "dataset.toml").write_text(
        f'[general]\nresolution = {RESOLUTION}\ncaption_extension = ".txt"\n'
        '[[datasets]]\nimage_directory = "images"\ncache_directory = "results/cache"\n'
    )


def _write_photographs(folder: Path) -> None:
    import skimage
    from PIL import Image, ImageOps

    folder.mkdir()
    photograph = Image.open(Path(skimage.__file__).parent / "data" / "astronaut.png").convert("RGB")
    for index, name in enumerate(_even_names()):
        image = ImageOps.fit(photograph.rotate(7 * index), (RESOLUTION, RESOLUTION))
        image.save(folder / name)
        (folder / name).with_suffix(".txt").write_text("an astronaut")


def _even_names() -> Iterator[str]:
    """Names of which every shard gets as many: a hash splits thousands evenly, of fifty one may get thirty."""
    from qwen_image.cache.shards import shard_of

    left = dict.fromkeys(range(1, len(NODES) + 1), IMAGES_PER_NODE)
    numbers = iter(range(10000))
    while any(left.values()):
        name = f"{next(numbers):04}.png"
        shard = shard_of(name, len(NODES))
        if left[shard]:
            left[shard] -= 1
            yield name


if __name__ == "__main__":
    from run import main

    sys.exit(main(["--only", "nodes", *sys.argv[1:]]))
