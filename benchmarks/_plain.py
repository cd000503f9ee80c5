"""The main job as a plain script: the library's functions in the order of the assets, in one
process, with neither Dagster nor MLflow nor reuse. Prints {stage: seconds} as JSON.

python -m benchmarks._plain FOLDER CUTOUTS
"""

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lens_pipeline import presets
from lens_pipeline.settings import Settings

seconds: dict[str, float] = {}


@contextmanager
def stage(name: str, folder: Path) -> Iterator[Path]:
    begun = time.perf_counter()
    out = folder / name
    out.mkdir(parents=True)
    yield out
    seconds[name] = time.perf_counter() - begun


def run(folder: Path, n: int) -> None:
    settings = Settings.load(home=folder, preset="tiny")
    size = presets.image_size(settings)

    with stage("cutout_catalogue", folder) as made:
        from lens_pipeline.catalogue.table import read_catalogue
        from lens_pipeline.simulation import load_config
        from lens_pipeline.simulation.simulate import simulate_catalogue

        config = load_config("des", None)
        simulated = simulate_catalogue(made, config, n, settings.seed, image_size=size)
        catalogue = read_catalogue(simulated)

    with stage("processed_dataset", folder) as made:
        from lens_pipeline.catalogue.build import build_dataset
        from lens_pipeline.evaluation.plots import jpeg_bytes, learning_curves_figure, png_bytes
        from lens_pipeline.evaluation.sheets import first_cutouts_sheet

        dataset = build_dataset(catalogue, made, image_size=size, origin="simulation")
        dataset.groups_in_two_splits()
        dataset.near_duplicates()
        train_images, train_table = dataset.images("train"), dataset.table("train")
        sheet = first_cutouts_sheet(train_images, train_table, dataset.format.units)
        (made / "cutouts.jpg").write_bytes(jpeg_bytes(sheet))

    with stage("lens_shards", folder) as made:
        from lens_pipeline.shards.writer import write_shards

        write_shards(dataset.folder, made)

    with stage("cloud_shards", folder) as cloud:
        from lens_pipeline.shards.cloud import publish_shards, published_problems

        published = publish_shards(made, str(cloud))
        assert not published_problems(made, published.url)

    members = {}
    # Dagster's order: whoever is first imports what the others find.
    for member in sorted(presets.chosen_members(settings), key=lambda member: member.name):
        with stage(f"checkpoints/{member.name}", folder) as made:
            from scipy.special import expit

            from lens_pipeline.evaluation.metrics import lens_metrics
            from lens_pipeline.shards.datamodule import LensDataModule
            from lens_pipeline.training.member import TrainedMember
            from lens_pipeline.training.train import train

            chosen = presets.member_config(settings, member)
            data = LensDataModule(
                data_root=published.url,
                batch_size=chosen.training.batch_size,
                num_workers=chosen.data.num_workers,
                seed=chosen.training.seed,
            )
            train(chosen, data, made)
            trained = members[member.name] = TrainedMember(made)
            scores = trained.val_scores
            lens_metrics(scores["label"], expit(scores["logit"]), bootstrap=0)
            (made / "curves.png").write_bytes(png_bytes(learning_curves_figure(trained.curves)))

    with stage("lens_ensemble", folder) as ensemble:
        from lens_pipeline.ensemble.assembly import assemble

        parts = {name: (t.checkpoint, t.val_scores) for name, t in members.items()}
        facts = {"dataset": dataset.facts["content"], "dataset_version": published.dataset_version}
        facts |= {"simulated": True, "learnt_from": "", "member_steps": {}}
        groups = {*dataset.table("train")["group"], *dataset.table("val")["group"]}
        assemble(
            parts,
            dataset.format,
            ensemble,
            facts,
            groups,
            fusion=settings.fusion,
            calibration=settings.calibration,
            prevalence=settings.prevalence,
        )

    with stage("ensemble_evaluation", folder) as made:
        from lens_pipeline.scoring.evaluate import evaluate_ensemble

        evaluate_ensemble(ensemble, dataset, catalogue, made, gate=settings.gate)


if __name__ == "__main__":
    run(Path(sys.argv[1]), int(sys.argv[2]))
    print(json.dumps(seconds))
