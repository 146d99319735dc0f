"""The command line of several ranks: one shows what there is to see, and each has its log."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from besa.cli import logs
from besa.cli.consoles import only_errors, refuse
from besa.errors import BesaError, Interrupted
from besa.system.processes import launched


@contextmanager
def together() -> Iterator[None]:
    """While open, this process works together with the others that torchrun has started, if it has.

    Raises:
        BesaError: they do not come together. If it is a `ToldError`, another rank shows it.
    """
    if not launched():
        yield
        return
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")  # torch's own words on what a sentence will say
    from besa.system.joining import Launch, joined  # torch takes a while to import

    launch = Launch.read()
    if launch.number > 0:
        only_errors()
    logs.begin(launch.number, f"{' '.join(['besa', *sys.argv[1:]])}, rank {launch.number} of {launch.count}")
    try:
        with joined(sys.argv[1:], _last_words):
            yield
    except (BesaError, Interrupted) as error:
        logs.write(str(error))
        raise
    except KeyboardInterrupt:
        logs.write("interrupted")
        raise
    except Exception:  # raised on: the log has it too
        logs.write(traceback.format_exc().rstrip())
        raise
    logs.write("done")


def leave(code: int) -> None:
    """End this process. Of several ranks, without what torch would do at its end, such as wait for others."""
    if launched():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _last_words(sentence: str, show: bool) -> None:
    logs.write(sentence)
    if show:
        refuse(sentence)
        sys.stderr.flush()
