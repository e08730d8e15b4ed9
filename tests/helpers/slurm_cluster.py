"""A real SLURM cluster of two nodes on this machine, in a folder of its own, gone after the tests whatever happens."""

from __future__ import annotations

import contextlib
import ctypes
import os
import pwd
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

USER = pwd.getpwuid(os.getuid()).pw_name
PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch")
PATH = f"{os.environ['PATH']}:/usr/sbin:/sbin"
NODES = ("n1", "n2")
# As on large clusters, but for what needs systemd: signals go to every process that a step has started (linuxproc).
CONFIG = """
ClusterName=mini
SlurmctldHost=localhost
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.socket
SlurmctldPort={ports[0]}
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmdSpoolDir={folder}/spool-%n
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0
ReturnToService=2
JobRequeue=1
KillWait=5
MinJobAge=600
SlurmdParameters=config_overrides
NodeName=n1 NodeHostname=localhost NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2 RealMemory=8000
NodeName=n2 NodeHostname=localhost NodeAddr=127.0.0.1 Port={ports[2]} CPUs=2 RealMemory=8000
PartitionName=debug Nodes=n1,n2 Default=YES MaxTime=60 State=UP
"""


def until(holds: Callable[[], object], seconds: float, what: str, shown: Callable[[], str] = str) -> None:
    """Waits for something; fails after `seconds` with what `shown` returns then."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, f"not within {seconds} s: {what}\n{shown()}"
        time.sleep(0.1)


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def die_with_parent() -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


class Cluster:
    """Its daemons run in the foreground and die with this process; `close` also ends the processes of jobs.

    Args:
        folder: short path, for it holds a socket.
        repo: where jobs are submitted.
    """

    def __init__(self, folder: Path, repo: Path):
        self.folder, self.repo, self.daemons = folder, repo, []
        self.config = folder / "slurm.conf"
        self.environment = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "PYTEST_", "MASTER_"))}
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "WANDB_SERVICE", "LIGHTNING_T2I_RESUME"):
            self.environment.pop(name, None)
        self.environment |= {"SLURM_CONF": str(self.config), "PATH": PATH}

    def start(self) -> None:
        (self.folder / "state").mkdir()
        self.config.write_text(CONFIG.format(folder=self.folder, ports=free_ports(3), user=USER))
        key = self.folder / "munge.key"
        key.write_bytes(secrets.token_bytes(1024))
        key.chmod(0o600)
        files = {"key-file": "key", "socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        munge = [f"--{option}={self.folder}/munge.{end}" for option, end in files.items()]
        self.daemon("munged", "--foreground", "--force", *munge)
        until((self.folder / "munge.socket").exists, 20, "munged listens")
        self.daemon("slurmctld", "-D")
        for node in NODES:
            self.daemon("slurmd", "-D", "-N", node)
        until(lambda: self.ask("sinfo", "--noheader", "--format=%T %D") == "idle 2", 60, "idle nodes", self.logs)

    def daemon(self, *command: str) -> None:
        with (self.folder / "daemons.log").open("a") as log:
            options = {"stdout": log, "stderr": log, "env": self.environment, "preexec_fn": die_with_parent}
            self.daemons.append(subprocess.Popen(command, **options))

    def logs(self) -> str:
        return "\n".join(f"{p.name}: {p.read_text(errors='replace')[-1500:]}" for p in self.folder.glob("*.log"))

    def ask(self, *command: str) -> str:
        """The output of a command of SLURM's; what it complains about is none."""
        return subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=60).stdout.strip()

    def close(self) -> None:
        self.ask("scancel", "--full", "--signal=KILL", f"--user={USER}")
        for daemon in reversed(self.daemons):
            daemon.kill()
            daemon.wait(20)
        for process in Path("/proc").glob("[0-9]*"):  # slurmstepd, and what of a job is left
            with contextlib.suppress(OSError):
                variables = (process / "environ").read_bytes().split(b"\0")
                if f"SLURM_CONF={self.config}".encode() in variables and int(process.name) != os.getpid():
                    os.kill(int(process.name), signal.SIGKILL)

    # ---- jobs --------------------------------------------------------------------------------------------------------

    def submit(self, script: str, *words: str, options: Sequence[str] = (), **variables: str) -> str:
        """Submits one of slurm/*.sbatch from the repository; returns the job's id."""
        command = f"{sys.executable} {self.repo / 'train.py'}"
        # n1 and n2 are no host names.
        environment = self.environment | {"MASTER_ADDR": "127.0.0.1", "LIGHTNING_T2I_COMMAND": command} | variables
        output = f"--output={self.folder}/%A_%a.out" if any(o.startswith("--array") for o in options) else ""
        arguments = ["--parsable", output or f"--output={self.folder}/%j.out", "--time=10", *options]
        done = subprocess.run(
            ["sbatch", *arguments, f"slurm/{script}", *words],
            cwd=self.repo,
            env=environment,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def fact(self, job: str, name: str) -> str:
        """One of the values that `scontrol show job` has: JobState, Reason, Restarts, ExitCode."""
        shown = self.ask("scontrol", "--oneliner", "show", "job", job)
        return dict(word.partition("=")[::2] for word in shown.split()).get(name, "")

    def output(self, job: str) -> str:
        file = self.folder / f"{job}.out"
        return file.read_text(errors="replace") if file.is_file() else ""

    def told(self, job: str) -> str:
        """Where a job stands and what it has written."""
        return f"{self.ask('scontrol', '--oneliner', 'show', 'job', job)}\n{self.output(job)}"

    def ends(self, job: str, state: str = "COMPLETED", seconds: float = 120) -> str:
        """Waits for the end of a job, which must be `state`; returns its output."""
        over = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "BOOT_FAIL", "OUT_OF_MEMORY")
        until(lambda: self.fact(job, "JobState") in over, seconds, f"end of job {job}", lambda: self.told(job))
        assert self.fact(job, "JobState") == state, self.told(job)
        return self.output(job)

    def goes_on(self, job: str) -> None:
        """Waits until a job is back in the queue and starts it; SLURM alone would hold it for two minutes.

        A node refuses a job that it has killed in the same second.
        """
        until(lambda: self.fact(job, "JobState") == "PENDING", 60, f"{job} is requeued", lambda: self.told(job))
        until(lambda: self.ask("squeue", "--noheader", "--states=completing") == "", 60, "the first start has ended")
        time.sleep(2)
        self.ask("scontrol", "update", f"JobId={job}", "StartTime=now")
