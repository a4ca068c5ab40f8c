"""Pairs from a file."""

from __future__ import annotations

import csv
import difflib
import io
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from patchsweep.errors import BadInput
from patchsweep.inputs import PAIRS, PAIRS_BYTES, TEXT, check_data, usable
from patchsweep.pairs.make import Bos, make_pair
from patchsweep.pairs.pair import Pair

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
NAMELESS = re.compile(r"|Unnamed: [\d.]+")  # a column of pandas' index, written once, and twice
# Names of files made for EAP-IG, whose answers are token ids of one tokenizer.
OF_EAP_IG = ("corrupted", "correct_idx", "incorrect_idx")


def read_pairs(
    path: str | Path, tokenizer: PreTrainedTokenizerBase, bos: Bos = "auto"
) -> list[Pair]:
    """The prompt pairs in the file at `path`: .jsonl (one object a line), .json (a list of objects)
    or .csv (the same columns); as tokens of `tokenizer`, `bos` as in `make_pair`.

    Keys: clean, answer; optional corrupt, wrong, labels {name: token index}, corrupt_labels, align,
    group, others {name: text}, continuation (see `make_pair`). `answer` and `wrong` are a text or a
    list of texts. In a CSV cell, lists and mappings are written as JSON; an empty cell, like null,
    is a key left out, and so is a column without a name (the index that pandas writes). BadInput as
    "file:line: ..." (of .json: the number of the object) for everything malformed.
    """
    path = Path(usable(path))
    readers = {".jsonl": _jsonl_rows, ".json": _json_rows, ".csv": _csv_rows}
    if path.suffix.lower() not in readers:
        raise BadInput(f"{path}: unknown kind of pairs file: use .jsonl, .json or .csv")
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
    origin = path.name.encode(errors="replace").decode()
    for line, row in readers[path.suffix.lower()](path, text):
        where = f"{path}:{line}"
        if len(pairs) == PAIRS:
            raise BadInput(f"{where}: more than {PAIRS:,} pairs: split the file")
        given = {k: v for k, v in row.items() if v is not None or k not in KEYS}
        check_data(given, where, TEXT)
        _check_row(given, where)
        pair = make_pair(tokenizer, **given, bos=bos, where=where)
        pairs.append(replace(pair, origin=origin))
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


def _json_rows(path: Path, text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        rows = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{path}: not JSON: {error}: one object a line goes in a .jsonl") from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise BadInput(f"{path}: not a list of objects: write [{{...}}, ...] with {KEYS[0]}, ...")
    yield from enumerate(rows, start=1)


def _csv_rows(path: Path, text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        names = [name for name in reader.fieldnames or [] if not NAMELESS.fullmatch(name)]
        if twice := [name for i, name in enumerate(names) if name in names[:i]]:
            raise BadInput(f"{path}:1: there are two columns '{twice[0]}': keep one")
        for cells in reader:
            where = f"{path}:{reader.line_num}"
            if None in cells:
                raise BadInput(f"{where}: more cells than columns: quote cells that hold a comma")
            # A key that is unknown is an error even where its cell is empty.
            row: dict[str, Any] = {
                k: v for k, v in cells.items() if (v or k not in KEYS) and not NAMELESS.fullmatch(k)
            }
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
    if theirs := [key for key in OF_EAP_IG if key in row]:
        raise BadInput(
            f"{where}: {', '.join(theirs)} are names of EAP-IG, whose answers are token ids: name "
            "the columns clean, corrupt, answer, wrong, and write the answers as text"
        )
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
