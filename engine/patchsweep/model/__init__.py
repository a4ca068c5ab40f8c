"""A model ready to be swept.

model.py       loaded or wrapped, and what a plan has to know of it
loading.py     models and tokenizers by name
placement.py   where its weights go: devices, memory, disk
adapters.py    what other libraries put around a model
identity.py    everything that changes what its forward computes, as one digest
digests.py     digests of Python values that are the same in every process

Imports device, errors, inputs, passes, plan.
"""

from patchsweep.model.loading import (
    PACKAGED,
    cache,
    load_config,
    load_tokenizer,
    resolve_device,
    weights,
)
from patchsweep.model.model import (
    Model,
    dimensions_of,
    empty_model,
    load_model,
    max_positions,
    wrap,
)
from patchsweep.model.placement import device_map, foreseen

__all__ = [
    "PACKAGED",
    "Model",
    "cache",
    "device_map",
    "dimensions_of",
    "empty_model",
    "foreseen",
    "load_config",
    "load_model",
    "load_tokenizer",
    "max_positions",
    "resolve_device",
    "weights",
    "wrap",
]
