"""metrics.csv: late columns, and what a resumed run keeps."""

from __future__ import annotations

import csv
import errno
import re
import resource
import shlex
from pathlib import Path

import pytest
from lightning.pytorch.loggers import WandbLogger

from t2i.errors import ConfigError
from t2i.training.loggers import MetricsCSV, TensorBoard, _wandb_id, _wandb_run, log_config, sync_command


def read(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_rows_can_be_read_while_the_run_goes_on(tmp_path):
    logger = MetricsCSV(tmp_path)
    for step in (1, 2):
        logger.log_metrics({"loss": step / 8}, step)
        assert read(tmp_path)[-1] == {"step": str(step), "loss": str(step / 8)}


def test_a_late_metric_gets_its_column_and_earlier_rows_stay(tmp_path):
    logger = MetricsCSV(tmp_path)
    logger.log_metrics({"loss": 0.5, "kl": 2.0}, 1)
    logger.log_metrics({"loss": 0.25, "generator": -1.0}, 2)
    logger.log_metrics({"loss": 0.125}, 3)
    assert read(tmp_path) == [
        {"step": "1", "loss": "0.5", "kl": "2.0", "generator": ""},
        {"step": "2", "loss": "0.25", "kl": "", "generator": "-1.0"},
        {"step": "3", "loss": "0.125", "kl": "", "generator": ""},
    ]


def test_a_resumed_run_drops_what_it_will_do_again(tmp_path):
    logger = MetricsCSV(tmp_path)
    for step in (10, 20, 30):
        logger.log_metrics({"loss": float(step)}, step)
    resumed = MetricsCSV(tmp_path, from_step=20)
    assert [row["step"] for row in read(tmp_path)] == ["10", "20"]
    resumed.log_metrics({"loss": 31.0}, 30)
    resumed.log_metrics({"loss": 41.0, "generator": 1.0}, 40)
    assert [(row["step"], row["loss"], row["generator"]) for row in read(tmp_path)] == [
        ("10", "10.0", ""),
        ("20", "20.0", ""),
        ("30", "31.0", ""),
        ("40", "41.0", "1.0"),
    ]


def test_a_late_column_never_leaves_half_a_table(tmp_path, monkeypatch):
    """Written beside it and put in its place: what stops in between leaves the old one."""
    logger = MetricsCSV(tmp_path)
    logger.log_metrics({"loss": 1.0}, 10)

    def crash(self, rows):
        raise KeyboardInterrupt

    monkeypatch.setattr(csv.DictWriter, "writerows", crash)
    with pytest.raises(KeyboardInterrupt):
        logger.log_metrics({"loss": 2.0, "kl": 1.0}, 20)
    assert read(tmp_path) == [{"step": "10", "loss": "1.0"}]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.csv"]


def test_a_row_that_a_crash_cut_is_dropped(tmp_path):
    logger = MetricsCSV(tmp_path)
    for step in (100, 120):
        logger.log_metrics({"loss": float(step)}, step)
    content = (tmp_path / "metrics.csv").read_text()
    for cut in range(1, len("120,120.0\n") + 1):
        (tmp_path / "metrics.csv").write_text(content[:-cut])
        MetricsCSV(tmp_path, from_step=150)
        assert read(tmp_path) == [{"step": "100", "loss": "100.0"}]


SETTINGS = {
    "seed": 10**30,
    "name": None,
    "optimizer": {"learning_rate": 1e-4, "betas": [0.9, 0.999]},
    "data": {"shards": [f"{i:05}.tar" for i in range(1_000)], "mixture": {}},
    "trainer": {"devices": 2, "precision": "32-true"},
    "flip": True,
}


def test_rows_that_a_full_disk_refuses_are_written_later(tmp_path, monkeypatch, caplog):
    logger = MetricsCSV(tmp_path)
    logger.log_metrics({"loss": 1.0}, 10)

    def refused(*args, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as full, caplog.at_level("WARNING", "t2i"):
        full.setattr(Path, "open", refused)
        logger.log_metrics({"loss": 2.0}, 20)
        logger.log_metrics({"loss": 3.0, "generator": 1.0}, 30)
    (said,) = (record.message for record in caplog.records)
    assert said.startswith(
        f"{tmp_path}/metrics.csv is not written: No space left on device; training goes on"
    )
    logger.log_metrics({"loss": 4.0}, 40)
    assert [row["loss"] for row in read(tmp_path)] == ["1.0", "2.0", "3.0", "4.0"]


@pytest.mark.parametrize(
    ("content", "left_out"),
    [
        (b"step,loss\n10,0.5\n\xff\xff,1\n20,0.25\n30\n40,1,2\n", 3),
        (b"step,loss\n10,0.5\n20,0.25\n\0\0\0\0\n", 1),  # what some file systems leave after a crash
        (b"step,loss\n10," + b"9" * 200_000 + b"\n", 2),
        (b"\0\0\n1,2\n", 1),
    ],
)
def test_rows_that_cannot_be_read_are_counted_and_kept_aside(tmp_path, caplog, content, left_out):
    (tmp_path / "metrics.csv").write_bytes(content)
    with caplog.at_level("WARNING", "t2i"):
        logger = MetricsCSV(tmp_path, from_step=100)
    (said,) = (record.message for record in caplog.records)
    assert said.startswith(f"{left_out} rows of {tmp_path}/metrics.csv cannot be read and are left out")
    (aside,) = tmp_path.glob("damaged_metrics_*.csv")
    assert aside.read_bytes() == content
    logger.log_metrics({"loss": 1.0}, 110)
    kept = ["10", "20"] if b"20,0.25" in content else []
    assert [row["step"] for row in read(tmp_path)] == [*kept, "110"]


def test_tensorboard_compares_runs_by_their_settings(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams import plugin_data_pb2

    logger = TensorBoard(tmp_path)
    log_config([MetricsCSV(tmp_path), logger], SETTINGS)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert events.Tags()["scalars"] == []  # no made-up metric
    content = events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    told = plugin_data_pb2.HParamsPluginData.FromString(content).session_start_info.hparams
    assert told["optimizer.learning_rate"].number_value == 1e-4
    assert told["trainer.precision"].string_value == "32-true"
    assert told["trainer.devices"].number_value == 2
    assert told["flip"].number_value == 1
    assert told["name"].string_value == "None"
    assert told["seed"].string_value == str(10**30)
    assert len(told["data.shards"].string_value) <= 500


def told_to_tensorboard(folder: Path) -> list[tuple[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars("loss")]


def test_tensorboard_has_each_step_once_however_often_a_run_is_started(tmp_path):
    """Each start but the last is killed: nothing is closed."""
    for from_step, steps in ((0, range(1, 7)), (4, range(5, 8)), (4, range(5, 10))):
        logger = TensorBoard(tmp_path, from_step)
        for step in steps:
            logger.log_metrics({"loss": float(step)}, step)
    assert told_to_tensorboard(tmp_path) == [(step, float(step)) for step in range(1, 10)]


def test_what_a_full_disk_refuses_of_tensorboards_files_is_written_later(tmp_path, caplog):
    """And training goes on; the disk takes a part of a record."""
    logger = TensorBoard(tmp_path)
    logger.log_metrics({"loss": 1.0}, 1)
    (path,) = (tmp_path / "tensorboard").glob("events.*")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 10, limits[1]))
        for step in (2, 3):
            logger.log_metrics({"loss": float(step)}, step)
            logger.save()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [record.message for record in caplog.records] == [
        f"{path} is not written: File too large; training goes on, and the rows are written when they can be"
    ]
    assert told_to_tensorboard(tmp_path) == [(1, 1.0)]
    logger.finalize("success")
    assert told_to_tensorboard(tmp_path) == [(step, float(step)) for step in (1, 2, 3)]


def test_a_run_folder_is_one_run_at_wandb_and_no_other_one(tmp_path):
    """Runs of the same name, on other machines, are others."""
    folders = [tmp_path / machine / "ldm" / "trial" for machine in ("a", "b")]
    for folder in folders:
        folder.mkdir(parents=True)
    ids = [_wandb_run(folder)[0] for folder in folders]
    assert ids[0] != ids[1]
    assert all(re.fullmatch("ldm-trial-[0-9a-f]{8}", each) for each in ids)
    folders[0].rename(tmp_path / "elsewhere")
    assert _wandb_run(tmp_path / "elsewhere", 150) == (ids[0], 150)
    assert _wandb_run(tmp_path / "elsewhere", 120) == (ids[0], 150)  # it got less far than the start before
    (tmp_path / "old" / "wandb").mkdir(parents=True)  # of a version that named it by its folder alone
    assert _wandb_run(tmp_path / "old")[0] == _wandb_id(tmp_path / "old")


def test_wandb_without_an_account_is_one_sentence(tmp_path, monkeypatch):
    errors = pytest.importorskip("wandb.errors")

    def nobody(self):
        raise errors.UsageError("No API key configured. Use `wandb login` to log in.")

    logger = WandbLogger(save_dir=tmp_path)
    monkeypatch.setattr(WandbLogger, "experiment", property(nobody))
    with pytest.raises(
        ConfigError, match=r"logger\.wandb is 'online': No API key .* log in; logger\.wandb=offline"
    ):
        log_config([logger], SETTINGS)


def test_wandb_ids_are_found_again_and_never_shared(tmp_path):
    names = ["trial", "a b", "a-b", "caf\u00e9", "cafe", "n" * 200, "n" * 201, "a=b", "a(b"]
    ids = [_wandb_id(tmp_path / "ldm" / name) for name in names]
    assert ids == [_wandb_id(tmp_path / "ldm" / name) for name in names]
    assert ids[0] == "ldm-trial"
    assert len(set(ids)) == len(ids)
    assert all(re.fullmatch("[A-Za-z0-9_-]{1,128}", each) for each in ids)


def test_the_parts_of_a_resumed_run_are_brought_to_wandb_together(tmp_path):
    folder = tmp_path / "it's a run"
    folder.mkdir()
    program, verb, flag, run_id, place = shlex.split(sync_command(folder))
    assert (program, verb, flag, run_id) == ("wandb", "sync", "--id", _wandb_run(folder)[0])
    assert place == f"{folder}/wandb/offline-run-*"


def test_a_run_resumed_before_anything_was_logged(tmp_path):
    MetricsCSV(tmp_path).log_metrics({"loss": 1.0}, 10)
    resumed = MetricsCSV(tmp_path, from_step=5)
    assert read(tmp_path) == []
    resumed.log_metrics({"loss": 2.0}, 6)
    assert read(tmp_path) == [{"step": "6", "loss": "2.0"}]
    MetricsCSV(tmp_path, from_step=6)
    assert read(tmp_path) == [{"step": "6", "loss": "2.0"}]
