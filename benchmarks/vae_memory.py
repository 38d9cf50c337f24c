"""Peak memory of decoding videos of 5, 15 and 60 seconds, which should not grow with the duration.

    python benchmarks/vae_memory.py [--height 128 --width 128] [--seconds 5 15 60]

Each duration runs in a separate process: random latents through `decode_stream`, with every frame converted
to bytes and discarded, as a file writer does. `peak` is the largest resident set, `beside` its increase over
the resident set with the weights loaded. The last line is one JSON object.
"""

import argparse
import json
import pathlib
import resource
import subprocess
import sys

import numpy as np

FPS = 24


def decode(seconds: int, height: int, width: int, variant: str) -> None:
    """In a separate process: prints resident MiB before decoding, peak MiB, and the number of frames."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from vidgen.core import pixels
    from vidgen.models.video_vae import streaming
    from vidgen.models.video_vae.config import VARIANTS
    from vidgen.models.video_vae.model import VideoVAE

    vae = VideoVAE(VARIANTS[variant], rngs=nnx.Rngs(0))
    jax.block_until_ready(nnx.state(vae))
    status = pathlib.Path("/proc/self/status").read_text()
    before = int(status.split("VmRSS:")[1].split()[0])
    frames = streaming.padded_frames(seconds * FPS, vae.config.temporal_factor)
    count, *shape = vae.config.latent_shape(frames, height, width)
    random = np.random.default_rng(0)
    latents = (jnp.asarray(random.normal(size=(1, 1, *shape)), jnp.float32) for _ in range(count))
    made = 0
    for block in streaming.decode_stream(vae, latents, num_frames=seconds * FPS):
        made += len(np.asarray(pixels.to_uint8(block))[0])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps([before / 1024, peak / 1024, made]))


def main() -> None:
    """Prints a row per duration and the JSON line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--height", type=int, default=128)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--variant", default="small")
    parser.add_argument("--seconds", type=int, nargs="+", default=[5, 15, 60])
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        decode(arguments.one, arguments.height, arguments.width, arguments.variant)
        return
    size = [
        "--height",
        str(arguments.height),
        "--width",
        str(arguments.width),
        "--variant",
        arguments.variant,
    ]
    peaks, beside = {}, {}
    for seconds in arguments.seconds:
        command = [sys.executable, __file__, "--one", str(seconds), *size]
        result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        before, peak, frames = json.loads(result.stdout.splitlines()[-1])
        assert frames == seconds * FPS
        peaks[seconds], beside[seconds] = peak, peak - before
        video_mib = frames * arguments.height * arguments.width * 3 * 4 / 2**20
        print(
            f"{seconds:3d} s, {frames} frames ({video_mib:.0f} MiB in float32): peak {peak:.0f} MiB, "
            f"decoding adds {beside[seconds]:.0f} MiB",
            flush=True,
        )
    first, last = min(peaks), max(peaks)
    result = {
        "peak_mib": peaks,
        "beside_mib": beside,
        f"ratio_{last}s_{first}s": peaks[last] / peaks[first],
        f"ratio_beside_{last}s_{first}s": beside[last] / beside[first],
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
