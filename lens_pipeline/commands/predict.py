"""`lens-pipeline predict`: the scores of a survey's cutouts."""

import argparse
import logging
from pathlib import Path
from typing import TYPE_CHECKING

from lens_pipeline.errors import InputError, masked
from lens_pipeline.locations import absolute, existing
from lens_pipeline.settings import Settings
from lens_pipeline.terminal import interruptible, local_path

if TYPE_CHECKING:
    from lens_pipeline.scoring.known import KnownLenses
    from lens_pipeline.scoring.parts import ScoredFile

log = logging.getLogger(__name__)


def add_predict(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--catalogue", required=True, help="a table, a folder of cutouts, or shards; a path or URL"
    )
    parser.add_argument("--out", type=local_path, required=True, help="scores, .parquet or .csv")
    parser.add_argument(
        "--model",
        help="models:/lens_ensemble@ALIAS or models:/lens_ensemble/VERSION "
        "[champion, else the newest challenger]",
    )
    parser.add_argument(
        "--top",
        type=int,
        default=0,
        metavar="N",
        help="list the N highest-scored, too, and show up to a thousand of them on a page to grade "
        "them on",
    )
    parser.add_argument(
        "--known",
        metavar="TABLE",
        help="a list of known lenses (columns ra, dec, name): says where they rank, and marks "
        "those of the highest-scored",
    )
    parser.add_argument(
        "--share",
        metavar="I/N",
        help="score the I-th of N shares of the rows, as 2/4, for several machines with one --out; "
        "the command without it, once all have ended, writes the file",
    )
    parser.set_defaults(do=_predict)


def _predict(options: argparse.Namespace) -> int:
    settings = Settings.load(home=options.home)
    for flag, given in (("--catalogue", options.catalogue), ("--known", options.known)):
        if given == "":  # as of a variable of the shell that is not set
            raise InputError(f"{flag}: is given, and empty")
    source = absolute(options.catalogue)
    if options.top < 0:
        raise InputError(f"--top {options.top}: must be 0 or more")
    from lens_pipeline.registry import Registry
    from lens_pipeline.scoring.claim import Share
    from lens_pipeline.scoring.score_files import check_out, files_of_best, files_of_known

    share = Share.parse(options.share) if options.share is not None else None
    for flag, given in (("--top", options.top), ("--known", options.known)):
        if share and given:
            raise InputError(f"{flag}: is for the command without --share, which writes the file")
    written = {options.out, *files_of_best(options.out), *files_of_known(options.out)}
    for what, given in (("the catalogue", source), ("the list of known lenses", options.known)):
        if given and Path(absolute(given)).resolve() in {file.resolve() for file in written}:
            raise InputError(f"--out {options.out}: {given} is {what}; name another file")
    check_out(options.out)
    registry = Registry(settings)
    registry.require()
    existing(source)
    known = None
    if options.known is not None:
        from lens_pipeline.catalogue.known import read_known_lenses

        known = read_known_lenses(existing(absolute(options.known)), settings.storage_options)
    # Torch comes with these, in ten seconds: what is wrong above is said at once.
    from lens_pipeline.registered import load_registered
    from lens_pipeline.scoring.best import n_shown
    from lens_pipeline.scoring.parts import score_to_file
    from lens_pipeline.scoring.shard_cutouts import open_cutout_source
    from lens_pipeline.tracking import keep_waits_short

    keep_waits_short()
    cutouts = open_cutout_source(
        source,
        cache=settings.cache,
        pad=settings.pad,
        storage_options=settings.storage_options,
    )
    ensemble, uri = load_registered(registry, options.model)
    if settings.tracking_uri:
        log.info("model: %s of MLFLOW_TRACKING_URI, %s", uri, masked(settings.mlflow_uri))
    with interruptible():
        scored = score_to_file(
            ensemble,
            cutouts,
            options.out,
            model=uri,
            top=options.top,
            known=known,
            max_reject_fraction=settings.max_reject_fraction,
            share=share,
        )
    if share:
        left = f"{scored.n_left} of {scored.n_rows} rows are left" if scored.n_left else "so is all"
        print(f"{scored.path}: share {share} is done; {left}")
        print("when every share is done, the same command without --share writes the file")
        return 0
    _tell(scored, options, uri, n_shown(ensemble.format))
    return 0


def _tell(scored: "ScoredFile", options: argparse.Namespace, model: str, n_on_page: int) -> None:
    from lens_pipeline.catalogue.dataset import counted_reasons
    from lens_pipeline.scoring.score_files import files_of_best, files_of_known

    if not scored.written:
        print(f"{scored.path}: nothing has changed since it was written")
    print(f"{scored.path}: {scored.n_scored} of {scored.n_rows} cutouts scored by {model}")
    if scored.rejects:
        said = counted_reasons(scored.rejects.elements())
        print(f"the column reject_reason says why others are not: {said}")
    if scored.n_learnt:
        print(
            f"the model was trained or validated on {scored.n_learnt} of the rows, or others of "
            "their groups (the column learnt_from says which): how it ranks these is no test of it"
        )
    if scored.known:
        _tell_known(scored.known, options.top)
    if scored.top:
        all_shown = min(options.top, scored.n_scored) <= n_on_page
        print(f"{scored.top}: the highest-scored, the best first")
        if scored.page:
            whom = "them" if all_shown else f"the first {n_on_page}"
            print(f"{scored.page}: open it in a browser to look at {whom} and grade them")
    for flag, given, (former, _) in (
        ("--top", options.top, files_of_best(scored.path)),
        ("--known", options.known, files_of_known(scored.path)),
    ):
        if scored.written and not given and former.is_file():
            print(f"{former}: is of former scores; {flag} makes it anew")


def _tell_known(known: "KnownLenses", top: int) -> None:
    shown, others = known.n_shown, known.n_in_field - known.n_shown
    print(
        f"{known.path}: {shown} of {known.n_listed} known lenses have a cutout; "
        f"{others} more lie within an arcminute of one"
    )
    ranks = sorted(known.unseen)
    n, n_unusable = len(ranks), sum(rank > known.n_scored for rank in ranks)
    if shown and not n:
        print("the model has learnt from all of them, so their ranks do not tell what it finds")
    if not n:
        return
    whose = " that the model has not learnt from" if n < shown else ""
    half = ranks[(n - 1) // 2]
    said = [f"half are among the first {half:.0f} of {known.n_scored} scored"]
    if half > known.n_scored:
        said = []
    if top:
        said.append(f"{sum(rank <= top for rank in ranks)} among the first {top}")
    if n_unusable:
        said.append(f"{n_unusable} could not be used")
    print(f"of the {n}{whose}: {', '.join(said)}")
