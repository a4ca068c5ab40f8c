"""Texts to tokens, and to a pair."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from patchsweep.errors import BadInput
from patchsweep.pairs.alignment import Align, aligned_positions, labelled
from patchsweep.pairs.pair import Pair, check_text, other_length, unequal

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Bos = Literal["auto", "always", "never"]
BOS: tuple[Bos, ...] = ("auto", "always", "never")
# Names of sources that are no prompts of a pair.
RESERVED = ("other", "zero", "mean", "resample", "vector", "clean", "corrupt")


def encode(tokenizer: PreTrainedTokenizerBase, text: str, bos: Bos = "auto") -> tuple[int, ...]:
    """Token ids [position] of a prompt.

    `bos`: "auto" keeps the special tokens that the tokenizer puts before a text by default, once: a
    text that begins with them, as chat templates do, gets no second ones (those it would put after
    it are left out: the next token is read at the end of the text), "always" starts with exactly
    one bos token, "never" with none. BadInput for another word, and for "always" where there is no
    bos token.
    """
    if bos not in BOS:
        raise BadInput(f"unknown bos '{bos}': use one of {', '.join(BOS)}")
    body = _ids(tokenizer, text, special=False)
    if bos == "auto":
        default = _ids(tokenizer, text, special=True)
        for start in range(len(default) - len(body) + 1):
            if default[start : start + len(body)] == body:
                before = default[:start]
                there = next(k for k in range(start, -1, -1) if before[start - k :] == body[:k])
                return before + body[there:]
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
    """Tokenize one pair of prompts, texts, with a model's `tokenizer`, and check it.

    `answer` and `wrong`: one text or several, each one token when it follows the clean prompt.
    `labels`, `corrupt_labels`: name -> token index, counted with the bos token; negative from the
    end of the prompt, before a continuation. `align` says which corrupt position stands for each
    clean one: "end" (the last ones, one to one), "labels" (those with the same label) or a list of
    [clean, corrupt], counted as labels are; it is needed where the lengths differ. Where the answer
    is read, the prompts always correspond. `others`: further corrupt prompts by name.
    `continuation`: the text of an answer of several tokens. `group` names the template, for
    clustered statistics. `bos`: special tokens before the text: "auto" as the tokenizer puts them
    by default, "always" one bos token, "never" none. `where` begins every error, e.g.
    "pairs.jsonl:3". BadInput for unequal lengths without align, an align or corrupt_labels that do
    not fit, prompts that do not differ, answers that are not one token or are both answer and
    wrong, labels outside the prompt, and a continuation that merges with the prompt.
    """
    at = f"{where}: " if where else ""
    texts = {"clean": [clean], "answer": _listed(answer), "wrong": _listed(wrong)}
    texts |= {"corrupt": [corrupt or ""], "continuation": [continuation or ""], "group": [group]}
    texts |= {"others": [*(others or {}), *(others or {}).values()], "labels": [*(labels or {})]}
    for what, some in texts.items():
        for text in some:
            check_text(f"{at}{what}", text)
    a = encode(tokenizer, clean, bos)
    b = () if corrupt is None else encode(tokenizer, corrupt, bos)
    if not a or (corrupt is not None and not b):
        raise BadInput(f"{at}the {'corrupt' if a else 'clean'} prompt has no tokens: write a text")
    if b and align is None and len(a) != len(b):
        raise BadInput(f"{at}{unequal(len(a), len(b))}")
    if a == b:
        raise BadInput(f"{at}clean and corrupt have no differing token: change one of them")
    right = _token_set(tokenizer, clean, answer, bos, f"{at}answer")
    if not right:
        raise BadInput(f"{at}answer is empty: give the text of at least one token")
    other = _token_set(tokenizer, clean, wrong, bos, f"{at}wrong")
    if shared := set(right) & set(other):
        names = ", ".join(repr(tokenizer.decode([token])) for token in sorted(shared))
        raise BadInput(f"{at}token {names} is in both answer and wrong: keep it in one of them")
    positions = labelled(labels or {}, len(a), f"{at}label")
    aligned = None
    if b:
        further = labelled(corrupt_labels or {}, len(b), f"{at}corrupt label")
        aligned = aligned_positions(align, len(a), len(b), positions, further, at)
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
            raise BadInput(f"{at}{other_length(name, len(found[name]), length)}")
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
    found = (_one_token(tokenizer, prompt, text, bos, what) for text in _listed(texts))
    return tuple(dict.fromkeys(found))


def _listed(texts: str | Sequence[str]) -> Sequence[str]:
    return [texts] if isinstance(texts, str) else texts


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
