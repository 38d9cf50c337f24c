"""Speed of the DiT in vidgen and in diffusers, with the same random weights and inputs.

    python benchmarks/dit_vs_diffusers.py [--preset small] [--layers 8] [--rounds 5]
    python benchmarks/dit_vs_diffusers.py --preset wan-1.3b --device gpu --peak-tflops 989

Times a forward pass, and a training step: forward, backward and AdamW update. On CPUs in float32, with the
same number of threads for both; on a GPU with bfloat16 products and float32 weights, attention by cuDNN in
vidgen and by PyTorch's fused kernel in diffusers, and each block recomputed in the backward pass. `--remat`
is vidgen's remat policy. diffusers' model runs eagerly and with `torch.compile`; its AdamW is PyTorch's fused
one. First compares outputs and gradients. Contenders take turns. Each turn is one untimed and one timed call,
like consecutive training steps, because contenders in between may have taken the memory that the first call
uses. Needs the `parity` extra. The last line is one JSON object; ratios are the better of diffusers' medians
over vidgen's: above 1, vidgen is faster. `--preset tiny` is a smoke test; `dit_profile.py` gives the time by
kind of operation.
"""

import argparse
import collections
import dataclasses
import functools
import json
import os
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True, kw_only=True)
class Size:
    """Sizes of the model and of its inputs; `latents` is (frames, height, width)."""

    num_heads: int
    head_dim: int
    ffn_dim: int
    layers: int
    text_dim: int
    text_tokens: int
    latents: tuple[int, int, int]


PRESETS = {
    "small": Size(
        num_heads=8, head_dim=64, ffn_dim=2048, layers=8, text_dim=512, text_tokens=64, latents=(5, 32, 32)
    ),
    "wan-1.3b": Size(
        num_heads=12,
        head_dim=128,
        ffn_dim=8960,
        layers=30,
        text_dim=4096,
        text_tokens=512,
        latents=(21, 60, 104),
    ),
    "tiny": Size(
        num_heads=2, head_dim=64, ffn_dim=192, layers=2, text_dim=48, text_tokens=64, latents=(2, 8, 8)
    ),
}
"""`wan-1.3b` is Wan 2.1's smaller model at 480 x 832 pixels and 81 frames."""
CHANNELS = 16
LEARNING_RATE, WEIGHT_DECAY = 1e-5, 0.01

Calls = dict[str, Callable[[], Any]]
"""`forward` and `train_step`; both return when the work is done."""


def write(folder: pathlib.Path, size: Size) -> None:
    """Writes random weights as a diffusers folder."""
    import torch
    from diffusers.models.transformers.transformer_wan import WanTransformer3DModel

    torch.manual_seed(0)
    model = WanTransformer3DModel(
        num_attention_heads=size.num_heads,
        attention_head_dim=size.head_dim,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        text_dim=size.text_dim,
        ffn_dim=size.ffn_dim,
        num_layers=size.layers,
    )
    model.save_pretrained(folder)


def make_inputs(size: Size) -> dict[str, np.ndarray]:
    """Random inputs in vidgen's layout (`b t h w c`), and the target velocity."""
    rng = np.random.default_rng(0)
    inputs = {
        "latents": rng.normal(size=(1, *size.latents, CHANNELS)),
        "timestep": np.array([0.7]),
        "text": rng.normal(size=(1, size.text_tokens, size.text_dim)),
        "target": rng.normal(size=(1, *size.latents, CHANNELS)),
    }
    return {name: array.astype(np.float32) for name, array in inputs.items()}


class Diffusers:
    """Diffusers' model with its optimizer."""

    def __init__(self, folder: pathlib.Path, inputs: dict[str, np.ndarray], device: str, threads: int):
        import torch
        from diffusers.models.transformers.transformer_wan import WanTransformer3DModel

        torch.set_num_threads(threads)
        self.torch, self.device = torch, {"cpu": "cpu", "gpu": "cuda"}[device]
        model: Any = WanTransformer3DModel.from_pretrained(folder)
        self.model = model.to(self.device).train()
        if device == "gpu":
            self.model.enable_gradient_checkpointing()
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, fused=True
        )

        def put(x: np.ndarray) -> Any:
            return torch.from_numpy(np.ascontiguousarray(x)).to(self.device)

        self.latents, self.target = (
            put(inputs[name].transpose(0, 4, 1, 2, 3)) for name in ("latents", "target")
        )
        self.timestep, self.text = put(1000.0 * inputs["timestep"]), put(inputs["text"])

    def velocity(self, model: Any) -> Any:
        with self.torch.autocast("cuda", self.torch.bfloat16, enabled=self.device == "cuda"):
            return model(self.latents, self.timestep, self.text).sample

    def loss(self, model: Any) -> Any:
        return self.torch.nn.functional.mse_loss(self.velocity(model).float(), self.target)

    def outputs(self) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Velocity in vidgen's layout, and gradients of the loss by name."""
        with self.torch.no_grad():
            velocity = self.velocity(self.model).float().cpu().numpy().transpose(0, 2, 3, 4, 1)
        self.loss(self.model).backward()
        gradients = {name: p.grad.cpu().numpy() for name, p in self.model.named_parameters()}
        self.optimizer.zero_grad()
        return velocity, gradients

    def calls(self, *, compiled: bool) -> Calls:
        model = self.torch.compile(self.model) if compiled else self.model

        def forward() -> None:
            with self.torch.inference_mode():
                self.velocity(model)
            self._wait()

        def train_step() -> None:
            self.loss(model).backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self._wait()

        return {"forward": forward, "train_step": train_step}

    def _wait(self) -> None:
        if self.device == "cuda":
            self.torch.cuda.synchronize()


class Vidgen:
    """Vidgen's model with the same weights."""

    def __init__(self, folder: pathlib.Path, inputs: dict[str, np.ndarray], device: str, remat: str):
        import jax
        import jax.numpy as jnp
        import optax
        from flax import nnx

        from vidgen.core.streams import TEXT, Stream
        from vidgen.core.tokens import Tokens, patchify, unpatchify
        from vidgen.models.dit.diffusers_folder import load_diffusers
        from vidgen.models.dit.model import DiT
        from vidgen.nn.embeddings import grid_positions

        dit = load_diffusers(folder)
        options = {"dtype": "bfloat16", "attention": "cudnn"} if device == "gpu" else {}
        self.config = dataclasses.replace(dit.config, remat=remat, **options)
        self.params = nnx.split(dit, graph=False)[1]
        self.inputs = {name: jnp.asarray(array) for name, array in inputs.items()}
        self.optimizer = optax.adamw(LEARNING_RATE, weight_decay=WEIGHT_DECAY)

        def loss(config: Any, params: Any, inputs: dict[str, Any]) -> tuple[Any, Any]:
            inputs = dict(inputs)
            target = inputs.pop("target")
            graphdef = nnx.split(nnx.eval_shape(lambda: DiT(config, rngs=nnx.Rngs(0))), graph=False)[0]
            grid = config.token_grid(*target.shape[1:4])
            tokens = Tokens(patchify(inputs["latents"], config.patch_size), grid_positions(*grid)[None])
            streams = {TEXT: Stream(inputs["text"])}
            patches, _ = nnx.merge(graphdef, params)(tokens, inputs["timestep"][:, None], streams)
            velocity = unpatchify(patches, grid, config.patch_size)
            return jnp.square(velocity - target).mean(), velocity

        def train_step(params: Any, state: Any, inputs: dict[str, Any]) -> tuple[Any, Any]:
            gradients = jax.grad(self.loss, has_aux=True)(params, inputs)[0]
            updates, state = self.optimizer.update(gradients, state, params)
            return optax.apply_updates(params, updates), state

        self.loss = functools.partial(loss, self.config)
        self.forward = jax.jit(lambda params, inputs: self.loss(params, inputs)[1])
        self.train_step = jax.jit(train_step, donate_argnums=(0, 1))
        # For counting operations: plain attention, and no recomputation.
        self.plain_loss = functools.partial(
            loss, dataclasses.replace(self.config, attention="xla", remat="none")
        )

    def outputs(self) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Velocity, and gradients of the loss with diffusers' names and layout."""
        import jax

        from vidgen.core.tree import named_leaves
        from vidgen.models.dit.params import diffusers_names

        gradients, velocity = jax.jit(jax.grad(self.loss, has_aux=True))(self.params, self.inputs)
        leaves = named_leaves(gradients)
        mappings, external = diffusers_names(self.config, leaves), {}
        for path, leaf in leaves.items():
            mapping, array = mappings[path], np.asarray(leaf)
            layers = list(array) if mapping.stacked else [array]
            for name, layer in zip(mapping.external_shapes(array.shape), layers, strict=True):
                external[name] = mapping.to_external(layer)
        return np.asarray(velocity), external

    def calls(self) -> Calls:
        import jax

        state = [self.params, self.optimizer.init(self.params)]

        def train_step() -> None:
            state[:] = jax.block_until_ready(self.train_step(*state, self.inputs))

        return {
            "forward": lambda: jax.block_until_ready(self.forward(state[0], self.inputs)),
            "train_step": train_step,
        }

    def flops(self) -> dict[str, float]:
        """FLOPs of the matrix products in each call."""
        import jax

        from vidgen.preflight.flops import matmul_flops

        gradient = jax.grad(self.plain_loss, has_aux=True)
        calls = {"forward": self.plain_loss, "train_step": gradient}
        return {name: matmul_flops(jax.make_jaxpr(f)(self.params, self.inputs)) for name, f in calls.items()}


def errors(found: tuple[np.ndarray, dict], expected: tuple[np.ndarray, dict]) -> dict[str, float]:
    """Largest difference of the velocity, and largest relative error (L2) of a block's gradients."""
    error, norm = collections.Counter(), collections.Counter()
    for name, gradient in expected[1].items():
        block = ".".join(name.split(".")[:2]) if name.startswith("blocks.") else "others"
        error[block] += np.square(found[1][name] - gradient).sum(dtype=np.float64)
        norm[block] += np.square(gradient).sum(dtype=np.float64)
    return {
        "forward_max_abs": float(np.abs(found[0] - expected[0]).max()),
        "worst_block_gradient": max(float((error[block] / norm[block]) ** 0.5) for block in norm),
    }


def measure(contenders: dict[str, Calls], rounds: int) -> dict[str, dict[str, float]]:
    """Median seconds by contender and call; contenders take turns."""
    seconds: dict[str, dict[str, list[float]]] = {
        name: {call: [] for call in calls} for name, calls in contenders.items()
    }
    for index in range(rounds):
        for name, calls in contenders.items():
            for call, run in calls.items():
                run()
                start = time.perf_counter()
                run()
                seconds[name][call].append(time.perf_counter() - start)
        row = ", ".join(
            f"{name} " + " / ".join(f"{values[-1]:.3f}" for values in by_call.values())
            for name, by_call in seconds.items()
        )
        print(f"round {index + 1}, seconds of a forward pass / a training step: {row}", flush=True)
    return {
        name: {call: statistics.median(values) for call, values in by_call.items()}
        for name, by_call in seconds.items()
    }


def main() -> None:
    """Prints the differences, a row per round, and the JSON line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", choices=PRESETS, default="small")
    parser.add_argument("--layers", type=int, help="number of layers; default: the preset's")
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--remat", choices=("none", "dots", "full"), help="default: dots; full on GPUs")
    parser.add_argument("--no-compile", action="store_true", help="skip torch.compile")
    parser.add_argument("--peak-tflops", type=float, help="device peak, to report model FLOPs utilisation")
    arguments = parser.parse_args()
    if arguments.device == "gpu":
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # PyTorch needs memory too.
    size = PRESETS[arguments.preset]
    size = dataclasses.replace(size, layers=arguments.layers or size.layers)
    inputs = make_inputs(size)
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        write(folder, size)
        diffusers = Diffusers(folder, inputs, arguments.device, arguments.threads)
        remat = arguments.remat or {"cpu": "dots", "gpu": "full"}[arguments.device]
        vidgen = Vidgen(folder, inputs, arguments.device, remat)
    parity = errors(vidgen.outputs(), diffusers.outputs())
    print("differences: " + json.dumps(parity), flush=True)
    flops = vidgen.flops()
    contenders = {"vidgen": vidgen.calls(), "diffusers": diffusers.calls(compiled=False)}
    if not arguments.no_compile:
        contenders["diffusers_compiled"] = diffusers.calls(compiled=True)
    for name, calls in list(contenders.items()):
        start = time.perf_counter()
        try:
            for run in calls.values():
                run()
        except Exception as error:
            if name != "diffusers_compiled":
                raise
            print(f"torch.compile fails and is skipped: {error}"[:2000], flush=True)
            del contenders[name]
        print(f"{name}: first calls {time.perf_counter() - start:.1f} s", flush=True)
    median = measure(contenders, arguments.rounds)
    best = {
        call: min(by_call[call] for name, by_call in median.items() if name != "vidgen")
        for call in ("forward", "train_step")
    }
    result = {
        "preset": arguments.preset,
        "device": arguments.device,
        "layers": size.layers,
        "remat": remat,
        "threads": arguments.threads,
        "parity": parity,
        "seconds": median,
        "tflops_per_second": {
            name: {call: flops[call] / seconds / 1e12 for call, seconds in by_call.items()}
            for name, by_call in median.items()
        },
        "ratio_forward": best["forward"] / median["vidgen"]["forward"],
        "ratio_train_step": best["train_step"] / median["vidgen"]["train_step"],
    }
    if arguments.peak_tflops:
        result["model_flops_utilisation"] = {
            name: {call: rate / arguments.peak_tflops for call, rate in by_call.items()}
            for name, by_call in result["tflops_per_second"].items()
        }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
