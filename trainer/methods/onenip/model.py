"""OneNIP: features are rebuilt from the tokens of one good image of the product, and a small network refines the error.

A pure module from taps and prompts to an anomaly map; it does not know how it is trained. Source: Gao, "Learning to
Detect Multi-class Anomalies with Just One Normal Image Prompt", ECCV 2024, in the decoder's form of November 2024.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn.utils import skip_init

from edge.products.product_file import PROMPTS
from trainer.methods.base import Head
from trainer.methods.patches import enlarge
from trainer.methods.uniad.model import (
    STRIDE,
    TAP_NAMES,
    Attention,
    EncoderLayer,
    Features,
    FeedForward,
    Sampling,
    draw_linear,
    neighbour_mask,
    places,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

MAP_STRIDE = 4
_LEAST_ERROR = 1e-12  # under the root


class BothWays(nn.Module):
    """A decoder layer in which the prompt looks at the image, then the image at the prompt.

    The image's tokens are updated with what they saw of the prompt; a first release took the prompt's own feed-forward
    output in its place.

    Args:
        width: d.
        heads: of both attentions.
        hidden: of the prompt's feed-forward network; the image has none.
    """

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.to_image, self.to_prompt = (Attention(width, heads, 0.0) for _ in range(2))
        self.feed = FeedForward(width, hidden, 0.0)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))

    def forward(
        self, prompt: torch.Tensor, image: torch.Tensor, place: torch.Tensor, mask: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return prompt and image, tokens [N, L, d] each; the prompt may be [1, L, d] for all."""
        seen = image + place
        prompt = self.norms[0](prompt + self.to_image(prompt + place, seen, image, mask))
        prompt = self.norms[1](prompt + self.feed(prompt))
        image = self.norms[2](image + self.to_prompt(seen, prompt + place, prompt, mask))
        return prompt, image


class PromptedReconstructor(nn.Module):
    """From features of an image and tokens of a prompt to what the image would be on a good part.

    Args:
        grid: (h, w).
        channels: C of features.
        width: d.
        layers: of encoder and decoder, each; the decoder has one attention more, which nothing is hidden from.
        heads: of every attention.
        hidden: of feed-forward networks.
        neighbours: side of the hidden square, see :func:`trainer.methods.uniad.model.neighbour_mask`.
        dropout: of the encoder, in training.
    """

    mask: torch.Tensor
    all_seen: torch.Tensor

    def __init__(
        self,
        *,
        grid: tuple[int, int],
        channels: int,
        width: int,
        layers: int,
        heads: int,
        hidden: int,
        neighbours: int,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        self.grid = grid
        self.enter, self.leave = skip_init(nn.Linear, channels, width), skip_init(nn.Linear, width, channels)
        self.columns = nn.Parameter(torch.zeros(grid[1], width // 2))
        self.rows = nn.Parameter(torch.zeros(grid[0], width - width // 2))
        self.encoder = nn.ModuleList(EncoderLayer(width, heads, hidden, dropout) for _ in range(layers))
        self.decoder = nn.ModuleList(BothWays(width, heads, hidden) for _ in range(layers))
        self.last, self.norm = Attention(width, heads, 0.0), nn.LayerNorm(width)
        self.register_buffer("mask", neighbour_mask(grid, neighbours), persistent=False)
        self.register_buffer("all_seen", torch.zeros(1, 1), persistent=False)

    @torch.no_grad()
    def initialise(self, generator: torch.Generator) -> None:
        """Draw every weight: linear ones Xavier-uniform, places uniform in 0..1."""
        draw_linear(self, generator)
        for table in (self.columns, self.rows):
            table.uniform_(generator=generator)

    def encode(self, features: torch.Tensor) -> torch.Tensor:
        """Return tokens float32 [N, L, d] of features [N, L, C]; each image by itself, so that a prompt can be kept."""
        place, x = places(self.columns, self.rows), self.enter(features)
        for layer in self.encoder:
            x = layer(x, place, self.mask)
        return x

    def decode(self, image: torch.Tensor, prompt: torch.Tensor) -> torch.Tensor:
        """Return rebuilt features float32 [N, L, C].

        Args:
            image: tokens [N, L, d] of :meth:`encode`.
            prompt: likewise, of a good image of the same product, or [1, L, d] for all.
        """
        place = places(self.columns, self.rows)
        for layer in self.decoder:
            prompt, image = layer(prompt, image, place, self.mask)
        prompt = self.norm(prompt + self.last(prompt + place, image + place, image, self.all_seen))
        rebuilt: torch.Tensor = self.leave(prompt)
        return rebuilt

    def forward(self, features: torch.Tensor, prompt: torch.Tensor) -> torch.Tensor:
        """Return features rebuilt float32 [N, L, C] of features and features of prompts, [N, L, C] each."""
        return self.decode(self.encode(features), self.encode(prompt))


class Refiner(nn.Module):
    """From errors of features to how likely each cell of a grid four times as fine is defective.

    Args:
        channels: C of errors.
        width: channels inside.
    """

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        stages = []
        for before in (channels, width):
            stages += [
                skip_init(nn.Conv2d, before, width, 3, padding=1, bias=False),
                nn.BatchNorm2d(width),
                nn.ReLU(),
                skip_init(nn.ConvTranspose2d, width, width, 2, stride=2),
            ]
        self.body = nn.Sequential(*stages)
        self.logit = skip_init(nn.Conv2d, width, 1, 1)

    @torch.no_grad()
    def initialise(self, generator: torch.Generator) -> None:
        """Draw every weight as He et al. (2015) do for a ReLU; biases are zero."""
        for part in self.modules():
            if isinstance(part, nn.Conv2d | nn.ConvTranspose2d):
                # A transposed convolution of stride 2 and side 2 gives each cell one weight of every channel.
                fan = part.in_channels * (1 if isinstance(part, nn.ConvTranspose2d) else part.kernel_size[0] ** 2)
                part.weight.normal_(0, (2 / fan) ** 0.5, generator=generator)
                if part.bias is not None:
                    part.bias.zero_()

    def forward(self, error: torch.Tensor) -> torch.Tensor:
        """Return logits float32 [N, 4 h, 4 w] of absolute errors [N, C, h, w]."""
        logit: torch.Tensor = self.logit(self.body(error))[:, 0]
        return logit


class OneNipHead(Head):
    """Distance of features from what the reconstructor makes of them, and the refiner's opinion, on the stride-4 grid.

    The map is ``(1 - share) error + share level probability``: error is the length of the difference of features,
    enlarged, and ``level`` brings the probability to its scale.

    Args:
        reconstructor: trained.
        refiner: trained.
        mean: float32 [C], taken from features first.
        scale: float32 [C], features are multiplied by then.
        prompts: float32 [P, L, d], the encoder's tokens of one good image of each product.
        share: of the refiner, in [0, 1].
        level: in units of the error, > 0.
        sampling: of finer taps.
    """

    tap_names: Sequence[str] = TAP_NAMES  # type: ignore[assignment]
    map_stride = MAP_STRIDE
    state_names: tuple[str, ...] = (PROMPTS,)
    mean: torch.Tensor
    scale: torch.Tensor
    prompts: torch.Tensor
    share: torch.Tensor
    level: torch.Tensor

    def __init__(
        self,
        reconstructor: PromptedReconstructor,
        refiner: Refiner,
        *,
        mean: torch.Tensor,
        scale: torch.Tensor,
        prompts: torch.Tensor,
        share: float,
        level: float,
        sampling: Sampling = Sampling.ALIGNED,
    ) -> None:
        super().__init__()
        self.features = Features(reconstructor.grid, sampling)
        self.reconstructor, self.refiner = reconstructor, refiner
        for name, values in (("mean", mean), ("scale", scale), (PROMPTS, prompts)):
            self.register_buffer(name, values)
        self.register_buffer("share", torch.tensor(share))
        self.register_buffer("level", torch.tensor(level))
        self.takes_product = len(prompts) > 1
        self.product_state = (PROMPTS,) if self.takes_product else ()

    def tokens(self, *taps: torch.Tensor) -> torch.Tensor:
        """Return what is rebuilt, float32 [N, L, C]."""
        found: torch.Tensor = (self.features(*taps) - self.mean) * self.scale
        return found

    def errors(self, features: torch.Tensor, prompt: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the parts of the map.

        Args:
            features: float32 [N, L, C] of :meth:`tokens`.
            prompt: float32 [N, L, d] or [1, L, d].

        Returns:
            Error float32 [N, h, w]; probability that a cell is defective, float32 [N, 4 h, 4 w]; the encoder's tokens
            of the image, float32 [N, L, d].
        """
        image = self.reconstructor.encode(features)
        difference = self.reconstructor.decode(image, prompt) - features
        length = difference.square().sum(2).clamp_min(_LEAST_ERROR).sqrt().unflatten(1, self.features.grid)
        fine = difference.abs().transpose(1, 2).unflatten(2, self.features.grid)
        return length, torch.sigmoid(self.refiner(fine)), image

    def forward(self, *taps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the map, and the encoder's tokens of the image, which are its prompt were it chosen for one.

        Args:
            taps: in the order of ``tap_names``; then, of several products, which one each tile shows, int64 [N].
        """
        prompt = self.prompts
        if self.takes_product:
            *taps, product = taps  # type: ignore[assignment]
            prompt = prompt.index_select(0, product)
        error, probability, image = self.errors(self.tokens(*taps), prompt)
        coarse = enlarge(error[:, None], STRIDE // MAP_STRIDE)[:, 0]
        return (1 - self.share) * coarse + self.share * self.level * probability, image
