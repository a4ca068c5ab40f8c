"""What a published folder or file holds: tensors, and settings under SAE-Lens' names."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from patchsweep.errors import BadInput
from patchsweep.sae.settings import (
    APPLIED,
    BESIDE,
    SAE_LENS_ONLY,
    TRAINING,
    check_known,
    check_loading,
    merged,
)
from patchsweep.sae.settings import SPARSIFY as SETTINGS_OF_SPARSIFY

SAE_LENS = "sae_weights.safetensors"
SPARSIFY = "sae.safetensors"
GEMMA_SCOPE = "params.npz"
IN_FOLDERS = (SAE_LENS, SPARSIFY, GEMMA_SCOPE, "params.safetensors")
PICKLES = frozenset({".pt", ".pth", ".bin", ".pkl", ".pickle", ".ckpt"})
ALIASES = {
    "encoder": "W_enc",
    "w_enc": "W_enc",
    "decoder": "W_dec",
    "w_dec": "W_dec",
    "topk_threshold": "threshold",
    "finetuning_scaling_factor": "scaling_factor",
}
LINEAR = {"encoder.weight": "W_enc", "encoder.bias": "b_enc"}  # torch.nn.Linear: [feature, width]
GEMMA_SCOPE_SITES = {"res": "resid_post", "mlp": "mlp_out", "att": "head_z"}

Settings = Mapping[str, Any]


def weights_file(path: Path) -> Path:
    """The file of the weights: this one, or the one in this folder."""
    if not path.exists():
        raise BadInput(f"no SAE at {path}: give a folder or a .safetensors or .npz file")
    if path.is_dir():
        return _in_folder(path)
    if path.suffix.lower() in PICKLES:
        raise BadInput(_pickled(path))
    if path.suffix not in (".safetensors", ".npz"):
        raise BadInput(f"cannot read an SAE from {path}: give a .safetensors or .npz file")
    return path


def _in_folder(folder: Path) -> Path:
    for name in IN_FOLDERS:
        if (folder / name).is_file():
            return folder / name
    pickles = sorted(p for p in folder.iterdir() if p.suffix.lower() in PICKLES)
    if pickles:
        raise BadInput(_pickled(pickles[0]))
    raise BadInput(f"no SAE in folder {folder}: it needs one of {', '.join(IN_FOLDERS)}")


def _pickled(path: Path) -> str:
    return (
        f"{path} is a pickle, which can run any code when it is read: save its tensors with "
        "safetensors.torch.save_file and give that file"
    )


def read_weights(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a file, and its metadata."""
    try:
        return _read_npz(file) if file.suffix == ".npz" else _read_safetensors(file)
    except (SafetensorError, BadZipFile, ValueError, TypeError, OSError, EOFError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise BadInput(f"cannot read SAE {file}: {reason}: fetch or save it again") from error


def _read_safetensors(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    with safe_open(str(file), framework="pt") as opened:
        tensors = {name: _real(opened.get_tensor(name)) for name in opened.keys()}  # noqa: SIM118
        return tensors, dict(opened.metadata() or {})


def _read_npz(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    with np.load(file, allow_pickle=False) as opened:
        return {name: _real(torch.from_numpy(opened[name])) for name in opened.files}, {}


def _real(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.to(torch.float32)


def _json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise BadInput(
            f"no {file.name} in {file.parent}: put it beside the weights, or rename the weights "
            "if they are a plain file"
        )
    try:
        said = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise BadInput(f"{file} is not JSON: fetch it again") from error
    if not isinstance(said, dict):
        raise BadInput(f"{file} is not a table of settings: fetch it again")
    return said


def read_settings(file: Path, metadata: Mapping[str, str]) -> tuple[Settings, Mapping[str, str]]:
    """The settings of the autoencoder, and what tensors of other names are called here."""
    if file.name in (SAE_LENS, SPARSIFY):
        check_known(str(file), metadata, {"format"})
        lens = file.name == SAE_LENS
        return (_sae_lens(file.parent), ALIASES) if lens else (_sparsify(file.parent), LINEAR)
    said = merged(str(file), {key: _value(v) for key, v in metadata.items()}, *_beside(file.parent))
    check_known(str(file), said, (APPLIED - SAE_LENS_ONLY) | TRAINING | BESIDE)
    check_loading(str(file), said)
    if file.suffix == ".npz":
        said = {"architecture": "jumprelu"} | merged(str(file), _gemma_scope(file), said)
    return {"apply_b_dec_to_input": False, **_gemma_scope_2(str(file), said)}, ALIASES


def _sae_lens(folder: Path) -> Settings:
    """Settings of an SAE-Lens folder: newer ones nest what is about the model in `metadata`."""
    said = _json(folder / "cfg.json")
    nested = said.get("metadata") or said.get("meta") or {}
    if not isinstance(nested, dict):
        raise BadInput(f"{folder / 'cfg.json'}: metadata is not a table: fetch it again")
    where = str(folder)
    flat = merged(where, nested, said)
    check_known(where, flat, APPLIED | TRAINING)
    check_loading(where, flat)
    flat = {"architecture": "standard", "apply_b_dec_to_input": True, **flat}
    for old, new in (("hook_point", "hook_name"), ("hook_point_layer", "hook_layer")):
        flat = merged(where, flat, {new: flat.get(old)})
    activation = flat.get("activation_fn_str", flat.get("activation_fn", "relu"))
    options = dict(flat.get("activation_fn_kwargs") or {})
    if activation == "topk":
        flat = merged(where, flat | {"architecture": "topk"}, {"k": options.pop("k", None)})
    elif activation != "relu":
        raise BadInput(f"SAE {folder} activates by '{activation}': only relu and topk are known")
    check_known(f"{where}: activation_fn_kwargs", options, ())
    heads = ("hook_head_index", "hook_point_head_index", "hook_head_index_out")
    if any(head in flat for head in heads):
        raise BadInput(f"SAE {folder} reads a single head: only all heads together are known")
    flat["processing_said"] = "model_from_pretrained_kwargs" in flat
    return flat | _scaler(folder / "activation_scaler.json", flat)


def _scaler(file: Path, said: Settings) -> dict[str, float]:
    """The factor of the input norm that a training run keeps beside its weights, if it does."""
    scaler = _json(file) if file.is_file() else {}
    factor = scaler.get("scaling_factor")
    if scaler.get("has_whitening"):
        raise BadInput(f"SAE {file.parent} whitens its input: only a factor can be folded in")
    if factor is None:
        return {}
    if normalisation(said) == "none":
        raise BadInput(
            f"SAE {file.parent}: {file.name} scales the input, cfg.json does not: set "
            "normalize_activations there to expected_average_only_in, or delete the file"
        )
    return {"norm_scaling_factor": factor}


def _sparsify(folder: Path) -> Settings:
    """Settings of a sparsify folder: TopK of the ReLU of the centred input."""
    said = _json(folder / "cfg.json")
    check_known(str(folder), said, SETTINGS_OF_SPARSIFY)
    for key in ("transcode", "signed", "gram_lookup", "skip_connection"):
        if said.get(key):
            raise BadInput(f"SAE {folder} was trained with {key}: only plain TopK is known")
    if said.get("activation", "topk") != "topk":
        raise BadInput(f"SAE {folder} activates by '{said['activation']}': only topk is known")
    return {
        "architecture": "topk",
        "apply_b_dec_to_input": True,
        "k": said.get("k"),
        "d_in": said.get("d_in"),
        "d_sae": said.get("num_latents") or None,
        "hook_name": said.get("hookpoint") or folder.absolute().name,
    }


def _gemma_scope(file: Path) -> Settings:
    """Settings of Gemma Scope (Lieberum et al. 2024, arXiv 2408.05147): JumpReLU, not centred."""
    folders = file.absolute().parent.parts
    said: dict[str, Any] = {"apply_b_dec_to_input": False}
    scope = [name for name in folders if "gemma-scope" in name]
    if scope and (scope[-1].endswith("transcoders") or "embedding" in folders):
        raise BadInput(f"SAE {file} is a transcoder or reads embeddings: use one of res, mlp, att")
    for name in scope:
        if found := re.search(r"-(res|mlp|att)(-canonical)?$", name):
            said["at"] = GEMMA_SCOPE_SITES[found[1]]
    for name in folders:
        if found := re.fullmatch(r"layer_(\d+)", name):
            said["layer"] = int(found[1])
    return said


def _beside(folder: Path) -> list[dict[str, Any]]:
    """What is said beside a file, but of a model that lies there too."""
    files = (folder / name for name in ("config.json", "cfg.json"))
    found = [_json(file) for file in files if file.is_file()]
    return [said for said in found if "model_type" not in said]


def _gemma_scope_2(where: str, said: Settings) -> Settings:
    """Settings of Gemma Scope 2 (config.json beside params.safetensors) under SAE-Lens' names, and
    any others as they are."""
    kind, reads, writes = (
        said.get(key) for key in ("type", "hf_hook_point_in", "hf_hook_point_out")
    )
    if kind not in (None, "sae") or (writes is not None and writes != reads):
        raise BadInput(
            f"SAE {where} is a {kind or 'transcoder'}, what it writes is not what it reads: use an "
            "autoencoder (type: sae)"
        )
    if said.get("affine_connection"):
        raise BadInput(f"SAE {where} has an affine skip connection: use one without")
    return merged(where, said, {"hook_name": reads, "d_sae": said.get("width")})


def _value(text: str) -> Any:
    try:
        return json.loads(text.lower() if text in ("True", "False") else text)
    except ValueError:
        return text


def normalisation(said: Settings) -> str:
    """The kind of scaling of the input, "none" if there is none."""
    value = said.get("normalize_activations")
    if isinstance(value, bool):  # before there were several kinds
        return "expected_average_only_in" if value else "none"
    return str(value or "none")
