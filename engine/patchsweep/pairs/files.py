"""Pairs from a file."""

from __future__ import annotations

import csv
import difflib
import io
import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from patchsweep.errors import BadInput
from patchsweep.limits import PAIRS, PAIRS_BYTES, TEXT, check_data
from patchsweep.pairs.make import Bos, make_pair
from patchsweep.pairs.pair import Pair
from patchsweep.paths import usable

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

REQUIRED = ("clean", "answer")
KEYS = (
    *REQUIRED,
    "corrupt",
    "wrong",
    "labels",
    "corrupt_labels",
    "align",
    "group",
    "others",
    "continuation",
)
MAPPINGS = ("labels", "corrupt_labels", "others")


def read_pairs(
    path: str | Path, tokenizer: PreTrainedTokenizerBase, bos: Bos = "auto"
) -> list[Pair]:
    """The prompt pairs of a .jsonl file (one object a line) or a .csv file (the same columns).

    Keys: clean, answer; optional corrupt, wrong, labels {name: token index}, corrupt_labels, align,
    group, others {name: text}, continuation (see `make_pair`). `answer` and `wrong` are a text or a
    list of texts. In a CSV cell, lists and mappings are written as JSON; an empty cell is a key
    left out. BadInput as "file:line: ..." for everything malformed.
    """
    path = Path(usable(path))
    readers = {".jsonl": _jsonl_rows, ".csv": _csv_rows}
    if path.suffix.lower() not in readers:
        raise BadInput(f"{path}: unknown kind of pairs file: use .jsonl or .csv")
    try:
        with path.open("rb") as file:
            content = file.read(PAIRS_BYTES + 1)
        if len(content) > PAIRS_BYTES:
            raise BadInput(f"{path}: the pairs file has more than {PAIRS_BYTES:,} bytes: split it")
        text = content.decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise BadInput(f"{path}: cannot read the pairs file: {reason}") from error
    pairs: list[Pair] = []
    for line, row in readers[path.suffix.lower()](path, text):
        where = f"{path}:{line}"
        if len(pairs) == PAIRS:
            raise BadInput(f"{where}: more than {PAIRS:,} pairs: split the file")
        check_data(row, where, TEXT)
        _check_row(row, where)
        pair = make_pair(tokenizer, **row, bos=bos, where=where)
        pairs.append(replace(pair, origin=path.name))
    if not pairs:
        raise BadInput(f"{path}: no pairs in the file: write at least one")
    return pairs


def _jsonl_rows(path: Path, text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    # Not splitlines(): JSON strings may hold U+2028 and the like unescaped.
    for line, content in enumerate(text.split("\n"), start=1):
        if not content.strip():
            continue
        try:
            row = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise BadInput(f"{path}:{line}: not a JSON object on one line: {error}") from error
        if not isinstance(row, dict):
            raise BadInput(f"{path}:{line}: not a JSON object: write {{...}} with {KEYS[0]}, ...")
        yield line, row


def _csv_rows(path: Path, text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        for cells in reader:
            where = f"{path}:{reader.line_num}"
            if None in cells:
                raise BadInput(f"{where}: more cells than columns: quote cells that hold a comma")
            # A key that is unknown is an error even where its cell is empty.
            row: dict[str, Any] = {k: v for k, v in cells.items() if v or k not in KEYS}
            for key in [k for k in row if k in ("answer", "wrong", "align", *MAPPINGS)]:
                if key in MAPPINGS or row[key].startswith("["):
                    try:
                        row[key] = json.loads(row[key])
                    except (ValueError, RecursionError) as error:
                        raise BadInput(f"{where}: {key} is not JSON: {error}") from error
            yield reader.line_num, row
    except csv.Error as error:
        raise BadInput(f"{path}:{reader.reader.line_num}: malformed CSV: {error}") from error


def _check_row(row: Mapping[str, Any], where: str) -> None:
    """BadInput unless the keys are known, the needed ones are there, and the types are right."""
    for key in row:
        if key not in KEYS:
            near = difflib.get_close_matches(str(key), KEYS, n=1)
            mend = f"did you mean '{near[0]}'?" if near else f"use {', '.join(KEYS)}"
            raise BadInput(f"{where}: unknown key '{key}': {mend}")
    for key in REQUIRED:
        if key not in row:
            raise BadInput(f"{where}: missing key '{key}': each pair needs {', '.join(REQUIRED)}")
    for key in ("clean", "corrupt", "group", "continuation"):
        if not isinstance(row.get(key, ""), str):
            raise BadInput(f"{where}: {key} is not a text: write it in quotes")
    for key in ("answer", "wrong"):
        value = row.get(key, "")
        if not all(isinstance(v, str) for v in (value if isinstance(value, list) else [value])):
            raise BadInput(f"{where}: {key} is not a text or a list of texts: write it in quotes")
    for key, kind, form in (
        ("labels", int, 'labels is not {name: token index}: e.g. {"END": -1}'),
        ("corrupt_labels", int, 'corrupt_labels is not {name: token index}: e.g. {"END": -1}'),
        ("others", str, 'others is not {name: text}: e.g. {"random": "..."}'),
    ):
        value = row.get(key, {})
        if not isinstance(value, dict) or not all(type(v) is kind for v in value.values()):
            raise BadInput(f"{where}: {form}")
    align = row.get("align", "end")
    if not isinstance(align, str) and not (
        isinstance(align, list) and all(isinstance(item, list) for item in align)
    ):
        raise BadInput(f'{where}: align is not "end", "labels" or [[clean, corrupt], ...]')
