"""Renew the generated parts of docs/attention.md: what each mechanism supports, is, and costs.

  python -m eval.attention_docs                                            # from the registry and the docstrings
  python -m eval.attention_docs --benchmark runs/benchmark/benchmark.json  # and the measurements, from this file

Everything outside the markers in the document is written by hand and stays.
"""

import inspect
import json
import sys
from pathlib import Path
from typing import Any

from attn_jax import MECHANISMS
from eval.growth_report import cell, curve
from eval.measure import PASSES, conditions, exponent, replace, table
from train import cli

DOCUMENT = Path(__file__).parent.parent / "docs" / "attention.md"

# What the numbers beside it are to be read for.
ADVICE = {
    "standard": "exact attention; the one to beat wherever its quadratic time is affordable",
    "local": "what matters is near: text at the byte level, audio, video frames",
    "dual_kv": "a second set of keys and values might help; compare at equal parameters with `param_mode`",
    "vq": "few distinct keys, long sequences; codebooks must be trained and watched (`pop_aux`)",
    "hyper": "long sequences whose attention is a few large weights over a flat rest",
    "maw": "examples of different kinds want different attention, and a loss or reward can tell which",
    "gravitational": "closeness, not direction, of queries and keys should count; tokens differ in weight",
    "multi_timescale": "a decay in time at several rates, the short ones linear in the length",
    "gravitational_multi_timescale": "both at once",
    "strided": "every token within two layers at a fraction of the cost",
    "local_global": "near tokens and a summary of everything, linear in the length",
    "cross_memory": "a second sequence or learned slots to read from",
    "performer": "linear time and a state of constant size; queries and keys of small norm",
    "mamba": "linear time, a state of constant size, order matters; no attention weights",
}


def main(argv: list[str]) -> None:
    """Writes docs/attention.md anew as the command line `argv` says."""
    parser = cli.Parser(prog="python -m eval.attention_docs", description=__doc__)
    help = "of python -m eval.benchmark; where there are several, later ones replace mechanisms of earlier ones"
    parser.add_argument("--benchmark", type=Path, nargs="+", metavar="FILE", help=help)
    parser.add_argument("--out", type=Path, default=DOCUMENT, metavar="FILE", help="default: docs/attention.md")
    args = parser.parse_args(argv)
    sections = {"support": support_matrix(), "mechanisms": descriptions()}
    with cli.user_errors(OSError, ValueError, KeyError):
        if args.benchmark:
            sections["measured"] = measured(_combined([json.loads(path.read_text()) for path in args.benchmark]))
        text = DOCUMENT.read_text()
        for name, content in sections.items():
            text = _with_section(text, name, content)
        replace(args.out, text.encode())
    print(f"written to {args.out}: {', '.join(sections)}")


def section(text: str, name: str) -> str:
    """What stands between the markers of `name`."""
    return text.split(_marker(name))[1].split(_marker(f"end of {name}"))[0].strip()


def _with_section(text: str, name: str, content: str) -> str:
    before, rest = text.split(_marker(name))
    _, after = rest.split(_marker(f"end of {name}"))
    return f"{before}{_marker(name)}\n\n{content}\n\n{_marker(f'end of {name}')}{after}"


def _marker(name: str) -> str:
    return f"<!-- generated: {name} -->"


def support_matrix() -> str:
    """The capabilities of every mechanism, from the registry."""
    rows = []
    for name, mechanism in MECHANISMS.items():
        row = {"mechanism": f"[`{name}`](#{name})", "time": mechanism.time, "memory": mechanism.memory}
        for capability in ("bidirectional", "causal", "mask", "cross", "decode", "weights"):
            row[capability] = "yes" if getattr(mechanism, capability) else "–"
        rows.append(row | {"implementations": ", ".join(mechanism.implementations) or "one"})
    return table(rows)


def descriptions() -> str:
    """The documentation of every mechanism's file, and its options with their defaults."""
    parts = []
    for name, mechanism in MECHANISMS.items():
        documentation = inspect.getdoc(inspect.getmodule(mechanism.module)) or ""
        options = ", ".join(f"`{option}={default!r}`" for option, default in mechanism.options().items())
        parts.append(f"### {name}\n\n{documentation.strip()}\n\nOptions: {options or 'none'}.")
    return "\n\n".join(parts)


def _combined(results: list[dict[str, Any]]) -> dict[str, Any]:
    first, *others = results
    for other in others:
        first["growth"] = [r for r in first["growth"] if r["mechanism"] not in other["checks"]] + other["growth"]
        first["checks"] |= other["checks"]
    return first


def measured(result: dict[str, Any]) -> str:
    """Growth and cost of every mechanism in a benchmark, and when to use it."""
    lengths = result["flags"]["lengths"]
    shown = sorted({4096 if 4096 in lengths else lengths[0], 65536 if 65536 in lengths else lengths[-1]})
    rows = []
    for name in result["checks"]:
        row = {"mechanism": f"`{name}`"}
        for pass_name in PASSES:
            fit = exponent(curve(result, name, pass_name, "cpu"))
            row[f"growth, {pass_name}"] = "" if fit is None else f"{fit:.2f}"
        for length in shown:
            cells = [
                cell(r)
                for r in result["growth"]
                if (r["mechanism"], r["pass"], r["length"]) == (name, PASSES[1], length)
            ]
            row[f"{length:,} tokens, {PASSES[1]}"] = cells[0] if cells else ""
        longest = [n for n in curve(result, name, PASSES[0], "wall")]
        row["longest run, forward"] = f"{max(longest):,}" if longest else ""
        rows.append(row | {"use it where": ADVICE.get(name, "")})
    return f"{conditions(result)}\n\n{table(rows)}"


if __name__ == "__main__":
    cli.run(main, sys.argv[1:])
