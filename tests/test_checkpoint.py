"""Checkpoint files: what is read, what is refused and never run, and what a failing write leaves behind."""

import os
import pickle
import resource
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from sase_blocks.checkpoint import read_checkpoint, save_checkpoint


class Hostile:
    """Unpickled in the ordinary way, it makes a folder of this name in the working directory."""

    def __reduce__(self):
        return os.mkdir, ('was_run',)


def write(path: Path, what: str) -> None:
    torch.save({'state_dict': {'weight': torch.arange(1000.0)}}, path)
    data = path.read_bytes()
    if what in ('hostile', 'hostile, old format'):
        torch.save({'state_dict': Hostile()}, path, _use_new_zipfile_serialization=what == 'hostile')
    elif what == 'hostile pickle':
        path.write_bytes(pickle.dumps({'state_dict': Hostile()}))
    elif what == 'a whole module':
        torch.save({'model': nn.Linear(2, 2)}, path)
    elif what == 'numpy array of objects':
        torch.save({'a': np.array([Hostile()], dtype=object)}, path)
    elif what == 'a list':
        torch.save([torch.ones(2)], path)
    else:
        cases = {
            'truncated': data[:-100],
            'cut in half': data[: len(data) // 2],
            'damaged': bytes(200) + data[200:],
            'empty': b'',
            'a web page': b'<!DOCTYPE html><html><body>404 not found</body></html>',
        }
        path.write_bytes(cases[what])


@pytest.mark.parametrize(
    ('what', 'says'),
    [
        ('hostile', r'refused to load .*posix\.mkdir|nt\.mkdir'),
        ('hostile, old format', r'refused to load .*mkdir'),
        ('hostile pickle', 'refused to load .*nothing in it was run'),
        ('a whole module', r'refused to load .*torch\.nn\.modules\.linear\.Linear'),
        ('numpy array of objects', 'refused to load'),
        ('a list', 'holds a list, expected a dict'),
        ('truncated', r'truncated, damaged or no checkpoint \(\d+ bytes'),
        ('cut in half', 'truncated, damaged or no checkpoint'),
        ('damaged', 'it is damaged or'),
        ('empty', r'truncated, damaged or no checkpoint \(0 bytes'),
        ('a web page', r'model\.pt'),
    ],
)
def test_bad_file_is_one_clear_error_and_runs_nothing(tmp_path, monkeypatch, what, says):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / 'model.pt', what)
    with pytest.raises(ValueError, match=says) as caught:
        read_checkpoint(tmp_path / 'model.pt')
    assert 'model.pt' in str(caught.value)
    with pytest.raises(ValueError, match=r'; start over$'):
        read_checkpoint(tmp_path / 'model.pt', advice='start over')
    assert 'weights_only' not in str(caught.value), "torch's advice to switch the safety off must not be passed on"
    assert not (tmp_path / 'was_run').exists()
    if 'hostile' in what:  # that the file would do harm if it were trusted
        if what == 'hostile pickle':
            pickle.loads((tmp_path / 'model.pt').read_bytes())
        else:
            torch.load(tmp_path / 'model.pt', weights_only=False)
        assert (tmp_path / 'was_run').exists()


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match=r'there is no checkpoint .*nowhere\.pt'):
        read_checkpoint(tmp_path / 'nowhere.pt')
    with pytest.raises(ValueError, match='is a folder'):
        read_checkpoint(tmp_path)
    os.mkfifo(tmp_path / 'pipe')
    for path in (tmp_path, tmp_path / 'pipe'):
        with pytest.raises(ValueError, match=r'expected a checkpoint file; start over$'):
            read_checkpoint(path, advice='start over')


@pytest.mark.parametrize('new_format', [True, False])
def test_numpy_numbers_are_read(tmp_path, new_format):
    """As in the authors' files: {'epoch', 'state_dict', 'best_acc_top1', 'optimizer'}."""
    numbers = {'best_acc_top1': np.float64(76.5), 'f': np.float32(0.5), 'i': np.int64(-3), 'b': np.bool_(True)}
    state = {'epoch': 7, 'state_dict': {'w': torch.ones(2)}, **numbers}
    torch.save(state, tmp_path / 'a.pth', _use_new_zipfile_serialization=new_format)
    read = read_checkpoint(tmp_path / 'a.pth')
    assert read['epoch'] == 7
    torch.testing.assert_close(read['state_dict']['w'], torch.ones(2))
    assert {name: read[name] for name in numbers} == numbers


def test_safetensors(tmp_path):
    save_file({'w': torch.arange(3.0)}, tmp_path / 'a.safetensors')
    torch.testing.assert_close(read_checkpoint(tmp_path / 'a.safetensors')['w'], torch.arange(3.0))
    (tmp_path / 'a.safetensors').write_bytes(b'\xff' * 40)
    with pytest.raises(ValueError, match='truncated, damaged or no checkpoint'):
        read_checkpoint(tmp_path / 'a.safetensors')


def test_save_replaces_the_file_and_a_stale_temporary(tmp_path):
    path = tmp_path / 'last.pt'
    (tmp_path / 'last.pt.tmp').write_bytes(b'left by a killed process')
    for value in (1.0, 2.0):
        save_checkpoint({'w': torch.full((3,), value), 'epoch': int(value)}, path)
    assert read_checkpoint(path)['epoch'] == 2
    assert os.listdir(tmp_path) == ['last.pt']


def test_save_into_a_missing_folder_and_of_what_cannot_be_saved(tmp_path):
    with pytest.raises(OSError, match=r'could not write the checkpoint .*last\.pt.*nothing was left behind'):
        save_checkpoint({'a': 1}, tmp_path / 'missing' / 'last.pt')
    with pytest.raises((AttributeError, pickle.PicklingError)):
        save_checkpoint({'a': lambda: None}, tmp_path / 'last.pt')
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize('limit', [0, 1_000, 390_000, 400_500])
def test_full_disk_keeps_the_last_good_file(tmp_path, limit):
    """A limit on the size of files stands in for a full disk: the write fails at the start, in the middle, at the end.

    Python ignores SIGXFSZ, so what arrives is an OSError, as with ENOSPC.
    """
    path = tmp_path / 'last.pt'
    save_checkpoint({'epoch': 1}, path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(OSError, match=r'could not write .*last\.pt.*the last good one is still there'):
            save_checkpoint({'epoch': 2, 'w': torch.zeros(100_000)}, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert read_checkpoint(path) == {'epoch': 1}
    assert os.listdir(tmp_path) == ['last.pt']
    save_checkpoint({'epoch': 2, 'w': torch.zeros(100_000)}, path)  # there is room again
    assert read_checkpoint(path)['epoch'] == 2
