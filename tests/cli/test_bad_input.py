"""Wrong use and bad input: one line that says what, where and the mend, and nothing is written."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    MambaConfig,
    MambaForCausalLM,
)

from cli.commands import Command, Done, listing, refused
from tiny import save


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["sweep"], ['Unknown command "sweep"', "run, plan, show", "See patchsweep --help"]),
        (["run"], ["SPEC", "patchsweep run --help"]),
        (["run", "a.yaml", "b.yaml"], ["b.yaml", "patchsweep run --help"]),
        (["run", "a.yaml", "--jobs", "2"], ["--jobs", "patchsweep run --help"]),
        (["run", "a.yaml", "--set"], ["--set requires an argument"]),
        (["run", "a.yaml", "--resume", "--overwrite"], ["exclude each other"]),
        (["run", "no/such.yaml"], ["no/such.yaml", "No such file"]),
        (["plan", "no/such.toml"], ["no/such.toml", "No such file"]),
        (["run", "spec.json"], ["spec.json", "use .yaml or .toml"]),
        (["show", "no/such.zarr"], ["no/such.zarr", "check the path"]),
        (["plot", "no/such.zarr"], ["no/such.zarr", "check the path"]),
        (["export", "no/such.zarr", "t.parquet"], ["no/such.zarr", "check the path"]),
    ],
    ids=lambda x: " ".join(x),
)
def test_wrong_use(command: Command, arguments: list[str], words: list[str]) -> None:
    refused(command(*arguments), *words)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("components=[head_x]", ["unknown component 'head_x'", "use one of embed, resid_pre"]),
        ("metrics=[logit_dif]", ["unknown metric 'logit_dif'", "did you mean 'logit_diff'"]),
        ("metric=kl", ["unknown key 'metric'", "did you mean 'metrics'"]),
        ("prompts.tasks=ioi", ["unknown key 'prompts.tasks'", "did you mean 'task'"]),
        ("prompts={task: io, n: 2}", ["unknown task 'io'", "ioi"]),
        ("prompts={task: ioi}", ["n is missing", "n: 8"]),
        ("direction=sideways", ["direction", "sideways", "denoise"]),
        ("positions=[8]", ["8 is outside every prompt", "use -8 to 7"]),
        ("positions=[S2]", ["unknown label 'S2'", "use one of END"]),
        ("token_budget=3", ["token_budget 3 is too small", "it needs", "raise it"]),
        ("token_budget=many", ["'many'", "use auto or a whole number"]),
        ("prompts.file=gone.jsonl", ["gone.jsonl", "No such file"]),
        ("model=./nowhere", ["./nowhere", "no such folder"]),
        ("dtype=int8", ["dtype", "float32", "int8"]),
        ("device=tpu", ["device", "'tpu'", "auto, cpu, cuda"]),
        ("out=", ["no out", "results/ioi.zarr"]),
        ("components", ["override 'components'", "key.key=value"]),
        ("=3", ["override '=3'", "key.key=value"]),
        ("model.name=3", ["model holds no keys", "set model itself"]),
        ("positions=[1", ["override 'positions=[1'", "not YAML"]),
    ],
)
def test_wrong_settings(
    command: Command, spec: Path, tmp_path: Path, override: str, words: list[str]
) -> None:
    refused(command("run", spec, "--set", override), *words)
    assert listing(tmp_path) == {"spec.yaml", "pairs.jsonl"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_where_there_is_none(command: Command, spec: Path, tmp_path: Path) -> None:
    refused(command("run", spec, "--set", "device=cuda"), "'cuda'", "use auto or cpu")
    assert listing(tmp_path) == {"spec.yaml", "pairs.jsonl"}


GOOD = {"clean": "a b c", "corrupt": "a d c", "answer": " e", "wrong": " f"}


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (json.dumps({**GOOD, "answer": " e g"}), ["answer ' e g' is 2 tokens", "not one"]),
        (json.dumps({**GOOD, "answer": " E9"}), ["answer ' E9' is not in the vocabulary"]),
        (json.dumps({**GOOD, "wrong": " e"}), ["'e' is in both answer and wrong"]),
        (json.dumps({**GOOD, "clean": "a b c d"}), ["4 tokens, corrupt has 3", "the same number"]),
        (json.dumps({**GOOD, "clean": "a d c"}), ["no differing token", "change one"]),
        (json.dumps({**GOOD, "anwser": " e"}), ["unknown key 'anwser'", "did you mean 'answer'"]),
        (json.dumps({"clean": "a", "corrupt": "b"}), ["missing key 'answer'"]),
        (json.dumps({**GOOD, "labels": {"END": 3}}), ["'END' at 3 is outside", "use -3 to 2"]),
        ('{"clean": "a b", ', ["not a JSON object on one line"]),
        ("[1]", ["not a JSON object"]),
    ],
)
def test_bad_pairs(
    command: Command, spec: Path, tmp_path: Path, line: str, words: list[str]
) -> None:
    (tmp_path / "pairs.jsonl").write_text(f"{json.dumps(GOOD)}\n\n{line}\n")
    refused(command("run", spec), f"{tmp_path / 'pairs.jsonl'}:3: ", *words)
    assert listing(tmp_path) == {"spec.yaml", "pairs.jsonl"}


def test_no_pairs(command: Command, spec: Path, tmp_path: Path) -> None:
    (tmp_path / "pairs.jsonl").write_text("\n")
    refused(command("run", spec), "pairs.jsonl", "no pairs in the file", "at least one")
    assert listing(tmp_path) == {"spec.yaml", "pairs.jsonl"}


def test_a_model_without_weights(command: Command, spec: Path, model: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(model, tmp_path / "model")
    (copy / "model.safetensors").unlink()
    done = command("run", spec, "--set", f"model={copy}")
    refused(done, str(copy), "no weights", ".safetensors")
    assert listing(tmp_path) == {"spec.yaml", "pairs.jsonl", "model"}


def test_a_prompt_longer_than_the_model_takes(command: Command, spec: Path, tmp_path: Path) -> None:
    config = GPT2Config(
        vocab_size=53,
        n_positions=6,
        n_embd=8,
        n_layer=1,
        n_head=2,
        bos_token_id=None,
        eos_token_id=None,
    )
    folder = save(tmp_path / "gpt2", GPT2LMHeadModel(config))
    done = command("run", spec, "--set", f"model={folder}")
    refused(done, "a prompt has 8 tokens", "takes 6", "shorten it")
    assert listing(tmp_path) == {"spec.yaml", "pairs.jsonl", "gpt2"}


def test_a_family_without_the_attention_interface(spec: Path, tmp_path: Path) -> None:
    """In a process that has not imported transformers yet, which has its say about it too."""
    config = BloomConfig(vocab_size=53, hidden_size=16, n_layer=1, n_head=2)
    folder = save(tmp_path / "bloom", BloomForCausalLM(config))

    def run(backend: str) -> Done:
        settings = ("--set", f"model={folder}", "--set", f"backend={backend}")
        command = [sys.executable, "-m", "patchsweep", "run", spec, *settings]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        return Done(done.returncode, done.stdout, done.stderr)

    refused(run("wavefront"), "BloomForCausalLM", "attention interface", "cannot run on the wave")
    assert listing(tmp_path) == {"spec.yaml", "pairs.jsonl", "bloom"}
    done = run("auto")
    assert (done.status, done.err) == (0, "")
    assert "nnsight (BloomForCausalLM does not call" in done.out


@pytest.mark.parametrize("name", ["run", "plan"])
def test_what_neither_backend_can_run(
    command: Command, spec: Path, tmp_path: Path, name: str
) -> None:
    recurrent = MambaConfig(vocab_size=53, hidden_size=16, num_hidden_layers=2)
    folder = save(tmp_path / "mamba", MambaForCausalLM(recurrent))
    done = command(name, spec, "--set", f"model={folder}")
    refused(done, "MambaForCausalLM", "no causal language model with attention", "neither backend")
    assert listing(tmp_path) == {"spec.yaml", "pairs.jsonl", "mamba"}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["device=balanced", "max_memory={cpu: 1KB}"], ["cpu cannot hold model.", "give it more"]),
        (
            ["device=balanced", "max_memory={cpu: 20KB}", "offload_folder=/dev/null/x"],
            ["cannot keep weights in /dev/null/x", "set offload_folder"],
        ),
        (["remote=true"], ["remote runs through nnsight", "add backend: nnsight"]),
    ],
)
def test_places_that_cannot_be_used(
    command: Command, spec: Path, tmp_path: Path, settings: list[str], words: list[str]
) -> None:
    sets = [word for setting in settings for word in ("--set", setting)]
    refused(command("run", spec, *sets), *words)
    assert listing(tmp_path) == {"spec.yaml", "pairs.jsonl"}
