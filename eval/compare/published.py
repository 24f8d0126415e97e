"""Published test accuracies on Long Range Arena."""

from collections.abc import Mapping

SOURCE = "Tay et al. 2020, Long Range Arena, table 1 (arXiv:2011.04006)"

_TASKS = ("lra_listops", "lra_text", "lra_retrieval", "lra_image", "lra_pathfinder")

_PERCENT = {
    "Transformer": (36.37, 64.27, 57.46, 42.44, 71.40),
    "Local Attention": (15.82, 52.98, 53.39, 41.46, 66.63),
    "Linear Transformer": (16.13, 65.90, 53.09, 42.34, 75.30),
    "Sparse Transformer": (17.07, 63.58, 59.59, 44.24, 71.71),
    "Longformer": (35.63, 62.85, 56.89, 42.22, 69.71),
    "BigBird": (36.05, 64.02, 59.29, 40.83, 74.87),
    "Performer": (18.01, 65.40, 53.82, 42.77, 77.05),
    "Reformer": (37.27, 56.10, 53.40, 38.07, 68.50),
}

MODEL_OF: Mapping[str, str] = {
    "standard": "Transformer",
    "local": "Local Attention",
    "performer": "Performer",
}
"""The published model that a mechanism stands in, by the mechanism's name; others have none."""


def accuracies(task: str) -> dict[str, float]:
    """By model, the published accuracy from 0 to 1 in the task of config name `task`; empty if there is none."""
    if task not in _TASKS:
        return {}
    return {model: round(values[_TASKS.index(task)] / 100, 4) for model, values in _PERCENT.items()}
