"""``sase-blocks search trionet``: find a network of convolutions and attention for your own data and budget."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from sase_blocks.runs import is_main, say

from .options import add_ray_options, add_settings, check_demo, ray_of

__all__ = ['add_trionet']

EXAMPLES = """
examples:
  sase-blocks search trionet --demo                                  a few minutes on handwritten digits
  sase-blocks search trionet --data DIR --max-macs 300M              a network within a budget, with weights
  sase-blocks search trionet --data DIR --space cifar --max-macs 40M --finetune 20
  sase-blocks search trionet --data DIR --max-ms 5 --resume          another budget, the same supernet
  sase-blocks search trionet --data DIR --space my_space.json --max-params 2M
  sase-blocks search trionet --data DIR --max-macs 300M --algorithm random --resume
  sase-blocks search trionet --data DIR --max-macs 300M --resume --ray auto
  torchrun --nproc-per-node 8 -m sase_blocks search trionet --data DIR ...

DIR holds train/CLASS/*.jpg, and val/CLASS/*.jpg (or validation/ or test/) for one test at the end. The result is
architecture.json and network.pt in --out:
  timm.create_model('trionet', architecture='OUT/architecture.json', checkpoint_path='OUT/network.pt', num_classes=N)
The search trains a supernet and then scores networks of it, with --ray on many GPUs and machines. The same command with
--resume continues a stopped search.
"""


def add_trionet(command: Callable[..., argparse.ArgumentParser]) -> None:
    """Add the command's parser; ``command(name, run, help, epilog)`` makes one."""
    from sase_blocks.search.trionet.config import TrioConfig

    sub = command('trionet', _search_trionet, 'search for a network of convolutions and attention', EXAMPLES)
    add_settings(sub, TrioConfig, leave_out=('data',))
    sub.add_argument('--data', metavar='DIR', help='folder with train/CLASS/* in it, or the root of --dataset')
    sub.add_argument('--demo', action='store_true', help='a small search on handwritten digits, with its own settings')
    add_ray_options(sub, 'the scoring of networks')


def _search_trionet(
    demo: bool, data: str | None, ray: str | None, ray_gpus: float | None, ray_retries: int, **settings: Any
) -> None:
    from sase_blocks.search.trionet import TrioConfig, search

    if demo:
        check_demo(TrioConfig, {'data': data, 'ray': ray, 'ray_gpus': ray_gpus, **settings})
        from sase_blocks.demo import run_trionet_demo

        run_trionet_demo(settings['out'], seed=settings['seed'])
        return
    if data is None:
        raise ValueError('--data DIR is missing: pass a folder with train/CLASS/* in it, or use --demo')
    config = TrioConfig(data=data, **settings)
    search(config, ray=ray_of(ray, ray_gpus, ray_retries, config.cpu))
    if is_main():
        say(f'written: {config.out}/architecture.json and network.pt')
