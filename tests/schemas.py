"""Random JSON Schemas within the subset that llguidance supports."""

import random

VALUES = ["a", "b c", 'd"e', "\\", "ä", "你好", "😀", "", 3, -0.5, 1e-7, True, None, [1, "x"], {"k": None}]
NAMES = ["a", "b", "name of", 'quo"te', "größe", "x/y~z", "$ref", ""]
PATTERNS = ["^[a-z]{2,4}$", "^(yes|no)$", "[0-9]", "^\\d{3}-\\d{2}$", "^ä+$", "^.{0,3}$"]
FORMATS = ["date", "time", "uuid", "email", "ipv4"]
DEPTH = 3


def schema_at_random(draw: random.Random) -> dict:
    """Return a random schema. Half of them have definitions, which may refer to each other."""
    if draw.random() < 0.5:
        return _part(draw, 0, [])
    names = ["one", "two"]  # definitions are objects, so that no reference leads only to itself
    definitions = {name: _object(draw, 1, names) for name in names}
    return {"$defs": definitions, **_object(draw, 0, names)}


def _part(draw: random.Random, depth: int, names: list[str]) -> dict:
    makers = [_values, _integer, _number, _string, _plain]
    if depth < DEPTH:
        makers += [_object, _array, _any_of, _object, _array]
        if names and depth:
            makers += [_reference, _reference]
    return draw.choice(makers)(draw, depth, names)


def _values(draw: random.Random, depth: int, names: list[str]) -> dict:
    if draw.random() < 0.2:
        return {"const": draw.choice(VALUES)}
    return {"enum": draw.sample(VALUES, draw.randint(1, 4))}


def _plain(draw: random.Random, depth: int, names: list[str]) -> dict:
    return {"type": draw.choice(["boolean", "null", ["null", "boolean"], ["integer", "null"]])}


def _integer(draw: random.Random, depth: int, names: list[str]) -> dict:
    made = {"type": "integer"}
    if draw.random() < 0.8:
        made[draw.choice(["minimum", "exclusiveMinimum"])] = draw.randint(-500, 20)
        made[draw.choice(["maximum", "exclusiveMaximum"])] = draw.randint(30, 2000)
    if draw.random() < 0.2:
        made["multipleOf"] = draw.choice([1, 2, 5, 7])
    return made


def _number(draw: random.Random, depth: int, names: list[str]) -> dict:
    made = {"type": "number"}
    if draw.random() < 0.8:
        made[draw.choice(["minimum", "exclusiveMinimum"])] = round(draw.uniform(-20, 0), 2)
        made[draw.choice(["maximum", "exclusiveMaximum"])] = round(draw.uniform(0.5, 300), 2)
    return made


def _string(draw: random.Random, depth: int, names: list[str]) -> dict:
    kind = draw.random()
    if kind < 0.3:
        return {"type": "string", "pattern": draw.choice(PATTERNS)}
    if kind < 0.5:
        return {"type": "string", "format": draw.choice(FORMATS)}
    least = draw.randint(0, 3)
    return {"type": "string", "minLength": least, "maxLength": least + draw.randint(0, 5)}


def _array(draw: random.Random, depth: int, names: list[str]) -> dict:
    least = draw.randint(0, 2)
    made = {"type": "array", "items": _part(draw, depth + 1, names)}
    made |= {"minItems": least, "maxItems": least + draw.randint(0, 2)}
    if draw.random() < 0.3:
        made["prefixItems"] = [_part(draw, depth + 1, names) for _ in range(draw.randint(1, 2))]
    return made


def _object(draw: random.Random, depth: int, names: list[str]) -> dict:
    properties = {name: _part(draw, depth + 1, names) for name in draw.sample(NAMES, draw.randint(1, 3))}
    required = [name for name in properties if draw.random() < 0.7]
    others = draw.choice([False, False, True, {"type": "integer"}])
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": others}


def _any_of(draw: random.Random, depth: int, names: list[str]) -> dict:
    return {"anyOf": [_part(draw, depth + 1, names) for _ in range(draw.randint(1, 3))]}


def _reference(draw: random.Random, depth: int, names: list[str]) -> dict:
    return {"$ref": f"#/$defs/{draw.choice(names)}"}
