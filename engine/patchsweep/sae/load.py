"""From the tensors and settings of a file to an autoencoder in the units of its activation."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from patchsweep.errors import BadInput
from patchsweep.sae.autoencoder import SAE, SITES
from patchsweep.sae.files import Settings, normalisation, read_settings, read_weights, weights_file

# Architecture -> the tensors that it cannot do without, besides the two matrices.
TENSORS = {
    "standard": ("b_enc",),
    "jumprelu": ("b_enc", "threshold"),
    "topk": ("b_enc",),
    "gated": ("b_gate", "r_mag", "b_mag"),
}
# Trained with a rule over the batch; what is published is one threshold per feature.
AS_JUMPRELU = ("jump_relu", "batchtopk", "matryoshka_batchtopk")
# Those that SAE-Lens may train with pre-activations measured by the norm of decoder rows.
BY_NORM = ("topk", "batchtopk", "matryoshka_batchtopk")
KNOWN = frozenset({"W_enc", "W_dec", "b_dec", "scaling_factor", *sum(TENSORS.values(), ())})

TRANSFORMER_LENS = {
    "hook_resid_pre": "resid_pre",
    "hook_resid_mid": "resid_mid",
    "hook_resid_post": "resid_post",
    "hook_attn_out": "attn_out",
    "hook_mlp_out": "mlp_out",
    "attn.hook_z": "head_z",
}
MODULES = {
    "": "resid_post",
    "attn": "attn_out",
    "self_attn": "attn_out",
    "attention": "attn_out",
    "mlp": "mlp_out",
}


def load_sae(path: str | Path, layer: int | None = None, at: str | None = None) -> SAE:
    """Read an autoencoder from a folder or a file of a published layout (see the package).

    `layer` and `at` win over what the file says. Weights keep float64, the rest becomes float32.
    BadInput for a missing or unreadable file, a pickle, a missing or unknown tensor, shapes that do
    not fit, weights that are not finite, an unknown architecture, normalisation or hook name, and
    where neither file nor caller says the layer and the activation.
    """
    file = weights_file(Path(path))
    tensors, metadata = read_weights(file)
    said, names = read_settings(file, metadata)
    where = str(file)
    weights = _named(where, tensors, names)
    if "architecture" not in said:
        said = {**said, "architecture": _guess(where, weights, said)}
    architecture = _architecture(where, said)
    _check_tensors(where, weights, architecture)
    site = _site(where, said, layer, at)
    return _assemble(where, weights, architecture, said, site)


def _named(
    where: str, tensors: Mapping[str, Tensor], names: Mapping[str, str]
) -> dict[str, Tensor]:
    """The tensors under the names of this module; the encoder as [width, feature]."""
    weights: dict[str, Tensor] = {}
    for old, tensor in tensors.items():
        name = "threshold" if old == "log_threshold" else names.get(old, old)
        if name in weights:
            raise BadInput(f"SAE {where} has two tensors for {name}: keep one")
        turned = tensor.T.contiguous() if old == "encoder.weight" and tensor.ndim == 2 else tensor
        weights[name] = turned.exp() if old == "log_threshold" else turned
    return weights


def _guess(where: str, weights: Mapping[str, Tensor], said: Settings) -> str:
    """The architecture of a file that does not name it, from what is in it."""
    signs = {
        "gated": "b_gate" in weights,
        "topk": "k" in said,
        "jumprelu": "threshold" in weights,
    }
    found = [name for name, is_there in signs.items() if is_there]
    if len(found) > 1:
        raise BadInput(f"SAE {where} may be {' or '.join(found)}: say architecture in its metadata")
    return found[0] if found else "standard"


def _architecture(where: str, said: Settings) -> str:
    name = said["architecture"]
    if name in AS_JUMPRELU:
        return "jumprelu"
    if name not in TENSORS:
        known = ", ".join((*TENSORS, *AS_JUMPRELU))
        raise BadInput(f"SAE {where} has the unknown architecture '{name}': use one of {known}")
    return str(name)


def _check_tensors(where: str, weights: Mapping[str, Tensor], architecture: str) -> None:
    """A tensor too many means another architecture: what it does cannot be guessed."""
    needed = ("W_enc", "W_dec", *TENSORS[architecture])
    missing = [name for name in needed if name not in weights]
    if missing:
        raise BadInput(
            f"SAE {where} has no tensor {', '.join(missing)}: {architecture} needs "
            f"{', '.join(needed)}"
        )
    unknown = [name for name in weights if name not in {*needed, "b_dec", "scaling_factor"}]
    if unknown:
        known = "but not of this architecture" if KNOWN.issuperset(unknown) else "unknown here"
        raise BadInput(
            f"SAE {where} has tensors {', '.join(unknown)}, {known}: {architecture} takes "
            f"{', '.join(needed)}, b_dec"
        )


def _site(where: str, said: Settings, layer: int | None, at: str | None) -> tuple[int, str]:
    """Layer and activation: the caller's, else the file's."""
    if layer is None or at is None:
        hook = said.get("hook_name")
        named = _hook(where, hook) if hook is not None else (said.get("layer"), said.get("at"))
        layer = named[0] if layer is None else layer
        at = named[1] if at is None else at
    if layer is None:
        raise BadInput(f"SAE {where} does not say its layer: give layer=")
    if at is None:
        raise BadInput(
            f"SAE {where} does not say what it reads: give at= one of {', '.join(SITES)}"
        )
    return _whole(where, "layer", layer), at


def _hook(where: str, name: Any) -> tuple[int, str]:
    """Layer and activation of a TransformerLens hook, or of the output of a module."""
    if found := re.fullmatch(r"blocks\.(\d+)\.([\w.]+)", str(name)):
        at = TRANSFORMER_LENS.get(found[2])
    elif found := re.fullmatch(r"(?:.*\.)?(?:layers|h)\.(\d+)(?:\.(\w+))?", str(name)):
        at = MODULES.get(found[2] or "")
    if found is None or at is None:
        raise BadInput(f"SAE {where} reads the unknown hook '{name}': give layer= and at=")
    return int(found[1]), at


def _whole(where: str, name: str, value: Any) -> int:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not float(value).is_integer():
        raise BadInput(f"SAE {where}: {name} is {value!r}: give a whole number")
    return int(value)


def _input_factor(where: str, said: Settings) -> float:
    """What the input is multiplied by first: sqrt(width) / the mean norm, or 1."""
    kind = normalisation(said)
    if kind == "none":
        return 1.0
    if kind != "expected_average_only_in":
        raise BadInput(
            f"SAE {where} normalises each input by '{kind}', its decoder has no fixed units: use "
            "one trained with none or expected_average_only_in"
        )
    factor = said.get("norm_scaling_factor")
    if not isinstance(factor, (int, float)) or not 0 < factor < float("inf"):
        raise BadInput(
            f"SAE {where} scales its input but does not say by how much: add norm_scaling_factor, "
            "sqrt(width) / the mean norm of its inputs, to cfg.json"
        )
    return float(factor)


def _centred(where: str, weights: Mapping[str, Tensor], said: Settings) -> Tensor | None:
    """What is subtracted from the input [width], if anything is."""
    applied = said["apply_b_dec_to_input"]
    if not isinstance(applied, bool):
        raise BadInput(f"SAE {where}: apply_b_dec_to_input is {applied!r}: give true or false")
    if applied and "b_dec" not in weights:
        raise BadInput(f"SAE {where} has no tensor b_dec, which is subtracted first: add it")
    return weights["b_dec"] if applied else None


def _decoder_factor(where: str, weights: Mapping[str, Tensor], said: Settings) -> Tensor:
    """What feature values are multiplied by before the decoder [feature] or [1], after tuning."""
    factor = weights.get("scaling_factor", torch.ones(1))
    if bool((factor == 1).all()):
        return torch.ones(1)
    if not said.get("finetuning_scaling_factor"):
        raise BadInput(
            f"SAE {where} has a scaling_factor that its settings do not use: delete the tensor or "
            "set finetuning_scaling_factor"
        )
    return factor


def _assemble(
    where: str,
    weights: Mapping[str, Tensor],
    architecture: str,
    said: Settings,
    site: tuple[int, str],
) -> SAE:
    """The autoencoder in the units of its activation: every constant factor folded in.

    A first object checks the file as it is, so that the foldings meet shapes that fit.
    """
    encoder, decoder = weights["W_enc"], weights["W_dec"]
    gated = architecture == "gated"
    threshold = weights["threshold"] if architecture == "jumprelu" else None
    if threshold is not None and threshold.numel() == 1 and encoder.ndim == 2:
        threshold = threshold.reshape(1).repeat(encoder.shape[1])
    sae = SAE(
        layer=site[0],
        at=site[1],
        encoder=encoder,
        decoder=decoder,
        bias=weights["b_gate" if gated else "b_enc"],
        centre=_centred(where, weights, said),
        threshold=threshold,
        k=_whole(where, "k", said.get("k")) if architecture == "topk" else None,
        gain=weights["r_mag"].exp() if gated else None,
        magnitude=weights["b_mag"] if gated else None,
        source=where,
    )
    width = said.get("d_in")
    if width is not None and width != sae.width:
        raise BadInput(f"SAE {where} reads {sae.width} values, its settings say {width}: mend d_in")
    if said["architecture"] in BY_NORM and said.get("rescale_acts_by_decoder_norm"):
        sae = _by_decoder_norm(sae)
    tuned = _decoder_factor(where, weights, said)
    if tuned.shape not in ((1,), (sae.features,)):
        raise BadInput(f"SAE {where}: scaling_factor is {list(tuned.shape)}: one for each feature")
    factor = _input_factor(where, said)
    return replace(
        sae,
        encoder=sae.encoder * factor,
        decoder=sae.decoder * tuned[:, None] / factor,
        centre=None if sae.centre is None else sae.centre / factor,
    )


def _by_decoder_norm(sae: SAE) -> SAE:
    """Features measured by what they write: pre-activations times the norms of decoder rows."""
    norm = sae.decoder.norm(dim=-1).clamp(min=1e-8)
    return replace(
        sae, encoder=sae.encoder * norm, bias=sae.bias * norm, decoder=sae.decoder / norm[:, None]
    )
