"""Names, texts and paths are data: whatever they hold, nothing is run, and nothing is written but where it belongs."""

from __future__ import annotations

import csv
import re
import subprocess
import tomllib
from pathlib import Path

import check_config
import clear_cache
import pytest
import torch
import verify_lock
import write_train_config
import yaml
from bombs import laughs
from odd_values import AGAIN, EVERYTHING, ODD, ROOT, ROWS, SNAKEMAKE, file_stem, long_name, make_canary

from qwen_image.cache.manifest import LATENT_COLUMNS, TEXT_COLUMNS, read_manifest
from qwen_image.container import read_header
from qwen_image.dataset.items import list_items
from qwen_image.lock.rows import read_lock, write_lock
from qwen_image.problems import InputError
from qwen_image.training.arguments import Settings, parse_arguments
from qwen_image.training.optimizers import check_optimizer
from qwen_image.training.schedule import make_schedule
from qwen_image.training.schema import key_schemas, key_types, with_defaults

pytestmark = pytest.mark.xdist_group("odd values")
TEXTS = sorted(key for key, one in key_schemas().items() if key_types(one)[0] == "string" and "enum" not in one)
"""Training arguments that take any text."""


def test_the_canary_sings_when_a_shell_takes_a_value_for_more_than_letters(tmp_path):
    canary = make_canary(tmp_path / "canary")
    for name in ("substitution", "backticks", "separators", "newline"):
        before = len(canary.songs)
        subprocess.run(f"echo {ODD[name]}", shell=True, env=canary.environment, capture_output=True)
        assert len(canary.songs) > before, name


# ---- the whole workflow ----------------------------------------------------------------------------------------------


def test_the_workflow_trains_on_odd_names_and_runs_none_of_them(odd_run):
    assert odd_run.said["run"].returncode == 0, odd_run.said["run"].stdout[-5000:]
    assert odd_run.canary.songs == []


def test_what_was_made_of_odd_names_is_locked_verified_and_planned_again(odd_run):
    assert odd_run.said["verify"].returncode == 0, odd_run.said["verify"].stdout[-5000:]
    facts = len(read_lock(odd_run.project / "dataset.lock"))
    assert f"verify: all {facts} facts are as in dataset.lock" in odd_run.said["verify"].stdout
    # the inputs are as locked, and nothing was made: it was a dry run
    text = odd_run.said["rebuild"].stdout
    assert "verify: all" in text and "nothing was made" not in text
    assert "lora: missing: it was locked, and is not here now" in text or "lora: missing: locked" in text
    again = yaml.safe_load((odd_run.home / AGAIN / "rebuild.yaml").read_text(encoding="utf-8"))
    for key in ("output_name", "training_comment", "metadata_title", "metadata_tags"):
        assert again[key] == odd_run.config[key]


def test_what_differs_is_told_by_its_odd_name(odd_run, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", odd_run.canary.environment["PATH"])
    monkeypatch.chdir(odd_run.project)
    rows, damaged = read_lock(Path("dataset.lock")), tmp_path / "damaged.lock"
    names = {*(f"{file_stem(text)}.png" for text in ODD.values()), f"{long_name(length=225)}.jpg"}
    assert {key[1] for key in rows if key[2] == "image"} == {f"[0] {name}" for name in names}
    write_lock(damaged, {key: "0" * 64 if key[2] in ("image", "caption") else value for key, value in rows.items()})
    assert verify_lock.main(["--config", odd_run.configfile, "--lock", str(damaged)]) == 1
    told = capsys.readouterr().err
    # a terminal would write the rest of the line from right to left
    shown = {name.replace("\u202e", r"\u202e") for name in names}
    assert all(f"[0] {name}, {what}: input changed" in told for name in shown for what in ("image", "caption"))
    assert odd_run.canary.songs == []


def test_a_table_of_runs_hands_odd_texts_on_as_they_are(odd_run):
    assert odd_run.said["table"].returncode == 0, odd_run.said["table"].stdout[-5000:]
    for run, values in ROWS.items():
        made = tomllib.loads((odd_run.project / f"results/train/{run}/config.toml").read_text(encoding="utf-8"))
        assert {key: made[key] for key in values} == values


def test_the_comparison_shows_odd_texts_as_they_are(odd_run):
    folder = odd_run.project / "results/compare"
    report = (folder / "report.html").read_text(encoding="utf-8")
    assert "&lt;script&gt;canary&lt;/script&gt;" in report and "<script" not in report
    with open(folder / "runs.tsv", newline="", encoding="utf-8") as stream:
        (row,) = csv.DictReader(stream, delimiter="\t")
    assert (row["run"], row["state"]) == (odd_run.config["output_name"], "trained")


def test_every_odd_item_is_trained_on_with_its_caption_as_it_is(odd_run):
    (text,) = odd_run.project.glob("results/manifests/*/text_encoder_outputs.tsv")
    rows = read_manifest(text, TEXT_COLUMNS).to_dict("records")
    captions = {row["key"]: read_header(_cache(odd_run) / row["cache_file"]).metadata["caption1"] for row in rows}
    expected = {f"{file_stem(text)}.png": f"{text} a picture of {name}" for name, text in ODD.items()}
    assert captions == expected | {f"{long_name(length=225)}.jpg": long_name(length=225)}
    (left_out,) = _lora(odd_run).parent.glob("*left_out.tsv")
    assert len(left_out.read_text().splitlines()) == 1


def test_the_loras_metadata_holds_the_texts_as_they_are(odd_run):
    header = read_header(_lora(odd_run))
    assert header.metadata["ss_training_comment"] == odd_run.config["training_comment"]
    assert header.metadata["modelspec.title"] == EVERYTHING
    assert header.metadata["ss_output_name"] == odd_run.config["output_name"]


def test_files_are_written_where_they_belong_and_nowhere_else(odd_run):
    """Beside the folders that the configuration names: results/, the lock, Snakemake's own, and what libraries keep."""
    named = (odd_run.config["output_dir"].split("/")[0], _lora(odd_run).parent.name, odd_run.config["logging_dir"])
    own = ("results", ".snakemake", "dataset.lock", *named, _cache(odd_run).name)
    places = [odd_run.project / name for name in own]
    # matplotlib makes an empty folder
    places += [odd_run.home / name for name in (AGAIN, "HOME/.cache", "HOME/.config/matplotlib")]
    stray = [path for path in odd_run.written if not any(path.is_relative_to(place) for place in places)]
    assert [path for path in stray if path != odd_run.home / "HOME/.config"] == []


def test_no_temporary_file_stays(odd_run):
    assert [path for path in odd_run.written if path.name.startswith(".tmp")] == []
    assert list((odd_run.home / "TMPDIR").iterdir()) == []


def _lora(run) -> Path:
    folder = (run.project / run.config["output_dir"]).resolve()
    return folder / f"{run.config['output_name']}.safetensors"


def _cache(run) -> Path:
    return run.project / f"cache {EVERYTHING}"


# ---- every text key, through the programs ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ODD)
def test_a_checked_configuration_of_odd_texts_runs_none_of_them(name, tmp_path, monkeypatch):
    canary = _listen(tmp_path, monkeypatch)
    keys = ("dataset_config", "dit", "vae", "text_encoder", "caching_teo_text_encoder", "tokenizer", "output_dir")
    config = dict.fromkeys((*keys, *TEXTS), ODD[name]) | {"output_name": ODD[name]}
    (tmp_path / "my.yaml").write_text(yaml.safe_dump(config, allow_unicode=True), encoding="utf-8")
    with pytest.raises(InputError) as told:
        check_config.main(["--config", str(tmp_path / "my.yaml")])
    keys = {problem.key for problem in told.value.problems}
    assert {"dit", "vae", "text_encoder"} <= keys
    assert canary.songs == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["canary", "my.yaml"]


@pytest.mark.parametrize("name", ODD)
def test_odd_texts_reach_the_trainer_as_they_are(name, tmp_path, monkeypatch):
    canary, text = _listen(tmp_path, monkeypatch), ODD[name]
    keys = ("dataset_config", "dit", "vae", "text_encoder", "output_dir", "training_comment", "metadata_title")
    config = dict.fromkeys(keys, text) | {"output_name": "x", "network_weights": text, "base_weights": [text]}
    (tmp_path / "my.yaml").write_text(yaml.safe_dump(config, allow_unicode=True), encoding="utf-8")
    write_train_config.main([
        "--config", str(tmp_path / "my.yaml"), f"--latents_manifest={text}", f"--text_encoder_outputs_manifest={text}",
        f"--toml={tmp_path}/c.toml", f"--resolved={tmp_path}/r.yaml",
    ])  # fmt: skip
    settings = parse_arguments(["--config_file", str(tmp_path / "c.toml")]).as_dict()
    assert {settings[key] for key in (*keys, "latents_manifest", "network_weights")} == {text}
    assert settings["base_weights"] == [text]
    resolved = yaml.safe_load((tmp_path / "r.yaml").read_text(encoding="utf-8"))
    assert resolved["training_comment"] == text
    assert canary.songs == []


def _listen(folder: Path, monkeypatch):
    canary = make_canary(folder / "canary")
    monkeypatch.setenv("PATH", canary.environment["PATH"])
    monkeypatch.chdir(folder)
    return canary


# called with what a user gives, the first runs a command; the others are ways to more of that
CALLS = {
    "pydoc.pipepager": ["cmd=canary"],
    "subprocess.Popen": ["args=canary", "shell=True"],
    "os.system": [],
    "timeit.timeit": ["stmt=__import__('os').system('canary')"],
    "torch.utils.cpp_extension.load": ["sources=['canary']"],
    "transformers.optimization.partial": ["cmd=canary"],
}


@pytest.mark.parametrize("path", CALLS)
def test_a_class_that_is_no_scheduler_or_optimizer_is_never_called(path, tmp_path, monkeypatch):
    canary, given = _listen(tmp_path, monkeypatch), {"max_train_steps": 2, "learning_rate": 0.1}
    schedule = {"lr_scheduler_type": path, "lr_scheduler_args": CALLS[path]}
    optimizer = {"optimizer_type": path, "optimizer_args": CALLS[path]}
    with pytest.raises(InputError, match=f"{re.escape(path)} is a .*\n.*name a subclass of torch"):
        make_schedule(Settings(**with_defaults(given | schedule)), 2)
    with pytest.raises(InputError, match=f"{re.escape(path)} is a .*\n.*name a subclass of torch"):
        check_optimizer(Settings(**with_defaults(given | optimizer)), torch.device("cpu"))
    assert canary.songs == []


# ---- names that lead elsewhere, or are too long ----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["../lora", "a/b", "/tmp/lora", "..", ".", "a\0b", "🐈" * 51, "x" * 201])
def test_the_loras_name_is_a_file_name(name, tmp_path):
    config = {"dataset_config": "a", "dit": "b", "vae": "c", "text_encoder": "d", "output_dir": str(tmp_path)}
    path = tmp_path / "my.yaml"
    path.write_text(yaml.safe_dump(config | {"output_name": name}), encoding="utf-8")
    with pytest.raises(InputError) as told:
        check_config.main(["--config", str(path)])
    assert "output_name" in {problem.key for problem in told.value.problems}
    # and the trainer by itself
    if "\0" not in name:
        with pytest.raises(InputError, match="output_name"):
            parse_arguments(["--output_name", name])


@pytest.mark.parametrize("key", ["dataset_config", "dit", "vae", "text_encoder", "output_dir", "logging_dir"])
@pytest.mark.parametrize("length", [255, 256, 5000])
def test_a_path_of_any_length_is_told_or_taken(key, length, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = {"dataset_config": "a.toml", "dit": "b", "vae": "c", "text_encoder": "d", "output_dir": "e"}
    path = tmp_path / "my.yaml"
    config |= {"output_name": "f", key: long_name(".toml", length)}
    path.write_text(yaml.safe_dump(config, allow_unicode=True), encoding="utf-8")
    with pytest.raises(InputError) as told:
        check_config.main(["--config", str(path)])
    keys = {problem.key for problem in told.value.problems}
    folder = key.endswith("_dir")
    # of a dataset file that is missing the file is named, not the key
    assert key == "dataset_config" or (key in keys) == (not folder or length > 255), told.value


def test_a_picture_whose_name_leaves_no_room_for_a_cache_file_is_left_out(tmp_path):
    from parsers import picture, settings

    for name in (long_name(".png", 225 + 4), long_name(".png", 226 + 4), long_name(".png", 251)):
        (tmp_path / name).write_bytes(picture("PNG"))
        (tmp_path / name).with_suffix(".txt").write_text("a")
    listing = list_items(settings(image_directory=str(tmp_path)))
    assert [len(item.stem.encode()) for item in listing.items] == [225]
    assert all("too long" in reject.reason for reject in listing.rejects)
    assert len(listing.rejects) == 2


@pytest.mark.parametrize("name", ["../x.safetensors", "/etc/passwd", "..", "", "a/../../x", "a\0b"])
def test_a_manifest_leads_to_no_file_outside_the_cache(name, tmp_path):
    row = dict.fromkeys(LATENT_COLUMNS, "0") | {"cache_file": name}
    text = "\n".join("\t".join(cells) for cells in (row, row.values()))
    (tmp_path / "latents.tsv").write_text(f"{text}\n", encoding="utf-8")
    with pytest.raises(InputError, match="not a readable manifest"):
        read_manifest(tmp_path / "latents.tsv", LATENT_COLUMNS)


def test_clearing_removes_no_file_of_a_dataset_that_there_is_not(tmp_path):
    (tmp_path / "d.toml").write_text('[[datasets]]\nimage_directory = "a"\ncaption_extension = ".txt"\n')
    (tmp_path / "m.tsv").write_text("dataset\tkey\tcache_file\tfingerprint\n7\ta.png\ta_qi.safetensors\t0\n")
    with pytest.raises(InputError, match=r"belongs to datasets\[7\]"):
        clear_cache.main([
            f"--dataset_config={tmp_path}/d.toml", f"--manifests={tmp_path}/m.tsv", f"--table={tmp_path}/t.tsv",
        ])  # fmt: skip


def test_a_configuration_that_is_a_program_is_refused_by_the_check(tmp_path, monkeypatch):
    """Snakemake itself would run it: `__use_yte__` makes a template of a configuration (docs/reliability.md)."""
    canary = _listen(tmp_path, monkeypatch)
    (tmp_path / "my.yaml").write_text("__use_yte__: true\ndit: ?__import__('os').system('canary')\n")
    with pytest.raises(InputError, match="__use_yte__: is not a known key"):
        check_config.main(["--config", "my.yaml"])
    assert canary.songs == []


def test_the_workflow_refuses_a_configuration_that_multiplies(tmp_path):
    (tmp_path / "my.yaml").write_bytes(laughs("[", ",", "]"))
    result = subprocess.run(
        [SNAKEMAKE, "--snakefile", ROOT / "Snakefile", "--directory", tmp_path, "-n", "--configfile", "my.yaml"],
        cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    assert result.returncode
    assert "more than 1,000,000 values" in result.stdout
    assert len(result.stdout) < 2000


# ---- the code itself -------------------------------------------------------------------------------------------------


def test_every_value_in_a_rules_command_is_quoted_or_cannot_be_odd():
    """Numbers, choices of a schema and names that this project makes itself need no quotes."""
    plain = re.compile(r"(resources|wildcards|threads|params\.(switches|num_shards|on_bad_item|precision))\b")
    for path in sorted((ROOT / "rules").glob("*.smk")):
        for command in re.findall(r'shell:\s*r?"""(.*?)"""', path.read_text(encoding="utf-8"), re.DOTALL):
            for value in re.findall(r"(?<!\{)\{([^{}]+)\}(?!\})", command):
                assert value.endswith(":q") or plain.match(value), f"{path.name}: {value}"


def test_no_program_hands_a_text_to_a_shell_or_to_python():
    """`shell=True`, `os.system`, `eval`, `exec`, pickles and unsafe YAML have no place here."""
    forbidden = re.compile(
        r"shell=True|os\.system|os\.popen|(?<![\w.])(eval|exec)\(|pickle|torch\.load\(|allow_pickle=True|yaml\.(unsafe_)?load\("
        r"|trust_remote_code=True|weights_only=False|__import__"
    )
    allowed = {
        ("bounded.py", "yaml.load(text, Loader)"),  # a subclass of SafeLoader
        ("recognise.py", "pickle"), ("locate.py", "pickle"), ("tree.py", "pickle"), ("files.py", "pickle"),  # in words
    }  # fmt: skip
    found = [
        (path.name, line.strip())
        for path in sorted((ROOT / "scripts").rglob("*.py"))
        for line in path.read_text(encoding="utf-8").splitlines()
        if forbidden.search(line)
    ]
    assert [one for one in found if not any(one[0] == name and text in one[1] for name, text in allowed)] == []


def test_no_temporary_file_has_a_name_that_can_be_foreseen():
    """In a shared folder another user may put a link under such a name; `tempfile` and `atomic_write` choose theirs."""
    fixed = re.compile(r"""["'](/tmp|/var/tmp|/dev/shm)\b|mktemp\(|gettempdir\(""")
    for folder in ("scripts", "rules", "benchmarks"):
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in (".py", ".smk"):
                assert not fixed.search(path.read_text(encoding="utf-8")), path
