"""The laws of noise levels: how often each level t, from 0 (the picture) to 1 (noise), is trained. Plain numbers only.

A law maps a number u in [0, 1] to a level, so that uniform numbers give levels of that law. Laws of several parts give
each part its share of the range of u. N is the number of a picture's image tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qwen_image.training.arguments import Settings

NORMAL = NormalDist()
SMALLEST_SHARE = 1e-6
"""Of a law that a range must hold to be cut out of it: below, the numbers that u can be lie too far apart."""
WEIGHED_FROM = 0.001
"""The lowest level of the grid of thousandths: sigma_sqrt weighs what lies below as much, a million."""


@dataclass(frozen=True)
class LogitNormal:
    """The law of shift_k(S(scale n)), n standard normal and S the sigmoid; logit(t) is normal around ln k."""

    scale: float
    k: float = 1.0
    lowest: float = 0.0
    highest: float = 1.0

    def of_draw(self, n: float) -> float:
        """Return the level of a standard normal number."""
        return min(max(shifted(_sigmoid(self.scale * n), self.k), self.lowest), self.highest)

    def quantile(self, u: float) -> float:
        """Return the level below which a share u of the law lies."""
        # a normal number is finite: the ends are left out by less than the distance of two draws
        return self.of_draw(NORMAL.inv_cdf(min(max(u, 2.0**-54), 1 - 2.0**-53)))


@dataclass(frozen=True)
class Uniform:
    """The law of shift_k(u + mode (cos^2(pi u / 2) - 1 + u)), u uniform: with mode 0 and k 1 that of u itself."""

    mode: float = 0.0
    k: float = 1.0

    def of_draw(self, u: float) -> float:
        """Return the level of a uniform number."""
        return shifted(u + self.mode * (math.cos(math.pi * u / 2) ** 2 - 1 + u), self.k)

    quantile = of_draw


@dataclass(frozen=True)
class Part:
    """One part of a law, or what is left of it between two of its quantiles."""

    share: float
    """Of the draws; the shares of a law's parts add up to 1."""
    kind: LogitNormal | Uniform
    first: float = 0.0
    last: float = 1.0

    def level(self, u: float) -> float:
        """Return the part's level for u in [0, 1]."""
        return self.kind.quantile(self.first + u * (self.last - self.first))


def law_parts(settings: Settings, tokens: int) -> tuple[Part, ...]:
    """Return the law that the settings choose, for a picture of N = `tokens`, before any range counts."""
    chosen = LAWS[settings.timestep_sampling](settings, tokens)
    return chosen if isinstance(chosen, tuple) else (Part(1.0, chosen),)


def level_at(parts: Sequence[Part], u: float) -> float:
    """Return the level for u in [0, 1): u's place decides on the part, and its place within the part's share on t."""
    for part in parts[:-1]:
        if u < part.share:
            return part.level(u / part.share)
        u -= part.share
    return parts[-1].level(min(u / parts[-1].share, 1.0))


def cut(parts: Sequence[Part], low: float, high: float) -> tuple[Part, ...]:
    """Return what a law is between two levels: each part keeps what it has there, and with it the law keeps its shape.

    Empty when the law has next to nothing there, less than SMALLEST_SHARE.
    """
    ends = [(_share_below(part.kind, low), _share_below(part.kind, high)) for part in parts]
    kept = [part.share * (last - first) for part, (first, last) in zip(parts, ends, strict=True)]
    total = math.fsum(kept)
    if total < SMALLEST_SHARE:
        return ()
    return tuple(
        Part(share / total, part.kind, first, last)
        for part, share, (first, last) in zip(parts, kept, ends, strict=True)
        if share > 0
    )


def level_weight(scheme: str, t: float) -> float:
    """Return what a level counts in the loss by weighting_scheme; those that are densities count all the same."""
    if scheme == "sigma_sqrt":
        return max(t, WEIGHED_FROM) ** -2
    if scheme == "cosmap":
        return 2 / (math.pi * (1 - 2 * t + 2 * t * t))
    return 1.0


def qwen_shift(tokens: int) -> float:
    """Return e^mu, mu on the line through (256 tokens, 0.5) and (8192, 0.9): the model's own scheduler's shift."""
    return _line(tokens, (256, 0.5), (8192, 0.9))


def shifted(t: float, k: float) -> float:
    """Return k t / (1 + (k - 1) t): for k above 1 a noisier level."""
    return k * t / (1 + (k - 1) * t)


def _line(tokens: int, low: tuple[int, float], high: tuple[int, float]) -> float:
    """Return e^mu, mu on the line through two points (N, mu)."""
    return math.exp(low[1] + (tokens - low[0]) * (high[1] - low[1]) / (high[0] - low[0]))


def _flux_shift(tokens: int) -> float:
    return _line(tokens, (256, 0.5), (4096, 1.15))


def _log_snr(mean: float, std: float) -> LogitNormal:
    """Return the law of t = S(-x / 2), x normal; a normal number and its negative are as likely."""
    return LogitNormal(std / 2, math.exp(-mean / 2))


def _ideogram4(tokens: int) -> LogitNormal:
    # the mean is half the logarithm of 256 h w / 512^2, with h w = 4 N numbers in a channel of Qwen's latent
    ends = 1 - 1 / (1 + math.exp(-7.5)), 1 - 1 / (1 + math.exp(9))
    return LogitNormal(1.5, math.sqrt(256 * 4 * tokens / 512**2), *ends)


def _sigma(settings: Settings) -> LogitNormal | Uniform:
    # the schemes draw the place from the noisy end, 1 - t; so a higher logit_mean means less noise
    k = settings.discrete_flow_shift
    if settings.weighting_scheme == "logit_normal":
        return LogitNormal(settings.logit_std, k * math.exp(-settings.logit_mean))
    return Uniform(settings.mode_scale if settings.weighting_scheme == "mode" else 0.0, k)


_DETAIL = _log_snr(5.36, 1.0)
"""Little noise, where the last detail is made."""

LAWS: dict[str, Callable[[Settings, int], LogitNormal | Uniform | tuple[Part, ...]]] = {
    "sigma": lambda s, _: _sigma(s),
    "uniform": lambda s, _: Uniform(),
    "sigmoid": lambda s, _: LogitNormal(s.sigmoid_scale),
    "shift": lambda s, _: LogitNormal(s.sigmoid_scale, s.discrete_flow_shift),
    "qwen_shift": lambda s, n: LogitNormal(s.sigmoid_scale, qwen_shift(n)),
    "flux_shift": lambda s, n: LogitNormal(s.sigmoid_scale, _flux_shift(n)),
    # counts the numbers in a channel of the latent, four a token
    "flux2_shift": lambda s, n: LogitNormal(s.sigmoid_scale, _flux_shift(4 * n)),
    "krea2_shift": lambda s, n: LogitNormal(s.sigmoid_scale, _line(n, (256, 0.5), (6400, 1.15))),
    "ideogram4_shift": lambda s, n: _ideogram4(n),
    "logsnr": lambda s, _: _log_snr(s.logit_mean, s.logit_std),
    "qinglong_qwen": lambda s, n: (
        Part(0.95, LogitNormal(s.sigmoid_scale, qwen_shift(n))),
        Part(0.05, _DETAIL),
    ),
    "qinglong_flux": lambda s, n: (
        Part(0.79, LogitNormal(s.sigmoid_scale, _flux_shift(n))),
        Part(0.11, _log_snr(s.logit_mean, s.logit_std)),
        Part(0.10, _DETAIL),
    ),
}  # fmt: skip


def _share_below(kind: LogitNormal | Uniform, level: float) -> float:
    """Return the share of the law below a level: the u whose quantile it is, found by halving."""
    if level >= 1:
        return 1.0
    below, above = 0.0, 1.0
    for _ in range(60):
        middle = (below + above) / 2
        if kind.quantile(middle) < level:
            below = middle
        else:
            above = middle
    return below


def _sigmoid(x: float) -> float:
    # the two forms keep exp from overflowing
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))
