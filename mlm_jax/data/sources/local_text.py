"""Text files as a TensorFlow data set: `write_local_text` writes it, a source `tfds:FOLDER` reads it, both without TensorFlow."""

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mlm_jax.config import InputError, SourceConfig
from mlm_jax.data.sources import documents
from mlm_jax.data.sources.base import missing

try:
    import tensorflow_datasets as tfds
except ImportError as e:
    raise missing("tfds:", e) from e


class LocalText(tfds.core.GeneratorBasedBuilder):
    """The documents of a source: `text`, the `prompt` before it, the `url` and `where` it came from, empty where there is none.

    Pages of HTML are stored as they are: whoever reads them sets `data.clean.html`.
    """

    VERSION = tfds.core.Version("1.0.0")
    url_infos = None  # nothing is downloaded

    def __init__(self, *, source: SourceConfig | None = None, **settings: Any) -> None:
        self._source = source or SourceConfig()
        super().__init__(**settings)

    def _info(self) -> Any:
        fields = {name: tfds.features.Text() for name in ("text", "prompt", "url", "where")}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(fields), disable_shuffling=True)

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        return {"train": self._generate_examples()}

    def _generate_examples(self) -> Iterator[tuple[int, dict[str, str]]]:
        for index, document in enumerate(documents(self._source)):
            yield index, {name: getattr(document, name) for name in ("text", "prompt", "url", "where")}


def write_local_text(source: SourceConfig, folder: Path) -> Path:
    """Writes the documents of a source as a data set below `folder`; returns the folder to name as tfds:FOLDER.

    Raises:
      InputError: the source cannot be used, or some of it cannot be read; or the folder holds one already.
    """
    builder = LocalText(source=source, data_dir=str(folder), file_format="array_record")
    if Path(builder.data_dir).exists():
        raise InputError("folder", str(folder), "holds a data set already", "Name another folder")
    tfds.disable_progress_bar()
    with contextlib.redirect_stdout(sys.stderr):
        builder.download_and_prepare()
    return Path(builder.data_dir)
