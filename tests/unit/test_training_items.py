"""What is trained on: the join of the manifests, and cache files that do not match them."""

import math
import shutil

import pytest
import torch
from training_data import ITEMS, cached_batches, write_tiny_training

from qwen_image.cache.manifest import LATENT_COLUMNS, TEXT_COLUMNS, read_manifest, write_digest, write_manifest
from qwen_image.container import read_header
from qwen_image.dataset.config import load_dataset_config
from qwen_image.problems import InputError
from qwen_image.training.batches import Batch, Draw
from qwen_image.training.items import CacheShape, check_cache_files, join_manifests
from qwen_image.training.loading import make_loader


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    return write_tiny_training(tmp_path_factory.mktemp("items"))


@pytest.fixture
def tiny(written, tmp_path):
    """A copy to spoil."""
    for name in ("latents.tsv", "text.tsv", "dataset.toml"):
        shutil.copy(written.folder / name, tmp_path)
    shutil.copytree(written.folder / "cache", tmp_path / "cache")
    text = (tmp_path / "dataset.toml").read_text().replace(str(written.folder), str(tmp_path))
    (tmp_path / "dataset.toml").write_text(text)
    return tmp_path


def join(folder):
    return join_manifests(
        str(folder / "latents.tsv"), str(folder / "text.tsv"), load_dataset_config(folder / "dataset.toml")
    )


def edit(path, columns, change):
    rows = read_manifest(path, columns).to_dict("records")
    write_manifest(path, change(rows), columns)


def test_join(tiny):
    joined = join(tiny)
    assert [item.key for item in joined.items] == [f"{name}.png" for name, _, _ in ITEMS]
    assert [item.bucket for item in joined.items] == [bucket for _, bucket, _ in ITEMS]
    assert not joined.left_out
    assert check_cache_files(joined.items) == CacheShape(channels=16, hidden_size=64)


def test_only_what_both_manifests_name(tiny):
    edit(tiny / "latents.tsv", LATENT_COLUMNS, lambda rows: rows[1:])
    edit(tiny / "text.tsv", TEXT_COLUMNS, lambda rows: rows[:-1])
    # further files in the cache directory count for nothing
    (tiny / "cache" / "stray_0064x0064_qi.safetensors").write_bytes(b"not a cache file")
    joined = join(tiny)
    assert [item.key for item in joined.items] == ["b.png", "c.png", "d.png"]
    assert len(joined.left_out) == 2
    assert [str(one) for one in joined.left_out] == [
        "datasets[0] a.png: no latent in latents.tsv",
        "datasets[0] e.png: no text-encoder output in text.tsv",
    ]


def test_keys_that_look_like_missing_values_or_numbers(tiny):
    for path, columns in ((tiny / "latents.tsv", LATENT_COLUMNS), (tiny / "text.tsv", TEXT_COLUMNS)):
        edit(path, columns, lambda rows: [{**rows[0], "key": "NA"}, {**rows[1], "key": "007"}])
    assert [item.key for item in join(tiny).items] == ["007", "NA"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda rows: [], "nothing to train on"),
        (lambda rows: [{**row, "key": "z" + row["key"]} for row in rows], "no item in common"),
        (lambda rows: [*rows, rows[0]], "stands twice"),
        (lambda rows: [{**row, "dataset": 3} for row in rows], "which the dataset file does not have"),
        (lambda rows: [{**row, "cache_file": "../x.safetensors"} for row in rows], "no file of the cache directory"),
    ],
)
def test_manifests_that_do_not_fit(tiny, change, words):
    edit(tiny / "latents.tsv", LATENT_COLUMNS, change)
    with pytest.raises(InputError, match=words):
        join(tiny)


def test_missing_manifest(tiny):
    (tiny / "text.tsv").unlink()
    with pytest.raises(InputError, match="run the caching stage again"):
        join(tiny)


def test_a_manifest_that_was_edited_is_not_trained_on(tiny):
    write_digest(tiny / "text.tsv", (tiny / "text.tsv").read_bytes())
    join(tiny)
    edit(tiny / "text.tsv", TEXT_COLUMNS, lambda rows: rows[1:])
    with pytest.raises(InputError, match=r"text.tsv: was changed after it was written\n *-> delete it"):
        join(tiny)


def test_every_bad_cache_file_is_named(tiny):
    cache = tiny / "cache"
    (cache / "a_0064x0064_qi.safetensors").unlink()
    (cache / "b_qi_te.safetensors").write_bytes((cache / "b_qi_te.safetensors").read_bytes()[:-3])
    (cache / "c_qi_te.safetensors").write_bytes(b"abc")
    shutil.copy(cache / "b_0064x0064_qi.safetensors", cache / "d_0064x0064_qi.safetensors")
    with pytest.raises(InputError) as caught:
        check_cache_files(join(tiny).items)
    found = {problem.key: problem.found for problem in caught.value.problems}
    assert "No such file" in found["datasets[0] a.png"]
    assert "truncated" in found["datasets[0] b.png"]
    assert "too short" in found["datasets[0] c.png"]
    assert "fingerprint differs" in found["datasets[0] d.png"]
    assert all("run the caching stages again" in problem.mend for problem in caught.value.problems)


def test_a_bucket_that_is_not_the_file_s(tiny):
    edit(tiny / "latents.tsv", LATENT_COLUMNS, lambda rows: [{**rows[0], "bucket_width": 128}, *rows[1:]])
    with pytest.raises(InputError, match=r"16 x 1 x 8 x 8, expected is (any|16) x 1 x 8 x 16"):
        check_cache_files(join(tiny).items)


def test_an_item_s_noise_belongs_to_its_visit(tiny):
    items = join(tiny).items
    batches = cached_batches(tiny, items)
    both = batches[Batch(1, 0, (Draw(0, 0), Draw(1, 0)))]
    alone = batches[Batch(1, 7, (Draw(1, 0),))]
    assert both.noise_bc1hw.dtype == both.latents_bc1hw.dtype == both.t_b.dtype == both.weight_b.dtype
    assert (both.noise_bc1hw[1] == alone.noise_bc1hw[0]).all()
    assert both.t_b[1] == alone.t_b[0]
    assert both.mask_bl.tolist() == [[True] * 5 + [False] * 4, [True] * 9]
    assert alone.mask_bl is None
    for other in (Batch(2, 0, (Draw(1, 0),)), Batch(1, 0, (Draw(1, 1),)), Batch(1, 0, (Draw(0, 0),))):
        assert not (batches[other].noise_bc1hw == alone.noise_bc1hw).any()
        assert batches[other].t_b != alone.t_b


def test_a_weight_is_that_of_the_level_and_the_dataset(tiny):
    batches = cached_batches(tiny, join(tiny).items, weighting_scheme="cosmap", num_timestep_buckets=5)
    batch = batches[Batch(1, 0, (Draw(0, 0), Draw(1, 0), Draw(3, 0)))]
    t = batch.t_b.double()
    assert torch.allclose(batch.weight_b.double(), 2 / (math.pi * (1 - 2 * t + 2 * t**2)), rtol=1e-6)
    assert cached_batches(tiny, join(tiny).items)[Batch(1, 0, (Draw(0, 0),))].weight_b.tolist() == [1.0]
    with open(tiny / "dataset.toml", "a") as stream:
        stream.write("loss_weight = 0.25\n")
    assert cached_batches(tiny, join(tiny).items)[Batch(1, 0, (Draw(0, 0),))].weight_b.tolist() == [0.25]


def test_workers_keep_the_order_and_the_values(tiny):
    items = join(tiny).items
    plan = [Batch(1, n, (Draw(index, 0),)) for n, index in enumerate([3, 0, 2, 4, 1])]
    loaders = [
        make_loader(iter(plan), cached_batches(tiny, items), workers=workers, pin_memory=False, persistent=False)
        for workers in (0, 2)
    ]
    for here, there in zip(*loaders, strict=True):
        assert here.noise_bc1hw.shape == there.noise_bc1hw.shape
        assert (here.noise_bc1hw == there.noise_bc1hw).all()
        assert (here.t_b == there.t_b).all()


def test_a_file_that_vanishes_is_named_across_processes(tiny):
    items = join(tiny).items
    (tiny / "cache" / "a_qi_te.safetensors").unlink()
    plan = [Batch(1, 0, (Draw(0, 0),))]
    loader = make_loader(plan, cached_batches(tiny, items), workers=1, pin_memory=False, persistent=False)
    (result,) = list(loader)
    assert isinstance(result, InputError)
    assert result.problems[0].file.endswith("a_qi_te.safetensors")


def test_headers_are_those_of_the_field(written):
    header = read_header(written.folder / "cache" / "a_0064x0064_qi.safetensors")
    assert list(header.tensors) == ["latents_1x8x8_bfloat16"]
