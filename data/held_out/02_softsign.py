import torch
import torch.nn as nn


class Model(nn.Module):
    def forward(self, x):
        return x / (1.0 + torch.abs(x))


def get_inputs():
    return [torch.randn(32, 1024)]


def get_init_inputs():
    return []
