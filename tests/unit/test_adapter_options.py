"""What is asked of the adapter: kinds, their options, and what does not go together, before anything is loaded."""

import pytest
from adapters import settings

from qwen_image.adapter.options import network_kind, network_options
from qwen_image.training.checks import check_settings

LOHA = {"network_module": "networks.loha"}
LOKR = {"network_module": "networks.lokr"}
FROM_FILE = {"network_weights": "a.safetensors", "dim_from_weights": True}


def args(*pairs):
    return {"network_args": list(pairs)}


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        ({}, "lora"),
        ({"network_module": "networks.lora_qwen_image"}, "lora"),
        (args("use_dora=True"), "dora"),
        (args("use_dora=False"), "lora"),
        (LOHA, "loha"),
        (LOKR, "lokr"),
        (FROM_FILE, None),
    ],
)
def test_kind(values, kind):
    assert network_kind(settings(**values).as_dict()) == kind


def test_options():
    given = args("factor=8", "decompose_both=True", "rank_dropout=0.1", "module_dropout=0", "verbose=True")
    options = network_options(settings(**LOKR, **given).as_dict())
    assert (options.factor, options.decompose_both) == (8, True)
    assert (options.rank_dropout, options.module_dropout) == (0.1, 0)
    assert options.verbose
    assert network_options(settings(**args("loraplus_lr_ratio=16")).as_dict()).loraplus_lr_ratio == 16


@pytest.mark.parametrize(
    "values",
    [
        args("use_dora=True", "loraplus_lr_ratio=4", "exclude_patterns=['a=b']"),
        {**LOHA, **args("rank_dropout=0.1", "module_dropout=0.1")},
        {**LOKR, **args("factor=-1", "rank_dropout=0.5"), "scale_weight_norms": 1.0},
        {"network_dropout": 0.1, "scale_weight_norms": 1.0},
        {"base_weights": ["a", "b"], "base_weights_multiplier": [1, 0.5]},
        {"base_weights": ["a"]},
        {"network_weights": "a.safetensors", "network_dim": 8, "network_alpha": 4},
        {**FROM_FILE, **args("rank_dropout=0.1", "loraplus_lr_ratio=2")},  # the file's kind decides at start
        {**FROM_FILE, "network_module": "networks.loha", **args("rank_dropout=0.1")},
    ],
)
def test_accepted(values):
    assert check_settings(values, "file") == []


@pytest.mark.parametrize(
    ("values", "key", "found", "mend"),
    [
        (args("conv_dim=4"), "network_args", "conv_dim is not supported", "no convolutions"),
        (args("conv_alpha=4"), "network_args", "conv_alpha is not supported", "no convolutions"),
        (args("dora_wd=True"), "network_args", "dora_wd", "use_dora=True"),
        (args("rank_dropout=0.1"), "network_args", "rank_dropout", "network_dropout"),
        (args("module_dropout=0.1"), "network_args", "module_dropout", "network_dropout"),
        (args("factor=4"), "network_args", "factor", "networks.lokr"),
        (args("decompose_both=True"), "network_args", "decompose_both", "networks.lokr"),
        (args("loraplus_lr_ratio=0"), "network_args", "loraplus_lr_ratio=0", "above 0"),
        (args("use_dora=yes"), "network_args", "use_dora=yes", "True or False"),
        (args("use_dor=True"), "network_args", "'use_dor' is no known key", "did you mean use_dora?"),
        ({**LOHA, **args("loraplus_lr_ratio=4")}, "network_args", "loraplus_lr_ratio", "up matrices"),
        ({**LOHA, **args("use_dora=True")}, "network_args", "use_dora", "networks.lora_qwen_image"),
        ({**LOHA, **args("factor=4")}, "network_args", "factor", "networks.lokr"),
        ({**LOKR, **args("factor=0")}, "network_args", "factor=0", "whole number"),
        ({**LOKR, **args("factor=2.5")}, "network_args", "factor=2.5", "whole number"),
        ({**LOKR, **args("rank_dropout=1")}, "network_args", "rank_dropout=1", "below 1"),
        ({**LOHA, "network_dropout": 0.1}, "network_dropout", "LoHa has no inputs", "rank_dropout"),
        ({**LOKR, "network_dropout": 0.1}, "network_dropout", "LoKr has no inputs", "rank_dropout"),
        ({**args("use_dora=True"), "scale_weight_norms": 1.0}, "scale_weight_norms", "DoRA", "learning_rate"),
        ({"dim_from_weights": True}, "dim_from_weights", "network_weights is not set", "remove"),
        ({**FROM_FILE, "network_dim": 8}, "network_dim", "changes nothing", "remove"),
        ({**FROM_FILE, "network_alpha": 8.0}, "network_alpha", "changes nothing", "remove"),
        ({**FROM_FILE, **args("factor=8")}, "network_args", "factor", "takes it from network_weights"),
        ({**FROM_FILE, **args("exclude_patterns=['a']")}, "network_args", "exclude_patterns", "takes it from"),
        ({"base_weights_multiplier": [1.0]}, "base_weights_multiplier", "base_weights is not set", "remove"),
        (
            {"base_weights": ["a"], "base_weights_multiplier": [1, 2]},
            "base_weights_multiplier", "2 for 1 base_weights", "one for each",
        ),
        ({"base_weights": "a.safetensors"}, "base_weights", "not of type 'array'", "give a list"),
        ({"base_weights": ["a"], "base_weights_multiplier": 0.5}, "base_weights_multiplier", "'array'", "give a list"),
        ({"base_weights": []}, "base_weights", "[]", "Adapter files"),
    ],
)  # fmt: skip
def test_refused_with_a_reason(values, key, found, mend):
    problems = check_settings(values, "file")
    assert [problem.key for problem in problems] == [key]
    assert found in problems[0].found
    assert mend in str(problems[0].mend)


def test_scaled_norms_need_an_optimizer_that_keeps_the_weights():
    values = {**settings(scale_weight_norms=1.0).as_dict(), "optimizer_type": "schedulefree.AdamWScheduleFree"}
    problems = [problem.found for problem in check_settings(values, "file") if problem.key == "scale_weight_norms"]
    assert len(problems) == 1 and "schedule-free" in problems[0]
