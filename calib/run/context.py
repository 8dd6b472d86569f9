"""What the stages of a calibration share, and how each of them goes through its items.

A stage is made of items that are finished one by one. One that the work folder already has is not done again, and under
``torchrun`` each process does its share; so a stage computes what is missing, waits for the others, and then reads its
result from the folder, whoever made it.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from calib.device import evaluating
from calib.model.layers import LayerSelection
from calib.model.load import SourceModel
from calib.record.work_folder import WorkFolder
from calib.run.plan import CalibrationPlan
from calib.run.processes import ProcessGroup
from dmq_export.common.progress import Advance, Progress
from dmq_export.recipe import Recipe


@dataclass(frozen=True)
class RunContext:
    """A calibration under way: what is calibrated, how, and where results and progress go."""

    source: SourceModel
    selection: LayerSelection
    recipe: Recipe
    plan: CalibrationPlan
    device: torch.device
    progress: Progress
    work: WorkFolder
    processes: ProcessGroup

    def each(
        self,
        stage: str,
        unit: str,
        items: Mapping[str, int],
        compute: Callable[[str, Advance], None],
        has: Callable[[str], bool] | None = None,
    ) -> None:
        """Compute this process's share of ``items`` (with their sizes) that is not there, then wait for the others.

        Args:
            has: whether an item is there; None looks for its key in the work folder.
        """
        is_there = has or self.work.__contains__
        mine = self.processes.share(list(items))
        total = sum(items[key] for key in mine)
        with self.progress.stage(stage, total, unit) as advance, evaluating(self.device):
            for key in mine:
                if is_there(key):
                    advance(items[key])
                else:
                    compute(key, advance)
            self.processes.wait()
