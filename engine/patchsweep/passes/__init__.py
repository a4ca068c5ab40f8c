"""Packed tokens of many runs, up the layers of a model: what computes.

attention.py   the attention function that is registered with transformers
stream.py      the residual stream inside a layer: what is added to it
layers.py      which modules are the layers, and how large they are
forward.py     a model's forward taken apart: embedding, layers, tail
taps.py        what is overwritten and read while a layer runs
values.py      the tensors that sources need: noise, means, vectors
metrics.py     from logits to one number per row
climb.py       the tokens that runs of edges begin with
wave.py        one wave: the baselines and every patched run of its blocks
means.py       mean activations over prompts

Imports device, errors, pairs, plan, processes, sae, sites, spec.
"""

from patchsweep.passes.attention import Attend, LayerCall, PatternRead, attention_call, attention_is
from patchsweep.passes.forward import Forward, as_it_is, take_apart
from patchsweep.passes.layers import Shape, layers_of, matrices, shapes_of
from patchsweep.passes.means import mean_activations
from patchsweep.passes.metrics import (
    DIVERGENCES,
    Context,
    Function,
    Rows,
    check_metrics,
    evaluate,
    given_functions,
    load_function,
    measure,
)
from patchsweep.passes.stream import ResidualStream, Tap
from patchsweep.passes.taps import BORDER, Editor, Seen
from patchsweep.passes.values import Constants, Values, embedding_std, read_tensor, read_vector
from patchsweep.passes.wave import (
    Carry,
    Launched,
    WaveResult,
    across,
    embedding_tap,
    launch_wave,
    wavefront,
)

__all__ = [
    "BORDER",
    "DIVERGENCES",
    "Attend",
    "Carry",
    "Constants",
    "Context",
    "Editor",
    "Forward",
    "Function",
    "Launched",
    "LayerCall",
    "PatternRead",
    "ResidualStream",
    "Rows",
    "Seen",
    "Shape",
    "Tap",
    "Values",
    "WaveResult",
    "across",
    "as_it_is",
    "attention_call",
    "attention_is",
    "check_metrics",
    "embedding_std",
    "embedding_tap",
    "evaluate",
    "given_functions",
    "launch_wave",
    "layers_of",
    "load_function",
    "matrices",
    "mean_activations",
    "measure",
    "read_tensor",
    "read_vector",
    "shapes_of",
    "take_apart",
    "wavefront",
]
