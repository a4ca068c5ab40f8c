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
from patchsweep.sae.settings import merged

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
    # Gemma Scope 2: of Gemma 3, whose attention and MLP end in a norm.
    "output": "resid_post",
    "self_attn.o_proj.input": "head_z",
    "post_attention_layernorm.output": "attn_out",
    "post_feedforward_layernorm.output": "mlp_out",
}


def load_sae(path: str | Path, layer: int | None = None, at: str | None = None) -> SAE:
    """Read an autoencoder from a folder or a file of a published layout (see the package).

    `layer` and `at` are needed where the file does not say them. Weights keep float64, the rest
    becomes float32. BadInput for a missing or unreadable file, a pickle, a missing or unknown
    tensor or setting, shapes that do not fit, weights that are not finite, an unknown architecture,
    normalisation or hook name, and where neither file nor caller says the layer and the activation,
    or they say different ones.
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
    """Layer and activation, from the file or the caller; BadInput if they disagree."""
    hook = said.get("hook_name")
    named = _hook(hook) if hook is not None else None
    if hook is not None and named is None and (layer is None or at is None):
        raise BadInput(f"SAE {where} reads the unknown hook '{hook}': give layer= and at=")
    file_layer, file_at = named or (None, None)
    of_file = merged(
        where,
        {"layer": file_layer, "at": file_at},
        {"layer": said.get("layer"), "at": said.get("at")},
        {"layer": said.get("hook_layer")},
    )
    given = {"layer": layer, "at": at}
    site = of_file | {key: value for key, value in given.items() if value is not None}
    if _same_place(site) != _same_place(site | of_file):
        says = ", ".join(f"{key} {value}" for key, value in of_file.items())
        asked = ", ".join(f"{key} {value}" for key, value in given.items() if value is not None)
        raise BadInput(
            f"SAE {where} says {says}, the sweep {asked}: leave that out, or use another file"
        )
    layer, at = site.get("layer"), site.get("at")
    if layer is None:
        raise BadInput(f"SAE {where} does not say its layer: give layer=")
    if at is None:
        raise BadInput(
            f"SAE {where} does not say what it reads: give at= one of {', '.join(SITES)}"
        )
    return _whole(where, "layer", layer), at


def _same_place(site: Mapping[str, Any]) -> tuple[Any, Any]:
    """What is read, under one name: the output of a layer is the input of the next."""
    layer, at = site.get("layer"), site.get("at")
    if at == "resid_post" and isinstance(layer, (int, float)):
        return layer + 1, "resid_pre"
    return layer, at


def _hook(name: Any) -> tuple[int, str] | None:
    """Layer and activation of a TransformerLens hook, or of a module's output; None if unknown."""
    if found := re.fullmatch(r"blocks\.(\d+)\.([\w.]+)", str(name)):
        at = TRANSFORMER_LENS.get(found[2])
    elif found := re.fullmatch(r"(?:.*\.)?(?:layers|h)\.(\d+)(?:\.([\w.]+))?", str(name)):
        at = MODULES.get(found[2] or "")
    return None if found is None or at is None else (int(found[1]), at)


def _whole(where: str, name: str, value: Any) -> int:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not float(value).is_integer():
        raise BadInput(f"SAE {where}: {name} is {value!r}: give a whole number")
    return int(value)


def _input_factor(where: str, said: Settings) -> float:
    """What the input is multiplied by first: sqrt(width) / the mean norm, or 1."""
    kind = normalisation(said)
    if kind == "none":
        if said.get("norm_scaling_factor", 1) != 1:
            raise BadInput(
                f"SAE {where} has a norm_scaling_factor that its settings do not use: take it out "
                "or set normalize_activations to expected_average_only_in"
            )
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
    if said.get("finetuning_scaling_factor") and "scaling_factor" not in weights:
        raise BadInput(
            f"SAE {where} was tuned by a scaling_factor that is not among its tensors: add it, or "
            "set finetuning_scaling_factor to false"
        )
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
        processing_said=bool(said.get("processing_said", True)),
    )
    _check_settings(where, said, sae)
    if said.get("rescale_acts_by_decoder_norm"):
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


def _check_settings(where: str, said: Settings, sae: SAE) -> None:
    """BadInput for settings that the tensors, or one another, contradict."""
    width = said.get("d_in")
    if width is not None and width != sae.width:
        raise BadInput(f"SAE {where} reads {sae.width} values, its settings say {width}: mend d_in")
    features = said.get("d_sae")
    if features is not None and features != sae.features:
        raise BadInput(
            f"SAE {where} has {sae.features} features, its settings say {features}: mend d_sae, "
            "width or num_latents"
        )
    out = said.get("hook_name_out", said.get("hook_name")), said.get("d_out", sae.width)
    if out != (said.get("hook_name"), sae.width) or "hook_layer_out" in said:
        raise BadInput(f"SAE {where} is a transcoder, it writes elsewhere: use an autoencoder")
    shape = said.get("reshape_activations", "none")
    if shape not in ("none", "hook_z") or (shape == "hook_z" and sae.at != "head_z"):
        raise BadInput(
            f"SAE {where} reshapes its input by '{shape}': only none and, of head_z, hook_z are "
            "known"
        )
    if said.get("rescale_acts_by_decoder_norm") and said["architecture"] not in BY_NORM:
        raise BadInput(
            f"SAE {where}: rescale_acts_by_decoder_norm is no setting of {said['architecture']}: "
            f"it is of {', '.join(BY_NORM)}"
        )


def _by_decoder_norm(sae: SAE) -> SAE:
    """Features measured by what they write: pre-activations times the norms of decoder rows."""
    norm = sae.decoder.norm(dim=-1).clamp(min=1e-8)
    return replace(
        sae, encoder=sae.encoder * norm, bias=sae.bias * norm, decoder=sae.decoder / norm[:, None]
    )
