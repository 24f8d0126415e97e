"""Slot-based video: reconstruct the frames of a clip from a few slots, and predict those that follow."""

from collections.abc import Iterable, Mapping

import grain
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from attn_jax import metrics
from attn_jax.models import SlotBasedVideoModel
from attn_jax.models.slots import SlotVideoOutput
from attn_jax.types import Array
from train.data import Clips, batches, sprites, video
from train.tasks.task import Batch, Metrics, Task, means_of


class SlotVideo(Task):
    """Mean squared error of pixels from 0 to 1, of the frames seen and, in a recurrent model, of those to come."""

    primary = "mse"
    better = "lower"

    def prepare(self) -> None:
        self._check_frames()
        nnx.eval_shape(lambda: self.model(nnx.Rngs(0)))  # sizes that do not fit are said before data is read
        self.data = self.load()
        for split, clips in self.data.items():
            if not len(clips):
                raise ValueError(f"the split {split} has no clip; training, validation and test need one each")
        masks = [clips.masks for clips in self.data.values() if clips.masks is not None]
        self.num_objects = max((int(mask.max()) for mask in masks), default=0)

    def _check_frames(self) -> None:
        task = self.config.task
        if self.config.model.recurrent and not 1 <= task.predict_frames < task.num_frames:
            raise ValueError(
                "task.predict_frames of a recurrent model must be at least 1 and less than task.num_frames"
                f" {task.num_frames}, got {task.predict_frames}"
            )

    def load(self) -> Mapping[str, Clips]:
        """The splits `train`, `val` and `test`."""
        task = self.config.task
        size = {"num_frames": task.num_frames, "height": task.height, "width": task.width}
        if task.source == "sprites":
            return sprites.load(sprites.Sprites(**size, **task.sprites))
        return video.read(task.source, video.ClipSpec(**size, **task.clips), column=task.column or None)

    @property
    def steps_per_epoch(self) -> int:
        return batches.num_batches(len(self.data["train"]), self.config.batch_size)

    def model(self, rngs: nnx.Rngs) -> nnx.Module:
        task = self.config.task
        size = {"height": task.height, "width": task.width}
        return SlotBasedVideoModel(rngs=rngs, **size, **self.model_arguments())

    def train_iterator(self, seed: int) -> grain.DatasetIterator:
        return batches.clip_train_iterator(self.data["train"], batch_size=self.config.batch_size, seed=seed)

    def eval_batches(self, split: str) -> Iterable[Batch]:
        return batches.clip_eval_batches(self.data[split], batch_size=self.config.eval_batch_size)

    def loss(self, model: nnx.Module, batch: Batch) -> tuple[Array, dict[str, Array]]:
        _, found = self._errors(model, batch)
        return means_of(found)

    def metrics(self, model: nnx.Module, batch: Batch) -> Metrics:
        assert isinstance(model, SlotBasedVideoModel)
        output, found = self._errors(model, batch)
        weight = batch["example_mask"].astype(jnp.float32)
        owner = output.masks.argmax(axis=2)  # (B, T, P)
        used = jax.nn.one_hot(owner, output.masks.shape[2]).max(axis=2).sum(-1).mean(-1)
        found |= {"psnr": (metrics.psnr(found["mse"][0]), weight), "slots_used": (used, weight)}
        if "masks" in batch:
            segments = expand_patches(owner, model.grid, model.patch_size)
            found |= self._rand_indices(batch["masks"], segments, output.masks.shape[2], weight)
        if model.predictor is not None:
            found |= self._rollout(model, batch, weight)
        return found

    def baselines(self, split: str) -> dict[str, float]:
        """The mean training frame, and the mean colour of each frame."""
        frames = self.data[split].frames.astype(np.float32) / 255
        mean_frame = self.data["train"].frames.mean(axis=(0, 1), dtype=np.float64) / 255
        colour = frames.mean(axis=(2, 3), keepdims=True)
        return {
            "mean frame": float(np.mean((frames - mean_frame) ** 2)),
            "mean colour": float(np.mean((frames - colour) ** 2)),
        }

    def _errors(self, model: nnx.Module, batch: Batch) -> tuple[SlotVideoOutput, Metrics]:
        """What the model makes of a batch, the loss and what it is made of."""
        assert isinstance(model, SlotBasedVideoModel)
        frames, weight = pixels(batch), batch["example_mask"].astype(jnp.float32)
        output = model(frames)
        loss = mse = metrics.mean_squared_error(output.frames, frames)
        found = {"mse": (mse, weight)}
        if output.predicted is not None:
            expected = model.decode(output.predicted[:, :-1])
            next_mse = metrics.mean_squared_error(expected, frames[:, 1:])
            loss += self.config.task.prediction_weight * next_mse
            found["next_mse"] = (next_mse, weight)
        return output, {"loss": (loss, weight), **found}

    def _rand_indices(self, masks: Array, segments: Array, num_slots: int, weight: Array) -> Metrics:
        """Of each frame, averaged; and of the foreground of all frames together: there slots must keep objects."""
        batch, time = masks.shape[:2]

        def index(groups: int, foreground: bool) -> tuple[Array, Array]:
            true, predicted = (x.astype(jnp.int32).reshape(groups, -1) for x in (masks, segments))
            found = metrics.adjusted_rand_index(
                true,
                predicted,
                num_true=self.num_objects + 1,
                num_predicted=num_slots,
                mask=true > 0 if foreground else None,
            ).reshape(batch, -1)
            defined = jnp.isfinite(found)
            count = defined.sum(1)
            return jnp.where(defined, found, 0).sum(1) / jnp.maximum(count, 1), weight * (count > 0)

        return {
            "ari": index(batch * time, False),
            "fg_ari": index(batch * time, True),
            "video_fg_ari": index(batch, True),
        }

    def _rollout(self, model: SlotBasedVideoModel, batch: Batch, weight: Array) -> Metrics:
        """Errors of the last frames, predicted from those before; and those of repeating the last one seen."""
        steps, frames = self.config.task.predict_frames, pixels(batch)
        seen, unseen = frames[:, :-steps], frames[:, -steps:]
        predicted = model.decode(model.predict(seen, steps))
        error = metrics.mean_squared_error
        return {
            "predicted_mse": (error(predicted, unseen), weight),
            "predicted_psnr": (metrics.psnr(error(predicted, unseen)), weight),
            "repeated_mse": (error(seen[:, -1:], unseen), weight),
            **{f"predicted_mse/{k + 1}": (error(predicted[:, k], unseen[:, k]), weight) for k in range(steps)},
        }


def pixels(batch: Batch) -> Array:
    """The frames of a batch, float32 from 0 to 1."""
    return batch["frames"].astype(jnp.float32) / 255


def expand_patches(labels: Array, grid: tuple[int, int], patch_size: int) -> Array:
    """Labels `(..., P)` of patches as labels `(..., height, width)` of pixels."""
    image = labels.reshape(*labels.shape[:-1], *grid)
    return image.repeat(patch_size, axis=-2).repeat(patch_size, axis=-1)
