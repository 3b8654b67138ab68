"""Models of the Hugging Face hub: fetched into its cache to be read as folders, and folders sent to it."""

from __future__ import annotations

import glob
import logging
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple, TypeVar

from compressor.arguments import require_model
from compressor.errors import BadInput, CompressorError
from compressor.io.remote_file import RemoteFile
from compressor.recipe.training_files import TRAINING_ARGUMENTS
from compressor.system_errors import explained

logger = logging.getLogger(__name__)

# Weights, and what is copied to a compressed folder with them; no code, and of the weights no second format.
_FETCHED = (
    "*.safetensors",
    "*.json",
    "*.md",
    "*.txt",
    "*.model",
    "*.tiktoken",
    "*.jinja",
    "*.yaml",
    "*.yml",
    "LICENSE*",
)
_LEFT_OUT = ("*/*.safetensors", "consolidated*", "checkpoint-*")
# A name that ends like a file is a path with a slip in it.
_FILE_ENDINGS = (".safetensors", ".json", ".bin", ".pt", ".pth", ".th", ".ckpt", ".yaml", ".yml", ".md")
# Weights of an earlier push under other names would be loaded instead of the new ones; those in folders are not.
_REPLACED = ("*.safetensors", "*.safetensors.index.json", "pytorch_model*")
_WEIGHT_ENDINGS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx")

AnyModel = TypeVar("AnyModel", bound=object)


class HubModel(NamedTuple):
    """A repository of the hub and the commit of it that lies in the cache."""

    repository: str
    commit: str


def hub_model(path: Path) -> HubModel | None:
    """The repository that a folder in the cache of huggingface_hub is a snapshot of; None for any other path."""
    snapshots = path.parent
    if snapshots.name != "snapshots" or not snapshots.parent.name.startswith("models--"):
        return None
    return HubModel(snapshots.parent.name.removeprefix("models--").replace("--", "/"), path.name)


def local_model(model: AnyModel, revision: str | None = None) -> AnyModel | Path:
    """The model itself or, for `org/name` where no such path exists, the hub's copy of it in the cache.

    Fetched are safetensors, configuration, tokenizer, card and training arguments of a `revision` (branch, tag or
    commit; the default branch otherwise), through huggingface_hub: its cache, token, endpoint and HF_HUB_OFFLINE are
    respected.

    Raises:
        BadInput: the model or revision does not exist or may not be read, has no safetensors, or the hub cannot be
            reached and the cache has no copy; or a revision is asked of what is no model of the hub.
    """
    require_model(model)
    if isinstance(model, str) and may_be_of_the_hub(model):
        return _fetched(model, revision)
    if revision is not None:
        what = model if isinstance(model, str | Path) else "a module"
        raise BadInput(
            f"`revision` {revision} is of models of the hub, and {what} is none",
            option="revision",
            remedy="leave it out, or name a model as org/name",
        )
    return model


class RemoteModel(NamedTuple):
    """A model of the hub whose weights stay there: its other files, in the cache, and the weight files by name."""

    folder: Path
    files: Mapping[str, RemoteFile]


def remote_model(model: AnyModel, revision: str | None = None) -> AnyModel | Path | RemoteModel:
    """As `local_model`, but the safetensors of a model of the hub stay there, unless the cache has all of them.

    Raises:
        BadInput: as `local_model`.
    """
    require_model(model)
    if not isinstance(model, str) or not may_be_of_the_hub(model):
        return local_model(model, revision)
    with _explained(model, revision):
        return _without_weights(model, revision)


def _without_weights(repository: str, revision: str | None) -> RemoteModel | Path:
    from huggingface_hub import HfApi, hf_hub_url, snapshot_download
    from huggingface_hub.constants import is_offline_mode
    from huggingface_hub.hf_api import RepoFile

    if is_offline_mode():
        return _fetched(repository, revision)
    patterns = [*(each for each in _FETCHED if not each.endswith(".safetensors")), TRAINING_ARGUMENTS]
    folder = Path(
        snapshot_download(
            repository, revision=revision, allow_patterns=patterns, ignore_patterns=[*_LEFT_OUT, "*.safetensors"]
        )
    )
    tree = HfApi().list_repo_tree(repository, revision=folder.name)
    files = {
        each.path: RemoteFile(
            hf_hub_url(repository, each.path, revision=folder.name), each.size, f"{repository}/{each.path}"
        )
        for each in tree
        if isinstance(each, RepoFile)
        and each.path.endswith(".safetensors")
        and not any(fnmatchcase(each.path, like) for like in _LEFT_OUT)
    }
    if not files:
        raise _without_safetensors(repository)
    return folder if all((folder / name).is_file() for name in files) else RemoteModel(folder, files)


def _without_safetensors(repository: str) -> BadInput:
    remedy = f"fetch what it has: hf download {repository} --local-dir {repository.rpartition('/')[2]}"
    return BadInput("has no safetensors on the hub", where=repository, remedy=remedy)


def may_be_of_the_hub(model: str) -> bool:
    """Whether a name is `org/name`, and not of a path that exists."""
    named = re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", model, re.ASCII) is not None
    return named and not model.endswith(_FILE_ENDINGS) and not os.path.lexists(model)


def _fetched(repository: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.constants import is_offline_mode

    patterns = [*_FETCHED, TRAINING_ARGUMENTS]
    with _explained(repository, revision):
        folder = Path(
            snapshot_download(repository, revision=revision, allow_patterns=patterns, ignore_patterns=list(_LEFT_OUT))
        )
    if not any(folder.glob("*.safetensors")):
        # All but the weights of a model that was only inspected is there too.
        raise _not_in_the_cache(repository, revision) if is_offline_mode() else _without_safetensors(repository)
    return folder


def _not_in_the_cache(repository: str, revision: str | None) -> BadInput:
    of = "" if revision is None else f" of revision {revision}"
    what = f"no such file or folder, and no whole copy{of} in the cache of the hub, which is offline"
    return BadInput(what, where=repository, remedy="unset HF_HUB_OFFLINE, or fetch it beforehand with 'hf download'")


@contextmanager
def _explained(repository: str, revision: str | None) -> Iterator[None]:
    """Say in a line what the hub has not, or why it cannot be asked."""
    from huggingface_hub import errors
    from huggingface_hub.constants import HF_HUB_CACHE, is_offline_mode

    logger.info("looking for %s on the hub", repository)
    try:
        yield
    except BadInput:
        raise
    except errors.GatedRepoError as error:
        remedy = "ask for access on its page of the hub, and log in with 'hf auth login'"
        raise BadInput("is a gated model of the hub", where=repository, remedy=remedy) from error
    except errors.RepositoryNotFoundError as error:
        what = "no such file or folder, and no such model on the hub that may be read"
        remedy = "check the name; for a private model log in with 'hf auth login'"
        raise BadInput(what, where=repository, remedy=remedy) from error
    except errors.RevisionNotFoundError as error:
        what = f"has no revision {revision or 'main'!r} on the hub"
        raise BadInput(what, where=repository, remedy="see its branches and tags there") from error
    except errors.HFValidationError as error:
        remedy = "check the path"
        raise BadInput("no such file or folder, and no name of the hub", where=repository, remedy=remedy) from error
    # The library under huggingface_hub, and so the class of a connection's failure, differs with its version.
    except Exception as error:
        cache, elsewhere = Path(HF_HUB_CACHE), "set HF_HOME to a folder on another disk"
        if refused := explained(error, doing="cannot be fetched", folder=cache, elsewhere=elsewhere, where=repository):
            raise refused from error
        if is_offline_mode():
            raise _not_in_the_cache(repository, revision) from error
        what = f"no such file or folder, and the hub cannot be asked for it ({_reason(error)})"
        raise BadInput(what, where=repository, remedy="check the path, or the network") from error


def check_push(repository: str, source: HubModel | None, *, overwrite: bool) -> None:
    """Refuse to send a folder to the hub where that is bound to fail or loses weights, before any work is done.

    Weights that the repository has are lost only with `overwrite`, and those of `source`, where it is what is
    compressed, never.

    Raises:
        BadInput: the name is none, nobody is logged in, the hub cannot be reached, or weights would be lost.
    """
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.constants import is_offline_mode

    if re.fullmatch(r"([\w-][\w.-]*/)?[\w-][\w.-]*", repository, re.ASCII) is None:
        raise BadInput(
            f"`push_to` {repository!r} is no name of the hub", option="push_to", remedy="write it as org/name"
        )
    if is_offline_mode():
        raise BadInput(
            "`push_to` needs the hub, which is offline", option="push_to", remedy="unset HF_HUB_OFFLINE, or push later"
        )
    if get_token() is None:
        raise BadInput(
            "`push_to` needs a token of the hub, and there is none",
            option="push_to",
            remedy="log in with 'hf auth login'",
        )
    try:
        user = HfApi().whoami()["name"]
        target = repository if "/" in repository else f"{user}/{repository}"
        weights = [name for name in _files_of(target) if name.endswith(_WEIGHT_ENDINGS)]
    except Exception as error:
        raise BadInput(
            f"`push_to` {repository} cannot work: the hub does not answer as it should ({_reason(error)})",
            option="push_to",
            remedy="check the network and 'hf auth whoami', or leave it out",
        ) from error
    # The hub takes names that differ in their case for one.
    if source is not None and source.repository.lower() == target.lower():
        what = f"`push_to` {repository} would replace the model that is compressed"
        raise BadInput(what, remedy="push it to a repository of its own")
    if weights and not overwrite:
        what = f"`push_to` {repository} would replace weights that are there ({weights[0]})"
        raise BadInput(what, remedy="push to another repository, or replace them with `overwrite`")


def push_folder(folder: Path, repository: str, *, overwrite: bool) -> str:
    """Send a finished folder to the hub as one commit, and return the commit's address.

    A repository that does not exist is made, and private; weights that it had before are replaced with `overwrite`.

    Raises:
        CompressorError: it could not be sent; the folder is as it was.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        made = api.create_repo(repository, private=True, exist_ok=True)
        there = _files_of(made.repo_id)
        if not overwrite and any(name.endswith(_WEIGHT_ENDINGS) for name in there):
            raise CompressorError("it has got weights in the meantime")
        old = [name for name in there if "/" not in name and any(fnmatchcase(name, like) for like in _REPLACED)]
        commit = api.upload_folder(
            repo_id=made.repo_id,
            folder_path=folder,
            commit_message="Compressed by compressor",
            delete_patterns=[glob.escape(name) for name in old] or None,
        )
    except Exception as error:
        raise CompressorError(f"{folder} was written, but not pushed to {repository}: {_reason(error)}") from error
    return str(commit.commit_url)


def _files_of(repository: str) -> list[str]:
    """The paths of all files of a repository; none where it does not exist or is empty."""
    from huggingface_hub import HfApi, errors

    try:
        return HfApi().list_repo_files(repository)
    except errors.GatedRepoError:
        raise
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError, errors.EntryNotFoundError):
        return []


def _reason(error: Exception) -> str:
    """The line of an error's text that says most, without what it advises."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0].removeprefix("Got: ")[:200].rstrip(".") if lines else type(error).__name__
