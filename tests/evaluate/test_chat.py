import io
import os
import subprocess
import sys

import pytest
from loopback import endpoint

from preftune.evaluate import chat
from preftune.evaluate.chat import answer
from preftune.evaluate.judge import JudgeError
from preftune.evaluate.subjects import SubjectError

SHORT = ["max_new_tokens=6"]


@pytest.mark.slow
def test_questions_can_be_piped_and_the_reference_answers_below(trained, tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "recipes.chat", f"run={trained('dpo')}", "--compare", *SHORT],
        input="Hi\n\n/reset\nHi\n/quit\nnever asked\n",
        cwd=tmp_path,
        env=os.environ,
        capture_output=True,
        encoding="utf-8",
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    out = done.stdout
    assert out.count("policy> ") == out.count("reference> ") == 2
    assert out.index("reference> ") < out.index("(forgotten)") < out.rindex("policy> ")
    first, second = out.split("(forgotten)")
    assert first[first.index("policy> ") :].strip() == second.strip()  # forgotten, so the answers are the same


def test_a_dialogue_goes_on_from_what_was_said(trained, settings, monkeypatch, capsys):
    seen = []
    monkeypatch.setattr(sys, "stdin", io.StringIO("One\nTwo\n"))
    real = answer
    monkeypatch.setattr(
        chat, "answer", lambda m, t, dialogue, cfg: seen.append(list(dialogue)) or real(m, t, dialogue, cfg)
    )
    chat.chat(settings("chat", f"run={trained('dpo')}", "temperature=0.7", *SHORT))
    assert [message["role"] for message in seen[1]] == ["user", "assistant", "user"]
    assert seen[1][1]["content"] in capsys.readouterr().out


def test_a_served_model_answers_and_knows_the_dialogue(settings, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO("One\nTwo\n/reset\nThree\n"))
    with endpoint() as (url, requests):
        chat.chat(settings("chat", "run=exported/demo", f"endpoint={url}", *SHORT))
    assert [line for line in capsys.readouterr().out.splitlines() if "> " in line] == [
        "policy> Message 1.",
        "policy> Message 3.",
        "policy> Message 1.",
    ]
    assert requests[1]["body"]["model"] == "exported/demo" and requests[1]["body"]["max_tokens"] == 6
    assert [message["role"] for message in requests[1]["body"]["messages"]] == ["user", "assistant", "user"]


def test_an_endpoint_that_cannot_be_is_an_error(settings):
    with pytest.raises(JudgeError, match="an endpoint begins with http"):
        chat.chat(settings("chat", "run=demo", "endpoint=localhost:8000"))
    with pytest.raises(SubjectError, match="compare=true"):
        chat.chat(settings("chat", "run=demo", "endpoint=http://localhost:8000/v1", "compare=true"))


def test_a_reward_model_does_not_chat(trained, settings):
    with pytest.raises(SubjectError, match="is a reward model"):
        chat.chat(settings("chat", f"run={trained('reward')}"))
