"""Malformed safetensors files: what is in them, and the words that their refusal must hold."""

import json


def pack(header: object, data: bytes = b"") -> bytes:
    """A file from a header (JSON text, bytes, or a value to encode) and its data."""
    if not isinstance(header, bytes):
        header = (header if isinstance(header, str) else json.dumps(header)).encode()
    return len(header).to_bytes(8, "little") + header + data


def entry(dtype: object, shape: object, begin: object, end: object, **more: object) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end], **more}


GOOD = {
    "layers.0.w": entry("F32", [2, 3], 0, 24),
    "layers.0.s": entry("F8_E8M0", [5], 24, 29),
}
DATA = bytes(range(29))
W = "'layers.0.w'"
S = "'layers.0.s'"


def with_w(**changes: object) -> dict:
    return {"layers.0.w": GOOD["layers.0.w"] | changes, "layers.0.s": GOOD["layers.0.s"]}


def without_w(key: str) -> dict:
    fields = {name: value for name, value in GOOD["layers.0.w"].items() if name != key}
    return GOOD | {"layers.0.w": fields}


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 4999999999\n"

# case -> (bytes of the file, words that the message must hold)
FILE_CASES: dict[str, tuple[bytes, list[str]]] = {
    "empty": (b"", ["is empty", "download it again"]),
    "one byte": (b"\x08", ["only 1 bytes", "download it again"]),
    "seven bytes": (b"\x02\0\0\0\0\0\0", ["only 7 bytes", "expected at least 8"]),
    "eight bytes": (b"\x02" + b"\0" * 7, ["truncated", "at least 10", "found 8"]),
    "header length past the end": (
        (1000).to_bytes(8, "little") + b"{}",
        ["truncated", "at least 1008", "found 10", "download it again"],
    ),
    "header length over the cap": (
        (100_000_001).to_bytes(8, "little") + b"{}",
        ["100000001", "at most 100000000"],
    ),
    "header length 2^63": ((2**63).to_bytes(8, "little") + b"{}", [str(2**63)]),
    "header length 2^64 - 1": (b"\xff" * 8 + b"{}", [str(2**64 - 1)]),
    "header length 0": (pack(b""), ["expected '{'"]),
    "git-LFS pointer": (LFS, ["git-LFS pointer", "download the real files"]),
    "short git-LFS pointer": (b"version https://git-lfs.github.com", ["git-LFS pointer"]),
    "HTML page": (b"<!DOCTYPE html><html>not found</html>", ["HTML", "download the real file"]),
    "JSON error page": (b'{"error": "not found", "code": 404}', ["JSON"]),
    "zip of a pickle": (b"PK\x03\x04\x14\0\x08\x08" + b"\0" * 40, ["zip archive"]),
    "pickle": (b"\x80\x02}q\x00(X\x01\x00\x00\x00a", ["pickle"]),
    "GGUF": (b"GGUF\x03\0\0\0" + b"\0" * 40, ["GGUF"]),
    "random text": (b"hello, this is no checkpoint", ["claims a header"]),
    "header is no JSON": (pack(b"{not json at all}"), ["not JSON"]),
    "header never ends": (pack(b"{not json at all"), ["brackets"]),
    "header is cut": (pack(b'{"a": {"dtype": "F32", '), ["brackets"]),
    "header is no UTF-8": (pack(b'{"\xff\xfe": 1}'), ["not UTF-8"]),
    "header is UTF-16": (pack('{"a": 1}'.encode("utf-16-le")), ["not"]),
    "header starts with a space": (pack(" " + json.dumps(GOOD), DATA), ["expected '{'"]),
    "header is an array": (pack(b"[]"), ["expected '{'"]),
    "header is null": (pack(b"null"), ["expected '{'"]),
    "text after the header object": (pack(json.dumps(GOOD) + "x", DATA), ["not JSON"]),
    "header holds NaN": (pack('{"a": NaN}'), ["NaN"]),
    "no tensors": (pack({}), ["0 tensors"]),
    "only metadata": (pack({"__metadata__": {"format": "pt"}}), ["0 tensors"]),
    "deep nesting": (pack(b'{"a":' * 50_000 + b"1" + b"}" * 50_000), ["nested deeper than 3"]),
    "deep nesting, never closed": (pack(b'{"a":' + b"[" * 1_000_000), ["deeper than 3"]),
    "nesting of depth 4": (pack('{"a": {"shape": [[1]]}}'), ["nested deeper than 3"]),
    "truncated data": (pack(GOOD, DATA[:-1]), ["truncated", S, "download it again"]),
    "no data": (pack(GOOD), ["truncated", "expected", "found"]),
    "trailing byte": (pack(GOOD, DATA + b"\0"), ["1 trailing bytes", "expected", "found"]),
    "hole at the start": (
        pack({"layers.0.s": entry("F8_E8M0", [5], 24, 29)}, DATA),
        [S, "24 bytes before it belong to no tensor"],
    ),
    "hole in the middle": (
        pack(GOOD | {"layers.0.s": entry("F8_E8M0", [4], 25, 29)}, DATA),
        [S, "1 bytes before it belong to no tensor"],
    ),
    "overlap": (
        pack(GOOD | {"layers.0.s": entry("F8_E8M0", [5], 23, 28)}, DATA[:-1]),
        [S, f"overlaps {W} by 1 bytes"],
    ),
    "contained": (
        pack(GOOD | {"layers.0.s": entry("F8_E8M0", [5], 8, 13)}, DATA[:24]),
        [S, f"overlaps {W}"],
    ),
    "alias": (
        pack(GOOD | {"layers.0.s": entry("I8", [24], 0, 24)}, DATA[:24]),
        [S, f"the same bytes as {W}"],
    ),
    "zero-size tensor sharing an offset": (
        pack(GOOD | {"layers.0.s": entry("F8_E8M0", [0, 5], 24, 24)}, DATA[:24]),
        [S, "shape [0, 5] is empty"],
    ),
    "claimed tensor of 2^60 bytes": (
        pack(GOOD | {"layers.0.s": entry("U8", [2**60], 24, 24 + 2**60)}, DATA),
        ["truncated", str(2**60 + 24 + 188), S],
    ),
}

HEADER_CASES: dict[str, tuple[object, list[str]]] = {
    "tensor twice": (
        json.dumps(GOOD)[:-1] + ', "layers.0.w": ' + json.dumps(GOOD["layers.0.w"]) + "}",
        [W, "occurs twice"],
    ),
    "metadata twice": (
        '{"__metadata__": {}, "__metadata__": {}, ' + json.dumps(GOOD)[1:],
        ["'__metadata__' occurs twice"],
    ),
    "dtype twice": (
        json.dumps(GOOD).replace('"dtype": "F32"', '"dtype": "I32", "dtype": "F32"'),
        [W, "'dtype' occurs twice"],
    ),
    "metadata key twice": (
        '{"__metadata__": {"format": "pt", "format": "tf"}, ' + json.dumps(GOOD)[1:],
        ["'format' occurs twice"],
    ),
    "metadata value is a number": (GOOD | {"__metadata__": {"step": 3}}, ["'step' is 3"]),
    "metadata value is null": (GOOD | {"__metadata__": {"step": None}}, ["'step' is None"]),
    "metadata is a list": (GOOD | {"__metadata__": ["pt"]}, ["__metadata__ is ['pt']"]),
    "metadata is null": (GOOD | {"__metadata__": None}, ["__metadata__ is None"]),
    "entry is a list": (GOOD | {"layers.0.w": [1]}, [W, "expected an object"]),
    "entry is null": (GOOD | {"layers.0.w": None}, [W, "expected an object"]),
    "unknown dtype": (with_w(dtype="BF17"), [W, "'BF17' is unknown"]),
    "dtype in lower case": (with_w(dtype="f32"), [W, "'f32' is unknown"]),
    "dtype F4": (with_w(dtype="F4", shape=[48]), [W, "'F4' is not supported"]),
    "dtype is a number": (with_w(dtype=7), [W, "dtype 7 is unknown"]),
    "dtype is a list": (with_w(dtype=["F32"]), [W, "dtype ['F32'] is unknown"]),
    "dtype missing": (without_w("dtype"), [W, "lacks dtype"]),
    "shape missing": (without_w("shape"), [W, "lacks shape"]),
    "offsets missing": (without_w("data_offsets"), [W, "lacks data_offsets"]),
    "everything missing": (GOOD | {"layers.0.w": {}}, [W, "lacks data_offsets, dtype, shape"]),
    "extra key": (with_w(strides=[3, 1]), [W, "unknown keys ['strides']"]),
    "shape too large for its bytes": (with_w(shape=[2, 4]), [W, "takes 32 bytes", "hold 24"]),
    "shape too small for its bytes": (with_w(shape=[5]), [W, "takes 20 bytes", "hold 24"]),
    "dtype wider than its bytes": (with_w(dtype="F64"), [W, "takes 48 bytes", "hold 24"]),
    "scalar shape of 24 bytes": (with_w(shape=[]), [W, "takes 4 bytes", "hold 24"]),
    "negative dim": (with_w(shape=[-2, -3]), [W, "[-2, -3]", "integers in [0, 2^63)"]),
    "float dim": (with_w(shape=[2.0, 3]), [W, "[2.0, 3]"]),
    "boolean dim": (with_w(shape=[True, 6]), [W, "[True, 6]"]),
    "string dim": (with_w(shape=["2", 3]), [W, "['2', 3]"]),
    "null dim": (with_w(shape=[None]), [W, "[None]"]),
    "shape is a number": (with_w(shape=6), [W, "shape 6"]),
    "shape is an object": (with_w(shape={"0": 6}), [W, "shape {'0': 6}"]),
    "dim 2^63": (with_w(shape=[2**63]), [W, str(2**63)]),
    "dim of 4000 digits": (
        json.dumps(with_w(shape=["N"])).replace('"N"', "9" * 4000),
        [W, "integers in [0, 2^63)"],
    ),
    "product overflow to the right size": (
        # 2^32 * 2^32 * 6 * 4 bytes = 0 modulo 2^64, plus nothing: a wrapping product matches 0
        with_w(shape=[2**32, 2**32, 6], data_offsets=[0, 0]),
        [W, "overflows"],
    ),
    "product of eight huge dims": (with_w(shape=[2**62] * 8), [W, "overflows"]),
    "nine dims": (with_w(shape=[1] * 7 + [2, 3]), [W, "at most 8"]),
    "zero dim": (with_w(shape=[0], data_offsets=[0, 0]), [W, "shape [0] is empty"]),
    "one offset": (with_w(data_offsets=[0]), [W, "data_offsets [0]"]),
    "three offsets": (with_w(data_offsets=[0, 24, 24]), [W, "data_offsets [0, 24, 24]"]),
    "offsets are a number": (with_w(data_offsets=24), [W, "data_offsets 24"]),
    "negative offset": (with_w(data_offsets=[-24, 0]), [W, "data_offsets [-24, 0]"]),
    "float offset": (with_w(data_offsets=[0.0, 24]), [W, "data_offsets [0.0, 24]"]),
    "boolean offset": (with_w(data_offsets=[False, 24]), [W, "data_offsets [False, 24]"]),
    "offset 2^64": (with_w(data_offsets=[2**64, 2**64 + 24]), [W, str(2**64)]),
    "begin after end": (with_w(data_offsets=[24, 0]), [W, "begin after their end"]),
} | {
    f"name {name!r}": (
        {name: GOOD["layers.0.w"], "layers.0.s": GOOD["layers.0.s"]},
        [ascii(name)[1:20], "the name is not words"],
    )
    for name in (
        "",
        " layers.0.w",
        "layers.0.w ",
        "../../etc/passwd",
        "layers/0/w",
        "/layers",
        "layers..w",
        ".layers",
        "layers.",
        "layers.\x00w",
        "layers.0.w\n",
        "lâyers",
        "\ud800",
        "x" * 513,
        "C:\\w",
    )
}
