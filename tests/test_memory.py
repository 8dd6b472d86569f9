"""Peak memory is counted in bytes."""

import subprocess
import sys


def test_a_large_array_shows_in_the_peak() -> None:
    code = "from dmq_export.memory import peak_memory as p; a = p(); b = b"x" * (256 * 2**20); print(p() - a)"
    grown = int(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout)
    assert 200 * 2**20 < grown < 320 * 2**20
