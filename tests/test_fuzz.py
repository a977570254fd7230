"""Whatever is typed and whatever stands in a file: an answer for the user, never a traceback."""

import contextlib
import io
import json

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from preftune.config.command_line import command_line
from preftune.config.errors import UserError
from preftune.data.load import load
from preftune.models.load import load_tokenizer
from preftune.runs import training

MANY = settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
FEW = settings(MANY, max_examples=10)

KEYS = [
    "train.learning_rate", "train.max_steps", "train.max_length", "train.seed", "train.lr_scheduler_type",
    "train.warmup_steps", "train.save_strategy", "train.eval_strategy", "train.optim", "loss.beta", "loss.loss_type",
    "loss", "model", "model.path", "model.dtype", "data", "data.path", "data.columns", "data.eval_fraction",
    "data.max_rows", "lora.r", "lora.target_modules", "lora", "hardware", "hardware.bf16", "hardware.optim",
    "hardware.per_device_train_batch_size", "gate.max_perplexity", "health.action", "sample_steps", "output_dir",
    "tracking.report_to", "nproc", "global_batch", "resume", "fastpath.enabled", "no.such.key", "train", "",
]  # fmt: skip
TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\x00"), max_size=12)
TYPED = st.one_of(
    TEXT,
    st.sampled_from(["null", "true", "-1", "0", "1e-5", "1e999", "nan", "inf", "9" * 5000, "[]", "{}", "[1,2", "{a:1}",
                     "${x}", "${oc.env:HOME}", "a,b", "choice(1,2)", "~", "'", '"', "\\", "???", "1_000", "0x10"]),
    st.integers().map(str),
    st.floats().map(str),
)  # fmt: skip
PLUS = st.sampled_from(["", "+", "++", "~"])


@pytest.mark.slow
@MANY
@given(st.lists(st.tuples(PLUS, st.sampled_from(KEYS), TYPED), min_size=1, max_size=3))
@example([("", "train.learning_rate", "${0}"), ("", "train.learning_rate", "")])
@example([("", "lora.target_modules", "${0}"), ("", "lora.target_modules", "{a:1}")])
def test_every_command_line_is_taken_or_answered(typed):
    with contextlib.redirect_stderr(io.StringIO()) as said:
        try:
            command_line("dpo", [f"{plus}{key}={value}" for plus, key, value in typed])
        except SystemExit as stopped:
            assert stopped.code == 2 and said.getvalue(), typed


LONG = "<long>"  # in a file a whole number of 5,000 digits
JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), TEXT, st.just(LONG)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(TEXT, inner, max_size=3)),
    max_leaves=6,
)
TURN = st.fixed_dictionaries(
    {
        "role": st.one_of(st.sampled_from(["user", "assistant", "system", "tool"]), JSON),
        "content": st.one_of(TEXT, JSON),
    }
)
VALUE = st.one_of(TEXT, st.lists(TURN, max_size=4), JSON)
NAMES = ["prompt", "chosen", "rejected", "completion", "label", "messages", "completions", "scores", "system", "id",
         "question", "images", "tools", "conversations"]  # fmt: skip
ROW = st.one_of(
    st.fixed_dictionaries({"prompt": VALUE, "chosen": VALUE, "rejected": VALUE}),
    st.fixed_dictionaries({"prompt": TEXT, "completion": TEXT, "label": st.one_of(st.booleans(), JSON)}),
    st.dictionaries(st.sampled_from(NAMES), VALUE, max_size=5),
    JSON,
)
GOOD = {"prompt": "Is it?", "chosen": "Yes.", "rejected": "No."}


def written(rows: list, path) -> str:
    lines = [json.dumps(row).replace(json.dumps(LONG), "9" * 5000) for row in rows]
    path.write_text("\n".join(lines), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("on_bad_rows", ["fail", "skip"])
def test_every_file_is_read_or_answered(composed, tmp_path, on_bad_rows):
    cfg = composed("dpo", f"data.on_bad_rows={on_bad_rows}")
    tokenizer = load_tokenizer(cfg.model)

    @settings(MANY, max_examples=100)
    @given(st.lists(ROW, min_size=1, max_size=4), st.sampled_from([".jsonl", ".json"]))
    def read(rows, ending):
        cfg.data.path = written([GOOD, *rows], tmp_path / f"rows{ending}")
        with contextlib.suppress(UserError):
            load(cfg.data, view="paired", tokenizer=tokenizer, max_length=256, seed=0)

    read()


@pytest.mark.slow
def test_what_is_read_trains_or_is_answered(composed, tmp_path):
    @FEW
    @given(st.lists(ROW, min_size=1, max_size=3), st.sampled_from(["dpo", "kto", "orpo", "sft"]), st.integers())
    def run(rows, recipe, number):
        cfg = composed(recipe, "data.on_bad_rows=skip", "train.max_steps=1", "fit_check=false")
        cfg.data.path = written([GOOD, *rows], tmp_path / "rows.jsonl")
        cfg.output_dir = str(tmp_path / f"run-{number}-{recipe}-{abs(hash(str(rows)))}")
        with contextlib.suppress(UserError):
            training.stage(cfg, {})

    run()
