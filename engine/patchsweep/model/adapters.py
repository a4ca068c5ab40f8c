"""What other libraries put around a model: adapters of PEFT, torch.compile, data parallelism.

A model is swept with its adapters as they are: the modules that PEFT has put into it compute.
"""

from __future__ import annotations

import importlib.util
import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from patchsweep.device import device_of, exactly
from patchsweep.errors import BadInput

CONFIG = "adapter_config.json"
MEND = "give m = m.merge_and_unload(), or a model whose adapter changes weights alone, as LoRA does"


def unwrapped(model: Any) -> PreTrainedModel:
    """The transformers model inside what torch.compile or PEFT have put around it, its adapters as
    they are. BadInput for anything else, and for an adapter that does more than its modules in
    the model do (prompts that it learnt): tried on a few tokens."""
    inner = model
    while not isinstance(inner, PreTrainedModel):
        if isinstance(getattr(inner, "_orig_mod", None), nn.Module):
            inner = inner._orig_mod
        elif isinstance(getattr(inner, "peft_config", None), dict):
            inner = _without_peft(inner)
        else:
            raise BadInput(f"wrap takes a transformers PreTrainedModel, not {_said(inner)}")
    return inner


def _without_peft(peft_model: Any) -> Any:
    """The model that PEFT has put adapters into."""
    given = (config.peft_type for config in peft_model.peft_config.values())
    kinds = {str(getattr(kind, "value", kind)) for kind in given}
    inner = peft_model.base_model
    if not isinstance(inner, PreTrainedModel):  # of learnt prompts it is the model itself
        inner = inner.model
    if not isinstance(inner, PreTrainedModel):
        return inner
    ids = torch.arange(4, device=device_of(inner.get_input_embeddings()))[None]
    try:
        with exactly(peft_model), torch.no_grad():
            one, other = (m(input_ids=ids).logits for m in (peft_model, inner))
        same = torch.equal(one, other)
    except (RuntimeError, TypeError, ValueError):  # it asks for arguments of its own
        same = False
    if not same:
        raise BadInput(
            f"this {type(peft_model).__name__} ({', '.join(sorted(kinds))}) computes other logits "
            f"than the model that it is put around: {MEND}"
        )
    return inner


def _said(model: Any) -> str:
    """What something is that is no model of transformers, with the mend."""
    kind = type(model).__name__
    for name in ("module", "model", "_model"):  # DistributedDataParallel, a pipeline, nnsight
        inside = getattr(model, name, None)
        if isinstance(inside, nn.Module):
            return f"{kind}: give its .{name} ({type(inside).__name__})"
    if isinstance(model, str | Path):
        return f"a name: use load_model({str(model)!r})"
    return f"{kind}: load one with AutoModelForCausalLM.from_pretrained"


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter and no model."""
    with suppress(OSError):  # a name that no folder can have
        return (folder / CONFIG).is_file() and not (folder / "config.json").is_file()
    return False


def base_of(folder: Path) -> str:
    """The name of the model that an adapter in a folder is for. BadInput if it says none, PEFT is
    not there, or the adapter's weights are not in safetensors."""
    try:
        name = json.loads((folder / CONFIG).read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError):
        name = None
    if not isinstance(name, str) or not name:
        raise BadInput(
            f"model '{folder}': its {CONFIG} names no model that the adapter is for: set "
            "base_model_name_or_path there, or give a folder of merge_and_unload().save_pretrained"
        )
    if not (folder / "adapter_model.safetensors").is_file():
        raise BadInput(
            f"model '{folder}': the adapter's weights, adapter_model.safetensors, are not there: "
            "save it with save_pretrained, as safetensors"
        )
    if importlib.util.find_spec("peft") is None:
        raise BadInput(f"model '{folder}' is an adapter, and PEFT is not there: pip install peft")
    beside = folder / name
    return str(beside) if not Path(name).expanduser().exists() and beside.is_dir() else name


def with_adapter(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """A model with the adapter of a folder active in it, in its own dtype where that is wider."""
    from peft import PeftModel

    known = set(model.parameters())
    adapted = unwrapped(PeftModel.from_pretrained(model, str(folder)))
    for parameter in adapted.parameters():
        if parameter not in known and parameter.dtype.itemsize < model.dtype.itemsize:
            parameter.data = parameter.data.to(model.dtype)
    return adapted.eval().requires_grad_(False)
