"""A method for tests whose head takes products: distance of every patch to the mean patch of the product it is of."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch.nn.utils import skip_init

from trainer.methods.base import FitContext, Head, Method, MethodConfig


class ProductMeansHead(Head):
    """State ``means`` float32 [P, C], chosen by product; rows are projected so that there is something for int8."""

    tap_names = ("s8",)
    state_names = ("means",)
    product_state = ("means",)
    takes_product = True
    map_stride = 8
    means: torch.Tensor

    def __init__(self, products: int, channels: int) -> None:
        super().__init__()
        self.register_buffer("means", torch.zeros(products, channels))
        self.project = skip_init(torch.nn.Conv2d, channels, channels, 1)
        with torch.no_grad():
            self.project.weight.copy_(torch.eye(channels)[:, :, None, None])
            self.project.bias.zero_()

    def forward(self, s8: torch.Tensor, product: torch.Tensor) -> tuple[torch.Tensor]:
        means = self.means.index_select(0, product)[:, :, None, None]
        return ((self.project(s8) - means).square().sum(1).sqrt(),)


class ProductMeans(Method):
    """Learns the means."""

    name: ClassVar[str] = "means"
    tap_names: ClassVar[tuple[str, ...]] = ("s8",)

    @classmethod
    def config(cls, preset: str) -> MethodConfig:
        del preset
        return MethodConfig()

    @classmethod
    def fit(cls, context: FitContext, config: MethodConfig) -> Head:
        del config
        tap, products = context.features.taps["s8"].float(), context.features.products
        assert products is not None
        head = ProductMeansHead(len(context.products), tap.shape[1])
        for product in range(len(context.products)):
            head.means[product] = tap[products == product].mean((0, 2, 3))
        return head.eval().requires_grad_(requires_grad=False)

    @classmethod
    def build(cls, config: MethodConfig, tensors: dict[str, torch.Tensor]) -> Head:
        del config
        head = ProductMeansHead(*tensors["means"].shape)
        head.load_state_dict(tensors)
        return head.eval().requires_grad_(requires_grad=False)
