"""The tokenizer of a recipe and its chat template: the model's own, one that ships (`templates/*.jinja`), or a file."""

from pathlib import Path
from typing import TYPE_CHECKING

from transformers import PreTrainedTokenizerBase

from ma_sft.errors import RecipeError, TemplateError
from ma_sft.hub import load_pretrained
from ma_sft.utils import frozen, not_there

if TYPE_CHECKING:
    from ma_sft.config import Settings


# Name -> Jinja source of every template that ships: a file of this folder is one.
TEMPLATES = {
    path.stem: path.read_text(encoding="utf-8")
    for path in sorted((Path(__file__).parent / "templates").glob("*.jinja"))
}


def set_chat_template(tokenizer: PreTrainedTokenizerBase, template: str | None) -> list[str]:
    """Give `tokenizer` a chat template and return the special tokens that had to be added for it.

    Args:
        template: None (keep the tokenizer's own), a name in `TEMPLATES`, a path to a `.jinja` file, or Jinja source.

    `"chatml"` brings `<|im_start|>` and `<|im_end|>` to a tokenizer that lacks them and makes `<|im_end|>` its
    EOS; the caller then has to resize the model's embedding. The plain templates begin with the BOS token if the
    tokenizer puts one before plain text.

    Raises:
        TemplateError: no template at all, an unknown name, a missing file.
    """
    if template is None:
        if not tokenizer.chat_template:
            raise TemplateError(
                f"the tokenizer {tokenizer.name_or_path!r} has no chat template; choose one with "
                f"template={' | '.join(TEMPLATES)} or a .jinja file"
            )
        return []
    if template in TEMPLATES:
        source = TEMPLATES[template]
        if template == "chatml":
            vocab = tokenizer.get_vocab()  # a new dict each time
            added = [t for t in ("<|im_start|>", "<|im_end|>") if t not in vocab]
            tokenizer.add_special_tokens({"eos_token": "<|im_end|>", "additional_special_tokens": added})
            tokenizer.chat_template = source
            return added
        puts_bos = tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]
        tokenizer.chat_template = ("{{ bos_token }}" if puts_bos else "") + source
    elif template.endswith((".jinja", ".j2")):
        if not Path(template).is_file():
            raise TemplateError(f"the chat template {not_there(template)}")
        tokenizer.chat_template = Path(template).read_text(encoding="utf-8")
    elif "{" in template:
        tokenizer.chat_template = template
    else:
        raise TemplateError(
            f"unknown template {template!r}; known: {', '.join(TEMPLATES)}, a path to a .jinja file, or Jinja source"
        )
    return []


def control_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Text -> id of every token that is structure: special tokens, and added tokens that the template writes."""
    template = str(tokenizer.chat_template or "")  # of a dict, all are
    return {
        token.content: index
        for index, token in tokenizer.added_tokens_decoder.items()
        if token.special or (token.content.strip() and token.content in template)
    }


@frozen()
def load_tokenizer(settings: "Settings") -> tuple[PreTrainedTokenizerBase, list[str]]:
    """The recipe's tokenizer with the recipe's chat template, and the special tokens added for it.

    Raises:
        RecipeError: as `ma_sft.hub.load_pretrained`.
        TemplateError: the template does not fit.
    """
    from transformers import AutoTokenizer

    model = settings.model
    name, code = str(model.model_name_or_path), settings.training.trust_remote_code
    tokenizer: PreTrainedTokenizerBase = load_pretrained(AutoTokenizer, name, model.model_revision, code=code)
    training, labels = settings.training, settings.labels
    added: list[str] = []
    if training.chat_template_path:
        added = _take_template(tokenizer, training.chat_template_path, code)
    elif labels.formatting_func is None or labels.template or labels.formatting_func in TEMPLATES:
        added = set_chat_template(tokenizer, labels.template or labels.formatting_func)
    for setting in ("eos_token", "pad_token"):
        if (token := getattr(training, setting)) is not None:
            if token not in tokenizer.get_vocab():
                raise RecipeError(f"{setting}: the tokenizer has no token {token!r}")
            setattr(tokenizer, setting, token)
    if training.eos_token and labels.formatting_func is None:
        _check_end(tokenizer)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer, added


def _take_template(tokenizer: PreTrainedTokenizerBase, path: str, code: bool) -> list[str]:
    """What `trl.clone_chat_template` does to a tokenizer: another one's template, added tokens and end token.

    Returns the tokens that are new, for which the model's embedding has to grow.
    """
    if path.endswith((".jinja", ".j2")):
        return set_chat_template(tokenizer, path)
    from transformers import AutoTokenizer

    source = load_pretrained(AutoTokenizer, path, None, code=code)
    if not source.chat_template:
        raise TemplateError(f"chat_template_path: the tokenizer {path!r} has no chat template")
    tokenizer.chat_template = source.get_chat_template()
    vocab = tokenizer.get_vocab()
    new = [token for token in source.added_tokens_decoder.values() if token.content not in vocab]
    tokenizer.add_tokens(new)
    tokenizer.eos_token = source.eos_token
    return [token.content for token in new]


def _check_end(tokenizer: PreTrainedTokenizerBase) -> None:
    """Compare the end token that was asked for with what the template writes after an answer.

    Raises:
        RecipeError: the template ends a turn with another token, so that the one asked for would never be trained.
    """
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    text = str(tokenizer.apply_chat_template(turns, tokenize=False)).rpartition("Hello")[2]
    if str(tokenizer.eos_token) not in text:
        raise RecipeError(
            f"eos_token: the chat template ends a turn with {text!r}, not with {tokenizer.eos_token!r}; "
            "set template or chat_template_path to one that does, or remove eos_token"
        )
