"""`ray up` with `examples/cluster/local.yaml` as it is: a laptop, a head and two workers, each a machine of its own.

The machines are namespaces of this one: each has its own network with the addresses of the file, its own processes, so
that `ray stop` ends no Ray of others, its own home and `sshd`. They share the disk that holds `/mnt/segadapt`.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib.metadata import entry_points
from pathlib import Path
from subprocess import STDOUT, CompletedProcess, Popen

import psutil
import pytest
import yaml
from conftest import TINY_WORDS

ROOT = Path(__file__).parents[3]
FILE = ROOT / "examples" / "cluster" / "local.yaml"
PROGRAMS = Path(sys.executable).parent
PROVIDER = yaml.safe_load(FILE.read_text())["provider"]
GATEWAY = PROVIDER["head_ip"].rpartition(".")[0] + ".1"
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

pytestmark = pytest.mark.slow


class Machine:
    """A network, a process table, a host name, a home and some folders of its own; ends with its first process."""

    def __init__(self, name: str, folder: Path, first: str) -> None:
        self.name, self.folder, self.home = name, folder / name, folder / name / "home"
        ray, passwords = self.folder / "ray", self.folder / "passwd"
        for made in (self.home / ".ssh", ray):
            made.mkdir(parents=True)
        (self.home / ".bashrc").touch()
        user = f"ray:x:0:0::{self.home}:/bin/bash\n"  # whom the file names, and no other user of this machine
        names = self.folder / "resolv.conf"
        names.write_text("nameserver 127.0.0.1\n")  # which refuses at once: pip looks for a newer pip
        passwords.write_text(user + Path("/etc/passwd").read_text())
        Path("/tmp/ray").mkdir(exist_ok=True)
        setup = [
            f"hostname {name}-{os.getpid()}",
            "ip link set lo up",
            "mount -t tmpfs none /run",
            "mkdir /run/sshd",
            "mount -t tmpfs none /mnt",
            "mkdir /mnt/segadapt",
            f"mount --bind {folder / 'shared'} /mnt/segadapt",
            f"mount --bind {ray} /tmp/ray",
            f"mount --bind {passwords} /etc/passwd",
            f"mount --bind {names} /etc/resolv.conf",
        ]
        unshare = ["unshare", "--net", "--uts", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
        with (self.folder / "log").open("w") as log:
            command = [*unshare, "sh", "-c", " && ".join([*setup, f"touch {self.folder}/up", f"exec {first}"])]
            self._unshare = Popen(command, stdout=log, stderr=log)
        wait_for((self.folder / "up").exists, f"{name}: {(self.folder / 'log').read_text()}")
        (self.process,) = (child.pid for child in psutil.Process(self._unshare.pid).children())

    def start(self, *words: str, **options: object) -> "Popen[str]":
        """Start a command on the machine, in its home."""
        enter = ["nsenter", "-t", str(self.process), "--net", "--uts", "--mount", "--pid", f"--wd={self.home}"]
        environment = {"HOME": str(self.home), "PATH": f"{PROGRAMS}:{PATH}", "USER": "ray", "LANG": "C.UTF-8"}
        return Popen([*enter, *words], env=environment, text=True, **options)  # type: ignore[call-overload, no-any-return]

    def run(self, *words: str, timeout_s: float = 300) -> "CompletedProcess[str]":
        """Run a command on the machine, in its home, which must succeed."""
        process = self.start(*words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=STDOUT)
        printed, _ = process.communicate(timeout=timeout_s)
        assert process.returncode == 0, f"{words}\n{printed}"
        return CompletedProcess(words, 0, printed)

    def rays(self) -> list[str]:
        """The processes of Ray that run on the machine."""
        commands = self.run("ps", "-eo", "args").stdout.splitlines()
        return [line for line in commands if any(word in line for word in ("raylet", "gcs_server", "ray::"))]

    def listens(self) -> set[str]:
        """The addresses and ports that somebody listens on here."""
        return {line.split()[3] for line in self.run("ss", "-Hltn").stdout.splitlines()}

    def end(self) -> None:
        """Switch the machine off."""
        os.kill(self.process, signal.SIGKILL)
        self._unshare.wait(timeout=60)


def wait_for(condition: Callable[[], object], what: str, timeout_s: float = 60) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"timed out waiting for {what}"
        time.sleep(0.05)


def connect(laptop: Machine, machine: Machine, address: str) -> None:
    """Plug a machine into the laptop's network."""
    _ip(laptop, f"link add {machine.name} type veth peer name eth0 netns {machine.process}")
    _ip(laptop, f"link set {machine.name} master lan up")
    _ip(machine, f"address add {address}/24 dev eth0")
    _ip(machine, "link set eth0 up")
    _ip(machine, f"route add default via {GATEWAY}")


def _ip(machine: Machine, words: str) -> None:
    subprocess.run(["nsenter", "-t", str(machine.process), "--net", "ip", *words.split()], check=True)


def install(machine: Machine) -> None:
    """Give a machine what the setup commands would fetch from the network: ~/segadapt with all but segadapt itself."""
    environment = machine.home / "segadapt"
    python = Path(sys.base_prefix) / "bin" / f"python3.{sys.version_info.minor}"
    subprocess.run([python, "-m", "venv", environment], check=True)
    (packages,) = environment.glob("lib/python3.*/site-packages")
    here = next(path for path in sys.path if path.endswith("site-packages"))
    subprocess.run([environment / "bin" / "pip", "uninstall", "--quiet", "--yes", "setuptools"], check=True)
    (packages / "here.pth").write_text(f"{here}\n")
    for program in ("ray", "mlflow"):
        entry = next(iter(entry_points(group="console_scripts", name=program)))
        script = environment / "bin" / program
        script.write_text(f"#!{environment}/bin/python\nfrom {entry.module} import {entry.attr}\n{entry.attr}()\n")
        script.chmod(0o755)


def sshd(folder: Path) -> str:
    """Write the settings of an SSH server and return its command."""
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / "host_key"], check=True)
    settings = folder / "sshd_config"
    settings.write_text(
        f"HostKey {folder}/host_key\nPidFile none\nUsePAM no\nStrictModes no\nPasswordAuthentication no\n"
        "PermitRootLogin prohibit-password\nAuthorizedKeysFile .ssh/authorized_keys\n"
        "SetEnv PIP_CONFIG_FILE=/dev/null\n"  # this machine's may cap what is installed here already
    )
    return f"{shutil.which('sshd')} -D -e -f {settings}"


@pytest.fixture
def machines(tmp_path: Path) -> Iterator[list[Machine]]:
    """The laptop, the head and the workers of the file; all of them mount one folder."""
    needed = ("sshd", "ssh", "ssh-keygen", "rsync", "unshare", "nsenter", "ip", "ss", "uv")
    if lacking := [name for name in needed if shutil.which(name) is None]:
        pytest.skip(f"not installed here: {', '.join(lacking)}")
    tried = subprocess.run(["unshare", "--net", "--mount", "--pid", "--fork", "true"], capture_output=True, check=False)
    if os.geteuid() != 0 or tried.returncode != 0:
        pytest.skip(f"no namespaces can be made here: {tried.stderr.decode() or 'not root'}")
    (tmp_path / "shared").mkdir()
    made = [Machine("laptop", tmp_path, "sleep infinity")]
    try:
        laptop = made[0]
        for words in ("link add lan type bridge", f"address add {GATEWAY}/24 dev lan", "link set lan up"):
            _ip(laptop, words)
        key = laptop.home / ".ssh" / "id_ed25519"
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key], check=True)
        server = sshd(tmp_path)
        for number, address in enumerate((PROVIDER["head_ip"], *PROVIDER["worker_ips"])):
            made.append(Machine(f"worker-{number}" if number else "head", tmp_path, server))
            connect(laptop, made[-1], address)
            install(made[-1])
            shutil.copy(key.with_suffix(".pub"), made[-1].home / ".ssh" / "authorized_keys")
        yield made
    finally:
        for machine in made:
            machine.end()


def test_machines_are_launched_by_ssh_run_a_search_and_are_stopped(machines: list[Machine]) -> None:
    """The commands at the head of the file, in their order."""
    laptop, head, *workers = machines
    subprocess.run(["uv", "build", "--quiet", "--wheel", "--out-dir", laptop.home / "dist", ROOT], check=True)
    laptop.run("sh", "-c", "ray get-auth-token --generate && chmod 600 ~/.ray/auth_token")
    assert not any(machine.rays() for machine in machines), "they see no Ray of others, so that `ray stop` ends none"
    laptop.run("ray", "up", "--yes", str(FILE), timeout_s=900)
    forward = ["-L", "8265:127.0.0.1:8265", "-L", "5000:127.0.0.1:5000", f"ray@{PROVIDER['head_ip']}"]
    tunnel = laptop.start("ssh", "-N", "-o", "StrictHostKeyChecking=accept-new", *forward)
    try:
        wait_for(lambda: all(worker.rays() for worker in workers), "the autoscaler to start both workers", 600)
        search = ["search", "sdca", "--trials", "2", "--concurrent", "2", "--storage", "/mnt/segadapt/runs"]
        search += ["--tracking-uri", "http://127.0.0.1:5000", *TINY_WORDS]
        printed = laptop.run("segadapt", "submit", "--follow", "--", *search, timeout_s=900).stdout
        assert "sdca-streets took" in printed
        board = laptop.run("segadapt", "runs", "sdca-streets", "--tracking-uri", "http://127.0.0.1:5000").stdout
        assert {"sdca-001", "sdca-002"} <= set(board.split())
    finally:
        tunnel.terminate()
        tunnel.wait(timeout=60)
    services = {address for address in head.listens() if address.endswith((":8265", ":5000"))}
    assert services == {"127.0.0.1:8265", "127.0.0.1:5000"}, "reached through the tunnel alone"
    laptop.run("ray", "down", "--yes", str(FILE))
    assert not head.rays()
    wait_for(lambda: not any(worker.rays() for worker in workers), "the workers to notice", 300)
