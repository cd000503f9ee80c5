"""What assets are given: the settings, the tracking server and its registry."""

import dagster as dg

from lens_pipeline.registry import Registry
from lens_pipeline.settings import Settings
from lens_pipeline.tracking import Tracking


class LensHome(dg.ConfigurableResource):
    """LENS_HOME and all else that the environment says, read when a step runs."""

    @property
    def settings(self) -> Settings:
        return Settings.load()

    @property
    def tracking(self) -> Tracking:
        return Tracking(self.settings)

    @property
    def registry(self) -> Registry:
        return Registry(self.settings)
