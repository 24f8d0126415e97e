"""Every command and every Python example in README.md and docs/ runs.

The commands run one after the other in one folder, as a reader would type them who reads one document after the
other; what another one said before is not done again. What trains does so with the sizes of the preset `smoke`,
one layer and two steps; what needs hours, devices or a network is asked for its `--help`, and a `paper` preset for
its settings.
"""

import glob
import importlib
import re
import shlex
import tomllib
from pathlib import Path
from unittest.mock import patch

import pytest

from attn_jax import registry
from tests.runs import outcome
from train import config as configs

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PLACEHOLDERS = {"MECHANISM": "standard", "TASK": "listops"}
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"].keys()

# One device divides every batch.
FEW = {"batch_size": 4, "steps": 2, "eval_every": 2, "model.num_layers": 1, "mesh.data": 1}
VERDICT = ("preset", "comparable", "comparability")
PACKAGES = ("train", "eval", "eval.compare", "eval.experiments")
# Programs with tests of their own; each takes minutes or hours, or compilers and devices.
LONG = ("eval.attention_docs", "eval.benchmark", "eval.experiments", "eval.gpu", "eval.targets")
# Programs that are not ours, or that run the tests themselves.
OTHERS = ("pytest", "ruff", "pyright", "uv", "hf", "srun", "jupyter", "git", "cd")

CODE = re.compile(
    r"```python\n(?P<python>.*?)```"
    r"|```\w*\n(?P<fenced>.*?)```"
    r"|(?<=\n\n)(?P<indented>(?: {4}.+\n)+)"
    r"|`(?P<span>[^`]+)`",
    re.DOTALL,
)


def code(text):
    """What a document, generated parts left out, has to run: Python sources, and commands split into words."""
    text = re.sub(r"<!-- generated: (\w+) -->.*?<!-- generated: end of \1 -->", "", text, flags=re.DOTALL)
    for found in CODE.finditer(text):
        if found["python"]:
            yield found["python"]
            continue
        lines = (found["fenced"] or found["indented"] or " ".join(found["span"].split())).replace("\\\n", " ")
        for part in (part for line in lines.splitlines() for part in line.split("&&")):
            if re.match(rf"\s*(python -m|pip install|{'|'.join(OTHERS)}) ", part):
                yield shlex.split(part, comments=True)


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    """The folder to work in, and what has been done there."""
    folder = tmp_path_factory.mktemp("desk")
    (folder / "configs").symlink_to(ROOT / "configs")
    return folder, []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_command_and_example_runs(document, desk, monkeypatch):
    folder, done = desk
    monkeypatch.chdir(folder)
    source = ""
    for item in code(document.read_text()):
        if item in done:
            continue
        done.append(item)
        with patch.dict(registry._registered):  # what an example registers goes with it
            if isinstance(item, str):
                source = item
                exec(compile(item, document.name, "exec"), {"__name__": "example"})
            elif item[:2] == ["pip", "install"]:
                named = re.findall(r"\[([\w,]+)\]", " ".join(item))
                assert EXTRAS >= {extra for extras in named for extra in extras.split(",")}
            elif item[:2] == ["python", "-m"]:
                run(item[2], item[3:], source)


def run(program, arguments, source):
    """Runs `python -m program` in this process; `source` is the content of a config that is not there."""
    if program in LONG or not arguments:
        arguments = [*arguments, "--help"]
    elif program == "train":
        arguments = short(arguments, source)
    arguments = [name for word in arguments for name in (glob.glob(word) if "*" in word else [word])]
    main = importlib.import_module(f"{program}.__main__" if program in PACKAGES else program).main
    code, out, err = outcome(main, *arguments)
    assert code == 0, f"python -m {program} {' '.join(arguments)}\n{err}"
    assert out


def short(arguments, source):
    """`arguments` of `python -m train` as a run of seconds: a default run gets the sizes of the preset `smoke`."""
    path = arguments[arguments.index("--config") + 1]
    if any(name in path for name in PLACEHOLDERS):
        for name, value in PLACEHOLDERS.items():
            path = path.replace(name, value)
        return ["--config", path, "--show"]
    file = path.partition(":")[0]
    if not Path(file).exists():
        Path(file).write_text(source)
    meant = configs.load(path, [])
    elsewhere = any(word.startswith("--config.distributed.") for word in arguments)
    if meant.preset == "paper" or elsewhere or "--show" in arguments:
        return [*(word for word in arguments if word != "--show"), "--show"]
    smoke = configs.load(f"{file}:{meant.mechanism.name},smoke", [])
    as_is, smoke = (configs.flatten(config.to_dict()) for config in (meant, smoke))
    less = {key: value for key, value in smoke.items() if key not in VERDICT and value != as_is[key]}
    own = dict(word.removeprefix("--config.").split("=", 1) for word in arguments if word.startswith("--config."))
    rest = [word for word in arguments if not word.startswith("--config.")]
    return rest + [f"--config.{key}={value}" for key, value in (less | own | FEW).items()]
