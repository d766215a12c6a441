"""How JSON files are laid out."""

import json

import pytest

from fedlora.files.atomic import laid_out, write_json

CONTENT = {
    "round": 2,
    "losses": [1.5, 2.0],
    "local": {"confusion": [[1, 0], [0, 3]], "none": {}, "empty": []},
    "rows": [{"client": 1, "why": "é \ud800"}, {"client": 2, "why": None}],
    7: (True, ("a", [1])),
}


def test_a_file_holds_what_json_would_hold(tmp_path):
    write_json(tmp_path / "a.json", CONTENT)
    assert json.loads((tmp_path / "a.json").read_text()) == json.loads(json.dumps(CONTENT))
    for small in ([], {}, 3, "text", None, [[]], [{}], ()):
        assert json.loads(laid_out(small)) == json.loads(json.dumps(small))


def test_a_line_is_an_entry_a_row_or_a_list_of_numbers():
    assert laid_out(CONTENT).splitlines() == [
        "{",
        ' "round": 2,',
        ' "losses": [1.5, 2.0],',
        ' "local": {',
        '  "confusion": [',
        "   [1, 0],",
        "   [0, 3]",
        "  ],",
        '  "none": {},',
        '  "empty": []',
        " },",
        ' "rows": [',
        '  {"client": 1, "why": "\\u00e9 \\ud800"},',
        '  {"client": 2, "why": null}',
        " ],",
        ' "7": [',
        "  true,",
        '  ["a", [1]]',
        " ]",
        "}",
    ]


def test_what_is_no_json_is_refused_where_it_stands():
    assert laid_out({"a": [float("nan")]}) == '{\n "a": [NaN]\n}'
    for content in ({"a": [float("nan")]}, [[float("inf")]], {"a": {"b": float("nan")}}):
        with pytest.raises(ValueError, match="not JSON compliant"):
            laid_out(content, allow_nan=False)
