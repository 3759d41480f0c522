"""The recommendation: statistically indistinguishable by paired tests, and the cheapest of these defenses."""

import pytest

from oag_transform.evaluation.result import Cell, RowResult
from oag_transform.evaluation.statistics import choose, recommend

N = 40


def row(name: str, clean: int, attacked: int, seconds: float | None = None, *, first: int = 0, error: str = "") -> RowResult:
    """So many of 40 right, those under attack from image ``first`` on; the second attack is like the first."""
    under = "".join("1" if first <= i < first + attacked else "0" for i in range(N))
    cells = (Cell("1" * clean + "0" * (N - clean)), Cell(under), Cell(under))
    code = f"DefendedModel(target, {name})"
    return RowResult(name, (None,) * 3 if error else cells, seconds, error, name if seconds is not None else "", 1, code)


def chosen(*rows: RowResult) -> tuple[str, list[str], str]:
    choice = choose(rows, clean=0, attacked=(1, 2))
    assert choice is not None
    return choice.best.name, [row.name for row in choice.indistinguishable], choice.cheapest.name


NONE = row("Undefended", 40, 0)
OAG = row("OAG", 38, 30, 0.5)


def test_the_cheapest_indistinguishable_from_the_best_is_taken() -> None:
    jpeg = row("JPEG", 38, 26, 0.01)  # 4 of 4 discordant images lost: p = 0.125
    assert chosen(NONE, OAG, jpeg) == ("OAG", ["OAG", "JPEG"], "JPEG")
    assert chosen(NONE, jpeg, OAG) == ("OAG", ["JPEG", "OAG"], "JPEG")


def test_worse_under_attack_is_distinguishable() -> None:
    # 5 of 5 lost: p = 0.0625, indistinguishable; 6 of 6: p = 0.03125
    assert chosen(NONE, OAG, row("JPEG", 38, 25, 0.01))[1] == ["OAG", "JPEG"]
    assert chosen(NONE, OAG, row("JPEG", 38, 24, 0.01)) == ("OAG", ["OAG"], "OAG")


def test_worse_on_clean_images_is_distinguishable_and_better_is() -> None:
    assert chosen(NONE, OAG, row("JPEG", 32, 30, 0.01))[1:] == (["OAG"], "OAG")
    better = row("JPEG", 40, 26, 0.01)
    assert chosen(NONE, row("OAG", 32, 30, 0.5), better)[1:] == (["OAG", "JPEG"], "JPEG")


def test_the_test_is_paired() -> None:
    # as many right, but other images: no one is ahead; and far fewer, but of images that the best has wrong
    assert chosen(NONE, OAG, row("JPEG", 38, 30, 0.01, first=10))[1] == ["OAG", "JPEG"]
    assert chosen(NONE, row("OAG", 38, 24, 0.5), row("JPEG", 38, 16, 0.01, first=24))[1] == ["OAG", "JPEG"]


def test_of_rows_equal_under_attack_clean_accuracy_and_then_cost_decide() -> None:
    better, cheaper = row("better", 39, 30, 0.9), row("cheaper", 38, 30, 0.1)
    for best, other in ((better, OAG), (cheaper, OAG), (better, cheaper)):
        assert chosen(NONE, best, other)[0] == chosen(NONE, other, best)[0] == best.name


def test_rows_that_failed_or_have_fewer_images_are_left_out() -> None:
    few = RowResult("slow", (Cell("11"), Cell("11"), Cell("11")), 0.001, "", "slow")
    assert chosen(NONE, few, OAG, row("broken", 40, 40, 0.001, error="no"))[0] == "OAG"
    assert choose([row("broken", 0, 0, error="no")], clean=0, attacked=(1, 2)) is None
    assert recommend([], clean=0, attacked=[1]) == "Nothing was measured that could be recommended."


def test_no_defense_is_recommended_if_it_is_indistinguishable() -> None:
    strong = row("Undefended", 40, 29)
    words = recommend([strong, OAG], clean=0, attacked=(1, 2))
    assert "No defense can be told from 'Undefended' here" in words
    assert "DefendedModel" not in words


@pytest.mark.parametrize(
    ("rows", "parts"),
    [
        (
            (NONE, OAG, row("JPEG", 38, 26, 0.0123)),
            ["all 40 images, OAG has the highest mean accuracy under attack: 75.0%, and 95.0% on clean", "is JPEG.",
             "The cheapest of these is JPEG: DefendedModel(target, JPEG), 0.012 s an image."],
        ),
        ((NONE, OAG), ["Every other is worse", "Take DefendedModel(target, OAG), 0.5 s an image."]),
        (
            (NONE, OAG, row("slower", 38, 29, 3.0), row("slowest", 38, 29, 4.0)),
            ["are slower; slowest.", "It is also the cheapest of these: DefendedModel(target, OAG)"],
        ),
    ],
)  # fmt: skip
def test_words(rows: tuple[RowResult, ...], parts: list[str]) -> None:
    words = recommend(rows, clean=0, attacked=(1, 2))
    for part in [*parts, "This says nothing about adaptive attacks."]:
        assert part in words
