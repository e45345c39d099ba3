"""Running a reader on generated input under watch: what it raises, how long it takes, what it touches.

A case passes if it ends within its time with a result or an error that is documented, the process has grown by no more
than ``MEMORY``, and nothing was run, opened for writing or changed outside the folder of the case.
"""

from __future__ import annotations

import os
import resource
import shutil
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis.errors import HypothesisWarning
from hypothesis.strategies import SearchStrategy

SECONDS = 20.0
"""That a case may take. Most take milliseconds; the machine may be crowded."""
MEMORY = 512 * 2**20
"""Bytes by which a case may make the process grow."""
ADDRESS_SPACE = 6 * 2**30
"""Bytes that it may ask for beyond what it has; more is a MemoryError, which no reader documents."""


class Violation(BaseException):
    """Something that reading a file must never do."""


class Hang(BaseException):
    """A case that did not end in time."""


@dataclass(frozen=True)
class Target:
    """A reader and what it is fed.

    Attributes:
        name: of the target.
        cases: what it is tried with.
        run: puts a case into an empty folder, the current one, and has it read.
        documented: what it may raise.
        prepare: a context for the whole run, such as one of patches.
    """

    name: str
    cases: SearchStrategy[Any]
    run: Callable[[Any], object]
    documented: tuple[type[BaseException], ...] = (ValueError, OSError)
    prepare: Callable[[], Any] | None = None


@dataclass
class Failure:
    """A case that did not pass."""

    what: str
    where: str
    case: str
    traceback: str
    times: int = 1


@dataclass
class Outcome:
    """What came of a target's cases."""

    name: str
    cases: int = 0
    refused: int = 0
    """With a documented error."""
    seconds: float = 0.0
    slowest: float = 0.0
    failures: list[Failure] = field(default_factory=list)


def fuzz(target: Target, cases: int, sandbox: Path, seed_: int = 0, tick: Callable[[], None] = lambda: None) -> Outcome:
    """Try a target with ``cases`` cases; those that fail are collected, one of each kind."""
    outcome = Outcome(target.name)
    found: dict[tuple[str, str], Failure] = {}
    watch = Watch(sandbox)

    def one(case: Any) -> None:
        if outcome.cases >= cases:
            return
        outcome.cases += 1
        started = time.monotonic()
        try:
            with watch:
                target.run(case)
        except target.documented:
            outcome.refused += 1
        except (KeyboardInterrupt, GeneratorExit):
            raise
        except BaseException as error:
            where = _where(error)
            what = f"{type(error).__name__}: {error}"[:300]
            key = (type(error).__name__, where)
            if key in found:
                found[key].times += 1
            else:
                text = "".join(traceback.format_exception(error))
                found[key] = Failure(what, where, repr(case)[:3000], text[-3000:])
        outcome.slowest = max(outcome.slowest, time.monotonic() - started)
        tick()

    started = time.monotonic()
    with watch.started(), warnings.catch_warnings():
        warnings.simplefilter("ignore", HypothesisWarning)
        warnings.simplefilter("ignore", UserWarning)  # of zipfile, which makes strange archives, and Pillow's of images
        with target.prepare() if target.prepare else _nothing():
            more = 0
            while outcome.cases < cases:  # a search space that is exhausted is searched again in another order
                search = settings(
                    max_examples=cases - outcome.cases,
                    database=None,
                    deadline=None,
                    phases=[Phase.generate],
                    suppress_health_check=list(HealthCheck),
                )
                seed(seed_ + more)(search(given(target.cases)(one)))()
                more += 1
    outcome.seconds = time.monotonic() - started
    outcome.failures = sorted(found.values(), key=lambda f: -f.times)
    return outcome


@contextmanager
def _nothing() -> Iterator[None]:
    yield


def _where(error: BaseException) -> str:
    """The innermost place in innerloop that an error came from."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [f for f in frames if "/innerloop/" in f.filename and "/tests/" not in f.filename]
    last = (ours or frames)[-1]
    return f"{Path(last.filename).name}:{last.lineno} {last.name}"


# --- watching ---------------------------------------------------------------------------------------------------------

_NEVER = frozenset(
    [
        "os.system",
        "os.exec",
        "os.fork",
        "os.forkpty",
        "os.posix_spawn",
        "os.spawn",
        "os.startfile",
        "subprocess.Popen",
        "pty.spawn",
        "ctypes.dlopen",
        "ctypes.call_function",
        "socket.connect",
        "socket.bind",
        "socket.getaddrinfo",
        "socket.sendto",
        "os.kill",
        "pickle.find_class",
        "os.chmod",
        "os.chown",
        "os.setxattr",
        "os.putenv",
        "os.unsetenv",
        "webbrowser.open",
        "urllib.Request",
        "shutil.unpack_archive",
        "shutil.chown",
        "code.__new__",
    ]
)
_CHANGES = frozenset(
    [
        "os.mkdir",
        "os.rename",
        "os.remove",
        "os.rmdir",
        "os.link",
        "os.symlink",
        "os.truncate",
        "os.utime",
        "shutil.rmtree",
        "shutil.move",
        "shutil.copyfile",
        "shutil.copytree",
    ]
)
_COMPILERS = ("typing.py", "dataclasses.py", "typing_extensions.py")
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


class _Now:
    """What the audit hook, which cannot be taken away again, looks at."""

    watch: Watch | None = None
    hooked = False


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    watch = _Now.watch
    if watch is None:
        return
    if event in _NEVER:
        watch.refuse(f"{event} {arguments!r}"[:300])
    elif event == "open":
        path, _, flags = arguments
        if isinstance(flags, int) and flags & _WRITES and not watch.inside(path):
            watch.refuse(f"opens {path!r} for writing")
    elif event in _CHANGES:
        for path in arguments:
            # What a link leads to is only read.
            if event == "os.symlink" and path is arguments[0]:
                continue
            if isinstance(path, str | bytes | os.PathLike) and not watch.inside(path):
                watch.refuse(f"{event} {path!r}")
    elif event == "compile":
        source, name = arguments
        # Code that came with a file is compiled from a text, and so are annotations by typing, which are ours.
        if (
            name == "<string>"
            and source is not None
            and Path(sys._getframe(1).f_code.co_filename).name not in _COMPILERS
        ):
            watch.refuse(f"compiles {source!r}"[:300])


class Watch:
    """Sees to it that a case leaves everything but its folder alone. Python's audit events tell, and a canary."""

    def __init__(self, sandbox: Path) -> None:
        self.sandbox = sandbox.resolve()
        self.folder = self.sandbox / "case"
        self.canary = self.sandbox / "canary"
        self.violations: list[str] = []

    def refuse(self, what: str) -> None:
        """Stop the case; said again at its end, should somebody catch everything."""
        self.violations.append(what)
        raise Violation(what)

    def inside(self, path: Any) -> bool:
        """Whether a path is in the case's folder (or is no path: a descriptor)."""
        if isinstance(path, int):
            return True
        full = os.path.realpath(os.fsdecode(path))
        return full == os.devnull or Path(full).is_relative_to(self.folder)

    @contextmanager
    def started(self) -> Iterator[None]:
        """What holds for all cases: the canary, the current folder, the limit on memory, the audit hook."""
        if not _Now.hooked:
            sys.addaudithook(_hook)
            _Now.hooked = True
        shutil.rmtree(self.sandbox, ignore_errors=True)
        (self.canary / "deep").mkdir(parents=True)
        for name in ("a", "b.png", "deep/config.json"):
            (self.canary / name).write_text(f"canary {name}")
        self.folder.mkdir()
        self._alive = self._tree()
        before = os.getcwd()
        limit = resource.getrlimit(resource.RLIMIT_AS)
        os.chdir(self.folder)
        if sys.platform == "linux":
            soft = _status("VmSize") + ADDRESS_SPACE
            resource.setrlimit(resource.RLIMIT_AS, (soft, limit[1]))
        handler = signal.signal(signal.SIGALRM, _too_long)
        try:
            yield
        finally:
            signal.signal(signal.SIGALRM, handler)
            resource.setrlimit(resource.RLIMIT_AS, limit)
            os.chdir(before)
            shutil.rmtree(self.sandbox, ignore_errors=True)

    def __enter__(self) -> None:
        """An empty folder; from here on it is watched."""
        for entry in os.scandir(self.folder):
            if entry.is_dir(follow_symlinks=False):
                shutil.rmtree(entry.path)
            else:
                os.unlink(entry.path)
        self.violations.clear()
        self._resident = _reset_peak()
        _Now.watch = self
        # Again and again: what is raised while something is freed is lost.
        signal.setitimer(signal.ITIMER_REAL, SECONDS, 0.1)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        """Raise ``Violation`` for what was done that may not be."""
        signal.setitimer(signal.ITIMER_REAL, 0)
        _Now.watch = None
        if error is not None and isinstance(error, Violation | Hang):
            return
        if self.violations:
            raise Violation(self.violations[0])
        if self._tree() != self._alive:
            raise Violation("the canary was changed")
        grown = _peak() - self._resident
        if grown > MEMORY:
            raise Violation(f"the process grew by {grown / 2**20:.0f} MiB")

    def _tree(self) -> list[tuple[str, int, int, int]]:
        found = []
        for folder in (self.sandbox, self.canary, self.canary / "deep"):
            for entry in sorted(os.scandir(folder), key=lambda e: e.name):
                status = entry.stat(follow_symlinks=False)
                changes = 0 if entry.path == str(self.folder) else status.st_mtime_ns
                found.append((entry.path, status.st_mode, status.st_size if changes else 0, changes))
        return found


def _too_long(number: int, frame: FrameType | None) -> None:
    raise Hang(f"did not end within {SECONDS:g} seconds")


def _status(name: str) -> int:
    """A line of /proc/self/status in bytes."""
    with open("/proc/self/status") as file:
        for line in file:
            if line.startswith(name + ":"):
                return int(line.split()[1]) * 1024
    return 0


def _reset_peak() -> int:
    """What the process has in memory, and from here on its peak is counted anew (on Linux)."""
    if sys.platform != "linux":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    except OSError:
        return _status("VmHWM")
    return _status("VmRSS")


def _peak() -> int:
    return _status("VmHWM") if sys.platform == "linux" else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
