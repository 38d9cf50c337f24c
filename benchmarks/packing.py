"""Fill of token rows: clips packed first-fit, in buckets, and padded to the longest.

  python benchmarks/packing.py [--num-clips 20000] [--tokens-per-row 65536] [--clips-per-row 64] [--window 64]

Clip sizes imitate a mix of images and camera footage and are drawn with a seed: aspect ratio, shorter side
and duration by the shares in the tables below, sides cropped to multiples of 16 pixels and durations to
1 + 4 n frames at 16 per second, so that every size is native. Token counts are for Wan's VAE and transformer:
4 x 8 x 8 pixels per latent, 1 x 2 x 2 latents per token. A clip longer than a packed row is truncated.

Methods to fill a batch; the figure is the share of tokens that belong to clips rather than padding:
  packed              packing as in training (`vidgen.data.packing`), full epochs.
  longest_of_batch    batches in shuffled order, each clip padded to the longest of its batch.
  buckets_by_length   batches of clips with similar lengths: bounds that double, padded to the bound.
  bucket_sizes        clips cropped and truncated to the nearest of a few sizes (`vidgen.data.buckets`): no
                      padding; the figure is the share of the clips' tokens that remain.
  longest_of_all      every clip padded to the longest of all.

Needs no accelerator. The last line is one JSON object.
"""

import argparse
import itertools
import json
import time

import numpy as np

from vidgen.data.packing import PackingOptions, plan_rows

ASPECTS = {16 / 9: 0.42, 9 / 16: 0.18, 4 / 3: 0.14, 1.0: 0.1, 3 / 4: 0.08, 2.39: 0.05, 3 / 2: 0.03}
SHORTER_SIDES = {256: 0.25, 360: 0.3, 480: 0.3, 720: 0.15}
IMAGES, MEDIAN_SECONDS, SPREAD = 0.3, 3.0, 0.7
"""Share of images; durations of videos are log-normal around the median, clipped to 1 to 10 seconds."""

FPS, PIXELS_PER_TOKEN, FRAMES_PER_TOKEN = 16, 16, 4
BUCKETS = tuple(
    (frames, height, width)
    for frames in (1, 17, 33, 65, 129)
    for height, width in ((256, 256), (256, 448), (448, 256), (480, 832), (832, 480), (640, 640))
)
"""(frames, height, width) of the buckets of `bucket_sizes`."""


def draw_sizes(count: int, tokens_per_row: int, seed: int = 0) -> tuple[np.ndarray, float]:
    """Frames, height and width of each clip, `n 3`, and the share of truncated clips."""
    rng = np.random.default_rng(seed)
    aspect = rng.choice(list(ASPECTS), count, p=list(ASPECTS.values()))
    side = rng.choice(list(SHORTER_SIDES), count, p=list(SHORTER_SIDES.values()))
    height = side * np.where(aspect < 1, 1 / aspect, 1)
    width = side * np.where(aspect > 1, aspect, 1)
    height, width = (x // PIXELS_PER_TOKEN * PIXELS_PER_TOKEN for x in (height, width))
    seconds = np.clip(MEDIAN_SECONDS * np.exp(SPREAD * rng.normal(size=count)), 1, 10)
    groups = np.where(rng.random(count) < IMAGES, 0, seconds * FPS // FRAMES_PER_TOKEN)
    area = height * width // PIXELS_PER_TOKEN**2
    room = tokens_per_row // area - 1
    truncated = float((groups > room).mean())
    return np.stack([1 + FRAMES_PER_TOKEN * np.minimum(groups, room), height, width], axis=-1).astype(
        int
    ), truncated


def count_tokens(sizes: np.ndarray) -> np.ndarray:
    """Number of tokens of clips with these sizes."""
    frames, height, width = sizes.T
    return (1 + (frames - 1) // FRAMES_PER_TOKEN) * (height // PIXELS_PER_TOKEN) * (width // PIXELS_PER_TOKEN)


def packed(lengths: np.ndarray, options: PackingOptions) -> dict[str, float]:
    """Figures of packing over two epochs, without the last window, which is not full."""
    start = time.monotonic()
    used = rows = clips = 0
    window: list[list[int]] = []
    for row in plan_rows(lengths.tolist(), options, seed=0, num_epochs=2):
        window.append(row)
        if len(window) == options.window:
            used += sum(int(lengths[index]) for index in itertools.chain.from_iterable(window))
            rows += len(window)
            clips += sum(map(len, window))
            window = []
    return {
        "filled": used / (rows * options.tokens_per_row),
        "clips_per_row": clips / rows,
        "plan_microseconds_per_clip": 1e6 * (time.monotonic() - start) / clips,
    }


def longest_of_batch(lengths: np.ndarray, batch_size: int) -> float:
    """Filled share with clips padded to the longest of their batch."""
    order = np.random.default_rng(1).permutation(lengths)
    batches = order[: len(order) // batch_size * batch_size].reshape(-1, batch_size)
    return float(batches.sum() / (batches.max(1) * batch_size).sum())


def buckets_by_length(lengths: np.ndarray) -> float:
    """Filled share with clips padded to the next bound; bounds double, up to the longest clip."""
    bounds = lengths.max() / 2.0 ** np.arange(12)[::-1]
    padded = np.ceil(bounds[np.searchsorted(bounds, lengths)])
    return float(lengths.sum() / padded.sum())


def bucket_sizes(sizes: np.ndarray) -> float:
    """Share of the clips' tokens that remain if each clip goes to the largest bucket that it covers."""
    buckets = np.asarray(BUCKETS)
    fits = (buckets[None] <= sizes[:, None]).all(-1)
    remaining = np.where(fits, count_tokens(buckets)[None], 0).max(1)
    return float(remaining.sum() / count_tokens(sizes).sum())


def main() -> None:
    """Prints the mix of clips, each method's filled share, and the JSON line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--num-clips", type=int, default=20_000)
    parser.add_argument("--tokens-per-row", type=int, default=65_536)
    parser.add_argument("--clips-per-row", type=int, default=64)
    parser.add_argument("--window", type=int, default=64, help="packed rows that are filled at a time")
    arguments = parser.parse_args()
    sizes, truncated = draw_sizes(arguments.num_clips, arguments.tokens_per_row)
    lengths = count_tokens(sizes)
    quartiles = np.percentile(lengths, [0, 25, 50, 75, 100]).astype(int).tolist()
    print(f"{len(sizes)} clips of {len(np.unique(sizes, axis=0))} sizes, {100 * truncated:.1f} % truncated")
    print(f"tokens per clip: {quartiles} (minimum, quartiles, maximum)")
    options = PackingOptions(
        tokens_per_row=arguments.tokens_per_row,
        clips_per_row=arguments.clips_per_row,
        window=arguments.window,
    )
    of_packed = packed(lengths, options)
    filled = {
        "packed": of_packed.pop("filled"),
        "longest_of_batch": longest_of_batch(lengths, batch_size=16),
        "buckets_by_length": buckets_by_length(lengths),
        "bucket_sizes": bucket_sizes(sizes),
        "longest_of_all": float(lengths.mean() / lengths.max()),
    }
    for name, share in filled.items():
        print(f"{name:<20}{100 * share:6.1f} %")
    values = {
        "filled": {name: round(share, 4) for name, share in filled.items()},
        **{name: round(value, 2) for name, value in of_packed.items()},
        "clips": len(sizes),
        "sizes": len(np.unique(sizes, axis=0)),
        "cut": round(truncated, 4),
        "tokens_quartiles": quartiles,
        "tokens_per_row": options.tokens_per_row,
        "window": options.window,
    }
    print(json.dumps(values))


if __name__ == "__main__":
    main()
