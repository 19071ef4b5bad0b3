"""States: stored to the bit, complete or absent, and chosen only by what they were made from."""

import json
import math
import os

import pytest
import torch

from qwen_image.problems import InputError
from qwen_image.training.state import (
    Facts,
    choose_state,
    differences,
    list_states,
    read_facts,
    read_state,
    remove_leftovers,
    remove_passed,
    remove_state,
    state_name,
    write_state,
)
from qwen_image.training.tree import read_tree, write_tree

ORIGIN = {"learning_rate": 1e-4, "latents": "abc"}


def facts(step=10, *, kept=False, origin=ORIGIN):
    return Facts(
        step=step, epoch=2, skipped_steps=1, recent_losses=[0.1, 1 / 3], best_validation=None, made_from=origin,
        kept=kept,
    )  # fmt: skip


def write(folder, name, **more):
    adapter = {"block.lora_A.weight": torch.randn(4, 3)}
    optimizer = {"state": {0: {"step": torch.tensor(10.0), "exp_avg": torch.randn(4, 3)}}, "param_groups": []}
    write_state(folder / name, facts(**more), adapter=adapter, optimizer=optimizer, average=None, check=lambda: None)
    return adapter, optimizer


# ---- trees -----------------------------------------------------------------------------------------------------------


def test_a_tree_reads_back_to_the_bit(tmp_path):
    tree = {
        "state": {0: {"step": torch.tensor(3.0), "codes": torch.arange(5, dtype=torch.uint8)}, 1: {}},
        "param_groups": [{"lr": 0.1 + 0.2, "betas": (0.9, 0.999), "foreach": None, "amsgrad": False, "params": [0, 1]}],
        "transposed": torch.arange(6.0).reshape(2, 3).T,
        "bf16": torch.tensor([1 / 3], dtype=torch.bfloat16),
        "infinite": -math.inf,
        "empty": torch.empty(0, 3),
    }
    write_tree(tmp_path / "tree", tree)
    found = read_tree(tmp_path / "tree")
    assert found.keys() == tree.keys() and found["state"].keys() == {0, 1}
    assert found["param_groups"] == tree["param_groups"] and isinstance(found["param_groups"][0]["betas"], tuple)
    assert found["infinite"] == -math.inf
    for before, after in (
        (tree["state"][0]["step"], found["state"][0]["step"]),
        (tree["state"][0]["codes"], found["state"][0]["codes"]),
        *((tree[key], found[key]) for key in ("transposed", "bf16", "empty")),
    ):
        assert before.dtype == after.dtype and before.shape == after.shape and torch.equal(before, after)


def test_what_a_tree_cannot_hold_is_refused_not_lost(tmp_path):
    class Packed(torch.Tensor):
        pass

    for value in (object(), {1, 2}, torch.randn(2).as_subclass(Packed)):
        with pytest.raises(TypeError):
            write_tree(tmp_path / "tree", {"x": value})
    assert not os.listdir(tmp_path)


# ---- complete or absent ----------------------------------------------------------------------------------------------


def test_a_state_reads_back(tmp_path):
    adapter, optimizer = write(tmp_path, "lora-state")
    saved = read_facts(tmp_path / "lora-state")
    assert saved.facts == facts()
    found, moments, average = read_state(saved)
    assert torch.equal(found["block.lora_A.weight"], adapter["block.lora_A.weight"]) and average is None
    assert torch.equal(moments["state"][0]["exp_avg"], optimizer["state"][0]["exp_avg"])


@pytest.mark.parametrize("failing", ["rename", "fsync"])
def test_a_state_that_cannot_be_written_leaves_nothing_and_the_old_one_alone(tmp_path, monkeypatch, failing):
    adapter, _ = write(tmp_path, "lora-state")

    def fail(*_):
        raise OSError("no space left")

    monkeypatch.setattr("pathlib.Path.rename" if failing == "rename" else "os.fsync", fail)
    with pytest.raises(OSError, match="no space"):
        write(tmp_path, "lora-state", step=11)
    monkeypatch.undo()
    assert os.listdir(tmp_path) == ["lora-state"]
    assert torch.equal(
        read_state(read_facts(tmp_path / "lora-state"))[0]["block.lora_A.weight"], adapter["block.lora_A.weight"]
    )


def test_a_newer_state_of_the_same_name_takes_the_place_of_the_old_one(tmp_path):
    write(tmp_path, "lora-state")
    write(tmp_path, "lora-state", step=20)
    assert read_facts(tmp_path / "lora-state").facts.step == 20
    assert os.listdir(tmp_path) == ["lora-state"]


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.safetensors"])
def test_a_damaged_state_is_named_with_what_to_do(tmp_path, file):
    write(tmp_path, "lora-state")
    path = tmp_path / "lora-state" / file
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(InputError, match="is damaged") as error:
        read_state(read_facts(tmp_path / "lora-state"))
    assert "lora-state" in error.value.problems[0].file and "remove this folder" in error.value.problems[0].mend


@pytest.mark.parametrize("content", ["", "{", "[]", '{"step": 1}', json.dumps({"version": 2})])
def test_a_folder_without_readable_facts_is_no_state(tmp_path, content):
    write(tmp_path, "lora-state")
    (tmp_path / "lora-state" / "state.json").write_text(content)
    assert list_states(tmp_path, "lora") == []


# ---- which one -------------------------------------------------------------------------------------------------------


def test_states_of_this_name_alone_are_listed_by_how_far_they_came(tmp_path):
    names = [state_name("lo.ra", step=9), state_name("lo.ra", epoch=3), state_name("lo.ra")]
    assert names == ["lo.ra-step00000009-state", "lo.ra-000003-state", "lo.ra-state"]
    for step, name in zip((9, 6, 12), names, strict=True):
        write(tmp_path, name, step=step)
    for other in ("loxra-state", "lo.ra-2-state", "lo.ra-best-state", "xlo.ra-state", "lo.ra-step9-state"):
        write(tmp_path, other, step=99)
    assert [saved.facts.step for saved in list_states(tmp_path, "lo.ra")] == [6, 9, 12]
    assert list_states(tmp_path / "nowhere", "lo.ra") == []


def test_the_furthest_of_the_same_origin_within_the_end_is_chosen(tmp_path):
    for step in (5, 10, 15):
        write(tmp_path, state_name("lora", step=step), step=step)
    write(tmp_path, "lora-state", step=20, origin=ORIGIN | {"learning_rate": 2e-4})
    states = list_states(tmp_path, "lora")
    assert choose_state(states, ORIGIN, 100).facts.step == 15
    assert choose_state(states, ORIGIN, 12).facts.step == 10
    assert choose_state(states, ORIGIN, 4) is None
    assert choose_state(states, ORIGIN | {"latents": "abd"}, 100) is None


def test_differences_name_the_key_and_both_values():
    assert differences({"a": 1, "b": 2}, {"a": 1, "b": 3, "c": 4}) == ["b was 2 and is 3", "c was None and is 4"]


# ---- what goes -------------------------------------------------------------------------------------------------------


def test_only_passed_states_that_nobody_asked_for_go(tmp_path):
    for step, kept in ((5, False), (10, True), (15, False)):
        write(tmp_path, state_name("lora", step=step), step=step, kept=kept)
    remove_passed(list_states(tmp_path, "lora"), newest=tmp_path / state_name("lora", step=15))
    assert [saved.facts.step for saved in list_states(tmp_path, "lora")] == [10, 15]


def test_leftovers_of_this_name_alone_go(tmp_path):
    kept = [f".tmp-{'0' * 16}", f".tmp-lora2-state-{'0' * 16}", ".tmp-lora-state-0", f".tmp-lora-x-state-{'0' * 16}"]
    for name in (f".tmp-lora-state-{'0' * 16}", f".tmp-lora-step00000001-state-{'a' * 16}", *kept):
        (tmp_path / name).mkdir()
    remove_leftovers(tmp_path, "lora")
    assert sorted(os.listdir(tmp_path)) == sorted(kept)


def test_a_link_is_never_followed_to_remove_what_it_points_to(tmp_path):
    write(tmp_path / "elsewhere", "lora-state")
    (tmp_path / "lora-state").symlink_to(tmp_path / "elsewhere" / "lora-state")
    remove_state(tmp_path / "lora-state")
    assert read_facts(tmp_path / "elsewhere" / "lora-state") is not None
