"""The command `lens-pipeline`."""

import argparse
import difflib
import importlib.metadata
import json
import logging
import re
import sys
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from lens_pipeline.errors import InputError, masked
from lens_pipeline.predict_command import add_predict
from lens_pipeline.settings import Settings, absolute
from lens_pipeline.steps import folder_aside
from lens_pipeline.terminal import INTERRUPTED, configure_logging, interruptible
from lens_pipeline.train_command import add_train
from lens_pipeline.tune_command import add_tune

BAD_INPUT = 2
FAILURE = 1
SECRET_WORDS = ("key", "secret", "token", "password")
GOES_ON = "the same command goes on where it stopped"


class _Parser(argparse.ArgumentParser):
    """One line on stderr for a command line that is not valid, with the nearest flag that is."""

    commands: Mapping[str, argparse.ArgumentParser] = {}

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        options, unknown = self.parse_known_args(args, namespace)
        if unknown:
            command = self.commands[options.command]
            flags = re.findall(r"--[a-z][a-z-]+", command.format_help())
            flag = unknown[0].partition("=")[0]
            near = difflib.get_close_matches(flag, flags, 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            if options.command == "run":
                hint = _elsewhere(flag.lstrip("-").replace("-", "_")) or hint
            command.error(f"unrecognized argument {unknown[0]}{hint}")
        return options

    def error(self, message: str) -> NoReturn:
        wrong = re.match("argument COMMAND: invalid choice: '(.*?)'", message)
        near = difflib.get_close_matches(wrong[1], self.commands, 1) if wrong else []
        if near:
            message = f"{message}; did you mean {near[0]}?"
        raise InputError(f"{message}; see {self.prog} --help")


def _elsewhere(name: str) -> str:
    """How `run` is told what is no flag of its own; empty for what is no setting."""
    from lens_pipeline.training.config import TrainConfig

    if name in Settings.model_fields:
        return f"; set LENS_{name.upper()} in the environment"
    for section, info in TrainConfig.model_fields.items():
        if name in info.annotation.model_fields:  # type: ignore[union-attr]
            return f"; say --set {section}.{name}=..."
    return ""


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="lens-pipeline",
        description="From survey cutouts to a registered ensemble that finds gravitational lenses.",
    )
    version = importlib.metadata.version("lens-pipeline")
    parser.add_argument("--version", action="version", version=f"lens-pipeline {version}")
    common = _Parser(add_help=False)
    common.add_argument("--home", help="where everything is written (LENS_HOME)")
    common.add_argument("--verbose", action="store_true", help="logs and tracebacks")
    common.set_defaults(after_interrupt=GOES_ON)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    flags = ("home", "source", "preset", "archs", "verify")
    others = [f"LENS_{name.upper()}" for name in Settings.model_fields if name not in flags]
    run = commands.add_parser(
        "run",
        parents=[common],
        help="the main job: source to registry",
        epilog=f"Variables of the environment say the rest (README, Settings): {', '.join(others)}",
    )
    run.add_argument("--source", help="`simulation`, or a catalogue (LENS_SOURCE)")
    run.add_argument("--preset", help="tiny, quick or full (LENS_PRESET)")
    run.add_argument("--archs", help="members, comma-separated (LENS_ARCHS)")
    run.add_argument("--verify", action="store_true", help="check sha256 of what is reused")
    run.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="[MEMBER.]SECTION.FIELD=VALUE",
        help="a training setting, of one member or of all: resnet18.training.epochs=5",
    )
    run.set_defaults(do=_run)

    simulate = commands.add_parser("simulate", parents=[common], help="a catalogue of simulations")
    simulate.add_argument(
        "--survey", default="des", help="des, hsc, lsst, euclid_vis or cfhtls; several: des,hsc"
    )
    simulate.add_argument("--config", type=Path, help="a YAML file that changes the simulation")
    simulate.add_argument("--n", type=int, default=1000, help="cutouts (default 1000)")
    simulate.add_argument("--seed", type=int, default=0)
    simulate.add_argument("--image-size", type=int, default=64, help="pixels (default 64)")
    simulate.add_argument("--device", default="cpu", help="a torch device (default cpu)")
    simulate.add_argument(
        "--compile", action="store_true", help="compile the ray tracing: pays for many thousands"
    )
    simulate.add_argument("--out", type=Path, required=True, help="a folder that does not exist")
    simulate.set_defaults(do=_simulate, after_interrupt="the same command begins again")

    prepare = commands.add_parser(
        "prepare", parents=[common], help="cutouts to WebDataset shards, here and in the cloud"
    )
    prepare.add_argument(
        "--data-root", help="a catalogue, a folder of cutouts, a processed dataset"
    )
    prepare.add_argument(
        "--output-dir", type=Path, required=True, help="where the shards lie, or will lie"
    )
    prepare.add_argument("--shard-size", type=int, default=1000, help="cutouts (default 1000)")
    prepare.add_argument("--image-size", type=int, help="pixels (default 64, or the dataset's)")
    prepare.add_argument("--encoding", help="float16 (default), float32, png16 or jpg")
    prepare.add_argument("--quality", type=int, help="of jpg, which it chooses: 1 to 100")
    prepare.add_argument("--cloud-url", help="where to publish: s3://, gs:// or a folder")
    prepare.add_argument("--storage-options", default="{}", help="fsspec's, JSON; no secrets")
    prepare.add_argument(
        "--upload-only", action="store_true", help="publish the shards that lie there already"
    )
    prepare.add_argument("--validate", action="store_true", help="read all back and check it")
    prepare.set_defaults(
        do=_prepare,
        after_interrupt="the same command begins again, or, where --output-dir is there already, "
        "goes on with its upload by --upload-only",
    )

    prune = commands.add_parser(
        "prune", parents=[common], help="remove old versions of published shards"
    )
    prune.add_argument("--cloud-url", help="where they are published (LENS_CLOUD_URL)")
    prune.add_argument("--keep", type=int, required=True, help="how many of the newest stay")
    prune.add_argument("--dry-run", action="store_true", help="only say what would go")
    prune.set_defaults(do=_prune)

    train = commands.add_parser("train", parents=[common], help="one network, or several together")
    add_train(train)

    tune = commands.add_parser("tune", parents=[common], help="search the best training settings")
    add_tune(tune)

    predict = commands.add_parser("predict", parents=[common], help="score the cutouts of a survey")
    add_predict(predict)

    promote = commands.add_parser("promote", parents=[common], help="make a version champion")
    promote.add_argument("version", help="a version of lens_ensemble")
    promote.set_defaults(do=_promote)
    rollback = commands.add_parser(
        "rollback", parents=[common], help="make the champion before this one champion again"
    )
    rollback.set_defaults(do=_rollback, after_interrupt="look who is champion before you repeat it")

    show = commands.add_parser("show", parents=[common], help="open the Dagster and MLflow UIs")
    show.add_argument("--dagster-port", type=_port, default=3000)
    show.add_argument("--mlflow-port", type=_port, default=5000)
    show.set_defaults(do=_show)
    parser.commands = commands.choices
    return parser


def _port(text: str) -> int:
    if not text.isdecimal() or not 0 < int(text) < 2**16:
        raise argparse.ArgumentTypeError(f"{text} is no port; name one from 1 to 65535")
    return int(text)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns 0, or 1 (failure), 2 (bad input), 130 (interrupted)."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    verbose = "--verbose" in arguments
    configure_logging(verbose)
    options = argparse.Namespace()
    try:
        options = _parser().parse_args(arguments)
        return int(options.do(options))
    except (Exception, KeyboardInterrupt) as problem:
        if verbose:
            logging.getLogger(__name__).exception("the command failed")
        status, message = _outcome(problem, verbose, getattr(options, "after_interrupt", ""))
    print(f"error: {' '.join(masked(message).split())}", file=sys.stderr)
    return status


def _outcome(problem: BaseException, verbose: bool, after_interrupt: str) -> tuple[int, str]:
    """(exit status, what to say) of what ended a command."""
    if isinstance(problem, InputError):
        return BAD_INPUT, str(problem)
    if isinstance(problem, KeyboardInterrupt):
        return INTERRUPTED, f"interrupted; {after_interrupt}".removesuffix("; ")
    hint = "" if verbose else " (--verbose shows where)"
    return FAILURE, f"{type(problem).__name__}: {problem}{hint}"


def _run(options: argparse.Namespace) -> int:
    settings = Settings.load(
        home=options.home,
        source=options.source,
        preset=options.preset,
        archs=options.archs,
        verify=options.verify or None,
    )
    settings.export()
    from lens_pipeline.presets import chosen_members

    changes = _training_changes(options.set, [m.name for m in chosen_members(settings)])
    with interruptible():
        from lens_pipeline.registry import answering
        from lens_pipeline.runner import run_pipeline
        from lens_pipeline.tracking import Tracking, keep_waits_short

        keep_waits_short()
        with answering("MLFLOW_TRACKING_URI"):
            assert Tracking(settings).client  # before hours of work are done for it
        run_pipeline(settings, changes, options.verbose)
    _print_summary(settings)
    return 0


def _training_changes(assignments: Sequence[str], members: Sequence[str]) -> dict[str, Any]:
    """`[member.]section.field=value` -> {member: {section: {field: value}}}."""
    import yaml

    from lens_pipeline.presets import left_open
    from lens_pipeline.training.config import TrainConfig

    changes: dict[str, Any] = {}
    for assignment in assignments:
        path, equals, text = assignment.partition("=")
        parts = path.split(".")
        if not equals or len(parts) not in (2, 3):
            raise InputError(f"--set {assignment}: must be [MEMBER.]SECTION.FIELD=VALUE")
        *member, section, field = parts
        if member and member[0] not in members:
            raise InputError(f"--set {assignment}: the members are {', '.join(members)}")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError:
            raise InputError(f"--set {assignment}: {text!r} is not a value") from None
        change = left_open({section: {field: value}}, f"--set {assignment}")
        parsed = TrainConfig.parse(change, f"--set {assignment}")
        value = getattr(getattr(parsed, section), field)  # 5e-4 is text for YAML
        for name in member or members:
            changes.setdefault(name, {}).setdefault(section, {})[field] = value
    return changes


def _print_summary(settings: Settings) -> None:
    from lens_pipeline.evaluation.report import (
        format_kinds,
        format_metrics_table,
        format_origins,
        format_surveys,
    )

    summary = json.loads((settings.reports / "summary.json").read_text())
    model = summary["model"]
    aliases = ", ".join(model["aliases"]) or "none"
    print()
    print(format_metrics_table({**summary["members"], "ensemble": summary["ensemble"]}))
    for what, line in (
        ("origins", format_origins),
        ("kinds", format_kinds),
        ("surveys", format_surveys),
    ):
        if summary[what]:
            print(textwrap.fill(line(summary[what]), 88, subsequent_indent="  "))
    print()
    print(f"Registered  {model['name']}, version {model['version']}; aliases: {aliases}")
    for reason in summary["gate"]["reasons"]:
        print(f"            gate: {reason}")
    print(f"Report      {summary['report']}")
    print(f"Scores      {summary['scores']}")
    print(f"To look around: lens-pipeline show --home {settings.home}")


def _simulate(options: argparse.Namespace) -> int:
    if options.n < 1:
        raise InputError(f"--n {options.n}: at least 1 is needed")
    out: Path = options.out
    if out.exists():
        raise InputError(f"--out {out}: exists already; name a folder that does not")
    from lens_pipeline.simulation import load_config
    from lens_pipeline.simulation.simulate import simulate_surveys

    names = options.survey.split(",")
    configs = [load_config(name.strip(), options.config) for name in names]
    with interruptible(), folder_aside(out) as aside:
        simulate_surveys(
            aside,
            configs,
            options.n,
            options.seed,
            device=options.device,
            image_size=options.image_size,
            compiled=options.compile,
            storage_options=Settings.load(home=options.home).storage_options,
        )
        _draw_kinds(aside)
    import pandas as pd

    label = pd.read_parquet(out / "catalogue.parquet", columns=["label"])["label"]
    print(
        f"{len(label)} cutouts: {int((label == 1).sum())} lenses, {int((label == 0).sum())} decoys"
    )
    print(out / "catalogue.parquet")
    print(out / "kinds.jpg")
    return 0


def _draw_kinds(folder: Path) -> None:
    """The picture of a simulated catalogue: some cutouts of each kind, by turns of each survey."""
    import numpy as np
    import pandas as pd

    from lens_pipeline.evaluation.plots import PER_KIND, jpeg_bytes, kinds_sheet

    table = pd.read_parquet(folder / "catalogue.parquet", columns=["path", "kind", "survey"])
    turn = table.groupby(["survey", "kind"]).cumcount().sort_values(kind="stable").index
    shown = table.loc[turn].groupby("kind", sort=False).head(PER_KIND)
    places = [path.split("#") for path in shown["path"]]
    images = np.stack([np.load(folder / name, mmap_mode="r")[int(row)] for name, row in places])
    figure = kinds_sheet(images, shown["kind"].tolist(), "background_sigma")
    (folder / "kinds.jpg").write_bytes(jpeg_bytes(figure))


def _prepare(options: argparse.Namespace) -> int:
    settings = Settings.load(home=options.home)
    storage = settings.storage_options | _storage_options(options.storage_options)
    out: Path = options.output_dir
    if options.upload_only and not options.cloud_url:
        raise InputError("--upload-only: needs --cloud-url, where to publish")
    if not options.upload_only:
        if not options.data_root:
            raise InputError("--data-root: is needed, unless with --upload-only")
        if out.exists():
            raise InputError(f"--output-dir {out}: exists already; {_way_out(out)}")
        from lens_pipeline.shards.prepare import prepare_shards

        with interruptible(), folder_aside(out) as aside:
            prepare_shards(
                absolute(options.data_root),
                aside,
                shard_size=options.shard_size,
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
    from lens_pipeline.shards.manifest import read_manifest

    manifest = read_manifest(out)
    places: list[tuple[str, dict[str, Any]]] = [(str(out), {})]
    if options.cloud_url:
        from lens_pipeline.shards.cloud import publish_shards

        published = publish_shards(out, absolute(options.cloud_url), storage_options=storage)
        places.append((published.url, storage))
    for place, how in places:
        if options.validate:
            from lens_pipeline.shards.manifest import verify_shards

            problems = verify_shards(place, how)
            if problems:
                raise InputError(f"{len(problems)} problems; the first: {problems[0]}")
        print(f"{place}  {'checked' if options.validate else 'written'}")
        for pattern in manifest.patterns(place).values():
            print(f"  {pattern}")
    print(f"dataset version {manifest.dataset_version}")
    return 0


def _way_out(out: Path) -> str:
    """What to do where shards shall be written to a folder that is there."""
    from lens_pipeline.shards.manifest import MANIFEST

    way = "name a folder that does not"
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
    waiting: list[Any] = [options]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            for name in value:
                if any(word in name.lower() for word in SECRET_WORDS):
                    raise InputError(
                        f"--storage-options: {name} looks secret, and everybody reads a command's "
                        "arguments; give it through the environment, as the provider's tools do"
                    )
            waiting += value.values()
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
                f"promote {options.version}: {MODEL} has the versions "
                f"{', '.join(known) or '(none)'}"
            )
        verdict = registry.version(options.version).tags.get(GATE, PASSED)
        registry.promote(options.version)
        against = () if verdict == PASSED else (f"before: {verdict}",)
        registry.judge(options.version, ("promoted by hand", *against))
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


def _show(options: argparse.Namespace) -> int:
    from lens_pipeline.runner import settings_of_home
    from lens_pipeline.serve import serve

    settings = settings_of_home(options.home)
    settings.export()

    with interruptible():
        return serve(settings, options.dagster_port, options.mlflow_port)


if __name__ == "__main__":
    sys.exit(main())
