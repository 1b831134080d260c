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
from helpers import QUICK, refusal, write_rows
from patience import PATIENCE

from ma_sft import Recipe, run
from ma_sft.cli import main
from ma_sft.pages.report import read_run, watch, write_report

EVIL = "</pre></p><script>alert(1)</script><img src=x onerror=alert(2)>&amp;\u202e [/foo] \x1b]0;x\x07"


@pytest.fixture(scope="module")
def finished(tiny_bpe, tmp_path_factory):
    """A run of four steps with held-out rows, a filter that removes one, and markup in questions and answers."""
    folder = tmp_path_factory.mktemp("report")
    rows = [{"prompt": f"{i} {EVIL}", "completion": f"It is {i}. {EVIL}"} for i in range(20)]
    data = write_rows(folder / "rows.jsonl", [*rows, rows[3]])
    places = {"model_name_or_path": str(tiny_bpe), "dataset_name": data, "output_dir": str(folder / "run")}
    held_out = {"test_size": 6, "generate_eval": 6, "max_new_tokens": 4, "eval_strategy": "steps", "eval_steps": 2}
    more = {"filters": {"exact_duplicates": True}, "packing": True, "max_length": 512, "use_peft": True}
    more |= {"per_device_train_batch_size": 1, "max_steps": 4, "learning_rate": 1e-3}
    run(Recipe(**{**QUICK, **places, **held_out, **more}, name="first <b>"))
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
        self.words = " ".join(self.text.split())

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes
        self.text += " "

    def handle_data(self, data):
        self.text += data


def change(path, **values):
    """The JSON file with other values."""
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def report_of(*runs):
    """The page of these runs."""
    page = runs[0].parent / "page.html"
    write_report([*runs], page)
    return Page(page)


@pytest.fixture
def two(copy, tmp_path):
    """Two copies of the run."""
    return copy, shutil.copytree(copy, tmp_path / "runs" / "other")


def test_tells_all_that_was_trained_and_how(finished):
    text = Page(finished / "report.html").words
    summary = json.loads((finished / "summary.json").read_text())
    assert "failed" not in summary, "markup of the terminal's ends no run"
    for part in (
        *("first <b>", "finished", "loss", "token accuracy", "learning rate", "tokens per second", "gradient norm"),
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
    assert "\u202e" not in source and "\\u202e" in source  # no character of a run is obeyed


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
    rows = write_rows(tmp_path / "rows.jsonl", ({"q": f"{i}?", "a": str(i)} for i in range(4)))
    places = {"model_name_or_path": str(tiny_bpe), "dataset_name": rows, "output_dir": str(tmp_path / "run")}
    run(Recipe(**{**QUICK, **places, "max_steps": 1}, formatting_func=f"{tmp_path / 'texts.py'}:texts"))
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


def test_compares_runs(finished, copy, tmp_path, monkeypatch, capsys):
    change(copy / "recipe.json", learning_rate=0.5)
    change(copy / "run.json", name="second")
    same, (question, before, after, reference) = json.loads((copy / "answers.json").read_text())[:2]
    (copy / "answers.json").write_text(json.dumps([same, [question, before, "another answer", reference]]))
    monkeypatch.chdir(tmp_path)
    assert main(["report", str(finished), str(copy)]) == 0
    assert capsys.readouterr().out == "report: comparison.html\n"
    page = Page(tmp_path / "comparison.html")
    text = page.words
    assert "2 runs" in text and "second" in text and "learning_rate 0.001 0.5" in text
    assert "max_length 512 512" not in text  # what does not differ is not in the table
    sides = text.split("Held-out answers side by side")[1].split("What is trained")[0]
    assert sides.index("another answer") < sides.index(same[0].split()[0] + " "), "what differs comes first"
    assert "first <b> second another" in sides and "second another answer reference It is" in sides
    assert not after.strip() and page.tags.count("polyline") == 14 and page.tags.count("details") >= 2


MATCH = {"metric": "exact-match"}


@pytest.mark.parametrize(
    ("before", "after", "reference", "says"),
    [
        ({"loss": 2.0}, {"loss": 0.5}, "short", "It worked: the held-out loss went from 2.000 to 0.500."),
        ({"loss": 2.0}, {"loss": 2.5}, "short", "It got worse: the held-out loss went from 2.000 to 2.500."),
        ({"loss": 2.0, "score": 0.1}, {"loss": 2.5, "score": 0.9, **MATCH}, "short",
         "It worked: the held-out answers' score went from 10.0% to 90.0%."),
        ({"loss": 4.42, "score": 0.0}, {"loss": 2.81, "score": 0.0, **MATCH}, "short",
         "It worked: the held-out loss went from 4.420 to 2.810."),
        # Of a chat the loss leads, even if an answer matches
        ({"loss": 4.42, "score": 0.01}, {"loss": 2.81, "score": 0.0, **MATCH}, "A long answer. " * 20,
         "It worked: the held-out loss went from 4.420 to 2.810."),
        (None, {"loss": 1.0}, "short", "before training was not measured"),
    ],
)  # fmt: skip
def test_first_thing_seen_is_whether_it_worked(before, after, reference, says, copy):
    (copy / "answers.json").write_text(json.dumps([["q", "b", "a", reference]]))
    both = [side and {"perplexity": 2.0, "token_accuracy": 0.5, "sources": {}, **side} for side in (before, after)]
    change(copy / "summary.json", evaluation=dict(zip(("before", "after"), both, strict=True)))
    assert says in report_of(copy).words.split("first <b>")[2][:201]


def test_comparison_marks_the_better_value_and_tells_namesakes_apart(two):
    copy, other = two
    change(copy / "summary.json", eval_loss=0.123456, train_seconds=100)
    change(other / "summary.json", eval_loss=0.234567, train_seconds=50)
    text = report_of(*two).words
    assert "held-out loss 0.123 ✓ best 0.235" in text and "time 1 min 40 s 50 s ✓ best" in text
    assert f"first <b> ({copy})" in text and f"first <b> ({other})" in text
    change(other / "recipe.json", test_size=5)
    text = report_of(*two).words
    assert "held-out loss 0.123 0.235" in text and "time 1 min 40 s 50 s" in text and "50 s ✓" not in text
    assert "test_size 6.0 5" in text and "Different data or held-out rows" in text


def test_comparison_of_other_tokens_or_missing_figures_has_no_best(two):
    copy, other = two
    change(copy / "summary.json", eval_loss=0.1, train_seconds=100, eos_rate=0.5)
    change(other / "summary.json", eval_loss=0.2, train_seconds=50, eos_rate=None)
    rows = json.loads((other / "run.json").read_text())["rows"]
    rows[0]["pieces"][0]["ids"] = [1, 2]  # of another tokenizer
    change(other / "run.json", rows=rows)
    text = report_of(*two).words
    assert "answers stopped by themselves 50.0% held-out loss 0.1 0.2 token" in text
    assert "time 1 min 40 s 50 s ✓ best" in text


def test_comparison_shows_the_default_of_a_run_that_left_a_setting_out(two):
    _, other = two
    recipe = json.loads((other / "recipe.json").read_text())
    left_out = {key: value for key, value in recipe.items() if key not in ("learning_rate", "packing")}
    (other / "recipe.json").write_text(json.dumps({**left_out, "warmup_steps": 0.25}))
    values = json.loads((other / "run.json").read_text())["values"]
    change(other / "run.json", values={**values, "learning_rate": 2e-4, "packing": True})
    table = report_of(*two).words.split("Curves")[0]
    assert "learning_rate 0.001 0.0002 (default)" in table and "packing" not in table and "null" not in table
    assert re.search(r"warmup_steps 0(\.0)? \(default\) 0\.25", table)


def test_answers_that_differ_come_first(copy):
    answers = [["q", "b", "same", "same"], ["long " * 400, "b", "It is 4.", "It is 5."], ["שלום", "", "送货", "送餐"]]
    (copy / "answers.json").write_text(json.dumps(answers))
    with (copy / "log.jsonl").open("a") as file:  # what is no number is counted and not drawn
        file.write('{"step": 5, "loss": NaN, "grad_norm": Infinity, "time": 1.0}\n')
    write_report([copy], copy / "report.html")
    source = (copy / "report.html").read_text(encoding="utf-8")
    assert source.index("It is 4.") < source.index(">same<") and "(2,000 characters)</summary>" in source
    assert 'dir="auto">שלום' in source
    assert source.count("1 values are no numbers") == 2 and "nan," not in source.lower()


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
    said = refusal(capsys, "report", tmp_path)
    assert said.startswith(f"error: {tmp_path} is not a run's folder, or its run has not come to its first step")


def test_json_for_scripts(finished, capsys):
    assert main(["report", "--json", str(finished)]) == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert found["summary"]["steps"] == 4 and len(found["answers"]) == 6
    speeds = [entry["tokens_per_second"] for entry in found["log"] if "loss" in entry]
    assert len(speeds) == 4 and all(speed > 0 for speed in speeds)


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
