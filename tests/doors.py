"""On which addresses processes listen, watched as long as they run."""

import contextlib
import ipaddress
import os
import threading
from pathlib import Path

_LISTENS = "0A"


class Doors:
    """Watches all processes that this one, and those it started, start within a `with` block."""

    def __init__(self) -> None:
        self.opened: set[tuple[str, str]] = set()
        """Address and name of each process that listened on it at any time."""
        self._ended = threading.Event()

    def __enter__(self) -> "Doors":
        running = _processes()
        self._before = set(running)
        self._family = _descendants({os.getpid()}, {pid: parent for (pid, _), parent in running.items()})
        self._watch = threading.Thread(target=self._look_until_ended)
        self._watch.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._watch.join()

    @property
    def to_others(self) -> set[tuple[str, str]]:
        """Those that other machines could reach."""
        return {(address, name) for address, name in self.opened if not _is_loopback(address)}

    def _look_until_ended(self) -> None:
        while not self._ended.wait(0.1):
            self._look()

    def _look(self) -> None:
        started = {pid: parent for (pid, since), parent in _processes().items() if (pid, since) not in self._before}
        self._family = _descendants(self._family, started)  # for good: whose parent ended has another one
        listening = _listening()
        for pid in started.keys() & self._family:
            for socket in _open_files(pid) & listening.keys():
                with contextlib.suppress(OSError):
                    self.opened.add((listening[socket], Path(f"/proc/{pid}/comm").read_text().strip()))


def _processes() -> dict[tuple[int, int], int]:
    """The parents of all processes, by number and start: numbers are given again."""
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words = (process / "stat").read_text().rpartition(")")[2].split()
            found[int(process.name), int(words[19])] = int(words[1])
    return found


def _descendants(family: set[int], parents: dict[int, int]) -> set[int]:
    """Processes with those they started, and what those started."""
    while children := {pid for pid, parent in parents.items() if parent in family} - family:
        family = family | children
    return family


def _open_files(pid: int) -> set[str]:
    found = set()
    with contextlib.suppress(OSError):
        for file in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                found.add(str(file.readlink()))
    return found


def _listening() -> dict[str, str]:
    """The sockets that somebody listens on, as they are called among open files, with their addresses."""
    found = {}
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            words = line.split()
            if words[3] == _LISTENS:
                found[f"socket:[{words[9]}]"] = _address(words[1].partition(":")[0])
    return found


def _address(digits: str) -> str:
    """Read an address as the kernel writes it: words of four bytes, each backwards."""
    words = [bytes.fromhex(digits[at : at + 8])[::-1] for at in range(0, len(digits), 8)]
    return str(ipaddress.ip_address(b"".join(words)))


def _is_loopback(address: str) -> bool:
    found = ipaddress.ip_address(address)
    return (getattr(found, "ipv4_mapped", None) or found).is_loopback
