"""Names with options: the text form, and every primitive and block with other options than the default."""

import json
import re

import pytest

from sase_blocks.ops.options import LONGEST, add_options, format_name, options_of, parse_name, split_names


def thing(channels, feat_size=None, *, size=7, ratio=0.5, mode='sum', at=(0, 0), deep=None, device=None, dtype=None):
    """Something with an option of every kind."""


def other(channels, *, size=3, **kwargs):
    pass


def plain(channels, feat_size=None, *, device=None, dtype=None):
    pass


DEFAULTS = {'size': 7, 'ratio': 0.5, 'mode': 'sum', 'at': (0, 0), 'deep': None}

# text, its options, its canonical text
READ = [
    ('thing', {}, 'thing'),
    (' thing ', {}, 'thing'),
    ('thing()', {}, 'thing'),
    ('thing(size=7)', {'size': 7}, 'thing'),
    ('thing ( ratio = 1, size=3 , )', {'ratio': 1, 'size': 3}, 'thing(size=3, ratio=1.0)'),
    ('thing(size=-3)', {'size': -3}, 'thing(size=-3)'),
    ('thing(size=0x10)', {'size': 16}, 'thing(size=16)'),
    ('thing(size=True)', {'size': True}, 'thing(size=True)'),
    ('thing(size=7.0)', {'size': 7.0}, 'thing(size=7.0)'),
    ('thing(ratio=1e-4)', {'ratio': 1e-4}, 'thing(ratio=0.0001)'),
    ('thing(ratio=0.1, deep=None)', {'ratio': 0.1, 'deep': None}, 'thing(ratio=0.1)'),
    ('thing(mode="a),(b;\'=#")', {'mode': "a),(b;'=#"}, 'thing(mode="a),(b;\'=#")'),
    ('thing(mode="\\n\\u2028ü")', {'mode': '\n\u2028ü'}, "thing(mode='\\n\\u2028ü')"),
    ('thing(at=(1, (2, "x"), ()))', {'at': (1, (2, 'x'), ())}, "thing(at=(1, (2, 'x'), ()))"),
    ('thing(at=(0, 0))', {'at': (0, 0)}, 'thing'),
    ('thing(at=(1,))', {'at': (1,)}, 'thing(at=(1,))'),
    (f'thing(size={2**63 - 1})', {'size': 2**63 - 1}, f'thing(size={2**63 - 1})'),
]


def test_a_text_is_parsed_printed_and_read_back():
    assert options_of(thing) == DEFAULTS
    assert options_of(plain) == {}
    for text, options, canonical in READ:
        assert parse_name(text) == ('thing', options), text
        assert [type(value) for value in parse_name(text)[1].values()] == [type(value) for value in options.values()]
        printed = format_name('thing', thing, options)
        assert printed == canonical
        assert '\n' not in printed
        assert format_name('thing', thing, parse_name(printed)[1]) == printed
        assert json.loads(json.dumps(printed)) == printed
        values = {**DEFAULTS, **parse_name(printed)[1]}
        assert values == {**DEFAULTS, **options}, text
        assert split_names(f'a,{printed} , b') == ['a', printed, 'b']
        assert split_names(f'a;{printed};', ';') == ['a', printed, '']


UNREADABLE = [
    'a(', 'a(b', 'a(b=', 'a(b=1', 'a(b=1))', 'a(b=1)(c=2)', 'a(b=1)(', 'a(b=1).c', 'a(b=1) + 1', 'a(b=1)#)', 'a(b=1 #)',
    'a(b=1\n)', 'a(b=1); c', 'a(b=[1)]', 'a(b=1if 1else 2)', "a(b='\\d')", 'a(=1)', 'a(b=1 c=2)', 'a(b=1, 4)',
    'a(b=\0)', 'a(b=\udcff)', 'a(b=' + '(' * 300, 'a(b=' + '(' * 300 + '1' + ')' * 300 + ')', 'a(1=2)', '((a))=1',
    'a(b=1):',
]  # fmt: skip
WRONG_TEXTS = [
    *((text, 'it cannot be parsed') for text in UNREADABLE),
    ('a(4)', 'each value needs the name of its option'),
    ('a(b==1)', 'each value needs the name of its option'),
    ('a(*b)', 'each value needs the name'),
    ('a(**{"b": 1})', 'each value needs the name'),
    ('a(b=1, b=1)', 'b is given twice'),
    ('a(b=c)', 'the value of b is not a literal'),
    ('a(b=__import__("os"))', 'not a literal'),
    ('a(b=1 if 1 else 2)', 'not a literal'),
    ('a(b=2 ** 9)', 'not a literal'),
    ('a(b=f"{c}")', 'not a literal'),
    ('a(b=lambda: 1)', 'not a literal'),
    ('a(b={[]})', 'not a literal'),
    ('a(b=' + '-' * 900 + '1)', 'b is not a literal|cannot be parsed'),
    ('a(b=[1])', 'b must be an int'),
    ('a(b={1: 2})', 'b must be an int'),
    ('a(b=b"x")', 'b must be an int'),
    ('a(b=1j)', 'b must be an int'),
    ('a(b=...)', 'b must be an int'),
    ('a(b=1e999)', 'b must be an int of at most 64 bits, a finite float'),
    ('a(b=(1, (2, -1e999)))', 'b must be an int'),
    (f'a(b={2**63})', 'at most 64 bits'),
    ('a(b=' + '9' * 990 + ')', 'at most 64 bits'),
    ('a(b=' + '9' * 100_000 + ')', f'more than {LONGEST} characters'),
    ('a(b=' + '[' * 100_000, f'more than {LONGEST} characters'),
    ('a(b="' + 'x' * LONGEST + '")', f'more than {LONGEST} characters'),
]


def test_any_other_text_is_an_error_of_one_line():
    for text, error in WRONG_TEXTS:
        with pytest.raises(ValueError, match=error) as caught:
            parse_name(text)
        assert str(caught.value).startswith('expected a name or name(option=value, ...), got ')
        assert '\n' not in str(caught.value)
        assert len(str(caught.value)) < 400


def test_names_are_split_outside_of_brackets_and_quotes():
    for text, expected in [
        ('', ['']),
        ('a', ['a']),
        (' a , b ', ['a', 'b']),
        ('a,,', ['a', '', '']),
        ('a(b=1, c=(2, 3)),d[,]{,}', ['a(b=1, c=(2, 3))', 'd[,]{,}']),
        ('a("),(\\"", \'"\'),b', ['a("),(\\"", \'"\')', 'b']),
        ('2conv_1x1(reduction=4),GAP+GMP', ['2conv_1x1(reduction=4)', 'GAP+GMP']),
    ]:
        assert split_names(text) == expected
    for text in ('(', ')', 'a(b,c', 'a(b]', '[(])', '"', "a('b", "a'", '(' * 100_000, '"' + "'" * 99_999, '"\\"'):
        with pytest.raises(ValueError, match='has no partner in') as caught:
            split_names(text)
        assert len(str(caught.value)) < 150
        assert '\n' not in str(caught.value)


def test_options_go_to_the_name_that_has_them():
    names = [('plain', plain), ('thing(ratio=2)', thing)]
    assert add_options(names, {}) == ['plain', 'thing(ratio=2.0)']
    assert add_options(names, {'size': 3}) == ['plain', 'thing(size=3, ratio=2.0)']
    assert add_options(names, {'mode': 'sum'}) == ['plain', 'thing(ratio=2.0)']
    long = 'ü' * (LONGEST // 2)
    for given, options, kind, error in [
        (names, {'siz': 3}, TypeError, "plain and thing have no option 'siz'; they have: size of thing, ratio of "),
        (names[:1], {'size': 3}, TypeError, "plain has no option 'size'; it has none"),
        (names[1:], {'siz': 3}, TypeError, "thing has no option 'siz'; it has: size, ratio, mode, at, deep"),
        ([*names, ('other', other)], {'size': 5}, TypeError, "thing and other have the option size; write it with "
         "its name, 'thing(size=5)'"),
        (names, {'ratio': 3.0}, TypeError, "ratio is given twice, in 'thing(ratio=2)' and as ratio=3.0"),
        ([('thing(siz=3)', thing)], {}, ValueError, "thing has no option 'siz'; it has: size, ratio"),
        (names, {'size': thing}, ValueError, 'thing: size must be an int of at most 64 bits'),
        (names, {'deep': float('nan')}, ValueError, 'thing: deep must be .* got nan'),
        (names, {'mode': '\u2028' * 900}, ValueError, f'more than {LONGEST} characters'),
    ]:  # fmt: skip
        with pytest.raises(kind, match=error if '.*' in error else re.escape(error)) as caught:
            add_options(given, options)
        assert '\n' not in str(caught.value)
    assert add_options(names, {'mode': long})[1] == f"thing(ratio=2.0, mode='{long}')"
