"""Measure the best model of a run on a split: `python -m eval --workdir runs/lra_listops-standard-default-s0`.

Prints the metrics beside the baselines, and writes them to `eval_<split>.json` in the work directory; those of
each example to `<split>_examples.json`. Of a video model also a picture and an animation, of a reranker its
ranking as a run file of TREC.
"""

import sys
from pathlib import Path
from typing import Any

from train import cli
from train.config import run_file
from train.reporting import results
from train.workdir import read_config, write_json


def main(argv: list[str]) -> None:
    """Evaluates as the command line `argv` (without the program) says."""
    parser = cli.Parser(prog="python -m eval", description=__doc__)
    parser.add_argument("--workdir", type=Path, metavar="DIR", required=True, help="of a run of python -m train")
    parser.add_argument("--split", choices=("val", "test"), default="test", help="default: test")
    arguments = parser.parse_args(argv)
    config = read_config(arguments.workdir)
    if Path(config.file).is_file():
        run_file(config.file)  # it may register a task or a mechanism of its own

    from eval import illustrations, runfile  # not before there is something to evaluate: they take seconds
    from train import evaluation, sharding

    sharding.use_cpu_devices(config)
    workdir, split = arguments.workdir, arguments.split
    written = [workdir / f"eval_{split}.json", workdir / f"{split}_examples.json"]
    with evaluation.restored(config, workdir) as run, cli.user_errors(OSError):
        result, examples = evaluation.measure(run, split)
        for path, content in zip(written, (result, examples)):
            write_json(path, content)
        written += illustrations.draw(run, split, workdir) + runfile.write(run, split, workdir)
    print(report(result), f"written to {', '.join(map(str, written))}", sep="\n")


def report(result: dict[str, Any]) -> str:
    """The metrics of `evaluation.measure` and the baselines as a table."""
    run = f"{result['name']}, preset {result['preset']}, seed {result['seed']}"
    measured = results(result["mechanism"], result["metrics"], result["primary"], result["baselines"])
    return f"{run}, step {result['step']}, {result['parameters']:,} parameters\n{measured}"


if __name__ == "__main__":
    cli.run(main, sys.argv[1:])
