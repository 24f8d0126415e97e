"""Slot-based video from the command line to the picture, and what its metrics mean."""

import functools
import io
import json
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from flax import nnx
from PIL import Image

import eval.__main__
import train.__main__
from attn_jax.models import SlotBasedVideoModel
from attn_jax.models.slots import SlotVideoOutput
from eval import illustrations
from tests.movies import encoded, movie, write
from tests.runs import Stopping, assert_bit_equal, final_state, one_program, outcome
from train import config as configs
from train import evaluation, loop, tasks
from train.data import Clips
from train.tasks import video as video_task
from train.workdir import read_metrics

CONFIG = "configs/video_slots.py"
SIDE, TIME = 8, 4
SMALL = {
    "mesh.data": 1,
    "optimizer.clip_norm": 0.0,  # less to compile
    "steps": 4,
    "eval_every": 4,
    "batch_size": 4,
    "eval_batch_size": 2,  # of three clips: the second batch has a dummy
    "task.num_frames": TIME,
    "task.height": SIDE,
    "task.width": SIDE,
    "task.sprites.num_train": 6,
    "task.sprites.num_val": 3,
    "task.sprites.num_test": 3,
    "model.dim": 8,
    "model.num_heads": 2,
    "model.num_slots": 3,
    "model.token_layers": 0,  # less to compile
}
RECURRENT = {"model.competition": "slots", "model.initial": "sampled", "model.recurrent": True}
FAST = {"model.num_iterations": 1}  # less to compile


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("ATTN_JAX_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


def flags(settings):
    return [f"--config.{key}={value}" for key, value in settings.items()]


def command(workdir, settings, variant="smoke"):
    return ["--config", f"{CONFIG}:{variant}", "--workdir", workdir, *flags(SMALL | settings)]


def trained(workdir, settings, variant="smoke"):
    """What a run ends with."""
    code, out, error = outcome(train.__main__.main, *command(workdir, settings, variant))
    assert code == 0, error
    assert "NOT comparable" in out.splitlines()[0]
    return json.loads((workdir / "result.json").read_text())


def evaluated(workdir, result):
    """Evaluates a run that ended with `result`; returns what was printed."""
    code, out, error = outcome(eval.__main__.main, "--workdir", workdir)
    assert code == 0, error
    written = json.loads((workdir / "eval_test.json").read_text())
    assert written["metrics"] == result["test"] and written["baselines"] == result["baselines"]
    with Image.open(workdir / "video_test.png") as picture, Image.open(workdir / "video_test.gif") as film:
        assert picture.format == "PNG" and film.n_frames == TIME
    return out


def test_clips_of_frames_seen_alone(tmp_path):
    result = trained(tmp_path, {}, "dual_kv,smoke")  # so that it trains the next test's program
    test = result["test"]
    assert {"mse", "psnr", "slots_used", "ari", "fg_ari", "video_fg_ari"} <= test.keys()
    assert not {"next_mse", "predicted_mse"} & test.keys()
    assert 1 <= test["slots_used"] <= 3
    assert result["primary"] == "mse" and set(result["baselines"]) == {"mean frame", "mean colour"}
    examples = json.loads((tmp_path / "test_examples.json").read_text())
    assert {len(values) for values in examples.values()} == {3}


def test_two_streams_on_real_video(tmp_path):
    write(tmp_path / "videos", height=SIDE, width=SIDE)
    settings = {"task.source": tmp_path / "videos", "task.clips.stride": 1}
    result = trained(tmp_path / "run", settings, "dual_kv,smoke")
    out = evaluated(tmp_path / "run", result)
    assert f"{result['test']['mse']:.4f}" in out and f"{result['baselines']['mean colour']:.4f}" in out
    assert any(name.endswith("second_stream_share") for name in result["test"])
    assert "ari" not in result["test"], "nobody knows the objects"

    config = configs.load(f"{CONFIG}:dual_kv,smoke", flags(SMALL | settings))
    with evaluation.restored(config, tmp_path / "run") as run:
        model, batch = run.module(), next(iter(run.task.eval_batches("test")))
        attention = model.decoder.blocks[-1].attention
        attention.stream_bias[...] = attention.stream_bias[...].at[1].set(50.0)  # the second wins
        panels = illustrations.video_panels(model, run.task, batch)
    red, _, blue = np.moveaxis(panels[illustrations.SECOND_STREAM].astype(int), -1, 0)
    assert (red > blue).all()


def test_a_recurrent_run_predicts_and_goes_on_after_an_interruption_as_if_there_was_none(tmp_path, monkeypatch):
    one_program(monkeypatch)
    monkeypatch.setattr(evaluation, "make_eval_step", loop.make_eval_step)
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    settings = RECURRENT | FAST
    result = trained(whole, settings)
    evaluated(whole, result)  # samples its slots, too
    config = configs.load(f"{CONFIG}:smoke", flags(SMALL | settings))
    task, theirs, progress, position = final_state(config, whole)
    frames = task.data["test"].frames / 255
    repeated = np.mean((frames[:, 1:2] - frames[:, 2:]) ** 2)
    np.testing.assert_allclose(result["test"]["repeated_mse"], repeated, rtol=1e-5)  # float32
    steps = [result["test"][f"predicted_mse/{step}"] for step in (1, 2)]
    np.testing.assert_allclose(result["test"]["predicted_mse"], np.mean(steps), rtol=1e-5)

    with monkeypatch.context() as patched:
        endless = video_task.SlotVideo.train_iterator
        patched.setattr(video_task.SlotVideo, "train_iterator", lambda *a: Stopping(endless(*a), at=3))
        code, _, error = outcome(train.__main__.main, *command(stopped, settings))
    assert code == 128 + signal.SIGTERM and "saved step 3" in error
    assert not (stopped / "result.json").exists()
    code, out, error = outcome(train.__main__.main, *command(stopped, settings))
    assert code == 0 and "resuming after step 3" in out, error
    _, ours, our_progress, our_position = final_state(config, stopped)
    assert_bit_equal(ours, theirs)
    assert int(ours.model.rest["encoder"]["random"]["count"]) > 1, "the randomness goes on, too"
    assert (our_progress["history"], our_position) == (progress["history"], position)
    assert read_metrics(stopped / "metrics.jsonl") == read_metrics(whole / "metrics.jsonl")
    assert json.loads((stopped / "result.json").read_text())["test"] == result["test"]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"task.source": "/nowhere"}, "no file or folder /nowhere"),
        ({"task.source": "nobody/nothing"}, "hub cannot be reached"),
        ({"task.source": "videos", "task.clips.fractions": "(1,1,1)"}, "three shares (train, val, test) of sum 1"),
        (RECURRENT | {"task.predict_frames": 0}, "task.predict_frames"),
        (RECURRENT | {"task.predict_frames": TIME}, "task.predict_frames"),
        ({"model.patch_size": 3}, "`patch_size` 3 must divide height 8 and width 8"),
        ({"model.competition": "nope"}, "`competition` must be"),
        ({"model.history": 2}, "recurrent=True"),
        ({"task.sprites.num_test": 0}, "the split test has no clip"),
        ({"task.sprites.min_objects": 9}, "max_objects"),
        ({"task.height": 4}, "height must be"),
    ],
)
def test_a_request_that_cannot_be_honoured_is_one_line(settings, expected, tmp_path):
    code, _, error = outcome(train.__main__.main, *command(tmp_path / "run", settings))
    assert code == 2 and expected in error
    assert error.startswith("error: ") and error.count("\n") == 1, error


def test_a_column_that_is_not_there_is_one_line(tmp_path):
    pq.write_table(pa.table({"video": [encoded(movie(0))]}), tmp_path / "f.parquet")
    settings = {"task.source": tmp_path, "task.column": "nope"}
    code, _, error = outcome(train.__main__.main, *command(tmp_path / "run", settings))
    assert code == 2 and "column nope holds no video" in error and "video (binary)" in error
    assert error.startswith("error: ") and error.count("\n") == 1, error


def test_a_single_frame_is_a_video_if_nothing_is_predicted():
    assert task(**{"task.num_frames": 1}).data["test"].frames.shape[1] == 1


def task(variant="smoke", **settings):
    return tasks.prepare(configs.load(f"{CONFIG}:{variant}", flags(SMALL | settings)))


class Sees(SlotBasedVideoModel):
    """Knows the object at each pixel by its colour; calls object `k` of frame `t` slot `names[t][k]`."""

    def __init__(self, names):
        self.grid, self.patch_size, self.predictor = (SIDE, SIDE), 1, None
        self.names = nnx.Variable(names)

    def __call__(self, frames):
        objects = jnp.round(frames[..., 0] * 255 / 50).astype(int).reshape(*frames.shape[:2], -1)
        slots = self.names[...][jnp.arange(objects.shape[1])[None, :, None], objects]
        masks = jnp.moveaxis(slots[..., None] == jnp.arange(4), -1, 2).astype(jnp.float32)
        return SlotVideoOutput(frames, jnp.zeros((*frames.shape[:2], 4, 4)), masks, None)


@functools.cache
def measured():
    """Of names and a batch, the metrics of `Sees`, where there are three objects."""
    made = task()
    made.num_objects = 3
    return jax.jit(lambda names, batch: made.metrics(Sees(names), batch))


SAME = [[0, 1, 2, 3]] * TIME
OTHER_AT_THE_END = [*SAME[1:], [0, 2, 3, 1]]


@pytest.mark.parametrize(("names", "kept"), [(SAME, True), (OTHER_AT_THE_END, False)])
def test_an_object_is_found_in_a_frame_by_any_slot_and_in_a_video_by_one(names, kept):
    objects = np.random.default_rng(0).integers(0, 4, (2, TIME, SIDE, SIDE), np.uint8)
    batch = {"frames": np.stack([50 * objects] * 3, -1), "masks": objects, "example_mask": np.array([True, False])}
    metrics = jax.device_get(measured()(np.array(names), batch))
    found = {name: (float(value[0]), weight) for name, (value, weight) in metrics.items()}
    assert found["mse"][0] == 0 and found["psnr"][0] == 100
    assert found["slots_used"][0] == 4
    # Rounding of float32 in sums over 256 points.
    assert found["ari"][0] == pytest.approx(1, abs=1e-5) and found["fg_ari"][0] == pytest.approx(1, abs=1e-5)
    assert (found["video_fg_ari"][0] == pytest.approx(1, abs=1e-5)) is kept
    assert all(list(weight) == [1, 0] for _, weight in found.values()), "a dummy does not count"


def test_a_clip_without_an_object_has_no_foreground_index():
    empty = np.zeros((2, TIME, SIDE, SIDE), np.uint8)
    batch = {"frames": np.stack([empty] * 3, -1), "masks": empty, "example_mask": np.array([True, True])}
    found = measured()(np.array(SAME), batch)
    assert [found[name][1].tolist() for name in ("ari", "fg_ari", "video_fg_ari")] == [[1, 1], [0, 0], [0, 0]]


def test_baselines_are_what_they_say():
    made, draw = task(), np.random.default_rng(0)
    frame = draw.integers(0, 256, (SIDE, SIDE, 3), np.uint8)
    still = Clips(np.broadcast_to(frame, (2, TIME, SIDE, SIDE, 3)), None, ("a", "b"))
    colours = draw.integers(0, 256, (3, TIME, 1, 1, 3), np.uint8)
    plain = Clips(np.broadcast_to(colours, (3, TIME, SIDE, SIDE, 3)), None, ("c", "d", "e"))
    made.data = {"train": still, "val": still, "test": plain}
    assert made.baselines("val")["mean frame"] == pytest.approx(0, abs=1e-12)
    assert made.baselines("test")["mean colour"] == pytest.approx(0, abs=1e-12)
    expected = np.mean((plain.frames / 255 - frame / 255) ** 2)
    assert made.baselines("test")["mean frame"] == pytest.approx(expected, rel=1e-5)


def test_every_frame_of_every_panel_is_in_the_picture_and_in_the_film():
    # A colour for each of 3 panels of 2 clips of 4 frames.
    colours = 40 + 30 * np.stack(np.meshgrid(*map(np.arange, (3, 2, TIME)), indexing="ij"), -1).astype(np.uint8)
    images = np.broadcast_to(colours[:, :, :, None, None], (3, 2, TIME, SIDE, SIDE, 3))
    panels = dict(zip(("one", "two", "three"), images))

    def shown(image):
        return {tuple(pixel) for pixel in np.asarray(image.convert("RGB")).reshape(-1, 3).tolist()}

    expected = {tuple(colour) for colour in colours.reshape(-1, 3).tolist()}
    assert expected <= shown(Image.open(io.BytesIO(illustrations.picture(panels))))
    film = Image.open(io.BytesIO(illustrations.animation(panels)))
    for time in range(TIME):
        film.seek(time)
        assert shown(film) & expected == {tuple(colour) for colour in colours[:, :, time].reshape(-1, 3).tolist()}
