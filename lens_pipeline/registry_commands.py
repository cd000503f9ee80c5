"""`lens-pipeline promote`, `rollback` and `retire`: who is champion, and who is there, by hand."""

import argparse
from datetime import UTC, datetime

from lens_pipeline.errors import InputError
from lens_pipeline.settings import Settings

BY_HAND = "promoted by hand"


def add_promote(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("version", help="a version of lens_ensemble")
    parser.set_defaults(do=_promote)


def add_rollback(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(do=_rollback, after_interrupt="look who is champion before you repeat it")


def add_retire(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--keep", type=int, required=True, help="how many of the newest stay")
    parser.add_argument("--dry-run", action="store_true", help="only say what would go")
    parser.set_defaults(do=_retire, after_interrupt="the same command goes on")


def _promote(options: argparse.Namespace) -> int:
    from lens_pipeline.registry import GATE, MODEL, PASSED, Registry, answering
    from lens_pipeline.tracking import keep_waits_short

    keep_waits_short()
    registry = Registry(Settings.load(home=options.home))
    registry.require()
    with answering(f"promote {options.version}"), registry.lock():
        known = [str(version.version) for version in registry.versions()]
        if options.version not in known:
            raise InputError(
                f"promote {options.version}: give the number of a version; {MODEL} has "
                f"{', '.join(known) or 'none'}"
            )
        verdict = registry.version(options.version).tags.get(GATE, PASSED)
        registry.promote(options.version)
        if not verdict.startswith(BY_HAND):
            against = () if verdict == PASSED else (f"before: {verdict}",)
            registry.judge(options.version, (BY_HAND, *against))
    print(f"{MODEL} version {options.version} is champion")
    return 0


def _rollback(options: argparse.Namespace) -> int:
    from lens_pipeline.registry import MODEL, Registry, answering
    from lens_pipeline.tracking import keep_waits_short

    keep_waits_short()
    registry = Registry(Settings.load(home=options.home))
    registry.require()
    with answering("rollback"):
        former, rolled_back = registry.roll_back()
    print(f"{MODEL} version {former} is champion again, in the place of version {rolled_back}")
    return 0


def _retire(options: argparse.Namespace) -> int:
    from lens_pipeline.registry import MODEL, Registry, answering
    from lens_pipeline.tracking import keep_waits_short

    keep_waits_short()
    registry = Registry(Settings.load(home=options.home))
    registry.require()
    with answering("retire"), registry.lock():
        needed, versions = registry.needed(options.keep), registry.versions()
        old = [number for v in versions if (number := str(v.version)) not in needed]
        if not options.dry_run:
            registry.retire(old)
    gone = "would go" if options.dry_run else "removed"
    for version in versions:
        number, made = str(version.version), version.creation_timestamp / 1000
        state = "kept" if number in needed else gone
        why = needed.get(number, "is older")
        print(f"version {number:>4}  {datetime.fromtimestamp(made, UTC):%F}  {state:8}  {why}")
    print(f"{MODEL}: {len(old)} of {len(versions)} versions {gone}")
    return 0
