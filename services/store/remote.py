"""The Hugging Face hub as a source: what a repository holds, and its files brought here."""

from __future__ import annotations

import re
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from huggingface_hub import HfApi, errors
from huggingface_hub.utils.tqdm import disable_progress_bars

from services.store.local import INDEX, LocalSource, is_small_file, weight_files
from services.store.manifest import DTYPES, HeaderTensor, corrupt, tensor_bytes
from services.store.model_config import parse_config
from shared.contracts.residency import Source
from shared.errors import Code, HearthError

SCHEME: Final = "hf:"
TIMEOUT_S: Final = 10.0
SAMPLE_S: Final = 0.25  # between two looks at how much of a download is there
_REPOSITORY: Final = re.compile(r"[A-Za-z0-9_.-]{1,96}(/[A-Za-z0-9_.-]{1,96})?")


@dataclass(frozen=True, slots=True)
class HubFiles:
    """A revision of a repository: its commit, and the files (name → bytes) that an import downloads."""

    repository: str
    commit: str
    files: dict[str, int]
    weights: tuple[str, ...]


class Hub:
    """The hub at `endpoint` (None: huggingface_hub's own setting). All methods block and raise `HearthError`."""

    def __init__(self, endpoint: str | None = None) -> None:
        self._api = HfApi(endpoint=endpoint)
        disable_progress_bars()  # a service's output is its log

    def look(self, source: Source) -> HubFiles:
        """What the source's revision is now."""
        repository = source.url.removeprefix(SCHEME)
        if not _REPOSITORY.fullmatch(repository) or ".." in repository:
            raise HearthError(Code.INVALID_REQUEST, f"{source.url!r} is not of the form hf:ORG/NAME.", param="source")
        with _clear_errors(repository, source.revision):
            info = self._api.model_info(repository, revision=source.revision, files_metadata=True, timeout=TIMEOUT_S)
            sizes = {file.rfilename: int(file.size or 0) for file in info.siblings or ()}
            if "config.json" not in sizes:
                raise corrupt(f"{repository} has no config.json, so it is no model in Hugging Face's form.")
            commit = str(info.sha)
            index = self._read(repository, commit, INDEX) if INDEX in sizes else None
        weights = weight_files(sorted(sizes), index)
        names = [*filter(is_small_file, sizes), *weights, *([INDEX] if INDEX in sizes and len(weights) > 1 else [])]
        return HubFiles(repository, commit, {name: sizes[name] for name in names}, tuple(weights))

    def headers(self, files: HubFiles) -> LocalSource:
        """The source as far as it can be known without its weights, to plan with."""
        with _clear_errors(files.repository, files.commit):
            small = {"config.json": self._read(files.repository, files.commit, "config.json")}
            tensors: dict[str, tuple[int, HeaderTensor]] = {}
            for number, name in enumerate(files.weights):
                table = self._api.parse_safetensors_file_metadata(
                    files.repository, name, revision=files.commit, timeout=TIMEOUT_S
                )
                for tensor, facts in table.tensors.items():
                    dtype, shape = str(facts.dtype), tuple(facts.shape)
                    if dtype not in DTYPES:
                        raise HearthError(Code.UNSUPPORTED, f"Tensor {tensor!r} has the unknown dtype {dtype!r}.")
                    place = HeaderTensor(dtype, shape, facts.data_offsets[0], tensor_bytes(dtype, shape))
                    tensors[tensor] = (number, place)
        config = parse_config(small["config.json"])
        return LocalSource(Path(), config, small, (), tensors, files.commit)

    def download(
        self, files: HubFiles, target: Path, *, progressed: Callable[[int], None], stop: threading.Event
    ) -> None:
        """Bring the files into the directory `target`; `progressed` hears the bytes, on another thread."""
        finished = threading.Event()

        def sample() -> None:
            while not finished.wait(SAMPLE_S):
                progressed(_tree_bytes(target))

        sampler = threading.Thread(target=sample, name="download-progress", daemon=True)
        sampler.start()
        try:
            with _clear_errors(files.repository, files.commit):
                for name in files.files:
                    if stop.is_set():
                        raise HearthError(Code.DRAINING, "The store is shutting down.")
                    self._api.hf_hub_download(
                        files.repository, name, revision=files.commit, local_dir=target, etag_timeout=TIMEOUT_S
                    )
        finally:
            finished.set()
            sampler.join()

    def _read(self, repository: str, commit: str, name: str) -> bytes:
        with tempfile.TemporaryDirectory() as directory:
            path = self._api.hf_hub_download(
                repository, name, revision=commit, local_dir=directory, etag_timeout=TIMEOUT_S
            )
            return Path(path).read_bytes()


def _tree_bytes(directory: Path) -> int:
    total = 0
    for path in directory.rglob("*"):
        try:
            if path.is_file():
                total += path.stat().st_blocks * 512
        except OSError:
            continue  # renamed between the listing and the look
    return total


@contextmanager
def _clear_errors(repository: str, revision: str | None) -> Iterator[None]:
    """huggingface_hub's errors as Hearth's, one sentence each."""
    transport: Any = errors.HTTPError  # type: ignore[attr-defined]  # the HTTP library's, whichever this version uses
    try:
        yield
    except HearthError:
        raise
    except errors.GatedRepoError as error:
        message = f"{repository} is gated: accept its terms on the hub and give the store a token (HF_TOKEN)."
        raise HearthError(Code.FORBIDDEN, message) from error
    except errors.RepositoryNotFoundError as error:
        message = f"The hub has no repository {repository}, or it is private."
        raise HearthError(Code.NOT_FOUND, message) from error
    except errors.RevisionNotFoundError as error:
        raise HearthError(Code.NOT_FOUND, f"{repository} has no revision {revision!r}.") from error
    except errors.HFValidationError as error:
        raise HearthError(Code.INVALID_REQUEST, f"{repository!r} is no name of a repository.") from error
    except errors.SafetensorsParsingError as error:
        raise corrupt(f"A weight file of {repository} has a malformed header.") from error
    except (transport, OSError) as error:
        message = f"The Hugging Face hub cannot be reached for {repository} ({type(error).__name__})."
        raise HearthError(Code.CHECKPOINT_UNAVAILABLE, message) from error
