"""The workflow's configuration: keys, types, ranges, choices, combinations, and what goes into the trainer's TOML."""

import tomllib
from pathlib import Path

import jsonschema
import pytest
import yaml

from qwen_image import config as configuration
from qwen_image.config import check_config, launch_arguments, load_config, resolve_config, training_arguments
from qwen_image.problems import InputError
from qwen_image.training.arguments import argument_names

ROOT = Path(__file__).parents[2]
GOOD = {
    "dataset_config": "d.toml",
    "dit": "dit.safetensors",
    "vae": "vae.safetensors",
    "text_encoder": "te",
    "output_dir": "out",
    "output_name": "lora",
}


def problems(**changes):
    return {problem.key: str(problem) for problem in check_config({**GOOD, **changes}, "my.yaml")}


@pytest.mark.parametrize("path", ["config/config.yaml", "config/config.example.yaml"])
def test_the_shipped_configurations_are_valid(path):
    assert check_config(load_config(ROOT / path), path) == []


@pytest.mark.parametrize("gpu_ids", [0, "0", "0,1", "0, 1", "all", "GPU-8a5f,MIG-3c"])
def test_gpus_by_number_or_name(gpu_ids):
    assert problems(gpu_ids=gpu_ids) == {}


@pytest.mark.parametrize("gpu_ids", ["cuda:1", "cpu", "", "0,", -1, "GPU"])
def test_other_gpus_are_refused(gpu_ids):
    assert set(problems(gpu_ids=gpu_ids)) == {"gpu_ids"}


def test_a_device_is_not_for_the_training():
    assert "a device such as cpu or cuda:1 is for the caching" in problems(gpu_ids="cuda:1")["gpu_ids"]


def test_the_schema_is_a_schema_and_documents_every_key():
    schema = configuration.workflow_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    for key, entry in schema["properties"].items():
        assert entry["description"].strip(), key
        assert "default" in entry or key in schema["required"], key
        if "default" in entry:
            jsonschema.validate(entry["default"], entry)


def test_the_contracts_defaults():
    resolved = resolve_config(GOOD)
    assert resolved["caching_latent_batch_size"] == 4
    assert resolved["caching_teo_batch_size"] == 16
    for stage in ("latent", "teo"):
        assert resolved[f"caching_{stage}_num_workers"] == 8
        assert resolved[f"caching_{stage}_skip_existing"] is True
        assert resolved[f"caching_{stage}_keep_cache"] is True
    assert resolved["caching_teo_fp8_vl"] is True
    assert resolved["caching_teo_text_encoder"] == GOOD["text_encoder"]


@pytest.mark.parametrize("key", sorted(GOOD))
def test_each_required_key_is_asked_for_by_name(key):
    config = {name: value for name, value in GOOD.items() if name != key}
    (problem,) = check_config(config, "my.yaml")
    assert (problem.file, problem.key, problem.found) == ("my.yaml", key, "is missing")


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("caching_latent_batch_size", 0, "at least 1"),
        ("caching_latent_batch_size", "four", "expected integer"),
        ("caching_latent_batch_size", True, "expected integer"),
        ("caching_latent_device", "gpu", "cuda"),
        ("caching_teo_fp8_vl", "yes", "expected boolean"),
        ("on_bad_item", "ignore", "error, skip"),
        ("mixed_precision", "fp32", "no, bf16"),
        ("output_name", "a/b", "text like"),
        ("output_dir", "", "empty"),
        ("dit", 5, "expected string"),
        ("num_processes", 1.5, "expected integer"),
        ("main_process_port", 70000, "at most 65535"),
        ("learning_rate", "fast", "learning_rate"),
        ("network_dim", -1, "network_dim"),
        ("lr_scheduler", "zigzag", "lr_scheduler"),
    ],
)
def test_a_wrong_value_is_named_with_what_was_found(key, value, words):
    found = problems(**{key: value})
    assert list(found) == [key]
    assert words in found[key]
    assert repr(value) in found[key] or str(value) in found[key]


@pytest.mark.parametrize(
    ("typo", "meant"),
    [
        ("learning_rat", "learning_rate"),
        ("caching_latents_batch_size", "caching_latent_batch_size"),
        ("dataset_conf", "dataset_config"),
        ("network_dims", "network_dim"),
    ],
)
def test_an_unknown_key_gets_a_suggestion(typo, meant):
    found = problems(**{typo: 1})
    assert f"did you mean {meant}?" in found[typo]


def test_all_problems_come_at_once():
    found = problems(learning_rat=1, mixed_precision="fp32", network_dim=-1, dit=None)
    assert set(found) == {"learning_rat", "mixed_precision", "network_dim", "dit"}


def test_keys_that_the_workflow_sets_are_refused():
    assert "set by the workflow" in problems(latents_manifest="x.tsv")["latents_manifest"]


def test_numbers_that_yaml_reads_as_text_are_numbers():
    config = {**GOOD, **yaml.safe_load("learning_rate: 1e-4")}
    assert config["learning_rate"] == "1e-4", "PyYAML still reads this as text"
    assert check_config(config, "my.yaml") == []
    assert resolve_config(config)["learning_rate"] == 1e-4


def test_the_toml_holds_training_arguments_and_nothing_else():
    config = {
        **GOOD, "learning_rate": 1e-4, "caching_latent_device": "cpu", "num_processes": 2, "on_bad_item": "skip",
        "mixed_precision": "no", "seed": 1, "network_alpha": None,
    }  # fmt: skip
    arguments = training_arguments(resolve_config(config))
    assert arguments["learning_rate"] == 1e-4
    assert arguments["seed"] == 1
    assert set(arguments) <= set(argument_names()) - set(configuration.LAUNCH_KEYS)
    assert not [key for key in arguments if key.startswith("caching_")]
    assert "network_alpha" not in arguments


def test_every_launch_key_reaches_the_launcher():
    config = {**GOOD, "num_processes": 2, "mixed_precision": "no", "dynamo_backend": "INDUCTOR"}
    dynamo = {"dynamo_mode": "default", "dynamo_fullgraph": True, "dynamo_dynamic": True}
    arguments = launch_arguments(resolve_config(config | dynamo))
    text = " ".join(arguments)
    assert "--num_processes 2" in text
    assert "--multi_gpu" in arguments
    assert "--mixed_precision no" in text
    assert "--dynamo_backend inductor --dynamo_mode default" in text
    assert {"--dynamo_use_fullgraph", "--dynamo_use_dynamic"} <= set(arguments)
    assert "--multi_gpu" not in launch_arguments(resolve_config(GOOD))


@pytest.mark.parametrize("content", ["", "- a list", "a: [unclosed", "\xff"])
def test_a_file_that_is_no_configuration_is_named(tmp_path, content):
    path = tmp_path / "my.yaml"
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(InputError, match=r"my\.yaml"):
        load_config(path)


def test_the_annotated_dataset_file_uses_known_keys_only(tmp_path, monkeypatch):
    from qwen_image.dataset.config import load_dataset_config

    text = (ROOT / "config/dataset.toml").read_text()
    (tmp_path / "dataset.toml").write_text(text)
    (settings,) = load_dataset_config(tmp_path / "dataset.toml")
    assert settings.resolution == (1328, 1328)
    every_line = text.replace("# alpha", "alpha").replace("# [[", "[[").replace("# image_jsonl", "image_jsonl")
    every_line = every_line.replace("# cache_dir", "cache_dir").replace("# num_rep", "num_rep")
    (tmp_path / "all.toml").write_text(every_line)
    assert tomllib.loads(every_line)["datasets"][1]["num_repeats"] == 2
    assert len(load_dataset_config(tmp_path / "all.toml")) == 2


def test_the_key_reference_is_what_the_schemas_say():
    from write_config_reference import TARGET, reference

    assert TARGET.read_text() == reference(), "run: python scripts/write_config_reference.py"


def test_a_bare_no_of_yaml_is_the_choice_of_that_name():
    config = {**GOOD, **yaml.safe_load("mixed_precision: no\ndynamo_backend: NO")}
    assert config["mixed_precision"] is False, "PyYAML still reads this as false"
    assert check_config(config, "my.yaml") == []
    assert launch_arguments(resolve_config(config))[5:9] == ["--mixed_precision", "no", "--dynamo_backend", "no"]


@pytest.mark.parametrize("text", ["C:\\xyz", "a\\x41", "\x01\x1b\x7f", "quo\"te's", "漢字 🎨\n\t", "[a]", "#", "$x{}"])
def test_any_text_survives_the_toml(text):
    from write_train_config import toml_text

    values = {"training_comment": text, "network_args": [f"exclude_patterns=[r'{text}']"], "learning_rate": 1e-4}
    assert tomllib.loads(toml_text(values)) == values


def test_the_resolved_configuration_holds_every_honoured_default(tmp_path):
    import write_train_config

    (tmp_path / "my.yaml").write_text(yaml.safe_dump({**GOOD, "seed": 7}))
    names = ("config", "latents_manifest", "text_encoder_outputs_manifest", "toml", "resolved")
    paths = {name: tmp_path / name for name in names} | {"config": tmp_path / "my.yaml"}
    assert write_train_config.main([part for name in names for part in (f"--{name}", str(paths[name]))]) == 0
    resolved = yaml.safe_load(paths["resolved"].read_text())
    assert resolved["seed"] == 7
    assert resolved["max_grad_norm"] == 1.0
    assert resolved["timestep_sampling"] == "qwen_shift"
    assert "fp8_base" not in resolved
    assert set(tomllib.loads(paths["toml"].read_text())) == {
        *GOOD, "seed", "latents_manifest", "text_encoder_outputs_manifest",
    }  # fmt: skip


@pytest.mark.parametrize("key", ["dynamo_mode", "dynamo_fullgraph", "dynamo_dynamic"])
def test_a_compile_key_without_a_backend_is_told(key):
    value = "default" if key == "dynamo_mode" else True
    assert "no effect while dynamo_backend is NO" in problems(**{key: value})[key]
    assert problems(**{key: value, "dynamo_backend": "INDUCTOR"}) == {}


def test_adopting_files_contradicts_determinism():
    assert "contradicts deterministic" in problems(adopt_existing=True, deterministic=True)["adopt_existing"]
    assert problems(adopt_existing=True) == problems(deterministic=True) == {}
