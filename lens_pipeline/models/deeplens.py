"""CMU DeepLens (Lanusse et al. 2018, MNRAS 473, 3895): the field's baseline."""

from torch import Tensor, nn


class _Block(nn.Module):
    """Pre-activated bottleneck (He et al. 2016b): 1x1, 3x3, 1x1, and a shortcut."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        inner = after // 2
        self.activate = nn.Sequential(nn.BatchNorm2d(before), nn.ELU())
        self.body = nn.Sequential(
            nn.Conv2d(before, inner, 1, stride=stride, bias=False),
            nn.BatchNorm2d(inner),
            nn.ELU(),
            nn.Conv2d(inner, inner, 3, padding=1, bias=False),
            nn.BatchNorm2d(inner),
            nn.ELU(),
            nn.Conv2d(inner, after, 1),
        )
        same = before == after and stride == 1
        self.shortcut = nn.Identity() if same else nn.Conv2d(before, after, 1, stride=stride)
        self.same = same

    def forward(self, x: Tensor) -> Tensor:
        active = self.activate(x)
        return self.body(active) + (x if self.same else self.shortcut(active))


class DeepLens(nn.Module):
    """The residual network of Lanusse et al. 2018, their figure 4 and table 1.

    A 7x7 convolution of 32 channels, then five stages of three pre-activated bottleneck blocks with
    32, 64, 128, 256 and 512 channels, each stage but the first halving the grid; ELU throughout.
    Input float32 (n, bands, height, width); output (n, 512).
    """

    n_features = 512

    def __init__(self, bands: int) -> None:
        super().__init__()
        stem = nn.Conv2d(bands, 32, 7, padding=3, bias=False)
        blocks: list[nn.Module] = []
        before = 32
        for stage, after in enumerate((32, 64, 128, 256, 512)):
            for block in range(3):
                stride = 2 if stage > 0 and block == 0 else 1
                blocks.append(_Block(before, after, stride))
                before = after
        self.layers = nn.Sequential(
            stem,
            nn.BatchNorm2d(32),
            nn.ELU(),
            *blocks,
            nn.BatchNorm2d(before),
            nn.ELU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)
