"""Sample pictures against diffusers' own pipeline: the same noise, embeddings and weights give the same picture."""

import json

import numpy
import pytest
import tiny
import torch
from diffusers import AutoencoderKLQwenImage, FlowMatchEulerDiscreteScheduler, QwenImagePipeline

from qwen_image.demo.checkpoints import HIDDEN, demo_transformer
from qwen_image.models.vae import load_vae
from qwen_image.problems import InputError
from qwen_image.sampling.generate import (
    PUBLISHED,
    decode,
    generate_latents,
    initial_noise,
    make_schedule,
    scheduler_config,
)
from qwen_image.sampling.prompts import SamplePrompt
from qwen_image.training.flow import pack

# latents are of size 1; both sides compute in float32, in another order
TOLERANCE = 1e-4
# scheduler/scheduler_config.json of the public model
PUBLIC_SCHEDULER = {
    "base_image_seq_len": 256, "base_shift": 0.5, "invert_sigmas": False, "max_image_seq_len": 8192, "max_shift": 0.9,
    "num_train_timesteps": 1000, "shift": 1.0, "shift_terminal": 0.02, "stochastic_sampling": False,
    "time_shift_type": "exponential", "use_beta_sigmas": False, "use_dynamic_shifting": True,
    "use_exponential_sigmas": False, "use_karras_sigmas": False,
}  # fmt: skip


def prompt(**changes):
    values = {
        "prompt": "a fox", "negative_prompt": " ", "width": 64, "height": 64, "seed": 5, "sample_steps": 4,
        "cfg_scale": 4.0, "discrete_flow_shift": None,
    }  # fmt: skip
    return SamplePrompt(**values | changes)


@pytest.fixture(scope="module")
def transformer():
    return demo_transformer().eval()


@pytest.fixture(scope="module")
def pipeline(transformer):
    vae = AutoencoderKLQwenImage(base_dim=16)
    vae.load_state_dict(tiny.stored("vae"))
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(PUBLIC_SCHEDULER)
    whole = QwenImagePipeline(
        scheduler=scheduler, vae=vae.float().eval(), text_encoder=None, tokenizer=None, transformer=transformer
    )
    whole.set_progress_bar_config(disable=True)
    return whole


@pytest.fixture(scope="module")
def embeddings():
    """Of a prompt and of a negative one, of different lengths, (L, D)."""
    random = torch.Generator().manual_seed(3)
    return torch.randn(9, HIDDEN, generator=random), torch.randn(6, HIDDEN, generator=random)


def ours(transformer, wanted, embeddings, config=PUBLISHED):
    text, negative = embeddings
    return generate_latents(
        transformer,
        initial_noise(wanted),
        text,
        negative if wanted.guided else None,
        make_schedule(config, wanted),
        cfg_scale=wanted.cfg_scale,
    )


def theirs(pipeline, wanted, embeddings, output_type):
    text, negative = (embedding[None] for embedding in embeddings)
    guidance = {"negative_prompt_embeds": negative, "negative_prompt_embeds_mask": torch.ones(1, negative.shape[1])}
    return pipeline(
        prompt_embeds=text,
        prompt_embeds_mask=torch.ones(1, text.shape[1]),
        true_cfg_scale=wanted.cfg_scale,
        width=wanted.width,
        height=wanted.height,
        num_inference_steps=wanted.sample_steps,
        # not our noise: the seed alone must give the same
        generator=torch.Generator().manual_seed(wanted.seed),
        output_type=output_type,
        **(guidance if wanted.guided else {}),
    ).images


@pytest.mark.parametrize(
    "wanted",
    [
        prompt(),
        prompt(cfg_scale=1.0, width=96, height=48),
        prompt(cfg_scale=2.5, width=48, height=112, sample_steps=7, seed=2**40),
        prompt(width=256, height=192, sample_steps=2),
    ],
    ids=lambda wanted: f"{wanted.width}x{wanted.height} cfg {wanted.cfg_scale}",
)
def test_latents_are_those_of_diffusers(pipeline, transformer, embeddings, wanted):
    expected_bnp = theirs(pipeline, wanted, embeddings, "latent")
    latents_bc1hw = ours(transformer, wanted, embeddings)
    assert latents_bc1hw.dtype == torch.float32
    torch.testing.assert_close(pack(latents_bc1hw), expected_bnp, atol=TOLERANCE, rtol=0)
    start_bc1hw = initial_noise(wanted)
    assert (latents_bc1hw - start_bc1hw).abs().mean() > 0.1, "nothing was denoised"


def test_a_picture_is_that_of_diffusers(pipeline, transformer, embeddings):
    wanted = prompt(width=96, height=64)
    (expected,) = theirs(pipeline, wanted, embeddings, "pil")
    vae = load_vae(tiny.path("vae"), dtype=torch.float32)
    picture = decode(vae, ours(transformer, wanted, embeddings))
    assert picture.size == expected.size == (96, 64)
    difference = numpy.abs(numpy.asarray(picture).astype(int) - numpy.asarray(expected).astype(int))
    assert difference.max() <= 1, "more than a rounding"


def test_a_fixed_shift_is_the_fields(pipeline, transformer, embeddings):
    wanted = prompt(discrete_flow_shift=3.0, sample_steps=5)
    fixed = PUBLIC_SCHEDULER | {"use_dynamic_shifting": False, "shift": 3.0}
    k, sigmas = 3.0, torch.linspace(1, 1 / 5, 5, dtype=torch.float64)
    shifted = k * sigmas / (1 + (k - 1) * sigmas)
    stretched = 1 - (1 - shifted) * (1 - 0.02) / (1 - shifted[-1])
    scheduler = make_schedule(PUBLISHED, wanted)
    torch.testing.assert_close(scheduler.sigmas.double(), torch.cat([stretched, torch.zeros(1)]), atol=1e-6, rtol=0)
    other = QwenImagePipeline(**pipeline.components | {"scheduler": FlowMatchEulerDiscreteScheduler.from_config(fixed)})
    other.set_progress_bar_config(disable=True)
    expected_bnp = theirs(other, wanted, embeddings, "latent")
    torch.testing.assert_close(pack(ours(transformer, wanted, embeddings)), expected_bnp, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("shift", [None, 2.0])
def test_one_step_gives_numbers(transformer, embeddings, shift):
    wanted = prompt(sample_steps=1, discrete_flow_shift=shift)
    assert make_schedule(PUBLISHED, wanted).sigmas.tolist() == [1.0, 0.0]
    assert torch.isfinite(ours(transformer, wanted, embeddings)).all()


def test_a_pipelines_own_scheduler_is_taken(tmp_path):
    (tmp_path / "transformer").mkdir()
    (tmp_path / "scheduler").mkdir()
    (tmp_path / "model_index.json").write_text("{}")
    assert scheduler_config(tmp_path) == PUBLISHED
    file = tmp_path / "scheduler" / "scheduler_config.json"
    config = {"_class_name": "FlowMatchEulerDiscreteScheduler", **PUBLIC_SCHEDULER, "shift_terminal": 0.5}
    file.write_text(json.dumps(config))
    for path in (tmp_path, tmp_path / "transformer"):
        sigmas = make_schedule(scheduler_config(path), prompt()).sigmas
        assert sigmas[-2] == pytest.approx(0.5), path
    file.write_text("{")
    with pytest.raises(InputError, match="cannot be read"):
        scheduler_config(tmp_path)


def test_the_published_scheduler_is_the_public_one():
    wanted = prompt(width=1328, height=1328, sample_steps=20)
    assert torch.equal(make_schedule(PUBLISHED, wanted).sigmas, make_schedule(PUBLIC_SCHEDULER, wanted).sigmas)


def test_chance_elsewhere_changes_nothing_and_is_not_changed(transformer, embeddings):
    before = torch.get_rng_state()
    first = ours(transformer, prompt(sample_steps=2), embeddings)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(99)
    assert torch.equal(ours(transformer, prompt(sample_steps=2), embeddings), first)
    stochastic = PUBLIC_SCHEDULER | {"stochastic_sampling": True}
    before = torch.get_rng_state()
    drawn = ours(transformer, prompt(sample_steps=2), embeddings, stochastic)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(ours(transformer, prompt(sample_steps=2), embeddings, stochastic), drawn)
    assert not torch.equal(drawn, first)
