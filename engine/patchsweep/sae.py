"""Sparse autoencoders: read from the published layouts, and the features of an activation.

A feature patch of the engine is x + (f'_i - f_i) * decoder[i]: what the autoencoder does not
explain of x stays as it is. So only the encoder and the decoder's rows matter here; the decoder's
bias counts only where it is subtracted before the encoder.

Architectures: ReLU (Bricken et al. 2023, transformer-circuits.pub/2023/monosemantic-features),
gated (Rajamanoharan et al. 2024, arXiv 2404.16014), TopK (Gao et al. 2024, arXiv 2406.04093),
JumpReLU (Rajamanoharan et al. 2024, arXiv 2407.14435) and BatchTopK (Bussmann et al. 2024,
arXiv 2412.06410), which is published with a threshold and then reads as a JumpReLU.

Layouts, weights always from safetensors or npz, never from a pickle:

- SAE-Lens: a folder of cfg.json and sae_weights.safetensors.
- sparsify: a folder, named as the hooked module ("layers.5.mlp"), of cfg.json and sae.safetensors.
- Gemma Scope: params.npz; layer and activation are read from the names of its folders.
- Plain: one .safetensors of W_enc (or encoder) [width, feature], W_dec (or decoder)
  [feature, width], b_enc [feature] and perhaps b_dec [width], threshold [feature]. The metadata of
  the file may say layer, at, hook_name, architecture, k and apply_b_dec_to_input; without the last
  b_dec is not subtracted from the input, as in Gemma Scope.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from patchsweep.errors import BadInput

TILE = 1 << 22  # features computed at once where one of each token is wanted, in elements
# Activations that an autoencoder may read. head_z: all heads, flattened [head * d_head].
SITES = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "head_z")

SAE_LENS = "sae_weights.safetensors"
SPARSIFY = "sae.safetensors"
GEMMA_SCOPE = "params.npz"
IN_FOLDERS = (SAE_LENS, SPARSIFY, GEMMA_SCOPE, "params.safetensors")
PICKLES = frozenset({".pt", ".pth", ".bin", ".pkl", ".pickle", ".ckpt"})

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
ALIASES = {
    "encoder": "W_enc",
    "w_enc": "W_enc",
    "decoder": "W_dec",
    "w_dec": "W_dec",
    "topk_threshold": "threshold",
    "finetuning_scaling_factor": "scaling_factor",
}
LINEAR = {"encoder.weight": "W_enc", "encoder.bias": "b_enc"}  # torch.nn.Linear: [feature, width]
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
GEMMA_SCOPE_SITES = {"res": "resid_post", "mlp": "mlp_out", "att": "head_z"}

Settings = Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class SAE:
    """A sparse autoencoder of one activation, in the units of that activation.

    `encoder` [width, feature], `decoder` [feature, width], `bias` [feature]. `centre` [width] is
    subtracted from the input first. At most one of: `threshold` [feature] (JumpReLU; at or below
    it, and below zero, a feature is 0), `k` (TopK) and the pair `gain`, `magnitude` [feature]
    (gated: the factor and the bias of the magnitudes, while `bias` is the gates'); with none of
    them the features are ReLU's. `source` is where it came from, for messages.

    BadInput if shapes do not fit together or weights are not finite.
    """

    layer: int
    at: str
    encoder: Tensor
    decoder: Tensor
    bias: Tensor
    centre: Tensor | None = None
    threshold: Tensor | None = None
    k: int | None = None
    gain: Tensor | None = None
    magnitude: Tensor | None = None
    source: str = "in memory"

    def __post_init__(self) -> None:
        if self.at not in SITES:
            raise BadInput(f"SAE {self.source} cannot read '{self.at}': use {', '.join(SITES)}")
        if self.layer < 0:
            raise BadInput(f"SAE {self.source} has layer {self.layer}: count layers from 0")
        self._check_activation()
        self._check_shapes()
        for name, tensor in self._tensors().items():
            if not bool(torch.isfinite(tensor).all()):
                raise BadInput(
                    f"SAE {self.source}: {name} has values that are not finite in "
                    f"{_dtype(tensor)}: fetch the file again or use a wider dtype"
                )

    @property
    def width(self) -> int:
        """Values of the activation that it reads."""
        return self.encoder.shape[0]

    @property
    def features(self) -> int:
        """How many features it has."""
        return self.encoder.shape[1]

    def encode(self, x: Tensor) -> Tensor:
        """Features [token, feature] of an activation [token, width], in the dtype of x.

        Weights of another dtype or device are converted on every call: do it once with `to`.
        """
        sae = self.to(x.device, x.dtype)
        return sae._features((x if sae.centre is None else x - sae.centre) @ sae.encoder)

    def one_each(self, x: Tensor, feature: Tensor) -> Tensor:
        """Of every activation [token, width] one feature, [token]; a tile of tokens at a time."""
        step = max(1, TILE // self.features)
        tiles = zip(x.split(step), feature.split(step), strict=True)
        return torch.cat([self.encode(a).gather(1, b[:, None])[:, 0] for a, b in tiles])

    def _features(self, projected: Tensor) -> Tensor:
        """Features [token, feature] of what the encoder makes of its input, before the bias."""
        before = projected + self.bias
        if self.gain is not None and self.magnitude is not None:
            # the encoder is shared: W_mag = W_gate * exp(r_mag) (arXiv 2404.16014, eq. 6)
            size = torch.relu(projected * self.gain + self.magnitude)
            return torch.where(before > 0, size, 0)
        active = torch.relu(before)
        if self.k is not None:
            top = active.topk(self.k, dim=-1)
            return torch.zeros_like(active).scatter(-1, top.indices, top.values)
        if self.threshold is not None:
            return torch.where(before > self.threshold, active, 0)
        return active

    def to(self, device: torch.device | str, dtype: torch.dtype) -> SAE:
        """The same autoencoder there and in that dtype; itself if it is already so."""
        tensors = self._tensors()
        moved = {name: tensor.to(device, dtype) for name, tensor in tensors.items()}
        if all(moved[name] is tensor for name, tensor in tensors.items()):
            return self
        return replace(self, **moved)  # type: ignore[arg-type]

    def check_width(self, width: int) -> None:
        """BadInput if the activation of the model has another width than this reads."""
        if width != self.width:
            raise BadInput(
                f"SAE {self.source} reads {self.width} values, {self.at} of this model has "
                f"{width}: use an autoencoder of this model, or another 'at'"
            )

    def _tensors(self) -> dict[str, Tensor]:
        names = ("encoder", "decoder", "bias", "centre", "threshold", "gain", "magnitude")
        every = ((name, getattr(self, name)) for name in names)
        return {name: tensor for name, tensor in every if tensor is not None}

    def _check_activation(self) -> None:
        if (self.gain is None) != (self.magnitude is None):
            raise BadInput(f"SAE {self.source} is half gated: give both gain and magnitude")
        if sum(kind is not None for kind in (self.threshold, self.k, self.gain)) > 1:
            raise BadInput(f"SAE {self.source} has two activations: give threshold, k or gain")

    def _check_shapes(self) -> None:
        if self.encoder.ndim != 2:
            raise BadInput(
                f"SAE {self.source}: encoder is {_shape(self.encoder)}, not [width, feature]: "
                "save it as a matrix"
            )
        width, features = self.encoder.shape
        fits = {"encoder": (width, features), "decoder": (features, width), "centre": (width,)}
        for name, tensor in self._tensors().items():
            wanted = fits.get(name, (features,))
            if tuple(tensor.shape) != wanted:
                raise BadInput(
                    f"SAE {self.source}: {name} is {_shape(tensor)}, beside an encoder [width, "
                    f"feature] of {_shape(self.encoder)} it must be {list(wanted)}: save it so"
                )
        if self.k is not None and not 1 <= self.k <= features:
            raise BadInput(f"SAE {self.source}: k is {self.k}: give one of 1 to {features}")


def load_sae(path: str | Path, layer: int | None = None, at: str | None = None) -> SAE:
    """Read an autoencoder from a folder or a file of a published layout (see the module).

    `layer` and `at` win over what the file says. Weights keep float64, the rest becomes float32.
    BadInput for a missing or unreadable file, a pickle, a missing or unknown tensor, shapes that do
    not fit, weights that are not finite, an unknown architecture, normalisation or hook name, and
    where neither file nor caller says the layer and the activation.
    """
    file = _weights_file(Path(path))
    tensors, metadata = _read(file)
    said, names = _layout(file, metadata)
    where = str(file)
    weights = _named(where, tensors, names)
    if "architecture" not in said:
        said = {**said, "architecture": _guess(where, weights, said)}
    architecture = _architecture(where, said)
    _check_tensors(where, weights, architecture)
    site = _site(where, said, layer, at)
    return _assemble(where, weights, architecture, said, site)


# Files


def _weights_file(path: Path) -> Path:
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


def _read(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
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


# Layouts: each becomes one table of settings, under the names that SAE-Lens gives them


def _layout(file: Path, metadata: Mapping[str, str]) -> tuple[Settings, Mapping[str, str]]:
    """The settings of the autoencoder, and what tensors of other names are called here."""
    if file.name == SAE_LENS:
        return _sae_lens(file.parent), ALIASES
    if file.name == SPARSIFY:
        return _sparsify(file.parent), LINEAR
    if file.suffix == ".npz":
        return _gemma_scope(file), ALIASES
    return _plain(metadata), ALIASES


def _sae_lens(folder: Path) -> Settings:
    """Settings of an SAE-Lens folder: newer ones nest what is about the model in `metadata`."""
    said = _json(folder / "cfg.json")
    nested = said.get("metadata") or said.get("meta") or {}
    if not isinstance(nested, dict):
        raise BadInput(f"{folder / 'cfg.json'}: metadata is not a table: fetch it again")
    flat = {"architecture": "standard", "apply_b_dec_to_input": True, **nested, **said}
    flat = {key: value for key, value in flat.items() if value is not None}
    flat.setdefault("hook_name", flat.get("hook_point"))
    activation = flat.get("activation_fn_str", flat.get("activation_fn", "relu"))
    if activation == "topk":
        flat["architecture"] = "topk"
        flat.setdefault("k", (flat.get("activation_fn_kwargs") or {}).get("k"))
    elif activation != "relu":
        raise BadInput(f"SAE {folder} activates by '{activation}': only relu and topk are known")
    if flat.get("hook_head_index", flat.get("hook_point_head_index")) is not None:
        raise BadInput(f"SAE {folder} reads a single head: only all heads together are known")
    return flat | _scaler(folder / "activation_scaler.json", flat)


def _scaler(file: Path, said: Settings) -> dict[str, float]:
    """The factor of the input norm that a training run keeps beside its weights, if it does."""
    scaler = _json(file) if file.is_file() else {}
    factor = scaler.get("scaling_factor")
    if scaler.get("has_whitening"):
        raise BadInput(f"SAE {file.parent} whitens its input: only a factor can be folded in")
    if factor is None:
        return {}
    if _normalisation(said) == "none":
        raise BadInput(
            f"SAE {file.parent}: {file.name} scales the input, cfg.json does not: set "
            "normalize_activations there to expected_average_only_in, or delete the file"
        )
    return {"norm_scaling_factor": factor}


def _sparsify(folder: Path) -> Settings:
    """Settings of a sparsify folder: TopK of the ReLU of the centred input."""
    said = _json(folder / "cfg.json")
    for key in ("transcode", "signed", "gram_lookup"):
        if said.get(key):
            raise BadInput(f"SAE {folder} was trained with {key}: only plain TopK is known")
    if said.get("activation", "topk") != "topk":
        raise BadInput(f"SAE {folder} activates by '{said['activation']}': only topk is known")
    return {
        "architecture": "topk",
        "apply_b_dec_to_input": True,
        "k": said.get("k"),
        "d_in": said.get("d_in"),
        "hook_name": folder.absolute().name,
    }


def _gemma_scope(file: Path) -> Settings:
    """Settings of Gemma Scope (Lieberum et al. 2024, arXiv 2408.05147): JumpReLU, not centred."""
    folders = file.absolute().parent.parts
    said: dict[str, Any] = {"architecture": "jumprelu", "apply_b_dec_to_input": False}
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


def _plain(metadata: Mapping[str, str]) -> Settings:
    """Settings of a plain file: the metadata of safetensors are strings."""
    return {"apply_b_dec_to_input": False} | {key: _value(v) for key, v in metadata.items()}


def _value(text: str) -> Any:
    try:
        return json.loads(text.lower() if text in ("True", "False") else text)
    except ValueError:
        return text


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


# Tensors and settings


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


def _normalisation(said: Settings) -> str:
    value = said.get("normalize_activations")
    if isinstance(value, bool):  # before there were several kinds
        return "expected_average_only_in" if value else "none"
    return str(value or "none")


def _input_factor(where: str, said: Settings) -> float:
    """What the input is multiplied by first: sqrt(width) / the mean norm, or 1."""
    kind = _normalisation(said)
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
        raise BadInput(f"SAE {where}: scaling_factor is {_shape(tuned)}: one for each feature")
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


def _shape(tensor: Tensor) -> str:
    return str(list(tensor.shape))


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
