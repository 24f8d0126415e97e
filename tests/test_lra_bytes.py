"""Texts and images of Long Range Arena: published files, read as published."""

import pickle

import numpy as np
import pytest

from tests.runs import outcome
from train import config as configs
from train.__main__ import main
from train.data import DataError, images, realdata, split_of, text
from train.tasks import TASKS


def test_an_id_is_a_byte_and_one():
    content = bytes(range(256))
    np.testing.assert_array_equal(text.encode(content, 1_000), np.arange(1, 257))
    assert text.encode(content, 3).tolist() == [1, 2, 3]
    assert text.encode("é".encode(), 9).tolist() == [0xC3 + 1, 0xA9 + 1]
    assert text.VOCAB_SIZE == 1 + text.encode(content, 1_000).max()


@pytest.fixture
def imdb(tmp_path):
    for part in ("train", "test"):
        for sentiment in text.SENTIMENTS:
            folder = tmp_path / part / sentiment
            folder.mkdir(parents=True)
            for number in range(40):
                (folder / f"{number}_7.txt").write_bytes(f"{part} {sentiment} {number}\r\n".encode())
    (tmp_path / "test" / "pos" / "empty.txt").touch()
    (tmp_path / "train" / "unsup").mkdir()
    return tmp_path


def test_both_sources_of_reviews_hold_out_the_same_ones(imdb, monkeypatch, caplog):
    def records(name, otherwise):
        """In another order than the folder's, and as tensorflow-datasets keeps them: without the space around."""
        parts = {}
        for part in ("train", "test"):
            files = sorted((imdb / part).glob("*/*_7.txt"), key=lambda file: file.name)
            labels = [text.SENTIMENTS.index(file.parent.name) for file in files]
            parts[part] = [{"text": f.read_bytes().strip(), "label": label} for f, label in zip(files, labels)]
        parts["test"].append({"text": b"", "label": 1})
        return parts

    def contents(splits):
        return {
            split: sorted(
                (record["tokens"].tobytes(), int(record["label"]))
                for record in map(data.__getitem__, range(len(data)))
            )
            for split, data in splits.items()
        }

    monkeypatch.setattr(text.prepared, "records", records)
    from_folder, from_prepared = contents(text.acl_imdb(imdb, 200)), contents(text.tfds_imdb(200))
    assert from_folder == from_prepared and len(from_folder["val"]) > 0
    assert [record.getMessage() for record in caplog.records] == ["texts: left out 1 without a character"] * 2
    # The text alone decides: whatever a file is called.
    for number, file in enumerate(sorted((imdb / "train" / "pos").iterdir())):
        file.rename(file.with_name(f"renamed_{number}.txt"))
    assert contents(text.acl_imdb(imdb, 200)) == from_folder


def test_reviews_are_read_once_with_their_class(imdb):
    splits = text.acl_imdb(imdb, 200)
    seen = {
        split: {bytes((data[i]["tokens"] - 1).astype(np.uint8)): int(data[i]["label"]) for i in range(len(data))}
        for split, data in splits.items()
    }
    assert {split: len(data) for split, data in splits.items()} == {
        split: len(found) for split, found in seen.items()
    }
    assert len(seen["train"]) + len(seen["val"]) == 80 and len(seen["test"]) == 80
    assert 0 < len(seen["val"]) < 20, "a tenth, by a hash of the text"
    for split, found in seen.items():
        part = b"test" if split == "test" else b"train"
        assert all(content.startswith(part) for content in found)
        assert all(label == (b" pos " in content) for content, label in found.items())


def test_a_missing_folder_says_what_to_download(imdb):
    for file in (imdb / "train" / "neg").iterdir():
        file.unlink()
    with pytest.raises(DataError, match=r"no texts .*train/neg/\*\.txt; download aclImdb_v1.tar.gz"):
        text.acl_imdb(imdb, 10)
    with pytest.raises(DataError, match=r"no imdb_reviews prepared in .*download aclImdb_v1"):
        text.tfds_imdb(10)
    with pytest.raises(DataError, match=r"no cifar10 prepared in .*download cifar-10-python"):
        images.tfds_cifar10()


def test_prepared_data_sets_are_read_without_tensorflow(monkeypatch):
    import tensorflow_datasets as tfds

    with tfds.testing.mock_data(num_examples=40):
        reviews, pictures = text.tfds_imdb(100), images.tfds_cifar10()
    assert sum(map(len, reviews.values())) == 80 and len(reviews["test"]) == 40
    assert {split: len(data) for split, data in pictures.items()} == {"train": 36, "val": 4, "test": 40}
    assert set(pictures["test"].lengths) == {1_024}


def test_news_are_one_split_each_and_their_order_says_nothing():
    articles = installed(realdata.distinct_articles)
    assert len(realdata.articles()) == 2_225, "the articles and no other text file of the package"
    splits = text.news(64)
    assert sum(map(len, splits.values())) == len(articles)
    for split, data in splits.items():
        expected = [article for article in articles if split_of(article.name) == split]
        assert data.labels.tolist() == [realdata.TOPICS.index(article.topic) for article in expected]
        np.testing.assert_array_equal(data[3]["tokens"], text.encode(expected[3].text, 64))
    texts = [{data[i]["tokens"].tobytes() for i in range(len(data))} for data in splits.values()]
    assert not texts[0] & texts[2] and not texts[0] & texts[1]


def test_grey_is_tensorflows():
    # Of tf.image.rgb_to_grayscale: a float sum with its weights, back to uint8 by * 255.5 and truncation.
    rgb = np.array([[255, 255, 255], [0, 0, 0], [255, 0, 0], [0, 255, 0], [0, 0, 255], [1, 2, 3]], np.uint8)
    assert images.grey(rgb).tolist() == [255, 0, 76, 149, 29, 1]
    every = np.random.default_rng(0).integers(0, 256, (1_000, 3), np.uint8)
    exact = every.astype(np.float64) @ [0.2989, 0.5870, 0.1140] * 255.5 / 255
    assert np.abs(images.grey(every) - np.floor(exact)).max() <= 1  # where float32 rounds across a step
    assert np.mean(images.grey(every) == np.floor(exact)) > 0.99


@pytest.fixture
def cifar(tmp_path):
    random = np.random.default_rng(0)
    for name in (*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"):
        data = random.integers(0, 256, (20, 3_072), np.uint8)
        content = {b"data": data, b"labels": random.integers(0, 10, 20).tolist(), b"batch_label": b"x"}
        (tmp_path / name).write_bytes(pickle.dumps(content, protocol=2))
    return tmp_path


def test_cifar_is_read_row_by_row_in_grey(cifar):
    splits = images.cifar10(cifar)
    assert {split: len(data) for split, data in splits.items()} == {"train": 90, "val": 10, "test": 20}
    content = pickle.loads((cifar / "test_batch").read_bytes())
    rgb = content[b"data"][5].reshape(3, 32, 32).transpose(1, 2, 0)
    np.testing.assert_array_equal(splits["test"][5]["tokens"].reshape(32, 32), images.grey(rgb))
    assert splits["test"].labels.tolist() == content[b"labels"]


@pytest.mark.parametrize(
    "damage, complaint",
    [
        (lambda path: path.unlink(), "no .*data_batch_3; download cifar-10-python"),
        (lambda path: path.write_bytes(path.read_bytes()[:1000]), "cannot read .*data_batch_3"),
        (
            lambda path: path.write_bytes(pickle.dumps({b"data": [[0] * 3_072], b"labels": [11]})),
            "1 images do not fit",
        ),
        (lambda path: path.write_bytes(pickle.dumps(pytest.raises)), "cannot read .*it holds _pytest"),
    ],
)
def test_damaged_files_are_said(cifar, damage, complaint):
    damage(cifar / "data_batch_3")
    with pytest.raises(DataError, match=complaint):
        images.cifar10(cifar)


def test_digits_are_pixels_and_classes():
    splits = installed(images.digits)
    assert sum(map(len, splits.values())) == 5_000
    assert set(splits["train"].lengths) == {784} and set(splits["train"].labels) == set(range(10))
    # Nearest mean of the training digits: far above chance where images and labels belong together.
    pixels = {split: data.tokens.reshape(len(data), -1).astype(float) for split, data in splits.items()}
    means = np.stack([pixels["train"][splits["train"].labels == c].mean(0) for c in range(10)])
    nearest = ((pixels["test"][:, None] - means) ** 2).sum(2).argmin(1)
    assert np.mean(nearest == splits["test"].labels) > 0.7


@pytest.mark.parametrize("black", [False, True])
def test_black_pixels_are_pixels_unless_asked_otherwise(cifar, black):
    config = configs.load(
        "configs/lra_image.py:smoke", [f"--config.task.source={cifar}", f"--config.task.mask_black={black}"]
    )
    task = TASKS["image"](config)
    seen = {}

    class Model:
        def __call__(self, tokens, *, mask):
            seen["mask"] = mask
            return np.zeros((len(tokens), 10), np.float32) + tokens.mean()

    tokens = np.array([[0, 5, 0]])
    batch = {"tokens": tokens, "mask": np.array([[True, True, False]])}
    task.metrics(Model(), batch | {"label": np.zeros(1, int), "example_mask": np.ones(1, bool)})
    assert seen["mask"].tolist() == [[not black, True, False]]


@pytest.mark.parametrize("name, folder", [("text", "imdb"), ("image", "cifar")])
def test_a_run_on_published_files(name, folder, request, tmp_path):
    data = request.getfixturevalue(folder)
    small = ["model.dim=8", "model.num_layers=0", "model.dropout=0", "steps=2", "eval_every=2", "mesh.data=1"]
    overrides = [f"--config.{setting}" for setting in (f"task.source={data}", *small)]
    workdir = tmp_path / "run"
    code, out, error = outcome(main, "--config", f"configs/lra_{name}.py:smoke", *overrides, "--workdir", workdir)
    assert code == 0, error
    assert "majority" in out and (workdir / "result.json").exists()


def installed(read):
    """What `read` returns; the test is skipped where the extra `realdata` is not installed."""
    try:
        return read()
    except DataError as error:
        pytest.skip(str(error))
