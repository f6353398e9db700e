"""Files as accidents and ill will leave them: bytes that flip or go, and JSON whose values are of another kind."""

import copy
import random
from typing import Any

JUNK: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 3, 10**9, 10**30, -0.5, 1e308, float("nan"), float("inf")),
    *("", "x", "../../etc/passwd", "/dev/null", "\u0000", "mamba", "a" * 5000),
    *([], {}, [None], [-1, 0, "x"], {"x": {}}, [[[]]]),
)


def damage(raw: bytes, rng: random.Random, header: int) -> bytes:
    """The bytes with a few flipped, overwritten, cut out or doubled, mostly where the structure is."""
    data = bytearray(raw)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(8 + header if rng.random() < 0.8 else len(data)) % max(len(data), 1)
        match rng.randrange(5):
            case 0:
                data[at : at + 1] = bytes([rng.randrange(256)])
            case 1:
                data[at : at + 1] = rng.choice([b"0", b"9", b"-", b'"', b"[", b"}", b",", b"\\", b"\xff"])
            case 2:
                del data[at : at + rng.randint(1, 9)]
            case 3:
                data[at:at] = data[at : at + rng.randint(1, 9)]
            case _:
                del data[rng.randrange(len(data) + 1) :]
        if not data:
            break
    return bytes(data)


def spoil(told: Any, rng: random.Random) -> Any:
    """JSON with one value somewhere that is of another kind, gone, or there twice."""
    spoilt = copy.deepcopy(told)
    inside = [spoilt, *(each for each in _parts(spoilt))]
    place = rng.choice([each for each in inside if isinstance(each, dict | list) and each])
    key = rng.choice(list(place) if isinstance(place, dict) else range(len(place)))
    match rng.randrange(4):
        case 0:
            del place[key]
        case 1 if isinstance(place, dict):
            place[rng.choice(["x", "", "__class__", key + "s"])] = place[key]
        case _:
            place[key] = rng.choice(JUNK)
    return spoilt


def _parts(told: Any) -> list[Any]:
    inner = told.values() if isinstance(told, dict) else told if isinstance(told, list) else ()
    return [part for each in inner for part in (each, *_parts(each))]
