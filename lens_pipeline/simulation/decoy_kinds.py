"""The kinds of decoys, and how many of each there are."""

from collections.abc import Mapping
from types import MappingProxyType

# Shares of the non-lenses. Nearly half are what survey teams find to be worst: the same red galaxy
# alone, with neighbours, or with arms (HOLISMOKES XI: random galaxies alone teach nothing of TPR0).
MIXTURE: Mapping[str, float] = MappingProxyType(
    {
        "unlensed": 0.18,  # the host galaxy alone
        "intruders": 0.14,  # one to three unlensed galaxies around it
        "singly_imaged": 0.08,  # a galaxy behind it, too far from it to have a second image
        "spiral": 0.17,  # arms around it as a bulge
        "late_type": 0.06,  # a small blue galaxy instead of it
        "merger": 0.07,  # two nuclei and a tail
        "edge_on": 0.07,  # a thin disc through it as a bulge
        "group": 0.08,  # two to four fainter red galaxies around it, and a blue one
        "ring": 0.05,  # a closed ring of stars around it as a bulge, inclined
        "star": 0.05,  # one or two stars beside it
        "artefact": 0.05,  # the host alone under an image defect, which others have seldom
    }
)

# Those that only add to the host's image, and need not know its light: what an image that is taken
# already allows.
KEEP_HOST = ("unlensed", "intruders", "singly_imaged", "star", "artefact")
