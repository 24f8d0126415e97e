"""Long Range Arena (Tay et al. 2020): classification of long sequences of tokens."""

from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence

import grain
import jax.numpy as jnp
import optax
from flax import nnx

from attn_jax.models import TransformerClassifier, TransformerMatcher
from train.config import Config
from train.data import SPLITS, SequenceDataset, aan, batches, images, listops, pathfinder, realdata, text
from train.tasks.task import Batch, Metrics, Task

BYTES = tuple(chr(byte) if 32 < byte < 127 else {10: "↵", 32: "␣"}.get(byte, f"{byte:02x}") for byte in range(256))
"""The words of tasks whose tokens are bytes."""


class SequenceClassification(Task):
    """A class for each sequence of tokens.

    Attributes:
      words: what the tokens 1, 2, ... stand for in text; None where they are no text.
    """

    primary = "accuracy"
    better = "higher"
    vocab_size: int
    num_classes: int
    words: Sequence[str] | None = None

    @abstractmethod
    def load(self) -> Mapping[str, SequenceDataset]:
        """The splits `train`, `val` and `test`."""

    def prepare(self) -> None:
        self.data = self.load()
        self.buckets = tuple(self.config.task.buckets)

    @property
    def steps_per_epoch(self) -> int:
        return batches.num_batches(len(self.data["train"]), self.config.batch_size)

    def model(self, rngs: nnx.Rngs) -> nnx.Module:
        return TransformerClassifier(
            vocab_size=self.vocab_size, num_classes=self.num_classes, rngs=rngs, **self.model_arguments()
        )

    def train_iterator(self, seed: int) -> grain.DatasetIterator:
        size = self.config.batch_size
        return batches.train_iterator(self.data["train"], batch_size=size, buckets=self.buckets, seed=seed)

    def eval_batches(self, split: str) -> Iterable[Batch]:
        size = self.config.eval_batch_size
        return batches.eval_batches(self.data[split], batch_size=size, buckets=self.buckets)

    def metrics(self, model: nnx.Module, batch: Batch) -> Metrics:
        logits = model(batch["tokens"], mask=batch["mask"]).astype(jnp.float32)
        weight = batch["example_mask"].astype(jnp.float32)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
        correct = (logits.argmax(axis=-1) == batch["label"]).astype(jnp.float32)
        return {"loss": (losses, weight), "accuracy": (correct, weight)}

    def baselines(self, split: str) -> dict[str, float]:
        return {"majority": listops.majority_accuracy(self.data["train"].labels, self.data[split].labels)}

    def example_text(self, batch: Batch, row: int) -> list[str] | None:
        if self.words is None:
            return None
        known = dict(enumerate(self.words, start=1))
        return [known.get(token, "?") for token in batch["tokens"][row][batch["mask"][row]].tolist()]


class ListOps(SequenceClassification):
    """The value of a nested list of operations on digits."""

    vocab_size = listops.VOCAB_SIZE
    num_classes = listops.NUM_CLASSES
    words = listops.VOCABULARY

    def load(self) -> Mapping[str, SequenceDataset]:
        task = self.config.task
        if task.data_dir:
            return listops.read_tsv(task.data_dir, max_length=max(task.buckets))
        return listops.load(listops.ListOps(**task.generator))

    def baselines(self, split: str) -> dict[str, float]:
        root = listops.root_operator_accuracy(self.data["train"], self.data[split])
        return super().baselines(split) | {"root operator": root}


class Text(SequenceClassification):
    """The topic of a news article, or the sentiment of a film review, from its bytes."""

    vocab_size = text.VOCAB_SIZE
    words = BYTES

    def __init__(self, config: Config):
        super().__init__(config)
        self.num_classes = len(realdata.TOPICS if config.task.source == "news" else text.SENTIMENTS)

    def load(self) -> Mapping[str, SequenceDataset]:
        source, length = self.config.task.source, max(self.config.task.buckets)
        match source:
            case "news":
                return text.news(length)
            case "imdb":
                return text.tfds_imdb(length)
        return text.acl_imdb(source, length)


class Image(SequenceClassification):
    """What an image shows, from its pixels one after the other."""

    vocab_size = images.VOCAB_SIZE
    num_classes = images.NUM_CLASSES

    def load(self) -> Mapping[str, SequenceDataset]:
        match self.config.task.source:
            case "digits":
                return images.digits()
            case "cifar10":
                return images.tfds_cifar10()
        return images.cifar10(self.config.task.source)

    def metrics(self, model: nnx.Module, batch: Batch) -> Metrics:
        if self.config.task.mask_black:
            batch = {**batch, "mask": batch["mask"] & (batch["tokens"] > 0)}
        return super().metrics(model, batch)


class Pathfinder(SequenceClassification):
    """Whether two dots are the ends of one dashed path, from the pixels one after the other."""

    vocab_size = pathfinder.VOCAB_SIZE
    num_classes = pathfinder.NUM_CLASSES

    def load(self) -> Mapping[str, SequenceDataset]:
        task = self.config.task
        if task.data_dir:
            return pathfinder.read(task.data_dir, task.generator.size)
        return pathfinder.load(pathfinder.Pathfinder(**task.generator))


class Retrieval(SequenceClassification):
    """Whether two documents belong together, from their bytes, by two towers that share their parameters."""

    vocab_size = text.VOCAB_SIZE
    num_classes = aan.NUM_CLASSES

    def load(self) -> Mapping[str, SequenceDataset]:
        task = self.config.task
        if task.source == "news":
            sizes = {split: task[f"num_{split}"] for split in SPLITS}
            return aan.news(sizes, max(task.buckets))
        return aan.read(task.source, max(task.buckets))

    def model(self, rngs: nnx.Rngs) -> nnx.Module:
        return TransformerMatcher(
            vocab_size=self.vocab_size, num_classes=self.num_classes, rngs=rngs, **self.model_arguments()
        )

    @property
    def steps_per_epoch(self) -> int:
        return batches.num_batches(len(self.data["train"]) // 2, self.config.batch_size)

    def _pairs(self, split: str) -> batches.PairedSequences:
        return batches.PairedSequences(self.data[split], self.buckets)

    def train_iterator(self, seed: int) -> grain.DatasetIterator:
        return batches.plan_iterator(self._pairs("train"), batch_size=self.config.batch_size, seed=seed)

    def eval_batches(self, split: str) -> Iterable[Batch]:
        return batches.plan_batches(self._pairs(split), batch_size=self.config.eval_batch_size)
