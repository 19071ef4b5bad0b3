"""A rebuild that proves itself, in the real workflow: locked, made again elsewhere, packed, trained from the pack."""

import os
import shutil
import subprocess

import yaml
from demo_project import ROOT, run_snakemake

DEMO = "resources/demo"
LORA = "results/models/demo.safetensors"
SCRIPTS = ROOT / "scripts"
ODD = "-{x} 'a' \"b\"\n🐈 $(touch canary)"
"""A picture's name, in which a shell, a template or a table would see more than letters."""


def made(folder, cache="cache"):
    """What must be the same: cache files, manifests, the trainer's TOML and the LoRA."""
    paths = [*(folder / cache).iterdir(), *(folder / "results/manifests/small").glob("*.*s*"), folder / LORA]
    paths.append(folder / "results/train/demo/config.toml")
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths if path.suffix != ".json"}


def program(python, folder, name, *words, **options):
    done = subprocess.run(
        [python, SCRIPTS / name, *words], cwd=folder, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, timeout=570, check=False, **options,
    )  # fmt: skip
    return done.returncode, done.stdout


def test_what_was_locked_is_made_again_byte_for_byte_and_what_changed_is_told(project, tmp_path):
    folder = project.folder
    (folder / "chosen").mkdir()
    for path in sorted((folder / f"{DEMO}/images").glob("00[1-4]*")):
        name = path.name.replace("002_", f"{ODD}_")
        shutil.copy(path, folder / "chosen" / name)
    (folder / "small.toml").write_text(
        '[general]\nresolution = 64\ncaption_extension = ".txt"\n'
        '[[datasets]]\nimage_directory = "chosen"\ncache_directory = "cache"\n'
    )
    project.configure(dataset_config="small.toml", deterministic=True, max_train_steps=1)
    result = project.run("--", "lock")
    assert result.code == 0, result.text
    assert result.rules[-1] == "lock" and "train" in result.rules

    # other numbers of cores, shards and workers, another path, another home and other rights
    again = tmp_path / "somewhere else" / "again"
    again.parent.mkdir()
    (tmp_path / "home").mkdir()
    code, text = program(
        project.python, folder, "rebuild.py", "--lock", "dataset.lock", "--folder", again, "--how", "caching_shards=2",
        "--how", "caching_latent_num_workers=1", "--how", "caching_teo_num_workers=1", "--", "--cores", "4",
        env=os.environ | {"HOME": str(tmp_path / "home"), "USER": "other"}, umask=0o077,
    )  # fmt: skip
    assert code == 0, text
    assert "facts are as in rebuild.lock" in text and "setting caching_shards: locked nothing, now 2" in text
    assert made(again) == made(folder)

    # the same, for who has the LoRA, and no lock
    alone = tmp_path / "from the LoRA alone"
    models = [word for key in ("dit", "vae", "text_encoder") for word in (f"--{key}", checkpoint(folder, key))]
    code, text = program(
        project.python, tmp_path, "rebuild.py", "--lora", folder / LORA, *models, "--images", folder / "chosen",
        "--folder", alone, "--how", "caching_shards=3", "--", "--cores", "2", "--set-threads", "train=2",
    )  # fmt: skip
    assert code == 0, text
    assert (alone / LORA).read_bytes() == (folder / LORA).read_bytes()

    # the cache in one file, without the images
    pack_and_train(project.python, folder, tmp_path / "moved")

    # nothing is mended before it is looked at
    file = next(path for path in (again / "cache").iterdir() if path.name.startswith(ODD))
    file.write_bytes(file.read_bytes()[:-1])
    (again / "chosen/003_triangle.txt").unlink()
    (again / "chosen/003_triangle.txt").write_text("another caption")
    shutil.copy(again / "rebuild.lock", again / "dataset.lock")
    command = ["--snakefile", ROOT / "Snakefile", "--cores", "1", "--configfile", "rebuild.yaml", "--", "verify"]
    result = run_snakemake([project.python, "-m", "snakemake", *command], cwd=again)
    assert result.code == 1
    assert "verify: 2 differences from dataset.lock" in result.text and file.name in result.text
    assert "[0] 003_triangle.jpg, caption: input changed" in result.text
    assert "Rule: cache_latents" not in result.text
    assert not list(tmp_path.rglob("canary")) and not list(folder.rglob("canary"))


def checkpoint(folder, key):
    """One of the demo's checkpoints, by the key that names it."""
    return next((folder / DEMO).glob(f"{key}*"))


def pack_and_train(python, folder, moved):
    """Move the cache, and train on it what was trained before: by the trainer itself, without an image."""
    moved.mkdir()
    code, text = program(
        python, folder, "cache_archive.py", "pack", "--dataset_config", "small.toml", "--archive", "small.tar"
    )
    assert code == 0, text
    shutil.copytree(folder / DEMO, moved / DEMO, ignore=shutil.ignore_patterns("images"))
    code, text = program(
        python, moved, "cache_archive.py", "unpack", "--archive", folder / "small.tar", "--folder", "small"
    )
    assert code == 0, text
    config = yaml.safe_load((folder / "my.yaml").read_text()) | {"dataset_config": "small/small.toml"}
    (moved / "my.yaml").write_text(yaml.safe_dump(config))
    manifests = [
        word for kind in ("latents", "text_encoder_outputs")
        for word in (f"--{kind}_manifest", f"small/manifests/{kind}.tsv")
    ]  # fmt: skip
    code, text = program(
        python, moved, "write_train_config.py", "--config", "my.yaml", *manifests, "--toml", "train.toml",
        "--resolved", "resolved.yaml",
    )  # fmt: skip
    assert code == 0, text
    code, text = program(
        python, moved, "qwen_image_train_network.py", "--config_file", "train.toml",
        env=os.environ | {"OMP_NUM_THREADS": "2", "ACCELERATE_MIXED_PRECISION": "bf16"},
    )  # fmt: skip
    assert code == 0, text
    assert (moved / LORA).read_bytes() == (folder / LORA).read_bytes()
