# %% [markdown]
# # Which heads move the name?
#
# A notebook in percent format: Jupyter opens it with jupytext, VS Code and PyCharm as it is.
# Every pair is a sentence such as "When Mary and John went to the store, John gave a drink to";
# in the corrupt prompt the second name is the other one.

# %%
import patchsweep as ps

model = ps.load_model("smollm2-135m")
pairs = ps.tasks.ioi(model.tokenizer, n=2)
print(model.tokenizer.decode(pairs[0].clean))
print(model.tokenizer.decode(pairs[0].corrupt))

# %% [markdown]
# One head at one position at a time is patched from the clean into the corrupt run.

# %%
results = ps.sweep(
    model,
    pairs,
    components=["head_z"],
    metrics=["logit_diff"],
    direction="denoise",
    out="results/notebook.zarr",
    overwrite=True,
)

# %% [markdown]
# Blue heads push against the answer. An effect of 0 is the corrupt run, 1 the clean one.

# %%
results.plot("head_z", "logit_diff", "denoise")

# %% [markdown]
# Where do they do it?

# %%
results.plot("head_z", "logit_diff", "denoise", view="layer_position")

# %%
for cell in results.top("head_z", "logit_diff", "denoise", n=5):
    place = f"{cell.layer}.{cell.unit} at position {cell.position} {cell.token!r}"
    print(f"head {place}: effect {cell.effect:+.3f}")

# %% [markdown]
# Every experiment is a row of a table.

# %%
table = results.to_frame()
table.sort_values("logit_diff_effect", ascending=False).head()
