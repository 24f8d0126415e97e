"""Compare finished runs: `python -m eval.compare runs/lra_listops-*`.

Runs that differ only in their seed are one setting; settings measured on the same test data are one section, so
runs of several tasks may be given at once. Writes to --out

  report.html  the whole report in one file: tables, charts, learning curves, attention maps
  report.md    the same without figures
  report.json  all numbers

and prints the tables. Folders that hold no finished run are left out, and the report says so.
"""

import json
import sys
from pathlib import Path

from eval.measure import replace
from train import cli


def main(argv: list[str]) -> None:
    """Compares the runs that the command line `argv` (without the program) names."""
    parser = cli.Parser(prog="python -m eval.compare", description=__doc__)
    parser.add_argument("folders", type=Path, nargs="+", metavar="DIR", help="a work directory of python -m train")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", default=Path("runs") / "compare", help="default: runs/compare"
    )
    parser.add_argument("--no-maps", action="store_true", help="restore no model, draw no attention maps")
    arguments = parser.parse_args(argv)
    for folder in arguments.folders:
        if not folder.is_dir():
            raise cli.UsageError(f"no folder {folder}; give work directories of python -m train")

    from eval.compare import maps, report  # not before the command line is known to be right: they take seconds
    from eval.compare.comparison import compare
    from eval.compare.document import markdown, page

    comparison = compare(arguments.folders)
    for line in comparison.left_out:
        print(f"left out: {line}", file=sys.stderr)
    drawn = None if arguments.no_maps else maps.draw(comparison)
    blocks = list(report.blocks(comparison, drawn))
    files = {
        "report.html": page(report.TITLE, blocks),
        "report.md": markdown(report.TITLE, blocks),
        "report.json": json.dumps(comparison.to_json(), indent=2) + "\n",
    }
    with cli.user_errors(OSError):
        arguments.out.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            replace(arguments.out / name, content.encode())
    print(
        markdown(report.TITLE, list(report.summary(comparison))),
        f"written to {', '.join(str(arguments.out / name) for name in files)}",
        sep="\n",
    )


if __name__ == "__main__":
    cli.run(main, sys.argv[1:])
