"""Tables that do not show an interruption, curves without doubles, trackers that start or say why they cannot."""

import csv
import dataclasses
import json
import math
import sys
import types
from pathlib import Path

import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from qwen_image.problems import InputError
from qwen_image.training.arguments import Settings, check_settings, with_defaults
from qwen_image.training.logger import Logger, StepRecord
from qwen_image.training.trackers import OPTIONS, check_trackers, tracker_options

HELD_OUT = {4: 0.5, 8: 0.25}
"""Validation losses by step."""


def settings(folder, **given):
    return Settings(**with_defaults({"output_dir": str(folder), "output_name": "lora", **given}))


def record(step):
    loss = math.nan if step == 3 else 1 / step
    return StepRecord(
        step=step, epoch=1, loss=loss, loss_average=loss / 3, learning_rate=1e-4, grad_norm=0.1 * step,
        skipped_steps=int(step >= 3),
    )  # fmt: skip


def write(given, first, last, *, close=True, **facts):
    """Log the steps from first to last; without close it is a training that was killed."""
    logger = Logger(given, start_step=first - 1, **facts)
    for step in range(first, last + 1):
        logger.log(record(step), seconds=step * 10)
        if step in HELD_OUT and given.validation_split:
            logger.validation(step, HELD_OUT[step])
    if close:
        logger.close()
    return logger


def facts(step):
    """What the state after a step tells."""
    seen = [loss for at, loss in HELD_OUT.items() if at <= step]
    return {"average_loss": record(step).loss_average, "best_validation": min(seen, default=None)}


def tables(folder):
    return {path.name: path.read_bytes() for path in Path(folder).glob("*.csv*")}


@pytest.fixture
def uninterrupted(tmp_path):
    write(settings(tmp_path / "whole", validation_split=0.1), 1, 9)
    return tables(tmp_path / "whole")


# ---- tables ----------------------------------------------------------------------------------------------------------


def test_a_table_holds_the_record_and_no_time(uninterrupted):
    rows = list(csv.DictReader(uninterrupted["lora.loss.csv"].decode().splitlines()))
    assert list(rows[0]) == [field.name for field in dataclasses.fields(StepRecord)]
    assert [int(row["step"]) for row in rows] == list(range(1, 10))
    assert float(rows[6]["loss"]) == 1 / 7 and rows[2]["loss"] == "nan"
    assert uninterrupted["lora.validation.csv"] == b"step,loss\n4,0.5\n8,0.25\n"
    assert uninterrupted.keys() == {"lora.loss.csv", "lora.validation.csv"}


@pytest.mark.parametrize("kept", [1, 3, 4, 6, 8])
@pytest.mark.parametrize("killed", [True, False], ids=["killed", "stopped"])
def test_an_interruption_does_not_show(tmp_path, uninterrupted, kept, killed):
    given = settings(tmp_path, validation_split=0.1)
    # a killed training has gone on from its last state for a while
    write(given, 1, 8 if killed else kept, close=not killed)
    write(given, kept + 1, 9, **facts(kept))
    assert tables(tmp_path) == uninterrupted


def test_a_torn_line_is_dropped_and_told(tmp_path, uninterrupted, caplog):
    given = settings(tmp_path, validation_split=0.1)
    write(given, 1, 8, close=False)
    part = tmp_path / "lora.loss.csv.part"
    part.write_bytes(part.read_bytes()[:-3])
    write(given, 8, 9, **facts(7))
    assert tables(tmp_path) == uninterrupted and not caplog.records
    lines = uninterrupted["lora.loss.csv"].splitlines(keepends=True)
    (tmp_path / "lora.loss.csv").write_bytes(b"".join(lines[:6]) + b"\0\0\0\0\0\n")
    write(given, 9, 9, **facts(8))
    assert tables(tmp_path)["lora.loss.csv"] == b"".join([*lines[:6], lines[9]])
    assert "lora.loss.csv lacks 3 of the first 8 steps" in caplog.text


def test_a_table_of_another_training_is_not_gone_on_with(tmp_path, caplog):
    given = settings(tmp_path, validation_split=0.1)
    write(given, 1, 9)
    write(given, 7, 9, average_loss=0.123, best_validation=0.456)
    rows = list(csv.DictReader(tables(tmp_path)["lora.loss.csv"].decode().splitlines()))
    assert [row["step"] for row in rows] == ["7", "8", "9"]
    assert tables(tmp_path)["lora.validation.csv"] == b"step,loss\n8,0.25\n"
    assert "lacks 6 of the first 6 steps" in caplog.text


def test_of_two_tables_the_one_of_this_training_is_taken(tmp_path, uninterrupted):
    given = settings(tmp_path, validation_split=0.1)
    write(given, 1, 6)
    # another training of the same name, killed
    other = Logger(given, start_step=0)
    for step in range(1, 8):
        other.log(dataclasses.replace(record(step), loss_average=7.0), seconds=0)
    write(given, 7, 9, **facts(6))
    assert tables(tmp_path) == uninterrupted


def test_starting_anew_leaves_the_old_table_until_the_new_one_is_done(tmp_path, uninterrupted):
    given = settings(tmp_path, validation_split=0.1)
    write(given, 1, 9)
    logger = write(given, 1, 2, close=False)
    assert tables(tmp_path)["lora.loss.csv"] == uninterrupted["lora.loss.csv"]
    assert len(tables(tmp_path)["lora.loss.csv.part"].splitlines()) == 3
    logger.close()
    assert len(tables(tmp_path)["lora.loss.csv"].splitlines()) == 3


def test_old_columns_are_not_mixed_with_new_ones(tmp_path):
    (tmp_path / "lora.loss.csv").write_text("step,loss\n1,0.5\n2,0.5\n")
    write(settings(tmp_path), 3, 3)
    assert [line.split(b",")[0] for line in tables(tmp_path)["lora.loss.csv"].splitlines()] == [b"step", b"3"]


def test_without_held_out_items_there_is_no_table_of_them(tmp_path):
    write(settings(tmp_path), 1, 2)
    assert tables(tmp_path).keys() == {"lora.loss.csv"}


# ---- TensorBoard -----------------------------------------------------------------------------------------------------


def events(folder):
    found = EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0})
    return found.Reload()


def test_tensorboard_goes_on_without_doubles(tmp_path):
    given = settings(tmp_path, logging_dir=str(tmp_path / "logs"), log_prefix="x-", validation_split=0.1)
    write(given, 1, 8)
    write(given, 7, 9, **facts(6))
    found = events(tmp_path / "logs/x-lora/network_train")
    steps = {name: [event.step for event in found.Scalars(name)] for name in found.Tags()["scalars"]}
    assert steps["loss/average"] == steps["loss/current"] == [1, 2, 4, 5, 6, 7, 8, 9]  # the third is no number
    assert steps["time/step_seconds"] == steps["lr/unet"] == steps["skipped_steps"] == list(range(1, 10))
    assert steps["loss/validation"] == [4, 8]
    assert [event.value for event in found.Scalars("time/step_seconds")] == [10.0 * step for step in range(1, 10)]


def test_tensorboard_shows_pictures_and_settings(tmp_path):
    options = tmp_path / "trackers.toml"
    options.write_text("[tensorboard]\nfilename_suffix = '.mine'\n")
    logger = Logger(
        settings(
            tmp_path, logging_dir=str(tmp_path / "logs"), log_with="tensorboard", log_tracker_name="t", log_config=True,
            log_tracker_config=str(options), learning_rate=3e-3,
        ),
        start_step=0,
    )  # fmt: skip
    for number in range(2):
        Image.new("RGBA", (6 + number, 4), (255, 0, 0, 255)).save(tmp_path / f"{number}.png")
    logger.pictures(5, [tmp_path / "0.png", tmp_path / "1.png"])
    logger.close()
    found = events(tmp_path / "logs/lora/t")
    pictures = [found.Images(f"samples/{number:02d}")[0] for number in range(2)]
    assert [(one.step, one.width, one.height) for one in pictures] == [(5, 6, 4), (5, 7, 4)]
    text = found.Tensors("config/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "learning_rate = 0.003" in text
    assert [path.name.endswith(".mine") for path in (tmp_path / "logs/lora/t").iterdir()] == [True]


# ---- wandb -----------------------------------------------------------------------------------------------------------


def test_wandb_writes_an_offline_run_without_any_secret(tmp_path, monkeypatch, capfd, caplog):
    secrets = {"WANDB_API_KEY": "deadbeef" * 5, "HF_TOKEN": "hf_plantedplantedplanted"}
    for name, value in secrets.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("WANDB_MODE", "offline")
    given = settings(
        tmp_path, log_with="all", logging_dir=str(tmp_path / "logs"), log_config=True, wandb_run_name="my-run",
        validation_split=0.1,
    )  # fmt: skip
    Image.new("RGB", (8, 8)).save(tmp_path / "picture.png")
    caplog.set_level("INFO")
    logger = Logger(given, start_step=0)
    for step in range(1, 5):
        logger.log(record(step), seconds=1)
    logger.validation(4, 0.5)
    logger.pictures(4, [tmp_path / "picture.png"])
    logger.close()
    (run,) = (tmp_path / "logs/wandb").glob("offline-run-*")
    (binary,) = run.glob("run-*.wandb")
    content = binary.read_bytes()
    for word in (b"my-run", b"network_train", b"loss/current", b"loss/validation", b"samples/00", b"learning_rate"):
        assert word in content
    assert list((run / "files/media").rglob("*.png"))
    everything = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    everything += "".join([*capfd.readouterr(), caplog.text]).encode()
    assert not [name for name, value in secrets.items() if value.encode() in everything]


def test_wandb_takes_its_settings_and_learns_of_a_failure(tmp_path, monkeypatch):
    calls = []

    class Run(types.SimpleNamespace):
        def log(self, values, step):
            calls.append((step, values))

        def finish(self, exit_code):
            calls.append(exit_code)

    def init(**given):
        calls.append(given)
        return Run(url="https://x", dir="d", offline=False)

    fake = types.SimpleNamespace(init=init, Error=RuntimeError, Settings=dict)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    options = tmp_path / "trackers.toml"
    options.write_text('[wandb]\nproject = "p"\ntags = ["a", "b"]\nmode = "offline"\n')
    given = settings(tmp_path, log_with="wandb", log_tracker_config=str(options), log_prefix="x-")
    logger = Logger(given, start_step=0)
    logger.log(record(3), seconds=2)
    with pytest.raises(ZeroDivisionError):
        try:
            raise ZeroDivisionError
        finally:
            logger.close()
    start, (step, values), code = calls
    assert (start["project"], start["tags"], start["mode"]) == ("p", ["a", "b"], "offline")
    assert (start["name"], start["group"], start["dir"], start["config"]) == ("x-lora", "lora", str(tmp_path), None)
    assert step == 3 and "loss/current" not in values and values["time/step_seconds"] == 2
    # a wandb that cannot be reached holds up no LoRA
    assert 0 < start["settings"]["finish_timeout"] <= 60
    assert code == 1

    def refuse(**_):
        raise RuntimeError("No API key configured")

    fake.init = refuse
    with pytest.raises(InputError, match=r"No API key configured[^\n]*\n.*WANDB_API_KEY in the environment"):
        Logger(given, start_step=0)


def test_what_the_file_may_set_are_arguments_of_the_tools():
    import inspect

    import wandb
    from torch.utils.tensorboard import SummaryWriter

    assert set(OPTIONS["wandb"]) <= inspect.signature(wandb.init).parameters.keys()
    assert set(OPTIONS["tensorboard"]) <= inspect.signature(SummaryWriter.__init__).parameters.keys()


# ---- checks ----------------------------------------------------------------------------------------------------------


def test_a_missing_wandb_is_told_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    (problem,) = check_trackers(settings(tmp_path, log_with="wandb").as_dict())
    assert "not installed" in problem.found and "log_with: tensorboard" in problem.mend
    assert not check_trackers(settings(tmp_path, logging_dir="x").as_dict())


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[wandb]\nprojekt = 'x'\n[tensorboard]\nlogdir = 'y'\n", ["wandb.projekt", "tensorboard.logdir"]),
        ("[wandbb]\n", ["wandbb: is no table"]),
        ("wandb = 3\n", ["wandb: is no table"]),
        ("[wandb\n", ["is no TOML file"]),
        (None, ["cannot be read"]),
    ],
)
def test_bad_tracker_files(tmp_path, text, words):
    path = tmp_path / "trackers.toml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(InputError) as caught:
        tracker_options(str(path))
    assert len(caught.value.problems) == len(words) and all(word in str(caught.value) for word in words)


def test_a_table_of_a_tool_that_is_not_used_is_told(tmp_path):
    (tmp_path / "t.toml").write_text("[wandb]\n[tensorboard]\n")
    given = settings(tmp_path, logging_dir="x", log_tracker_config=str(tmp_path / "t.toml"))
    assert [problem.key for problem in check_trackers(given.as_dict())] == ["wandb"]


def test_keys_without_effect_and_secrets():
    def keys(**given):
        return {problem.key: problem for problem in check_settings(given, "f")}

    assert not keys(log_with="wandb", wandb_run_name="n", log_tracker_name="t", log_config=True, log_prefix="p")
    assert keys(log_with="all").keys() == {"log_with"}
    assert keys(logging_dir="x", wandb_run_name="n", log_tracker_config="t.toml").keys() == {"wandb_run_name"}
    assert keys(log_prefix="p", log_config=True, log_tracker_config="t").keys() == {
        "log_prefix", "log_config", "log_tracker_config",
    }  # fmt: skip
    for key, value in {"wandb_api_key": "planted-secret", "huggingface_token": "planted-secret"}.items():
        (problem,) = check_settings({key: value}, "f")
        assert "planted" not in str(problem) and "environment" in problem.mend
    assert "planted" not in json.dumps(
        [str(problem) for problem in check_settings({"wandb_api_key": ["planted"]}, "f")]
    )
