"""One path from defaults, experiment file, `KEY=VALUE` and searched values to a frozen, validated `TrialConfig`."""

import ast
import dataclasses
import difflib
import functools
import inspect
import json
import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_type_hints

import yaml
from pydantic import TypeAdapter, ValidationError

from segadapt.platform.errors import UsageError, check_no_password
from segadapt.platform.settings.text import path_of
from segadapt.trainables import method_class
from segadapt.trainables.core.data.datasets import DataConfig
from segadapt.trainables.core.data.transforms import AugmentationConfig
from segadapt.trainables.core.method import Method, WarmupConfig
from segadapt.trainables.core.networks import NetworkConfig, base_lr, recommended_optimizer
from segadapt.trainables.core.online.config import OnlineConfig
from segadapt.trainables.core.training.config import OptimizerConfig, TrainerConfig

Values = Mapping[str, Any]
"""Settings by dotted key, such as {"method.temperature": 10.0}."""

_FLOW = ("[", "{", '"', "'")
"""How a word begins that is meant to be a list, a mapping or quoted text."""

_NOT_PLAIN = re.compile(r"[\s:#]")
"""What no number has, but YAML passes over or reads as one: `3 # a comment`, and 12:30 as 750."""


@dataclass(frozen=True, kw_only=True)
class TrialConfig:
    """Everything that decides a trial."""

    method_name: str
    data: DataConfig
    network: NetworkConfig
    warmup: WarmupConfig
    method: Method.Config
    optimizer: OptimizerConfig
    trainer: TrainerConfig
    augmentation: AugmentationConfig
    online: OnlineConfig
    seed: int = 0
    """Decides initialisation, sample order and augmentation."""
    settings: Values = dataclasses.field(default_factory=dict, compare=False, repr=False)
    """What it was resolved from, by dotted key: settings that follow from others follow anew in `override`."""

    def as_dict(self) -> dict[str, Any]:
        """Return plain nested values, as they are logged."""
        content = dataclasses.asdict(self)
        del content["settings"]
        return content


def sections(method: str) -> dict[str, type]:
    """Return the configuration classes of a trial of `method` by the first part of their keys."""
    return {
        "data": DataConfig,
        "network": NetworkConfig,
        "warmup": WarmupConfig,
        "method": method_class(method).Config,
        "optimizer": OptimizerConfig,
        "trainer": TrainerConfig,
        "augmentation": AugmentationConfig,
        "online": OnlineConfig,
    }


@dataclass(frozen=True)
class Key:
    """One setting of a method's trials."""

    name: str
    type: str
    default: Any
    doc: str


@functools.cache
def keys(method: str) -> dict[str, Key]:
    """Return all settings of a method's trials by dotted name."""
    all_keys = {"seed": Key("seed", "int", 0, "Decides initialisation, sample order and augmentation.")}
    for section, cls in sections(method).items():
        all_keys.update({key.name: key for key in _keys_of(section, cls)})
    return all_keys


def _keys_of(prefix: str, cls: type) -> Iterator[Key]:
    docs = _field_docs(cls)
    hints = get_type_hints(cls)
    for field in dataclasses.fields(cls):
        name = f"{prefix}.{field.name}"
        if dataclasses.is_dataclass(hints[field.name]):
            yield from _keys_of(name, hints[field.name])
            continue
        hint = hints[field.name]
        shown = hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")
        yield Key(name, shown, field.default, docs.get(field.name, ""))


def _field_docs(cls: type) -> dict[str, str]:
    """Read the docstrings under the fields of a dataclass."""
    docs: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if not dataclasses.is_dataclass(base):
            continue
        body = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0]
        assert isinstance(body, ast.ClassDef)
        for statement, following in zip(body.body, body.body[1:], strict=False):
            if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
                match following:
                    case ast.Expr(value=ast.Constant(value=str(text))):
                        docs[statement.target.id] = " ".join(text.split())
    return docs


def parse_assignments(assignments: Sequence[str]) -> dict[str, Any]:
    """Parse `KEY=VALUE` words.

    A value is a number, true, false or null as JSON and YAML write them, a list, mapping or quoted text if it begins as
    one, and otherwise text as it stands: a path may hold ` #` and `: `.
    """
    values: dict[str, Any] = {}
    for word in assignments:
        key, separator, text = word.partition("=")
        if not separator or not key:
            raise UsageError(f"A setting must be written KEY=VALUE, but got {word!r}. Example: trainer.steps=100")
        if key in values:
            raise UsageError(f"A setting must be given once, but {key!r} came twice. Keep one.")
        values[key] = parse_value(text)
    return values


def parse_value(text: str) -> Any:
    """Return what a word means as a value; see `parse_assignments`."""
    for parse in (json.loads, yaml.safe_load):  # JSON first: YAML 1.1 takes 1e-3 for text
        try:
            value = parse(text)
        except (ValueError, yaml.YAMLError):
            continue
        plain = value is None or isinstance(value, bool | int | float)
        if text.startswith(_FLOW) or (plain and not _NOT_PLAIN.search(text)):
            return value
    return text


def read_experiment(path: Path) -> dict[str, Any]:
    """Read a YAML experiment file into settings by dotted key; nesting and dots mean the same."""
    try:
        content = yaml.safe_load(path.read_text())
    except OSError as error:
        raise UsageError(f"An experiment file must be readable, but {path} is not: {error.strerror}.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"An experiment file must be YAML, but {path} is not: {error}.") from error
    if not isinstance(content, dict):
        raise UsageError(f"An experiment file must hold KEY: VALUE pairs, but {path} holds {type(content).__name__}.")
    return dict(flatten(content))


def flatten(content: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield nested settings by dotted key."""
    for key, value in content.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict):
            yield from flatten(value, f"{name}.")
        else:
            yield name, value


def anchored(values: Values) -> dict[str, Any]:
    """Return the settings with roots of datasets and files of weights made absolute: trials run in other folders.

    Raises:
        UsageError: If one holds a password: settings are kept in many places.
    """
    settings = dict(values)
    for key, value in settings.items():
        check_no_password(key, value)
    for key in ("data.source", "data.target"):
        kind, separator, root = str(values.get(key, "")).partition(":")
        if separator and root and "://" not in root:
            settings[key] = f"{kind}:{path_of(root).absolute()}"
    weights = Path(str(values.get("network.weights", "")))
    if weights.suffix:  # published weights go by a name, without a dot
        settings["network.weights"] = str(path_of(str(weights)).absolute())
    return settings


def resolve(method: str, values: Values) -> TrialConfig:
    """Build the configuration of a trial.

    Args:
        method: A name from `METHODS`.
        values: Settings that differ from the defaults, by dotted key.

    Raises:
        UsageError: Listing every unknown key, ill-typed value and violated range at once.
    """
    try:
        known = keys(method)
    except ValueError as error:
        raise UsageError(str(error)) from error
    unknown = [key for key in values if not _is_known(key, known)]
    faults = [_unknown(key, known) for key in unknown]
    parts: dict[str, Any] = {}
    for section, cls in sections(method).items():
        in_section = {
            key: value for key, value in values.items() if key.startswith(section + ".") and key not in unknown
        }
        try:
            parts[section] = _adapter(cls).validate_json(
                json.dumps(_nest(in_section, section), allow_nan=True), strict=True
            )
        except ValidationError as error:
            faults += [_ill_typed(section, fault, known) for fault in error.errors()]
        except TypeError:
            faults += [f"Settings must be plain values, but {section} holds {in_section!r}."]
    seed = values.get("seed", 0)
    if not isinstance(seed, int) or isinstance(seed, bool) or seed < 0:
        faults.append(f"'seed' must be a non-negative integer, but got {seed!r}.")
    if "optimizer" in parts and "network" in parts:
        try:
            parts["optimizer"] = _with_rates(parts["optimizer"], parts["network"])
        except ValueError as error:
            faults.append(str(error))
    if "online" in parts:
        try:
            parts["online"] = _with_method(parts["online"], method)
        except ValueError as error:
            faults.append(str(error))
    if faults:
        raise UsageError("\n".join(faults))
    return TrialConfig(method_name=method, seed=seed, settings=dict(values), **parts)


def override(config: TrialConfig, values: Values) -> TrialConfig:
    """Return the configuration with other settings, such as those a trial of a search has by itself.

    Raises:
        UsageError: As `resolve` does.
    """
    return resolve(config.method_name, {**config.settings, **values}) if values else config


def _with_rates(optimizer: OptimizerConfig, network: NetworkConfig) -> OptimizerConfig:
    """Fill in the optimiser and the learning rates that follow from the network.

    The recommended rate is meant for the recommended optimiser: another one needs a rate of its own.
    """
    pretrained = network.weights not in (None, "none")
    recommended = recommended_optimizer(network.name)
    if optimizer.lr is None and optimizer.name not in (None, recommended):
        raise ValueError(
            f"optimizer.lr must be given with optimizer.name={optimizer.name}: the rate that is recommended for "
            f"{network.name!r}, {base_lr(network.name, pretrained=pretrained):g}, is meant for {recommended}."
        )
    return dataclasses.replace(
        optimizer.filled(recommended),
        lr=base_lr(network.name, pretrained=pretrained) if optimizer.lr is None else optimizer.lr,
        head_lr_factor=(10.0 if pretrained else 1.0) if optimizer.head_lr_factor is None else optimizer.head_lr_factor,
    )


def _with_method(online: OnlineConfig, method: str) -> OnlineConfig:
    """Fill in whether the terms of online self-training are added, which follows from the method."""
    cls = method_class(method)
    adapts = any("target" in stage.domains for stage in cls.plan(cls.Config()))
    if online.enabled and not adapts:
        raise ValueError(
            f"online.enabled must be false for {method}, which sees no target image. Choose online_self_training."
        )
    if online.enabled is False and cls.always_online:
        raise ValueError(
            f"online.enabled must be true for {method}, which is nothing else, but got false. Leave it out; among "
            f"several methods, add {method}.online.enabled=true."
        )
    return dataclasses.replace(online, enabled=bool(online.enabled) or cls.always_online)


@functools.cache
def _adapter(cls: type) -> TypeAdapter[Any]:
    return TypeAdapter(cls)


def _nest(values: Values, section: str) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for key, value in values.items():
        *path, name = key.removeprefix(section + ".").split(".")
        inner = nested
        for part in path:
            inner = inner.setdefault(part, {})
        inner[name] = value
    return nested


def _is_known(key: str, known: Mapping[str, Key]) -> bool:
    """Return whether there is such a setting; of one that is a mapping, each entry may have a key of its own."""
    mapping = known.get(key.rpartition(".")[0])
    return key in known or (mapping is not None and mapping.type.startswith("dict"))


def _unknown(key: str, known: Mapping[str, Key]) -> str:
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    section = key.split(".", 1)[0]
    siblings = sorted(name for name in known if name.startswith(section + ".")) or sorted(known)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return f"There is no setting {key!r}.{hint} Known: {', '.join(siblings)}."


def _ill_typed(section: str, fault: Any, known: Mapping[str, Key]) -> str:
    key = ".".join([section, *(str(part) for part in fault["loc"] if isinstance(part, str) and part.isidentifier())])
    if fault["type"] == "value_error":
        return str(fault["ctx"]["error"])
    while key not in known and "." in key:
        key = key.rsplit(".", 1)[0]
    kind = known[key].type if key in known else "different"
    return f"{key!r} must be of type {kind}, but got {fault['input']!r}: {fault['msg'][0].lower()}{fault['msg'][1:]}."


METHOD = "method"
"""Searched value that names a trial's method, where an experiment has several."""
