"""The ways to load a file through timm that the documentation names: weights arrive, and no code of a file runs."""

import os
import pickle
from pathlib import Path

import pytest
import timm
import torch
from timm.models import load_checkpoint, load_state_dict, resume_checkpoint, save_for_hf
from timm.utils import ModelEma
from torch import nn

import sase_blocks
from sase_blocks.checkpoint import read_checkpoint

NAME, CLASSES = 'resnet20_cifar', {'num_classes': 2}
FILE = 'folder/pytorch_model.bin'


class Hostile:
    """Unpickled in the ordinary way, it makes a folder of this name in the working directory."""

    def __reduce__(self):
        return os.mkdir, ('was_run',)


def small() -> nn.Module:
    return timm.create_model(NAME, **CLASSES)


def into(load):
    """A loader that fills a model which is there already."""

    def loaded() -> nn.Module:
        model = small()
        return load(model) or model

    return loaded


def from_the_hub() -> nn.Module:
    return timm.create_model(
        NAME, **CLASSES, pretrained=True, pretrained_cfg_overlay={'hf_hub_id': 'user/name', **CLASSES}
    )


WAYS = {
    'checkpoint_path': lambda: timm.create_model(NAME, **CLASSES, checkpoint_path=FILE),
    'overlay': lambda: timm.create_model(
        NAME, **CLASSES, pretrained=True, pretrained_cfg_overlay={'file': FILE, **CLASSES}
    ),
    'local-dir': lambda: timm.create_model('local-dir:folder', pretrained=True),
    'hf-hub': from_the_hub,
    # Of timm's scripts: --initial-checkpoint, --resume, validation, the moving average.
    'load_checkpoint': into(lambda model: load_checkpoint(model, FILE) and None),
    'resume_checkpoint': into(lambda model: resume_checkpoint(model, FILE) and None),
    'load_state_dict': into(lambda model: model.load_state_dict(load_state_dict(FILE)) and None),
    'ModelEma': into(lambda model: ModelEma(model, resume=FILE).ema),
    # Our own.
    'sase_blocks.load_checkpoint': into(lambda model: sase_blocks.load_checkpoint(model, FILE) and None),
    'read_checkpoint': into(lambda model: model.load_state_dict(read_checkpoint(FILE)['state_dict']) and None),
}

HOSTILE = {
    'zip': lambda state: torch.save(state, FILE),
    'old format': lambda state: torch.save(state, FILE, _use_new_zipfile_serialization=False),
    'pickle': lambda state: Path(FILE).write_bytes(pickle.dumps(state, protocol=2)),
}


@pytest.fixture
def weights(tmp_path, monkeypatch):
    """The state of a model that stands in a folder, as the Hub has it; downloads take that folder's file."""
    monkeypatch.chdir(tmp_path)
    model = small()
    save_for_hf(model, 'folder', safe_serialization=False)

    def download(repo_id, filename, **options):
        if 'safetensors' in filename:
            from huggingface_hub.utils import EntryNotFoundError

            raise EntryNotFoundError(filename)
        return FILE

    monkeypatch.setattr('timm.models._hub.hf_hub_download', download)
    return model.state_dict()


def test_weights_arrive_by_each_way(weights):
    torch.save({'state_dict': weights, 'state_dict_ema': weights, 'epoch': 1}, FILE)
    for way, load in WAYS.items():
        loaded = load().state_dict()
        assert all(torch.equal(loaded[key], value) for key, value in weights.items()), way


@pytest.mark.parametrize('write', HOSTILE.values(), ids=HOSTILE)
def test_nothing_in_a_file_runs_by_any_way(write, weights, tmp_path):
    write({'state_dict': weights, 'state_dict_ema': weights, 'epoch': Hostile()})
    for way, load in WAYS.items():
        with pytest.raises(
            (RuntimeError, ValueError, pickle.UnpicklingError), match=r'(?i)weights.only|refused to load'
        ):
            load()
        assert not (tmp_path / 'was_run').exists(), way
    # The same file does harm when it is trusted.
    with open(FILE, 'rb') as file:
        pickle.load(file) if write is HOSTILE['pickle'] else torch.load(file, weights_only=False)
    assert (tmp_path / 'was_run').exists()
