"""Checks of the machine: device, cores, compiler, memory, disks, wandb.

Each check really does what it is about: it multiplies on the card, compiles a file against torch's
headers, writes a file into the folder. None takes longer than its time limit.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.metadata
import math
import os
import shutil
import signal
import subprocess
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from dqn_fast.device import choose_device, first_line
from dqn_fast.doctor.findings import Finding, fault, note, ok
from dqn_fast.engines import cache_state, choose_engine
from dqn_fast.engines.choice import why_not_compiled
from dqn_fast.envs import TensorEnv
from dqn_fast.memory import check_memory, free_memory, memory_needs
from dqn_fast.record import tracker
from dqn_fast.setup import make_plan, settle
from dqn_fast.train import Args

COMPILER_S = 20.0
"""Time limit of a compilation in seconds."""
LOW_DISK = 10**9
"""Free bytes of a folder below which a note says so. A run of the default settings writes 20 MB, a
checkpoint of a million transitions of CartPole 40 MB."""
ROOT = Path("/")

PROGRAM = """\
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <omp.h>
extern "C" int dqn_fast_doctor() {
  return omp_get_max_threads() > 0 ? 42 + aoti_torch_device_type_cpu() : 0;
}
"""


def check_machine(args: Args, env: TensorEnv, name: str) -> Iterator[Finding]:
    """Check this machine for a run.

    Args:
        args: settings of the run, with a device that exists.
        env: the run's environment.
        name: of the environment.
    """
    yield from check_devices()
    yield from check_cpu(args.num_threads)
    yield from check_compiler()
    yield from check_triton()
    yield from check_cache()
    yield from check_folder("temporary files", temporary_folder, "set TMPDIR to another folder")
    yield from check_folder("working directory", Path.cwd, "change to another or set --run-dir")
    yield from check_fit(args, env, name)
    yield from check_descriptors()
    yield from check_wandb()
    yield check_engine(args, env, name)


# ----------------------------------------------------------------------------------------- devices


def check_devices() -> Iterator[Finding]:
    """CUDA cards that compute, or why there is none; MPS."""
    cuda = torch.version.cuda
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for i in range(count):
        yield check_card(i)
    present = nvidia_cards()
    if count == 0 and present:
        cards = f"{present} NVIDIA card(s) are here, but "
        if cuda is None:
            words = f"torch {torch.__version__} is built without CUDA: install a CUDA build"
        else:
            why = first_line(Warning(caught[0].message)) if caught else "it finds no usable card"
            words = (
                f"torch, built for CUDA {cuda}, cannot use them ({why}): compare the driver in "
                "nvidia-smi with that version, and look at CUDA_VISIBLE_DEVICES"
            )
        yield note("CUDA", f"{cards}{words}; runs use the CPU")
    elif count == 0 and cuda is not None:
        words = f"no card; torch is built for CUDA {cuda}. Runs use the CPU, which is right here"
        yield ok("CUDA", f"{words}; a CPU build of torch is smaller")
    elif count == 0:
        yield ok("CUDA", "no card; runs use the CPU")
    if torch.backends.mps.is_available():
        yield ok("MPS", "available with --device mps; auto chooses the CPU")


def check_card(index: int) -> Finding:
    """Multiply on a card; its name and memory."""
    name = what = f"cuda:{index}"
    try:
        name = torch.cuda.get_device_name(index)
        ones = torch.ones(64, 64, device=what)
        total = (ones @ ones).sum().item()
        free, size = torch.cuda.mem_get_info(index)
    except RuntimeError as error:
        words = f"{name} does not compute: {first_line(error)}; choose another with --device"
        return fault(what, f"{words}, or a build of torch for this card")
    if total != 64.0**3:
        return fault(what, f"{name} computes wrongly (a sum is {total}): do not use it")
    words = f"{name}, {in_gb(free)} of {in_gb(size)} free, CUDA {torch.version.cuda}"
    if free < size / 4:
        return note(what, f"{words}: another program uses it, see nvidia-smi")
    return ok(what, words)


def nvidia_cards(root: Path = ROOT) -> int:
    """Number of NVIDIA cards that the driver knows, whatever torch can use."""
    with contextlib.suppress(OSError):
        if found := len(list((root / "proc" / "driver" / "nvidia" / "gpus").iterdir())):
            return found
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=5)
        return sum(line.startswith("GPU ") for line in listed.stdout.splitlines())
    return 0


def check_cpu(num_threads: int) -> Iterator[Finding]:
    """Vector instructions, and cores for `num_threads`; 0: torch's own choice."""
    capability = torch.backends.cpu.get_cpu_capability()
    if capability in ("AVX2", "AVX512"):
        yield ok("CPU", f"{capability}: compiled runs use the project's own matrix product")
    else:
        words = f"no AVX2 ({capability}): compiled runs use torch's matrix product, "
        yield note("CPU", f"{words}which is slower for small networks; nothing to do")
    cores = usable_cores()
    quota = cpu_quota()
    usable = cores if quota is None else min(cores, quota)
    words = f"{cores} usable" + (f", of which {quota:g} are granted" if quota else "")
    threads = num_threads or torch.get_num_threads()
    words += f"; --num-threads {num_threads}" + (f" is {threads}" if num_threads == 0 else "")
    if threads > math.ceil(usable):
        yield note("cores", f"{words}: more threads than cores are slow; set it to 1")
    else:
        yield ok("cores", words)


def usable_cores() -> int:
    """Cores on which this process may run."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def cpu_quota(root: Path = ROOT) -> float | None:
    """Cores that the control groups of this process grant; None: no limit."""
    quotas = []
    groups = root / "sys" / "fs" / "cgroup"
    try:
        lines = (root / "proc" / "self" / "cgroup").read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        base = groups / "cpu" if controllers else groups
        group = base / path.lstrip("/")
        for folder in (group, *group.parents):
            if folder.is_relative_to(base):
                with contextlib.suppress(OSError, ValueError):
                    quotas.append(_quota_of(folder, old=bool(controllers)))
    return min((quota for quota in quotas if quota is not None), default=None)


def _quota_of(folder: Path, old: bool) -> float | None:
    """Cores that one control group grants; `old`: of the first version."""
    if old:
        quota = (folder / "cpu.cfs_quota_us").read_text()
        period = (folder / "cpu.cfs_period_us").read_text()
    else:
        quota, period = (folder / "cpu.max").read_text().split()
    return int(quota) / int(period) if quota != "max" and int(quota) > 0 else None


# ------------------------------------------------------------------------------------- compilation


def check_compiler() -> Iterator[Finding]:
    """Compile, link and call a small file with torch's headers."""
    name = os.environ.get("CXX", "g++")
    slow = "without it, long runs stay eager, 4 to 7 times slower"
    if why_not_compiled(torch.device("cpu")) is not None:
        yield note("C++ compiler", f"{name} is not found; {slow}. Install g++ or set CXX")
        return
    version = (_output([name, "--version"]).splitlines() or ["no version"])[0]
    torch_folder = Path(torch.__file__).parent
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder, "doctor.cpp"), Path(folder, "doctor.so")
        source.write_text(PROGRAM)
        flags = ["-std=c++17", "-O1", "-march=native", "-fopenmp", "-fPIC", "-shared"]
        paths = [f"-I{torch_folder / 'include'}", f"-L{torch_folder / 'lib'}", "-ltorch_cpu"]
        command = [name, *flags, str(source), "-o", str(library), *paths]
        try:
            _output(command, COMPILER_S, check=True)
            answer = ctypes.CDLL(str(library)).dqn_fast_doctor()
            why = "" if answer == 42 else f"its program returned {answer}"
        except (OSError, RuntimeError) as error:
            why = first_line(error)
    if why:
        yield note("C++ compiler", f"{version} does not work with torch ({why}); {slow}")
    elif shutil.which("ar") is None:
        yield note("C++ compiler", f"{version} works, but ar is not found; install binutils")
    else:
        yield ok("C++ compiler", f"{version}; compiles, links and runs with torch")


def _output(command: Sequence[str], timeout: float = 5.0, check: bool = False) -> str:
    """What a program prints; it and its children are ended after `timeout` seconds.

    Raises:
        RuntimeError: with `check`, it failed or took too long.
        OSError: it cannot be started.
    """
    with subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        start_new_session=True,
    ) as process:
        try:
            out, err = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            out, err = "", f"no result after {timeout:g} s"
        finally:
            with contextlib.suppress(OSError, AttributeError):  # other systems have no groups
                os.killpg(process.pid, signal.SIGKILL)
    if check and process.returncode != 0:
        lines = err.splitlines()
        raise RuntimeError(next((line for line in lines if "error" in line), err) or "it failed")
    return out


def check_triton() -> Iterator[Finding]:
    """Triton, which compiles for CUDA."""
    if not torch.cuda.is_available():
        return
    if (why := why_not_compiled(torch.device("cuda"))) is not None:
        yield note("Triton", f"{why}: graphs hold plain kernels, 2.5 times slower. Install triton")
        return
    version = importlib.metadata.version("triton")
    yield ok("Triton", f"{version}; graphs of long runs hold compiled kernels")


def check_cache() -> Iterator[Finding]:
    """Folder of compiled functions."""
    folder, why = cache_state()
    if why is not None:
        words = f"{folder} is not used: {why}; compiled functions are kept for one run only"
        yield note("compile cache", f"{words}. Give this folder to yourself with mode 0700")
        return
    size = sum(
        path.stat().st_size
        for path in folder.rglob("*")
        if path.is_file() and not path.is_symlink()
    )
    yield _with_free_space("compile cache", folder, f"{folder}, {in_gb(size)} in use")


# ------------------------------------------------------------------------------ disks and memory


def temporary_folder() -> Path:
    """Folder of temporary files."""
    return Path(tempfile.gettempdir())


def check_folder(what: str, find: Callable[[], Path], help: str) -> Iterator[Finding]:
    """Write a file into a folder."""
    try:
        folder = find()
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".dqn_fast-") as file:
            file.write(bytes(4096))
            file.flush()
    except OSError as error:
        yield fault(what, f"cannot be written ({error.strerror or error}): {help}")
        return
    yield _with_free_space(what, folder, str(folder))


def _with_free_space(what: str, folder: Path, words: str) -> Finding:
    """A finding about the free space of the disk that `folder` is on, or will be on."""
    place = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(place).free
    words = f"{words}, {in_gb(free)} free"
    return ok(what, words) if free >= LOW_DISK else note(what, f"{words}: make room")


def check_fit(args: Args, env: TensorEnv, name: str) -> Iterator[Finding]:
    """Free memory of the device, control groups included, and what the run needs."""
    device = choose_device(args.device)
    free = free_memory(device)
    if free is None:
        yield note("memory", f"what is free on {device} is not known")
        return
    settled = settle(args)
    words = f"{in_gb(free)} free on {device}; the default run of {name} needs "
    words += in_gb(memory_needs(settled, env, device).total)
    try:
        check_memory(settled, env, device)
    except ValueError as error:
        yield fault("memory", str(error))
        return
    yield ok("memory", words)


def check_descriptors() -> Iterator[Finding]:
    """Limit of open files, of which each environment in a process of its own takes some."""
    try:
        import resource
    except ImportError:  # another system
        return
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if limit == resource.RLIM_INFINITY:
        yield ok("open files", "no limit")
        return
    # Measured: 3 for each process, and 10 for the program; the rest is for files of the run.
    copies = max((limit - 64) // 3, 0)
    words = f"at most {limit:,}: about {copies:,} environments with --vectorization-mode async"
    if copies < 128:
        yield note("open files", f"{words}; raise it with ulimit -n 4096")
    else:
        yield ok("open files", words)


# --------------------------------------------------------------------------------- wandb, engines


def check_wandb() -> Iterator[Finding]:
    """Where a run with --track would be recorded."""
    for variable, value in tracker.WANDB_DEFAULTS.items():
        os.environ.setdefault(variable, value)
    try:
        import wandb

        settings = wandb.setup().settings
    except (Exception, SystemExit) as error:
        words = f"does not start: {type(error).__name__}: {first_line(error)}; leave out --track"
        yield note("wandb", words)
        return
    offline = "--track records offline, and `wandb sync` uploads later"
    mode = settings.mode
    if mode in ("offline", "dryrun", "disabled"):
        yield ok("wandb", f"{mode}, as WANDB_MODE or `wandb offline` asks: {offline}")
        return
    url = settings.base_url
    has_key = settings.api_key or settings.identity_token_file or tracker.has_netrc_key(url)
    if not has_key:
        yield note("wandb", f"no API key for {url}: {offline}. To log online: wandb login")
    elif not tracker.answers(url):
        yield note("wandb", f"{url} does not answer within {tracker.PROBE_S:g} s: {offline}")
    else:
        yield ok("wandb", f"logged in at {url}, which answers")


def check_engine(args: Args, env: TensorEnv, name: str) -> Finding:
    """Engine that `auto` chooses for a run."""
    device = choose_device(args.device)
    plan = make_plan(settle(args), env)
    choice = choose_engine(args.engine, device, plan.total_updates, env.on_host)
    return ok(
        "engine", f"auto chooses {choice.engine} for the default run of {name} ({choice.reason})"
    )


def in_gb(size: int) -> str:
    """Bytes in MB or GB."""
    return f"{size / 1e9:.1f} GB" if size >= 10**9 else f"{size / 1e6:.1f} MB"
