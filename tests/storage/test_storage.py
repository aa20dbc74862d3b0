"""Atomic writes, locks that end with their process, and the append-only log."""

from __future__ import annotations

import errno
import json
import os
import threading
from typing import TYPE_CHECKING, Any

import pytest

from guardreasoner_vl.errors import DataError
from guardreasoner_vl.storage import jsonl_log
from guardreasoner_vl.storage.atomic import replacing, write_json, write_whole
from guardreasoner_vl.storage.jsonl_log import Format, JsonlLog, read_log_rows
from guardreasoner_vl.storage.lock import LOCK, locked_folder

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

resource = pytest.importorskip("resource")


def parsed(line: bytes) -> dict[str, Any]:
    row: dict[str, Any] = json.loads(line)
    return {"id": row["id"]} if isinstance(row, dict) and "id" in row else json.loads("{")


FORM = Format(parsed, "a row", key=lambda row: row["id"])


def log(path: Path) -> JsonlLog[dict[str, Any]]:
    return JsonlLog(path, FORM, "`stage`")


def line(number: int) -> bytes:
    return json.dumps({"id": number}).encode() + b"\n"


@pytest.fixture
def small_disk() -> Iterator[Any]:
    """Limits the size of files in bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


# --- writing whole --------------------------------------------------------------------------------------


def test_two_writers_of_one_path_do_not_share_a_file(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    with replacing(path) as first, replacing(path) as second:
        assert first != second
        first.write_text("1")
        second.write_text("2")
    assert path.read_text() == "1"
    assert list(tmp_path.iterdir()) == [path]


def test_what_the_disk_does_not_take_is_one_line_and_leaves_the_old_file(tmp_path: Path, small_disk: Any) -> None:
    path = tmp_path / "x.json"
    write_json(path, {"old": 1})
    small_disk(100)
    with pytest.raises(DataError, match=r"x\.json cannot be written \(File too large\): make room; the same command"):
        write_json(path, {"new": "x" * 200})
    assert json.loads(path.read_text()) == {"old": 1}
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(DataError, match=r"cannot be written \(No such file or directory\): check the path and its"):
        write_whole(tmp_path / "none" / "x", [b""])


def test_a_new_file_is_readable_by_whom_the_umask_says(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_whole(tmp_path / "x", [b""])
    finally:
        os.umask(before)
    assert (tmp_path / "x").stat().st_mode & 0o777 == 0o640


# --- a folder's lock ------------------------------------------------------------------------------------


def refused(folder: Path, command: str = "mine") -> str:
    """The error message that another thread gets when it locks the folder too."""
    messages: list[str] = []

    def work() -> None:
        try:
            with locked_folder(folder, command):
                messages.append("")
        except DataError as error:
            messages.append(str(error))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    return messages[0]


def test_a_folder_in_use_is_refused_in_one_line_that_names_the_command(tmp_path: Path) -> None:
    with locked_folder(tmp_path / "out", "grpo") as folder:
        with locked_folder(tmp_path / "." / "out", "run"):  # a stage inside a run
            pass
        expected = f"{folder}: another `grpo` (process {os.getpid()}) is writing it; wait for it or give another --out"
        assert refused(folder) == expected
        (folder / "x").touch()
    assert refused(folder) == ""
    assert [path.name for path in folder.iterdir()] == ["x"]


def test_a_folder_that_was_made_for_nothing_goes(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nothing"), locked_folder(tmp_path / "out", "grpo"):
        raise ValueError("nothing")
    assert list(tmp_path.iterdir()) == []


def test_links_in_a_circle_are_no_folder(tmp_path: Path) -> None:
    (tmp_path / "one").symlink_to(tmp_path / "other")
    (tmp_path / "other").symlink_to(tmp_path / "one")
    with pytest.raises(DataError, match="cannot be written"), locked_folder(tmp_path / "one", "run"):
        pytest.fail("there is no such folder")


def test_the_lock_of_a_killed_process_holds_nobody_up(tmp_path: Path) -> None:
    (tmp_path / LOCK).write_text("`grpo` (process 1)")
    with locked_folder(tmp_path, "grpo"):
        assert str(os.getpid()) in (tmp_path / LOCK).read_text()
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_process_left_half_written_goes(tmp_path: Path) -> None:
    (tmp_path / "inner").mkdir()
    (tmp_path / "busy").mkdir()
    (tmp_path / "busy" / LOCK).touch()
    dead = [tmp_path / "a.json.4194305-00ff00ff.partial", tmp_path / "inner" / "b.json.4194305-00ff00ff.partial"]
    others = [
        tmp_path / f"a.json.{os.getpid()}-00ff00ff.partial",
        tmp_path / "mine.partial",
        tmp_path / "busy" / "b.json.4194305-00ff00ff.partial",
    ]
    for path in (*dead, *others):
        path.touch()
    with locked_folder(tmp_path, "grpo"):
        assert not any(path.exists() for path in dead)
        assert all(path.exists() for path in others)


# --- the log --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tail", "kept"), [(b"", 2), (b'{"id": 3', 2), (b"\xff" * 200_000, 2), (b"\x00", 2), (b'{"id": 3}', 3)]
)
def test_a_torn_tail_is_cut_off_in_its_place(tail: bytes, kept: int, tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_bytes(line(1) + line(2) + tail)
    inode = path.stat().st_ino
    with log(path) as opened:
        assert [row["id"] for _, row in opened.rows()] == list(range(1, kept + 1))
        opened.append([line(9)])
    assert path.read_bytes() == b"".join(map(line, [*range(1, kept + 1), 9]))
    assert path.stat().st_ino == inode


def test_a_line_that_is_no_row_is_named_and_nothing_is_changed(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    content = line(1) + b"cake\n" + line(2) + b'{"id"'
    path.write_bytes(content)
    for read in (lambda opened: list(opened.rows()), lambda _: list(read_log_rows(path, FORM))):
        with log(path) as opened, pytest.raises(DataError, match=r"log\.jsonl, line 2: not a row; remove the line"):
            read(opened)
    assert path.read_bytes() == content


def test_a_duplicate_row_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_bytes(line(1) + line(2) + line(1))
    with pytest.raises(DataError, match="line 3: repeats the row of line 1; remove one of the two lines"):
        list(read_log_rows(path, FORM))


def test_a_full_disk_leaves_whole_lines(tmp_path: Path, small_disk: Any) -> None:
    path = tmp_path / "log.jsonl"
    with log(path) as opened:
        opened.append([line(1)])
        small_disk(25)
        with pytest.raises(DataError, match=r"log\.jsonl cannot be written \(File too large\): make room"):
            opened.append([line(2), line(3)])
        assert path.read_bytes() == line(1)
        opened.append([line(4)])
    assert path.read_bytes() == line(1) + line(4)


def test_lines_that_may_not_be_on_the_disk_are_not_reported_as_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(_: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    path = tmp_path / "log.jsonl"
    with log(path) as opened:
        opened.append([line(1)], sync=False)
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", broken)
            with pytest.raises(DataError, match="Input/output error"):
                opened.append([line(2)])
            with pytest.raises(DataError, match="Input/output error"):
                opened.sync()
        for late in (opened.sync, lambda: opened.append([line(3)])):
            with pytest.raises(DataError, match="Input/output error"):
                late()
    assert path.read_bytes() == line(1)


def test_one_process_at_a_time_has_the_file(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    message = r"log\.jsonl: another `stage` is writing it; wait for it or give another --out"
    with log(path) as opened:
        with pytest.raises(DataError, match=message), log(path):
            pass
        opened.replace([line(1), b'{"id": 2}'])
        with pytest.raises(DataError, match=message), log(path):
            pass
        opened.append([line(3)])
    assert path.read_bytes() == line(1) + line(2) + line(3)


def test_a_file_that_was_replaced_is_not_taken_for_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "log.jsonl"

    def locked(file: int) -> bool:
        path.unlink()
        path.write_bytes(line(1))
        return True

    monkeypatch.setattr(jsonl_log, "try_lock", locked)
    with pytest.raises(DataError, match="is writing it"), log(path):
        pass
    assert path.read_bytes() == line(1)


def test_lines_are_taken_out_and_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_bytes(b"".join(map(line, range(1, 6))))
    path.chmod(0o640)
    with log(path) as opened:
        opened.without({1, 4})
        assert [row["id"] for _, row in opened.rows()] == [2, 3, 5]
        opened.cut(2)
        opened.append([line(7)])
    assert path.read_bytes() == line(2) + line(3) + line(7)
    assert path.stat().st_mode & 0o777 == 0o640


def test_a_disk_without_room_for_the_new_file_leaves_the_old_one(tmp_path: Path, small_disk: Any) -> None:
    path = tmp_path / "log.jsonl"
    path.write_bytes(b"".join(map(line, range(1, 6))))
    before = path.read_bytes()
    with log(path) as opened:
        small_disk(20)
        with pytest.raises(DataError, match="make room"):
            opened.without({1})
        small_disk(1_000)
        opened.append([line(9)])
    assert path.read_bytes() == before + line(9)
    assert list(tmp_path.iterdir()) == [path]
