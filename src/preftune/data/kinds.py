"""Every kind of finding: its code, how grave it is, what it says, and what to do about it."""

from functools import partial
from typing import NamedTuple

ERROR, WARNING, NOTE = "error", "warning", "note"
SKIP = "data.on_bad_rows=skip"
FIX = f"fix the rows, or skip them: {SKIP}"


class Kind(NamedTuple):
    """How grave a finding of this kind is, what it says, and what to do about it."""

    severity: str
    says: str
    remedy: str


error, warning, note = (partial(Kind, severity) for severity in (ERROR, WARNING, NOTE))
KINDS = {
    # files and lines
    "unreadable_file": error("a file cannot be read", "write the file again, as UTF-8 JSONL, JSON, CSV or Parquet"),
    "unread_files": note("files that are not read", "data.train_split and data.eval_split choose"),
    "no_rows": error("there is not one usable row", "see the other findings, and data.path"),
    "malformed_line": error("not valid JSON or CSV", FIX),
    "not_utf8": error("bytes that are not UTF-8", f"find the true encoding (iconv -f latin1 -t utf-8), or {FIX}"),
    "null_byte": error("a null byte in the text", FIX),
    "missing_column": error("columns are missing", f"name them: data.columns={{prompt: THEIR_NAME}}; or {SKIP}"),
    "mixed_shapes": error("rows of another kind than the rest", f"write each kind into its own file, or {SKIP}"),
    "wrong_type": error("a value of the wrong type", FIX),
    "unknown_label": error("a label that is neither good nor bad", f"write true or false, 1 or 0, or {SKIP}"),
    "prompt_mismatch": error(
        "the prompt column is not how the dialogues begin", f"data.columns={{prompt: null}}, or {SKIP}"
    ),
    # single rows
    "empty_prompt": error("there is no prompt", FIX),
    "empty_answer": error("an answer is empty or whitespace", FIX),
    "role_order": error("roles out of order", f"chat templates refuse or garble such rows: fix them, or {SKIP}"),
    "identical_pair": warning("chosen and rejected are the same", "remove these pairs: they teach nothing"),
    "user_turn_in_answer": warning("an answer holds later user turns, which are trained on too", "cut them off"),
    "extra_message_fields": warning(
        "messages have fields that the chat template does not name", "write them into content if they matter"
    ),
    "rendered_text": warning(
        "text holds the marks of another template's turns, which would be trained on as text",
        "write the turns as messages, or remove the marks",
    ),
    "repeated_prompt": note("both answers repeated the prompt at their start; it was cut off", "none needed"),
    "images": error("images that cannot be read here", f"leave them unread: data.columns={{images: null}}; or {SKIP}"),
    "images_cut": error("the prompt and its images fill train.max_length", f"raise train.max_length, or {SKIP}"),
    "two_verdicts": error("verdicts that disagree", f"name the one that counts (data.verdict=COLUMN), or {SKIP}"),
    "unread_columns": note("columns that are not read", "name those that matter (data.columns), or put them in prompt"),
    "replacement_character": warning("text holds U+FFFD: it was decoded wrongly once", "decode the source again"),
    "tied_scores": note("answers that are equally good make no pair", "none needed; see also data.pairs_rule"),
    "unmatched_labels": note("labelled answers without an opposite to the same prompt make no pair", "use loss=kto"),
    # the whole set
    "duplicate_rows": warning("rows stand there more than once", "remove the copies: they count double"),
    "contradictory_pairs": warning("pairs that other rows prefer the other way round", "remove the wrong ones"),
    "contradictory_labels": warning("answers that are called good and bad", "decide, and remove the wrong rows"),
    "prompt_leakage": warning("held-out rows whose prompt is trained on", "remove them, or use data.eval_fraction"),
    "label_imbalance": warning("one label has several times the rows of the other", "keep loss.balance_labels=true"),
    "one_label": warning("every row has the same label", "add the other label, or train with python -m recipes.sft"),
    "few_prompts": warning("few prompts stand behind many rows", "add prompts, or lower data.max_rows"),
    "length_bias": warning(
        "length goes with the preference",
        "the model will learn the length first: balance the pairs, or loss=simpo, loss=dpo_norm or loss.ld_alpha=0.5",
    ),
    "length_explains": warning("length alone explains this pair set", "balance the pairs by length before training"),
    "words_explain": warning(
        "a bag of words tells chosen from rejected on pairs that it has not seen",
        "a few stock phrases may be all that differs: read the words in the report, and compare accuracies with it",
    ),
    # tokens
    "template_refuses": error(
        "the chat template refuses the dialogue",
        f"fix the roles, name another template (model.chat_template=FILE), or {SKIP}",
    ),
    "system_ignored": warning(
        "the chat template leaves the system message out",
        "write it into the first user turn, or name another template (model.chat_template=FILE)",
    ),
    "reasoning_stripped": warning(
        "the chat template leaves out what an answer thinks, so it is not trained on",
        "name a template that keeps it: model.chat_template=training where TRL ships one, or model.chat_template=FILE",
    ),
    "tools_ignored": warning(
        "the chat template leaves the tools out", "name a template that writes them: model.chat_template=FILE"
    ),
    "alike_in_template": warning(
        "the answers differ, and the chat template writes them alike: such pairs teach nothing",
        "name a template that writes what differs (reasoning, tool calls): model.chat_template=FILE",
    ),
    "nothing_differs": error(
        "the chat template writes chosen and rejected alike in every row",
        "name a template that writes what differs (reasoning, tool calls): model.chat_template=FILE",
    ),
    "prompt_not_prefix": warning(
        "the tokens of the prompt are not how prompt + answer begins",
        "training sees another context than generation: model.chat_template=FILE with one that writes both alike",
    ),
    "double_bos": warning("a dialogue begins with two BOS tokens", "remove BOS from the text or the chat template"),
    "missing_eos": warning(
        "the chat template closes an answer with no token, so the model will not learn to stop",
        "model.chat_template=training where TRL ships a template for training this family, or model.chat_template=FILE",
    ),
    "special_tokens_in_text": warning("text holds the tokenizer's special tokens", "remove them: they end turns"),
    "loses_end": warning(
        "rows are longer than train.max_length and lose their end, EOS with it",
        "raise train.max_length, or drop these rows",
    ),
    "loses_everything": warning(
        "the prompt alone fills train.max_length, and the row is left out", "raise train.max_length"
    ),
    "held_out_loses_everything": warning(
        "the prompt alone fills train.max_length, and the held-out row is left out", "raise train.max_length"
    ),
    "nothing_left": error("every row loses its whole answer", "raise train.max_length"),
    "cut_alike": warning("cut at train.max_length, chosen and rejected are the same", "raise train.max_length"),
    "long_tail": warning("a few rows are far longer than the rest", "lower train.max_length: they cost memory"),
    "suspected_swaps": note("pairs that the model would label the other way round", "review the file of suspects"),
}
