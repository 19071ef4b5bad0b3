"""What goes wrong in the real workflow: told early, told whole, told last, and nothing lost."""

import os
import shutil

from safetensors.torch import load_file

DEMO = "resources/demo"


def test_wrong_configuration_stops_before_anything_starts_with_all_problems_at_once(project):
    images = project.folder / f"{DEMO}/images"
    shutil.copy(images / "001_circle.jpg", images / "001_circle.png")
    project.configure(learning_rat=1, caching_latent_batch_size=0)
    project.configure(vae="nowhere.safetensors", dit=f"{DEMO}/vae.safetensors")
    for more in ((), ("--dry-run",)):
        result = project.run(*more)
        assert result.code != 0
        assert result.rules == []
        for words in (
            "did you mean learning_rate?",
            "caching_latent_batch_size",
            "nowhere.safetensors",
            "001_circle.jpg",
            "001_circle.png",
        ):
            assert words in result.text, words
        (line,) = [line for line in result.text.splitlines() if "vae.safetensors" in line and "dit" in line]
        assert "VAE" in line
        assert "Traceback" not in result.text


def test_a_missing_caption_fails_the_caching_stages_once_the_others_are_cached(project):
    caption = project.folder / f"{DEMO}/images/002_square.txt"
    content = caption.read_bytes()
    caption.unlink()
    cache = project.folder / "results/cache/demo"
    shutil.rmtree(cache)
    (project.folder / "results/models/demo.safetensors").unlink()
    result = project.run()
    assert result.code != 0
    assert result.rules == ["check_config"]
    notice = f"check: 1 of 18 items cannot be used, for example {DEMO}/images/002_square.jpg: its caption file"
    assert notice in result.text
    for stage in ("cache_latents", "cache_text_encoder_outputs"):
        explanation = result.text[result.text.rindex(f"Stage {stage} failed with return code 2") :]
        assert f"{DEMO}/images/002_square.jpg: its caption file 002_square.txt is missing" in explanation
        assert "on_bad_item: skip" in explanation
        assert project.encoded(stage) == 17
    assert len(list(cache.glob("*_qi.safetensors"))) == len(list(cache.glob("*_qi_te.safetensors"))) == 17
    assert not (project.folder / "results/models/demo.safetensors").exists()

    caption.write_bytes(content)
    result = project.run()
    assert result.code == 0, result.text
    assert project.encoded("cache_latents") == project.encoded("cache_text_encoder_outputs") == 1
    assert (project.folder / "results/models/demo.safetensors").exists()


def test_a_missing_caption_is_no_obstacle_where_bad_items_are_skipped(project):
    (project.folder / f"{DEMO}/images/002_square.txt").unlink()
    project.configure(on_bad_item="skip")
    result = project.run()
    assert result.code == 0, result.text
    assert "they are left out (on_bad_item: skip)" in result.text
    assert "002_square" in (project.folder / "results/check/dataset.txt").read_text()
    assert "002_square" in (project.folder / "results/manifests/dataset/latents.rejects.tsv").read_text()


def test_a_dataset_without_a_usable_item_stops_before_anything_starts(project):
    for caption in (project.folder / f"{DEMO}/images").glob("*.txt"):
        caption.unlink()
    result = project.run()
    assert result.code != 0
    assert result.rules == []
    assert "0 usable images: 18 images and 0 caption files" in result.text


def test_a_failing_stage_is_explained_last_and_what_depends_on_it_does_not_start(project):
    image = project.folder / f"{DEMO}/images/004_star.png"
    good = image.read_bytes()
    image.write_bytes(good[:1000])
    shutil.copy(project.folder / f"{DEMO}/images/001_circle.jpg", project.folder / f"{DEMO}/images/new.jpg")
    (project.folder / f"{DEMO}/images/new.txt").write_text("a new one")
    before = (project.folder / "results/models/demo.safetensors").read_bytes()
    result = project.run()
    assert result.code != 0
    assert "train" not in result.rules
    explanation = result.text[result.text.rindex("Stage cache_latents failed with return code 2") :]
    assert f"{DEMO}/images/004_star.png" in explanation
    assert "Hint:" in explanation
    assert "results/logs/cache_latents/dataset/1-of-1.log" in explanation
    assert (project.folder / "results/models/demo.safetensors").read_bytes() == before

    image.write_bytes(good)
    result = project.run()
    assert result.code == 0, result.text
    assert project.encoded("cache_latents") == 0, "the new image was cached before the stage failed"


def test_training_stops_at_a_damaged_cache_file_and_names_it(project):
    damaged = next((project.folder / "results/cache/demo").glob("004_star_0*"))
    damaged.write_bytes(damaged.read_bytes()[:-1])
    project.configure(learning_rate=2e-3)
    lora = project.folder / "results/models/demo.safetensors"
    before = lora.read_bytes()
    result = project.run()
    assert result.code != 0
    assert damaged.name in result.text[result.text.rindex("Stage train failed") :]
    assert lora.read_bytes() == before, "the LoRA of the last good run is kept"
    result = project.run("--forcerun", "cache_latents")
    assert result.code == 0, result.text
    assert project.encoded("cache_latents") == 1
    assert "train" in result.rules
    assert lora.read_bytes() != before


def test_training_stops_at_a_cache_file_of_which_one_bit_has_changed(project):
    damaged = next((project.folder / "results/cache/demo").glob("004_star_0*"))
    good = damaged.read_bytes()
    damaged.write_bytes(good[:-100] + bytes([good[-100] ^ 1]) + good[-99:])
    # an epoch: every file is read
    project.configure(max_train_steps=12)
    result = project.run()
    assert result.code != 0
    explanation = result.text[result.text.rindex("Stage train failed") :]
    assert f"{damaged.name}: is damaged" in explanation and "-> delete it, and run the caching stages" in explanation
    damaged.unlink()
    result = project.run("--forcerun", "cache_latents")
    assert result.code == 0, result.text
    assert project.encoded("cache_latents") == 1
    assert damaged.read_bytes() == good


def test_files_from_the_future_are_told_at_once(project):
    """Nothing that is made from them is ever newer than they are: Snakemake fails each rule once it has run."""
    late = [project.folder / DEMO / name for name in ("images/004_star.png", "images/005_ring.txt", "dit.safetensors")]
    late.append(project.folder / "results/manifests/dataset/latents.tsv")
    for path in late:
        os.utime(path, (2_224_000_000, 2_224_000_000))
    result = project.run()
    assert result.code != 0 and result.rules == []
    for path in late:
        assert f"{path.relative_to(project.folder)}: was changed on 2040-06-" in result.text
        path.touch()
    assert project.run().code == 0


def test_strange_paths_are_only_paths(project, tmp_path):
    strange = tmp_path / "sp ace 'q\" $(touch canary) `id`; {x} {{y}} & 漢字 🎨"
    project = type(project)(project.folder.rename(strange), project.python)
    (project.folder / f"{DEMO}/images").rename(project.folder / "pic's {z} $HOME")
    names = {"001_circle": "it's {a}; $(touch canary)", "002_square": "-rf 漢字 🎨", "003_triangle": 'a "b" `c`'}
    for image in (project.folder / "pic's {z} $HOME").iterdir():
        if image.stem in names:
            image.rename(image.with_name(names[image.stem] + image.suffix))
    (project.folder / DEMO).rename(project.folder / "chk {w} 'p'")
    (project.folder / "data {v}.toml").write_text(
        '[general]\nresolution = 128\ncaption_extension = ".txt"\nenable_bucket = true\n'
        '[[datasets]]\nimage_directory = "pic\'s {z} $HOME"\ncache_directory = "ca;che {u}"\n'
    )
    project.configure(
        dataset_config="data {v}.toml",
        dit="chk {w} 'p'/dit.safetensors",
        vae="chk {w} 'p'/vae.safetensors",
        text_encoder="chk {w} 'p'/text_encoder",
        output_dir="out $(touch canary) {t}",
        output_name="lo'ra {s} ; 漢字",
    )
    result = project.run()
    assert result.code == 0, result.text
    lora = project.folder / "out $(touch canary) {t}" / "lo'ra {s} ; 漢字.safetensors"
    assert load_file(lora)
    assert not list(tmp_path.rglob("canary"))
    assert project.encoded("cache_latents") == 18
    assert project.run().nothing_done
    # a path that Snakemake cannot watch as an input is watched all the same
    (project.folder / "pic's {z} $HOME" / "it's {a}; $(touch canary).txt").write_text("another caption")
    result = project.run()
    assert set(result.rules) == {"cache_text_encoder_outputs", "merge_text_encoder_outputs", "train"}, result.text
    assert project.encoded("cache_text_encoder_outputs") == 1


def test_the_lora_is_never_written_over_a_checkpoint(project):
    dit = project.folder / f"{DEMO}/dit.safetensors"
    before = dit.read_bytes()
    project.configure(output_dir=DEMO, output_name="dit", dit=str(dit))
    result = project.run()
    assert result.code != 0
    assert "is the dit itself" in result.text
    assert dit.read_bytes() == before


def test_what_headers_tell_is_told_before_caching(project):
    project.configure(num_layers=60)
    result = project.run()
    assert result.code != 0
    assert result.rules == []
    assert "it has 2 layers, num_layers says 60" in result.text
