"""Digests of Python values that are the same in every process: data by what it is, functions by
their code and what it refers to, objects by what they hold. Nothing depends on an address."""

from __future__ import annotations

import dis
import functools
import hashlib
import logging
import re
import secrets
import sys
import weakref
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from collections.abc import Set as AbstractSet
from enum import Enum
from pathlib import PurePath
from threading import Lock, RLock
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PretrainedConfig

# Values of each tensor that are taken beside its sum.
SAMPLED = 64
# Values that are followed, and how far from where one begins; what is beyond is unreadable.
MOST, DEEPEST = 1_000_000, 100
# Known by name wherever they lie; other packages only where they are installed.
KNOWN = {"torch", "transformers", "accelerate", "peft", "bitsandbytes", "nnsight", "patchsweep"}
KNOWN |= {"patchsweep_kernels", "numpy"}
DATA = (int, float, complex, str, bytes, bool, type(None), type(...), range, slice, torch.dtype)
PLAIN = (*DATA, Enum, PurePath, re.Pattern)
OF_EVERY_CLASS = {"__dict__", "__weakref__", "__module__", "__doc__", "__firstlineno__"}
OF_EVERY_CLASS |= {"__abstractmethods__", "_abc_impl"}
HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
# Of a config: what says where it comes from or changes no logits.
NO_MATTER = ("_name_or_path", "use_cache")
# Objects that hold nothing that a forward computes with. A device changes no more than rounding.
INERT = (torch.device, RemovableHandle, logging.Logger, type(Lock()), type(RLock()))
UNREADABLE = secrets.token_hex(16)  # no other process has it


class Digests:
    """Digests of values. The modules `places` are known by the names that they have there."""

    def __init__(self, places: Mapping[nn.Module, str]) -> None:
        self._places = places
        # Values are kept, so that no other gets the address of one.
        self._found: dict[int, tuple[Any, str]] = {}
        self._depth = 0

    def of(self, value: Any) -> str:
        """Equal for equal values. What holds something that cannot be read (a generator, a file)
        has one of this process alone."""
        if isinstance(value, PLAIN):
            return f"{type(value).__name__} {value!r}"
        if id(value) not in self._found:
            self._found[id(value)] = value, "again"  # should it hold itself
            self._depth += 1
            far = self._depth > DEEPEST or len(self._found) > MOST
            self._found[id(value)] = value, digest(unreadable(value) if far else self._parts(value))
            self._depth -= 1
        return self._found[id(value)][1]

    def each(self, values: Iterable[Any]) -> Iterator[str]:
        """Of each value."""
        return (self.of(value) for value in values)

    def _parts(self, value: Any) -> Iterable[str]:
        """What makes a value that is not plain."""
        if isinstance(value, Tensor):
            return self.tensor(value)
        if isinstance(value, np.ndarray | np.generic) and not value.dtype.hasobject:
            return str(value.dtype), str(value.shape), hashlib.sha256(value.tobytes()).hexdigest()
        if isinstance(value, nn.Module) and value in self._places:
            return "module", self._places[value]
        if isinstance(value, FunctionType):
            return self._function(value)
        if isinstance(value, MethodType):
            return self.each((value.__func__, value.__self__))
        if isinstance(value, functools.partial):
            return self.each((value.func, value.args, value.keywords))
        if isinstance(value, type):
            return self._class(value)
        if isinstance(value, PretrainedConfig):
            return self._config(value)
        if isinstance(value, list | tuple | deque | AbstractSet | Mapping):
            return self._container(value)
        if isinstance(value, staticmethod | classmethod | functools._lru_cache_wrapper):
            return self.each((value.__wrapped__,))
        if isinstance(value, property):
            return self.each((value.fget,))
        if isinstance(value, weakref.ref):
            return self.each((value(),))
        if isinstance(value, ModuleType):
            return self._module(value)
        if isinstance(value, INERT):
            return (type(value).__name__,)
        if isinstance(value, CodeType):
            return self._code(value)
        return self._object(value)

    def _container(self, value: Any) -> Iterator[str]:
        yield self.of(type(value))
        yield from self.each(getattr(value, "__dict__", {}).values())
        if isinstance(value, Mapping):
            yield from sorted(" ".join(self.each(item)) for item in value.items())
        else:
            found = self.each(value)
            yield from sorted(found) if isinstance(value, AbstractSet) else found

    def _module(self, module: ModuleType) -> Iterator[str]:
        """A package by its name; a file of the user's own by all that is in it."""
        yield module.__name__
        if not installed(module.__name__):
            yield self.of({k: v for k, v in vars(module).items() if not k.startswith("__")})

    def tensor(self, tensor: Tensor) -> Iterator[str]:
        """A sample and the sum; of packed values (quantised ones) all that they are packed from."""
        yield f"{type(tensor).__name__} {tuple(tensor.shape)} {tensor.dtype}"
        if hasattr(tensor, "__tensor_flatten__"):
            names, context = tensor.__tensor_flatten__()
            yield from self.each(getattr(tensor, name) for name in names)
            yield self.of(context)
        elif not tensor.is_meta:
            values = tensor.detach()
            values = values.dequantize() if values.is_quantized else values.to_dense()
            flat = (torch.view_as_real(values) if values.is_complex() else values).flatten()
            sample = flat[:: max(1, flat.numel() // SAMPLED)].to("cpu", torch.float64)
            yield hashlib.sha256(sample.numpy().tobytes()).hexdigest()
            # In pieces: a sum in float64 copies what it sums.
            yield str(float(sum(p.to(torch.float64).sum() for p in flat.split(1 << 20))))

    def _config(self, config: PretrainedConfig) -> Iterator[str]:
        yield type(config).__name__
        yield self.of(_without(config.to_diff_dict(), NO_MATTER))
        yield str(getattr(config, "_attn_implementation", None))
        yield str(getattr(config, "_experts_implementation", None))
        yield from self.each(v for v in vars(config).values() if isinstance(v, PretrainedConfig))

    def _function(self, function: FunctionType) -> Iterator[str]:
        compiled = vars(function).get("_torchdynamo_orig_callable")
        if compiled is not None:  # compiled or not, it is the same
            yield self.of(compiled)
            return
        module = str(function.__globals__.get("__name__"))
        for cell in function.__closure__ or ():
            try:
                yield self.of(cell.cell_contents)
            except ValueError:
                yield "empty"
        if installed(module):
            yield f"{module} {function.__code__.co_qualname}"
            return
        yield self.of(function.__code__)
        yield self.of((function.__defaults__, function.__kwdefaults__, vars(function)))
        for name in sorted(set(_globals(function.__code__))):
            if name in function.__globals__:
                yield f"{name} {self.of(function.__globals__[name])}"

    def _code(self, code: CodeType) -> Iterator[str]:
        yield f"{code.co_code.hex()} {code.co_names} {code.co_flags} {code.co_argcount}"
        yield from self.each(code.co_consts)

    def _class(self, cls: type) -> Iterator[str]:
        yield f"{cls.__module__} {cls.__qualname__}"
        if not installed(cls.__module__):
            yield self.of({k: v for k, v in vars(cls).items() if k not in OF_EVERY_CLASS})
            yield from self.each(cls.__bases__)

    def _object(self, value: Any) -> Iterable[str]:
        if not readable(value):
            if getattr(value, "__qualname__", None) and callable(value):  # written in C
                owner = getattr(value, "__self__", None)
                return "builtin", value.__qualname__, self.of(owner)
            return unreadable(value)
        held = dict(getattr(value, "__dict__", {}))
        for cls in type(value).__mro__:
            names = vars(cls).get("__slots__", ())
            for name in (names,) if isinstance(names, str) else names:
                if hasattr(value, name) and name not in ("__dict__", "__weakref__"):
                    held[name] = getattr(value, name)
        if isinstance(value, nn.Module):  # the keys of hooks are numbers of this process
            held |= {name: list(held[name].values()) for name in HOOKS}
        return self.each((type(value), held))


def digest(parts: Iterable[str]) -> str:
    """Of some texts, in order."""
    found = hashlib.sha256()
    for part in parts:
        found.update(f"{len(part)} {part}".encode())
    return found.hexdigest()


def unreadable(value: Any) -> tuple[str, ...]:
    """Stands for a value that nobody can look into: the same one in this process, none else."""
    return type(value).__qualname__, UNREADABLE, str(id(value))


def readable(value: Any) -> bool:
    """Whether an object is of classes written in Python alone, so that it shows all it holds."""
    roots = [cls for cls in type(value).__mro__ if cls.__base__ is object]
    return all({"__dict__", "__slots__"} & vars(cls).keys() for cls in roots)


def installed(module: str) -> bool:
    """Whether what a module defines is known by its name: it comes with Python or a package, and is
    none of the user's own."""
    package = module.partition(".")[0]
    if package in KNOWN or package in sys.stdlib_module_names:
        return package != "__main__"
    found = sys.modules.get(package)
    where = [getattr(found, "__file__", None) or "", *getattr(found, "__path__", ())]
    return any("site-packages" in path or "dist-packages" in path for path in where)


def _globals(code: CodeType) -> Iterator[str]:
    """The names that code, and code inside it, takes from its module."""
    for instruction in dis.get_instructions(code):
        if instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
            yield instruction.argval
    for const in code.co_consts:
        if isinstance(const, CodeType):
            yield from _globals(const)


def _without(value: Any, names: Iterable[str]) -> Any:
    """Nested dictionaries without some keys."""
    if not isinstance(value, dict):
        return value
    return {k: _without(v, names) for k, v in value.items() if k not in names}
