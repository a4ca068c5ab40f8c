"""A disk that gets slow: what processes write to that a test is about to kill.

Python imports this by itself where this folder is on its path. Once SLOW_FROM blocks are finished,
the next twenty take a third of a second each: a signal that comes late finds the sweep still going.
"""

import os
import time
from pathlib import Path
from typing import Any

replace = os.replace


def slow_replace(source: Any, target: Any, **how: Any) -> None:
    completion = Path(target).parents[2]
    if completion.name == "completion":
        done = sum(1 for _ in completion.glob("*/c/[0-9]*"))
        time.sleep(0.3 if 0 <= done - int(os.environ["SLOW_FROM"]) < 20 else 0)
    replace(source, target, **how)


os.replace = slow_replace
