"""No row is lost without a word: quoting, delimiters, missing values, and what a reader tells."""

import csv
import io

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fedlora.config import DataConfig
from fedlora.data.columns import RawSplit, choose
from fedlora.data.files import read_table
from fedlora.data.sources import load
from fedlora.errors import DataError

HARD = ["plain", 'he said "yes"', "two\nlines", 'ends in "', "a, b; c\td", " spaced ", "ünïcode", '"whole"', '""', ""]


def tweets(sign: str, opened=(5, 50), text='"text {}') -> str:
    """180 rows in which some texts begin with a quotation mark that nothing closes."""
    lines = [f"{(text if i in opened else 'text {}').format(i)}{sign}{'ab'[i % 2]}" for i in range(180)]
    return "\n".join([f"text{sign}label", *lines, ""])


@pytest.mark.parametrize("ending", ["\n", "\r\n"])
@pytest.mark.parametrize("sign", [",", "\t", ";", "|"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_every_text_comes_back_as_it_was_written(tmp_path, sign, ending, mark):
    written = io.StringIO()
    writer = csv.writer(written, delimiter=sign, lineterminator=ending, quoting=csv.QUOTE_ALL)
    writer.writerows([["text", "label"], *([text, "a"] for text in HARD)])
    path = tmp_path / ("d.tsv" if sign == "\t" else "d.csv")
    path.write_bytes((mark + written.getvalue()).encode())
    read = read_table(path)
    assert read.table["text"].to_pylist() == HARD
    assert read.notes == ((f"its cells are separated by a {SIGNS[sign]}, not by a comma",) if sign in SIGNS else ())


SIGNS = {";": "semicolon", "|": "bar"}


def test_a_csv_file_whose_texts_begin_with_quotation_marks_is_refused_by_line(tmp_path):
    path = tmp_path / "d.csv"
    path.write_text(tweets(","))
    with pytest.raises(DataError, match=r"line 52: text after a closing quotation mark .* row that begins in line 7"):
        read_table(path)


def test_so_is_one_in_which_a_later_text_happens_to_close_the_mark(tmp_path):
    path = tmp_path / "d.csv"
    path.write_text(tweets(",").replace('"text 50', 'text 50"'))
    with pytest.raises(DataError, match="line 7: a quotation mark opens a cell that takes in rows which are whole"):
        read_table(path)


@pytest.mark.parametrize("closed", [False, True])
def test_a_tsv_file_is_then_read_without_quoting_and_says_so(tmp_path, closed):
    path = tmp_path / "d.tsv"
    path.write_text(tweets("\t").replace('"text 50', 'text 50"') if closed else tweets("\t"))
    read = read_table(path)
    assert read.table.num_rows == 180
    assert read.table["text"][5].as_py() == '"text 5'
    assert len(read.notes) == 1
    assert read.notes[0].startswith("quotation marks are read as text (line ")


def test_a_ragged_tsv_file_with_such_marks_is_refused(tmp_path):
    path = tmp_path / "d.tsv"
    path.write_text(tweets("\t") + "one\ttwo\tthree\n")
    with pytest.raises(DataError, match="line 52: text after a closing quotation mark"):
        read_table(path)


@pytest.mark.parametrize(("name", "line"), [("d.csv", "{},a\n"), ("d.jsonl", '{{"text": "{}", "label": "a"}}\n')])
def test_blank_lines_are_counted(tmp_path, name, line):
    head = "text,label\n" if name.endswith("csv") else ""
    (tmp_path / name).write_text(head + line.format("one") + "\n\n" + line.format("two"))
    read = read_table(tmp_path / name)
    assert (read.table.num_rows, read.notes) == (2, ("2 blank lines passed over",))


def test_only_the_columns_that_are_asked_for_are_kept(tmp_path):
    table = pa.table({"text": ["a", "b"], "label": ["x", "y"], "more": [1, 2]})
    pq.write_table(table, tmp_path / "d.parquet")
    table.to_pandas().to_csv(tmp_path / "d.csv", index=False)
    table.to_pandas().to_json(tmp_path / "d.jsonl", orient="records", lines=True)
    for name in ("d.parquet", "d.csv", "d.jsonl"):
        read = read_table(tmp_path / name, {"label", "elsewhere"})
        assert (read.table.column_names, read.columns) == (["label"], ("text", "label", "more")), name


@pytest.mark.parametrize(
    ("labels", "missing"),
    [
        (pa.array([0.0, 1.0, float("nan"), 1.0]), 3),
        (pa.array([0, 1, None, 1]), 3),
        (pa.array(["0", "1", "nan", "1"]), 3),
        (pa.array(["1.5", "NaN", "2e3", "1.5"]), 2),
        (pa.array(["no", "nan", "yes", "no"]), None),
        (pa.array(["nan", "nan", "nan", "nan"]), None),
    ],
    ids=["floats", "integers", "numbers as text", "fractions as text", "words", "one word"],
)
@pytest.mark.parametrize("ours", ["label", "client"])
def test_a_missing_number_is_missing_and_a_word_is_a_word(labels, missing, ours):
    split = RawSplit(pa.table({"text": ["a", "b", "c", "d"], "it": pa.chunked_array([labels])}), "d")
    if missing is None:
        assert choose(split, {"text": "text", ours: "it"}).table[ours].to_pylist() == labels.to_pylist()
    else:
        with pytest.raises(DataError, match=rf"1 of 4 examples have no \w+ \(first: row {missing}\)"):
            choose(split, {"text": "text", ours: "it"})


@pytest.mark.parametrize("ours", ["text", "text_pair"])
def test_a_text_column_of_numbers_with_a_gap(ours):
    split = RawSplit(pa.table({"it": pa.array([1.5, float("nan")])}), "d")
    with pytest.raises(DataError, match=r"1 of 2 examples have no text \(first: row 2\)"):
        choose(split, {ours: "it"})


def test_nan_in_json_lines_is_a_missing_label_and_1_and_1_0_are_one_class(tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_text("".join(f'{{"text": "t {i}", "label": {["0", "1", "1.0"][i % 3]}}}\n' for i in range(60)))
    assert load(DataConfig(name=str(path)), 0).labels == ("0", "1")
    path.write_text(path.read_text() + '{"text": "t", "label": NaN}\n')
    with pytest.raises(DataError, match=r"1 of 61 examples have no label \(first: row 61\)"):
        load(DataConfig(name=str(path)), 0)


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_a_column_that_is_there_twice(tmp_path, kind):
    path = tmp_path / f"d.{kind}"
    if kind == "csv":
        path.write_text("text,label,text\n" + "".join(f"some {i},{'ab'[i % 2]},other {i}\n" for i in range(60)))
    else:
        columns = [pa.array(["a"] * 4), pa.array(["x", "y"] * 2), pa.array(["b"] * 4)]
        pq.write_table(pa.Table.from_arrays(columns, ["text", "label", "text"]), path)
    with pytest.raises(DataError, match="column 'text' is there 2 times; rename or remove all but one"):
        load(DataConfig(name=str(path)), 0)


TABLE = {
    "site": ["bbc", "cnn", "bbc", "cnn"] * 10,
    "body": [f"a long story about number {i}" for i in range(40)],
    "topic": ["war", "peace", "war", "sport"] * 10,
}


@pytest.mark.parametrize(
    ("names", "ours", "asked", "hint"),
    [
        (["body", "topic", "site"], "text", "text", "'body' holds the longest texts: is it that?"),
        (["site", "topic"], "text", "text", None),
        (["body", "topic"], "label", "label", "'topic' holds classes: is it that?"),
        (["body", "topic", "site"], "label", "label", None),
        (["body", "topic"], "label", "Topics", "Did you mean 'topic'?"),
        (["body", "site"], "client", "sites", "Did you mean 'site'?"),
        (["body", "site"], "client", "who", None),
    ],
)
def test_a_column_is_suggested_by_its_content_or_not_at_all(names, ours, asked, hint):
    with pytest.raises(DataError) as caught:
        choose(RawSplit(pa.table({name: TABLE[name] for name in names}), "d"), {ours: asked})
    after_columns = str(caught.value).partition(f"{', '.join(names)}.")[2]
    assert after_columns == f"{f' {hint}' if hint else ''} Set data.{ours} to one of them"


@pytest.mark.parametrize("order", [("text", "label"), ("label", "text")])
@pytest.mark.parametrize("sign", [",", "\t"])
def test_a_cell_of_rows_is_found_although_another_text_is_rightly_quoted(tmp_path, order, sign):
    rows = [{"text": f"text {i}", "label": "ab"[i % 2]} for i in range(60)]
    rows[5]["text"], rows[20]["text"], rows[40]["text"] = '"text 5', 'text 20"', f'"with{sign} in it"'
    path = tmp_path / ("d.tsv" if sign == "\t" else "d.csv")
    path.write_text(
        "".join(sign.join(row[name] for name in order) + "\n" for row in [dict(zip(order, order, strict=True)), *rows])
    )
    with pytest.raises(DataError, match=r"before 'text 5.*' makes one cell of lines that look like rows"):
        read_table(path)


def test_a_text_of_several_lines_with_commas_is_no_such_cell(tmp_path):
    path = tmp_path / "d.csv"
    texts = ["Things:\napples,a\npears,b\nplums", "Dear,\nsir", "one, two", "x,a\ny,c\nz"] * 20
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([["text", "label"], *([text, "ab"[i % 2]] for i, text in enumerate(texts))])
    assert read_table(path).table["text"].to_pylist() == texts
