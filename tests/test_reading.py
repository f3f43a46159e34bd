"""Text from users and files: what is read, what raises a one-line error, and how a message shows it."""

import os

import pytest

from sase_blocks.blocks import Genotype
from sase_blocks.models import Architecture
from sase_blocks.models.trionet import read_architecture
from sase_blocks.reading import one_line, parse_json, printable, quoted, read_text, shorten
from sase_blocks.search.sase.space import SearchSpace
from sase_blocks.search.trionet.space import TrioSpace


def recursive():
    value = []
    for _ in range(100_000):
        value = [value]
    return value


def test_a_message_shows_a_line():
    assert quoted('a\nb') == r"'a\nb'"
    assert quoted({'a': [1]}) == "{'a': [1]}"
    long = quoted('x' * 100_000)
    assert len(long) == 100
    assert '(100,002 characters)' in long
    assert quoted(recursive()) == 'a deeply nested list'
    assert shorten('x' * 100) == 'x' * 100
    assert one_line(KeyError('a')) == "'a'"
    assert one_line(EOFError()) == 'EOFError'
    assert one_line(RuntimeError('two\n\tlines ')) == 'two lines'
    assert len(one_line(RuntimeError('x' * 5000))) == 1000
    torch_error = RuntimeError(
        'too large\nException raised from f at a.cpp:79 (most recent call first):\nframe #0: g()'
    )
    assert one_line(torch_error) == 'too large'
    caught = 'Caught RuntimeError.\nTraceback (most recent call last):\n  File ...\nRuntimeError: no'
    assert one_line(RuntimeError(caught)) == 'RuntimeError: no'


@pytest.mark.parametrize(
    ('text', 'shown'),
    [
        ('a\x1b[31mb', r'a\x1b[31mb'),
        ('\x07\r\x9b\x7f\u202e\u2028', r'\x07\r\x9b\x7f\u202e\u2028'),
        ('\udcff', r'\udcff'),  # a name that is not UTF-8
        ('two\nlines,\ta tab', 'two\nlines,\ta tab'),
        ('Käse 10 °C 苹果', 'Käse 10 °C 苹果'),
    ],
)
def test_control_characters_are_escaped(text, shown):
    assert printable(text, keep='\n\t') == shown
    assert printable(text) == shown.replace('\n', r'\n').replace('\t', r'\t')
    printable(text).encode()


DEEP = '[' * 100_000
NESTED = '{"a":' * 400 + '1' + '}' * 400  # json reads it, but repr and copies fail
READERS = {
    'genotype': Genotype.read,
    'architecture': Architecture.read,
    'architecture by timm': read_architecture,
    'search space': lambda path: SearchSpace.parse(str(path)),
    'space': lambda path: TrioSpace.parse(str(path)),
}


@pytest.mark.parametrize('reader', READERS)
@pytest.mark.parametrize(
    'content',
    ['', ' \n', '{}', '[]', 'null', '5', '"text"', 'true', '{', DEEP, '{"a": ' + DEEP, NESTED, 'x' * 100_000,
     '{"' + 'x' * 100_000 + '": 1}', '{"genotypes": []}', '{"genotypes": [[1]]}', '{"architecture": 5}',
     '{"architecture": null}', '{"channel_squeeze": 5}',
     '{"image_size": 32, "stem": 16, "reduction": 1, "heads": 4, "stages": [{"width": 8, "blocks": 5}]}',
     b'\xff\xfe\x00', 'a folder', 'a pipe', 'nothing'],
    ids=lambda content: repr(content)[:20],
)  # fmt: skip
def test_wrong_files_are_named_in_one_line(tmp_path, reader, content):
    path = tmp_path / 'file.json'
    if content == 'a folder':
        path.mkdir()
    elif content == 'a pipe':
        os.mkfifo(path)
    elif isinstance(content, bytes):
        path.write_bytes(content)
    elif content != 'nothing':
        path.write_text(content)
    with pytest.raises(ValueError, match=r'file\.json') as caught:
        READERS[reader](path)
    assert len(str(caught.value).replace(str(tmp_path), '')) < 500
    assert '\n' not in str(caught.value)


@pytest.mark.parametrize(
    'parse',
    [Genotype.parse, Genotype.from_json, Architecture.parse, SearchSpace.parse, TrioSpace.parse],
    ids=['genotype', 'genotype in JSON', 'architecture', 'search space', 'space'],
)
@pytest.mark.parametrize('text', ['', '{', DEEP, NESTED, 'x' * 100_000], ids=lambda text: text[:5])
def test_wrong_texts_are_quoted_shortly(parse, text):
    with pytest.raises(ValueError, match=r'\w') as caught:
        parse(text)
    assert len(str(caught.value)) < 900


def test_good_files(tmp_path):
    file = tmp_path / 'a.json'
    file.write_text(' {"a": [1, {"b": null}]}\n', encoding='utf-8')
    assert parse_json(read_text(file, 'thing'), 'a thing') == {'a': [1, {'b': None}]}
    assert parse_json('[' * 20 + ']' * 20, 'a thing')
    with pytest.raises(ValueError, match='nested too deeply'):
        parse_json('[' * 21 + ']' * 21, 'a thing')
