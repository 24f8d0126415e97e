"""The notebooks run, and each is in two forms: a script to read and change, and what Jupyter and Colab open."""

import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import nbclient
import pytest

from tests.notebooks import SCRIPTS, notebook, text

every_notebook = pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)


@every_notebook
def test_both_forms_say_the_same(script):
    """Renew the second with `python -m tests.notebooks`."""
    assert script.with_suffix(".ipynb").read_text() == text(script)


@every_notebook
def test_it_runs(script, monkeypatch, tmp_path):
    """At smoke size, in a kernel of its own, started where the notebook is."""
    monkeypatch.setenv("ATTN_JAX_SMOKE", "1")
    monkeypatch.setenv("ATTN_JAX_CACHE", str(tmp_path))
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")  # so little is computed that compiling takes longer
    resources = {"metadata": {"path": str(script.parent)}}
    nbclient.NotebookClient(notebook(script), timeout=300, kernel_name="python3", resources=resources).execute()


def installation(script):
    (cell,) = (c.source for c in notebook(script).cells if "REPOSITORY = " in c.source)
    return cell


def test_all_install_alike():
    cells = {installation(script).replace('["test"]', "[]").replace(": list[str]", "") for script in SCRIPTS}
    assert len(SCRIPTS) == 3 and len(cells) == 1


@pytest.mark.parametrize(
    "environment, gpu, extras", [({}, 1, ""), ({}, 0, "[cuda12]"), ({"TPU_ACCELERATOR_TYPE": "v5e"}, 1, "[tpu]")]
)
def test_outside_a_checkout_the_extra_of_the_device_is_installed(environment, gpu, extras, tmp_path, monkeypatch):
    """`gpu` is the exit code of `nvidia-smi`, which is there in any case."""
    commands = []

    def run(command, **kwargs):
        commands.append(command)
        if command[:2] == ["git", "clone"]:
            Path(command[-1]).mkdir()
        return SimpleNamespace(returncode=gpu)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(shutil, "which", lambda program: f"/usr/bin/{program}")
    for name in ("COLAB_TPU_ADDR", "TPU_NAME", "TPU_ACCELERATOR_TYPE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    source = installation(SCRIPTS[0]).replace('REPOSITORY = ""', 'REPOSITORY = "somewhere"')
    exec(source, {})
    clone, install = commands[-2:]
    assert clone == ["git", "clone", "--depth", "1", "somewhere", str(tmp_path / "attn-jax")]
    assert install[1:] == ["-m", "pip", "install", "--quiet", "--editable", f"{tmp_path / 'attn-jax'}{extras}"]
    assert Path.cwd() == tmp_path / "attn-jax"


def test_outside_a_checkout_an_address_is_asked_for(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RuntimeError, match="set REPOSITORY in this cell"):
        exec(installation(SCRIPTS[0]), {})
