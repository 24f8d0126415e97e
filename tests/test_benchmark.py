"""`python -m eval.benchmark`: what it measures, what it refuses, and what it says about bad requests."""

import functools
import json
import sys
from argparse import Namespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attn_jax.engine import plan
from attn_jax.mechanisms import performer, standard
from eval import benchmark, peers
from eval.measure import difference, exponent, number, root_mean_square, table
from train import cli

SMALL = ["--dim", "4", "--heads", "1", "--repeats", "1"]

# Polynomial fits in float64.
ROUNDING = 1e-9


def outcome(capsys, *argv):
    """Exit code, standard output and standard error."""
    with pytest.raises(SystemExit) as exit:
        cli.run(benchmark.main, [str(argument) for argument in argv])
    captured = capsys.readouterr()
    return exit.value.code, captured.out, captured.err


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(benchmark, "CHECK_LENGTH", 20)
    monkeypatch.setattr(benchmark, "LADDER", ())


def test_a_run_leaves_tables_plots_and_what_they_are_about(tmp_path, capsys):
    out = tmp_path / "results"
    argv = ["--mechanisms", "performer", "--lengths", "32,16,9000000000", *SMALL, "--out", out]
    code, text, progress = outcome(capsys, *argv)
    assert code == 0, progress
    result = json.loads((out / "benchmark.json").read_text())
    *measured, too_long = [r for r in result["growth"] if r["pass"] == "forward+backward"]
    assert [r["length"] for r in measured] == [16, 32]
    assert all(r["status"] == "ok" and r["wall"] > 0 and r["cpu"] > 0 and r["temp_bytes"] > 0 for r in measured)
    assert too_long["status"].startswith("skipped: predicted") and too_long["status"] in text
    assert [r["length"] for r in result["approximation"]] == [n for n in (16, 32) for _ in benchmark.SCALES]
    assert all(r["relative_rms_error"] > 0 for r in result["approximation"])
    assert result["checks"]["performer"]["difference"] < benchmark.TOLERANCE["float32"]
    assert result["flags"]["dim"] == 4 and result["versions"]["jax"] == jax.__version__ and result["device"]
    assert (out / "benchmark.md").read_text() in text
    assert "performer" in text and "performer" in progress
    assert (out / "growth.png").read_bytes().startswith(b"\x89PNG")
    assert b"<svg" in (out / "growth.svg").read_bytes()
    assert {path.name for path in out.iterdir()} == {"benchmark.json", "benchmark.md", "growth.png", "growth.svg"}


STANDARD, FAVOR = standard.standard_attention, performer.favor_attention


def _gradient_forgotten(q, k, v, **options):
    dense = options["implementation"] == "dense"
    return STANDARD(q, k if dense else jax.lax.stop_gradient(k), v, **options)


def _not_a_number(q, k, v, **options):
    return STANDARD(q, k, v, **options) + (0 if options["implementation"] == "dense" else jnp.nan)


def _one_key_forgotten(q, k, v, projection, **options):
    return FAVOR(q, k, v, projection, **options | {"mask": (jnp.arange(k.shape[1]) > 0)[None]})


@pytest.mark.parametrize(
    "module, operation, wrong",
    [
        (standard, "standard_attention", _gradient_forgotten),
        (standard, "standard_attention", _not_a_number),
        (performer, "favor_attention", _one_key_forgotten),  # has no dense version but dense weights
    ],
)
def test_a_mechanism_that_differs_from_its_dense_version_fails_the_check(monkeypatch, module, operation, wrong):
    args = Namespace(dim=4, heads=1, causal=False, dtype="float32")
    monkeypatch.setattr(module, operation, wrong)
    name = module.__name__.rpartition(".")[-1]
    assert not benchmark.check(name, args) <= benchmark.TOLERANCE["float32"]


def test_a_mechanism_that_fails_the_check_is_not_timed(tmp_path, capsys, monkeypatch):
    errors = {"standard": 1.0, "local": float("nan")}
    monkeypatch.setattr(benchmark, "check", lambda name, args: errors[name])
    argv = ["--mechanisms", "standard,local", "--lengths", "16", *SMALL, "--out", tmp_path]
    code, text, messages = outcome(capsys, *argv)
    assert code == 1
    assert text.count("refused") == 2 and messages.splitlines()[-1].startswith("error: refused")
    assert json.loads((tmp_path / "benchmark.json").read_text())["growth"] == []


@pytest.mark.parametrize("power", [1.0, 1.5, 2.0])
def test_growth_of_a_power_law_is_its_exponent(power):
    law = {n: 3e-7 * n**power for n in (100, 300, 1700)}
    assert exponent(law) == pytest.approx(power, abs=ROUNDING)
    assert exponent(law | {50: 0}) == pytest.approx(power, abs=ROUNDING)  # nothing allocated is no growth
    assert benchmark.predict(law, 5000) == pytest.approx(3e-7 * 5000**power, rel=ROUNDING)
    assert exponent({100: 1.0}) is None
    assert benchmark.predict({}, 100) == 0 and benchmark.predict({100: 1.0}, 300) == pytest.approx(9)


def test_difference_is_relative_to_each_array_but_not_to_rounding():
    big, small = np.full(3, 100.0), np.full(2, 1.0)
    assert difference((big, small), (big, small)) == 0
    assert difference((big, 1.5 * small), (big, small)) == pytest.approx(0.5)
    assert difference((big, small * 1e-9), (big, small * 0)) < 1e-7
    assert np.isnan(difference((big, small * np.nan), (big, small)))
    one_of_two = small + np.array([0.3, 0])
    assert difference((big, one_of_two), (big, small), root_mean_square) == pytest.approx(0.3 / np.sqrt(2))


@pytest.mark.parametrize(
    "argv, expected",
    [
        (["--mechanisms", "nope"], "unknown mechanism 'nope'; registered: "),
        (["--lengths", "64,-1"], "positive integers"),
        (["--heads", "3"], "multiple of `num_heads`"),
        (["--repeats", "0"], "--repeats"),
        (["--peers", "--dtype", "bfloat16"], "float32"),
        (["--nope"], "--nope"),
    ],
)
def test_a_request_that_cannot_be_honoured(capsys, tmp_path, argv, expected):
    code, _, error = outcome(capsys, *argv, "--out", tmp_path / "results")
    assert code == 2
    assert error.count("\n") == 1 and expected in error
    assert not (tmp_path / "results").exists()


def test_an_output_folder_that_cannot_be_made(capsys, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    code, _, error = outcome(capsys, "--mechanisms", "standard", *SMALL, "--out", tmp_path / "file")
    assert code == 2 and error.count("\n") == 1 and "file" in error


def request_peers(monkeypatch, peer, threads=1, length=16, causal=True):
    monkeypatch.setattr(peers, "PEERS", [entry for entry in peers.PEERS if entry[1] == peer])
    names = [entry[0] for entry in peers.PEERS]
    args = Namespace(mechanisms=names, lengths=[length], causal=causal, dim=4, heads=2, repeats=2, budget=1.0)
    return list(peers.compare(args, threads))


def test_peers_are_timed_beside_ours(monkeypatch):
    records = request_peers(monkeypatch, "jax.nn", threads=2)
    assert [r["pass"] for r in records] == ["forward", "forward+backward"]
    for r in records:
        assert r["status"] == "ok" and r["difference"] <= peers.TOLERANCE and r["peer_temp_bytes"] > 0
        for setting in ("one_core", "all_cores"):
            assert r[setting]["rounds"] == 2 and r[setting]["ratio"] > 0


def replace_attention(monkeypatch, ours, theirs):
    monkeypatch.setattr(peers.ops, "standard_attention", lambda q, k, v, causal: ours(v))
    monkeypatch.setattr(jax.nn, "dot_product_attention", lambda q, k, v, is_causal: theirs(v))


def test_products_alone_are_timed_where_they_are_those_of_whole_tiles(monkeypatch):
    replace_attention(monkeypatch, jnp.sin, jnp.sin)  # compiles fast
    forward, both = request_peers(monkeypatch, "jax.nn", length=peers.WHOLE_TILES, causal=False)
    assert forward["products"]["ratio"] > 0 and peers.row(forward)["products alone, ratio"]
    assert "products" not in both
    for length, causal in ((peers.WHOLE_TILES + 1, False), (peers.WHOLE_TILES, True)):
        records = request_peers(monkeypatch, "jax.nn", length=length, causal=causal)
        assert all("products" not in r for r in records)


def test_products_alone_are_those_of_attention_and_of_its_features():
    length, (w,) = 2 * peers.WHOLE_TILES, peers._normal(1, (24, 8))
    arrays = peers._normal(0, *[(1, length, 2, 8)] * 3)
    q, k, v = (x[0].swapaxes(0, 1) for x in arrays)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-2)  # sums of 1024 terms of order 10
    close(peers._attention_products(*arrays).reshape(q.shape), q @ k.swapaxes(1, 2) @ v)
    close(
        peers._favor_products(w, *arrays).swapaxes(2, 3).reshape(q.shape),
        q @ w.T @ ((k @ w.T).swapaxes(1, 2) @ v),
    )
    # In a window, what the tile of a query in the middle reads.
    left = right = peers.WINDOW
    tile, seen = plan.tiles(left, right)[0]
    windows = peers._attention_products(*arrays, left=left, right=right).reshape(q.shape)
    rows = slice(4 * tile, 5 * tile)
    keys = slice(4 * tile - left, 4 * tile - left + seen)
    close(windows[:, rows], q[:, rows] @ k[:, keys].swapaxes(1, 2) @ v[:, keys])


def test_no_ratio_where_the_results_differ(monkeypatch):
    replace_attention(monkeypatch, jnp.sin, jnp.cos)
    records = request_peers(monkeypatch, "jax.nn")
    assert all(r["status"].startswith("refused") and "one_core" not in r for r in records)


def test_a_peer_that_is_not_installed_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "local_attention", None)
    (record,) = request_peers(monkeypatch, "local-attention")
    assert "pip install -e '.[peers]'" in peers.row(record)["status"]


def test_tables_are_aligned_and_numbers_have_three_digits():
    lines = table([{"a": "1", "long name": "x"}, {"a": "22"}]).splitlines()
    assert len({len(line) for line in lines}) == 1 and lines[1] == "| -- | --------- |"
    assert [number(x) for x in (0.01234, 1.0, 99.96, 12345.0, 0)] == ["0.0123", "1.00", "100", "12,300", "0"]
