"""What the pages show of an asset: tables, links, pictures, and files that are only looked at."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dagster as dg

from lens_pipeline.errors import masked
from lens_pipeline.settings import Settings
from lens_pipeline.steps import Recipe, Step, run_step

if TYPE_CHECKING:
    import pandas as pd

FIRST = 20  # rows that are shown of a longer table


def link(address: str | None, otherwise: str | dg.MetadataValue) -> str | dg.MetadataValue:
    """A link as metadata, or what is shown where there is no such page."""
    return dg.MetadataValue.url(address) if address else otherwise


def linked_table(
    rows: "pd.DataFrame", links: Mapping[str, Mapping[str, str | None]]
) -> dg.MetadataValue:
    """A data frame as a table in Markdown, whose cells may be links.

    links: {column: {what stands in a cell: the address it leads to, if any}}.
    """

    def cell(column: str, value: Any) -> str:
        text = _shown(value).replace("|", "\\|")
        address = links.get(column, {}).get(text)
        return f"[{text}]({address})" if address else text

    lines = [[str(name) for name in rows], ["---"] * len(rows.columns)]
    lines += [[cell(str(name), value) for name, value in row.items()] for _, row in rows.iterrows()]
    return dg.MetadataValue.md("\n".join(f"| {' | '.join(line)} |" for line in lines))


def column_schema(rows: "pd.DataFrame", help_of: Mapping[str, str]) -> dg.TableSchema:
    """The columns of a table as the UI lists them, those that are known with what they mean.

    Text is text: pandas has several types for it, by where the table was read from.
    """
    from pandas.api.types import is_object_dtype, is_string_dtype

    return dg.TableSchema(
        [
            dg.TableColumn(
                str(name),
                type="text" if is_string_dtype(kind) or is_object_dtype(kind) else str(kind),
                description=help_of.get(str(name)),
            )
            for name, kind in rows.dtypes.items()
        ]
    )


def table(rows: "pd.DataFrame", otherwise: str = "none") -> dg.MetadataValue:
    """A data frame as metadata that the UI shows as a table, or what it says where no row is."""
    if rows.empty:
        return dg.MetadataValue.text(otherwise)
    return dg.MetadataValue.table(
        [
            dg.TableRecord({str(name): _shown(value) for name, value in row.items()})
            for _, row in rows.iterrows()
        ],
        dg.TableSchema([dg.TableColumn(str(name)) for name in rows]),
    )


def _shown(value: Any) -> str:
    """A cell of a table: three digits, nothing where there is nothing, no secret of a URL."""
    from pandas import isna
    from pandas.api.types import is_scalar

    if is_scalar(value) and isna(value):
        return ""
    return f"{value:.3g}" if isinstance(value, float) else masked(str(value))


def drawn(name: str, of: Step, draw: Callable[[], bytes], module: str, settings: Settings) -> Path:
    """The PNG or JPEG file `name`, drawn from what a step made by a function of a module.

    With another colour it is drawn again, and no network trained again.
    """
    return derived("pictures", name, of.content, draw, settings, (module,), ("matplotlib",))


def derived(
    kind: str,
    name: str,
    of: str,
    content: Callable[[], bytes],
    settings: Settings,
    modules: tuple[str, ...],
    libraries: tuple[str, ...],
) -> Path:
    """The file `name` among those of a kind, of what a step made. It is a step of its own: what is
    only looked at is written once, and nothing else is made again when it changes.

    of: a hash of what the step made; modules, libraries: see `Recipe`.
    """
    recipe = Recipe(f"{kind}/{name}", modules, libraries, inputs={"step": of})
    step = run_step(recipe, settings.home / kind, lambda out: (out / name).write_bytes(content()))
    return step.folder / name


def picture(path: Path) -> dg.MetadataValue:
    """A PNG or JPEG file as metadata that the UI shows in place."""
    import base64
    import mimetypes

    encoded = base64.b64encode(path.read_bytes()).decode()
    kind, _ = mimetypes.guess_type(path.name)
    return dg.MetadataValue.md(f"![{path.stem}](data:{kind};base64,{encoded})")
