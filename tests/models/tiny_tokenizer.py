"""A SentencePiece tokenizer of a few sentences, as T5's are."""

import io
import pathlib

import sentencepiece

TEXT = [
    "A red circle moves to the left on a blue background.",
    "Two dogs run over a green field while it rains.",
    "The camera follows a boat on a quiet lake at dawn.",
    "Il pleut à Zürich; 雨が降っています。",
]
SIZE = 55


def write_tokenizer(folder: pathlib.Path) -> pathlib.Path:
    """Writes `spiece.model` into `folder`, which is returned."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT * 5),
        model_writer=model,
        vocab_size=SIZE,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "spiece.model").write_bytes(model.getvalue())
    return folder
