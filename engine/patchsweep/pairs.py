"""Prompt pairs: tokens, alignment, labels, files."""

from __future__ import annotations

import csv
import difflib
import io
import json
from collections import Counter
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
# Names of sources that are no prompts of a pair.
RESERVED = ("other", "zero", "mean", "resample", "vector", "clean", "corrupt")

Align = Literal["end", "labels"] | Sequence[Sequence[int]] | Mapping[int, int]
Link = tuple[str, int, int]  # as it was said, clean position, corrupt position
Entry = int | str


@dataclass(frozen=True)
class Pair:
    """A clean and a corrupt prompt, and what to measure behind them.

    `answer` and `wrong` are sets of token ids, read where `read` says; `wrong` may be empty if no
    metric needs it, `corrupt` if no source does. `labels` names positions of the clean prompt;
    `group` names the template, for clustered statistics. `align` [clean position] is the corrupt
    position that stands for each, −1 for none; None: the same one, in prompts of equal length.
    `others` are further corrupt prompts, each as long as the clean one. `continuation` are the
    tokens of an answer of several: all prompts end with all but its last. BadInput if these do not
    fit together.
    """

    clean: tuple[int, ...]
    corrupt: tuple[int, ...]
    answer: tuple[int, ...]
    wrong: tuple[int, ...] = ()
    labels: Mapping[str, int] = field(default_factory=dict)
    group: str = ""
    align: tuple[int, ...] | None = None
    others: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    continuation: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        _check_labels(self)
        _check_lengths(self)
        _check_align(self)
        _check_tail(self)

    def __len__(self) -> int:
        return len(self.clean)

    @property
    def read(self) -> int:
        """The clean position whose next token is the answer."""
        return len(self.clean) - max(1, len(self.continuation))

    @property
    def alignment(self) -> NDArray[np.int64]:
        """[clean position]: the corrupt position that stands for it, −1 for none. BadInput for
        unequal lengths without `align`."""
        if self.align is not None:
            return np.array(self.align, np.int64)
        if not self.corrupt:
            return np.full(len(self.clean), -1, np.int64)
        if len(self.clean) != len(self.corrupt):
            raise BadInput(_unequal(len(self.clean), len(self.corrupt)))
        return np.arange(len(self.clean), dtype=np.int64)


def _check_labels(pair: Pair) -> None:
    for name, index in pair.labels.items():
        if not 0 <= index < len(pair):
            raise BadInput(
                f"label '{name}' at {index} is outside the prompt: "
                f"it has {len(pair)} tokens, use 0 to {len(pair) - 1}"
            )


def _check_lengths(pair: Pair) -> None:
    for name, tokens in pair.others.items():
        if len(tokens) != len(pair):
            raise BadInput(_other_length(name, len(tokens), len(pair)))


def _check_align(pair: Pair) -> None:
    if pair.align is None:
        return
    if len(pair.align) != len(pair):
        raise BadInput(
            f"align has {len(pair.align)} entries, clean has {len(pair)} tokens: "
            "give one corrupt position, or −1, for each token"
        )
    if outside := [n for n in pair.align if not -1 <= n < len(pair.corrupt)]:
        raise BadInput(
            f"align: {outside[0]} is outside the corrupt prompt: "
            f"it has {len(pair.corrupt)} tokens, use −1 to {len(pair.corrupt) - 1}"
        )
    known = [n for n in pair.align if n >= 0]
    if twice := [n for n, count in Counter(known).items() if count > 1]:
        raise BadInput(f"align: position {twice[0]} of corrupt is there twice: keep one")


def _check_tail(pair: Pair) -> None:
    tail = pair.continuation[:-1]
    prompts = {"clean": pair.clean, "corrupt": pair.corrupt, **pair.others}
    for name, tokens in prompts.items():
        short = len(tokens) <= len(tail)
        if tail and tokens and (short or tokens[-len(tail) :] != tail):
            raise BadInput(
                f"continuation: prompt '{name}' does not end with all but its last token: "
                "append them"
            )


def _unequal(clean: int, corrupt: int) -> str:
    return (
        f"clean has {clean} tokens, corrupt has {corrupt}: word the prompts so that both have the "
        'same number of tokens, or say which positions correspond, e.g. align: "end"'
    )


def _other_length(name: str, tokens: int, clean: int) -> str:
    return (
        f"others: '{name}' has {tokens} tokens, clean has {clean}: "
        "word it so that both have the same number of tokens"
    )


@dataclass(frozen=True, eq=False)
class Positions:
    """The entries of a position axis: their names, and members [pair, entry, clean position], which
    positions an entry stands for in each pair (none: it is outside the prompt)."""

    names: tuple[int, ...] | tuple[str, ...]
    members: NDArray[np.bool_]


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
    corrupt: str | None = None,
    answer: str | Sequence[str] = (),
    wrong: str | Sequence[str] = (),
    labels: Mapping[str, int] | None = None,
    group: str = "",
    bos: Bos = "auto",
    where: str = "",
    *,
    corrupt_labels: Mapping[str, int] | None = None,
    align: Align | None = None,
    others: Mapping[str, str] | None = None,
    continuation: str | None = None,
) -> Pair:
    """Tokenize and check one pair of prompts.

    `answer` and `wrong`: one text or several, each one token when it follows the clean prompt.
    `labels`, `corrupt_labels`: name -> token index, counted with the bos token; negative from the
    end of the prompt, before a continuation. `align` says which corrupt position stands for each
    clean one: "end" (the last ones, one to one), "labels" (those with the same label) or a list of
    [clean, corrupt], counted as labels are; it is needed where the lengths differ. Where the answer
    is read, the prompts always correspond. `others`: further corrupt prompts by name.
    `continuation`: the text of an answer of several tokens. `where` begins every error, e.g.
    "pairs.jsonl:3". BadInput for unequal lengths without align, an align or corrupt_labels that do
    not fit, prompts that do not differ, answers that are not one token or are both answer and
    wrong, labels outside the prompt, and a continuation that merges with the prompt.
    """
    at = f"{where}: " if where else ""
    a = encode(tokenizer, clean, bos)
    b = () if corrupt is None else encode(tokenizer, corrupt, bos)
    if not a or (corrupt is not None and not b):
        raise BadInput(f"{at}the {'corrupt' if a else 'clean'} prompt has no tokens: write a text")
    if b and align is None and len(a) != len(b):
        raise BadInput(f"{at}{_unequal(len(a), len(b))}")
    if a == b:
        raise BadInput(f"{at}clean and corrupt have no differing token: change one of them")
    right = _token_set(tokenizer, clean, answer, bos, f"{at}answer")
    if not right:
        raise BadInput(f"{at}answer is empty: give the text of at least one token")
    other = _token_set(tokenizer, clean, wrong, bos, f"{at}wrong")
    if shared := set(right) & set(other):
        names = ", ".join(repr(tokenizer.decode([token])) for token in sorted(shared))
        raise BadInput(f"{at}token {names} is in both answer and wrong: keep it in one of them")
    positions = _labelled(labels or {}, len(a), f"{at}label")
    aligned = None
    if b:
        further = _labelled(corrupt_labels or {}, len(b), f"{at}corrupt label")
        aligned = _aligned(align, len(a), len(b), positions, further, at)
    elif align is not None or corrupt_labels:
        key = "corrupt_labels" if align is None else "align"
        raise BadInput(f"{at}{key} needs a corrupt prompt: add one or leave {key} out")
    more = _others(tokenizer, others or {}, len(a), bos, at)
    tail: tuple[int, ...] = ()
    if continuation is not None:
        tail = _continuation(tokenizer, clean, continuation, bos, at)
    if aligned is not None:
        aligned += tuple(range(len(b), len(b) + max(0, len(tail) - 1)))
    return Pair(
        clean=a + tail[:-1],
        corrupt=b + tail[:-1] if b else (),
        answer=right,
        wrong=other,
        labels=positions,
        group=group,
        align=aligned,
        others={name: tokens + tail[:-1] for name, tokens in more.items()},
        continuation=tail,
    )


def _labelled(labels: Mapping[str, int], length: int, what: str) -> dict[str, int]:
    """Labels counted from the first token; BadInput if one is outside the prompt."""
    positions = {}
    for name, index in labels.items():
        if not -length <= index < length:
            raise BadInput(
                f"{what} '{name}' at {index} is outside the prompt: "
                f"it has {length} tokens, use {-length} to {length - 1}"
            )
        positions[name] = index % length
    return positions


def _aligned(
    align: Align | None,
    clean: int,
    corrupt: int,
    labels: Mapping[str, int],
    corrupt_labels: Mapping[str, int],
    at: str,
) -> tuple[int, ...] | None:
    """[clean position]: its corrupt position, −1 for none; None if all are the same."""
    if corrupt_labels and align != "labels":
        raise BadInput(
            f'{at}corrupt_labels only serve align: "labels": say so, or leave corrupt_labels out'
        )
    if align is None:
        return None
    if align == "end":
        links = [("end", clean - k, corrupt - k) for k in range(1, min(clean, corrupt) + 1)]
    elif align == "labels":
        links = _links_by_label(labels, corrupt_labels, at)
    else:
        links = _links_given(align, clean, corrupt, at)
    out = _linked(links, clean, corrupt, at)
    return None if out == tuple(range(corrupt)) else out


def _links_by_label(
    labels: Mapping[str, int], corrupt_labels: Mapping[str, int], at: str
) -> list[Link]:
    """The positions that share a label; two labels of the same two positions are one link."""
    links = {
        (labels[name], corrupt_labels[name]): f"label '{name}'"
        for name in labels
        if name in corrupt_labels
    }
    if not links:
        raise BadInput(f"{at}align: labels and corrupt_labels have no name in common: add one")
    return [(said, *link) for link, said in links.items()]


def _links_given(align: object, clean: int, corrupt: int, at: str) -> list[Link]:
    """The listed positions, counted from the first token."""
    items: object = tuple(align.items()) if isinstance(align, Mapping) else align
    if isinstance(items, str) or not isinstance(items, Sequence):
        raise BadInput(f'{at}align is {align!r}: use "end", "labels" or [[clean, corrupt], ...]')
    links = []
    for item in items:
        pair = list(item) if isinstance(item, list | tuple) else []
        if len(pair) != 2 or any(type(n) is not int for n in pair):
            raise BadInput(
                f"{at}align: {item!r} is no [clean, corrupt] pair of token indices: "
                "write e.g. [3, 4]"
            )
        for n, length, run in zip(pair, (clean, corrupt), ("clean", "corrupt"), strict=True):
            if not -length <= n < length:
                raise BadInput(
                    f"{at}align: {pair} is outside the {run} prompt: "
                    f"it has {length} tokens, use {-length} to {length - 1}"
                )
        links.append((f"{pair}", pair[0] % clean, pair[1] % corrupt))
    return links


def _linked(links: Sequence[Link], clean: int, corrupt: int, at: str) -> tuple[int, ...]:
    """[clean position]: its corrupt position, −1 for none. The last positions, where the answer is
    read, always correspond."""
    forth: dict[int, int] = {}
    taken: set[int] = set()
    for said, i, j in links:
        if i in forth or j in taken:
            position = f"{i} of clean" if i in forth else f"{j} of corrupt"
            raise BadInput(f"{at}align: {said}: position {position} is there twice: keep one")
        if (i == clean - 1) != (j == corrupt - 1):
            raise BadInput(
                f"{at}align: {said}: the last tokens of both prompts, where the answer is read, "
                "correspond to each other: leave this one out"
            )
        forth[i] = j
        taken.add(j)
    forth[clean - 1] = corrupt - 1
    return tuple(forth.get(i, -1) for i in range(clean))


def _others(
    tokenizer: PreTrainedTokenizerBase, texts: Mapping[str, str], length: int, bos: Bos, at: str
) -> dict[str, tuple[int, ...]]:
    """The tokens of further corrupt prompts."""
    found = {}
    for name, text in texts.items():
        if not name or name in RESERVED:
            raise BadInput(f"{at}others: '{name}' cannot name a prompt: choose another name")
        found[name] = encode(tokenizer, text, bos)
        if len(found[name]) != length:
            raise BadInput(f"{at}{_other_length(name, len(found[name]), length)}")
    return found


def _continuation(
    tokenizer: PreTrainedTokenizerBase, prompt: str, text: str, bos: Bos, at: str
) -> tuple[int, ...]:
    """The tokens of a text in place behind a prompt."""
    before, after = encode(tokenizer, prompt, bos), encode(tokenizer, prompt + text, bos)
    if after == before:
        raise BadInput(f"{at}continuation {text!r} adds no token: write a text or leave it out")
    if after[: len(before)] != before:
        raise BadInput(
            f"{at}continuation {text!r} changes the prompt's own tokens when it follows them: "
            "let it begin with a space or another word"
        )
    tail = after[len(before) :]
    if tokenizer.unk_token_id is not None and tokenizer.unk_token_id in tail:
        raise BadInput(f"{at}continuation {text!r} is not in the vocabulary: use other words")
    return tail


def read_pairs(
    path: str | Path, tokenizer: PreTrainedTokenizerBase, bos: Bos = "auto"
) -> list[Pair]:
    """The prompt pairs of a .jsonl file (one object a line) or a .csv file (the same columns).

    Keys: clean, answer; optional corrupt, wrong, labels {name: token index}, corrupt_labels, align,
    group, others {name: text}, continuation (see `make_pair`). `answer` and `wrong` are a text or a
    list of texts. In a CSV cell, lists and mappings are written as JSON; an empty cell is a key
    left out. BadInput as "file:line: ..." for everything malformed.
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
    pairs: Sequence[Pair], positions: str | Sequence[Entry] | Mapping[str, Sequence[Entry]]
) -> Positions:
    """The entries that `positions` stands for.

    "each" (entries 0 .. longest prompt - 1), "all" (one entry: every position), a list of indices
    (negative from the end of the prompt, before a continuation) and labels, or named groups of
    them, {name: [...]}, each one entry of the positions that a pair has of it. The names are all
    integers, or all strings if there is a label. A pair without a label that others have is
    outside. BadInput for a label no pair has, an index outside every prompt, a repeat, an empty
    list, a group named as a label, "all" or "each".
    """
    if not pairs:
        raise BadInput("positions: there are no pairs: give at least one")
    lengths = np.array([len(pair) for pair in pairs])
    places = np.arange(lengths.max())
    inside = (places < lengths[:, None])[:, None]
    if positions == "all":
        return Positions(("all",), inside)
    if positions == "each":
        return Positions(tuple(places.tolist()), inside & np.eye(len(places), dtype=np.bool_))
    if isinstance(positions, Mapping):
        if not positions:
            raise BadInput("positions: the mapping is empty: name at least one group")
        groups = [_group(pairs, name, entries) for name, entries in positions.items()]
        return Positions(tuple(positions), np.stack(groups, 1))
    if isinstance(positions, str):
        raise BadInput(f"positions '{positions}': use each, all, or a list such as [{positions}]")
    names = (
        tuple(int(e) for e in positions)
        if all(not isinstance(e, str) for e in positions)
        else tuple(str(e) for e in positions)
    )
    return Positions(names, _members(pairs, positions, "positions"))


def _group(pairs: Sequence[Pair], name: str, entries: Sequence[Entry]) -> NDArray[np.bool_]:
    """Members [pair, position] of a named group; BadInput if its name means something else."""
    what = f"positions: group '{name}'"
    if isinstance(entries, str):
        raise BadInput(f"{what} is no list of indices or labels: write [{entries}]")
    named_so = name in ("", "all", "each") or any(name in pair.labels for pair in pairs)
    if named_so and list(entries) != [name]:
        raise BadInput(f"{what} has a name that means something else: choose another name")
    found: NDArray[np.bool_] = np.any(_members(pairs, entries, what), axis=1)
    return found


def _members(pairs: Sequence[Pair], entries: Sequence[Entry], what: str) -> NDArray[np.bool_]:
    """Members [pair, entry, position] of single positions."""
    if not entries:
        raise BadInput(f"{what}: the list is empty: give some indices or labels")
    if repeats := [e for i, e in enumerate(entries) if e in entries[:i]]:
        raise BadInput(f"{what}: {repeats[0]!r} is there twice: keep one")
    index = np.stack([_column(pairs, entry, what) for entry in entries], axis=1)
    found: NDArray[np.bool_] = index[:, :, None] == np.arange(max(map(len, pairs)))
    return found


def _column(pairs: Sequence[Pair], entry: Entry, what: str) -> NDArray[np.int64]:
    """Token index [pair] of one entry, −1 where it is outside."""
    if isinstance(entry, str):
        known = list(dict.fromkeys(name for pair in pairs for name in pair.labels))
        if entry not in known:
            hint = f"use one of {', '.join(known)}" if known else "the pairs have no labels"
            raise BadInput(f"{what}: unknown label '{entry}': {hint}")
        return np.array([pair.labels.get(entry, -1) for pair in pairs], dtype=np.int64)
    lengths = np.array([len(pair) for pair in pairs])
    # From the end means from where the answer is read: before a continuation.
    ends = np.array([pair.read + 1 for pair in pairs])
    index = entry + ends if entry < 0 else np.full(len(pairs), entry)
    index = np.where((index >= 0) & (index < lengths), index, -1).astype(np.int64)
    if (index < 0).all():
        raise BadInput(
            f"{what}: {entry} is outside every prompt: "
            f"the longest has {lengths.max()} tokens, use {-ends.max()} to {lengths.max() - 1}"
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
            for key in {"answer", "wrong", "align", *MAPPINGS} & row.keys():
                if key in MAPPINGS or row[key].startswith("["):
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
