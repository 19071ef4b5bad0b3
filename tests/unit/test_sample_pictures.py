"""Sample pictures of a training and of saved checkpoints: when, with what, and that they leave the model alone."""

import re

import numpy
import pytest
import qwen_image_cache_prompts
import qwen_image_generate_samples
import tiny
import torch
from PIL import Image
from sample_data import write_prompts
from training_data import tiny_transformer

from qwen_image.adapter.files import adapter_tensors, save_adapter
from qwen_image.adapter.network import add_adapter
from qwen_image.cache import text_encoder_outputs
from qwen_image.cache.prompts import prompts_folder, read_prompts, text_sha256
from qwen_image.problems import InputError
from qwen_image.sampling.checkpoints import adapter_on, check_loras, run_checkpoints
from qwen_image.sampling.pictures import SamplePictures
from qwen_image.sampling.sheet import LONGEST_SIDE, contact_sheet
from qwen_image.training.arguments import Settings, with_defaults
from qwen_image.training.batches import Step
from qwen_image.training.flow import predict_velocity


@pytest.fixture
def arguments(tmp_path):
    """Of a training that makes sample pictures every two steps."""
    more = {"output_dir": str(tmp_path / "models"), "output_name": "lora", "dit": str(tmp_path / "none")}
    return write_prompts(tmp_path) | more | {"sample_every_n_steps": 2}


def settings(arguments, **changes):
    return Settings(**with_defaults(arguments | changes))


def pictures(arguments, **changes):
    return SamplePictures(settings(arguments, **changes), torch.device("cpu"))


def step(number, epoch=1, *, ends_epoch=False):
    return Step(number, epoch, (), ends_epoch)


def adapted(transformer, seed=0, **changes):
    """Put an adapter on a transformer that changes something."""
    add_adapter(transformer, settings({"network_dim": 2, "seed": seed}, **changes))
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in transformer.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=random) * 0.2)
    return transformer


def predicted(transformer):
    """What the model says of noise of 32 x 48 pixels."""
    random = torch.Generator().manual_seed(1)
    z_bc1hw, text_bld = torch.randn(1, 16, 1, 6, 4, generator=random), torch.randn(1, 5, 64, generator=random)
    return predict_velocity(transformer, z_bc1hw, torch.tensor([0.5]), text_bld, None)


def content(paths):
    return [path.read_bytes() for path in paths]


def test_when_they_are_due(arguments):
    def due(**changes):
        made = pictures(arguments, **changes)
        steps = [step(number, (number + 2) // 3, ends_epoch=number % 3 == 0) for number in range(1, 8)]
        return [one.number for one in steps if made.due(one, last=one.number == 7)]

    assert due() == [2, 4, 6, 7]
    assert due(sample_every_n_steps=None, sample_every_n_epochs=2) == [6, 7]
    assert due(sample_every_n_epochs=1) == [2, 3, 4, 6, 7], "6 is both, and once is enough"
    assert due(sample_every_n_steps=None, sample_at_first=True) == []


def test_without_their_keys_nothing_is_read():
    none = SamplePictures(settings({"output_dir": "/nowhere", "output_name": "a"}), torch.device("cpu"))
    assert not none.due(step(2, ends_epoch=True), last=True)
    assert none.make(None, step=0, epoch=None) == []


def test_names_say_step_or_epoch_and_the_bytes_are_the_same_again(arguments, tmp_path):
    transformer = adapted(tiny_transformer())
    made = pictures(arguments, sample_every_n_epochs=2)
    paths = made.make(transformer, step=4, epoch=1)
    assert [path.parent for path in paths] == [tmp_path / "models" / "sample"] * 2
    assert re.fullmatch(r"lora_000004_00_3\.png lora_000004_01_\d+\.png", " ".join(path.name for path in paths))
    assert [Image.open(path).size for path in paths] == [(32, 48), (48, 32)]
    first = content(paths)
    assert first[0] != first[1]
    again = made.make(transformer, step=12, epoch=2)
    assert [path.name[:12] for path in again] == ["lora_e000002"] * 2
    assert content(again) == first, "the same weights make the same pictures, whatever was made before"
    assert not [path for path in (tmp_path / "models" / "sample").iterdir() if path.suffix != ".png"]
    other = pictures(arguments).make(adapted(tiny_transformer(), seed=1), step=4, epoch=None)
    assert content(other)[0] != first[0], "the adapter takes part"


def test_they_leave_no_trace_in_the_model_or_in_chance(arguments):
    transformer = adapted(tiny_transformer(), network_dropout=0.5).train()
    transformer.enable_gradient_checkpointing()
    frozen = transformer.transformer_blocks[0].attn.to_q.base_layer.eval()
    weights = {name: tensor.clone() for name, tensor in transformer.state_dict().items()}
    modes = [module.training for module in transformer.modules()]
    torch.manual_seed(7)
    chance = torch.get_rng_state()
    paths = pictures(arguments).make(transformer, step=2, epoch=None)
    assert torch.equal(torch.get_rng_state(), chance)
    assert [module.training for module in transformer.modules()] == modes
    assert not frozen.training
    assert transformer.is_gradient_checkpointing
    assert all(torch.equal(tensor, weights[name]) for name, tensor in transformer.state_dict().items())
    assert all(parameter.grad is None for parameter in transformer.parameters())
    undropped = adapted(tiny_transformer())
    assert content(paths) == content(pictures(arguments).make(undropped, step=4, epoch=None)), "dropout was on"
    # the model's tables must be good for training after pictures
    predicted(transformer).sum().backward()


def test_the_vae_is_not_on_the_device_while_training(arguments):
    made = pictures(arguments)
    assert made._painter._vae is None
    made.make(tiny_transformer(), step=2, epoch=None)
    assert made._painter._vae.device.type == "cpu"


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"vae": None}, "vae: is not set"),
        ({"vae": "/nowhere.safetensors"}, "/nowhere.safetensors: vae"),
        ({"prompts_manifest": None}, "prompts_manifest: is not set"),
        ({"sample_prompts": "/nowhere.txt"}, "/nowhere.txt"),
    ],
)
def test_what_is_missing_is_told_at_the_start(arguments, changes, words):
    with pytest.raises(InputError) as error:
        pictures(arguments, **changes)
    assert words in str(error.value)


def test_a_prompt_that_is_not_cached_is_told_at_the_start(arguments, tmp_path):
    (tmp_path / "prompts.txt").write_text("a red square\na green one\n")
    with pytest.raises(InputError) as error:
        pictures(arguments)
    (problem,) = error.value.problems
    assert "a green one" in str(problem)
    assert "qwen_image_cache_prompts.py" in problem.mend


@pytest.mark.parametrize("how", ["gone", "other"])
def test_a_cached_text_that_is_not_the_manifests_is_told_at_the_start(arguments, how):
    manifest = arguments["prompts_manifest"]
    file = prompts_folder(manifest) / f"{text_sha256('a red square')}_qi_te.safetensors"
    if how == "gone":
        file.unlink()
    else:
        file.write_bytes((prompts_folder(manifest) / f"{text_sha256('a blue round')}_qi_te.safetensors").read_bytes())
    with pytest.raises(InputError) as error:
        pictures(arguments)
    (problem,) = error.value.problems
    assert problem.file == str(file)


def test_a_failure_costs_the_pictures_and_not_the_training(arguments, tmp_path, caplog):
    class Full(torch.nn.Module):
        txt_in = torch.nn.Linear(1, 1)

        def forward(self, **_):
            raise torch.OutOfMemoryError("no room for it")

    made = pictures(arguments)
    assert made.make(Full().train(), step=2, epoch=None) == []
    assert "step 2" in caplog.text
    assert "no room for it" in caplog.text
    assert len(made.failures) == 1
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "sample").write_text("in the way")
    assert made.make(tiny_transformer(), step=4, epoch=None) == []
    assert len(made.failures) == 2
    (tmp_path / "models" / "sample").unlink()
    assert len(made.make(tiny_transformer(), step=6, epoch=None)) == 2


@pytest.mark.parametrize("kind", ["lora", "dora", "loha", "lokr"])
def test_a_saved_adapter_goes_on_and_off_the_model(tmp_path, kind):
    module = {"loha": "networks.loha", "lokr": "networks.lokr"}.get(kind)
    extra = {"network_args": ["use_dora=True"]} if kind == "dora" else {}
    trained = adapted(tiny_transformer(), network_module=module, **extra)
    file = tmp_path / "one.safetensors"
    save_adapter(file, adapter_tensors(trained, precision="fp32"), {})
    transformer = tiny_transformer()
    names = [name for name, _ in transformer.named_parameters()]
    wanted, bare = predicted(trained), predicted(transformer)
    for _ in range(2):
        with adapter_on(transformer, file):
            assert torch.equal(predicted(transformer), wanted)
        assert [name for name, _ in transformer.named_parameters()] == names
        assert torch.equal(predicted(transformer), bare)
    assert not torch.equal(wanted, bare)


def test_the_checkpoints_of_a_run_in_their_order(tmp_path):
    stems = ["my[1]-000002", "my[1]-000010", "my[1]-step00000005", "my[1]-best", "my[1]"]
    for stem in [*stems, "my[1].diffusers", "my[1]-other", "my1", "other-000002"]:
        (tmp_path / f"{stem}.safetensors").touch()
    (tmp_path / "my[1]-state").mkdir()
    assert [path.stem for path in run_checkpoints(tmp_path / "my[1].safetensors")] == stems
    with pytest.raises(InputError, match="no such LoRA"):
        run_checkpoints(tmp_path / "absent.safetensors")


def test_loras_that_cannot_be_used_are_all_named(tmp_path):
    for folder in ("a", "b"):
        tiny.save(tmp_path / folder / "same.safetensors", {"x": torch.zeros(1)})
    (tmp_path / "broken.safetensors").write_bytes(b"no")
    with pytest.raises(InputError) as error:
        check_loras([tmp_path / "a/same.safetensors", tmp_path / "b/same.safetensors", tmp_path / "broken.safetensors"])
    assert {problem.file for problem in error.value.problems} == {"same", str(tmp_path / "broken.safetensors")}
    check_loras([tmp_path / "a/same.safetensors"], [tmp_path / "b/same.safetensors"])


def test_the_sheet_holds_every_picture_in_its_place(tmp_path):
    colours = [["red", "lime"], ["blue", "yellow"], ["black", "purple"]]
    files = []
    for row, names in enumerate(colours):
        files.append([tmp_path / f"{row}{column}.png" for column in range(2)])
        for file, colour, size in zip(files[-1], names, ((64, 32), (2 * LONGEST_SIDE, 400)), strict=True):
            Image.new("RGB", size, colour).save(file)
    sheet = contact_sheet(["a" * 60, "b c", "d"], ["first " * 30, "第二"], files)
    pixels = numpy.asarray(sheet)
    for row, names in enumerate(colours):
        for column, colour in enumerate(names):
            there = (pixels == numpy.array(Image.new("RGB", (1, 1), colour))[0, 0]).all(-1)
            ys, xs = there.nonzero()
            if colour != "black":  # letters are black too
                assert there.sum() == (64 * 32, LONGEST_SIDE * 200)[column]
                assert (ys.max() < 300) == (row == 0)
                assert (xs.min() > 270) == (column == 1)


@pytest.fixture(scope="module")
def cached(tmp_path_factory):
    """A folder in which the program cached a prompt file's texts and the empty caption."""
    folder = tmp_path_factory.mktemp("prompts")
    (folder / "prompts.txt").write_text("a red square --w 32 --h 32 --s 1\na blue round --w 32 --h 32 --s 1 --l 1\n")
    assert cache(folder) == 0
    return folder


def cache(folder, *more):
    words = [
        "--sample_prompts", folder / "prompts.txt", "--manifest", folder / "prompts.tsv", "--device", "cpu",
        "--text_encoder", tiny.path("text_encoder"), "--skip_existing", "--empty_caption", *more,
    ]  # fmt: skip
    return qwen_image_cache_prompts.main([str(word) for word in words])


def test_texts_are_cached_like_captions(cached):
    files = read_prompts(cached / "prompts.tsv")
    assert set(files) == {text_sha256(text) for text in ("a red square", "a blue round", " ", "")}
    tokens = {line.split("\t")[1]: line for line in (cached / "prompts.tsv").read_text().splitlines()}
    assert "\t5\tbfloat16\t" in tokens[text_sha256("")], "the closing template alone"
    assert len({file.fingerprint for file in files.values()}) == 4


def test_only_new_texts_are_encoded_and_nothing_is_loaded_for_none(cached, monkeypatch, capfd):
    before = (cached / "prompts.tsv").read_bytes()
    files = {path: path.stat().st_mtime_ns for path in (cached / "prompts").iterdir()}
    with monkeypatch.context() as patch:
        patch.setattr(text_encoder_outputs.TextEncoderStage, "encode", lambda *_: pytest.fail("a model was loaded"))
        assert cache(cached, "--keep_cache") == 0
    assert "nothing to encode" in capfd.readouterr().err
    assert (cached / "prompts.tsv").read_bytes() == before
    assert {path: path.stat().st_mtime_ns for path in (cached / "prompts").iterdir()} == files

    text = (cached / "prompts.txt").read_text()
    (cached / "prompts.txt").write_text(text.replace("a blue round", "a green round"))
    assert cache(cached, "--keep_cache") == 0
    assert "1 encoded, 3 up to date" in capfd.readouterr().err
    assert len(list((cached / "prompts").glob("*.safetensors"))) == 5
    (cached / "prompts.txt").write_text(text)
    assert cache(cached) == 0
    assert "1 removed" in capfd.readouterr().err
    assert (cached / "prompts.tsv").read_bytes() == before


def test_a_program_makes_the_pictures_of_saved_loras_and_their_sheet(cached, tmp_path):
    from qwen_image.models.transformer import load_transformer

    for number, name in enumerate(("my-000001", "my")):
        transformer = adapted(load_transformer(tiny.path("dit")), seed=number)
        save_adapter(tmp_path / f"{name}.safetensors", adapter_tensors(transformer, precision="bf16"), {})

    def generate(folder, *which):
        words = [
            *which, "--dit", tiny.path("dit"), "--vae", tiny.path("vae"), "--device", "cpu", "--output_dir", folder,
            "--sample_prompts", cached / "prompts.txt", "--prompts_manifest", cached / "prompts.tsv",
        ]  # fmt: skip
        assert qwen_image_generate_samples.main([str(word) for word in words]) == 0
        return {path.name: path.read_bytes() for path in folder.iterdir()}

    made = generate(tmp_path / "one", "--checkpoints_of", tmp_path / "my.safetensors")
    assert len(made) == 5
    assert {re.sub(r"_\d+\.png", "", name) for name in made} == {
        "my-000001_00", "my-000001_01", "my_00", "my_01", "sheet.png",
    }  # fmt: skip
    assert len(set(made.values())) == 5
    again = generate(tmp_path / "two", "--lora", tmp_path / "my.safetensors")
    assert {name: made[name] for name in again if name != "sheet.png"} == {
        name: picture for name, picture in again.items() if name != "sheet.png"
    }
