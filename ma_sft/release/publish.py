"""The model card of a run, and `push_to_hub`: what a user would publish of it, once, at its end."""

from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi, ModelCardData, get_token

from ma_sft.config import Settings
from ma_sft.data.load import Source
from ma_sft.errors import RecipeError
from ma_sft.hub import explain, is_hub_id, unreachable
from ma_sft.utils import say, write_whole


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
    files = [*sorted(path for path in saved.iterdir() if path.is_file()), out / "report.html", out / "recipe.json"]
    additions = [CommitOperationAdd(path.name, path) for path in files if path.is_file()]
    api = HfApi(token=settings.chosen.get("hub_token"))
    try:
        if why := unreachable(name):
            raise RecipeError(why)
        repo = api.create_repo(name, private=training.hub_private_repo, exist_ok=True)
        if training.hub_revision:
            api.create_branch(repo.repo_id, branch=training.hub_revision, exist_ok=True)
        message = f"{settings.run.name}: {summary['steps']} steps"
        api.create_commit(repo.repo_id, additions, commit_message=message, revision=training.hub_revision)
    except Exception as error:  # whatever a hub does, the run is done
        raise RecipeError(
            f"{explain(error, name)}; what was trained is in {saved}; later: hf upload {name} {saved}"
        ) from None
    say(f"published: {repo}", *(f"  {a.path_in_repo} ({a.upload_info.size:,} bytes)" for a in additions))
    return str(repo)


def write_cards(settings: Settings, saved: Path, summary: dict[str, Any]) -> None:
    """Write the model card of a run and what it saved, in the place of TRL's and PEFT's empty ones."""
    for folder in (saved.parent, saved, saved.parent / "merged"):
        if folder.is_dir():
            write_whole(folder / "README.md", _card(settings, folder, saved.parent / "recipe.json", summary))


def _card(settings: Settings, folder: Path, recipe: Path, summary: dict[str, Any]) -> str:
    """Base and data, what training and evaluation gave, and the recipe; above it no path of this machine."""
    model = settings.model
    paths = [Source.of(source).path for source in settings.rows.datasets or [str(settings.rows.dataset_name)]]
    base, *sources = (path if is_hub_id(path) else Path(path).name for path in [str(model.model_name_or_path), *paths])
    data = ModelCardData(
        base_model=base if is_hub_id(base) else None,
        datasets=[path for path in paths if is_hub_id(path)] or None,
        library_name="peft" if (folder / "adapter_config.json").is_file() else "transformers",
        pipeline_tag="text-generation",
        tags=["sft", "trl", "ma-sft"],
    )
    figures = {name: value for name, value in summary.items() if isinstance(value, int | float) and value}
    revision = f" at `{model.model_revision}`" if is_hub_id(base) else ""
    return "\n".join(
        [
            f"---\n{data.to_yaml()}\n---\n# {settings.run.name}\n",
            f"`{base}`{revision}, fine-tuned with ma_sft on {', '.join(sources)}. `report.html` shows the run, "
            "`sft_manifest.json` says what the next stage must agree with.\n\n| | |\n| --- | --- |",
            *(f"| {name.replace('_', ' ')} | {value:,.6g} |" for name, value in figures.items()),
            f"\n## Recipe\n\n```json\n{recipe.read_text(encoding='utf-8')}\n```\n",
        ]
    )
