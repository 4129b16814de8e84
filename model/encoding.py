"""A picture as a file that says how it was made and that it is synthetic.

Every file carries three things, for three kinds of readers:

    infotext      AUTOMATIC1111, Civitai   PNG text `parameters`; EXIF UserComment in JPEG and WebP
    parameters    diffray, exactly         JSON: PNG text `diffray`, JPEG comments, XMP of WebP
    source type   anybody                  XMP `Iptc4xmpExt:DigitalSourceType`, the IPTC code for media made by a
                                           trained algorithm, or composed with one (image-to-image, inpainting)

The bytes depend on the picture, the request, the model and the versions of Pillow and its codecs; no time, no
place. The size is bounded by that of the prompts; a JPEG's infotext is cut where EXIF ends at 64 kB.
"""

from __future__ import annotations

import io
import json
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any, Literal
from xml.sax.saxutils import escape, unescape

from PIL import Image, PngImagePlugin

from .errors import InvalidRequest
from .infotext import infotext
from .request import ImageRequest

Format = Literal["png", "jpeg", "webp"]
FORMATS: dict[str, Format] = {".png": "png", ".jpg": "jpeg", ".jpeg": "jpeg", ".webp": "webp"}
"""File name endings and the formats they mean."""
MEDIA_TYPES: dict[Format, str] = {"png": "image/png", "jpeg": "image/jpeg", "webp": "image/webp"}

SYNTHETIC = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
COMPOSITE = "http://cv.iptc.org/newscodes/digitalsourcetype/compositeWithTrainedAlgorithmicMedia"

_EXIF_IFD, _USER_COMMENT = 0x8769, 0x9286
_UNICODE = b"UNICODE\0"
"""EXIF's mark for UTF-16 text, here big-endian, as piexif writes it and AUTOMATIC1111 reads it."""
_JPEG_SEGMENT = 65_533
_JPEG_INFOTEXT = 32_000
"""UTF-16 units that fit a JPEG's one EXIF segment, with room for the rest of it."""
_COMMENT = b"diffray "
_XMP = """<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>
<x:xmpmeta xmlns:x="adobe:ns:meta/">
 <rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">
  <rdf:Description rdf:about=""
    xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/"
    xmlns:xmp="http://ns.adobe.com/xap/1.0/"
    xmlns:diffray="urn:diffray:">
   <Iptc4xmpExt:DigitalSourceType>{source}</Iptc4xmpExt:DigitalSourceType>
   <xmp:CreatorTool>diffray</xmp:CreatorTool>{parameters}
  </rdf:Description>
 </rdf:RDF>
</x:xmpmeta>
<?xpacket end="r"?>"""


@dataclass(frozen=True, slots=True)
class Provenance:
    """What a file says about its making; None is what it does not say.

    Attributes:
        infotext: generation parameters in AUTOMATIC1111's form; `parse_infotext` reads it.
        parameters: `ImageRequest.parameters()` and the model, if diffray made the file.
        source_type: the IPTC digital source type, a URI.
    """

    infotext: str | None = None
    parameters: dict[str, Any] | None = None
    source_type: str | None = None


def encode_image(
    image: Image.Image,
    request: ImageRequest,
    *,
    format: Format = "png",
    quality: int = 92,
    model: str | None = None,
    model_checksum: str | None = None,
    adapter_checksums: Mapping[str, str] | None = None,
) -> bytes:
    """The image file. Thread safe; most of its time is spent outside the interpreter's lock.

    Args:
        image: the picture.
        request: what it was made from, as the engine resolved it.
        format: "png", "jpeg" or "webp".
        quality: 1..100, of jpeg and webp; webp at 100 is lossless.
        model: the checkpoint's name.
        model_checksum: SHA-256 of the checkpoint.
        adapter_checksums: SHA-256 of adapters by name (`Adapters.checksums`); those of the request are written.

    Raises:
        ValueError, OSError: the format cannot hold the picture (a JPEG side above 65,535, WebP above 16,383).
    """
    if format not in MEDIA_TYPES:
        raise ValueError(f"format: got {format!r}, allowed is one of {', '.join(MEDIA_TYPES)}")
    used = {choice.name for choice in request.adapters}
    checksums = {name: own for name, own in (adapter_checksums or {}).items() if name in used}
    text = infotext(request, model=model, model_hash=model_checksum, adapter_hashes=checksums)
    text = _clean(text)
    facts = request.parameters() | {"model": model, "model_checksum": model_checksum}
    facts |= {"adapters": facts["adapters"] or None, "adapter_checksums": checksums or None}
    parameters = json.dumps({k: v for k, v in facts.items() if v is not None})
    composite = request.init_image is not None
    sink = io.BytesIO()
    if format == "png":
        chunks = PngImagePlugin.PngInfo()
        chunks.add_text("parameters", text)
        chunks.add_text("diffray", parameters)
        chunks.add_itxt("XML:com.adobe.xmp", _xmp(composite).decode())
        image.save(sink, "PNG", pnginfo=chunks)
    elif format == "jpeg":
        exif = _exif(_shortened(text, _JPEG_INFOTEXT))
        image.save(sink, "JPEG", quality=quality, exif=exif, xmp=_xmp(composite))
        return _with_comments(sink.getvalue(), parameters.encode())
    else:
        image.save(
            sink,
            "WEBP",
            quality=quality,
            lossless=quality == 100,
            exif=_exif(text),
            xmp=_xmp(composite, parameters),
        )
    return sink.getvalue()


def save_image(image: Image.Image, request: ImageRequest, path: Any, **options: Any) -> None:
    """Write a picture to `path` in the format that its ending names; `options` are those of `encode_image`.

    Raises:
        InvalidRequest: an ending that names none.
    """
    data = encode_image(image, request, format=format_of(path), **options)
    with open(path, "wb") as file:
        file.write(data)


def format_of(path: Any) -> Format:
    """The format that a file name's ending names.

    Raises:
        InvalidRequest: it names none.
    """
    ending = PurePath(path).suffix.lower()
    if ending not in FORMATS:
        raise InvalidRequest("path", f"got {str(path)!r}, allowed endings are {', '.join(FORMATS)}")
    return FORMATS[ending]


def read_provenance(data: bytes) -> Provenance:
    """What an image file says about its making, diffray's own or AUTOMATIC1111's. Of a PNG without EXIF
    data the pixels are decoded too (by Pillow, which looks for it behind them).

    Raises:
        ValueError: not a PNG, JPEG or WebP file.
    """
    try:
        with Image.open(io.BytesIO(data), formats=("PNG", "JPEG", "WEBP")) as image:
            info = dict(image.info)
            comments = [body for name, body in getattr(image, "applist", []) if name == "COM"]
            comment = image.getexif().get_ifd(_EXIF_IFD).get(_USER_COMMENT)
            text = getattr(image, "text", {})
    except Exception as error:  # Pillow raises OSError, SyntaxError, struct.error, ...
        raise ValueError(f"not a readable image file: {error}") from error
    xmp = info.get("xmp") or info.get("XML:com.adobe.xmp") or ""
    xmp = xmp.decode("utf-8", "replace") if isinstance(xmp, bytes) else xmp
    kept = (
        text.get("diffray")
        or b"".join(body.removeprefix(_COMMENT) for body in comments if body.startswith(_COMMENT)).decode(
            "ascii", "replace"
        )
        or unescape(_found(r"<diffray:parameters>(.*?)</diffray:parameters>", xmp) or "")
    )
    source = _found(r"Iptc4xmpExt:DigitalSourceType\s*(?:>|=\s*[\"'])\s*([^<\"'\s]+)", xmp)
    return Provenance(text.get("parameters") or _user_comment(comment), _object(kept), source)


def _xmp(composite: bool, parameters: str | None = None) -> bytes:
    """The XMP packet, with parameters where the file has no better place for them."""
    kept = f"\n   <diffray:parameters>{escape(parameters)}</diffray:parameters>" if parameters else ""
    return _XMP.format(source=COMPOSITE if composite else SYNTHETIC, parameters=kept).encode()


def _exif(text: str) -> bytes:
    """EXIF data with a user comment alone. Pillow would give it type BYTE; the standard and piexif want UNDEFINED."""
    comment, long, undefined = _UNICODE + text.encode("utf-16-be"), 4, 7
    head = struct.pack(">2sHI", b"MM", 42, 8)
    first = struct.pack(">HHHIII", 1, _EXIF_IFD, long, 1, 26, 0)
    second = struct.pack(">HHHIII", 1, _USER_COMMENT, undefined, len(comment), 44, 0)
    return b"Exif\0\0" + head + first + second + comment


def _user_comment(value: Any) -> str | None:
    if not isinstance(value, bytes) or not value.startswith(_UNICODE):
        return None
    return value.removeprefix(_UNICODE).decode("utf-16-be", "replace") or None


def _with_comments(jpeg: bytes, data: bytes) -> bytes:
    """A JPEG file with `data` in comment segments, as many as it takes, before the picture itself."""
    room = _JPEG_SEGMENT - len(_COMMENT)
    parts = [_COMMENT + data[at : at + room] for at in range(0, len(data), room)]
    segments = [b"\xff\xfe" + (len(part) + 2).to_bytes(2, "big") + part for part in parts]
    end = 2  # after the start mark and the application segments, which readers want first
    while jpeg[end] == 0xFF and 0xE0 <= jpeg[end + 1] <= 0xEF:
        end += 2 + int.from_bytes(jpeg[end + 2 : end + 4], "big")
    return b"".join([jpeg[:end], *segments, jpeg[end:]])


def _clean(text: str) -> str:
    """Text that every text field can hold: no NUL, no lone surrogates."""
    return text.replace("\0", "\ufffd").encode("utf-8", "replace").decode()


def _shortened(text: str, units: int) -> str:
    """An infotext with at most so many UTF-16 units: the prompts are cut, the last line stays."""
    if len(text.encode("utf-16-be")) <= 2 * units:
        return text
    prompts, _, last = text.rpartition("\n")
    room = 2 * (units - 1) - len(last.encode("utf-16-be")) - 2
    return prompts.encode("utf-16-be")[: max(room, 0)].decode("utf-16-be", "ignore") + "…\n" + last


def _found(pattern: str, text: str) -> str | None:
    match = re.search(pattern, text, re.DOTALL)
    return match[1] if match else None


def _object(text: str) -> dict[str, Any] | None:
    try:
        value = json.loads(text)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None
