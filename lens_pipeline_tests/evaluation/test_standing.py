"""What each member contributes, told."""

from typing import Any

from lens_pipeline.evaluation.standing import idle_members, members_table


def facts(strategy: str = "mean", **shares: float) -> dict[str, Any]:
    """Of members by their shares in the score; the first alone is better than chance."""
    lows = [0.8, *[0.4] * (len(shares) - 1)]
    return {
        "fusion": {"strategy": strategy},
        "members": {name: {"slope": 0.001, "intercept": 0.0} for name in shares},
        "standing": {
            name: {"share": share, "auroc": {"value": low + 0.1, "low": low, "high": low + 0.15}}
            for (name, share), low in zip(shares.items(), lows, strict=True)
        },
    }


def test_a_member_that_hardly_counts_is_named_with_the_reason() -> None:
    assert idle_members(facts(resnet18=0.04, lastro=0.96)) == [
        "resnet18 hardly counts: its share in the score is 4%"
    ]
    assert idle_members(facts(resnet18=1.0, lastro=0.001)) == [
        "lastro cannot be told from chance on the validation split (AUROC 0.500 [0.400, 0.550]) "
        "and hardly counts: its share in the score is 0%"
    ]


def test_members_that_count_are_not_named_nor_those_beside_a_single_one() -> None:
    assert idle_members(facts(resnet18=0.5, lastro=0.5)) == []
    assert idle_members(facts("single", resnet18=1.0, lastro=0.0)) == []


def test_every_member_has_its_slope_and_share_in_the_table() -> None:
    assert members_table(facts(resnet18=0.75, lastro=0.25)).to_dict("records") == [
        {
            "member": "resnet18",
            "calibration slope": "0.001",
            "AUROC, validation split": "0.900 [0.800, 0.950]",
            "share in the score": "75%",
        },
        {
            "member": "lastro",
            "calibration slope": "0.001",
            "AUROC, validation split": "0.500 [0.400, 0.550]",
            "share in the score": "25%",
        },
    ]
