"""Run a documented experiment: `python -m eval.experiments video`.

Each cell of its grid is a run of `python -m train` in a work directory of its own below --out, in a process of its
own on a core of its own. What is finished is kept: the same command again goes on where the last one was stopped,
also within a cell. The report is written again after every cell.

  lra        what do gravity and timescales do on ListOps and text, beside standard attention and all others?
  video      does a second key-value stream help slot-based video, at which capacity, at which cost?
  retrieval  does a routed depth help to rerank, taught with labels or by reinforcement, at which cost?
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from eval.experiments import grid, lra, retrieval, video
from eval.measure import replace
from train import cli

SLURM_HELP = "settings of submitit: timeout_min=240 slurm_partition=cpu; cluster=local tries it on this machine"

EXPERIMENTS: dict[str, grid.Experiment] = {
    "lra": lra.EXPERIMENT,
    "video": video.EXPERIMENT,
    "retrieval": retrieval.EXPERIMENT,
}


def main(argv: list[str]) -> None:
    """Runs the experiment that the command line `argv` (without the program) names."""
    args = _parse(argv)
    experiment = EXPERIMENTS[args.experiment]
    cells = experiment.cells(args.seeds)
    cli.make_folder(args.out, "--out")

    def report() -> str:
        text = experiment.report(args.out, args.seeds)
        replace(args.out / "report.md", text.encode())
        return text

    failed: list[str] = []
    if not args.report:
        todo = grid.unfinished(args.out, cells)
        print(f"{len(cells) - len(todo)} of {len(cells)} runs are finished", file=sys.stderr)
        failed = grid.run_all(todo, _engine(args, todo), report) if todo else []
        experiment.measure(args.out)
    print(report(), f"written to {args.out / 'report.md'}", sep="\n")
    if failed:
        raise cli.RunError(f"{len(failed)} of {len(cells)} runs failed: {'; '.join(failed)}")


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = cli.Parser(prog="python -m eval.experiments", description=__doc__)
    add = parser.add_argument
    add("experiment", choices=EXPERIMENTS)
    add("--out", type=Path, metavar="DIR", help="default: runs/experiments/<experiment>")
    add("--seeds", type=_seeds, metavar="A,B", default=[0, 1, 2], help="default: 0,1,2")
    add("--processes", type=int, metavar="N", help="runs at once (default: one for each core, as memory allows)")
    add("--engine", choices=("local", "slurm"), default="local", help="this machine (the default), or a job array")
    add("--slurm", type=_option, nargs="+", default=[], metavar="KEY=VALUE", help=SLURM_HELP)
    add("--report", action="store_true", help="train nothing, only report what is there")
    args = parser.parse_args(argv)
    args.out = args.out or Path("runs") / "experiments" / args.experiment
    args.processes = grid.default_processes() if args.processes is None else args.processes
    if args.processes < 1:
        parser.error("--processes must be positive")
    return args


def _engine(args: argparse.Namespace, cells: Sequence[grid.Cell]) -> grid.Engine:
    if args.engine == "local":
        return grid.LocalEngine(args.out, args.processes)
    from eval.experiments.slurm import SlurmEngine

    return SlurmEngine(args.out, cells, args.processes, dict(args.slurm))


def _option(text: str) -> tuple[str, str | int]:
    key, equals, value = text.partition("=")
    if not (key and equals):
        raise argparse.ArgumentTypeError(f"expected KEY=VALUE such as timeout_min=240, got {text!r}")
    return key, int(value) if value.isdecimal() else value


def _seeds(text: str) -> list[int]:
    if not all(part.isdecimal() for part in text.split(",")):
        raise argparse.ArgumentTypeError(f"expected non-negative integers such as 0,1,2, got {text!r}")
    return sorted({int(part) for part in text.split(",")})


if __name__ == "__main__":
    cli.run(main, sys.argv[1:])
