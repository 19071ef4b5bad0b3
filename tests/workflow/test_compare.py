"""`snakemake compare` in the real workflow: one run, and several of which one fails; test_many_runs.py has more."""

import pandas

TABLE = "results/compare/runs.tsv"
SO_FAR = "results/compare/so_far/runs.tsv"


def test_one_run_is_compared_with_nothing_and_trained_by_nothing(finished, tmp_path):
    project = finished[0].copy(tmp_path / "project")
    result = project.run("--", "compare")
    assert (result.code, result.rules) == (0, ["compare_runs", "compare"]), result.text
    (row,) = pandas.read_csv(project.folder / TABLE, sep="\t").to_dict("records")
    assert (row["rank"], row["run"], row["ranked_by"], row["steps"]) == (1, "demo", "training loss", 2)
    assert row["sha256"] == (project.folder / "results/train/demo/lora.sha256").read_text().split()[0]
    assert row["train_seconds"] > 0
    assert "trained with other settings" not in result.text
    assert project.run("--", "compare").nothing_done


def test_a_run_that_fails_is_left_out_for_the_time_being(finished, tmp_path):
    project = finished[0].copy(tmp_path / "project")
    project.configure(runs="runs.tsv", output_name=None)
    table = project.folder / "runs.tsv"
    # next to no share holds out nothing, which the training finds out
    table.write_text("output_name\tvalidation_split\ndemo\t\nheld_out\t1e-9\n")
    result = project.run("--", "compare")
    assert result.code != 0
    assert "1 demo" in " ".join(result.text.split()) and "Not ranked: held_out (failed)" in result.text
    so_far = pandas.read_csv(project.folder / SO_FAR, sep="\t")
    assert list(so_far["run"]) == ["demo", "held_out"] and so_far["rank"].isna().tolist() == [False, True]
    assert not (project.folder / TABLE).exists()

    table.write_text("output_name\tvalidation_split\ndemo\t\n")
    result = project.run("--", "compare")
    assert (result.code, result.rules[-2:]) == (0, ["compare_runs", "compare"]), result.text
    assert "train" not in result.rules
    assert list(pandas.read_csv(project.folder / TABLE, sep="\t")["run"]) == ["demo"]
