"""Bucketed batches: what an epoch holds, its order, and its division among processes."""

from collections import Counter
from types import SimpleNamespace

from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_image.training.batches import epoch_batches, share, training_steps
from qwen_image.training.items import CacheFile, TrainingItem

DATASETS = {
    0: SimpleNamespace(batch_size=2, num_repeats=1),
    1: SimpleNamespace(batch_size=3, num_repeats=2),
}
BUCKETS = [(64, 64), (96, 48), (48, 96)]


def make_items(places):
    file = CacheFile("", "")
    return [TrainingItem(dataset, f"{n}", file, (file,), BUCKETS[bucket]) for n, (dataset, bucket) in enumerate(places)]


places = st.lists(st.tuples(st.integers(0, 1), st.integers(0, 2)), min_size=1, max_size=25)


@given(places=places, seed=st.integers(0, 5), epoch=st.integers(1, 3))
@settings(max_examples=60, deadline=None)
def test_an_epoch_visits_every_item_as_often_as_it_should(places, seed, epoch):
    items = make_items(places)
    batches = epoch_batches(items, DATASETS, seed=seed, epoch=epoch)
    visits = Counter(draw for batch in batches for draw in batch)
    assert set(visits.values()) == {1}
    expected = {(n, repeat) for n, (dataset, _) in enumerate(places) for repeat in range(DATASETS[dataset].num_repeats)}
    assert set(visits) == expected
    short = Counter()
    for batch in batches:
        homes = {(items[draw.item].dataset, items[draw.item].bucket) for draw in batch}
        assert len(homes) == 1, "one dataset and one bucket a batch"
        (home,) = homes
        size = DATASETS[home[0]].batch_size
        assert len(batch) <= size
        short[home] += len(batch) < size
    assert max(short.values()) <= 1, "only the last batch of a bucket may be short"


@given(places=places, processes=st.integers(1, 4))
@settings(max_examples=40, deadline=None)
def test_all_processes_do_equally_many_and_none_is_left_out(places, processes):
    batches = epoch_batches(make_items(places), DATASETS, seed=1, epoch=1)
    shares = [share(batches, rank=rank, processes=processes) for rank in range(processes)]
    assert len({len(mine) for mine in shares}) == 1
    assert {batch for mine in shares for batch in mine} == set(batches)
    assert sum(map(len, shares)) - len(batches) < processes


def test_order_depends_on_seed_and_epoch_and_on_nothing_else():
    items = make_items([(0, n % 3) for n in range(20)])
    first = epoch_batches(items, DATASETS, seed=1, epoch=1)
    assert first == epoch_batches(items, DATASETS, seed=1, epoch=1)
    assert first != epoch_batches(items, DATASETS, seed=1, epoch=2)
    assert first != epoch_batches(items, DATASETS, seed=2, epoch=1)


def test_steps_accumulate_and_end_with_the_epoch():
    items = make_items([(0, 0)] * 10)  # 5 batches
    steps = list(training_steps(items, DATASETS, seed=1, accumulation=2, total=7))
    assert [step.number for step in steps] == [1, 2, 3, 4, 5, 6, 7]
    assert [len(step.batches) for step in steps] == [2, 2, 1, 2, 2, 1, 2]
    assert [step.epoch for step in steps] == [1, 1, 1, 2, 2, 2, 3]
    assert [step.ends_epoch for step in steps] == [False, False, True, False, False, True, False]
    # extending a training does not change what came before
    assert list(training_steps(items, DATASETS, seed=1, accumulation=2, total=9))[:7] == steps
