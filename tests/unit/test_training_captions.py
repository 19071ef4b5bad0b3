"""Which caption a visit is trained with, the items' several captions, and the table of items that are left out."""

import pickle
import shutil
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from training_data import add_captions, write_empty_caption, write_tiny_training

from qwen_image.cache.manifest import LATENT_COLUMNS, TEXT_COLUMNS, read_manifest, write_manifest
from qwen_image.container import write_safetensors
from qwen_image.dataset.config import load_dataset_config
from qwen_image.problems import InputError
from qwen_image.training.arguments import Settings, with_defaults
from qwen_image.training.batches import Batch, Draw, batches_per_epoch, epoch_batches, training_steps
from qwen_image.training.captions import CaptionChoice, empty_caption
from qwen_image.training.items import (
    CacheFile,
    LeftOut,
    TrainingItem,
    check_cache_files,
    join_manifests,
    write_left_out,
)
from qwen_image.training.loading import CachedBatches, read_tensor
from qwen_image.training.noise_levels import NoiseLevels
from qwen_image.training.schedule import steps_per_epoch
from qwen_image.training.validation import split_items

EMPTY = CacheFile("empty", "")
THREE = TrainingItem(0, "a.png", EMPTY, tuple(CacheFile(f"{n}", "") for n in range(3)), (64, 64))
VISITS = [(epoch, repeat) for epoch in range(1, 501) for repeat in range(4)]


def choice(rate=0.0, seed=42):
    return CaptionChoice(SimpleNamespace(seed=seed, caption_dropout_rate=rate), EMPTY)


def drawn(chooser, item=THREE):
    return [chooser.file(item, *visit).path for visit in VISITS]


# ---- the choice ------------------------------------------------------------------------------------------------------


def test_every_caption_comes_up_equally_often():
    counts = Counter(drawn(choice()))
    assert set(counts) == {"0", "1", "2"}
    # three standard deviations of 2000 draws with chance 1/3
    assert all(abs(count - 2000 / 3) < 64 for count in counts.values())


def test_captions_are_dropped_at_their_rate_and_the_others_are_chosen_as_before():
    with_dropout, without = drawn(choice(0.2)), drawn(choice())
    dropped = with_dropout.count("empty")
    assert abs(dropped - 400) < 54
    assert all(one in ("empty", other) for one, other in zip(with_dropout, without, strict=True))
    counts = Counter(other for one, other in zip(with_dropout, without, strict=True) if one == "empty")
    assert all(abs(count - dropped / 3) < 29 for count in counts.values()), "dropping prefers no caption"
    assert set(drawn(choice(1.0))) == {"empty"}


def test_a_choice_depends_on_seed_epoch_item_and_repeat_and_on_nothing_else():
    first = drawn(choice())
    assert pickle.loads(pickle.dumps(choice())).file(THREE, 3, 1) == choice().file(THREE, 3, 1)
    assert [choice().file(THREE, *visit).path for visit in reversed(VISITS)] == first[::-1]
    files = (THREE.latents, THREE.texts, THREE.bucket)
    for other in (drawn(choice(seed=43)), drawn(choice(), TrainingItem(1, "a.png", *files)),
                  drawn(choice(), TrainingItem(0, "b.png", *files))):  # fmt: skip
        assert abs(sum(one == two for one, two in zip(first, other, strict=True)) - 2000 / 3) < 64
    by_epoch, by_repeat = first[0::4], first[1::4]
    assert abs(sum(one == two for one, two in zip(by_epoch, by_repeat, strict=True)) - 500 / 3) < 32


def test_one_caption_is_always_it():
    one = TrainingItem(0, "a.png", EMPTY, (CacheFile("only", ""),), (64, 64))
    assert set(drawn(choice(), one)) == {"only"}


# ---- the empty caption -----------------------------------------------------------------------------------------------


def wanted(rate, manifest):
    return empty_caption(SimpleNamespace(caption_dropout_rate=rate, prompts_manifest=manifest and str(manifest)))


def test_the_empty_caption_is_looked_for_only_where_captions_are_dropped(tmp_path):
    manifest = write_empty_caption(tmp_path)
    rows = read_manifest(manifest, TEXT_COLUMNS).to_dict("records")
    others = tmp_path / "others.tsv"
    write_manifest(others, [], TEXT_COLUMNS)
    assert wanted(0, tmp_path / "nowhere.tsv") is None
    assert wanted(0.1, manifest) == CacheFile(str(tmp_path / "prompts" / rows[0]["cache_file"]), rows[0]["fingerprint"])
    for manifest, found in ((None, "prompts_manifest is not set"), (others, "does not list it")):
        with pytest.raises(InputError, match=found) as caught:
            wanted(0.1, manifest)
        assert caught.value.problems[0].key == "caption_dropout_rate"
        assert "qwen_image_cache_prompts.py" in caught.value.problems[0].mend


# ---- several captions in the manifest --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Five items, of which the second has eleven captions."""
    folder = write_tiny_training(tmp_path_factory.mktemp("captions")).folder
    add_captions(folder, "b", 11)
    return folder


@pytest.fixture
def tiny(written, tmp_path):
    """A copy to spoil."""
    for name in ("latents.tsv", "text.tsv", "dataset.toml"):
        shutil.copy(written / name, tmp_path)
    shutil.copytree(written / "cache", tmp_path / "cache")
    text = (tmp_path / "dataset.toml").read_text().replace(str(written), str(tmp_path))
    (tmp_path / "dataset.toml").write_text(text)
    return tmp_path


def join(folder):
    datasets = load_dataset_config(folder / "dataset.toml")
    return join_manifests(str(folder / "latents.tsv"), str(folder / "text.tsv"), datasets)


def edit(path, change, columns=TEXT_COLUMNS):
    write_manifest(path, change(read_manifest(path, columns).to_dict("records")), columns)


def test_captions_come_in_the_order_of_their_numbers(tiny):
    items = join(tiny).items
    assert [len(item.texts) for item in items] == [1, 11, 1, 1, 1]
    names = ["b_qi_te.safetensors", *(f"b_qi_te{number}.safetensors" for number in range(2, 12))]
    assert [Path(text.path).name for text in items[1].texts] == names
    assert check_cache_files(items).hidden_size == 64


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda rows: [row for row in rows if "te2." not in row["cache_file"] and "te7" not in row["cache_file"]],
         "b.png: of its 11 captions these are missing: 2, 7"),
        (lambda rows: [row for row in rows if row["cache_file"] != "b_qi_te.safetensors"], "these are missing: 1"),
        (lambda rows: [*rows, rows[1]], "stands twice"),
    ],
)  # fmt: skip
def test_captions_that_are_not_all_there_are_told(tiny, change, words):
    edit(tiny / "text.tsv", change)
    with pytest.raises(InputError, match=words):
        join(tiny)


def test_captions_of_a_dataset_that_no_longer_has_several_are_told(tiny):
    text = (tiny / "dataset.toml").read_text().replace("multiple_captions = true", "")
    (tiny / "dataset.toml").write_text(text)
    with pytest.raises(InputError, match="has 11 captions here, and multiple_captions is not set"):
        join(tiny)


def test_every_bad_caption_file_is_named(tiny):
    items, cache = join(tiny).items, tiny / "cache"
    (cache / "b_qi_te2.safetensors").unlink()
    # an older caption's: whole, and under the right name
    shutil.copy(cache / "b_qi_te4.safetensors", cache / "b_qi_te3.safetensors")
    narrow = CacheFile(str(cache / "empty_qi_te.safetensors"), "e")
    tensors = {"varlen_vl_embed_bfloat16": torch.zeros(5, 32, dtype=torch.bfloat16)}
    write_safetensors(narrow.path, tensors, {"fingerprint": "e"})
    with pytest.raises(InputError) as caught:
        check_cache_files(items, narrow)
    found = {Path(problem.file).name: (problem.key, problem.found) for problem in caught.value.problems}
    assert found["b_qi_te2.safetensors"] == ("datasets[0] b.png", "cannot be read (No such file or directory)")
    assert "fingerprint differs" in found["b_qi_te3.safetensors"][1]
    assert found["empty_qi_te.safetensors"][0] == "the empty caption"
    assert "5 x 32, expected is any x 64" in found["empty_qi_te.safetensors"][1]
    assert len(found) == 3


def test_the_loader_reads_the_chosen_caption(tiny):
    items = join(tiny).items
    settings = Settings(**with_defaults({"caption_dropout_rate": 0.3}))
    datasets = dict(enumerate(load_dataset_config(tiny / "dataset.toml")))
    captions = CaptionChoice(settings, items[0].texts[0])
    batches = CachedBatches(items, NoiseLevels(settings, items, datasets), captions, seed=settings.seed)
    used = set()
    for epoch in range(1, 25):
        file = captions.file(items[1], epoch, 0)
        used.add(file)
        text_bld = batches[Batch(epoch, 0, (Draw(1, 0),))].text_bld
        assert torch.equal(text_bld[0], read_tensor(file, "varlen_vl_embed_"))
    assert items[0].texts[0] in used and len(used) > 5


# ---- what is not trained on ------------------------------------------------------------------------------------------


def test_the_table_of_what_is_left_out(tiny):
    path = tiny / "lora.left_out.tsv"
    write_left_out(path, join(tiny))
    assert path.read_text() == "dataset\tkey\treason\n"
    edit(tiny / "text.tsv", lambda rows: [row for row in rows if row["key"] != "e.png"])
    edit(tiny / "latents.tsv", lambda rows: rows[1:], LATENT_COLUMNS)
    joined = join(tiny)
    assert joined.left_out == [
        LeftOut(0, "a.png", "no latent in latents.tsv"), LeftOut(0, "e.png", "no text-encoder output in text.tsv"),
    ]  # fmt: skip
    trained, held_out = joined.items[:2], joined.items[2:]
    write_left_out(path, joined, held_out)
    assert path.read_text().splitlines() == [
        "dataset\tkey\treason",
        "0\ta.png\tno latent in latents.tsv",
        "0\td.png\theld out to validate with (validation_split)",
        "0\te.png\tno text-encoder output in text.tsv",
    ]
    assert [item.key for item in trained] == ["b.png", "c.png"]


@pytest.mark.parametrize("processes", [1, 2, 3, 7])
@pytest.mark.parametrize("accumulation", [1, 2, 5])
def test_every_item_is_trained_num_repeats_times_an_epoch_or_is_listed(processes, accumulation):
    """All processes together; where they cannot share the batches evenly, the epoch's first ones come once more."""
    datasets = {0: SimpleNamespace(batch_size=2, num_repeats=1), 1: SimpleNamespace(batch_size=3, num_repeats=3)}
    buckets = [(64, 64), (96, 48), (48, 96)]
    every = [TrainingItem(n % 2, f"{n}.png", EMPTY, (EMPTY,), buckets[n % 3]) for n in range(23)]
    items, held_out = split_items(every, 0.2)
    assert len(items) + len(held_out) == 23 and held_out
    in_epoch = steps_per_epoch(batches_per_epoch(items, datasets), processes=processes, accumulation=accumulation)
    visits = {1: Counter(), 2: Counter()}
    for rank in range(processes):
        steps = training_steps(
            items, datasets, seed=7, accumulation=accumulation, total=2 * in_epoch, rank=rank, processes=processes
        )
        for step in steps:
            visits[step.epoch].update(draw for batch in step.batches for draw in batch.draws)
    for epoch, found in visits.items():
        batches = epoch_batches(items, datasets, seed=7, epoch=epoch)
        once_more = [draw for batch in batches[: -len(batches) % processes] for draw in batch]
        once = [Draw(n, repeat) for n, item in enumerate(items) for repeat in range(datasets[item.dataset].num_repeats)]
        assert found == Counter(once) + Counter(once_more)
