"""A Slurm cluster of one node, this machine, for tests: its own munge key, configuration and folders."""

import os
import shutil
import socket
import subprocess
import time
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "scontrol")
CONFIG = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={munge}/munge.socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
ReturnToService=2
MinJobAge=300
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} RealMemory=9000 State=UNKNOWN
SlurmdParameters=config_overrides
PartitionName=work Nodes={host} Default=YES MaxTime=INFINITE State=UP
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
"""
"""Without an accounting database, as Debian's packages come."""
UP_SECONDS = 60
USUAL = Path("/etc/slurm/slurm.conf")
"""Where Slurm looks by itself: Snakemake takes SLURM_CONF from its jobs, which start steps."""


def lacking() -> str:
    """Why no cluster can be started here; empty if one can."""
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    if missing:
        return f"no {', '.join(missing)}: apt-get install slurmctld slurmd slurm-client munge"
    if USUAL.exists():
        return f"this machine has a cluster of its own, {USUAL}"
    return "" if os.geteuid() == 0 else "slurmd runs as root only"


class Cluster:
    """Runs while it is open; `environment` is what its commands need."""

    def __init__(self, folder: Path):
        self.folder, self.processes = folder, []
        self.environment = os.environ | {"SLURM_CONF": str(folder / "slurm.conf")}

    def __enter__(self) -> "Cluster":
        for name in ("state", "spool", "munge"):
            (self.folder / name).mkdir(parents=True)
        self._start_munge()
        host, ports = socket.gethostname().split(".")[0], [_free_port(), _free_port()]
        settings = {"folder": self.folder, "munge": self.folder / "munge", "host": host, "ports": ports}
        (self.folder / "slurm.conf").write_text(CONFIG.format(**settings, cpus=max(2, os.cpu_count() or 1)))
        USUAL.parent.mkdir(exist_ok=True)
        USUAL.symlink_to(self.folder / "slurm.conf")
        self._start("slurmctld", "-D", "-f", self.environment["SLURM_CONF"])
        self._start("slurmd", "-D", "-f", self.environment["SLURM_CONF"], "-N", host)
        self._wait()
        return self

    def _start_munge(self) -> None:
        place = self.folder / "munge"
        place.chmod(0o755)
        (place / "key").write_bytes(os.urandom(128))
        (place / "key").chmod(0o400)
        names = {
            "key": "key-file",
            "munge.socket": "socket",
            "pid": "pid-file",
            "log": "log-file",
            "seed": "seed-file",
        }
        options = [f"--{option}={place / name}" for name, option in names.items()]
        self._start("munged", "--foreground", "--force", *options)
        _until(lambda: (place / "munge.socket").exists(), "munged")

    def _start(self, *command: str) -> None:
        log = (self.folder / f"{command[0]}.out").open("wb")
        self.processes.append(
            subprocess.Popen(command, stdout=log, stderr=log, env=self.environment, start_new_session=True)
        )

    def _wait(self) -> None:
        def idle() -> bool:
            told = subprocess.run(
                ["sinfo", "-h", "-o", "%T"], env=self.environment, capture_output=True, text=True
            )
            return told.stdout.split() == ["idle"]

        try:
            _until(idle, "slurmctld and slurmd")
        except AssertionError as error:
            logs = "\n".join(path.read_text()[-2000:] for path in sorted(self.folder.glob("*.out")))
            self.__exit__()
            raise AssertionError(f"{error}\n{logs}") from None

    def __exit__(self, *_: object) -> None:
        USUAL.unlink()
        self.run("scancel", "--user=root", check=False)
        for process in reversed(self.processes):
            process.terminate()
        for process in self.processes:
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()

    def run(self, *command: str, check: bool = True, **options) -> str:
        """What one of its commands prints."""
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, **options)
        assert not check or done.returncode == 0, done.stderr
        return done.stdout

    def submit(self, script: str, *options: str, **run) -> str:
        """The number of a submitted script."""
        return self.run("sbatch", "--parsable", *options, "--wrap", script, **run).strip()

    def state(self, job: str) -> str:
        """A job's state, such as RUNNING."""
        return self.fields(job).get("JobState", "GONE")

    def fields(self, job: str) -> dict[str, str]:
        """What the controller knows of a job."""
        words = self.run("scontrol", "show", "job", job, check=False).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait(self, job: str, *states: str, seconds: float = 300) -> str:
        """Until a job is in one of some states."""
        _until(lambda: self.state(job) in states, f"job {job} to be {' or '.join(states)}", seconds)
        return self.state(job)


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def _until(done, what: str, seconds: float = UP_SECONDS) -> None:
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end, f"waited {seconds:.0f} s for {what}"
        time.sleep(0.5)
