"""The built-in prompt sets, with tokenizers of three kinds."""

from __future__ import annotations

import operator
import random
import re
from collections import Counter
from functools import cache
from importlib import import_module
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.made_tokenizers import byte_level, metaspace
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from patchsweep.errors import BadInput
from patchsweep.model.loading import load_tokenizer
from patchsweep.pairs import Pair
from patchsweep.tasks import TASKS, arithmetic, docstring, facts, find, greater_than, ioi, nobel
from patchsweep.tasks.task import in_random_order

RELATIONS = import_module("patchsweep.tasks.facts").RELATIONS
TEMPLATES = import_module("patchsweep.tasks.ioi").TEMPLATES
BOS = ("auto", "never", "always")


@cache
def tokenizer(kind: str) -> PreTrainedTokenizerBase:
    """smollm2 (byte-level, digits apart), bytes (as GPT-2's), metaspace (as Llama's)."""
    made = {"bytes": byte_level, "metaspace": metaspace}
    return made[kind]() if kind in made else load_tokenizer("smollm2-135m")


KINDS = pytest.mark.parametrize("kind", ("smollm2", "bytes", "metaspace"))
SEEDS = st.integers(0, 2**32)


def words_only(*words: str) -> PreTrainedTokenizerFast:
    """A tokenizer that knows these words and nothing else."""
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(["?", *words])}, unk_token="?"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="?")


def ids(pair: Pair) -> tuple[tuple[int, ...], ...]:
    return (pair.clean, pair.corrupt, pair.answer, pair.wrong)


def text(t: PreTrainedTokenizerBase, tokens: tuple[int, ...]) -> str:
    """A prompt as a reader sees it."""
    return t.decode(tokens, skip_special_tokens=True).strip(" ")


def words(t: PreTrainedTokenizerBase, tokens: tuple[int, ...]) -> list[str]:
    return [t.decode([token]).strip() for token in tokens]


def part(t: PreTrainedTokenizerBase, pair: Pair, name: str, run: str = "clean") -> str:
    """The text at a label, or at the labels NAME_1, NAME_2 ... of it."""
    named = [at for label, at in pair.labels.items() if re.fullmatch(rf"{name}(_\d+)?", label)]
    assert named == list(range(named[0], named[0] + len(named)))
    return t.decode([getattr(pair, run)[at] for at in named]).strip()


def changed(task: str, options: dict[str, str]) -> set[str]:
    """The parts in which the corrupt prompt differs."""
    corruption = options.get("corruption", "")
    return {
        "ioi": {"s2": {"S2"}, "s1_io": {"S1", "IO"}, "abc": {"S1", "S2", "IO"}},
        "docstring": {
            "c_def": {"C_def"},
            "def": {"A_def", "B_def"},
            "doc": {"A_doc", "B_doc"},
            "c_def_doc": {"C_def", "A_doc", "B_doc"},
            "def_doc": {"A_def", "B_def", "A_doc", "B_doc"},
        },
        "arithmetic": {"operands": {"A", "B"}, "first": {"A"}, "second": {"B"}},
        "greater_than": {"": {"YY"}},
        "facts": {"": {"SUBJECT"}},
        "nobel": {"both": {"FIRST", "SECOND"}, "first": {"FIRST"}, "second": {"SECOND"}},
    }[task][corruption]


@pytest.mark.parametrize("name", TASKS)
@KINDS
@settings(max_examples=5)
@given(seed=SEEDS, bos=st.sampled_from(BOS[:2]), data=st.data())
def test_pairs_are_sound(name: str, kind: str, seed: int, bos: Any, data: st.DataObject) -> None:
    task, t = TASKS[name], tokenizer(kind)
    options = {o: data.draw(st.sampled_from(choices)) for o, choices in task.options.items()}
    pairs = task(t, 6, seed, bos, **options)
    assert task(t, 6, seed, bos, **options) == pairs
    assert task(t, 3, seed, bos, **options) == pairs[:3]
    assert len({ids(p) for p in pairs}) == 6
    for p in pairs:
        assert len(p.clean) == len(p.corrupt)
        assert p.answer
        assert p.wrong
        assert len({*p.answer, *p.wrong}) == len(p.answer) + len(p.wrong)
        assert p.labels["END"] == len(p) - 1
        assert (p.clean[0] == t.bos_token_id) == (kind == "metaspace" and bos == "auto")
        meant = changed(name, options)
        places = {
            at: re.sub(r"_(\d+|LAST)$", "", label)
            for label, at in p.labels.items()
            if label != "END"
        }
        assert all(words(t, p.clean)[at] for at in places)  # no space that is a token of its own
        differ = [i for i in range(len(p)) if p.clean[i] != p.corrupt[i]]
        assert {places[i] for i in differ} == meant


@pytest.mark.parametrize("name", TASKS)
def test_the_seed_decides(name: str) -> None:
    t = tokenizer("smollm2")
    assert TASKS[name](t, 30, seed=1) != TASKS[name](t, 30, seed=2)


@pytest.mark.parametrize("name", TASKS)
def test_bos_moves_the_labels(name: str) -> None:
    t = tokenizer("smollm2")
    for p, q in zip(TASKS[name](t, 5), TASKS[name](t, 5, bos="always"), strict=True):
        assert q.clean == (t.bos_token_id, *p.clean)
        assert q.labels == {label: i + 1 for label, i in p.labels.items()}


@KINDS
@settings(max_examples=5)
@given(seed=SEEDS, corruption=st.sampled_from(ioi.options["corruption"]))
def test_ioi(kind: str, seed: int, corruption: str) -> None:
    t = tokenizer(kind)
    for p in ioi(t, 4, seed, corruption=corruption):
        io, s = p.labels["IO"], p.labels["S1"]
        assert p.group.startswith("ABBA" if io < s else "BABA")
        said = [part(t, p, name) for name in ("IO", "S1", "S2")]
        assert said[1:] == words(t, p.wrong) * 2
        assert said[:1] == words(t, p.answer)
        counts = [len(re.findall(rf"\b{word}\b", text(t, p.clean))) for word in said[:2]]
        assert counts == [1, 2]
        corrupt = [part(t, p, name, "corrupt") for name in ("IO", "S1", "S2")]
        if corruption == "s2":
            assert corrupt == [said[0], said[1], said[0]]
        else:
            assert len({*corrupt}) == 3
            kept = [a for a, b in zip(said, corrupt, strict=True) if a == b]
            assert kept == ([said[2]] if corruption == "s1_io" else [])
            assert {*said} & {*corrupt} == {*kept}


def test_a_lazy_shuffle() -> None:
    """Everything once, in every order equally often."""
    rng = random.Random(0)
    assert sorted(in_random_order(rng, range(100))) == list(range(100))
    orders = Counter(tuple(in_random_order(rng, "abc")) for _ in range(6000))
    assert len(orders) == 6
    assert all(abs(count - 1000) < 150 for count in orders.values())  # 5 standard deviations


def test_ioi_corruptions_share_their_clean_prompts() -> None:
    t = tokenizer("smollm2")
    first, *others = ([p.clean for p in ioi(t, 9, 5, corruption=c)] for c in ("s2", "s1_io", "abc"))
    assert all(clean == first for clean in others)


def test_ioi_templates() -> None:
    """Each both ways round, equally often, and the classic one in its own words."""
    t, many = tokenizer("smollm2"), 2 * len(TEMPLATES)
    assert many >= 48
    pairs = ioi(t, 2 * many)
    kinds = {f"{order}-{i}" for order in ("ABBA", "BABA") for i in range(len(TEMPLATES))}
    assert {p.group for p in pairs[:many]} == {p.group for p in pairs[many:]} == kinds
    assert {p.group[:4] for p in ioi(t, many, templates="baba")} == {"BABA"}
    for p in (p for p in pairs if p.group.endswith("-0")):
        form = r"When (\w+) and (\w+) went to the \w+, (\w+) gave a \w+ to"
        found = re.fullmatch(form, text(t, p.clean))
        assert found
        assert found[3] in (found[1], found[2])


def test_ioi_pairs_of_a_seed_stay() -> None:
    """Small samples are those of earlier versions."""
    [p] = ioi(tokenizer("smollm2"), 1)
    assert text(tokenizer("smollm2"), p.clean) == (
        "Yesterday Henry and Sean came back from the church, and Sean passed a coat to"
    )


@KINDS
@settings(max_examples=5)
@given(seed=SEEDS, wrong=st.sampled_from(greater_than.options["wrong"]))
def test_greater_than(kind: str, seed: int, wrong: str) -> None:
    t = tokenizer(kind)
    for p in greater_than(t, 4, seed, wrong=wrong):
        form = r"The (\w+) lasted from the year (\d\d)(\d\d) to the year (\d\d)"
        found, other = re.fullmatch(form, text(t, p.clean)), re.fullmatch(form, text(t, p.corrupt))
        assert found
        assert other
        noun, century, year, again = found.groups()
        assert other.groups() == (noun, century, "01", century)
        assert [part(t, p, name) for name in ("NOUN", "XX", "YY", "XX2")] == [
            noun,
            century,
            year,
            again,
        ]
        if kind == "bytes":  # years as they are, all hundred of them
            answers, wrongs = ([int(w) for w in words(t, ts)] for ts in (p.answer, p.wrong))
            assert sorted(wrongs) == list(range(int(year) + (wrong == "up_to")))
            assert sorted(answers) == list(range(int(year) + 1, 100))
        else:  # their tens: all ten years that begin so, or none, come later
            tens = {w: [int(f"{w}{y}") for y in range(10)] for w in "0123456789"}
            least = int(year) + (wrong == "up_to")  # the first that is not wrong
            assert {*words(t, p.answer)} == {w for w, of in tens.items() if min(of) > int(year)}
            assert {*words(t, p.wrong)} == {w for w, of in tens.items() if max(of) < least}


@KINDS
@settings(max_examples=5)
@given(seed=SEEDS, corruption=st.sampled_from(docstring.options["corruption"]))
def test_docstring(kind: str, seed: int, corruption: str) -> None:
    t = tokenizer(kind)
    form = (
        r'def \w+\(self, (.+)\):\s+"""\w+ \w+ \w+\s+:param (\w+): \w+ \w+\s+:param (\w+): .+param'
    )
    for p in docstring(t, 3, seed, corruption=corruption):
        prompts = [text(t, tokens) for tokens in (p.clean, p.corrupt)]
        found, other = (re.fullmatch(form, prompt, re.DOTALL) for prompt in prompts)
        assert found
        assert other
        arguments, others = (f[1].split(", ") for f in (found, other))
        assert list(found.groups()[1:]) == arguments[2:4]
        assert words(t, p.answer) == [arguments[4]]
        named = {*arguments, *others, *other.groups()[1:]} - {arguments[4]}
        assert {*words(t, p.wrong)} == named
        assert len({*arguments}) == len({*others}) == 6
        for name, word in zip("ABC", arguments[2:], strict=False):
            assert part(t, p, f"{name}_def") == word
        for name, word in zip("AB", found.groups()[1:], strict=True):
            assert part(t, p, f"{name}_doc") == word
        if corruption == "c_def":
            assert others[4] not in prompts[0]


@KINDS
@settings(max_examples=5)
@given(seed=SEEDS, relation=st.sampled_from(facts.options["relation"]))
def test_facts(kind: str, seed: int, relation: str) -> None:
    t = tokenizer(kind)
    for p in facts(t, 12, seed, relation=relation):
        assert relation in ("all", p.group)
        found = RELATIONS[p.group]
        before, after = found.prompt.split("{SUBJECT}")
        for run, token in (("clean", p.answer), ("corrupt", p.wrong)):
            prompt = text(t, getattr(p, run))
            subject = prompt.removeprefix(before).removesuffix(after)
            assert before + subject + after == prompt
            assert (subject, *words(t, token)) in found.facts
            assert part(t, p, "SUBJECT", run) == subject
        last = max(at for label, at in p.labels.items() if re.fullmatch(r"SUBJECT_\d+", label))
        assert p.labels["SUBJECT_LAST"] == last


def test_the_facts() -> None:
    assert len(RELATIONS) >= 10
    assert sum(len(relation.facts) for relation in RELATIONS.values()) >= 300
    for relation in RELATIONS.values():
        subjects = [subject for subject, _ in relation.facts]
        assert len({*subjects}) == len(subjects)
        assert len({obj for _, obj in relation.facts}) > 1
    for t in map(tokenizer, ("smollm2", "bytes", "metaspace")):
        assert {p.group for p in facts(t, 200)} == {*RELATIONS}


@KINDS
@settings(max_examples=6)
@given(seed=SEEDS, data=st.data())
def test_arithmetic(kind: str, seed: int, data: st.DataObject) -> None:
    t = tokenizer(kind)
    options = {o: data.draw(st.sampled_from(choices)) for o, choices in arithmetic.options.items()}
    apply = {"+": operator.add, "-": operator.sub, "*": operator.mul}
    apply |= {"plus": apply["+"], "minus": apply["-"], "times": apply["*"]}
    sign = {"addition": "+plus", "subtraction": "-minus", "multiplication": "*times"}
    for p in arithmetic(t, 6, seed, **options):
        solved = {}
        for run, token in (("clean", p.answer), ("corrupt", p.wrong)):
            [result] = words(t, token)
            numbers = re.findall(
                r"(\d+) (\S+) (\d+) (?:=|is) (\d+)", f"{text(t, getattr(p, run))} {result}"
            )
            assert len(numbers) == 3
            for a, how, b, c in numbers:
                assert apply[how](int(a), int(b)) == int(c)
                assert all(
                    1 <= int(n) <= (9 if n is c and kind != "bytes" else 300) for n in (a, b, c)
                )
                assert how in sign[p.group.rpartition("-")[0]]
            solved[run] = numbers
            assert [part(t, p, name, run) for name in "AB"] == [numbers[2][0], numbers[2][2]]
        assert solved["clean"][:2] == solved["corrupt"][:2]
        assert not {solved["clean"][2], solved["corrupt"][2]} & {*solved["clean"][:2]}


@KINDS
@settings(max_examples=3)
@given(seed=SEEDS, corruption=st.sampled_from(nobel.options["corruption"]))
def test_nobel(kind: str, seed: int, corruption: str) -> None:
    t = tokenizer(kind)
    for p in nobel(t, 9, seed, corruption=corruption):
        assert text(t, p.clean) == "the Nobel Peace"
        assert [words(t, ids_) for ids_ in (p.answer, p.wrong)] == [["Prize"], ["Medal"]]
        said = [part(t, p, name) for name in ("FIRST", "SECOND")]
        other = [part(t, p, name, "corrupt") for name in ("FIRST", "SECOND")]
        assert said == ["Nobel", "Peace"]
        assert len({*other}) == 2
        assert text(t, p.corrupt) == f"the {other[0]} {other[1]}"


@pytest.mark.parametrize("kind", ["smollm2", "metaspace"])
def test_all_and_not_one_more(kind: str) -> None:
    t = tokenizer(kind)
    with pytest.raises(BadInput, match="100000 pairs asked for") as error:
        facts(t, 100_000, relation="capital")
    most = int(re.search(r"(\d+) can", str(error.value))[1])
    assert len({ids(p) for p in facts(t, most, relation="capital")}) == most
    with pytest.raises(BadInput, match=f"{most + 1} pairs asked for, {most} can be had"):
        facts(t, most + 1, relation="capital")


def test_all_ioi_and_not_one_more() -> None:
    rest = " ".join(TEMPLATES).replace("{", " ").replace("}", " ")
    known = sorted(set(re.findall(r"\w+|[^\w\s]+", rest)))
    t = words_only(*known, "John", "Mary", "store", "drink")
    most = 2 * len(TEMPLATES) * 2
    assert len({ids(p) for p in ioi(t, most)}) == most
    with pytest.raises(BadInput, match=f"{most} can be had"):
        ioi(t, most + 1)
    with pytest.raises(BadInput, match="0 can be had"):  # no third name
        ioi(t, 1, corruption="abc")


@pytest.mark.parametrize("name", TASKS)
def test_a_tokenizer_without_the_words(name: str) -> None:
    form = r"0 can be had: .*file|this tokenizer .*file|no number .*file"
    with pytest.raises(BadInput, match=form) as error:
        TASKS[name](words_only("the"), 1)
    assert "\n" not in str(error.value)


def test_years_in_threes_are_refused() -> None:
    """As some tokenizers split numbers: 173 2."""
    frame = "The treaty lasted from the year to"
    t = words_only(*frame.split(), *map(str, range(1000)), *(f"{n:02}" for n in range(10)))
    threes = pre_tokenizers.Split(Regex(r"\d{1,3}"), "isolated")
    inner = t.backend_tokenizer
    inner.pre_tokenizer = pre_tokenizers.Sequence([inner.pre_tokenizer, threes])
    assert words(t, t("1732")["input_ids"]) == ["173", "2"]
    with pytest.raises(BadInput, match="neither into century and year nor into digits"):
        greater_than(t, 1)
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.Split(Regex(r"\d{2}"), "isolated")]
    )
    assert len(greater_than(t, 5)) == 5


@pytest.mark.parametrize(
    ("options", "words_"),
    [
        (
            {"corruptoin": "s2"},
            ["unknown option 'corruptoin' of ioi", "did you mean 'corruption'?"],
        ),
        ({"corruption": "abcd"}, ["corruption of ioi is 'abcd'", "did you mean 'abc'?"]),
        ({"templates": 3}, ["templates of ioi is 3", "use one of all, abba, baba"]),
    ],
)
def test_wrong_options(options: dict[str, Any], words_: list[str]) -> None:
    with pytest.raises(BadInput) as error:
        ioi(tokenizer("smollm2"), 1, **options)
    assert all(word in str(error.value) for word in words_)


def test_pairs_know_their_task() -> None:
    t = tokenizer("smollm2")
    assert ioi(t, 1, templates="all")[0].origin == "ioi"
    assert ioi(t, 1, corruption="abc")[0].origin == "ioi, corruption abc"


def test_unknown_task_and_no_pairs() -> None:
    with pytest.raises(BadInput, match="unknown task 'oio': did you mean 'ioi'"):
        find("oio")
    with pytest.raises(
        BadInput, match="unknown option 'corruption' of greater_than: use one of wrong"
    ):
        greater_than(tokenizer("smollm2"), 1, corruption="01")
    with pytest.raises(BadInput, match="at least 1"):
        ioi(tokenizer("smollm2"), 0)
