"""What every download shares: a revision is resolved once, only what is needed comes, and an error is one line.

huggingface_hub caches, retries and goes on after a cut; no code and no pickle of a stranger is loaded. Whatever cannot
be had, read or trusted is a `RecipeError` of one line that says what to do.
"""

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ma_sft.errors import RecipeError, one_line
from ma_sft.utils import not_there, progress, read_json

if TYPE_CHECKING:
    from transformers import GenerationConfig

FIRST_ANSWER = 8.0  # seconds that the hub has for its first answer; a busy one is asked four times
PLAIN_FILES = ["*.json", "*.jinja", "*.txt", "*.model"]  # of a model, beside weights and code
# `kind/name@revision` -> commit, as it was when this run, or the one that it goes on with, asked for it first
commits: dict[str, str] = {}
OFFLINE = "HF_HUB_OFFLINE=1 forbids asking the hub"
_unreachable: list[str] = []  # why there is no hub, where `unreachable` found that out


def pin(name: str, revision: str | None = None, kind: str = "model") -> str:
    """The commit that a branch, a tag or None (the main branch) of a repository stands for in this whole run."""
    from huggingface_hub import HfApi

    key = f"{kind}/{name}@{revision or 'main'}"
    try:
        if key not in commits:
            offline = unreachable(name, revision, kind) is not None
            found = HfApi().resolve_revision(name, repo_type=kind, revision=revision, local_files_only=offline)
            commits[key] = found.resolved
    except Exception as error:
        raise RecipeError(explain(error, name, kind, revision)) from None
    return commits[key]


def unreachable(name: str, revision: str | None = None, kind: str = "model") -> str | None:
    """Why the hub cannot be asked for anything, None where it answers.

    Once it does not answer in time, that is said, and holds as `HF_HUB_OFFLINE=1` does.
    """
    import datasets
    import httpx2
    from huggingface_hub import constants, is_offline_mode
    from huggingface_hub.errors import HfHubHTTPError
    from huggingface_hub.utils import build_hf_headers, http_backoff  # type: ignore[attr-defined]  # documented names

    if is_offline_mode():
        return (_unreachable or [OFFLINE])[0]
    url = f"{constants.ENDPOINT}/api/{kind}s/{name}/revision/{(revision or 'main').replace('/', '%2F')}"
    try:
        http_backoff(
            "GET", url, headers=build_hf_headers(), timeout=FIRST_ANSWER, max_retries=3, retry_on_exceptions=()
        )
        return None  # it answers, and whoever asks for more explains it
    except (httpx2.TransportError, HfHubHTTPError) as error:
        _unreachable[:] = [f"the hub {constants.ENDPOINT} cannot be reached ({one_line(error)})"]
    os.environ["HF_HUB_OFFLINE"] = "1"  # for the processes that this one starts
    constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    progress(f"{_unreachable[0]}; going on with what is cached")
    return _unreachable[0]


def model_folder(name: str, revision: str | None = None, *, weights: bool = False, code: bool = False) -> Path:
    """The folder of a model: `name` itself, or the snapshot of a hub id with what is needed of it.

    Args:
        weights: with the safetensors that the index names, or `model.safetensors`.
        code: with the repository's Python files.
    """
    folder = Path(name).expanduser()
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        commit = pin(name, revision)
        try:
            folder = Path(
                snapshot_download(name, revision=commit, allow_patterns=[*PLAIN_FILES, *(["*.py"] if code else [])])
            )
            if weights:
                snapshot_download(name, revision=commit, allow_patterns=weight_files(folder))
        except Exception as error:
            raise RecipeError(explain(error, name)) from None
    if weights:
        refuse_pickles(name, weight_files(folder), [path.name for path in folder.iterdir()])
    return folder


def saved_folder(folder: Path, *, adapter: bool = False) -> Path:
    """The saved model or adapter that a run's folder, its own, or a hub id stands for; an adapter if it must be."""
    if is_hub_id(str(folder)):
        folder = model_folder(str(folder), weights=True)
    if not folder.is_dir():
        raise RecipeError(f"the folder {not_there(folder)}")
    files = [*([] if adapter else ["config.json"]), "adapter_config.json"]
    for candidate in (folder / name for name in (("adapter", "") if adapter else ("merged", "model", "", "adapter"))):
        if any((candidate / file).is_file() for file in files):
            return candidate
    what = f"{'' if adapter else 'model (config.json) and no '}adapter (adapter_config.json)"
    raise RecipeError(f"{folder} holds no {what}; give a run's folder or that of what it saved")


def is_hub_id(name: str) -> bool:
    """Whether this can be an id on a hub, and is nothing here; `runs` holds runs."""
    return re.fullmatch(r"(?!runs/)[\w-][\w.-]*/[\w-][\w.-]*", name) is not None and not Path(name).exists()


def weight_files(folder: Path) -> list[str]:
    """The names of a folder's safetensors: an adapter's, those of the index, or `model.safetensors`, there or not."""
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        return ["adapter_model.safetensors"]
    path = folder / "model.safetensors.index.json"
    index = read_json(path, {"weight_map": {"all": "model.safetensors"}})
    try:
        return sorted({str(name) for name in index["weight_map"].values()})
    except (KeyError, TypeError, AttributeError):
        raise RecipeError(f"{path} is broken; get it again") from None


def refuse_pickles(name: str, wanted: list[str], there: list[str]) -> None:
    """Pickles can carry code, have no header to prove, and a merge goes through safetensors: none are loaded."""
    if not set(wanted) & set(there):
        pickles = sorted(file for file in there if file.endswith((".bin", ".pt", ".pth", ".ckpt", ".pkl")))
        raise RecipeError(
            f"the model {name!r} has no {wanted[0]}{f', only {pickles[0]}' if pickles else ''}; pickles can carry code "
            "and are not loaded: take a copy with safetensors, e.g. the hub's own --model_revision refs/pr/N"
        )


def model_class(config: Any) -> Any:
    """The class of a model that writes text, as TRL takes it: its architecture, or an auto class."""
    import transformers

    kind = getattr(transformers, next(iter(config.architectures or []), ""), None)
    return kind if kind is not None and kind.can_generate() else transformers.AutoModelForCausalLM


def load_pretrained(auto: Any, name: str, revision: str | None = None, *, code: bool = False, **kwargs: Any) -> Any:
    """What one of transformers' auto classes makes of a model's folder or hub id; code of its own only with `code`.

    `AutoModelForCausalLM` stands for the model's own class, which for one of text and images is another auto class's.
    """
    import transformers

    weights, tokenizer = "CausalLM" in auto.__name__, "Tokenizer" in auto.__name__
    folder = model_folder(name, revision, weights=weights, code=code)
    try:
        if weights:
            kwargs = {"use_safetensors": True, **kwargs}
            auto = model_class(transformers.AutoConfig.from_pretrained(str(folder), trust_remote_code=code))
        if tokenizer and not code:  # transformers takes another class than the tokenizer's own code, in silence
            config = read_json(folder / "tokenizer_config.json", {})
            own = "AutoTokenizer" in (config.get("auto_map") or ()) and str(config.get("tokenizer_class"))
            if own and not hasattr(transformers, own):
                raise ValueError("trust_remote_code")
        loaded = auto.from_pretrained(str(folder), trust_remote_code=code, **kwargs)
        if tokenizer:
            loaded("a é 你 😀")  # what does not fit each other fails at a text alone
            loaded.name_or_path = name
    except Exception as error:
        raise RecipeError(explain(error, name)) from None
    return loaded


def generation_config(name: str) -> "GenerationConfig | None":
    """What a model's folder, or its hub id in the cache, says of how it generates; None if it says nothing."""
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


def load_dataset(
    path: str, name: str | None, split: str, revision: str | None = None, *, streaming: bool = False, **files: Any
) -> Any:
    """A split of a hub data set at the commit that `revision` stands for in this run.

    Args:
        name: its configuration.
        files: `data_files` and `data_dir` of `datasets.load_dataset`.
    """
    import datasets
    from huggingface_hub import is_offline_mode

    commit = pin(path, revision, "dataset")
    offline = is_offline_mode()
    try:
        if offline and not files:
            builder = _cached_builder(path, name, commit)
            return builder.as_streaming_dataset(split) if streaming else builder.as_dataset(split)
        rows = datasets.load_dataset(path, name, split=split, revision=commit, streaming=streaming, **files)
    except Exception as error:
        raise RecipeError(explain(error, path, "dataset", revision)) from None
    if offline and not streaming and not any(commit in file["filename"] for file in rows.cache_files):
        raise RecipeError(f"the data {path!r} is cached in other revisions than {commit[:12]}; name one of those")
    return rows


def _cached_builder(path: str, name: str | None, commit: str) -> Any:
    """The Arrow files of this commit; `datasets` alone takes the revision that was cached last."""
    import datasets
    from datasets.packaged_modules.cache.cache import Cache

    folders = {folder.parts[-3]: folder for folder in Path(datasets.config.HF_DATASETS_CACHE).glob(f"*/*/*/{commit}")}
    name = next(iter(folders)) if name is None and len(folders) == 1 else name
    if name not in folders:
        known = f"in the configurations {', '.join(sorted(folders))}" if folders else "not at all"
        raise RecipeError(f"the data {path!r} at {commit[:12]} is cached {known}; name what is cached")
    owner_less, version = path.split("/")[-1], folders[name].parts[-2]
    return Cache(repo_id=path, dataset_name=owner_less, config_name=name, version=version, hash=commit)


def explain(error: BaseException, name: str, kind: str = "model", revision: str | None = None) -> str:
    """One line of what a library said in many: which repository, what happened, what to do."""
    from huggingface_hub import constants

    if isinstance(error, RecipeError):
        return str(error)
    if found := re.search(r"models--([^/]+)/snapshots/[^/]+$", name):
        name = found[1].replace("--", "/", 1)
    chain, text, is_data = [error], one_line(error), kind == "dataset"
    while cause := chain[-1].__cause__ or chain[-1].__context__:
        chain.append(cause)
    what = f"the {'data' if is_data else kind} {name!r}"
    page = f"{constants.ENDPOINT}/{'datasets/' if is_data else ''}{name}"
    login = "log in with `hf auth login` or set HF_TOKEN"
    folder = f"pass a {'file or folder' if is_data else 'folder'} (make: {'DATA' if is_data else 'MODEL'}=PATH)"
    nowhere = f"{what} is no file or folder here and cannot be had from a hub"
    kinds = {kind.__name__ for each in chain for kind in type(each).__mro__}
    if "nvalid credentials" in text or "Invalid user token" in text:
        return f"the hub refuses the token when asked for {what}: it is wrong or was withdrawn; {login}"
    if "GatedRepoError" in kinds or "is a gated dataset" in text:
        return f"{what} is gated: accept its terms at {page}, then {login}"
    if "RepositoryNotFoundError" in kinds or "doesn't exist on the Hub" in text:
        return f"{nowhere}: {constants.ENDPOINT} has none, or it is private and its owner must {login}"
    if "RevisionNotFoundError" in kinds:
        return f"{what} has no revision {revision!r}; see {page}/tree/main"
    if "HFValidationError" in kinds:
        return f"{nowhere} (ids are owner/name); {folder}"
    if _unreachable or kinds & {"LocalEntryNotFoundError", "OfflineModeIsEnabled", "RevisionResolutionError"}:
        return f"{nowhere}: {(_unreachable or [OFFLINE])[0]}, and it is not all cached; {folder}"
    if "trust_remote_code" in text:
        where = name if Path(name).is_dir() else page
        return f"{what} brings code of its own: read it at {where}, then trust it with --trust_remote_code true"
    if "scripts are no longer supported" in text:
        return f"{what} is a script ({text.split()[-1]}), which does not run; take {name}@refs/convert/parquet"
    if not is_data and Path(name).is_dir() and not any(Path(name).glob("*config.json")):
        return f"{what} holds no config.json; give the folder of a model, such as a run's `merged` or `model`"
    inner = next((e for e in chain if type(e).__module__.startswith(("pyarrow", "httpx2"))), chain[-1])
    said = (text if inner is error else f"{text}: {one_line(inner)}")[:400]
    if is_data and ("onfig" in text or "split" in text):
        return f"{what}: {said}; set dataset_config or dataset_train_split, or name or split in the source"
    return f"{what} cannot be loaded: {type(inner).__name__}: {said}"
