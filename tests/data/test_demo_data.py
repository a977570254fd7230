import math
from collections import Counter

import pytest

from preftune.data import demo
from preftune.data.demo import EVAL, HERE, TRAIN, build, demonstrations, unpaired
from preftune.data.demo.build import PATHS, read_entries, read_phrases, statistics, text_of

ROWS = {"train": demo.read(TRAIN), "eval": demo.read(EVAL)}
ALL = ROWS["train"] + ROWS["eval"]
MANNERS = ("evading", "padding", "flattering")


@pytest.fixture(scope="module")
def rebuilt():
    return build.build()


def text(row, side):
    return row[side][0]["content"]


def length(row, side):
    return len(text(row, side).split())


def frame_words(phrase):
    return build.words(phrase.replace("{topic}", "").replace("{half}", ""))


def frames(manner, split):
    phrases = read_phrases(HERE / "manners" / f"{manner}.txt")
    return [phrase for (name, _), group in phrases.items() if name == split for phrase in group]


def test_committed_files_equal_a_rebuild(rebuilt):
    for name, rows in rebuilt.items():
        assert PATHS[name].read_text(encoding="utf-8") == text_of(rows)


def test_readme_states_the_statistics_of_the_files(rebuilt):
    readme = (HERE / "README.md").read_text(encoding="utf-8")
    for name, rows in rebuilt.items():
        assert f"{name}\n{statistics(rows)}\n" in readme


def test_train_has_440_pairs_and_eval_110_on_the_same_subjects():
    assert len(ROWS["train"]) >= 440
    assert len(ROWS["eval"]) >= 110
    subjects = {name: {row["id"].rpartition("-")[0] for row in rows} for name, rows in ROWS.items()}
    assert subjects["train"] == subjects["eval"]
    assert len(subjects["train"]) >= 14


def test_every_row_is_one_user_turn_with_two_assistant_replies():
    for row in ALL:
        assert list(row) == ["id", "prompt", "chosen", "rejected"]
        for side, role in (("prompt", "user"), ("chosen", "assistant"), ("rejected", "assistant")):
            (message,) = row[side]
            assert list(message) == ["role", "content"]
            assert message["role"] == role
            assert message["content"] == message["content"].strip() != ""
            assert "{" not in text(row, "rejected")


def test_ids_and_texts_occur_once():
    assert len({row["id"] for row in ALL}) == len(ALL)
    for side in ("prompt", "chosen", "rejected"):
        assert len({tuple(build.words(text(row, side))) for row in ALL}) == len(ALL), side
    topics = [entry.topic.lower() for entry in read_entries(HERE / "source")]
    assert len(set(topics)) == len(topics)


def test_no_two_chosen_replies_open_alike_and_none_opens_with_praise():
    openings = [tuple(build.words(text(row, "chosen"))[:3]) for row in ALL]
    assert len(set(openings)) == len(openings)
    assert not {"sure", "great", "certainly", "absolutely", "wonderful"} & {opening[0] for opening in openings}


def test_no_eval_prompt_and_no_near_copy_of_one_is_in_train():
    used = Counter(word for row in ALL for word in set(build.words(text(row, "prompt"))))
    rare = {row["id"]: {w for w in build.words(text(row, "prompt")) if used[w] <= 10} for row in ALL}
    assert all(rare.values())
    for row in ROWS["eval"]:
        for other in ROWS["train"]:
            mine, theirs = rare[row["id"]], rare[other["id"]]
            assert len(mine & theirs) <= 0.5 * len(mine | theirs), (row["id"], other["id"])


def test_length_does_not_tell_chosen_from_rejected():
    for rows in ROWS.values():
        assert 0.45 <= sum(length(row, "chosen") > length(row, "rejected") for row in rows) / len(rows) <= 0.55
        assert 0.45 <= sum(len(text(r, "chosen")) > len(text(r, "rejected")) for r in rows) / len(rows) <= 0.55
        assert all(0.65 <= length(row, "rejected") / length(row, "chosen") <= 1.35 for row in rows)


def test_within_each_manner_length_does_not_tell_either(rebuilt):
    for rows in rebuilt.values():
        for manner in MANNERS:
            longer = [length(row, "chosen") > length(row, "rejected") for row in rows if row["manner"] == manner]
            assert 0.4 <= sum(longer) / len(longer) <= 0.6


def test_eval_phrases_share_no_four_words_with_train_phrases():
    def fours(split):
        found = set()
        for manner in MANNERS:
            for phrase in frames(manner, split):
                words = frame_words(phrase)
                found |= {tuple(words[i : i + 4]) for i in range(len(words) - 3)} | {tuple(words)}
        return found

    assert not fours("train") & fours("eval")


def test_a_bag_of_words_from_train_ranks_nine_in_ten_eval_pairs():
    sides = ("chosen", "rejected")
    counts = {side: Counter(word for row in ROWS["train"] for word in build.words(text(row, side))) for side in sides}
    total = {side: sum(counts[side].values()) for side in counts}
    vocabulary = len(counts["chosen"] | counts["rejected"])

    def score(reply):
        odds = {side: [(counts[side][w] + 1) / (total[side] + vocabulary) for w in reply] for side in counts}
        return sum(map(math.log, odds["chosen"])) - sum(map(math.log, odds["rejected"]))

    right = [score(build.words(text(r, "chosen"))) > score(build.words(text(r, "rejected"))) for r in ROWS["eval"]]
    assert sum(right) / len(right) > 0.9


def test_unpaired_view_keeps_every_reply_with_its_label():
    rows = unpaired(ALL)
    assert Counter(row["label"] for row in rows) == {True: len(ALL), False: len(ALL)}
    for pair, (up, down) in zip(ALL, zip(rows[::2], rows[1::2], strict=True), strict=True):
        assert up == {"prompt": pair["prompt"], "completion": pair["chosen"], "label": True}
        assert down == {"prompt": pair["prompt"], "completion": pair["rejected"], "label": False}


def test_demonstrations_are_the_chosen_replies():
    assert demonstrations(ALL) == [{"prompt": row["prompt"], "completion": row["chosen"]} for row in ALL]


GOOD = "Q: How hot is tea?\nA: About eighty degrees.\nT: hot tea\n"


@pytest.mark.parametrize(
    ("source", "line", "want"),
    [
        ("Q: How hot is tea?\nT: hot tea\n", 3, "lacks A:"),
        (GOOD + "\n" + GOOD, 8, "entry 1"),
        ("Q: How hot is tea?\nA: Hot.\nT: " + "very " * 8 + "hot tea\n", 3, "at most 8"),
        ("Q: How hot is tea?\nQ: How hot is milk?\n", 2, "a second Q:"),
        ("Q: How hot is tea?\nAnswer: hot\n", 2, "want a line"),
        (GOOD + "H: it is warm.\n", 4, "full stop"),
    ],
)
def test_a_malformed_source_is_named_by_file_and_line(tmp_path, source, line, want):
    (tmp_path / "drinks.txt").write_text(source, encoding="utf-8")
    with pytest.raises(ValueError, match=want) as error:
        read_entries(tmp_path)
    assert f"drinks.txt:{line}:" in str(error.value)


def test_a_phrase_outside_a_heading_is_named_by_file_and_line(tmp_path):
    (tmp_path / "evading.txt").write_text("# comment\nIt depends.\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"evading\.txt:2: want a \[split part\] heading"):
        read_phrases(tmp_path / "evading.txt")
