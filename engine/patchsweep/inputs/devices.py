"""What a user may say of devices and of the memory on them."""

from __future__ import annotations

import re
from collections.abc import Mapping

from patchsweep.errors import BadInput

DEVICES = "auto, cpu, cuda, cuda:N or balanced"
_UNITS = {"": 0, "K": 3, "M": 6, "G": 9, "T": 12}


def memory_limits(given: object) -> dict[int | str, int]:
    """Bytes by GPU number and "cpu", from {cpu: 200MB, 0: 10GiB}; BadInput for anything else."""
    if not isinstance(given, Mapping) or not given:
        raise BadInput(f"max_memory is {given!r}: write e.g. {{cpu: 20GB, 0: 10GB}}")
    limits: dict[int | str, int] = {}
    for place, size in given.items():
        if not re.fullmatch(r"cpu|\d+", str(place)):
            raise BadInput(f"max_memory: unknown place {place!r}: use cpu or the number of a GPU")
        found = re.fullmatch(r"(\d+(?:\.\d+)?) ?(?:([KMGT]?)(i?)B)?", str(size))
        if found is None or isinstance(size, bool):
            raise BadInput(f"max_memory: {place} is {size!r}: write a size such as 200MB or 10GiB")
        number, unit, binary = found.groups()
        power = _UNITS[unit or ""]
        scale = 2 ** (10 * power // 3) if binary else 10**power
        limits["cpu" if place == "cpu" else int(place)] = int(float(number) * scale)
    return limits


def check_placement(device: str, max_memory: object, offload_folder: object) -> None:
    """BadInput if what only `device: balanced` uses is given with another device."""
    for name, given in (("max_memory", max_memory), ("offload_folder", offload_folder)):
        if given is not None and device != "balanced":
            raise BadInput(f"{name} is for device balanced, not {device}: leave one of them out")
