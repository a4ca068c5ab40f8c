"""The tensors that sources need beside the runs of a wave: noise, means, vectors, autoencoders."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from patchsweep.device import weights_of
from patchsweep.errors import BadInput
from patchsweep.passes.forward import Forward
from patchsweep.plan import Source
from patchsweep.plan.layout import Layouts
from patchsweep.sae import SAE
from patchsweep.spec import Gaussian, Vector

# (source, component) -> [layer, position or 1, unit or 1, width or 1]
Constants = dict[tuple[int, str], Tensor]


@dataclass(frozen=True, eq=False)
class Values:
    """What the sources and metrics of a sweep need, on the model's device.

    constants: of sources that take no run, by (source, component), [layer, position, unit, width],
    sizes of 1 standing for all; nothing for zero. noise_scale: of Gaussian sources, one standard
    deviation of the embeddings. directions: of probes, by metric column, [width].
    """

    sources: tuple[Source, ...]
    constants: Constants = field(default_factory=dict)
    noise_scale: float = 0.0
    sae: SAE | None = None
    directions: dict[str, Tensor] = field(default_factory=dict)

    def noise(
        self,
        pair: Sequence[int],
        slot: Sequence[int],
        source: Sequence[int],
        sample: int,
        width: int,
    ) -> NDArray[np.float64]:
        """Noise [token, width] on embeddings, in float64: token i is noised position slot[i] of
        pair[i]. Every sigma scales the same draw, which hangs on the seed, the sample, the slot and
        the prompt's own tokens: not on where the prompt stands in a list."""
        rows = []
        for p, s, number in zip(pair, slot, source, strict=True):
            of = self.sources[number]
            assert isinstance(of.given, Gaussian)
            tokens = of.others[sample][p].tokens
            rng = np.random.default_rng([of.given.seed, sample, s, *tokens])
            rows.append(rng.standard_normal(width) * of.sigma * self.noise_scale)
        return np.stack(rows)

    def constant(
        self, source: int, component: str, layer: int, unit: Tensor, position: Tensor
    ) -> Tensor | None:
        """Values [edit, width] of a source that takes no run; None for zero."""
        table = self.constants.get((source, component))
        if table is None:
            return None
        by_layer = table[layer if table.shape[0] > 1 else 0].to(unit.device)
        pick = [
            index if size > 1 else torch.zeros_like(index)
            for index, size in zip((position, unit), by_layer.shape, strict=False)
        ]
        return by_layer[pick[0], pick[1]]


@torch.no_grad()
def embedding_std(forward: Forward, given: Gaussian, layouts: Layouts) -> float:
    """One standard deviation of the embeddings, over the noised tokens of all pairs or over the
    whole vocabulary (all values together, in float64)."""
    embedding = forward.hf_model.get_input_embeddings()
    if given.std == "table":
        tokens = torch.arange(embedding.weight.shape[0], device=forward.device)
    else:
        source = next(s for s in layouts.sources if isinstance(s.given, Gaussian))
        noised = [o.tokens[i] for o in source.others[0] for i in o.noised]
        tokens = torch.tensor(noised, device=forward.device)
    count, total, squares = 0, 0.0, 0.0
    with weights_of(embedding):
        for part in tokens.split(4096):
            x = embedding(part).double()
            count, total = count + x.numel(), total + float(x.sum())
            squares += float((x * x).sum())
    return float(np.sqrt(max(0.0, squares / count - (total / count) ** 2)))


def read_vector(given: Vector, what: str, layers: int, units: int, width: int) -> Tensor:
    """A steering vector, [layer or 1, 1, unit or 1, width], times its scale.

    BadInput if it has not the size of the activation.
    """
    x = read_tensor(given.file)
    fits = {(width,), (layers, width), (layers, units, width)}
    if tuple(x.shape) not in fits:
        need = " or ".join(str(list(f)) for f in sorted(fits, key=len))
        raise BadInput(
            f"{given.file}: the vector is {list(x.shape)}, {what} of this model needs {need}"
        )
    if x.dim() == 1:
        x = x[None, None]
    elif x.dim() == 2:
        x = x[:, None]
    return x[:, None] * given.scale


def read_tensor(file: Path) -> Tensor:
    """The one tensor of a .safetensors or .npy file; BadInput for anything else."""
    try:
        if file.suffix == ".npy":
            found = {"array": torch.from_numpy(np.load(file, allow_pickle=False))}
        elif file.suffix == ".safetensors":
            from safetensors.torch import load_file

            found = load_file(file)
        else:
            raise BadInput(f"{file}: unknown kind of file: use .safetensors or .npy")
    except (OSError, ValueError) as error:
        if isinstance(error, BadInput):
            raise
        raise BadInput(f"{file}: cannot read the vector: {error}") from error
    except Exception as error:  # safetensors' own
        raise BadInput(f"{file}: cannot read the vector: {' '.join(str(error).split())}") from error
    if len(found) != 1:
        raise BadInput(f"{file}: holds {len(found)} tensors: keep one")
    [x] = found.values()
    if not bool(x.isfinite().all()):
        raise BadInput(f"{file}: has values that are not finite")
    return x.double()
