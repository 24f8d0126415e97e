"""The runs of a grid as one job array of Slurm, by submitit (`pip install -e '.[slurm]'`).

The checkout and the folder of the experiment must be on a file system that all machines see.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from eval.experiments import grid
from eval.experiments.grid import Cell
from train import cli


class SlurmEngine:
    """A job array of `cells`, of which `processes` run at once.

    Args:
      options: of `submitit.AutoExecutor.update_parameters`, such as `timeout_min=240`, `slurm_partition="cpu"`;
        and `cluster`: "slurm" (the default), or "local" for processes of this machine.

    Raises:
      UsageError: no submitit, no Slurm, or an unknown option.
    """

    def __init__(self, out: Path, cells: Sequence[Cell], processes: int, options: Mapping[str, Any]):
        try:
            import submitit
        except ImportError as error:
            raise cli.UsageError("--engine slurm needs submitit: pip install -e '.[slurm]'") from error
        rest = {"cpus_per_task": 1, "mem_gb": grid.MEMORY // 2**30, "timeout_min": 24 * 60, **options}
        cluster = rest.pop("cluster", "slurm")
        with cli.user_errors(RuntimeError, NameError, ValueError, TypeError, FileNotFoundError):
            executor = submitit.AutoExecutor(folder=out / "slurm", cluster=cluster)
            executor.update_parameters(slurm_array_parallelism=processes, name="attn-jax", **rest)
            jobs = executor.map_array(_Train(out.absolute()), list(cells))
        self.jobs = dict(zip(cells, jobs, strict=True))
        self.at_once = max(1, len(jobs))  # waiting costs nothing

    def run(self, cell: Cell) -> str | None:
        job = self.jobs[cell]
        try:
            return job.result()
        except Exception as error:  # whatever ended it: submitit's own errors, or what the job raised
            return f"{str(error).strip().splitlines()[-1]} (job {job.job_id}, see {job.paths.stderr})"

    def stop(self) -> None:
        for job in self.jobs.values():
            if not job.done():
                job.cancel()


class _Train:
    """What a job does; one that is preempted or out of time is queued again, and its run goes on."""

    def __init__(self, out: Path):
        self.out = out

    def __call__(self, cell: Cell) -> str | None:
        process = grid.start(cell, self.out)
        try:
            return grid.wait(cell, self.out, process)
        finally:
            process.terminate()  # which saves

    def checkpoint(self, cell: Cell) -> Any:
        import submitit

        return submitit.helpers.DelayedSubmission(self, cell)
