"""Documents of a local text file, one after another. The content decides the format, not the name."""

from __future__ import annotations

import gzip
import io
import json
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from besa.errors import BesaError
from besa.progress import Progress, silent

DOCUMENT = 16 << 20  # characters of the longest plain text that is one document; tokenizers need 200 bytes for each
PIECE = 1 << 15  # characters of a piece of a longer text, at least; at most twice as many
CHUNK = 1 << 16  # characters or bytes read at a time
REPORT = 1 << 22  # bytes read between two reports of progress

BOM = b"\xef\xbb\xbf"
GZIP, ZSTD, PARQUET = b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"PAR1"
COMPRESSED = (".gz", ".zst")
# First bytes of other formats that could pass for text.
FOREIGN = {
    b"%PDF-": "a PDF",
    b"{\\rtf": "an RTF document",
    b"PK\x03\x04": "a zip archive",
    b"BZh91AY&SY": "compressed by bzip2",
    b"\xfd7zXZ": "compressed by xz",
    b"\x04\x22\x4d\x18": "compressed by lz4",
    b"<!doctype html": "HTML",
    b"<html": "HTML",
}
JSON_NAMES = (".json", ".jsonl", ".ndjson")
TABLES = (".csv", ".tsv")
JSON_BEGINS = re.compile(rb'\s*(\{\s*["}]|\[\s*["{\]])')  # an object, or an array of objects or strings
BETWEEN = re.compile(r"[\s,]*")  # between two elements of an array
BREAKS = ("\n\n", "\n", " ")  # where a long text is cut, best first


def file_documents(path: Path, progress: Progress = silent) -> Iterator[str]:
    """The documents of a local file in order, including blank ones.

    JSON lines are objects with a string "text". A JSON array holds such objects, or strings. A parquet file has a
    column "text". These and plain text may be compressed by gzip or zstd. Plain text is one document; a text longer
    than 16 Mi characters is cut into documents of 32 to 64 Ki characters, at blank lines if possible.

    Args:
        path: of the file.
        progress: is called while a large file is read.

    Raises:
        BesaError: there is no such file, it cannot be read, or it has none of these formats.
    """
    with _opened(path) as file:
        if _is_parquet(path, file):
            yield from _parquet(path, progress)
        else:
            yield from _reported(_contents(path, _decompressed(path, file)), path, file, progress)


def check_file(path: Path) -> None:
    """Check that a local file is there and can be read.

    Raises:
        BesaError: there is no such file, or it cannot be read.
    """
    with _opened(path):
        pass


def is_plain_text(path: Path) -> bool:
    """Whether a local file is one document; JSON and parquet hold several.

    Raises:
        BesaError: there is no such file, or it cannot be read.
    """
    with _opened(path) as file:
        return not _is_parquet(path, file) and not _is_json(path, _decompressed(path, file))


@contextmanager
def _opened(path: Path) -> Iterator[io.BufferedReader]:
    try:
        if not path.is_file():
            raise BesaError(
                f"There is no text {path}: give an embedded one (such as c4), a file of text, JSON lines or parquet, "
                "or hf:<dataset>."
            )
        with path.open("rb") as file:
            yield file
    except GeneratorExit:  # may come while Python ends, when the names below no longer exist
        raise
    except (OSError, EOFError, zlib.error) as exc:
        reason = getattr(exc, "strerror", None) or " ".join(str(exc).split()).rstrip(".")
        raise BesaError(f"Could not read {path} ({reason}): give a file that can be read.") from exc


def _is_parquet(path: Path, file: io.BufferedReader) -> bool:
    return file.peek(len(PARQUET)).startswith(PARQUET) or path.suffix.lower() == ".parquet"


def _decompressed(path: Path, file: io.BufferedReader) -> io.BufferedReader:
    """The content of the file, decompressed if it is compressed by gzip or zstd."""
    head = file.peek(4)
    if head.startswith(GZIP):
        return io.BufferedReader(gzip.GzipFile(fileobj=file), CHUNK)
    if not head.startswith(ZSTD):
        return file
    try:
        import pyarrow as pa
    except ImportError as exc:
        raise BesaError(f'Reading {path}, compressed by zstd, needs pyarrow: pip install "besa-llm[data]".') from exc
    return io.BufferedReader(pa.CompressedInputStream(file, "zstd"), CHUNK)


def _reported(documents: Iterator[str], path: Path, file: BinaryIO, progress: Progress) -> Iterator[str]:
    """Pass the documents on, and call progress with the number of bytes read."""
    size, reported = path.stat().st_size, 0
    for document in documents:
        if file.tell() - reported >= REPORT:
            reported = file.tell()
            progress(reported, size, f"reading {path.name}")
        yield document


def _ending(path: Path) -> str:
    """The last suffix of a name in lower case, without that of a compressed file."""
    names = [suffix.lower() for suffix in path.suffixes]
    if names and names[-1] in COMPRESSED:
        names.pop()
    return names[-1] if names else ""


def _is_json(path: Path, stream: io.BufferedReader) -> bool:
    return _ending(path) in JSON_NAMES or JSON_BEGINS.match(stream.peek(CHUNK).removeprefix(BOM)) is not None


def _contents(path: Path, stream: io.BufferedReader) -> Iterator[str]:
    if _ending(path) in TABLES:
        raise BesaError(f'{path} is a table: give its texts as JSON lines, objects with a "text", or as parquet.')
    head = stream.peek(CHUNK).removeprefix(BOM).lstrip()[:16].lower()
    if other := next((form for begins, form in FOREIGN.items() if head.startswith(begins.lower())), None):
        raise BesaError(f"{path} is {other}: give plain text, JSON lines or parquet, or these as .gz or .zst.")
    if not _is_json(path, stream):
        form = _text
    else:
        form = _array if stream.peek(CHUNK).removeprefix(BOM).lstrip().startswith(b"[") else _lines
    try:
        yield from form(path, stream)
    except UnicodeDecodeError as exc:
        at = stream.tell() - len(exc.object) + exc.start
        raise BesaError(f"{path} is not UTF-8 text (byte {at:,}): convert it to UTF-8 first.") from exc


def _lines(path: Path, stream: io.BufferedReader) -> Iterator[str]:
    for number, line in enumerate(stream, start=1):
        if number == 1:
            line = line.removeprefix(BOM)
        if line.strip():
            try:
                yield _string(json.loads(line.decode())["text"])
            except UnicodeDecodeError:
                raise
            except (ValueError, TypeError, KeyError, RecursionError) as exc:
                if number == 1 and _is_object(line + stream.read(DOCUMENT)):
                    raise BesaError(
                        f'{path} is one JSON object: give lines or an array of objects with a string "text".'
                    ) from exc
                raise BesaError(
                    f'Line {number:,} of the JSON lines {path} is no object with a string "text": correct or remove it.'
                ) from exc


def _is_object(content: bytes) -> bool:
    """Whether all of this is one JSON object."""
    try:
        return isinstance(json.loads(content), dict)
    except (ValueError, RecursionError):
        return False


def _array(path: Path, stream: io.BufferedReader) -> Iterator[str]:
    """The elements of an array one by one; the array may be larger than memory."""
    text, decoder = io.TextIOWrapper(stream, encoding="utf-8-sig"), json.JSONDecoder()
    number, held, place = 1, text.read(CHUNK).lstrip()[1:], 0
    while True:
        place = BETWEEN.match(held, place).end()  # type: ignore[union-attr]  # it matches anything
        if held[place : place + 1] == "]":
            if (held[place + 1 :] + text.read(CHUNK)).strip():
                raise BesaError(f"{path} goes on after its JSON array: remove the rest, or write JSON lines.")
            return
        try:
            element, place = decoder.raw_decode(held, place)
            yield _string(element if isinstance(element, str) else element["text"])
        except json.JSONDecodeError as exc:  # cut off or wrong; doubling the text held keeps the time linear
            more = text.read(max(CHUNK, len(held) - place)) if len(held) - place < DOCUMENT else ""
            if not more:
                raise BesaError(f"Element {number:,} of the JSON array {path} is damaged or cut off.") from exc
            held, place = held[place:] + more, 0
        except (ValueError, TypeError, KeyError, RecursionError) as exc:
            raise BesaError(
                f'Element {number:,} of the JSON array {path} is neither a string nor an object with a string "text": '
                "correct or remove it."
            ) from exc
        else:
            number += 1


def _string(value: Any) -> str:
    """The value, if it is a string.

    Raises:
        TypeError: it is no string.
        ValueError: it has half a surrogate pair, which tokenizers do not accept.
    """
    if not isinstance(value, str):
        raise TypeError
    value.encode()
    return value


def _text(path: Path, stream: io.BufferedReader) -> Iterator[str]:
    text = io.TextIOWrapper(stream, encoding="utf-8-sig")  # -sig: a byte order mark is no part of the text
    held = text.read(DOCUMENT + 1)
    if "\0" in held:
        raise BesaError(f"{path} holds zero bytes, so it is no text: give a file of text, JSON lines or parquet.")
    yield from [held] if len(held) <= DOCUMENT else _pieces(held, text)


def _pieces(held: str, text: io.TextIOWrapper) -> Iterator[str]:
    """The pieces of a long text."""
    place = 0
    while True:
        if len(held) - place < 2 * PIECE:
            held, place = held[place:] + text.read(DOCUMENT), 0
            if len(held) < 2 * PIECE:
                yield held
                return
        first, last = place + PIECE, place + 2 * PIECE
        end, gap = next(((at, gap) for gap in BREAKS if (at := held.rfind(gap, first, last)) >= 0), (last, ""))
        yield held[place:end]
        place = end + len(gap)


def _of_strings(kind: Any) -> bool:
    """Whether a column of an Arrow type holds strings, in any layout."""
    import pyarrow.types as pt

    kind = kind.value_type if pt.is_dictionary(kind) else kind
    return bool(pt.is_string(kind) or pt.is_large_string(kind) or pt.is_string_view(kind))


def _parquet(path: Path, progress: Progress) -> Iterator[str]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as exc:
        raise BesaError('Reading .parquet files needs pyarrow: pip install "besa-llm[data]".') from exc
    try:
        with pq.ParquetFile(path) as file:
            schema = file.schema_arrow
            if "text" not in schema.names or not _of_strings(schema.field("text").type):
                columns = ", ".join(f"{field.name} ({field.type})" for field in schema) or "none at all"
                raise BesaError(f'{path} has no column "text" of strings, only {columns}: rename or convert one.')
            done = 0
            for batch in file.iter_batches(1024, columns=["text"]):
                yield from (document for document in batch["text"].to_pylist() if document is not None)
                done += len(batch)
                progress(done, file.metadata.num_rows, f"reading {path.name}")
    except (pa.ArrowException, OSError, ValueError) as exc:
        reason = str(exc).partition("\n")[0].rstrip(".")
        raise BesaError(f"{path} is not a readable parquet file ({reason}): write it anew.") from exc
