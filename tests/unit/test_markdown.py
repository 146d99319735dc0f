"""Tables in Markdown."""

from besa.report.markdown import table


def test_words_are_aligned_to_the_left_and_numbers_to_the_right() -> None:
    assert table(["recipe", "wiki"], [["dense", "1.00"], ["besa", ""]]) == (
        "| recipe | wiki |\n|---|---:|\n| dense | 1.00 |\n| besa |  |\n"
    )
    assert table(["a", "b", "c"], [], words=2) == "| a | b | c |\n|---|---|---:|\n"


def test_a_bar_in_a_name_ends_no_cell() -> None:
    assert table(["a|b"], [["c"]]) == "| a\\|b |\n|---|\n| c |\n"
