"""Names with options: the text form, and every primitive and block with other options than the default."""

import copy
import itertools
import json
import re

import pytest
import timm
import torch
from torch import nn

from sase_blocks import ChannelAttention, Genotype, SpatialAttention, create_block, insert, keep_channels
from sase_blocks.blocks import BLOCKS, ParallelAttention, block_graph, block_name
from sase_blocks.ops import EXTENDED_SETS, ChannelAvg, primitive_name, resolve_primitive
from sase_blocks.ops.options import LONGEST, add_options, format_name, options_of, parse_name, split_names
from sase_blocks.search.sase.mixed import MixedBlock
from sase_blocks.search.sase.space import SearchSpace


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
        (names, {'siz': 3}, TypeError, "no option 'siz' in plain, thing(size, ratio, mode, at, deep)"),
        (names[:1], {'size': 3}, TypeError, "plain has no option 'size'; it has none"),
        (names[1:], {'siz': 3}, TypeError, "thing has no option 'siz'; it has size, ratio, mode, at, deep"),
        ([*names, ('other', other)], {'size': 5}, TypeError, "thing, other each have an option size; write it with "
         "the name, 'thing(size=5)'"),
        (names, {'ratio': 3.0}, TypeError, "ratio is given twice, in 'thing(ratio=2)' and as ratio=3.0"),
        ([('thing(siz=3)', thing)], {}, ValueError, "thing has no option 'siz'; it has size, ratio"),
        (names, {'size': thing}, ValueError, 'thing: size must be an int of at most 64 bits'),
        (names, {'deep': float('nan')}, ValueError, 'thing: deep must be .* got nan'),
        (names, {'mode': '\u2028' * 900}, ValueError, f'more than {LONGEST} characters'),
    ]:  # fmt: skip
        with pytest.raises(kind, match=error if '.*' in error else re.escape(error)) as caught:
            add_options(given, options)
        assert '\n' not in str(caught.value)
    assert add_options(names, {'mode': long})[1] == f"thing(ratio=2.0, mode='{long}')"


# ---- primitives and blocks with other options than the defaults ----

C, SIZE = 32, (7, 6)
GENOTYPE = (
    'second_order(reduction=8),mlp(reduction=4),conv_eca(kernel_size=5),second_order(grid=4),dilated(dilation=2),'
    'conv_norm(kernel_size=3)'
)
# The set of a primitive or 'block', the name, and the number of parameters for 32 channels.
CASES = [
    ('channel_squeeze', 'second_order(reduction=8)', 4 * 4 + 4 * C + 2 * 4),
    ('channel_squeeze', 'dct(frequencies=4)', 0),
    ('channel_squeeze', 'gsop(rd_channels=8)', 5 * 8 * C + C + 4 * 8 * 8 + 9 * 8),
    ('channel_excite', 'mlp(reduction=4)', 2 * C * 8),
    ('channel_excite', 'mlp_norm(reduction=8)', 2 * C * 4 + C + 3 * 4),
    ('channel_excite', 'mlp_batch_norm(reduction=4)', 2 * C * 8 + 3 * C + 8),
    ('channel_excite', 'conv_eca(kernel_size=5)', 5),
    ('channel_excite', 'conv_eca(gamma=1, beta=2)', 7),
    ('channel_excite', 'conv_circular(kernel_size=65)', 65),
    ('channel_excite', 'conv_circular(gamma=1, beta=0)', 5),
    ('channel_excite', 'conv_mlp(reduction=2, kernel_size=5)', (5 + 2) * 16 + 1),
    ('channel_excite', 'conv_mlp(gamma=1, beta=2)', (7 + 2) * 8 + 1),
    ('spatial_squeeze', 'second_order(grid=4)', 2 * 16 + 2 * 16 * 16),
    ('spatial_squeeze', 'dilated(reduction=8, dilation=2)', 4 * C + 18 * 16 + 4 * 4 + 1),
    ('spatial_excite', 'conv_norm(kernel_size=3)', 9 + 2),
    ('block', 'sase(reduction=4)', 2 * C * 8 + 2 * C + 2 + 2 + 2 + 2 * 9),
    ('block', 'se(reduction=1)', 2 * C * C),
    ('block', 'eca(kernel_size=7)', 7),
    ('block', 'eca(gamma=1, beta=0)', 5),
    ('block', 'ecam(reduction=2, kernel_size=5)', (5 + 2) * 16 + 1),
    ('block', 'ecam(gamma=1, beta=0)', (5 + 2) * 8 + 1),
    ('block', 'ceca(kernel_size=7)', 7),
    ('block', 'ceca(gamma=1, beta=0)', 5),
    ('block', 'cbam(reduction=8, kernel_size=3)', 2 * C * 4 + 2 * 9 + 2),
    ('block', 'lcbam(reduction=2, kernel_size=5)', 2 * C * 16 + 25 + 2),
    ('block', 'bam(reduction=8, dilation=2)', (2 * C * 4 + 3 * C + 4) + (4 * C + 18 * 16 + 4 * 4 + 1) + 2),
    ('block', 'scse(reduction=4)', 2 * C * 8 + C),
    ('block', 'gc(reduction=8)', C + 2 * C * 4 + C + 3 * 4),
    ('block', 'gca(reduction=4)', C + 2 * C * 8 + C + 3 * 8),
    ('block', 'ge(extent=4)', 0),
    ('block', 'ge_theta(extent=2)', 9 * C + 2 * C),
    ('block', 'ge_plus(extent=4, reduction=8)', 2 * (9 * C + 2 * C) + 2 * C * 4 + 4 + C),
    ('block', 'fca(frequencies=8, reduction=4)', 2 * C * 8),
    ('block', 'gsop(rd_channels=8)', 5 * 8 * C + C + 4 * 8 * 8 + 9 * 8),
    ('block', 'sge(groups=4)', 2 * 4),
    ('block', 'ema(groups=8)', (4 * 4 + 4) + (9 * 4 * 4 + 4) + 2 * 4),
    ('block', 'shuffle(groups=4)', 6 * 4),
    ('block', 'simam(e_lambda=0.01)', 0),
    ('block', 'triplet(kernel_size=3)', 3 * (2 * 9 + 2)),
    ('block', 'coord(reduction=2)', 3 * C * 16 + 2 * 16),
    ('block', 'scoord(reduction=2)', 3 * C * 16 + 16 + 2 * C),
    ('block', 'ela(kernel_size=5, groups=4)', 2 * 5 * C + 4 * C),
    ('block', 'strip(kernel_size=5)', 2 * 5 * C),
    ('block', 'lka(kernel_size=9, dilation=2)', (9 + 25 + 2) * C + C * C + C),
    ('block', 'lska(kernel_size=11, dilation=2)', (2 * 3 + 2 * 5 + 4) * C + C * C + C),
    ('block', 'dual(reduction=2)', 2 * C * 16 + 16 + C * C + C + 2),
    ('block', 'criss_cross(reduction=2, recurrence=1)', 2 * C * 16 + 16 + C * C + C + 1),
    ('block', 'a2(reduction=2)', 4 * C * 16 + 2 * 16 + C),
    ('block', 'polarized(parallel=False)', C + 4 * C * 16 + 2 * C),
    ('block', 'lsk(reduction=4, kernel_size=3)', (25 + 49 + 2) * C + 3 * C * 8 + 2 * 8 + C + 4 * 9 + 2),
    ('block', 'sk(groups=4, reduction=2, min_rd_channels=8)', 2 * (9 * C * 8 + 2 * C) + C * 16 + 2 * 16 + 2 * 16 * C),
    ('block', 'sk(num_paths=3, groups=1)', 3 * (9 * C * C + 2 * C) + C * 32 + 2 * 32 + 3 * 32 * C),
    ('block', 'caa(kernel_size=5)', 2 * (C * C + C) + 2 * (5 * C + C)),
    ('block', 'mlca(local_size=3, local_weight=0.25)', 2 * 3),
    ('block', 'mlca(kernel_size=7)', 2 * 7),
    ('block', 'mlca(gamma=1, beta=0)', 2 * 5),
    ('block', 'scsa(num_heads=4, window_size=2)', 8 * (3 + 5 + 7 + 9 + 4) + 9 * C),
    ('block', 'scsa(kernel_sizes=(1, 3, 3, 5))', 8 * (1 + 3 + 3 + 5 + 4) + 9 * C),
    ('block', 'gam(reduction=4, kernel_size=3)', (2 * C * 8 + 8 + C) + 2 * 9 * C * 8 + 2 * 8 + 2 * C),
    ('block', GENOTYPE,
     (4 * 4 + 4 * C + 2 * 4) + 2 * C * 8 + 5 + (2 * 16 + 2 * 16 * 16) + (2 * C + 18 * 4 + 8 + 1) + 11 + 4),
]  # fmt: skip
BUILDERS = {**{(kind, name): cls for kind, table in EXTENDED_SETS.items() for name, cls in table.items()},
            **{('block', name): build for name, build in BLOCKS.items()}}  # fmt: skip


def make(kind: str, name: str, channels: int = C, **kwargs) -> nn.Module:
    torch.manual_seed(0)
    build = create_block if kind == 'block' else lambda *args, **kw: resolve_primitive(kind, args[0])(*args[1:], **kw)
    return build(name, channels, feat_size=SIZE, **kwargs)


def example(kind: str, channels: int = C, height: int = 9, width: int = 8) -> torch.Tensor:
    shape = {'channel_excite': (2, channels, 1, 1), 'spatial_excite': (2, 1, height, width)}.get(
        kind, (2, channels, height, width)
    )
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def test_every_option_stands_in_a_case():
    told = {(kind, parse_name(text)[0]): set() for kind, text, _ in CASES if text != GENOTYPE}
    for kind, text, _ in CASES:
        if text != GENOTYPE:
            told[kind, parse_name(text)[0]] |= set(parse_name(text)[1])
    assert told == {key: set(options_of(build)) for key, build in BUILDERS.items() if options_of(build)}


def test_every_option(one_thread):
    """Parameters, output, gradients, the same from keyword arguments, copies, state dicts, drawing, channels."""
    for kind, text, parameters in CASES:
        module, x = make(kind, text), example(kind).requires_grad_()
        assert sum(p.numel() for p in module.parameters()) == parameters, text
        y = module.train()(x)
        y.sum().backward()
        assert all(g is not None and g.isfinite().all() for g in (y, x.grad, *(p.grad for p in module.parameters()))), (
            text
        )
        assert block_name(text) == text if kind == 'block' else primitive_name(kind, text) == text
        module.eval()
        y = module(x)
        if text != GENOTYPE:
            name, options = parse_name(text)
            by_keyword = make(kind, name, **options) if kind == 'block' else BUILDERS[kind, name](C, SIZE, **options)
            default = make(kind, name)
            shapes = [[v.shape for v in one.state_dict().values()] for one in (module, by_keyword, default)]
            assert shapes[0] == shapes[1], text
            assert shapes[0] != shapes[2] or not torch.equal(default.eval()(x), y), f'{text} is the default'
            by_keyword.load_state_dict(module.state_dict())
            assert torch.equal(by_keyword.eval()(x), y), text
        assert torch.equal(copy.deepcopy(module)(x), y)
        if kind == 'block':
            assert block_graph(text) == block_graph(module)
        keep_channels(module, range(0, C, 2))
        assert module(example(kind, C // 2)).isfinite().all(), text


def test_small_maps_and_few_channels(one_thread):
    """An option limits the channels only where its value does."""
    for kind, text, _ in CASES:
        least = 33 if 'kernel_size=65' in text else 8
        for channels, (height, width) in itertools.product((least, 40), ((1, 1), (2, 5))):
            module = make(kind, text, channels)
            assert module(example(kind, channels, height, width)).isfinite().all(), (text, channels)
    for name, channels in (('se', 1), ('se(reduction=16)', 1), ('se(reduction=2)', 1), ('coord', 3), ('scse', 1)):
        assert create_block(name, channels)(example('', channels)).isfinite().all()


# Values that are checked where they are used.
WRONG_VALUES = [
    *(('block', f'se(reduction={value})', f'ChannelMLP needs reduction to be an int .* got {re.escape(value)}')
      for value in ('0', '-1', '4.0', 'True', 'None', "'4'", '(4,)')),
    ('block', 'se(reduction=33)', 'ChannelMLP of 32 channels needs reduction to be at most 32, got 33'),
    ('block', 'sase(reduction=33)', 'ChannelMLP of 32 channels needs reduction to be at most 32, got 33'),
    ('block', 'gc(reduction=33)', 'ChannelMLPNorm of 32 channels'),
    ('block', 'bam(reduction=33)', 'ChannelMLPBatchNorm of 32 channels'),
    ('block', 'ecam(reduction=33)', 'ChannelConvMLP of 32 channels'),
    ('block', 'ge_plus(reduction=33)', 'GatherExcite of 32 channels'),
    ('block', 'coord(reduction=33)', 'CoordinateAttention of 32 channels'),
    ('block', 'scoord(reduction=33)', 'SimpleCoordinateAttention of 32 channels'),
    ('spatial_squeeze', 'dilated(reduction=33)', 'SpatialDilated of 32 channels'),
    ('channel_squeeze', 'second_order(reduction=33)', 'ChannelSecondOrder of 32 channels'),
    *(('block', f'{name}(kernel_size={value})', 'needs an odd kernel_size, which keeps the size of the map, got')
      for name in ('cbam', 'triplet', 'ela', 'strip', 'eca', 'ecam', 'ceca', 'caa', 'gam') for value in (0, 2)),
    *(('block', f'{name}(kernel_size={value})', 'needs kernel_size to be an int of at least 1, got')
      for name in ('cbam', 'triplet', 'ela', 'strip', 'eca') for value in (-1, 3.0, True)),
    ('block', 'eca(kernel_size=67)', 'ChannelConvECA of 32 channels needs kernel_size to be at most 65, got 67'),
    ('block', 'eca(kernel_size=3, gamma=3)', 'pass these or kernel_size=3, not both'),
    ('block', 'ceca(gamma=1, beta=99)', 'ChannelConvCircular .* needs kernel_size to be at most 65, got 105'),
    ('block', 'eca(gamma=0)', 'ChannelConvECA needs gamma to be an int of at least 1, got 0'),
    ('block', 'eca(gamma=2.5)', 'ChannelConvECA needs gamma to be an int of at least 1, got 2.5'),
    ('block', 'eca(beta=-1)', 'ChannelConvECA needs beta to be an int of at least 0, got -1'),
    *(('block', f'{name}(groups=3)', 'needs groups to divide its 32 channels') for name in ('sge', 'ema', 'ela', 'sk')),
    *(('block', f'{name}(groups={value})', 'needs groups to be an int of at least 1, got')
      for name in ('sge', 'ema', 'ela', 'sk') for value in (0, 2.0, True)),
    ('block', 'sk(num_paths=1)', 'SelectiveKernel needs num_paths to be an int of at least 2, got 1'),
    ('block', 'sk(min_rd_channels=0)', 'SelectiveKernel needs min_rd_channels to be an int of at least 1, got 0'),
    ('block', 'sk(reduction=33)', 'SelectiveKernel of 32 channels'),
    ('block', 'shuffle(groups=32)', r'needs 2 \* groups to divide its 32 channels, got groups=32'),
    ('block', 'shuffle(groups=0)', 'ShuffleAttention needs groups to be an int of at least 1, got 0'),
    ('block', 'mlca(local_size=0)', 'MixedLocalChannelAttention needs local_size to be an int of at least 1, got 0'),
    *(('block', f'mlca(local_weight={value})', 'needs local_weight to be a number from 0 to 1, got')
      for value in (-0.1, 1.5, True, None)),
    ('block', 'mlca(kernel_size=67)', 'MixedLocalChannelAttention .* needs kernel_size to be at most 65, got 67'),
    ('block', 'scsa(num_heads=3)', 'SynergisticAttention needs num_heads to divide its 32 channels, got 3'),
    ('block', 'scsa(num_heads=0)', 'SynergisticAttention needs num_heads to be an int of at least 1, got 0'),
    ('block', 'scsa(window_size=-1)', 'SynergisticAttention needs window_size to be an int of at least 1, got -1'),
    *(('block', f'scsa(kernel_sizes={value})', f'needs kernel_sizes to be four odd ints, got {re.escape(value)}')
      for value in ('7', '(3, 5)')),
    ('block', 'scsa(kernel_sizes=(3, 5, 7, 8))', 'SynergisticAttention needs an odd kernel_size, .* got 8'),
    ('block', 'gam(reduction=33)', 'GlobalAttention of 32 channels'),
    ('block', 'bam(dilation=0)', 'SpatialDilated needs dilation to be an int of at least 1, got 0'),
    ('block', 'fca(frequencies=17)', 'ChannelDCT needs frequencies to be an int from 1 to 16, got 17'),
    ('block', 'gsop(rd_channels=129)', 'ChannelGSoP needs rd_channels to be an int from 1 to 128, got 129'),
    ('spatial_squeeze', 'second_order(grid=1)', 'SpatialSecondOrder needs grid to be an int of at least 2, got 1'),
    *(('block', f'simam(e_lambda={value})', 'SimAM needs e_lambda to be a finite number above 0, got')
      for value in (0, -1e-4, True, None)),
    ('block', 'lka(kernel_size=7, dilation=2)',
     r'LargeKernelAttention needs an odd ceil\(kernel_size / dilation\), .* got 4 from kernel_size=7, dilation=2'),
    ('block', 'dual(reduction=33)', 'DualAttention of 32 channels needs reduction to be at most 32'),
    ('block', 'criss_cross(reduction=33)', 'CrissCrossAttention of 32 channels needs reduction to be at most 32'),
    ('block', 'criss_cross(recurrence=0)', 'CrissCrossAttention needs recurrence to be an int of at least 1, got 0'),
    ('block', 'a2(reduction=33)', 'DoubleAttention of 32 channels needs reduction to be at most 32, got 33'),
    ('block', 'polarized(parallel=1)', 'PolarizedSelfAttention needs parallel to be True or False, got 1'),
    ('block', 'lsk(reduction=33)', 'LargeSelectiveKernel of 32 channels needs reduction to be at most 32, got 33'),
    ('block', 'lsk(kernel_size=4)', 'LargeSelectiveKernel needs an odd kernel_size, which keeps .* got 4'),
    ('block', 'lska(kernel_size=2)',
     'LargeSeparableKernelAttention needs an odd kernel_size // dilation, .* got 0 from kernel_size=2, dilation=3'),
    ('block', 'lka(kernel_size=0)', 'LargeKernelAttention needs kernel_size to be an int of at least 1, got 0'),
    ('block', 'lka(dilation=0)', 'LargeKernelAttention needs dilation to be an int of at least 1, got 0'),
    ('block', 'ge(extent=3)', 'GatherExcite needs extent to be a power of 2 from 2 on, got 3'),
]  # fmt: skip


def test_wrong_values_name_the_class_the_value_and_what_is_expected():
    for kind, text, error in WRONG_VALUES:
        with pytest.raises(ValueError, match=error) as caught:
            make(kind, text)
        assert '\n' not in str(caught.value)


def test_options_of_compositions():
    def state(block):
        return [(key, value.shape) for key, value in block.state_dict().items()], str(block)

    for by_keyword, by_text in [
        (ChannelAttention(C, 'avg', 'mlp', reduction=4), ChannelAttention(C, 'avg', 'mlp(reduction=4)')),
        (ChannelAttention(C, 'GAP', '2conv_1x1', reduction=4), ChannelAttention(C, 'avg', '2conv_1x1( reduction=4)')),
        (ChannelAttention(C, ('avg', 'max'), 'mlp', reduction=4), create_block('cbam', C, reduction=4)[0]),
        (
            SpatialAttention(C, 'second_order', 'conv7x7', grid=4),
            SpatialAttention(C, 'second_order(grid=4)', 'conv7x7'),
        ),
        (SpatialAttention(C, ('avg', 'max'), 'conv_norm', kernel_size=3), create_block('cbam(kernel_size=3)', C)[1]),
        (
            ParallelAttention(C, ('avg', 'mlp'), ('project', 'identity'), reduction=4),
            ParallelAttention(C, ('avg', 'mlp(reduction=4)'), ('project', 'identity')),
        ),
        (create_block(GENOTYPE, C, gamma=2), create_block(GENOTYPE, C)),
    ]:
        assert state(by_keyword) == state(by_text)
    for build, error in [
        (lambda: ChannelAttention(C, 'avg', 'mlp', rd=4), r"no option 'rd' in avg, mlp\(reduction\)"),
        (lambda: ChannelAttention(C, 'avg', 'mlp(reduction=4)', reduction=8), "given twice, in 'mlp\\(reduction=4\\)'"),
        (lambda: ParallelAttention(C, ('avg', 'mlp_batch_norm'), ('dilated', 'norm'), reduction=4),
         r"mlp_batch_norm, dilated each have an option reduction; write .* 'mlp_batch_norm\(reduction=4\)'"),
        (lambda: create_block(GENOTYPE, C, kernel_size=5), 'conv_eca, conv_norm each have an option kernel_size'),
    ]:  # fmt: skip
        with pytest.raises(TypeError, match=error):
            build()


def test_a_new_option_works_wherever_a_name_is_taken(monkeypatch):
    """The signature is the only table. A float has a dot, which is not allowed in the name of a module."""

    def scaled(channels, feat_size=None, *, scale=1.0, mode='a', device=None, dtype=None):
        assert (scale, mode) == (0.25, 'b;,=(')
        return ChannelAvg(channels, feat_size)

    scaled.paper_key = None
    monkeypatch.setitem(EXTENDED_SETS['channel_squeeze'], 'scaled', scaled)
    name = "scaled(scale=0.25, mode='b;,=(')"
    text = f'{name},mlp,affine,avg,avg,conv7x7'
    assert ChannelAttention(8, 'scaled', 'mlp', scale=0.25, mode='b;,=(').graph().edges[0].label == name
    assert str(Genotype.parse(Genotype.parse(text).to_json())) == text
    for genotype in (text, f'{text};se; se', [text, 'se', 'se']):
        model = timm.create_model('resnet20_cifar', genotype=genotype, device='meta')
        assert str(model.layer1[0].se.genotype) == text
    model = nn.Sequential(nn.Conv2d(3, 8, 1))
    assert insert(model, text, '0').block == text
    assert len(insert(model, Genotype.parse(text), '0').already) == 1
    space = SearchSpace.parse(f'channel_squeeze=avg,{name}; gate_excite=affine')
    assert SearchSpace.parse(str(space)) == SearchSpace.of(json.loads(json.dumps(space.to_dict()))) == space
    assert space.channel_squeeze == ('avg', name)
    block = MixedBlock(8, space, 8)
    assert block(torch.randn(2, 8, 8, 8)).isfinite().all()
    block.load_state_dict(MixedBlock(8, space, 8).state_dict())


@pytest.mark.slow
@pytest.mark.filterwarnings('ignore:.torch.jit.*is deprecated')
@pytest.mark.filterwarnings("ignore:The TorchScript type system doesn't support instance-level annotations")
@pytest.mark.parametrize(('kind', 'text'), [case[:2] for case in CASES])
def test_captures(kind, text):
    for mode in (True, False):
        module = make(kind, text).train(mode)
        script = torch.jit.script(copy.deepcopy(module))
        traced = torch.fx.symbolic_trace(copy.deepcopy(module))
        for x in (example(kind), example(kind, C, 17, 12)):
            expected = module(x)
            torch.testing.assert_close(script(x), expected)
            torch.testing.assert_close(traced(x), expected)
    batch, height, width = (torch.export.Dim(n, min=1 if n == 'b' else 9, max=64) for n in 'bhw')
    shapes = {0: batch} if kind == 'channel_excite' else {0: batch, 2: height, 3: width}
    exported = torch.export.export(module, (example(kind, C, 18, 27),), dynamic_shapes=(shapes,)).module()
    torch.testing.assert_close(
        exported(example(kind, C, 12, 14)), module(example(kind, C, 12, 14)), rtol=1e-4, atol=1e-5
    )
