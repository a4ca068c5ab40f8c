"""Short digests of files that include their place: what is right elsewhere is wrong here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from hashlib import blake2b, sha256
from typing import Any

import numpy as np
from numpy.typing import NDArray

Digests = NDArray[np.uint64]


def digest(key: str, content: bytes) -> int:
    """Of a file and its name below the results; never 0."""
    found = blake2b(f"{key}\0".encode(), digest_size=8)
    found.update(content)
    return int.from_bytes(found.digest(), "little") or 1


def sealed(key: str, number: int) -> int:
    """A number below 256 with a digest of it and of its place, in 64 bits."""
    return digest(key, bytes([number])) & ~0xFF | number


def unsealed(numbers: Digests, key_of: Callable[[tuple[int, ...]], str]) -> NDArray[np.uint8]:
    """The numbers again, 0 where nothing was written; ValueError for one from another place.
    `key_of`: the place of an element, by its indices."""
    found = (numbers & np.uint64(0xFF)).astype(np.uint8)
    for at in map(tuple, np.argwhere(numbers).tolist()):
        if sealed(key_of(at), int(found[at])) != numbers[at]:
            raise ValueError(f"{key_of(at)} is not what was written there")
    return found


def digest_of_all(files: Mapping[str, bytes]) -> str:
    """Of files and their names."""
    found = sha256()
    for key in sorted(files):
        found.update(f"{len(key)} {key} {len(files[key])}\n".encode())
        found.update(files[key])
    return found.hexdigest()


def numbers(content: Any) -> Digests:
    return np.asarray(content, dtype=np.uint64)
