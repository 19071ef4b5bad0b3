"""The sample pictures of several runs side by side: a row a run, a column a prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from qwen_image.comparison.runs import Run
from qwen_image.problems import InputError
from qwen_image.sampling.prompts import load_prompts

Place = tuple[int, str]
"""A prompt's place in its file, counted from 0, and its text."""


@dataclass(frozen=True, kw_only=True)
class Samples:
    """The pictures that are there; runs and prompts without any are left out."""

    runs: list[Run]
    labels: list[str]
    """What made each row's pictures."""
    prompts: list[str]
    files: list[list[Path | None]]
    """A list a run, with a file a prompt."""


def find_samples(runs: Sequence[Run]) -> Samples:
    """Find the pictures that generate_samples made of the runs' LoRAs: of the best one, where that is not the last."""
    made = [(run, *_pictures(run)) for run in runs]
    made = [(run, label, files) for run, label, files in made if files]
    places = sorted({place for *_, files in made for place in files})
    return Samples(
        runs=[run for run, *_ in made],
        labels=[label for _, label, _ in made],
        prompts=[text for _, text in places],
        files=[[files.get(place) for place in places] for *_, files in made],
    )


def _pictures(run: Run) -> tuple[str, dict[Place, Path]]:
    """Return what made the pictures of a run, and their files."""
    path = run.settings.get("sample_prompts")
    if not path or not run.trained:
        return "", {}
    try:
        prompts = load_prompts(run.root / str(path), seed=int(run.settings.get("seed", 0)))
    except InputError:  # the file went or changed since; the pictures' prompts are not known then
        return "", {}
    folder = run.root / "results/samples" / run.key
    stems = {run.lora.stem: f"{run.name}, step {run.steps}"}
    if run.best_lora is not None and run.best[0] != run.steps:
        stems = {run.best_lora.stem: f"{run.name}, best: step {run.best[0]}", **stems}
    for stem, label in stems.items():
        files = {
            (index, prompt.prompt): folder / f"{stem}_{index:02d}_{prompt.seed}.png"
            for index, prompt in enumerate(prompts)
        }
        there = {place: file for place, file in files.items() if file.exists()}
        if there:
            return label, there
    return "", {}
