"""A template that writes the date writes one and the same in labels, judge, resume and hand-off."""

import json
import re
from datetime import datetime, timedelta

import pytest
import transformers.utils.chat_template_utils as chat_templates
from helpers import QUICK, Die, assistant, load_tokenizer, user, write_rows
from transformers import AutoTokenizer

from ma_sft import Recipe, RecipeError, RunError, make_trainer, run
from ma_sft.labels.encoder import ChatEncoder
from ma_sft.labels.templates import TEMPLATES as BUILT_IN
from ma_sft.labels.templates import load_tokenizer as load
from ma_sft.labels.tokenize import check, label
from ma_sft.labels.verify import Verifier
from ma_sft.release.chat import load as load_chat
from ma_sft.release.manifest import check_handoff
from ma_sft.training.checkpoints import with_date

DATED = (
    "{% if strftime_now is defined %}{% set now = strftime_now('%d %b %Y %H:%M:%S') %}"
    "{% else %}{% set now = '26 Jul 2024' %}{% endif %}{{ '<|im_start|>system\\nToday: ' + now + '<|im_end|>\\n' }}"
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
ROWS = [{"question": f"q{n}?", "answer": f"a{n}"} for n in range(6)]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "date.jinja").write_text(DATED)
    write_rows(tmp_path / "rows.jsonl", ROWS)
    return tmp_path


@pytest.fixture
def days_later(monkeypatch):
    """Sets the machine's clock ahead, as transformers and ma_sft read it."""

    def shift(days: int) -> str:
        class Later(datetime):
            @classmethod
            def now(cls, tz=None):
                return datetime.now(tz) + timedelta(days=days)

        class LaterDay:
            today = staticmethod(lambda: Later.now().date())

        monkeypatch.setattr(chat_templates, "datetime", Later)
        monkeypatch.setattr("ma_sft.training.checkpoints.date", LaterDay)
        return Later.now().strftime("%d %b %Y")

    return shift


def recipe(model, **settings):
    given = {
        "model_name_or_path": str(model),
        "dataset_name": "rows.jsonl",
        "output_dir": "o",
        "template": "date.jinja",
    }
    return Recipe(**{**QUICK, **given, "use_cpu": True, "max_length": 256, "max_steps": 4, **settings})


def dated(given):
    settings = given.resolve()
    tokenizer, _ = load(settings)
    return with_date(settings, tokenizer), tokenizer


def prepared(model, **settings) -> list[str]:
    """The texts of the rows, whose labels the judge approved of."""
    found, tokenizer = dated(recipe(model, **settings))
    labelled = label(found, tokenizer)
    report = check(found, tokenizer, labelled)
    assert not report.errors, report
    return [tokenizer.decode(ids) for ids in labelled.dataset["input_ids"]]


def test_each_day_has_its_date_and_is_proven(folder, tiny_bpe, days_later):
    today, tomorrow = days_later(0), days_later(1)
    assert all(f"Today: {tomorrow} 00:00:00" in text for text in prepared(tiny_bpe))
    days_later(0)
    assert all(f"Today: {today} 00:00:00" in text for text in prepared(tiny_bpe))


def test_template_now_is_what_the_template_writes(folder, tiny_bpe, caplog):
    assert all("Today: 29 Feb 2024 13:14:00" in text for text in prepared(tiny_bpe, template_now="2024-02-29T13:14"))
    assert "the template writes the date 2024-02-29T13:14 (template_now)" in caplog.messages


def test_many_rows_of_one_date_are_warned_about(folder, tiny_bpe, caplog):
    write_rows(folder / "rows.jsonl", ROWS * 50)
    prepared(tiny_bpe, template_now="2024-02-29")
    assert "300 rows with one date teach the model that it is always that day" in caplog.text


def test_date_that_is_not_written_is_not_told(folder, tiny_bpe, caplog):
    dated = "{% if messages[0].role != 'user' %}{{ strftime_now('%Y') }}{% endif %}"
    (folder / "date.jinja").write_text(dated + DATED.replace("strftime_now is defined", "false"))
    assert all("26 Jul 2024" in text for text in prepared(tiny_bpe, template_now="2021-02-03"))
    assert "template_now" not in caplog.text


def test_values_of_the_setting(folder, tiny_bpe):
    for written in ("2024-02-29", "2024-02-29 13:14:00"):
        write_rows(folder / "r.yaml", [f"{{model_name_or_path: x, dataset_name: x, template_now: {written}}}"])
        assert Recipe.load("r.yaml").resolve().labels.template_now == written.replace(" ", "T")
    with pytest.raises(RecipeError, match=r"template_now: a date as .* expected, found 'yesterday'"):
        recipe(tiny_bpe, template_now="yesterday").resolve()
    with pytest.raises(RecipeError, match="template_now: the chat template reads no clock"):
        dated(recipe(tiny_bpe, template="chatml", template_now="2024-02-29"))


def test_workers_and_streams_have_the_same_clock(folder, tiny_bpe):
    texts = prepared(tiny_bpe, template_now="2024-02-29", dataset_num_proc=2)
    found, tokenizer = dated(recipe(tiny_bpe, template_now="2024-02-29", dataset_streaming=True))
    assert [tokenizer.decode(ids) for ids in label(found, tokenizer).dataset["input_ids"]] == texts


def test_real_template():
    """gpt-oss writes the date into every system message."""
    tokenizer, question = load_tokenizer("gptoss"), [user("Hi")]
    own = tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=True)
    encoder = ChatEncoder(tokenizer, template_now="2024-02-29")
    assert tokenizer.decode(encoder.encode_prompt(question)) == re.sub("(?<=date: )[0-9-]+", "2024-02-29", own)
    chats = [[user(f"q{n}"), assistant(f"a{n}")] for n in range(8)]
    rows = [(e.input_ids, e.labels) for (e,) in encoder.encode(chats)]
    for date, proven in (("2024-02-29", True), (None, False)):
        judge = Verifier(tokenizer, template_date=date)
        verdicts = [judge.verify(chat, [row]) for chat, row in zip(chats, rows, strict=True)]
        assert {bool(verdict.proven) for verdict in verdicts} == {proven}
    assert tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=True) == own


@pytest.mark.slow
def test_run_keeps_its_date(folder, tiny_bpe, days_later, caplog, capsys):
    """Stopped on one day, looked at and gone on with on the next, saved, and handed over a year later."""
    today = days_later(0)
    day = datetime.strptime(today, "%d %b %Y").date().isoformat()
    settings = {"save_strategy": "steps", "save_steps": 2, "test_size": 2, "generate_eval": 1, "max_new_tokens": 2}
    with pytest.raises(RunError, match="killed"):
        run(recipe(tiny_bpe, **settings), on_trainer=lambda trainer: trainer.add_callback(Die(2)))
    assert json.loads((folder / "o" / "recipe.json").read_text())["template_now"] == day

    tomorrow = days_later(1)
    assert all(today in text for text in prepared(tiny_bpe, **settings))
    kept = Recipe.load(folder / "o" / "recipe.json").resolve(["--output_dir", "elsewhere"])
    assert kept.labels.template_now == day
    assert all(tomorrow in text for text in prepared(tiny_bpe, **settings, resume="never"))
    caplog.clear()
    summary = run(recipe(tiny_bpe, **settings))
    assert summary["steps"] == 4 and "going on from o/checkpoint-2" in capsys.readouterr().out
    assert f"the template writes the date {day} (template_now)" in caplog.messages

    days_later(365)
    manifest = json.loads((folder / "o" / "model" / "sft_manifest.json").read_text())
    assert manifest["template_now"] == day
    assert not [found for found in check_handoff(folder / "o") if not found.ok]
    _, encoder, _ = load_chat(folder / "o")
    assert f"Today: {today} 00:00:00" in encoder.tokenizer.decode(
        encoder.encode_prompt([{"role": "user", "content": "Hi"}])
    )


def test_trainer_of_a_tokenizer_that_is_given(folder, tiny_bpe):
    tokenizer = AutoTokenizer.from_pretrained(tiny_bpe)
    tokenizer.chat_template = DATED
    given = recipe(tiny_bpe, template=None, template_now="2024-02-29")
    row = make_trainer(given, processing_class=tokenizer).train_dataset[0]
    assert "Today: 29 Feb 2024 00:00:00" in tokenizer.decode(row["input_ids"])
    tokenizer.chat_template = BUILT_IN["chatml"]
    with pytest.raises(RecipeError, match="template_now: the chat template reads no clock"):
        make_trainer(given, processing_class=tokenizer)
