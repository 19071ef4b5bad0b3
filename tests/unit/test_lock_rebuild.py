"""The folder in which a lock is made again: its inputs are the locked ones, whatever they are called here."""

import os
import re
import shutil
from pathlib import Path

import pytest
import yaml
from locked import CONFIG, NAMES, cache, lock, train, write_config, write_project
from rebuild import main as rebuild
from verify_lock import main as verify_lock

from qwen_image.config import load_config
from qwen_image.lock.from_lora import known_images, rows_of_lora
from qwen_image.lock.layout import KINDS, read_layout
from qwen_image.lock.plan import CONFIG_FILE, Plan, Sources, plan_from_lock, threads
from qwen_image.lock.rows import read_lock
from qwen_image.problems import InputError

LORA = Path("results/models/pets.safetensors")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rebuilt") / "first"
    folder.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        write_project(folder)
    return folder


@pytest.fixture
def project(made, tmp_path, monkeypatch):
    """A project, the working directory."""
    shutil.copytree(made, tmp_path / "project", symlinks=True)
    monkeypatch.chdir(tmp_path / "project")
    return tmp_path / "project"


def prepared(folder, monkeypatch, given=(), **how):
    """Make the folder from the lock here, go there, and return the plan."""
    rows = read_lock("dataset.lock")
    plan = plan_from_lock(rows, Sources(Path(), dict(given)), how)
    plan.make(folder)
    shutil.copy("dataset.lock", folder)
    monkeypatch.chdir(folder)
    return plan


def inputs_are_the_locked_ones():
    return verify_lock(["--config", CONFIG_FILE, "--lock", "dataset.lock", "--inputs_only"]) == 0


def test_the_inputs_are_linked_one_by_one_and_nothing_made_is_taken_along(project, tmp_path, monkeypatch):
    # the cache lies among the images
    Path("pets.toml").write_text(Path("pets.toml").read_text().replace('cache_directory = "cache"', ""))
    cache()
    train()
    lock()
    prepared(tmp_path / "again", monkeypatch)
    assert inputs_are_the_locked_ones()
    wanted = sorted(f"{name}.{ending}" for name in NAMES for ending in ("png", "txt"))
    assert sorted(os.listdir("images")) == wanted and not os.path.islink("images")
    assert not list(Path().rglob("*_qi*.safetensors"))


LINE = '{{"image_path": "images/{}.png", "caption": "{}"}}'


def rebuilt_with_what_is_left_out(folder, monkeypatch, names):
    """Rebuild, and have the tables of what is left out made again."""
    write_config(Path(), on_bad_item="skip")
    cache("skip")
    train()
    assert lock() == 0
    rows = read_lock("dataset.lock")
    assert sorted(key[1] for key in rows if key[2] == "left out") == names
    before = [Path(f"results/manifests/pets/{kind}.rejects.tsv").read_bytes() for kind in KINDS]
    prepared(folder, monkeypatch)
    assert inputs_are_the_locked_ones()
    cache("skip")
    assert [Path(f"results/manifests/pets/{kind}.rejects.tsv").read_bytes() for kind in KINDS] == before


def test_what_a_folder_leaves_out_is_left_out_again(project, tmp_path, monkeypatch):
    shutil.copy("images/dog.png", "images/nocaption.png")
    Path("images/folder.png").mkdir()
    shutil.copy("images/dog.png", "images/odd.png")
    Path("images/odd.txt").mkdir()
    os.symlink("nowhere", "images/gone.png")
    shutil.copy("images/dog.png", b"images/bytes\xff.png")
    shutil.copy("images/dog.txt", b"images/bytes\xff.txt")
    left_out = ["bytes\\xff.png", "folder.png", "gone.png", "nocaption.png", "odd.png"]
    rebuilt_with_what_is_left_out(tmp_path / "again", monkeypatch, [f"[0] {name}" for name in left_out])
    assert not os.path.lexists("images/nocaption.txt")


def test_what_a_jsonl_file_leaves_out_is_left_out_again(project, tmp_path, monkeypatch):
    shutil.copy("images/dog.png", "images/two.png")
    lines = [*(LINE.format(name, f"a {name}") for name in (*NAMES, "fox")), "{", LINE.format("absent", "a ghost")]
    lines += [LINE.format("two", "one"), LINE.format("two", "another")]
    Path("pets.jsonl").write_text("\n".join(lines))
    Path("pets.toml").write_text(
        '[general]\nresolution = 64\n[[datasets]]\nimage_jsonl_file = "pets.jsonl"\ncache_directory = "cache"\n'
    )
    left_out = ["images/absent.png", "images/two.png", "line 4", "line 5"]
    rebuilt_with_what_is_left_out(tmp_path / "again", monkeypatch, [f"[0] {name}" for name in left_out])
    assert sorted(os.listdir("images")) == [f"{name}.png" for name in sorted(NAMES)]


@pytest.mark.parametrize(
    "several",
    [
        {"runs": "runs.tsv"},
        {"runs_grid": {"learning_rate": [5e-5, 1e-4], "network_dim": [4, 8]}},
        {
            "runs_grid": {
                "training_comment": [None, "two\nlines\t'\""],
                "save_every_n_steps": [None, 1],
            }
        },
        {"runs_grid": {"optimizer_args": [["betas=(0.9, 0.99)"], None], "mixed_precision": ["no", "bf16"]}},
        {"training_comment": "of all", "runs_grid": {"training_comment": [None, "of one"]}},
        {"save_every_n_steps": 1, "runs_grid": {"save_every_n_steps": [None, 2]}},
    ],
)
def test_several_runs_are_the_same_runs(project, tmp_path, monkeypatch, capsys, several):
    Path("runs.tsv").write_text(
        "output_name\tlearning_rate\tnetwork_args\nz_first\t5e-5\t[verbose=True]\na_second\t1e-4\t\n"
    )
    write_config(project, learning_rate=None, **several)
    # nothing of them is trained: only the inputs are of interest here
    monkeypatch.setattr("lock_dataset.to_lock", lambda inventory: inventory.rows)
    lock()
    prepared(tmp_path / "again", monkeypatch)
    assert inputs_are_the_locked_ones()


@pytest.mark.parametrize("value", [" y ", "", "null"])
def test_a_run_that_no_table_can_hold_is_not_locked(project, value):
    write_config(project, runs_grid={"training_comment": ["x", value]})
    with pytest.raises(InputError) as error:
        lock()
    told = [problem for problem in error.value.problems if problem.key == "training_comment"]
    assert len(told) == 1 and f"{value!r} cannot stand in a table of runs" in told[0].found


def test_a_rebuild_has_caches_of_the_same_names(project, tmp_path, monkeypatch, capsys):
    """They are named after paths that only rows name, and in a rebuild these are others."""
    far = tmp_path / "far"
    shutil.copytree(Path("models").resolve(), far)
    shutil.copy("pets.toml", far / "pets.toml")
    Path("prompts.txt").write_text("a moon\n")
    shutil.copy("prompts.txt", far)
    header = ("output_name", "vae", "text_encoder", "dataset_config", "sample_prompts")
    rows = [
        ("a", "", "", "", ""), ("b", far / "vae.safetensors", far / "text_encoder", "", far / "prompts.txt"),
        ("c", "", "", far / "pets.toml", "null"), ("d", "", "", "", "prompts.txt"),
    ]  # fmt: skip
    Path("runs.tsv").write_text("".join("\t".join(map(str, row)) + "\n" for row in (header, *rows)))
    write_config(project, runs="runs.tsv", sample_prompts="prompts.txt")
    monkeypatch.setattr("lock_dataset.to_lock", lambda inventory: inventory.rows)

    def caches(file):
        layout = read_layout(load_config(file), file)
        return {kind: [one.name for one in layout.sets(kind)] for kind in KINDS} | {"prompts": layout.prompts}

    lock()
    here = caches("my.yaml")
    assert [len(here[kind]) for kind in KINDS] == [3, 3] and set(here["prompts"]) == {"a", "b", "d"}
    text = Path("dataset.lock").read_text()
    assert str(tmp_path) not in text
    given = {place: far / place.rpartition("/")[2] for place in re.findall(r"external/[\w-]+/[\w.]+", text)}
    prepared(tmp_path / "again", monkeypatch, given)
    assert caches(CONFIG_FILE) == here
    assert inputs_are_the_locked_ones()


def test_paths_that_left_the_folder_are_asked_for(project, tmp_path, monkeypatch, capsys):
    vae = tmp_path / "far/away.safetensors"
    vae.parent.mkdir()
    shutil.copy("models/vae.safetensors", vae)
    write_config(project, vae=str(vae))
    train()
    lock()
    with pytest.raises(InputError, match=r"--input external/vae/away\.safetensors=PATH"):
        rebuild(["--lock", "dataset.lock", "--folder", str(tmp_path / "again")])
    os.rename(vae, vae.with_name("another_name"))
    prepared(tmp_path / "again", monkeypatch, {"external/vae/away.safetensors": vae.with_name("another_name")})
    assert inputs_are_the_locked_ones()


def test_a_text_encoder_that_left_the_folder_is_found_again(project, tmp_path, monkeypatch, capsys):
    shutil.copytree(Path("models/text_encoder").resolve(), tmp_path / "far/te")
    write_config(project, text_encoder=str(tmp_path / "far/te"))
    monkeypatch.setattr("lock_dataset.to_lock", lambda inventory: inventory.rows)
    lock()
    prepared(tmp_path / "again", monkeypatch, {"external/text_encoder/te": tmp_path / "far/te"})
    assert inputs_are_the_locked_ones()


def test_other_inputs_are_told_before_anything_is_made(project, tmp_path, capfd):
    lock()
    Path("images/cat.txt").write_text("a tiger")
    assert rebuild(["--lock", "dataset.lock", "--folder", str(tmp_path / "again")]) == 1
    said = capfd.readouterr().err
    assert "[0] cat.png, caption: input changed" in said and "nothing was made" in said
    assert not (tmp_path / "again/results").exists()


def test_a_folder_that_holds_anything_is_refused(project, tmp_path):
    lock()
    (tmp_path / "again").mkdir()
    (tmp_path / "again/mine").write_text("mine")
    with pytest.raises(InputError, match="not empty"):
        rebuild(["--lock", "dataset.lock", "--folder", str(tmp_path / "again")])
    assert os.listdir(tmp_path / "again") == ["mine"]


def test_a_lock_that_leads_out_of_the_folder_is_refused(project):
    lock()
    text = Path("dataset.lock").read_text()
    assert '"cache"' in text and '"results/models"' in text
    for before, after in (
        ("\tpets.toml\n", "\t../pets.toml\n"), ('"images"', '"/images"'), ('"cache"', '"../cache"'),
        ('"results/models"', '"/results/models"'),
    ):  # fmt: skip
        assert before in text
        Path("dataset.lock").write_text(text.replace(before, after))
        with pytest.raises(InputError, match="leads out of the folder"):
            plan_from_lock(read_lock("dataset.lock"), Sources(Path(), {}), {})


def test_each_stage_has_the_threads_that_it_had():
    rows = {
        ("device", "train a", "computed on"): "cpu, 2 threads",
        ("device", "train b", "computed on"): "cpu, 2 threads",
        ("device", "cache_latents pets", "computed on"): "cpu, 1 thread",
        ("device", "cache_prompts pets", "computed on"): "cpu, 1 thread; cpu, 2 threads",
        ("device", "cache_text_encoder_outputs pets", "computed on"): "cuda, NVIDIA H100",
        ("device", "cpu", "kind"): "x86_64",
        ("config", "setting", "num_processes"): "3",
    }
    assert threads(rows) == {"cache_latents": 1, "train": 6}


def test_a_lora_alone_tells_its_configuration(project, tmp_path, monkeypatch, capsys):
    models = {"dit": Path("models/dit.safetensors"), "vae": Path("models/vae.safetensors")}
    models["text_encoder"] = Path("models/text_encoder")
    rows = rows_of_lora(LORA, models)
    rows |= known_images(rows, [Path("images")])
    given = {f"external/{key}/{path.name}": path for key, path in models.items()}
    plan = plan_from_lock(rows, Sources(Path(), given | {"external/images-0/images": Path("images")}), {})
    config = yaml.safe_load(plan.files[CONFIG_FILE])
    assert config["learning_rate"] == CONFIG["learning_rate"] and config["caching_teo_fp8_vl"] is True
    assert {place for place in plan.links if place.endswith(".png")} == {
        f"external/images-0/images/{name}.png" for name in NAMES
    }
    with pytest.raises(InputError, match="2 given, the LoRA was trained on 1 folders"):
        known_images(rows, [Path("images"), Path("images")])


def test_a_lora_with_other_checkpoints_is_not_made_again(project, tmp_path, capfd):
    models = os.path.realpath("models")
    code = rebuild([
        "--lora", str(LORA), "--dit", f"{models}/dit.safetensors", "--vae", f"{models}/dit.safetensors",
        "--text_encoder", f"{models}/text_encoder", "--images", "images", "--folder", str(tmp_path / "again"),
    ])  # fmt: skip
    assert code == 1
    assert "external/vae/vae.safetensors, identity: " in capfd.readouterr().err
    with pytest.raises(InputError, match="does not tell how it was made"):
        rows_of_lora(Path(models) / "dit.safetensors", {})


def test_a_plan_follows_no_link_that_leads_nowhere(tmp_path):
    with pytest.raises(InputError, match="is not there"):
        Plan({}, {"x": tmp_path / "absent"}).make(tmp_path / "new")
    assert not (tmp_path / "new").exists()
