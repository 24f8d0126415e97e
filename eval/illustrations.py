"""Pictures and animations of what a model does, for tasks that can be looked at."""

import io
from collections.abc import Callable, Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from PIL import Image

from attn_jax.models import SlotBasedVideoModel
from eval.measure import replace
from train.evaluation import Restored
from train.tasks.video import SlotVideo, expand_patches, pixels

Panels = Mapping[str, np.ndarray]
"""By title, images `(N, T, height, width, 3)` uint8 of `N` clips."""

SECOND_STREAM = "second stream's share\n(blue 0, red 1)"
"""Title of the competition of the two streams of dual-KV attention: where patches read slots, mean over heads."""

_EXAMPLES = 3
_SIDE = 128  # pixels to which a frame of the animation is enlarged, at least
_SECONDS_PER_FRAME = 0.4


def draw(run: Restored, split: str, folder: Path) -> list[Path]:
    """Draws a few clips of `split` into `folder`; returns the files, none for a task that has no pictures."""
    if not isinstance(run.task, SlotVideo):
        return []
    batch = next(iter(run.task.eval_batches(split)))
    real = np.flatnonzero(batch["example_mask"])
    chosen = real[np.linspace(0, len(real) - 1, min(_EXAMPLES, len(real))).astype(int)]
    batch = {name: array[chosen] for name, array in batch.items()}
    panels = video_panels(run.module(), run.task, batch)
    files: list[tuple[Path, Callable[[Panels], bytes]]] = [
        (folder / f"video_{split}.png", picture),
        (folder / f"video_{split}.gif", animation),
    ]
    for path, render in files:
        replace(path, render(panels))
    return [path for path, _ in files]


def video_panels(model: nnx.Module, task: SlotVideo, batch: Mapping[str, np.ndarray]) -> Panels:
    """What a slot video model sees, makes of it and expects of the last frames, and how its slots share it."""
    assert isinstance(model, SlotBasedVideoModel)
    frames, steps = pixels(batch), task.config.task.predict_frames

    def look(model: SlotBasedVideoModel, frames: jax.Array):
        output, predicted, shares = model(frames), None, None
        if model.predictor is not None:
            predicted = model.decode(model.predict(frames[:, :-steps], steps))
        attention = model.decoder.blocks[-1].attention if model.decoder.blocks else None
        if getattr(attention, "merge", None) == "sequence":
            slots = output.slots
            shares = model.decoder.stream_shares(slots.reshape(-1, *slots.shape[2:]))[..., 1].mean(-1)
            shares = shares.reshape(*slots.shape[:2], -1)
        return output, predicted, shares

    # With the model as an argument: initial slots may be sampled, which changes its random state.
    output, predicted, shares = nnx.jit(look)(model, frames)

    def image(patches: jax.Array) -> jax.Array:
        return expand_patches(patches, model.grid, model.patch_size)

    colours = _palette(output.masks.shape[2])
    panels: dict[str, np.ndarray | jax.Array] = {
        "frames": frames,
        "reconstruction": output.frames,
        "slot masks": jnp.einsum("ntk...,kc->nt...c", image(output.masks), colours),
    }
    if "masks" in batch:
        panels["true masks"] = np.concatenate([np.zeros((1, 3)), _palette(task.num_objects)])[batch["masks"]]
    if predicted is not None:
        panels["prediction"] = jnp.concatenate([jnp.ones_like(frames[:, :-steps]), predicted], axis=1)
    if shares is not None:
        panels[SECOND_STREAM] = _colour_map("coolwarm")(image(shares))[..., :3]
    return {title: (255 * np.clip(panel, 0, 1) + 0.5).astype(np.uint8) for title, panel in panels.items()}


def picture(panels: Panels) -> bytes:
    """A PNG: for each clip a block, in it a row of frames over time for each panel."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    clips, time = next(iter(panels.values())).shape[:2]
    figure = Figure(figsize=(1.2 * time + 1.6, (1.2 * len(panels) + 0.4) * clips), layout="constrained")
    for clip, block in enumerate(figure.subfigures(clips, 1, squeeze=False, hspace=0.03)[:, 0]):
        axes = block.subplots(len(panels), time, squeeze=False)
        for row, (title, panel) in zip(axes, panels.items()):
            for cell, frame in zip(row, panel[clip]):
                cell.imshow(frame, interpolation="nearest")
                cell.set(xticks=[], yticks=[])
                cell.spines[:].set_visible(False)
            row[0].set_ylabel(title, rotation=0, ha="right", va="center", fontsize=9)
        for t, cell in enumerate(axes[0]):
            cell.set_title(f"t = {t}", fontsize=9)
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    return buffer.getvalue()


def animation(panels: Panels) -> bytes:
    """A GIF that repeats: a row for each clip, a column for each panel in the order of the picture."""
    height, width = next(iter(panels.values())).shape[2:4]
    scale = max(1, -(-_SIDE // min(height, width)))
    gap = ((0, 0), (0, 0), (2, 2), (2, 2), (0, 0))
    enlarged = [p.repeat(scale, axis=2).repeat(scale, axis=3) for p in panels.values()]
    framed = np.stack([np.pad(p, gap, constant_values=255) for p in enlarged])  # (panels, N, T, h, w, 3)
    columns = np.concatenate(list(framed), axis=3)  # (N, T, h, panels w, 3)
    films = np.concatenate(list(columns), axis=1)  # (T, N h, panels w, 3)
    images = [Image.fromarray(film) for film in films]
    buffer = io.BytesIO()
    images[0].save(
        buffer,
        format="GIF",
        save_all=True,
        append_images=images[1:],
        duration=int(1000 * _SECONDS_PER_FRAME),
        loop=0,
    )
    return buffer.getvalue()


def _palette(count: int) -> np.ndarray:
    """`(count, 3)` colours from 0 to 1, as different as they can be."""
    hues = np.arange(count) / max(count, 1)
    return np.asarray(_colour_map("hsv")(hues))[:, :3]


def _colour_map(name: str) -> Callable[[np.ndarray | jax.Array], np.ndarray]:
    import matplotlib

    return lambda values: matplotlib.colormaps[name](np.asarray(values))
