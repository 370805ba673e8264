#!/usr/bin/env python3
"""Build the simulated device: kernels_cu/*.cu by a C++ compiler, and a libcuda.so.1 that runs them.

Prints, as its last line, the folder for which `LD_LIBRARY_PATH=<folder> gllm generate --device cuda …` uses it.
What has not changed is not compiled again: an object is named after the hash of its preprocessed text and flags.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
KERNELS = ROOT / "kernels_cu"
TEST_KERNELS = HERE / "kernels"
KERNEL_LIBRARY = "libkernels_host.so"
DRIVER_LIBRARY = "libcuda.so.1"

# No -fextern-tls-init: the engine's one thread-local pointer needs no initializer, and calls to one would be slow.
COMMON = ["-std=c++20", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-fno-extern-tls-init", "-g1", "-w"]
OPTIMIZE = {
    "none": ["-O3"],
    "asan": ["-O1", "-fsanitize=address", "-fno-omit-frame-pointer"],
    "tsan": ["-O1", "-fsanitize=thread"],
}
# The kernel's name is what stands before the parameter list, after attributes (__launch_bounds__ expands to nothing).
KERNEL = re.compile(r'extern "C"\s+__attribute__\(\(visibility\("default"\)\)\)\s+void\s+(\w+)\s*\(')


class BuildError(Exception):
    """A compiler said no; the message is what it said."""


def run(command: list[str], **kwargs: object) -> str:
    done = subprocess.run(command, capture_output=True, text=True, **kwargs)  # type: ignore[call-overload]
    if done.returncode:
        raise BuildError(f"{' '.join(command)}\n{done.stderr.strip()}")
    return done.stdout


class Builder:
    """One build folder, one compiler, one set of flags."""

    def __init__(self, out: Path, sanitizer: str, compiler: str) -> None:
        self.out = out
        self.objects = out / "objects"
        self.objects.mkdir(parents=True, exist_ok=True)
        self.compiler = compiler
        self.sanitizer = sanitizer
        machine = ["-march=x86-64-v3"] if os.uname().machine == "x86_64" else []
        self.flags = [*COMMON, *machine, *OPTIMIZE[sanitizer]]
        self.engine_flags = [f if f != "-fsanitize=thread" else "-DHOSTSIM_TSAN_ENGINE" for f in self.flags]

    def kernels(self, source: Path) -> Path:
        """The object of one .cu file, with its kernels registered under their names."""
        includes = [f"-I{HERE / 'engine'}", f"-I{KERNELS}"]
        text = run([self.compiler, *self.flags, *includes, "-x", "c++", "-E", str(source)])
        names = KERNEL.findall(text)
        if not names:
            raise BuildError(f'{source}: no kernel: nothing reads extern "C" __global__ void name(…)')
        text += "".join(
            f'static hs::Registered hostsim_registered_{n}(hs::KernelOf<&{n}>::named("{n}"));\n' for n in names
        )
        return self.compile_text(f"{source.parent.name}-{source.stem}", text, self.flags)

    def host(self, source: Path) -> Path:
        """The object of one C++ file of the engine or the stub driver."""
        text = run([self.compiler, *self.engine_flags, "-E", str(source)])
        return self.compile_text(f"{source.parent.name}-{source.stem}", text, self.engine_flags)

    def compile_text(self, stem: str, text: str, flags: list[str]) -> Path:
        key = hashlib.sha256("\0".join([self.compiler, *flags, text]).encode()).hexdigest()[:16]
        target = self.objects / f"{stem}.{key}.o"
        if not target.exists():
            with tempfile.TemporaryDirectory(dir=self.objects) as folder:
                (Path(folder) / "a.ii").write_text(text)
                run([self.compiler, *flags, "-c", f"{folder}/a.ii", "-o", f"{folder}/a.o"])
                os.replace(f"{folder}/a.o", target)
            for old in self.objects.glob(f"{stem}.*.o"):
                if old != target and old.stem.rpartition(".")[0] == stem:
                    old.unlink(missing_ok=True)
        return target

    def link(self, name: str, objects: list[Path], *flags: str) -> None:
        """Link unless the objects are the same, and replace the library in one step: processes may be using it."""
        target = self.out / name
        listing = "\n".join(str(o) for o in objects)
        record = self.objects / f"{name}.objects"
        if target.exists() and record.exists() and record.read_text() == listing:
            return
        sanitize = [f for f in self.flags if f.startswith("-fsanitize")]
        with tempfile.TemporaryDirectory(dir=self.out) as folder:
            command = [self.compiler, "-shared", *sanitize, "-o", f"{folder}/a.so", *map(str, objects), *flags]
            run([*command, "-lpthread", "-ldl"])
            os.replace(f"{folder}/a.so", target)
        record.write_text(listing)


def build(
    out: Path | None = None,
    sanitizer: str | None = None,
    compiler: str = "g++",
    ops: list[str] | None = None,
    jobs: int | None = None,
) -> Path:
    """Build into `out` and return it: for the sanitizer this process runs under, unless another is named.

    Raises BuildError with every compiler's complaint.
    """
    sanitizer = sanitizer or os.environ.get("GLLM_SANITIZER", "none")
    out = out or default_folder(sanitizer, ops)
    builder = Builder(out, sanitizer, compiler)
    with (out / ".lock").open("w") as lock:  # one build at a time in a folder
        fcntl.flock(lock, fcntl.LOCK_EX)
        _build(builder, ops, jobs)
    return out


def _build(builder: Builder, ops: list[str] | None, jobs: int | None) -> None:
    write_generated_headers()
    kernels = [*sorted(KERNELS.glob("*.cu")), *sorted(KERNELS.glob("sm_*/*.cu"))]
    if ops is not None:
        unknown = set(ops) - {k.stem for k in kernels}
        if unknown:
            raise BuildError(
                f"no such op: {', '.join(sorted(unknown))}; there are {', '.join(sorted({k.stem for k in kernels}))}"
            )
        kernels = [k for k in kernels if k.stem in ops]
    kernels += sorted(TEST_KERNELS.glob("*.cu"))
    with ThreadPoolExecutor(jobs or os.cpu_count() or 1) as pool:
        kernel_jobs = [pool.submit(builder.kernels, source) for source in kernels]
        engine_jobs = [pool.submit(builder.host, source) for source in sorted((HERE / "engine").glob("*.cpp"))]
        stub_jobs = [pool.submit(builder.host, source) for source in sorted((HERE / "stub").glob("*.cpp"))]
        errors = [str(e) for job in kernel_jobs + engine_jobs + stub_jobs if (e := job.exception())]
    built = [job.result() for job in kernel_jobs if not job.exception()]
    if not any(job.exception() for job in engine_jobs) and built:
        builder.link(KERNEL_LIBRARY, built + [job.result() for job in engine_jobs])
    if stub_jobs and not any(job.exception() for job in stub_jobs):
        builder.link(DRIVER_LIBRARY, [job.result() for job in stub_jobs], f"-Wl,-soname,{DRIVER_LIBRARY}")
    if errors:
        raise BuildError("\n\n".join(errors))


def default_folder(sanitizer: str = "none", ops: list[str] | None = None) -> Path:
    """Where a build goes unless told otherwise; one of a few ops, or of the test kernels alone, has its own."""
    parts = ["hostsim", *([] if sanitizer == "none" else [sanitizer]), *([] if ops is None else ops or ["tests"])]
    return ROOT / "build" / "-".join(parts)


def write_generated_headers() -> None:
    """The argument structs, from the contracts."""
    sys.path.insert(0, str(ROOT))
    from gllm_driver.ops.header import write_headers

    write_headers(KERNELS / "generated")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--san", choices=sorted(OPTIMIZE), default="none", help="sanitizer to build with")
    parser.add_argument("--out", type=Path, help="folder to build in (default: build/hostsim[-SAN][-OPS])")
    parser.add_argument("--op", help="comma-separated ops to build (default: every kernels_cu/*.cu)")
    parser.add_argument("--cxx", default=os.environ.get("CXX", "g++"), help="C++ compiler (default: $CXX or g++)")
    parser.add_argument("--jobs", type=int, help="compilers to run at once (default: one per processor)")
    options = parser.parse_args()
    try:
        out = build(options.out, options.san, options.cxx, options.op.split(",") if options.op else None, options.jobs)
    except BuildError as error:
        print(error, file=sys.stderr)
        return 1
    print(out.resolve())
    return 0


if __name__ == "__main__":
    sys.exit(main())
