import collections
import json

import jax
import numpy as np
import pytest

from train.data import SequenceDataset
from train.data.batches import eval_batches, num_batches, train_iterator

BUCKETS = (4, 8, 16)
DTYPES = {"tokens": np.int32, "mask": bool, "label": np.int32, "example_mask": bool}


def make_dataset(num_examples: int, max_length: int = 16) -> SequenceDataset:
    """Sequence `i` has length `i % max_length + 1`, label `i`, and zeros among its tokens, which are real."""
    sequences = [bytes((i + j) % 5 for j in range(i % max_length + 1)) for i in range(num_examples)]
    return SequenceDataset.from_bytes(sequences, range(num_examples))


def take(iterator, count: int):
    return [next(iterator) for _ in range(count)]


def labels_of(batches) -> list[int]:
    return np.concatenate([batch["label"][batch["example_mask"]] for batch in batches]).tolist()


def assert_same(batches, others):
    assert len(batches) == len(others)
    jax.tree.map(np.testing.assert_array_equal, batches, others)


@pytest.mark.parametrize("num_examples", [1, 5, 64, 67])
@pytest.mark.parametrize("batch_size", [1, 8, 100])
@pytest.mark.parametrize("kind", ["train", "eval"])
def test_batches_hold_every_example_once_in_static_shapes(num_examples, batch_size, kind):
    dataset = make_dataset(num_examples)
    steps = num_batches(num_examples, batch_size)
    if kind == "train":
        batches = take(train_iterator(dataset, batch_size=batch_size, buckets=BUCKETS, seed=0), steps)
    else:
        batches = list(eval_batches(dataset, batch_size=batch_size, buckets=BUCKETS))
    assert len(batches) == steps
    assert sorted(labels_of(batches)) == list(range(num_examples))
    for batch in batches:
        length = batch["tokens"].shape[1]
        assert jax.tree.map(lambda array: array.dtype, batch) == DTYPES
        assert batch["tokens"].shape == batch["mask"].shape == (batch_size, length)
        assert batch["label"].shape == batch["example_mask"].shape == (batch_size,)
        longest = batch["mask"].sum(axis=1).max()
        assert length == min(bucket for bucket in BUCKETS if bucket >= longest)
        for row in range(batch_size):
            size = 0
            if batch["example_mask"][row]:
                expected = dataset[batch["label"][row]]["tokens"]
                size = len(expected)
                assert batch["tokens"][row, :size].tolist() == expected.tolist()
            assert batch["mask"][row].tolist() == [True] * size + [False] * (length - size)
            assert not batch["tokens"][row, size:].any()
        assert not batch["label"][~batch["example_mask"]].any()


def test_a_remainder_is_shared_by_all_batches():
    batches = take(train_iterator(make_dataset(65), batch_size=8, buckets=BUCKETS, seed=0), num_batches(65, 8))
    assert {int(batch["example_mask"].sum()) for batch in batches} == {7, 8}


def test_epochs_are_shuffled_differently_and_batches_meet_other_examples():
    steps = num_batches(64, 8)
    iterator = train_iterator(make_dataset(64), batch_size=8, buckets=BUCKETS, seed=0)
    epochs = [labels_of(take(iterator, steps)) for _ in range(3)]
    assert all(sorted(epoch) == list(range(64)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    companions = [{frozenset(epoch[i : i + 8]) for i in range(0, 64, 8)} for epoch in epochs]
    assert not companions[0] & companions[1]


def test_the_seed_alone_decides_the_order():
    dataset = make_dataset(64)
    first, again, other = (
        take(train_iterator(dataset, batch_size=8, buckets=BUCKETS, seed=seed), 20) for seed in (3, 3, 4)
    )
    assert_same(first, again)
    assert labels_of(first) != labels_of(other)
    few = train_iterator(make_dataset(8), batch_size=2, buckets=(16,), seed=0)
    assert labels_of(take(few, 4)) == [4, 5, 3, 2, 0, 7, 1, 6]  # in every process and with every NumPy


def test_examples_of_one_bucket_share_batches():
    """At most one batch at each border between buckets is padded to more than its example's own bucket."""
    dataset = make_dataset(640)
    batches = take(train_iterator(dataset, batch_size=8, buckets=BUCKETS, seed=0), num_batches(640, 8))
    shapes = collections.Counter(batch["tokens"].shape[1] for batch in batches)
    assert set(shapes) == set(BUCKETS)
    lengths = [batch["tokens"].shape[1] for batch in batches]
    assert lengths not in (sorted(lengths), sorted(lengths, reverse=True))  # the batches are shuffled, too
    mixed = 0
    for batch in batches:
        own = np.searchsorted(BUCKETS, batch["mask"].sum(axis=1))
        mixed += len(set(own.tolist())) > 1
    assert mixed <= len(BUCKETS) - 1


def test_order_of_buckets_does_not_matter():
    ascending, mixed = (
        list(eval_batches(make_dataset(40), batch_size=8, buckets=buckets))
        for buckets in ((4, 8, 16), [16, 4, 8, 8])
    )
    assert_same(ascending, mixed)


@pytest.mark.parametrize("position", [0, 1, 7, 8, 9, 21])
def test_resumed_iterator_continues_exactly(position):
    """Epochs have 9 steps: positions lie within epochs, at their borders and next to them."""
    unbroken, fresh = (train_iterator(make_dataset(67), batch_size=8, buckets=BUCKETS, seed=5) for _ in range(2))
    take(unbroken, position)
    state = json.loads(json.dumps(unbroken.get_state()))
    expected = take(unbroken, 20)

    fresh.set_state(state)
    assert_same(take(fresh, 20), expected)
    unbroken.set_state(state)  # and backwards
    assert_same(take(unbroken, 20), expected)


def test_evaluation_repeats_the_same_batches():
    batches = eval_batches(make_dataset(67), batch_size=8, buckets=BUCKETS)
    assert_same(list(batches), list(batches))
    lengths = [batch["tokens"].shape[1] for batch in batches]
    assert lengths == sorted(lengths)


@pytest.mark.parametrize("num_examples", [5, 67])
def test_processes_share_the_rows_of_each_batch(num_examples):
    dataset = make_dataset(num_examples)
    arguments = {"batch_size": 8, "buckets": BUCKETS, "seed": 2}
    whole = take(train_iterator(dataset, **arguments), 12)
    parts = [take(train_iterator(dataset, **arguments, process_index=i, process_count=4), 12) for i in range(4)]
    together = [{key: np.concatenate([part[step][key] for part in parts]) for key in DTYPES} for step in range(12)]
    assert_same(together, whole)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"dataset": make_dataset(0)}, "without examples"),
        ({"buckets": (4, 15)}, r"longest sequence, of 16 tokens, got \(4, 15\)"),
        ({"buckets": ()}, "buckets must reach"),
        ({"batch_size": 0}, "batch_size must be a positive multiple"),
        ({"process_count": 3}, "batch_size must be a positive multiple of process_count 3, got 8"),
        ({"process_index": 2, "process_count": 2}, r"process_index must be in \[0, 2\), got 2"),
    ],
)
def test_bad_arguments_are_named_before_the_first_batch(arguments, message):
    arguments = {"dataset": make_dataset(20), "batch_size": 8, "buckets": BUCKETS, **arguments}
    for make in (eval_batches, lambda dataset, **options: train_iterator(dataset, seed=0, **options)):
        with pytest.raises(ValueError, match=message):
            make(**arguments)


def test_a_negative_seed_is_refused():
    with pytest.raises(ValueError, match="seed must not be negative, got -1"):
        train_iterator(make_dataset(20), batch_size=8, buckets=BUCKETS, seed=-1)


def test_empty_sequences_are_examples_without_tokens():
    dataset = SequenceDataset.from_bytes([b"", b"\1\0"], [3, 4])
    (batch,) = eval_batches(dataset, batch_size=2, buckets=(4,))
    assert batch["mask"].tolist() == [[False] * 4, [True, True, False, False]]
    assert batch["example_mask"].all()


def test_packing_needs_a_label_for_every_sequence():
    with pytest.raises(ValueError, match="2 sequences but 1 labels"):
        SequenceDataset.from_bytes([b"\1", b"\2"], [0])
