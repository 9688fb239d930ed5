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

from forgetless.adapters.card import CARD, Evaluated, Samples
from forgetless.adapters.export import export
from forgetless.adapters.load import CONFIG, WEIGHTS, read_adapter_config
from forgetless.adapters.variant import LIVE_BOTH
from forgetless.errors import AdapterError

# All that an export writes; whatever else lies in a folder stays at home.
_OURS = re.compile(
    r"README\.md|compression\.json|adapter_config\.json|adapter_model\.safetensors"
    r"|config\.json|generation_config\.json|model(-\d+-of-\d+)?\.safetensors"
    r"|model\.safetensors\.index\.json|[\w.-]+\.gguf"
    r"|tokenizer\.json|tokenizer_config\.json|special_tokens_map\.json|added_tokens\.json"
    r"|vocab\.json|merges\.txt|tokenizer\.model|spiece\.model|chat_template\.jinja"
)
_MODELS = ("config.json", "*.gguf")
_REMEDY = "export it first: forgetless export ADAPTER FOLDER"


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
        private: Whether a new repository is private; the account's default where None.
        revision: Branch, which must exist; `main` by default.
        token: The one that `hf auth login` or HF_TOKEN set, where None.
        report: For a PeftModel: as for `export`.
        samples: For a PeftModel: as for `export`.
        **options: For a PeftModel: all further arguments of `export`.

    Raises:
        AdapterError: A folder that is no export, no token, no network, or a refusal of the hub.
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


def push_folder(
    folder: Path,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    token: str | None = None,
) -> Pushed:
    """Upload the export in a folder; of a run, that in `adapter/`.

    Raises:
        AdapterError: As for `push_to_hub`.
    """
    source = folder / "adapter" if (folder / "adapter" / CONFIG).is_file() else folder
    files = exported_files(source)
    api = HfApi(token=_token(token))
    try:
        url = api.create_repo(repo_id, private=private, exist_ok=True)
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


def exported_files(folder: Path) -> tuple[str, ...]:
    """Names of the files of an export that may be uploaded.

    Raises:
        AdapterError: No export, a checkpoint that PEFT alone cannot open, no card, or a
            configuration that names a folder of this machine as its base.
    """
    names = tuple(sorted(path.name for path in folder.glob("*") if _OURS.fullmatch(path.name)))
    if (folder / CONFIG).is_file():
        _refuse_unfit(folder, read_adapter_config(folder))
    elif not any(any(folder.glob(pattern)) for pattern in _MODELS):
        raise AdapterError(f"{folder}: expected an exported adapter or model, got none; {_REMEDY}")
    if CARD not in names:
        raise AdapterError(f"{folder}: expected the model card {CARD}, found none; {_REMEDY}")
    return names


def _refuse_unfit(folder: Path, config: dict[str, Any]) -> None:
    if config.get("init_lora_weights") == LIVE_BOTH:
        raise AdapterError(
            f"{folder}: expected an export, got a training checkpoint of the form both, which PEFT "
            f"alone cannot open; {_REMEDY}"
        )
    if not (folder / WEIGHTS).is_file():
        raise AdapterError(f"{folder}: expected {WEIGHTS}, found none; {_REMEDY}")
    base = str(config.get("base_model_name_or_path") or "")
    if Path(base).is_absolute() or Path(base).expanduser().is_dir():
        raise AdapterError(
            f"{folder}: expected a base that others can load, got the local folder {base}; export "
            "it again with the base's hub id: --model ORG/NAME, in Python base_name="
        )


def _token(token: str | None) -> str:
    found = token or get_token()
    if found is None:
        raise AdapterError(
            "push: expected a token for the hub, found none; run `hf auth login`, or set HF_TOKEN"
        )
    return found


def _remedy(error: HfHubHTTPError) -> str:
    status = error.response.status_code
    if status in (401, 403):
        return "use a token with write access to it: hf auth login"
    if status == 404:
        return "check the name and the revision"
    return "try again later" if status >= 500 else "check the card's front matter and the name"


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0].rstrip(".")[:200] if text else type(error).__name__
