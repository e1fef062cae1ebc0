"""Models that are fetched from a model hub if they are not there, and checks of the files that are.

A folder is filled file by file, and a file that is there is never touched: what was placed by hand stays, and
a fetch that was stopped goes on from what it had. Pickles are never fetched.
"""

from __future__ import annotations

import glob
import json
import logging
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flowtilt.checkpoints import CheckpointError, sha256_of
from flowtilt.domains.images.sections import HubConfig, SourceConfig
from flowtilt.files import atomic_path, read_json, write_text
from flowtilt.pipeline.configuration import ConfigError
from flowtilt.pipeline.domain import Job
from flowtilt.pipeline.places import located

if TYPE_CHECKING:
    from flowtilt.domains.images.experiment import ImageExperiment

log = logging.getLogger(__name__)

LISTING = ".hub.json"
"""File in a fetched folder: the names of all files of its repository, and of which revision."""

WEIGHTS = ".safetensors"
PICKLES = (".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth")
"""Endings of files that can run code when they are opened."""


@dataclass(frozen=True)
class Wanted:
    """Files of a repository, and where they belong.

    Attributes:
        hub: the repository, its revision, and patterns of the files.
        key: of the configuration that asks for them, for messages.
        place: where a file is to be placed by hand, for messages.
    """

    hub: HubConfig
    folder: Path
    key: str
    place: str


def fetch_job(job: Job) -> None:
    """The stage of :func:`fetch`."""
    fetch(job.experiment, job.outputs["fetched"])


def fetch(experiment: ImageExperiment, output: Path) -> None:
    """Fetch those models of an experiment that have a key ``hub`` and are not there, and check them.

    Args:
        output: JSON file to write: what was fetched, from where, and the SHA-256 of all weights.

    Raises:
        CheckpointError: if files cannot be fetched, or are not those that the configuration means.
        ConfigError: if a key asks for pickles or for what its repository has not, or a package is missing.
    """
    sources = _sources(experiment)
    for key, source, hub in sources.values():
        _check_patterns(source, hub, key)
    found: dict[str, Any] = {}
    for part, (key, source, hub) in sources.items():
        fetched = _provide(source, hub, key)
        check_source(source, key)
        found[part] = {
            "path": source.path,
            "repository": hub.repository,
            "revision": hub.revision,
            "fetched": fetched,
            "sha256": contents_of(Path(source.path)),
        }
    record = {"model": experiment.model.name, "sources": found}
    write_text(output, json.dumps(record, indent=1) + "\n")


def _sources(experiment: ImageExperiment) -> dict[str, tuple[str, SourceConfig, HubConfig]]:
    """The models that come from a model hub, and the keys that say so."""
    model = f"model {experiment.model.name}"
    sources = {
        "pipeline": (model, experiment.model.pipeline),
        "alignment": (model, experiment.model.alignment),
        "reward.weights": (f"experiment {experiment.name}", experiment.reward.weights),
    }
    return {
        part: (f"{owner}: key {part}", source, source.hub)
        for part, (owner, source) in sources.items()
        if source is not None and source.hub is not None
    }


def _check_patterns(source: SourceConfig, hub: HubConfig, key: str) -> None:
    for pattern in hub.files:
        if pattern.lower().endswith(PICKLES):
            raise ConfigError(
                f"{key}.hub.files: {pattern!r} asks for a pickle, which can run code when it is opened; name "
                f"files that end in {WEIGHTS}"
            )
    first, *others = hub.files
    if _is_file(source) and (others or glob.has_magic(first) or not first.endswith(WEIGHTS)):
        raise ConfigError(
            f"{key}.hub.files: the path {source.path} is a single file; name the one file that ends in "
            f"{WEIGHTS}, or set the path to a folder"
        )


def _is_file(source: SourceConfig) -> bool:
    return source.path.endswith(WEIGHTS)


def _provide(source: SourceConfig, hub: HubConfig, key: str) -> list[str]:
    """Fetch what a source lacks; the names in its repository."""
    path = Path(source.path)
    if not _is_file(source):
        return _fill(Wanted(hub, path, key, f"in the folder {path}"))
    if path.is_file():
        return []
    # A folder beside the file, so that the renaming cannot cross file systems.
    staging = path.with_name(f".{path.name}.fetching")
    fetched = _fill(Wanted(hub, staging, key, f"as {path}"))
    (staging / hub.files[0]).replace(path)
    shutil.rmtree(staging)
    return fetched


# ---------------------------------------------------------------------------------- one folder


def _fill(wanted: Wanted) -> list[str]:
    """Fetch the files that a folder lacks; their names.

    The names of all files are written down before the first is fetched: of a folder that holds some, patterns
    alone cannot tell whether there should be more.

    Raises:
        CheckpointError: if some are still lacking.
        ConfigError: see :func:`fetch`.
    """
    if not _lacking(wanted):
        return []
    try:
        import huggingface_hub as client
    except ImportError:
        raise ConfigError("huggingface_hub is not installed; pip install 'flowtilt[images]'") from None
    before = set(_files(wanted.folder))
    reason = None
    if _listing(wanted) is None:
        reason = _ask(wanted, partial(_list, client, wanted))
    if reason is None:
        reason = _ask(wanted, partial(_download, client, wanted, _lacking(wanted)))
    if _lacking(wanted):
        _ask(wanted, partial(_copy_cached, client, wanted))
    if lacking := _lacking(wanted):
        raise CheckpointError(
            f"{wanted.key}.hub: {wanted.hub.repository} could not be fetched at revision "
            f"{wanted.hub.revision} ({reason or 'no answer'}); run again with a network, or place "
            f"{', '.join(lacking)} of it by hand {wanted.place}: a later run goes on from what is there"
        )
    return sorted(set(_files(wanted.folder)) - before)


def _files(folder: Path) -> Iterator[str]:
    """Names of the files in a folder, as a repository has them; not of what is hidden."""
    for file in folder.rglob("*"):
        name = file.relative_to(folder)
        if file.is_file() and not any(part.startswith(".") for part in name.parts):
            yield name.as_posix()


def _matches(name: str, pattern: str) -> bool:
    """Whether the model hub's client counts a file to a pattern: a folder's stands for all that is in it."""
    return fnmatchcase(name, f"{pattern}*" if pattern.endswith("/") else pattern)


def _asked_for(name: str, hub: HubConfig) -> bool:
    return not name.lower().endswith(PICKLES) and any(_matches(name, pattern) for pattern in hub.files)


def _lacking(wanted: Wanted) -> list[str]:
    """Files that a folder lacks; as long as the repository's are not known, patterns that no file is of.

    Raises:
        CheckpointError: if the folder is of another repository or revision.
        ConfigError: if the repository has no file of a pattern.
    """
    listing, files = _listing(wanted), wanted.hub.files
    if listing is None:
        present = list(_files(wanted.folder))
        return [pattern for pattern in files if not any(_matches(name, pattern) for name in present)]
    names = [name for name in listing if _asked_for(name, wanted.hub)]
    for pattern in files:
        if not any(_matches(name, pattern) for name in names):
            raise ConfigError(
                f"{wanted.key}.hub.files: {wanted.hub.repository} has no file {pattern!r}, pickles aside, at "
                f"revision {wanted.hub.revision}; correct the key"
            )
    return [name for name in names if not (wanted.folder / name).is_file()]


def _listing(wanted: Wanted) -> list[str] | None:
    """Names of the repository's files; None before they were written down."""
    file, hub = wanted.folder / LISTING, wanted.hub
    try:
        data = read_json(file)
        names, of = [str(name) for name in data["files"]], (data["repository"], data["revision"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if of != (hub.repository, hub.revision):
        if not any(_files(wanted.folder)):
            return None
        raise CheckpointError(
            f"{wanted.key}.hub: {wanted.folder} holds files of {of[0]} at revision {of[1]}, not of "
            f"{hub.repository} at {hub.revision}; restore the key, give another path, or delete the folder"
        )
    return names


# ------------------------------------------------------------------------------- the model hub


def _list(client: Any, wanted: Wanted) -> None:
    hub = wanted.hub
    names = sorted(client.list_repo_files(hub.repository, revision=hub.revision))
    data = {"repository": hub.repository, "revision": hub.revision, "files": names}
    write_text(wanted.folder / LISTING, json.dumps(data, indent=1) + "\n")


def _download(client: Any, wanted: Wanted, names: list[str]) -> None:
    hub = wanted.hub
    log.info("%s: fetching %d files of %s", wanted.key, len(names), hub.repository)
    client.snapshot_download(
        hub.repository,
        revision=hub.revision,
        allow_patterns=[glob.escape(name) for name in names],
        local_dir=wanted.folder,
    )


def _copy_cached(client: Any, wanted: Wanted) -> None:
    """Copy from the client's cache, where it does not look itself if it fills a folder without a network."""
    hub = wanted.hub
    cached = client.snapshot_download(
        hub.repository,
        revision=hub.revision,
        allow_patterns=hub.files,
        ignore_patterns=[f"*{ending}" for ending in PICKLES],
        local_files_only=True,
    )
    for name in _files(Path(cached)):
        if _asked_for(name, hub) and not (wanted.folder / name).exists():
            with atomic_path(wanted.folder / name) as temporary:
                shutil.copyfile(Path(cached) / name, temporary)


def _ask(wanted: Wanted, question: Callable[[], None]) -> str | None:
    """Do something that takes the model hub; why it did not answer, or None.

    Raises:
        CheckpointError: if it refused.
        OSError: if the disk is at fault.
    """
    try:
        question()
    except Exception as error:  # of httpx, requests or hf_xet, by the client's release
        network = isinstance(error, ConnectionError | TimeoutError)
        if isinstance(error, OSError) and error.errno is not None and not network:
            raise
        if (refusal := _refusal(error, wanted)) is not None:
            raise CheckpointError(f"{wanted.key}.hub{refusal}") from None
        return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return None


def _refusal(error: Exception, wanted: Wanted) -> str | None:
    """What an answer of the model hub that is no file means, and the fix."""
    from huggingface_hub import errors

    repository, revision = wanted.hub.repository, wanted.hub.revision
    login = "log in by `hf auth login` or set HF_TOKEN"
    if isinstance(error, errors.GatedRepoError):
        return f": {repository} has terms of use; accept them on its page, {login}, and run again"
    if isinstance(error, errors.RevisionNotFoundError):
        return f".revision: {repository} has no revision {revision}; correct the key"
    if isinstance(error, errors.RepositoryNotFoundError):
        return f".repository: there is no {repository}; correct the key, or if it is private, {login}"
    return None


# ------------------------------------------------------------------------------------ checking


def contents_of(path: Path) -> dict[str, str]:
    """SHA-256 of the weights in a folder, by their paths in it; or of a file, by its name."""
    if path.is_file():
        return {path.name: sha256_of(path)}
    return {name: sha256_of(path / name) for name in sorted(_files(path)) if name.endswith(WEIGHTS)}


def check_source(source: SourceConfig, where: str) -> None:
    """Refuse files that are not those that the configuration means. Raises CheckpointError, naming the file
    and the key."""
    path, hub = located(source.path), source.hub
    fetches = "the rule fetch_checkpoint fetches it"
    if not path.exists():
        fix = "restore it" if hub is None else fetches
        raise CheckpointError(f"{where}.path: {path}: no such file or folder; {fix}")
    for name, expected in source.sha256.items():
        file = path / name if path.is_dir() else path
        if not file.is_file():
            raise CheckpointError(f"{where}.sha256: {file}: no such file; restore it or correct the key")
        if (found := sha256_of(file)) != expected:
            fix = "restore the file" if hub is None else f"delete the file, and {fetches} again,"
            raise CheckpointError(
                f"{where}.sha256: {file} has the SHA-256 {found}, not {expected}; {fix} or correct the key"
            )
