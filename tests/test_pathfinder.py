"""Pathfinder: the label is what the pixels show, and nothing else tells it."""

import numpy as np
import pytest
from PIL import Image

from tests.runs import outcome
from train.__main__ import main
from train.data import DataError, pathfinder

SPEC = pathfinder.Pathfinder(num_train=4, num_val=2, num_test=2)


@pytest.fixture(scope="module")
def drawing():
    return pathfinder.draw(SPEC, 400)


def connected(closed, start, end):
    """Whether a walk over neighbouring pixels of `closed`, diagonal ones too, leads from `start` to `end`."""
    seen, front = {tuple(start)}, [tuple(start)]
    while front:
        row, column = front.pop()
        for place in ((row + i, column + j) for i in (-1, 0, 1) for j in (-1, 0, 1)):
            if place not in seen and closed[place]:
                seen.add(place)
                front.append(place)
    return tuple(end) in seen


def test_a_path_leads_from_dot_to_dot_where_the_label_says_so(drawing):
    for closed, label, (start, end) in zip(drawing.closed, drawing.labels, drawing.dots):
        assert closed[tuple(start)] and closed[tuple(end)]
        assert connected(closed, start, end) == bool(label)


def test_the_dots_and_the_paths_are_drawn_with_gaps(drawing):
    for pixels, closed, dots in zip(drawing.pixels, drawing.closed, drawing.dots):
        for row, column in dots:
            assert (pixels[row - 1 : row + 2, column - 1 : column + 2] == 255).all()
        # One point of three is a gap, less where a dot covers it or two points share a pixel.
        assert 0.1 < (closed & (pixels == 0)).sum() / closed.sum() < 0.5


def test_neither_ink_nor_distance_tells_the_label(drawing):
    distance = np.linalg.norm(drawing.dots[:, 0] - drawing.dots[:, 1], axis=1)
    for value in (drawing.pixels.mean((1, 2)), distance):
        by_label = [value[drawing.labels == label] for label in (0, 1)]
        error = np.sqrt(sum(part.var() / len(part) for part in by_label))
        assert abs(by_label[0].mean() - by_label[1].mean()) < 4 * error  # false alarm: 1 in 16,000
    assert abs(drawing.labels.mean() - 0.5) < 4 * 0.5 / 400**0.5


def test_images_depend_on_the_seed_and_on_nothing_else(drawing, tmp_path):
    splits = pathfinder.load(SPEC, tmp_path)
    assert [len(splits[name]) for name in ("train", "val", "test")] == [4, 2, 2]
    np.testing.assert_array_equal(splits["val"][0]["tokens"].reshape(32, 32), drawing.pixels[4])
    assert splits["test"].labels.tolist() == drawing.labels[6:8].tolist()
    other = pathfinder.draw(pathfinder.Pathfinder(seed=1), 8)
    assert (other.pixels != drawing.pixels[:8]).any(axis=(1, 2)).all()


def test_larger_images_hold_the_law_too():
    made = pathfinder.draw(pathfinder.Pathfinder(size=128), 6)  # more would be another batch
    for closed, label, (start, end) in zip(made.closed, made.labels, made.dots):
        assert connected(closed, start, end) == bool(label)


@pytest.fixture
def published(tmp_path):
    root = tmp_path / "pathfinder32" / "curv_contour_length_14"
    (root / "metadata").mkdir(parents=True)
    for part in range(2):
        (root / "imgs" / str(part)).mkdir(parents=True)
        lines = []
        for number in range(40):
            file = root / "imgs" / str(part) / f"sample_{number}.png"
            if (part, number) == (1, 3):
                file.touch()  # as some of the published ones
            else:
                Image.fromarray(np.full((32, 32), 40 * part + number, np.uint8)).save(file)
            lines.append(f"imgs/{part} sample_{number}.png 0 {number % 2} 1 2 3\r\n")
        (root / "metadata" / f"{part}.npy").write_text("".join(lines), newline="")
    return root


def test_published_images_are_read_once_with_their_label(published):
    splits = pathfinder.read(published.parent, 32)
    found = {
        int(data[i]["tokens"][0]): int(data[i]["label"]) for data in splits.values() for i in range(len(data))
    }
    assert found == {value: value % 2 for value in range(80) if value != 43}
    assert sum(map(len, splits.values())) == 79 and set(splits["train"].lengths) == {1_024}
    assert [data.labels.tolist() for data in pathfinder.read(published, 32).values()] == [
        data.labels.tolist() for data in splits.values()
    ]


def test_what_is_wrong_with_a_folder_is_said(published, tmp_path):
    with pytest.raises(DataError, match=r"no metadata/\*.npy in .*download lra_release.gz"):
        pathfinder.read(tmp_path, 32)
    with pytest.raises(DataError, match=r"has 32 x 32 pixels, task.generator.size is 128"):
        pathfinder.read(published, 128)
    (published / "imgs" / "0" / "sample_7.png").unlink()
    with pytest.raises(DataError, match=r"no image .*sample_7.png"):
        pathfinder.read(published, 32)
    metadata = published / "metadata" / "0.npy"
    metadata.write_text("imgs/0 sample_0.png 0 1 2\nimgs/0 sample")
    with pytest.raises(DataError, match=r"0.npy:2: expected folder, file, number and label"):
        pathfinder.read(published, 32)


def test_a_run_on_published_images(published, tmp_path):
    small = ("model.dim=8", "model.num_layers=0", "steps=2", "eval_every=2", "mesh.data=1")
    settings = (f"task.data_dir={published}", *small)
    overrides = [f"--config.{setting}" for setting in settings]
    run = tmp_path / "run"
    code, out, error = outcome(main, "--config", "configs/lra_pathfinder.py:smoke", *overrides, "--workdir", run)
    assert code == 0, error
    assert "majority" in out and (run / "result.json").exists()
