import torch
import torch.nn as nn


class Model(nn.Module):
    def forward(self, x, y):
        return torch.sum(torch.abs(x - y), dim=1)


def get_inputs():
    return [torch.randn(64, 256), torch.randn(64, 256)]


def get_init_inputs():
    return []
