"""State dicts from elsewhere: the SASE authors' checkpoints and plain ResNet weights, into models of this library.

The authors' keys say which edge a tensor belongs to (``_ops.E...``) and what it is, so they map onto ours one to one
for any genotype: ``layer1.0.attention._ops.5.0.weight`` is ``layer1.0.se.spatial_excite.convs.0.weight``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from einops import EinopsError, rearrange
from torch import Tensor, nn

from .blocks import AttentionModule, Genotype
from .checkpoint import read_checkpoint

StateDict = dict[str, Tensor]

# What `insert` writes on an attention.
INSERTED = '_inserted_attention_mark'

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
    state = unwrap_state_dict(state_dict)
    if any(key.startswith('backbone.') for key in state):
        state = {k.removeprefix('backbone.'): v for k, v in state.items() if k.startswith('backbone.')}
    if not is_paper_state_dict(state):
        near = ', '.join(list(state)[:3])
        raise ValueError(
            f"not a SASE authors' checkpoint: no key like 'layer1.0.attention._ops.0...'; first keys: {near}"
        )
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


def unwrap_state_dict(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """The state dict inside a checkpoint: under ``state_dict`` or ``model`` where there is one, without ``module.``.

    Raises:
        ValueError: nothing in it is a state dict of tensors.
    """
    state: Any = checkpoint
    for name in ('state_dict', 'model', 'model_state_dict'):
        if isinstance(state.get(name), Mapping):
            state = state[name]
            break
    if not state or not all(isinstance(v, Tensor) for v in state.values()):
        found = ', '.join(f'{k}: {type(v).__name__}' for k, v in list(state.items())[:4]) or 'nothing'
        raise ValueError(f'expected a state dict of tensors, or a dict with one under state_dict or model, got {found}')
    for prefix in ('module.', '_orig_mod.'):
        if all(k.startswith(prefix) for k in state):
            state = {k[len(prefix) :]: v for k, v in state.items()}
    return dict(state)


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


def _prepare(state_dict: Mapping[str, Any], model: nn.Module) -> tuple[StateDict, list[str]]:
    """The state dict in this library's names, filled up with the model's values, and the keys that were filled in.

    Filled up is each group of attention that the state dict has no key of.
    """
    state = unwrap_state_dict(state_dict)
    if is_paper_state_dict(state):
        state = convert_paper_state_dict(state)
    own = model.state_dict()
    added = [key for group in _attention_keys(model) if not any(k in state for k in group) for key in group]
    state.update({key: own[key] for key in added})
    return state, added


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: nn.Module) -> StateDict:
    """What timm calls before it loads a file: the authors' keys become ours, a file without attention is filled up.

    It is filled from the model's present values, and only when it holds no attention key at all: a file that has
    some of them is damaged, and loading it fails with the missing keys named.
    """
    return _prepare(state_dict, model)[0]


@dataclass(frozen=True)
class LoadReport:
    """What ``load_checkpoint`` did: state-dict keys that were loaded, kept from the model, and left out of the file."""

    source: str
    loaded: list[str] = field(repr=False)
    added: list[str] = field(repr=False)  # attention the file did not have: the model keeps its own values
    kept_head: list[str] = field(repr=False)  # the model's own classifier, with keep_head=True

    def __str__(self) -> str:
        lines = [f'{self.source}: {len(self.loaded)} tensors loaded']
        for what, keys in (
            ('added attention, kept at its initial values', self.added),
            ("classifier, kept the model's own", self.kept_head),
        ):
            if keys:
                more = f', ... ({len(keys) - 3} more)' if len(keys) > 3 else ''
                lines.append(f'  {what}: {len(keys)} tensors: {", ".join(keys[:3])}{more}')
        return '\n'.join(lines)


def load_checkpoint(model: nn.Module, source: str | Path | Mapping[str, Any], *, keep_head: bool = False) -> LoadReport:
    """Load weights into ``model``, in place and all or nothing: a file of ours, the authors', or a plain ResNet's.

    Args:
        model: any model; one with blocks of this library takes the authors' files and plain ones too.
        source: a file (``.pt``, ``.pth``, ``.safetensors``; read without running any code in it) or a state dict.
        keep_head: leave the model's own classifier where the file has none, or one for other classes.

    Returns:
        A report; printed, it says what was loaded and what was added.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a truncated or hostile file, keys missing (a damaged checkpoint, or another model's), keys that
            the model does not have, or other shapes; the first of them are named and the model is unchanged.
    """
    if isinstance(source, Mapping):
        label, raw = 'state dict', source
    else:
        label, raw = str(source), read_checkpoint(source)
    state, added = _prepare(raw, model)
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
        raise ValueError(
            f'{label} does not fit {type(model).__name__}, which is unchanged: {"; ".join(problems)}{hint}'
        )
    model.load_state_dict(state)
    loaded = [k for k in own if k not in set(added) and k not in set(kept)]
    return LoadReport(label, loaded, sorted(added), kept)
