"""Small transformers for cutouts."""

from itertools import pairwise

import torch
from torch import Tensor, nn

WIDTH = 128
DEPTH = 4
HEADS = 4


class LightTransformer(nn.Module):
    """Compact convolutional transformer (CCT, Hassani et al. 2021) for cutouts of any size.

    Three convolutions, each halving the grid, make tokens that know their neighbourhood, as arcs
    need; four pre-norm encoder layers relate them; attention pooling weighs them. The convolutions'
    zero padding carries the position, so any size works without position embeddings.

    Input float32 (n, bands, height, width); output (n, 128).
    """

    n_features = WIDTH

    def __init__(self, bands: int) -> None:
        super().__init__()
        widths = (bands, 32, 64, WIDTH)
        self.tokenizer = nn.Sequential(
            *(
                nn.Sequential(
                    nn.Conv2d(before, after, 3, stride=2, padding=1, bias=False),
                    nn.BatchNorm2d(after),
                    nn.ReLU(inplace=True),
                )
                for before, after in pairwise(widths)
            )
        )
        layer = nn.TransformerEncoderLayer(
            WIDTH,
            HEADS,
            2 * WIDTH,
            dropout=0.0,
            activation="gelu",
            batch_first=True,
            norm_first=True,
        )
        self.encoder = nn.TransformerEncoder(layer, DEPTH, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(WIDTH)
        self.attention = nn.Linear(WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.tokenizer(x).flatten(2).transpose(1, 2)
        tokens = self.norm(self.encoder(tokens))
        weight = torch.softmax(self.attention(tokens), dim=1)
        return (weight * tokens).sum(dim=1)
