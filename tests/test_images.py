"""Image files: how each kind of pixel is decoded, what is refused, and how a picture lies."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image
from test_data import make_images, remove

from sase_blocks.data import (
    Samples,
    inspect_images,
    open_split,
)
from sase_blocks.images import ImageFiles, decode_image


def stored(image, suffix, **options):
    file = io.BytesIO()
    image.save(file, suffix, **options)
    return file.getvalue()


def twelve_bits(values):
    """A TIFF that states 12 bits a sample, two samples in three bytes."""
    height, width = values.shape
    pairs = values.reshape(-1, 2).astype(np.uint32)
    packed = (pairs[:, 0] << 12) | pairs[:, 1]
    pixels = b''.join(int(pair).to_bytes(3, 'big') for pair in packed)
    tags = [(256, width), (257, height), (258, 12), (259, 1), (262, 1), (273, 8), (277, 1), (278, height)]
    entries = b''.join(struct.pack('<HHII', tag, 4, 1, value) for tag, value in [*tags, (279, len(pixels))])
    return b'II*\0' + struct.pack('<I', 8 + len(pixels)) + pixels + struct.pack('<H', 9) + entries + bytes(4)


def sixteen_bit_png(values, kind):
    """Grey with alpha (kind 4), RGB (2) or RGBA (6) of 16 bits, which Pillow reads and does not write."""
    height, width = values.shape
    pixels = np.repeat(values[..., None], {4: 2, 2: 3, 6: 4}[kind], 2).astype('>u2')
    if kind != 2:
        pixels[..., -1] = 65535
    header = struct.pack('>IIBBBBB', width, height, 16, kind, 0, 0, 0)
    chunks = {b'IHDR': header, b'IDAT': zlib.compress(b''.join(b'\0' + row.tobytes() for row in pixels)), b'IEND': b''}
    return b'\x89PNG\r\n\x1a\n' + b''.join(
        struct.pack('>I', len(body)) + name + body + struct.pack('>I', zlib.crc32(name + body))
        for name, body in chunks.items()
    )


def sixteen_bit_tiff(values):
    """RGB of 16 bits, which Pillow reads and does not write."""
    height, width = values.shape
    pixels = np.repeat(values[..., None], 3, 2).astype('<u2').tobytes()
    bits = 8 + len(pixels)
    tags = [(256, 1, width), (257, 1, height), (258, 3, bits), (259, 1, 1), (262, 1, 2), (273, 1, 8), (277, 1, 3)]
    tags += [(278, 1, height), (279, 1, len(pixels))]
    entries = b''.join(struct.pack('<HHII', tag, 3 if tag == 258 else 4, *rest) for tag, *rest in tags)
    head = b'II*\0' + struct.pack('<I', bits + 6)
    return head + pixels + struct.pack('<HHH', 16, 16, 16) + struct.pack('<H', 9) + entries + bytes(4)


RAMP = np.linspace(0, 65535, 48).round().astype(np.uint16).reshape(6, 8)
EIGHT = (RAMP / 257).round().astype(np.uint8)  # what the ramp is in 8 bits


@pytest.mark.parametrize(
    ('content', 'largest'),
    [
        (lambda: stored(Image.fromarray(RAMP), 'png'), 65535),
        (lambda: stored(Image.fromarray(RAMP), 'tiff'), 65535),
        (lambda: stored(Image.fromarray(RAMP.astype('>u2')), 'tiff'), 65535),
        (lambda: b'P5 8 6 65535\n' + RAMP.astype('>u2').tobytes(), 65535),
        (lambda: sixteen_bit_png(RAMP, 4), 65535),
        (lambda: sixteen_bit_png(RAMP, 2), 65535),
        (lambda: sixteen_bit_png(RAMP, 6), 65535),
        (lambda: sixteen_bit_tiff(RAMP), 65535),
        (lambda: twelve_bits(RAMP >> 4), None),
        (lambda: stored(Image.fromarray(EIGHT), 'png'), None),
        (lambda: stored(Image.fromarray(EIGHT).convert('LA'), 'png'), None),
        (lambda: stored(Image.fromarray(EIGHT).convert('RGBA'), 'png'), None),
        (lambda: stored(Image.fromarray(EIGHT).convert('CMYK'), 'tiff'), None),
        (lambda: stored(Image.fromarray(EIGHT).convert('P'), 'png', transparency=bytes(range(256))), None),
        (lambda: stored(Image.fromarray(EIGHT).convert('P'), 'png', transparency=3), None),
        (lambda: Image.fromarray(RAMP), 65535),
        (lambda: Image.fromarray(EIGHT), None),
    ],
    ids=[
        'png16',
        'tiff16',
        'tiff16 big endian',
        'pgm16',
        'LA16',
        'RGB16',
        'RGBA16',
        'RGB16 tiff',
        'tiff12',
        'L',
        'LA',
        'RGBA',
        'CMYK',
        'P',
        'P3',
        'I;16',
        'Lm',
    ],
)
@pytest.mark.parametrize('mode', ['L', 'RGB'])
def test_pixels_keep_their_place_in_the_range(content, largest, mode):
    image, found = decode_image(content(), mode)
    assert (image.mode, found) == (mode, largest)
    pixels = np.asarray(image).reshape(6, 8, -1)
    np.testing.assert_allclose(pixels, np.broadcast_to(EIGHT[..., None], pixels.shape), atol=1)


@pytest.mark.parametrize('mode', ['L', 'RGB'])
def test_one_bit_is_black_and_white(mode):
    image, _ = decode_image(stored(Image.fromarray(EIGHT > 99), 'png'), mode)
    assert (np.asarray(image).reshape(6, 8, -1) == np.where(EIGHT > 99, 255, 0)[..., None]).all()


@pytest.mark.parametrize(
    ('array', 'says'),
    [
        (RAMP.astype(np.float32), '32-bit floating-point pixels have no known range'),
        (RAMP.astype(np.float32) / 65535, '32-bit floating-point pixels have no known range'),
        (RAMP.astype(np.int32), '32-bit integer pixels have no known range'),
    ],
)
def test_pixels_without_a_range_are_refused_by_name(tmp_path, array, says):
    root = make_images(tmp_path)
    Image.fromarray(array).save(root / 'train/dog/deep.tif')
    train = open_split(root)
    (text,) = inspect_images(train)[0].values()
    assert says in text
    assert 'deep.tif' in text
    with pytest.raises(ValueError, match=rf'dog.deep\.tif: {says}.*save it with 8 or 16 bits'):
        train.load(8)


def test_twelve_bits_in_sixteen_are_refused_where_all_are(tmp_path):
    """A file does not tell them from a dark image, a set of images does."""
    root = make_images(tmp_path)
    for i, most in enumerate((4095, 1000)):
        Image.fromarray((RAMP.astype(np.uint32) * most // 65535).astype(np.uint16)).save(root / f'train/dog/1{i}.png')
    broken, fingerprint = inspect_images(open_split(root))
    assert [text.split(': ')[1] for text in broken.values()] == [
        f'a 16-bit image of values up to {most} among 16-bit images that all stay below 4096, so nearly black'
        for most in (4095, 1000)
    ]
    remove(root, 'train/dog/1?.png')
    assert inspect_images(open_split(root)) == ({}, fingerprint)
    Image.fromarray(RAMP >> 5).save(root / 'train/dog/10.png')
    Image.fromarray(RAMP).save(root / 'train/dog/11.png')
    assert inspect_images(open_split(root))[0] == {}


@pytest.mark.parametrize('kind', [4, 2, 6, 'tiff'])
def test_twelve_bits_in_sixteen_are_refused_in_colour_and_with_alpha(tmp_path, kind):
    def save(values):
        content = sixteen_bit_tiff(values) if kind == 'tiff' else sixteen_bit_png(values, kind)
        (root / 'train/dog/10.png').write_bytes(content)
        return inspect_images(open_split(root))[0]

    root = make_images(tmp_path)
    (text,) = save(RAMP >> 4).values()
    assert '10.png: a 16-bit image of values up to 4095 among 16-bit images' in text
    assert save(RAMP >> 3) == {}
    assert save(RAMP) == {}


UPRIGHT = np.repeat(np.repeat(np.arange(6, dtype=np.uint8).reshape(2, 3) * 40, 16, 0), 16, 1)
TURNED = {  # how a picture lies in a file that states this orientation
    1: UPRIGHT, 2: UPRIGHT[:, ::-1], 3: UPRIGHT[::-1, ::-1], 4: UPRIGHT[::-1],
    5: UPRIGHT.T, 6: np.rot90(UPRIGHT), 7: UPRIGHT[::-1, ::-1].T, 8: np.rot90(UPRIGHT, -1),
}  # fmt: skip


@pytest.mark.parametrize('orientation', TURNED)
def test_orientation_of_exif_is_applied(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    for suffix, mode in (
        ('jpeg', 'L'),
        ('jpeg', 'RGB'),
        ('png', 'L'),
        ('png', 'I;16'),
        ('tiff', 'RGB'),
        ('webp', 'RGB'),
    ):
        lying = np.ascontiguousarray(TURNED[orientation])
        picture = Image.fromarray(lying.astype(np.uint16) * 257 if mode == 'I;16' else lying)
        picture = picture if mode == 'I;16' else picture.convert(mode)
        content = stored(picture, suffix, exif=exif)
        for wanted in ('L', 'RGB'):
            image, _ = decode_image(content, wanted)
            np.testing.assert_allclose(np.asarray(image.convert('L')).astype(int), UPRIGHT, atol=12)
    (tmp_path / 'a.jpg').write_bytes(stored(Image.fromarray(TURNED[orientation].copy()), 'jpeg', exif=exif))
    samples = Samples(ImageFiles(str(tmp_path), [(str(tmp_path / 'a.jpg'), 0)]), ['a'], [0], 'train')
    assert samples.load(0)[0].size == (48, 32)


@pytest.mark.parametrize(
    'exif', [b'Exif\0\0nonsense', b'Exif\0\0MM\0*\0\0\0\x08\xff\xff', b'\xff' * 40], ids=['text', 'cut', 'bytes']
)
@pytest.mark.filterwarnings('ignore')  # Pillow may warn of it
def test_broken_exif_is_no_broken_image(exif):
    image, _ = decode_image(stored(Image.fromarray(UPRIGHT), 'jpeg', exif=exif), 'L')
    assert image.size == (48, 32)
