"""What Polygraphy and TensorRT log is kept for our errors and off the user's streams."""

import logging

import pytest

from engines.tensorrt.runtime import captured_log

logger = pytest.importorskip("polygraphy.logger", reason="polygraphy is not installed").G_LOGGER


def test_the_log_is_captured_and_nothing_is_printed(capfd: pytest.CaptureFixture[str]) -> None:
    with captured_log() as lines:
        logger.verbose("what TensorRT calls information")
        logger.error("an error")
    assert [line.split("] ")[-1] for line in lines] == ["what TensorRT calls information", "an error"]
    captured = capfd.readouterr()
    assert (captured.out, captured.err) == ("", "")


def test_logging_is_as_before_afterwards(capfd: pytest.CaptureFixture[str]) -> None:
    ours = logging.getLogger("Polygraphy")
    before = (ours.level, ours.propagate, list(ours.handlers))
    with pytest.raises(RuntimeError), captured_log():
        raise RuntimeError
    assert (ours.level, ours.propagate, list(ours.handlers)) == before
    logger.error("printed again")
    assert "printed again" in capfd.readouterr().out
