"""Only names that nobody chose are replaced."""

from prefect.utilities.names import generate_slug

from tasks.names import is_generated


def test_generated_names_are_recognised_and_chosen_ones_kept():
    assert all(is_generated(generate_slug(2)) for _ in range(200))
    assert is_generated("Handcrafted-Muskox")  # by the form in the browser
    assert not is_generated("Generic-Baseline")
    assert not is_generated("my-run")
    assert not is_generated("fedit seed 0")
    assert not is_generated("nightly")
