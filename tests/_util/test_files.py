"""Files that are replaced whole, and logs whose last line may be half written."""

from __future__ import annotations

import hashlib
import json

import pytest

from patchscope_nn._util.digests import digest
from patchscope_nn._util.files import append_lines, cut_half_line, replacing, whole_lines, write_whole


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    file = tmp_path / "a.json"
    write_whole(file, "old")

    def fail():
        with replacing(file) as draft:
            draft.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert file.read_text() == "old"
    write_whole(file, "é")
    assert file.read_text(encoding="utf-8") == "é"
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("half", [b"", b'{"cell": 2', b"x" * 200_000])
@pytest.mark.parametrize("whole", [b"", b"one\n", b"one\n" + b"y" * 70_000 + b"\n"])
def test_a_half_written_line_is_left_out_and_cut_off(tmp_path, whole, half):
    file = tmp_path / "lines.jsonl"
    assert list(whole_lines(file)) == []
    cut_half_line(file)
    append_lines(file, whole + half)
    assert b"".join(whole_lines(file)) == whole
    cut_half_line(file)
    assert file.read_bytes() == whole
    append_lines(file, b"two\n")
    assert list(whole_lines(file))[-1] == b"two\n"


def test_a_digest_is_of_sorted_json():
    value = {"b": [1, 2.5, None], "a": "é"}
    text = json.dumps(value, sort_keys=True)
    assert digest(value) == hashlib.sha256(text.encode()).hexdigest()[:16]
    assert digest({"a": "é", "b": (1, 2.5, None)}, length=24)[:16] == digest(value)
