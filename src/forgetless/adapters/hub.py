"""Upload an exported folder, with its model card, to the Hugging Face hub; nothing beside it."""

from __future__ import annotations

import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, get_token

# HTTPError is that of the HTTP library that the hub's client uses.
from huggingface_hub.errors import (  # type: ignore[attr-defined]
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
)
from peft import PeftModel

from forgetless.adapters.card import Evaluated, Samples
from forgetless.adapters.export import export
from forgetless.adapters.exported_files import WHOLE_MODEL, exported_files, kinds_in
from forgetless.adapters.load import CONFIG
from forgetless.errors import AdapterError

_REMEDIES = {
    400: "check the card's front matter and the name",
    401: "use a token with write access to it: hf auth login",
    403: "use a token with write access to it: hf auth login",
    404: "check the name and the revision",
    409: "something else is being written there: try again",
    413: "it is too large for the hub: cut the rank with --max-rank, or push an adapter only",
    422: "check the card's front matter and the name",
    429: "too many requests: wait some minutes, then try again",
}


@dataclass(frozen=True, slots=True)
class Pushed:
    """What was uploaded.

    Attributes:
        url: Of the repository.
        commit: Its id.
        files: Their names.
    """

    url: str
    commit: str
    files: tuple[str, ...]


def push_to_hub(
    model: PeftModel | Path | str,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    token: str | None = None,
    report: Evaluated | None = None,
    samples: Samples = "none",
    **options: Any,
) -> Pushed:
    """Upload an adapter or a merged model with its card; a model is exported on the way.

    As with transformers: the repository is made where there is none, files of the same names are
    replaced, others in it stay.

    Args:
        model: A folder that `export`, the command `export` or a run wrote; or a PeftModel.
        repo_id: `you/name`.
        private: Whether a new repository is private; the account's default where None. Where
            True, nothing is uploaded into one that is public already.
        revision: Branch, which must exist; `main` by default.
        token: The one that `hf auth login` or HF_TOKEN set, where None.
        report: For a PeftModel: as for `export`.
        samples: For a PeftModel: as for `export`.
        **options: For a PeftModel: all further arguments of `export`.

    Raises:
        AdapterError: A folder that is no export, no token, no network, a refusal of the hub, or a
            public repository where a private one was asked for.
        ArtefactError: Weights that are damaged.
    """
    if isinstance(model, PeftModel):
        _token(token)
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name) / "export"
            export(model, folder, report=report, samples=samples, **options)
            return push_folder(folder, repo_id, private=private, revision=revision, token=token)
    if report is not None or samples != "none" or options:
        given = [*(["report"] if report is not None else []), *options] or ["samples"]
        raise AdapterError(
            f"push: expected {', '.join(given)} with a PeftModel only, got a folder; its card is "
            "written already: give them to export"
        )
    return push_folder(Path(model), repo_id, private=private, revision=revision, token=token)


def _export_in(folder: Path) -> Path:
    """The folder itself where it is an export, else that of a run."""
    of_run = [
        folder / name
        for name, is_there in (
            ("adapter", (folder / "adapter" / CONFIG).is_file()),
            ("model", WHOLE_MODEL.is_in(folder / "model")),
        )
        if is_there
    ]
    if kinds_in(folder) or not of_run:
        return folder
    if len(of_run) > 1:
        raise AdapterError(
            f"{folder}: expected one export, got {' and '.join(map(str, of_run))}; name one of them"
        )
    return of_run[0]


def push_folder(
    folder: Path,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    token: str | None = None,
) -> Pushed:
    """Upload the export in a folder; of a run, that in `adapter/` or `model/`.

    Raises:
        AdapterError: As for `push_to_hub`.
    """
    source = _export_in(folder)
    files = exported_files(source)
    api = HfApi(token=_token(token))
    try:
        url = api.create_repo(repo_id, private=private, exist_ok=True)
        if private:
            _refuse_public(api, url.repo_id)
        commit = api.upload_folder(
            repo_id=url.repo_id,
            folder_path=source,
            allow_patterns=list(files),
            revision=revision,
            commit_message="Upload with forgetless",
        )
    except HFValidationError as error:
        raise AdapterError(
            f"push: expected a repository name such as you/name, got {repo_id!r} "
            f"({_first_line(error)})"
        ) from error
    except HfHubHTTPError as error:
        raise AdapterError(
            f"push: the hub refused {repo_id} ({_first_line(error)}); {_remedy(error)}"
        ) from error
    except (HTTPError, ConnectionError) as error:
        raise AdapterError(
            f"push: could not reach the hub ({_first_line(error)}); check the network, HF_ENDPOINT "
            "and HF_HUB_OFFLINE"
        ) from error
    return Pushed(str(url), commit.oid, files)


def _token(token: str | None) -> str:
    """A token that can stand in a header; no message ever holds it."""
    found = get_token() if token is None else token
    if found is None:
        raise AdapterError(
            "push: expected a token for the hub, found none; run `hf auth login`, or set HF_TOKEN"
        )
    found = found.strip()
    if not re.fullmatch("[!-~]+", found):
        raise AdapterError(
            "push: expected a token of printable ASCII without spaces, got another (not shown); "
            "copy it again from the hub's settings"
        )
    return found


def _refuse_public(api: HfApi, repo_id: str) -> None:
    """The hub leaves a repository that exists already as it is, whatever was asked for."""
    if api.repo_info(repo_id).private is not True:
        raise AdapterError(
            f"push: expected a private repository, got {repo_id}, which is public already; nothing "
            "was uploaded: make it private in its settings, or choose another name"
        )


def _remedy(error: HfHubHTTPError) -> str:
    status = error.response.status_code
    later = "try again later" if status >= 500 else "look this status up in the hub's documentation"
    return _REMEDIES.get(status, later)


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0].rstrip(".")[:200] if text else type(error).__name__
