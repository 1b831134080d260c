"""The run's page: what it tells of finished, unfinished and several runs, and that nothing from data is unescaped."""

import json
import re
import shutil
import threading
import time
from html.parser import HTMLParser

import pytest
from browser import chromium
from check_pages import findings
from patience import PATIENCE

from ma_sft import Recipe, run
from ma_sft.cli import main
from ma_sft.pages.report import read_run, watch, write_report

EVIL = "</pre></p><script>alert(1)</script><img src=x onerror=alert(2)>&amp;\u202e"


@pytest.fixture(scope="module")
def finished(tiny_bpe, tmp_path_factory):
    """A run of four steps with held-out rows, a filter that removes one, and markup in questions and answers."""
    folder = tmp_path_factory.mktemp("report")
    rows = [{"prompt": f"{i} {EVIL}", "completion": f"It is {i}. {EVIL}"} for i in range(20)]
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in [*rows, rows[3]]))
    recipe = Recipe(
        name="first <b>",
        model_name_or_path=str(tiny_bpe),
        dataset_name=str(data),
        filters={"exact_duplicates": True},
        test_size=6,
        generate_eval=6,
        max_new_tokens=4,
        packing=True,
        max_length=512,
        per_device_train_batch_size=1,
        max_steps=4,
        eval_strategy="steps",
        eval_steps=2,
        logging_steps=1,
        learning_rate=1e-3,
        save_strategy="no",
        use_peft=True,
        report_to="none",
        output_dir=str(folder / "run"),
    )
    run(recipe)
    return folder / "run"


@pytest.fixture
def copy(finished, tmp_path):
    """A copy of the finished run that a test may change."""
    return shutil.copytree(finished, tmp_path / "runs" / "copy", ignore=shutil.ignore_patterns("adapter", "merged"))


class Page(HTMLParser):
    """What a browser makes of a page: its tags, its text, its attributes."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.text, self.attributes = [], "", []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes
        self.text += " "

    def handle_data(self, data):
        self.text += data


def test_tells_all_that_was_trained_and_how(finished):
    page = Page(finished / "report.html")
    text = " ".join(page.text.split())
    summary = json.loads((finished / "summary.json").read_text())
    for part in (
        "first <b>",
        "finished",
        *("loss", "token accuracy", "learning rate", "tokens per second", "gradient norm"),
        *("held-out loss", f"{summary['eval_loss']:.4f}", f"{summary['train_loss']:.4f}"),
        *("Held-out answers", "before", "after", "reference"),
        *("What is trained", "The check: every label is right: all"),
        *("length of a row", "packing", "density", "exact duplicates"),
        *("learning_rate: 0.001", "torch", "transformers", "CPU", "python"),
        *("It was started with", f"ma-sft train {finished}/recipe.json --name"),
    ):
        assert part in text, part
    source = (finished / "report.html").read_text(encoding="utf-8")
    lines = re.findall(r'<polyline class="(held|)" points="([^"]+)"', source)
    assert len(lines) == 7 and [kind for kind, _ in lines] == ["", "held", "", "held", "", "", ""]
    held_out = [len(points.split()) for kind, points in lines if kind]
    assert held_out == [3, 3]  # before, at step 2, at the end
    points = [tuple(map(float, point.split(","))) for _, line in lines for point in line.split()]
    assert all(0 <= x <= 360 and 0 <= y <= 190 for x, y in points)


def test_opens_offline_and_runs_nothing_from_the_data(finished):
    page = Page(finished / "report.html")
    assert not {"script", "img", "link", "iframe"} & set(page.tags)
    assert page.text.count("<script>alert(1)</script>") >= 6  # shown as the text that it is
    names = {name for name, _ in page.attributes}
    assert not {"onerror", "onload", "src", "href"} & names
    assert ("content", "default-src 'none'; style-src 'unsafe-inline'") in page.attributes
    source = (finished / "report.html").read_text(encoding="utf-8")
    assert "http" not in source.replace("http-equiv", "") and "url(" not in source
    assert "prefers-color-scheme: dark" in source and 'name="viewport"' in source


def test_shows_the_mask_token_by_token(finished):
    source = (finished / "report.html").read_text(encoding="utf-8")
    row = re.search(r'<pre class="mask">\n(.*?)</pre>', source, re.DOTALL)[1]
    trained = "".join(re.findall(r'<span class="t(?: c)?" title="[\d, ]+">([^<]*)</span>', row))
    assert re.match(r"It is \d+\. &lt;/pre&gt;", trained) and trained.endswith("&lt;|im_end|&gt;")
    assert re.search(r'<span class="c" title="\d+">&lt;\|im_start\|&gt;</span>', row)


def test_does_not_call_labels_right_that_nobody_verified(tiny_bpe, tmp_path):
    """A `formatting_func` without a response template trains whole texts: there is no boundary to be verified."""
    (tmp_path / "texts.py").write_text(
        "def texts(rows):\n    return [f'Q: {q} A: {a}' for q, a in zip(rows['q'], rows['a'])]\n"
    )
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"q": f"{i}?", "a": str(i)}) + "\n" for i in range(4)))
    run(
        Recipe(
            model_name_or_path=str(tiny_bpe),
            dataset_name=str(tmp_path / "rows.jsonl"),
            formatting_func=f"{tmp_path / 'texts.py'}:texts",
            max_steps=1,
            save_strategy="no",
            report_to="none",
            output_dir=str(tmp_path / "run"),
        )
    )
    text = Page(tmp_path / "run" / "report.html").text
    assert "every label" not in text and "not proven: no row was verified" in text


def test_unfinished_run_has_a_page_too(copy, capsys):
    (copy / "summary.json").unlink()
    (copy / "answers.json").unlink()
    log = (copy / "log.jsonl").read_text().splitlines()
    (copy / "log.jsonl").write_text("\n".join(log[:5]) + '\n{"step": 9, "lo')  # killed while it wrote a line
    assert main(["report", str(copy)]) == 0
    assert f"report: {copy}/report.html" in capsys.readouterr().out
    text = Page(copy / "report.html").text
    assert re.search(r"not finished: step [123] of 4, last heard of at 20\d\d-", text) and "What is trained" in text
    assert "Held-out answers" not in text


def test_resumed_run_shows_each_step_once(copy):
    with (copy / "log.jsonl").open("a") as file:
        for entry in ({"start": 2, "max_steps": 6}, {"step": 3, "loss": 7.0}, {"step": 6, "loss": 6.0}):
            file.write(json.dumps({**entry, "time": 1.0}) + "\n")
    found = read_run(copy)
    losses = {entry["step"]: entry["loss"] for entry in found["log"] if "loss" in entry}
    assert list(losses) == [1, 2, 3, 6] and (losses[3], losses[6]) == (7.0, 6.0) and found["planned_steps"] == 6


def test_values_that_are_no_numbers_are_counted_and_not_drawn(copy):
    with (copy / "log.jsonl").open("a") as file:
        file.write('{"step": 5, "loss": NaN, "grad_norm": Infinity, "time": 1.0}\n')
    write_report([copy], copy / "report.html")
    source = (copy / "report.html").read_text(encoding="utf-8")
    assert source.count("1 values are no numbers") == 2 and "nan," not in source.lower()


def test_compares_runs(finished, copy, tmp_path, monkeypatch, capsys):
    settings = json.loads((copy / "recipe.json").read_text())
    (copy / "recipe.json").write_text(json.dumps({**settings, "learning_rate": 0.5}))
    facts = json.loads((copy / "run.json").read_text())
    (copy / "run.json").write_text(json.dumps({**facts, "name": "second"}))
    same, (question, before, after, reference) = json.loads((copy / "answers.json").read_text())[:2]
    (copy / "answers.json").write_text(json.dumps([same, [question, before, "another answer", reference]]))
    monkeypatch.chdir(tmp_path)
    assert main(["report", str(finished), str(copy)]) == 0
    assert capsys.readouterr().out == "report: comparison.html\n"
    page = Page(tmp_path / "comparison.html")
    text = " ".join(page.text.split())
    assert "2 runs" in text and "second" in text and "learning_rate 0.001 0.5" in text
    assert "max_length 512 512" not in text  # what does not differ is not in the table
    sides = text.split("Held-out answers side by side")[1].split("What is trained")[0]
    assert sides.index("another answer") < sides.index(same[0].split()[0] + " "), "what differs comes first"
    assert (
        "first <b> second another" in sides and not after.strip() and "second another answer reference It is" in sides
    )
    assert page.tags.count("polyline") == 14 and page.tags.count("details") >= 2


def changed(run, **summary):
    """The run with another summary."""
    path = run / "summary.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | summary))
    return run


def evaluated(before, after):
    return {"evaluation": {"before": before, "after": {"sources": {}, **after}}}


@pytest.mark.parametrize(
    ("before", "after", "says"),
    [
        ({"loss": 2.0, "sources": {}}, {"loss": 0.5}, "It worked: the held-out loss went from 2.000 to 0.500."),
        ({"loss": 2.0, "sources": {}}, {"loss": 2.5}, "It got worse: the held-out loss went from 2.000 to 2.500."),
        (
            {"loss": 2.0, "score": 0.1, "sources": {}},
            {"loss": 2.5, "score": 0.9, "metric": "exact-match"},
            "It worked: the held-out answers' score went from 10.0% to 90.0%.",
        ),
        (
            {"loss": 4.42, "score": 0.0, "sources": {}},
            {"loss": 2.81, "score": 0.0, "metric": "exact-match"},
            "It worked: the held-out loss went from 4.420 to 2.810.",
        ),
        (None, {"loss": 1.0}, "before training was not measured"),
    ],
)
def test_first_thing_seen_is_whether_it_worked(before, after, says, copy):
    (copy / "answers.json").write_text(json.dumps([["q", "b", "a", "short"]]))
    both = [side and {"perplexity": 2.0, "token_accuracy": 0.5, **side} for side in (before, after)]
    write_report([changed(copy, **evaluated(*both))], copy / "report.html")
    text = " ".join(Page(copy / "report.html").text.split("first <b>")[2].split())
    assert says in text[:200]


def test_of_a_chat_the_loss_leads_even_if_an_answer_matches(copy):
    (copy / "answers.json").write_text(json.dumps([["q", "b", "a", "A long answer. " * 20]]))
    before = {"loss": 4.42, "score": 0.01, "sources": {}, "perplexity": 2.0, "token_accuracy": 0.5}
    after = {**before, "loss": 2.81, "score": 0.0, "metric": "exact-match"}
    write_report([changed(copy, **evaluated(before, after))], copy / "report.html")
    assert "It worked: the held-out loss went from 4.420 to 2.810." in Page(copy / "report.html").text


def test_comparison_marks_the_better_value_and_tells_namesakes_apart(copy, tmp_path):
    other = shutil.copytree(copy, tmp_path / "runs" / "other")
    changed(copy, eval_loss=0.123456, train_seconds=100)
    changed(other, eval_loss=0.234567, train_seconds=50)
    write_report([copy, other], tmp_path / "two.html")
    text = " ".join(Page(tmp_path / "two.html").text.split())
    assert "held-out loss 0.123 ✓ best 0.235" in text and "time 1 min 40 s 50 s ✓ best" in text
    assert f"first <b> ({copy})" in text and f"first <b> ({other})" in text
    recipe = json.loads((other / "recipe.json").read_text())
    (other / "recipe.json").write_text(json.dumps({**recipe, "test_size": 5}))
    write_report([copy, other], tmp_path / "two.html")
    text = " ".join(Page(tmp_path / "two.html").text.split())
    assert "held-out loss 0.123 0.235" in text and "time 1 min 40 s 50 s" in text and "50 s ✓" not in text
    assert "test_size 6.0 5" in text and "Different data or held-out rows" in text


def test_comparison_of_other_tokens_or_missing_figures_has_no_best(copy, tmp_path):
    other = shutil.copytree(copy, tmp_path / "runs" / "other")
    changed(copy, eval_loss=0.1, train_seconds=100, eos_rate=0.5)
    changed(other, eval_loss=0.2, train_seconds=50, eos_rate=None)
    facts = json.loads((other / "run.json").read_text())
    facts["rows"][0]["pieces"][0]["ids"] = [1, 2]  # of another tokenizer
    (other / "run.json").write_text(json.dumps(facts))
    write_report([copy, other], tmp_path / "two.html")
    text = " ".join(Page(tmp_path / "two.html").text.split())
    assert "answers stopped by themselves 50.0% held-out loss 0.1 0.2 token" in text
    assert "time 1 min 40 s 50 s ✓ best" in text


def test_comparison_shows_the_default_of_a_run_that_left_a_setting_out(copy, tmp_path):
    other = shutil.copytree(copy, tmp_path / "runs" / "other")
    recipe = json.loads((copy / "recipe.json").read_text())
    left_out = {key: value for key, value in recipe.items() if key not in ("learning_rate", "packing")}
    (other / "recipe.json").write_text(json.dumps({**left_out, "warmup_steps": 0.25}))
    facts = json.loads((other / "run.json").read_text())
    facts["values"] |= {"learning_rate": 2e-4, "packing": True}
    (other / "run.json").write_text(json.dumps(facts))
    write_report([copy, other], tmp_path / "two.html")
    text = " ".join(Page(tmp_path / "two.html").text.split())
    assert "learning_rate 0.001 0.0002 (default)" in text and "packing" not in text.split("Curves")[0]
    assert "warmup_steps 0 (default) 0.25" in text or "warmup_steps 0.0 (default) 0.25" in text
    assert "null" not in text.split("Curves")[0]


def test_answers_that_differ_come_first(copy):
    answers = [["q", "b", "same", "same"], ["long " * 400, "b", "It is 4.", "It is 5."], ["שלום", "", "送货", "送餐"]]
    (copy / "answers.json").write_text(json.dumps(answers))
    write_report([copy], copy / "report.html")
    source = (copy / "report.html").read_text(encoding="utf-8")
    assert source.index("It is 4.") < source.index(">same<") and "(2,000 characters)</summary>" in source
    assert 'dir="auto">שלום' in source


def test_no_character_of_a_run_is_obeyed(finished):
    source = (finished / "report.html").read_text(encoding="utf-8")
    assert "\u202e" not in source and "\\u202e" in source


def test_a_glob_of_runs_passes_over_what_is_none(copy, tmp_path, capsys):
    (tmp_path / "runs" / "Nov25_host").mkdir()
    runs = sorted(map(str, (tmp_path / "runs").iterdir()))
    assert main(["report", *runs, "-o", str(tmp_path / "all.html")]) == 0
    assert "Nov25_host is not a run's folder" in capsys.readouterr().err
    assert "first <b>" in Page(tmp_path / "all.html").text


def test_report_follows_no_link_that_someone_left(copy, tmp_path):
    mine = tmp_path / "mine.txt"
    mine.write_text("mine")
    for name in (".report.html", "report.html"):
        (copy / name).unlink(missing_ok=True)
        (copy / name).symlink_to(mine)
    write_report([copy], copy / "report.html")
    assert mine.read_text() == "mine" and not (copy / "report.html").is_symlink()
    assert {path.name for path in copy.iterdir() if path.name.startswith(".")} == {".report.html", ".lock"}


def test_watch_reloads_until_the_run_is_finished(copy, tmp_path):
    summary = (copy / "summary.json").read_text()
    (copy / "summary.json").unlink()
    facts = (copy / "run.json").rename(tmp_path / "run.json")  # as while rows are tokenised
    page = tmp_path / "live.html"
    watching = threading.Thread(target=watch, args=([copy], page, 1))
    watching.start()
    time.sleep(1.5)
    assert watching.is_alive() and not page.exists()
    facts.rename(copy / "run.json")
    until = time.monotonic() + 60 * PATIENCE
    while not page.exists() and time.monotonic() < until:
        time.sleep(0.05)
    assert ("http-equiv", "refresh") in Page(page).attributes and "not finished" in page.read_text()
    (copy / "summary.json").write_text(summary)
    watching.join(60 * PATIENCE)
    assert not watching.is_alive()
    assert ("http-equiv", "refresh") not in Page(page).attributes and "not finished" not in page.read_text()


def test_folders_without_a_run_are_one_line(tmp_path, capsys):
    assert main(["report", str(tmp_path)]) == 2
    assert capsys.readouterr().err == (
        f"error: {tmp_path} is not a run's folder; give one that `ma-sft train` made, such as runs/NAME\n"
    )
    (tmp_path / "recipe.json").write_text("{}")
    assert main(["report", str(tmp_path)]) == 2
    assert "has not come to its first step; wait with --watch" in capsys.readouterr().err


def test_json_for_scripts(finished, capsys):
    assert main(["report", "--json", str(finished)]) == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert found["summary"]["steps"] == 4 and len(found["answers"]) == 6
    speeds = [entry["tokens_per_second"] for entry in found["log"] if "loss" in entry]
    assert len(speeds) == 4 and all(speed > 0 for speed in speeds)


def test_settings_of_a_run_train_again(finished, tmp_path):
    again = Recipe.load(finished / "recipe.json")
    settings = again.resolve(["--output_dir", str(tmp_path / "again")])
    assert (settings.training.learning_rate, settings.training.max_steps, settings.rows.test_size) == (1e-3, 4, 6)


@pytest.fixture
def browser():
    if chromium() is None:
        pytest.skip("no Chromium for this kind of machine")


@pytest.mark.slow
def test_what_is_wrong_is_found_in_a_browser(browser, tmp_path):
    (tmp_path / "page.html").write_text(
        "<!doctype html><html lang='en'><title>T</title><style>@media (prefers-color-scheme: dark) "
        "{ p { color: #777; background: #666 } }</style><h1>T</h1>"
        "<main><p>Hi</p><div style='width: 900px'>wide</div></main>"
    )
    light, dark = (findings(tmp_path / "page.html", 390, dark) for dark in (False, True))
    assert light[-1].endswith("px wider than the window") and not any("contrast" in text for text in light)
    assert any("color-contrast" in text for text in dark)


@pytest.mark.slow
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_pages_are_readable_in_a_browser(browser, width, dark, finished, tmp_path):
    """Contrast, names and keyboard by axe-core, and nothing wider than the window."""
    write_report([finished], tmp_path / "one.html")
    write_report([finished] * 9, tmp_path / "many.html")
    for page in ("one.html", "many.html"):
        assert findings(tmp_path / page, width, dark) == []
