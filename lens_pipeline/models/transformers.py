"""Small transformers for cutouts."""

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional


def _encoder(width: int, heads: int, depth: int) -> nn.Sequential:
    """Pre-norm encoder layers, each drawn by itself (`nn.TransformerEncoder` copies one)."""
    return nn.Sequential(
        *(
            nn.TransformerEncoderLayer(
                width,
                heads,
                2 * width,
                dropout=0.0,
                activation="gelu",
                batch_first=True,
                norm_first=True,
            )
            for _ in range(depth)
        )
    )


class LightTransformer(nn.Module):
    """Compact convolutional transformer (CCT, Hassani et al. 2021) for cutouts of any size.

    Three convolutions, each halving the grid, make tokens that know their neighbourhood, as arcs
    need; four pre-norm encoder layers relate them; attention pooling weighs them. The convolutions'
    zero padding carries the position, so any size works without position embeddings. Each
    convolution's output is normalised within its cutout, so an image's output never depends on its
    batch, and several processes train what one would.

    Input float32 (n, bands, height, width); output (n, 128).
    """

    n_features = 128

    def __init__(self, bands: int) -> None:
        super().__init__()
        widths = (bands, 32, 64, self.n_features)
        self.tokenizer = nn.Sequential(
            *(
                nn.Sequential(
                    nn.Conv2d(before, after, 3, stride=2, padding=1, bias=False),
                    nn.InstanceNorm2d(after, affine=True),
                    nn.ReLU(inplace=True),
                )
                for before, after in pairwise(widths)
            )
        )
        self.encoder = _encoder(self.n_features, heads=4, depth=4)
        self.norm = nn.LayerNorm(self.n_features)
        self.attention = nn.Linear(self.n_features, 1, bias=False)  # softmax takes one away

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.tokenizer(x).flatten(2).transpose(1, 2)
        tokens = self.norm(self.encoder(tokens))
        weight = torch.softmax(self.attention(tokens), dim=1)
        return (weight * tokens).sum(dim=1)


class TransEncS(nn.Module):
    """Small plain vision transformer (Dosovitskiy et al. 2021) for cutouts of any size.

    Each patch of 8x8 pixels is one token by one linear map; a class token gathers them through six
    pre-norm encoder layers of width 192. Positions are fixed 2-D sinusoids (Beyer et al. 2022),
    counted from the middle of the cutout, where the deflector is: a patch keeps its code when the
    cutout grows. Zeros round the cutout fill the last patches. Unlike the light transformer it has
    no convolution: every layer sees the whole cutout.

    Input float32 (n, bands, height, width); output (n, 192).
    """

    n_features = 192
    patch = 8

    def __init__(self, bands: int) -> None:
        super().__init__()
        self.embed = nn.Conv2d(bands, self.n_features, self.patch, stride=self.patch)
        self.class_token = nn.Parameter(0.02 * torch.randn(1, 1, self.n_features))
        self.encoder = _encoder(self.n_features, heads=3, depth=6)
        self.norm = nn.LayerNorm(self.n_features)

    def forward(self, x: Tensor) -> Tensor:
        lacking_rows, lacking_columns = (-side % self.patch for side in x.shape[-2:])
        top, left = lacking_rows // 2, lacking_columns // 2
        x = functional.pad(x, (left, lacking_columns - left, top, lacking_rows - top))
        grid = self.embed(x)
        codes = sinusoids(grid.shape[-2], grid.shape[-1], self.n_features, grid.device)
        grid = grid + codes.to(grid.dtype)
        tokens = torch.cat(
            [self.class_token.expand(len(x), -1, -1), grid.flatten(2).transpose(1, 2)], dim=1
        )
        return self.norm(self.encoder(tokens)[:, 0])


def sinusoids(rows: int, columns: int, width: int, device: torch.device | None = None) -> Tensor:
    """Position codes (width, rows, columns), counted in tokens from the middle of the grid.

    A quarter of the width each: sine and cosine of the row, of the column, at wavelengths from
    2 pi to 20,000 pi tokens (Vaswani et al. 2017, section 3.5, for each axis).
    """
    frequency = 10_000 ** -torch.linspace(0, 1, width // 4, device=device)
    row, column = (
        frequency[:, None] * (torch.arange(n, device=device) - (n - 1) / 2) for n in (rows, columns)
    )  # each (width / 4, n)
    codes = [
        row.sin()[:, :, None],
        row.cos()[:, :, None],
        column.sin()[:, None],
        column.cos()[:, None],
    ]
    return torch.cat([code.expand(-1, rows, columns) for code in codes])
