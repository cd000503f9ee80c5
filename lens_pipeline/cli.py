"""The command `lens-pipeline`."""

import argparse
import atexit
import difflib
import importlib.metadata
import json
import logging
import os
import re
import shlex
import sys
import textwrap
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn, get_args

from lens_pipeline.commands.predict import add_predict
from lens_pipeline.commands.registry import add_promote, add_retire, add_rollback
from lens_pipeline.commands.shards import add_prepare, add_prune
from lens_pipeline.commands.simulate import add_simulate
from lens_pipeline.commands.train import add_train
from lens_pipeline.commands.tune import add_tune
from lens_pipeline.errors import InputError, masked
from lens_pipeline.settings import DAGSTER_PORT, MLFLOW_PORT, Settings
from lens_pipeline.terminal import (
    INTERRUPTED,
    configure_logging,
    interruptible,
    prepare_environment,
)
from lens_pipeline.training.config import ABBREVIATED
from lens_pipeline.training.launch import TOLD, leave_word

BAD_INPUT = 2
FAILURE = 1
GOES_ON = "the same command goes on where it stopped"


class _Parser(argparse.ArgumentParser):
    """One line on stderr for a command line that is not valid, with the nearest flag that is."""

    commands: Mapping[str, "_Parser"] = {}
    given: Sequence[str] = ()

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**{"allow_abbrev": False, **kwargs})

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        options, unknown = self.parse_known_args(args, namespace)
        if unknown:
            self.commands[options.command].refuse(unknown[0])
        return options

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        self.given = list(args or ())
        return super().parse_known_args(args, namespace)

    def refuse(self, unknown: str) -> NoReturn:
        """Raises InputError for an argument that this command does not have."""
        flags = re.findall(r"--[a-z][a-z-]+", self.format_help())
        flag = unknown.partition("=")[0]
        meant = "--" + ABBREVIATED.get(flag.strip("-"), "").replace("_", "-")
        begun = [one for one in flags if one.startswith(flag)]
        near = [meant] if meant in flags else begun or difflib.get_close_matches(flag, flags, 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        if flag in flags:  # which stood before the command
            hint = f"; name it behind {self.prog.rpartition(' ')[2]}"
        if self.prog.endswith(" run"):
            hint = _elsewhere(flag.lstrip("-").replace("-", "_")) or hint
        self.error(f"unrecognized argument {unknown}{hint}")

    def error(self, message: str) -> NoReturn:
        if message.startswith("the following arguments are required"):
            known = self._option_string_actions
            for one in self.given:  # one that is misspelt is why another is missing
                if one.startswith("--") and one.partition("=")[0] not in known:
                    self.refuse(one)
        wrong = re.match(r"argument .*: invalid choice: '(.*?)' \(choose from (.*)\)", message)
        names = re.findall(r"[\w-]+", wrong[2]) if wrong else []
        if wrong and (near := difflib.get_close_matches(wrong[1], names, 1)):
            message = f"{message}; did you mean {near[0]}?"
        raise InputError(f"{message}; see {self.prog} --help")


def _elsewhere(name: str) -> str:
    """How `run` is told what is no flag of its own; empty for what is no setting."""
    from lens_pipeline.presets import DECIDED
    from lens_pipeline.training.config import TrainConfig

    if name in Settings.model_fields:
        return f"; set {Settings.variable(name)} in the environment"
    for section, info in TrainConfig.model_fields.items():
        left_open = {*info.annotation.model_fields} - {*DECIDED.get(section, ())}  # type: ignore[union-attr]
        if name in left_open:
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
    found = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, about: str, epilog: str | None = None) -> _Parser:
        said = f"{about[0].upper()}{about[1:]}."
        return found.add_parser(name, parents=[common], help=about, description=said, epilog=epilog)

    flags = ("home", "source", "preset", "archs", "verify")
    others = [Settings.variable(name) for name in Settings.model_fields if name not in flags]
    run = command(
        "run",
        "the main job: source to registry",
        epilog=f"Variables of the environment say the rest (docs/settings.md): {', '.join(others)}",
    )
    run.add_argument(
        "--source",
        help="`simulation`, a catalogue, a folder of cutouts or published shards (LENS_SOURCE)",
    )
    presets = get_args(Settings.model_fields["preset"].annotation)
    run.add_argument("--preset", choices=presets, help="how large the job is (LENS_PRESET)")
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

    add_simulate(command("simulate", "make a catalogue of simulated cutouts"))
    add_prepare(command("prepare", "cutouts to WebDataset shards, here and in the cloud"))
    add_prune(command("prune", "remove old versions of published shards"))
    add_train(command("train", "train one network, or several together"))
    add_tune(command("tune", "search the best training settings"))
    add_predict(command("predict", "score the cutouts of a survey"))
    add_promote(command("promote", "make a version of the registered ensemble champion"))
    add_rollback(command("rollback", "make the champion before this one champion again"))
    add_retire(command("retire", "remove old versions of the registered ensemble"))

    show = command("show", "serve the pages of Dagster and MLflow, until Ctrl-C")
    for name, port in (("dagster", DAGSTER_PORT), ("mlflow", MLFLOW_PORT)):
        show.add_argument(f"--{name}-port", type=_port, default=port, help=f"[{port}]")
    show.set_defaults(do=_show)
    parser.commands = found.choices
    return parser


def _port(text: str) -> int:
    if not text.isdecimal() or not 0 < int(text) < 2**16:
        raise argparse.ArgumentTypeError(f"{text} is no port; name one from 1 to 65535")
    return int(text)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns 0, or 1 (failure), 2 (bad input), 130 (interrupted).

    Without `argv` it is the program itself, and the process ends here.
    """
    status = _status(list(sys.argv[1:] if argv is None else argv))
    if argv is None:
        _end_at_once(status)
    return status


def _status(arguments: Sequence[str]) -> int:
    verbose = "--verbose" in arguments
    configure_logging(verbose)
    prepare_environment()
    options = argparse.Namespace()
    try:
        options = _parser().parse_args(arguments)
        return int(options.do(options))
    except (Exception, KeyboardInterrupt) as problem:
        if verbose:
            logging.getLogger(__name__).exception("the command failed")
        if isinstance(problem, InputError) and TOLD in os.environ:
            leave_word(Path(os.environ[TOLD]), problem)
        status, message = _outcome(problem, verbose, getattr(options, "after_interrupt", ""))
    print(f"error: {' '.join(masked(message).split())}", file=sys.stderr)
    return status


def _end_at_once(status: int) -> NoReturn:
    """Orderly, but without Python's last search for what nothing refers to: it takes seconds where
    large libraries are loaded, and somebody waits."""
    try:
        if status != INTERRUPTED:
            threading._shutdown()  # type: ignore[attr-defined]  # waits for threads, as Python does
    except KeyboardInterrupt:
        status = INTERRUPTED
    atexit._run_exitfuncs()
    for stream in filter(None, (sys.stdout, sys.stderr)):  # one that is closed is None
        try:
            stream.flush()
        except OSError as problem:  # a full disk, or nobody who reads
            status = status or FAILURE
            with suppress(OSError):
                print(f"error: what was printed is not whole: {problem}", file=sys.stderr)
    os._exit(status)


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
    from lens_pipeline.presets import chosen_members, member_config

    members = chosen_members(settings)
    changes = _training_changes(options.set, [member.name for member in members])
    for member in members:  # before hours of work are done for it
        config = member_config(settings, member).with_changes(changes.get(member.name, {}), "--set")
        if config.starts_from_a_file and not Path(config.model.pretrained).is_file():
            raise InputError(f"model.pretrained: {config.model.pretrained}: there is no such file")
    with interruptible():
        from lens_pipeline.registry import answering
        from lens_pipeline.runner import prepare_home, run_pipeline
        from lens_pipeline.tracking import Tracking, short_waits

        prepare_home(settings)
        with short_waits(), answering("MLFLOW_TRACKING_URI"):
            _ = Tracking(settings).client  # before hours of work are done for it
        run_pipeline(settings, changes, options.verbose)
    _print_summary(settings)
    return 0


def _training_changes(assignments: Sequence[str], members: Sequence[str]) -> dict[str, Any]:
    """`[member.]section.field=value` -> {member: {section: {field: value}}}."""
    from lens_pipeline.presets import left_open
    from lens_pipeline.settings_files import parse_yaml
    from lens_pipeline.training.config import TrainConfig

    changes: dict[str, Any] = {}
    for assignment in assignments:
        path, equals, text = assignment.partition("=")
        parts = path.split(".")
        if not equals or len(parts) not in (2, 3):
            hint = _elsewhere(parts[-1])
            raise InputError(f"--set {assignment}: must be [MEMBER.]SECTION.FIELD=VALUE{hint}")
        *member, section, field = parts
        if not member and section in members and (hint := _elsewhere(field)):
            raise InputError(f"--set {assignment}: names no section{hint}")
        if member and member[0] not in members:
            raise InputError(f"--set {assignment}: the members are {', '.join(members)}")
        try:
            value = parse_yaml(text)
        except ValueError:
            raise InputError(f"--set {assignment}: {text!r} is not a value") from None
        change = left_open({section: {field: value}}, f"--set {assignment}")
        parsed = TrainConfig.parse(change, f"--set {assignment}")
        value = getattr(getattr(parsed, section), field)  # 5e-4 is text for YAML
        for name in member or members:
            changes.setdefault(name, {}).setdefault(section, {})[field] = value
    return changes


def _print_summary(settings: Settings) -> None:
    from lens_pipeline.evaluation.tables import (
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
    before = " (before this run)" if summary["stages"]["registered_ensemble"]["reused"] else ""
    print(f"Registered  {model['name']}, version {model['version']}{before}; aliases: {aliases}")
    for reason in summary["gate"]["reasons"]:
        print(f"            gate: {reason}")
    print(f"Report      {summary['report']}")
    print(f"Scores      {summary['scores']}")
    print(f"To look around: lens-pipeline show --home {shlex.quote(str(settings.home))}")


def _show(options: argparse.Namespace) -> int:
    from lens_pipeline.runner import settings_of_home
    from lens_pipeline.serve import serve

    settings = settings_of_home(options.home)
    settings.export()

    with interruptible():
        return serve(settings, options.dagster_port, options.mlflow_port, options.verbose)


if __name__ == "__main__":
    sys.exit(main())
