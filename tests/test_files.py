"""Files that appear whole or not at all."""

import json

import pytest

from vocalnet.files import replacing, write_json, write_text


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path):
    file = tmp_path / "report.json"
    write_json(file, {"right": 1})

    def fail_half_way():
        with replacing(file) as temporary:
            temporary.write_text("hal")
            assert json.loads(file.read_text()) == {"right": 1}
            raise ValueError("half way")

    with pytest.raises(ValueError, match="half way"):
        fail_half_way()
    assert json.loads(file.read_text()) == {"right": 1}
    assert list(tmp_path.iterdir()) == [file]


def test_folders_are_made_and_text_is_utf8(tmp_path):
    write_text(tmp_path / "a" / "b.md", "≤ 6 %\n")
    assert (tmp_path / "a" / "b.md").read_bytes() == "≤ 6 %\n".encode()
