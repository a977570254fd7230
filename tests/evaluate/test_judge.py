import json

import pytest
from loopback import endpoint
from omegaconf import OmegaConf

from preftune.evaluate import judge
from preftune.evaluate.judge import Endpoint, JudgeError, win_rate

KEY = "sk-not-to-be-seen-0123456789"
ROW = [{"role": "user", "content": "Why?"}]


class Letters:
    """A tokenizer with one token a character."""

    def __call__(self, text):
        return {"input_ids": list(text)}


def asked(base_url, **more):
    return Endpoint(base_url, "judge-1", "A_KEY", timeout=5, options={"temperature": 0}, **more)


def test_an_endpoint_is_asked_both_ways_round(monkeypatch):
    monkeypatch.setenv("A_KEY", KEY)
    with endpoint() as (url, requests):
        found = win_rate(asked(url), [(ROW, "short", "a longer one"), (ROW, "long enough", "brief")], Letters())
    assert found["win_rate"] == 0.5 and found["judged"] == 2
    assert [request["path"] for request in requests] == ["/v1/chat/completions"] * 4
    assert {request["key"] for request in requests} == {f"Bearer {KEY}"}
    assert requests[0]["body"].keys() == {"model", "messages", "temperature"}
    assert "user: Why?" in requests[0]["body"]["messages"][0]["content"]


def test_a_judge_of_places_gives_a_half():
    assert win_rate(lambda *_: 1.0, [(ROW, "one", "other")] * 3, Letters())["win_rate"] == 0.5


def test_equal_answers_are_a_tie_without_a_question():
    with endpoint() as (url, requests):
        assert win_rate(asked(url), [(ROW, "same", "same")], Letters())["win_rate"] == 0.5
    assert requests == []


def test_a_judge_of_length_alone_wins_nothing_at_equal_length():
    rows = [(ROW, "x" * mine, "x" * (mine + by)) for mine, by in [(20, 30), (20, 20), (50, 12), (9, 9), (40, -8)] * 6]
    found = win_rate(lambda _, first, second: float(len(first) < len(second)), rows, Letters())
    assert found["win_rate"] == 0.8
    assert abs(found["length_controlled_win_rate"] - 0.5) < 0.25


@pytest.mark.parametrize(
    "said, verdict", [("A", 1.0), ("**B**.", 0.0), ("Answer: T", 0.5), ("A is bad.\n\nBetter answer: b", 0.0)]
)
def test_a_verdict_is_one_letter_at_the_end(said, verdict):
    with endpoint(says=lambda *_: said) as (url, _):
        assert asked(url)(ROW, "one", "other") == verdict


def test_no_verdict_is_an_error_that_shows_the_reply():
    with endpoint(says=lambda *_: "I would rather not say.") as (url, _), pytest.raises(JudgeError, match="rather not"):
        asked(url)(ROW, "one", "other")
    with pytest.raises(JudgeError, match="it must say from 0 to 1"):
        win_rate(lambda *_: 7, [(ROW, "one", "other")], Letters())


def test_a_refusal_names_the_variable_and_never_the_key(monkeypatch):
    monkeypatch.setenv("A_KEY", KEY + "\n")
    with endpoint(status=401) as (url, _), pytest.raises(JudgeError) as refused:
        asked(url)(ROW, "one", "other")
    assert "401" in str(refused.value) and "refused: Bearer ***" in str(refused.value)
    assert KEY not in str(refused.value) and KEY not in repr(refused.value.__context__)
    monkeypatch.delenv("A_KEY")
    with endpoint(status=401) as (url, _), pytest.raises(JudgeError, match="A_KEY is not set"):
        asked(url)(ROW, "one", "other")


def test_a_server_that_is_not_there_is_one_line():
    with pytest.raises(JudgeError, match="the endpoint at 127.0.0.1 gave no answer"):
        asked("http://127.0.0.1:9")(ROW, "one", "other")
    with pytest.raises(JudgeError, match="begins with http"):
        judge.build(
            OmegaConf.create(
                {
                    "_target_": "preftune.evaluate.judge.Endpoint",
                    "base_url": "localhost",
                    "model": "m",
                    "api_key_env": "A_KEY",
                }
                | {"timeout": 1, "options": {}}
            )
        )


def test_a_function_that_cannot_be_imported_is_named(settings):
    with pytest.raises(JudgeError, match="no_such_module"):
        judge.build(settings("evaluate", "judge=function", "judge.path=no_such_module.f", "models=x").judge)


def test_a_local_model_weighs_two_letters(settings):
    built = judge.build(settings("evaluate", "judge=model", "judge.path=embedded://tiny", "models=x").judge)
    assert 0 < built(ROW, "one", "other") < 1


def test_the_key_reaches_no_output_of_the_recipe(trained, typed, tmp_path):
    run, report = trained("dpo"), tmp_path / "report.json"
    short = [f"models=[{run}]", "kl_prompts=0", "max_new_tokens=8", "generations=0", "judged_prompts=2"]
    with endpoint(says=lambda *_: "T") as (url, requests):
        judged = ["judge=openai", f"judge.base_url={url}", "judge.model=judge-1", "judge.api_key_env=A_KEY"]
        done = typed("recipes.evaluate", *short, *judged, "format=json", f"output={report}", A_KEY=KEY)
    assert done.returncode == 0, done.stderr
    (told,) = json.loads(done.stdout)
    assert told["win_rate"] == 0.5 and told["win_rate_ci"][0] < 0.5 < told["win_rate_ci"][1]
    assert {request["key"] for request in requests} <= {f"Bearer {KEY}"}
    everything = done.stdout + done.stderr + "".join(path.read_text() for path in run.glob("*.*") if path.is_file())
    assert KEY not in everything + report.read_text()


def nothing(prompt, answer):
    return float("nan")


def test_a_rule_that_gives_no_number_and_a_judge_without_a_target_are_one_line():
    with pytest.raises(JudgeError, match="nothing: ValueError: it gives NaN"):
        judge.Rule(f"{__name__}.nothing").score([{"role": "user", "content": "Why?"}], "So.")
    with pytest.raises(JudgeError, match="judge=function: wants what a file of conf/judge holds"):
        judge.build(OmegaConf.create({"function": None}))
