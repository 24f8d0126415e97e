"""Config files, their variants, and the command line on top of them."""

import inspect
import json
import re
from pathlib import Path
from unittest.mock import patch

import pytest
from ml_collections import ConfigDict

import attn_jax
from attn_jax import registry
from train import config as configs
from train.cli import UsageError

TOY = "tests/toy.py"
FILES = sorted(str(path) for path in Path("configs").glob("*.py"))


@pytest.mark.parametrize("preset", configs.PRESETS)
@pytest.mark.parametrize("file", FILES)
def test_every_config_file_has_every_preset(file, preset):
    config = configs.load(f"{file}:{preset}", [])
    assert config.preset == preset
    assert config.name == Path(file).stem
    assert config.comparability, "a run says how its result relates to published numbers"
    assert json.loads(json.dumps(configs.to_dict(config))) == configs.to_dict(config)


@pytest.mark.parametrize("file", FILES)
def test_every_config_file_says_how_to_run_it(file):
    documentation = inspect.cleandoc(Path(file).read_text().split('"""')[1])
    assert f"python -m train --config {file}" in documentation


@pytest.mark.parametrize("name", sorted(attn_jax.MECHANISMS))
def test_mechanism_and_preset_come_in_any_order(name):
    one, other = configs.load(f"{TOY}:{name},smoke", []), configs.load(f"{TOY}:smoke,{name}", [])
    assert one.to_dict() == other.to_dict()
    assert (one.mechanism.name, one.preset, one.steps) == (name, "smoke", 8)
    assert set(one.mechanism) == {"name", *attn_jax.MECHANISMS[name].options()}


def test_mechanism_flag_equals_the_variant():
    by_variant = configs.load(f"{TOY}:local,smoke", ["--config.mechanism.window=3"])
    for flag in (["--config.mechanism.name=local"], ["--config.mechanism.name", "local"]):
        by_flag = configs.load(f"{TOY}:smoke", [*flag, "--config.mechanism.window=3"])
        assert configs.to_dict(by_flag) == configs.to_dict(by_variant)
    assert by_variant.mechanism.window == 3


def test_mechanism_flag_finds_what_the_file_registers(tmp_path):
    file = tmp_path / "own.py"
    file.write_text(
        "import attn_jax\nfrom attn_jax.mechanisms.standard import StandardAttention\n"
        "from configs.lra_listops import get_config\n"
        "attn_jax.register('own', causal=False, time='L', memory='L')(type('Own', (StandardAttention,), {}))\n"
    )
    with patch.dict(registry._registered):
        assert configs.load(str(file), ["--config.mechanism.name=own"]).mechanism.name == "own"


def test_an_option_without_a_default_value_takes_any_literal():
    assert attn_jax.MECHANISMS["standard"].options()["implementation"] is None
    config = configs.load(TOY, ["--config.mechanism.implementation=xla"])
    assert config.mechanism.implementation == "xla"


@pytest.mark.parametrize(
    "path, overrides, complaint",
    [
        ("configs/nope.py", [], r"no config file `configs/nope.py`"),
        ("README.md", [], r"no config file"),
        (f"{TOY}:nope", [], r"`nope` is neither a preset \(smoke, default, paper\) nor a mechanism \(.*standard"),
        (f"{TOY}:smoke,paper", [], r"names two presets, `smoke` and `paper`"),
        (f"{TOY}:standard,local", [], r"names two mechanisms"),
        (TOY, ["--config.nope=1"], r"--config.nope: `config` has no `nope`; it has .*steps"),
        (TOY, ["--config.model.nope=1"], r"`config.model` has no `nope`; it has dim, dropout, hidden"),
        (TOY, ["--config.steps.nope=1"], r"`config.steps` has no `nope`, it is a value"),
        (TOY, ["--config.steps=many"], r"--config.steps=many: invalid literal for int"),
        (TOY, ["--config.steps"], r"Missing value for flag --config.steps"),
        (TOY, ["--config.model={}"], r"is a section; set one of its keys: dim, dropout, hidden"),
        (TOY, ["--config.mechanism.name=nope"], r"no mechanism `nope`; there are .*standard"),
        (TOY, ["--config.comparable=True"], r"--config.comparable cannot be set: it follows from --config FILE"),
        (TOY, ["--config.preset=paper"], r"--config.preset cannot be set"),
        (TOY, ["--config.data_location.key=steps"], r"--config.data_location.key cannot be set"),
        (TOY, ["--config.mechanism.nope=1"], r"mechanism `standard` has no `nope`; it has implementation, name"),
        (TOY, ["--config.mechanism.name=local", "--config.mechanism.nope=1"], r"mechanism `local` has no `nope`"),
        (TOY, 2 * ["--config.optimizer.no_decay=('vectors',)"], r"--config.optimizer.no_decay is given 2 times"),
        (TOY, ["nope"], r"unexpected argument `nope`"),
        (TOY, ["--nope=1"], r"nope"),
    ],
)
def test_a_wrong_command_line_is_one_line_that_says_what_is_right(path, overrides, complaint):
    with pytest.raises(UsageError) as error:
        configs.load(path, overrides)
    assert re.search(complaint, str(error.value))
    assert "\n" not in str(error.value)


def test_a_changed_setting_is_not_comparable():
    plain = configs.load(TOY, [])
    assert configs.load(TOY, ["--config.seed=3"]).comparability == plain.comparability
    assert configs.load(TOY, ["--config.mesh.data=1"]).comparability == plain.comparability
    changed = configs.load(TOY, ["--config.model.dim=8", "--config.steps=3"])
    assert not changed.comparable
    assert set(changed.comparability.removeprefix("changed from the preset: ").split(", ")) == {
        "model.dim",
        "steps",
    }


LOCATIONS = [
    ("lra_listops", "task.data_dir", None),
    ("lra_text", "task.source", "news"),
    ("lra_retrieval", "task.source", "news"),
    ("lra_image", "task.source", "digits"),
    ("lra_pathfinder", "task.data_dir", None),
    ("lra_pathx", "task.data_dir", None),
]


@pytest.mark.parametrize("name, key, other_data", LOCATIONS)
def test_where_the_data_lie_changes_no_verdict_and_other_data_do(name, key, other_data):
    def verdict(*flags, preset="paper"):
        config = configs.load(f"configs/{name}.py:{preset}", [f"--config.{flag}" for flag in flags])
        return config.comparable, config.comparability

    assert verdict(f"{key}=~/data") == verdict()
    assert verdict(f"{key}=~/data", "steps=3") == (False, "changed from the preset: steps")
    if other_data is not None:
        assert verdict(f"{key}={other_data}") == (False, f"changed from the preset: {key}")
        # The other presets read the stand-in, from which the published data differ.
        assert verdict(f"{key}=~/data", preset="default") == (False, f"changed from the preset: {key}")


def test_differing_keys_are_named_wherever_they_are():
    a = configs.to_dict(configs.load(TOY, []))
    b = configs.to_dict(configs.load(f"{TOY}:local", ["--config.optimizer.b1=0.5", "--config.log_every=1"]))
    assert configs.differing_keys(a, a) == []
    assert set(configs.differing_keys(a, b)) == {"optimizer.b1", "mechanism.name", "mechanism.window"}
    assert set(configs.differing_keys(b, a)) == {"optimizer.b1", "mechanism.name", "mechanism.window"}


def test_hash_is_that_of_the_experiment():
    config = configs.load(TOY, [])
    same = [["--config.seed=5"], ["--config.mesh.data=2"], ["--config.num_cpu_devices=1"]]
    other = [["--config.model.dim=8"], ["--config.mechanism.name=local"], ["--config.optimizer.b2=0.9"]]
    assert {configs.config_hash(configs.load(TOY, flags)) for flags in same} == {configs.config_hash(config)}
    assert len({configs.config_hash(configs.load(TOY, flags)) for flags in [[], *other]}) == 4


def test_hash_survives_the_work_directory():
    config = configs.load(f"{TOY}:local", [])
    assert configs.config_hash(ConfigDict(configs.to_dict(config))) == configs.config_hash(config)
