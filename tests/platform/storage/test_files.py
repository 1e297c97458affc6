"""Files that several processes share."""

import subprocess
import sys
from pathlib import Path

import pytest

from segadapt.platform.storage.files import folder_size, locked, write_whole, written_whole


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    write_whole(path, "first")

    def fail() -> None:
        with written_whole(path) as partial:
            partial.write_text("sec")
            raise OSError("full")

    with pytest.raises(OSError, match="full"):
        fail()
    assert path.read_text() == "first"
    write_whole(path, b"second")
    assert [(entry.name, entry.read_text()) for entry in tmp_path.iterdir()] == [("record.json", "second")]


HOLDER = """
import sys
from pathlib import Path
from segadapt.platform.storage.files import locked
with locked(Path(sys.argv[1])):
    print("locked", flush=True)
    sys.stdin.read()
"""


def test_a_lock_is_held_by_one_process_until_it_ends(tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    with locked(path) as alone:
        assert alone
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(path)], stdin=-1, stdout=-1, text=True)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "locked\n"
        with locked(path, wait=False) as alone:
            assert not alone
    finally:
        holder.kill()
        holder.communicate()
    with locked(path, wait=False) as alone:
        assert alone, "a kill lets go of it"


def test_the_size_of_a_folder_is_that_of_its_files(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "c").write_bytes(bytes(5))
    (tmp_path / "d").write_bytes(bytes(2))
    assert folder_size(tmp_path) == 7
