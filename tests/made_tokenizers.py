"""Two small tokenizers, trained here on the words of the tasks: as GPT-2's and as Llama's are."""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib import import_module

from tokenizers import (
    Regex,
    Tokenizer,
    decoders,
    models,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

ioi, greater_than, docstring, facts, arithmetic, nobel = (
    import_module(f"patchsweep.tasks.{name}")
    for name in ("ioi", "greater_than", "docstring", "facts", "arithmetic", "nobel")
)


def _texts() -> list[str]:
    """Every word of the tasks, in its place after a space; what is in them often comes first."""
    lists = (ioi.NAMES, ioi.PLACES, ioi.OBJECTS, greater_than.NOUNS)
    lists += (docstring.ARGUMENTS, docstring.DESCRIPTIONS, nobel.OTHERS)
    lists += (*nobel.WORDS.values(), nobel.ANSWER, nobel.WRONG)
    words = [f"the {word}," for words in lists for word in words.split()]
    said = [
        f"{relation.prompt.format(SUBJECT=subject)} {answer}"
        for relation in facts.RELATIONS.values()
        for subject, answer in relation.facts
    ]
    frames = [*ioi.TEMPLATES, greater_than.TEMPLATE, docstring.TEMPLATE, *arithmetic.TEMPLATES]
    words += [f"is {sign}" for _, *signs in arithmetic.OPERATIONS.values() for sign in signs]
    return [*words, *said, *(re.sub(r" ?\{\w+\}", "", frame) for frame in frames)] * 3


def byte_level() -> PreTrainedTokenizerFast:
    """Byte-level BPE: the space belongs to the word; numbers up to three digits are one token, a
    year is its century and the rest. No bos token of its own accord."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=6000,
        min_frequency=2,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )

    def numbers() -> Iterator[str]:
        # The more often, the earlier merged: " 17" before "32", so that " 1732" is these two.
        yield from [f" {n}" for n in range(10, 100)] * 400
        yield from [f"x{n:02}" for n in range(100)] * 20
        yield from [f" {n}" for n in range(100, 301)] * 4

    inner.train_from_iterator([*_texts(), *numbers()], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<|endoftext|>", eos_token="<|endoftext|>"
    )


def metaspace() -> PreTrainedTokenizerFast:
    """SentencePiece's way: spaces are "▁", one before every text, digits are apart, bos by default;
    what has no piece is <unk>."""
    inner = Tokenizer(models.BPE(unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Metaspace(prepend_scheme="first"),
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.Split(Regex(r"[^▁\w]"), "isolated"),
        ]
    )
    inner.decoder = decoders.Metaspace(prepend_scheme="first")
    trainer = trainers.BpeTrainer(
        vocab_size=6000, special_tokens=["<unk>", "<s>"], show_progress=False
    )
    digits = [f"is {n}" for n in range(10)] * 3
    inner.train_from_iterator([*_texts(), *digits], trainer)
    inner.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", inner.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", bos_token="<s>")
