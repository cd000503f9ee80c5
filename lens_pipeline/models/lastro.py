"""EPFL-LASTRO's network (Schaefer et al. 2018, A&A 611, A2), first of the space-based challenge."""

from torch import Tensor, nn


class Lastro(nn.Module):
    """The plain convolutional network of Schaefer et al. 2018, for cutouts of any size.

    Pairs of 3x3 convolutions (the first 4x4) with 16, 32, 64 and 128 channels, a 2x2 maximum
    between the pairs. Two changes: every convolution is normalised, which makes the dropout between
    them needless, and the mean over the grid stands where their first dense layer fixed the size.
    Input float32 (n, bands, height, width); output (n, 128).
    """

    n_features = 128

    def __init__(self, bands: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        before = bands
        for stage, after in enumerate((16, 32, 64, 128)):
            if stage:
                layers.append(nn.MaxPool2d(2))
            for kernel in (4 if stage == 0 else 3, 3):
                layers += [
                    nn.Conv2d(before, after, kernel, padding=kernel // 2, bias=False),
                    nn.BatchNorm2d(after),
                    nn.ReLU(inplace=True),
                ]
                before = after
        self.layers = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)
