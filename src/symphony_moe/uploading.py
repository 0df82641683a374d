"""A finished model to the hub, through its own client, in one commit: a repository never shows half
of a model."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from symphony_moe import __version__
from symphony_moe.errors import RecipeError, RunFolderError, UploadError, first_line, shortened
from symphony_moe.reporting.numbers import size
from symphony_moe.runs.folder import RunFolder, changed_files
from symphony_moe.sources.provenance import CARD
from symphony_moe.sources.source import GENERATION
from symphony_moe.sources.source_tokenizer import CHAT_TEMPLATES, TOKENIZER_FILES

if TYPE_CHECKING:
    from huggingface_hub import HfApi

log = logging.getLogger(__name__)

MAIN = "main"
"""The branch that every repository has."""

_READ_BY_NAME = {GENERATION, *TOKENIZER_FILES}


@dataclass(frozen=True)
class Upload:
    """What goes to the hub, or has gone there."""

    repo_id: str
    """`owner/name`."""
    revision: str
    """The branch."""
    model: str
    """The folder in the run that is sent: `checkpoint` or `trained`."""
    files: dict[str, int]
    """Every file -> its size in bytes."""
    card: str
    """README.md as it is sent."""
    deleted: tuple[str, ...] = ()
    """Files of another model that the repository had, and that transformers would read with this
    one."""
    url: str | None = None
    """The model's page; None where nothing was sent."""
    commit: str | None = None
    """The commit's page."""

    @property
    def num_bytes(self) -> int:
        """Size of all files."""
        return sum(self.files.values())

    def to_json(self) -> dict[str, Any]:
        """For `--json`."""
        return asdict(self)


def refuse_name(repo_id: str) -> None:
    """Raise RecipeError for what is no `owner/name` on the hub."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        if repo_id.count("/") != 1:
            raise HFValidationError("one slash is expected in it")
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise RecipeError(
            f"{shortened(repo_id, 100)!r} is no repository of the hub: {first_line(error)[:150]}; "
            "expected OWNER/NAME, where OWNER is you or an organization"
        ) from None


def token_of_user(repo_id: str) -> str:
    """The token that the environment or the login has. Raises UploadError where there is none, and
    where the hub must not be asked."""
    from huggingface_hub import constants, get_token

    if constants.HF_HUB_OFFLINE:
        raise UploadError(
            f"{repo_id}: HF_HUB_OFFLINE is set, so nothing is sent to the hub; unset it to push"
        )
    token = get_token()
    if not token:
        raise UploadError(
            f"{repo_id}: no token for {constants.ENDPOINT}; set HF_TOKEN, or log in with "
            f"`hf auth login`. {constants.ENDPOINT}/settings/tokens makes one that may write"
        )
    return token


def model_folder(run: RunFolder, what: str | None) -> Path:
    """The folder of a run that is to be sent: the trained model where there is one, unless `what`
    (`checkpoint`, `trained`) names it. Raises RunFolderError where it is not finished."""
    run.require_checkpoint()
    folders = {folder.name: folder for folder in (run.checkpoint, run.trained)}
    if what is None:
        return run.trained if run.trained.is_dir() else run.checkpoint
    if what not in folders:
        raise RecipeError(f"what to push is {' or '.join(folders)}, not {shortened(what, 60)!r}")
    if not folders[what].is_dir():
        raise RunFolderError(
            f"{run.root}: no finished trained/; run `symphony train {run.root}`, or push what is "
            "built with --what checkpoint"
        )
    return folders[what]


def checked_files(run: RunFolder, folder: Path) -> dict[str, Path]:
    """Name in the repository -> file, for every file of a model. Raises RunFolderError where one is
    not what the manifest says. Reads all of them."""
    listed = run.read_json(run.manifest)["files"]
    if problem := changed_files(folder, listed):
        raise RunFolderError(
            f"{folder}: {shortened(problem, 200)}; nothing is sent. Put the files back, or build "
            "or train again with --overwrite"
        )
    found = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {path.relative_to(folder).as_posix(): path for path in found}


def send(upload: Upload, files: Mapping[str, Path], token: str, *, private: bool) -> Upload:
    """Make the repository and the branch where they are not there, and send everything in one
    commit; the upload with its addresses.

    Raises UploadError for whatever the hub or the way to it refuses. Nothing on this machine
    changes, and what has arrived before is not sent again by the next call.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    api = HfApi(token=token, library_name="symphony-moe", library_version=__version__)
    repo_id, revision = upload.repo_id, upload.revision
    with _refusals(repo_id, api):
        page = str(api.create_repo(repo_id, private=private or None, exist_ok=True))
        if private and not api.repo_info(repo_id).private:
            raise UploadError(
                f"{repo_id}: is there already and public; --private makes only a new repository "
                "private. Change it on the hub, or push to another name"
            )
        if revision != MAIN and not revision.startswith("refs/"):
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        deleted = _of_another_model(api.list_repo_files(repo_id, revision=revision), files)
        if deleted:
            log.info("deleting what another model has left there: %s", ", ".join(deleted))
        contents: dict[str, Path | bytes] = {**files, CARD: upload.card.encode()}
        done = api.create_commit(
            repo_id,
            [
                *(CommitOperationDelete(path_in_repo=name) for name in deleted),
                *(
                    CommitOperationAdd(path_in_repo=name, path_or_fileobj=content)
                    for name, content in contents.items()
                ),
            ],
            commit_message=f"Upload {upload.model} with symphony-moe {__version__}",
            revision=revision,
        )
    if revision != MAIN:
        page += f"/tree/{revision}"
    return replace(upload, url=page, commit=done.commit_url, deleted=tuple(deleted))


def describe_upload(upload: Upload) -> str:
    """What is sent where, with sizes."""
    listed = ", ".join(f"{name} ({size(num_bytes)})" for name, num_bytes in upload.files.items())
    return (
        f"{upload.model}/ to {upload.repo_id}, branch {upload.revision}: {len(upload.files)} "
        f"files, {size(upload.num_bytes)}: {listed}"
    )


def _of_another_model(there: Sequence[str], sent: Mapping[str, Path]) -> list[str]:
    """Files of a repository that `transformers` would read together with what is sent: weights
    (one file comes before an index of several), tokenizer, generation config."""
    return [
        name
        for name in sorted(there)
        if name not in sent
        and (
            name in _READ_BY_NAME
            or name.startswith(f"{CHAT_TEMPLATES}/")
            or ("/" not in name and name.endswith((".safetensors", ".safetensors.index.json")))
        )
    ]


@contextmanager
def _refusals(repo_id: str, api: "HfApi") -> Iterator[None]:
    """UploadError for whatever the client raises in the block."""
    try:
        yield
    except UploadError:
        raise
    except Exception as error:
        # The client's own kinds, those of its HTTP library (another one in other versions), of its
        # threads and of its transfer protocol: none is a bug of ours.
        raise UploadError(f"{repo_id}: {_why(error, repo_id.partition('/')[0], api)}") from error


def _why(error: Exception, owner: str, api: "HfApi") -> str:
    """What was refused, and what to do."""
    status, tokens = _status(error), f"{api.endpoint}/settings/tokens"
    if status == 401:
        return f"{api.endpoint} does not accept the token (401); {tokens} makes one that may write"
    if status == 403:
        return (
            f"the token may not write there (403). Is {owner} you, or an organization that you "
            f"are in? {tokens} says what the token may do"
        )
    said = [" ".join(str(one).split()).rstrip(".") or type(one).__name__ for one in _chain(error)]
    reason = shortened(": ".join(dict.fromkeys(said)), 220)
    return (
        f"the upload was cut short: {reason}. A model appears there whole or not at all, and "
        "nothing has changed here; the same command again sends what is missing"
    )


def _status(error: BaseException) -> int | None:
    """The status that the hub answered with; None where it did not answer."""
    for one in _chain(error):
        status = getattr(getattr(one, "response", None), "status_code", None)
        if status is not None:
            return int(status)
    return None


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error and what it was raised for."""
    while error is not None:
        yield error
        error = error.__cause__
