"""Compiles the GPU kernels for NVIDIA devices without having one, and prints what became of them as JSON.

Run as a program of its own: where Triton interprets, it does not compile.
"""

import json
import re
import sys

from triton import compiler
from triton.backends.compiler import GPUTarget

from regrow.kernels import gpu, triton_kernels

POINTERS = {"pointer": "*i32", "source": "*i32", "slot": "*i32", "row_ptr": "*i32", "col_idx": "*i32", "sums": "*fp32"}
FLOATS = dict.fromkeys(("values", "gradient", "mean", "square", "size", "root"), "*fp32")
FLOATS |= dict.fromkeys(("rest1", "beta2", "rest2", "keep", "eps"), "fp32")
POINTERS |= {"owner": "*i32", "col_ptr": "*i32", "row_idx": "*i32", "slot_t": "*i32"}


def compiled(kernel, pointers: dict[str, str], constants: dict, capability: int, warps: int, stages: int) -> str:
    """PTX, for sizes and strides that are multiples of 16."""
    constexprs = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    signature, attributes = {}, {}
    for i, name in enumerate(kernel.arg_names):
        signature[name] = "constexpr" if name in constants else pointers.get(name, "i32")
        if name not in constants and signature[name] != "fp32":
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = compiler.ASTSource(kernel, signature, constexprs=constexprs, attrs=attributes)
    options = {"num_warps": warps, "num_stages": stages}
    return compiler.compile(source, target=GPUTarget("cuda", capability, 32), options=options).asm["ptx"]


def report(ptx: str) -> dict[str, int]:
    return {
        "matrix": len(re.findall(r"wgmma\.mma|mma\.sync", ptx)),
        "wide_loads": len(re.findall(r"cp\.async\.c[ag]\.shared\.global.*, 0x10|ld\.global\S*\.v4", ptx)),
        "local_memory": len(re.findall(r"(ld|st)\.local", ptx)),
    }


SQUARE = [(1, 1), (8, 8), (16, 16), (64, 64)]
CASES = [(90, "bf16", block) for block in [*SQUARE, (16, 1)]] + [(90, "fp32", (16, 16)), (80, "bf16", (16, 16))]


def main() -> None:
    reports = {}
    for capability, dtype, (height, width) in CASES:
        pointers = dict.fromkeys(("x", "g", "values", "bias", "y", "slope"), f"*{dtype}") | POINTERS
        cut = gpu.plan(height, width)
        along = "token" if cut.feature_major else "feature"
        both = {"TOKENS": cut.tokens, "COUNT": max(1, cut.terms // width), "PRECISION": "tf32", "WIDEN": False}
        strides = {"TARGET": height, "SOURCE": width, "TARGET_STRIDE": width, "SOURCE_STRIDE": 1}
        flags = {"TARGETS": cut.targets, "WITH_BIAS": True, "GELU": True, "WITH_SLOPE": True}
        kernels = {
            "product": both | strides | flags | {f"x_{along}": 1},
            "block_products": both | {"HEIGHT": height, "WIDTH": width, f"x_{along}": 1, f"g_{along}": 1},
            "by_columns": {"CHUNK": 1024},
        }
        for name, constants in kernels.items():
            kernel = getattr(triton_kernels, name)
            ptx = compiled(kernel, pointers, constants, capability, cut.warps, cut.stages)
            reports[f"{name} sm_{capability} {dtype} {height}x{width}"] = report(ptx)
    reports["adamw"] = report(compiled(triton_kernels.adamw, FLOATS, {"CHUNK": 1024}, 90, 4, 3))
    json.dump(reports, sys.stdout)


if __name__ == "__main__":
    main()
