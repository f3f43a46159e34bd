"""Load state dicts of other trainers, of the SASE authors and of plain ResNets into models of this library.

The authors' keys say which edge a tensor belongs to (``_ops.E...``) and what it is, so they map onto ours one to one
for any genotype: ``layer1.0.attention._ops.5.0.weight`` is ``layer1.0.se.spatial_excite.convs.0.weight``.
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

# What `insert` writes on an attention.
INSERTED = '_inserted_attention_mark'

# Under which a checkpoint holds its weights, and averages of them over the training; one may be in another.
WEIGHTS = ('state_dict', 'model', 'model_state_dict', 'module', 'checkpoint', 'net', 'network')
AVERAGES = ('state_dict_ema', 'model_ema', 'ema_model', 'ema_state_dict', 'ema')
DEPTH = 4  # of these names; a bound, since a file may hold a dict that is in itself
# What trainers and compilers put before the names of a model, in any order and as often as they wrap it.
PREFIXES = ('model.', 'module.', '_orig_mod.', 'backbone.', 'encoder.')
PROFILED = ('total_ops', 'total_params')  # buffers that a profiler (thop) leaves in every module

_PAPER_KEY = re.compile(r'^(?P<prefix>(?:.*?\.)??)(?P<rest>_ops\.(?P<edge>[0-5])\..+|mixer\.[01]\..+)$')
_EDGES = tuple(Genotype.SET_OF)

# What follows `_ops.E.` in the authors' keys: ours, whatever the operation, and the change of shape.
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
# What a name means here depends on the set that the edge chooses from.
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
    """Our name for an operation's tensor and the einops pattern of its shape; None for a name that is not theirs."""
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
    """The authors' state dict in this library's names.

    Args:
        state_dict: of their ImageNet ResNets, of a detector (``backbone.`` in front; the rest of the detector is left
            out), with or without ``module.``, or of a single block (keys ``_ops.E...`` and ``mixer...``), for any
                    genotype. The file's outer dict with the key ``state_dict`` is taken too.

    Returns:
        A state dict for ``resnet50_sase``/``resnet101_sase`` (or with the genotype of the file), or for an
        ``AttentionBlock``. A detector's has no classifier: load it with ``num_classes=0``.

    Raises:
        ValueError: no attention key of the authors in it, or one that is not known.
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
    """Rename the authors' keys, behind any prefix, to this library's; other keys stay."""
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
            raise ValueError(f"unknown key {key!r} in a SASE authors' checkpoint: no operation of theirs has it")
        name, shape = found
        try:
            out[prefix + name] = value if shape is None else rearrange(value, shape)
        except EinopsError:
            raise ValueError(f'{key!r} has shape {tuple(value.shape)}, expected {shape.split(" -> ")[0]}') from None  # type: ignore[union-attr]
    return out


@dataclass(frozen=True)
class Extracted:
    """The state dict that was found in a checkpoint for a model."""

    state: StateDict
    entry: str  # where it was, such as 'state_dict'; empty if the checkpoint is the state dict
    prefix: str  # what stood before its keys
    left_out: list[str]  # other keys of it, and states beside it


def extract_state_dict(
    checkpoint: Mapping[str, Any], keys: Collection[str], prefix: str | None = None, *, use_ema: bool = False
) -> Extracted:
    """The state dict inside a checkpoint, in the names of a model, as far as the checkpoint has them.

    It is looked for under ``WEIGHTS``, then under ``AVERAGES``, and in these again, ``DEPTH`` deep. ``PREFIXES``
    before its keys are taken off in any order and depth, such that most keys of the model are found; then what is not
    under the prefix, and what profilers left, is left out. The authors' keys become ours.

    Args:
        checkpoint: a file's content.
        keys: of the model.
        prefix: a prefix of another name, or which of several; '' for none.
        use_ema: take an average of the weights, not the weights.

    Raises:
        ValueError: no state dict of tensors with names for keys, no average, no key under ``prefix``, or two prefixes
            that fit alike.
    """
    state, entry, beside = _unwrap(checkpoint, use_ema)
    if is_paper_state_dict(state):
        state = _rename(state)
    own = set(keys)
    found = _choose_prefix(state, own, prefix)
    taken, left_out = {}, list(beside)
    for key, value in state.items():
        name = key.removeprefix(found)
        another = any(name[len(p) :] in own for p in _leading(name, PREFIXES))  # of a second copy of the model
        if key.startswith(found) and (name in own or not (another or _is_profiled(key))):
            taken[name] = value
        else:
            left_out.append(key)
    return Extracted(taken, entry, found, left_out)


def _is_profiled(key: str) -> bool:
    return key.rpartition('.')[2] in PROFILED


def _unwrap(checkpoint: Mapping[str, Any], use_ema: bool) -> tuple[StateDict, str, list[str]]:
    """The state dict of tensors in a checkpoint, the entries that lead to it, and other states beside these."""
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
            raise ValueError(f'expected a state dict with names for keys, got {quoted(key)} ({type(key).__name__})')
    if use_ema and not averaged:
        raise ValueError(f'use_ema=True, but there is no average of the weights under {", ".join(AVERAGES)}')
    return dict(state), '.'.join(path), beside


def _holds_state(value: Any, depth: int) -> bool:
    """Whether it is a state dict, or has one less than ``depth`` names deep; a dict of settings is none."""
    if not isinstance(value, Mapping):
        return False
    nested = depth > 1 and any(_holds_state(value.get(name), depth - 1) for name in (*WEIGHTS, *AVERAGES))
    return nested or any(isinstance(v, Tensor) for v in value.values())


def _choose_prefix(state: Mapping[str, Any], own: Set[str], given: str | None) -> str:
    """What to take off the keys of ``state``: the prefix under which most keys of the model are."""
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
            raise ValueError(f'no key of the model is there under prefix={given!r}; first keys: {first}')
        found = candidates
    best = max(found, key=lambda p: len(found[p]))
    alike = [p for p, fits in found.items() if fits and fits == found[best]]
    if len(alike) > 1:
        raise ValueError(
            f'the keys under {" and under ".join(map(repr, alike))} fit the model alike: choose one with '
            f'prefix={alike[-1]!r}'
        )
    return best


def _leading(key: str, names: tuple[str, ...]) -> Iterator[str]:
    """Every prefix of a key that is made of ``names``, the empty one first."""
    at = 0
    yield ''
    while name := next((n for n in names if key.startswith(n, at)), ''):
        at += len(name)
        yield key[:at]


def _attention_keys(model: nn.Module) -> list[list[str]]:
    """State-dict keys of attention: what was inserted, whatever its class, and this library's own blocks elsewhere.

    Two groups, for a checkpoint from before an insertion has all keys of the one and none of the other.
    """
    modules = list(model.named_modules())
    inserted = tuple(f'{name}.' for name, m in modules if INSERTED in m.__dict__)
    blocks = tuple(f'{name}.' if name else '' for name, m in modules if isinstance(m, AttentionModule))
    keys = list(model.state_dict())
    first = [key for key in keys if key.startswith(inserted)]
    return [first, [key for key in keys if key.startswith(blocks) and not key.startswith(inserted)]]


def _fill_up(state: StateDict, model: nn.Module) -> list[str]:
    """Give ``state`` the model's values for each group of attention that it has no key of. -> these keys."""
    own = model.state_dict()
    added = [key for group in _attention_keys(model) if not any(k in state for k in group) for key in group]
    state.update({key: own[key] for key in added})
    return added


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: nn.Module) -> StateDict:
    """What timm calls before it loads a file: the authors' keys become ours, a file without attention is filled up.

    It is filled from the model's present values, and only when it holds no attention key at all: a file that has
    some of them is damaged, and loading it fails with the missing keys named.
    """
    state = extract_state_dict(state_dict, model.state_dict()).state
    _fill_up(state, model)
    return state


@dataclass(frozen=True)
class LoadReport:
    """What ``load_checkpoint`` did: state-dict keys that were loaded, kept from the model, and left out of the file."""

    source: str
    loaded: list[str] = field(repr=False)
    added: list[str] = field(repr=False)  # attention the file did not have: the model keeps its own values
    kept_head: list[str] = field(repr=False)  # the model's own classifier, with keep_head=True
    left_out: list[str] = field(default_factory=list, repr=False)  # of the file: other keys, and states beside
    entry: str = ''  # where in the file the state dict was, such as 'state_dict_ema'
    prefix: str = ''  # what was taken off its keys, such as 'module.'

    def __str__(self) -> str:
        where = f' from {self.entry!r}' if self.entry else ''
        without = f', {self.prefix!r} taken off their names' if self.prefix else ''
        lines = [f'{self.source}: {len(self.loaded)} tensors loaded{where}{without}']
        for what, keys in (
            ('added attention, kept at its initial values', self.added),
            ("classifier, kept the model's own", self.kept_head),
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
    """Load weights into ``model``, in place and all or nothing: a file of ours, of another trainer, or the authors'.

    Args:
        model: any model; one with blocks of this library takes the authors' files and plain ones too.
        source: a file (``.pt``, ``.pth``, ``.safetensors``; read without running any code in it) or a state dict. It
            may be a trainer's, with ``model.``, ``module.``, ``_orig_mod.``, ``backbone.`` or ``encoder.`` before its
            keys, in any order and depth; what is then not under that prefix is left out.
        keep_head: leave the model's own classifier where the file has none, or one for other classes.
        prefix: another prefix, such as ``'student.'``, or which of several that fit; '' for none.
        use_ema: load the average of the weights (``state_dict_ema``, ``model_ema``, ...) of a file that has both.
            Without it such an average is loaded only where the file has nothing else.

    Returns:
        A report; printed, it says what was loaded, from where in the file, what was added and what was left out.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a truncated or hostile file, keys missing (a damaged checkpoint, or another model's), keys that
            the model does not have, other shapes, or prefixes that fit alike; the first of them are named and the
            model is unchanged.
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
        classifier = getattr(model, 'default_cfg', None) or {}
        heads = classifier.get('classifier') or 'fc'
        prefixes = tuple(f'{h}.' for h in ([heads] if isinstance(heads, str) else heads))
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


def _other_prefix(state: Mapping[str, Any], own: Collection[str]) -> str:
    """A prefix that is none of ``PREFIXES`` under which at least half of the model's keys are; '' if there is none."""
    found = Counter(key[: at.end()] for key in state for at in re.finditer(r'\.', key) if key[at.end() :] in own)
    prefix, count = max(found.items(), key=lambda item: item[1], default=('', 0))
    return prefix if 2 * count >= len(own) else ''
