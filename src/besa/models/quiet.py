"""What transformers and its readers say, kept out of the terminal or made one sentence."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, redirect_stderr
from traceback import clear_frames

import torch
from huggingface_hub.utils import logging as hub_logging
from transformers.utils import logging as transformers_logging

from besa.errors import BesaError


@contextmanager
def quiet() -> Iterator[None]:
    """Keep the progress bars and warnings of transformers and huggingface_hub out of the terminal."""
    bars, level = transformers_logging.is_progress_bar_enabled(), transformers_logging.get_verbosity()
    of_hub = hub_logging.get_verbosity()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity(logging.ERROR)
    hub_logging.set_verbosity(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers_logging.set_verbosity(level)
        hub_logging.set_verbosity(of_hub)
        if bars:
            transformers_logging.enable_progress_bar()


def without_bars() -> AbstractContextManager[object]:
    """Hide the progress bars of the readers of .gguf files and of codes, which no setting turns off."""
    return redirect_stderr(io.StringIO())


@contextmanager
def model_explained(name: str) -> Iterator[None]:
    """Turn any exception of transformers about a damaged, missing or foreign checkpoint into one sentence.

    transformers reads with a pool of threads. If Ctrl-C comes while one starts, Python does not know of it: at the end
    it would wait for the thread without ever telling it to end. A pool that nothing holds any more ends its threads, so
    what the interrupted calls hold is dropped here.
    """
    try:
        yield
    except KeyboardInterrupt as interruption:
        clear_frames(interruption.__traceback__)
        raise
    except (MemoryError, torch.OutOfMemoryError, BesaError):
        raise
    except (Exception, SystemExit) as error:  # transformers, safetensors and huggingface_hub share no base class
        reason = " ".join(str(error).split()).rstrip(".")
        if "trust_remote_code" in reason:
            reason = "it needs model code of its own; pass --trust-remote-code if you trust it"
        raise BesaError(
            f"Model {name} cannot be read: {reason[:300] or type(error).__name__}"
            f"{': mend it, or get the model anew' if reason.endswith('is not a valid JSON file') else ''}."
        ) from error
