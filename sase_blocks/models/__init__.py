"""timm models. Importing this package registers them."""

from . import resnet_cifar, resnet_operators, trionet
from .architecture import Architecture
from .resnet import register_resnet
from .resnet_cifar import CifarResNet
from .trionet import TrioNet

__all__ = ['Architecture', 'CifarResNet', 'TrioNet', 'register_resnet', 'resnet_cifar', 'resnet_operators', 'trionet']
