"""The file of an evaluation: what it takes, what it refuses, what it survives."""

import json
from dataclasses import replace

import pytest

from kvjax.eval.record import Journal, JournalError, Record, Turn

SETTINGS = {"model": "m", "seed": 0}
TURN = Turn("Wo?\n", ("ä", "b"), "ä\u2028\ud83d", 0.5, "length", 10, 3, 0.1, 0.2)
RECORDS = [Record("mini/vt", 256, index, 0.5, None, (TURN, TURN)) for index in range(3)]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "deep" / "run.jsonl"


def write(path, records=RECORDS) -> None:
    with Journal(path, SETTINGS) as journal:
        for record in records:
            journal.append(record)


def test_what_was_written_is_read_again(path):
    write(path)
    with Journal(path, SETTINGS) as journal:
        assert list(journal.records.values()) == RECORDS


def test_each_line_is_on_disk_at_once(path):
    with Journal(path, SETTINGS) as journal:
        for count, record in enumerate(RECORDS, start=2):
            journal.append(record)
            assert len(path.read_bytes().splitlines()) == count


@pytest.mark.parametrize("left", range(1, 40, 7))
def test_a_line_that_was_being_written_is_cut_off(path, left):
    write(path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-left])
    with Journal(path, SETTINGS) as journal:
        assert list(journal.records.values()) == RECORDS[:-1]
        journal.append(RECORDS[-1])
    assert path.read_bytes() == whole


def test_the_last_line_of_a_sample_counts(path):
    failed = replace(RECORDS[0], score=None, error="gone")
    write(path, [failed, RECORDS[1], RECORDS[0]])
    with Journal(path, SETTINGS) as journal:
        assert journal.records[RECORDS[0].key] == RECORDS[0]
        assert len(journal.records) == 2


def test_other_settings_are_refused_by_name_and_the_file_is_left_alone(path):
    write(path)
    before = path.read_bytes()
    with pytest.raises(JournalError, match=r"seed was 0 and now is 1\. .*choose another name"):
        Journal(path, {"model": "m", "seed": 1})
    with pytest.raises(JournalError, match="form was None and now is 'chat'"):
        Journal(path, SETTINGS | {"form": "chat"})
    assert path.read_bytes() == before


@pytest.mark.parametrize("content", ["notes of mine\n", "notes without an end", '{"a": 1}\n', "[1]\n", "\n"])
def test_other_files_are_refused_and_left_alone(path, content):
    path.parent.mkdir()
    path.write_text(content)
    with pytest.raises(JournalError, match=r"is no file of kvjax.eval"):
        Journal(path, SETTINGS)
    assert path.read_text() == content


def test_damage_in_the_middle_is_told_with_its_line(path):
    write(path)
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*lines[:2], '{"task": "mini/vt"}\n', *lines[3:]]))
    with pytest.raises(JournalError, match="damaged in line 3"):
        Journal(path, SETTINGS)


def test_a_later_format_is_refused(path):
    write(path)
    head, *rest = path.read_text().splitlines(keepends=True)
    path.write_text("".join([json.dumps(json.loads(head) | {"kvjax.eval": 99}) + "\n", *rest]))
    with pytest.raises(JournalError, match="format 99"):
        Journal(path, SETTINGS)


def test_two_runs_do_not_write_one_file(path):
    with Journal(path, SETTINGS) as journal:
        with pytest.raises(JournalError, match="being written by another run"):
            Journal(path, SETTINGS)
        journal.append(RECORDS[0])
    write(path, RECORDS[1:])
    assert len(path.read_text().splitlines()) == 4


def test_an_empty_file_is_a_new_one(path):
    path.parent.mkdir()
    path.touch()
    write(path)
    assert len(path.read_text().splitlines()) == 4


def test_a_folder_is_no_file(tmp_path):
    with pytest.raises(JournalError, match="cannot be used: Is a directory"):
        Journal(tmp_path, SETTINGS)


@pytest.mark.parametrize(("score", "error"), [(None, None), (0.0, "gone")])
def test_a_record_has_a_score_or_an_error(score, error):
    with pytest.raises(ValueError, match="score or an error"):
        replace(RECORDS[0], score=score, error=error)
