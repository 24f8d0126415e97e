"""The tasks that a config can name."""

from train.cli import UsageError, user_errors
from train.config import Config
from train.tasks import lra, rerank, video
from train.tasks.budget import within_budget
from train.tasks.task import Batch, Metrics, Task

__all__ = ["TASKS", "Batch", "Metrics", "Task", "prepare"]

TASKS: dict[str, type[Task]] = {
    "listops": lra.ListOps,
    "text": lra.Text,
    "image": lra.Image,
    "pathfinder": lra.Pathfinder,
    "video": video.SlotVideo,
    "rerank": rerank.Rerank,
}


def prepare(config: Config) -> Task:
    """The task that `config.task.name` names, its data at hand; making that may take minutes.

    Raises:
      UsageError: an unknown task, wrong settings for it, or data that is missing or malformed.
    """
    if config.task.name not in TASKS:
        raise UsageError(f"task.name `{config.task.name}` is not one of {', '.join(TASKS)}")
    with user_errors(ValueError, TypeError, OSError):
        task = TASKS[config.task.name](config)
        task.prepare()
        if config.parameter_budget:
            task.config = within_budget(task, config.parameter_budget)
    return task
