"""Rows are the same whatever they are read from, and what is no table says where."""

import datetime as dt
import json
import os
import sys
import types
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from patchscope_nn.data.rows import BUILTIN, DataSpec, fingerprint, load_rows
from patchscope_nn.errors import DataError, SpecError

ROWS = [
    {"entity": "Paris, France", "kind": 'a "city"'},
    {"entity": "Ünïcode \u2028 line", "kind": "two\nlines"},
]
CSV = 'entity,kind\n"Paris, France","a ""city"""\n"Ünïcode \u2028 line","two\nlines"\n'


def write(folder: Path, name: str, text: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def write_all(folder: Path) -> list[Path]:
    lines = [json.dumps(row, ensure_ascii=False) for row in ROWS]
    table = folder / "rows.parquet"
    parquet.write_table(pa.Table.from_pylist(ROWS), table)
    return [
        write(folder, "rows.jsonl", "\n".join(lines)),
        write(folder, "crlf.jsonl", "\r\n".join(["", *lines, "", ""])),
        write(folder, "bom.jsonl", "\ufeff" + "\n".join(lines)),
        write(folder, "rows.json", json.dumps(ROWS, indent=1)),
        write(folder, "rows.csv", CSV),
        write(
            folder,
            "crlf.CSV",
            CSV.replace("two\nlines", "two|lines").replace("\n", "\r\n").replace("|", "\n"),
        ),
        write(folder, "bom.csv", "\ufeff" + CSV),
        write(folder, "rows.tsv", CSV.replace(",k", "\tk").replace('","', '"\t"')),
        table,
    ]


@pytest.mark.quick
def test_every_format_gives_the_same_rows(tmp_path):
    for path in write_all(tmp_path):
        assert load_rows(DataSpec(file=path.name), base=tmp_path) == ROWS, path.name
        assert load_rows(DataSpec(file=path), limit=1) == ROWS[:1], path.name


def test_a_relative_file_starts_from_the_working_directory_without_a_recipe(tmp_path, monkeypatch):
    write(tmp_path, "rows.csv", CSV)
    monkeypatch.chdir(tmp_path)
    assert load_rows(DataSpec(file="rows.csv")) == ROWS


def test_parquet_keeps_types(tmp_path):
    rows = [{"a": 1, "b": [1.5, None], "c": dt.date(2024, 1, 2)}]
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    assert load_rows(DataSpec(file="rows.parquet"), base=tmp_path) == rows
    assert len(fingerprint(rows)) == 16


COLUMNS = {
    "attributes": (300, ("relation", "prompt", "subject", "object", "sentence")),
    "contexts": (200, ("context", "continuation")),
    "directions": (8, ("index", "topic")),
    "entities": (60, ("entity", "description", "kind")),
    "facts": (60, ("prompt", "subject", "answer")),
    "texts": (800, ("text",)),
    "topics": (40, ("text", "topic", "sentiment")),
    "two-hop": (60, ("first", "second", "query", "bridge", "answer", "swapped_first", "builtin_model")),
    "words": (80, ("word", "text")),
}


@pytest.mark.parametrize("name", BUILTIN)
def test_builtin_data(name):
    rows = load_rows(DataSpec(builtin=name))
    least, columns = COLUMNS[name]
    assert len(rows) >= least
    assert tuple(rows[0]) == columns
    texts = [value for row in rows for name, value in row.items() if name != "index"]
    assert all(isinstance(text, str) and text == text.strip() != "" for text in texts)
    assert len({tuple(row.values()) for row in rows}) == len(rows)


def test_an_attribute_is_asked_for_and_its_subject_mentioned():
    rows = load_rows(DataSpec(builtin="attributes"))
    assert len({(row["relation"], row["subject"]) for row in rows}) == len(rows)
    for row in rows:
        assert row["prompt"].endswith(" x"), row
        assert row["sentence"].find(row["subject"]) > 0, row
        assert row["object"].lower() not in row["sentence"].lower(), row
    sizes = Counter(row["relation"] for row in rows)
    assert len(sizes) >= 10
    assert min(sizes.values()) >= 18
    for relation in sizes:
        asked = {row["prompt"] for row in rows if row["relation"] == relation}
        assert len(asked) == 1, relation


def test_a_query_has_two_hops_and_a_swapped_one_has_another_answer():
    rows = load_rows(DataSpec(builtin="two-hop"))
    answers = {(row["first"], row["second"]): row["answer"] for row in rows}
    for row in rows:
        assert row["query"] == f"{row['second']} {row['first']}"
        assert row["answer"] not in row["query"], row
        assert row["bridge"] not in row["query"], row
        assert answers[row["swapped_first"], row["second"]] != row["answer"], row


def test_a_fact_begins_with_its_subject_and_does_not_tell_its_answer():
    for row in load_rows(DataSpec(builtin="facts")):
        assert row["prompt"].startswith(row["subject"]), row
        assert row["answer"].lower() not in row["prompt"].lower().split(), row


def test_texts_are_short_and_unlike_each_other():
    texts = [row["text"] for row in load_rows(DataSpec(builtin="texts"))]
    assert all(30 <= len(text.split()) <= 120 for text in texts if "```" not in text)
    assert all(text.isprintable() for text in "".join(texts).split("\n"))
    assert max(Counter(" ".join(text.lower().split()[:3]) for text in texts).values()) <= 6
    assert 20 < sum("```" in text or "def " in text or "SELECT" in text for text in texts) < len(texts) / 4


def test_a_text_ends_in_its_word():
    for row in load_rows(DataSpec(builtin="words")):
        assert row["text"].endswith(f" {row['word']}"), row
        assert row["text"].count(row["word"]) == 1, row


def test_topics_have_as_many_sentences_each():
    rows = load_rows(DataSpec(builtin="topics"))
    assert set(Counter(row["topic"] for row in rows).values()) == {5}
    assert {row["sentiment"] for row in rows} == {"positive", "negative", "neutral"}
    assert not [row for row in rows if row["topic"] in row["text"].lower()]


def test_the_builtin_names_are_the_files_that_ship():
    folder = Path(sys.modules["patchscope_nn.data.rows"].__file__).parent / "builtin"
    assert sorted(BUILTIN) == sorted(path.stem for path in folder.glob("*.jsonl"))


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        ({"a": 1}, [0, 1]),
        ({"a": [1, "2"]}, [0, 1, 2]),
        ({"a": "1", "b": "y"}, [1]),
    ],
)
def test_where_takes_the_rows_that_have_a_value(where, expected, tmp_path):
    rows = [{"a": 1, "b": "x"}, {"a": 1, "b": "y"}, {"a": 2, "b": "x"}, {"a": 3, "b": "x"}]
    assert load_rows(DataSpec(rows=tuple(rows), where=where)) == [rows[one] for one in expected]
    assert load_rows(DataSpec(rows=tuple(rows), where=where), limit=1) == [rows[expected[0]]]
    (tmp_path / "rows.csv").write_text("a,b\n1,x\n1,y\n2,x\n3,x\n")
    assert len(load_rows(DataSpec(file=tmp_path / "rows.csv", where=where))) == len(expected)


def test_where_says_what_there_is():
    rows = ({"kind": "person"}, {"kind": "place"})
    with pytest.raises(DataError, match=r"data\.where=\{'kind': 'film'\} leaves no row") as caught:
        load_rows(DataSpec(rows=rows, where={"kind": "film"}))
    assert caught.value.hint == "There are kind: person, place."
    with pytest.raises(DataError, match=r"row 1: data\.where\.kid is not a column") as caught:
        load_rows(DataSpec(rows=rows, where={"kid": "film"}))
    assert "Did you mean 'kind'?" in caught.value.hint


def test_any_beginning_of_the_attributes_has_all_relations():
    rows = load_rows(DataSpec(builtin="attributes"), limit=26)
    assert set(Counter(row["relation"] for row in rows).values()) == {2}
    phases = DataSpec(builtin="attributes", where={"relation": "substance_phase"})
    assert set(Counter(row["object"] for row in load_rows(phases, limit=6)).values()) == {2}


def test_inline_rows_are_copied():
    data = DataSpec(rows=[{"a": 1}])
    load_rows(data)[0]["a"] = 2
    assert load_rows(data) == [{"a": 1}]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {},
            (
                "DataSpec: names no data; give exactly one of builtin, file, hub, rows, reader, function, "
                "for example {builtin: contexts}"
            ),
        ),
        (
            {"builtin": "contexts", "file": "x.csv"},
            (
                "DataSpec: names builtin and file; give exactly one of builtin, file, hub, rows, reader, "
                "function, for example {builtin: contexts}"
            ),
        ),
        (
            {"builtin": "contxts"},
            (
                "DataSpec: builtin: 'contxts' is not builtin data. Did you mean 'contexts'? "
                "Allowed: attributes, contexts, directions, entities, facts, texts, topics, two-hop, words."
            ),
        ),
        ({"hub": "org/name"}, "DataSpec: hub needs a split, for example {hub: org/name, split: test}"),
        (
            {"file": "x.csv", "split": "test"},
            "DataSpec: split belongs to hub, and this is file; leave it out",
        ),
        (
            {"rows": []},
            "DataSpec: rows: is an empty list; give at least one row, for example [{entity: Paris}]",
        ),
        ({"rows": "Paris"}, "DataSpec: rows: should be a list; given 'Paris'"),
        (
            {"fille": "x.csv"},
            (
                "DataSpec: fille: is not a field here. Did you mean 'file'? "
                "Allowed: builtin, file, hub, split, config, revision, rows, reader, "
                "function, arguments, where, drop_missing."
            ),
        ),
    ],
)
def test_what_is_no_data(fields, message):
    with pytest.raises(SpecError) as caught:
        DataSpec(**fields)
    assert str(caught.value) == message


ALIKE = "Give every row the same columns."
BAD_FILES = {
    "missing.csv": (
        None,
        "data.file='missing.csv' does not exist; looked for {folder}/missing.csv. Check data.file.",
    ),
    "rows.txt": (
        "a",
        (
            "data.file='rows.txt' has .txt, which is not read. "
            "Did you mean '.tsv'? Allowed: .jsonl, .json, .csv, .tsv, .parquet."
        ),
    ),
    "rows": (
        "a",
        "data.file='rows' has no ending, which is not read. Allowed: .jsonl, .json, .csv, .tsv, .parquet.",
    ),
    "empty.jsonl": ("", "data.file='empty.jsonl' holds no row. Give data with at least one row."),
    "empty.json": ("", "data.file='empty.json' holds no row. Give data with at least one row."),
    "empty.csv": ("", "data.file='empty.csv' holds no row. Give data with at least one row."),
    "header.csv": ("a,b\r\n", "data.file='header.csv' holds no row. Give data with at least one row."),
    "empty.parquet": (
        b"",
        "data.file='empty.parquet' is not a Parquet file (Parquet file size is 0 bytes). Check the file.",
    ),
    "latin.csv": (b"a\n\xe9\n", "data.file='latin.csv' is not UTF-8 text. Save the file as UTF-8."),
    "bad.jsonl": (
        '{"a": 1}\n\n{"a": }\n',
        "data.file='bad.jsonl', line 3, column 7: is not JSON (Expecting value). Correct that line.",
    ),
    "bad.json": (
        '[\n {"a": 1},\n {"a" 2}\n]',
        "data.file='bad.json', line 3, column 7: is not JSON (Expecting ':' delimiter). Correct that line.",
    ),
    "object.json": (
        '{"a": [1]}',
        (
            "data.file='object.json' is a JSON dict, not a list of rows. "
            'Write [{"column": value}, ...], or one row a line in a .jsonl file.'
        ),
    ),
    "list.jsonl": (
        '{"a": 1}\n[1, 2]\n',
        (
            "data.file='list.jsonl', line 2: [1, 2] is not a row. "
            'A row is a mapping of columns to values, for example {"entity": "Paris"}.'
        ),
    ),
    "bare.jsonl": ("{}\n", "data.file='bare.jsonl', line 1: the row has no column. Leave the row out."),
    "ragged.jsonl": (
        '{"a": 1, "b": 2}\n{"a": 1}\n',
        f"data.file='ragged.jsonl', line 2: the columns are a; those of the first row are a, b. {ALIKE}",
    ),
    "ragged.json": (
        '[{"a": 1}, {"b": 1}]',
        f"data.file='ragged.json', row 2: the columns are b; those of the first row are a. {ALIKE}",
    ),
    "ragged.csv": (
        "a,b\n1,2\nParis, France, Europe\n",
        (
            "data.file='ragged.csv', line 3: 3 values for 2 columns (a, b). "
            "Give every row the same columns; put a text that holds the separator in quotes."
        ),
    ),
    "twice.csv": (
        "a,a\n1,2\n",
        (
            "data.file='twice.csv', line 1: the column 'a' is unnamed or comes twice. "
            "The first line names every column once."
        ),
    ),
    "quote.csv": (
        'a\n"open\n',
        (
            "data.file='quote.csv', line 2: is not CSV (unexpected end of data). "
            'Put a text that holds quotes or line ends in quotes, and write quotes in it as "".'
        ),
    ),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_file_that_is_no_table(name, tmp_path):
    content, message = BAD_FILES[name]
    if content is not None:
        write(tmp_path, name, content)
    with pytest.raises(DataError) as caught:
        load_rows(DataSpec(file=name), base=tmp_path)
    assert str(caught.value) == message.replace("{folder}", str(tmp_path))


def test_a_parquet_file_that_is_none(tmp_path):
    write(tmp_path, "rows.parquet", "this is text, not a table")
    with pytest.raises(
        DataError, match=r"^data\.file='rows\.parquet' is not a Parquet file \(.*\)\. Check the file\.$"
    ):
        load_rows(DataSpec(file="rows.parquet"), base=tmp_path)


def test_a_folder_and_a_locked_file_cannot_be_read(tmp_path):
    (tmp_path / "rows.csv").mkdir()
    with pytest.raises(
        DataError, match=r"^data\.file='rows\.csv' cannot be read: Is a directory\. Check the file\.$"
    ):
        load_rows(DataSpec(file="rows.csv"), base=tmp_path)
    locked = write(tmp_path, "locked.json", "[]")
    locked.chmod(0)
    if not os.access(locked, os.R_OK):  # root may read it all the same
        with pytest.raises(DataError, match="cannot be read: Permission denied"):
            load_rows(DataSpec(file=locked))


def test_deep_json_is_an_error(tmp_path):
    write(tmp_path, "rows.json", "[" * 100_000)
    with pytest.raises(DataError, match="is JSON that cannot be read"):
        load_rows(DataSpec(file="rows.json"), base=tmp_path)


@pytest.mark.parametrize("limit", [0, -1])
def test_a_limit_below_one(limit):
    with pytest.raises(DataError) as caught:
        load_rows(DataSpec(builtin="contexts"), limit=limit)
    assert str(caught.value) == f"limit={limit} leaves no row. Give 1 or more, or leave it out to read all."


def test_inline_rows_that_are_no_table():
    with pytest.raises(DataError) as caught:
        load_rows(DataSpec(rows=[{"a": 1}, {"a": 1, "b": 2}]))
    assert (
        str(caught.value) == f"data.rows, row 2: the columns are a, b; those of the first row are a. {ALIKE}"
    )


def test_hub_data_is_streamed_under_a_limit(monkeypatch):
    calls = []

    def load_dataset(*given, **named):
        calls.append((*given, named))
        return iter([{"a": 1}, {"a": 2}])

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    data = DataSpec(hub="org/name", split="test", config="en", revision="v1")
    assert load_rows(data, limit=1) == [{"a": 1}]
    assert load_rows(data) == [{"a": 1}, {"a": 2}]
    named = {"split": "test", "revision": "v1"}
    assert calls == [
        ("org/name", "en", {**named, "streaming": True}),
        ("org/name", "en", {**named, "streaming": False}),
    ]


def test_hub_data_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError) as caught:
        load_rows(DataSpec(hub="org/name", split="test"))
    assert str(caught.value) == (
        "data.hub='org/name' needs the package datasets, which is not installed. "
        "Run: pip install 'patchscope-nn[hub]'"
    )


def test_hub_data_that_cannot_be_reached(monkeypatch):
    def load_dataset(*_given, **_named):
        raise ConnectionError("no route to the Hub.\nmore")

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    with pytest.raises(DataError) as caught:
        load_rows(DataSpec(hub="org/name", split="test"))
    assert str(caught.value) == (
        "data.hub='org/name', split='test' cannot be read (ConnectionError: no route to the Hub). "
        "Check the name, the split and the network, or save the rows and use {file: rows.jsonl}."
    )


def test_the_fingerprint_is_pinned():
    assert fingerprint([{"a": 1, "b": "é"}]) == "6ce780f85212069b"


VALUES = st.none() | st.booleans() | st.integers(0, 2) | st.sampled_from(["", "1", "é"])


@given(st.lists(st.dictionaries(st.sampled_from("ab"), VALUES), min_size=1, max_size=3))
def test_the_fingerprint_sees_the_order_of_rows_and_not_of_columns(rows):
    turned = [dict(reversed(row.items())) for row in rows]
    assert fingerprint(turned) == fingerprint(rows)
    same = [sorted(map(repr, row.items())) for row in rows]
    assert (fingerprint(rows[::-1]) == fingerprint(rows)) == (same[::-1] == same)
