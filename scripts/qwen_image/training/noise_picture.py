"""Shows which noise levels the settings train how often, as a picture or as text, from the very draws of a training."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from qwen_image.dataset.config import load_dataset_config
from qwen_image.files import atomic_write
from qwen_image.training.items import join_manifests
from qwen_image.training.noise_laws import law_parts
from qwen_image.training.noise_levels import NoiseLevels, image_tokens
from qwen_image.training.schema import key_schemas
from qwen_image.training.validation import split_items

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from qwen_image.training.arguments import Settings

DRAWS = 20_000
BINS = 40
LINES = 25
BAR = 50
"""Width of the text's longest bar."""
KEYS = (
    "weighting_scheme", "discrete_flow_shift", "sigmoid_scale", "logit_mean", "logit_std", "mode_scale", "min_timestep",
    "max_timestep", "preserve_distribution_shape", "num_timestep_buckets",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """Levels of visits, and what each counts in the loss."""

    name: str
    levels: list[float]
    weights: list[float]


@dataclass(frozen=True, kw_only=True)
class Shown:
    """What the picture and the text are made of."""

    law: str
    """The settings, in words."""
    every: Drawn
    """Visits of all items, as often as they are trained."""
    sizes: list[Drawn]
    """Visits of pictures of a few sizes; empty when the law is the same for all of them."""
    weighs: bool
    """Whether some visits count more than others."""


def show_timesteps(settings: Settings) -> None:
    """Print the noise levels of a training as text, or write them as a picture and print its path. Loads no model.

    Raises InputError when there is nothing to train on, or the law has next to nothing in the range.
    """
    shown = draw_visits(settings)
    if settings.show_timesteps == "console":
        print("\n".join(text_lines(shown)))
        return
    path = Path(settings.output_dir) / f"{settings.output_name}.timesteps.png"
    atomic_write(path, lambda stream: write_picture(shown, stream))
    print(path)


def draw_visits(settings: Settings) -> Shown:
    """Draw levels as the training would: of every item, and of the smallest, the most frequent and the largest size."""
    datasets = {dataset.index: dataset for dataset in load_dataset_config(settings.dataset_config)}
    joined = join_manifests(settings.latents_manifest, settings.text_encoder_outputs_manifest, list(datasets.values()))
    items, _ = split_items(joined.items, settings.validation_split)
    levels = NoiseLevels(settings, items, datasets)
    repeats = [range(datasets[item.dataset].num_repeats) for item in items]
    visits = [(index, repeat) for index in range(len(items)) for repeat in repeats[index]]

    def draw(name: str, some: Sequence[tuple[int, int]]) -> Drawn:
        drawn, weights = [], []
        for index, epoch, repeat in _epochs(some):
            drawn.append(levels.level(index, epoch, repeat, image_tokens(items[index].bucket)))
            weights.append(levels.visit_weight(index, drawn[-1]))
        return Drawn(name=name, levels=drawn, weights=weights)

    every = draw(f"all {len(visits)} visits of an epoch", visits)
    frequent = Counter(items[index].bucket for index, _ in visits)
    by_size = sorted(frequent, key=lambda bucket: (image_tokens(bucket), bucket))
    chosen = dict.fromkeys([by_size[0], max(by_size, key=frequent.__getitem__), by_size[-1]])
    if len({law_parts(settings, image_tokens(bucket)) for bucket in by_size}) == 1:
        chosen = {}
    return Shown(
        law=_in_words(settings),
        every=every,
        sizes=[
            draw(
                f"{bucket[0]} x {bucket[1]} ({frequent[bucket]} visits)",
                [visit for visit in visits if items[visit[0]].bucket == bucket],
            )
            for bucket in sorted(chosen, key=by_size.index)
        ],
        weighs=len(set(every.weights)) > 1,
    )


def text_lines(shown: Shown) -> Iterator[str]:
    """Yield the histogram's lines, and the middle of each picture size's law."""
    yield f"noise levels of {len(shown.every.levels)} draws: {shown.law}"
    yield "  noise level    draws" + ("  weight" if shown.weighs else "")
    shares = _shares(shown.every.levels, [1.0] * len(shown.every.levels))
    weighted = _shares(shown.every.levels, shown.every.weights)
    for line, (share, counted) in enumerate(zip(shares, weighted, strict=True)):
        bar = "#" * round(BAR * share / max(shares))
        weight = f"  {counted:6.1%}" if shown.weighs else ""
        yield f"  {line / LINES:.2f}..{(line + 1) / LINES:.2f}   {share:6.1%}{weight}  {bar}".rstrip()
    for drawn in (shown.every, *shown.sizes):
        yield f"half of the levels lie below {statistics.median(drawn.levels):.3f}: {drawn.name}"
    if shown.weighs:
        yield "weight: what the draws count in the loss, of what all of them count"


def write_picture(shown: Shown, stream: BinaryIO) -> None:
    """Write a PNG of the histogram, the same bytes each time for the same draws."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 7.5 if shown.weighs else 5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    if shown.weighs:
        density, weight = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
        _plot_weights(weight, shown)
    else:
        density = weight = figure.subplots()
    _plot_density(density, shown)
    figure.suptitle(shown.law, fontsize=11, wrap=True)
    weight.set_xlabel("noise level t: 0 is the picture, 1 is noise")
    weight.set_xlim(0, 1)
    weight.set_xticks([tenth / 10 for tenth in range(11)])
    figure.savefig(stream, format="png", metadata={"Software": None})


def _plot_density(axes: Axes, shown: Shown) -> None:
    edges = [number / BINS for number in range(BINS + 1)]
    axes.hist(
        shown.every.levels, edges, density=True, color="#9db8d9", label=f"{shown.every.name}, {_middle(shown.every)}"
    )
    if shown.weighs:
        axes.hist(
            shown.every.levels, edges, density=True, weights=shown.every.weights, histtype="step", color="black",
            linestyle="dotted", linewidth=1.5, label="the same, by what they count in the loss",
        )  # fmt: skip
    for drawn, colour in zip(shown.sizes, ("#2a7f3f", "#c26a00", "#8b1e5b"), strict=False):
        axes.hist(
            drawn.levels, edges, density=True, histtype="step", color=colour, linewidth=1.4,
            label=f"{drawn.name}, {_middle(drawn)}",
        )  # fmt: skip
    axes.set_ylabel("density of the draws")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=9)


def _plot_weights(axes: Axes, shown: Shown) -> None:
    axes.plot(shown.every.levels, shown.every.weights, ".", markersize=2, color="black", rasterized=True)
    if max(shown.every.weights) > 20 * min(shown.every.weights):
        axes.set_yscale("log")
    else:
        axes.set_ylim(bottom=0)
    axes.set_ylabel("weight in the loss")
    axes.grid(alpha=0.3)


def _epochs(visits: Sequence[tuple[int, int]]) -> Iterator[tuple[int, int, int]]:
    """Yield (index, epoch, repeat), epoch after epoch until there are DRAWS; of a longer epoch every so many-th."""
    some = visits[:: -(-len(visits) // DRAWS)]
    drawn = 0
    for epoch in count(1):
        for index, repeat in some:
            yield index, epoch, repeat
        drawn += len(some)
        if drawn + len(some) > DRAWS:
            return


def _shares(levels: Sequence[float], weights: Sequence[float]) -> list[float]:
    sums = [0.0] * LINES
    for level, weight in zip(levels, weights, strict=True):
        sums[min(int(level * LINES), LINES - 1)] += weight
    total = sum(weights)
    return [number / total for number in sums]


def _middle(drawn: Drawn) -> str:
    return f"middle {statistics.median(drawn.levels):.2f}"


def _in_words(settings: Settings) -> str:
    """Return the law's name and each of the settings that is not the default."""
    words = [f"timestep_sampling {settings.timestep_sampling}"]
    for key in KEYS:
        value = getattr(settings, key)
        if value != key_schemas()[key]["default"]:
            words.append(key if value is True else f"{key} {value}")
    return ", ".join(words)
