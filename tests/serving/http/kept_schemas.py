"""Schemas that an answer can keep, of every kind that is supported, by a name each."""

SHORT = {"type": "string", "maxLength": 4}


def closed(**properties):
    """An object of these properties, all of them needed, and no others."""
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def integer(least, most):
    return {"type": "integer", "minimum": least, "maximum": most}


TREE = {"type": "object", "additionalProperties": False, "required": ["v"], "properties": {
    "v": {"type": "boolean"},
    "below": {"type": "array", "maxItems": 2, "items": {"$ref": "#/$defs/tree"}}}}  # fmt: skip
ADDRESS = closed(street=SHORT, zip={"type": "string", "pattern": "^\\d{5}$"})

SCHEMAS = {
    "boolean": {"type": "boolean"},
    "null": {"type": "null"},
    "several types": {"type": ["boolean", "null", "integer"], "minimum": 0, "maximum": 9},
    "enum of kinds": {"enum": ["wörld", "你好", 3, None, True, [1], {"a": None}]},
    "enum with escapes": {"enum": ['"', "\\", "\n", "\t", "/", " "]},
    "enum of one type": {"type": "string", "enum": ["a", "b"]},
    "const": {"const": {"a": [1, "🙂"]}},
    "const of a number": {"const": 1.5},
    "short string": SHORT,
    "string with both lengths": {"type": "string", "minLength": 2, "maxLength": 3},
    "empty string": {"type": "string", "maxLength": 0},
    "pattern": {"type": "string", "pattern": "^[a-c]{2}-\\d$"},
    "pattern without anchors": {"type": "string", "pattern": "b", "maxLength": 6},
    "pattern of alternatives": {"type": "string", "pattern": "^(yes|no|(may){1,2}be)$"},
    "pattern of unicode": {"type": "string", "pattern": "^[ä-ü]{1,3}🙂?$"},
    "pattern of escapes": {"type": "string", "pattern": '^["\\\\]{1,2}$'},
    "date": {"type": "string", "format": "date"},
    "time": {"type": "string", "format": "time"},
    "uuid": {"type": "string", "format": "uuid"},
    "ipv4": {"type": "string", "format": "ipv4"},
    "email": {"type": "string", "format": "email"},
    "bounded integer": integer(-3, 12),
    "positive integer": {"type": "integer", "exclusiveMinimum": 0, "exclusiveMaximum": 4},
    "negative integer": {"type": "integer", "minimum": -1200, "maximum": -1100},
    "bounded number": {"type": "number", "minimum": 0, "maximum": 9},
    "number between others": {"type": "number", "exclusiveMinimum": -0.25, "exclusiveMaximum": 0.5},
    "multiples": {"type": "integer", "multipleOf": 7, "minimum": 0, "maximum": 100},
    "any of": {"anyOf": [{"type": "null"}, integer(1, 9)]},
    "any of objects": {"anyOf": [closed(kind={"const": "a"}, a=integer(0, 1)),
                                 closed(kind={"const": "b"}, b={"type": "null"})]},
    "one of": {"oneOf": [{"type": "boolean"}, {"type": "null"}]},
    "one of constants": {"oneOf": [{"const": "x"}, {"const": "y"}, {"const": "xy"}]},
    "all of": {"allOf": [{"required": ["a"]}, {"type": "object", "properties": {"a": {"enum": [1]}},
                                               "additionalProperties": False}]},
    "all of bounds": {"allOf": [{"type": "integer", "minimum": 3}, {"type": "integer", "maximum": 5}]},
    "array of booleans": {"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 3},
    "empty array": {"type": "array", "maxItems": 0},
    "tuple": {"type": "array", "prefixItems": [{"type": "null"}, SHORT], "items": False, "minItems": 2},
    "tuple and more": {"type": "array", "prefixItems": [{"const": 1}], "items": {"const": 2}, "minItems": 2,
                       "maxItems": 4},
    "nested arrays": {"type": "array", "maxItems": 2, "items": {"type": "array", "maxItems": 1,
                                                                "items": {"const": 1}}},
    "empty object": closed(),
    "object": closed(a={"type": "boolean"}, b={"type": "null"}),
    "names of unicode": closed(**{"名": SHORT, "ключ ☃": {"type": "null"}, '"\\': {"const": 1}}),
    "optional properties": {"type": "object", "additionalProperties": False, "properties": {
        "a": {"type": "null"}, "b": {"type": "boolean"}, "c": integer(0, 9)}},
    "optional among needed": {
        "type": "object", "required": ["b"], "additionalProperties": False,
        "properties": {"a": {"type": "null"}, "b": {"type": "boolean"}, "c": integer(0, 9)}},
    "needed without a schema": {"type": "object", "required": ["z"], "additionalProperties": integer(0, 1),
                                "maxProperties": 1},
    "additional properties": {"type": "object", "properties": {"a": {"const": 1}}, "required": ["a"],
                              "additionalProperties": {"type": "boolean"}},
    "properties by pattern": {"type": "object", "patternProperties": {"^x\\d$": integer(0, 3)},
                              "additionalProperties": False},
    "nested objects": closed(a=closed(b=closed(c=closed(d={"enum": [1, 2]})))),
    "array of objects": {"type": "array", "minItems": 1, "maxItems": 2, "items": closed(id=integer(0, 99))},
    "reference": {"$defs": {"one": integer(0, 1)}, "type": "array", "maxItems": 3,
                  "items": {"$ref": "#/$defs/one"}},
    "reference of a reference": {"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"type": "boolean"}},
                                 **closed(x={"$ref": "#/$defs/a"}, y={"$ref": "#/$defs/b"})},
    "old definitions": {"definitions": {"t": {"enum": ["p"]}}, **closed(k={"$ref": "#/definitions/t"})},
    "reference to a property": closed(a=integer(0, 5), b={"$ref": "#/properties/a"}),
    "tree": {"$defs": {"tree": TREE}, "$ref": "#/$defs/tree"},
    "list by recursion": {"$defs": {"list": {"anyOf": [{"type": "null"}, closed(
        head=integer(0, 1), tail={"$ref": "#/$defs/list"})]}}, "$ref": "#/$defs/list"},
    "two that need each other": {
        "$defs": {"a": {"anyOf": [{"const": 0}, closed(b={"$ref": "#/$defs/b"})]},
                  "b": {"anyOf": [{"const": 1}, closed(a={"$ref": "#/$defs/a"})]}},
        **closed(start={"$ref": "#/$defs/a"})},
    "recursion of the root": {"type": "object", "additionalProperties": False, "properties": {
        "next": {"$ref": "#"}}},
    "a whole record": {
        "$schema": "https://json-schema.org/draft/2020-12/schema", "title": "Order", "description": "x",
        "$defs": {"address": ADDRESS},
        **closed(id={"type": "string", "format": "uuid"}, when={"type": "string", "format": "date"},
                 to={"$ref": "#/$defs/address"}, state={"enum": ["open", "paid"]},
                 items={"type": "array", "minItems": 1, "maxItems": 2, "items": closed(
                     sku={"type": "string", "pattern": "^[A-Z]{2}\\d{2}$"}, count=integer(1, 20),
                     price={"type": "number", "minimum": 0, "maximum": 10})},
                 note={"anyOf": [SHORT, {"type": "null"}]})},
}  # fmt: skip
