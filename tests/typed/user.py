"""A program of a user: every public name once. Comments say what a type checker makes of it."""

from pathlib import Path
from typing import Any, reveal_type

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import patchsweep as ps


def largest(logits: torch.Tensor, context: ps.Context) -> torch.Tensor:
    """A metric of the user's own."""
    reveal_type(context.pairs)  # Sequence[Pair]
    reveal_type(context.run)  # ndarray[tuple[Any, ...], dtype[signedinteger[_8Bit]]]
    return logits.amax(-1)


def spec_of(file: Path) -> ps.Spec:
    return ps.load_spec(file, ["prompts.n=16"])


def swept(model: ps.Model, pairs: list[ps.Pair], out: Path) -> ps.Results:
    return ps.sweep(
        model,
        pairs,
        components=["head_z"],
        metrics=["logit_diff", {"callable": "mine:largest"}],
        sets={"two": [str(ps.parse_site("head_z.0.1@END")), "mlp_out.1"]},
        out=out,
    )


def main(folder: Path) -> None:
    model = ps.load_model("gpt2", dtype="float32", device="balanced", max_memory={0: "10GB"})
    reveal_type(model)  # Model
    reveal_type(model.device)  # device
    hf_model: Any = AutoModelForCausalLM.from_pretrained("gpt2")
    reveal_type(ps.wrap(hf_model, AutoTokenizer.from_pretrained("gpt2"), name="mine"))  # Model

    pairs = ps.tasks.ioi(model.tokenizer, n=16, seed=1, bos="auto", corruption="abc")
    reveal_type(pairs)  # list[Pair]
    pairs += ps.read_pairs(folder / "pairs.jsonl", model.tokenizer)
    pair = ps.make_pair(
        model.tokenizer, "a b", "c b", answer=" d", wrong=[" e", " f"], labels={"END": -1}
    )
    reveal_type(pair)  # Pair
    reveal_type(pair.alignment)  # ndarray[tuple[Any, ...], dtype[signedinteger[_64Bit]]]

    results = swept(model, [*pairs, pair], folder / "r.zarr")
    reveal_type(results)  # Results
    site = ps.parse_site("mlp_out.3@END")
    reveal_type(site.layer)  # int | None
    reveal_type(ps.Site("mlp_out", layer=3))  # Site

    spec = spec_of(folder / "ioi.yaml")
    reveal_type(spec)  # Spec
    reveal_type(spec.directions)  # tuple[Literal['denoise'] | Literal['noise'], ...]
    try:
        results = ps.run(spec, resume=True)
    except ps.BadInput as error:
        reveal_type(error)  # BadInput

    results = ps.open(str(folder / "r.zarr"))
    ds = results.to_xarray("head_z", by="labels")
    reveal_type(ds)  # Dataset
    effect = results.effect("head_z", "logit_diff", align="end", min_pairs=1)
    reveal_type(effect)  # DataArray
    low, _ = results.interval("head_z", "logit_diff", samples=100)
    reveal_type(low)  # ndarray[tuple[Any, ...], dtype[float64]]
    reveal_type(results.baseline("logit_diff"))  # ndarray[tuple[Any, ...], dtype[float64]]
    reveal_type(results.noise_floor("logit_diff"))  # ndarray[tuple[Any, ...], dtype[float64]]
    reveal_type(results.p_values("head_z", "kl"))  # ndarray[tuple[Any, ...], dtype[float64]]
    reveal_type(results.standard_error("head_z", "kl"))  # ndarray[tuple[Any, ...], dtype[float64]]
    moved, span = results.changes("head_z", "kl")
    reveal_type(moved)  # ndarray[tuple[Any, ...], dtype[float64]]
    reveal_type(span)  # ndarray[tuple[Any, ...], dtype[float64]] | None
    joint, single = results.windows("mlp_out", 3, "kl")
    reveal_type(joint - single)  # ndarray[tuple[Any, ...], dtype[float64]]
    reveal_type(results.estimated_effect("head_z", "kl"))  # DataArray
    reveal_type(results.edges("kl"))  # DataArray
    reveal_type(results.top_edges("kl", n=3))  # list[tuple[str, float]]
    reveal_type(results.top_sites("head_z", "kl", "denoise", 3)[0].effect)  # float
    reveal_type(results.agreement("head_z", "kl").pearson)  # float
    verdict = results.audit("head_z", "kl")
    reveal_type(verdict)  # Verdict | None
    reveal_type(results.counts("head_z", "kl"))  # dict[Status, int]
    reveal_type(results.columns("head_z").names)  # tuple[int, ...] | tuple[str, ...]
    reveal_type(results.grid("head_z").shape)  # tuple[int, ...]
    reveal_type(results.components + results.metrics)  # tuple[str, ...]
    reveal_type(results.complete)  # bool
    reveal_type(results.circuit("logit_diff").cpr)  # float
    reveal_type(results.plot("head_z"))  # Figure
    results.export("cells.parquet", overwrite=True)
    reveal_type(results.warnings())  # list[str]
    reveal_type(ps.check(folder / "r.zarr").damages)  # tuple[Damage, ...]
    verified = ps.verify(results, cells=5, model=model, functions={"mine:largest": largest})
    reveal_type(verified.holds)  # bool
