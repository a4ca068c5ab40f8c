"""Where a model's weights go: on one device or several, in the host's memory, on disk."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise

import torch
from torch import nn
from transformers import PreTrainedModel

from patchsweep.device import worthwhile
from patchsweep.errors import BadInput
from patchsweep.inputs import memory_limits
from patchsweep.passes import layers_of
from patchsweep.plan import Offload

Place = int | str  # a GPU's number, "cpu" or "disk"
WEIGHTS_SHARE = 0.9  # of the memory that is free, where max_memory does not say more


def balanced_cut(layers: int, devices: int) -> list[int]:
    """The first layer of every device.

    Runs join on the way up, so the work of a layer grows with its depth: cuts at layers·√(k /
    devices) give every device as much of it.
    """
    return [round(layers * math.sqrt(k / devices)) for k in range(devices)]


def device_map(
    empty: PreTrainedModel, max_memory: Mapping[Place, int | str] | None
) -> dict[str, Place]:
    """The place of every part of a model, by name; `empty` has the model's weights on meta.

    max_memory: for weights, by GPU and "cpu"; what it leaves out is not used. What fits nowhere
    goes to disk. BadInput where the largest part does not fit where it must compute.
    """
    from accelerate import infer_auto_device_map
    from accelerate.utils import get_balanced_memory, get_max_memory

    if max_memory is None:
        limits = {place: int(n * WEIGHTS_SHARE) for place, n in get_max_memory().items()}
    else:
        limits = memory_limits(max_memory)
    gpus = sorted(place for place in limits if isinstance(place, int))
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if gpus and gpus[-1] >= count:
        raise BadInput(f"max_memory: GPU {gpus[-1]}: torch sees {count} CUDA devices")
    computes = gpus[0] if gpus else "cpu"
    whole = list(empty._no_split_modules or ())
    part, size = _largest_part(empty)
    if limits.get(computes, 0) < size:
        raise BadInput(
            f"max_memory: {computes} cannot hold {part}, which takes "
            f"{math.ceil(size / 1e3):,} KB: give it more"
        )
    if len(gpus) > 1:
        by_work = _by_work(empty, gpus)
        if all(held <= limits[gpu] for gpu, held in _held(empty, by_work).items()):
            return by_work
        limits = get_balanced_memory(empty, limits, whole)
    found: dict[str, Place] = infer_auto_device_map(empty, limits, whole)
    return found


def offload(hf_model: PreTrainedModel, names: set[str], device: torch.device) -> Offload:
    """What a wave moves where the parameters `names` are kept off the device that computes. Where
    layers come in ahead, two of them are there, perhaps still beside the larger end."""
    own = {
        module: sum(
            p.nbytes for leaf, p in module.named_parameters(name, recurse=False) if leaf in names
        )
        for name, module in hf_model.named_modules()
    }
    ends = [own[m] for m in (hf_model.get_input_embeddings(), hf_model.get_output_embeddings())]
    layers = [sum(own[m] for m in layer.modules()) for layer in layers_of(hf_model)]
    moved = sum(own.values())
    if worthwhile(device):
        two = max(a + b for a, b in pairwise([0, *layers]))
        most = max(ends) + two
    else:
        most = max(*ends, *layers)
    return Offload(moved, most + moved - sum(ends) - sum(layers))


def foreseen(empty: PreTrainedModel, placed: Mapping[str, Place]) -> tuple[torch.device, Offload]:
    """Where a model that is placed so begins to compute, and what a wave moves."""
    gpus = [place for place in placed.values() if isinstance(place, int)]
    device = torch.device("cuda", min(gpus)) if gpus else torch.device("cpu")
    return device, offload(empty, kept_off(empty, placed), device)


def kept_off(empty: PreTrainedModel, placed: Mapping[str, Place]) -> set[str]:
    """The parameters that a device map keeps off the device that computes, by name."""
    off = {"disk", "cpu"} if any(isinstance(p, int) for p in placed.values()) else {"disk"}
    parameters = (name for name, _ in empty.named_parameters(remove_duplicate=False))
    return {name for name in parameters if _place_of(name, placed) in off}


def _place_of(name: str, placed: Mapping[str, Place]) -> Place:
    """The place of a parameter: that of the smallest part that has one."""
    parts = name.split(".")
    found = (".".join(parts[:i]) for i in reversed(range(len(parts))))
    return next(placed[part] for part in found if part in placed)


def _largest_part(empty: PreTrainedModel) -> tuple[str, int]:
    """What has to be on a device as a whole: a layer, or any other module's own weights; the
    largest, with its bytes."""
    layers = layers_of(empty)
    whole, inside = set(layers), {m for layer in layers for m in layer.modules()}
    sizes = {
        name: sum(p.nbytes for p in module.parameters(recurse=module in whole))
        for name, module in empty.named_modules()
        if module in whole or module not in inside
    }
    largest = max(sizes, key=lambda name: sizes[name])
    return largest, sizes[largest]


def _by_work(empty: PreTrainedModel, gpus: Sequence[int]) -> dict[str, Place]:
    """Layers cut by their work; the rest on the first GPU, an untied unembedding on the last."""
    layers = layers_of(empty)
    placed: dict[str, Place] = {}
    numbers = {layer: i for i, layer in enumerate(layers)}
    first = balanced_cut(len(layers), len(gpus))
    inside = {m for layer in layers for m in layer.modules()}
    output = empty.get_output_embeddings()
    tied = output.weight is empty.get_input_embeddings().weight
    for name, module in empty.named_modules():
        if module in numbers:
            placed[name] = gpus[sum(numbers[module] >= f for f in first) - 1]
        elif module not in inside and _has_tensors(module):
            placed[name] = gpus[-1] if module is output and not tied else gpus[0]
    return placed


def _has_tensors(module: nn.Module) -> bool:
    return any(True for _ in (*module.parameters(recurse=False), *module.buffers(recurse=False)))


def _held(empty: PreTrainedModel, placed: Mapping[str, Place]) -> dict[Place, int]:
    """Bytes of parameters at every place."""
    held: dict[Place, int] = {}
    for name, p in empty.named_parameters():
        place = _place_of(name, placed)
        held[place] = held.get(place, 0) + p.nbytes
    return held
