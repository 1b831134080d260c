"""`push_to_hub`: what a user would publish of a run, once, at its end."""

from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi, ModelCardData, get_token

from ma_sft.config import Settings
from ma_sft.data.load import Source
from ma_sft.errors import RecipeError
from ma_sft.hub import explain, is_hub_id, unreachable
from ma_sft.utils import say


def check_login(settings: Settings) -> None:
    """Stop before the first step where nobody could publish at the end.

    Raises:
        RecipeError: `push_to_hub` without a token.
    """
    if settings.training.push_to_hub and not (settings.training.hub_token or get_token()):
        raise RecipeError("push_to_hub: the hub wants to know who publishes; `hf auth login`, or set HF_TOKEN")


def publish(settings: Settings, saved: Path, summary: dict[str, Any]) -> str:
    """Upload a run's adapter or model, with its card, report and recipe, in one commit; the address.

    Raises:
        RecipeError: the hub refuses or does not answer; says how to publish later.
    """
    training, out = settings.training, saved.parent
    name = training.hub_model_id or str(settings.run.name)
    files: dict[str, Path | bytes] = {path.name: path for path in sorted(saved.iterdir()) if path.is_file()}
    files |= {name: out / name for name in ("report.html", "recipe.json") if (out / name).is_file()}
    files["README.md"] = make_card(settings, saved, summary).encode()
    api = HfApi(token=settings.chosen.get("hub_token"))
    later = f"what was trained is in {saved}; later: hf upload {name} {saved}"
    try:
        if why := unreachable(name):
            raise RecipeError(f"{why}; {later}")
        repo = api.create_repo(name, private=training.hub_private_repo, exist_ok=True)
        if training.hub_revision:
            api.create_branch(repo.repo_id, branch=training.hub_revision, exist_ok=True)
        additions = [CommitOperationAdd(path_in_repo=path, path_or_fileobj=file) for path, file in files.items()]
        message = f"{settings.run.name}: {summary['steps']} steps"
        api.create_commit(repo.repo_id, additions, commit_message=message, revision=training.hub_revision)
    except RecipeError:
        raise
    except Exception as error:  # whatever a hub does, the run is done
        raise RecipeError(f"{explain(error, name)}; {later}") from None
    say(f"published: {repo}", *(f"  {a.path_in_repo} ({a.upload_info.size:,} bytes)" for a in additions))
    return str(repo)


def make_card(settings: Settings, saved: Path, summary: dict[str, Any]) -> str:
    """The hub's model card: base and data, what training and evaluation gave, the recipe, how to load it."""
    model, rows = settings.model, settings.rows
    given = [rows.dataset_name] if rows.dataset_name else rows.datasets
    paths = [Source.of(source).path for source in given]
    sources = [path if is_hub_id(path) else Path(path).name for path in paths]
    base = str(model.model_name_or_path)
    base = base if is_hub_id(base) else Path(base).name
    data = ModelCardData(
        base_model=base,
        datasets=[path for path in paths if is_hub_id(path)] or None,
        library_name="peft" if saved.name == "adapter" else "transformers",
        pipeline_tag="text-generation",
        tags=["sft", "trl", "ma-sft"],
    )
    figures = {
        key: value for key, value in summary.items() if key != "name" and isinstance(value, int | float) and value
    }
    recipe = (saved.parent / "recipe.json").read_text(encoding="utf-8")
    return "\n".join(
        [
            f"---\n{data.to_yaml()}\n---",
            f"# {settings.run.name}",
            f"`{base}` at `{model.model_revision}`, fine-tuned with ma_sft on {', '.join(sources)}. `report.html` "
            "shows the run, `sft_manifest.json` says what the next stage must agree with.",
            "\n| | |\n| --- | --- |",
            *(f"| {key.replace('_', ' ')} | {value:,.6g} |" for key, value in figures.items()),
            f"\n## Recipe\n\n```json\n{recipe}\n```\n",
        ]
    )
