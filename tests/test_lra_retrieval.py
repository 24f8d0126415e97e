"""Document retrieval of Long Range Arena: pairs as published, and two towers that read them alike."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attn_jax.models import TransformerMatcher
from tests.runs import outcome
from train.__main__ import main
from train.data import DataError, SequenceDataset, aan, batches, realdata

# Of float32 logits of order 1, summed in another order.
ROUNDING = 1e-5


TOKENS = np.random.default_rng(0).integers(1, 257, (3, 2, 7))


def matcher(features):
    size = dict(vocab_size=257, num_classes=2, dim=8, num_heads=1, num_layers=1, mlp_dim=16)
    model = TransformerMatcher(features=features, rngs=nnx.Rngs(0), **size)
    model.eval()
    return model


@pytest.mark.parametrize("features", ["concatenated", "product"])
def test_a_padded_pair_is_the_pair_and_both_documents_go_through_the_same_encoder(features):
    padded = np.full((3, 2, 11), 99)
    padded[:, :, :7] = TOKENS

    @jax.jit  # one program, which compiles faster than its parts
    def outputs():
        model = matcher(features)
        first, second = (model.pooled(TOKENS[:, place]) for place in (0, 1))
        parts = [first, second] if features == "concatenated" else [first, second, first * second, first - second]
        by_hand = model.head(jnp.concatenate(parts, axis=1))
        mask = jnp.broadcast_to(jnp.arange(11) < 7, padded.shape)
        return model(TOKENS), model(padded, mask=mask), by_hand, model(TOKENS[:, ::-1])

    found, of_padded, by_hand, swapped = outputs()
    np.testing.assert_allclose(of_padded, found, atol=ROUNDING)
    np.testing.assert_allclose(found, by_hand, atol=ROUNDING)
    assert np.abs(found - swapped).max() > 100 * ROUNDING


@pytest.mark.parametrize(
    "make, complaint",
    [
        (lambda: matcher("nope"), r"`features` must be .*product"),
        (lambda: matcher("product")(TOKENS[:, 0]), r"`tokens` must have shape \(B, 2, L\)"),
    ],
)
def test_what_does_not_fit_is_refused(make, complaint):
    with pytest.raises(ValueError, match=complaint):
        nnx.eval_shape(make)


@pytest.fixture
def published(tmp_path):
    folder = tmp_path / "tsv_data"
    folder.mkdir()
    for name in ("train", "eval", "test"):
        lines = [
            f'{float(number % 2)}\tid{number}\tid"{number}\t{name} first "{number}\t{"x" * number} second\r\n'
            for number in range(10)
        ]
        (folder / f"new_aan_pairs.{name}.tsv").write_text("".join(lines), newline="")
    return tmp_path


def test_published_pairs_are_read_as_they_stand(published):
    splits = aan.read(published, 12)
    assert [len(splits[name]) for name in ("train", "val", "test")] == [20, 20, 20]
    assert splits["val"].labels.tolist() == [number % 2 for number in range(10) for _ in (1, 2)]
    texts = [bytes((splits["val"][place]["tokens"] - 1).astype(np.uint8)) for place in (6, 7)]
    assert texts == [b'eval first "', b"xxx second"]
    assert splits["test"].lengths.max() == 12
    for label in (0, 1):  # also without the folder in between
        assert (aan.read(published / "tsv_data", 12)["train"].labels == label).sum() == 10


def test_a_text_is_cut_to_its_first_10_000_bytes_before_the_models_length(published):
    file = published / "tsv_data" / "new_aan_pairs.eval.tsv"
    file.write_bytes(b"1.0\ta\tb\t" + b"x" * 10_001 + b"\ttext\n")
    for max_length, kept in ((4_000, 4_000), (20_000, 10_000)):
        assert aan.read(published, max_length)["val"].lengths.tolist() == [kept, 4]


@pytest.mark.parametrize(
    "content, complaint",
    [
        (None, "cannot read .*eval.tsv: No such file.*download lra_release.gz"),
        (b"", "holds no pairs"),
        (
            b"1.0\ta\tb\ttext\ttext\n2.0\ta\tb\ttext\ttext\n",
            r"eval.tsv:2: expected label .*got 5 fields and b'2.0'",
        ),
        (b"1.0\ta\tb\ttext\ttext\n1.0\ta\tb\tte", r"eval.tsv:2: .*got 4 fields.*cut off"),
        (b"1.0\ta\tb\ttext\ttext\n1.0\ta\tb\ttext\tte", r"eval.tsv:2: the last line has no end"),
        (b"1.0\ta\tb\t\ttext\n", "holds no pairs"),
    ],
)
def test_what_is_wrong_with_a_file_is_said(published, content, complaint):
    file = published / "tsv_data" / "new_aan_pairs.eval.tsv"
    file.unlink() if content is None else file.write_bytes(content)
    with pytest.raises(DataError, match=complaint):
        aan.read(published, 12)


def test_pairs_with_an_empty_text_are_left_out_and_counted(published, caplog):
    file = published / "tsv_data" / "new_aan_pairs.eval.tsv"
    file.write_bytes(b"1.0\ta\tb\t\ttext\n0.0\ta\tb\ttext\t \r\n1.0\ta\tb\tfirst\tsecond\n")
    assert aan.read(published, 12)["val"].lengths.tolist() == [5, 6]
    (record,) = caplog.records
    assert record.getMessage() == f"{file}: left out 2 pairs with an empty text"


def test_every_pair_is_in_one_batch_with_both_documents(published):
    data = aan.read(published, 32)["train"]
    made = list(batches.plan_batches(batches.PairedSequences(data, (16, 32)), batch_size=4))
    found = [
        (*(tuple((tokens[mask] - 1).tolist()) for tokens, mask in zip(*pair)), label)
        for batch in made
        for *pair, label, real in zip(batch["tokens"], batch["mask"], batch["label"], batch["example_mask"])
        if real
    ]
    pairs = [data[place]["tokens"].astype(int) - 1 for place in range(20)]
    expected = [(tuple(pairs[2 * i]), tuple(pairs[2 * i + 1]), i % 2) for i in range(10)]
    assert sorted(found) == sorted(expected)
    assert {batch["tokens"].shape for batch in made} <= {(4, 2, 16), (4, 2, 32)}


def test_pairs_share_batches_by_the_longer_document():
    lengths = [(3, 3), (3, 9), (9, 3), (9, 9), (2, 2)]
    documents = [np.ones(length, np.uint16) for pair in lengths for length in pair]
    data = SequenceDataset.pack(documents, [0] * len(documents))
    made = batches.plan_batches(batches.PairedSequences(data, (4, 16)), batch_size=1)
    assert [batch["tokens"].shape for batch in made] == [(1, 2, 4)] * 2 + [(1, 2, 16)] * 3


def test_pairs_of_news_are_of_one_topic_or_of_two_and_of_one_split():
    try:
        articles = realdata.distinct_articles()
    except DataError as error:
        pytest.skip(str(error))
    topic = {article.text[:80]: article.topic for article in articles}
    splits = aan.news({"train": 40, "val": 20, "test": 20}, 80)
    seen = []
    for data in splits.values():
        texts = [bytes((data[place]["tokens"] - 1).astype(np.uint8)) for place in range(len(data))]
        assert data.labels.mean() == 0.5
        for place in range(0, len(texts), 2):
            assert (topic[texts[place]] == topic[texts[place + 1]]) == bool(data.labels[place])
            assert texts[place] != texts[place + 1]
        seen.append(set(texts))
    assert not seen[0] & seen[1] and not seen[0] & seen[2] and not seen[1] & seen[2]
    again = aan.news({"train": 40, "val": 20, "test": 20}, 80)
    np.testing.assert_array_equal(splits["train"].tokens, again["train"].tokens)


def test_a_run_on_published_pairs(published, tmp_path):
    small = ("model.dim=8", "model.num_layers=0", "steps=2", "eval_every=2", "mesh.data=1")
    settings = (f"task.source={published}", *small)
    overrides = [f"--config.{setting}" for setting in settings]
    run = tmp_path / "run"
    code, out, error = outcome(main, "--config", "configs/lra_retrieval.py:smoke", *overrides, "--workdir", run)
    assert code == 0, error
    assert "majority" in out and (run / "result.json").exists()
