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
- Gemma Scope 2: a folder of config.json and params.safetensors.
- Plain: one .safetensors of W_enc (or encoder) [width, feature], W_dec (or decoder)
  [feature, width], b_enc [feature] and perhaps b_dec [width], threshold [feature]. The metadata of
  the file, or a config.json beside it, may say layer, at, hook_name, architecture, k and
  apply_b_dec_to_input; without the last b_dec is not subtracted from the input, as in Gemma Scope.

A setting that is not known is refused, as is a tensor: what it changes cannot be guessed.

    autoencoder.py   the autoencoder itself: its features, checked shapes
    files.py         the published layouts: tensors and settings as they are there
    settings.py      which settings are known, and which of them change nothing
    load.py          from those to an autoencoder

Imports errors.
"""

from patchsweep.sae.autoencoder import SAE, SITES, TILE
from patchsweep.sae.load import load_sae

__all__ = ["SAE", "SITES", "TILE", "load_sae"]
