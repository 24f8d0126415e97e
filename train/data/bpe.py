"""Byte-level BPE (Sennrich et al. 2016; Radford et al. 2019), trained on the corpus it is for, by `tokenizers`."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from train.data import DataError, cache

if TYPE_CHECKING:
    from tokenizers import Tokenizer

PAD, CLS, SEP = "[PAD]", "[CLS]", "[SEP]"
PAD_ID, CLS_ID, SEP_ID = range(3)

_SMALLEST = 256 + 3


def train(texts: Sequence[str], vocab_size: int, cache_dir: str | os.PathLike | None = None) -> Tokenizer:
    """A tokenizer of `vocab_size` ids trained on `texts`; ids 0, 1, 2 are padding, CLS and SEP. Trained once.

    Raises:
      DataError: `vocab_size` does not hold the bytes.
    """
    from tokenizers import Tokenizer

    if vocab_size < _SMALLEST:
        raise DataError(f"a byte-level vocabulary needs {_SMALLEST} ids at least, got {vocab_size}")
    digest = hashlib.sha256(str(vocab_size).encode())
    for text in texts:
        digest.update(f"\0{len(text)} {text}".encode(errors="surrogatepass"))

    def make(path: Path) -> dict[str, np.ndarray]:
        return {"json": np.array(_train(texts, vocab_size).to_str())}

    stored = cache.load(f"bpe-v1-{vocab_size}-{digest.hexdigest()[:16]}.npz", make, cache_dir)
    return Tokenizer.from_str(str(stored["json"]))


def _train(texts: Sequence[str], vocab_size: int) -> Tokenizer:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, CLS, SEP],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer
