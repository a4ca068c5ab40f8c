"""The command line. Exit status: 0 done, 1 failure, 2 wrong use or bad input, 130 interrupted,
143 terminated."""

from __future__ import annotations

import os
import shlex
import signal
import sys
import traceback
from pathlib import Path
from types import FrameType

from cyclopts import CycloptsError

from patchsweep.commands import TRACEBACK, DoesNotHold, app
from patchsweep.errors import BadInput, Lost, has_secrets, one_line
from patchsweep.inputs import SECRETS

INTERRUPTED = (130, 143)


class Terminated(BaseException):
    """SIGTERM or SIGHUP arrived."""


def main() -> None:
    """Run a command and exit with its status."""
    for quiet in ("TRANSFORMERS_VERBOSITY", "TORCH_CPP_LOG_LEVEL"):
        os.environ.setdefault(quiet, "error")  # what matters is said in one line
    signal.signal(signal.SIGTERM, _stop)
    if signal.getsignal(signal.SIGHUP) is signal.SIG_DFL:  # nohup ignores it
        signal.signal(signal.SIGHUP, _stop)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _stop)
    status = _status(sys.argv[1:])
    if status in INTERRUPTED:
        # Zarr's threads are still at what was interrupted, and would report how it ends.
        sys.stdout.flush()
        os._exit(status)
    sys.exit(status)


def _status(arguments: list[str]) -> int:
    """Run a command; its exit status. Every error is one line on standard error."""
    given = [a for a in arguments if a != TRACEBACK]
    try:
        if any(map(has_secrets, given)):
            raise BadInput(SECRETS)
        app(given, exit_on_error=False, print_error=False, result_action="return_value")
    except BadInput as error:
        return _say(error, 2)
    except DoesNotHold as error:
        return _say(error, 1)
    except CycloptsError as error:
        known = [name for name in given[:1] if name in list(app)]
        return _say(f"{error} See {shlex.join(['patchsweep', *known, '--help'])}", 2)
    except (KeyboardInterrupt, Terminated) as error:
        word, status = (
            ("terminated", 143) if isinstance(error, Terminated) else ("interrupted", 130)
        )
        return _say(f"{word}{_go_on(given)}", status)
    except Lost as error:
        return _say(f"{error}{_go_on(given)}", 1)
    except Exception as error:
        if TRACEBACK in arguments:
            traceback.print_exc()
        return _say(f"{type(error).__name__}: {error} ({TRACEBACK} says where)", 1)
    return 0


def _go_on(arguments: list[str]) -> str:
    """How to go on after an interrupted run, or experiment."""
    if arguments[:1] not in (["run"], ["reproduce"]):
        return ""
    # Before the larger results are there only --append goes on, after that either does.
    how = "--append" if "--append" in arguments else "--resume"
    kept = [a for a in arguments if a not in ("--overwrite", "--resume", "--append")]
    more = [how] if arguments[0] == "run" else []
    command = shlex.join([*_launched_by(arguments), *kept, *more])
    unless = "; unless the launcher starts it again" if _may_start_again() else ""
    return f"; what was finished is kept{unless}, go on with: {command}"


def _may_start_again() -> bool:
    """Whether torchrun was given --max-restarts, and has not used them up."""
    names = ("TORCHELASTIC_RESTART_COUNT", "TORCHELASTIC_MAX_RESTARTS")
    used, most = (int(os.environ.get(name, "0")) for name in names)
    return used < most


def _launched_by(arguments: list[str]) -> list[str]:
    """The command line up to `arguments`; of several processes as their launcher was given it."""
    if _several():
        import psutil

        launcher = psutil.Process().parent()
        said = launcher.cmdline() if launcher else []
        own = said[: len(said) - len(arguments)]
        if own and own + arguments == said:
            program = 1 if Path(own[0]).name.startswith("python") and own[1:2] != ["-m"] else 0
            return [Path(own[program]).name, *own[program + 1 :]]
    return ["patchsweep"]


def _stop(signum: int, _frame: FrameType | None) -> None:
    """End in order. A launcher may pass on a signal that has come already: one is enough."""
    for each in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(each, signal.SIG_IGN)
    raise KeyboardInterrupt if signum == signal.SIGINT else Terminated


def _say(what: object, status: int) -> int:
    """Say why the command ends, unless another process of it has ended before; the exit status."""
    mine = True
    if _several():
        from patchsweep.processes import end

        status, mine = end(status)
    if mine:
        print(f"patchsweep: {' '.join(one_line(what).split())}", file=sys.stderr, flush=True)
    return status


def _several() -> bool:
    """Whether a launcher has started several processes; torch is not asked, it takes a second."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1
