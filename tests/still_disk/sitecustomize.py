"""A disk that stands still: what processes write to that a test is about to end.

Python imports this by itself where this folder is on its path. Once STILL_FROM blocks are finished,
the record of a further one waits until the process has been told to end: a signal that comes late
finds the sweep still going. A group that a launcher has started again has a disk like any other.
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


def still_replace(source: Any, target: Any, **how: Any) -> None:
    completion = Path(target).parents[2]
    if completion.name == "completion" and not again:
        done = sum(1 for _ in completion.glob("*/c/[0-9]*"))
        while done >= int(os.environ["STILL_FROM"]) and not told_to_end():
            assert time.monotonic() < give_up
            time.sleep(0.01)
    replace(source, target, **how)


os.replace = still_replace
