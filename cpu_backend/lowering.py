"""From a numba function to LLVM IR text: numba types and lowers, and nothing is compiled for the host on the way.

numba's dispatchers insist on machine code for every helper a kernel calls. Here their libraries stop at IR: helpers are
linked in as IR and optimized once, together with the kernel, for the target the kernel is built for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import llvmlite.binding as llvm
from llvmlite import ir
from numba.core import codegen, compiler, types
from numba.core.compiler_lock import global_compiler_lock
from numba.core.registry import cpu_target


class _IrLibrary(codegen.JITCodeLibrary):
    """A code library that ends as IR."""

    def _optimize_functions(self, ll_module: Any) -> None:
        ll_module.data_layout = self._codegen._data_layout

    def _optimize_final_module(self) -> None:
        pass

    def _finalize_specific(self) -> None:
        pass

    def get_pointer_to_function(self, name: str) -> int:
        return 0  # what Python would call; our helpers are only called by kernels


class _IrCodegen(codegen.JITCPUCodegen):
    _library_class = _IrLibrary

    def _add_module(self, module: Any) -> None:
        pass

    def set_env(self, env_name: str, env: Any) -> None:
        pass  # environments serve calls from Python


@contextmanager
def _ir_only() -> Iterator[None]:
    """Let everything numba compiles inside the block end as IR. Holds numba's compiler lock."""
    context = cpu_target.target_context
    with global_compiler_lock:
        usual = context._internal_codegen
        context._internal_codegen = _ours()
        try:
            yield
        finally:
            context._internal_codegen = usual


_codegen: list[_IrCodegen] = []


def _ours() -> _IrCodegen:
    if not _codegen:
        _codegen.append(_IrCodegen("gllm.kernels"))
    return _codegen[0]


def lower(function: Callable, argument_types: tuple, name: str) -> str:
    """IR of `function`, all it calls, and a C function `name(int64 …) -> int64` around it. No target is named."""
    flags = compiler.Flags()
    flags.no_compile = True
    flags.no_cpython_wrapper = True
    flags.no_cfunc_wrapper = True
    flags.error_model = "numpy"
    flags.boundscheck = False
    with _ir_only():
        cpu_target.target_context.refresh()
        compiled = compiler.compile_extra(
            cpu_target.typing_context, cpu_target.target_context, function, argument_types, None, flags, {}
        )
        compiled.library.finalize()
        body = compiled.library.get_llvm_str()
    module = llvm.parse_assembly(_without_target(body))
    module.link_in(llvm.parse_assembly(_without_target(str(_wrapper(compiled, len(argument_types), name)))))
    return str(module)


def _wrapper(compiled: Any, num_arguments: int, name: str) -> ir.Module:
    """A C entry point for a function in numba's calling convention: (result*, exception**, arguments) -> status."""
    module = ir.Module()
    i64, i8p = ir.IntType(64), ir.IntType(8).as_pointer()
    returns = compiled.signature.return_type != types.none
    result_type = i64 if returns else i8p
    inner_type = ir.FunctionType(ir.IntType(32), [result_type.as_pointer(), i8p.as_pointer()] + [i64] * num_arguments)
    inner = ir.Function(module, inner_type, compiled.fndesc.llvm_func_name)
    outer = ir.Function(module, ir.FunctionType(i64, [i64] * num_arguments), name)
    b = ir.IRBuilder(outer.append_basic_block())
    result, raised = b.alloca(result_type), b.alloca(i8p)
    b.call(inner, [result, raised, *outer.args])
    b.ret(b.load(result) if returns else ir.Constant(i64, 0))
    return module


def _without_target(text: str) -> str:
    return "\n".join(line for line in text.splitlines() if not line.startswith("target "))
