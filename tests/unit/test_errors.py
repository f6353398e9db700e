import pytest

from ssmcompress import errors


@pytest.mark.parametrize(
    ("kind", "code"),
    [
        (errors.SsmcompressError, 1),
        (errors.InputError, 2),
        (errors.RecipeError, 2),
        (errors.UnsupportedError, 3),
        (errors.BackendError, 4),
        (errors.ResourceError, 4),
        (errors.GateError, 5),
    ],
)
def test_each_error_has_its_exit_code(kind, code):
    error = kind("What is wrong.", hint="What to do.")
    assert isinstance(error, errors.SsmcompressError)
    assert (error.exit_code, error.message, error.hint, str(error)) == (
        code,
        "What is wrong.",
        "What to do.",
        "What is wrong.",
    )


def test_a_recipe_error_is_an_input_error():
    assert issubclass(errors.RecipeError, errors.InputError)
    assert errors.InputError("x").hint == ""
