"""The sweep of ioi.yaml through the library. Usage: python ioi.py [RESULTS [PAIRS]]"""

import sys

import patchsweep as ps

out = sys.argv[1] if len(sys.argv) > 1 else "results/ioi-library.zarr"
n = int(sys.argv[2]) if len(sys.argv) > 2 else 8

model = ps.load_model("smollm2-135m")
pairs = ps.tasks.ioi(model.tokenizer, n=n)
results = ps.sweep(
    model,
    pairs,
    components=["head_z", "mlp_out", "resid_pre"],
    metrics=["logit_diff", "logprob", "prob", "rank", "kl"],
    direction="denoise",
    out=out,
)

print(results.top("head_z", "logit_diff", n=5))

heads = results.to_xarray("head_z")
print(heads.logit_diff.sel(layer=23, head=3))
