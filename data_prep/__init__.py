"""Data at a site: read, clean, split, encode. The registry of modalities."""

from importlib import import_module
from pathlib import Path

from ..config import ConfigError, RunConfig
from .modality import Encoded, Modality
from .schema import ImageSchema, Schema, load_schema

__all__ = [
    "MODALITIES",
    "Encoded",
    "Modality",
    "Schema",
    "check_unit",
    "held_by",
    "modality",
    "run_schema",
]

MODALITIES = {
    "table": "tabular:MODALITY",
    "image": "images:MODALITY",
    "text": "texts:MODALITY",
}

_PERSON_MENDS = {
    "table": 'name the column of its key, person = "...", or ',
    "image": "",
    "text": 'name its key in a line of .jsonl, person = "...", or ',
}


def modality(schema: Schema) -> Modality:
    """The functions for a schema's kind of data, imported on use."""
    module, name = MODALITIES[schema.modality].split(":")
    found = getattr(import_module(f".{module}", __name__), name)
    if not isinstance(found, Modality):
        raise TypeError(f"{module}:{name} is no Modality")
    return found


def held_by(source: str) -> str:
    """The modality that a file or folder seems to be of, by its endings alone."""
    path = Path(source)
    if path.is_dir():
        from .images import image_files
        from .texts import text_files

        return "text" if text_files(path) and not image_files(path) else "image"
    ending = path.suffix.lower()
    return {".npz": "image", ".txt": "text", ".jsonl": "text"}.get(ending, "table")


def check_unit(config: RunConfig, schema: Schema) -> None:
    """Refuses to hide persons where nothing says whose a record is.

    Raises:
        ConfigError: The unit is a person, and the schema names no key of one.
    """
    if config.unit == "person" and schema.person is None:
        mend = _PERSON_MENDS[schema.modality]
        raise ConfigError(
            f'privacy.unit = "person": the schema of these {schema.modality}s knows no person; '
            f'{mend}use privacy.unit = "record"'
        )


def run_schema(config: RunConfig) -> Schema:
    """The schema of a run: the declared file, or the built-in one of an `sklearn:` source.

    Raises:
        ConfigError: None is declared, or it is unusable.
    """
    data = config.data
    if data.schema_file is not None:
        return load_schema(data.schema_file)
    if data.source == "sklearn:digits":
        return ImageSchema(height=8, width=8, classes=tuple("0123456789"))
    if data.source == "sklearn:breast_cancer":
        from .tabular import breast_cancer_schema

        return breast_cancer_schema()
    if data.source.startswith("sklearn:"):
        raise ConfigError(
            f"data.source = {data.source}: unknown; known are sklearn:digits, sklearn:breast_cancer"
        )
    raise ConfigError(
        "data.schema: missing: name the TOML file that declares the columns and their bounds"
    )
