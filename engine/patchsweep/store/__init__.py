"""Results in a folder or at a URL: a Zarr v3 group that xarray opens.

A chunk holds every layer of some pairs, units and positions: a block of the plan, or, where that
would make too many files, several (`plan.chunks`). `Store.grids` are cut into chunks; to the store
a block is a chunk. It is written once, by one process.

Layout under the results folder:

- `README.txt`: what the arrays are, for who has only xarray (`readme.py`).
- `<component>/<metric>`, `<component>/<metric>_status`: `sites.DIMENSIONS`, with 1-D coordinates
  and, but for sets, `token`, `label` [pair, position] and `n_pairs` [position] (`texts.py`). What
  an array is its attributes say (`described.py`).
- `<component>/<metric>_estimate`, where the sweep estimates the component: the same dimensions and
  chunks, without a status; its attribute `approximation` says how it was made.
- `edges/<metric>`, where the sweep scores edges: [direction, source, sample, pair, sender,
  receiver], NaN where there is no edge, with the nodes' texts as coordinates; its attribute
  `approximation` says how it was made.
- `choice/<component>_status`, `choice/<component>_stratum` uint8 [direction, source, layer, unit,
  column]: what becomes of an estimated component's cells (`prefilter.Choice`) at what its positions
  mean over pairs, by index in results without the root attribute `chosen_columns`.
- Records, uint64, one after another, each a chunk, so that no two processes write the same file:
  `completion/<component>`, one per chunk; `completion/edges`, one per [source, sample, pair];
  `completion/choice`, one; `records/baseline`, `records/estimates`, one per [source, sample, tile
  of pairs]. What they say, and of which chunks: `ledger.py`.
- Marks, uint64 in chunks of one, each a number below 256 with a digest of its place
  (`digests.sealed`): `completion/estimates` [source, sample, pair], whose estimates are written;
  `completion/waves_split` [wave], as long as if every block of the plan were a wave: how often a
  wave was halved because it ran out of memory (`engine/splitting.py`);
  `completion/estimates_split`, `completion/edges_split` [source, sample, pair]: how often the pairs
  that are estimated together were, counted from this one on.
- `sets/`: runs that patch several sites at once, a grid whose positions are the sets' names; beside
  it the sites in columns [site]: `site_set`, `site_component`, `site_layer`, `site_unit`,
  `site_position`, `site_source`.
- `baseline/<metric>`, `baseline/<metric>_noise_floor`: [run, source, sample, pair], the runs
  being clean and corrupt.
- `prompts/`: `clean_tokens`, `corrupt_tokens` int32 [pair, position] (-1 = outside), their strings
  in `clean_text`, `corrupt_text`; `align` [pair, position], the corrupt position of a clean one;
  `length`, `group` [pair]; attributes `labels`, `answer`, `wrong`,
  `answer_text`, `wrong_text`: one entry per pair.
- Root attributes: `patchsweep_schema`, `components`, `metrics`, `dtype`, `created`, and those that
  the caller gives (spec, estimators, edges, plan_hash, token_budget, blocks_per_chunk,
  pairs_per_block, model, model_fingerprint, versions, device, threads; `prompts`:
  the tasks or files that the pairs are from; `appended`: what the results held each time that pairs
  or metrics were added, their number of `pairs`, their `metrics`, and `when`), `written_once`, and
  `readme`: the name of README.txt, where it is of the results.
- `manifest`: what is written once, again (`manifest.py`).
- `summary`, `summary/second`: the attributes that come later (`summary.py`): plan, joint, measured.

Beside it, in `.<name>.job/`: `lock`, `progress.json`, `rank-<n>.log` (`processes/progress.py`).

A chunk is written to a temporary file and renamed, data before its record: what is recorded
outlives a killed process. With `fsync` files and folders reach the disk in that order too, and it
outlives a power cut. A zip file of such a folder (`pack`) can be read. At a URL (`bucket.py`) there
are objects of the same names. Nothing is read but these files, and of them only Zarr v3 of a few
kinds (`nodes.py`), through `checked.py`, which gives Zarr what was compared with what should be
there. Results of schema 2 (without manifest and digests) are read.

    place.py        where results lie: folder.py (with files.py), bucket.py
    owned.py        which files they consist of: nothing else is moved or deleted with them
    outside.py      files that are written elsewhere: tables, figures, pages
    nodes.py        what metadata may say
    arrays.py       the arrays, laid out empty; prompts.py: the prompt pairs
    described.py    what arrays say of themselves; texts.py: what is at positions; readme.py
    lay_out.py      what is written once, made and read; manifest.py: that, kept twice
    summary.py      attributes that change
    ledger.py       which record speaks of which chunks; books.py: records, read; digests.py
    damage.py       what is wrong with a file that is not what was written
    checked.py      results as Zarr reads them
    array_store.py  arrays by name: read, written by regions, and the files of their chunks
    store.py        the results of a sweep; whole.py: deleted, packed
    integrity.py    whether all is there that should be; what is damaged is withdrawn
    writer.py       writing in the background

Imports errors, inputs, pairs, sites.
"""

from patchsweep.store import described
from patchsweep.store.arrays import (
    ESTIMATED,
    ESTIMATED_SPLIT,
    RUNS,
    SCORED_SPLIT,
    WAVES_SPLIT,
    Nodes,
)
from patchsweep.store.damage import Damaged, Why
from patchsweep.store.files import OLDER, SCHEMA, writing
from patchsweep.store.integrity import Check, check, refuse_missing, withdraw
from patchsweep.store.ledger import BASELINES, CHOSEN, ESTIMATES, SCORED, scored
from patchsweep.store.outside import MADE, check_made, check_outside, replacing
from patchsweep.store.place import (
    beside,
    changed,
    check_free,
    check_own,
    exists,
    job_folder,
    known_by,
    locked,
    path_or_url,
    private,
    put_back,
)
from patchsweep.store.prompts import stored_pairs
from patchsweep.store.store import Store
from patchsweep.store.texts import texts_of, two_prompts
from patchsweep.store.whole import pack, remove
from patchsweep.store.writer import background

__all__ = [
    "BASELINES",
    "CHOSEN",
    "ESTIMATED",
    "ESTIMATED_SPLIT",
    "ESTIMATES",
    "MADE",
    "OLDER",
    "RUNS",
    "SCHEMA",
    "SCORED",
    "SCORED_SPLIT",
    "WAVES_SPLIT",
    "Check",
    "Damaged",
    "Nodes",
    "Store",
    "Why",
    "background",
    "beside",
    "changed",
    "check",
    "check_free",
    "check_made",
    "check_outside",
    "check_own",
    "described",
    "exists",
    "job_folder",
    "known_by",
    "locked",
    "pack",
    "path_or_url",
    "private",
    "put_back",
    "refuse_missing",
    "remove",
    "replacing",
    "scored",
    "stored_pairs",
    "texts_of",
    "two_prompts",
    "withdraw",
    "writing",
]
