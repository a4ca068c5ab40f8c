"""A small GPT-2 with weights set by hand, whose circuits are known: to see what patching finds.

The gates (AND, OR), the backup and the negative component are those that Heimersheim & Nanda
discuss (How to use and interpret activation patching, arXiv 2404.15255), with their example of
"Nobel Peace" -> " Prize"; the weights are our own. Every prompt has three tokens, the last two
labelled WORD and END.

    and       head 0.0 moves "Nobel" to END; neuron 1.42 fires if that and "Peace" are there and
              writes " Prize"
    or        heads 0.1 and 0.2 both tell END of "Parisians"; neuron 0.7 fires if neither did, and
              then takes " French" away and calls the backup, head 1.0, which writes most of it
    negative  head 1.1 writes the country of the city named, head 1.2 a little against it

`KNOWN`, `KNOWN_SETS`, `KNOWN_EDGES` and `KNOWN_PATHS` say what every patch does to the logit
difference.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from patchsweep.pairs import Pair, make_pair

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

UNKNOWN = "?"
FILLERS = ("stones", "rivers", "lamps", "clouds")  # words that no circuit reads
ANSWERS = ("Prize", "Medal", "French", "German", "Italy", "Norway")
READ = ("the", "find", "Nobel", "Peace", "Parisians", "speak", "Rome", "Oslo", "in")
WORDS = (UNKNOWN, *READ, *FILLERS, *ANSWERS)
# What the residual stream holds: the word of a token, the next word's logit, and three notes.
FEATURES = (*WORDS, *(f"next {word}" for word in ANSWERS), "after Nobel", "told", "untold")

LAYERS, HEADS, D_HEAD, NEURONS = 2, 4, 16, 64
D_MODEL = HEADS * D_HEAD
SHARP = 1000.0  # attention score: exp(-SHARP) is 0, so a head attends to its token alone
# A layer norm divides by sqrt(variance + NORM_SCALE ** 2), which rounds to NORM_SCALE, and
# multiplies by NORM_SCALE: it is the identity, since no feature moves the mean.
NORM_SCALE = 2.0**40


@dataclass(frozen=True)
class Head:
    """A head that copies features from the tokens that have them.

    `moves`: (feature at the token attended to, feature written, strength). With `called_by` it
    looks away wherever that feature is 0 at the query.
    """

    layer: int
    head: int
    moves: tuple[tuple[str, str, float], ...]
    called_by: str = ""


@dataclass(frozen=True)
class Neuron:
    """relu(sum of the features in `reads` times their weights + bias), written with `writes`."""

    layer: int
    neuron: int
    reads: Mapping[str, float]
    bias: float
    writes: Mapping[str, float]


CIRCUITS: tuple[Head | Neuron, ...] = (
    # and
    Head(0, 0, (("Nobel", "after Nobel", 1.0),)),
    Neuron(1, 42, {"after Nobel": 1.0, "Peace": 1.0}, -1.0, {"next Prize": 10.0}),
    # or, and its backup; neuron 0.8 fires always
    Head(0, 1, (("Parisians", "told", 1.0),)),
    Head(0, 2, (("Parisians", "told", 1.0),)),
    Neuron(0, 7, {"told": -1.0}, 1.0, {"untold": 1.0, "next French": -10.0}),
    Neuron(0, 8, {}, 1.0, {"next French": 10.0}),
    Head(1, 0, (("Parisians", "next French", 7.0),), called_by="untold"),
    # negative
    Head(1, 1, (("Rome", "next Italy", 13.0), ("Oslo", "next Norway", 13.0))),
    Head(1, 2, (("Rome", "next Italy", -3.0), ("Oslo", "next Norway", -3.0))),
)


class Effect(NamedTuple):
    """Effect on the logit difference of one patch, 0 (none) to 1 (the source run's), or beyond."""

    denoise: float
    noise: float


@dataclass(frozen=True)
class KnownSet:
    """Several sites patched in one run."""

    sites: tuple[str, ...]
    effect: Effect


@dataclass(frozen=True)
class KnownPath:
    """Senders at a label, patched together into receivers, through nothing."""

    senders: tuple[str, ...]
    receivers: tuple[str, ...]
    label: str
    effect: Effect


BOTH, NOISE_ONLY, DENOISE_ONLY = Effect(1.0, 1.0), Effect(0.0, 1.0), Effect(1.0, 0.0)

# Prompts -> cell, written as a site, -> effect. Every other cell of embed, head_z, neuron and
# mlp_out has effect 0 in both directions.
KNOWN: dict[str, dict[str, Effect]] = {
    "and": {
        "embed@WORD": NOISE_ONLY,
        "embed@END": NOISE_ONLY,
        "head_z.0.0@END": NOISE_ONLY,
        "neuron.1.42@END": BOTH,
        "mlp_out.1@END": BOTH,
    },
    "and_first": {
        "embed@WORD": BOTH,
        "head_z.0.0@END": BOTH,
        "neuron.1.42@END": BOTH,
        "mlp_out.1@END": BOTH,
    },
    "and_second": {
        "embed@END": BOTH,
        "neuron.1.42@END": BOTH,
        "mlp_out.1@END": BOTH,
    },
    "or": {
        "embed@WORD": BOTH,
        "head_z.0.1@END": DENOISE_ONLY,
        "head_z.0.2@END": DENOISE_ONLY,
        "neuron.0.7@END": Effect(1.0, 0.3),
        "mlp_out.0@END": Effect(1.0, 0.3),
    },
    "negative": {
        "embed@WORD": BOTH,
        "head_z.1.1@END": Effect(1.3, 1.3),
        "head_z.1.2@END": Effect(-0.3, -0.3),
    },
}

# Prompts -> name -> sites patched together.
KNOWN_SETS: dict[str, dict[str, KnownSet]] = {
    "and": {"head and embedding": KnownSet(("head_z.0.0@END", "embed@END"), BOTH)},
    "or": {
        "both heads": KnownSet(("head_z.0.1@END", "head_z.0.2@END"), Effect(1.0, 0.3)),
        "one head and backup": KnownSet(("head_z.0.1@END", "head_z.1.0@END"), DENOISE_ONLY),
        "both heads and backup": KnownSet(
            ("head_z.0.1@END", "head_z.0.2@END", "head_z.1.0@END"), BOTH
        ),
    },
    "negative": {"both heads": KnownSet(("head_z.1.1@END", "head_z.1.2@END"), BOTH)},
}

# A key that no longer finds its word: the head attends to all three tokens alike, so that a value
# counts a third.
THIRD = 1 / 3
SPREAD = Effect(0.0, 1 - THIRD)

# Prompts -> sender->receiver@label -> effect. Every other edge has effect 0 in both directions.
# Layer 1's MLP holds neuron 1.42 alone, so that its input is that neuron's.
KNOWN_EDGES: dict[str, dict[str, Effect]] = {
    "and": {
        "embed->head_k.0.0@WORD": SPREAD,
        "embed->head_v.0.0@WORD": NOISE_ONLY,
        "embed->mlp_in.1@END": NOISE_ONLY,
        "head_z.0.0->mlp_in.1@END": NOISE_ONLY,
        "mlp_out.1->logits@END": BOTH,
    },
    "and_first": {
        "embed->head_k.0.0@WORD": SPREAD,
        "embed->head_v.0.0@WORD": Effect(THIRD, 1.0),
        "head_z.0.0->mlp_in.1@END": BOTH,
        "mlp_out.1->logits@END": BOTH,
    },
    "and_second": {
        "embed->mlp_in.1@END": BOTH,
        "mlp_out.1->logits@END": BOTH,
    },
    "or": {
        "embed->head_v.0.1@WORD": Effect(THIRD, 0.0),
        "embed->head_v.0.2@WORD": Effect(THIRD, 0.0),
        "embed->head_k.1.0@WORD": Effect(0.0, -0.7 * THIRD),
        "embed->head_v.1.0@WORD": Effect(0.7 * THIRD, 0.0),
        "head_z.0.1->mlp_in.0@END": DENOISE_ONLY,
        "head_z.0.2->mlp_in.0@END": DENOISE_ONLY,
        "mlp_out.0->head_q.1.0@END": Effect(0.0, -0.7),
        "mlp_out.0->logits@END": BOTH,
    },
    "negative": {
        "embed->head_v.1.1@WORD": Effect(1.3, 1.3),
        "embed->head_v.1.2@WORD": Effect(-0.3, -0.3),
        "head_z.1.1->logits@END": Effect(1.3, 1.3),
        "head_z.1.2->logits@END": Effect(-0.3, -0.3),
    },
}

# Prompts -> name -> a path of several edges.
NOBEL = ("embed",), ("head_q.0.0", "head_k.0.0", "head_v.0.0"), "WORD"
KNOWN_PATHS: dict[str, dict[str, KnownPath]] = {
    "and": {
        "nobel_to_head": KnownPath(*NOBEL, NOISE_ONLY),
        "both_to_neuron": KnownPath(("head_z.0.0", "embed"), ("mlp_in.1",), "END", BOTH),
    },
    "and_first": {"nobel_to_head": KnownPath(*NOBEL, BOTH)},
    "or": {
        "both_to_mlp": KnownPath(
            ("head_z.0.1", "head_z.0.2"), ("mlp_in.0",), "END", Effect(1.0, 0.3)
        ),
    },
}


def known_circuits() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model, in float64, and its tokenizer, which knows 20 words. Nothing is downloaded."""
    config = GPT2Config(
        vocab_size=len(WORDS),
        n_positions=8,
        n_embd=D_MODEL,
        n_layer=LAYERS,
        n_head=HEADS,
        n_inner=NEURONS,
        activation_function="relu",
        layer_norm_epsilon=NORM_SCALE**2,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = GPT2LMHeadModel(config).to(torch.float64).eval()
    _set_weights(model)
    return model, _tokenizer()


def circuit_pairs(tokenizer: PreTrainedTokenizerBase) -> dict[str, list[Pair]]:
    """The prompts of every circuit, by the names in `KNOWN`.

    "and" has both words replaced in the corrupt prompt, "and_first" only "Nobel", "and_second" only
    "Peace"; "or" has "Parisians" replaced, each time by words that no circuit reads. In "negative"
    two cities change places, so that the corrupt run is sure of the wrong country.
    """
    prize, french = ((" Prize", " Medal"), (" French", " German"))
    cities = (("Rome", "Italy"), ("Oslo", "Norway"))
    after = FILLERS[1:] + FILLERS[:1]
    prompts = {
        "and": [
            ("the Nobel Peace", f"the {a} {b}", *prize) for a, b in zip(FILLERS, after, strict=True)
        ],
        "and_first": [("the Nobel Peace", f"the {word} Peace", *prize) for word in FILLERS],
        "and_second": [("the Nobel Peace", f"the Nobel {word}", *prize) for word in FILLERS],
        "or": [("the Parisians speak", f"the {word} speak", *french) for word in FILLERS],
        "negative": [
            (f"find {a} in", f"find {b} in", f" {right}", f" {wrong}")
            for (a, right), (b, wrong) in itertools.permutations(cities)
        ],
    }
    labels = {"WORD": 1, "END": 2}
    return {
        name: [make_pair(tokenizer, *texts, labels=labels, group=name) for texts in rows]
        for name, rows in prompts.items()
    }


def _tokenizer() -> PreTrainedTokenizerFast:
    """One token a word; words are parted by white space."""
    vocabulary = {word: i for i, word in enumerate(WORDS)}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token=UNKNOWN)


def _written(feature: str) -> torch.Tensor:
    """The direction [d_model] of a feature: two coordinates of its own, with mean zero."""
    vector = torch.zeros(D_MODEL, dtype=torch.float64)
    first = 2 * FEATURES.index(feature)
    vector[first], vector[first + 1] = 1.0, -1.0
    return vector


def _read(feature: str) -> torch.Tensor:
    """What gives 1 with the feature's own direction and 0 with every other, [d_model]."""
    return _written(feature) / 2


@torch.no_grad()
def _set_weights(model: GPT2LMHeadModel) -> None:
    """Everything zero, but words in and out, norms that do nothing, and the circuits."""
    for parameter in model.parameters():
        parameter.zero_()
    body: Any = model.transformer
    norms = [norm for block in body.h for norm in (block.ln_1, block.ln_2)]
    for norm in (*norms, body.ln_f):
        norm.weight.fill_(NORM_SCALE)
    for token, word in enumerate(WORDS):
        body.wte.weight[token] = _written(word)
        if word in ANSWERS:
            model.lm_head.weight[token] = _read(f"next {word}")
    for part in CIRCUITS:
        block = body.h[part.layer]
        if isinstance(part, Head):
            _set_head(block.attn, part)
        else:
            _set_neuron(block.mlp, part)


def _set_head(attention: Any, head: Head) -> None:
    """Query and key meet in the head's first dimension; every move has a value dimension."""
    start = head.head * D_HEAD
    q, k, v = (start + i * D_MODEL for i in range(3))
    # The score is divided by sqrt(D_HEAD). Without a call it is SHARP, or -SHARP if it needs one.
    loud = SHARP * D_HEAD**0.5
    attention.c_attn.bias[q] = -loud if head.called_by else loud
    if head.called_by:
        attention.c_attn.weight[:, q] = 2 * loud * _read(head.called_by)
    for i, (attended, written, strength) in enumerate(head.moves):
        attention.c_attn.weight[:, k] += _read(attended)
        attention.c_attn.weight[:, v + i] = _read(attended)
        attention.c_proj.weight[start + i] = strength * _written(written)


def _set_neuron(mlp: Any, neuron: Neuron) -> None:
    mlp.c_fc.bias[neuron.neuron] = neuron.bias
    for feature, weight in neuron.reads.items():
        mlp.c_fc.weight[:, neuron.neuron] += weight * _read(feature)
    for feature, strength in neuron.writes.items():
        mlp.c_proj.weight[neuron.neuron] += strength * _written(feature)
