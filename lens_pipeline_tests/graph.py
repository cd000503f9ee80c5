"""The asset graph as text, beside which `test_definitions.py` lays it.

After a change that is meant: `python -m lens_pipeline_tests.graph > lens_pipeline_tests/graph.txt`.
"""

from pathlib import Path

from dagster import FreshnessPolicy
from dagster._core.definitions.assets.graph.asset_graph import AssetGraph, AssetNode
from dagster._core.definitions.freshness import TimeWindowFreshnessPolicy

from lens_pipeline.definitions import make_definitions
from lens_pipeline.settings import Settings

SHOWN = Path(__file__).with_suffix(".txt")
MEMBERS = "resnet18,b=deeplens@7"


def described(settings: Settings) -> str:
    """One paragraph an asset: what it is made from, where it belongs, what is checked of it."""
    graph = make_definitions(settings).resolve_asset_graph()
    return "\n\n".join(_paragraph(graph, graph.get(key)) for key in graph.toposorted_asset_keys)


def _paragraph(graph: AssetGraph, node: AssetNode) -> str:
    spec, retries = node.to_asset_spec(), node.assets_def.op.retry_policy
    facts = {
        "made from": ", ".join(sorted(parent.to_user_string() for parent in node.parent_keys)),
        "group": spec.group_name,
        "kinds": ", ".join(sorted(spec.kinds)),
        "owners": ", ".join(spec.owners),
        "pool": ", ".join(node.pools or ()),
        "retries": retries and f"{retries.max_retries}, after {retries.delay} s and longer",
        "stale": _window(spec.freshness_policy),
        **{
            f"check {key.name}": "blocking" if graph.get(key).blocking else "warning"
            for key in sorted(node.check_keys)
        },
    }
    lines = [f"  {name}: {value}" for name, value in facts.items() if value]
    return "\n".join([f"{node.key.to_user_string()}{' (observed)' * node.is_observable}", *lines])


def _window(policy: FreshnessPolicy | None) -> str | None:
    if policy is None:
        return None
    assert isinstance(policy, TimeWindowFreshnessPolicy)
    assert policy.warn_window is not None
    warned, failed = (w.to_timedelta().days for w in (policy.warn_window, policy.fail_window))
    return f"warned of after {warned} days, failed after {failed}"


if __name__ == "__main__":
    print(described(Settings.load(archs=MEMBERS)))
