"""One step under torch.profiler, with a range for each action of the pipeline and of the encoder."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, record_function

from k25sys.parallel.faults import Monitor
from k25sys.parallel.pipeline.ir import Action
from k25sys.parallel.pipeline.recorder import Recorder


class ProfiledRecorder(Recorder):
    """A recorder whose actions are ranges of the profiler: "0F3" is the forward of micro-batch 3 through stage 0."""

    @contextmanager
    def during(self, action: Action, monitor: Monitor | None = None) -> Iterator[None]:
        """See Recorder."""
        with record_function(str(action)), super().during(action, monitor):
            yield


@contextmanager
def profile(folder: Path, rank: int, step: int) -> Iterator[None]:
    """Writes folder/profile/step-S-rank-R.json, for ui.perfetto.dev."""
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])
    with torch.profiler.profile(activities=activities) as profiler:
        yield
    path = folder / "profile" / f"step-{step}-rank-{rank}.json"
    path.parent.mkdir(exist_ok=True)
    profiler.export_chrome_trace(str(path))
