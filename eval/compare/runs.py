"""What a comparison reads of a work directory."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from train.cli import UsageError, user_errors
from train.config import config_hash
from train.workdir import read_json, read_metrics

Curve = list[tuple[int, float]]
"""`(step, value)` of a metric in a run."""

# Of result.json: what a comparison needs of every run.
_NEEDED = {
    **dict.fromkeys(("name", "preset", "mechanism", "comparability", "primary", "better", "devices"), str),
    **dict.fromkeys(("comparable",), bool),
    **dict.fromkeys(("test", "baselines"), dict),
    **dict.fromkeys(("seed", "best_step", "steps", "parameters", "peak_memory_bytes"), int),
    **dict.fromkeys(("epochs_to_90_percent_of_best", "seconds_per_step"), (int, float)),
}


@dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
      folder: its work directory.
      config, result: the content of `config.json` and `result.json`.
      setting: equal for the runs that differ only in their seed and in where and how they ran.
      examples: `(examples,)` float64, the primary metric of each test example, NaN where it is undefined; None
        where the run kept none.
      curves: by `(split, metric)`, for the splits `train` and `val`.
    """

    folder: Path
    config: Mapping[str, Any]
    result: Mapping[str, Any]
    setting: str
    examples: np.ndarray | None
    curves: Mapping[tuple[str, str], Curve]

    @property
    def seed(self) -> int:
        return self.result["seed"]

    @property
    def primary(self) -> float:
        """The primary metric on the test split."""
        return self.result["test"][self.result["primary"]]


def read(folder: Path) -> Run:
    """Reads the run in `folder`.

    Raises:
      UsageError: there is none, it is not finished, or a file of it is damaged.
    """
    config = read_json(folder / "config.json", "give work directories of python -m train")
    if not (folder / "result.json").exists():
        raise UsageError(f"the run in {folder} is not finished; the command that started it goes on with it")
    result = read_json(folder / "result.json", "run it again")
    for name, content in (("config.json", config), ("result.json", result)):
        if not isinstance(content, dict):
            raise UsageError(f"cannot read {folder / name}: it is no JSON object")
    _check(folder / "result.json", result)
    examples = _examples(folder / "test_examples.json", result["primary"])
    return Run(
        folder, config, result, config_hash(ConfigDict(config)), examples, _curves(folder / "metrics.jsonl")
    )


def read_all(folders: Iterable[Path]) -> tuple[list[Run], list[str]]:
    """The runs in `folders`, each once, and for every folder that is left out a line that says why."""
    runs: list[Run] = []
    left_out: list[str] = []
    seen: dict[Path, Path] = {}
    same: dict[tuple[str, int], Path] = {}
    for folder in folders:
        if folder.resolve() in seen:
            left_out.append(f"{folder} is given twice; it counts once")
            continue
        seen[folder.resolve()] = folder
        try:
            run = read(folder)
        except UsageError as error:
            left_out.append(" ".join(str(error).split()))
            continue
        first = same.setdefault((run.setting, run.seed), folder)
        if first is not folder:
            left_out.append(f"{folder} repeats {first}: the same settings and seed {run.seed}; the first counts")
            continue
        runs.append(run)
    return runs, left_out


def _check(path: Path, result: Mapping[str, Any]) -> None:
    wrong = [key for key, kind in _NEEDED.items() if not isinstance(result.get(key), kind)]
    if wrong:
        raise UsageError(f"cannot read {path}: no or unknown {', '.join(wrong)}")
    value = result["test"].get(result["primary"])
    if not isinstance(value, int | float) or not math.isfinite(value):
        raise UsageError(f"cannot read {path}: its test {result['primary']} is {value}")


def _examples(path: Path, metric: str) -> np.ndarray | None:
    if not path.exists():
        return None
    values = read_json(path, "run it again")
    if not isinstance(values, dict) or metric not in values:
        raise UsageError(f"cannot read {path}: it has no {metric}")
    with user_errors(ValueError, TypeError):
        return np.array(values[metric], np.float64)  # None becomes NaN


def _curves(path: Path) -> dict[tuple[str, str], Curve]:
    try:
        records = read_metrics(path)
        found: dict[tuple[str, str], Curve] = {}
        for record in records:
            for name, value in record.items():
                if record["split"] in ("train", "val") and name not in ("step", "split") and value is not None:
                    found.setdefault((record["split"], name), []).append((record["step"], value))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"cannot read {path}: {error}") from error
    return found
