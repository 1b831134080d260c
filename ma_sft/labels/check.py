"""`check_dataset`: facts about the labels of all rows, and the judge on a sample in which every shape stands.

The facts need `input_ids` and `labels` alone, so they serve every way in which labels are made. Run it on rows before
they are cut and packed.
"""

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from ma_sft.labels.court import Court
from ma_sft.labels.facts import Facts
from ma_sft.labels.findings import SHOWN_ROWS, CheckReport, Finding, Findings
from ma_sft.labels.response import TemplateReport
from ma_sft.labels.verify import Verifier

TEXT_ROWS = (
    "text has no chat template to compare with; proven of it: the response template was found, labels are the tokens "
    "in their place, and each turn ends in a trained end token"
)


def check_dataset(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    conversations: Dataset | None = None,
    judge: Verifier | None = None,
    template_report: TemplateReport | None = None,
    max_length: int | None = None,
    sample: int | None = 2_000,
    num_proc: int | None = 1,
) -> CheckReport:
    """Check every row of a labelled dataset.

    Args:
        dataset: columns `input_ids` and `labels`, uncut and unpacked; `row` (of the conversation), `untrained` and
            `special_text`, as `ChatEncoder.tokenize_batch` gives them, are used if there.
        conversations: `messages` of the rows, and `tools`, `chat_template_kwargs` and `raw`, the row as it lies in its
            file, if there are such columns. Without them nothing is judged.
        judge: by default one that knows the tokenizer alone.
        template_report: what `DataCollatorForCompletionOnlyLM.check` found in the rows.
        max_length: where rows will be cut, in tokens.
        sample: how many conversations are judged, evenly spread, beside 20 of every shape; None for all.
        num_proc: processes that judge; None for all cores if there are many conversations.
    """
    report = CheckReport(rows=len(dataset))
    found = Findings()
    facts = Facts(dataset, tokenizer, max_length, report, found)
    facts.gather()
    if conversations is not None:
        court = Court(dataset, conversations, judge or Verifier(tokenizer), report, found, facts, num_proc)
        court.judge(sample)
    elif template_report is not None:
        report.not_proven[TEXT_ROWS] = found.counts["not proven"] = report.rows
    if template_report is not None:
        _take_over(template_report, found)
    report.cut_rows, report.cut_turns = found.counts["cut rows"], found.counts["cut turns"]
    report.lost_rows = found.counts["nothing left after cutting"]
    report.foreign_labels, report.missing_end = found.counts["foreign labels"], found.counts["missing end token"]
    report.double_bos, report.mismatches = found.counts["double BOS"], found.counts["unlike inference"]
    report.template_missing = found.counts["response template missing"]
    report.special_text_rows = found.counts["special-token text"]
    report.duplicate_rows = found.counts["duplicate rows"]
    report.findings = _explain(report, found, max_length, template_report)
    return report


def _take_over(template_report: TemplateReport, found: Findings) -> None:
    for code, status, count in (
        ("response template missing", "missing", template_report.missing),
        ("border inside a token", "merged", template_report.merged),
        ("several response templates", "ambiguous", template_report.ambiguous),
    ):
        rows = [problem.row for problem in template_report.problems if problem.status == status]
        found.counts[code], found.rows[code] = count, rows[:SHOWN_ROWS]


def _explain(
    report: CheckReport, found: Findings, max_length: int | None, template_report: TemplateReport | None
) -> list[Finding]:
    nothing = report.trained_tokens == 0 or report.lost_rows + report.rows_without_label >= report.rows
    findings = []
    if nothing:
        why = (
            f"max_length={max_length} cuts off every response; raise max_length"
            if report.lost_rows
            else "no row has a label"
        )
        findings.append(Finding("error", "nothing to train", report.rows, [], why))
    missing = next((p for p in template_report.problems if p.status == "missing"), None) if template_report else None
    hint = f"; row {missing.row}: {missing.surroundings!r}: {missing.suggestion}" if missing else ""
    reasons = "; ".join(f"{reason} ({n:,})" for reason, n in report.untrained_turns.items())
    losses = "; ".join(f"{what} ({n:,} rows)" for what, n in report.losses.items())
    texts = ", ".join(repr(token) for token in list(report.special_text)[:SHOWN_ROWS])
    for level, code, message in (
        ("error", "no labels", "these rows train nothing; remove them or mend their template"),
        ("error", "foreign labels", "a label differs from the token in its place; labels must not be shifted"),
        ("error", "missing end token", "a trained turn does not end in a trained end token: the model learns no end"),
        ("error", "double BOS", "the text already had the BOS token; tokenise with add_special_tokens=False"),
        ("error", "unlike inference", "the ids before a trained turn are not what inference sees"),
        ("error", "unlike the template", "what is trained is not what the model must write"),
        ("error", "trained past the end", "more is trained than the model must write"),
        ("error", "trained against the row", "turns are trained that must not be"),
        ("error", "trained twice", "a turn is trained more than once"),
        ("error", "turns left out", "turns are not trained, and nothing says why"),
        ("error", "lost content", "what the row says is neither trained nor shown"),
        ("error", "unlike the marks", "the template's generation marks say otherwise"),
        ("error", "unknown rest", "what follows the last trained turn is not the conversation"),
        ("error", "unlike the row", "the conversation is not what the raw row says"),
        ("error", "response template missing", f"nothing is trained in these rows{hint}"),
        ("warning", "not proven", "; ".join(report.not_proven)),
        ("warning", "harmless", "what the model learns beside its turns and generation never shows"),
        ("warning", "said but not shown", f"the template leaves it out of the history: {losses}"),
        ("warning", "untrained turns", f"turns without a label: {reasons}"),
        ("warning", "cut rows", f"longer than max_length={max_length}; what is behind it is not trained"),
        ("warning", "cut turns", "turns that lose their end; they do not teach to stop"),
        ("warning", "nothing left after cutting", "the response begins behind max_length; these rows are dropped"),
        ("warning", "border inside a token", "the first token of the response holds the template's end; it is masked"),
        ("warning", "several response templates", "the last one counts; is it quoted, or are there several turns?"),
        ("warning", "special-token text", f"text that looks like control tokens, encoded as ordinary text: {texts}"),
        ("warning", "duplicate rows", "the same ids as an earlier row"),
    ):
        findings += found.finding(level, code, message)  # type: ignore[arg-type]
    return findings
