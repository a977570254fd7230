import io
import os
import subprocess
import sys

from preftune.evaluate import chat
from preftune.evaluate.chat import answer

SHORT = ["max_new_tokens=6"]


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
