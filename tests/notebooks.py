"""The notebooks: scripts in notebooks/*.py, and the .ipynb made of each by `python -m tests.notebooks`."""

from pathlib import Path

import jupytext

SCRIPTS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.py"))


def notebook(script):
    """The notebook of a `script` in Jupytext's percent format, without outputs, its cells numbered."""
    made = jupytext.read(script)
    for number, cell in enumerate(made.cells):
        cell["id"] = f"cell-{number}"
    return made


def text(script):
    """The content of the .ipynb that belongs to `script`."""
    return jupytext.writes(notebook(script), fmt="ipynb")


if __name__ == "__main__":
    for script in SCRIPTS:
        script.with_suffix(".ipynb").write_text(text(script))
