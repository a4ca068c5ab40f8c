"""A sparse autoencoder: the features of an activation, and the rows that write them back."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from patchsweep.errors import BadInput

TILE = 1 << 22  # features computed at once where one of each token is wanted, in elements
# Activations that an autoencoder may read. head_z: all heads, flattened [head * d_head].
SITES = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "head_z")


@dataclass(frozen=True, eq=False)
class SAE:
    """A sparse autoencoder of one activation, in the units of that activation.

    `encoder` [width, feature], `decoder` [feature, width], `bias` [feature]. `centre` [width] is
    subtracted from the input first. At most one of: `threshold` [feature] (JumpReLU; at or below
    it, and below zero, a feature is 0), `k` (TopK) and the pair `gain`, `magnitude` [feature]
    (gated: the factor and the bias of the magnitudes, while `bias` is the gates'); with none of
    them the features are ReLU's. `source` is where it came from, for messages; `processing_said`:
    whether it says if its model's weights were processed.

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
    processing_said: bool = True

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


def _shape(tensor: Tensor) -> str:
    return str(list(tensor.shape))


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
