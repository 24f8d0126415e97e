"""Retrieval: the reader of BEIR's layout on awkward files, the first stage, and the lists that a reranker sees."""

import json
import shutil
import sysconfig
from pathlib import Path

import jax
import numpy as np
import pytest
import pytrec_eval

import eval.__main__
import train.__main__
from attn_jax import metrics
from tests.runs import Stopping, assert_bit_equal, final_state, one_program, outcome
from tests.test_train_cli import complaint
from train import cli, loop, pretrained, sharding, tasks
from train import config as configs
from train.checkpoints import best_arrays
from train.data import DataError, beir, bpe, corpora, retrieval
from train.data.batches import plan_batches, plan_iterator
from train.data.pairs import Lengths, RankedLists
from train.data.retrieval import Collection
from train.evaluation import Measured
from train.state import initial_train_state
from train.tasks.rerank import Rerank

CUTOFFS = ("ndcg@10", "mrr@10", "hit@1")


# Metrics.

WIDTH = 30
ranking = jax.jit(metrics.ranking)


def trec_eval(scores, grades, names, missing):
    """The three metrics of one query by trec_eval; `missing` are grades of documents that were not found."""
    qrel = {"q": {name: int(g) for name, g in zip(names, grades)} | {f"m{i}": g for i, g in enumerate(missing)}}
    run = {"q": {name: float(s) for name, s in zip(names, scores)}}
    found = pytrec_eval.RelevanceEvaluator(qrel, {"ndcg_cut.10", "recip_rank", "P.1"}).evaluate(run)["q"]
    reciprocal = found["recip_rank"] if found["recip_rank"] >= 0.1 else 0.0
    return found["ndcg_cut_10"], reciprocal, found["P_1"]


@pytest.mark.parametrize("seed", range(20))
def test_rankings_are_measured_as_trec_eval_does(seed):
    """With ties, grades above 1, documents that were not found, and padding that holds anything."""
    random = np.random.default_rng(seed)
    count = int(random.integers(1, WIDTH + 1))
    names = sorted((f"{n:03}" for n in random.permutation(1000)[:count]), reverse=True)
    scores = random.integers(0, 6, count).astype(np.float32)  # many ties
    grades = random.integers(0, 4, count) * (random.random(count) < 0.3)
    missing = random.integers(1, 4, int(random.integers(1, 4))).tolist()
    ideal = np.zeros((1, 10), int)
    best = sorted([*grades[grades > 0].tolist(), *missing], reverse=True)[:10]
    ideal[0, : len(best)] = best
    pad = (0, WIDTH - count)
    found = ranking(
        np.pad(scores, pad, constant_values=[np.nan, np.inf][seed % 2])[None],
        np.pad(grades, pad, constant_values=3)[None],
        ideal,
        (np.arange(WIDTH) < count)[None],
    )
    expected = trec_eval(scores, grades, names, missing)
    np.testing.assert_allclose([found[name][0] for name in CUTOFFS], expected, atol=1e-6)  # float32 sums of ten


def test_a_query_without_candidates_counts_zero():
    scores, ideal = np.ones((1, WIDTH), np.float32), np.eye(1, 10, dtype=int)
    found = ranking(scores, np.ones((1, WIDTH), int), ideal, np.zeros((1, WIDTH), bool))
    assert [float(found[name][0]) for name in CUTOFFS] == [0, 0, 0]


# BEIR's layout.


def lines(*records):
    return "".join(json.dumps(record) + "\n" for record in records)


FILES = {
    "corpus.jsonl": lines(
        {"_id": "001", "title": "", "text": "a red fox"},
        {"_id": "1", "title": "Whales", "text": "blue whales sing"},
        {"_id": "1", "title": "Whales", "text": "blue whales sing"},
        {"_id": "2", "title": None, "text": "green frogs sing"},
    ),
    "queries.jsonl": lines(
        {"_id": "q1", "text": "red fox"},
        {"_id": "q2", "text": "whales"},
        {"_id": "q3", "text": "frogs"},
        {"_id": "q4", "text": "not judged"},
    ),
    "qrels/train.tsv": "query-id\tcorpus-id\tscore\r\nq1\t001\t1\r\nq1\tgone\t2\r\nq2\t1\t1\r\n",
    "qrels/test.tsv": "query-id\tcorpus-id\tscore\nq3\t2\t1\nq3\t1\t0\n",
}


def write(folder, **changes):
    """`FILES` below `folder`; `changes` replace their contents, by name without its ending."""
    for name, content in FILES.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(changes.get(path.stem, content).encode())
    return folder


def test_ids_stay_strings_and_awkward_lines_are_read(tmp_path, caplog):
    splits = beir.read(write(tmp_path))
    train, val, test = (splits[name] for name in ("train", "val", "test"))
    assert dict(train.documents) == {"001": "a red fox", "1": "Whales\nblue whales sing", "2": "green frogs sing"}
    assert {**train.queries, **val.queries} == {"q1": "red fox", "q2": "whales"} and len(val.queries) == 1
    assert test.queries == {"q3": "frogs"} and test.relevance["q3"] == {"2": 1, "1": 0}
    assert train.relevance["q1"] == {"001": 1, "gone": 2}  # counts in the ideal ranking
    assert "judges 1 documents that are not in the corpus, such as gone" in caplog.text


def test_dev_is_the_validation_where_there_is_one(tmp_path):
    write(tmp_path)
    (tmp_path / "qrels" / "dev.tsv").write_text("q3\t2\t1\n")  # no head
    splits = beir.read(tmp_path)
    assert set(splits["val"].queries) == {"q3"} and set(splits["train"].queries) == {"q1", "q2"}


def test_a_test_only_data_set_is_trained_on_another(tmp_path):
    write(tmp_path / "a"), write(tmp_path / "b")
    (tmp_path / "b" / "qrels" / "train.tsv").unlink()
    with pytest.raises(DataError, match=r"no qrels/train.tsv to train on; give .* task.train_dir"):
        beir.read(tmp_path / "b")
    assert set(beir.read(tmp_path / "b", tmp_path / "a")) == {"train", "val", "test"}


@pytest.mark.parametrize(
    "changes, expected",
    [
        ({"corpus": FILES["corpus.jsonl"][:-9]}, "corpus.jsonl, line 4 is not JSON, as if cut off"),
        ({"corpus": lines({"id": "1"})}, "line 1 has no `_id`"),
        ({"corpus": FILES["corpus.jsonl"] + lines({"_id": "2", "text": "other"})}, "the id 2 is there before"),
        ({"train": "q1\t001\n"}, "train.tsv, line 1: expected query-id, corpus-id and an integer score"),
        ({"train": "q1\t001\tx\n"}, "train.tsv, line 1: expected"),
        ({"train": "q9\t001\t1\n"}, "query q9 and 0 more are not in"),
        ({"test": "q3\t2\t0\n"}, "test.tsv judges no document as relevant"),
        ({"train": "q1\t001\t1\n"}, "judges one query, too few"),
    ],
)
def test_what_is_wrong_with_a_file_is_said(tmp_path, changes, expected):
    with pytest.raises(DataError, match=expected):
        beir.read(write(tmp_path, **changes))


def test_missing_files_say_where_to_get_them(tmp_path):
    write(tmp_path)
    (tmp_path / "corpus.jsonl").unlink()
    with pytest.raises(DataError, match=r"no .*corpus.jsonl; BEIR's data sets are linked at"):
        beir.read(tmp_path)


# The first stage.

COLLECTION = Collection(
    {"a": "red fox", "b": "red fox", "c": "red red whale", "d": "green frog", "e": ""},
    {"q": "red fox", "none": "unheard of", "empty": ""},
    {"q": {"a": 2, "d": 1}, "none": {"a": 1}, "empty": {"a": 1}},
)


def test_bm25_finds_words_and_orders_ties_as_trec_eval(tmp_path):
    found = retrieval.bm25(COLLECTION, 4, tmp_path)
    # Both foxes score alike: the larger id first. A document without a word of the query is not found.
    assert found.documents.tolist() == [[1, 0, 2, -1], [-1] * 4, [-1] * 4]
    first, second, third, none = found.scores[0]
    assert first == second > third > none == 0
    again = retrieval.bm25(COLLECTION, 4, tmp_path)
    np.testing.assert_array_equal(again.documents, found.documents)
    assert len(list(tmp_path.iterdir())) == 1
    assert retrieval.bm25(COLLECTION.only(["q"]), 4, tmp_path).documents.tolist() == [[1, 0, 2, -1]]
    assert len(list(tmp_path.iterdir())) == 2


def test_bm25_is_its_formula(tmp_path):
    """Lucene's: sum over words of log(1 + (N - n + .5) / (n + .5)) tf / (tf + k1 (1 - b + b |d| / mean |d|))."""
    words = [text.split() for text in COLLECTION.documents.values()]
    mean = np.mean([len(w) for w in words])

    def score(document):
        total = 0.0
        for word in ("red", "fox"):
            n, tf = sum(word in w for w in words), document.count(word)
            total += np.log(1 + (5 - n + 0.5) / (n + 0.5)) * tf / (tf + 0.9 * (0.6 + 0.4 * len(document) / mean))
        return total

    found = retrieval.bm25(COLLECTION, 3, tmp_path)
    np.testing.assert_allclose(found.scores[0], [score(words[i]) for i in (1, 0, 2)], rtol=1e-5)


# What a reranker sees.


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return bpe.train(list(COLLECTION.documents.values()) * 4, 300, tmp_path_factory.mktemp("cache"))


def ranked(tokenizer, tmp_path, num_candidates=None, lengths=None, seed=0):
    lengths = lengths or Lengths(8, 24, (12, 24))
    first = retrieval.bm25(COLLECTION, 4, tmp_path)
    return RankedLists(COLLECTION, first, tokenizer, lengths, num_candidates, seed=seed)


def test_a_pair_is_query_and_document_and_is_cut_at_the_end(tokenizer, tmp_path):
    lists = ranked(tokenizer, tmp_path)
    pair = lists.pair(0, 2)
    assert pair[0] == bpe.CLS_ID and pair[-1] == bpe.SEP_ID and pair.count(bpe.SEP_ID) == 2
    middle = pair.index(bpe.SEP_ID)
    assert tokenizer.decode(pair[1:middle]).strip() == "red fox"
    assert tokenizer.decode(pair[middle + 1 : -1]).strip() == "red red whale"
    short = ranked(tokenizer, tmp_path, lengths=Lengths(2, 6, (6,)))
    assert len(short.pair(0, 2)) == 6 and short.pair(0, 2)[-1] == bpe.SEP_ID


def test_evaluation_holds_every_judged_query_and_all_that_was_found(tokenizer, tmp_path):
    (batch,) = plan_batches(ranked(tokenizer, tmp_path), batch_size=4)
    assert batch["example_mask"].tolist() == [True, True, True, False]
    assert batch["candidate_mask"].sum(1).tolist() == [3, 0, 0, 0]
    assert batch["grades"][0].tolist() == [0, 0, 2, 0]  # c, b, a: later ids first
    assert batch["first_stage"][0].argmax() in (1, 2)
    assert batch["ideal"][:, :3].tolist() == [[2, 1, 0], [1, 0, 0], [1, 0, 0], [0, 0, 0]]
    assert (batch["mask"] == (batch["tokens"] > 0)).all()  # no text holds padding
    assert batch["tokens"].shape == (4, 4, 12)


def test_training_lists_have_a_relevant_document_first_and_no_other(tokenizer, tmp_path):
    lists = ranked(tokenizer, tmp_path, num_candidates=3)
    iterator = plan_iterator(lists, batch_size=3, seed=0)
    seen = set()
    for _ in range(20):
        batch = next(iterator)
        assert (batch["grades"][:, 0] > 0).all() and not batch["grades"][:, 1:].any()
        assert batch["candidate_mask"].all()
        seen.add(batch["tokens"].tobytes())
    assert len(seen) > 5  # drawn anew


def test_training_lists_are_a_function_of_seed_and_step(tokenizer, tmp_path):
    def batches(skip, seed=0):
        iterator = plan_iterator(ranked(tokenizer, tmp_path, 3, seed=seed), batch_size=2, seed=seed)
        if skip:
            state = plan_iterator(ranked(tokenizer, tmp_path, 3), batch_size=2, seed=seed)
            for _ in range(skip):
                next(state)
            iterator.set_state(state.get_state())
        return [next(iterator)["tokens"].tobytes() for _ in range(6 - skip)]

    assert batches(0)[2:] == batches(2) and batches(0) != batches(0, seed=1)


def test_lengths_that_do_not_fit_are_said():
    with pytest.raises(ValueError, match="no room for a query of 8"):
        Lengths(8, 10, (10,))
    with pytest.raises(ValueError, match=r"task.buckets must reach task.max_length 16, got \(8,\)"):
        Lengths(8, 16, (8,))


# Text that is there.


def test_docstrings_are_read_once_split_by_module_and_do_not_tell_their_query(tmp_path, monkeypatch):
    monkeypatch.setenv("ATTN_JAX_CACHE", str(tmp_path / "cache"))
    library = Path(sysconfig.get_paths()["stdlib"])
    for name in ("asyncio", "email", "http", "logging", "unittest"):  # some of each split
        shutil.copytree(library / name, tmp_path / "library" / name)
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path / "library")})
    splits = corpora.docstrings()
    monkeypatch.setattr(corpora, "_documented", None)  # not needed any more
    assert {n: vars(s) for n, s in corpora.docstrings().items()} == {n: vars(s) for n, s in splits.items()}
    modules = {split: {name.split(".")[0] for name in found.queries} for split, found in splits.items()}
    assert not (
        modules["train"] & modules["val"] or modules["train"] & modules["test"] or modules["val"] & modules["test"]
    )
    for found in splits.values():
        assert len(found.queries) > 100 and set(found.queries) == set(found.documents)
        assert sum(query in found.documents[name] for name, query in found.queries.items()) < 0.02 * len(
            found.queries
        )


# From the command line to the run file.

CONFIG = "configs/retrieval_rerank.py"
SMALL = {
    "task.vocab_size": 300,
    "task.num_candidates": 6,
    "task.num_val": 4,
    "task.num_test": 0,
    "model.dim": 8,
    "model.num_heads": 2,
    "model.dropout": 0.1,
    "steps": 2,
    "eval_every": 2,
    "mesh.data": 1,
}
TEXTS = [" ".join(words) for words in np.random.default_rng(0).choice([f"w{i}" for i in range(12)], (31, 6))]
TEST = "".join(f"q{i}\t{i:02}\t1\nq{i}\t{i - 1:02}\t2\n" for i in range(20, 31))


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """A folder in BEIR's layout, of a few invented texts."""
    corpus = lines(*({"_id": f"{i:02}", "text": text} for i, text in enumerate(TEXTS)))
    queries = lines(*({"_id": f"q{i}", "text": " ".join(text.split()[:2])} for i, text in enumerate(TEXTS)))
    train = "".join(f"q{i}\t{i:02}\t{1 + i % 2}\n" for i in range(20))
    return write(tmp_path_factory.mktemp("words"), corpus=corpus, queries=queries, train=train, test=TEST)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ATTN_JAX_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def flags(words, settings):
    return [f"--config.{key}={value}" for key, value in ({"task.source": words} | SMALL | settings).items()]


@pytest.fixture(scope="module")
def trained(words, cache, tmp_path_factory):
    """Work directory of a finished run of standard attention, and what it said."""
    folder = tmp_path_factory.mktemp("earlier") / "run"
    code, out, error = outcome(
        train.__main__.main, "--config", f"{CONFIG}:smoke", *flags(words, {}), "--workdir", folder
    )
    assert code == 0, error
    return folder, out


@pytest.fixture
def earlier(trained):
    return trained[0]


def test_a_reranker_is_trained_and_its_run_file_has_its_metrics(trained):
    folder, out = trained
    assert "perfect order of its candidates" in out
    code, _, error = outcome(eval.__main__.main, "--workdir", folder)
    assert code == 0, error
    found = json.loads((folder / "eval_test.json").read_text())["metrics"]
    qrel, run = {}, {}
    for query, document, grade in (line.split() for line in TEST.splitlines()):
        qrel.setdefault(query, {})[document] = int(grade)
    for query, _, document, _, score, _ in map(str.split, (folder / "run_test.trec").read_text().splitlines()):
        run.setdefault(query, {})[document] = float(score)
    by_query = pytrec_eval.RelevanceEvaluator(qrel, {"ndcg_cut.10", "P.1"}).evaluate(run)
    for name, theirs in (("ndcg@10", "ndcg_cut_10"), ("hit@1", "P_1")):
        expected = sum(scores[theirs] for scores in by_query.values()) / len(qrel)  # those not found count 0
        assert found[name] == pytest.approx(expected, abs=1e-5)  # scores have six digits there


def test_sources_that_are_not_there_are_said(capsys, tmp_path):
    config = ["--config", f"{CONFIG}:smoke", "--workdir", tmp_path / "run"]
    said = complaint(capsys, *config, "--config.task.source=nowhere")
    assert "task.source `nowhere` is neither one of docstrings, news nor a folder" in said
    assert "no room for a query" in complaint(capsys, *config, "--config.task.max_query_length=100")


# Runs that go on.


def reranker_config(words, variant="smoke", **settings):
    return configs.load(f"{CONFIG}:{variant}", flags(words, settings))


def test_a_stopped_run_of_grpo_goes_on_to_the_bit(words, cache, tmp_path, monkeypatch):
    router = {"task.router.method": "grpo", "task.router.entropy_weight": 0.1, "task.router.group": 2}
    small = {"mechanism.depth": 2, "model.dropout": 0, "steps": 3, "eval_every": 3}
    config = reranker_config(words, "smoke,maw", **router, **small)
    usual = Rerank.train_iterator
    one_program(monkeypatch)
    loop.train(config, tmp_path / "whole")
    with monkeypatch.context() as patch, pytest.raises(cli.Interrupted, match="saved step 2"):
        patch.setattr(Rerank, "train_iterator", lambda self, seed: Stopping(usual(self, seed), 2))
        loop.train(config, tmp_path / "stopped")
    loop.train(config, tmp_path / "stopped")
    (_, ours, *ended), (_, theirs, *expected) = (final_state(config, tmp_path / n) for n in ("stopped", "whole"))
    assert_bit_equal(ours, theirs)
    assert ended[1] == expected[1] and ended[0]["history"] == expected[0]["history"]
    noise = [leaf for path, leaf in flat(ours.model.rest).items() if "noise" in path and "count" in path]
    assert noise and all(noise), "the routers drew depths"


def flat(tree):
    """Leaves by path; a file has the index of a list as text."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {"/".join(str(getattr(key, "key", key)) for key in path): leaf for path, leaf in leaves}


def program_of(config):
    """The task, and what is trained."""
    task = tasks.prepare(config)
    with sharding.activate(config) as mesh:
        return task, loop.Program.of(config, task, mesh)


def test_a_start_from_another_mechanism_takes_what_they_share(words, earlier, caplog):
    caplog.set_level("INFO", "train")
    config = reranker_config(words, "smoke,maw", **{"task.pretrained": earlier, "mechanism.depth": 2})
    task, program = program_of(config)
    assert task.pretrained == earlier
    with sharding.activate(config):
        first = initial_train_state(task, program.optimizer, config.seed, program.abstract)
        state = pretrained.start(first, earlier)
    ours, theirs = flat(state.model.params), flat(best_arrays(earlier))
    fresh, taken = flat(first.model.params), 0
    for path, leaf in ours.items():
        new = any(name in path for name in ("router", "down", "up"))
        np.testing.assert_array_equal(leaf, fresh[path] if new else theirs[path], err_msg=path)
        taken += not new
    assert taken == len(flat(program_of(reranker_config(words))[1].abstract.model.params))
    assert f"{taken} arrays from the best model in {earlier}; fresh: attention.key.down" in caplog.text


def test_what_is_frozen_stays_and_the_mechanism_and_the_head_learn(words, earlier, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "evaluate", lambda *arguments: Measured({"ndcg@10": 0.5}, {}))
    config = reranker_config(words, **{"task.pretrained": earlier, "task.frozen": True})
    result = loop.train(config, tmp_path / "run")
    theirs = flat(best_arrays(earlier))
    _, state, *_ = final_state(config, tmp_path / "run")
    learnt, rest = flat(state.model.params), flat(state.model.rest)
    assert all(("attention/" in path or "head_" in path) for path in learnt)
    assert all(any(part in path for path in learnt) for part in ("attention/", "head_"))
    assert sum(leaf.size for leaf in learnt.values()) == result["parameters"]
    kept = {path: leaf for path, leaf in rest.items() if path in theirs and leaf.dtype == np.float32}
    assert set(learnt) | set(kept) == {path for path, leaf in theirs.items() if leaf.dtype == np.float32}
    for path, leaf in kept.items():
        np.testing.assert_array_equal(leaf, theirs[path], err_msg=path)
    assert any((leaf != theirs[path]).any() for path, leaf in learnt.items())


@pytest.mark.parametrize(
    "settings, complaint",
    [
        (
            {"model.dim": 16},
            r"is another one: encoder.embed.embedding of shape \(300, 16\) is of shape \(300, 8\)",
        ),
        (
            {"model.num_layers": 2},
            r"encoder.transformer.blocks.1.\S+ of shape \S+ is missing there; start from a run",
        ),
        ({"task.vocab_size": 310}, "task.vocab_size must be that of the run in task.pretrained, 300"),
        ({"task.pretrained": "nowhere"}, "no config.json in nowhere: no run there"),
        ({"task.pretrained": "", "task.frozen": True}, "task.frozen keeps what task.pretrained brings"),
    ],
)
def test_a_start_that_does_not_fit_is_said(words, earlier, tmp_path, monkeypatch, settings, complaint):
    # Shapes are enough to refuse.
    monkeypatch.setattr(loop.state, "initial_train_state", lambda task, optimizer, seed, abstract: abstract)
    config = reranker_config(words, **({"task.pretrained": earlier} | settings))
    with pytest.raises(cli.UsageError, match=complaint):
        loop.train(config, tmp_path / "run")


def test_types_tell_which_tokens_query_and_document_share(tokenizer, tmp_path):
    (batch,) = plan_batches(ranked(tokenizer, tmp_path), batch_size=4)
    tokens, types = batch["tokens"][0, 2], batch["types"][0, 2]  # "red fox" and "red fox"
    first, second = np.flatnonzero(tokens == bpe.SEP_ID)
    assert types[1:first].tolist() == [2] * (first - 1) and types[first + 1 : second].tolist() == [4] * (first - 1)
    assert not types[[0, first, second]].any() and not types[second:].any()
    other = batch["types"][0, 0]  # "red fox" and "red red whale"
    assert set(other.tolist()) == {0, 1, 2, 3, 4} and (batch["types"][1:] == 0).all()


@pytest.mark.parametrize("num_hard", [None, 0, 2])
def test_of_the_hard_candidates_there_are_as_many_as_asked_for(tokenizer, tmp_path, num_hard):
    documents = {f"{word}{i}": word for word in ("fox", "frog") for i in range(8)}
    collection = Collection(documents, {"a": "fox", "b": "frog"}, {"a": {"fox0": 1}, "b": {"frog0": 1}})
    first = retrieval.bm25(collection, 8, tmp_path)
    lists = RankedLists(collection, first, tokenizer, Lengths(8, 24, (24,)), 6, num_hard)
    found = np.array([(lists.candidates(0, step) < 8).sum() - 1 for step in range(50)])
    if num_hard is None:
        assert (found == 5).all()
    else:
        assert found.min() >= num_hard and found.std() > 0 and found.mean() < 5
