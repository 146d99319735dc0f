"""Files as they come: whatever their names, their documents are told by their content, or they are refused."""

import codecs
import gzip
import io
import json
import sys
import tarfile
import zipfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from besa.data import textfiles
from besa.data.textfiles import file_documents, is_plain_text
from besa.errors import BesaError

C4 = [
    {"text": 'Beginners BBQ Class!\nDo you "want" to?', "timestamp": "2019-04-25T12:57:54Z", "url": "https://x.com"},
    {
        "text": "Zwölf Boxkämpfer.\u2028Eine Zeile. 😀",
        "timestamp": "2019-04-21T10:07:13Z",
        "url": "https://y.com",
    },
    {"text": " ", "timestamp": "", "url": ""},
]
TEXTS = [row["text"] for row in C4]
LINES = "".join(json.dumps(row) + "\n" for row in C4)
ARRAY = json.dumps(C4, indent=1)


def read(path, *arguments) -> list[str]:
    return list(file_documents(path, *arguments))


def refusal(call, *arguments) -> str:
    with pytest.raises(BesaError) as caught:
        call(*arguments)
    sentence = str(caught.value)
    assert "\n" not in sentence
    assert sentence.endswith(".")
    return sentence


def gz(data: bytes) -> bytes:
    """Without the time, as names of tests are made of it."""
    return gzip.compress(data, mtime=0)


def zstd(content: bytes) -> bytes:
    packed = pa.BufferOutputStream()
    with pa.CompressedOutputStream(packed, "zstd") as stream:
        stream.write(content)
    return packed.getvalue().to_pybytes()


@pytest.fixture
def write(tmp_path):
    def write(name: str, content: str | bytes):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


@pytest.mark.parametrize(
    "content",
    [
        LINES,
        "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in C4),
        "\ufeff" + LINES.replace("\n", "\r\n\r\n"),
        "\n \n" + LINES.rstrip("\n"),
        ARRAY,
        "\ufeff\r\n" + json.dumps(C4),
        json.dumps(TEXTS),
        "[" + ", ".join([json.dumps(TEXTS[0]), *map(json.dumps, C4[1:])]) + "]\n",
    ],
)
@pytest.mark.parametrize("pack", [bytes, gz, zstd])
@pytest.mark.parametrize(
    "name", ["c4-train.00000-of-01024.json", "c4.json.gz", "A.JSONL.GZ", "x.ndjson", "my.zst", "a.txt"]
)
def test_json_is_read_by_its_content_whatever_its_name(write, content, pack, name):
    path = write(name, pack(content.encode()))
    assert read(path) == TEXTS
    assert not is_plain_text(path)


@pytest.mark.parametrize("pack", [bytes, gz, zstd])
@pytest.mark.parametrize("name", ["text.txt", "wiki.test.raw", "README", "a.TXT.gz", "ümlaut ordner/b c.md"])
@pytest.mark.parametrize(
    "text", ["One.\r\n\r\nStill one: é.\n", "{{ jinja }} one", "[Chorus]\nla la", "{}[]", '"Quoted."']
)
def test_other_text_is_one_document(write, text, pack, name):
    path = write(name, pack(codecs.BOM_UTF8 + text.encode()))
    if text.startswith("{}"):  # an empty object
        assert refusal(read, path).startswith("Line 1 of ")
        return
    assert read(path) == [text.replace("\r\n", "\n")]
    assert is_plain_text(path)


@pytest.mark.parametrize(
    "line",
    [
        "{",
        '{"txt": "x"}',
        '{"text": 3}',
        '{"text": null}',
        "[1]",
        "7",
        r'{"text": "\ud800"}',
        '"x"',
        "[" * 99999,
        "\x00",
    ],
)
def test_a_bad_line_is_named(write, line):
    path = write("a.jsonl", f'{{"text": "fine"}}\n{line}\n')
    assert refusal(read, path).startswith(f"Line 2 of the JSON lines {path} is no object")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ('["One.", 3]', "Element 2 of the JSON array"),
        ('["One.", {"content": "x"}]', "Element 2 of the JSON array"),
        (r'["One.", "\ud800"]', "neither a string nor an object"),
        ('["One.", nonsense]', "Element 2 of the JSON array"),
        ('["One.", "Two', "damaged or cut off"),
        ('["One."', "damaged or cut off"),
        ('["One."] ["Two."]', "goes on after its JSON array"),
        ('{\n "text": "One."\n}', "is one JSON object: give lines or an array of objects"),
        ('{"data": [{"text": "One."}]}', "is one JSON object: give lines or an array of objects"),
    ],
)
def test_json_that_holds_no_texts_is_refused(write, content, reason):
    for name in ("a.json", "a.txt"):
        assert reason in refusal(read, write(name, content))


def test_text_under_a_name_of_json_is_refused(write):
    assert "Line 1 of" in refusal(read, write("a.json", "Once upon a time"))


def packed_folder(kind: str) -> bytes:
    content = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(content, "w") as archive:
            archive.writestr("a.txt", "One.")
    else:
        with tarfile.open(fileobj=content, mode=kind) as archive:
            archive.addfile(tarfile.TarInfo("a.txt"))
    return content.getvalue()


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("latin.txt", "Café\n".encode("latin-1"), "is not UTF-8 text (byte 3)"),
        ("late.txt", b"x" * 300_000 + b"\xff", "is not UTF-8 text (byte 300,000)"),
        ("late.txt.gz", gz(b"x" * 300_000 + b"\xff"), "is not UTF-8 text (byte 300,000)"),
        ("late.json", b'["One.", "' + b"x" * 300_000 + b'\xff"]', "is not UTF-8 text (byte 300,010)"),
        ("wide.txt", "One.".encode("utf-16"), "is not UTF-8 text (byte 0)"),
        ("wide.txt", "One.".encode("utf-16-le"), "holds zero bytes"),
        ("a.tar", packed_folder("w:"), "holds zero bytes"),
        ("a.json.tar.gz", packed_folder("w:gz"), "holds zero bytes"),
        ("a.zip", packed_folder("zip"), "is a zip archive"),
        ("a.csv", "id,text\n1,One.", "is a table"),
        ("a.TSV.gz", gz(b"id\ttext\n1\tOne."), "is a table"),
        ("a.json.gz", gz(LINES.encode() * 99)[:-20], "Could not read"),
        ("a.json.gz", gz(LINES.encode())[:40] + b"\xff" * 40, "Could not read"),
        ("a.json.zst", zstd(LINES.encode() * 99)[:-20], "Could not read"),
    ],
    ids=lambda value: value if isinstance(value, str) and len(value) < 40 else "",  # tar holds the time
)
def test_what_is_no_text_is_refused(write, name, content, reason):
    assert reason in refusal(read, write(name, content))


def test_files_that_are_not_there(tmp_path):
    for missing in ("no-such-text", "", str(tmp_path), "nul\0"):
        for call in (read, is_plain_text):
            assert "embedded one (such as c4)" in refusal(call, type(tmp_path)(missing))
    assert "Could not read" in refusal(read, type(tmp_path)("x" * 5000))


def test_two_packed_parts_in_one_file(write):
    for pack in (gz, zstd):
        assert read(write("a.json", pack(LINES.encode()) * 2)) == TEXTS * 2


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string()])
def test_parquet(tmp_path, kind):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": pa.array(["One.", None, "", "Two."], kind), "id": [1, 2, 3, 4]}), path)
    assert read(path) == ["One.", "", "Two."]


@pytest.mark.parametrize("columns", [{"body": ["One."]}, {"text": [3]}])
def test_parquet_without_a_column_of_text(tmp_path, columns):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table(columns), path)
    assert 'has no column "text" of strings' in refusal(read, path)


def test_damaged_parquet(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": ["One." * 1000]}), path, compression="none")
    whole = path.read_bytes()
    for damaged in (b"", b"nonsense", whole[:-100], whole[:4] + b"\xff" * 300 + whole[304:]):
        path.write_bytes(damaged)
        assert "is not a readable parquet file" in refusal(read, path)


def test_parquet_under_another_name(tmp_path):
    path = tmp_path / "train-00000-of-00001"
    pq.write_table(pa.table({"text": ["One.", "Two."]}), path)
    assert read(path) == ["One.", "Two."]
    assert not is_plain_text(path)


def test_a_library_that_is_missing(write, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    for path in (write("a.parquet", b""), write("a.json.zst", b"\x28\xb5\x2f\xfd")):
        assert 'pip install "besa-llm[data]"' in refusal(read, path)


# --- long files ---


@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_an_array_in_small_parts(write, monkeypatch, chunk):
    monkeypatch.setattr(textfiles, "CHUNK", chunk)
    documents = [f"Document {place}, {'long ' * (place % 7)}" for place in range(200)]
    path = write("a.json", json.dumps([{"id": 1, "text": document} for document in documents]))
    assert list(textfiles._array(path, path.open("rb"))) == documents


def test_a_long_text_is_cut_at_blank_lines_and_nothing_of_it_is_lost(write, monkeypatch):
    monkeypatch.setattr(textfiles, "PIECE", 50)
    monkeypatch.setattr(textfiles, "DOCUMENT", 400)
    paragraphs = [f"Paragraph {place}.\nIt has a second line." for place in range(100)]
    path = write("a.txt", "\n\n".join(paragraphs))
    pieces = read(path)
    assert "\n\n".join(pieces) == "\n\n".join(paragraphs)
    assert 20 < len(pieces) <= 100
    assert max(map(len, pieces)) <= 100
    assert all(piece.startswith("Paragraph") for piece in pieces)
    monkeypatch.setattr(textfiles, "DOCUMENT", 10_000)
    assert read(path) == ["\n\n".join(paragraphs)]


@pytest.mark.parametrize(("text", "gap"), [("word " * 400, " "), ("line\n" * 400, "\n"), ("ü" * 2000, "")])
def test_a_long_text_without_blank_lines_is_cut_all_the_same(write, monkeypatch, text, gap):
    monkeypatch.setattr(textfiles, "PIECE", 50)
    monkeypatch.setattr(textfiles, "DOCUMENT", 400)
    pieces = read(write("a.txt", text))
    assert gap.join(pieces) == text
    assert max(map(len, pieces)) <= 100


def test_progress_of_a_long_file(write, monkeypatch):
    monkeypatch.setattr(textfiles, "REPORT", 100)
    told = []
    path = write("a.jsonl", LINES * 500)
    read(path, lambda *news: told.append(news))
    assert [done for done, _, _ in told] == sorted(done for done, _, _ in told)
    assert told[0][1:] == (len(LINES) * 500, "reading a.jsonl")


@pytest.mark.parametrize(
    ("content", "form"),
    [
        (b"%PDF-1.4\n1 0 obj", "a PDF"),
        (b"{\\rtf1\\ansi Text}", "an RTF document"),
        (b"PK\x03\x04text", "a zip archive"),
        (b"BZh91AY&SYtext", "compressed by bzip2"),
        (b"\xfd7zXZ\x00text", "compressed by xz"),
        (b"\x04\x22\x4d\x18text", "compressed by lz4"),
        (b"\xef\xbb\xbf\n<!DOCTYPE html><p>Text", "HTML"),
        (gz(b"<html><p>Text"), "HTML"),
    ],
)
def test_other_forms_that_could_pass_for_text_are_refused(tmp_path, content, form):
    path = tmp_path / "text.txt"
    path.write_bytes(content)
    assert refusal(read, path) == (
        f"{path} is {form}: give plain text, JSON lines or parquet, or these as .gz or .zst."
    )


@pytest.mark.parametrize("ending", ["json", "jsonl", "jsonl.gz"])
def test_json_lines_in_another_encoding_are_refused_as_such(tmp_path, ending):
    for encoding, at in [("utf-16", 0), ("latin-1", 12)]:
        path = tmp_path / f"{encoding}.{ending}"
        content = '{"text": "Zwölf Boxkämpfer."}\n'.encode(encoding)
        path.write_bytes(gz(content) if ending.endswith("gz") else content)
        assert refusal(read, path) == f"{path} is not UTF-8 text (byte {at}): convert it to UTF-8 first."


@pytest.mark.parametrize("lay_out", [lambda t: t.dictionary_encode(), lambda t: t.cast(pa.string_view()), lambda t: t])
def test_parquet_columns_of_strings_however_laid_out(tmp_path, lay_out):
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"text": lay_out(pa.array(TEXTS))}), path)
    assert read(path) == TEXTS
