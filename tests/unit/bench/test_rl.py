"""How the figures of credit and training are put together."""

from pathlib import Path

import pytest

pytest.importorskip("trl", reason="training needs the extra `rl`")

from bench import rl
from bench.result import Result


def test_a_part_measured_anew_leaves_the_others_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def part(name: str, value: float):
        return lambda result: result.measures.update({name: value})

    monkeypatch.setattr(rl, "PARTS", {"one": part("a", 1.0), "two": part("b", 2.0)})
    rl.measure(["one", "two"], tmp_path).write(1.0, tmp_path)
    monkeypatch.setattr(rl, "PARTS", {"one": part("a", 3.0), "two": part("b", 4.0)})
    again = rl.measure(["two"], tmp_path / "absent")
    assert again.measures == {"b": 4.0}
    Result("rl", {}, {"a": 1.0, "b": 2.0}, {"kept": 1}).write(1.0, tmp_path)
    again = rl.measure(["two"], tmp_path)
    assert again.measures == {"a": 1.0, "b": 4.0} and again.notes["kept"] == 1
    assert set(again.notes["parts"]) == {"two"}


def test_every_row_of_the_numbers_has_a_part_that_measures_it() -> None:
    assert set(rl.PARTS) == {"parity", "training", "swaps", "credit", "capital"}
    assert all(sign in ("<=", ">=") for sign, _ in rl.MUST.values())


def test_the_capital_city_study_counts_with_three_seeds_and_says_where_it_is_from(tmp_path: Path) -> None:
    from bench.capital import keep

    def entries(count: int) -> list[dict[str, object]]:
        one = {"greedy": [1.0, 1.0, 0.0, 1.0], "sampled": 0.5, "contains": 1.0, "seconds": 9.0, "cpu_seconds": 5.0}
        return [{"seed": seed, **one} for seed in range(count)]

    for count, known in ((2, False), (3, True)):
        keep({"rft": entries(count)}, tmp_path)
        result = Result("rl", rl.MUST)
        rl.on_capital(result, tmp_path)
        assert ("capital city, held-out exact, mean of seeds" in result.measures) is known
    assert result.measures["capital city, held-out exact, mean of seeds"] == 0.75
    assert (tmp_path / "capital.svg").is_file()
