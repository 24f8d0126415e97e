import collections
import json

import jax
import numpy as np
import pytest

from train.data import Clips, SequenceDataset
from train.data.batches import clip_eval_batches, clip_train_iterator, eval_batches, num_batches, train_iterator

BUCKETS = (4, 8, 16)
DTYPES = {"tokens": np.int32, "mask": bool, "label": np.int32, "example_mask": bool}


def make_dataset(num_examples: int, max_length: int = 16) -> SequenceDataset:
    """Sequence `i` has length `i % max_length + 1`, label `i`, and zeros among its tokens, which are real."""
    sequences = [bytes((i + j) % 5 for j in range(i % max_length + 1)) for i in range(num_examples)]
    return SequenceDataset.from_bytes(sequences, range(num_examples))


def make_clips(num_clips: int, with_masks: bool = True) -> Clips:
    """Clip `i` is `i + 1` everywhere, so that no clip looks like a dummy."""
    numbers = np.arange(1, num_clips + 1, dtype=np.uint8)
    frames = np.broadcast_to(numbers[:, None, None, None, None], (num_clips, 2, 4, 5, 3))
    masks = np.broadcast_to(numbers[:, None, None, None], (num_clips, 2, 4, 5)) if with_masks else None
    return Clips(frames, masks, tuple(map(str, range(num_clips))))


def take(iterator, count: int):
    return [next(iterator) for _ in range(count)]


def labels_of(batches) -> list[int]:
    return np.concatenate([batch["label"][batch["example_mask"]] for batch in batches]).tolist()


def clips_of(batches) -> list[int]:
    """Which clips the batches hold, in order; all their arrays agree on it, and dummies are zero."""
    found = []
    for batch in batches:
        numbers = batch["frames"][:, 0, 0, 0, 0].astype(int)
        for key in {"frames", "masks"} & set(batch):
            assert (batch[key].T == numbers).all()
        assert batch["example_mask"].tolist() == (numbers > 0).tolist()
        found += numbers[numbers > 0].tolist()
    return [number - 1 for number in found]


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


def test_evaluation_goes_bucket_by_bucket_in_the_order_of_the_data_set():
    dataset = make_dataset(67)
    bucket = np.searchsorted(BUCKETS, dataset.lengths)
    expected = sorted(range(67), key=lambda example: bucket[example])  # `sorted` is stable
    for batch_size in (1, 8, 100):
        assert labels_of(eval_batches(dataset, batch_size=batch_size, buckets=BUCKETS)) == expected


# Clips: the same plan, another collation.


@pytest.mark.parametrize("with_masks", [True, False])
@pytest.mark.parametrize("num_clips, batch_size", [(1, 8), (64, 8), (67, 8), (67, 100)])
def test_batches_hold_every_clip_once_in_one_shape(num_clips, batch_size, with_masks):
    clips = make_clips(num_clips, with_masks)
    steps = num_batches(num_clips, batch_size)
    trained = take(clip_train_iterator(clips, batch_size=batch_size, seed=0), steps)
    evaluated = list(clip_eval_batches(clips, batch_size=batch_size))
    assert len(evaluated) == steps
    assert sorted(clips_of(trained)) == list(range(num_clips))
    assert clips_of(evaluated) == list(range(num_clips))
    shapes = {"frames": (batch_size, 2, 4, 5, 3), "masks": (batch_size, 2, 4, 5), "example_mask": (batch_size,)}
    if not with_masks:
        del shapes["masks"]
    for batch in trained + evaluated:
        assert jax.tree.map(np.shape, batch) == shapes
        assert jax.tree.map(lambda array: array.dtype, batch) == {
            key: bool if key == "example_mask" else np.uint8 for key in shapes
        }


def test_clips_meet_in_the_order_of_sequences_of_one_bucket():
    """Order, epochs and seeds are those of the sequences above: one plan makes both."""
    clips, sequences = make_clips(67), make_dataset(67)
    for seed in (0, 3):
        iterator = train_iterator(sequences, batch_size=8, buckets=(16,), seed=seed)
        clip_iterator = clip_train_iterator(clips, batch_size=8, seed=seed)
        assert clips_of(take(clip_iterator, 30)) == labels_of(take(iterator, 30))


@pytest.mark.parametrize("position", [0, 5, 9, 21])
def test_resumed_clips_continue_exactly(position):
    unbroken, fresh = (clip_train_iterator(make_clips(67), batch_size=8, seed=5) for _ in range(2))
    take(unbroken, position)
    state = json.loads(json.dumps(unbroken.get_state()))
    fresh.set_state(state)
    assert_same(take(fresh, 20), take(unbroken, 20))


def test_processes_share_the_clips_of_each_batch():
    clips = make_clips(13)
    whole = list(clip_eval_batches(clips, batch_size=8))
    parts = [list(clip_eval_batches(clips, batch_size=8, process_index=i, process_count=4)) for i in range(4)]
    together = [
        {key: np.concatenate([part[step][key] for part in parts]) for key in whole[0]} for step in range(2)
    ]
    assert_same(together, whole)


def test_bad_arguments_for_clips_are_named_before_the_first_batch():
    with pytest.raises(ValueError, match="without examples"):
        clip_eval_batches(make_clips(0), batch_size=8)
    with pytest.raises(ValueError, match="batch_size must be a positive multiple"):
        clip_train_iterator(make_clips(3), batch_size=0, seed=0)
    with pytest.raises(ValueError, match="seed must not be negative, got -1"):
        clip_train_iterator(make_clips(3), batch_size=2, seed=-1)
