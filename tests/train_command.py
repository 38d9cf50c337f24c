"""`vidgen train` in its own process, on one device: programs that such runs have in common compile once."""

import subprocess
import sys


def train_command(config, workdir, *options):
    """Trains until the end, or fails with what the command wrote."""
    command = [sys.executable, "-m", "vidgen.cli.train", f"--config={config}", f"--workdir={workdir}"]
    result = subprocess.run([*command, *options], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
