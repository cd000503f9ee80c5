"""`lens-pipeline predict`: the scores of a survey's cutouts."""

import argparse
from pathlib import Path

from lens_pipeline.errors import InputError
from lens_pipeline.settings import Settings, absolute
from lens_pipeline.terminal import interruptible


def add_predict(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--catalogue", required=True, help="a table, a folder of cutouts, or shards; a path or URL"
    )
    parser.add_argument("--out", type=Path, required=True, help="scores, .parquet or .csv")
    parser.add_argument("--model", help="models:/lens_ensemble@alias or /version")
    parser.add_argument(
        "--top", type=int, default=0, metavar="N", help="list and draw the N highest-scored, too"
    )
    parser.set_defaults(do=_predict)


def _predict(options: argparse.Namespace) -> int:
    settings = Settings.load(home=options.home)
    source = absolute(options.catalogue)
    if options.top < 0:
        raise InputError(f"--top {options.top}: must be 0 or more")
    from lens_pipeline.catalogue.dataset import counted_reasons
    from lens_pipeline.ensemble.parts import check_out, score_to_file
    from lens_pipeline.ensemble.shard_cutouts import open_cutout_source
    from lens_pipeline.registry import Registry
    from lens_pipeline.tracking import keep_waits_short

    check_out(options.out)
    if options.out.resolve() == Path(source).resolve():
        raise InputError(f"--out {options.out}: is the catalogue; name another file")
    keep_waits_short()
    registry = Registry(settings)
    registry.require()
    cutouts = open_cutout_source(
        source,
        cache=settings.home / "cache",
        pad=settings.pad,
        storage_options=settings.storage_options,
    )
    ensemble, uri = registry.load(options.model)
    with interruptible():
        scored = score_to_file(
            ensemble,
            cutouts,
            options.out,
            model=uri,
            top=options.top,
            max_reject_fraction=settings.max_reject_fraction,
        )
    print(f"{scored.path}: {scored.n_scored} of {scored.n_rows} cutouts scored by {uri}")
    if scored.rejects:
        said = counted_reasons(scored.rejects.elements())
        print(f"the column reject_reason says why others are not: {said}")
    if scored.top:
        drawn = f"; {scored.gallery}: their picture" if scored.gallery else ""
        print(f"{scored.top}: the highest-scored, the best first{drawn}")
    return 0
