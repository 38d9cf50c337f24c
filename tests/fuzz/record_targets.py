"""Array records: clips as TFDS writes them, and latents; whole files, and what is in a record."""

import contextlib
import pathlib
import random

import numpy as np
from array_record.python import array_record_module
from safetensors.numpy import load, save

from tests.data.conftest import numbered_frame
from tests.fuzz.mutate import damage_bytes, damage_json, damage_npy, damage_safetensors
from tests.fuzz.target import Target
from vidgen.data.latents_records import LatentClip, LatentRecords, RecordsInfo, write_latent_records
from vidgen.data.source import BrokenClip
from vidgen.data.tfds_builder import build_records
from vidgen.data.tfds_clips import ArrayRecordData, decode_record, encode_record

INFO = RecordsInfo(vae="runs/vae", encoder="0a", channels=3, spatial_factor=8, temporal_factor=4, fps=8.0)
CLIPS = 3


def _example(index: int) -> dict:
    return {
        "video": np.stack([numbered_frame(index + n, 16, 32) for n in range(3)]),
        "caption": f'"été" {index}',
        "name": f"clip-{index}",
        "boxes": np.ones((2, 4), np.float32),
    }


class _Clips:
    def __len__(self):
        return CLIPS

    def __getitem__(self, index):
        return _example(index)


def _read_all(source) -> None:
    for index in range(len(source)):
        with contextlib.suppress(BrokenClip):
            source[index]


def _read_clips(folder: pathlib.Path) -> None:
    data = ArrayRecordData(path=str(folder), num_frames=3, height=16, width=32, fps=8.0)
    _read_all(data.source())


def _make_record(folder: pathlib.Path) -> None:
    """One record by itself, as files, whose parts are damaged before it is put together."""
    record = encode_record(_example(0), fps=8.0, encoding="lossless")
    for name, value in record.items():
        (folder / name).write_bytes(value if isinstance(value, bytes) else value.encode())


def _read_record(folder: pathlib.Path) -> None:
    record = {path.name: path.read_bytes() for path in folder.iterdir()}
    decode_record(record, num_frames=3, fps=8.0, height=16, width=32)


def _make_latents(folder: pathlib.Path) -> None:
    rng = np.random.default_rng(0)
    clips = [
        LatentClip(
            latents=rng.normal(size=(*INFO.latent_size(5, 16, 24), 3)).astype(np.float32),
            caption=f'"été" {index}',
            name=f"clip-{index}",
            num_frames=5,
            height=16,
            width=24,
        )
        for index in range(CLIPS)
    ]
    write_latent_records(folder / "latents", iter(clips), INFO)


def _read_latents(folder: pathlib.Path) -> None:
    records = LatentRecords(folder / "latents")
    _read_all(records)
    for index in range(len(records)):
        t, h, w = records.sizes[index]
        assert min(records.info.latent_size(t, h, w)) > 0


def _damage_records(data: bytes, rng: random.Random, donor: bytes) -> bytes:
    """The records of a file written again, with one of them damaged: the checksums are right."""
    if rng.random() < 0.4:
        return damage_bytes(data, rng, donor)
    with _beside(data) as path:
        reader = array_record_module.ArrayRecordReader(str(path))
        records = reader.read_all()
        reader.close()
    chosen = rng.randrange(len(records))
    kind = rng.random()
    if kind < 0.7:
        records[chosen] = _damage_latents(records[chosen], rng, donor)
    elif kind < 0.8:
        del records[chosen]
    elif kind < 0.9:
        records.insert(chosen, records[chosen])
    else:
        records[chosen] = b""
    with _beside(b"") as path:
        writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1,uncompressed")
        for record in records:
            writer.write(record)
        writer.close()
        return path.read_bytes()


def _damage_latents(record: bytes, rng: random.Random, donor: bytes) -> bytes:
    tensors = load(record)
    kind = rng.random()
    if kind < 0.4:
        about = damage_json(tensors["about"].tobytes(), rng)
        return save({**tensors, "about": np.frombuffer(about, np.uint8)})
    if kind < 0.6:
        latents = tensors["latents"]
        other = rng.choice(
            (latents[:0], latents[0], latents.astype(np.float64), latents * np.float16("nan"), latents.T)
        )
        return save({**tensors, "latents": np.ascontiguousarray(other)})
    return damage_safetensors(record, rng, donor)


class _beside:
    """A file in memory's own folder, for a library that takes names only."""

    def __init__(self, data: bytes):
        self._data = data

    def __enter__(self) -> pathlib.Path:
        import tempfile

        self._folder = tempfile.TemporaryDirectory()
        path = pathlib.Path(self._folder.name) / "a.array_record"
        path.write_bytes(self._data)
        return path

    def __exit__(self, *_: object) -> None:
        self._folder.cleanup()


TARGETS = {
    "clip_records": Target(
        make=lambda folder: build_records({"train": _Clips()}, folder, fps=8.0, encoding="lossless"),
        damaged={"**/*.json": damage_json, "**/*.array_record*": damage_bytes},
        read=_read_clips,
    ),
    "clip_record": Target(
        make=_make_record,
        damaged={
            "metadata": damage_json,
            "clip": damage_bytes,
            "name": damage_bytes,
            "caption": damage_bytes,
        },
        read=_read_record,
        names=("clip-0", "record"),
    ),
    "latent_records": Target(
        make=_make_latents,
        damaged={
            "*/latents.json": damage_json,
            "*/sizes.npy": damage_npy,
            "*/*.array_record": _damage_records,
        },
        read=_read_latents,
    ),
}
