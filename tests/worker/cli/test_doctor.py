"""What `tweetscore doctor` reads from the files of running workers."""

from pathlib import Path

import pytest

from db.errors import TweetscoreError
from training.model.devices import claim_device
from worker.cli.doctor import describe_claims
from worker.process.heartbeat import Heartbeat
from worker.settings import Settings


def test_doctor_names_the_setting_when_more_scoring_workers_run_than_may_share_the_gpus(settings: Settings) -> None:
    assert describe_claims(settings) == "scoring workers: 0"
    beat = Heartbeat(settings.run, "scoring", lambda: "idle", lambda: None, lambda: None)
    beat._write()
    with pytest.raises(TweetscoreError, match=r"1 run, and 0 of them have a share.*GPU_SCORERS"):
        describe_claims(settings)
    assert _claimed(settings.run / "gpus") == "cuda:0"
    assert describe_claims(settings) == "scoring workers: 1"


def _claimed(folder: Path) -> str:
    return claim_device("auto", folder, "scoring", found=lambda _: ["GPU-a"])
