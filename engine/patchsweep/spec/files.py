"""A spec from its file, with what is set on the command line."""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from patchsweep.errors import BadInput
from patchsweep.inputs import DEPTH, ENTRIES, SPEC_BYTES, TOO_DEEP, home, usable
from patchsweep.spec.sweep import Spec, parse_spec


def load_spec(path: str | Path, overrides: Sequence[str] = ()) -> Spec:
    """The spec in the file at `path`, .yaml, .yml or .toml.

    `overrides`: "key.key=value", the value as YAML, set before the whole is validated. A relative
    `prompts.file`, also in an override, is taken from the spec file's folder. YAML has no aliases
    here, and no dates: they are text. BadInput, in one line, for a file that cannot be read or is
    too large (256 KiB), and for everything in it that is not right.
    """
    path = Path(usable(path))
    data = _parse(path)
    for override in overrides:
        _override(data, override)
    spec = parse_spec(data, str(path))
    if spec.prompts.file is None:
        return spec
    file = path.parent / home(spec.prompts.file)
    return spec.model_copy(update={"prompts": spec.prompts.model_copy(update={"file": file})})


def _parse(path: Path) -> dict[str, Any]:
    """The content of a spec file."""
    if path.suffix not in (".yaml", ".yml", ".toml"):
        raise BadInput(f"{path}: unknown kind of spec file: use .yaml or .toml")
    try:
        text = _read(path, "spec").decode()
        data = _toml(text) if path.suffix == ".toml" else _yaml(text)
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
        with path.open("rb") as file:
            found = file.read(SPEC_BYTES + 1)
    except OSError as error:
        raise BadInput(f"{path}: cannot read the {what}: {error.strerror}") from error
    if len(found) > SPEC_BYTES:
        raise BadInput(f"{path}: the {what} has more than {SPEC_BYTES:,} bytes: write less")
    return found


def _toml(text: str) -> Any:
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError:
        raise
    except (ValueError, RecursionError) as error:
        raise tomllib.TOMLDecodeError(_too_much(error)) from error


# What PyYAML raises of values that are not what their tags say.
_WRONG = (ValueError, TypeError, AttributeError, LookupError, ArithmeticError, RecursionError)


class _Loader(yaml.SafeLoader):  # type: ignore[misc]
    """YAML without aliases, a few of which stand for more than there is memory; in which a key that
    is there twice is an error, not the last one's victory; and dates are text: nothing here takes
    them, and not all that look so are."""

    yaml_implicit_resolvers = {  # noqa: RUF012
        first: [(tag, form) for tag, form in known if tag != "tag:yaml.org,2002:timestamp"]
        for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    depth = entries = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        self.depth += 1
        self.entries += 1
        if isinstance(event, yaml.AliasEvent):
            what = f"alias *{event.anchor}: aliases are not taken, write out what it stands for"
            raise _refused(what, event)
        if self.depth > DEPTH + 1:
            raise _refused(TOO_DEEP, event)
        if self.entries > 2 * ENTRIES:  # keys are counted here, too
            raise _refused(f"more than {ENTRIES:,} entries: write fewer", event)
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def compose_mapping_node(self, anchor: Any) -> Any:
        node, seen = super().compose_mapping_node(anchor), set()
        for key, _ in node.value:
            if str(key.value) in seen:
                raise _refused(f"key '{key.value}' is there twice", key)
            seen.add(str(key.value))
        return node


def _refused(problem: str, where: Any) -> yaml.YAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=where.start_mark)


def _yaml(text: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)
    except _WRONG as error:
        raise yaml.YAMLError(_too_much(error)) from error


def _too_much(error: Exception) -> str:
    """What Python says of a value that is none, or of numbers and lists that are too large."""
    if isinstance(error, RecursionError):
        return TOO_DEEP
    if "digits" in str(error):
        return "a number has thousands of digits: use at most 2^63 - 1"
    return f"a value is not what it says: {error}"


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
