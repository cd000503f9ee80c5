"""`lens-pipeline prepare` and `prune`: shards are written and published, and old versions go."""

import argparse
import json
from pathlib import Path
from typing import Any

from lens_pipeline.errors import InputError, secrets_in
from lens_pipeline.files import folder_aside, is_taken
from lens_pipeline.locations import absolute, publishable
from lens_pipeline.settings import Settings
from lens_pipeline.terminal import interruptible, local_path


def add_prepare(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data-root", help="a catalogue, a folder of cutouts, a processed dataset")
    parser.add_argument(
        "--output-dir", type=local_path, required=True, help="where the shards lie, or will lie"
    )
    parser.add_argument("--shard-size", type=int, help="cutouts (default 1000)")
    parser.add_argument("--image-size", type=int, help="pixels (default 64, or the dataset's)")
    parser.add_argument("--encoding", help="float16 (default), float32, png16 or jpg")
    parser.add_argument("--quality", type=int, help="of jpg, which it chooses: 1 to 100")
    parser.add_argument("--cloud-url", help="where to publish: s3://, gs:// or a folder")
    parser.add_argument("--storage-options", default="{}", help="fsspec's, JSON; no secrets")
    parser.add_argument(
        "--upload-only", action="store_true", help="publish the shards that lie there already"
    )
    parser.add_argument("--validate", action="store_true", help="read all back and check it")
    parser.set_defaults(
        do=_prepare,
        after_interrupt="the same command begins again, or, where --output-dir is there already, "
        "goes on with its upload by --output-dir, --cloud-url and --upload-only alone",
    )


def add_prune(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--cloud-url", help="where they are published (LENS_CLOUD_URL)")
    parser.add_argument("--keep", type=int, required=True, help="how many of the newest stay")
    parser.add_argument("--dry-run", action="store_true", help="only say what would go")
    parser.set_defaults(do=_prune)


def _prepare(options: argparse.Namespace) -> int:
    settings = Settings.load(home=options.home)
    storage = settings.storage_options | _storage_options(options.storage_options)
    out: Path = options.output_dir
    if options.cloud_url == "":  # as of a variable of the shell that is not set
        raise InputError("--cloud-url: is given, and empty; leave it out, or name where to publish")
    cloud_url = options.cloud_url and publishable(options.cloud_url)
    if options.upload_only:
        if not options.cloud_url:
            raise InputError("--upload-only: needs --cloud-url, where to publish")
        made_by = ("data_root", "shard_size", "image_size", "encoding", "quality")
        for name in made_by:
            if getattr(options, name) is not None:
                flag = f"--{name.replace('_', '-')}"
                raise InputError(
                    f"{flag}: leave it out, with --upload-only: shards are as they were made"
                )
    else:
        if not options.data_root:
            raise InputError("--data-root: is needed, unless with --upload-only")
        if is_taken(out):
            raise InputError(f"--output-dir {out}: exists already; {_way_out(out)}")
        from lens_pipeline.shards.prepare import prepare_shards

        with interruptible(), folder_aside(out) as aside:
            prepare_shards(
                absolute(options.data_root),
                aside,
                shard_size=1000 if options.shard_size is None else options.shard_size,
                encoding=options.encoding or ("jpg" if options.quality is not None else "float16"),
                quality=options.quality,
                image_size=options.image_size,
                bands=settings.bands,
                surveys=settings.survey,
                pad=settings.pad,
                split_seed=settings.seed,
                max_reject_fraction=settings.max_reject_fraction,
                options=storage,
            )
    import pandas as pd

    from lens_pipeline.catalogue.dataset import REJECTS, rejects_in_words
    from lens_pipeline.shards.store import read_manifest

    manifest = read_manifest(out)
    if not options.upload_only and (out / REJECTS).is_file():
        rejects = pd.read_parquet(out / REJECTS)
        n_rows = len(rejects) + sum(shard.samples for shard in manifest.shards)
        print(rejects_in_words(rejects, n_rows, out / REJECTS))
    places: list[tuple[str, dict[str, Any]]] = [(str(out), {})]
    if cloud_url:
        from lens_pipeline.shards.cloud import publish_shards

        published = publish_shards(out, cloud_url, storage_options=storage)
        places.append((published.url, storage))
    for place, how in places:
        if options.validate:
            from lens_pipeline.shards.verify import verify_shards

            problems = verify_shards(place, how)
            if problems:
                raise InputError(f"{len(problems)} problems; the first: {problems[0]}")
        print(f"{place}  {'checked' if options.validate else 'written'}")
        for pattern in manifest.patterns(place).values():
            print(f"  {pattern}")
    print(f"bands {', '.join(manifest.format['bands'])}")
    print(f"dataset version {manifest.dataset_version}")
    return 0


def _way_out(out: Path) -> str:
    """What to do where shards shall be written to a folder that is there."""
    from lens_pipeline.shards.manifest import MANIFEST

    way = "name a folder that does not, or is empty"
    if (out / MANIFEST).is_file():
        way += ", or publish the shards in it with --cloud-url and --upload-only"
    return way


def _storage_options(text: str) -> dict[str, Any]:
    """Raises InputError for what is no JSON object, and for keys that look secret."""
    try:
        options = json.loads(text)
    except ValueError:
        options = None
    if not isinstance(options, dict):
        raise InputError('--storage-options: must be a JSON object, as {"anon": true}')
    for name, _ in secrets_in(options):
        raise InputError(
            f"--storage-options: {name} looks secret, and everybody reads a command's arguments; "
            "give it through the environment, as the provider's tools do"
        )
    return options


def _prune(options: argparse.Namespace) -> int:
    settings = Settings.load(home=options.home, cloud_url=options.cloud_url)
    from lens_pipeline.defs.cleaning import shards_in_use
    from lens_pipeline.registry import Registry
    from lens_pipeline.runner import open_instance
    from lens_pipeline.shards.prune import prune_versions
    from lens_pipeline.tracking import keep_waits_short

    keep_waits_short()
    try:
        referred = Registry(settings).dataset_versions()
    except InputError as problem:
        raise InputError(f"nothing is removed: {problem}") from None
    with open_instance(settings) as instance:
        referred = shards_in_use(instance) | referred
    found = prune_versions(
        settings.cloud,
        options.keep,
        referred=referred,
        dry_run=options.dry_run,
        storage_options=settings.storage_options,
    )
    gone = "would go" if options.dry_run else "removed"
    for one in found:
        state = "kept" if one.kept else gone
        print(f"{one.version}  {one.bytes / 1e6:10.1f} MB  {state:8}  {one.reason}")
    lost = [one.bytes / 1e6 for one in found if not one.kept]
    print(f"{settings.cloud}: {len(lost)} of {len(found)} versions {gone}, {sum(lost):.1f} MB")
    return 0
