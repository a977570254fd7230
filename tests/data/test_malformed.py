import json

import pytest
from malformed import files

from preftune.data.findings import DataError

FILES = files()


def test_there_are_forty_malformed_files_of_different_names():
    assert len({file.name for file in FILES}) == len(FILES) == 40


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_a_malformed_file_is_refused_with_its_line_and_a_remedy(file, write, loaded):
    with pytest.raises(DataError) as told:
        loaded(write(file.name, file.content))
    (finding,) = [finding for finding in told.value.findings if finding.code == file.code]
    where = file.name if file.line is None else f"{file.name}:{file.line}"
    assert where in finding.examples[0]
    assert file.word in str(told.value)
    assert finding.remedy in str(told.value)


def test_skipped_rows_are_written_and_counted_and_the_good_ones_trained_on(write, loaded, tmp_path):
    kept, lost = 0, 0
    for file in FILES:
        if file.code in ("unreadable_file", "no_rows") or not file.name.endswith(".jsonl"):
            continue
        data = loaded(write(file.name, file.content), on_bad_rows="skip")
        skipped = [json.loads(line) for line in (tmp_path / "skipped.jsonl").open()]
        assert {row["code"] for row in skipped} == {file.code}
        assert skipped[0]["origin"] == f"{file.name}:3"
        assert len(data.train) == 3
        assert data.skipped == len(skipped) == len([line for line in file.content.splitlines() if line]) - 3
        kept, lost = kept + 3, lost + len(skipped)
    assert (kept, lost) == (72, 25)


def test_a_file_that_breaks_in_the_middle_is_an_error_even_when_bad_rows_are_skipped(write, loaded):
    cut = next(file for file in FILES if file.name == "cut.jsonl.gz")
    with pytest.raises(DataError, match="unreadable_file.*cut.jsonl.gz:"):
        loaded(write(cut.name, cut.content), on_bad_rows="skip")


def test_a_missing_file_is_told_with_the_nearest_name(write, loaded, tmp_path):
    write("prefs.jsonl", [])
    with pytest.raises(DataError, match="did you mean .*prefs.jsonl"):
        loaded(str(tmp_path / "perfs.jsonl"))
