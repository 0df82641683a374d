"""Files of a checkpoint on the hub."""

from collections.abc import Sequence
from pathlib import Path

from symphony_moe.errors import SourceError, first_line, if_mistyped
from symphony_moe.recipe.settings import SourceSpec
from symphony_moe.sources.convert import INDEX, SAFETENSORS, weight_map
from symphony_moe.sources.provenance import FILES as OF_PROVENANCE
from symphony_moe.sources.source import Header, by_tensor

SMALL_FILES = ["*.json", "*.jinja", "*.model", "*.txt", *OF_PROVENANCE]


def fetch(name: str, hub_id: str, revision: str | None, patterns: Sequence[str]) -> Path:
    """The local snapshot of a hub id (taken from the cache where it is there). A token comes from
    the client's own login or HF_TOKEN; HF_HUB_OFFLINE=1 asks the cache alone."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        found = snapshot_download(hub_id, revision=revision, allow_patterns=list(patterns))
        return Path(found)
    except HFValidationError:
        raise SourceError(
            f"{name}: {hub_id!r} is neither a folder nor a hub id{if_mistyped(Path(hub_id))}"
        ) from None
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise SourceError(
            f"{name}: {hub_id!r} is no folder here, and as a hub id it cannot be fetched: "
            f"{first_line(error).removeprefix('Got: ')}{if_mistyped(Path(hub_id))}"
        ) from None


def is_on_hub(spec: SourceSpec, file: str) -> bool:
    """Whether a hub checkpoint has a file that was not fetched."""
    from huggingface_hub import file_exists

    try:
        return file_exists(spec.model, file, revision=spec.revision)
    except Exception:
        # Offline, or whatever else the client raises: what was fetched is all there is.
        return False


def has_weights(name: str, folder: Path) -> bool:
    """Whether every weights file is there (a hub snapshot may hold some, or none)."""
    if (folder / SAFETENSORS).is_file():
        return True
    index = folder / INDEX
    return index.is_file() and all(
        (folder / file).is_file() for file in weight_map(name, index).values()
    )


def hub_headers(name: str, spec: SourceSpec) -> tuple[dict[str, Header], list[str]]:
    """(headers of a hub checkpoint by range requests, without its weights; notes)."""
    from huggingface_hub import get_safetensors_metadata

    try:
        metadata = get_safetensors_metadata(spec.model, revision=spec.revision)
    except Exception as error:
        # Connection, permission and format errors of the client alike: none is a bug of ours.
        raise SourceError(
            f"{name}: no safetensors headers for hub id {spec.model!r}: {first_line(error)}"
        ) from None
    return by_tensor(
        name,
        {
            file: {
                tensor: Header(file, tuple(info.shape), info.dtype)
                for tensor, info in content.tensors.items()
            }
            for file, content in sorted(metadata.files_metadata.items())
        },
    )
