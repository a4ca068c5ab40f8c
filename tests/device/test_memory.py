"""Memory: within what the plan says, and flat however long the sweep."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tiny import SETTINGS

# What is freed goes back at once: what is resident is what is used. Else the peak depends on which
# thread had what when, by half of itself.
AT_ONCE = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "131072",
}


def printed(script: str, argument: str) -> list[Any]:
    """The lines that a script prints in a process of its own, each JSON."""
    command = [sys.executable, "-c", script, argument]
    env = {**os.environ, **AT_ONCE}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


MEMORY = """
import json, sys
from pathlib import Path
import psutil, torch
from transformers import LlamaConfig, LlamaForCausalLM
import patchsweep as ps
from patchsweep.engine.planning import plan_sweep
from patchsweep.spec import parse_settings

counts, settings, folder = json.loads(sys.argv[1])
torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=20_000, hidden_size=512, intermediate_size=1408, num_hidden_layers=4,
    num_attention_heads=8, num_key_value_heads=4,
)
model = ps.wrap(LlamaForCausalLM(config), type("T", (), {"decode": lambda self, t: str(t)})())
pairs = []
for i in range(max(counts)):
    clean, corrupt = torch.randint(20_000, (2, 16)).tolist()
    corrupt[:9], corrupt[10:] = clean[:9], clean[10:]
    pairs.append(ps.Pair(tuple(clean), tuple(corrupt), (1,), (2,)))
with torch.no_grad():
    model.hf_model(torch.tensor([pairs[0].clean]))
before = psutil.Process().memory_info().rss
for n in counts:
    plan = plan_sweep(model.dimensions, pairs[:n], parse_settings(settings), model.device)
    ps.sweep(model, pairs[:n], out=Path(folder, str(n)), **settings)
    # This process's own: the peak that getrusage tells may be that of the process it came from.
    status = Path("/proc/self/status").read_text().split()
    peak = int(status[status.index("VmHWM:") + 1]) * 1024
    print(json.dumps({"taken": peak - before, **plan.counts()}))
"""


@pytest.mark.multiproc
def test_memory_stays_under_what_the_plan_says(tmp_path: Path) -> None:
    """And more pairs are more waves, not more memory."""
    settings = {**SETTINGS, "direction": "denoise", "token_budget": 512}
    sweeps = printed(MEMORY, json.dumps([[1, 2, 4], settings, str(tmp_path)]))
    first, few, many = sweeps
    assert [sweep["waves"] for sweep in sweeps] == [2, 4, 8]
    assert {sweep["peak_tokens"] for sweep in sweeps} == {first["peak_tokens"]}
    assert first["peak_tokens"] > 400
    assert first["peak_bytes"] < 10 * first["taken"], first
    assert all(sweep["taken"] < sweep["peak_bytes"] for sweep in sweeps), sweeps
    # The larger plan itself takes a little; 6 more waves would take far more than this.
    assert many["taken"] < few["taken"] + 6 * 2**20, sweeps


FLAT = """
import json, sys
import psutil, torch
from transformers import LlamaConfig, LlamaForCausalLM
import patchsweep as ps
from patchsweep.store import Store

torch.manual_seed(0)
torch.set_num_threads(1)
config = LlamaConfig(
    vocab_size=50, hidden_size=16, intermediate_size=512, num_hidden_layers=2,
    num_attention_heads=2, num_key_value_heads=2,
)
model = ps.wrap(LlamaForCausalLM(config), type("T", (), {"decode": lambda self, t: str(t)})())
pairs = []
for _ in range(123):
    clean, corrupt = torch.randint(3, 26, (8,)), torch.randint(26, 50, (8,))
    pairs.append(ps.Pair(tuple(clean.tolist()), tuple(corrupt.tolist()), (1,), (2,)))
write, taken, cells = Store.write_block, [], 0

def watched(self, block, values, status):
    global cells
    write(self, block, values, status)
    cells += status["logit_diff"].size
    taken.append((cells, psutil.Process().memory_info().rss))

Store.write_block = watched
metrics = ["logit_diff", "prob", "rank", "kl"]
ps.sweep(model, pairs, components=["neuron"], metrics=metrics, out=sys.argv[1], token_budget=8192)
print(json.dumps(taken))
"""


@pytest.mark.slow
@pytest.mark.multiproc
def test_memory_is_flat_over_a_million_cells(tmp_path: Path) -> None:
    """What is resident in the second tenth of them is so in the last one, but for less than half of
    what the values take. Each time the least: what a wave needs comes and goes."""
    [taken] = printed(FLAT, str(tmp_path / "r.zarr"))
    cells = taken[-1][0]
    assert cells >= 1_000_000
    second = min(resident for n, resident in taken if 0.1 < n / cells <= 0.2)
    last = min(resident for n, resident in taken if n / cells > 0.9)
    values = cells * len(SETTINGS["metrics"]) * (4 + 1)  # with their statuses, in bytes
    assert last - second < values / 2, (second, last)
