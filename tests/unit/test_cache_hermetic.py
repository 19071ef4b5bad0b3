"""Equal input gives equal bytes: in any batch, order and shard, with any neighbours, and in runs at the same time."""

import shutil

import pytest
import torch
from bench import MANIFESTS, made, various_photographs
from safetensors.torch import load_file


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """The same number in every run that is compared: the last bits depend on it, as they do on the machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def various(tmp_path_factory):
    """Photographs and captions of several sizes; `alone` is what each gives in a dataset of its own."""
    bench = various_photographs(tmp_path_factory.mktemp("various"))
    bench.alone = {}
    for name in bench.names:
        one = bench.copy(tmp_path_factory.mktemp("alone"))
        for path in list(one.images.iterdir()):
            if path.stem != name:
                path.unlink()
        one.latents()
        one.texts("--deterministic")
        bench.alone |= one.files()
    return bench


@pytest.fixture
def bench(various, tmp_path):
    """The same photographs and captions, and no cache yet."""
    return various.copy(tmp_path / "copy")


def texts_alone(various):
    return {name: content for name, content in various.alone.items() if name.endswith("_te.safetensors")}


# ---- what the bytes do not tell --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("batch_size", "workers", "shards"), [("1", "1", 1), ("3", "4", 1), ("8", "4", 5), ("3", "1", 5)]
)
def test_the_bytes_do_not_tell_batch_size_workers_shards_or_neighbours(various, bench, batch_size, workers, shards):
    for shard in reversed(range(1, shards + 1)):
        common = ["--batch_size", batch_size, "--num_workers", workers]
        common += ["--shard", str(shard), "--num_shards", str(shards)]
        bench.latents(*common, "--manifest", str(bench.folder / f"m/shards/latents.{shard}.tsv"))
        common += ["--manifest", str(bench.folder / f"m/shards/text_encoder_outputs.{shard}.tsv")]
        bench.texts(*common, "--deterministic")
    assert bench.files() == various.alone


def test_the_bytes_do_not_tell_the_order(various, bench):
    names = dict(zip(bench.names, reversed(bench.names), strict=True))
    for path in list(bench.images.iterdir()):
        path.rename(path.with_name(f"new_{names[path.stem]}{path.suffix}"))
    bench.latents("--batch_size", "3")
    bench.texts("--batch_size", "3", "--deterministic")
    back = {new: old for old, new in names.items()}
    new = {name.removeprefix("new_"): content for name, content in bench.files().items()}
    assert {back[name[0]] + name[1:]: content for name, content in new.items()} == various.alone


def test_what_was_edited_and_edited_back_has_the_bytes_it_had(various, bench):
    shutil.rmtree(bench.cache, ignore_errors=True)
    bench.texts("--deterministic")
    path = bench.images / "3.txt"
    caption = path.read_text()
    for text in ("another", caption):
        path.write_text(text)
        assert bench.texts("--deterministic")["encoded"] == 1
    assert bench.files() == texts_alone(various)


# ---- where it is promised, and where not -----------------------------------------------------------------------------


def test_latents_on_a_cpu_are_a_promise(bench):
    bench.latents()
    assert set(bench.manifest()["arithmetic"]) == {"deterministic"}
    assert bench.latents("--deterministic")["encoded"] == 0


def test_fast_texts_are_no_promise_and_a_deterministic_run_makes_them_one(various, bench):
    bench.texts("--batch_size", "8")
    assert "fast" in set(bench.manifest("text_encoder_outputs")["arithmetic"])
    assert bench.texts("--deterministic")["encoded"] > 0
    assert set(bench.manifest("text_encoder_outputs")["arithmetic"]) == {"deterministic"}
    assert bench.files() == texts_alone(various)
    assert bench.texts()["encoded"] == 0, "what is deterministic is good enough for a run that need not be"


def test_fast_texts_stay_close(various, bench, tmp_path):
    bench.texts("--batch_size", "8")
    for name, content in texts_alone(various).items():
        (tmp_path / name).write_bytes(content)
        ((_, ours_ld),) = load_file(bench.cache / name).items()
        ((_, alone_ld),) = load_file(tmp_path / name).items()
        assert torch.nn.functional.cosine_similarity(ours_ld.float(), alone_ld.float()).min() > 0.999


# ---- runs at the same time -------------------------------------------------------------------------------------------


def test_runs_at_once_on_one_cache_do_not_damage_each_other(tmp_path):
    bench = made().copy(tmp_path / "copy")
    shutil.rmtree(bench.cache)
    bench.latents()
    bench.texts("--deterministic")
    expected = bench.files()
    shutil.rmtree(bench.cache)
    processes = [
        (kind, run, bench.process(kind, *more, "--manifest", str(bench.folder / run / f"{kind}.tsv")))
        for kind, more in (("latents", []), ("text_encoder_outputs", ["--deterministic"]))
        for run in ("first", "second")
    ]
    for kind, run, process in processes:
        output, _ = process.communicate(timeout=300)
        assert process.returncode == 0, output
        manifest = bench.folder / MANIFESTS[kind]
        assert (bench.folder / run / f"{kind}.tsv").read_bytes() == manifest.read_bytes()
    assert bench.files() == expected
    assert {path.name for path in bench.cache.iterdir()} == expected.keys(), "nothing is left behind"
