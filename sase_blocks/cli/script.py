"""``sase-blocks run``: run any script with our models in timm's registry."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

__all__ = ['run_script']


def run_script(script: str, arguments: Sequence[str]) -> None:
    """Run a script in this process as `python SCRIPT ARGS...` would, and exit with its code."""
    if not Path(script).is_file():
        raise FileNotFoundError(f'there is no script {script}')
    before = sys.argv, sys.path[:]
    sys.argv = [script, *arguments]
    if not getattr(sys.flags, 'safe_path', False):  # python -P, from 3.11 on
        sys.path[0] = str(Path(script).resolve().parent)
    try:
        runpy.run_path(script, run_name='__main__')
    except Exception as error:
        # As Python prints it: drop the traceback frames above the script.
        trace = error.__traceback__
        while trace is not None and Path(trace.tb_frame.f_code.co_filename).absolute() != Path(script).absolute():
            trace = trace.tb_next
        error.__traceback__ = trace
        sys.excepthook(type(error), error, trace)
        raise SystemExit(1) from None
    finally:
        sys.argv, sys.path[:] = before
