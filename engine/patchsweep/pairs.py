"""Prompt pairs: tokens, labels, files."""

from __future__ import annotations

import csv
import difflib
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from patchsweep.errors import BadInput

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from transformers import PreTrainedTokenizerBase

Bos = Literal["auto", "always", "never"]
BOS: tuple[Bos, ...] = ("auto", "always", "never")

REQUIRED = ("clean", "corrupt", "answer")
KEYS = (*REQUIRED, "wrong", "labels", "group")


@dataclass(frozen=True)
class Pair:
    """A clean and a corrupt prompt of equal token length, and what to measure at the last token.

    `answer` and `wrong` are sets of token ids; `wrong` may be empty if no metric needs it. `labels`
    names token positions; `group` names the template, for clustered statistics.
    """

    clean: tuple[int, ...]
    corrupt: tuple[int, ...]
    answer: tuple[int, ...]
    wrong: tuple[int, ...] = ()
    labels: Mapping[str, int] = field(default_factory=dict)
    group: str = ""

    def __len__(self) -> int:
        return len(self.clean)


def encode(tokenizer: PreTrainedTokenizerBase, text: str, bos: Bos = "auto") -> tuple[int, ...]:
    """Token ids [position] of a prompt.

    `bos`: "auto" keeps the special tokens that the tokenizer puts before a text by default (those
    it would put after it are left out: the next token is read at the end of the text), "always"
    starts with exactly one bos token, "never" with none. BadInput for another word, and for
    "always" where there is no bos token.
    """
    if bos not in BOS:
        raise BadInput(f"unknown bos '{bos}': use one of {', '.join(BOS)}")
    body = _ids(tokenizer, text, special=False)
    if bos == "auto":
        default = _ids(tokenizer, text, special=True)
        for start in range(len(default) - len(body) + 1):
            if default[start : start + len(body)] == body:
                return default[: start + len(body)]
        return default
    first: Any = tokenizer.bos_token_id
    if first is None:
        if bos == "never":
            return body
        raise BadInput("bos 'always': this tokenizer has no bos token: use bos 'auto' or 'never'")
    while body[:1] == (first,):
        body = body[1:]
    return (first, *body) if bos == "always" else body


def make_pair(
    tokenizer: PreTrainedTokenizerBase,
    clean: str,
    corrupt: str,
    answer: str | Sequence[str],
    wrong: str | Sequence[str] = (),
    labels: Mapping[str, int] | None = None,
    group: str = "",
    bos: Bos = "auto",
    where: str = "",
) -> Pair:
    """Tokenize and check one pair of prompts.

    `answer` and `wrong`: one text or several, each one token when it follows the clean prompt.
    `labels`: name -> token index, counted with the bos token; negative from the end. `where` begins
    every error, e.g. "pairs.jsonl:3". BadInput for unequal lengths, prompts that do not differ,
    answers that are not one token or are both answer and wrong, and labels outside the prompt.
    """
    at = f"{where}: " if where else ""
    a, b = encode(tokenizer, clean, bos), encode(tokenizer, corrupt, bos)
    if not a or not b:
        raise BadInput(f"{at}the {'corrupt' if a else 'clean'} prompt has no tokens: write a text")
    if len(a) != len(b):
        raise BadInput(
            f"{at}clean has {len(a)} tokens, corrupt has {len(b)}: "
            "word the prompts so that both have the same number of tokens"
        )
    if a == b:
        raise BadInput(f"{at}clean and corrupt have no differing token: change one of them")
    right = _token_set(tokenizer, clean, answer, bos, f"{at}answer")
    if not right:
        raise BadInput(f"{at}answer is empty: give the text of at least one token")
    other = _token_set(tokenizer, clean, wrong, bos, f"{at}wrong")
    if shared := set(right) & set(other):
        names = ", ".join(repr(tokenizer.decode([token])) for token in sorted(shared))
        raise BadInput(f"{at}token {names} is in both answer and wrong: keep it in one of them")
    positions = {}
    for name, index in (labels or {}).items():
        if not -len(a) <= index < len(a):
            raise BadInput(
                f"{at}label '{name}' at {index} is outside the prompt: "
                f"it has {len(a)} tokens, use {-len(a)} to {len(a) - 1}"
            )
        positions[name] = index % len(a)
    return Pair(a, b, right, other, positions, group)


def read_pairs(
    path: str | Path, tokenizer: PreTrainedTokenizerBase, bos: Bos = "auto"
) -> list[Pair]:
    """The prompt pairs of a .jsonl file (one object a line) or a .csv file (the same columns).

    Keys: clean, corrupt, answer; optional wrong, labels {name: token index}, group. `answer` and
    `wrong` are a text or a list of texts. In a CSV cell, lists and labels are written as JSON; an
    empty cell is a key left out. BadInput as "file:line: ..." for everything malformed.
    """
    path = Path(path)
    readers = {".jsonl": _jsonl_rows, ".csv": _csv_rows}
    if path.suffix.lower() not in readers:
        raise BadInput(f"{path}: unknown kind of pairs file: use .jsonl or .csv")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise BadInput(f"{path}: cannot read the pairs file: {reason}") from error
    pairs = []
    for line, row in readers[path.suffix.lower()](path, text):
        where = f"{path}:{line}"
        _check_row(row, where)
        pairs.append(make_pair(tokenizer, **row, bos=bos, where=where))
    if not pairs:
        raise BadInput(f"{path}: no pairs in the file: write at least one")
    return pairs


def resolve_positions(
    pairs: Sequence[Pair], positions: str | Sequence[int | str]
) -> tuple[tuple[int, ...] | tuple[str, ...], NDArray[np.int64]]:
    """Names of the position entries, and their token index [pair, entry] (-1 = outside the prompt).

    `positions`: "each" (entries 0 .. longest prompt - 1), "all" (one entry that stands for every
    position; its index is 0), or a list of indices (negative from the end) and labels. The names
    are all integers, or all strings if there is a label. A pair without a label that others have
    is outside. BadInput for a label no pair has, an index outside every prompt, a repeat, an
    empty list.
    """
    if not pairs:
        raise BadInput("positions: there are no pairs: give at least one")
    lengths = np.array([len(pair) for pair in pairs])
    if positions == "all":
        return ("all",), np.zeros((len(pairs), 1), dtype=np.int64)
    if positions == "each":
        entries: Sequence[int | str] = range(lengths.max())
    elif isinstance(positions, str):
        raise BadInput(f"positions '{positions}': use each, all, or a list such as [{positions}]")
    else:
        entries = positions
    if not entries:
        raise BadInput("positions: the list is empty: use each, all, or some indices or labels")
    if repeats := [e for i, e in enumerate(entries) if e in entries[:i]]:
        raise BadInput(f"positions: {repeats[0]!r} is there twice: keep one")
    columns = [_column(pairs, lengths, entry) for entry in entries]
    names = (
        tuple(int(e) for e in entries)
        if all(not isinstance(e, str) for e in entries)
        else tuple(str(e) for e in entries)
    )
    return names, np.stack(columns, axis=1)


def _column(
    pairs: Sequence[Pair], lengths: NDArray[np.int64], entry: int | str
) -> NDArray[np.int64]:
    """Token index [pair] of one entry, -1 where it is outside."""
    if isinstance(entry, str):
        known = list(dict.fromkeys(name for pair in pairs for name in pair.labels))
        if entry not in known:
            hint = f"use one of {', '.join(known)}" if known else "the pairs have no labels"
            raise BadInput(f"positions: unknown label '{entry}': {hint}")
        return np.array([pair.labels.get(entry, -1) for pair in pairs], dtype=np.int64)
    index = entry + lengths if entry < 0 else np.full(len(pairs), entry)
    index = np.where((index >= 0) & (index < lengths), index, -1).astype(np.int64)
    if (index < 0).all():
        longest = int(lengths.max())
        raise BadInput(
            f"positions: {entry} is outside every prompt: "
            f"the longest has {longest} tokens, use {-longest} to {longest - 1}"
        )
    return index


def _ids(tokenizer: PreTrainedTokenizerBase, text: str, special: bool) -> tuple[int, ...]:
    return tuple(tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])


def _token_set(
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    texts: str | Sequence[str],
    bos: Bos,
    what: str,
) -> tuple[int, ...]:
    """The token of each text, without repeats."""
    texts = [texts] if isinstance(texts, str) else texts
    return tuple(dict.fromkeys(_one_token(tokenizer, prompt, text, bos, what) for text in texts))


def _one_token(
    tokenizer: PreTrainedTokenizerBase, prompt: str, text: str, bos: Bos, what: str
) -> int:
    """The token of `text` after `prompt`: in place first: SentencePiece may add a space."""
    before, after = encode(tokenizer, prompt, bos), encode(tokenizer, prompt + text, bos)
    alone = _ids(tokenizer, text, special=False)
    if len(after) == len(before) + 1 and after[:-1] == before:
        token = after[-1]
    elif len(alone) == 1:
        token = alone[0]
    else:
        shown = ", ".join(repr(t) for t in tokenizer.convert_ids_to_tokens(list(alone)))
        raise BadInput(
            f"{what} {text!r} is {len(alone)} tokens ({shown}), not one: use a word that is one "
            f"token{'' if text[:1].isspace() else ', perhaps with a leading space'}"
        )
    if token == tokenizer.unk_token_id and text != tokenizer.unk_token:
        raise BadInput(f"{what} {text!r} is not in the vocabulary: use a word that is one token")
    return token


def _jsonl_rows(path: Path, text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    # Not splitlines(): JSON strings may hold U+2028 and the like unescaped.
    for line, content in enumerate(text.split("\n"), start=1):
        if not content.strip():
            continue
        try:
            row = json.loads(content)
        except ValueError as error:
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
            for key in {"answer", "wrong", "labels"} & row.keys():
                if key == "labels" or row[key].startswith("["):
                    try:
                        row[key] = json.loads(row[key])
                    except ValueError as error:
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
    for key in ("clean", "corrupt", "group"):
        if not isinstance(row.get(key, ""), str):
            raise BadInput(f"{where}: {key} is not a text: write it in quotes")
    for key in ("answer", "wrong"):
        value = row.get(key, "")
        if not all(isinstance(v, str) for v in (value if isinstance(value, list) else [value])):
            raise BadInput(f"{where}: {key} is not a text or a list of texts: write it in quotes")
    labels = row.get("labels", {})
    if not isinstance(labels, dict) or not all(type(v) is int for v in labels.values()):
        raise BadInput(f'{where}: labels is not {{name: token index}}: e.g. {{"END": -1}}')
