"""Train one model: `python -m train --config configs/lra_listops.py`.

A config's variant is a mechanism and a preset, either or both, in any order:

  python -m train --config configs/lra_listops.py:performer,smoke
  python -m train --config configs/lra_listops.py:mamba --config.optimizer.learning_rate=3e-4 --config.seed=1
  python -m train --config configs/lra_listops.py --config.mechanism.name=local --config.mechanism.window=64

Presets: `smoke` (under two minutes on two CPU cores), none (about ten minutes), `paper` (the published setting in
full, for accelerators). The same command again resumes a run that was stopped or killed; with `--show` it prints
all settings instead.

Exit codes: 0 done, 1 the run failed, 2 the request cannot be honoured, 128 + n stopped by signal n after saving.
"""

import functools
import shlex
import sys
from pathlib import Path

from train import cli, processes, sharding
from train import config as configs
from train.config import Config
from train.reporting import results
from train.workdir import open_workdir, read_json


def main(argv: list[str]) -> None:
    """Trains as the command line `argv` (without the program) says."""
    parser = cli.Parser(prog="python -m train", description=__doc__)
    parser.add_argument("--config", metavar="FILE.py[:VARIANT]", required=True, help="what to train")
    parser.add_argument(
        "--workdir", type=Path, metavar="DIR", help="default: runs/<config>-<mechanism>-<preset>-s<seed>"
    )
    parser.add_argument("--show", action="store_true", help="print all settings, and train nothing")
    parser.epilog = "--config.KEY=VALUE overrides a setting, such as --config.model.dim=128."
    arguments, overrides = parser.parse_known_args(argv)
    config = configs.load(arguments.config, overrides)
    if arguments.show:
        print(headline(config), *listing(config), sep="\n")
        return
    workdir = arguments.workdir or default_workdir(config)
    sharding.use_cpu_devices(config, max(config.distributed.num_processes, 1))
    processes.join(config)
    say = functools.partial(print, flush=True) if processes.first() else lambda *lines: None
    say(f"{headline(config)}\nwork directory {workdir}")
    with open_workdir(workdir, config):
        if processes.gather((workdir / "result.json").exists())[0]:
            say("this run is finished; give another --workdir or seed for a new one")
            result = read_json(workdir / "result.json", "")
        else:
            from train import loop  # not before the request is known to be right: it takes seconds

            result = loop.train(config, workdir)
    say(summary(result))


def default_workdir(config: Config) -> Path:
    """Where a run goes that is not told."""
    return Path("runs") / f"{config.name}-{config.mechanism.name}-{config.preset}-s{config.seed}"


def listing(config: Config) -> list[str]:
    """Every setting as a shell takes it behind `--config.`, by name."""
    settings = configs.flatten(config.to_dict()).items()
    return [shlex.quote(f"{key}={value}") for key, value in settings]


def headline(config: Config) -> str:
    """The first line of a run: what it is, and whether its result is comparable with published numbers."""
    verdict = "comparable" if config.comparable else "NOT comparable"
    return (
        f"{config.name}, preset {config.preset}, mechanism {config.mechanism.name}, seed {config.seed}:"
        f" {verdict} with published numbers ({config.comparability})"
    )


def summary(result: dict) -> str:
    """The test metrics of a run beside the baselines, and what it cost."""
    return (
        f"{results(result['mechanism'], result['test'], result['primary'], result['baselines'])}\n"
        f"best of {result['steps']} steps: {result['best_step']};"
        f" {result['parameters']:,} parameters; {result['seconds_per_step']:.3g} s per step;"
        f" {result['peak_memory_bytes'] / 2**30:.2f} GiB at the peak"
    )


if __name__ == "__main__":
    cli.run(main, sys.argv[1:])
