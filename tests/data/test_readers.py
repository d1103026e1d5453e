"""Data files as records: exact addresses for every kind of damage, and counts that add up for any bytes at all."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from luthier.core.errors import DataError
from luthier.data.reading import text_files
from luthier.data.reading.readers import Record, read_records
from luthier.data.reading.rows import SourceFile, find_sources, open_source, write_rejects
from luthier.data.row_log import demand_readable
from luthier.data.strict_json import MAX_DEPTH, Place, excerpt, locate, parse
from tests.data.taken import take

GOOD = b'{"question": "1 + 1?", "answer": "2"}\n'


def put(folder: Path, name: str, content: bytes) -> Path:
    path = folder / name
    path.write_bytes(content)
    return path


def the_error(path: Path) -> DataError:
    """The one bad row of a file."""
    errors = [item for item in read_records(path) if isinstance(item, DataError)]
    assert len(errors) == 1, errors
    return errors[0]


BAD_LINES = [
    (b'{"question": "1"', "17", "ends too early"),
    (b'{"question": "1', "14", "broken JSON"),
    (b'{"question": "1\0"}', "16", "NUL"),
    (b'{"question": "\xff"}', "15", "0xff"),
    (b'{"question": "\xed\xa0\x80"}', "15", "0xed"),
    (b'{"question": "\\ud800 x"}', "14", "surrogate"),
    (b'{"question": NaN}', "14", "NaN"),
    (b'{"question": [1, -Infinity]}', "18", "-Infinity"),
    (b'{"question": 1e999}', "14", "1e999"),
    (b'{"question": ' + b"9" * 5000 + b"}", "14", "5000 digits"),
    (b'{"a": {"b": 1, "b": 2}}', "16", '"b" for the second time'),
    (b'{"a": ' + b"[" * 200_000 + b"]" * 200_000 + b"}", str(7 + MAX_DEPTH - 1), "nested too deep"),
    (b"[" * 200_000, str(1 + MAX_DEPTH), "nested too deep"),
    (b"{'a': 1}", "2", "double quotes"),
    (b'{"a": 1,}', "9", "comma"),
    (b'{"a": True}', "7", "true, false or null"),
    (b'{"a": 1} {"b": 2}', "10", "after the end"),
    (b'["a"]', "1", "a list"),
    (b'"text"', "1", "a string"),
    (b"null", "1", "null"),
    (b"3", "1", "a number"),
    (b'{"a": "tab\there"}', "11", "control character"),
    (b'{"a": "\\x"}', "8", "one of"),
    (b'  {"a": 01}', "10", "comma"),
]


@pytest.mark.parametrize(("line", "column", "words"), BAD_LINES)
@pytest.mark.parametrize("end", [b"\n", b"\r\n", b""])
def test_a_bad_line_has_its_address_and_hides_no_other(
    tmp_path: Path, line: bytes, column: str, words: str, end: bytes
) -> None:
    path = put(tmp_path, "rows.jsonl", GOOD + line + end + (GOOD if end else b""))
    error = the_error(path)
    kept = [item for item in read_records(path) if isinstance(item, Record)]
    assert error.where == f"{path}:2:{column}"
    assert words in str(error)
    assert [item.number for item in kept] == ([0, 2] if end else [0])
    assert max(len(part) for part in (error.received, error.do)) < 160


def test_a_surrogate_pair_and_a_byte_order_mark_are_fine(tmp_path: Path) -> None:
    path = put(tmp_path, "rows.jsonl", b'\xef\xbb\xbf{"text": "\\ud83d\\ude00 \\\\ud800"}')
    (record,) = read_records(path)
    assert isinstance(record, Record)
    assert record.values == {"text": "\U0001f600 \\ud800"}
    assert record.where == f"{path}:1:1"


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.txt"])
def test_utf_16_is_named_once(tmp_path: Path, name: str) -> None:
    path = put(tmp_path, name, (GOOD * 3).decode().encode("utf-16"))
    assert "UTF-16" in the_error(path).received
    assert the_error(path).where == f"{path}:1:1"


def test_utf_16_without_a_mark_is_guessed(tmp_path: Path) -> None:
    path = put(tmp_path, "rows.txt", "some text".encode("utf-16-le"))
    assert "looks like UTF-16" in the_error(path).do


def test_blank_lines_are_no_rows(tmp_path: Path) -> None:
    path = put(tmp_path, "rows.jsonl", b"\n" + GOOD + b"  \r\n\n" + GOOD.rstrip())
    assert [item.where for item in read_records(path)] == [f"{path}:2:1", f"{path}:5:1"]


def test_a_line_too_long_is_refused_and_passed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_files, "MAX_LINE_BYTES", 64)
    path = put(tmp_path, "rows.jsonl", GOOD + b'{"a": "' + b"x" * 500 + b'"}\n' + GOOD)
    assert the_error(path).where == f"{path}:2:1"
    assert len(list(read_records(path))) == 3


def test_a_list_gives_each_element_its_line(tmp_path: Path) -> None:
    text = '[\n  {"text": "a"},\n\n  {"text":\n "b"}, {"text": "c"}\n]\n'
    path = put(tmp_path, "rows.json", text.encode())
    records = list(read_records(path))
    assert [item.where for item in records] == [f"{path}:2:3", f"{path}:4:3", f"{path}:5:8"]
    assert isinstance(records[1], Record)
    assert records[1].locate(("text",)) == f"{path}:4:4"


def test_a_bad_element_does_not_hide_the_next(tmp_path: Path) -> None:
    path = put(tmp_path, "rows.json", b'[{"a": 1},\n {"a": 1, "a": 2},\n {"a": NaN}, 7, {"a": 3}]')
    found = [item.where for item in read_records(path)]
    assert found == [f"{path}:1:2", f"{path}:2:11", f"{path}:3:8", f"{path}:3:14", f"{path}:3:17"]


@pytest.mark.parametrize(
    ("text", "where", "words"),
    [
        (b'[{"a": 1}\n {"a": 2}]', "2:2", "a comma"),
        (b'[{"a": 1},\n', "2:1", "ends too early"),
        (b'[{"a": 1}', "1:10", "ends too early"),
        (b'[{"a": 1}]\n]', "2:1", "after the end of the list"),
        (b'[{"a": 1},\n {"a": }]', "2:8", "expected a value"),
        (b'[{"a": 1},]', "1:11", "expected a value"),
    ],
)
def test_a_broken_list_says_where_it_ends(tmp_path: Path, text: bytes, where: str, words: str) -> None:
    path = put(tmp_path, "rows.json", text)
    error = the_error(path)
    assert error.where == f"{path}:{where}"
    assert words in str(error)
    assert "nothing after it was read" in str(error)


def test_json_that_is_lines_and_lines_that_are_a_list(tmp_path: Path) -> None:
    assert len(list(read_records(put(tmp_path, "a.json", GOOD * 3)))) == 3
    assert len(list(read_records(put(tmp_path, "b.jsonl", b"[\n" + GOOD + b"," + GOOD + b"]")))) == 2
    assert len(list(read_records(put(tmp_path, "c.json", b'{\n"text": "one object"\n}\n{"text": "two"}')))) == 2
    assert list(read_records(put(tmp_path, "d.json", b"[]"))) == []
    assert ".json" in the_error(put(tmp_path, "e.jsonl", b'[{"a": 1}, {"a": 2}]')).do


def test_gzip_whole_and_cut(tmp_path: Path) -> None:
    packed = gzip.compress(b"".join(json.dumps({"text": str(n) * 9}).encode() + b"\n" for n in range(5000)))
    assert len(list(read_records(put(tmp_path, "rows.jsonl.gz", packed)))) == 5000
    assert "cut short" in the_error(put(tmp_path, "cut.jsonl.gz", packed[:-2000])).received
    assert "damaged" in the_error(put(tmp_path, "not.jsonl.gz", GOOD)).received


def test_a_table_with_quotes_lines_and_addresses(tmp_path: Path) -> None:
    path = put(tmp_path, "rows.csv", b'mr,ref\r\n"a, ""b""\r\nc",5" pipe\r\nd,\r\n\r\n"e",f')
    first, second, third = read_records(path)
    assert isinstance(first, Record)
    assert isinstance(second, Record)
    assert first.values == {"mr": 'a, "b"\r\nc', "ref": '5" pipe'}
    assert first.locate(("ref",)) == f"{path}:3:4"
    assert second.values == {"mr": "d", "ref": ""}
    assert third.where == f"{path}:6:1"


@pytest.mark.parametrize(
    ("text", "where", "words"),
    [
        (b"a,b\n1,2\n1,2,3\n1,2\n", "3:1", "3 cells"),
        (b"a,b\n1\n", "2:1", "1 cells"),
        (b'a,b\n1,2\n3,"x"y\n1,2', "3:6", "closing quote"),
        (b'a,b\n1,2\n3,"x\n1,2', "3:3", "never closed"),
        (b"a,b\n1,\xff\n", "2:3", "0xff"),
    ],
)
def test_a_bad_table_row_has_its_address(tmp_path: Path, text: bytes, where: str, words: str) -> None:
    path = put(tmp_path, "rows.csv", text)
    error = the_error(path)
    assert error.where == f"{path}:{where}"
    assert words in str(error)


def test_tables_find_their_delimiter_and_refuse_a_double_column(tmp_path: Path) -> None:
    for name, text in (("a.csv", b"mr;ref\n1,5;2"), ("b.tsv", b"mr\tref\n1,5\t2")):
        (record,) = read_records(put(tmp_path, name, text))
        assert isinstance(record, Record)
        assert record.values == {"mr": "1,5", "ref": "2"}
    with pytest.raises(DataError, match="second time"):
        list(read_records(put(tmp_path, "c.csv", b"a,a\n1,2")))


def test_parquet_rows_and_damage(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "rows.parquet"
    parquet.write_table(pyarrow.table({"text": ["a", "b", None]}), path)
    report = take(SourceFile(path))
    assert (report.read, report.kept, report.rejected) == (3, 2, 1)
    assert report.rejects[0].where == f"{path}:3:1"
    assert "not readable" in the_error(put(tmp_path, "bad.parquet", b"PAR1" + b"\0" * 50)).received


def test_missing_files_name_their_neighbours(tmp_path: Path) -> None:
    put(tmp_path, "train.jsonl", GOOD)
    put(tmp_path, "train.xyz", GOOD)
    with pytest.raises(DataError, match=r"did you mean train\.jsonl"):
        take(SourceFile(tmp_path / "trian.jsonl"))
    with pytest.raises(DataError, match=r"did you mean train\.jsonl"):
        take(SourceFile(tmp_path / "Train.json.gz"))
    put(tmp_path, "testing.json", b"[]")
    # What is only called a file of the same kind, or is no data, was not meant.
    with pytest.raises(DataError, match=r"data files there: testing\.json, train\.jsonl"):
        take(SourceFile(tmp_path / "nothing.json"))
    with pytest.raises(DataError, match="data files there"):
        take(SourceFile(tmp_path / "a.xyz"))
    with pytest.raises(DataError, match="no folder"):
        find_sources(tmp_path / "no" / "file.jsonl")
    with pytest.raises(DataError, match="no kind of data file"):
        take(SourceFile(tmp_path / "train.xyz"))


def test_sources_from_folders_globs_and_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("b.jsonl", "a.jsonl", "notes.log", "README.md", ".hidden.jsonl"):
        put(tmp_path, name, GOOD * 4)
    both = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    assert [source.path for source in find_sources(tmp_path)] == both
    assert [source.path for source in find_sources(f"{tmp_path}/*.jsonl")] == both
    (sample,) = find_sources(f"{tmp_path}/a.jsonl#3")
    assert take(sample).read == 3
    with pytest.raises(DataError, match="no data file"):
        find_sources(f"{tmp_path}/*.csv")
    with pytest.raises(DataError, match="no pattern"):
        find_sources(f"{tmp_path}/**.csv")
    monkeypatch.chdir(tmp_path)
    assert [source.path for source in find_sources("*.jsonl")] == [Path("a.jsonl"), Path("b.jsonl")]


def test_raise_lists_all_bad_rows_with_counts(tmp_path: Path) -> None:
    """Breaks when a bad row is passed over, or its address or the counts are lost on the way to the error."""
    path = put(tmp_path, "rows.jsonl", GOOD + b"{\n" + GOOD + b'{"question": "?", "answer": ""}\n')
    with pytest.raises(DataError) as caught:
        demand_readable([SourceFile(path)])
    text = str(caught.value)
    assert "2 of 4 rows cannot be used (2 can)" in text
    assert f"{path}:2:2: " in text
    assert f"{path}:4:19: the answer is empty" in text
    assert "--set data.on_bad_row=skip" in text


def test_raise_stops_at_the_limit(tmp_path: Path) -> None:
    """Breaks when a file of damage is read to its end, or fills the screen."""
    path = put(tmp_path, "rows.jsonl", GOOD + b"{\n" * 50)
    with pytest.raises(DataError, match=r"20 of 21 rows .* stopped after 20") as caught:
        demand_readable([SourceFile(path)])
    assert str(caught.value).count("\n  ") == 20


def test_rows_of_several_files_are_counted_and_rejects_written(tmp_path: Path) -> None:
    """Breaks when a file's rows are numbered anew, or a reject is lost between reading and writing."""
    path = put(tmp_path, "rows.jsonl", GOOD + b"{\n" * 50 + GOOD)
    found = take(SourceFile(path), SourceFile(path, limit=3))
    assert (found.read, found.kept, found.rejected) == (55, 3, 52)
    assert [(file.start, file.kept, file.rejected) for file in found.files] == [(0, 2, 50), (2, 1, 2)]
    assert [row.number for row in found.rows] == [0, 1, 2]
    out = tmp_path / "rejects.jsonl"
    assert write_rejects(out, found.rejects) == 52
    first = json.loads(out.read_text().splitlines()[0])
    assert first["where"] == f"{path}:2:2"


def test_a_file_without_rows_is_an_error(tmp_path: Path) -> None:
    """Breaks when nothing at all is taken for a data set."""
    for content in (b"", b"\n\n", b"[]"):
        with pytest.raises(DataError, match="has no row"):
            take(SourceFile(put(tmp_path, "empty.json", content)))


def test_locate_finds_keys_elements_and_nearest_ancestors() -> None:
    text = '{"a": [{"b": "}"}, {"b\\u0063": 1, "b": [7, 8]}]}'
    assert text[locate(text, ("a", 1, "b", 1)) :].startswith("8]")
    assert text[locate(text, ("a", 1, "bc")) :].startswith('"b\\u0063"')
    assert text[locate(text, ("a", 1, "missing")) :].startswith('{"b\\u0063"')
    assert locate(text, ("nothing",)) == 0


def test_excerpts_are_short_and_harmless() -> None:
    assert excerpt("a\x1b[31m\n\u202e") == '"a\\u001b[31m\\n\\u202e"'
    for text in ("x" * 500, "\x1b" * 500, "é" * 79, "x" * 78):
        assert len(excerpt(text)) <= 80


def test_a_long_list_on_one_line_takes_linear_time(tmp_path: Path) -> None:
    path = put(tmp_path, "rows.json", b"[" + b'{"text": "' + b"x" * 40 + b'"},' + b'{"a":1,"a":2},' * 9_000 + b"{}]")
    items = list(read_records(path))
    assert len(items) == 9_002
    assert items[-1].where == f"{path}:1:{path.stat().st_size - 2}"


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@given(json_values)
@settings(max_examples=100, deadline=None)
def test_strict_json_reads_what_the_standard_library_writes(value: object) -> None:
    for ascii_only in (True, False):
        text = json.dumps(value, ensure_ascii=ascii_only)
        assert parse(text, Place("x")) == value


HEADS = [b"", GOOD, b"[" + GOOD + b",", b"question,answer\n1,2\n", b"\xef\xbb\xbf", b'{"messages": [{"role": ']
FRAGMENTS = [
    GOOD,
    *(line for line, _, _ in BAD_LINES if len(line) < 100),
    b'{"messages": [{"role": "user", "content": "a"}, {"role": "asistant", "content": 3}]}',
    b'{"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]}',
    b'{"conversations": [{"from": "function_call", "value": "[]"}], "tools": "[1]"}',
    b'{"instruction": "x", "output": "y", "history": [["a"]]}',
    *(bytes([char]) for char in b'{}[]",:\\\n\r\t 0-.e\xff'),
]


@given(
    head=st.sampled_from(HEADS),
    pieces=st.lists(st.sampled_from(FRAGMENTS) | st.binary(max_size=20), max_size=8),
    suffix=st.sampled_from([".json", ".jsonl", ".csv", ".tsv", ".txt", ".jsonl.gz", ".parquet"]),
    limit=st.sampled_from([None, 1, 3]),
)
@example(head=b"", pieces=[b"[" * 100_000], suffix=".json", limit=None)
@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_bytes_give_rows_or_a_data_error(
    tmp_path: Path, head: bytes, pieces: list[bytes], suffix: str, limit: int | None
) -> None:
    content = head + b"".join(pieces)
    path = put(tmp_path, "rows" + suffix, gzip.compress(content) if suffix.endswith("gz") else content)
    source = SourceFile(path, limit=limit)
    try:
        items = list(open_source(source).items)
        report = take(source)
    except DataError:
        return
    assert report.read == report.kept + report.rejected == len(items)
    assert report.files[0].read == report.read
    assert limit is None or report.read <= limit
    assert all(failure.where.startswith(f"{path}:") for failure in report.rejects)
