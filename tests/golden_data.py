"""The authors' numbers in tests/golden, as tensors."""

from functools import cache
from pathlib import Path

import numpy as np
import torch

GOLDEN = Path(__file__).parent / 'golden'


@cache
def load(name: str) -> dict[str, torch.Tensor | list[str]]:
    with np.load(GOLDEN / name) as file:
        return {
            key: file[key].tolist() if file[key].dtype.kind == 'U' else torch.from_numpy(file[key])
            for key in file.files
        }


def section(name: str, prefix: str) -> dict:
    return {key[len(prefix) :]: value for key, value in load(name).items() if key.startswith(prefix)}
