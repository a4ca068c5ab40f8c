"""The records of results, read: what vouches for a chunk, and whether it does."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from patchsweep.store.damage import Why, damaged, decoded, why_of
from patchsweep.store.digests import Digests, digest
from patchsweep.store.ledger import Ledger, Record
from patchsweep.store.place import Place


class Books:
    """The records as they were when they were first asked for, or last read or written here; others
    may have written more since. Not `vouching`: those of older results, which only mark what is
    done, and are not read here."""

    def __init__(self, place: Place, ledgers: Mapping[str, Ledger], vouching: bool = True) -> None:
        self.ledgers = ledgers
        self.vouching = vouching
        self._place = place
        self._by_array = {array: book for book in ledgers.values() for array in book.arrays}
        self._known: dict[str, Digests] = {}

    def of(self, array: str) -> Ledger | None:
        """The ledger that vouches for an array; None where nothing does."""
        return self._by_array.get(array)

    def read(self, ledger: Ledger) -> tuple[Digests, dict[int, Why]]:
        """All records as they are now, one after another; and the numbers of damaged ones."""
        keys = {ledger.key(n): n for n in range(ledger.size // ledger.length)}
        numbers, bad = np.zeros(ledger.size, np.uint64), dict[int, Why]()
        for key, content in self._place.gets(keys).items():
            n = keys[key]
            row = _decoded(content, ledger)
            if row is None:
                bad[n] = why_of(content)
            else:
                numbers[n * ledger.length : (n + 1) * ledger.length] = row
        self._known[ledger.name] = numbers
        return numbers, bad

    def record(self, ledger: Ledger, number: int, fresh: bool = False) -> Record:
        """One of them; Damaged if it is. `fresh`: as it is now."""
        mine = slice(number * ledger.length, (number + 1) * ledger.length)
        if not fresh:
            if ledger.name not in self._known:
                self.read(ledger)
            return ledger.record(self._known[ledger.name][mine].copy())
        row = np.zeros(ledger.length, np.uint64)
        key = ledger.key(number)
        if (content := self._place.gets([key]).get(key)) is not None:
            found = _decoded(content, ledger)
            if found is None:
                raise damaged(self._place.at, key, why_of(content))
            row = found
        self.note(ledger, number, row)
        return ledger.record(row)

    def note(self, ledger: Ledger, number: int, row: Digests) -> None:
        """A record was written here."""
        if ledger.name in self._known:
            self._known[ledger.name][number * ledger.length : (number + 1) * ledger.length] = row

    def forget(self) -> None:
        """Records were deleted."""
        self._known.clear()

    def chunk(self, array: str, chunk: tuple[int, ...], key: str) -> bytes | None:
        """A chunk of an array that is filled; None if no record speaks of it, whatever is there.
        Damaged if it is not what its record says."""
        found = self._place.gets([key]).get(key)
        ledger = self.of(array)
        if ledger is None or not self.vouching:
            return found
        number, slot = ledger.place(array, chunk)
        of_it = digest(key, found) if found is not None else 0
        for fresh in (False, True):
            record = self.record(ledger, number, fresh)
            if found is None and not record.vouches(slot):
                return None
            if found is not None and record.allows(slot, of_it):
                return found
        if not record.vouches(slot):
            return None
        raise damaged(self._place.at, key, "missing" if found is None else why_of(found))


def _decoded(content: bytes, ledger: Ledger) -> Digests | None:
    """What a record's file says; None if it is damaged."""
    try:
        row = np.frombuffer(decoded(content), "<u8")
    except ValueError:
        return None
    return row.astype(np.uint64) if row.shape == (ledger.length,) else None
