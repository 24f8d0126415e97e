"""The ranking of a reranker as a run file of TREC, which trec_eval and ir-measures read."""

from pathlib import Path

import jax
import numpy as np

from eval.measure import replace
from train import sharding
from train.evaluation import Restored
from train.tasks.rerank import Rerank, score


def write(run: Restored, split: str, folder: Path) -> list[Path]:
    """Writes `run_<split>.trec` into `folder`; returns the files, none for a task that ranks nothing.

    A line is `query Q0 document rank score tag`; equal scores stand in trec_eval's order.
    """
    task = run.task
    if not isinstance(task, Rerank):
        return []
    lists = task.lists[split]
    module = run.module()
    scoring = jax.jit(lambda batch: score(module, batch))
    lines, query_ids, query = [], list(lists.collection.queries), 0
    for batch in task.eval_batches(split):
        scores = np.asarray(scoring(sharding.put_batch(batch, run.mesh)))
        for row in np.flatnonzero(batch["example_mask"]):
            documents = lists.candidates(query, 0)
            found = scores[row, : len(documents)]
            for rank, column in enumerate(np.argsort(-found, kind="stable"), 1):
                document = lists.document_ids[documents[column]]
                lines.append(f"{query_ids[query]} Q0 {document} {rank} {found[column]:.6f} {run.config.name}\n")
            query += 1
    path = folder / f"run_{split}.trec"
    replace(path, "".join(lines).encode())
    return [path]
