"""Comparing runs: what is read of each, their order, the settings that differ, and what is said of the rest."""

import math
from pathlib import Path

import pytest
from compare_runs import main
from compared import write_run, write_time

from qwen_image.comparison.ranking import differing_settings, in_order, notes, ranks, shared_settings, table
from qwen_image.comparison.runs import find_folders, read_runs
from qwen_image.config import known_keys
from qwen_image.problems import InputError


def read(*folders):
    return read_runs(folders)


def test_the_order(tmp_path):
    nan = math.nan
    runs = read(
        write_run(tmp_path, "learnt_by_heart", losses=[0.9, 0.01]),
        write_run(tmp_path, "lowest_in_between", validation=[0.6, 0.3, 0.7], losses=[1, 1, 1]),
        write_run(tmp_path, "no_number", losses=[nan, nan]),
        write_run(tmp_path, "lowest_at_the_end", validation=[0.6, 0.5, 0.4]),
        write_run(tmp_path, "not_finished", validation=[0.1], finished=False),
        write_run(tmp_path, "as_good", validation=[nan, 0.4, nan]),
        write_run(tmp_path, "diverged", validation=[nan, nan], losses=[0.9, 0.8]),
    )
    ordered = in_order(runs)
    assert [run.name for run in ordered] == [
        "lowest_in_between", "as_good", "lowest_at_the_end", "learnt_by_heart", "diverged", "no_number", "not_finished",
    ]  # fmt: skip
    assert ranks(ordered) == [1, 2, 2, 4, 5, 6, None]
    assert [run.best for run in ordered[:3]] == [(2, 0.3), (2, 0.4), (3, 0.4)]
    said = "\n".join(notes(ordered))
    assert "behind those with a validation loss: learnt_by_heart, diverged" in said
    assert "come last: no_number" in said
    assert "not_finished (not finished, at step 2)" in said


def test_the_table(tmp_path):
    write_time(tmp_path, "b", 10.0)
    runs = read(
        write_run(tmp_path, "a", validation=[0.6, 0.3, 0.7], losses=[0.5, 0.45, 0.4], learning_rate=3e-4),
        write_run(tmp_path, "b", losses=[0.5] * 20),
    )
    rows = table(runs)
    assert list(rows.columns) == [
        "rank", "run", "state", "ranked_by", "best_validation_loss", "best_step", "final_validation_loss",
        "final_training_loss", "steps", "learning_rate", "validation_split", "lora", "sha256", "best_lora",
        "train_seconds", "steps_per_second",
    ]  # fmt: skip
    first, second = rows.to_dict("records")
    assert (first["best_validation_loss"], first["best_step"], first["final_validation_loss"]) == (0.3, 2, 0.7)
    assert (first["final_training_loss"], first["steps"], first["ranked_by"]) == (0.4, 3, "validation loss")
    assert (first["learning_rate"], first["validation_split"]) == ("0.0003", "0.1")
    assert first["best_lora"] == str(tmp_path / "results/models/a-best.safetensors")
    assert math.isnan(first["train_seconds"])
    assert (second["ranked_by"], second["train_seconds"], second["steps_per_second"]) == ("training loss", 10.0, 2.0)
    assert math.isnan(second["best_validation_loss"])
    assert [len(row["sha256"]) for row in (first, second)] == [64, 64]


def test_no_setting_has_the_name_of_a_column(tmp_path):
    columns = set(table(read(write_run(tmp_path, "a"))).columns)
    assert not columns & set(known_keys())


def test_settings_that_differ(tmp_path):
    runs = read(
        write_run(tmp_path, "a", network_args=["x=1"], logging_dir="logs/a", text_encoder="t", save_state=False),
        write_run(tmp_path, "b", network_args=["x=2"], logging_dir="logs/b", text_encoder="u"),
        tmp_path / "results/train/not_there",
    )
    assert differing_settings(runs) == ["network_args", "save_state", "text_encoder"]
    assert shared_settings(runs)["network_dim"] == "4"
    assert not {"output_name", "logging_dir", "network_args"} & shared_settings(runs).keys()
    # the encoder's cache follows the encoder unless it is set
    runs = read(
        write_run(tmp_path, "a", text_encoder="t", caching_teo_text_encoder="t"),
        write_run(tmp_path, "b", text_encoder="u", caching_teo_text_encoder="u"),
    )
    assert differing_settings(runs) == ["text_encoder"]


def test_losses_that_were_not_measured_in_the_same_way(tmp_path):
    runs = read(
        write_run(tmp_path, "a", validation=[0.5], dataset_config="one.toml", loss_type="huber"),
        write_run(tmp_path, "b", validation=[0.5], dataset_config="two.toml"),
    )
    (note,) = notes(runs)
    assert "validation loss" in note and note.endswith("dataset_config differ.")
    runs = read(write_run(tmp_path, "a", loss_type="huber"), write_run(tmp_path, "b", loss_type="mse"))
    assert [note for note in notes(runs) if "training loss" in note and "loss_type differ" in note]


def test_a_lora_that_is_not_what_its_settings_say(tmp_path):
    trained_with = {"learning_rate": 1e-4, "network_dim": 8, "dataset_config": "dataset.toml", "gone": 1}
    folder = write_run(tmp_path, "a", validation=[0.5], trained_with=trained_with)
    (note,) = notes(read(folder))
    assert note == "a: its LoRA was trained with other settings than it has now: network_dim 8"
    trained_with["network_dim"] = 4
    folder = write_run(tmp_path, "a", validation=[0.5], trained_with=trained_with)
    assert not list(notes(read(folder)))
    lora = tmp_path / "results/models/a.safetensors"
    lora.write_bytes(lora.read_bytes()[:-1] + b" ")
    assert ["is not the file that was checked" in note for note in notes(read(folder))][-1]


@pytest.mark.parametrize(
    ("log", "speed"),
    [
        ("", 2.0),
        ("train: going on after step 10 of 20, from here\n", 1.0),
        ("train: a.safetensors is finished; nothing to do\n", None),
    ],
    ids=["in one go", "gone on", "only looked at"],
)
def test_time(tmp_path, log, speed):
    write_time(tmp_path, "a", 10.0, log)
    (row,) = table(read(write_run(tmp_path, "a", losses=[0.5] * 20))).to_dict("records")
    if speed is None:
        assert math.isnan(row["train_seconds"]) and math.isnan(row["steps_per_second"])
    else:
        assert (row["train_seconds"], row["steps_per_second"]) == (10.0, speed)


@pytest.mark.parametrize(
    ("steps", "report", "state"),
    [
        (0, None, "not trained"),
        (3, None, "not finished, at step 3"),
        (3, "train/a", "failed after step 3"),
        (0, "train/a", "failed"),
        (3, "check_lora/a", "failed: its LoRA did not pass the check"),
    ],
)
def test_what_became_of_a_run(tmp_path, steps, report, state):
    folder = write_run(tmp_path, "a", losses=[0.5] * steps, finished=False)
    if report:
        path = tmp_path / f"results/logs/{report}.failed"
        path.parent.mkdir(parents=True)
        path.write_text("Stage failed")
    (run,) = read(folder)
    assert (run.state, run.trained, run.steps) == (state, False, steps)


def test_a_run_that_was_asked_to_stop(tmp_path):
    folder = write_run(tmp_path, "a", finished=False)
    write_time(tmp_path, "a", 1.0)
    (tmp_path / "results/logs/train/a.failed").write_text("its state is saved; the same command goes on from there")
    assert read(folder)[0].state == "stopped after step 2"


def test_a_table_that_is_being_written(tmp_path):
    folder = write_run(tmp_path, "a", validation=[0.5, 0.4], finished=False)
    for name in ("a.loss.csv.part", "a.validation.csv.part"):
        with open(tmp_path / "results/models" / name, "a") as stream:
            stream.write("3")
    (run,) = read(folder)
    assert run.validation_losses == [(1, 0.5), (2, 0.4), (3, pytest.approx(math.nan, nan_ok=True))]
    assert run.best == (2, 0.4)
    (tmp_path / "results/models/a.loss.csv.part").write_text("")
    assert read(folder)[0].training_losses == []


def test_an_earlier_result_does_not_count_while_it_is_made_anew(tmp_path):
    folder = write_run(tmp_path, "a", losses=[0.5] * 9)
    write_run(tmp_path, "a", losses=[0.7], finished=False)
    (folder / "lora.sha256").unlink()
    (run,) = read(folder)
    assert (run.state, run.training_losses) == ("not finished, at step 1", [(1, 0.7)])


def test_runs_are_named_or_all_that_are_here(tmp_path, monkeypatch):
    project = tmp_path / "project"
    for name in ("b", "a"):
        write_run(project, name)
    monkeypatch.chdir(project)
    train = Path("results/train")
    assert find_folders([]) == [train / "a", train / "b"]
    assert find_folders(["b", "new", "results/train/b"]) == [train / "b", train / "new"]
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="results/train: holds no run"):
        find_folders([])


def test_runs_of_two_projects(tmp_path, monkeypatch):
    for project in ("one", "two"):
        write_run(tmp_path / project, "a")
    monkeypatch.chdir(tmp_path / "one")
    runs = read(*find_folders(["a", "../two/results/train/a/"]))
    assert [run.name for run in runs] == ["a (.)", "a (../two)"]
    assert [str(run.lora) for run in runs] == ["results/models/a.safetensors", "../two/results/models/a.safetensors"]
    monkeypatch.chdir("results/train/a")
    assert read(Path("."))[0].trained


def test_what_is_missing_or_failed_keeps_no_other_from_being_compared(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path, "good", validation=[0.5])
    write_run(tmp_path, "under_way", finished=False)
    broken = write_run(tmp_path, "broken")
    (broken / "resolved.yaml").write_text("{[")
    assert main(["good", "under_way", "broken", "missing"]) == 0
    printed = capsys.readouterr()
    lines = [line.split() for line in printed.out.splitlines()]
    assert [line[:2] for line in lines] == [
        ["rank", "run"],
        ["1", "good"],
        ["-", "broken"],
        ["-", "missing"],
        ["-", "under_way"],
    ]
    assert "not trained: no settings in results/train/missing/resolved.yaml" in printed.err
    assert sorted(path.name for path in (tmp_path / "results/compare/by_hand").iterdir()) == ["report.html", "runs.tsv"]


def test_nothing_to_rank_is_an_error(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path, "a", finished=False)
    with pytest.raises(InputError) as error:
        main(["a", "b"])
    assert [problem.file for problem in error.value.problems] == ["a", "b"]
    assert not (tmp_path / "results/compare").exists()


def test_text_on_a_terminal_steers_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path, "a", network_args=["\x1b[31m"], output_name="\x1b[2J")
    write_run(tmp_path, "b")
    assert main([]) == 0
    printed = capsys.readouterr()
    assert "\x1b" not in printed.out + printed.err
