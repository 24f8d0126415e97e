"""What the files in `configs/` share, and how a command line becomes a config.

A config file holds three dictionaries (the default run, and what the presets `smoke` and `paper` change) and
hands them to `experiment`, which adds the settings common to all runs and the options of the mechanism.
"""

import copy
import hashlib
import inspect
import json
import runpy
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_dict, config_flags

import attn_jax
from attn_jax.types import check_dtype
from train.cli import UsageError, user_errors

Config = Any
"""A `ConfigDict`, whose keys a type checker cannot know."""

PRESETS = ("smoke", "default", "paper")

# What may differ between two commands that go on with one run: where and how it runs, not what it computes.
RUNTIME_KEYS = ("file", "num_cpu_devices", "mesh", "distributed", "log_every")
_VERDICT_KEYS = ("comparable", "comparability", "data_location")  # follow from the others, or only judge them
_GIVEN_KEYS = ("name", "preset", *_VERDICT_KEYS)  # by `--config FILE.py:VARIANT`, and by nothing else

COMMON = dict(
    file="",  # where the config came from
    seed=0,
    # How a result of this preset relates to published numbers; a changed setting makes it not comparable.
    comparable=False,
    comparability="",
    # The setting that says where the data of this preset lie, and those of its values that are other data. Any
    # other value is a place of the same data and leaves the result as comparable as it is.
    data_location=dict(key="", other_data=()),
    dtype="float32",  # of the computation; "bfloat16" on accelerators
    param_dtype="float32",
    batch_size=32,
    eval_batch_size=32,
    parameter_budget=0,  # model.mlp_dim is set so that the model has so many, within 2 %; 0: as it is given
    steps=1000,
    log_every=10,
    eval_every=100,  # steps between validations; each one saves a checkpoint
    patience=0,  # validations without improvement before the run stops early; 0: never
    aux_weight=1.0,  # of a mechanism's own losses, such as VQ commitment
    optimizer=dict(
        learning_rate=1e-3,  # the peak, reached after the warm-up
        schedule="cosine",  # or "rsqrt", "constant"
        warmup_steps=100,
        b1=0.9,
        b2=0.98,
        eps=1e-9,
        weight_decay=0.1,
        no_decay=("vectors", "embeddings"),  # what weight decay leaves alone
        clip_norm=1.0,  # of the whole gradient; 0: never clip
    ),
    # Devices by mesh axis; -1 takes what the others leave. Logical names of array axes map to mesh axes.
    mesh=dict(data=-1, fsdp=1, tensor=1),
    sharding_rules=(
        ("batch", ("data", "fsdp")),
        ("embed", "fsdp"),
        ("heads", "tensor"),
        ("mlp", "tensor"),
        ("vocab", None),
    ),
    # Processes that train together: the address HOST:PORT of process 0, and which of how many this one is; or
    # "auto", and JAX asks the cluster (Slurm, Open MPI, TPU pod, GKE). `timeout`: seconds for all to join.
    distributed=dict(coordinator="", num_processes=0, process_id=0, timeout=300),
    num_cpu_devices=0,  # CPU devices that share the work; 0: one for each core, as far as the batch divides
)

# The smallest values of settings that are numbers.
LEAST = {
    **dict.fromkeys(("batch_size", "eval_batch_size", "steps", "log_every", "eval_every"), 1),
    **dict.fromkeys(("seed", "patience", "aux_weight", "num_cpu_devices", "parameter_budget"), 0),
    **dict.fromkeys(("distributed.num_processes", "distributed.process_id"), 0),
    "distributed.timeout": 1,
    **dict.fromkeys(("optimizer.learning_rate", "optimizer.warmup_steps", "optimizer.weight_decay"), 0),
    **dict.fromkeys(("optimizer.b1", "optimizer.b2", "optimizer.eps", "optimizer.clip_norm"), 0),
}


def experiment(
    name: str, variant: str, *, default: Mapping[str, Any], smoke: Mapping[str, Any], paper: Mapping[str, Any]
) -> Config:
    """The config of `configs/<name>.py:<variant>`.

    Args:
      name: of the experiment.
      variant: a mechanism and a preset, either or both, in any order, separated by commas.
      default: settings that add to or replace `COMMON`.
      smoke: what the preset `smoke` changes in them.
      paper: what the preset `paper` changes in them.

    Raises:
      UsageError: the variant holds neither.
    """
    mechanism, preset = parse_variant(variant)
    config = ConfigDict(COMMON)
    config.update(name=name, preset=preset, mechanism=_mechanism(mechanism))
    config.update(copy.deepcopy(dict(default)))
    config.lock()  # a preset changes settings; a key of its own would be a typo
    config.update(dict({"smoke": smoke, "paper": paper}.get(preset, {})))
    return config


def lra_optimizer(warmup_steps: int) -> dict[str, Any]:
    """Of the released code of Long Range Arena: Adam with decoupled weight decay on everything.

    The learning rate is `0.05 min(1, s / warmup_steps) / sqrt(max(s, warmup_steps))` at step `s`.
    """
    return {
        "learning_rate": 0.05 / warmup_steps**0.5,
        "schedule": "rsqrt",
        "warmup_steps": warmup_steps,
        "b2": 0.98,
        "eps": 1e-9,
        "weight_decay": 0.1,
        "no_decay": (),
        "clip_norm": 0.0,
    }


def parse_variant(variant: str) -> tuple[str, str]:
    """Splits `variant` into the names of a mechanism and of a preset; `standard` and `default` where not said."""
    found: dict[str, str] = {}
    for word in filter(None, (part.strip() for part in variant.split(","))):
        kind = "preset" if word in PRESETS else "mechanism" if word in attn_jax.MECHANISMS else None
        if kind is None:
            raise UsageError(
                f"`{word}` is neither a preset ({', '.join(PRESETS)}) nor a mechanism"
                f" ({', '.join(attn_jax.MECHANISMS)}); one of your own goes into a config file that registers it"
                " (README, Add a mechanism)"
            )
        if kind in found:
            raise UsageError(f"`{variant}` names two {kind}s, `{found[kind]}` and `{word}`")
        found[kind] = word
    return found.get("mechanism", "standard"), found.get("preset", "default")


def _mechanism(name: str) -> dict[str, Any]:
    """The section `mechanism`: its name and every option with its default."""
    options = attn_jax.MECHANISMS[name].options()
    # An option without a type to keep to takes any Python literal; the mechanism itself checks it.
    untyped = {
        key: config_dict.placeholder(object)
        for key, value in options.items()
        if value is None or value is inspect.Parameter.empty
    }
    return {"name": name, **options, **untyped}


def load(path: str, overrides: Sequence[str]) -> Config:
    """The config of `path` (`file.py` or `file.py:variant`) with `--config.key=value` applied.

    Raises:
      UsageError: no such file, or an unknown variant, key or mechanism, or a value of the wrong type.
    """
    file, _, variant = path.partition(":")
    get_config = _get_config(file)  # which may register a mechanism
    overrides, name = _split_mechanism_name(overrides)
    if name is not None:
        # The mechanism decides which options there are, so its name is part of the variant.
        _, preset = parse_variant(variant)
        variant = f"{preset},{name}"
    plain, config = get_config(variant), get_config(variant)
    config.file = str(Path(file).resolve())
    keys = list(filter(None, map(_overridden_key, overrides)))
    for key in keys:
        _check_key(config, key)
        if keys.count(key) > 1 and isinstance(flatten(config.to_dict())[key], tuple):
            # Absl would make one of them. Of other values the last counts.
            raise UsageError(f"--config.{key} is given {keys.count(key)} times")
    values = flags.FlagValues()
    argv = ["", *overrides]
    try:
        config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=argv)
        unknown = values(argv)[1:]
    except (flags.Error, TypeError, ValueError) as error:
        raise UsageError(str(error)) from error
    if unknown:
        raise UsageError(f"unexpected argument `{unknown[0]}` (see --help)")
    _check_values(config)
    before, after = (flatten(made.to_dict()) for made in (plain, config))
    for key in keys:
        if key.partition(".")[0] in _GIVEN_KEYS and after[key] != before[key]:
            raise UsageError(f"--config.{key} cannot be set: it follows from --config FILE.py[:VARIANT]")
    changed = [key for key in differing_keys(to_dict(config), to_dict(plain)) if key != "seed"]
    location = plain.data_location
    if location.key in changed and after[location.key] not in location.other_data:
        changed.remove(location.key)
    if changed:
        config.comparable = False
        config.comparability = f"changed from the preset: {', '.join(changed)}"
    return config


def to_dict(config: Config) -> dict[str, Any]:
    """`config` as JSON gives it back: only dicts, lists, strings, numbers, booleans and None."""
    return json.loads(config.to_json())


def differing_keys(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    """Keys, such as `model.dim`, in which two configs of `to_dict` differ, `RUNTIME_KEYS` aside."""
    flat_a, flat_b = flatten(_settings(a)), flatten(_settings(b))
    missing = object()
    return [key for key in {**flat_a, **flat_b} if flat_a.get(key, missing) != flat_b.get(key, missing)]


def config_hash(config: Config) -> str:
    """Twelve hexadecimal digits shared by the runs that differ only in seed and `RUNTIME_KEYS`."""
    settings = _settings(to_dict(config)) | {"seed": None}
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]


def run_file(file: str) -> dict[str, Any]:
    """Executes a config file, which may register tasks and mechanisms of its own; returns its names."""
    return runpy.run_path(file)


def _get_config(file: str) -> Callable[[str], Config]:
    if Path(file).suffix != ".py" or not Path(file).is_file():
        raise UsageError(f"no config file `{file}`; the ones of this project are configs/*.py")
    names = run_file(file)
    if "get_config" not in names:
        raise UsageError(f"config file `{file}` has no function `get_config`")
    return names["get_config"]


def _overridden_key(argument: str) -> str | None:
    """`optimizer.learning_rate` of `--config.optimizer.learning_rate=1e-3`."""
    for prefix in ("--config.", "-config.", "--noconfig.", "-noconfig."):
        if argument.startswith(prefix):
            return argument.removeprefix(prefix).partition("=")[0]
    return None


def _split_mechanism_name(overrides: Sequence[str]) -> tuple[list[str], str | None]:
    """Takes `--config.mechanism.name=x` (or its value as the next argument) out of `overrides`."""
    rest, name = [], None
    arguments = iter(overrides)
    for argument in arguments:
        if _overridden_key(argument) == "mechanism.name":
            _, equals, value = argument.partition("=")
            name = value if equals else next(arguments, "")
        else:
            rest.append(argument)
    if name is not None and name not in attn_jax.MECHANISMS:
        known = ", ".join(attn_jax.MECHANISMS)
        raise UsageError(f"--config.mechanism.name: no mechanism `{name}`; there are {known}")
    return rest, name


def _check_key(config: Config, key: str) -> None:
    section, seen = config, "config"
    for part in key.split("."):
        if not isinstance(section, ConfigDict) or part not in section:
            there = f"; it has {', '.join(section)}" if isinstance(section, ConfigDict) else ", it is a value"
            owner = f"mechanism `{config.mechanism.name}`" if seen == "config.mechanism" else f"`{seen}`"
            raise UsageError(f"--config.{key}: {owner} has no `{part}`{there}")
        section, seen = section[part], f"{seen}.{part}"
    if isinstance(section, ConfigDict):
        raise UsageError(f"--config.{key} is a section; set one of its keys: {', '.join(section)}")


def _check_values(config: Config) -> None:
    """Raises a `UsageError` where a setting of `COMMON` is out of its range, before anything is made of it."""
    values = flatten(to_dict(config))
    for key, least in LEAST.items():
        if key in values and not values[key] >= least:
            raise UsageError(f"--config.{key} must be at least {least}, got {values[key]}")
    for key in ("dtype", "param_dtype"):
        if key in values:
            with user_errors(ValueError):
                check_dtype("--config", key, values[key])


def _settings(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key not in RUNTIME_KEYS + _VERDICT_KEYS}


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The values in `tree` by keys such as `model.dim`."""
    flat = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return flat
