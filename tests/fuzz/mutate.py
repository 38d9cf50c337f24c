"""Damage to files: each function takes the bytes of a file and a generator, and gives other bytes.

The same generator state gives the same bytes. `donor` is another file, for splices.
"""

import json
import math
import random
import re
import struct
import zlib
from collections.abc import Callable

__all__ = [
    "Mutator",
    "damage_bytes",
    "damage_json",
    "damage_lines",
    "damage_npy",
    "damage_png",
    "damage_safetensors",
]

Mutator = Callable[[bytes, random.Random, bytes], bytes]


class Raw(str):
    """Text that stands in JSON as it is."""


class Again(str):
    """A key that stands in a mapping beside the same one."""

    __hash__ = object.__hash__

    def __eq__(self, other: object) -> bool:
        return self is other


INTEGERS = (0, 1, -1, 2, 3, 7, 127, 255, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**62, 2**63 - 1)
NUMBERS = (*INTEGERS, -(2**63), 2**64, 10**9, 10**12, 10**40, 0.5, -0.5, 1e-300, 1e30, 1e308)
LITERALS = ("NaN", "Infinity", "-Infinity", "1e999", "1" + "0" * 5000, "-0", "0x10", "[" * 70 + "]" * 70)
DEEP = 100_000
STRINGS = (
    "",
    " ",
    "x",
    "\0",
    "\ud800",
    "..",
    "../secret.safetensors",
    "/etc/passwd",
    "a/b",
    "é\u2028雨",
    "x" * 300,
    "%s{0}{",
    "nan",
    "1",
    "float32",
    "F64",
    "bfloat16",
    "http://127.0.0.1:9/a",
)
OTHERS = (None, True, False, [], {}, [[]], [None], {"": 0}, {"a": {"b": 1}}, [1, 2, 3], ["a", 1, None])
TEXTS = (
    "\0",
    "\ufeff",
    "\u2028",
    "\x85",
    "\v",
    "\r",
    "\n\n",
    '"',
    ",",
    "\\",
    "{",
    "]",
    "\t",
    "%",
    "雨",
    "é",
    "\U0001f600",
    "-1",
    "99999999999999999999",
    "x" * 200_000,
)


def dumps(value: object) -> str:
    """JSON of a value that may hold `Raw` and `Again`."""
    if isinstance(value, Raw):
        return str(value)
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(str(key))}: {dumps(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(dumps, value)) + "]"
    return json.dumps(value)


def damage_bytes(data: bytes, rng: random.Random, donor: bytes = b"") -> bytes:
    """One to three of: flipped bits, cuts, insertions, splices, and numbers written over what is there."""
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        data = rng.choice(_BYTES)(bytearray(data), rng, donor)
    return bytes(data)


def _flip(data: bytearray, rng: random.Random, donor: bytes) -> bytearray:
    for _ in range(rng.choice((1, 1, 2, 8, 64)) if data else 0):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return data


def _flip_early(data: bytearray, rng: random.Random, donor: bytes) -> bytearray:
    """In the header, where it counts."""
    for _ in range(rng.choice((1, 2, 4)) if data else 0):
        data[rng.randrange(min(len(data), 200))] = rng.randrange(256)
    return data


def _truncate(data: bytearray, rng: random.Random, donor: bytes) -> bytearray:
    return data[: rng.randrange(len(data) + 1)]


def _splice(data: bytearray, rng: random.Random, donor: bytes) -> bytearray:
    donor = donor or bytes(data)
    return data[: rng.randrange(len(data) + 1)] + donor[rng.randrange(len(donor) + 1) :]


def _insert(data: bytearray, rng: random.Random, donor: bytes) -> bytearray:
    at = rng.randrange(len(data) + 1)
    return data[:at] + rng.randbytes(rng.choice((1, 2, 7, 300))) + data[at:]


def _remove(data: bytearray, rng: random.Random, donor: bytes) -> bytearray:
    at = rng.randrange(len(data) + 1)
    return data[:at] + data[at + rng.choice((1, 4, 60, 1000)) :]


def _repeat(data: bytearray, rng: random.Random, donor: bytes) -> bytearray:
    at = rng.randrange(len(data) + 1)
    piece = data[at : at + rng.choice((1, 16, 500))]
    return data[:at] + piece * rng.choice((2, 50)) + data[at:]


def _zero(data: bytearray, rng: random.Random, donor: bytes) -> bytearray:
    at, count = rng.randrange(len(data) + 1), rng.choice((4, 64, 1000))
    fill = rng.choice((b"\0", b"\xff"))
    return data[:at] + fill * len(data[at : at + count]) + data[at + count :]


def _number(data: bytearray, rng: random.Random, donor: bytes) -> bytearray:
    size = rng.choice((1, 2, 4, 8))
    at = rng.randrange(max(1, len(data) - size))
    value = rng.choice(INTEGERS) % 2 ** (8 * size)
    return data[:at] + value.to_bytes(size, rng.choice(("little", "big"))) + data[at + size :]


_BYTES = (_flip, _flip, _flip_early, _truncate, _splice, _insert, _remove, _repeat, _zero, _number, _number)


def damage_json(data: bytes, rng: random.Random, donor: bytes = b"") -> bytes:
    """Mostly another value of JSON: numbers, types and keys that should not be; sometimes other bytes."""
    if rng.random() < 0.2 or data.lstrip()[:1] not in (b"{", b"["):
        return damage_bytes(data, rng, donor)
    if rng.random() < 0.02:
        return b"[" * DEEP + b"]" * DEEP
    value = json.loads(data)
    for _ in range(rng.choice((1, 1, 2))):
        value = damage_value(value, rng)
    return dumps(value).encode("utf-8", "surrogatepass")


def damage_value(value: object, rng: random.Random) -> object:
    """A value of JSON with one change somewhere in it."""
    inside = _containers(value)
    if not inside or rng.random() < 0.03:
        return _another(value, rng)
    container = rng.choice(inside)
    if isinstance(container, dict):
        _change_mapping(container, rng)
    else:
        _change_list(container, rng)
    return value


def _containers(value: object) -> list:
    """The mappings and lists within a value that are not empty."""
    if not isinstance(value, dict | list) or not value:
        return []
    items = value.values() if isinstance(value, dict) else value
    return [value, *(inner for item in items for inner in _containers(item))]


def _change_mapping(mapping: dict, rng: random.Random) -> None:
    key = rng.choice(list(mapping))
    kind = rng.random()
    if kind < 0.65:
        mapping[key] = _another(mapping[key], rng)
    elif kind < 0.8:
        del mapping[key]
    elif kind < 0.9:
        mapping[rng.choice((key + "s", key.upper(), *STRINGS))] = mapping.pop(key)
    elif kind < 0.95:
        mapping[key] = mapping[rng.choice(list(mapping))]
    else:
        mapping[Again(key)] = _another(mapping[key], rng)


def _change_list(values: list, rng: random.Random) -> None:
    at = rng.randrange(len(values))
    kind = rng.random()
    if kind < 0.6:
        values[at] = _another(values[at], rng)
    elif kind < 0.75:
        del values[at]
    elif kind < 0.9:
        values.insert(at, values[at])
    else:
        values[:] = values[:1] * rng.choice((2, 17, 1000))


def _another(value: object, rng: random.Random) -> object:
    """In the place of a value: one of its type, or of another."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if number and rng.random() < 0.6:
        return rng.choice((*NUMBERS, value + 1, -value, value * 1000, float(value), value / 3))
    if isinstance(value, str) and rng.random() < 0.5:
        return rng.choice((*STRINGS, value + "x", value.upper(), value[:-1], value * 40))
    kind = rng.random()
    if kind < 0.25:
        return rng.choice(NUMBERS)
    if kind < 0.4:
        return Raw(rng.choice(LITERALS))
    if kind < 0.6:
        return rng.choice(STRINGS)
    if kind < 0.8:
        return json.loads(json.dumps(rng.choice(OTHERS)))
    return rng.choice(([value], {"a": value}, str(value), [value] * 3))


def damage_lines(data: bytes, rng: random.Random, donor: bytes = b"") -> bytes:
    """Text of lines (captions, prompts, CSV, JSON lines): other bytes, characters, lines or JSON."""
    kind = rng.random()
    if kind < 0.3:
        return damage_bytes(data, rng, donor)
    if kind < 0.4:
        return data.decode("utf-8", "replace").encode(rng.choice(("utf-16", "latin-1", "utf-32")), "replace")
    lines = data.split(b"\n")
    at = rng.randrange(len(lines))
    if kind < 0.6 and lines[at][:1] in (b"{", b"["):
        lines[at] = damage_json(lines[at], rng)
    elif kind < 0.8:
        line = bytearray(lines[at])
        place = rng.randrange(len(line) + 1)
        lines[at] = bytes(line[:place] + rng.choice(TEXTS).encode() + line[place:])
    elif kind < 0.9:
        lines[at : at + 1] = [lines[at]] * rng.choice((0, 2, 300))
    else:
        rng.shuffle(lines)
    return b"\n".join(lines)


def damage_safetensors(data: bytes, rng: random.Random, donor: bytes = b"") -> bytes:
    """A header that is other JSON, with its length put right; or other bytes."""
    if rng.random() < 0.35:
        return damage_bytes(data, rng, donor)
    length = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + length]
    header = _fitting(json.loads(header), rng) if rng.random() < 0.4 else damage_json(header, rng)
    return struct.pack("<Q", len(header)) + header + data[8 + length :]


def _fitting(header: dict, rng: random.Random) -> bytes:
    """A header that is as good as the one before, of other tensors: names, types and shapes are changed."""
    names = sorted(header.keys() - {"__metadata__"})
    name = rng.choice(names)
    entry, kind = header[name], rng.random()
    if kind < 0.3:
        same = next(types for types in _SAME_SIZE if entry["dtype"] in types)
        entry["dtype"] = rng.choice(same)
    elif kind < 0.7:
        count = math.prod(entry["shape"])
        entry["shape"] = rng.choice(
            ([count], [1, count], [count, 1, 1], entry["shape"][::-1], [1] * 40 + [count])
        )
    elif kind < 0.9:
        other = rng.choice((*names, name + "x", name.upper(), "", "x" * 5000, "a.alpha", "../b", "\u2028"))
        header[name], header[other] = header.get(other, entry), entry
        if rng.random() < 0.5:
            del header[name]
    else:
        header["__metadata__"] = {
            "format": rng.choice(STRINGS[:3]),
            "vidgen": rng.choice(("{", "[]", "1e999", "{}")),
        }
    return json.dumps(header).encode()


_SAME_SIZE = (
    ("F32", "I32", "U32"),
    ("F16", "BF16", "I16", "U16"),
    ("F64", "I64", "U64"),
    ("F8_E4M3", "F8_E5M2", "I8", "U8", "BOOL"),
)


def damage_png(data: bytes, rng: random.Random, donor: bytes = b"") -> bytes:
    """Other bytes in one chunk, whose checksum is put right; or other bytes anywhere."""
    if rng.random() < 0.3:
        return damage_bytes(data, rng, donor)
    chunks, at = [], 8
    while at < len(data):
        length = int.from_bytes(data[at : at + 4], "big")
        chunks.append((data[at + 4 : at + 8], data[at + 8 : at + 8 + length]))
        at += length + 12
    chosen = rng.randrange(len(chunks))
    kind, inside = chunks[chosen]
    chunks[chosen] = (kind, damage_bytes(inside, rng))
    if rng.random() < 0.2:
        chunks.insert(chosen, chunks[rng.randrange(len(chunks))])
    packed = b"".join(
        len(inside).to_bytes(4, "big") + kind + inside + zlib.crc32(kind + inside).to_bytes(4, "big")
        for kind, inside in chunks
    )
    return data[:8] + packed


def damage_npy(data: bytes, rng: random.Random, donor: bytes = b"") -> bytes:
    """Another header of the same length; or other bytes."""
    if rng.random() < 0.4:
        return damage_bytes(data, rng, donor)
    length = int.from_bytes(data[8:10], "little")
    header = data[10 : 10 + length].decode("latin-1")
    changes = (
        (r"'<i4'", rng.choice(("'|O'", "'<f8'", "'<i8'", "'|V4'", "'<U9'", "[('a','<i4')]", "'x'"))),
        (
            r"\([\d, ]+\)",
            rng.choice(("(2**31, 3)", "(99999999999, 3)", "(-1, 3)", "()", "(3,)", "(1, 1, 3)")),
        ),
        (r"False", rng.choice(("True", "None", "(" * 60 + "1" + ")" * 60))),
    )
    pattern, text = rng.choice(changes)
    header = re.sub(pattern, text, header, count=1)
    header = header.rstrip().ljust(length - 1)[: length - 1] + "\n"
    return data[:10] + header.encode() + data[10 + length :]
