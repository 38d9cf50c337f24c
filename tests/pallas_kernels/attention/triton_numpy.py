"""What Pallas lowers to Triton, computed in NumPy: the program that a GPU would run, where there is none.

Only what attention needs. Each load and store is checked to lie within its array, and what a mask leaves out
and nothing fills in is NaN. Products are summed in float32; inline assembly is known by its text.
"""

import re
import struct
from typing import NamedTuple

import jax
import ml_dtypes
import numpy as np
from jax._src.lib.mlir import ir
from jax._src.lib.triton import dialect

DTYPES = {
    "bf16": ml_dtypes.bfloat16,
    "f16": np.float16,
    "f32": np.float32,
    "i1": np.bool_,
    "i8": np.int8,
    "i32": np.int32,
    "i64": np.int64,
}
EXP2 = r"\{ \.reg \.f32 x; fma\.rn\.f32 x, \$1, 0f(\w{8}), \$2; ex2\.approx\.ftz\.f32 \$0, x; \}"


class Pointer(NamedTuple):
    """Elements of an array."""

    array: np.ndarray
    offsets: np.ndarray


def pallas_call(kernel, original, **options):
    """In place of `original`, Pallas's own, but for arrays that are there."""

    def run(*arguments):
        call = original(kernel, **options)
        lowered = jax.jit(call).trace(*arguments).lower(lowering_platforms=("cuda",))
        (config,) = configs(lowered)
        inputs = [np.array(x).reshape(-1) for x in jax.tree.leaves(arguments)]
        shapes = jax.tree.leaves(options["out_shape"])
        outputs = [np.full(x.size, -99, x.dtype) for x in shapes]
        grid = [ir.IntegerAttr(config[f"grid_{axis}"]).value for axis in "xyz"]
        module = parse(config)
        for program in np.ndindex(*grid):
            Program(program).run_module(module, [*inputs, *outputs])
        return [jax.numpy.asarray(x.reshape(y.shape)) for x, y in zip(outputs, shapes, strict=True)]

    return run


def configs(lowered):
    """Of the Triton calls in a lowered program, in order."""
    found = []

    def visit(op):
        if op.operation.name == "stablehlo.custom_call":
            found.append(ir.DictAttr(op.operation.attributes["mhlo.backend_config"]))
        return ir.WalkResult.ADVANCE

    lowered.compiler_ir().operation.walk(visit)
    return found


def parse(config):
    """The Triton module of a call."""
    context = ir.Context()
    dialect.register_dialect(context)
    context.load_all_available_dialects()
    return ir.Module.parse(ir.StringAttr(config["ir"]).value_bytes, context=context)


class Program:
    """One program of a grid."""

    def __init__(self, ids):
        self.ids, self.values = ids, {}

    def run_module(self, module, arrays):
        (function,) = module.body.operations
        block = function.operation.regions[0].blocks[0]
        for argument, array in zip(block.arguments, arrays, strict=True):
            self.values[argument] = Pointer(array, np.int64(0))
        self.run_block(block)

    def run_block(self, block):
        """What its last operation gives."""
        for op in block.operations:
            operands = [self.values[x] for x in op.operation.operands]
            name = op.operation.name
            if name in ("scf.yield", "tt.return"):
                return operands
            if name == "scf.for":
                results = self.run_loop(op.operation, *operands)
            else:
                results = [self.compute(name, op.operation, *operands)]
            for result, value in zip(op.operation.results, results, strict=False):
                self.values[result] = value
        raise AssertionError("a block ends with what it gives")

    def run_loop(self, op, first, last, step, *carry):
        block = op.regions[0].blocks[0]
        for i in range(int(first), int(last), int(step)):
            for argument, value in zip(block.arguments, (np.int32(i), *carry), strict=True):
                self.values[argument] = value
            carry = self.run_block(block)
        return carry

    def compute(self, name, op, *x):
        """Of an operation with one result or none."""
        kind, _, plain = name.partition(".")
        if kind == "arith":
            return arith(plain, op, *x)
        return getattr(self, plain)(op, *x)

    def get_program_id(self, op):
        return np.int32(self.ids[ir.IntegerAttr(op.attributes["axis"]).value])

    def make_range(self, op):
        first, last = (ir.IntegerAttr(op.attributes[name]).value for name in ("start", "end"))
        return np.arange(first, last, dtype=np.int32)

    def splat(self, op, x):
        return shaped(op, x, lambda y, shape: np.broadcast_to(y, shape))

    broadcast = splat

    def expand_dims(self, op, x):
        return np.expand_dims(x, ir.IntegerAttr(op.attributes["axis"]).value)

    def trans(self, op, x):
        return x.T

    def addptr(self, op, pointer, offsets):
        return Pointer(pointer.array, pointer.offsets + offsets.astype(np.int64))

    def load(self, op, pointer, mask=None, other=None):
        array, offsets = pointer
        mask = np.True_ if mask is None else mask
        assert ((offsets >= 0) & (offsets < array.size) | ~mask).all(), "a load beyond its array"
        loaded = array[np.where(mask, offsets, 0)]
        fill = np.nan if loaded.dtype.kind in "fV" else -(2**31)
        return np.where(mask, loaded, np.asarray(fill if other is None else other, loaded.dtype))

    def store(self, op, pointer, value, mask=None):
        array, offsets = pointer
        mask = np.broadcast_to(True if mask is None else mask, offsets.shape)
        assert ((offsets >= 0) & (offsets < array.size) | ~mask).all(), "a store beyond its array"
        array[offsets[mask]] = value[mask]

    def dot(self, op, left, right, sums):
        return sums + left.astype(np.float32) @ right.astype(np.float32)

    def reduce(self, op, x):
        combine = op.regions[0].blocks[0].operations[0].operation.name
        reduction = {"arith.addf": np.sum, "arith.maxnumf": np.max}[combine]
        return reduction(x, axis=ir.IntegerAttr(op.attributes["axis"]).value)

    def extern_elementwise(self, op, x):
        symbol = ir.StringAttr(op.attributes["symbol"]).value
        return {"__nv_exp2f": np.exp2, "__nv_logf": np.log}[symbol](x)

    def elementwise_inline_asm(self, op, scores, offsets):
        text = ir.StringAttr(op.attributes["asm_string"]).value
        (rate,) = struct.unpack(">f", bytes.fromhex(re.fullmatch(EXP2, text)[1]))
        # Rounded once, as a fused multiplication and addition is.
        exponents = (scores.astype(np.float64) * rate + offsets).astype(np.float32)
        weights = np.exp2(exponents)
        return np.where(weights < np.finfo(np.float32).tiny, np.float32(0), weights)


def arith(name, op, *x):
    """Arithmetic: the operations of NumPy, but for constants and comparisons."""
    if name == "constant":
        return constant(op.attributes["value"])
    if name in ("cmpi", "cmpf"):
        predicate = ir.IntegerAttr(op.attributes["predicate"]).value
        names = {"cmpi": {2: "less", 3: "less_equal"}, "cmpf": {2: "greater"}}
        return getattr(np, names[name][predicate])(*x)
    if name == "truncf":
        return x[0].astype(element(op.results[0].type))
    functions = {
        "addi": np.add,
        "muli": np.multiply,
        "remui": np.remainder,
        "divui": np.floor_divide,
        "andi": np.logical_and,
        "addf": np.add,
        "subf": np.subtract,
        "mulf": np.multiply,
        "divf": np.divide,
        "maxnumf": np.fmax,
        "select": np.where,
    }
    return functions[name](*x)


def constant(value):
    if isinstance(value, ir.DenseElementsAttr):
        return constant(value.get_splat_value())
    if isinstance(value, ir.FloatAttr):
        return DTYPES[str(value.type)](value.value)
    if isinstance(value, ir.BoolAttr):
        return np.bool_(value.value)
    return DTYPES[str(ir.IntegerAttr(value).type)](ir.IntegerAttr(value).value)


def element(kind):
    """The NumPy type of what a value or a tensor holds."""
    if isinstance(kind, ir.RankedTensorType):
        kind = kind.element_type
    return DTYPES[str(kind)]


def shaped(op, x, function):
    shape = tuple(ir.RankedTensorType(op.results[0].type).shape)
    if isinstance(x, Pointer):
        return Pointer(x.array, function(x.offsets, shape))
    return function(x, shape)
