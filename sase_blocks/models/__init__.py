"""timm models. Importing this package registers them."""

from . import resnet_cifar, trionet
from .resnet import register_resnet
from .resnet_cifar import CifarResNet

__all__ = ['CifarResNet', 'register_resnet', 'resnet_cifar', 'trionet']
