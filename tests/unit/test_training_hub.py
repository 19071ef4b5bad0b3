"""Uploads and downloads through real requests to a hub on this machine: nothing is lost, nothing leaks, all is said."""

import json

import hub_server
import huggingface_hub.constants
import pytest
from training_data import write_tiny_training

from qwen_image.problems import InputError
from qwen_image.training.arguments import Settings, check_settings, parse_arguments, with_defaults
from qwen_image.training.hub import STATE, Uploader, fetch_state, upload_what_is_left
from qwen_image.training.loop import train

REPOSITORY = "me/my-lora"
HERE = f"models/{REPOSITORY}"


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with hub_server.serve() as server:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.endpoint)
        template = server.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", hub_server.TOKEN)
        monkeypatch.delenv("RANK", raising=False)
        # the library waits seconds between its own attempts
        monkeypatch.setattr("time.sleep", lambda _: None)
        yield server


def settings(folder, **given):
    given = {"huggingface_repo_id": REPOSITORY, "output_dir": str(folder), "output_name": "lora", **given}
    return Settings(**with_defaults(given))


def write(folder, *names):
    """Write files, each of its own content, and return their paths."""
    folder.mkdir(exist_ok=True)
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(f"content of {name}")
    return [folder / name for name in names]


def left(folder):
    path = folder / "lora.not_uploaded.json"
    return json.loads(path.read_text()) if path.exists() else []


@pytest.mark.parametrize("background", [False, True], ids=["at once", "in the background"])
def test_files_and_folders_arrive(hub, tmp_path, background):
    given = settings(
        tmp_path / "out", async_upload=background, huggingface_path_in_repo="a/b/",
        huggingface_repo_visibility="public" if background else None,
    )  # fmt: skip
    one, two, _, _ = write(tmp_path / "out", "1.safetensors", "2.safetensors", "lora-state/a", "lora-state/b")
    uploader = Uploader(given)
    uploader.file(one)
    if not background:
        assert list(hub.files[HERE]) == ["a/b/1.safetensors"]
    uploader.file(two)
    uploader.folder(tmp_path / "out/lora-state")
    uploader.finish()
    assert hub.files[HERE] == {
        "a/b/1.safetensors": b"content of 1.safetensors", "a/b/2.safetensors": b"content of 2.safetensors",
        "a/b/lora-state/a": b"content of lora-state/a", "a/b/lora-state/b": b"content of lora-state/b",
    }  # fmt: skip
    assert hub.commits[0] == ["a/b/1.safetensors"] and len(hub.commits) == 3
    assert [one["visibility"] for one in hub.created] == ["public" if background else "private"]
    assert left(tmp_path / "out") == []


def test_the_kind_of_repository(hub, tmp_path):
    uploader = Uploader(settings(tmp_path, huggingface_repo_type="dataset"))
    uploader.file(*write(tmp_path, "1"))
    assert hub.files == {f"datasets/{REPOSITORY}": {"1": b"content of 1"}}


@pytest.mark.parametrize("background", [False, True], ids=["at once", "in the background"])
def test_a_failed_upload_loses_nothing_and_is_told_at_the_end(hub, tmp_path, caplog, background):
    given = settings(tmp_path / "out", async_upload=background)
    good, bad = write(tmp_path / "out", "good", "bad")
    uploader = Uploader(given)
    hub.refuse["bad"] = 500
    uploader.file(bad)
    uploader.file(good)
    with pytest.raises(InputError) as caught:
        uploader.finish()
    (problem,) = caught.value.problems
    assert problem.file == str(bad) and "is saved, but not uploaded" in problem.found
    assert "run the same command again" in problem.mend
    assert hub.files[HERE] == {"good": b"content of good"} and left(tmp_path / "out") == ["bad"]
    assert f"{bad} is not uploaded" in caplog.text
    assert hub_server.TOKEN not in caplog.text + str(caught.value)
    # the same command again, once it is finished
    hub.refuse.clear()
    upload_what_is_left(given)
    assert hub.files[HERE]["bad"] == b"content of bad" and left(tmp_path / "out") == []
    upload_what_is_left(given)
    assert len(hub.commits) == 2


def test_what_failed_is_tried_once_more_at_the_end(hub, tmp_path):
    uploader = Uploader(settings(tmp_path))
    hub.refuse["preupload"] = 503
    uploader.file(*write(tmp_path, "1"))
    assert left(tmp_path) == ["1"]
    hub.refuse.clear()
    uploader.finish()
    assert hub.files[HERE] == {"1": b"content of 1"} and left(tmp_path) == []


def test_what_a_killed_training_did_not_upload_is_uploaded_by_the_next(hub, tmp_path, monkeypatch):
    given = settings(tmp_path, async_upload=True)
    killed = Uploader(given)
    monkeypatch.setattr(killed, "_work", lambda: None)
    for path in write(tmp_path, "1", "2"):
        killed.file(path)
    assert left(tmp_path) == ["1", "2"]
    (tmp_path / "1").unlink()
    uploader = Uploader(given)
    uploader.file(*write(tmp_path, "3"))
    uploader.finish()
    assert hub.files[HERE].keys() == {"2", "3"} and left(tmp_path) == []


def test_an_older_file_that_made_way_is_no_failure(hub, tmp_path):
    uploader = Uploader(settings(tmp_path))
    uploader.file(tmp_path / "gone")
    uploader.finish()
    assert not hub.commits and left(tmp_path) == []


@pytest.mark.parametrize("status", [401, 403])
def test_a_repository_that_may_not_be_written_to_stops_the_start(hub, tmp_path, status):
    hub.refuse["."] = status
    with pytest.raises(InputError, match="may not be written to") as caught:
        Uploader(settings(tmp_path))
    assert "HF_TOKEN in the environment" in str(caught.value) and hub_server.TOKEN not in str(caught.value)


def test_a_hub_that_is_down_does_not_stop_the_start(hub, tmp_path, caplog):
    hub.refuse["repos/create"] = 502
    uploader = Uploader(settings(tmp_path))
    assert "cannot be reached now" in caplog.text
    hub.refuse.clear()
    uploader.file(*write(tmp_path, "1"))
    uploader.finish()
    assert hub.created and hub.files[HERE] == {"1": b"content of 1"}


def test_without_a_token_or_offline_nothing_starts(hub, tmp_path, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(InputError, match="has no token"):
        Uploader(settings(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="HF_HUB_OFFLINE is set"):
        Uploader(settings(tmp_path))


@pytest.mark.parametrize("other", ["another process", "no repository"])
def test_nothing_is_uploaded_by_other_processes_or_unasked(hub, tmp_path, monkeypatch, other):
    if other == "another process":
        monkeypatch.setenv("RANK", "1")
    given = settings(tmp_path, **({"huggingface_repo_id": None} if other == "no repository" else {}))
    uploader = Uploader(given)
    uploader.file(*write(tmp_path, "1"))
    uploader.folder(tmp_path)
    uploader.finish()
    upload_what_is_left(given)
    assert not hub.created and left(tmp_path) == []


# ---- states ----------------------------------------------------------------------------------------------------------


def test_a_state_is_fetched(hub, tmp_path):
    hub.files[HERE] = {
        "x/lora-state/state.json": b"{}", "x/lora-state/model.safetensors": b"m", "x/lora-state-2/state.json": b"no",
        "lora.safetensors": b"no",
    }  # fmt: skip
    given = settings(tmp_path, resume_from_huggingface=True, resume=f"{REPOSITORY}/x/lora-state:main")
    folder = fetch_state(given)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {
        "state.json": b"{}",
        "model.safetensors": b"m",
    }
    assert sorted(path.name for path in folder.parent.iterdir()) == ["lora-state"]
    assert fetch_state(settings(tmp_path)) is None


def test_a_state_that_cannot_be_had_is_named(hub, tmp_path):
    hub.files[HERE] = {"other": b""}
    given = settings(tmp_path, resume_from_huggingface=True, resume=f"{REPOSITORY}/lora-state")
    with pytest.raises(InputError, match="is not in the repository"):
        fetch_state(given)
    hub.refuse["."] = 404
    with pytest.raises(InputError, match="cannot be downloaded"):
        fetch_state(given)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("u/n/a-state", ("u/n", "a-state", None, None)),
        ("u/n/x/y/a-state:v1.0", ("u/n", "x/y/a-state", "v1.0", None)),
        ("u/n/a:main:dataset", ("u/n", "a", "main", "dataset")),
        ("u/n", None),
        ("/absolute/folder/state", None),
        ("auto", None),
        ("u/n/a:main:thing", None),
    ],
)
def test_names_of_states(text, parts):
    named = STATE.fullmatch(text)
    assert (named and named.group("repo", "path", "revision", "kind")) == parts


# ---- checks ----------------------------------------------------------------------------------------------------------


def test_keys_that_do_not_go_together():
    def keys(**given):
        return {problem.key for problem in check_settings(given, "f")}

    assert not keys(
        huggingface_repo_id="a/b", huggingface_path_in_repo="x/y", huggingface_repo_type="model", async_upload=True,
        huggingface_repo_visibility="public", save_state_to_huggingface=True, resume_from_huggingface=True,
        resume="a/b/c-state",
    )  # fmt: skip
    needing = {"huggingface_repo_type": "model", "huggingface_path_in_repo": "x", "async_upload": True,
               "huggingface_repo_visibility": "public", "save_state_to_huggingface": True}  # fmt: skip
    assert keys(**needing) == needing.keys()
    assert keys(resume_from_huggingface=True) == keys(resume_from_huggingface=True, resume="a/b") == {"resume"}
    assert keys(huggingface_repo_id="a/b", save_state_on_train_end=False) == {"save_state_on_train_end"}
    assert keys(huggingface_repo_id="b", huggingface_path_in_repo="../x") == {
        "huggingface_repo_id", "huggingface_path_in_repo",
    }  # fmt: skip
    assert keys(huggingface_repo_id="a/b", huggingface_repo_type="space") == {"huggingface_repo_type"}


# ---- whole trainings -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return write_tiny_training(tmp_path_factory.mktemp("tiny"))


def trained(tiny, folder, **more):
    more = {"network_dim": 2, "max_data_loader_n_workers": 0, "output_dir": folder, **more}
    return train(parse_arguments(tiny.flags(**more)))


def test_a_training_whose_uploads_fail_is_whole_and_the_same_command_uploads(hub, tiny, tmp_path):
    given = {"huggingface_repo_id": REPOSITORY, "save_state_to_huggingface": True, "save_every_n_steps": 2}
    hub.refuse["lora.safetensors"] = hub.refuse["lora-state"] = 500
    with pytest.raises(InputError, match="2 problems were found") as caught:
        trained(tiny, tmp_path, **given)
    assert "lora.safetensors: is saved, but not uploaded" in str(caught.value)
    assert list(hub.files[HERE]) == ["lora-step00000002.safetensors"]
    content = (tmp_path / "lora.safetensors").read_bytes()
    assert (tmp_path / "lora-state").is_dir() and left(tmp_path) == ["lora-state", "lora.safetensors"]
    hub.refuse.clear()
    assert trained(tiny, tmp_path, **given).read_bytes() == content == hub.files[HERE]["lora.safetensors"]
    assert left(tmp_path) == []
    # a workflow takes the file of a failed training away
    hub.files[HERE].pop("lora.safetensors")
    (tmp_path / "lora.safetensors").unlink()
    trained(tiny, tmp_path, **given)
    assert hub.files[HERE]["lora.safetensors"] == content


def test_a_training_goes_on_from_an_uploaded_state(hub, tiny, tmp_path):
    whole = trained(tiny, tmp_path / "whole", max_train_steps=5)
    given = {"huggingface_repo_id": REPOSITORY, "save_state_to_huggingface": True, "async_upload": True}
    trained(tiny, tmp_path / "first", max_train_steps=2, **given)
    assert "lora-state/state.json" in hub.files[HERE]
    state = {"resume_from_huggingface": True, "resume": f"{REPOSITORY}/lora-state"}
    assert trained(tiny, tmp_path / "second", max_train_steps=5, **state).read_bytes() == whole.read_bytes()
