"""XML in and out: the bodies that S3 requests and answers have."""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterable
from typing import Any
from urllib.parse import quote
from xml.parsers import expat

from cloud_jobs.s3_errors import S3Error, xml_text

NAMESPACE = "http://s3.amazonaws.com/doc/2006-03-01/"
MAX_DOCUMENT_BYTES = 8 * 1024 * 1024
"""10,000 parts with every checksum, or 1,000 keys of 1,024 escaped bytes, are well below it."""

MAX_DEPTH = 8
MAX_ELEMENTS = 100_000


class Element:
    """An element of a request's document."""

    __slots__ = ("children", "name", "text")

    def __init__(self, name: str) -> None:
        self.name = name
        self.text = ""
        self.children: list[Element] = []

    def all(self, name: str) -> list[Element]:
        """The children of that name."""
        return [child for child in self.children if child.name == name]

    def value(self, name: str) -> str | None:
        """The text of the first child of that name; None without one."""
        return next((child.text for child in self.children if child.name == name), None)

    def required(self, name: str) -> str:
        """The text of a child that must be there."""
        value = self.value(name)
        if value is None:
            raise S3Error("MalformedXML", f"{self.name} lacks {name}.")
        return value


class _Reader:
    """Builds elements from expat's events. Declarations, and so entities, are refused."""

    def __init__(self) -> None:
        self.root: Element | None = None
        self._open: list[Element] = []
        self._count = 0

    def start(self, name: str, _attributes: object) -> None:
        element = Element(name.rpartition(":")[2])
        self._count += 1
        if len(self._open) >= MAX_DEPTH or self._count > MAX_ELEMENTS:
            raise S3Error("MalformedXML")
        if self._open:
            self._open[-1].children.append(element)
        else:
            self.root = element
        self._open.append(element)

    def end(self, _name: str) -> None:
        self._open.pop()

    def text(self, data: str) -> None:
        if self._open:
            self._open[-1].text += data

    def declaration(self, *_arguments: Any) -> None:
        raise S3Error("MalformedXML", "Document type declarations are not accepted.")


def read_document(data: bytes, *names: str) -> Element:
    """The root element of a request's document, which must have one of these names."""
    reader = _Reader()
    parser = expat.ParserCreate()
    parser.buffer_text = True
    parser.StartElementHandler = reader.start
    parser.EndElementHandler = reader.end
    parser.CharacterDataHandler = reader.text
    parser.StartDoctypeDeclHandler = reader.declaration
    parser.EntityDeclHandler = reader.declaration
    try:
        parser.Parse(data, True)
    except (expat.ExpatError, ValueError, LookupError) as error:
        raise S3Error("MalformedXML") from error
    if reader.root is None or reader.root.name not in names:
        raise S3Error("MalformedXML")
    return reader.root


def document(root: str, *parts: str) -> bytes:
    """An answer's document; the parts are XML already."""
    return (
        f'<?xml version="1.0" encoding="UTF-8"?>\n<{root} xmlns="{NAMESPACE}">'
        f"{''.join(parts)}</{root}>"
    ).encode()


def tag(name: str, value: object) -> str:
    """One element with text."""
    return f"<{name}>{xml_text(str(value))}</{name}>"


def optional(name: str, value: object) -> str:
    """One element with text; nothing where there is no value."""
    return tag(name, value) if value not in (None, "") else ""


def joined(parts: Iterable[str]) -> str:
    """Several elements."""
    return "".join(parts)


def iso_time(milliseconds: int) -> str:
    """A moment as S3's documents write it."""
    moment = dt.datetime.fromtimestamp(milliseconds / 1000, dt.timezone.utc)
    return f"{moment:%Y-%m-%dT%H:%M:%S}.{milliseconds % 1000:03}Z"


def key_text(key: bytes, encoded: bool) -> str:
    """A key in a listing, percent-encoded where encoding-type=url was asked for."""
    return quote(key, safe="/-_.~*") if encoded else key.decode("utf-8", "replace")
