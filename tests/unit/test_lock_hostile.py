"""A lock or a LoRA that somebody else wrote: its rebuild runs nothing of theirs and touches nothing of the user's."""

import json
import os
from pathlib import Path

import pytest
import yaml
from locked import CONFIG, lock, train, write_config, write_project
from rebuild import main as rebuild
from verify_lock import main as verify_lock

from qwen_image.lock.from_lora import known_images, rows_of_lora
from qwen_image.lock.plan import CONFIG_FILE, LOCK, Sources, plan_from_lock
from qwen_image.lock.rows import read_lock, source_of, write_lock
from qwen_image.lock.settings import AWAY, without_away
from qwen_image.problems import InputError
from qwen_image.training.schema import key_schemas

SETTING = ("config", "setting")
DATASET = ("dataset d", "[0]")
ROWS = {
    **{
        (*SETTING, key): json.dumps(value)
        for key, value in {
            "dataset_config": "d.toml", "dit": "m/dit.safetensors", "vae": "m/vae.safetensors", "text_encoder": "te",
            "output_dir": "out", "output_name": "x",
        }.items()
    },
    ("dataset d", "file", "place"): "d.toml",
    (*DATASET, "setting image_directory"): '"im"',
    (*DATASET, "setting cache_directory"): '"cache"',
    (*DATASET, "setting caption_extension"): '".txt"',
    ("dataset d", "[0] a.png", "image"): "0" * 64,
    ("run x", "order", "number"): "1",
}  # fmt: skip
LINKS = ["im/a.png", "im/a.txt", "m/dit.safetensors", "m/vae.safetensors", "te"]


@pytest.fixture
def inputs(tmp_path, monkeypatch):
    """The user's own files, at the places of the lock's."""
    monkeypatch.chdir(tmp_path)
    root = tmp_path / "mine"
    for place in (*LINKS[:-1], "te/model.safetensors", "te/tokenizer/tokenizer.json", "other"):
        (root / place).parent.mkdir(parents=True, exist_ok=True)
        (root / place).write_text("x")
    return root


def plan(inputs, changes, given=(), **more):
    """Plan what the lock says with these changes; None takes a fact away."""
    rows = {key: value for key, value in {**ROWS, **changes}.items() if value is not None}
    return plan_from_lock(rows, Sources(inputs, dict(given)), {}, **more)


def test_the_example_is_sound(inputs):
    assert sorted(plan(inputs, {}).links) == LINKS
    plan(inputs, {}).make(Path("again"))
    assert (Path("again") / "im/a.png").read_text() == "x"


@pytest.mark.parametrize(
    "key", ["__use_yte__", "__definitions__", "?x", "learning_rat", "runs", "runs_grid", "config_file"]
)
def test_what_is_no_setting_is_refused(inputs, key):
    for place in (SETTING, ("run x", "setting")):
        with pytest.raises(InputError, match=r"is not a known key|no setting of a lock|set by the workflow") as error:
            plan(inputs, {(*place, key): "true" if key == "__use_yte__" else '"runs.tsv"'})
        assert key in str(error.value)


def test_a_configuration_that_snakemake_would_run_is_not_run(tmp_path, monkeypatch):
    folder = tmp_path / "project"
    folder.mkdir()
    monkeypatch.chdir(folder)
    write_project(folder)
    assert lock() == 0
    rows = read_lock("dataset.lock")
    rows[*SETTING, "__use_yte__"] = "true"
    rows[*SETTING, "training_comment"] = json.dumps(f"?open({str(tmp_path / 'canary')!r}, 'w').close()")
    write_lock("dataset.lock", dict(sorted(rows.items())))
    with pytest.raises(InputError, match=r"dataset\.lock: line \d+, config, setting, __use_yte__: is not a known key"):
        rebuild(["--lock", "dataset.lock", "--folder", str(tmp_path / "again"), "--", "--cores", "1", "--dry-run"])
    assert sorted(os.listdir(tmp_path)) == ["project"]


def test_a_rebuild_publishes_nothing_and_is_logged_nowhere(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "project"
    folder.mkdir()
    monkeypatch.chdir(folder)
    write_project(folder)
    away = {
        "huggingface_repo_id": "me/cats", "huggingface_repo_visibility": "public", "async_upload": True,
        "log_with": "wandb", "log_tracker_config": "log.toml", "logging_dir": "logs", "resume": "pets-state",
    }  # fmt: skip
    write_config(folder, **away)
    train()
    assert lock() == 0
    rows = read_lock("dataset.lock")
    again = plan_from_lock(rows, Sources(Path(), {}), {})
    assert yaml.safe_load(again.files[CONFIG_FILE]).keys() == CONFIG.keys()
    assert not {"log.toml", "pets-state"} & again.links.keys()
    # what it makes without them is what was locked
    again.make(tmp_path / "again")
    write_lock(tmp_path / "again" / LOCK, without_away(rows))
    monkeypatch.chdir(tmp_path / "again")
    os.makedirs("results/train/pets")
    for name in ("cache", "results/manifests", "results/models", "results/logs"):
        os.symlink(folder / name, name)
    text = (folder / "results/train/pets/config.toml").read_text()
    Path("results/train/pets/config.toml").write_text(
        "".join(line for line in text.splitlines(keepends=True) if line.partition(" = ")[0] not in away)
    )
    assert verify_lock(["--config", CONFIG_FILE, "--lock", LOCK]) == 0, capsys.readouterr().err


def test_every_key_of_uploads_and_trackers_is_left_out():
    wanted = ("huggingface_", "wandb_", "log_", "logging_", "resume", "async_")
    assert {key for key in key_schemas() if key.startswith(wanted) or "upload" in key or "huggingface" in key} == AWAY


CLASSES = [
    ("optimizer_type", "antigravity.Flight"), ("optimizer_type", "torchevil.optim.AdamW"),
    ("optimizer_type", "os.system"), ("lr_scheduler_type", "pydoc.pipepager"), ("lr_scheduler_type", "torch.hub.load"),
    ("lr_scheduler_type", "transformers.pipeline"), ("lr_scheduler_type", "torch.utils.cpp_extension.load_inline"),
]  # fmt: skip


@pytest.mark.parametrize(("key", "path"), CLASSES)
def test_a_class_of_any_package_is_used_only_when_the_user_names_it(inputs, key, path):
    for place in (SETTING, ("run x", "setting")):
        changes = {(*place, key): json.dumps(path), ("run x", "setting", "output_name"): '"x"'}
        with pytest.raises(InputError, match=f"--allow_class {path}"):
            plan(inputs, changes)
        plan(inputs, changes, allowed=[path])


@pytest.mark.parametrize(
    ("key", "path"),
    [
        ("optimizer_type", "AdamW"), ("optimizer_type", "torch.optim.NAdam"),
        ("optimizer_type", "pytorch_optimizer.SOAP"), ("lr_scheduler_type", "StepLR"),
        ("lr_scheduler_type", "torch.optim.lr_scheduler.StepLR"),
        ("lr_scheduler_type", "transformers.get_cosine_schedule_with_warmup"),
    ],
)  # fmt: skip
def test_classes_of_known_packages_are_used(inputs, key, path):
    assert yaml.safe_load(plan(inputs, {(*SETTING, key): json.dumps(path)}).files[CONFIG_FILE])[key] == path


@pytest.mark.parametrize(
    "changes",
    [
        {(*SETTING, "output_dir"): '"te"'},
        {(*SETTING, "output_dir"): '"./te//deeper"'},
        {(*DATASET, "setting cache_directory"): '"te/cache"'},
        {(*DATASET, "setting cache_directory"): None, (*DATASET, "setting image_directory"): '"te"'},
        {(*DATASET, "setting cache_directory"): '"m/dit.safetensors"'},
        {(*SETTING, "sample_prompts"): '"te/planted.txt"'},
        {(*SETTING, "dataset_config"): '"te/d.toml"', ("dataset d", "file", "place"): "te/d.toml"},
        {(*SETTING, "vae"): '"results"'},
        {(*SETTING, "sample_prompts"): '"results/logs/train/x.txt"'},
        {(*SETTING, "vae"): '".snakemake/vae.safetensors"'},
        {(*SETTING, "vae"): '"cache/d.vae-x"'},
        {(*SETTING, "vae"): '"profiles"'},
        {(*SETTING, "dit"): '"Snakefile"'},
        {(*DATASET, "setting image_directory"): '"profiles/default"'},
        {("dataset d", "[0] Snakefile", "image"): "0"},
        {("dataset d", "[0] sub/a.png", "image"): "0"},
        {(*SETTING, "vae"): '"d.toml"'},
        {(*SETTING, "vae"): '"d.toml/vae"'},
        {(*SETTING, "vae"): '"rebuild.lock"'},
        {(*SETTING, "vae"): '"."'},
        {(*SETTING, "dataset_config"): '"/etc/evil.toml"'},
        {("run x", "setting", "dataset_config"): '"elsewhere.toml"', ("run x", "setting", "output_name"): '"x"'},
        {(*DATASET, "setting control_directory"): '"/etc"'},
        {("model", "../vae.safetensors", "sha256"): "0"},
        {
            (*SETTING, "dataset_config"): '"/etc/of all.toml"', ("run x", "setting", "output_name"): '"x"',
            ("run x", "setting", "dataset_config"): '"d.toml"',
        },
    ],
)  # fmt: skip
def test_nothing_is_written_or_linked_where_it_does_not_belong(inputs, changes):
    for name in ("cache/d.vae-x", "profiles"):
        (inputs / name).mkdir(parents=True)
    before = sorted(inputs.rglob("*"))
    with pytest.raises(InputError):
        plan(inputs, changes, {"te/planted.txt": inputs / "other"}).make(Path("again"))
    assert sorted(inputs.rglob("*")) == before and not Path("again").exists()


def test_what_a_linked_folder_gives_needs_no_link_of_its_own(inputs):
    again = plan(inputs, {(*SETTING, "tokenizer"): '"te/tokenizer"', ("model", "te/model.safetensors", "sha256"): "0"})
    assert sorted(again.links) == LINKS
    again.make(Path("again"))
    assert Path("again/te/tokenizer/tokenizer.json").read_text() == "x"


def test_a_lora_to_start_from_may_lie_where_loras_go(inputs):
    (inputs / "results").mkdir()
    (inputs / "results/first.safetensors").write_text("x")
    again = plan(
        inputs, {(*SETTING, "network_weights"): '"results/first.safetensors"', (*SETTING, "output_dir"): '"results"'}
    )
    assert again.links["results/first.safetensors"] == inputs / "results/first.safetensors"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ((*SETTING, "seed"), "abc"), ((*SETTING, "seed"), "[" * 100_000), ((*SETTING, "seed"), "9" * 5000),
        ((*SETTING, "output_dir"), '"out\\u0000x"'), ((*SETTING, "output_dir"), '{"a": "/etc"}'),
        ((*SETTING, "tokenizer"), '["a/b"]'), ((*SETTING, "training_comment"), '"\\ud800"'), ((*SETTING, "dit"), None),
        (("run x", "order", "number"), "x"), (("run x", "order", "number"), "9" * 5000),
        (("run y", "setting", "output_name"), '"y"'),
        (("dataset d", "file", "place"), None), (("dataset d", "file", "place"), "a\0.toml"),
        (("dataset d", "file", "place"), "rebuild.yaml"), ((*DATASET, "setting caption_extension"), None),
        ((*DATASET, "setting caption_extension"), "5"), ((*DATASET, "setting image_directory"), "null"),
        ((*DATASET, "setting cache_directory"), '"a\\u0000"'), ((*DATASET, "setting resolution"), "[[1]]"),
        ((*DATASET, "setting num_repeats"), "["), (("dataset d", "[x]", "setting num_repeats"), "1"),
        (("dataset d", "[2]", "setting num_repeats"), "1"), (("dataset d", "[7] a.png", "image"), "0"),
        (("dataset d", "[0] a\0.png", "image"), "0"), (("model", "a\0", "sha256"), "0"),
        ((*DATASET, "setting evil"), "1"),
    ],
)  # fmt: skip
def test_an_edited_lock_is_refused_in_words(inputs, key, value):
    with pytest.raises(InputError) as error:
        plan(inputs, {key: value})
    assert all(problem.file == "dataset.lock" and problem.mend for problem in error.value.problems)


def test_the_line_is_named(inputs, tmp_path):
    write_lock(tmp_path / "my.lock", {**ROWS, (*SETTING, "seed"): "abc"})
    rows = read_lock(tmp_path / "my.lock")
    number = 1 + next(n for n, line in enumerate((tmp_path / "my.lock").read_text().splitlines()) if "\tseed\t" in line)
    with pytest.raises(InputError, match=rf"my\.lock: line {number}, config, setting, seed: is no JSON value"):
        plan_from_lock(rows, Sources(inputs, {}), {}, source=source_of(tmp_path / "my.lock", rows))


def test_how_is_checked_as_the_rest(inputs):
    with pytest.raises(InputError, match=r"command line: --how caching_shards: found 0"):
        plan_from_lock(ROWS, Sources(inputs, {}), {"caching_shards": 0})


@pytest.mark.parametrize(
    "changes",
    [
        {"huggingface_repo_id": "evil/x"}, {"resume": "/etc/x"}, {"output_dir": "/etc"}, {"logging_dir": "/etc"},
        {"sample_prompts": "/etc/x"}, {"runs": "x.tsv"}, {"__use_yte__": True}, {"dit": "../../x"}, {"vae": ["x"]},
        {"network_weights": "../x"}, {"base_weights": ["a", "/etc/b"]}, {"optimizer_type": "antigravity.X"},
        {"output_name": "../../x"}, {"dataset_config": "../x.toml"}, {"dataset_config": "rebuild.yaml"},
    ],
)  # fmt: skip
def test_a_lora_sets_nothing_but_what_loras_tell(tmp_path, monkeypatch, changes):
    with pytest.raises(InputError):
        plan_of_lora(tmp_path, monkeypatch, settings=changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"caption_extension": None}, {"caption_extension": 5}, {"caption_extension": ""},
        {"cache_directory": "../../x"},
        {"image_directory": "../x"}, {"image_directory": ["x"]}, {"evil": "x"}, {"resolution": "\ud800"},
    ],
)  # fmt: skip
def test_a_loras_datasets_are_checked(tmp_path, monkeypatch, changes):
    with pytest.raises(InputError, match="does not tell how it was made"):
        plan_of_lora(tmp_path, monkeypatch, dataset=changes)


def test_a_loras_time_is_a_number(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_lock("my.lock", {**ROWS, ("run x", "lora made with", "SOURCE_DATE_EPOCH"): "1\0"})
    with pytest.raises(InputError, match="no number of seconds"):
        rebuild(["--lock", "my.lock", "--folder", "again"])


def plan_of_lora(folder, monkeypatch, *, settings=(), dataset=()):
    from attacks.parsers import ACCOUNT, TABLE, container

    account = {key: json.loads(value) for key, value in ACCOUNT.items()}
    account["qwen_image.settings"] |= dict(settings)
    account["qwen_image.datasets"][0] |= dict(dataset)
    monkeypatch.chdir(folder)
    Path("images").mkdir()
    for name in ("a.png", "a.txt"):
        Path("images", name).write_text("x")
    header = {"__metadata__": {key: json.dumps(value) for key, value in account.items()}, "a": TABLE}
    Path("lora.safetensors").write_bytes(container(header, bytes(8)))
    rows = rows_of_lora(Path("lora.safetensors"), {key: Path(key) for key in ("dit", "vae", "text_encoder")})
    return plan_from_lock(rows | known_images(rows, [Path("images")]), Sources(Path(), {}), {})
