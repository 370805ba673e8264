#!/usr/bin/env python3
"""Compile kernels_cu/*.cu for every architecture into cubin/sm_XX/<op>.cubin, and describe them in cubin/manifest.json.

The binaries are committed: users need no compiler. A file is rebuilt when the hash of what it is made from changes (its
source, all it includes, the headers generated from the contracts, the flags, the compiler's version); the same inputs
give the same bytes on every machine. `--check` compares hashes alone, so it needs no compiler and suits every commit.

Exit codes: 0 done, 1 a build or check failed, 2 the command line is wrong.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import click

from gllm_driver.ops import CONTRACTS
from gllm_driver.ops.header import write_headers
from tools import nvrtc
from tools.cubin_tree import FLAGS, MANIFEST_FORMAT, Target, Tree, sha256, write_atomically
from tools.nvcc import OF_RECORD, BuildError, Nvcc, figures, find, losses_in, warnings_in
from tools.nvrtc import Nvrtc

# What ships: more would pass the limit below. The kernels compile for 100 and 120 too: name them with --arch. 61 and 75
# have no kernels on tensor cores and are small.
ARCHS = ("61", "75", "80", "86", "89", "90")
# Architectures that take an earlier one's files: nvcc makes the same instructions for both, but for the order of a few
# in four helper kernels. The manifest has entries for all.
SHARING = {"89": "86"}
# Kernels that no other architecture can run, for the ops that have a file in kernels_cu/sm_<name>; the loader looks
# there before it looks into the whole set.
SPECIAL_ARCHS = ("90a",)
ALLOWED_SPILLS: Mapping[str, int] = {}  # kernel → bytes of spill stores it may have, each with its reason
MAX_TOTAL_NBYTES = 20_000_000


def is_current(tree: Tree, target: Target, entry: Mapping[str, Any] | None, nvcc_version: str) -> bool:
    """Whether the binary on disk is what the sources say."""
    path = tree.cubin / target.file
    return (
        entry is not None
        and entry["source_hash"] == tree.source_hash(target, nvcc_version)
        and path.is_file()
        and sha256(path) == entry["sha256"]
    )


def maker(target: Target) -> Target:
    """The target whose file serves this one."""
    return Target(target.op, SHARING.get(target.arch, target.arch))


def build_one(tree: Tree, compiler: Nvcc | Nvrtc, target: Target, out: Path) -> tuple[dict[str, Any], str, list[str]]:
    """Compile one target into `out`: its manifest entry, the command, warnings. BuildError for errors and spills."""
    source = (tree.kernels / tree.source(target)).relative_to(tree.root)
    command, said = compiler.compile(source, target.arch, list(FLAGS), out, tree.root)
    if losses := losses_in(said):
        raise BuildError(f"{source}: {losses[0].strip()}")
    kernels = figures(said, out.read_bytes())
    spills: list[str] = []  # of architectures that do not ship: told, but no reason to have nothing
    for name, f in kernels.items():
        if not name.startswith(f"{target.op}__"):
            raise BuildError(f"{source}: kernel {name} must be named {target.op}__<variant>")
        if not f.max_threads:
            raise BuildError(f"{source}: kernel {name} has no __launch_bounds__")
        if f.spill_store_nbytes > ALLOWED_SPILLS.get(name, 0):
            problem = (
                f"{source}: kernel {name} spills {f.spill_store_nbytes} bytes for sm_{target.arch} "
                f"({f.registers} registers, {f.max_threads} threads): give it fewer live values or smaller blocks"
            )
            if target.arch in (*ARCHS, *SPECIAL_ARCHS):
                raise BuildError(problem)
            spills.append(problem)
    entry = {
        "op": target.op,
        "arch": target.arch,
        "nvcc": compiler.version,
        "source_hash": tree.source_hash(target, compiler.version),
        "abi_hash": CONTRACTS[target.op].abi_hash,
        "sha256": sha256(out),
        "nbytes": out.stat().st_size,
        "kernels": {name: f.as_json() for name, f in kernels.items()},
    }
    return entry, command, warnings_in(said) + spills


def build(
    tree: Tree, nvcc: Nvcc, targets: Iterable[Target], jobs: int, verbose: bool, older: Nvrtc | None = None
) -> list[str]:
    """Build what is not current, publish what succeeded, and return what went wrong.

    `older` compiles for the architectures that nvcc does not know any more.
    """
    with tree.locked():
        return _build(tree, nvcc, list(targets), jobs, verbose, older)


def _build(tree: Tree, nvcc: Nvcc, targets: list[Target], jobs: int, verbose: bool, older: Nvrtc | None) -> list[str]:
    def compiler(target: Target) -> Nvcc | Nvrtc:
        return older if older and target.arch in nvrtc.ARCHS else nvcc

    manifest = tree.read_manifest()
    files: dict[str, Any] = manifest["files"]
    write_headers(tree.kernels / "generated")
    made = list(dict.fromkeys(maker(t) for t in targets))
    stale = [t for t in made if not is_current(tree, t, files.get(t.file), compiler(t).version)]
    problems: list[str] = []
    for left in tree.cubin.glob(".build-*"):  # by a build that was killed; this one holds the lock
        shutil.rmtree(left)
    scratch = Path(tempfile.mkdtemp(prefix=".build-", dir=tree.cubin))
    pool = ThreadPoolExecutor(max(1, jobs))
    try:
        outs = {target: scratch / target.file.replace("/", "-") for target in stale}
        running = {pool.submit(build_one, tree, compiler(target), target, out): target for target, out in outs.items()}
        for future in as_completed(running):
            target = running[future]
            try:
                entry, command, warnings = future.result()
            except BuildError as error:
                problems.append(str(error))
                continue
            publish(tree, target, outs[target], entry, files)
            report(target, entry, command, warnings, verbose)
    finally:
        pool.shutdown(cancel_futures=True)
        shutil.rmtree(scratch)
    for target in targets:
        if target != maker(target) and (entry := alias(target, files)):
            files[target.file] = entry
    forget_strangers(tree, files)
    write_manifest(tree, files)
    total = total_nbytes(files)
    done = len(stale) - len(problems)
    click.echo(
        f"{done} built, {len(made) - len(stale)} up to date, {len(problems)} failed; "
        f"{len(files)} files, {total / 1e6:.2f} MB in {tree.cubin}"
    )
    return sorted(problems)


def publish(tree: Tree, target: Target, out: Path, entry: dict[str, Any], files: dict[str, Any]) -> None:
    """Put a binary in its place and in the manifest at once, so that an interrupted build keeps what it did."""
    final = tree.cubin / target.file
    final.parent.mkdir(exist_ok=True)
    out.replace(final)
    files[target.file] = entry
    write_manifest(tree, files)


def alias(target: Target, files: Mapping[str, Any]) -> dict[str, Any] | None:
    """The entry of an op for an architecture that shares another's file; None while there is no such file."""
    entry = files.get(maker(target).file)
    return None if entry is None else entry | {"arch": target.arch, "same_as": maker(target).file}


def total_nbytes(files: Mapping[str, Any]) -> int:
    """Bytes of all files that there are."""
    return sum(entry["nbytes"] for entry in files.values() if "same_as" not in entry)


def write_manifest(tree: Tree, files: dict[str, Any]) -> None:
    manifest = {"format": MANIFEST_FORMAT, "flags": list(FLAGS), "files": dict(sorted(files.items()))}
    write_atomically(tree.manifest, json.dumps(manifest, indent=1, sort_keys=True) + "\n")


def forget_strangers(tree: Tree, files: dict[str, Any]) -> None:
    """Drop binaries of ops that are gone, and files nobody speaks of."""
    for name in [n for n, entry in files.items() if entry["op"] not in CONTRACTS]:
        del files[name]
    for path in tree.cubin.glob("sm_*/*.cubin"):
        name = path.relative_to(tree.cubin).as_posix()
        if name not in files or "same_as" in files[name]:
            path.unlink()


def report(target: Target, entry: Mapping[str, Any], command: str, warnings: list[str], verbose: bool) -> None:
    kernels = entry["kernels"]
    most = max(k["registers"] for k in kernels.values())
    click.echo(f"{target.file}  {entry['nbytes'] / 1e3:.1f} kB, {len(kernels)} kernels, at most {most} registers")
    for warning in warnings:
        click.echo(f"  {warning}", err=True)
    if verbose:
        click.echo(f"  {command}")
        for name, k in kernels.items():
            click.echo(
                f"  {name}: {k['registers']} registers, {k['max_threads']} threads, "
                f"{k['static_smem_nbytes']} B shared, {k['stack_nbytes']} B stack, {k['spill_store_nbytes']} B spilled"
            )


def check(tree: Tree, targets: Iterable[Target]) -> list[str]:
    """What differs between the committed binaries and the sources; nothing is compiled or written."""
    manifest = tree.read_manifest()
    files: dict[str, Any] = manifest["files"]
    problems = []
    if manifest.get("flags") != list(FLAGS):
        problems.append(f"manifest: built with flags {manifest.get('flags')}, the script says {list(FLAGS)}")
    targets, sources = list(targets), tree.sources()
    problems += [f"kernels_cu/{op}.cu does not exist" for op in sorted({t.op for t in targets} - set(sources))]
    for target in [t for t in targets if t.op in sources]:
        entry = files.get(target.file)
        if entry is None:
            problems.append(f"{target.file}: not built")
            continue
        if target != maker(target):
            if entry != alias(target, files):
                problems.append(f"{target.file}: not what {maker(target).file} is")
            continue
        path = tree.cubin / target.file
        if not path.is_file():
            problems.append(f"{target.file}: in the manifest, but the file is missing")
        elif sha256(path) != entry["sha256"]:
            problems.append(f"{target.file}: its bytes are not those the manifest describes")
        of_record = nvrtc.OF_RECORD if target.arch in nvrtc.ARCHS else OF_RECORD
        if not entry["nvcc"].startswith(of_record + "."):
            problems.append(f"{target.file}: built by nvcc {entry['nvcc']}, the builder of record is {of_record}")
        if entry["abi_hash"] != CONTRACTS[target.op].abi_hash:
            problems.append(f"{target.file}: built for another argument struct (the contract changed)")
        if entry["source_hash"] != tree.source_hash(target, entry["nvcc"]):
            problems.append(f"{target.file}: older than its sources")
    known = {f"sm_{arch}/{op}.cubin" for op in CONTRACTS for arch in ARCHS}
    known |= {f"sm_{arch}/{op}.cubin" for arch in SPECIAL_ARCHS for op in tree.special_sources(arch)}
    strangers = set(files) | {p.relative_to(tree.cubin).as_posix() for p in tree.cubin.glob("sm_*/*.cubin")}
    problems += [f"{name}: no op and architecture of this version" for name in sorted(strangers - known)]
    total = total_nbytes(files)
    if total > MAX_TOTAL_NBYTES:
        problems.append(f"all files: {total / 1e6:.1f} MB, at most {MAX_TOTAL_NBYTES / 1e6:.0f} MB may be committed")
    return problems


def chosen(tree: Tree, archs: str | None, ops: tuple[str, ...], checking: bool) -> list[Target]:
    """The targets asked for. BuildError for an op without contract or without kernel file."""
    sources = tree.sources()
    strays = sorted(set(sources) - set(CONTRACTS))
    if strays:
        raise BuildError(f"kernels_cu/{strays[0]}.cu has no contract in gllm_driver/ops")
    unknown = sorted(set(ops) - set(CONTRACTS))
    if unknown:
        raise BuildError(f"no op is called {unknown[0]!r}; there are {', '.join(CONTRACTS)}")
    wanted = sorted(ops or (CONTRACTS if checking else sources))
    missing = sorted(set(wanted) - set(sources))
    if missing and not checking:
        raise BuildError(f"kernels_cu/{missing[0]}.cu does not exist: op {missing[0]} has no kernels")
    names = [a.strip().removeprefix("sm_") for a in archs.split(",")] if archs else [*ARCHS, *SPECIAL_ARCHS]
    if any(not re.fullmatch(r"\d+[af]?", a) for a in names):
        raise BuildError(f"--arch takes numbers like 80,86,90a, got {archs!r}")
    return [
        Target(op, arch)
        for arch in dict.fromkeys(names)
        for op in wanted
        if arch not in SPECIAL_ARCHS or op in tree.special_sources(arch)
    ]


@click.command(help=__doc__)
@click.option("--arch", "archs", metavar="80,86", help=f"Architectures; default: {', '.join(ARCHS)}.")
@click.option("--op", "ops", multiple=True, metavar="NAME", help="Only this op; may be given more than once.")
@click.option("--check", "checking", is_flag=True, help="Only say whether the committed binaries fit the sources.")
@click.option("--jobs", type=click.IntRange(1), default=os.cpu_count() or 1, show_default="cores")
@click.option("--verbose", is_flag=True, help="Print commands and the figures of every kernel.")
def main(archs: str | None, ops: tuple[str, ...], checking: bool, jobs: int, verbose: bool) -> None:
    tree = Tree()
    try:
        targets = chosen(tree, archs, ops, checking)
        if checking:
            problems = check(tree, targets)
            if not problems:
                click.echo(f"{len(targets)} binaries fit their sources")
        else:
            nvcc = find()
            if not nvcc.version.startswith(OF_RECORD + "."):
                click.echo(f"nvcc is {nvcc.version}; committed binaries come from {OF_RECORD}", err=True)
            older, missing = None, []
            if any(t.arch in nvrtc.ARCHS for t in targets):
                try:
                    older = nvrtc.find()
                except BuildError as error:  # the others are built all the same
                    missing = [str(error)]
                    targets = [t for t in targets if t.arch not in nvrtc.ARCHS]
            for arch in {t.arch for t in targets} - set(nvrtc.ARCHS):
                nvcc.check_arch(arch)
            problems = missing + build(tree, nvcc, targets, jobs, verbose, older)
    except BuildError as error:
        problems = [str(error)]
    for problem in problems:
        click.echo(problem, err=True)
    if problems and checking:
        click.echo(f"{len(problems)} problems: run python build_cubins.py and commit cubin/", err=True)
    sys.exit(1 if problems else 0)


if __name__ == "__main__":
    main()
