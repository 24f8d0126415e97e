import hashlib
import math
import os
import statistics
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from train.data import DataError, SequenceDataset, listops
from train.data.listops import ListOps

SMALL = ListOps(num_train=120, num_val=20, num_test=10, min_length=10, max_length=100)
BENCHMARK = ListOps()
NUM_TREES = 65_536  # about 5,400 examples in half a second

# Sampling error: the generator is seeded, so these tests never flicker; a wrong grammar is off by far more.
SIGMAS = 4.0
REFERENCE_EXAMPLES = 12_000  # the sample from which the reference baselines were measured


def digest(splits: dict[str, SequenceDataset]) -> str:
    parts = [part for data in splits.values() for i in range(len(data)) for part in data[i].values()]
    return hashlib.sha256(b"".join(part.tobytes() for part in parts)).hexdigest()


def words_of(data: SequenceDataset, index: int) -> list[str]:
    return [listops.VOCABULARY[token - 1] for token in data[index]["tokens"]]


def parse(words: list[str]):
    """The expression as a digit or a list `[operator, *arguments]`."""
    words = words[::-1]

    def expression():
        word = words.pop()
        if word.isdigit():
            return int(word)
        arguments = []
        while words[-1] != "X":
            arguments.append(expression())
        words.pop()
        return [word, *arguments]

    tree = expression()
    assert not words
    return tree


def evaluate(tree) -> int:
    if isinstance(tree, int):
        return tree
    operator, *arguments = tree
    function = {
        "[MIN": min,
        "[MAX": max,
        "[MED": lambda values: int(statistics.median(values)),
        "[SM": lambda values: sum(values) % 10,
    }[operator]
    return function([evaluate(argument) for argument in arguments])


def operators_of(tree, depth=1):
    """`(operator, number of arguments, depth)` of every operator."""
    if isinstance(tree, list):
        yield tree[0], len(tree) - 1, depth
        for argument in tree[1:]:
            yield from operators_of(argument, depth + 1)


@pytest.fixture(scope="module")
def sample() -> SequenceDataset:
    return listops.sample_batch(BENCHMARK, np.random.PCG64(7), NUM_TREES)


@pytest.fixture(scope="module")
def small() -> dict[str, SequenceDataset]:
    return listops.generate(SMALL)


# The grammar


@pytest.mark.parametrize(
    "spec",
    [
        BENCHMARK,
        replace(BENCHMARK, min_length=0, max_length=60),
        replace(BENCHMARK, max_depth=3, max_args=3, min_length=1, max_length=20, operator_p=0.8),
    ],
)
def test_expressions_obey_the_grammar_and_labels_equal_their_value(spec):
    data = listops.sample_batch(spec, np.random.PCG64(1), 4096)
    assert len(data) > 100
    depths = set()
    for index in range(0, len(data), 1 + len(data) // 300):
        words = words_of(data, index)
        assert spec.min_length < len(words) < spec.max_length
        tree = parse(words)
        assert evaluate(tree) == data.labels[index]
        for _, num_arguments, depth in operators_of(tree):
            assert 2 <= num_arguments <= spec.max_args
            depths.add(depth)
    assert max(depths) < spec.max_depth  # the deepest nodes are digits


def test_the_oracle_by_hand():
    expressions = {
        "[MED 1 2 X": 1,
        "[MED 9 0 2 5 X": 3,
        "[MED 3 1 2 X": 2,
        "[SM 9 9 9 X": 7,
        "[MIN 4 [MAX 2 8 X 6 X": 4,
    }
    assert {text: evaluate(parse(text.split())) for text in expressions} == expressions


def test_lengths_have_the_distribution_of_the_grammar(sample):
    """Exact by generating functions, level by level: a token, or two and those of 2 to 10 children."""
    exact = np.zeros(BENCHMARK.max_length)
    exact[1] = 1.0
    for _ in range(BENCHMARK.max_depth - 1):
        power, children = exact, np.zeros_like(exact)
        for _ in range(2, BENCHMARK.max_args + 1):
            power = np.convolve(power, exact)[: exact.size]
            children += power / (BENCHMARK.max_args - 1)
        exact = (1 - BENCHMARK.operator_p) * (np.arange(exact.size) == 1)
        exact[2:] += BENCHMARK.operator_p * children[:-2]
    exact[: BENCHMARK.min_length + 1] = 0
    acceptance = exact.sum()
    assert round(acceptance, 3) == 0.083  # the published reference
    assert abs(len(sample) / NUM_TREES - acceptance) < SIGMAS * math.sqrt(acceptance / NUM_TREES)

    cumulative = np.cumsum(exact) / acceptance
    measured = np.cumsum(np.bincount(sample.lengths, minlength=exact.size)) / len(sample)
    # Kolmogorov's statistic exceeds 2.2 / sqrt(n) about once in ten thousand samples.
    assert np.abs(measured - cumulative).max() < 2.2 / math.sqrt(len(sample))


def test_operators_and_digits_are_uniform(sample):
    counts = np.bincount(sample.tokens, minlength=listops.VOCAB_SIZE)
    assert counts[listops.PAD_ID] == counts[listops.OOV_ID] == 0
    for words in (listops.OPERATORS, tuple("0123456789")):
        observed = counts[[listops.VOCABULARY.index(word) + 1 for word in words]]
        expected = observed.sum() / len(words)
        assert np.abs(observed - expected).max() < SIGMAS * math.sqrt(expected)


def test_baselines_have_the_published_levels(sample):
    majority = listops.majority_accuracy(sample.labels, sample.labels)
    root = listops.root_operator_accuracy(sample, sample)
    for measured, reference in ((majority, 0.171), (root, 0.356)):
        error = math.sqrt(reference * (1 - reference) * (1 / len(sample) + 1 / REFERENCE_EXAMPLES))
        assert abs(measured - reference) < SIGMAS * error


def test_baselines_by_hand():
    train = SequenceDataset.from_bytes([b"\1\6", b"\1\7", b"\1\7\7", b"\2\6"], [5, 5, 3, 3])
    test = SequenceDataset.from_bytes([b"\1\6", b"\2\6", b"\2\7", b"\4\6"], [5, 3, 5, 3])
    assert listops.majority_accuracy(np.array([1, 1, 2]), np.array([2, 1, 2, 2])) == 0.25
    # An operator that training never showed gets the majority, here a tie that the smaller label wins.
    assert listops.root_operator_accuracy(train, test) == 0.75


# The data set


def test_vocabulary():
    assert " ".join(listops.VOCABULARY) == "[MIN [MAX [MED [SM X 0 1 2 3 4 5 6 7 8 9"
    assert (listops.PAD_ID, listops.OOV_ID, listops.VOCAB_SIZE, listops.NUM_CLASSES) == (0, 16, 17, 10)


def test_splits_have_their_sizes_and_share_no_expression(small):
    assert [len(small[name]) for name in listops.SPLITS] == list(SMALL.sizes)
    examples = [(words_of(data, i), data.labels[i]) for data in small.values() for i in range(len(data))]
    assert len({tuple(words) for words, _ in examples}) == len(examples) == sum(SMALL.sizes)
    assert all(evaluate(parse(words)) == label for words, label in examples)


def test_no_expression_is_repeated_even_when_few_exist():
    spec = ListOps(num_train=390, num_val=5, num_test=5, min_length=3, max_length=5)  # 4 operators, 100 pairs
    data = listops.generate(spec)
    assert len({tuple(words_of(part, i)) for part in data.values() for i in range(len(part))}) == 400
    with pytest.raises(ValueError, match="found 400 of 401"):
        listops.generate(replace(spec, num_train=391))


@pytest.mark.parametrize(
    "change",
    [
        {"num_train": 0},
        {"num_val": -1},
        {"max_length": 501},
        {"max_args": 1},
        {"max_args": 256},
        {"operator_p": 1.5},
        {"seed": -1},
    ],
)
def test_bad_specifications_name_the_argument(change):
    with pytest.raises(ValueError, match=f"ListOps: {next(iter(change))} must be between"):
        ListOps(**change)


def test_data_depend_on_the_seed_and_on_nothing_else(small):
    """A fixed digest: other machines, other NumPy versions and other hash seeds generate the same bytes."""
    expected = "60f97537244988f4e2bedb91726b48a4d2ed4d307594945aba426601ced7aecd"
    assert digest(small) == expected
    assert digest(listops.generate(replace(SMALL, seed=1))) != expected
    code = (
        "from train.data.listops import ListOps, generate; from tests.test_listops import SMALL, digest;"
        "print(digest(generate(SMALL)))"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "1234"}
    run = subprocess.run(
        [sys.executable, "-c", code],
        env=environment,
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout.strip() == expected


# The cache


def test_cache_is_written_once_and_read_afterwards(small, tmp_path, monkeypatch):
    assert digest(listops.load(SMALL, tmp_path)) == digest(small)
    assert [path.name for path in tmp_path.iterdir()] == [SMALL.cache_name]
    monkeypatch.setattr(listops, "_generate", None)
    assert digest(listops.load(SMALL, tmp_path)) == digest(small)


def test_cache_folder_comes_from_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("ATTN_JAX_CACHE", str(tmp_path / "new" / "folder"))
    listops.load(SMALL)
    assert (tmp_path / "new" / "folder" / SMALL.cache_name).exists()


def test_every_argument_names_another_cache_file():
    changes = [{name: getattr(SMALL, name) + 1} for name in vars(SMALL) if name != "operator_p"]
    specs = [SMALL, *(replace(SMALL, **change) for change in changes), replace(SMALL, operator_p=0.3)]
    assert len({spec.cache_name for spec in specs}) == len(specs) == 1 + len(vars(SMALL))


def flip_a_token(path: Path, _):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def forge_a_token(path: Path, _):
    """A well-formed file whose own check sums agree with its contents, but not with the stored digest."""
    with np.load(path) as file:
        arrays = dict(file)
    arrays["labels"][0] ^= 1
    np.savez(path, **arrays)


def put_another_data_set(path: Path, tmp_path: Path):
    other = replace(SMALL, seed=1)
    listops.load(other, tmp_path / "other")
    os.replace(tmp_path / "other" / other.cache_name, path)


@pytest.mark.parametrize(
    "damage",
    [
        lambda path, _: path.write_bytes(b""),
        lambda path, _: path.write_bytes(b"not a zip file"),
        lambda path, _: path.write_bytes(path.read_bytes()[:-100]),
        flip_a_token,
        forge_a_token,
        put_another_data_set,
    ],
)
def test_damaged_cache_is_reported_once_and_replaced(small, damage, tmp_path):
    listops.load(SMALL, tmp_path)
    damage(tmp_path / SMALL.cache_name, tmp_path)
    with pytest.warns(RuntimeWarning, match="damaged") as warned:
        assert digest(listops.load(SMALL, tmp_path)) == digest(small)
    assert len(warned) == 1
    assert digest(listops.load(SMALL, tmp_path)) == digest(small)  # a warning would be an error here


def test_interrupted_write_leaves_nothing(tmp_path, monkeypatch):
    def interrupted(file, **_):
        file.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(np, "savez", interrupted)
    with pytest.raises(KeyboardInterrupt):
        listops.load(SMALL, tmp_path)
    assert not list(tmp_path.iterdir())


def test_writers_at_the_same_time_leave_one_good_file(small, tmp_path):
    results = []
    threads = [
        threading.Thread(target=lambda: results.append(digest(listops.load(SMALL, tmp_path)))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [digest(small)] * 4
    assert [path.name for path in tmp_path.iterdir()] == [SMALL.cache_name]


def test_cache_folder_that_cannot_be_written_fails_before_generating(tmp_path, monkeypatch):
    monkeypatch.setattr(listops, "_generate", None)
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"cannot write .*; set ATTN_JAX_CACHE to another folder"):
        listops.load(SMALL, tmp_path / "file")


# The published files


def test_text_is_left_nested_binary(small):
    words = ["[MAX", "2", "[MIN", "4", "7", "X", "0", "X"]
    tokens = [listops.VOCABULARY.index(word) + 1 for word in words]
    text = "( ( ( ( [MAX 2 ) ( ( ( [MIN 4 ) 7 ) ] ) ) 0 ) ] )"
    assert listops.to_text(np.array(tokens, np.uint8)) == text
    for index in range(len(small["val"])):
        tokens = small["val"][index]["tokens"]
        assert len(listops.to_text(tokens).split()) == 3 * len(tokens) - 2


@pytest.mark.parametrize("folder", ["", "listops-1000"])
def test_files_give_back_what_was_written(small, folder, tmp_path):
    listops.write_tsv(tmp_path / folder, small)
    assert (tmp_path / folder / "basic_train.tsv").read_bytes().startswith(b"Source\tTarget\r\n( ( ")
    read = listops.read_tsv(tmp_path)
    assert list(read) == list(listops.SPLITS)
    assert digest(read) == digest(small)


def write_splits(folder: Path, content: str) -> Path:
    for split in listops.SPLITS:
        (folder / f"basic_{split}.tsv").write_text(content)
    return folder


def test_reader_maps_unknown_words_and_truncates(tmp_path):
    folder = write_splits(tmp_path, "Source\tTarget\n( ( ( [FIRST 2 ) 10 ) ] )\t2\n7\t7\n")
    data = listops.read_tsv(folder)["test"]
    assert data[0]["tokens"].tolist() == [16, 8, 16, 5]
    assert data[1]["tokens"].tolist() == [13]
    assert data.labels.tolist() == [2, 7]
    assert listops.read_tsv(folder, max_length=3)["test"][0]["tokens"].tolist() == [16, 8, 16]


@pytest.mark.parametrize(
    "content, message",
    [
        ("", "basic_train.tsv:1: the header"),
        ("Source,Target\n7\t7\n", "basic_train.tsv:1: the header"),
        ("Source\tTarget\n", "no examples"),
        ("Source\tTarget\n7\t7\n( ( ( [MAX 2 ) 1", "basic_train.tsv:3: .*cut off"),
        ("Source\tTarget\n7\t7\n( ( ( [MAX 2 ) 1 ) ] )\t", "basic_train.tsv:3: the label"),
        ("Source\tTarget\n7\t7\n\t5\n", "basic_train.tsv:3: .*cut off"),
        ("Source\tTarget\n7\t10\n", "basic_train.tsv:2: the label"),
        ("Source\tTarget\n7\tx\n", "basic_train.tsv:2: the label"),
        ("Source\tTarget\n7\t-1\n", "basic_train.tsv:2: the label"),
        ("Source\tTarget\n7\t7\t7\n", "basic_train.tsv:2: the label"),
    ],
)
def test_malformed_files_are_named_with_the_line(content, message, tmp_path):
    with pytest.raises(DataError, match=message) as raised:
        listops.read_tsv(write_splits(tmp_path, content))
    assert "\n" not in str(raised.value)


def test_missing_files_are_named(tmp_path):
    with pytest.raises(DataError, match=r"no folder .*nowhere; it should hold basic_train.tsv"):
        listops.read_tsv(tmp_path / "nowhere")
    write_splits(tmp_path, "Source\tTarget\n7\t7\n")
    (tmp_path / "basic_val.tsv").unlink()
    with pytest.raises(DataError, match=r"cannot read .*basic_val.tsv: No such file"):
        listops.read_tsv(tmp_path)
