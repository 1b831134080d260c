"""What every download shares: a revision is resolved once, only what is needed comes, and an error is one line."""

import difflib
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ma_sft.errors import RecipeError, one_line
from ma_sft.utils import no_bar_for_weights, not_there, say

if TYPE_CHECKING:
    from transformers import GenerationConfig

FIRST_ANSWER = 8.0  # seconds that the hub has for its first answer, retries of a busy one included


# What a model is beside its weights; code comes only where it may run.
PLAIN_FILES = ["*.json", "*.jinja", "*.txt", "*.model"]


OTHERS = "name what is cached, or try again when the hub answers"


class DamagedError(Exception):
    """A file that is not what the hub says it sent."""


# What each revision was when it was first asked for, so that one that moves meanwhile changes nothing.
_commits: dict[str, str] = {}


def commits() -> dict[str, str]:
    """`kind/name@revision` -> commit of what this run has asked for."""
    return dict(_commits)


def recall(known: Mapping[str, str]) -> None:
    """Go on with the commits of another process, or of the run that is resumed."""
    _commits.update(known)


def pin(name: str, revision: str | None = None, kind: str = "model") -> str:
    """The commit that a branch, a tag or None (the main branch) of a repository stands for in this whole run.

    Raises:
        RecipeError: no such repository or revision, no access, or a hub that cannot be reached and nothing cached.
    """
    from huggingface_hub import HfApi, is_offline_mode

    key = f"{kind}/{name}@{revision or 'main'}"
    if key not in _commits:
        try:
            if not is_offline_mode():
                _check_connection(name, revision, kind)
            offline = is_offline_mode()
            found = HfApi().resolve_revision(name, repo_type=kind, revision=revision, local_files_only=offline)
            _commits[key] = found.resolved
        except Exception as error:
            raise RecipeError(explain(error, name, kind, revision)) from None
    return _commits[key]


def pin_model(settings: Any) -> dict[str, str]:
    """Put the commit in the place of a recipe's `model_revision`.

    Returns:
        As `commits`.
    """
    model = settings.model
    if model.model_name_or_path != "demo" and not Path(model.model_name_or_path).expanduser().is_dir():
        model.model_revision = pin(model.model_name_or_path, model.model_revision)
    return commits()


def model_folder(name: str, revision: str | None = None, *, weights: bool = False, code: bool = False) -> Path:
    """The folder of a model: `name` itself, or the snapshot of a hub id with what is needed of it.

    Args:
        weights: with the safetensors that the index names, or `model.safetensors`.
        code: with the repository's Python files.

    Raises:
        RecipeError: as `pin`; a download that stays broken, no space, or weights that are pickles alone.
    """
    folder = Path(name).expanduser()
    if not folder.is_dir():
        commit = pin(name, revision)
        folder = _download(name, commit, [*PLAIN_FILES, *(["*.py"] if code else [])])
        if weights:
            refuse_pickles(name, weight_files(folder), _listed(name, commit, folder))
            _download(name, commit, weight_files(folder))
    elif weights:
        refuse_pickles(name, weight_files(folder), [path.name for path in folder.iterdir()])
    return folder


def saved_folder(folder: Path, *, adapter: bool = False) -> Path:
    """The saved model or adapter that a run's folder, its own folder, or a hub id stands for; an adapter if it must be.

    Raises:
        RecipeError: there is none.
    """
    if is_hub_id(str(folder)):
        folder = model_folder(str(folder), weights=True)
    if not folder.is_dir():
        raise RecipeError(f"the folder {not_there(folder)}")
    files = {"config.json": "model", "adapter_config.json": "adapter"}
    if adapter:
        del files["config.json"]
    for candidate in (folder / name for name in (("adapter", "") if adapter else ("merged", "model", "", "adapter"))):
        if any((candidate / file).is_file() for file in files):
            return candidate
    holds = " and ".join(f"no {kind} ({file})" for file, kind in files.items())
    raise RecipeError(f"{folder} holds {holds}; give a run's folder or that of what it saved")


def is_hub_id(name: str) -> bool:
    """Whether this can be an id on a hub, and is nothing here."""
    return re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name) is not None and not Path(name).exists()


def weight_files(folder: Path) -> list[str]:
    """The names of a folder's safetensors: an adapter's, those of the index, or `model.safetensors`, there or not.

    Raises:
        RecipeError: an index that is broken.
    """
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        return ["adapter_model.safetensors"]
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return ["model.safetensors"]
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError):
        raise RecipeError(f"{index} is broken; get it again") from None
    return [str(name) for name in names]


def refuse_pickles(name: str, wanted: list[str], there: list[str]) -> None:
    """Pickles can carry code, have no header to prove, and a merge goes through safetensors: none are loaded.

    Raises:
        RecipeError: what is wanted is not there, and pickles are.
    """
    pickled = sorted(file for file in there if file.endswith((".bin", ".pt", ".pth", ".ckpt", ".pkl")))
    if pickled and not set(wanted) & set(there):
        raise RecipeError(
            f"the model {name!r} has its weights as pickles alone ({pickled[0]}), which can carry code; take a "
            "revision or a copy with safetensors, e.g. --model_revision refs/pr/N of the hub's own conversion"
        )


def load_pretrained(auto: Any, name: str, revision: str | None = None, *, code: bool = False, **kwargs: Any) -> Any:
    """What one of transformers' auto classes makes of a model's folder or hub id; code of its own only with `code`.

    Raises:
        RecipeError: as `model_folder`; code without `code`, or files that are missing or broken.
    """
    weights = "CausalLM" in auto.__name__
    folder = model_folder(name, revision, weights=weights, code=code)
    if "Tokenizer" in auto.__name__ and not code:
        _refuse_tokenizer_code(name, folder)
    kwargs = {"use_safetensors": True, **kwargs} if weights else kwargs
    try:
        with no_bar_for_weights():
            loaded = auto.from_pretrained(str(folder), trust_remote_code=code, **kwargs)
        if "Tokenizer" in auto.__name__:
            loaded("a é 你 😀")  # what does not fit each other fails at a text alone
            loaded.name_or_path = name
    except Exception as error:
        raise RecipeError(explain(error, name)) from None
    return loaded


def generation_config(name: str) -> "GenerationConfig | None":
    """What a model's folder, or its hub id in the cache, says of how it generates; None if it says nothing.

    Raises:
        RecipeError: a file that transformers does not take.
    """
    from transformers import GenerationConfig

    if not name:  # of a tokenizer that was made in memory; transformers would look into the working folder
        return None
    try:
        found: GenerationConfig = GenerationConfig.from_pretrained(name, local_files_only=True)
        if not all(type(end) is int for end in stop_ids(found)):
            raise ValueError(f"eos_token_id: whole numbers expected, found {stop_ids(found)}")
    except Exception as error:
        path = Path(name, "generation_config.json")
        if isinstance(error, OSError | ValueError) and not path.is_file():
            return None
        raise RecipeError(f"{path}: {one_line(error)}; mend it or remove it") from None
    return found


def stop_ids(generation: "GenerationConfig | None") -> list[Any]:
    """The ids at which a model stops by its own configuration, which gives none, one or a list."""
    ends = generation.eos_token_id if generation else None
    return [] if ends is None else ends if isinstance(ends, list) else [ends]


def _refuse_tokenizer_code(name: str, folder: Path) -> None:
    """Where a tokenizer's class is in its own code, transformers without that code takes another one in silence."""
    import transformers

    try:
        config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        own, kind = "AutoTokenizer" in config.get("auto_map", {}), str(config.get("tokenizer_class"))
    except (OSError, ValueError, AttributeError, TypeError):  # whoever loads it says so
        return
    if own and not hasattr(transformers, kind):
        raise RecipeError(explain(ValueError("trust_remote_code"), name))


def load_dataset(
    path: str, name: str | None, split: str, revision: str | None = None, *, streaming: bool = False, **files: Any
) -> Any:
    """A split of a hub data set at the commit that `revision` stands for in this run.

    Args:
        name: its configuration.
        files: `data_files` and `data_dir` of `datasets.load_dataset`.

    Raises:
        RecipeError: as `pin`; no such configuration or split (the message lists them), a script, or broken files.
    """
    import datasets
    from huggingface_hub import is_offline_mode

    commit = pin(path, revision, "dataset")
    if is_offline_mode() and not files:
        return _cached_rows(path, name, split, commit, streaming)

    def read() -> Any:
        start = time.time()
        try:
            rows = datasets.load_dataset(path, name, split=split, revision=commit, streaming=streaming, **files)
        except Exception as error:
            if damaged := _remove_damaged(path, "dataset", start):
                raise DamagedError(damaged[0]) from error
            raise
        if not streaming and (damaged := _remove_damaged(path, "dataset", start)):
            for folder in {Path(file["filename"]).parent for file in rows.cache_files}:
                shutil.rmtree(folder, ignore_errors=True)  # made from damaged files
            raise DamagedError(damaged[0])
        return rows

    rows = _persist(read, path, "dataset", revision)
    if is_offline_mode() and not streaming and not any(commit in file["filename"] for file in rows.cache_files):
        raise RecipeError(f"{_what(path, 'dataset')} is cached in other revisions than {commit[:12]} alone; {OTHERS}")
    return rows


def _cached_rows(path: str, name: str | None, split: str, commit: str, streaming: bool) -> Any:
    """A split from the Arrow files of this commit; `datasets` alone takes the revision that was cached last."""
    import datasets
    from datasets.packaged_modules.cache.cache import Cache

    folders = {folder.parts[-3]: folder for folder in Path(datasets.config.HF_DATASETS_CACHE).glob(f"*/*/*/{commit}")}
    name = next(iter(folders)) if name is None and len(folders) == 1 else name
    if name not in folders:
        known = f" in the configurations {', '.join(sorted(folders))}" if folders else ", or not in this revision"
        raise RecipeError(f"{_what(path, 'dataset')} is not cached{known}; {OTHERS}")
    version = folders[name].parts[-2]
    builder = Cache(repo_id=path, dataset_name=path.split("/")[-1], config_name=name, version=version, hash=commit)
    try:
        return builder.as_streaming_dataset(split) if streaming else builder.as_dataset(split)
    except ValueError as error:
        raise RecipeError(explain(error, path, "dataset")) from None


def _persist(get: Callable[[], Any], name: str, kind: str, revision: str | None) -> Any:
    """What `get` gives, again after a while where a hub is busy or something came damaged.

    Raises:
        RecipeError: it failed otherwise, or four times.
    """
    from huggingface_hub.errors import HfHubHTTPError

    for wait in (1, 2, 4, 0):
        try:
            return get()
        except DamagedError as error:
            reason, final = f"{error} arrived damaged and was removed", None
        except Exception as error:
            status = next((e.response.status_code for e in _chain(error) if isinstance(e, HfHubHTTPError)), 0)
            reason, final = f"the hub answers {status}", explain(error, name, kind, revision)
            if status not in (429, 500, 502, 503, 504):
                break
        if wait:
            say(f"{_what(name, kind)}: {reason}; once more in {wait} s", error=True)
            time.sleep(wait)
    raise RecipeError(final or f"{_what(name, kind)}: {reason}, each time; try again later") from None


def _check_connection(name: str, revision: str | None, kind: str) -> None:
    """Find out whether the hub answers within `FIRST_ANSWER` seconds; if not, say so and go on without it."""
    import httpx2
    from huggingface_hub.constants import ENDPOINT
    from huggingface_hub.errors import HfHubHTTPError
    from huggingface_hub.utils import build_hf_headers, http_backoff  # type: ignore[attr-defined]  # documented names

    url = f"{ENDPOINT}/api/{kind}s/{name}/revision/{(revision or 'main').replace('/', '%2F')}"
    headers, wait = build_hf_headers(), FIRST_ANSWER
    try:
        http_backoff("GET", url, headers=headers, timeout=wait, max_retries=3, retry_on_exceptions=())
        return
    except httpx2.TimeoutException:
        reason = f"no answer within {wait:.0f} s"
    except httpx2.ProxyError as error:
        reason = f"the proxy says: {error}"
    except HfHubHTTPError as error:
        if error.response.status_code < 500:
            return  # it answers, and whoever asks for more explains it
        reason = f"it answers {error.response.status_code}"
    except httpx2.TransportError as error:
        reason = str(error)
    _go_offline(f"the hub {ENDPOINT} cannot be reached ({reason})")


def unreachable(name: str) -> str | None:
    """Why the hub cannot be asked for anything now, None where it answers."""
    from huggingface_hub import is_offline_mode

    if not is_offline_mode():
        _check_connection(name, None, "model")
    return (_unreachable or ["HF_HUB_OFFLINE=1 forbids asking the hub"])[0] if is_offline_mode() else None


# Why there is no hub, where `_check_connection` found that out.
_unreachable: list[str] = []


def _go_offline(reason: str) -> None:
    """What `HF_HUB_OFFLINE=1` does, from now on and in processes that this one starts."""
    import datasets
    from huggingface_hub import constants

    _unreachable[:] = [reason]
    os.environ["HF_HUB_OFFLINE"] = "1"
    constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    if os.environ.get("LOCAL_RANK", "0") == "0":
        say(f"{reason}; going on with what is cached", error=True)


def _download(name: str, commit: str, patterns: list[str]) -> Path:
    from huggingface_hub import snapshot_download

    def get() -> Path:
        start = time.time()
        folder = snapshot_download(name, revision=commit, allow_patterns=patterns)
        if damaged := _remove_damaged(name, "model", start):
            raise DamagedError(damaged[0])
        return Path(folder)

    folder: Path = _persist(get, name, "model", commit)
    return folder


def _remove_damaged(name: str, kind: str, since: float) -> list[str]:
    """Remove the large files that came since then and whose SHA-256 is not their name in the cache; which they were.

    Nobody else compares: clients look at the size alone.
    """
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    damaged = []
    cached = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=name, repo_type=kind)
    for link in cached.glob("snapshots/*/**/*"):
        if not link.is_symlink() or not link.is_file() or link.stat().st_mtime < since - 1:
            continue
        blob = link.resolve()
        if len(blob.name) != 64:  # a small one, named as git names it; its reader complains
            continue
        with open(blob, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest != blob.name:
            blob.unlink()
            link.unlink()
            damaged.append(link.name)
    return damaged


def _listed(name: str, commit: str, folder: Path) -> list[str]:
    """The files that the repository has, or where another program has cached it, those of them that are here."""
    from huggingface_hub import get_cached_repo_tree
    from huggingface_hub.errors import CachedRepoTreeNotFoundError

    try:
        return [entry.path for entry in get_cached_repo_tree(name, revision=commit)]
    except CachedRepoTreeNotFoundError:
        return [path.name for path in folder.iterdir()]


def explain(error: BaseException, name: str, kind: str = "model", revision: str | None = None) -> str:
    """One line of what a library said in many: which repository, what happened, what to do."""
    from huggingface_hub import constants, errors

    if found := re.search(r"models--([^/]+)/snapshots/[^/]+$", name):
        name = found[1].replace("--", "/", 1)
    chain = [*_chain(error)]
    text = one_line(error)
    what = _what(name, kind)
    page = f"{constants.ENDPOINT}/{'datasets/' if kind == 'dataset' else ''}{name}"
    login = "log in with `hf auth login` or set HF_TOKEN"
    status = next((e.response.status_code for e in chain if isinstance(e, errors.HfHubHTTPError)), 0)

    def any_of(*kinds: type[BaseException]) -> bool:
        return any(isinstance(e, kinds) for e in chain)

    if "nvalid credentials" in text or "Invalid user token" in text:
        return f"the hub refuses the token when asked for {what}: it is wrong or was withdrawn; {login}"
    if any_of(errors.GatedRepoError) or "is a gated dataset" in text:
        return f"{what} is gated: accept its terms at {page}, then {login}"
    if any_of(errors.RepositoryNotFoundError) or "doesn't exist on the Hub" in text:
        return (
            f"{what} is no file or folder here and cannot be had from a hub: {constants.ENDPOINT} has none, or it is "
            f"private and its owner must {login}{_nearly(name, kind)}"
        )
    if any_of(errors.RevisionNotFoundError):
        return f"{what} has no revision {revision!r}; it has {', '.join(_revisions(name, kind)) or 'others'}"
    if any_of(errors.HFValidationError):
        return f"{what} is no file or folder here and cannot be had from a hub (ids are owner/name); {_pass(kind)}"
    offline = (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, errors.RevisionResolutionError)
    if _unreachable or any_of(*offline):
        why = _unreachable[0] if _unreachable else "HF_HUB_OFFLINE=1 forbids asking it"
        return f"{what} is no file or folder here, not all cached, and cannot be had from a hub: {why}; {_pass(kind)}"
    if status:
        return f"the hub {constants.ENDPOINT} answers {status} when asked for {what}, and did so again; try again later"
    if "trust_remote_code" in text:
        return (
            f"{what} brings code of its own, which does not run unless you trust it: read it at "
            f"{name if Path(name).is_dir() else page}, then set trust_remote_code (--trust_remote_code true)"
        )
    if "scripts are no longer supported" in text:
        return (
            f"{what} is a script ({text.split()[-1]}), which does not run; take the hub's Parquet copy of it, "
            f"{name}@refs/convert/parquet, or its files"
        )
    inner = next((e for e in chain if type(e).__module__.startswith(("pyarrow", "httpx2"))), chain[-1])
    said = text if inner is error else f"{text}: {' '.join(str(inner).split())}"
    if kind == "dataset" and "onfig" in text:
        return f"{what}: {_short(said)}; set dataset_config, or name in the source"
    if kind == "dataset" and "split" in text:
        return f"{what}: {_short(said)}; set dataset_train_split, or split in the source"
    return f"{what} cannot be loaded: {type(inner).__name__}: {_short(said)}"


def _what(name: str, kind: str) -> str:
    return f"the {'data' if kind == 'dataset' else kind} {name!r}"


def _pass(kind: str) -> str:
    setting, variable = ("dataset_name", "DATA") if kind == "dataset" else ("model_name_or_path", "MODEL")
    return f"pass a {'file or ' if kind == 'dataset' else ''}folder: --{setting} PATH (make: {variable}=PATH)"


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _short(text: str, most: int = 400) -> str:
    return text if len(text) <= most else f"{text[:most]} ..."


def _nearly(name: str, kind: str) -> str:
    """The repository that was probably meant; the hub is asked for its owner's, and for such names."""
    from huggingface_hub import HfApi

    listed = HfApi().list_datasets if kind == "dataset" else HfApi().list_models
    owner, _, short = name.rpartition("/")
    try:
        found = [*listed(author=owner, limit=200), *listed(search=short, limit=200)]
    except Exception:  # this is but a hint
        return ""
    lower = {repo.id.lower(): repo.id for repo in found if repo.id != name}
    close = difflib.get_close_matches(name.lower(), lower, n=1, cutoff=0.75)
    return f"; did you mean {lower[close[0]]}?" if close else ""


def _revisions(name: str, kind: str) -> list[str]:
    from huggingface_hub import HfApi

    try:
        refs = HfApi().list_repo_refs(name, repo_type=kind)
    except Exception:  # this is but a hint
        return []
    return [ref.name for ref in (*refs.branches, *refs.tags)][:20]
