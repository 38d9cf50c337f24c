from vidgen.train.metrics import MetricsWriter


def events(workdir):
    return [path.read_bytes() for path in sorted((workdir / "tensorboard").glob("events.*"))]


def test_what_is_written_is_on_disk_at_once_and_starts_without_lines_leave_no_file(tmp_path):
    MetricsWriter(tmp_path).close()
    assert not (tmp_path / "tensorboard").exists()
    writer = MetricsWriter(tmp_path)
    writer.write(1, {"loss": 0.5})  # not closed, as by a kill
    (board,) = events(tmp_path)
    assert b"loss" in board
    writer.write(2, {"later": 0.25})
    (board,) = events(tmp_path)
    assert b"later" in board
    assert (
        tmp_path / "metrics.jsonl"
    ).read_text() == '{"step": 1, "loss": 0.5}\n{"step": 2, "later": 0.25}\n'
    writer.close()
    MetricsWriter(tmp_path, resume_step=1).close()
    assert len(events(tmp_path)) == 1
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "loss": 0.5}\n'
