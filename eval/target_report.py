"""What `eval.targets` found out, as Markdown: a table for each question."""

import textwrap
from collections.abc import Iterator, Mapping
from typing import Any

from eval import aot, work
from eval.measure import PASSES, exponent, number, table
from eval.vendors import DEVICES, TARGETS, Gpu, Target

Entry = dict[str, Any]
"""What was found out about one job, and with what: see `eval.targets`."""

Entries = dict[str, Entry]

FLOOR_LENGTH = 16384
HEAD_WIDTH = aot.SETTINGS.dim // aot.SETTINGS.heads
WIDE = aot.SETTINGS.dim // aot.WIDE_HEADS


def markdown(entries: Entries, code: Mapping[str, str]) -> str:
    """All tables; `code` is the fingerprint of the present code, by kind of entry."""
    sections = [_conditions(entries, code), _compiles(entries), _kernels(entries), _memory(entries)]
    sections += [_steps(entries), _floor(entries)]
    return "\n\n".join(["# Targets", *filter(None, sections)]) + "\n"


# What an entry says.


def finished(entry: Entry) -> bool:
    """Whether the process said what it found, be it that something does not compile."""
    return "programs" in entry or entry.get("status") == "ok"


def succeeded(entry: Entry) -> bool:
    """Whether its programs compile; those for longer sequences than the shortest may need too much memory."""
    return not _problem(entry)


def _problem(entry: Entry) -> str:
    if "programs" not in entry:  # a training step, or a process that ended
        return "" if entry["status"] == "ok" else entry["status"]
    shortest = [p["status"] for p in entry["programs"] if p["length"] == entry["lengths"][0]]
    return next((status for status in shortest if status != "ok"), "")


def merged_kernels(entry: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """By name, what all programs of an entry say of each kernel: of each quantity the largest."""
    found: dict[str, dict[str, Any]] = {}
    for program in entry.get("programs", [entry]):
        for name, kernel in program.get("kernels", {}).items():
            found[name] = aot.largest(found.get(name, {}), kernel)
    return found


def _of_kind(entries: Entries, kind: str) -> Iterator[Entry]:
    """Entries in the order of `TARGETS`."""
    for target in TARGETS:
        yield from (e for e in entries.values() if e["kind"] == kind and e["target"] == target)


def _targets(entries: Entries) -> list[str]:
    return [name for name in TARGETS if any(e["target"] == name for e in entries.values())]


# Sections.


def _section(title: str, prose: str, *parts: str) -> str:
    return "\n\n".join([f"## {title}", _filled(prose), *parts])


def _filled(prose: str) -> str:
    return textwrap.fill(prose, 115, break_long_words=False, break_on_hyphens=False)


def _conditions(entries: Entries, code: Mapping[str, str]) -> str:
    if not entries:
        return "Nothing is recorded."
    made = sorted({", ".join(f"{k} {v}" for k, v in e["versions"].items()) for e in entries.values()})
    dates = sorted({e["date"] for e in entries.values()})
    stale = sum(e["code"] != code[e["kind"]] for e in entries.values())
    settings = aot.SETTINGS
    return _filled(
        "Compiled ahead of time for devices that are not there: nothing ran. Written by `python -m eval.targets`"
        f" ({' to '.join(dict.fromkeys((dates[0], dates[-1])))}). Compiled with {'; or with '.join(made)}."
        f" One sequence, {settings.heads} heads of {HEAD_WIDTH}, {settings.dtype}, projections included,"
        f" causal={settings.causal}, every option at its default."
        + (f" {stale} of {len(entries)} records are of earlier code." if stale else "")
    )


def _compiles(entries: Entries) -> str:
    rows: dict[str, dict[str, str]] = {}
    for entry in _of_kind(entries, "module"):
        row = rows.setdefault(entry["mechanism"], {"mechanism": f"`{entry['mechanism']}`"})
        row[entry["target"]] = _path(entry)
    if not rows:
        return ""
    return _section(
        "Does it compile, and which path runs?",
        "Forward and backward. XLA: the path in portable operations; otherwise the number of fused kernels.",
        table(list(rows.values())),
    )


def _path(entry: Entry) -> str:
    problem, fused = _problem(entry), len(merged_kernels(entry))
    return f"no: {_cell(problem)}" if problem else f"{fused} fused" if fused else "XLA"


def _cell(text: str) -> str:
    return text.replace("|", "/").replace("\n", " ")[:120]


def _kernels(entries: Entries) -> str:
    rows: dict[str, dict[str, str]] = {}
    for entry in (*_of_kind(entries, "module"), *_of_kind(entries, "wide")):
        for name, kernel in merged_kernels(entry).items():
            row = {
                "target": entry["target"],
                "kernel": f"`{name}`",
                "heads of": str(WIDE if entry["kind"] == "wide" else HEAD_WIDTH),
                **_resources(kernel, TARGETS[entry["target"]]),
            }
            same = rows.setdefault(str(row), row | {"mechanisms": ""})
            same["mechanisms"] = ", ".join(filter(None, (same["mechanisms"], entry["mechanism"])))
    title = "What do the kernels need?"
    if not rows:
        return _section(title, "No fused kernel is in any of the programs.")
    return _section(
        title,
        "The largest of their variants. Spilt: bytes stored and loaded again, by ptxas. Matrix, copy: how often"
        " the instructions that multiply matrices and that copy tiles stand in the machine code.",
        table(list(rows.values())),
    )


def _resources(kernel: Mapping[str, Any], target: Target) -> dict[str, str]:
    limit = f" of {target.shared_memory:,}" if isinstance(target, Gpu) else ""
    counted = kernel.get("instructions")

    def listed(names: tuple[str, ...]) -> str:
        if counted is None:
            return "not disassembled"
        return ", ".join(f"{name} {counted[name]}" for name in names if name in counted) or "none"

    shared = f"{kernel['shared_memory']:,}{limit}" if "shared_memory" in kernel else "?"
    return {
        "registers": str(kernel.get("registers", "?")),
        "spilt": str(kernel.get("spill_bytes", "?")),
        "shared memory": shared,
        "matrix": listed(aot.MATRIX),
        "copy": listed(aot.COPY),
    }


def _memory(entries: Entries) -> str:
    parts = []
    for target in _targets(entries):
        found = [e for kind in ("module", "dense") for e in _of_kind(entries, kind) if "programs" in e]
        if here := [e for e in found if e["target"] == target]:
            parts += [f"### {target}", table([_memory_row(e) for e in here])]
            parts += filter(None, ["\n".join(reason for e in here for reason in _too_long(e))])
    if not parts:
        return ""
    return _section(
        "How much memory does it need?",
        f"Temporary memory of {PASSES[-1]} by tokens, in MiB, and the exponent of its growth between the two"
        " longest, with the mechanism's own claim. Dense: the version that computes all weights at once. XLA keeps"
        " what it can in the vector memory of a TPU, and does not count it.",
        *parts,
    )


def _too_long(entry: Entry) -> Iterator[str]:
    """Why there are programs that do not compile."""
    for program in entry["programs"]:
        if program["status"] != "ok":
            what = f"{entry['mechanism']}, {program['length']:,} tokens, {program['pass']}"
            yield f"- no: {what}{', dense' if entry['kind'] == 'dense' else ''}: {_cell(program['status'])}"


def _memory_row(entry: Entry) -> dict[str, str]:
    dense = entry["kind"] == "dense"
    row, points = {"mechanism": f"`{entry['mechanism']}`" + (", dense" if dense else "")}, {}
    for program in entry["programs"]:
        if program["pass"] == PASSES[-1]:
            ok = program["status"] == "ok"
            row[f"{program['length']:,}"] = number(program["temp_bytes"] / 2**20) if ok else "no"
            points |= {program["length"]: program["temp_bytes"]} if ok else {}
    growth = exponent(dict(sorted(points.items())[-2:]))
    return row | {"growth": "" if growth is None else f"{growth:.2f}", "claim": "" if dense else entry["memory"]}


def _steps(entries: Entries) -> str:
    rows = []
    for entry in _of_kind(entries, "train"):
        row = {"target": entry["target"], "mechanism": f"`{entry['mechanism']}`"}
        if entry["status"] != "ok":
            rows.append(row | {"kernel calls": f"does not compile: {_cell(entry['status'])}"})
            continue
        calls = sum(kernel["calls"] for kernel in entry["kernels"].values())
        row |= {"kernel calls": str(calls) if calls else "XLA", "MiB": number(entry["temp_bytes"] / 2**20)}
        row |= {name: str(entry["collectives"].get(name, 0)) for name in aot.COLLECTIVES}
        for what, arrays in entry["gathered"].items():
            row[f"gathered: {what}"] = ", ".join(f"{n} {array}" for array, n in arrays.items()) or "none"
        rows.append(row)
    if not rows:
        return ""
    mesh = ", ".join(f"{axis} {size}" for axis, size in aot.MESH.items())
    return _section(
        f"What does a training step on {DEVICES} devices exchange?",
        f"ListOps at its published width and length with {aot.LAYERS} layers, mesh {mesh}. MiB: temporary, of each"
        " device. Collectives are counted in the program's text: in a loop once, of several arrays together once."
        " Gathered are arrays of the training state (parameters, gradients, moments) or activations; gathering"
        " activations would be a fault of sharding.",
        table(rows),
    )


# The bound from below.


def _floor(entries: Entries) -> str:
    rows = []
    targets = _targets(entries)
    names = dict.fromkeys(e["mechanism"] for e in _of_kind(entries, "module"))
    for name in names:
        least = work.of(name, FLOOR_LENGTH, aot.SETTINGS.heads, HEAD_WIDTH)
        if least is None:
            continue
        both = least[PASSES[-1]]
        row = {"mechanism": f"`{name}`", "GFLOP": number(both.flops / 1e9), "kernels'": "–"}
        row |= {"G exp": number(both.exponentials / 1e9), "MB": number(both.bytes / 1e6), "kernels' MB": "–"}
        if claimed := _claimed(entries, name):
            row |= {"kernels'": number(claimed["flops"] / 1e9), "kernels' MB": number(claimed["bytes"] / 1e6)}
        rows.append(row | {target: _bound(both, TARGETS[target]) for target in targets})
    if not rows:
        return ""
    return _section(
        "How fast could it be?",
        f"{PASSES[-1].capitalize()} of {FLOOR_LENGTH:,} tokens between the projections: what the equation asks for"
        " (`eval/work.py`), what the kernels say they do, and for each target the time below which no"
        " implementation can come, in ms, from peak rates of products (p), exponentials (e; known for GPUs) or"
        " memory (m), whichever takes longest. These are bounds, not measurements. What the kernels say is the"
        " most that they may do: of the tiles that they leave out it knows those beyond a window, but not those"
        " that depend on data or on the position of the first query (spans, reach, causal order).",
        table(rows),
    )


def _claimed(entries: Entries, mechanism: str) -> dict[str, float] | None:
    """What the kernels of the first target that has any say they do at `FLOOR_LENGTH`."""
    for entry in _of_kind(entries, "module"):
        for program in entry.get("programs", []):
            asked = (entry["mechanism"], program["length"], program["pass"]) == (
                mechanism,
                FLOOR_LENGTH,
                PASSES[-1],
            )
            if asked and any(kernel["flops"] for kernel in program.get("kernels", {}).values()):
                claims = program["kernels"].values()
                return {quantity: sum(kernel[quantity] for kernel in claims) for quantity in ("flops", "bytes")}
    return None


def _bound(least: work.Work, target: Target) -> str:
    seconds = {"p": least.flops / target.flops, "m": least.bytes / target.bandwidth}
    if target.exponentials:
        seconds["e"] = least.exponentials / target.exponentials
    what = max(seconds, key=lambda name: seconds[name])
    return f"{number(1e3 * seconds[what])} {what}"
