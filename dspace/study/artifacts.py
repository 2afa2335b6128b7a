"""Where trials leave their files: the study's folder, a folder that all machines see, or an S3 bucket."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from dspace.errors import StorageError, UserError
from dspace.study.schema import StudyFile
from dspace.study.storage import Home


def store_of(home: Home, study: StudyFile) -> Any:
    """Optuna's artifact store of a study. Raises StorageError for a place that cannot be used."""
    from optuna.artifacts import Backoff, Boto3ArtifactStore, FileSystemArtifactStore

    place = study.artifacts
    if place is None or "://" not in place:
        folder = home.artifacts if place is None else Path(place)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError(
                f"{folder}: artifacts cannot be kept there ({error.strerror})\n"
                '  cure: artifacts = "..." in the study file, a folder that every machine can write'
            ) from None
        return FileSystemArtifactStore(str(folder))
    parts = urlsplit(place)
    if parts.scheme != "s3" or not parts.netloc or parts.path.strip("/"):
        raise UserError(f"artifacts = {place!r} is not understood\n  cure: a folder, or s3://BUCKET")
    try:
        return Backoff(Boto3ArtifactStore(parts.netloc))
    except ImportError:
        raise UserError("artifacts on S3 need boto3\n  cure: pip install boto3") from None


def fetch(home: Home, study: StudyFile, artifact_id: str) -> Path | None:
    """A local path of an artifact (fetched into the study's folder where it is elsewhere), or None if it is gone."""
    local = home.artifacts / artifact_id
    if local.is_file():
        return local
    if study.artifacts is None:
        return None
    try:
        with store_of(home, study).open_reader(artifact_id) as reader:
            home.artifacts.mkdir(parents=True, exist_ok=True)
            local.write_bytes(reader.read())
    except Exception:  # each store has its own way of saying that there is none
        return None
    return local
