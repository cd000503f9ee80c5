"""`lens-pipeline promote`, `rollback` and `retire`: who is champion, and who is there, by hand."""

import argparse
from collections.abc import Sequence
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
    parser.add_argument("versions", nargs="*", help="those to remove; or else --keep")
    parser.add_argument("--keep", type=int, help="how many of the newest stay")
    parser.add_argument("--dry-run", action="store_true", help="only say what would go")
    parser.set_defaults(do=_retire, after_interrupt="the same command goes on")


def _check_known(command: str, number: str, known: Sequence[str]) -> None:
    if number not in known:
        from lens_pipeline.registry import MODEL

        raise InputError(
            f"{command} {number}: give the number of a version; {MODEL} has "
            f"{', '.join(known) or 'none'}"
        )


def _promote(options: argparse.Namespace) -> int:
    from lens_pipeline.registry import GATE, MODEL, PASSED, Registry, answering
    from lens_pipeline.tracking import keep_waits_short

    keep_waits_short()
    registry = Registry(Settings.load(home=options.home))
    registry.require()
    with answering(f"promote {options.version}"), registry.lock():
        known = [str(version.version) for version in registry.versions()]
        _check_known("promote", options.version, known)
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

    if bool(options.versions) == (options.keep is not None):
        raise InputError("retire: name versions, or say with --keep how many of the newest stay")
    named = list(dict.fromkeys(options.versions))
    keep_waits_short()
    registry = Registry(Settings.load(home=options.home))
    registry.require()
    with answering("retire"), registry.lock():
        versions = {str(version.version): version for version in registry.versions()}
        for number in named:
            _check_known("retire", number, [*versions])
            if aliases := registry.all_aliases().get(number):
                raise InputError(
                    f"retire {number}: it is {' and '.join(aliases)}; give the alias to another "
                    "version first"
                )
        needed = registry.needed(options.keep) if options.keep is not None else {}
        old = named or [number for number in versions if number not in needed]
        if not options.dry_run:
            registry.retire(old)
    gone = "would go" if options.dry_run else "removed"
    for number in named or versions:
        state, why = ("kept", needed[number]) if number in needed else (gone, "is older")
        why = "was named" if named else why
        made = datetime.fromtimestamp(versions[number].creation_timestamp / 1000, UTC)
        print(f"version {number:>4}  {made:%F}  {state:8}  {why}")
    print(f"{MODEL}: {len(old)} of {len(versions)} versions {gone}")
    return 0
