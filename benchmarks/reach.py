"""How far ``insert`` reaches by default: one small network of every kind in five libraries, one row each.

    python benchmarks/reach.py                                         the installed libraries; resumes
    python benchmarks/reach.py --only 'timm/*vit*' --again wrong       measure these again if they failed
    python benchmarks/reach.py --table                                 only the tables, from the existing rows

A network passes if ``insert(model, 'se')`` adds attention, the outputs stay equal bit for bit in eval and in train
mode, all gradients of one training step are finite and every alpha has one, the attention changes the outputs once its
alpha does, and ``remove`` restores the network. Each row goes to the folder's ``reach.jsonl`` when it is measured, the
tables to its ``README.md``, and the counts to docs/insertion.md. The weights are random, so nothing is downloaded.
"""

from __future__ import annotations

import argparse
import copy
import fnmatch
import gc
import importlib.metadata
import json
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sase_blocks import insert, remove

HERE = Path(__file__).parent / 'results' / 'reach'
DOCS = Path(__file__).parent.parent / 'docs' / 'insertion.md'
PACKAGES = {
    'timm': 'timm',
    'torchvision': 'torchvision',
    'smp': 'segmentation_models_pytorch',
    'transformers': 'transformers',
    'ultralytics': 'ultralytics',
}

# The smallest model, or nearly so, of each module of timm that has registered models.
TIMM = """
    test_vit test_byobnet beit_base_patch16_224 halonet26t poolformer_s12 caformer_s18 cait_xxs24_224
    coat_lite_tiny test_maxvit convit_tiny convmixer_768_32 test_convnext cpubone_nano crossvit_tiny_240
    cs3darknet_s csatv2 cspnext_tiny davit_tiny deepseek_vit_412m deit_tiny_distilled_patch16_224 densenet121
    dla46_c test_nfnet dpn48b ese_vovnet19b_slim_dw resnet10t edgenext_xx_small efficientformer_l1
    efficientformerv2_s0 test_efficientnet efficientvim_m1 efficientvit_b0 efficientvit_m0 eva02_tiny_patch14_224
    fasternet_t0 fastvit_t8 mobilenetv3_small_050 focalnet_tiny_srf gcvit_xxtiny gemma4_vit_167m ghostnet_050
    gmlp_ti16_224 hardcorenas_a hgnetv2_b0 hiera_tiny_224 sam2_hiera_tiny hrnet_w18_small iformer_t
    inception_next_atto inception_resnet_v2 inception_v3 inception_v4 lcnetv2_small legacy_seresnet18
    legacy_xception levit_128s lowformer_b0 test_mambaout mobilenetv5_300m mobilevit_xxs mvitv2_tiny
    naflexvit_base_patch16_gap nasnetalarge nest_tiny nextvit_small pit_ti_224 pnasnet5large pvt_v2_b0
    qwen3_vit_88m rdnet_tiny regnetx_002 repghostnet_050 repvit_m0_9 res2net50_14w_8s resnest14d resnetv2_18
    rexnet_100 samvit_base_patch16_224 selecsls42 sequencer2d_s shvit_s1 skresnet18 starnet_s050 swiftformer_xs
    swin_tiny_patch4_window7_224 swinv2_tiny_window8_256 swinv2_cr_tiny_224 test_vit_relpos tiny_vit_5m_224
    tnt_s_patch16_224 tresnet_m twins_svt_small vgg11 visformer_tiny vit_tiny_r_s16_p8_224 vitamin_small_224
    volo_d1_224 xception41 xcit_nano_12_p16_224
"""
# The smallest of these modules are still large, so build them with fewer blocks.
SHALLOW = {
    name: {'depth': 2}
    for name in (
        'beit_base_patch16_224',
        'deepseek_vit_412m',
        'gemma4_vit_167m',
        'qwen3_vit_88m',
        'samvit_base_patch16_224',
    )
}
CLASSIFIERS = """
    alexnet convnext_tiny densenet121 efficientnet_b0 efficientnet_v2_s googlenet inception_v3 maxvit_t mnasnet0_5
    mobilenet_v2 mobilenet_v3_small regnet_x_400mf regnet_y_400mf resnet18 resnet50 resnext50_32x4d
    wide_resnet50_2 shufflenet_v2_x0_5 squeezenet1_1 swin_t swin_v2_t vgg11 vgg11_bn vit_b_16
"""
SEGMENTERS = ['fcn_resnet50', 'deeplabv3_resnet50', 'deeplabv3_mobilenet_v3_large', 'lraspp_mobilenet_v3_large']
DETECTORS = """
    fasterrcnn_resnet50_fpn fasterrcnn_resnet50_fpn_v2 fasterrcnn_mobilenet_v3_large_320_fpn fcos_resnet50_fpn
    retinanet_resnet50_fpn maskrcnn_resnet50_fpn keypointrcnn_resnet50_fpn ssd300_vgg16
    ssdlite320_mobilenet_v3_large
"""
ENCODERS = """
    resnet18 resnext50_32x4d dpn68 vgg11 vgg11_bn se_resnet50 se_resnext50_32x4d densenet121 inceptionresnetv2
    inceptionv4 efficientnet-b0 mobilenet_v2 xception timm-efficientnet-b0 timm-tf_efficientnet_lite0
    timm-skresnet18 mit_b0 mobileone_s0 tu-convnext_atto tu-resnest14d tu-mobilevitv2_050 tu-regnetx_002
    tu-edgenext_xx_small
"""
DECODERS = """
    Unet UnetPlusPlus MAnet Linknet FPN PSPNet PAN DeepLabV3 DeepLabV3Plus UPerNet Segformer
"""


class Case:
    """A network, how to insert into it, and how to run it.

    Args:
        build: builds the network.
        sizes: image sizes; the first that the network accepts is used.
        detector: whether it takes a list of images, and targets in training.
    """

    def __init__(self, build: Callable[[], nn.Module], sizes: Sequence[int], detector: bool = False) -> None:
        self.build, self.sizes, self.detector = build, sizes, detector

    def example(self, model: nn.Module) -> Any:
        """Two images of the first size that the network accepts."""
        for size in self.sizes:
            x = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
            try:
                with torch.no_grad():
                    model.eval()(list(x) if self.detector else x)
            except Exception:
                if size == self.sizes[-1]:
                    raise
                continue
            return list(x) if self.detector else x
        raise AssertionError('no sizes')

    def outputs(self, model: nn.Module, x: Any, train: bool) -> list[Tensor]:
        """All floating-point outputs, or the losses of a detector in training."""
        torch.manual_seed(1)
        if not train or not self.detector:
            return list(_floats(model.train(train)(x)))
        target = {
            'boxes': torch.tensor([[8.0, 8.0, 30.0, 30.0], [1.0, 1.0, 62.0, 62.0]]),  # on small and on large maps
            'labels': torch.tensor([1, 2]),
            'masks': torch.ones(2, *x[0].shape[1:], dtype=torch.uint8),
            'keypoints': torch.tensor([[[20.0, 20.0, 1.0]] * 17] * 2),
        }
        return list(_floats(model.train()(x, [target] * len(x))))


def _floats(found: Any) -> Iterator[Tensor]:
    if isinstance(found, Tensor):
        if found.is_floating_point():
            yield found
    elif isinstance(found, dict):
        for value in found.values():
            yield from _floats(value)
    elif isinstance(found, list | tuple):
        for value in found:
            yield from _floats(value)


def check(case: Case) -> dict[str, Any]:
    """One row: what ``insert`` did, and its faults, '' for none."""
    torch.manual_seed(0)
    plain = case.build()
    with torch.no_grad():
        for p in plain.parameters():  # a branch that starts at zero would hide the attention in it
            p.add_(torch.randn_like(p), alpha=0.02)
    x = case.example(plain)
    model = copy.deepcopy(plain)
    row: dict[str, Any] = {'size': list((x[0] if case.detector else x).shape[-2:]), 'places': 0, 'wrong': ''}
    try:
        report = insert(model, 'se', example=(x,))
    except Exception as error:
        return {**row, 'wrong': f'{type(error).__name__}: {error}'[:600]}
    if report.places:
        first = report.places[len(report.places) // 2]
        row |= {
            'places': len(report.places),
            'by': 'our rule' if report.by_rule else 'table',
            'place': first.name,
            'layouts': sorted({place.layout for place in report.places}),
            'left_out': list(report.left_out),
        }
    try:
        row['wrong'] = '; '.join(_faults(case, plain, model, x, report.keys))
    except Exception as error:
        row['wrong'] = f'after insertion, {type(error).__name__}: {error}'[:600]
    return row


def _faults(case: Case, plain: nn.Module, model: nn.Module, x: Any, keys: Sequence[str]) -> Iterator[str]:
    with torch.no_grad():
        if not _same(case.outputs(plain, x, False), case.outputs(model, x, False)):
            yield 'eval outputs differ'
    outputs = case.outputs(model, x, True)
    if not _same(case.outputs(plain, x, True), outputs):  # with gradients, too: attention has other kernels without
        yield 'train outputs differ'
    loss = sum((y.flatten() @ torch.linspace(-1, 1, y.numel()) for y in outputs if y.requires_grad), torch.zeros(()))
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    if not all(gradient.isfinite().all() for gradient in gradients.values()):
        yield 'a gradient is not finite'
    alphas = [key for key in keys if key.endswith('.alpha')]
    still = [key for key in alphas if key not in gradients or not gradients[key].abs().max() > 0]
    if still:
        yield f'{len(still)} of {len(alphas)} alphas get no gradient: {still[0]}'
    torch.optim.SGD(model.parameters(), lr=1e-6).step()
    with torch.no_grad():
        for key in alphas:
            model.get_parameter(key).fill_(0.7)
        attended = case.outputs(model, x, case.detector)  # an untrained detector has no detections, but has losses
    remove(model)
    if model.state_dict().keys() != plain.state_dict().keys() or repr(model) != repr(plain):
        yield 'something stays after remove'
    with torch.no_grad():
        if _same(case.outputs(model, x, case.detector), attended):
            yield 'attention changes nothing'
        plain.load_state_dict(model.state_dict())
        if not _same(case.outputs(plain, x, False), case.outputs(model, x, False)):
            yield 'outputs after remove differ'


def _same(a: Sequence[Tensor], b: Sequence[Tensor]) -> bool:
    return len(a) == len(b) > 0 and all(torch.equal(p.nan_to_num(), q.nan_to_num()) for p, q in zip(a, b, strict=True))


def timm_cases() -> Iterator[tuple[str, Case]]:
    import timm

    for name in TIMM.split():
        if timm.is_model(name):
            own = timm.get_pretrained_cfg(name).input_size[-1]
            fixed = timm.get_pretrained_cfg(name).fixed_input_size
            build = lambda name=name: timm.create_model(name, num_classes=10, **SHALLOW.get(name, {}))  # noqa: E731
            yield name, Case(build, [own] if fixed else [64, 96, 128, own])


def torchvision_cases() -> Iterator[tuple[str, Case]]:
    import torchvision.models as models

    for name in CLASSIFIERS.split():
        more = {'init_weights': True} if name in ('googlenet', 'inception_v3') else {}
        build = lambda name=name, more=more: models.get_model(name, weights=None, num_classes=10, **more)  # noqa: E731
        # In training the second head of inception_v3 needs at least 299.
        yield name, Case(build, [299] if name == 'inception_v3' else [64, 128, 224])
    for name in SEGMENTERS:
        build = lambda name=name: models.get_model(name, weights=None, weights_backbone=None, num_classes=3)  # noqa: E731
        yield name, Case(build, [64])
    for name in DETECTORS.split():
        more = {} if name.startswith('ssd') else {'min_size': 64, 'max_size': 64}
        build = lambda name=name, more=more: models.get_model(  # noqa: E731
            name, weights=None, weights_backbone=None, num_classes=3, **more
        )
        yield name, Case(build, [64], detector=True)


def smp_cases() -> Iterator[tuple[str, Case]]:
    import segmentation_models_pytorch as smp

    for encoder in ENCODERS.split():
        build = lambda encoder=encoder: smp.Unet(encoder, encoder_weights=None)  # noqa: E731
        yield f'Unet({encoder})', Case(build, [64, 128])
    for decoder in DECODERS.split():
        build = lambda decoder=decoder: getattr(smp, decoder)('resnet18', encoder_weights=None)  # noqa: E731
        yield f'{decoder}(resnet18)', Case(build, [64, 128])


def transformers_cases() -> Iterator[tuple[str, Case]]:
    import transformers as t

    stages = {'embedding_size': 8, 'hidden_sizes': [8, 16, 24, 32], 'depths': [2, 2, 2, 2]}
    mix = {'hidden_sizes': [8, 16, 24, 32], 'depths': [2, 2, 2, 2]}
    vit = {
        'hidden_size': 32,
        'num_hidden_layers': 3,
        'num_attention_heads': 2,
        'intermediate_size': 64,
        'image_size': 64,
        'patch_size': 8,
    }
    swin = {'image_size': 64, 'patch_size': 4, 'embed_dim': 16, 'depths': [2, 2], 'num_heads': [2, 4], 'window_size': 4}
    configs: dict[str, tuple[str, dict[str, Any]]] = {
        'ResNet': ('ResNet', {**stages, 'layer_type': 'basic'}),
        'ConvNeXt': ('ConvNext', mix),
        'Swin': ('Swin', swin),
        'ViT': ('ViT', vit),
        'MobileNetV2': ('MobileNetV2', {'depth_multiplier': 0.25, 'image_size': 64}),
        'RegNet': ('RegNet', {**stages, 'groups_width': 8}),
        'SegFormer': ('Segformer', {'hidden_sizes': [8, 16, 24, 32], 'num_attention_heads': [1, 1, 2, 2]}),
        'PoolFormer': ('PoolFormer', {**mix, 'layer_scale_init_value': 0.1}),
        'DINOv2': ('Dinov2', vit),
        'BEiT': ('Beit', vit),
        'EfficientNet': ('EfficientNet', {'width_coefficient': 0.25, 'depth_coefficient': 0.5, 'hidden_dim': 320}),
        'BiT': ('Bit', {**stages, 'num_groups': 4}),
    }
    for name, (prefix, options) in configs.items():
        build = lambda prefix=prefix, options=options: getattr(t, f'{prefix}Model')(  # noqa: E731
            getattr(t, f'{prefix}Config')(**options)
        )
        yield name, Case(build, [64])


def ultralytics_cases() -> Iterator[tuple[str, Case]]:
    from ultralytics.nn.tasks import DetectionModel

    for name in ('yolov8n.yaml', 'yolo11n.yaml'):
        yield name.removesuffix('.yaml'), Case(lambda name=name: DetectionModel(name, nc=3, verbose=False), [64])


LIBRARIES: dict[str, Callable[[], Iterator[tuple[str, Case]]]] = {
    'timm': timm_cases,
    'torchvision': torchvision_cases,
    'smp': smp_cases,
    'transformers': transformers_cases,
    'ultralytics': ultralytics_cases,
}


def cases(pattern: str = '*') -> Iterator[tuple[str, Case]]:
    """The cases of the installed libraries whose 'library/name' matches the pattern."""
    for library, of_library in LIBRARIES.items():
        try:
            importlib.metadata.version(PACKAGES[library])
        except importlib.metadata.PackageNotFoundError:
            continue
        yield from ((f'{library}/{name}', case) for name, case in of_library() if _fits(f'{library}/{name}', pattern))


def _fits(name: str, pattern: str) -> bool:
    return any(fnmatch.fnmatchcase(name, part) for part in pattern.split(','))


def measure(out: Path, pattern: str, again: str) -> None:
    """Measure the missing rows, and with ``again`` 'all' or the 'wrong' ones again."""
    rows = read_rows(out)
    with (out / 'reach.jsonl').open('a', encoding='utf-8') as file:
        for name, case in cases(pattern):
            if name in rows and not (again == 'all' or (again == 'wrong' and rows[name]['wrong'])):
                continue
            began = time.monotonic()
            try:
                row = check(case)
            except Exception as error:
                row = {'places': 0, 'wrong': f'not built or not run without attention, {error}'[:300]}
            version = importlib.metadata.version(PACKAGES[name.partition('/')[0]])
            row = {'name': name, **row, 'version': version, 'torch': torch.__version__}
            print(
                f'{name:50}{row["places"]:>4} places  {time.monotonic() - began:5.0f} s  {row["wrong"][:150]}',
                flush=True,
            )
            file.write(json.dumps(row) + '\n')
            file.flush()
            gc.collect()


def read_rows(out: Path) -> dict[str, dict[str, Any]]:
    """The last row for each name."""
    path = out / 'reach.jsonl'
    lines = path.read_text(encoding='utf-8').splitlines() if path.exists() else []
    return {row['name']: row for row in map(json.loads, lines)}


def tables(rows: dict[str, dict[str, Any]]) -> tuple[str, str]:
    """The counts per library, and a table of each library's networks, in markdown."""
    head = '| library | networks | passed | by the table | by our rule | failed |\n' + '|---' * 6 + '|\n'
    counts, lists = '', ''
    for library in LIBRARIES:
        own = {name.partition('/')[2]: row for name, row in rows.items() if name.startswith(f'{library}/')}
        if not own:
            continue
        right = {name: row for name, row in own.items() if not row['wrong']}
        by = [sum(row['by'] == way for row in right.values()) for way in ('table', 'our rule')]
        first = next(iter(own.values()))
        version = f'{library} {first["version"]}, torch {first["torch"]}'
        counts += f'| {version} | {len(own)} | {len(right)} | {by[0]} | {by[1]} | {len(own) - len(right)} |\n'
        lists += f'\n## {library}\n\n| network | images | places | example place | layout | by |\n' + '|---' * 6 + '|\n'
        for name, row in own.items():
            size = ' x '.join(map(str, row.get('size', [])))
            if row['wrong']:
                lists += f'| {name} | {size} | {row["places"]} | {row["wrong"][:200].replace("|", "/")} | | |\n'
            else:
                kinds = ', '.join(row['layouts'])
                lists += f'| {name} | {size} | {row["places"]} | `{row["place"]}` | {kinds} | {row["by"]} |\n'
    return head + counts, lists


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--only', default='*', metavar='PATTERN', help="patterns of 'library/name', comma-separated")
    parser.add_argument('--again', choices=('', 'wrong', 'all'), default='', help='which rows to measure again')
    parser.add_argument('--table', action='store_true', help='only write the tables')
    parser.add_argument('--out', type=Path, default=HERE, help='the folder (default: benchmarks/results/reach)')
    options = parser.parse_args(argv)
    options.out.mkdir(parents=True, exist_ok=True)
    warnings.simplefilter('ignore')
    if not options.table:
        measure(options.out, options.only, options.again)
    rows = read_rows(options.out)
    order = {name: index for index, (name, _) in enumerate(cases())}
    rows = {name: rows[name] for name in sorted(rows, key=lambda name: order.get(name, len(order)))}
    lines = ''.join(json.dumps(row) + '\n' for row in rows.values())
    (options.out / 'reach.jsonl').write_text(lines, encoding='utf-8')  # only the last row of each
    counts, lists = tables(rows)
    text = f'# How far `insert` reaches\n\nMeasured by `python benchmarks/reach.py`. {ABOUT}\n\n{counts}{lists}'
    (options.out / 'README.md').write_text(text, encoding='utf-8')
    if options.out == HERE:
        before, mark, rest = DOCS.read_text(encoding='utf-8').partition('<!-- reach -->\n')
        after = rest.partition('<!-- /reach -->')[2]
        DOCS.write_text(f'{before}{mark}\n{counts}\n<!-- /reach -->{after}', encoding='utf-8')


ABOUT = """The call is `insert(model, 'se')` without `where`, on a CPU, with random
weights and two images. A network passes if its outputs stay equal bit for bit in eval and in train mode, all gradients
of one training step are finite and every alpha has one, the attention changes the outputs once alpha is 0.7, and
`remove` restores the network. If a network fails or gets no attention, its row has the error instead of a place."""


if __name__ == '__main__':
    main()
