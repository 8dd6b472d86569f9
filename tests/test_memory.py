"""Peak memory is counted in bytes."""

import subprocess
import sys


def test_a_large_array_shows_in_the_peak() -> None:
    code = "from dmq_export.memory import peak_memory; array = b'x' * (256 * 2**20); print(peak_memory())"
    peak = int(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout)
    # Linux lets a child inherit its parent's peak, so there is no tight upper bound; the unit is what can be wrong
    assert 256 * 2**20 < peak < 256 * 2**30
