"""The held-out items: which they are, and that their loss is the same each time and on any number of processes."""

import pytest

from qwen_image.problems import InputError
from qwen_image.training.items import CacheFile, TrainingItem
from qwen_image.training.validation import split_items


def items(count, dataset=0):
    file = CacheFile("x", "0")
    return [TrainingItem(dataset, f"{number:04}.png", file, (file,), (64, 64)) for number in range(count)]


def test_without_a_share_all_are_trained_on():
    assert split_items(items(3), 0) == (items(3), [])


def test_about_the_share_is_held_out_and_nothing_is_lost():
    everything = items(2000)
    trained, held_out = split_items(everything, 0.1)
    assert 150 < len(held_out) < 250
    assert sorted([*trained, *held_out], key=lambda item: item.key) == everything


def test_an_item_is_held_out_by_its_name_alone():
    _, held_out = split_items(items(200), 0.1)
    _, among_fewer = split_items(items(200)[50:150], 0.1)
    assert {item.key for item in among_fewer} == {item.key for item in held_out} & {
        item.key for item in items(200)[50:150]
    }
    _, elsewhere = split_items(items(200, dataset=3), 0.1)
    assert [item.key for item in elsewhere] == [item.key for item in held_out]
    _, more = split_items(items(200), 0.3)
    assert {item.key for item in held_out} < {item.key for item in more}, "a larger share holds out the same and more"


@pytest.mark.parametrize("share", [1e-9, 0.999999])
def test_a_dataset_that_has_none_to_spare_is_told(share):
    with pytest.raises(InputError, match="validation_split") as error:
        split_items(items(3), share)
    assert "of 3" in str(error.value)
