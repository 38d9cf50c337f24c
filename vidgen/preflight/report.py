"""The preflight report of a run, as a table and as JSON."""

import dataclasses
import json
import math
from typing import Any

import jax

from vidgen.core.tree import count, named_leaves
from vidgen.core.typing import PyTree
from vidgen.preflight.compile import CompiledStep, TooLarge
from vidgen.preflight.hlo import count_collectives
from vidgen.preflight.layout import Layout, compare_layout
from vidgen.preflight.topology import GIB, chip_of
from vidgen.train.experiment import Experiment

__all__ = ["Memory", "Report", "lines", "make_report"]

_SHOWN = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes on one device, as the compiler allocates them.

    Attributes:
      arguments: state, frozen weights and batch.
      outputs: of the step; the state aliases the arguments.
      temporaries: activations, gradients and the rest.
      code: the program.
      text_encoder: weights of the frozen text encoder, which stay in memory from the first caption that is
        not in the cache. Memory for encoding a caption is not counted.
      peak: the sum, aliases counted once; if the program is too large, the compiler's sum, with the parts
        unknown.
      available: memory that a program may use; None if it is unknown (CPU).
    """

    arguments: int
    outputs: int | None
    temporaries: int | None
    code: int | None
    text_encoder: int
    peak: int
    available: int | None

    @classmethod
    def read(
        cls,
        executable: jax.stages.Compiled | TooLarge,
        arguments: PyTree,
        available: int | None,
        text_encoder: int = 0,
    ) -> "Memory":
        """Reads the memory analysis of a compiled program.

        Args:
          arguments: of the program, as `jax.ShapeDtypeStruct`s with shardings.
        """
        if isinstance(executable, TooLarge):
            sizes = [
                math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
                for leaf in jax.tree.leaves(arguments)
            ]
            return cls(
                arguments=sum(sizes),
                outputs=None,
                temporaries=None,
                code=None,
                text_encoder=text_encoder,
                peak=executable.needed_bytes + text_encoder,
                available=available,
            )
        found: Any = executable.memory_analysis()
        inputs, outputs = found.argument_size_in_bytes, found.output_size_in_bytes
        temporaries, code = found.temp_size_in_bytes, found.generated_code_size_in_bytes
        return cls(
            arguments=inputs,
            outputs=outputs,
            temporaries=temporaries,
            code=code,
            text_encoder=text_encoder,
            peak=inputs + outputs - found.alias_size_in_bytes + temporaries + code + text_encoder,
            available=available,
        )

    @property
    def fits(self) -> bool:
        return self.available is None or self.peak <= self.available

    def rows(self) -> list[tuple[str, str]]:
        """(name, text) pairs for the report's table."""
        rows = [("memory per chip", "")]
        for name in ("arguments", "outputs", "temporaries", "code"):
            rows += [(f"  {name}", _gib(getattr(self, name)))]
        if self.text_encoder:
            rows += [("  text encoder", f"{_gib(self.text_encoder)}, once a caption is not in its cache")]
        limit = f"of {_gib(self.available)}" if self.available is not None else "(of an unknown limit)"
        return [
            *rows,
            ("  peak", f"{_gib(self.peak)} {limit}: {'fits' if self.fits else 'DOES NOT FIT'}"),
        ]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """A compiled step in numbers.

    Attributes:
      devices: number and kind of the devices.
      layout, collectives: None if the program is too large.
      num_parameters: trained parameters.
      parameters_per_chip: elements of the trained parameters on one device.
      flops: per step over all devices, matrix products and convolutions only, with recomputation; attention
        counts as if nothing were masked.
      seconds_at_peak: per step, with `flops` at the peak rate. No lower bound if attention is masked (packed
        rows, causality), because kernels skip masked blocks.
      advice: what to change if the step does not fit.
    """

    topology: str
    devices: str
    mesh: dict[str, int]
    batch: dict[str, tuple[int, ...]]
    memory: Memory
    layout: Layout | None
    collectives: dict[str, int] | None
    num_parameters: int
    parameters_per_chip: int
    frozen_parameters: int
    flops: float
    seconds_at_peak: float | None
    compile_seconds: float
    advice: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Whether the step fits and keeps the requested sharding of the state."""
        return self.memory.fits and (self.layout is None or not self.layout.moved)

    def to_json(self) -> str:
        """The report as one line of JSON."""
        values = dataclasses.asdict(self) | {"fits": self.memory.fits, "ok": self.ok}
        return json.dumps(values)

    def table(self) -> str:
        """The report as a table."""
        rows = [("devices", f"{self.topology}: {self.devices}")]
        rows += [("mesh", ", ".join(f"{name}={size}" for name, size in self.mesh.items()))]
        rows += [("batch", ", ".join(f"{name} {list(shape)}" for name, shape in self.batch.items()))]
        rows += [
            ("parameters", f"{self.num_parameters:,} trained, {self.parameters_per_chip:,} of them per chip")
        ]
        rows += [("frozen", f"{self.frozen_parameters:,} parameters")]
        rows += self.memory.rows()
        rows += _layout_rows(self.layout)
        if self.collectives is not None:
            counted = ", ".join(f"{number} {name}" for name, number in self.collectives.items())
            rows += [("collectives", f"{counted} (instructions; in a loop once)")]
        counted = "matrix products and convolutions, all chips; masks leave nothing out"
        rows += [("flops per step", f"{self.flops:.3e}, {counted}")]
        if self.seconds_at_peak is not None:
            rows += [
                ("at peak rate", f"{self.seconds_at_peak:.3f} s for these flops: computed, not measured")
            ]
        rows += [("compiled in", f"{self.compile_seconds:.0f} s")]
        rows += [("to make it fit" if not index else "", line) for index, line in enumerate(self.advice)]
        return lines(rows)


def lines(rows: list[tuple[str, str]]) -> str:
    """Formats (name, text) pairs as a table."""
    return "\n".join(f"{name:<17} {text}".rstrip() for name, text in rows)


def make_report(compiled: CompiledStep, experiment: Experiment, topology: str) -> Report:
    """Builds the report of a compiled step.

    Args:
      topology: name of the devices in the report.
    """
    devices = compiled.mesh.devices
    chip = chip_of(devices.flat[0])
    memory = Memory.read(
        compiled.executable,
        (compiled.state, compiled.frozen, compiled.batch),
        chip.hbm_bytes if chip else None,
        compiled.encoder_bytes,
    )
    executable = compiled.executable
    refused = isinstance(executable, TooLarge)
    seconds_at_peak = compiled.flops / devices.size / chip.bf16_flops if chip else None
    return Report(
        topology=topology,
        devices=f"{devices.size} x {devices.flat[0].device_kind}",
        mesh=dict(compiled.mesh.shape),
        batch={name: tuple(leaf.shape) for name, leaf in named_leaves(compiled.batch).items()},
        memory=memory,
        layout=None if refused else compare_layout(compiled.state, executable.output_shardings[0]),
        collectives=None if refused else count_collectives(executable.as_text() or ""),
        num_parameters=count(compiled.state.params),
        parameters_per_chip=_numbers_per_chip(compiled.state.params),
        frozen_parameters=count(compiled.frozen),
        flops=compiled.flops,
        seconds_at_peak=seconds_at_peak,
        compile_seconds=compiled.seconds,
        advice=() if memory.fits else _advice(experiment, compiled),
    )


def _numbers_per_chip(tree: PyTree) -> int:
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) for leaf in jax.tree.leaves(tree))


def _layout_rows(layout: Layout | None) -> list[tuple[str, str]]:
    if layout is None:
        return []
    share = 100 * layout.sharded_bytes / max(layout.total_bytes, 1)
    rows = [("state as asked", f"{layout.as_asked} of {layout.num_arrays} parameters, averages and moments")]
    rows += [
        (
            "state sharded",
            f"{share:.2f} % of {_gib(layout.total_bytes)}; {_gib(layout.per_chip_bytes)} per chip",
        )
    ]
    moved = [f"{name}: {text}" for name, text in layout.moved.items()]
    rows += [("not as asked" if not index else "", line) for index, line in enumerate(_some(moved))]
    replicated = sum(layout.replicated.values())
    rows += [("replicated", f"{len(layout.replicated)} arrays, {replicated / 2**20:.2f} MiB; largest:")]
    largest = [f"{name} {size / 2**10:.1f} KiB" for name, size in layout.replicated.items()]
    return rows + [("", line) for line in _some(largest)]


def _some(lines: list[str]) -> list[str]:
    return lines if len(lines) <= _SHOWN else [*lines[:_SHOWN], f"... and {len(lines) - _SHOWN} more"]


def _advice(experiment: Experiment, compiled: CompiledStep) -> tuple[str, ...]:
    """Changes that make a step smaller, the cheapest first."""
    mesh, run, advice = compiled.mesh, experiment.run, []
    clips = run.batch_size // run.grad_accumulation // (mesh.shape["data"] * mesh.shape["fsdp"])
    if clips > 1:
        advice.append(
            f"{clips} clips are on a chip at once: raise --config.run.grad_accumulation "
            f"(now {run.grad_accumulation}), or lower --config.run.batch_size (now {run.batch_size})"
        )
    path, model = experiment.task.network
    if model.remat != "full":
        advice.append(f'--config.task.{path}.remat=full recomputes activations (now "{model.remat}")')
    if model.dtype != "bfloat16":
        advice.append(f"--config.task.{path}.dtype=bfloat16 halves activations (now {model.dtype})")
    if mesh.shape["data"] > 1:
        advice.append(
            f"--config.mesh.data=1 --config.mesh.fsdp=-1 shards the state {mesh.shape['data']} times finer"
        )
    data = experiment.data
    if data.packing is not None:
        sizes = f"shorter rows: --config.data.packing.tokens_per_row (now {data.packing.tokens_per_row})"
        product = "it"
    else:
        sizes = (
            f"smaller clips: --config.data.num_frames (now {data.num_frames}), .height ({data.height}), "
            f".width ({data.width})"
        )
        product = "their product"
    advice.append(f"{sizes}; attention scores grow with the square of {product}")
    advice.append("a larger slice, or chips with more memory: --topology")
    return tuple(advice)


def _gib(size: int | None) -> str:
    return "not known" if size is None else f"{size / GIB:.3f} GiB"
