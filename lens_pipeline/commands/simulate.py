"""`lens-pipeline simulate`: a catalogue of simulated cutouts, and a picture of their kinds."""

import argparse
from pathlib import Path

from lens_pipeline.errors import InputError
from lens_pipeline.files import folder_aside, is_taken
from lens_pipeline.settings import Settings
from lens_pipeline.terminal import interruptible, local_path


def add_simulate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--survey",
        help="des, hsc, lsst, euclid_vis or cfhtls; several: des,hsc (LENS_SURVEY, else des)",
    )
    parser.add_argument(
        "--config",
        type=local_path,
        help="a YAML file that changes the simulation (LENS_SIMULATION)",
    )
    parser.add_argument("--n", type=int, default=1000, help="cutouts (default 1000)")
    parser.add_argument("--seed", type=int, help="of all that is drawn (LENS_SEED, else 0)")
    parser.add_argument("--image-size", type=int, default=64, help="pixels, 32 to 512 (default 64)")
    parser.add_argument("--device", default="cpu", help="a torch device (default cpu)")
    parser.add_argument(
        "--compile", action="store_true", help="compile the ray tracing: pays for many thousands"
    )
    parser.add_argument(
        "--out", type=local_path, required=True, help="a folder that does not exist, or is empty"
    )
    parser.set_defaults(do=_simulate, after_interrupt="the same command begins again")


def _simulate(options: argparse.Namespace) -> int:
    out: Path = options.out
    if is_taken(out):
        raise InputError(f"--out {out}: exists already; name a folder that does not, or is empty")
    from lens_pipeline.simulation import load_configs
    from lens_pipeline.simulation.simulate import simulate_surveys

    settings = Settings.load(
        home=options.home,
        survey=options.survey,
        simulation=options.config and str(options.config),
        seed=options.seed,
    )
    configs = load_configs(settings.survey, settings.simulation)
    with interruptible(), folder_aside(out) as aside:
        simulate_surveys(
            aside,
            configs,
            options.n,
            settings.seed,
            device=options.device,
            image_size=options.image_size,
            compiled=options.compile,
            storage_options=settings.storage_options,
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

    from lens_pipeline.catalogue.cutout import SIGMA_UNITS
    from lens_pipeline.evaluation.plots import jpeg_bytes
    from lens_pipeline.evaluation.sheets import PER_KIND, kinds_sheet

    table = pd.read_parquet(folder / "catalogue.parquet", columns=["path", "kind", "survey"])
    turn = table.groupby(["survey", "kind"]).cumcount().sort_values(kind="stable").index
    shown = table.loc[turn].groupby("kind", sort=False).head(PER_KIND)
    places = [path.split("#") for path in shown["path"]]
    images = np.stack([np.load(folder / name, mmap_mode="r")[int(row)] for name, row in places])
    figure = kinds_sheet(images, shown["kind"].tolist(), SIGMA_UNITS)
    (folder / "kinds.jpg").write_bytes(jpeg_bytes(figure))
