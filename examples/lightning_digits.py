"""Train with Lightning on scikit-learn's handwritten digits: python examples/lightning_digits.py

Only the model's name is ours. pip install "sase-blocks[ecosystem]"
"""

import lightning as L
import timm
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset

import sase_blocks  # noqa: F401  registers the models with timm


class Classifier(L.LightningModule):
    def __init__(self, name: str = 'resnet20_cifar', genotype: str = 'sase', lr: float = 2e-3) -> None:
        super().__init__()
        self.save_hyperparameters()  # plain strings and numbers, so that load_from_checkpoint needs no arguments
        self.model = timm.create_model(name, genotype=genotype, in_chans=1)

    def training_step(self, batch: list[torch.Tensor], _: int) -> torch.Tensor:
        return F.cross_entropy(self.model(batch[0]), batch[1])

    def validation_step(self, batch: list[torch.Tensor], _: int) -> None:
        self.log('accuracy', (self.model(batch[0]).argmax(1) == batch[1]).float().mean(), prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.hparams.lr)


def main(epochs: int = 3) -> L.Trainer:
    L.seed_everything(0, verbose=False)
    images, labels = load_digits(return_X_y=True)
    data = TensorDataset(torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16, torch.tensor(labels))
    train, val = torch.utils.data.random_split(data, [0.8, 0.2])
    trainer = L.Trainer(max_epochs=epochs, logger=False, enable_checkpointing=False)
    trainer.fit(Classifier(), DataLoader(train, 64, shuffle=True), DataLoader(val, 256))
    print(f'accuracy {trainer.callback_metrics["accuracy"]:.3f} after {epochs} epochs')
    return trainer


if __name__ == '__main__':
    main()
