"""Sharing the template's keys and values changes nothing: against transformers' own forward pass, and the pipeline."""

import json
import shutil

import pytest
import tiny
import torch
from diffusers import QwenImagePipeline
from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2TokenizerFast
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLTextConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLTextModel

from qwen_image.cache.text_encoder_outputs import TEMPLATE_PREFIX, tokenize
from qwen_image.models.prompt_prefix import PrefixEncoder
from qwen_image.models.text_encoder import load_text_encoder
from qwen_image.models.tokenizer import load_tokenizer

PREFIX = list(range(5, 39))
ROWS = 300


def random_model(dtype=torch.float32):
    """Two groups of three heads, as the real model's four groups of seven; every call gives the same weights."""
    torch.manual_seed(3)
    config = Qwen2_5_VLTextConfig(
        vocab_size=ROWS, hidden_size=96, intermediate_size=160, num_hidden_layers=3, num_attention_heads=6,
        num_key_value_heads=2, rope_parameters={"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]},
        bos_token_id=None, eos_token_id=None, initializer_range=0.2,
    )  # fmt: skip
    config.dtype = dtype
    return Qwen2_5_VLTextModel(config).to(dtype).eval().requires_grad_(False)


def lists(*lengths, shared=34):
    """Random token lists of so many tokens behind as much of the prefix."""
    generator = torch.Generator().manual_seed(sum(lengths))
    # ids from 50 on: none of the prefix
    return [PREFIX[:shared] + torch.randint(50, ROWS, (n,), generator=generator).tolist() for n in lengths]


def plain(model, ids):
    return model(input_ids=torch.tensor([ids]), use_cache=False).last_hidden_state[0, len(PREFIX) :]


BATCHES = {
    "one": lists(1),
    "equal lengths": lists(7, 7, 7),
    "other lengths, unsorted": lists(30, 1, 12, 12, 5, 30),
    "long": lists(400, 3),
    "one departs from the prefix at its last token": [*lists(9, 9), *lists(10, shared=33)],
    "all depart from it, each elsewhere": [lists(40, shared=shared)[0] for shared in (0, 33, 1, 20)],
    "another token within, and the prefix again": [[*PREFIX[:10], 77, *PREFIX[11:], 60, 61], *lists(2)],
}


@pytest.mark.parametrize("name", BATCHES)
def test_every_list_gets_what_the_whole_model_gives_it_alone(name):
    model, batch = random_model(), BATCHES[name]
    expected = [plain(model, ids) for ids in batch]
    found = PrefixEncoder(model, PREFIX).encode(batch)
    for ours, theirs, ids in zip(found, expected, batch, strict=True):
        assert ours.shape == (len(ids) - len(PREFIX), 96)
        assert theirs.std() > 0.5
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=0)


def test_in_bf16_the_result_is_as_near_to_the_exact_one_as_the_plain_models():
    exact, model, batch = random_model(), random_model(torch.bfloat16), lists(30, 12, 5)
    truth = torch.cat([plain(exact, ids) for ids in batch])
    theirs = torch.cat([plain(model, ids) for ids in batch])
    ours = torch.cat(PrefixEncoder(model, PREFIX).encode(batch))
    assert ours.dtype == torch.bfloat16
    assert (ours - truth).norm() < 1.1 * (theirs - truth).norm()


def test_only_the_tokens_behind_the_prefix_run_and_the_prefix_once():
    model, seen = random_model(), []
    model.layers[0].mlp.register_forward_hook(lambda _module, inputs, _output: seen.append(inputs[0].shape[1]))
    encoder = PrefixEncoder(model, PREFIX)
    encoder.encode(lists(3, 8, 30))
    encoder.encode([*lists(2), *lists(4, shared=33)])
    assert seen == [len(PREFIX), 3 + 8 + 30, 2 + 4]


def test_a_list_alone_gives_the_same_bytes_whatever_was_encoded_before():
    (ids,) = lists(13)
    (first,) = PrefixEncoder(random_model(torch.bfloat16), PREFIX).encode([ids])
    encoder = PrefixEncoder(random_model(torch.bfloat16), PREFIX)
    encoder.encode(lists(40, 3, 13))
    encoder.encode(lists(5, shared=2) + lists(200))
    assert torch.equal(encoder.encode([ids])[0], first)


def test_a_list_that_gives_nan_spoils_no_other():
    model, batch = random_model(), lists(9, 9, 9, 20)
    expected = PrefixEncoder(random_model(), PREFIX).encode(batch)
    bad = [*PREFIX, 49, *batch[1][len(PREFIX) + 1 :]]
    model.embed_tokens.weight[49] = float("nan")
    found = PrefixEncoder(model, PREFIX).encode([batch[0], bad, *batch[2:]])
    assert found[1].isnan().all()
    for index in (0, 2, 3):
        torch.testing.assert_close(found[index], expected[index], atol=1e-5, rtol=0)


def test_fp8_weights_give_what_the_plain_model_gives_with_them():
    model = load_text_encoder(tiny.path("text_encoder"), fp8=True)
    batch = lists(12, 5)
    expected = torch.cat([plain(model, ids) for ids in batch]).float()
    found = torch.cat(PrefixEncoder(model, PREFIX).encode(batch)).float()
    assert (found - expected).norm() < 0.02 * expected.norm()


@pytest.fixture(scope="module")
def merging(tmp_path_factory):
    """The text encoder's folder with a tokenizer that knows two line breaks as one token, as the real one does."""
    folder = tmp_path_factory.mktemp("merging") / "text_encoder"
    shutil.copytree(tiny.path("text_encoder"), folder)
    content = json.loads((folder / "tokenizer.json").read_text())
    content["model"]["vocab"]["ĊĊ"] = 1 + max(token["id"] for token in content["added_tokens"])
    content["model"]["merges"].append(["Ċ", "Ċ"])
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return folder


def test_a_caption_that_merges_with_the_template_equals_encode_prompt(merging):
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(merging, dtype=torch.float32)
    library = Qwen2TokenizerFast.from_pretrained(merging)
    pipeline = QwenImagePipeline(scheduler=None, vae=None, text_encoder=model, tokenizer=library, transformer=None)
    tokenizer = load_tokenizer(merging)
    prefix = tokenizer(TEMPLATE_PREFIX).input_ids
    encoder = PrefixEncoder(load_text_encoder(merging, dtype=torch.float32), prefix)
    captions = ["\na cat", "a cat", "\n", "\n\n\nanother cat, at some length"]
    tokens = list(tokenize(tokenizer, captions))
    assert [ids[: len(prefix)].tolist() == prefix for ids in tokens] == [False, True, False, False]
    for ours, caption in zip(encoder.encode(tokens), captions, strict=True):
        expected, _ = pipeline.encode_prompt(prompt=[caption], device="cpu")
        torch.testing.assert_close(ours, expected[0], atol=1e-4, rtol=0)
