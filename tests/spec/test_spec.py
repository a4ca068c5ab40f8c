"""The spec: what is read, how it is normalised, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from pydantic import ValidationError

from patchsweep.errors import BadInput
from patchsweep.model.loading import DTYPES
from patchsweep.spec import METRICS, REQUIRED, Dtype, Metric, load_spec, parse_metric, parse_spec

ROOT = Path(__file__).resolve().parents[2]
DATA: dict[str, Any] = {
    "model": "smollm2-135m",
    "prompts": {"task": "ioi", "n": 8},
    "components": ["head_z"],
}


def refused(data: object, *words: str) -> None:
    """The data is refused in one line that begins with the place and holds these words."""
    with pytest.raises(BadInput) as error:
        parse_spec(data, "s.yaml")
    line = str(error.value)
    assert line.startswith("s.yaml: ")
    assert "\n" not in line
    for word in words:
        assert word in line


def test_defaults() -> None:
    spec = parse_spec(DATA)
    assert spec.dtype == "float32"
    assert spec.device == "auto"
    assert spec.directions == ("denoise",)
    assert spec.positions == "each"
    assert spec.metrics == (Metric("logit_diff"),)
    assert spec.token_budget == "auto"
    assert (spec.prompts.seed, spec.prompts.bos) == (0, "auto")
    assert spec.out is None
    assert parse_spec({**DATA, "direction": "both"}).directions == ("denoise", "noise")
    with pytest.raises(ValidationError, match="frozen"):
        spec.dtype = "float64"


def test_every_dtype_can_be_loaded() -> None:
    assert get_args(Dtype) == tuple(DTYPES)


def test_the_example() -> None:
    spec = load_spec(ROOT / "examples" / "ioi.yaml")
    assert spec.model == "smollm2-135m"
    assert spec.components == ("head_z", "mlp_out", "resid_pre")
    assert [m.column for m in spec.metrics] == ["logit_diff", "logprob", "prob", "rank", "kl"]


def test_metrics() -> None:
    spec = parse_spec(
        {**DATA, "metrics": ["kl", {"accuracy": {"k": 5}}, "accuracy", {"logit_diff": None}]}
    )
    assert spec.metrics == (
        Metric("kl"),
        Metric("accuracy", k=5),
        Metric("accuracy"),
        Metric("logit_diff"),
    )
    assert [m.column for m in spec.metrics] == ["kl", "accuracy_k5", "accuracy", "logit_diff"]
    assert parse_metric({"logit_diff": {"reduce": "sum"}}).column == "logit_diff_sum"
    assert parse_metric({"accuracy": {"k": 1}}) == Metric("accuracy")
    plain = [name for name, options in METRICS.items() if REQUIRED not in options.values()]
    assert [parse_metric(name).column for name in plain] == plain
    assert parse_metric({"kl": {"at": "S2"}}).column == "kl_at_S2"
    assert parse_metric({"callable": {"path": "a.b:my_metric"}}).column == "my_metric"
    inner = {"attention": {"layer": 9, "head": 6, "query": "END", "key": "IO"}}
    assert parse_metric(inner).column == "attention_9_6_END_IO"


def test_a_dump_can_be_read_again() -> None:
    metrics = ["kl", {"accuracy": {"k": 5}}, {"logit_diff": {"reduce": "sum"}}]
    prompts = {"task": {"ioi": {"corruption": "abc"}}, "n": 2, "only_correct": True}
    said = {"metrics": metrics, "positions": ["S2", -1], "prompts": prompts, "out": "x.zarr"}
    spec = parse_spec({**DATA, **said})
    data = json.loads(json.dumps(spec.model_dump(mode="json")))
    assert data["metrics"] == metrics
    assert data["prompts"] == {**prompts, "file": None, "seed": 0, "bos": "auto"}
    assert parse_spec(data) == spec


def test_yaml_and_toml_agree(tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_text(yaml.safe_dump({**DATA, "positions": ["END", -2]}))
    (tmp_path / "s.toml").write_text(
        'model = "smollm2-135m"\ncomponents = ["head_z"]\npositions = ["END", -2]\n'
        '[prompts]\ntask = "ioi"\nn = 8\n'
    )
    spec = load_spec(tmp_path / "s.yaml")
    assert spec == load_spec(tmp_path / "s.toml")
    assert spec.positions == ("END", -2)


def test_overrides(tmp_path: Path) -> None:
    file = tmp_path / "s.yaml"
    file.write_text(yaml.safe_dump(DATA))
    spec = load_spec(
        file,
        ["prompts.n=3", "positions=[S2, -1]", "metrics=[{accuracy: {k: 2}}]", "out=a=b.zarr"],
    )
    assert spec.prompts.n == 3
    assert spec.positions == ("S2", -1)
    assert spec.metrics == (Metric("accuracy", k=2),)
    assert spec.out == Path("a=b.zarr")
    for override, words in (
        ("prompts.n", "write key.key=value"),
        ("=3", "write key.key=value"),
        ("prompts..n=3", "write key.key=value"),
        ("model.name=3", "model holds no keys"),
        ("prompts.n=[3", "not YAML"),
        ("prompts.m=3", "unknown key 'prompts.m'"),
    ):
        with pytest.raises(BadInput, match=words):
            load_spec(file, [override])


def test_a_prompts_file_lies_beside_the_spec(tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_text(yaml.safe_dump({**DATA, "prompts": {"file": "p.csv"}}))
    assert load_spec(tmp_path / "s.yaml").prompts.file == tmp_path / "p.csv"
    assert load_spec(tmp_path / "s.yaml", ["prompts.file=/p.csv"]).prompts.file == Path("/p.csv")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"componets": ["head_z"]}, ["unknown key 'componets'", "'components'"]),
        ({"qqqq": 1}, ["unknown key 'qqqq'", "use one of", "token_budget"]),
        ({"prompts": {"tsak": "ioi", "n": 1}}, ["'prompts.tsak'", "'task'"]),
        ({"model": 3}, ["model: ", "is 3"]),
        ({"model": ""}, ["model: "]),
        ({"dtype": "float8"}, ["dtype: ", "'bfloat16'", "'float8'"]),
        ({"device": "cuda:x"}, ["device: 'cuda:x'", "cuda:N"]),
        ({"corrupt": "gausian"}, ["corrupt: 'gausian'", "use pairs or gaussian"]),
        ({"corrupt": {"gaussian": {"sigma": 0}}}, ["gaussian: sigma: 0 is no number above 0"]),
        ({"corrupt": {"gaussian": {"sigma": [3, -1]}}}, ["sigma: -1 is no number above 0"]),
        ({"corrupt": {"gaussian": {"sigm": 3}}}, ["unknown key 'sigm'", "'sigma'"]),
        ({"sae": {"file": "x", "lyer": 3}}, ["unknown key 'sae.lyer'", "'layer'"]),
        ({"corrupt": {"gaussian": {"samples": 0}}}, ["gaussian: samples: ", "is 0"]),
        ({"corrupt": {"gaussian": {"std": "all"}}}, ["gaussian: std: ", "'table'"]),
        ({"source": "mean"}, ["source: source mean needs the prompts", "{mean: {prompts: clean}}"]),
        ({"source": {"mean": {"prompt": "x"}}}, ["needs the prompts"]),
        ({"source": {"vector": {}}}, ["source vector: missing key 'file'"]),
        ({"source": {"zero": {"k": 1}}}, ["source zero has no options"]),
        ({"source": ["zero", "zero"]}, ["'zero' is there twice"]),
        ({"windows": [1]}, ["windows.0: ", "is 1"]),
        ({"windows": [3], "components": ["head_z"]}, ["windows are over resid_pre"]),
        ({"sets": {"a": ["head_z.1"]}}, ["site 'head_z.1'", "head_z.layer.head@position"]),
        ({"sets": {"a": ["foo.1"]}}, ["unknown component 'foo'"]),
        ({"sets": {"a": ["what?"]}}, ["'what?' is no site"]),
        ({"sets": {"a": []}}, ["sets.a: the list is empty"]),
        ({"sets": {"a": {"within": ["head_z"]}}}, ["missing key 'besides'"]),
        ({"components": ["sae_feature"]}, ["sae_feature needs an autoencoder", "sae: {file: ...}"]),
        ({"sets": {"a": {"within": [], "beside": []}}}, ["sets.a: unknown key 'beside'"]),
        ({"circuit": {"sizes": [1]}}, ["missing key 'circuit.ranking'"]),
        (
            {"circuit": {"ranking": {"results": "r", "componet": "head_z", "metric": "kl"}}},
            ["circuit.ranking: unknown key 'componet': did you mean 'component'?"],
        ),
        ({"circuit": {"ranking": "head_z.1.1"}}, ["circuit.ranking: 'head_z.1.1' is not a list"]),
        ({"circuit": {"ranking": ["mlp_out.1"], "sizes": [0]}}, ["circuit.sizes: 0 is no number"]),
        ({"circuit": {"ranking": ["mlp_out.1"], "sizes": "all"}}, ["circuit.sizes: 'all' is not"]),
        ({"corrupt": {"gaussian": {"tokens": "S2"}}}, ["gaussian: tokens: 'S2' is not a list"]),
        ({"positions": {3: [1]}}, ["positions: 3 names a group of positions: quote it"]),
        ({"prefilter": "5%"}, ["prefilter: should be a mapping, {key: value}, and is '5%'"]),
        ({"max_memory": {"cpu": "lots"}}, ["s.yaml: max_memory: cpu is 'lots'"]),
        ({"direction": "up"}, ["direction: ", "'both'"]),
        ({"prompts": {}}, ["prompts: give either task or file"]),
        ({"prompts": {"task": "ioi", "file": "x", "n": 1}}, ["either task or file"]),
        ({"prompts": {"task": "oio", "n": 1}}, ["unknown task 'oio'", "did you mean 'ioi'?"]),
        (
            {"prompts": {"task": {"ioi": {"template": "abba"}}, "n": 1}},
            ["prompts.task: unknown option 'template' of ioi", "did you mean 'templates'?"],
        ),
        (
            {"prompts": {"task": {"ioi": {"templates": "abab"}}, "n": 1}},
            ["prompts.task: templates of ioi is 'abab'", "did you mean 'baba'?"],
        ),
        ({"prompts": {"task": ["ioi", "facts"], "n": 1}}, ["prompts.task: ", "is not one task"]),
        ({"prompts": {"task": "ioi", "n": 1, "only_correct": "so"}}, ["prompts.only_correct: "]),
        ({"prompts": {"task": "ioi"}}, ["prompts: n is missing"]),
        ({"prompts": {"task": "ioi", "n": 0}}, ["prompts.n: ", "is 0"]),
        ({"prompts": {"task": "ioi", "n": True}}, ["prompts.n: ", "is True"]),
        ({"prompts": {"task": "ioi", "n": "8"}}, ["prompts.n: ", "is '8'"]),
        ({"prompts": {"task": "ioi", "n": 8, "seed": -1}}, ["prompts.seed: "]),
        ({"prompts": {"task": "ioi", "n": 8, "bos": "yes"}}, ["prompts.bos: ", "'always'"]),
        ({"prompts": "ioi"}, ["prompts: "]),
        ({"components": []}, ["components is missing", "[head_z, mlp_out]"]),
        ({"components": "head_z"}, ["components: 'head_z' is not a list"]),
        ({"components": ["head"]}, ["unknown component 'head'", "head_z"]),
        ({"components": [1]}, ["components.0: "]),
        ({"components": ["head_z", "head_z"]}, ["components: 'head_z' is there twice"]),
        ({"positions": "S2"}, ["positions: 'S2'", "[S2]"]),
        ({"positions": []}, ["positions: the list is empty"]),
        ({"positions": [1, 1]}, ["positions: 1 is there twice"]),
        ({"positions": [True]}, ["positions: True", "quote it"]),
        ({"positions": 3}, ["positions: 3 is not a list"]),
        ({"metrics": []}, ["metrics: the list is empty"]),
        ({"metrics": ["kll"]}, ["unknown metric 'kll'", "'kl'"]),
        ({"metrics": [3]}, ["metrics: 3 is not one metric"]),
        ({"metrics": [{"kl": {}, "prob": {}}]}, ["is not one metric"]),
        ({"metrics": [{"kl": {"k": 1}}]}, ["unknown option 'k' of kl", "use one of at"]),
        ({"metrics": [{"sequence_logprob": {"k": 1}}]}, ["it has none"]),
        ({"metrics": ["attention"]}, ["attention needs layer"]),
        ({"metrics": [{"kl": {"at": 1.5}}]}, ["at of kl is 1.5", "a token index or a label"]),
        ({"metrics": [{"callable": {"path": "f"}}]}, ["package.module:function"]),
        ({"metrics": [{"accuracy": {"top": 1}}]}, ["unknown option 'top' of accuracy"]),
        ({"metrics": [{"accuracy": 5}]}, ["the options of accuracy are 5"]),
        ({"metrics": [{"accuracy": {"k": 0}}]}, ["k of accuracy is 0"]),
        ({"metrics": [{"accuracy": {"k": True}}]}, ["k of accuracy is True"]),
        ({"metrics": [{"logit_diff": {"reduce": "max"}}]}, ["'max': use mean or sum"]),
        ({"metrics": ["accuracy", {"accuracy": {"k": 1}}]}, ["'accuracy' is there twice"]),
        ({"token_budget": 0}, ["token_budget: 0"]),
        ({"token_budget": True}, ["token_budget: True"]),
        ({"token_budget": "much"}, ["token_budget: 'much'"]),
        ({"out": 3}, ["out: should be a path"]),
        ({"dtype": "x", "direction": "y", "out": 3}, ["direction: ", "(and 2 more)"]),
        ({"dtype": "x", "oot": 3}, ["unknown key 'oot'", "'out'", "(and 1 more)"]),
    ],
)
def test_bad_specs(change: dict[str, Any], words: list[str]) -> None:
    refused({**DATA, **change}, *words)


def test_missing_keys_and_no_mapping() -> None:
    refused({k: v for k, v in DATA.items() if k != "model"}, "missing key 'model'")
    refused([1], "not a mapping")


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("s.yaml", "model: [", r"s\.yaml:1: not YAML"),
        ("s.yaml", "model: a\nprompts:\n  n: 1\n  n: 2\n", r"s\.yaml:4: .*'n' is there twice"),
        ("s.yaml", "- model", r"s\.yaml: not a mapping"),
        ("s.yaml", "", r"s\.yaml: not a mapping"),
        ("s.yaml", "a: &x\n  b: *x\n", r"s\.yaml:2: not YAML: alias \*x: aliases are not taken"),
        ("s.toml", "model = ", r"s\.toml: not TOML"),
        ("s.json", "{}", r"s\.json: unknown kind"),
    ],
)
def test_bad_files(tmp_path: Path, name: str, text: str, words: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(BadInput, match=words) as error:
        load_spec(tmp_path / name)
    assert "\n" not in str(error.value)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"gone\.yaml: cannot read the spec: No such file"):
        load_spec(tmp_path / "gone.yaml")
    (tmp_path / "s.yaml").write_bytes(b"model: \xe9")
    with pytest.raises(BadInput, match="not UTF-8"):
        load_spec(tmp_path / "s.yaml")
