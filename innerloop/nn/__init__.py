"""Networks of the field, as ordinary modules. The last layer of each is named ``head``."""

from innerloop.nn.conv4 import Conv4
from innerloop.nn.conv_norm_act_pool import ConvNormActPool
from innerloop.nn.mlp import MLP
from innerloop.nn.norm_act_pool import NormActPool
from innerloop.nn.resnet12 import ResNet12

__all__ = ["MLP", "Conv4", "ConvNormActPool", "NormActPool", "ResNet12"]
