"""SASE in a trained network, without harming it: python examples/finetune_pretrained.py

A small ResNet learns handwritten digits from half of the images. Then training continues with all of them in three
ways: unchanged, with SASE inserted as the identity, and with SASE inserted with its paper's initialisation. Three seeds
give a table and a figure in about six minutes on one core (extra "demo"). `--pretrained resnet18` starts from timm's
ImageNet weights instead of random ones (a download), `--quick` is only a trial.

This shows what happens at the insertion and soon after. 1,797 images cannot tell which network is better in the end.
"""

import argparse
import copy
from pathlib import Path
from statistics import fmean, pstdev

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sase_blocks.demo import load_digits
from sase_blocks.insertion import insert

WAYS = {'no insertion': None, "SASE, start='identity'": 'identity', "SASE, start='paper'": 'paper'}
STYLES = dict(zip(WAYS, (('#4d4d4d', '--', 3), ('#0072b2', '-', 2), ('#d55e00', '-', 2)), strict=True))  # last: on top
BATCH_SIZE = 32
TEST_EVERY = 10  # steps between two tests


def small_resnet(pretrained: str | None) -> nn.Module:
    """A plain network for one-channel images and ten classes."""
    if pretrained:
        return timm.create_model(pretrained, pretrained=True, in_chans=1, num_classes=10)
    return timm.create_model('resnet20_cifar', layers=(2, 2, 2), channels=(8, 16, 32), in_chans=1)


@torch.no_grad()
def test(model: nn.Module, images: Tensor, labels: Tensor) -> tuple[float, float]:
    """Accuracy in per cent and mean cross-entropy."""
    model.eval()
    logits = torch.cat([model(batch) for batch in images.split(120)])
    return 100 * (logits.argmax(1) == labels).double().mean().item(), F.cross_entropy(logits, labels).item()


def train(model, optimizer, images, labels, steps, seed, look=lambda step: None) -> None:
    """Train ``steps`` steps on random batches. Calls ``look(step)`` before the first, and from time to time."""
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, steps)
    generator = torch.Generator().manual_seed(seed)
    for step in range(steps):
        if step % TEST_EVERY == 0:
            look(step)
        batch = torch.randint(len(labels), (BATCH_SIZE,), generator=generator)
        model.train()
        loss = F.cross_entropy(model(images[batch]), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    look(steps)


def run(seed: int, first_steps: int, steps: int, pretrained: str | None = None) -> dict[str, list[tuple]]:
    """For each way to continue: (step, accuracy, loss) on the test images, from the insertion on."""
    digits = load_digits()
    half = len(digits.train_labels) // 2
    torch.manual_seed(seed)
    trained = small_resnet(pretrained).to(memory_format=torch.channels_last)  # twice as fast on a CPU
    optimizer = torch.optim.AdamW(trained.parameters(), lr=5e-3, weight_decay=0.05)
    train(trained, optimizer, digits.train_images[:half], digits.train_labels[:half], first_steps, seed)

    curves: dict[str, list[tuple]] = {}
    for way, start in WAYS.items():
        model = copy.deepcopy(trained)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)
        if start is not None:
            report = insert(model, 'sase', start=start, input_size=32, optimizer=optimizer)
            if seed == 0:
                print(f'\n{report}')
        rows = curves[way] = []

        def look(step: int, model: nn.Module = model, rows: list = rows) -> None:
            rows.append((step, *test(model, digits.test_images, digits.test_labels)))

        train(model, optimizer, digits.train_images, digits.train_labels, steps, seed + 1000, look)
    before = test(trained, digits.test_images, digits.test_labels)
    assert curves["SASE, start='identity'"][0][1:] == before, 'the insertion is an identity'
    return curves


def table(curves: list[dict[str, list[tuple]]]) -> str:
    """Mean and standard deviation over the seeds, right after the insertion and at the end."""
    lines = [f'{"":24}{"right after insertion":^34}{"at the end":^34}']
    lines.append(f'{"":24}' + f'{"accuracy":>17}{"loss":>17}' * 2)
    for way in WAYS:
        line = f'{way:24}'
        for at in (0, -1):
            for column, unit in ((1, ' %'), (2, '')):
                values = [run[way][at][column] for run in curves]
                digits = 1 if unit else 3
                spread = f' ± {pstdev(values):.{digits}f}' if len(values) > 1 else ''
                line += f'{f"{fmean(values):.{digits}f}{spread}{unit}":>17}'
        lines.append(line)
    return '\n'.join(lines)


def draw(curves: list[dict[str, list[tuple]]], path: Path) -> None:
    """Plot test loss and accuracy over the steps: thin lines for seeds, thick for the mean."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter

    figure = Figure(figsize=(8, 3.4), dpi=160, layout='constrained')
    panels = zip(figure.subplots(1, 2), (2, 1), ('test loss (cross-entropy)', 'test accuracy (%)'), strict=True)
    for axis, column, label in panels:
        for way, (color, line, order) in STYLES.items():
            runs = [[row[column] for row in run[way]] for run in curves]
            steps = [row[0] for row in curves[0][way]]
            for values in runs:
                axis.plot(steps, values, line, color=color, alpha=0.3, linewidth=0.8)
            mean = [fmean(values) for values in zip(*runs, strict=True)]
            axis.plot(steps, mean, line, color=color, linewidth=2, zorder=order, label=way if column == 1 else None)
            axis.plot(0, mean[0], 'o', color=color, markersize=6 if line == '-' else 3, clip_on=False, zorder=order + 1)
        axis.set(xlabel='steps after the insertion', ylabel=label, xlim=(0, None))
        axis.spines[['top', 'right']].set_visible(False)
        axis.grid(color='#e4e4e4', linewidth=0.7)
        if column == 2:
            axis.set_yscale('log')
            axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.yaxis.set_major_formatter('{x:g}')
            axis.yaxis.set_minor_formatter(NullFormatter())
    figure.legend(loc='outside upper center', ncols=len(WAYS), frameon=False)
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--out', type=Path, default=Path('finetune_pretrained.png'), help='the figure')
    parser.add_argument('--seeds', type=int, default=3)
    parser.add_argument('--first-steps', type=int, default=300, help='steps before the insertion')
    parser.add_argument('--steps', type=int, default=150, help='after it')
    parser.add_argument('--pretrained', metavar='MODEL', help='a timm model; downloads its weights')
    parser.add_argument('--quick', action='store_true', help='one seed, a few steps')
    args = parser.parse_args()
    if args.quick:
        args.seeds, args.first_steps, args.steps = 1, 5, 5
    curves = [run(seed, args.first_steps, args.steps, args.pretrained) for seed in range(args.seeds)]
    print(f'\n{table(curves)}')
    draw(curves, args.out)
    print(f'\nWritten: {args.out}')


if __name__ == '__main__':
    main()
