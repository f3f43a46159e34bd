"""Load state dicts from other trainers, the SASE authors and plain ResNets into models of this library.

The authors' keys give a tensor's edge (``_ops.E...``) and role, so they map one to one to ours for any genotype:
``layer1.0.attention._ops.5.0.weight`` is ``layer1.0.se.spatial_excite.convs.0.weight``.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from einops import EinopsError, rearrange
from torch import Tensor, nn

from .blocks import AttentionModule, Genotype
from .checkpoint import read_checkpoint
from .reading import quoted

StateDict = dict[str, Tensor]

# The attribute that `insert` sets on an attention.
INSERTED = '_inserted_attention_mark'

# Keys of a checkpoint's weights, and of their averages over the training; they may be nested.
WEIGHTS = ('state_dict', 'model', 'model_state_dict', 'module', 'checkpoint', 'net', 'network')
AVERAGES = ('state_dict_ema', 'model_ema', 'ema_model', 'ema_state_dict', 'ema')
DEPTH = 4  # maximum nesting of these keys, since a file may contain a dict inside itself
# Prefixes that trainers and compilers add to the names of a model, in any order and number.
PREFIXES = ('model.', 'module.', '_orig_mod.', 'backbone.', 'encoder.')
PROFILED = ('total_ops', 'total_params')  # buffers that a profiler (thop) leaves in every module

_PAPER_KEY = re.compile(r'^(?P<prefix>(?:.*?\.)??)(?P<rest>_ops\.(?P<edge>[0-5])\..+|mixer\.[01]\..+)$')
_EDGES = tuple(Genotype.SET_OF)

# The part after `_ops.E.` in the authors' keys: our name for any operation, and the change of shape.
_OPERATION = [
    (re.compile(r'(?:mixer\.)?mixer\.0\.weight'), 'weight', '1 two 1 1 -> two'),
    (re.compile(r'(?:instanceNorm|layerNorm)\.(weight|bias)'), r'\1', None),
    (re.compile(r'row_bn_for_(?:channel|spatial)\.(.+)'), r'norm.\1', None),
    (re.compile(r'row_conv_group_for_(?:channel|spatial)\.weight'), 'row_weight', 'row 1 column 1 -> row column'),
    (re.compile(r'fc_adapt_channels_for_(?:channel|spatial)\.weight'), 'fc.weight', 'o i 1 1 -> o i'),
    (re.compile(r'conv1D(?:_1)?\.0\.weight'), 'convs.0.weight', None),
    (re.compile(r'conv1D_2\.0\.weight'), 'convs.1.weight', None),
    (re.compile(r'conv1D_3\.0\.weight'), 'convs.2.weight', None),
]
# The meaning of these names depends on the edge's set of operations.
_OF_SET: dict[str, dict[str, tuple[str, str | None]]] = {
    'channel_excite': {
        '0.weight': ('fc1.weight', 'o i 1 1 -> o i'),
        '2.weight': ('fc2.weight', 'o i 1 1 -> o i'),
        'alpha': ('weight', 'c 1 1 -> c'),
        'beta': ('bias', 'c 1 1 -> c'),
    },
    'spatial_excite': {
        '0.weight': ('convs.0.weight', None),
        '1.weight': ('convs.1.weight', None),
        '2.weight': ('convs.1.weight', None),
        'alpha': ('weight', '1 h w -> h w'),
        'beta': ('bias', '1 h w -> h w'),
    },
}


def _operation_key(edge: str, rest: str) -> tuple[str, str | None] | None:
    """Our name for an operation's tensor and the einops pattern of its shape; None if the authors have no such name."""
    of_set = _OF_SET.get(Genotype.SET_OF[edge], {})
    if rest in of_set:
        return of_set[rest]
    for pattern, ours, shape in _OPERATION:
        if pattern.fullmatch(rest):
            return pattern.sub(ours, rest), shape
    return None


def is_paper_state_dict(state_dict: Mapping[str, Any]) -> bool:
    """Whether any key is one of the authors' attention keys."""
    return any('_ops.' in key and _PAPER_KEY.match(key) for key in state_dict)


def convert_paper_state_dict(state_dict: Mapping[str, Any]) -> StateDict:
    """Convert the authors' state dict to this library's names.

    Args:
        state_dict: from their ImageNet ResNets, a detector (prefix ``backbone.``; the rest of the detector is left
            out), with or without ``module.``, or a single block (keys ``_ops.E...`` and ``mixer...``), for any
                    genotype. The file's outer dict with the key ``state_dict`` is taken too.

    Returns:
        A state dict for ``resnet50_sase``/``resnet101_sase`` (or with the genotype of the file), or for an
        ``AttentionBlock``. A detector's has no classifier: load it with ``num_classes=0``.

    Raises:
        ValueError: it has no attention key of the authors, or an unknown one.
    """
    state, _, _ = _unwrap(state_dict, use_ema=False)
    state = {key: value for key, value in state.items() if not _is_profiled(key) and key != 'n_averaged'}
    while shared := [p for p in PREFIXES if state and all(key.startswith(p) for key in state)]:
        state = {key.removeprefix(shared[0]): value for key, value in state.items()}
    if any(key.startswith('backbone.') for key in state):
        state = {k.removeprefix('backbone.'): v for k, v in state.items() if k.startswith('backbone.')}
    if not is_paper_state_dict(state):
        near = ', '.join(list(state)[:3])
        raise ValueError(
            f"not a SASE authors' checkpoint: no key like 'layer1.0.attention._ops.0...'; first keys: {near}"
        )
    return _rename(state)


def _rename(state: Mapping[str, Tensor]) -> StateDict:
    """The authors' keys in this library's names, with any prefix; other keys are unchanged."""
    out: StateDict = {}
    for key, value in state.items():
        match = _PAPER_KEY.match(key)
        if match is None:
            out[key] = value
            continue
        prefix = re.sub(r'attention\.$', 'se.', match['prefix'])
        rest = match['rest']
        found: tuple[str, str | None] | None
        if match['edge'] is not None:
            edge = _EDGES[int(match['edge'])]
            found = _operation_key(edge, rest.split('.', 2)[2])
            found = None if found is None else (f'{edge}.{found[0]}', found[1])
        elif rest == 'mixer.0.weight':
            found = ('mix_weight', '1 two 1 1 -> two')
        else:
            found = (rest.replace('mixer.1.', 'norm.'), None)
        if found is None:
            raise ValueError(f"unknown key {key!r} in a SASE authors' checkpoint: none of their operations has it")
        name, shape = found
        try:
            out[prefix + name] = value if shape is None else rearrange(value, shape)
        except EinopsError:
            raise ValueError(f'{key!r} has shape {tuple(value.shape)}, expected {shape.split(" -> ")[0]}') from None  # type: ignore[union-attr]
    return out


@dataclass(frozen=True)
class Extracted:
    """The state dict found in a checkpoint for a model."""

    state: StateDict
    entry: str  # where it was, such as 'state_dict'; empty if the checkpoint is the state dict
    prefix: str  # the prefix of its keys
    left_out: list[str]  # its other keys, and other state dicts


def extract_state_dict(
    checkpoint: Mapping[str, Any], keys: Collection[str], prefix: str | None = None, *, use_ema: bool = False
) -> Extracted:
    """The state dict inside a checkpoint, in the names of a model, as far as the checkpoint has them.

    Searches under ``WEIGHTS``, then under ``AVERAGES``, recursively to depth ``DEPTH``. Removes ``PREFIXES`` from its
    keys, in any order and depth, so that most keys of the model are found, then leaves out keys without the prefix and
    profilers' buffers. The authors' keys become ours.

    Args:
        checkpoint: a file's content.
        keys: keys of the model.
        prefix: another prefix, or the choice among several; '' for none.
        use_ema: use an average of the weights instead of the weights.

    Raises:
        ValueError: no state dict of tensors with string keys, no average, no key under ``prefix``, or two prefixes
            that fit equally well.
    """
    state, entry, beside = _unwrap(checkpoint, use_ema)
    if is_paper_state_dict(state):
        state = _rename(state)
    own = set(keys)
    found = _choose_prefix(state, own, prefix)
    taken, left_out = {}, list(beside)
    for key, value in state.items():
        name = key.removeprefix(found)
        another = any(name[len(p) :] in own for p in _leading(name, PREFIXES))  # a second copy of the model
        if key.startswith(found) and (name in own or not (another or _is_profiled(key))):
            taken[name] = value
        else:
            left_out.append(key)
    return Extracted(taken, entry, found, left_out)


def _is_profiled(key: str) -> bool:
    return key.rpartition('.')[2] in PROFILED


def _unwrap(checkpoint: Mapping[str, Any], use_ema: bool) -> tuple[StateDict, str, list[str]]:
    """The state dict of tensors in a checkpoint, the path of keys to it, and the other state dicts."""
    state: Any = checkpoint
    path: list[str] = []
    beside: list[str] = []
    averaged = False
    for depth in range(DEPTH, 0, -1):
        weights, averages = ([n for n in names if _holds_state(state.get(n), depth)] for names in (WEIGHTS, AVERAGES))
        names = averages + weights if use_ema else weights + averages
        if not names:
            break
        averaged = averaged or names[0] in AVERAGES
        path.append(names[0])
        beside += names[1:]
        state = state[names[0]]
    if not state or not all(isinstance(v, Tensor) for v in state.values()):
        found = ', '.join(f'{k}: {type(v).__name__}' for k, v in list(state.items())[:4]) or 'nothing'
        raise ValueError(
            f'expected a state dict of tensors, or a dict with one under {", ".join((*WEIGHTS, *AVERAGES))}, at most '
            f'{DEPTH} deep, got {found}'
        )
    for key in state:
        if not isinstance(key, str):
            raise ValueError(f'expected a state dict with string keys, got {quoted(key)} ({type(key).__name__})')
    if use_ema and not averaged:
        raise ValueError(f'use_ema=True, but there is no average of the weights under {", ".join(AVERAGES)}')
    return dict(state), '.'.join(path), beside


def _holds_state(value: Any, depth: int) -> bool:
    """Whether it is a state dict, or has one less than ``depth`` keys deep; a dict of settings does not count."""
    if not isinstance(value, Mapping):
        return False
    nested = depth > 1 and any(_holds_state(value.get(name), depth - 1) for name in (*WEIGHTS, *AVERAGES))
    return nested or any(isinstance(v, Tensor) for v in value.values())


def _choose_prefix(state: Mapping[str, Any], own: Set[str], given: str | None) -> str:
    """The prefix to remove from the keys of ``state``: the one with the most keys of the model."""
    if given:
        given = given.rstrip('.') + '.'
    names = (*((given,) if given else ()), *PREFIXES)
    found: dict[str, set[str]] = {'': set()}
    for key in state:
        for prefix in _leading(key, names):
            found.setdefault(prefix, set())
            if key[len(prefix) :] in own:
                found[prefix].add(key[len(prefix) :])
    if given is not None:
        exact = {p: fits for p, fits in found.items() if p == given}
        inside = {p: fits for p, fits in found.items() if given in p}
        candidates = exact if given == '' or any(exact.values()) else inside
        if not any(candidates.values()):
            first = ', '.join(list(state)[:3])
            raise ValueError(f'no key of the model has prefix={given!r}; first keys: {first}')
        found = candidates
    best = max(found, key=lambda p: len(found[p]))
    alike = [p for p, fits in found.items() if fits and fits == found[best]]
    if len(alike) > 1:
        raise ValueError(
            f'the keys under {" and under ".join(map(repr, alike))} fit the model equally well: choose one with '
            f'prefix={alike[-1]!r}'
        )
    return best


def _leading(key: str, names: tuple[str, ...]) -> Iterator[str]:
    """All prefixes of a key made of ``names``, the empty one first."""
    at = 0
    yield ''
    while name := next((n for n in names if key.startswith(n, at)), ''):
        at += len(name)
        yield key[:at]


def _attention_keys(model: nn.Module) -> list[list[str]]:
    """State-dict keys of attention: inserted modules of any class, and this library's own blocks elsewhere.

    Two groups, since a checkpoint from before an insertion has all keys of one and none of the other.
    """
    modules = list(model.named_modules())
    inserted = tuple(f'{name}.' for name, m in modules if INSERTED in m.__dict__)
    blocks = tuple(f'{name}.' if name else '' for name, m in modules if isinstance(m, AttentionModule))
    keys = list(model.state_dict())
    first = [key for key in keys if key.startswith(inserted)]
    return [first, [key for key in keys if key.startswith(blocks) and not key.startswith(inserted)]]


def _fill_up(state: StateDict, model: nn.Module) -> list[str]:
    """Add the model's values to ``state`` for each attention group without any key in it. -> these keys."""
    own = model.state_dict()
    added = [key for group in _attention_keys(model) if not any(k in state for k in group) for key in group]
    state.update({key: own[key] for key in added})
    return added


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: nn.Module) -> StateDict:
    """timm calls this before it loads a file: convert the authors' keys, and add attention if the file has none.

    The model's present values are added only if the file has no attention key at all: a file with only some of them is
    damaged, and loading it fails with an error that names the missing keys.
    """
    state = extract_state_dict(state_dict, model.state_dict()).state
    _fill_up(state, model)
    return state


@dataclass(frozen=True)
class LoadReport:
    """The result of ``load_checkpoint``: state-dict keys loaded, kept from the model, and left out of the file."""

    source: str
    loaded: list[str] = field(repr=False)
    added: list[str] = field(repr=False)  # attention missing in the file: the model keeps its own values
    kept_head: list[str] = field(repr=False)  # the model's own classifier, with keep_head=True
    left_out: list[str] = field(default_factory=list, repr=False)  # other keys and state dicts of the file
    entry: str = ''  # the state dict's key in the file, such as 'state_dict_ema'
    prefix: str = ''  # the prefix removed from its keys, such as 'module.'

    def __str__(self) -> str:
        where = f' from {self.entry!r}' if self.entry else ''
        without = f', {self.prefix!r} removed from their names' if self.prefix else ''
        lines = [f'{self.source}: {len(self.loaded)} tensors loaded{where}{without}']
        for what, keys in (
            ('added attention, kept at its initial values', self.added),
            ('classifier, kept from the model', self.kept_head),
            ('left out of the file', self.left_out),
        ):
            if keys:
                more = f', ... ({len(keys) - 3} more)' if len(keys) > 3 else ''
                kind = 'entries' if keys is self.left_out else 'tensors'
                lines.append(f'  {what}: {len(keys)} {kind}: {", ".join(keys[:3])}{more}')
        return '\n'.join(lines)


def load_checkpoint(
    model: nn.Module,
    source: str | Path | Mapping[str, Any],
    *,
    keep_head: bool = False,
    prefix: str | None = None,
    use_ema: bool = False,
) -> LoadReport:
    """Load weights into ``model``, in place and all or nothing: from our files, another trainer's or the authors'.

    Args:
        model: any model; one with blocks of this library takes the authors' files and plain ones too.
        source: a file (``.pt``, ``.pth``, ``.safetensors``; read without running any code in it) or a state dict. Its
            keys may have a trainer's prefixes ``model.``, ``module.``, ``_orig_mod.``, ``backbone.`` or ``encoder.``,
            in any order and depth; keys without that prefix are then left out.
        keep_head: keep the model's own classifier if the file has none, or one for other classes.
        prefix: another prefix, such as ``'student.'``, or the choice among several that fit; '' for none.
        use_ema: load the average of the weights (``state_dict_ema``, ``model_ema``, ...) of a file that has both.
            By default the average is loaded only if the file has nothing else.

    Returns:
        A report; printed, it says what was loaded, from where in the file, what was added and what was left out.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a truncated or hostile file, missing keys (a damaged checkpoint, or another model's), keys that the
            model does not have, other shapes, or prefixes that fit equally well. The message names the first of them,
            and the model is unchanged.
    """
    if isinstance(source, Mapping):
        label, raw = 'state dict', source
    else:
        label, raw = str(source), read_checkpoint(source)
    try:
        extracted = extract_state_dict(raw, model.state_dict(), prefix, use_ema=use_ema)
    except ValueError as error:
        raise ValueError(f'{label}: {error}') from None
    state = extracted.state
    added = _fill_up(state, model)
    own = model.state_dict()
    kept: list[str] = []
    if keep_head:
        prefixes = classifier_prefixes(model)
        for key in own:
            if key.startswith(prefixes) and (key not in state or state[key].shape != own[key].shape):
                kept.append(key)
                state[key] = own[key]
        state = {k: v for k, v in state.items() if k in own or not k.startswith(prefixes)}

    problems = []
    missing = [k for k in own if k not in state]
    unexpected = [k for k in state if k not in own]
    shapes = [
        f'{k} is {tuple(state[k].shape)} in the file and {tuple(own[k].shape)} in the model'
        for k in own
        if k in state and state[k].shape != own[k].shape
    ]
    for what, items in (('missing', missing), ('not in the model', unexpected), ('of another shape', shapes)):
        if items:
            more = f', ... ({len(items) - 5} more)' if len(items) > 5 else ''
            problems.append(f'{len(items)} keys {what}: {", ".join(items[:5])}{more}')
    if problems:
        hint = ''
        if any(k.startswith(('fc.', 'head.', 'classifier.')) for k in missing + unexpected + shapes):
            hint = '; keep_head=True keeps the classifier of the model'
        other = _other_prefix(state, own)
        if other:
            hint = f'; its keys fit with prefix={other!r}'
        raise ValueError(
            f'{label} does not fit {type(model).__name__}, which is unchanged: {"; ".join(problems)}{hint}'
        )
    model.load_state_dict(state)
    loaded = [k for k in own if k not in set(added) and k not in set(kept)]
    return LoadReport(label, loaded, sorted(added), kept, extracted.left_out, extracted.entry, extracted.prefix)


def classifier_prefixes(model: nn.Module) -> tuple[str, ...]:
    """How the state-dict keys of a model's classifier begin, by its timm configuration; 'fc.' without one."""
    heads = (getattr(model, 'default_cfg', None) or {}).get('classifier') or 'fc'
    return tuple(f'{head}.' for head in ([heads] if isinstance(heads, str) else heads))


def _other_prefix(state: Mapping[str, Any], own: Collection[str]) -> str:
    """A prefix not in ``PREFIXES`` that at least half of the model's keys have; '' if there is none."""
    found = Counter(key[: at.end()] for key in state for at in re.finditer(r'\.', key) if key[at.end() :] in own)
    prefix, count = max(found.items(), key=lambda item: item[1], default=('', 0))
    return prefix if 2 * count >= len(own) else ''
