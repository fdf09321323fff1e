"""`tokenmill experts plot`: what is read of a recorder's files, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.bench.errors import BenchError
from engine.bench.expert_map import heat_map, read_counts
from engine.cli import main


def test_counts_are_summed_over_passes_and_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "some.csv"
    path.write_text("forward_pass_id,layer_id,expert_id,count\n3,1,0,5\n3,1,1,1\n3,4,0,2\n3,4,1,4\n7,1,0,10\n7,4,1,2\n")
    layers, counts = read_counts(path)
    assert (layers, counts.tolist()) == ([1, 4], [[15, 1], [2, 6]])
    figure = heat_map(layers, counts, "some.csv")
    (picture,) = figure.axes[0].images
    assert picture.get_array().tolist() == [[1.875, 0.125], [0.5, 1.5]]
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["1", "4"]
    assert main(["experts", "plot", str(path)]) == 0
    assert (tmp_path / "some.csv.png").read_bytes().startswith(b"\x89PNG")
    assert main(["experts", "plot", str(path), "--out", str(tmp_path / "else.png")]) == 0
    assert "2 layers of 2 experts" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a,b\n1,2\n", "has not the columns layer_id, expert_id, count"),
        ("", "has not the columns"),
        ("layer_id,expert_id,count\n", "the model has no experts"),
        ("layer_id,expert_id,count\n1,2,x\n", "line 2: has something else than whole numbers"),
        ("layer_id,expert_id,count\n1,2\n", "line 2: has something else than whole numbers"),
        ("layer_id,expert_id,count\n1,-2,3\n", "line 2: has a number below 0"),
    ],
)
def test_what_is_no_count_is_refused(text: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "some.csv"
    path.write_text(text)
    with pytest.raises(BenchError, match=said):
        read_counts(path)
    with pytest.raises(SystemExit, match=said):
        main(["experts", "plot", str(path)])
    with pytest.raises(SystemExit, match="cannot be read"):
        main(["experts", "plot", str(tmp_path / "none.csv")])
