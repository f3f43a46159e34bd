"""timm models. Importing this package registers them."""

from . import resnet_cifar, trio_network, trionet
from .architecture import Architecture
from .resnet import register_resnet
from .resnet_cifar import CifarResNet
from .trio_network import TrioNet

__all__ = ['Architecture', 'CifarResNet', 'TrioNet', 'register_resnet', 'resnet_cifar', 'trio_network', 'trionet']
