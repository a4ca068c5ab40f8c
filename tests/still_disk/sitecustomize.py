"""A disk that stands still: what processes write to that a test is about to end.

Python imports this by itself where this folder is on its path. Once STILL_FROM blocks are finished,
the record of a further one waits until the process has been told to end: a signal that comes late
finds the sweep still going. A group that a launcher has started again has a disk like any other.

Or, with STILL_FOR, the folder of a job of two: what one of them has computed is not recorded before
the other has computed something too, however late it begins.
"""

import os
import signal
import time
from pathlib import Path
from typing import Any

replace = os.replace
give_up = time.monotonic() + 900  # seconds: whoever was to end this process has died
again = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"


def told_to_end() -> bool:
    """The command ignores all further signals then."""
    return signal.getsignal(signal.SIGTERM) == signal.SIG_IGN


def computed(rank: int) -> bool:
    """Whether that process has computed a wave since it began."""
    log = Path(os.environ["STILL_FOR"], f"rank-{rank}.log")
    return log.exists() and ": computed" in log.read_text().rpartition(" begins\n")[2]


def ahead() -> bool:
    """Whether this process has computed something, and the other one nothing yet."""
    rank = int(os.environ["RANK"])
    return computed(rank) and not computed(1 - rank)


def still_replace(source: Any, target: Any, **how: Any) -> None:
    completion = Path(target).parents[2]
    if completion.name == "completion" and "STILL_FOR" in os.environ:
        while ahead():
            assert time.monotonic() < give_up
            time.sleep(0.01)
    elif completion.name == "completion" and not again:
        done = sum(1 for _ in completion.glob("*/c/[0-9]*"))
        while done >= int(os.environ["STILL_FROM"]) and not told_to_end():
            assert time.monotonic() < give_up
            time.sleep(0.01)
    replace(source, target, **how)


os.replace = still_replace
