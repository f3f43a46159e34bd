"""The data of a search: how a training set is split, and which part is augmented."""

from dataclasses import replace

import pytest
import torch
from test_data import make_images, truncate
from test_search_run import CLASSES, SMALL, pictures

from sase_blocks.data import SmallImages, TransformedSamples, inspect_images, open_split
from sase_blocks.search.data import check_arrays, describe_data, shuffle_labels, split_classes, split_data
from sase_blocks.search.sase import SearchConfig, search

MEAN_STD = {'mean': (0.5, 0.4, 0.3), 'std': (0.2, 0.3, 0.4), 'interpolation': 'bilinear', 'crop_pct': 0.9}


def config(**changes):
    return SearchConfig('', **{'fraction': 0.5, 'hflip': 0.5, 'seed': 3, 'batch_size': 4, 'workers': 0, **changes})


def all_images(part, epoch):
    """The sums of the images of one epoch, sorted, so that order does not matter."""
    return torch.cat([images for images, _ in part.epoch(epoch, 4, 0, len(part) // 4)]).flatten(1).sum(1).sort()[0]


@pytest.mark.parametrize('kind', ['arrays', 'small files', 'large files'])
def test_both_parts_have_all_classes_and_one_is_augmented(tmp_path, kind):
    size = 72 if kind == 'large files' else 12
    if kind == 'arrays':
        data, facts = pictures(), None
    else:
        data = open_split(make_images(tmp_path, train=8))
        facts = {'input_size': (3, size, size), **MEAN_STD}
    both = split_data(data, config(), facts)
    count = len(both.training)
    assert (
        both.facts['weights'] == both.facts['held_out'] == len(both.held_out) == count == (48 if facts is None else 12)
    )
    labels = data[1] if facts is None else torch.tensor(data.labels())
    assert torch.bincount(labels[both.facts['held_out_indices']]).tolist() == [count // 3] * 3
    for part in (both.training, both.held_out):
        assert isinstance(part.images, TransformedSamples if kind == 'large files' else SmallImages)
        images, seen = zip(*part.epoch(0, 4, 0, count // 4), strict=True)
        assert torch.bincount(torch.cat(seen)).tolist() == [count // 3] * 3
        assert images[0].shape == (4, 3, size, size)
    assert torch.equal(all_images(both.held_out, 0), all_images(both.held_out, 1))
    assert not torch.equal(all_images(both.training, 0), all_images(both.training, 1))
    if facts is None:
        images = data[0][[i for i in range(96) if i not in set(both.facts['held_out_indices'])]].float() / 255
        torch.testing.assert_close(both.training.images.mean.flatten() / 255, images.mean((0, 2, 3)))
    else:
        assert both.facts['fingerprint'] == inspect_images(data)[1]
    assert describe_data(both.facts).startswith(f'{count} training and {count} held-out images of 3 classes (data ')


@pytest.mark.parametrize('kind', ['arrays', 'large files'])
def test_random_labels_keep_their_counts(tmp_path, kind):
    data, facts = pictures(), None
    if kind == 'large files':
        data = open_split(make_images(tmp_path, train=8))
        facts = {'input_size': (3, 72, 72), **MEAN_STD}
    labels = [
        torch.cat([labels for _, labels in split_data(data, config(), facts, null=null).held_out.once(4)])
        for null in (False, True)
    ]
    assert torch.equal(*map(torch.bincount, labels))
    assert not torch.equal(*labels)
    _, labels, classes = pictures()
    parts = split_classes(labels, classes, 0.5, 0)
    new = shuffle_labels(labels, parts, 0)
    assert (new != labels).double().mean() > 0.4
    for part in parts:
        assert torch.equal(torch.bincount(new[part]), torch.bincount(labels[part]))


@pytest.mark.parametrize(
    ('counts', 'fraction', 'expected'),
    [([4, 4], 0.5, [2, 2]), ([4, 10], 0.8, [3, 8]), ([2, 2], 0.99, [1, 1]), ([2, 3], 0.01, [1, 1])],
)
def test_share_of_each_class(counts, fraction, expected):
    labels = torch.repeat_interleave(torch.arange(2), torch.tensor(counts))
    parts = split_classes(labels, ['a', 'b'], fraction, 0)
    assert torch.bincount(labels[parts[0]]).tolist() == expected
    assert sorted(parts[0] + parts[1]) == list(range(len(labels)))
    assert parts == split_classes(labels, ['a', 'b'], fraction, 0)
    assert max(counts) < 4 or parts != split_classes(labels, ['a', 'b'], fraction, 1)


def test_wrong_data():
    images, labels, classes = pictures()
    for data, changes, says in (
        ((images, torch.where(labels == 2, 1, labels), classes), {}, "class 'striped' has 0 training images"),
        ((images, labels, [*classes, 'none']), {}, "class 'none' has 0 training images, a split in two parts needs 2"),
        ((images.float(), labels, classes), {}, 'expected uint8 images .* got torch.float32'),
        ((images[0], labels, classes), {}, r'expected uint8 images .* got torch.uint8 \(3, 12, 12\)'),
        ((images, labels[1:], classes), {}, 'and 95 labels'),
        ((images, labels, classes), {'batch_size': 64}, '48 training images are fewer than one batch of 64'),
        ((images, labels, classes), {'fraction': 0.97}, '3 held-out images are fewer than one batch of 4'),
    ):
        with pytest.raises(ValueError, match=says):
            split_data(data, config(**changes))
    assert len(split_data((images, labels, classes), config(fraction=0.97), trains_on_both=False).held_out) == 3
    check_arrays(images, labels)
    assert classes == CLASSES


@pytest.mark.slow
def test_samples_given_to_a_search_are_checked_once(tmp_path):
    """Broken images are named, or left out, before any work, even if another check is switched off."""
    root = make_images(tmp_path / 'images', train=6, val=1, classes=('cat', 'dog'))
    truncate(root / 'train/dog/3.png')
    samples = open_split(root)
    settings = SearchConfig(**{**SMALL, 'img_size': 72, 'batch_size': 2, 'epochs': 1, 'hessian_every': 0})
    with pytest.raises(ValueError, match=r'broken image .*dog.3\.png.*--skip-broken'):
        search(replace(settings, out=str(tmp_path / 'named')), samples)
    assert not (tmp_path / 'named' / 'last.pt').exists()
    result = search(replace(settings, out=str(tmp_path / 'left out'), skip_broken=True), samples)
    assert (result['data']['weights'], result['data']['held_out']) == (5, 6)
