"""Commands of besa in this process, which spares the seconds that a new one takes to begin."""

import contextlib
import io
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from besa.cli import main


def called(*arguments: object, folder: Path | None = None) -> subprocess.CompletedProcess[str]:
    """What a command leaves and says, in the present folder or another; any exception but an exit is a bug."""
    out, err = io.StringIO(), io.StringIO()
    command, code = ["besa", *map(str, arguments)], 0
    with contextlib.ExitStack() as stack:
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        patch.setattr(sys, "argv", command)
        patch.setattr(warnings, "showwarning", warnings.showwarning)  # main() changes it
        patch.setenv("COLUMNS", "200")
        if folder is not None:
            stack.enter_context(contextlib.chdir(folder))
        stack.enter_context(contextlib.redirect_stdout(out))
        stack.enter_context(contextlib.redirect_stderr(err))
        try:
            main()
        except SystemExit as end:
            code = int(end.code or 0)
    return subprocess.CompletedProcess(command, code, out.getvalue(), err.getvalue())
