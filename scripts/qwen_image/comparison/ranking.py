"""Runs in order, the settings in which they differ, and what keeps their numbers from being compared.

The lowest validation loss comes first. A training loss is no match for one, because it is measured on what is learnt;
so runs without validation follow, by their final average training loss, and behind them runs without any number.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from qwen_image.comparison.runs import Run, value_text

if TYPE_CHECKING:
    import pandas

VALIDATION, TRAINING, NO_NUMBER = "validation loss", "training loss", "no loss is a number"
"""What a run may be ranked by, the better first."""
NAMING = frozenset({
    "output_name", "output_dir", "logging_dir", "log_prefix", "log_tracker_name", "wandb_run_name", "metadata_title",
})  # fmt: skip
"""Settings that tell runs apart and say nothing about them."""
VALIDATED_ON = ("dataset_config", "vae", "validation_split")
"""Settings that say on what a validation loss was measured."""
TRAINED_ON = (
    "dataset_config", "vae", "validation_split", "timestep_sampling", "weighting_scheme", "discrete_flow_shift",
    "sigmoid_scale", "logit_mean", "logit_std", "mode_scale", "min_timestep", "max_timestep", "loss_type",
    "huber_delta", "caption_dropout_rate",
)  # fmt: skip
"""Settings that say how a training loss is measured."""


def in_order(runs: Sequence[Run]) -> list[Run]:
    """Return the runs, best first; equal ones by name, and those that are not finished last."""
    return sorted(runs, key=lambda run: (*_place(run), run.name))


def ranks(runs: Sequence[Run]) -> list[int | None]:
    """Return each run's rank, counted from 1; equal losses have equal ranks, a run that is not finished has none."""
    places = [_place(run) for run in runs]
    return [
        1 + sum(other < place for other in places) if run.trained else None
        for run, place in zip(runs, places, strict=True)
    ]


def ranked_by(run: Run) -> str:
    """Say which of its losses gives the run its rank."""
    if run.best is not None:
        return VALIDATION
    return TRAINING if math.isfinite(run.final_training_loss) else NO_NUMBER


def table(runs: Sequence[Run]) -> pandas.DataFrame:
    """Return a row a run, in the order given; the settings in which they differ are columns, and times come last."""
    import pandas

    rows = [
        {
            "rank": rank,
            "run": run.name,
            "state": run.state,
            "ranked_by": ranked_by(run) if run.trained else None,
            "best_validation_loss": run.best[1] if run.best else math.nan,
            "best_step": run.best[0] if run.best else None,
            "final_validation_loss": run.final_validation_loss,
            "final_training_loss": run.final_training_loss,
            "steps": run.steps,
            **{key: value_text(run.settings.get(key)) for key in differing_settings(runs)},
            "lora": run.lora and str(run.lora),
            "sha256": run.sha256,
            "best_lora": run.best_lora and str(run.best_lora),
            "train_seconds": run.seconds,
            "steps_per_second": run.timed_steps / run.seconds if run.seconds and run.timed_steps else math.nan,
        }
        for run, rank in zip(runs, ranks(runs), strict=True)
    ]
    return pandas.DataFrame(rows).astype({"rank": "Int64", "best_step": "Int64", "train_seconds": "float64"})


def differing_settings(runs: Sequence[Run]) -> list[str]:
    """Return the keys whose values are not the same in all runs, by name; those that only name a run are left out."""
    known = [run.settings for run in runs if run.settings]
    keys = sorted({key for settings in known for key in settings} - NAMING)
    if all(settings.get("caching_teo_text_encoder") == settings.get("text_encoder") for settings in known):
        keys = [key for key in keys if key != "caching_teo_text_encoder"]
    return [key for key in keys if len({value_text(settings.get(key)) for settings in known}) > 1]


def shared_settings(runs: Sequence[Run]) -> Mapping[str, str]:
    """Return the settings that all runs have in common, by name; those without a value are left out."""
    known = [run.settings for run in runs if run.settings]
    differing = {*differing_settings(runs), *NAMING}
    values = {key: value_text(value) for settings in known[:1] for key, value in sorted(settings.items())}
    return {key: value for key, value in values.items() if value and key not in differing}


def notes(runs: Sequence[Run]) -> Iterator[str]:
    """Yield what a reader must know to trust the order."""
    trained = [run for run in runs if run.trained]
    by = {what: [run for run in trained if ranked_by(run) == what] for what in (VALIDATION, TRAINING, NO_NUMBER)}
    if by[VALIDATION] and by[TRAINING]:
        yield f"Ranked by {TRAINING}, behind those with a {VALIDATION}: {_names(by[TRAINING])}."
    elif by[TRAINING]:
        yield f"Ranked by {TRAINING}, which tells how well the pictures were learnt by heart: set validation_split."
    if by[NO_NUMBER]:
        yield f"No loss is a number, so they come last: {_names(by[NO_NUMBER])}."
    for what, keys in ((VALIDATION, VALIDATED_ON), (TRAINING, TRAINED_ON)):
        if other := [key for key in differing_settings(by[what]) if key in keys]:
            yield f"Their {what} is not measured in the same way, so the order says little: {', '.join(other)} differ."
    if left := [run for run in runs if not run.trained]:
        yield f"Not ranked: {', '.join(f'{run.name} ({run.state})' for run in left)}."
    for run in trained:
        yield from run.warnings


def printable(text: str) -> str:
    """Return a text with a space for every character that is no letter to show, such as those that steer a terminal."""
    return "".join(letter if letter.isprintable() else " " for letter in text)


def _place(run: Run) -> tuple[int, float]:
    """What to sort by. NaN would sort anywhere, so it never gets here."""
    if not run.trained:
        return 3, 0.0
    if run.best is not None:
        return 0, run.best[1]
    return (1, run.final_training_loss) if ranked_by(run) == TRAINING else (2, 0.0)


def _names(runs: Sequence[Run]) -> str:
    return ", ".join(run.name for run in runs)
