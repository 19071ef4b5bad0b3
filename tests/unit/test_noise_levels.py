"""Noise levels: each law against its closed form, ranges, strata, weights; draws that depend on their visit alone."""

import math
import pickle
from collections import Counter
from itertools import pairwise
from statistics import NormalDist
from types import SimpleNamespace

import pytest
import torch
from diffusers.pipelines.qwenimage.pipeline_qwenimage import calculate_shift

from qwen_image.problems import InputError
from qwen_image.training.arguments import Settings, check_settings, with_defaults
from qwen_image.training.noise_laws import LAWS, level_weight, qwen_shift
from qwen_image.training.noise_levels import NoiseLevels, Strata, image_tokens
from qwen_image.training.randomness import generator
from qwen_image.training.schema import key_schemas

PHI = NormalDist().cdf
VISITS = 2000
# at 1 % of seeds a right law is farther off; a wrong one nearly always is
KOLMOGOROV = 1.63 / math.sqrt(VISITS)
BUCKET = (768, 512)
TOKENS = 48 * 32


def make_levels(*, buckets=(BUCKET,) * 500, loss_weight=1.0, **changes):
    """500 items with 4 visits each: VISITS an epoch."""
    given = {"seed": 5, "discrete_flow_shift": 1.7, "sigmoid_scale": 1.3, "logit_mean": 0.4, "logit_std": 0.8}
    items = [SimpleNamespace(dataset=0, key=f"{n:04d}.png", bucket=bucket) for n, bucket in enumerate(buckets)]
    datasets = {0: SimpleNamespace(num_repeats=4, loss_weight=loss_weight)}
    return NoiseLevels(Settings(**with_defaults({**given, **changes})), items, datasets)


def draw(levels, *, epoch=1, items=500, tokens=TOKENS):
    return [levels.level(index, epoch, repeat, tokens) for index in range(items) for repeat in range(4)]


def logit(t):
    return -math.inf if t <= 0 else math.inf if t >= 1 else math.log(t / (1 - t))


def logit_normal(mean, std):
    return lambda t: PHI((logit(t) - mean) / std)


def mixture(*parts):
    return lambda t: sum(share * below(t) for share, below in parts)


def mode_below(t, scale=1.29):
    """The share of u for which u + scale (cos^2(pi u / 2) - 1 + u) is below t, counted; it grows with u."""
    u = torch.arange(10_000, dtype=torch.float64) / 10_000
    return torch.searchsorted(u + scale * ((math.pi * u / 2).cos() ** 2 - 1 + u), t).item() / 10_000


def line(x1, y1, x2, y2, tokens=TOKENS):
    return y1 + (tokens - x1) * (y2 - y1) / (x2 - x1)


QWEN = logit_normal(line(256, 0.5, 8192, 0.9), 1.3)
FLUX = logit_normal(line(256, 0.5, 4096, 1.15), 1.3)
DETAIL = logit_normal(-5.36 / 2, 0.5)
H_TIMES_W = 96 * 64  # of the latent
CLOSED_FORMS = {
    "uniform": lambda t: t,
    "sigmoid": logit_normal(0, 1.3),
    "shift": logit_normal(math.log(1.7), 1.3),
    "qwen_shift": QWEN,
    "flux_shift": FLUX,
    "flux2_shift": logit_normal(line(256, 0.5, 4096, 1.15, tokens=H_TIMES_W), 1.3),
    "krea2_shift": logit_normal(line(256, 0.5, 6400, 1.15), 1.3),
    "ideogram4_shift": logit_normal(0.5 * math.log(256 * H_TIMES_W / 512**2), 1.5),
    "logsnr": logit_normal(-0.4 / 2, 0.8 / 2),
    "qinglong_qwen": mixture((0.95, QWEN), (0.05, DETAIL)),
    "qinglong_flux": mixture((0.79, FLUX), (0.11, logit_normal(-0.4 / 2, 0.8 / 2)), (0.10, DETAIL)),
}
SIGMA = {
    # the place is drawn from the noisy end, 1 - t
    "none": lambda t: t,
    "cosmap": lambda t: t,
    "logit_normal": logit_normal(-0.4, 0.8),
    "mode": mode_below,
}


def distance(levels, below):
    """Kolmogorov's and Smirnov's: how far the levels' own distribution is from a closed form."""
    ordered, n = sorted(levels), len(levels)
    return max(max(below(t) - k / n, (k + 1) / n - below(t)) for k, t in enumerate(ordered))


def unshift(t, k):
    return t / (k - (k - 1) * t)


def test_every_law_is_tested_and_offered():
    assert set(LAWS) == {*CLOSED_FORMS, "sigma"} == set(key_schemas()["timestep_sampling"]["enum"])
    assert not key_schemas()["timestep_sampling"].get("x-refused-values")


@pytest.mark.parametrize("law", CLOSED_FORMS)
def test_closed_forms(law):
    levels = draw(make_levels(timestep_sampling=law))
    assert all(0 <= t <= 1 for t in levels)
    assert distance(levels, CLOSED_FORMS[law]) < KOLMOGOROV
    # the test can tell: the law of another is farther off
    other = "sigmoid" if law == "uniform" else "uniform"
    assert distance(levels, CLOSED_FORMS[other]) > 1.5 * KOLMOGOROV


def test_ideogram4_leaves_the_ends_out():
    low, high = 1 - 1 / (1 + math.exp(-7.5)), 1 - 1 / (1 + math.exp(9))
    levels = make_levels(timestep_sampling="ideogram4_shift")
    assert max(draw(levels, tokens=256**2)) < high
    assert max(draw(levels, tokens=10**9)) == high
    assert min(draw(levels, tokens=1)) == low


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("cut", [False, True])
def test_extreme_settings_stay_in_the_range(law, cut):
    extremes = [
        {"sigmoid_scale": 1e300, "logit_std": 1e300, "discrete_flow_shift": 0.001, "logit_mean": 20.0},
        {"sigmoid_scale": 1e-300, "logit_std": 1e-300, "discrete_flow_shift": 1000.0, "logit_mean": -20.0},
    ]
    for more in extremes:
        for scheme in ("none", "logit_normal", "mode"):
            low = 0 if cut else 1
            settings = {"min_timestep": low, "preserve_distribution_shape": cut, "weighting_scheme": scheme, **more}
            levels = draw(make_levels(buckets=[BUCKET] * 30, timestep_sampling=law, **settings), items=30)
            assert all(low / 1000 <= t <= 1 for t in levels)


@pytest.mark.parametrize("scheme", SIGMA)
def test_sigma_draws_thousandths(scheme):
    levels = draw(make_levels(timestep_sampling="sigma", weighting_scheme=scheme, discrete_flow_shift=1.0))
    assert {round(1000 * t) / 1000 for t in levels} == set(levels)
    assert min(levels) >= 0.001
    # half a thousandth back, as the grid's step is rounded up
    assert distance([t - 0.0005 for t in levels], SIGMA[scheme]) < KOLMOGOROV + 0.002


def test_the_shift_counts_in_sigma_and_its_range_is_not_turned_round():
    levels = draw(make_levels(timestep_sampling="sigma", discrete_flow_shift=3.0))
    assert distance(levels, lambda t: unshift(t, 3.0)) < KOLMOGOROV + 0.002
    upper = draw(make_levels(timestep_sampling="sigma", discrete_flow_shift=1.0, min_timestep=500))
    assert 0.501 <= min(upper) < 0.51
    assert max(upper) <= 1.0
    lower = draw(make_levels(timestep_sampling="sigma", discrete_flow_shift=1.0, max_timestep=3))
    assert set(lower) == {0.001, 0.002, 0.003}


@pytest.mark.parametrize("law", ["qwen_shift", "shift", "sigmoid", "uniform"])
def test_the_first_laws_draw_as_they_always_did(law):
    """To the bit, so that a LoRA trained by an earlier version comes out again."""
    levels = make_levels(timestep_sampling=law, min_timestep=100, max_timestep=900)
    for index, epoch, repeat in [(0, 1, 0), (0, 2, 0), (17, 1, 3), (499, 9, 1)]:
        random = generator("noise level", 5, epoch, 0, f"{index:04d}.png", repeat)
        if law == "uniform":
            t = torch.rand((), generator=random, dtype=torch.float64).item()
        else:
            x = 1.3 * torch.randn((), generator=random, dtype=torch.float64).item()
            t = 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))
        if law.endswith("shift"):
            k = 1.7 if law == "shift" else math.exp(0.5 + (TOKENS - 256) * (0.9 - 0.5) / (8192 - 256))
            t = k * t / (1 + (k - 1) * t)
        assert levels.level(index, epoch, repeat, TOKENS) == (100 + t * (900 - 100)) / 1000


@pytest.mark.parametrize(("side", "k"), [(512, 1.714), (768, 1.828), (1024, 2.001), (1328, 2.303)])
def test_shift_of_the_model_s_own_scheduler(side, k):
    tokens = image_tokens((side, side))
    assert qwen_shift(tokens) == pytest.approx(k, abs=6e-4)
    assert qwen_shift(tokens) == pytest.approx(math.exp(calculate_shift(tokens, 256, 8192, 0.5, 0.9)))


@pytest.mark.parametrize("law", CLOSED_FORMS)
def test_a_range_squeezes_the_law(law):
    levels = draw(make_levels(timestep_sampling=law, min_timestep=200, max_timestep=700))
    assert distance(levels, lambda t: CLOSED_FORMS[law]((t - 0.2) / 0.5)) < KOLMOGOROV
    assert 0.2 <= min(levels) < max(levels) <= 0.7


@pytest.mark.parametrize("buckets", [None, 8])
@pytest.mark.parametrize("law", [*CLOSED_FORMS, "sigma"])
def test_a_range_cuts_the_law(law, buckets):
    below = CLOSED_FORMS.get(law, lambda t: unshift(t, 1.7))
    levels = draw(
        make_levels(
            timestep_sampling=law, min_timestep=600, max_timestep=850, preserve_distribution_shape=True,
            num_timestep_buckets=buckets,
        )
    )  # fmt: skip
    assert 0.6 <= min(levels) < max(levels) <= 0.85
    cut = lambda t: (below(t) - below(0.6)) / (below(0.85) - below(0.6))  # noqa: E731
    # strata bring draws nearer to the law; those of a mixture are not in the order of its levels
    near = 0.01 if buckets and not law.startswith("qinglong") else KOLMOGOROV
    grid = 0.006 if law == "sigma" else 0
    assert distance(levels, cut) < near + grid


def test_a_thin_slice_is_still_the_law_s():
    """Resampling would need 100,000 tries a draw here."""
    levels = draw(
        make_levels(timestep_sampling="sigmoid", sigmoid_scale=0.5, min_timestep=880, preserve_distribution_shape=True)
    )
    share = 1 - PHI(logit(0.88) / 0.5)
    assert share < 1e-4
    assert min(levels) >= 0.88
    assert distance(levels, lambda t: 1 - (1 - PHI(logit(t) / 0.5)) / share) < KOLMOGOROV


def test_a_range_where_the_law_has_nothing_is_an_error_at_the_start():
    with pytest.raises(InputError, match="sigmoid trains next to nothing between min_timestep 990 and max"):
        make_levels(timestep_sampling="sigmoid", sigmoid_scale=0.1, min_timestep=990, preserve_distribution_shape=True)


@pytest.mark.parametrize("law", [law for law in CLOSED_FORMS if not law.startswith("qinglong")])
def test_each_stratum_gets_its_number_in_every_epoch(law):
    levels = make_levels(timestep_sampling=law, num_timestep_buckets=10)
    stratum = lambda t: min(int(10 * CLOSED_FORMS[law](t)), 9)  # noqa: E731
    for epoch in (1, 2):
        assert Counter(map(stratum, draw(levels, epoch=epoch))) == dict.fromkeys(range(10), VISITS // 10)
    first, second = ([stratum(t) for t in draw(levels, epoch=epoch)] for epoch in (1, 2))
    assert first != second
    # within its stratum a level is as free as ever
    assert distance(draw(levels), CLOSED_FORMS[law]) < 0.01


def test_strata_spread_the_parts_of_a_mixture_too():
    """With so narrow a law the rest of the levels are the twentieth that is drawn for detail."""
    levels = make_levels(timestep_sampling="qinglong_qwen", sigmoid_scale=0.01, num_timestep_buckets=20)
    for epoch in (1, 2, 3):
        assert sum(t < 0.5 for t in draw(levels, epoch=epoch)) == VISITS // 20


def test_strata_hold_for_each_dataset_and_do_not_depend_on_the_list():
    items = [SimpleNamespace(dataset=n % 2, key=f"{n}.png", bucket=BUCKET) for n in range(30)]
    datasets = {0: SimpleNamespace(num_repeats=2), 1: SimpleNamespace(num_repeats=1)}
    strata = Strata(4, 7, items, datasets)
    got = {(items[n].key, r): strata.of(n, 3, r) for n in range(30) for r in range(datasets[n % 2].num_repeats)}
    for dataset, visits in ((0, 30), (1, 15)):
        counts = Counter(stratum for (key, _), stratum in got.items() if int(key[:-4]) % 2 == dataset)
        assert set(counts.values()) == {visits // 4, visits // 4 + 1}
        assert set(counts) == {0, 1, 2, 3}
    turned = items[::-1]
    again = Strata(4, 7, turned, datasets)
    # asked in another order, with other epochs between
    for key, repeat in reversed(got):
        index = next(n for n, item in enumerate(turned) if item.key == key)
        again.of(index, 1, repeat)
        assert again.of(index, 3, repeat) == got[key, repeat]


def test_more_strata_than_visits():
    items = [SimpleNamespace(dataset=0, key=f"{n}.png", bucket=BUCKET) for n in range(3)]
    strata = Strata(10, 7, items, {0: SimpleNamespace(num_repeats=1)})
    seen = set()
    for epoch in range(1, 60):
        these = sorted(strata.of(index, epoch, 0) for index in range(3))
        assert all(3 <= later - earlier <= 4 for earlier, later in pairwise(these))
        seen.update(these)
    assert seen == set(range(10)), "no stratum is left out for good"


def test_levels_depend_on_their_visit_alone():
    levels = make_levels(timestep_sampling="qinglong_flux", num_timestep_buckets=7)
    copy = pickle.loads(pickle.dumps(levels))
    assert draw(copy, epoch=2, items=20) == draw(levels, epoch=2, items=20)
    assert len(set(draw(levels, items=20))) == 80
    alone = make_levels(buckets=(BUCKET,) * 20, timestep_sampling="qinglong_flux")
    assert draw(alone, items=20) == draw(make_levels(timestep_sampling="qinglong_flux"), items=20)
    for off in (0, 1):
        same = make_levels(timestep_sampling="qinglong_flux", num_timestep_buckets=off)
        assert draw(same, items=20) == draw(alone, items=20)


def test_each_picture_has_its_own_shift():
    levels = make_levels(buckets=[(512, 512), (1328, 1328)])
    small, large = (levels.level(0, 1, 0, tokens) for tokens in (1024, 6889))
    assert logit(large) - logit(small) == pytest.approx(math.log(qwen_shift(6889) / qwen_shift(1024)))


@pytest.mark.parametrize("t", [0.001, 0.25, 0.5, 0.9, 1.0])
def test_weights(t):
    """The field's are the same on its grid of thousandths, where it takes the nearest level and rounds to bf16."""
    weight = {scheme: level_weight(scheme, t) for scheme in key_schemas()["weighting_scheme"]["enum"]}
    assert weight["none"] == weight["logit_normal"] == weight["mode"] == 1
    assert weight["sigma_sqrt"] == pytest.approx(t**-2.0)
    assert weight["cosmap"] == pytest.approx(2 / (math.pi * (1 - 2 * t + 2 * t**2)))


def test_a_weight_is_never_beyond_bounds():
    assert level_weight("sigma_sqrt", 0.0) == level_weight("sigma_sqrt", 1e-9) == pytest.approx(1e6)


def test_a_visit_s_weight_is_its_level_s_times_its_dataset_s():
    levels = make_levels(weighting_scheme="cosmap", loss_weight=0.5)
    assert levels.visit_weight(3, 0.5) == levels.weight(0.5) / 2 == pytest.approx(2 / math.pi)


@pytest.mark.parametrize(
    ("settings", "key", "words"),
    [
        ({"weighting_scheme": "mode"}, "weighting_scheme", "it is not sigma"),
        ({"weighting_scheme": "logit_normal", "timestep_sampling": "shift"}, "weighting_scheme", "it is not sigma"),
        ({"logit_mean": 1}, "logit_mean", "qinglong_flux is set"),
        ({"logit_std": 2, "timestep_sampling": "qinglong_qwen"}, "logit_std", "qinglong_flux is set"),
        ({"mode_scale": 1}, "mode_scale", "weighting_scheme is not mode"),
        ({"mode_scale": 2, "weighting_scheme": "mode", "timestep_sampling": "sigma"}, "mode_scale", "maximum of 1.75"),
        ({"sigmoid_scale": 2, "timestep_sampling": "sigma"}, "sigmoid_scale", "sigma"),
        ({"sigmoid_scale": 2, "timestep_sampling": "ideogram4_shift"}, "sigmoid_scale", "ideogram4_shift"),
        ({"discrete_flow_shift": 2, "timestep_sampling": "krea2_shift"}, "discrete_flow_shift", "neither shift nor"),
        ({"preserve_distribution_shape": True}, "preserve_distribution_shape", "narrows the range"),
        ({"preserve_distribution_shape": True, "max_timestep": 1000}, "preserve_distribution_shape", "narrows"),
        ({"huber_delta": 1}, "huber_delta", "loss_type is not huber"),
    ],
)  # fmt: skip
def test_keys_without_effect_are_named(settings, key, words):
    (problem,) = check_settings(settings, "f")
    assert problem.key == key
    assert words in f"{problem.found} {problem.mend}"


@pytest.mark.parametrize(
    "settings",
    [
        {"timestep_sampling": "sigma", "weighting_scheme": "mode", "mode_scale": -0.5, "discrete_flow_shift": 2.2},
        {"timestep_sampling": "sigma", "weighting_scheme": "logit_normal", "logit_mean": 1, "logit_std": 0.5},
        {"timestep_sampling": "logsnr", "logit_mean": -6, "logit_std": 2, "weighting_scheme": "cosmap"},
        {"timestep_sampling": "qinglong_flux", "logit_mean": 1, "sigmoid_scale": 2, "weighting_scheme": "sigma_sqrt"},
        {"timestep_sampling": "flux2_shift", "min_timestep": 1, "preserve_distribution_shape": True},
        {"num_timestep_buckets": 10, "loss_type": "huber", "huber_delta": 0.5, "show_timesteps": "console"},
    ],
)
def test_combinations_that_make_sense_are_accepted(settings):
    assert not check_settings(settings, "f")
