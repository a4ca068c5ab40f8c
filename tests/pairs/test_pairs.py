"""Prompt pairs: what is read, and what is refused."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from patchsweep.errors import BadInput
from patchsweep.pairs import Bos, Pair, encode, make_pair, read_pairs, resolve_positions

CLEAN = "When John and Mary went to the store, John gave a drink to"
CORRUPT = "When John and Mary went to the store, Mary gave a drink to"
ROW = {"clean": CLEAN, "corrupt": CORRUPT, "answer": " Mary", "wrong": " John"}


def byte_level(bos: bool = True, eos: bool = False) -> PreTrainedTokenizerFast:
    """A byte-level BPE that knows the words of CLEAN; <s> and </s> only if it adds them itself."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator([CLEAN, " Mary John"] * 3, trainer)
    if bos or eos:
        inner.post_processor = processors.TemplateProcessing(
            single=" ".join(["<s>"] * bos + ["$A"] + ["</s>"] * eos),
            special_tokens=[("<s>", 0), ("</s>", 1)],
        )
    tokens = {"bos_token": "<s>"} if bos else {}
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>", **tokens)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_level()


def write(path: Path, *rows: object) -> Path:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def refused(path: Path, tokenizer: PreTrainedTokenizerFast, *words: str) -> None:
    """Reading is refused in one line that holds these words."""
    with pytest.raises(BadInput) as error:
        read_pairs(path, tokenizer)
    line = str(error.value)
    assert "\n" not in line
    for word in words:
        assert word in line


def test_reads_a_line(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    row = {**ROW, "labels": {"S2": 10, "END": -1}, "group": "g"}
    [pair] = read_pairs(write(tmp_path / "p.jsonl", "", row), tokenizer)
    assert len(pair) == 15  # <s> and fourteen words
    assert pair.clean == tuple(tokenizer(CLEAN)["input_ids"])
    assert pair.corrupt == tuple(tokenizer(CORRUPT)["input_ids"])
    assert [i for i in range(15) if pair.clean[i] != pair.corrupt[i]] == [10]
    assert tokenizer.convert_ids_to_tokens([*pair.answer, *pair.wrong]) == ["ĠMary", "ĠJohn"]
    assert pair.labels == {"S2": 10, "END": 14}
    assert pair.group == "g"


def test_jsonl_and_csv_agree(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    rows: list[dict[str, Any]] = [
        {**ROW, "answer": [" Mary", " drink", " Mary"], "labels": {"S2": 10}},
        {"clean": CLEAN, "corrupt": CORRUPT, "answer": " Mary", "group": "b"},
    ]
    cells = [
        f'"{CLEAN}","{CORRUPT}","["" Mary"", "" drink""]", John,"{{""S2"": 10}}",',
        f'"{CLEAN}","{CORRUPT}", Mary,,,b',
    ]
    jsonl = read_pairs(write(tmp_path / "p.jsonl", *rows), tokenizer)
    csv = read_pairs(
        write(tmp_path / "p.csv", "clean,corrupt,answer,wrong,labels,group", *cells), tokenizer
    )
    assert jsonl == csv
    assert [p.origin for p in jsonl + csv] == ["p.jsonl"] * 2 + ["p.csv"] * 2
    assert [len(p.answer) for p in csv] == [2, 1]
    assert [len(p.wrong) for p in csv] == [1, 0]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ("{", ["p.jsonl:2", "not a JSON object"]),
        ("[1]", ["p.jsonl:2", "not a JSON object"]),
        ({**ROW, "wrng": "x"}, ["p.jsonl:2", "'wrng'", "'wrong'"]),
        ({**ROW, "zzz": "x"}, ["p.jsonl:2", "'zzz'", "clean, answer, corrupt"]),
        ({**ROW, "align": "middle"}, ["p.jsonl:2: align is 'middle'", '"end"']),
        ({**ROW, "align": [[0]]}, ["align: [0] is no [clean, corrupt] pair"]),
        ({**ROW, "align": [[0, 99]]}, ["align: [0, 99] is outside"]),
        ({**ROW, "align": [[0, 0], [0, 1]]}, ["align: [0, 1]: position 0 of clean is there twice"]),
        ({**ROW, "align": [[1, 0], [0, -15]]}, ["[0, -15]: position 0 of corrupt is there twice"]),
        ({**ROW, "align": [[0, 14]]}, ["align: [0, 14]: the last tokens of both prompts"]),
        ({**ROW, "align": [[1, 1], [-1, 3]]}, ["align: [-1, 3]: the last tokens of both"]),
        ({**ROW, "align": [[-16, 0]]}, ["[-16, 0] is outside the clean prompt", "use -15 to 14"]),
        ({**ROW, "align": [[True, 0]]}, ["align: [True, 0] is no [clean, corrupt] pair"]),
        ({**ROW, "align": {"1": 1}}, ["p.jsonl:2: align is not"]),
        ({**ROW, "align": 3}, ["p.jsonl:2: align is not"]),
        ({**ROW, "align": "end", "corrupt_labels": {"a": 1}}, ["only serve align"]),
        ({**ROW, "corrupt_labels": {"a": 1}}, ["corrupt_labels only serve align"]),
        ({"clean": CLEAN, "answer": " Mary", "align": "end"}, ["align needs a corrupt prompt"]),
        (
            {"clean": CLEAN, "answer": " Mary", "corrupt_labels": {"a": 0}},
            ["corrupt_labels needs a corrupt prompt"],
        ),
        ({**ROW, "others": {"": CLEAN}}, ["others: '' cannot name a prompt"]),
        ({**ROW, "continuation": ""}, ["continuation '' adds no token"]),
        ({**ROW, "align": "labels", "labels": {"a": 1}}, ["no name in common"]),
        ({**ROW, "corrupt_labels": {"a": 99}}, ["corrupt label 'a' at 99 is outside"]),
        ({**ROW, "others": {"zero": CLEAN}}, ["others: 'zero' cannot name a prompt"]),
        ({**ROW, "others": {"far": "When"}}, ["others: 'far' has 2 tokens, clean has 15"]),
        ({**ROW, "others": ["When"]}, ["others is not {name: text}"]),
        ({**ROW, "continuation": ["a"]}, ["continuation is not a text"]),
        ({**ROW, "corrupt": "When John"}, ["clean has 15 tokens, corrupt has 3", 'align: "end"']),
        ({"clean": CLEAN, "corrupt": CORRUPT}, ["p.jsonl:2", "missing key 'answer'"]),
        ({**ROW, "answer": " elephant"}, ["p.jsonl:2: answer", "tokens ('Ġ", "not one"]),
        ({**ROW, "wrong": [" John", "John?"]}, ["wrong 'John?'", "leading space"]),
        ({**ROW, "answer": []}, ["p.jsonl:2", "answer is empty"]),
        ({**ROW, "answer": 3}, ["p.jsonl:2", "answer is not a text"]),
        ({**ROW, "wrong": [1]}, ["p.jsonl:2", "wrong is not a text"]),
        ({**ROW, "wrong": " Mary"}, ["p.jsonl:2", "' Mary' is in both"]),
        ({**ROW, "corrupt": CORRUPT + " the"}, ["clean has 15 tokens, corrupt has 16"]),
        ({**ROW, "corrupt": CLEAN}, ["p.jsonl:2", "no differing token"]),
        ({**ROW, "clean": 1}, ["p.jsonl:2", "clean is not a text"]),
        ({**ROW, "group": 1}, ["p.jsonl:2", "group is not a text"]),
        ({**ROW, "labels": {"S": 15}}, ["label 'S' at 15 is outside", "-15 to 14"]),
        ({**ROW, "labels": {"S": -16}}, ["label 'S' at -16 is outside"]),
        ({**ROW, "labels": {"S": True}}, ["p.jsonl:2", "labels is not"]),
        ({**ROW, "labels": [1]}, ["p.jsonl:2", "labels is not"]),
    ],
)
def test_bad_lines(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, row: object, words: list[str]
) -> None:
    refused(write(tmp_path / "p.jsonl", ROW, row), tokenizer, *words)


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (["clean,corrupt,answer", "a,b,c,d"], ["p.csv:2", "more cells than columns"]),
        (["clean,corrupt,answer", "a,b"], ["p.csv:2", "missing key 'answer'"]),
        (["clean,corrupt,anwser", "a,b,c"], ["p.csv:2", "'anwser'", "'answer'"]),
        (["clean,corrupt,answer", 'a,b,"c'], ["p.csv:2", "malformed CSV"]),
        (["clean,corrupt,answer,labels", "a,b,c,{"], ["p.csv:2", "labels is not JSON"]),
        (["clean,corrupt,answer", "a,b,[c"], ["p.csv:2", "answer is not JSON"]),
        (["clean,wrong,answer,labels", "a,[b,[c,{"], ["p.csv:2", "wrong is not JSON"]),  # first
        (["clean,corrupt,answer"], ["p.csv", "no pairs"]),
    ],
)
def test_bad_csv(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, lines: list[str], words: list[str]
) -> None:
    refused(write(tmp_path / "p.csv", *lines), tokenizer, *words)


def test_a_json_array(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    file = tmp_path / "p.json"
    file.write_text(json.dumps([ROW, {**ROW, "group": "g"}], indent=2))
    [one, other] = read_pairs(file, tokenizer)
    assert one == make_pair(tokenizer, **ROW)  # type: ignore[arg-type]
    assert (other.group, other.origin) == ("g", "p.json")
    file.write_text(json.dumps([ROW, {**ROW, "answer": 3}]))
    refused(file, tokenizer, "p.json:2", "answer is not a text")
    for text, words in (("[{", "not JSON"), ("{}", "not a list of objects"), ("[1]", "not a list")):
        file.write_text(text)
        refused(file, tokenizer, "p.json", words)
    file.write_text("[]")
    refused(file, tokenizer, "p.json", "no pairs")


def test_null_is_a_key_left_out(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    nothing = dict.fromkeys(["wrong", "labels", "align", "group", "others", "continuation"])
    [pair] = read_pairs(write(tmp_path / "p.jsonl", {**ROW, **nothing}), tokenizer)
    assert pair == make_pair(tokenizer, CLEAN, CORRUPT, " Mary")
    for key, words in (("clean", "missing key 'clean'"), ("clen", "unknown key 'clen'")):
        refused(write(tmp_path / "p.jsonl", {**ROW, key: None}), tokenizer, "p.jsonl:1", words)


@pytest.mark.parametrize(
    ("header", "cells"), [(",", "0,"), ("Unnamed: 0,", "0,"), ("Unnamed: 0.1,Unnamed: 0,", "0,0,")]
)
def test_the_index_that_pandas_writes(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, header: str, cells: str
) -> None:
    names, row = f"{header}clean,corrupt,answer,wrong", f'{cells}"{CLEAN}","{CORRUPT}", Mary, John'
    [pair] = read_pairs(write(tmp_path / "p.csv", names, row), tokenizer)
    assert pair == make_pair(tokenizer, **ROW)  # type: ignore[arg-type]


def test_two_columns_of_one_name(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    file = write(tmp_path / "p.csv", "clean,answer,clean", f'"{CLEAN}", Mary,"{CORRUPT}"')
    refused(file, tokenizer, "p.csv:1", "two columns 'clean'")


def test_the_names_of_eap_ig(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    header = "clean,corrupted,correct_idx,incorrect_idx"
    file = write(tmp_path / "p.csv", header, f'"{CLEAN}","{CORRUPT}",7042,9302')
    refused(file, tokenizer, "p.csv:2", "token ids: name the columns clean, corrupt, answer, wrong")


@pytest.mark.parametrize(
    "more",
    [
        {"clean": "A \ud83d is"},
        {"corrupt": "B \ud83d is"},
        {"answer": ["\ud83d"]},
        {"wrong": "\ud83d"},
        {"continuation": " \ud83d"},
        {"others": {"x": "\ud83d"}},
        {"group": "\ud83d"},
        {"labels": {"\ud83d": 1}},
    ],
)
def test_half_a_character(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, more: dict[str, Any]
) -> None:
    file = write(tmp_path / "p.jsonl", ROW, {**ROW, **more})
    refused(file, tokenizer, "p.jsonl:2", "half a character (a lone surrogate): write")


def test_a_name_that_is_no_utf8(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    file = tmp_path / os.fsdecode(b"p\xff.jsonl")
    [pair] = read_pairs(write(file, ROW), tokenizer)
    assert pair.origin == "p?.jsonl"


def test_numbers_of_other_libraries() -> None:
    plain = Pair((1, 2, 3), (1, 4, 3, 9), (5, 6), (7,), {"S": 1}, "g", (0, 1, 3), {"x": (1, 2, 4)})
    for of in (np.array, torch.tensor):
        made = Pair(
            of((1, 2, 3)),
            list(of((1, 4, 3, 9))),  # type: ignore[arg-type]
            of((5, 6)),
            (of(7),),  # type: ignore[arg-type]
            {"S": of(1)},  # type: ignore[dict-item]
            "g",
            of((0, 1, 3)),
            {"x": of((1, 2, 4))},
        )
        assert made == plain
        numbers = (*made.clean, *made.corrupt, *made.answer, *made.wrong, *made.labels.values())
        assert {type(n) for n in (*numbers, *(made.align or ()), *made.others["x"])} == {int}


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"clean": (1.0, 2.0, 3.0)}, "clean: .*flat list of whole numbers"),
        ({"clean": torch.tensor([[1, 2, 3]])}, "clean: .*flat list"),
        ({"answer": 5}, "answer: .*flat list"),
        ({"wrong": "Rome"}, "wrong: .*flat list"),
        ({"labels": {"S": "1"}}, "labels: .*flat list"),
        ({"labels": {1: 1}}, "a pair's names: 1 is no text"),
        ({"group": 3}, "a pair's names: 3 is no text"),
    ],
)
def test_what_is_no_number_or_no_text(more: dict[str, Any], words: str) -> None:
    with pytest.raises(BadInput, match=words) as error:
        Pair(**{"clean": (1, 2, 3), "corrupt": (1, 2, 4), "answer": (1,), **more})
    assert "\n" not in str(error.value)


def test_bad_files(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    refused(write(tmp_path / "p.jsonl", "", " "), tokenizer, "p.jsonl", "no pairs")
    refused(tmp_path / "gone.csv", tokenizer, "gone.csv", "No such file")
    refused(write(tmp_path / "p.txt", ROW), tokenizer, "p.txt", ".jsonl, .json or .csv")
    (tmp_path / "latin.jsonl").write_bytes(b'{"clean": "\xe9"}')
    refused(tmp_path / "latin.jsonl", tokenizer, "latin.jsonl", "not UTF-8")


@pytest.mark.parametrize(
    ("bos", "text", "first"),
    [
        ("auto", "When John", ["<s>", "When", "ĠJohn"]),
        ("auto", "<s>When", ["<s>", "When"]),  # as a chat template begins
        ("auto", "<s>", ["<s>"]),
        ("always", "When John", ["<s>", "When", "ĠJohn"]),
        ("always", "<s>When", ["<s>", "When"]),
        ("never", "When John", ["When", "ĠJohn"]),
        ("never", "<s>When", ["When"]),
    ],
)
def test_bos(bos: Bos, text: str, first: list[str]) -> None:
    for tokenizer in (byte_level(), byte_level(eos=True)):  # a closing eos is never kept
        assert tokenizer.convert_ids_to_tokens(encode(tokenizer, text, bos)) == first


def test_bos_of_a_tokenizer_without() -> None:
    tokenizer = byte_level(bos=False)
    for bos in ("auto", "never"):
        assert len(make_pair(tokenizer, CLEAN, CORRUPT, " Mary", bos=bos)) == 14
    with pytest.raises(BadInput, match="no bos token"):
        make_pair(tokenizer, CLEAN, CORRUPT, " Mary", bos="always")
    with pytest.raises(BadInput, match="unknown bos 'yes'"):
        make_pair(tokenizer, CLEAN, CORRUPT, " Mary", bos=cast(Bos, "yes"))


def test_an_answer_outside_the_vocabulary() -> None:
    inner = Tokenizer(models.WordLevel({"a": 0, "b": 1, "c": 2, "?": 3}, unk_token="?"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="?")
    assert make_pair(tokenizer, "a b", "b b", " c") == Pair((0, 1), (1, 1), (2,))
    with pytest.raises(BadInput, match="' d' is not in the vocabulary"):
        make_pair(tokenizer, "a b", "b b", " d")
    with pytest.raises(BadInput, match="the clean prompt has no tokens"):
        make_pair(tokenizer, "", "b b", " c")


def test_prompts_of_unequal_length(tokenizer: PreTrainedTokenizerFast) -> None:
    short = "When John and went to the store, Mary gave a drink to"

    def aligned(**more: Any) -> list[int]:
        made = make_pair(tokenizer, CLEAN, short, " Mary", " John", **more)
        assert (len(made.clean), len(made.corrupt)) == (15, 14)
        found: list[int] = made.alignment.tolist()
        return found

    assert aligned(align="end") == [-1, *range(14)]
    by_label = {"labels": {"S2": 10, "x": 1}, "corrupt_labels": {"S2": 9, "y": 1}}
    expected = [-1] * 15
    expected[10], expected[14] = 9, 13  # and the last ones, where the answer is read
    assert aligned(align="labels", **by_label) == expected
    expected[1] = 2
    assert aligned(align=[[1, 2], [-5, -5], [-1, -1]]) == expected
    assert aligned(align={1: 2, 10: 9}) == expected
    expected[1], expected[2] = 2, 1  # the order need not be kept
    assert aligned(align=[[2, 1], [1, 2], [10, 9]]) == expected
    twice = {"labels": {"S2": 10, "name": 10}, "corrupt_labels": {"S2": 9, "name": 9}}
    assert aligned(align="labels", **twice) == aligned(align=[[10, 9]])
    assert make_pair(tokenizer, CLEAN, CORRUPT, " Mary").alignment.tolist() == list(range(15))
    same = make_pair(tokenizer, CLEAN, CORRUPT, " Mary", align="end")
    assert same == make_pair(tokenizer, CLEAN, CORRUPT, " Mary")
    longer = make_pair(tokenizer, short, CLEAN, " Mary", align="end")
    assert longer.alignment.tolist() == list(range(1, 15))
    assert make_pair(tokenizer, CLEAN, answer=" Mary").alignment.tolist() == [-1] * 15


def test_continuations_and_further_prompts(tokenizer: PreTrainedTokenizerFast) -> None:
    other = "When Mary and Mary went to the store, Mary gave a drink to"
    made = make_pair(
        tokenizer,
        CLEAN,
        CORRUPT,
        " Mary",
        labels={"END": -1},
        others={"both": other},
        continuation=" Mary and John",
    )
    words = [" Mary", " and", " John"]
    assert [tokenizer.decode([t]) for t in made.continuation] == words
    assert made.clean == encode(tokenizer, CLEAN + " Mary and")
    assert made.corrupt == encode(tokenizer, CORRUPT + " Mary and")
    assert made.others == {"both": encode(tokenizer, other + " Mary and")}
    assert made.read == 14 == made.labels["END"]
    with pytest.raises(BadInput, match="continuation 'k' changes the prompt's own tokens"):
        make_pair(tokenizer, "gave a drin", answer=" Mary", continuation="k")
    found = resolve_positions([made], [-1, "END"]).members[0]
    assert found.argmax(1).tolist() == [14, 14]  # from the end of the prompt proper
    assert resolve_positions([made], "each").names == tuple(range(17))
    with pytest.raises(BadInput, match=r"-16 is outside every prompt.* use -15 to 16"):
        resolve_positions([made], [-16])


@pytest.mark.parametrize(
    ("align", "before"),
    [("end", [-1, *range(13)]), ([], [-1] * 14), ([[3, 2]], [-1, -1, -1, 2, *[-1] * 10])],
)
def test_continuations_of_prompts_of_unequal_length(
    tokenizer: PreTrainedTokenizerFast, align: Any, before: list[int]
) -> None:
    """The answer's tokens always correspond; `before` are the positions before them."""
    short = "When John and went to the store, Mary gave a drink to"
    made = make_pair(tokenizer, CLEAN, short, " Mary", align=align, continuation=" Mary and John")
    assert (len(made), len(made.corrupt), made.read) == (17, 16, 14)
    assert made.alignment.tolist() == [*before, 13, 14, 15]
    assert made.clean[-2:] == made.corrupt[-2:] == made.continuation[:-1]


def test_a_continuation_of_one_token(tokenizer: PreTrainedTokenizerFast) -> None:
    plain = make_pair(tokenizer, CLEAN, CORRUPT, " Mary")
    made = make_pair(tokenizer, CLEAN, CORRUPT, " Mary", continuation=" Mary")
    assert (made.clean, made.corrupt) == (plain.clean, plain.corrupt)
    assert made.continuation == plain.answer
    assert made.read == plain.read == 14


def test_a_continuation_outside_the_vocabulary() -> None:
    inner = Tokenizer(models.WordLevel({"a": 0, "b": 1, "c": 2, "?": 3}, unk_token="?"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="?")
    made = make_pair(tokenizer, "a b", "b b", " c", continuation=" c a")
    assert made == Pair((0, 1, 2), (1, 1, 2), (2,), continuation=(2, 0))
    with pytest.raises(BadInput, match="continuation ' c d' is not in the vocabulary"):
        make_pair(tokenizer, "a b", "b b", " c", continuation=" c d")


def test_new_keys_in_csv(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    short = "When John and went to the store, Mary gave a drink to"
    more = {"align": [[1, 2]], "others": {"far": CORRUPT}, "continuation": " Mary and"}
    rows = [
        {"clean": CLEAN, "corrupt": short, "answer": " Mary", **more},
        {"clean": CLEAN, "answer": " Mary"},
    ]
    cells = [
        f'"{CLEAN}","{short}", Mary,"[[1, 2]]","{{""far"": ""{CORRUPT}""}}", Mary and',
        f'"{CLEAN}",, Mary,,,',
    ]
    header = "clean,corrupt,answer,align,others,continuation"
    csv = read_pairs(write(tmp_path / "p.csv", header, *cells), tokenizer)
    assert csv == read_pairs(write(tmp_path / "p.jsonl", *rows), tokenizer)
    assert csv[0].others.keys() == {"far"}
    assert csv[1].corrupt == ()


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"labels": {"E": -1}}, "label 'E' at -1 is outside the prompt: .* use 0 to 2"),
        ({"labels": {"E": 3}}, "label 'E' at 3 is outside"),
        ({"others": {"x": (1, 2)}}, "others: 'x' has 2 tokens, clean has 3"),
        ({"align": (0, 1)}, "align has 2 entries, clean has 3 tokens"),
        ({"align": (0, 3, 2)}, "align: 3 is outside the corrupt prompt"),
        ({"align": (-2, 1, 2)}, "align: -2 is outside the corrupt prompt"),
        ({"align": (1, 1, -1)}, "align: position 1 of corrupt is there twice"),
        ({"continuation": (3, 7)}, "prompt 'corrupt' does not end with all but its last token"),
        ({"continuation": (0, 1, 2, 3, 7)}, "prompt 'clean' does not end"),
        (
            {"corrupt": (9, 2, 3), "others": {"x": (1, 2, 4)}, "continuation": (3, 7)},
            "prompt 'x' does not end",
        ),
    ],
)
def test_parts_that_do_not_fit(more: dict[str, Any], words: str) -> None:
    with pytest.raises(BadInput, match=words):
        Pair(**{"clean": (1, 2, 3), "corrupt": (1, 2, 4), "answer": (1,), **more})


def test_alignment_of_unequal_lengths_without_align() -> None:
    with pytest.raises(BadInput, match="clean has 3 tokens, corrupt has 2"):
        _ = Pair((1, 2, 3), (1, 2), (1,)).alignment


def pair(length: int, **labels: int) -> Pair:
    return Pair(tuple(range(length)), (9, *range(1, length)), (1,), labels=labels)


def members(pairs: list[Pair], positions: Any) -> tuple[Any, list[list[list[int]]]]:
    """The names, and the positions of every entry of every pair."""
    found = resolve_positions(pairs, positions)
    return found.names, [[np.flatnonzero(e).tolist() for e in pair] for pair in found.members]


def test_positions() -> None:
    pairs = [pair(3, S=1), pair(2, S=0, T=1)]
    assert members(pairs, "each") == ((0, 1, 2), [[[0], [1], [2]], [[0], [1], []]])
    assert members(pairs, "all") == (("all",), [[[0, 1, 2]], [[0, 1]]])
    assert members(pairs, [2, -1, -3]) == ((2, -1, -3), [[[2], [2], [0]], [[], [1], []]])
    named = (("S", "-1", "T"), [[[1], [2], []], [[0], [1], [1]]])
    assert members(pairs, ["S", -1, "T"]) == named
    groups = {"names": ["S", "T"], "rest": [-1]}
    assert members(pairs, groups) == (("names", "rest"), [[[1], [2]], [[0, 1], [1]]])


@pytest.mark.parametrize(
    ("positions", "words"),
    [
        (["s"], "unknown label 's': use one of S, T"),
        (["S", 3], "3 is outside every prompt"),
        ([-4], "-4 is outside every prompt"),
        ("S", r"use each, all, or a list such as \[S\]"),
        ([], "list is empty"),
        ({}, "mapping is empty"),
        ({"a": ["s"]}, "group 'a': unknown label 's'"),
        ({"a": [0], "b": [7]}, "group 'b': 7 is outside every prompt"),
        ({"a": []}, "group 'a': the list is empty"),
        ({"a": [1, 1]}, "group 'a': 1 is there twice"),
        ({"a": "each"}, "group 'a' is no list"),
        ({"S": [0]}, "group 'S' has a name that means something else"),
        ({"all": [0]}, "group 'all' has a name that means something else"),
        ([1, "S", 1], "1 is there twice"),
    ],
)
def test_bad_positions(positions: Any, words: str) -> None:
    with pytest.raises(BadInput, match=words):
        resolve_positions([pair(3, S=1), pair(2, T=1)], positions)


def test_positions_without_labels_or_pairs() -> None:
    with pytest.raises(BadInput, match="the pairs have no labels"):
        resolve_positions([pair(3)], ["S"])
    with pytest.raises(BadInput, match="no pairs"):
        resolve_positions([], "each")
