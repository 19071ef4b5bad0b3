"""The training arguments: all of the field's are known, each is honoured or refused with a reason, none is ignored."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import toml
import yaml
from jsonschema import Draft202012Validator

from qwen_image.problems import InputError
from qwen_image.training.arguments import (
    REQUIRED,
    argument_names,
    check_settings,
    coerce_numbers,
    parse_arguments,
    with_defaults,
)
from qwen_image.training.schema import key_schemas, key_types, load_schema

FIELD = json.loads((Path(__file__).parents[1] / "data" / "arguments.json").read_text())
TYPES = {"str": "string", "Path": "string", "flag": "boolean", "int": "integer", "float": "number"}
OURS = {
    "latents_manifest", "text_encoder_outputs_manifest", "prompts_manifest", "loss_type", "huber_delta",
    "caption_dropout_rate", "save_format", "save_state_every_n_minutes", "stop_before", "max_skipped_steps",
    "ema_decay", "validation_split", "validate_every_n_steps", "validate_every_n_epochs",
}  # fmt: skip
# where the defaults differ on purpose
DEFAULTS = {
    "timestep_sampling": "qwen_shift", "save_precision": "bf16", "seed": 42, "sdpa": True, "optimizer_type": "AdamW",
    "resume": "auto", "save_state_on_train_end": True,
}  # fmt: skip
HONOURED = """
    config_file dataset_config dit vae text_encoder num_layers model_version network_module network_dim
    network_alpha network_dropout network_args network_weights dim_from_weights scale_weight_norms
    base_weights base_weights_multiplier max_train_steps max_train_epochs gradient_accumulation_steps seed
    max_data_loader_n_workers persistent_data_loader_workers mixed_precision optimizer_type optimizer_args
    learning_rate max_grad_norm lr_scheduler lr_warmup_steps lr_scheduler_num_cycles lr_scheduler_power
    lr_decay_steps lr_scheduler_timescale lr_scheduler_min_lr_ratio lr_scheduler_type lr_scheduler_args
    timestep_sampling discrete_flow_shift sigmoid_scale min_timestep max_timestep weighting_scheme
    preserve_distribution_shape num_timestep_buckets show_timesteps logit_mean logit_std mode_scale
    loss_type huber_delta caption_dropout_rate prompts_manifest save_format resume stop_before save_state
    save_state_on_train_end save_state_every_n_minutes save_last_n_epochs_state save_last_n_steps_state
    max_skipped_steps ema_decay validation_split validate_every_n_steps validate_every_n_epochs
    sample_every_n_steps sample_every_n_epochs sample_at_first sample_prompts
    gradient_checkpointing ddp_timeout ddp_gradient_as_bucket_view ddp_static_graph output_dir output_name
    save_precision save_every_n_epochs save_every_n_steps save_last_n_epochs save_last_n_steps no_metadata
    training_comment metadata_title metadata_author metadata_description metadata_license metadata_tags
    metadata_reso metadata_arch logging_dir log_with log_prefix log_tracker_name log_config latents_manifest
    log_tracker_config wandb_run_name huggingface_repo_id huggingface_repo_type huggingface_path_in_repo
    huggingface_repo_visibility save_state_to_huggingface resume_from_huggingface async_upload
    text_encoder_outputs_manifest
"""
MINIMAL = dict.fromkeys(REQUIRED, "x")


def messages(settings, **kwargs):
    return {problem.key: f"{problem.found} -> {problem.mend}" for problem in check_settings(settings, "f", **kwargs)}


def other_value(name):
    """A value of the right type that is not the default."""
    schema = key_schemas()[name]
    if "enum" in schema:
        return next(choice for choice in schema["enum"] if choice not in (None, schema["default"]))
    kind = key_types(schema)[0]
    if kind == "array":
        return ["1"]
    return {"boolean": not schema["default"], "string": "x", "integer": 7, "number": 0.5}[kind]


def test_schema_is_valid_and_complete():
    Draft202012Validator.check_schema(load_schema())
    assert set(argument_names()) == {argument["name"] for argument in FIELD} | OURS
    assert len(FIELD) == 127
    for name, schema in key_schemas().items():
        assert len(schema["description"]) > 10, name
        assert "default" in schema, name
    assert not list(Draft202012Validator(load_schema()).iter_errors(with_defaults({})))


@pytest.mark.parametrize("argument", FIELD, ids=lambda argument: argument["name"])
def test_every_argument_of_the_field(argument):
    name = argument["name"]
    schema = key_schemas()[name]
    assert schema["default"] == DEFAULTS.get(name, argument["default"])
    wanted = "array" if argument["nargs"] else TYPES.get(argument["type"], "number")
    assert wanted in key_types(schema)
    if argument["choices"]:
        assert set(argument["choices"]) <= set(schema["enum"])
    assert not check_settings({name: schema["default"]}, "f")
    assert not check_settings({name: None}, "f")
    if name in HONOURED.split():
        assert "x-refused" not in schema
    else:
        value = other_value(name)
        assert messages({name: value})[name].endswith(f"is not supported -> {schema['x-refused']}")


def test_refused_values_are_choices_and_give_their_reason():
    for name, schema in key_schemas().items():
        for value, reason in schema.get("x-refused-values", {}).items():
            assert value in schema["enum"]
            assert reason in messages({name: value})[name]


def test_secrets_are_not_repeated():
    assert "hf_secret" not in str(messages({"huggingface_token": "hf_secret", "wandb_api_key": "hf_secret"}))


def test_all_problems_at_once():
    found = messages(
        {
            "learnin_rate": 1, "learning_rate": -1, "seed": True, "fp8_base": True, "network_dim": 0,
            "output_name": "a/b", "save_precision": "bf17", "max_grad_norm": float("nan"),
            "optimizer_args": [3], "network_dropout": 1,
        },
        required=["dit"],
    )  # fmt: skip
    assert found["learnin_rate"].endswith("did you mean learning_rate?")
    assert "less than the minimum of 0" in found["learning_rate"]
    assert "not of type 'integer'" in found["seed"]
    assert "fp8 weights are not in this version" in found["fp8_base"]
    assert "did you mean bf16?" in found["save_precision"]
    assert "is no finite number" in found["max_grad_norm"]
    assert "is not set" in found["dit"]
    assert {"network_dim", "output_name", "optimizer_args[0]", "network_dropout"} <= found.keys()


@pytest.mark.parametrize(
    ("settings", "key", "words"),
    [
        ({"lr_warmup_steps": 10}, "lr_warmup_steps", "constant_with_warmup"),
        ({"lr_warmup_steps": 1.5, "lr_scheduler": "cosine"}, "lr_warmup_steps", "more than the whole"),
        ({"lr_warmup_steps": "150%", "lr_scheduler": "cosine"}, "lr_warmup_steps", "more than the whole"),
        (
            {"persistent_data_loader_workers": True, "max_data_loader_n_workers": 0},
            "persistent_data_loader_workers", "no workers",
        ),
        ({"min_timestep": 500, "max_timestep": 500}, "min_timestep", "not below"),
        ({"discrete_flow_shift": 2.2}, "discrete_flow_shift", "size of the picture"),
        ({"sigmoid_scale": 2, "timestep_sampling": "uniform"}, "sigmoid_scale", "uniform"),
        ({"save_last_n_epochs": 2}, "save_last_n_epochs", "save_every_n_epochs is not set"),
        ({"save_last_n_steps": 2}, "save_last_n_steps", "save_every_n_steps is not set"),
        ({"log_prefix": "a"}, "log_prefix", "neither logging_dir nor log_with is set"),
        ({"lr_scheduler_num_cycles": 2}, "lr_scheduler_num_cycles", "cosine_with_restarts"),
        ({"ddp_static_graph": True, "gradient_accumulation_steps": 2}, "ddp_static_graph", "gradient_accumulation"),
        ({"optimizer_type": "Lio"}, "optimizer_type", "did you mean lion"),
        ({"optimizer_type": "nonsense"}, "optimizer_type", "is no optimizer"),
        ({"optimizer_args": ["weigth_decay=1"]}, "optimizer_args", "did you mean weight_decay"),
        ({"optimizer_args": ["weight_decay"]}, "optimizer_args", "no key=value"),
        ({"optimizer_args": ["betas=0.9"]}, "optimizer_args", "two numbers"),
        ({"optimizer_args": ["lr=0.1"]}, "optimizer_args", "learning_rate"),
        ({"network_args": ["exclude_patterns=['[']"]}, "network_args", "regular expressions"),
        ({"network_args": ["exclude_pattern=['a']"]}, "network_args", "did you mean exclude_patterns"),
        ({"network_args": ["conv_dim=4"]}, "network_args", "no convolutions"),
    ],
)  # fmt: skip
def test_combinations(settings, key, words):
    assert words in messages(settings)[key]


def test_numbers_as_yaml_and_command_lines_write_them():
    assert yaml.safe_load("a: 1e-4")["a"] == "1e-4"
    given = {"learning_rate": "1e-4", "max_train_steps": "100", "network_dim": 16.0, "lr_warmup_steps": "10%"}
    assert coerce_numbers(given) == {
        "learning_rate": 1e-4, "max_train_steps": 100, "network_dim": 16, "lr_warmup_steps": "10%",
    }  # fmt: skip
    assert coerce_numbers({"mixed_precision": False}) == {"mixed_precision": "no"}
    assert coerce_numbers({"dynamo_backend": False}) == {"dynamo_backend": "NO"}
    assert coerce_numbers({"output_name": "12", "unknown": "1"}) == {"output_name": "12", "unknown": "1"}
    assert not check_settings({"learning_rate": "1e-4"}, "f")
    assert "not of type" in messages({"learning_rate": "fast"})["learning_rate"]


def test_file_and_command_line_give_the_same_settings(tmp_path):
    values = {
        **MINIMAL, "learning_rate": 1e-4, "network_dim": 16, "gradient_checkpointing": True, "sdpa": True,
        "optimizer_args": ["weight_decay=0.1", "betas=(0.9,0.99)"], "lr_warmup_steps": "5%", "lr_scheduler": "cosine",
        "network_args": ["include_patterns=['.*_mod.*']"],
    }  # fmt: skip
    (tmp_path / "t.toml").write_text(toml.dumps({"model": {"dit": "x"}, "rest": {"deep": values | {"dit": None}}}))
    from_file = parse_arguments(["--config_file", str(tmp_path / "t.toml")])
    words = []
    for key, value in values.items():
        words += [f"--{key}", *(map(str, value) if isinstance(value, list) else [] if value is True else [str(value)])]
    from_line = parse_arguments(words)
    assert {**from_file.as_dict(), "config_file": None} == from_line.as_dict()
    assert from_file.learning_rate == 1e-4
    assert set(from_file.as_dict()) == set(argument_names())
    with pytest.raises(AttributeError):
        from_file.seed = 1


def test_command_line_wins_also_over_true(tmp_path):
    (tmp_path / "t.toml").write_text(toml.dumps({**MINIMAL, "seed": 1, "gradient_checkpointing": True}))
    settings = parse_arguments(
        ["--config_file", str(tmp_path / "t.toml"), "--seed", "2", "--no-gradient_checkpointing"]
    )
    assert (settings.seed, settings.gradient_checkpointing) == (2, False)


def test_both_are_checked_alike_and_named(tmp_path):
    path = tmp_path / "t.toml"
    path.write_text(toml.dumps({"a": {"seed": "x", "sed": 1}, "b": {"network_dim": 0}}))
    with pytest.raises(InputError) as caught:
        parse_arguments(["--config_file", str(path), "--max_grad_norm", "-1", "--learning_rat", "3"])
    found = {problem.key: problem.file for problem in caught.value.problems}
    assert found["seed"] == found["sed"] == found["network_dim"] == str(path)
    assert found["max_grad_norm"] == found["learning_rat"] == "command line"
    assert set(REQUIRED) <= found.keys()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[a]\nseed = 1\n[b]\nseed = 2\n", "stands in two sections"),
        ("config_file = 'other.toml'\n", "names another file"),
        ("seed = \n", "is no TOML file"),
    ],
)
def test_bad_files(tmp_path, text, words):
    (tmp_path / "t.toml").write_text(text)
    with pytest.raises(InputError, match=words):
        parse_arguments(["--config_file", str(tmp_path / "t.toml")])


def test_missing_file_and_stray_words():
    with pytest.raises(InputError, match="cannot be read"):
        parse_arguments(["--config_file", "nowhere.toml"])
    with pytest.raises(InputError, match="a value without a flag"):
        parse_arguments(["stray"])
    with pytest.raises(InputError, match="expected one argument"):
        parse_arguments(["--seed"])


def test_help_describes_every_argument_and_loads_no_torch():
    code = (
        "import sys; from qwen_image.training.arguments import build_parser, check_settings; "
        "check_settings({'seed': 1}, 'f'); print(build_parser().format_help()); assert 'torch' not in sys.modules"
    )
    scripts = Path(__file__).parents[2] / "scripts"
    shown = subprocess.run([sys.executable, "-c", code], cwd=scripts, capture_output=True, text=True, check=True).stdout
    for name in argument_names():
        assert f"--{name}" in shown
    assert "halve it when the loss jumps" in " ".join(shown.split())
