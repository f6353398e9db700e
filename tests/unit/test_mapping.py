"""YAML texts of users: read, counted, and keys that are there twice told with their lines."""

import pytest
import yaml

from ssmcompress.mapping import mapping, twice

BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 30)
)


def test_the_values_are_those_of_yaml():
    text = "a: {b: [1, 2.5, null]}\nc: &c yes\nd: *c\n"
    assert mapping(text)[1] == yaml.safe_load(text)
    assert mapping("") == (None, None) and twice(None) == []


@pytest.mark.parametrize("text", [BOMB, "a: &a [*a]", "a: &a {b: *a}", "[" * 100_000, "a: [", "\t"])
def test_what_is_no_yaml_of_a_reasonable_size_is_refused(text):
    with pytest.raises(yaml.YAMLError):
        mapping(text)


def test_keys_that_are_there_twice_are_found_at_any_depth():
    text = "a: 1\nb:\n- c: 1\n  d: {e: 1, e: 2}\n  c: 2\na: 3\n"
    assert [said.partition(": this")[0] for said in twice(mapping(text)[0])] == ["line 6: a", "line 5: c", "line 4: e"]
    assert not twice(mapping("a: {b: 1}\nb: {b: 1}\n")[0])
