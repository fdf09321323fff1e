"""What stands on the board outlives its writer, and is right or missing."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.wire import board as board_module
from engine.wire.board import Board


def test_who_is_computed_is_read_once(tmp_path: Path) -> None:
    writer, reader = Board(str(tmp_path)), Board(str(tmp_path))
    assert reader.take_computed() == []
    for keys in ([7, 2**40, 9], [8], list(range(4095))):
        writer.note_computed(keys)
        assert reader.take_computed() == keys
        assert reader.take_computed() == []
    writer.note_computed(list(range(4096)))
    assert reader.take_computed() is None
    writer.note_computed([1, 2])
    writer.note_computed([])
    assert reader.take_computed() == []


def test_who_is_computed_disturbs_nothing_else(tmp_path: Path) -> None:
    board = Board(str(tmp_path))
    board.beat("worker63")
    board.hold("scheduler", 5)
    beat = board.last_beat("worker63")
    board.note_computed(list(range(1, 4096)))
    assert (board.last_beat("worker63"), board.held("scheduler")) == (beat, 5)
    assert board.take_computed() == list(range(1, 4096))


def test_a_death_in_the_middle_of_writing_leaves_nothing_false(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    board = Board(str(tmp_path))
    board.note_computed([1, 2, 3])

    def dies(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(board_module, "array", dies)
    with pytest.raises(KeyboardInterrupt):
        board.note_computed([4, 5])
    assert Board(str(tmp_path)).take_computed() is None
