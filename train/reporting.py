"""Where the numbers of a run go: `metrics.jsonl` (the source of truth), TensorBoard events, and the console."""

import json
import math
import sys
import time
from collections.abc import Collection, Mapping
from pathlib import Path

from tqdm import tqdm

from train.workdir import read_metrics, write_metrics


class Reporter:
    """Writes the metrics of a run that goes on after `step` of `total` steps.

    Records that an earlier attempt wrote, and this one will write again, are dropped; `validated` are the steps
    whose validation this one will not repeat.
    """

    def __init__(self, workdir: Path, step: int, total: int, validated: Collection[int]):
        path = workdir / "metrics.jsonl"
        records = read_metrics(path)
        done = {"train": range(step + 1), "val": validated, "test": ()}
        write_metrics(path, [record for record in records if record["step"] in done[record["split"]]])
        self._file = path.open("a")
        self._events = _summary_writer()(str(workdir), purge_step=step + 1)
        self._interactive = sys.stderr.isatty()
        self._bar = tqdm(total=total, initial=step, unit="step", disable=not self._interactive, dynamic_ncols=True)
        self._total, self._first, self._start = total, step, time.monotonic()

    def write(self, step: int, split: str, metrics: Mapping[str, float]) -> None:
        """Records `metrics` of `split` after `step` steps."""
        # JSON has no NaN; a diagnostic may be undefined, such as the perplexity of a codebook not yet used.
        values = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        self._file.write(json.dumps({"step": step, "split": split, **values}) + "\n")
        self._file.flush()
        for name, value in metrics.items():
            self._events.add_scalar(f"{split}/{name}", value, step)
        names = sorted((name for name in metrics if "/" not in name), key=lambda name: name != "loss")
        shown = "  ".join(f"{name} {metrics[name]:.4g}" for name in names)
        if split == "train" and self._interactive:
            self._bar.set_postfix_str(shown, refresh=False)
        else:
            remaining = self._remaining(step) if split == "train" else ""
            self.say(f"step {step:>{len(str(self._total))}}/{self._total}  {split:5}  {shown}{remaining}")

    def step(self) -> None:
        """One more step is done."""
        self._bar.update()

    def say(self, line: str) -> None:
        """Prints a line that the progress bar does not overwrite."""
        if self._interactive:
            self._bar.write(line)
        else:
            print(line, flush=True)

    def close(self) -> None:
        self._bar.close()
        self._events.close()
        self._file.close()

    def _remaining(self, step: int) -> str:
        per_step = (time.monotonic() - self._start) / (step - self._first)
        return f"  ({duration(per_step * (self._total - step))} left)"


class Silent(Reporter):
    """Of a process that leaves reporting to another: does nothing."""

    def __init__(self, *arguments: object):
        pass

    def write(self, step: int, split: str, metrics: Mapping[str, float]) -> None:
        pass

    def step(self) -> None:
        pass

    def say(self, line: str) -> None:
        pass

    def close(self) -> None:
        pass


def _summary_writer() -> type:
    # tensorboardX imports torch if it is there, which takes seconds and half a gigabyte, and does without if not.
    hide_torch = "torch" not in sys.modules
    if hide_torch:
        sys.modules["torch"] = None  # pyright: ignore[reportArgumentType]
    try:
        from tensorboardX import SummaryWriter
    finally:
        if hide_torch:
            del sys.modules["torch"]
    return SummaryWriter


def results(mechanism: str, metrics: Mapping[str, float], primary: str, baselines: Mapping[str, float]) -> str:
    """Metrics as a table beside the baselines' `primary` one; under it the diagnostics of single layers."""
    rows = {mechanism: {name: value for name, value in metrics.items() if "/" not in name}}
    rows |= {name: {primary: value} for name, value in baselines.items()}
    diagnostics = [f"{name} {value:.4g}" for name, value in metrics.items() if "/" in name]
    return "\n".join([table(rows), *diagnostics])


def duration(seconds: float) -> str:
    """`75` as `1:15`, `3675` as `1:01:15`."""
    minutes, seconds = divmod(math.ceil(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def table(rows: Mapping[str, Mapping[str, float | str]]) -> str:
    """Rows of named values, under a head of the names of all of them."""
    names = list(dict.fromkeys(name for row in rows.values() for name in row))
    lines = [["", *names]]
    for title, row in rows.items():
        values = [row.get(name, "") for name in names]
        lines.append([title, *(value if isinstance(value, str) else f"{value:.4f}" for value in values)])
    first, *widths = (max(map(len, column)) for column in zip(*lines))
    return "\n".join("  ".join([title.ljust(first), *map(str.rjust, cells, widths)]) for title, *cells in lines)
