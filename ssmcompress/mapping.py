"""A YAML text of a user's: its values, and its nodes, which know their lines."""

from typing import Any

import yaml

MOST = 10_000  # values; a few aliases of aliases make billions


def mapping(text: str) -> tuple[yaml.Node | None, Any]:
    """The root node of a YAML text, and its values; YAMLError where it is none, or holds itself or far too much."""
    try:
        tree, values = yaml.compose(text, yaml.SafeLoader), yaml.safe_load(text)
    except RecursionError:
        raise yaml.YAMLError("it is nested too deeply") from None
    except yaml.YAMLError:
        raise
    except Exception as error:  # of any kind, by the value: a date that there is not, a number that is none
        raise yaml.YAMLError(f"it holds a value that is none: {error}") from None
    waiting, count = [tree], 0
    while waiting:
        node, count = waiting.pop(), count + 1
        if count > MOST:
            raise yaml.YAMLError(f"it holds itself, or more than {MOST:,} values")
        waiting += _children(node)
    return tree, values


def twice(node: yaml.Node | None) -> list[str]:
    """A sentence for every key that one mapping holds twice: YAML itself takes the last, silently."""
    found: list[str] = []
    if isinstance(node, yaml.MappingNode):
        names = [key.value for key, _ in node.value]
        found += [
            f"line {key.start_mark.line + 1}: {key.value}: this key is there twice"
            for i, (key, _) in enumerate(node.value)
            if key.value in names[:i]
        ]
    return found + [said for child in _children(node) for said in twice(child)]


def _children(node: yaml.Node | None) -> list[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        return [each for pair in node.value for each in pair]
    return list(node.value) if isinstance(node, yaml.SequenceNode) else []
