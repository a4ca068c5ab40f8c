"""A spec from its file, with what is set on the command line."""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from patchsweep.errors import BadInput
from patchsweep.spec.sweep import Spec, parse_spec


def load_spec(path: str | Path, overrides: Sequence[str] = ()) -> Spec:
    """The spec of a .yaml, .yml or .toml file.

    `overrides`: "key.key=value", the value as YAML, set before the whole is validated. A relative
    `prompts.file`, also in an override, is taken from the spec file's folder. BadInput, in one
    line, for a file that cannot be read and for everything in it that is not right.
    """
    path = Path(path)
    data = _parse(path)
    for override in overrides:
        _override(data, override)
    spec = parse_spec(data, str(path))
    if spec.prompts.file is None:
        return spec
    file = path.parent / spec.prompts.file.expanduser()
    return spec.model_copy(update={"prompts": spec.prompts.model_copy(update={"file": file})})


def _parse(path: Path) -> dict[str, Any]:
    """The content of a spec file."""
    if path.suffix not in (".yaml", ".yml", ".toml"):
        raise BadInput(f"{path}: unknown kind of spec file: use .yaml or .toml")
    try:
        text = _read(path, "spec").decode()
        data = tomllib.loads(text) if path.suffix == ".toml" else _yaml(text)
    except UnicodeDecodeError as error:
        raise BadInput(f"{path}: not UTF-8 text: save it as UTF-8") from error
    except tomllib.TOMLDecodeError as error:
        raise BadInput(f"{path}: not TOML: {error}") from error
    except yaml.YAMLError as error:
        raise BadInput(f"{path}{_yaml_reason(error)}") from error
    if not isinstance(data, dict):
        raise BadInput(f"{path}: not a mapping: write lines such as 'model: smollm2-135m'")
    return data


def _read(path: Path, what: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise BadInput(f"{path}: cannot read the {what}: {error.strerror}") from error


def _yaml(text: str) -> Any:
    """YAML in which a key that is there twice is an error, not the last one's victory."""
    todo, done = [yaml.compose(text, Loader=yaml.SafeLoader)], set()
    while todo:
        node = todo.pop()
        if isinstance(node, yaml.MappingNode) and node not in done:
            done.add(node)  # an anchor may hold itself
            seen: set[str] = set()
            for key, value in node.value:
                if str(key.value) in seen:
                    problem = f"key '{key.value}' is there twice"
                    raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
                seen.add(str(key.value))
                todo.append(value)
    return yaml.safe_load(text)


def _yaml_reason(error: yaml.YAMLError) -> str:
    """ ":line: not YAML: why" """
    mark = getattr(error, "problem_mark", None)
    reason = getattr(error, "problem", None) or " ".join(str(error).split())
    return f"{f':{mark.line + 1}' if mark else ''}: not YAML: {reason}"


def _override(data: dict[str, Any], override: str) -> None:
    """Set one "key.key=value" in `data`."""
    keys, equals, text = override.partition("=")
    parts = [part.strip() for part in keys.split(".")]
    if not equals or not all(parts):
        raise BadInput(f"override '{override}': write key.key=value, e.g. prompts.n=16")
    try:
        value = _yaml(text)
    except yaml.YAMLError as error:
        raise BadInput(f"override '{override}'{_yaml_reason(error)}") from error
    for i, part in enumerate(parts[:-1]):
        data = data.setdefault(part, {})
        if not isinstance(data, dict):
            above = ".".join(parts[: i + 1])
            raise BadInput(f"override '{override}': {above} holds no keys: set {above} itself")
    data[parts[-1]] = value
