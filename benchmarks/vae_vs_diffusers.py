"""Speed and memory of Wan's video VAE in vidgen and in diffusers, with the same random weights and clip.

    python benchmarks/vae_vs_diffusers.py [--frames 17 --height 128 --width 128] [--rounds 5]

Both run in float32 with the same number of threads and take turns in one process; the peak memory of decoding
is measured in a separate process for each. First compares outputs. Needs the `parity` extra. The last line is
one JSON object; ratios are diffusers' figure over vidgen's: above 1, vidgen is better. `--variant 2.2` is Wan
2.2's VAE.
"""

import argparse
import json
import os
import pathlib
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import numpy as np

VARIANTS: dict[str, dict[str, Any]] = {
    "2.1": {},
    "2.2": {
        "base_dim": 160,
        "decoder_base_dim": 256,
        "z_dim": 48,
        "patch_size": 2,
        "is_residual": True,
        "in_channels": 12,
        "out_channels": 12,
        "scale_factor_spatial": 16,
        "latents_mean": [0.0] * 48,
        "latents_std": [1.0] * 48,
    },
}
"""Arguments of diffusers' `AutoencoderKLWan` for Wan's autoencoders."""
Coder = Callable[[np.ndarray], np.ndarray]


def write(folder: pathlib.Path, variant: str) -> None:
    """Writes random weights as a diffusers folder."""
    import torch
    from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan

    torch.manual_seed(0)
    vae = AutoencoderKLWan(**VARIANTS[variant])
    vae.decoder.conv_out.weight.data.mul_(0.1)  # diffusers clips what it decodes.
    vae.save_pretrained(folder)


def diffusers_coders(folder: pathlib.Path, threads: int) -> tuple[Coder, Coder]:
    """Diffusers' encoder, video `b t h w 3` to raw latents, and decoder."""
    import torch
    from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan

    torch.set_num_threads(threads)
    vae: Any = AutoencoderKLWan.from_pretrained(folder).eval()

    @torch.inference_mode()
    def encode(video: np.ndarray) -> np.ndarray:
        x = torch.from_numpy(np.ascontiguousarray(video.transpose(0, 4, 1, 2, 3)))
        return vae.encode(x).latent_dist.mode().numpy().transpose(0, 2, 3, 4, 1)

    @torch.inference_mode()
    def decode(latents: np.ndarray) -> np.ndarray:
        z = torch.from_numpy(np.ascontiguousarray(latents.transpose(0, 4, 1, 2, 3)))
        return vae.decode(z).sample.numpy().transpose(0, 2, 3, 4, 1)

    return encode, decode


def vidgen_coders(folder: pathlib.Path, _: int) -> tuple[Coder, Coder]:
    """Vidgen's encoder and decoder, streamed chunk by chunk as in `vidgen encode` and `vidgen decode`."""
    import jax.numpy as jnp

    from vidgen.models.video_vae import streaming
    from vidgen.models.video_vae.diffusers_folder import load_diffusers

    vae = load_diffusers(folder)

    def encode(video: np.ndarray) -> np.ndarray:
        frames = (video[:, index] for index in range(video.shape[1]))
        latents = jnp.concatenate(list(streaming.encode_stream(vae, frames)), axis=1)
        return np.asarray(vae.denormalise(latents))

    def decode(latents: np.ndarray) -> np.ndarray:
        normalised = vae.normalise(jnp.asarray(latents))
        blocks = streaming.decode_stream(vae, jnp.split(normalised, latents.shape[1], axis=1))
        return np.concatenate([np.asarray(block) for block in blocks], axis=1)

    return encode, decode


CODERS = {"diffusers": diffusers_coders, "vidgen": vidgen_coders}


def decoding_memory(name: str, folder: pathlib.Path, latents: np.ndarray, threads: int) -> float:
    """MiB by which decoding raises a separate process's peak over its resident set with loaded weights."""
    np.save(folder / "latents.npy", latents)
    command = [
        sys.executable,
        __file__,
        "--measure",
        name,
        "--folder",
        str(folder),
        "--threads",
        str(threads),
    ]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(result.stdout.split()[-1])


def measure_memory(name: str, folder: pathlib.Path, threads: int) -> None:
    """In a separate process: prints the MiB by which decoding raises the peak."""
    latents = np.load(folder / "latents.npy")
    decode = CODERS[name](folder, threads)[1]
    decode(latents[:, :1])  # One-time allocations.
    status = pathlib.Path("/proc/self/status").read_text()
    before = int(status.split("VmRSS:")[1].split()[0])
    decode(latents)
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)


def main() -> None:
    """Prints the differences, a row per round, and the JSON line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--variant", choices=VARIANTS, default="2.1")
    parser.add_argument("--frames", type=int, default=17)
    parser.add_argument("--height", type=int, default=128)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--measure", choices=CODERS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=pathlib.Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        measure_memory(arguments.measure, arguments.folder, arguments.threads)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        write(folder, arguments.variant)
        coders = {name: make(folder, arguments.threads) for name, make in CODERS.items()}
        shape = (1, arguments.frames, arguments.height, arguments.width, 3)
        video = np.random.default_rng(0).uniform(-1, 1, shape).astype(np.float32)
        latents = {name: coders[name][0](video) for name in coders}
        videos = {name: coders[name][1](latents["diffusers"]) for name in coders}
        errors = {
            what: float(np.abs(found["vidgen"] - found["diffusers"]).max() / found["diffusers"].std())
            for what, found in (("encode", latents), ("decode", videos))
        }
        print("largest difference, relative to the standard deviation: " + json.dumps(errors), flush=True)
        seconds: dict[tuple[str, int], list[float]] = {}
        for index in range(arguments.rounds):
            for name, pair in coders.items():
                for part, (coder, x) in enumerate(zip(pair, (video, latents["diffusers"]), strict=True)):
                    start = time.perf_counter()
                    coder(x)
                    seconds.setdefault((name, part), []).append(time.perf_counter() - start)
            row = ", ".join(f"{n} {('encode', 'decode')[p]} {s[-1]:.2f} s" for (n, p), s in seconds.items())
            print(f"round {index + 1}: {row}", flush=True)
        memory = {
            name: decoding_memory(name, folder, latents["diffusers"], arguments.threads) for name in coders
        }
    median = {key: statistics.median(values) for key, values in seconds.items()}
    result = {
        "variant": arguments.variant,
        "threads": arguments.threads,
        "max_error": errors,
        "seconds": {f"{n}_{('encode', 'decode')[p]}": value for (n, p), value in median.items()},
        "decode_mib": memory,
        "ratio_encode": median["diffusers", 0] / median["vidgen", 0],
        "ratio_decode": median["diffusers", 1] / median["vidgen", 1],
        "ratio_decode_memory": memory["diffusers"] / memory["vidgen"],
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
