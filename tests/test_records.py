"""Records are written whole or not at all, and read back only as what they are."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlaifv.fingerprint import digest_files
from rlaifv.records import (
    Candidate,
    Claim,
    Judgement,
    not_finite,
    read_jsonl,
    read_records,
    to_json,
    write_atomic,
    write_jsonl,
)

JUDGEMENT = {"claim_id": "a/0", "p_yes": 0.9, "p_no": 0.1, "accepted": True, "labeler": "x"}


def test_a_broken_line_is_named_by_file_and_number(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"a": 1}\n{"a": \n')
    with pytest.raises(ValueError, match=r"rows\.jsonl, line 2: not JSON"):
        read_jsonl(tmp_path / "rows.jsonl")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"accepted": "false"}, r"row 2: accepted is 'false', expected bool"),
        ({"accepted": False}, r"row 2: claim b/0 is rejected although p_yes is 0\.9 and p_no 0\.1"),
        ({"p_yes": float("nan")}, r"row 2: p_yes is nan, expected a finite number"),
        ({"p_no": None}, r"row 2: p_no is None, expected float"),
        ({"claim_id": "a/0"}, r"row 2: claim_id 'a/0' was there before"),
        ({"more": 1}, r"row 2: no Judgement: its fields are claim_id, p_yes, p_no, accepted, labeler, got"),
    ],
    ids=["text", "contradiction", "nan", "null", "twice", "unknown"],
)
def test_a_row_that_is_no_such_record_is_refused_with_file_row_and_reason(tmp_path, change, message):
    path = tmp_path / "judgements.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in (JUDGEMENT, JUDGEMENT | {"claim_id": "b/0"} | change)))
    with pytest.raises(ValueError, match=rf"judgements\.jsonl, {message}"):
        read_records(path, Judgement)


def test_a_row_without_a_field_is_refused_and_a_whole_number_is_a_number(tmp_path):
    path = tmp_path / "judgements.jsonl"
    write_jsonl(path, [JUDGEMENT | {"p_yes": 1, "p_no": 0}])
    assert read_records(path, Judgement)[0].p_yes == 1
    write_jsonl(path, [{k: v for k, v in JUDGEMENT.items() if k != "labeler"}])
    with pytest.raises(ValueError, match="row 1: no Judgement"):
        read_records(path, Judgement)


text = st.text(st.characters(blacklist_categories=("Cs",)))


@given(rows=st.lists(st.dictionaries(text, text)))
def test_json_lines_round_trip_any_text(tmp_path_factory, rows):
    path = tmp_path_factory.getbasetemp() / "round-trip.jsonl"
    write_jsonl(path, rows)
    assert read_jsonl(path) == rows


@given(claims=st.lists(st.builds(Claim, text, text, text, text), unique_by=lambda claim: claim.id))
def test_records_round_trip_any_text(tmp_path_factory, claims):
    path = tmp_path_factory.getbasetemp() / "claims.jsonl"
    write_jsonl(path, claims)
    assert read_records(path, Claim) == claims


def test_a_write_that_dies_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "summary.json"
    write_atomic(path, json.dumps(1))
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        write_atomic(path, json.dumps(2))
    assert path.read_text() == "1"


def test_a_digest_changes_with_an_image_that_keeps_its_name_and_a_missing_one_is_left_to_the_stage(tmp_path):
    image = tmp_path / "a.png"
    missing = digest_files(image)
    image.write_bytes(b"one")
    first = digest_files(image)
    image.write_bytes(b"two")
    assert len({missing, first, digest_files(image)}) == 3


def test_candidates_keep_their_types(tmp_path):
    path = tmp_path / "candidates.jsonl"
    candidate = Candidate("i#0", "i", 0, "a dog", 3, "stop", 7, "model")
    write_jsonl(path, [candidate])
    assert read_records(path, Candidate) == [candidate]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (Judgement("a/0", float("nan"), 0.1, False, "x"), "Judgement a/0: p_yes is nan, expected a finite number"),
        ({"dev": [{"recall": 1.0}, {"recall_interval": [0.5, math.inf]}]}, r"dev\[1\]\.recall_interval\[1\] is inf"),
        ([0.0, -math.inf], r"\[1\] is -inf"),
        (math.nan, "the value is nan"),
    ],
    ids=["record", "nested", "list", "number"],
)
def test_a_number_that_is_not_finite_is_not_written_and_its_place_is_named(row, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        to_json(row)


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3),
    max_leaves=8,
)


@given(value=values)
def test_what_is_written_is_json_for_every_reader_or_nothing(value):
    def no_json(constant):
        raise AssertionError(constant)

    if list(not_finite(value)):
        with pytest.raises(ValueError, match="expected a finite number"):
            to_json(value)
    else:
        assert json.loads(to_json(value), parse_constant=no_json) == value


def test_a_byte_order_mark_is_no_text(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"a": 1}\n', encoding="utf-8-sig")
    assert read_jsonl(tmp_path / "rows.jsonl") == [{"a": 1}]


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16"])
def test_a_file_in_another_encoding_is_named_with_the_way_out(tmp_path, encoding):
    (tmp_path / "rows.jsonl").write_text('{"a": "Café"}\n', encoding=encoding)
    with pytest.raises(ValueError, match=r"rows\.jsonl is not UTF-8 .*iconv"):
        read_jsonl(tmp_path / "rows.jsonl")


@pytest.mark.parametrize(
    ("line", "problem"), [("[" * 100_000, "nested too deeply"), ("1" * 5000, "a number of thousands of digits")]
)
def test_json_that_no_program_reads_is_named_by_its_line(tmp_path, line, problem):
    (tmp_path / "rows.jsonl").write_text("{}\n" + line + "\n")
    with pytest.raises(ValueError, match=rf"rows\.jsonl, line 2: {problem}$"):
        read_jsonl(tmp_path / "rows.jsonl")
