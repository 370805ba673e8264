"""Models from the Hugging Face hub, through huggingface_hub and its cache (imported on first use)."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from ..errors import HubError
from .gguf import SPLIT_NAME
from .jsonfile import read_object
from .safetensors import INDEX_NAME, SINGLE_NAME, shards_of_index

POOLING_CONFIG = "1_Pooling/config.json"  # of sentence-transformers
_CONFIG_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
    POOLING_CONFIG,
)


def fetch_from_hub(repo: str, *, revision: str | None, file: str | None, progress: bool | None) -> Path:
    """Download what running `repo` needs, as far as the cache lacks it; returns its folder, or the GGUF file's path.

    `file` names one GGUF file of the repository (of a split model the first part; the others come along); a repository
    without safetensors and with a single GGUF file needs no name. The cache and the environment variables HF_ENDPOINT,
    HF_HUB_OFFLINE, HF_HUB_CACHE and HF_TOKEN are huggingface_hub's. Without a connection the cache alone serves.
    `progress` False silences the progress bars.

    Raises HubError, which says what to do, when neither the hub nor the cache has everything.
    """
    try:
        import huggingface_hub
    except ImportError as error:
        raise HubError(
            f"cannot fetch {repo!r}: huggingface_hub is not installed (pip install huggingface_hub)"
        ) from error
    endpoint = os.environ.get("HF_ENDPOINT", "").rstrip("/") or None

    def download(names: Sequence[str], commit: str | None) -> Path:
        """Fetch all files; returns where the first one lies."""
        paths: list[Path] = []
        for name in names:
            # One file is asked for by branch, so that the cache learns which commit the branch is at and can answer
            # for it without a connection; the others by that commit, so that they fit the first.
            wanted = commit if paths else revision
            with _explained(f"{repo}/{name}"):
                paths.append(Path(huggingface_hub.hf_hub_download(repo, name, revision=wanted, endpoint=endpoint)))
        return paths[0]

    with _progress_bars(progress):
        try:
            with _explained(repo):
                info = huggingface_hub.HfApi(endpoint=endpoint).model_info(repo, revision=revision)
        except _UnreachableError as unreachable:
            return _from_cache(repo, revision, file, unreachable)
        names = [sibling.rfilename for sibling in info.siblings or ()]
        if file is None and SINGLE_NAME not in names and INDEX_NAME not in names:
            file = _only_gguf(repo, names)
        if file is not None:
            if file not in names:
                raise HubError(f"{repo!r} has no file {file!r}; its GGUF files: {_listed(_ggufs(names))}")
            return download(_parts(file), info.sha)
        if "config.json" not in names:
            raise HubError(f"{repo!r} has no config.json, so its safetensors files cannot be read")
        weights = INDEX_NAME if INDEX_NAME in names else SINGLE_NAME
        folder = download([*(name for name in _CONFIG_FILES if name in names), weights], info.sha).parent
        if weights == INDEX_NAME:
            index = folder / INDEX_NAME
            download(["config.json", *shards_of_index(read_object(index), index)], info.sha)
        return folder


class _UnreachableError(HubError):
    """The hub did not answer, or was not to be asked; the cache may still have the model."""


@contextmanager
def _explained(what: str) -> Iterator[None]:
    """Turns huggingface_hub's errors into HubErrors that say what to do."""
    from huggingface_hub import errors

    # The HTTP library differs between versions of huggingface_hub; the base class of its own error tells which it is.
    http_error: type[Exception] = errors.HfHubHTTPError.__bases__[0]
    repo = "/".join(what.split("/")[:2])
    try:
        yield
    except errors.GatedRepoError as error:
        raise HubError(
            f"{repo!r} is gated: accept its terms on its page on the hub, then set HF_TOKEN to a token of that account"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise HubError(
            f"there is no path and no model {repo!r} on the hub, or it is private: check the name, or set HF_TOKEN"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise HubError(f"{repo!r} has no such revision on the hub") from error
    except errors.EntryNotFoundError as error:
        if isinstance(error, errors.LocalEntryNotFoundError):  # not in the cache, and no connection
            raise _UnreachableError(_advice(what, error)) from error
        raise HubError(f"the hub has no file {what!r}") from error
    except errors.OfflineModeIsEnabled as error:
        raise _UnreachableError(
            f"{what!r} is not in the cache, and HF_HUB_OFFLINE is set: unset it, or give a path"
        ) from error
    except errors.HfHubHTTPError as error:
        status = getattr(error.response, "status_code", None)
        if status in (401, 403):
            raise HubError(
                f"the hub refuses access to {what!r} (HTTP {status}): set HF_TOKEN to a valid token"
            ) from error
        raise _UnreachableError(
            f"the hub answered {what!r} with HTTP {status}: try again later, or give a path"
        ) from error
    except errors.HFValidationError as error:
        raise HubError(f"{repo!r} is no valid hub id: {error}") from error
    except (OSError, http_error) as error:
        raise _UnreachableError(_advice(what, error)) from error


def _advice(what: str, error: Exception) -> str:
    reason = " ".join(str(error).split())[:120]
    return f"cannot fetch {what!r} ({reason}): check the network or HF_ENDPOINT, or give the path of a downloaded model"


@contextmanager
def _progress_bars(progress: bool | None) -> Iterator[None]:
    from huggingface_hub import utils

    silence = progress is False and not utils.are_progress_bars_disabled()
    if silence:
        utils.disable_progress_bars()
    try:
        yield
    finally:
        if silence:
            utils.enable_progress_bars()


def _from_cache(repo: str, revision: str | None, file: str | None, unreachable: HubError) -> Path:
    """The folder or file in the cache, if it is complete; else the reason why the hub was not reached."""
    import huggingface_hub

    def cached(name: str) -> Path | None:
        found = huggingface_hub.try_to_load_from_cache(repo, name, revision=revision)
        return Path(found) if isinstance(found, str) else None

    if file is not None:
        parts = [cached(name) for name in _parts(file)]
        if parts[0] is not None and None not in parts:
            return parts[0]
        raise unreachable
    config = cached("config.json")
    if config is None:
        raise unreachable
    index = cached(INDEX_NAME)
    weights = [SINGLE_NAME] if index is None else shards_of_index(read_object(index), index)
    if not all(cached(name) for name in weights):
        raise unreachable
    return config.parent


def _parts(file: str) -> list[str]:
    """All files of a split GGUF model, `file` first; `[file]` when it is not split."""
    match = SPLIT_NAME.fullmatch(file)
    if match is None:
        return [file]
    parts = [f"{match[1]}-{number:05}-of-{match[3]}.gguf" for number in range(1, int(match[3]) + 1)]
    return sorted(parts, key=lambda name: name != file)


def _ggufs(names: Sequence[str]) -> list[str]:
    return sorted(name for name in names if name.endswith(".gguf"))


def _only_gguf(repo: str, names: Sequence[str]) -> str:
    ggufs = [name for name in _ggufs(names) if (match := SPLIT_NAME.fullmatch(name)) is None or int(match[2]) == 1]
    if len(ggufs) == 1:
        return ggufs[0]
    if ggufs:
        raise HubError(f"{repo!r} has several GGUF files; name one as {repo}:FILE of {_listed(ggufs)}")
    raise HubError(f"{repo!r} has neither {SINGLE_NAME} nor GGUF files; it has {_listed(sorted(names))}")


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "") if names else "none"
