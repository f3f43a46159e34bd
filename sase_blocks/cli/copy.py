"""``sase-blocks copy``: copy blocks into one file that needs only torch, and compare such a file with the library."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sase_blocks.copying import check_copy, copy_blocks
from sase_blocks.reading import printable
from sase_blocks.runs import say

__all__ = ['EXIT_CODES', 'run_copy']

EXIT_CODES = {'unchanged': 0, 'out of date': 3, 'changed by hand': 4}


def run_copy(blocks: Sequence[str], out: str | None, check: str | None, overwrite: bool) -> int:
    """Write or check a copied file. Returns the exit code."""
    if check is not None:
        if blocks or out is not None or overwrite:
            raise ValueError('--check FILE takes no block and no other option, because the file names its command')
        return check_file(Path(check))
    if not blocks or out is None:
        raise ValueError('pass the blocks to copy and -o FILE, or --check FILE; `sase-blocks list` lists the blocks')
    path = Path(out)
    if path.suffix != '.py' or not path.stem.isidentifier():
        raise ValueError(f'a copy must be a .py file with the name of a module, got {out!r}')
    if not path.parent.is_dir():
        raise FileNotFoundError(f'there is no folder {path.parent}')
    text = copy_blocks(blocks, path.name)
    if path.exists() and not overwrite:
        raise FileExistsError(f'{out} exists; pass --overwrite to replace it')
    path.write_text(text, encoding='utf-8', newline='\n')
    say(f'written: {out}, {len(text.splitlines())} lines')
    return 0


def check_file(path: Path) -> int:
    """Print how a copied file compares with the library. Returns the exit code."""
    try:
        result, diff = check_copy(path.read_text(encoding='utf-8'))
    except UnicodeDecodeError:
        raise ValueError(f'{path} is not a file of sase-blocks copy: it is no UTF-8 text') from None
    except ValueError as error:
        raise ValueError(f'{path}: {error}') from None
    if diff:
        print(printable(diff, '\n'))
    hint = '; to update it, run the command in its header with --overwrite' if result == 'out of date' else ''
    say(f'{path}: {result}{hint}')
    return EXIT_CODES[result]
