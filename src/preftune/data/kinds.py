"""Every kind of finding: its code, how grave it is, what it says, and what to do about it."""

from dataclasses import dataclass

ERROR, WARNING, NOTE = "error", "warning", "note"


@dataclass(frozen=True)
class Kind:
    """How grave a finding of this kind is, what it says, and what to do about it."""

    severity: str
    says: str
    remedy: str


LEFT_OUT = "fix the rows, or skip them: data.on_bad_rows=skip"

KINDS = {
    # files and lines
    "unreadable_file": Kind(
        ERROR,
        "a file cannot be read",
        "write the file again, as UTF-8 JSONL, JSON, CSV or Parquet",
    ),
    "no_rows": Kind(
        ERROR,
        "there is not one usable row",
        "see the other findings, and data.path",
    ),
    "malformed_line": Kind(
        ERROR,
        "not valid JSON or CSV",
        LEFT_OUT,
    ),
    "not_utf8": Kind(
        ERROR,
        "bytes that are not UTF-8",
        f"find the true encoding (iconv -f latin1 -t utf-8), or {LEFT_OUT}",
    ),
    "null_byte": Kind(
        ERROR,
        "a null byte in the text",
        LEFT_OUT,
    ),
    "missing_column": Kind(
        ERROR,
        "columns are missing",
        "name them: data.columns={prompt: THEIR_NAME}; or data.on_bad_rows=skip",
    ),
    "mixed_shapes": Kind(
        ERROR,
        "rows of another kind than the rest",
        "keep pairs, labelled answers and demonstrations in files of their own, or data.on_bad_rows=skip",
    ),
    "wrong_type": Kind(
        ERROR,
        "a value of the wrong type",
        LEFT_OUT,
    ),
    "unknown_label": Kind(
        ERROR,
        "a label that is neither good nor bad",
        "write true/false, 1/0 or thumbs_up/thumbs_down, or data.on_bad_rows=skip",
    ),
    "prompt_mismatch": Kind(
        ERROR,
        "the prompt column is not how the dialogues begin",
        "leave the column unread (data.columns={prompt: null}), or data.on_bad_rows=skip",
    ),
    # single rows
    "empty_prompt": Kind(
        ERROR,
        "there is no prompt",
        LEFT_OUT,
    ),
    "empty_answer": Kind(
        ERROR,
        "an answer is empty or whitespace",
        LEFT_OUT,
    ),
    "role_order": Kind(
        ERROR,
        "roles out of order",
        "chat templates refuse such dialogues, or garble them: fix them, or data.on_bad_rows=skip",
    ),
    "identical_pair": Kind(
        WARNING,
        "chosen and rejected are the same",
        "they teach nothing and hold rewards/accuracies down: remove them",
    ),
    "user_turn_in_answer": Kind(
        WARNING,
        "an answer holds later user turns, which are trained on too",
        "end chosen and rejected with their first different answer",
    ),
    "extra_message_fields": Kind(
        WARNING,
        "messages have fields beside role and content (tool calls, names), which are not trained on",
        "write them into content if they matter",
    ),
    "unread_columns": Kind(
        NOTE,
        "columns that are not read",
        "where one matters, name what it is (data.columns) or write it into the prompt",
    ),
    "replacement_character": Kind(
        WARNING,
        "text holds U+FFFD: it was decoded wrongly once",
        "go back to the source of the text",
    ),
    "tied_scores": Kind(
        NOTE,
        "rated answers with equal scores make no pair",
        "none needed; another data.pairs_rule makes more pairs",
    ),
    "unmatched_labels": Kind(
        NOTE,
        "labelled answers without an opposite to the same prompt make no pair",
        "train on all of them with loss=kto",
    ),
    # the whole set
    "duplicate_rows": Kind(
        WARNING,
        "rows stand there more than once",
        "remove the copies: they count double and hide in both splits",
    ),
    "contradictory_pairs": Kind(
        WARNING,
        "pairs that other rows prefer the other way round",
        "decide which is right and remove the other: together they cancel",
    ),
    "contradictory_labels": Kind(
        WARNING,
        "answers that are called good and bad",
        "decide which is right and remove the other",
    ),
    "prompt_leakage": Kind(
        WARNING,
        "held-out rows whose prompt is trained on",
        "the evaluation looks better than it is: take these prompts out of one side, or let data.eval_fraction "
        "hold prompts out",
    ),
    "label_imbalance": Kind(
        WARNING,
        "one label has several times the rows of the other",
        "loss.balance_labels=true (the default) weighs the rarer one; more rows of it teach more",
    ),
    "one_label": Kind(
        WARNING,
        "every row has the same label",
        "add rows of the other label; good answers alone are demonstrations: python -m recipes.sft trains on them",
    ),
    "few_prompts": Kind(
        WARNING,
        "few prompts stand behind many rows",
        "the model learns these prompts by heart: add others, or lower data.max_rows",
    ),
    "length_bias": Kind(
        WARNING,
        "length goes with the preference",
        "the model will learn the length first: balance the pairs, or loss=simpo, loss=dpo_norm or loss.ld_alpha=0.5",
    ),
    "length_explains": Kind(
        WARNING,
        "length alone explains this pair set",
        "a model that only counts tokens would pass: balance the pairs by length before training on them",
    ),
    "words_explain": Kind(
        WARNING,
        "a bag of words tells chosen from rejected on pairs that it has not seen",
        "the preference may be a matter of a few stock phrases: read the words in the report, and judge held-out "
        "accuracy by this figure",
    ),
    # tokens
    "template_refuses": Kind(
        ERROR,
        "the chat template refuses the dialogue",
        "fix the roles, name another template (model.chat_template=FILE), or data.on_bad_rows=skip",
    ),
    "prompt_not_prefix": Kind(
        WARNING,
        "the tokens of the prompt are not how prompt + answer begins",
        "the model is trained on another context than it will see: model.chat_template=FILE with one that writes "
        "both alike",
    ),
    "double_bos": Kind(
        WARNING,
        "a dialogue begins with two BOS tokens",
        "take the BOS out of the text or out of the chat template",
    ),
    "missing_eos": Kind(
        WARNING,
        "the chat template closes an answer with no token, so the model will not learn to stop",
        "model.chat_template=training where TRL ships a template for training this family, or model.chat_template=FILE",
    ),
    "special_tokens_in_text": Kind(
        WARNING,
        "text holds the tokenizer's special tokens",
        "they end or open turns in mid-text: remove them",
    ),
    "loses_end": Kind(
        WARNING,
        "rows are longer than train.max_length and lose their end, EOS with it",
        "raise train.max_length, or drop these rows",
    ),
    "loses_everything": Kind(
        WARNING,
        "the prompt alone fills train.max_length, and the row is left out",
        "raise train.max_length",
    ),
    "held_out_loses_everything": Kind(
        WARNING,
        "the prompt alone fills train.max_length, and the held-out row is left out",
        "raise train.max_length",
    ),
    "nothing_left": Kind(
        ERROR,
        "every row loses its whole answer",
        "raise train.max_length",
    ),
    "cut_alike": Kind(
        WARNING,
        "cut at train.max_length, chosen and rejected are the same",
        "raise train.max_length: these pairs teach nothing",
    ),
    "long_tail": Kind(
        WARNING,
        "a few rows are far longer than the rest",
        "they set the memory that every batch needs: lower train.max_length or drop them",
    ),
    "suspected_swaps": Kind(
        NOTE,
        "pairs that the model would label the other way round",
        "review the file of suspects, from the top",
    ),
}
OF_ROWS = frozenset(code for code, kind in KINDS.items() if "data.on_bad_rows=skip" in kind.remedy)
