"""The lock and its verification: what is locked, and that each kind of change is told with its reason."""

import os
import re
import shutil
from pathlib import Path

import lock_dataset
import pytest
import torch
from locked import cache, flip_last_bit, lock, train, verify, write_config, write_project

from qwen_image.container import Header, write_safetensors
from qwen_image.files import sha256_file
from qwen_image.lock.differences import compare
from qwen_image.lock.inventory import Inventory
from qwen_image.lock.outputs import provenance
from qwen_image.lock.rows import read_lock, write_lock
from qwen_image.problems import InputError

CAT_TEXT, LORA = "cache/cat_qi_te.safetensors", "results/models/pets.safetensors"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("locked") / "first"
    folder.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        write_project(folder)
        assert lock() == 0
    return folder


@pytest.fixture
def project(made, tmp_path, monkeypatch):
    """A locked project, the working directory."""
    shutil.copytree(made, tmp_path / "project", symlinks=True)
    monkeypatch.chdir(tmp_path / "project")
    return tmp_path / "project"


def test_the_lock_names_every_content_and_neither_a_path_of_this_machine_nor_a_time(project, capsys):
    text = Path("dataset.lock").read_text()
    hashed = [
        "images/cat.png", CAT_TEXT, "cache/dog_0064x0064_qi.safetensors", LORA, "results/train/pets/config.toml",
        "results/manifests/pets/latents.tsv", "results/manifests/pets/text_encoder_outputs.tsv",
        "models/vae.safetensors",
    ]  # fmt: skip
    for path in hashed:
        assert sha256_file(path) in text, path
    for words in ("[0] cat.png\tcaption\t", "[0] cat.png\tbucket\t64x64", "software\ttorch\tversion\t", "train pets\t"):
        assert words in text
    assert str(project.parent) not in text and os.path.realpath("models") not in text
    assert not re.search(r"\b20\d\d-\d\d-\d\d|\b\d\d:\d\d:\d\d", text)
    lines = text.splitlines()[1:]
    assert lines == sorted(lines, key=lambda line: line.split("\t")) and len(set(lines)) == len(lines)
    assert verify(capsys) == (0, f"verify: all {len(lines)} facts are as in dataset.lock\n")


def test_the_same_is_locked_in_the_same_bytes_wherever_it_lies(project):
    before = Path("dataset.lock").read_bytes()
    for path in Path().rglob("*"):
        os.utime(path, (1, 1))
    assert lock() == 0
    assert Path("dataset.lock").read_bytes() == before


def test_one_caption_changes_few_lines_and_everything_that_follows_names_it(project, capsys):
    before = read_lock("dataset.lock")
    Path("images/cat.txt").write_text("a tiger")
    code, text = verify(capsys)
    assert code == 1 and text.startswith("verify: 1 difference from dataset.lock:")
    assert "dataset pets: [0] cat.png, caption: input changed" in text

    cache()
    train()
    code, text = verify(capsys)
    assert code == 1
    assert f"{CAT_TEXT}: [0] cat.png: made from something else (input changed)" in text
    assert "manifest: follows from 1 items" in text
    assert "lora: made from something else (inputs: text_encoder_outputs_manifest)" in text
    assert lock() == 0
    after = read_lock("dataset.lock")
    assert before.keys() == after.keys()
    changed = sorted({key[:2] for key in before if before[key] != after[key]})
    assert len(changed) == 6, changed


@pytest.mark.parametrize(
    ("path", "words"),
    [
        (CAT_TEXT, "file damaged: its values are not those that its own header names"),
        (LORA, "file damaged: its weights are not those that its own header names"),
        ("results/manifests/pets/latents.tsv", "manifest: file damaged: it was changed after it was written"),
        ("results/train/pets/config.toml", "config.toml: file damaged, or edited"),
    ],
)
def test_a_bit_that_flipped_is_seen_whatever_its_time_says(project, capsys, path, words):
    times = os.stat(path)
    flip_last_bit(path)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    code, text = verify(capsys)
    assert code == 1 and words in text and path in text


def test_a_model_that_changed_is_told_and_what_was_made_by_it(project, capsys):
    models = os.path.realpath("models")
    Path("models").unlink()
    shutil.copytree(models, "models")
    flip_last_bit("models/vae.safetensors")
    code, text = verify(capsys)
    assert code == 1 and text.count("model changed") == text.count("\n- ") == 2
    cache()
    code, text = verify(capsys)
    assert text.count("made from something else (model changed)") == 3 and "text_encoder_outputs" not in text


def test_settings_and_versions_that_changed_are_told(project, capsys, monkeypatch):
    write_config(project, learning_rate=2e-4, caching_latent_num_workers=3)
    monkeypatch.setattr("qwen_image.lock.inputs.__version__", "9.9")
    code, text = verify(capsys)
    assert code == 1
    assert "setting, learning_rate: settings changed: locked 0.0001, now 0.0002" in text
    assert "code: qwen_image, version: code changed: locked 0.1.0, now 9.9" in text
    assert "note: made in another way: setting caching_latent_num_workers: locked nothing, now 3" in text
    assert "2 differences" in text
    write_config(project, learning_rate=2e-4)
    train(learning_rate=2e-4)
    code, text = verify(capsys)
    assert "config.toml: follows from changed settings (learning_rate)" in text
    assert "lora: made from something else (settings: learning_rate)" in text


def test_another_number_of_threads_explains_other_bytes_and_makes_no_difference_alone(project, capsys):
    Path("results/logs/train/pets.log").write_text("train: computed on cpu, 4 threads\n")
    code, text = verify(capsys)
    assert code == 0
    assert "note: made in another way: train pets computed on: locked cpu, 2 threads, now cpu, 4 threads" in text
    train(first=1.0, threads=4)
    code, text = verify(capsys)
    assert code == 1 and "made again from the same in another way (train pets: locked cpu, 2 threads" in text


def test_missing_and_new_are_told_all_in_one_message_and_nothing_is_made(project, capsys):
    Path("images/cat.png").unlink()
    Path(CAT_TEXT).unlink()
    Path("models").unlink()
    shutil.copy("images/dog.png", "images/new.png")
    Path("images/new.txt").write_text("new")
    before = sorted(Path().rglob("*"))
    code, text = verify(capsys)
    assert code == 1
    assert "dataset pets: [0] cat.png: missing" in text
    assert "dataset pets: [0] new.png: new: not in dataset.lock" in text
    assert f"{CAT_TEXT}: [0] cat.png: missing" in text
    assert "model: models/vae.safetensors, identity: missing" in text
    assert sorted(Path().rglob("*")) == before
    shutil.rmtree("images")
    code, text = verify(capsys)
    assert code == 1 and "cannot be listed" in text


def test_what_is_not_made_is_not_locked(project):
    Path(CAT_TEXT).unlink()
    Path(LORA).unlink()
    with pytest.raises(InputError, match="2 problems were found") as error:
        lock()
    assert {problem.file for problem in error.value.problems} == {CAT_TEXT, LORA}


def test_what_is_damaged_is_not_locked(project):
    damaged = {CAT_TEXT, "cache/dog_0064x0064_qi.safetensors", LORA}
    for path in damaged:
        flip_last_bit(path)
    with pytest.raises(InputError, match="3 problems were found") as error:
        lock()
    assert {problem.file for problem in error.value.problems} == damaged
    assert all("is damaged" in problem.found and "delete it" in problem.mend for problem in error.value.problems)


def test_a_lora_of_other_caches_is_not_locked(project):
    Path("images/cat.txt").write_text("a tiger")
    cache()
    with pytest.raises(InputError, match="was made from another text_encoder_outputs_manifest"):
        lock()


def test_paths_that_leave_the_folder_stand_under_their_last_name(project, capsys, tmp_path):
    os.rename(os.path.realpath("images"), tmp_path / "pictures")
    toml = Path("pets.toml")
    toml.write_text(toml.read_text().replace('"images"', f'"{tmp_path}/pictures"'))
    write_config(project, vae=os.path.realpath("models/vae.safetensors"))
    train()
    assert lock() == 0
    text = Path("dataset.lock").read_text()
    assert str(tmp_path) not in text and "external/vae/vae.safetensors" in text
    assert verify(capsys)[0] == 0
    os.rename(tmp_path / "pictures", tmp_path / "deeper_pictures")
    toml.write_text(toml.read_text().replace("pictures", "deeper_pictures"))
    code, text = verify(capsys)
    assert code == 1 and "image_directory: settings changed" in text


WORDS = (
    "arithmetic.png", "my arithmetic lesson.jpg", "lora made by me.png", "x] made by", "made by", "setting sun.jpg",
    "setting", "manifest", "order", "computed on", "seed",
)  # fmt: skip


@pytest.mark.parametrize("word", WORDS)
def test_a_file_is_compared_whatever_words_of_the_lock_are_in_its_name(word):
    facts = [
        ("dataset cats", f"[0] {word}", "image"), ("dataset cats", f"[0] {word}", "caption"),
        ("cache cats latents", f"[0] {word}", "sha256"), ("cache cats latents", f"[0] {word}", "bucket"),
        ("cache cats text_encoder_outputs", f"[0] {word}", "sha256 2"), ("model", f"loras/{word}", "identity"),
        ("model", f"loras/{word}", "sha256"), ("input", f"prompts/{word}", "sha256"),
    ]  # fmt: skip
    for key in facts:
        there = Inventory({key: "b" * 64}, {key: Path("x")})
        changed = compare({key: "a" * 64}, there, "dataset.lock")
        assert len(changed.problems) == 1 and not changed.notes, key
        assert "settings changed" not in str(changed.problems[0]) or key[2] == "bucket"
        assert "missing: it was locked" in str(compare({key: "a" * 64}, Inventory({}, {}), "dataset.lock").problems[0])
        assert "new: not in dataset.lock" in str(compare({}, there, "dataset.lock").problems[0])


def test_any_name_survives_the_lock(tmp_path):
    rows = {("a", name, "x"): name for name in ("tab\there", "line\nend\r", "back\\slash\\t", "\udcff", "☃", "")}
    write_lock(tmp_path / "lock", rows)
    assert read_lock(tmp_path / "lock") == rows


@pytest.mark.parametrize("content", ["", "a\tb\tc\td\n", "{head}a\tb\n", "{head}a\tb\tc\td\na\tb\tc\te\n"])
def test_what_is_no_lock_is_refused(tmp_path, content):
    (tmp_path / "lock").write_text(
        content.format(head="# dataset.lock, format 1: part, name, what, value (docs/reproducibility.md)\n")
    )
    with pytest.raises(InputError, match="no readable lock"):
        read_lock(tmp_path / "lock")


def test_files_that_somebody_broke_are_told_with_the_rest(project, capsys):
    toml = Path("results/train/pets/config.toml")
    toml.write_text(re.sub("(?m)^dit = .*", r'dit = "a\\qb"', toml.read_text()) + 'vae = "\\ud800"\n')
    assert 'dit = "a\\qb"' in toml.read_text()
    write_safetensors(CAT_TEXT, {"x": torch.zeros(1)}, {"fingerprint_parts": "[" * 100_000})
    write_safetensors(LORA, {"x": torch.zeros(1)}, {"qwen_image.settings": '{"a\\ud800": "\\ud800"}'})
    code, text = verify(capsys)
    assert code == 1
    for words in (
        f"{toml}: config.toml: file damaged, or edited",
        f"{CAT_TEXT}: [0] cat.png: file damaged",
        f"{LORA}: lora",
    ):
        assert words in text


def test_what_a_header_says_can_always_be_locked(tmp_path):
    header = Header({}, {"qwen_image.settings": '{"a\\ud800": "\\ud800"}', "ss_training_started_at": "\ud800"}, 8)
    rows = {("run a", *key): value for key, value in provenance(header)}
    write_lock(tmp_path / "lock", rows)
    assert len(rows) == 2 and read_lock(tmp_path / "lock") == rows


def test_of_several_runs_each_is_locked(project, capsys):
    Path("runs.tsv").write_text("output_name\tlearning_rate\npets\t1e-4\n")
    write_config(project, runs="runs.tsv", learning_rate=None)
    train()
    assert lock_dataset.main(["--config", "my.yaml"]) == 0
    assert "run pets\tsetting\tlearning_rate\t" in Path("dataset.lock").read_text()
    Path("runs.tsv").write_text("output_name\tlearning_rate\npets\t1e-4\nmore\t2e-4\n")
    code, text = verify(capsys)
    assert code == 1 and "run more" in text and "new: not in dataset.lock" in text
