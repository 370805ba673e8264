"""build_cubins.py: what is built when, what the check sees, and what users read when something is missing or wrong."""

from __future__ import annotations

import json
import os
import shutil
import stat
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT))  # behind the installed package, if there is one

import build_cubins  # noqa: E402
from tools import cubin_tree, nvcc, nvrtc  # noqa: E402
from tools.cubin_tree import Target, Tree  # noqa: E402
from tools.nvcc import BuildError, Nvcc  # noqa: E402

TINY = """
#include "common/scale.cuh"
#include "generated/rope_table_args.h"
extern "C" __global__ void __launch_bounds__(96) rope_table__tiny(const RopeTableArgs a) { a.cos_sin[0] = SCALE; }
"""
GREEDY = """
extern "C" __global__ void __launch_bounds__(1024) rope_table__greedy(float *x) {
  float v[160];
#pragma unroll
  for (int i = 0; i < 160; i++) v[i] = x[i * 1024 + threadIdx.x];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 160; i++) x[threadIdx.x * 160 + i] = v[159 - i] * v[(i * 7) % 160];
}
"""
TARGET = Target("rope_table", "80")

has_nvcc = pytest.mark.skipif(not nvcc.candidates() or not shutil.which("gcc"), reason="needs nvcc and gcc")


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    """A checkout with one small kernel."""
    tree = Tree(tmp_path / "checkout")
    (tree.kernels / "common").mkdir(parents=True)
    (tree.kernels / "rope_table.cu").write_text(TINY)
    (tree.kernels / "common" / "scale.cuh").write_text("#pragma once\n#define SCALE 2.0f\n")
    return tree


@pytest.fixture
def compiler() -> Nvcc:
    return nvcc.find()


def build(tree: Tree, compiler: Nvcc, *targets: Target) -> list[str]:
    return build_cubins.build(tree, compiler, targets or [TARGET], jobs=2, verbose=True)


def manifest(tree: Tree) -> dict:
    return json.loads(tree.manifest.read_text())


# --- building -------------------------------------------------------------------------------------------------------


@has_nvcc
def test_kernels_of_one_architecture_alone(tree: Tree, compiler: Nvcc) -> None:
    """They have a file in a folder named after it, and a binary beside those of all."""
    (tree.kernels / "sm_90a").mkdir()
    text = TINY.replace("__tiny", "__wide").replace('"common', '"../common').replace('"generated', '"../generated')
    (tree.kernels / "sm_90a" / "rope_table.cu").write_text(text)
    targets = build_cubins.chosen(tree, "90,90a", ("rope_table",), False)
    assert [tree.source(t) for t in targets] == ["rope_table.cu", "sm_90a/rope_table.cu"]
    assert build(tree, compiler, *targets) == []
    files = manifest(tree)["files"]
    assert list(files["sm_90a/rope_table.cubin"]["kernels"]) == ["rope_table__wide"]
    assert build_cubins.check(tree, targets) == []
    (tree.kernels / "rope_table.cu").write_text(TINY + "// another\n")
    assert build_cubins.check(tree, targets) == ["sm_90/rope_table.cubin: older than its sources"]


def test_an_architecture_with_kernels_of_its_own_needs_no_others(tree: Tree) -> None:
    assert build_cubins.chosen(tree, "90a", ("rope_table",), False) == []


def test_slow_products_of_warpgroups_fail_a_build() -> None:
    said = "ptxas info : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized due to ..."
    assert nvcc.losses_in(f"ptxas info : fine\n{said}") == [said]


@has_nvcc
def test_a_build_describes_its_kernels_and_passes_the_check(tree: Tree, compiler: Nvcc) -> None:
    assert build(tree, compiler) == []
    entry = manifest(tree)["files"]["sm_80/rope_table.cubin"]
    kernel = entry["kernels"].pop("rope_table__tiny")
    assert entry["kernels"] == {}
    assert kernel["max_threads"] == 96
    assert 2 <= kernel["registers"] <= 16
    assert kernel["spill_store_nbytes"] == kernel["static_smem_nbytes"] == 0
    assert entry["nbytes"] == (tree.cubin / TARGET.file).stat().st_size
    assert entry["abi_hash"] == build_cubins.CONTRACTS["rope_table"].abi_hash
    if compiler.version.startswith(nvcc.OF_RECORD + "."):
        assert build_cubins.check(tree, [TARGET]) == []
    assert sorted(p.name for p in tree.cubin.iterdir()) == [".lock", "manifest.json", "sm_80"]


@has_nvcc
def test_an_architecture_that_shares_anothers_file(
    tree: Tree, compiler: Nvcc, capsys: pytest.CaptureFixture[str]
) -> None:
    both = [Target("rope_table", "86"), Target("rope_table", "89")]
    assert build(tree, compiler, both[1]) == []
    assert [p.parent.name for p in tree.cubin.glob("sm_*/*.cubin")] == ["sm_86"]
    first, second = (manifest(tree)["files"][t.file] for t in both)
    assert second == first | {"arch": "89", "same_as": both[0].file}
    assert build_cubins.total_nbytes(manifest(tree)["files"]) == first["nbytes"]
    capsys.readouterr()
    assert build(tree, compiler, *both) == []
    assert "0 built, 1 up to date" in capsys.readouterr().out
    (tree.kernels / "common" / "scale.cuh").write_text("#define SCALE 3.0f\n")
    build(tree, compiler, both[0])
    problems = build_cubins.check(tree, both)
    assert "sm_89/rope_table.cubin: not what sm_86/rope_table.cubin is" in problems
    build(tree, compiler, *both)
    assert "sm_89/rope_table.cubin" not in "".join(build_cubins.check(tree, both))


@has_nvcc
def test_nothing_is_built_twice(tree: Tree, compiler: Nvcc, capsys: pytest.CaptureFixture[str]) -> None:
    build(tree, compiler)
    before, stamp = tree.manifest.read_bytes(), (tree.cubin / TARGET.file).stat().st_mtime_ns
    capsys.readouterr()
    assert build(tree, compiler) == []
    assert "0 built, 1 up to date, 0 failed" in capsys.readouterr().out
    assert tree.manifest.read_bytes() == before
    assert (tree.cubin / TARGET.file).stat().st_mtime_ns == stamp


@has_nvcc
def test_the_same_sources_give_the_same_bytes_elsewhere(tree: Tree, compiler: Nvcc, tmp_path: Path) -> None:
    other = Tree(tmp_path / "some other place")
    shutil.copytree(tree.root, other.root)
    build(tree, compiler)
    build(other, compiler)
    assert (tree.cubin / TARGET.file).read_bytes() == (other.cubin / TARGET.file).read_bytes()
    assert tree.manifest.read_bytes() == other.manifest.read_bytes()


@has_nvcc
def test_a_changed_include_is_seen_and_rebuilt(tree: Tree, compiler: Nvcc, capsys: pytest.CaptureFixture[str]) -> None:
    build(tree, compiler)
    before = (tree.cubin / TARGET.file).read_bytes()
    (tree.kernels / "common" / "scale.cuh").write_text("#define SCALE 3.0f\n")
    assert "sm_80/rope_table.cubin: older than its sources" in build_cubins.check(tree, [TARGET])
    build(tree, compiler)
    assert "1 built" in capsys.readouterr().out
    assert (tree.cubin / TARGET.file).read_bytes() != before


@has_nvcc
def test_a_damaged_binary_is_rebuilt_and_strangers_go(tree: Tree, compiler: Nvcc) -> None:
    build(tree, compiler)
    path, good = tree.cubin / TARGET.file, (tree.cubin / TARGET.file).read_bytes()
    path.write_bytes(good[:-1] + b"\x01")
    stranger = tree.cubin / "sm_80" / "no_such_op.cubin"
    stranger.write_bytes(b"")
    assert build(tree, compiler) == []
    assert path.read_bytes() == good
    assert not stranger.exists()


@has_nvcc
def test_an_interrupted_build_keeps_what_it_did(
    tree: Tree, compiler: Nvcc, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tree.kernels / "sample.cu").write_text(TINY.replace("rope_table__tiny", "sample__tiny"))
    targets = [TARGET, Target("sample", "80")]
    reported: list[Target] = []

    def interrupt(target: Target, *_: object) -> None:
        reported.append(target)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(build_cubins, "report", interrupt)
        with pytest.raises(KeyboardInterrupt):
            build_cubins.build(tree, compiler, targets, jobs=1, verbose=False)
    assert list(manifest(tree)["files"]) == [reported[0].file]
    (tree.cubin / ".build-killed").mkdir()
    assert build_cubins.build(tree, compiler, targets, jobs=1, verbose=False) == []
    assert "1 built, 1 up to date" in capsys.readouterr().out
    assert list(tree.cubin.glob(".build-*")) == []


@has_nvcc
def test_an_error_shows_file_and_line_and_spares_the_rest(tree: Tree, compiler: Nvcc) -> None:
    build(tree, compiler)
    before = (tree.cubin / TARGET.file).read_bytes()
    (tree.kernels / "rope_table.cu").write_text(TINY + "int broken = nonsense;\n")
    (tree.kernels / "sample.cu").write_text(TINY.replace("rope_table__tiny", "sample__tiny"))
    problems = build(tree, compiler, TARGET, Target("sample", "80"))
    assert len(problems) == 1
    assert problems[0].startswith("kernels_cu/rope_table.cu does not compile for sm_80:\n")
    assert "kernels_cu/rope_table.cu(5): error" in problems[0]
    assert (tree.cubin / TARGET.file).read_bytes() == before
    assert "sm_80/sample.cubin" in manifest(tree)["files"]


@has_nvcc
@pytest.mark.parametrize(
    ("source", "problem"),
    [
        (TINY.replace("rope_table__tiny", "tiny"), "kernel tiny must be named rope_table__<variant>"),
        (TINY.replace("__launch_bounds__(96)", ""), "kernel rope_table__tiny has no __launch_bounds__"),
        (GREEDY, "kernel rope_table__greedy spills"),
    ],
)
def test_kernels_that_break_the_rules_fail(tree: Tree, compiler: Nvcc, source: str, problem: str) -> None:
    (tree.kernels / "rope_table.cu").write_text(source)
    problems = build(tree, compiler)
    assert len(problems) == 1
    assert problem in problems[0]
    assert manifest(tree)["files"] == {}


@has_nvcc
def test_spills_for_an_architecture_that_does_not_ship_are_told(
    tree: Tree, compiler: Nvcc, capsys: pytest.CaptureFixture[str]
) -> None:
    (tree.kernels / "rope_table.cu").write_text(GREEDY)
    assert build(tree, compiler, Target("rope_table", "120")) == []
    assert "kernel rope_table__greedy spills" in capsys.readouterr().err
    assert "sm_120/rope_table.cubin" in manifest(tree)["files"]


@has_nvcc
def test_without_a_host_compiler_the_error_says_so(
    tree: Tree, compiler: Nvcc, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    problems = build(tree, compiler)
    assert len(problems) == 1
    assert "nvcc needs a host compiler: install gcc" in problems[0]


# --- the check: no compiler needed ----------------------------------------------------------------------------------


@pytest.fixture
def built(tree: Tree) -> Tree:
    """A checkout whose binary and manifest were made by hand."""
    path = tree.cubin / TARGET.file
    path.parent.mkdir(parents=True)
    path.write_bytes(b"binary")
    entry = {
        "op": "rope_table",
        "arch": "80",
        "nvcc": "13.0.88",
        "source_hash": tree.source_hash(TARGET, "13.0.88"),
        "abi_hash": build_cubins.CONTRACTS["rope_table"].abi_hash,
        "sha256": cubin_tree.sha256(path),
        "nbytes": 6,
        "kernels": {},
    }
    write_manifest(tree, entry)
    return tree


def write_manifest(tree: Tree, entry: dict, **changes: object) -> None:
    whole = {"format": 1, "flags": list(cubin_tree.FLAGS), "files": {TARGET.file: entry}, **changes}
    tree.manifest.write_text(json.dumps(whole))


def entry_of(tree: Tree) -> dict:
    return manifest(tree)["files"][TARGET.file]


def test_what_fits_passes_without_a_compiler(built: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvcc, "candidates", list)
    assert build_cubins.check(built, [TARGET]) == []


def test_the_check_writes_nothing(built: Tree) -> None:
    before = sorted(built.root.rglob("*"))
    build_cubins.check(built, [TARGET, Target("rope_table", "90")])
    assert sorted(built.root.rglob("*")) == before


@pytest.mark.parametrize(
    ("field", "value", "problem"),
    [
        ("nvcc", "13.5.37", "built by nvcc 13.5.37, the builder of record is 13.0"),
        ("abi_hash", "0", "built for another argument struct"),
        ("source_hash", "0", "older than its sources"),
        ("sha256", "0", "its bytes are not those the manifest describes"),
        ("nbytes", 1 << 30, "at most 20 MB may be committed"),
    ],
)
def test_what_does_not_fit_is_listed(built: Tree, field: str, value: object, problem: str) -> None:
    write_manifest(built, {**entry_of(built), field: value})
    problems = build_cubins.check(built, [TARGET])
    assert any(problem in p for p in problems), problems


def test_missing_and_strange_files_are_listed(built: Tree) -> None:
    (built.cubin / TARGET.file).rename(built.cubin / "sm_80" / "stranger.cubin")
    problems = build_cubins.check(built, [TARGET, Target("rope_table", "90"), Target("linear", "80")])
    assert problems == [
        "kernels_cu/linear.cu does not exist",
        "sm_80/rope_table.cubin: in the manifest, but the file is missing",
        "sm_90/rope_table.cubin: not built",
        "sm_80/stranger.cubin: no op and architecture of this version",
    ]


def test_other_flags_are_listed(built: Tree) -> None:
    write_manifest(built, entry_of(built), flags=["-O0"])
    assert "manifest: built with flags ['-O0']" in build_cubins.check(built, [TARGET])[0]


def test_a_changed_contract_is_seen(built: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    changed = {**cubin_tree.headers(), "rope_table_args.h": "struct RopeTableArgs;"}
    monkeypatch.setattr(cubin_tree, "headers", lambda: changed)
    assert build_cubins.check(built, [TARGET]) == ["sm_80/rope_table.cubin: older than its sources"]


@pytest.mark.parametrize("text", ["{", "[]", '{"format": 2, "files": {}}', '{"format": 1, "files": []}'])
def test_a_damaged_manifest_is_named(built: Tree, text: str) -> None:
    built.manifest.write_text(text)
    with pytest.raises(BuildError, match=r"manifest\.json .*delete it and build again"):
        build_cubins.check(built, [TARGET])


def test_an_include_that_does_not_exist_is_named(built: Tree) -> None:
    (built.kernels / "common" / "scale.cuh").write_text('#include "other.cuh"\n')
    with pytest.raises(BuildError, match=r"rope_table\.cu includes common/other\.cuh, which does not exist"):
        build_cubins.check(built, [TARGET])


def test_bytes_that_are_no_binary_are_refused() -> None:
    with pytest.raises(BuildError, match="no ELF file"):
        nvcc.max_threads(b"not a cubin")


def test_ptxas_output_in_another_form_is_an_error() -> None:
    with pytest.raises(BuildError, match="in a form this script does not know"):
        nvcc.figures("ptxas info    : Compiling entry function 'f' for 'sm_80'\nnews", EMPTY_ELF)
    with pytest.raises(BuildError, match="the CUBIN holds"):
        nvcc.figures(
            "ptxas info    : Compiling entry function 'f' for 'sm_80'\n"
            "    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads\n"
            "ptxas info    : Used 8 registers\n",
            EMPTY_ELF,
        )


EMPTY_ELF = b"\x7fELF\x02\x01" + bytes(58)


# --- finding nvcc; the command line ---------------------------------------------------------------------------------


def fake_nvcc(folder: Path, says: str) -> Path:
    """A program that answers --version; no real compiler is too old or broken on demand."""
    path = folder / "bin" / "nvcc"
    path.parent.mkdir(parents=True)
    path.write_text(f"#!/bin/sh\necho '{says}'\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def release(version: str) -> str:
    return f"Cuda compilation tools, release {version.rpartition('.')[0]}, V{version}"


@pytest.fixture
def nowhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A machine without nvcc."""
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin")
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    if shutil.which("nvcc"):
        pytest.skip("nvcc is in /bin")


@pytest.mark.usefixtures("nowhere")
def test_no_nvcc_says_where_it_looked_and_what_to_do() -> None:
    with pytest.raises(BuildError, match=r"no nvcc on PATH, in CUDA_HOME .*pip install '\.\[cuda-build\]'"):
        nvcc.find()


@pytest.mark.usefixtures("nowhere")
@pytest.mark.parametrize(
    ("says", "problem"),
    [
        (release("12.9.86"), r"nvcc 13\.0 or newer is needed: .*/bin/nvcc \(CUDA_HOME\) is 12\.9\.86; install"),
        ("Segmentation fault", r"--version says nothing useful: 'Segmentation fault'"),
    ],
)
def test_an_unusable_nvcc_is_named(says: str, problem: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_nvcc(tmp_path / "toolkit", says)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "toolkit"))
    with pytest.raises(BuildError, match=problem):
        nvcc.find()


@pytest.mark.usefixtures("nowhere")
def test_the_builder_of_record_is_preferred_wherever_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    newer = fake_nvcc(tmp_path / "newer", release("13.5.37"))
    monkeypatch.setenv("PATH", f"{newer.parent}{os.pathsep}{os.environ['PATH']}")
    assert nvcc.find().path == newer
    record = fake_nvcc(tmp_path / "site" / "nvidia" / "cu13", release("13.0.88"))
    monkeypatch.setattr(sys, "path", [str(tmp_path / "site")])
    assert nvcc.find() == Nvcc(record, "13.0.88", ())


def test_architectures_the_compiler_does_not_know() -> None:
    compiler = Nvcc(Path("nvcc"), "13.0.88", ("75", "80", "90"))
    for arch in ("75", "80", "90", "90a"):
        compiler.check_arch(arch)
    for arch in ("61", "80a", "91"):
        with pytest.raises(BuildError, match=f"does not know architecture '{arch}'; it knows 75, 80, 90"):
            compiler.check_arch(arch)


def has_nvrtc() -> bool:
    try:
        nvrtc.find()
    except BuildError:
        return False
    return True


@pytest.mark.skipif(not has_nvrtc(), reason="needs NVRTC 12.9")
def test_an_architecture_that_nvcc_does_not_know_any_more(tree: Tree) -> None:
    target, older = Target("rope_table", "61"), nvrtc.find()
    unused = Nvcc(Path("nvcc"), "13.0.88", ("80",))
    assert build_cubins.build(tree, unused, [target], 1, True, older) == []
    entry = manifest(tree)["files"][target.file]
    assert entry["nvcc"] == older.version
    assert entry["kernels"]["rope_table__tiny"]["max_threads"] == 96
    assert build_cubins.check(tree, [target]) == []
    (tree.kernels / "rope_table.cu").write_text(TINY.replace("SCALE;", "NOTHING;"))
    (problem,) = build_cubins.build(tree, unused, [target], 1, True, older)
    assert problem.startswith("kernels_cu/rope_table.cu does not compile for sm_61:")
    assert 'error: identifier "NOTHING" is undefined' in problem
    with pytest.raises(BuildError, match=r"for architectures 60, 61, .* got '80'"):
        older.check_arch("80")


def test_without_nvrtc_the_others_are_built(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(nvrtc.sys, "path", [str(tmp_path)])
    with pytest.raises(BuildError, match=r"below 75 are built by NVRTC 12\.9, .*pip install '\.\[cuda-build\]'"):
        nvrtc.find()
    asked = []
    monkeypatch.setattr(build_cubins, "find", lambda: Nvcc(Path("nvcc"), "13.0.88", ("75", "80")))
    monkeypatch.setattr(build_cubins, "build", lambda tree, nvcc, targets, *rest: asked.extend(targets) or [])
    done = CliRunner().invoke(build_cubins.main, ["--arch", "61,75", "--op", "linear"])
    assert (done.exit_code, asked) == (1, [Target("linear", "75")])
    assert "NVRTC 12.9, which is not installed" in done.output


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--op", "nothing"], "no op is called 'nothing'; there are embedding, "),
        (["--arch", "eighty"], "--arch takes numbers like 80,86,90a, got 'eighty'"),
        (["--arch", "80,"], "--arch takes numbers"),
    ],
)
def test_wrong_arguments_are_one_line(arguments: list[str], problem: str) -> None:
    done = CliRunner().invoke(build_cubins.main, arguments)
    assert done.exit_code == 1
    assert problem in done.output
    assert done.output.count("\n") == 1


def test_every_op_must_have_a_contract(tree: Tree) -> None:
    (tree.kernels / "stray.cu").write_text("")
    with pytest.raises(BuildError, match=r"kernels_cu/stray\.cu has no contract"):
        build_cubins.chosen(tree, None, (), checking=False)


def test_kernels_launch_arithmetic_and_contracts_have_the_same_names() -> None:
    kernels = {p.stem for p in (ROOT / "kernels_cu").glob("*.cu")}
    launches = {p.stem for p in (ROOT / "gllm_driver" / "launch").glob("[!_]*.py")} - {"base"}
    assert kernels == launches <= set(build_cubins.CONTRACTS)
