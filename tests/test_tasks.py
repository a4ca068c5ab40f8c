"""The built-in prompt sets, with the demo model's tokenizer."""

from __future__ import annotations

import re
from collections import Counter

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from patchsweep.errors import BadInput
from patchsweep.loading import load_tokenizer
from patchsweep.pairs import Pair
from patchsweep.tasks import TASKS, build
from patchsweep.tasks.facts import RELATIONS
from patchsweep.tasks.ioi import NAMES, TEMPLATES


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return load_tokenizer("smollm2-135m")


def words_only(*words: str) -> PreTrainedTokenizerFast:
    """A tokenizer that knows these words and nothing else."""
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(["?", *words])}, unk_token="?"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="?")


def ids(pair: Pair) -> tuple[tuple[int, ...], ...]:
    return (pair.clean, pair.corrupt, pair.answer, pair.wrong)


@pytest.mark.parametrize("task", TASKS)
def test_pairs_are_sound(tokenizer: PreTrainedTokenizerBase, task: str) -> None:
    pairs = build(task, tokenizer, 200)
    assert len({ids(p) for p in pairs}) == 200
    for p in pairs:
        assert len(p.clean) == len(p.corrupt)
        assert p.clean != p.corrupt
        assert len(p.answer) == len(p.wrong) == 1
        assert p.answer != p.wrong
        assert p.labels["END"] == len(p) - 1
        assert tokenizer.decode(p.answer).startswith(" ")


@pytest.mark.parametrize("task", TASKS)
def test_the_seed_decides(tokenizer: PreTrainedTokenizerBase, task: str) -> None:
    first = build(task, tokenizer, 30, seed=1)
    assert build(task, tokenizer, 30, seed=1) == first
    assert build(task, tokenizer, 10, seed=1) == first[:10]
    assert build(task, tokenizer, 30, seed=2) != first


@pytest.mark.parametrize("task", TASKS)
def test_bos_moves_the_labels(tokenizer: PreTrainedTokenizerBase, task: str) -> None:
    for without, with_bos in zip(
        build(task, tokenizer, 5), build(task, tokenizer, 5, bos="always"), strict=True
    ):
        assert with_bos.clean == (tokenizer.bos_token_id, *without.clean)
        assert with_bos.labels == {name: i + 1 for name, i in without.labels.items()}


def test_ioi(tokenizer: PreTrainedTokenizerBase) -> None:
    assert len(TEMPLATES) >= 12
    assert len(set(NAMES.split())) == len(NAMES.split()) >= 60
    groups = Counter()
    for p in build("ioi", tokenizer, 4 * len(TEMPLATES)):
        groups[p.group] += 1
        io, s1, s2 = (p.labels[name] for name in ("IO", "S1", "S2"))
        assert p.clean[io] == p.corrupt[io] == p.answer[0]
        assert p.clean[s1] == p.clean[s2] == p.corrupt[s1] == p.wrong[0]
        assert p.corrupt == (*p.clean[:s2], p.answer[0], *p.clean[s2 + 1 :])
        assert (io < s1 < s2) if p.group.startswith("ABBA") else (s1 < io < s2)
    # Every template both ways round, equally often.
    assert groups == {f"{o}-{i}": 2 for o in ("ABBA", "BABA") for i in range(len(TEMPLATES))}


def test_ioi_classic_form(tokenizer: PreTrainedTokenizerBase) -> None:
    texts = [tokenizer.decode(p.clean) for p in build("ioi", tokenizer, 28) if "-0" in p.group]
    assert len(texts) == 2
    for text in texts:
        found = re.fullmatch(r"When (\w+) and (\w+) went to the \w+, (\w+) gave a \w+ to", text)
        assert found and found[3] in (found[1], found[2])


def test_facts(tokenizer: PreTrainedTokenizerBase) -> None:
    assert len(RELATIONS) >= 5
    entries = {
        (before + entry.split(":")[0] + after): entry.split(":")
        for before, after, facts in RELATIONS.values()
        for entry in facts
    }
    assert len(entries) == sum(len(facts) for _, _, facts in RELATIONS.values()) >= 80
    seen = set()
    for p in build("facts", tokenizer, 300):
        subject, answer = entries[tokenizer.decode(p.clean)]
        other, wrong = entries[tokenizer.decode(p.corrupt)]
        assert (tokenizer.decode(p.answer), tokenizer.decode(p.wrong)) == (answer, wrong)
        end = p.labels["SUBJECT_LAST"] + 1
        assert tokenizer.decode(p.clean[:end]).endswith(subject)
        assert tokenizer.decode(p.corrupt[:end]).endswith(other)
        assert p.clean[end:] == p.corrupt[end:]
        seen.add(p.group)
    assert seen == set(RELATIONS)


def test_all_facts_and_not_one_more(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(BadInput, match="100000 pairs asked for") as error:
        build("facts", tokenizer, 100_000)
    most = int(re.search(r"(\d+) can", str(error.value))[1])
    assert len({ids(p) for p in build("facts", tokenizer, most)}) == most
    with pytest.raises(BadInput, match=f"{most + 1} pairs asked for, {most} can be had"):
        build("facts", tokenizer, most + 1)


def test_all_ioi_and_not_one_more() -> None:
    rest = " ".join(TEMPLATES).replace("{", " ").replace("}", " ")
    known = sorted(set(re.findall(r"\w+|[^\w\s]+", rest)))
    tokenizer = words_only(*known, "John", "Mary", "store", "drink")
    most = 2 * len(TEMPLATES) * 2
    assert len({ids(p) for p in build("ioi", tokenizer, most)}) == most
    with pytest.raises(BadInput, match=f"{most} can be had .*2 names, 1 places, 1 objects"):
        build("ioi", tokenizer, most + 1)


def test_a_tokenizer_without_the_words() -> None:
    for task in TASKS:
        with pytest.raises(BadInput, match="1 pairs asked for, 0 can be had"):
            build(task, words_only("the"), 1)


def test_unknown_task_and_no_pairs(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(BadInput, match="unknown task 'oio': use one of ioi, facts"):
        build("oio", tokenizer, 1)
    with pytest.raises(BadInput, match="at least 1"):
        build("ioi", tokenizer, 0)
